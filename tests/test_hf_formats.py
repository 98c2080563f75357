"""Converters of Hugging Face checkpoints' weights: each format against its definition, element by element."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import hf_packers as packers
import numpy as np
import pytest
import torch
from hf_cases import CASES, convert, hqq_meta, make

from tilewright import quant
from tilewright.quant.bitstream import unpack_bits


@pytest.mark.parametrize("name", CASES)
def test_means_what_the_format_says(name: str) -> None:
    """Every element is the definition's value, rounded to float32 at most once."""
    stored = make(name)
    _, shape, becomes, most_bits = CASES[name]
    weight = convert(stored)
    assert weight.shape == shape
    assert weight.format.split(" ")[0] == becomes
    assert torch.equal(weight.dequantize(), stored.w.float())
    bits = 8 * weight.nbytes / (-(-shape[0] // 32) * 32 * shape[1])
    assert bits <= most_bits, f"{bits:.2f} bits a weight"


def test_group_of_ordered_columns_is_kept() -> None:
    """Act-order: the columns are sorted by group, stably, and the order stays with the weight."""
    stored = packers.gptq(np.random.default_rng(0), 32, 96, act_order=True)
    order = stored.tensors["g_idx"].long().argsort(stable=True)
    assert torch.equal(convert(stored).columns, order)
    stored = packers.gptq(np.random.default_rng(0), 32, 96)
    assert convert(stored).columns is None
    whole = convert(stored).dequantize()
    stored.tensors["g_idx"] = None  # groups of consecutive columns
    assert torch.equal(convert(stored).dequantize(), whole)


def test_quant_state_objects() -> None:
    """bitsandbytes' QuantState, by its as_dict(), and names with the module's "weight."."""
    stored = packers.four_bit(np.random.default_rng(0), 32, 128, nested=256)
    t = dict(stored.tensors)
    weight = t.pop("weight")

    class State:
        def as_dict(self) -> dict[str, Any]:
            inner = json.loads(bytes(t["weight.quant_state.bitsandbytes__nf4"].numpy()))
            return {
                "quant_type": "nf4",
                "shape": tuple(inner["shape"]),
                "blocksize": 64,
                "absmax": t["weight.absmax"],
                "quant_map": t["weight.quant_map"],
                "nested_absmax": t["weight.nested_absmax"],
                "nested_quant_map": t["weight.nested_quant_map"],
                "nested_blocksize": 256,
                "nested_offset": inner["nested_offset"],
            }

    bare = {name.removeprefix("weight."): value for name, value in t.items()}
    for state in (t, bare, State(), State().as_dict()):
        for same in (weight, weight.view(-1), weight.view(-1).view(torch.bfloat16), weight.view(torch.int8)):
            assert torch.equal(quant.from_bitsandbytes(same, state).dequantize(), stored.w.float())


def test_llm_int8_threshold() -> None:
    stored = packers.llm_int8(np.random.default_rng(0), 32, 64)
    weight, scb = stored.tensors["weight"], stored.tensors["SCB"]
    assert quant.from_bitsandbytes(weight, {"SCB": scb}).outlier_threshold == 0.0
    assert quant.from_bitsandbytes(weight, {"SCB": scb, "threshold": 6}).outlier_threshold == 6.0
    state = SimpleNamespace(SCB=scb, threshold=4.5)  # bitsandbytes' MatmulLtState
    assert quant.from_bitsandbytes(weight, state).outlier_threshold == 4.5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["both", "scale", "zero"])
def test_hqq_quantised_metadata(kind: str, dtype: torch.dtype) -> None:
    """Scales and zeros that HQQ quantised themselves, in 8 bits: of groups along axis 0, and one for all."""
    rng = np.random.default_rng(0)
    stored = packers.hqq(rng, 96, 128, group=64, dtype=dtype)
    meta = hqq_meta(stored.tensors)
    values = {"scale": meta["scale"], "zero": meta["zero"]}
    if kind in ("both", "scale"):
        codes = rng.integers(0, 256, (64, 3))
        inner = {"scale": packers.tensor(rng.uniform(1e-4, 2e-4, (1, 3)), dtype), "zero": torch.zeros(1, 3).to(dtype)}
        meta["scale_q"] = packers.tensor(codes, torch.uint8)
        meta["meta_scale"] = {**inner, "axis": 0, "group_size": 64, "packing": "8bit_u8", "compute_dtype": dtype}
        values["scale"] = ((packers.tensor(codes, dtype) - inner["zero"]) * inner["scale"]).reshape(-1, 1)
        meta["quant_scale"] = True
        del meta["scale"]
    if kind in ("both", "zero"):
        codes = rng.integers(0, 256, (192, 1))
        inner = {"scale": torch.tensor(0.05, dtype=dtype), "zero": torch.tensor(1.5, dtype=dtype)}
        meta["zero_q"] = packers.tensor(codes, torch.uint8)
        meta["meta_zero"] = {**inner, "axis": 0, "group_size": None, "packing": "8bit_u8", "compute_dtype": dtype}
        values["zero"] = (packers.tensor(codes, dtype) - inner["zero"]) * inner["scale"]
        meta["quant_zero"] = True
        del meta["zero"]
    codes = quant.from_hqq(stored.tensors["W_q"], {**hqq_meta(stored.tensors), "scale": torch.ones(192, 1).half(),
                                                   "zero": torch.zeros(192, 1).half()}).dequantize()  # fmt: skip
    expected = (codes.double().view(-1, 64) - values["zero"].double()) * values["scale"].double()
    assert torch.equal(quant.from_hqq(stored.tensors["W_q"], meta).dequantize(), expected.float().view(96, 128))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_hqq_words_viewed_as_floats(bits: int, dtype: torch.dtype) -> None:
    stored = packers.hqq(np.random.default_rng(0), 96, 128, bits=bits)
    meta = {**hqq_meta(stored.tensors), "view_as_float": True}
    assert torch.equal(quant.from_hqq(stored.tensors["W_q"].view(dtype), meta).dequantize(), stored.w.float())


def test_plain_int8_and_fp8() -> None:
    rng = np.random.default_rng(0)
    codes = packers.tensor(rng.integers(-128, 128, (33, 50)), torch.int8)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        scale = packers.tensor(rng.uniform(0.01, 0.02, 33), dtype)
        exact = (codes.double() * scale.double()[:, None]).float()
        assert torch.equal(quant.from_int8(codes, scale).dequantize(), exact)
        assert torch.equal(quant.from_int8(codes, scale[:, None]).dequantize(), exact)
    raw = packers.tensor(np.arange(33 * 50) % 256, torch.uint8).view(33, 50)
    raw[(raw & 0x7F) == 0x7F] = 0
    weight = raw.view(torch.float8_e4m3fn)
    for scale in (torch.tensor(0.3), torch.tensor([0.3]), torch.rand(33), torch.rand(33, 1).bfloat16()):
        exact = (weight.double() * scale.double().reshape(-1, 1)).float()
        assert torch.equal(quant.from_fp8(weight, scale).dequantize(), exact)
    bytes_of = torch.tensor([[120, 127], [130, 110]], dtype=torch.uint8)
    exact = (
        weight.double() * (2.0 ** (bytes_of.double() - 127)).repeat_interleave(32, 0).repeat_interleave(32, 1)[:33, :50]
    )
    assert torch.equal(quant.from_fp8(weight, bytes_of, (32, 32)).dequantize(), exact.float())


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 7, 8, 9, 31, 32, 33, 100])
def test_streams_of_bits(bits: int, count: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 2**bits, (3, count))
    words = packers.tensor(packers.stream(codes, bits))
    assert torch.equal(unpack_bits(words, bits, count), packers.tensor(codes, torch.uint8))
