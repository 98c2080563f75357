"""Quantised linear layers that the tests of the CUDA and the Triton kernels share, and what they are compared with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from cases import seeded
from torch import Tensor

from tilewright.ops.linear import rounded_activations
from tilewright.quant import QuantizedWeight
from tilewright.quant.weight import pack, pack_bf16

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class Case:
    m: int
    n: int
    k: int
    codes: str = "int4"
    group: int = 32
    offset: str = "none"
    bias: bool = False
    scale: torch.dtype = FP16

    def __str__(self) -> str:
        return f"{self.m}x{self.n}x{self.k}_{self.codes}_g{self.group}_{self.offset}"


def inputs(case: Case, dtype: torch.dtype, expert: int = 0) -> tuple[Tensor, QuantizedWeight, Tensor | None]:
    c, g = case, seeded(f"{case}{expert or ''}")
    bias = torch.randn(c.n, generator=g) if c.bias else None
    x = torch.randn(c.m, c.k, generator=g).to(dtype)
    if c.codes == "bf16":
        return x, pack_bf16(torch.randn(c.n, c.k, generator=g) * 0.1), bias
    groups = 1 if c.group == -1 else -(-c.k // c.group)
    top = 1 << (int(c.codes[3]) if c.codes.startswith("int") else 8 if c.codes == "e4m3" else 4)
    codes = torch.randint(0, top, (c.n, c.k), generator=g, dtype=torch.uint8)
    if c.codes == "e4m3":
        codes[codes & 127 == 127] = 0  # no NaN
    scales = (torch.rand(c.n, groups, generator=g) * 0.02 + 0.001).to(c.scale).float()
    if c.scale == BF16:
        scales[0, 0] = 2.0**-40  # no float16: they are kept as bfloat16
    offsets = None
    if c.offset == "zero":
        offsets = torch.randint(0, top, (c.n, groups), generator=g, dtype=torch.uint8)
    elif c.offset == "min":
        offsets = torch.randn(c.n, groups, generator=g).to(c.scale).float() * 0.125
    return x, pack(codes, scales, offsets, c.codes, c.group, c.offset), bias


def naive(x: Tensor, weight: QuantizedWeight, bias: Tensor | None, activation: str) -> Tensor:
    w = weight.dequantize()
    if activation.startswith("int8"):
        out = rounded_activations(x, weight, activation).float() @ w.t()
    else:
        dtype = BF16 if activation == "bf16" else x.dtype
        out = (x.to(dtype) @ w.to(dtype).t()).float()
    return (out if bias is None else out + bias).to(x.dtype)
