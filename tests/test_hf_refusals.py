"""Converters of Hugging Face checkpoints' weights: what is refused, and how; whatever comes, nothing crashes."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hf_cases import CASES, MUTATIONS, convert, make, mutated
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright import quant

# A case, a change of its tensors (their names with "_" for "."; NaN, inf, args(...), state(...) as below), and the
# message; "?" before it: NotImplementedError, "!": TypeError, otherwise ValueError.
BROKEN = [
    ("gptq-4", "qweight = qweight.long()", "from_gptq: qweight must be int32, got int64"),
    ("gptq-4", "qweight = qweight[0]", r"qweight must have shape \(any, any\)"),
    ("gptq-4", "qweight = None", "!qweight must be a tensor, got NoneType"),
    ("gptq-4", "qweight = qweight.to('meta')", "qweight must be a dense CPU tensor, got torch.strided on meta"),
    ("gptq-4", "qweight = qweight.to_sparse()", "qweight must be a dense CPU tensor, got torch.sparse_coo on cpu"),
    ("gptq-3", "qweight = qweight[:-1]", "qweight must have a multiple of 3 rows for 3 bits, got 14"),
    ("gptq-4", "qzeros = qzeros[:, :-1]", r"qzeros must have shape \(5, 12\), got \(5, 11\)"),
    ("gptq-4", "scales = scales[:-1]", r"qzeros must have shape \(4, 12\), got \(5, 12\)"),
    ("gptq-4", "scales = scales.double()", "scales must be float32 or float16 or bfloat16, got float64"),
    ("gptq-4", "scales[1, 3] = NaN", "scales contains NaN or infinity"),
    ("gptq-4", "scales[1, 3] = inf", "scales contains NaN or infinity"),
    ("gptq-4", "g_idx[7] = 5", r"g_idx must be in \[0, 5\), the groups that scales has, got 0 to 5"),
    ("gptq-4", "g_idx[7] = -1", r"g_idx must be in \[0, 5\), .* got -1 to 4"),
    ("gptq-4", "g_idx[7] = 2", r"g_idx must give every group the same number of columns, got \[31, 32, 33, 32, 32\]"),
    ("gptq-4", "g_idx = g_idx[:-1]", r"g_idx must have shape \(160\), got \(159,\)"),
    ("gptq-4", "g_idx = g_idx.float()", "g_idx must be int32 or int64, got float32"),
    ("gptq-4", "config['bits'] = 5", "bits must be 2, 3, 4 or 8, got 5"),
    ("awq", "qweight = qweight.short()", "from_awq: qweight must be int32, got int16"),
    ("awq", "qzeros = qzeros.t()", r"qzeros must have shape \(5, 12\), got \(12, 5\)"),
    ("awq", "scales = scales[:3]; qzeros = qzeros[:3]", "scales must have rows that divide K = 160, got 3"),
    ("awq", "scales = scales[:0]", "scales must have rows that divide K = 160, got 0"),
    ("llm-int8", "del SCB", r"!from_bitsandbytes: state\.SCB must be a tensor, got NoneType"),
    ("llm-int8", "SCB = SCB[:-1]", r"state\.SCB must have shape \(96\), got \(95,\)"),
    ("llm-int8", "SCB[3] = NaN", r"state\.SCB contains NaN"),
    ("llm-int8", "weight = weight[0]", r"weight must have shape \(any, any\)"),
    ("llm-int8", "weight_format.fill_(2)", r"?state\.weight_format 2 is not supported, only 0"),
    ("llm-int8", "config['llm_int8_threshold'] = -1", r"state\.threshold must be a number from 0, got -1"),
    ("nf4", "weight = weight[:-1]", "weight must hold 96 x 160 4-bit codes in 7680 bytes .* got 7679"),
    ("nf4", "weight_absmax = weight_absmax[:-1]", r"state\['absmax'\] must have shape \(240\), got \(239,\)"),
    ("nf4", "weight_absmax[0] = inf", r"state\['absmax'\] contains NaN or infinity"),
    ("nf4", "del weight_absmax", r"!state\['absmax'\] must be a tensor"),
    ("nf4", "del weight_quant_state_bitsandbytes__nf4", r"state\['quant_type'\] must be 'nf4' or 'fp4', got None"),
    ("nf4", "weight_quant_map += 0.1", r"?state\['quant_map'\] is not nf4's table"),
    ("nf4", "weight_quant_state_bitsandbytes__nf4[0] = 0", r"state\['quant_state.bitsandbytes__nf4'\] must be JSON"),
    ("nf4", "state(blocksize=0)", r"state\['blocksize'\] must be a positive integer, got 0"),
    ("nf4", "state(blocksize='64')", r"state\['blocksize'\] must be a positive integer, got '64'"),
    ("nf4", "state(shape=[96])", r"state\['shape'\] must be two positive integers, got \[96\]"),
    ("nf4", "state(shape=[96, 2**40])", r"state\['shape'\] must be two positive integers"),
    ("nf4", "state(shape=[96, 320])", r"state\['absmax'\] must have shape \(480\), got \(240,\)"),
    (
        "nf4",
        "state(shape=[640, 24])",
        "?groups of 8 columns of 24 are not supported; supported: multiples of 16, and a",
    ),
    ("nf4", "state(quant_type='af4')", r"state\['quant_type'\] must be 'nf4' or 'fp4', got 'af4'"),
    ("nf4-nested", "state(nested_blocksize=None)", r"state\['nested_blocksize'\] must be a positive integer"),
    ("nf4-nested", "state(nested_offset='0')", r"state\['nested_offset'\] must be a number, got '0'"),
    ("nf4-nested", "state(nested_offset=NaN)", r"state\['nested_offset'\] must be a number, got nan"),
    ("nf4-nested", "del weight_nested_quant_map", r"!state\['nested_quant_map'\] must be a tensor"),
    ("nf4-nested", "weight_absmax = weight_absmax.float()", r"state\['absmax'\] must be uint8, got float32"),
    ("hqq-4", "axis.fill_(0)", r"?meta\['axis'\] 0 is not supported: its groups run along the outputs"),
    ("hqq-4", "axis.fill_(2)", r"meta\['axis'\] must be 1"),
    ("hqq-4", "shape[0] = 98", "w_q must hold 15680 codes, got 7680 words of 2"),
    ("hqq-4", "shape[0] = -96", r"meta\['shape'\] must be two positive integers, got \[-96, 160\]"),
    ("hqq-4", "shape[0] = 2**62", r"meta\['shape'\] must be two positive integers"),
    ("hqq-4", "group_size.fill_(7)", r"meta\['group_size'\] must divide 96 \* 160, got 7"),
    ("hqq-4", "group_size.fill_(0)", r"meta\['group_size'\] must divide 96 \* 160, got 0"),
    ("hqq-4", "scale = scale[:-1]", r"meta\['scale'\] must have 480 elements, one a group, got \(479, 1\)"),
    ("hqq-4", "zero = zero.int()", r"meta\['zero'\] must be float32 or float16 or bfloat16, got int32"),
    ("hqq-4", "zero[5] = inf", r"meta\['zero'\] contains NaN or infinity"),
    ("hqq-4", "packing[0] = 55", r"?meta\['packing'\] '7bit_u8' is not supported; supported: 8bit_u8"),
    ("hqq-4", "W_q = W_q[:-1]", "w_q must hold 15360 codes, got 7648 words of 2"),
    ("hqq-3", "W_q = W_q.long()", "w_q must be int32, got int64"),
    ("hqq-3", "W_q = W_q[:-1]", "w_q must hold 15360 codes"),
    ("eetq", "weight = weight.t()", r"from_eetq: weight must have a multiple of 64 rows .* got \(32, 128\)"),
    ("eetq", "weight = weight.view(torch.uint8)", "weight must be int8, got uint8"),
    ("eetq", "weight_scales = weight_scales[1:]", r"scales must have shape \(32\), got \(31,\)"),
    ("eetq", "weight = weight[:0]", "multiple of 64 rows"),
    ("ct-int4-group", "del weight_scale", "expected a tensor weight_scale, got weight_packed, weight_shape"),
    ("ct-int4-group", "weight_shape[1] = 168", r"weight_packed must have shape \(96, 21\), got \(96, 20\)"),
    ("ct-int4-group", "weight_shape[0] = 97", r"weight_shape must fit weight_packed \(96, 20\), got \(97, 160\)"),
    ("ct-int4-group", "weight_shape[1] = -8", "weight_shape must fit weight_packed"),
    ("ct-int4-group", "weight_shape = weight_shape.float()", "weight_shape must be int32 or int64, got float32"),
    ("ct-int4-group", "weight_scale = weight_scale[:, 1:]", r"weight_scale must have shape \(96, 5\), got \(96, 4\)"),
    (
        "ct-int4-group",
        "weight_zero_point = torch.ones(96, 5)",
        r"weight_zero_point must be 0 where scheme\.weights\.sym",
    ),
    ("ct-int4-group-zeros", "del weight_zero_point", "expected a tensor weight_zero_point, got weight_scale"),
    (
        "ct-int4-group-zeros",
        "weight_zero_point = weight_zero_point[1:]",
        r"weight_zero_point must have shape \(12, 5\)",
    ),
    ("ct-int4-act-order", "weight_g_idx[0] = 99", r"weight_g_idx must be in \[0, 5\)"),
    ("ct-int4-act-order", "args(group_size=40)", r"weight_scale must have shape \(96, 4\)"),
    ("ct-int4-plain", "weight[3, 3] = 8", "weight must hold 4-bit codes, got some beyond"),
    ("ct-int8-zeros", "weight_zero_point = weight_zero_point.int()", "weight_zero_point must be int8, got int32"),
    ("ct-fp8-block", "weight = weight.view(torch.float8_e5m2)", "weight must be float8_e4m3fn, got float8_e5m2"),
    ("ct-fp8-block", "weight.view(torch.uint8)[70, 3] = 255", "from_compressed_tensors: weight contains NaN"),
    ("ct-int4-group", "args(num_bits=9)", r"scheme\.weights\.num_bits must be an integer from 1 to 8, got 9"),
    ("ct-int4-group", "args(num_bits='4')", r"scheme\.weights\.num_bits must be an integer from 1 to 8, got '4'"),
    ("ct-int4-group", "args(type='float')", r"?scheme\.weights\.num_bits: 4-bit floats are not supported"),
    ("ct-int4-group", "args(type='float', num_bits=8)", r"'pack-quantized' holds integers, but scheme\.weights\.type"),
    ("ct-fp8-block", "args(type='int')", r"'float-quantized' holds floats, but scheme\.weights\.type is 'int'"),
    ("ct-fp8-block", "args(symmetric=False)", r"?scheme\.weights\.symmetric: floats with a zero point"),
    ("ct-int4-group", "args(type='complex')", r"scheme\.weights\.type must be 'int' or 'float', got 'complex'"),
    ("ct-int4-group", "args(strategy='tensor_group')", r"?scheme\.weights\.strategy 'tensor_group' is not supported"),
    ("ct-int4-group", "args(strategy=['group'])", r"?scheme\.weights\.strategy \['group'\] is not supported"),
    (
        "ct-int4-group",
        "args(group_size=0)",
        r"scheme\.weights\.group_size must be positive for strategy 'group', got 0",
    ),
    ("ct-int4-group", "args(group_size=2.5)", r"scheme\.weights\.group_size must be a positive integer, -1 or null"),
    ("ct-int4-group", "args(group_size=64)", r"weight_scale must have shape \(96, 3\), got \(96, 5\)"),
    ("ct-int4-group", "args(symmetric='yes')", r"scheme\.weights\.symmetric must be true or false, got 'yes'"),
    ("ct-fp8-block", "args(block_structure=[0, 3])", r"scheme\.weights\.block_structure must be two positive integers"),
    ("ct-fp8-block", "args(block_structure='8 by 8')", r"scheme\.weights\.block_structure must be two positive"),
    ("ct-fp8-block", "args(block_structure=None)", r"scheme\.weights\.block_structure must be two positive integers"),
    (
        "ct-fp8-block",
        "config['format'] = 'nvfp4-pack-quantized'",
        r"?scheme\.format 'nvfp4-pack-quantized' is not supp",
    ),
    ("fp8-block", "weight_scale_inv = weight_scale_inv[1:]", r"scale must have shape \(3, 3\) for blocks of 32 x 64"),
    ("fp8-block", "weight_scale_inv = weight_scale_inv.double()", "scale must be float32 or .*, got float64"),
    ("fp8-block", "weight.view(torch.uint8)[1, 1] = 127", "from_fp8: weight contains NaN"),
    ("fp8-block", "weight_scale_inv[0, 0] = NaN", "scale contains NaN"),
    ("fp8-e8m0", "weight_scale_inv.view(torch.uint8)[0, 0] = 255", "scale contains NaN"),
    ("fp8-tensor", "weight_scale_inv = torch.ones(2, 2, 2)", "scale must have shape"),
    ("fp8-tensor", "weight_scale_inv = torch.ones(5)", r"scale must have 1 element, or shape \(96,\) or \(96, 1\)"),
    ("fp8-block", "config['weight_block_size'] = [32, 24]", r"scale must have shape \(3, 7\)"),
    ("fp8-block", "config['weight_block_size'] = [32, True]", "block_size must be two positive integers"),
]


@pytest.mark.parametrize("case", range(len(BROKEN)), ids=lambda i: f"{BROKEN[i][0]}: {BROKEN[i][1]}")
def test_refuses(case: int) -> None:
    name, change, message = BROKEN[case]
    stored = make(name)
    names = {part.replace(".", "_"): part for part in stored.tensors}
    local: dict[str, Any] = {short: stored.tensors[part] for short, part in names.items()}

    def state(**changes: Any) -> None:
        key = "weight_quant_state_bitsandbytes__nf4"
        entries = {**json.loads(bytes(local[key].numpy())), **changes}
        local[key] = torch.tensor(list(json.dumps(entries).encode()), dtype=torch.uint8)

    def args(**changes: Any) -> None:
        stored.config["config_groups"]["group_0"]["weights"].update(changes)

    given_names = {"torch": torch, "NaN": torch.nan, "inf": torch.inf, "config": stored.config}
    exec(change, {**given_names, "state": state, "args": args}, local)
    stored.tensors = {names.get(short, short): value for short, value in local.items()}
    error = {"?": NotImplementedError, "!": TypeError}.get(message[0], ValueError)
    with pytest.raises(error, match=message.lstrip("?!")) as caught:
        convert(stored)
    assert type(caught.value) is error


def test_refuses_arguments() -> None:
    t = make("gptq-4").tensors
    with pytest.raises(ValueError, match="zero_offset must be 0 or 1"):
        quant.from_gptq(t["qweight"], t["qzeros"], t["scales"], None, 4, zero_offset=2)
    with pytest.raises(ValueError, match="scales must have rows that divide K = 160 where there is no g_idx, got 3"):
        quant.from_gptq(t["qweight"], t["qzeros"][:3], t["scales"][:3], None, 4, zero_offset=1)
    t = make("awq").tensors
    with pytest.raises(NotImplementedError, match="bits must be 4, got 8"):
        quant.from_awq(t["qweight"], t["qzeros"], t["scales"], 8)
    with pytest.raises(TypeError, match="state must be a QuantState or a dict, got list"):
        quant.from_bitsandbytes(torch.zeros(8, dtype=torch.uint8), [])
    with pytest.raises(TypeError, match="meta must be a dict"):
        quant.from_hqq(torch.zeros(8, 8, dtype=torch.uint8), None)
    with pytest.raises(ValueError, match=r"scheme\.weights must be an object"):
        quant.from_compressed_tensors({}, {"format": "pack-quantized"})
    with pytest.raises(NotImplementedError, match="groups of 24 columns of 96"):
        quant.from_fp8(torch.zeros(32, 96).to(torch.float8_e4m3fn), torch.ones(1, 4), (32, 24))


@given(
    st.sampled_from([name for name in CASES if CASES[name][1][1] < 1000]), st.lists(MUTATIONS, min_size=1, max_size=3)
)
@settings(max_examples=300, deadline=None)
def test_broken_tensors_never_crash(name: str, mutations: list[tuple[int, str, int]]) -> None:
    """Whatever is wrong with the tensors: an error that says so, or a weight of some values."""
    stored = make(name)
    for which, kind, number in mutations:
        part = sorted(stored.tensors)[which % len(stored.tensors)]
        stored.tensors[part] = mutated(stored.tensors[part], kind, number)
    try:
        weight = convert(stored)
    except (ValueError, TypeError, NotImplementedError) as error:
        assert "from_" in str(error)
        return
    assert weight.dequantize().shape == weight.shape
