"""Cases of every Hugging Face format, the converter for each, and ways to break their tensors."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import hf_packers as packers
import numpy as np
import torch
from hf_packers import Stored
from hypothesis import strategies as st
from torch import Tensor

from tilewright import quant
from tilewright.quant import QuantizedWeight


def convert(stored: Stored) -> QuantizedWeight:
    """As the loader does it."""
    t, config = dict(stored.tensors), stored.config
    match config["quant_method"]:
        case "gptq":
            offset = 1 if config["checkpoint_format"] == "gptq" else 0
            return quant.from_gptq(
                t["qweight"], t["qzeros"], t["scales"], t["g_idx"], config["bits"], zero_offset=offset
            )
        case "awq":
            return quant.from_awq(t["qweight"], t["qzeros"], t["scales"])
        case "bitsandbytes":
            return quant.from_bitsandbytes(t.pop("weight"), {**t, "threshold": config.get("llm_int8_threshold")})
        case "hqq":
            return quant.from_hqq(t["W_q"], hqq_meta(t))
        case "eetq":
            return quant.from_eetq(t["weight"], t["weight_scales"])
        case "compressed-tensors":
            return quant.from_compressed_tensors(t, ct_scheme(config))
        case "fp8":
            return quant.from_fp8(t["weight"], t["weight_scale_inv"], config["weight_block_size"])
    raise AssertionError(config)


def hqq_meta(t: dict[str, Tensor]) -> dict[str, Any]:
    plain = {name: t[name].tolist() for name in ("axis", "shape", "group_size") if t.get(name) is not None}
    packing = (
        None if t["packing"] is None else bytes(t["packing"].reshape(-1).view(torch.uint8).numpy()).decode("latin-1")
    )
    return {**plain, "packing": packing, "scale": t["scale"], "zero": t["zero"]}


def ct_scheme(config: dict[str, Any]) -> dict[str, Any]:
    return {**config["config_groups"]["group_0"], "format": config["format"]}


gptq, awq, hqq, fp8, four_bit = packers.gptq, packers.awq, packers.hqq, packers.fp8, packers.four_bit
ct = packers.compressed_tensors
CASES: dict[str, tuple[Callable[..., Stored], tuple[int, int], str, float]] = {
    # name: how it is made, its shape, what it becomes, the most bits a weight
    "gptq-2": (partial(gptq, bits=2), (96, 160), "int4_g32_zero", 5),
    "gptq-3": (partial(gptq, bits=3), (96, 160), "int4_g32_zero", 5),
    "gptq-4": (gptq, (96, 160), "int4_g32_zero", 5),
    "gptq-8": (partial(gptq, bits=8), (96, 160), "int8_g32_zero", 9),
    "gptq-8-v2": (partial(gptq, bits=8, version=2), (96, 160), "int8_g32_zero", 9),
    "gptq-4-256-zero": (partial(gptq, largest_zero=True), (96, 160), "int4_g32_zero", 5),
    "gptq-8-256-zero": (partial(gptq, bits=8, largest_zero=True), (96, 160), "int8_g32_min", 10.1),
    "gptq-4-v2": (partial(gptq, version=2), (96, 160), "int4_g32_zero", 5),
    "gptq-3-v2-symmetric": (partial(gptq, bits=3, version=2, symmetric=True), (96, 160), "int4_g32", 4.6),
    "gptq-2-symmetric": (partial(gptq, bits=2, symmetric=True), (96, 160), "int4_g32", 4.6),
    "gptq-8-symmetric": (partial(gptq, bits=8, symmetric=True), (96, 160), "int8_g32", 8.6),
    "gptq-act-order": (partial(gptq, act_order=True), (96, 160), "int4_g32_zero", 5),
    "gptq-3-act-order": (partial(gptq, bits=3, act_order=True, group=64), (64, 160), "int4_g64_zero", 5),
    "gptq-8-act-order-row": (partial(gptq, bits=8, act_order=True, group=-1), (96, 160), "int8_row_zero", 8.3),
    "gptq-short-group": (partial(gptq, group=128), (96, 160), "int4_g128_zero", 4.4),
    "gptq-group-48": (partial(gptq, group=48), (64, 96), "int4_g16_zero", 5.6),
    "gptq-bf16-scales": (partial(gptq, scale=torch.bfloat16), (96, 160), "int4_g32_zero", 5),
    "gptq-fp32-scales": (partial(gptq, scale=torch.float32), (96, 160), "int4_g32_zero", 5.4),
    "gptq-many-pieces": (partial(gptq, group=128), (96, 8192), "int4_g128_zero", 4.3),
    "awq": (awq, (96, 160), "int4_g32_zero", 5),
    "awq-128": (partial(awq, group=128), (40, 256), "int4_g128_zero", 5.8),
    "awq-row": (partial(awq, group=96), (32, 96), "int4_row_zero", 5),
    "awq-symmetric": (partial(awq, symmetric=True), (96, 160), "int4_g32", 4.6),
    "awq-many-pieces": (partial(awq, group=64), (96, 8192), "int4_g64_zero", 4.5),
    "llm-int8": (packers.llm_int8, (96, 160), "int8_row", 8.4),
    "nf4": (four_bit, (96, 160), "nf4_g32", 5.1),
    "nf4-aligned": (four_bit, (96, 128), "nf4_g64", 4.6),
    "nf4-nested": (partial(four_bit, nested=256), (96, 128), "nf4_g64", 4.6),
    "nf4-nested-crossing": (partial(four_bit, nested=64, blocksize=128), (96, 160), "nf4_g32", 5.1),
    "nf4-block-over-rows": (partial(four_bit, blocksize=4096), (96, 64), "nf4_row", 4.6),
    "nf4-one-short-block": (partial(four_bit, blocksize=2048), (3, 33), "nf4_row", 60),
    "nf4-group-16": (partial(four_bit, blocksize=64), (32, 48), "nf4_g16", 8.1),
    "nf4-many-pieces": (partial(four_bit, nested=256), (96, 8192), "nf4_g64", 4.6),
    "fp4": (partial(four_bit, kind="fp4"), (96, 160), "fp4_g32", 5.1),
    "fp4-nested": (partial(four_bit, kind="fp4", blocksize=32, nested=128), (96, 160), "fp4_g32", 5.1),
    "hqq-8": (partial(hqq, bits=8), (96, 160), "int8_g32_min", 10.1),
    "hqq-6": (partial(hqq, bits=6), (96, 160), "int8_g32_min", 10.1),
    "hqq-5": (partial(hqq, bits=5, group=64), (96, 128), "int8_g64_min", 9.1),
    "hqq-4": (hqq, (96, 160), "int4_g32_min", 6.1),
    "hqq-4-odd-rows": (hqq, (33, 64), "int4_g32_min", 12),
    "hqq-4-crossing": (partial(hqq, group=64), (96, 160), "int4_g32_min", 6.1),
    "hqq-4-row": (partial(hqq, group=None), (96, 160), "int4_row_min", 4.5),
    "hqq-4-bf16": (partial(hqq, dtype=torch.bfloat16, group=64), (96, 128), "int4_g64_min", 5.1),
    "hqq-3": (partial(hqq, bits=3), (96, 160), "int4_g32_min", 6.1),
    "hqq-3-tens": (partial(hqq, bits=3, group=16), (40, 80), "int4_g16_min", 14),
    "hqq-2": (partial(hqq, bits=2, group=16), (96, 160), "int4_g16_min", 8.1),
    "hqq-1": (partial(hqq, bits=1), (96, 160), "int4_g32_min", 6.1),
    "hqq-many-pieces": (partial(hqq, bits=3, group=64), (96, 8192), "int4_g64_min", 5.1),
    "eetq": (packers.eetq, (32, 128), "int8_row", 8.4),
    "eetq-wide": (packers.eetq, (96, 8192), "int8_row", 8.1),
    "ct-int4-group": (ct, (96, 160), "int4_g32", 4.6),
    "ct-int4-group-zeros": (partial(ct, symmetric=False), (96, 160), "int4_g32_zero", 5),
    "ct-int4-channel": (partial(ct, strategy="channel"), (96, 160), "int4_row", 4.3),
    "ct-int4-channel-zeros": (partial(ct, strategy="channel", symmetric=False), (96, 160), "int4_row_zero", 4.3),
    "ct-int4-act-order": (partial(ct, act_order=True), (96, 160), "int4_g32", 4.6),
    "ct-int4-fp32-scales": (partial(ct, scale=torch.float32), (96, 160), "int4_g32", 5.1),
    "ct-int4-odd": (partial(ct, group=16, symmetric=False), (33, 48), "int4_g16_zero", 12),
    "ct-int8-packed": (partial(ct, bits=8, group=64), (96, 192), "int8_g64", 8.4),
    "ct-int8-packed-zeros": (partial(ct, bits=8, symmetric=False), (96, 160), "int8_g32_zero", 9),
    "ct-int2-packed": (partial(ct, bits=2), (96, 160), "int4_g32", 4.6),
    "ct-int3-packed-zeros": (partial(ct, bits=3, symmetric=False), (96, 160), "int4_g32_zero", 5),
    "ct-int5-packed": (partial(ct, bits=5), (96, 160), "int5_g32", 5.6),
    "ct-int6-packed-zeros": (partial(ct, bits=6, symmetric=False), (96, 160), "int6_g32_zero", 7),
    "ct-int7-packed": (partial(ct, bits=7), (96, 160), "int8_g32", 8.6),
    "ct-int8-channel": (partial(ct, form="int-quantized", bits=8, strategy="channel"), (96, 160), "int8_row", 8.4),
    "ct-int8-tensor": (partial(ct, form="int-quantized", bits=8, strategy="tensor"), (96, 160), "int8_row", 8.4),
    "ct-int8-zeros": (
        partial(ct, form="int-quantized", bits=8, strategy="channel", symmetric=False), (96, 160), "int8_row_zero", 8.4
    ),
    "ct-int8-block": (partial(ct, form="naive-quantized", bits=8, strategy="block"), (80, 160), "int8_g32", 10.5),
    "ct-int4-plain": (partial(ct, form="naive-quantized"), (96, 160), "int4_g32", 4.6),
    "ct-fp8-tensor": (
        partial(ct, form="float-quantized", bits=8, strategy="tensor", floating=True), (96, 160), "e4m3_row", 8.4
    ),
    "ct-fp8-channel": (
        partial(ct, form="naive-quantized", bits=8, strategy="channel", floating=True), (96, 160), "e4m3_row", 8.4
    ),
    "ct-fp8-block": (
        partial(ct, form="float-quantized", bits=8, strategy="block", floating=True), (80, 176), "e4m3_g32", 11
    ),
    "ct-fp8-group": (
        partial(ct, form="float-quantized", bits=8, floating=True, group=64), (96, 160), "e4m3_g64", 8.5
    ),
    "ct-many-pieces": (partial(ct, group=128), (96, 8192), "int4_g128", 4.2),
    "fp8-tensor": (partial(fp8, block=None), (96, 160), "e4m3_row", 8.4),
    "fp8-block": (fp8, (96, 160), "e4m3_g64", 8.9),
    "fp8-block-128": (partial(fp8, block=(128, 128)), (300, 320), "e4m3_g128", 8.8),
    "fp8-block-columns": (partial(fp8, block=(1, 16)), (32, 96), "e4m3_g16", 10.1),
    "fp8-e8m0": (partial(fp8, scale=torch.float8_e8m0fnu), (96, 160), "e4m3_g64", 8.9),
    "fp8-bf16-scales": (partial(fp8, scale=torch.bfloat16), (96, 160), "e4m3_g64", 8.9),
}  # fmt: skip


def make(name: str) -> Stored:
    maker, shape, _, _ = CASES[name]
    return maker(np.random.default_rng(sum(name.encode())), *shape)


# How to break a tensor: which of several, what to do with it, and a number for that.
KINDS = ("drop", "short", "wide", "flat", "dtype", "number", "empty", "turn")
MUTATIONS = st.tuples(st.integers(0, 30), st.sampled_from(KINDS), st.integers(0, 2**32 - 1))
DTYPES = (torch.uint8, torch.int8, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.bool)


def mutated(t: Tensor | None, kind: str, number: int) -> Tensor | None:
    if kind == "drop" or t is None:
        return None
    if kind == "short" and t.dim():
        return t[: max(len(t) - 1 - number % 3, 0)]
    if kind == "wide":
        return torch.cat([t, t]) if t.dim() else t.reshape(1)
    if kind == "flat":
        return t.reshape(-1)
    if kind == "dtype":
        dtype = DTYPES[number % len(DTYPES)]
        return t.to(dtype) if t.dtype.itemsize != dtype.itemsize else t.view(dtype)
    if kind == "number" and t.numel():
        raw = t.clone().reshape(-1).view(torch.uint8)
        raw[number % raw.numel()] = number >> 24
        return raw.view(t.dtype).view(t.shape)
    if kind == "empty":
        return t.new_empty((0,) * max(t.dim(), 1))
    return t.t() if kind == "turn" and t.dim() == 2 else t
