"""out = act(gate) * up, elementwise: silu, or gelu in its two spellings (https://arxiv.org/abs/2002.05202).

Reads two tensors and writes one, so memory decides; arithmetic is float32. A program takes a tile of rows x columns
of at most 4,096 elements: 128 threads with 32 each, 16 bytes a load.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tilewright.triton_kernels.launch import check_floats, row_offset, rows, run
from tilewright.triton_kernels.special import tanh

_TILE = 4096
_CONFIGS = [triton.Config({}, num_warps=4, num_stages=1)]


def act_mul(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """`tilewright.silu_mul` and `tilewright.gelu_mul`; activation: "silu", "gelu" or "gelu_tanh"."""
    if activation not in ("silu", "gelu", "gelu_tanh"):
        raise ValueError(f'act_mul: activation must be silu, gelu or gelu_tanh, got "{activation}"')
    op = "silu_mul" if activation == "silu" else "gelu_mul"
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"{op}: gate and up must have one shape and dtype, got {tuple(gate.shape)} {gate.dtype} and "
            f"{tuple(up.shape)} {up.dtype}"
        )
    check_floats(op, gate=gate)
    out = torch.empty_like(gate, memory_format=torch.contiguous_format)
    if out.numel() == 0:
        return out
    n = gate.shape[-1] if gate.dim() else 1
    if gate.is_contiguous() and up.is_contiguous():  # one long row
        n = out.numel()
    count = out.numel() // n
    gate, *gate_rows = rows(gate)
    up, *up_rows = rows(up)
    columns = min(triton.next_power_of_2(n), _TILE)
    block = {"ROWS": _TILE // columns if count > 1 else 1, "COLUMNS": columns}
    programs = triton.cdiv(count, block["ROWS"]) * triton.cdiv(n, columns)
    run(
        _act_mul,
        programs,
        {"gate": gate, "up": up, "out": out, "gate_rows": tuple(gate_rows), "up_rows": tuple(up_rows), "count": count,
         "n": n, "ACTIVATION": activation, **block},
        _CONFIGS,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["count"])
def _act_mul(
    gate, up, out, gate_rows, up_rows, count, n, ACTIVATION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    blocks = tl.cdiv(n, COLUMNS)
    row = tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)
    first = (tl.program_id(0) % blocks).to(tl.int64) * COLUMNS
    column = tl.arange(0, COLUMNS)
    inside = (row < count)[:, None] & (column < n - first)[None, :]
    x = tl.load(gate + first + row_offset(row, gate_rows[0], gate_rows[1])[:, None] + column[None, :], mask=inside)
    y = tl.load(up + first + row_offset(row, up_rows[0], up_rows[1])[:, None] + column[None, :], mask=inside)
    x, y = x.to(tl.float32), y.to(tl.float32)
    if ACTIVATION == "silu":
        act = x / (1.0 + tl.exp2(x * -1.4426950408889634))
    elif ACTIVATION == "gelu":
        act = 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))
    else:
        act = 0.5 * x * (1.0 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    at = first + row.to(tl.int64)[:, None] * n + column[None, :]
    tl.store(out + at, (act * y).to(out.dtype.element_ty), mask=inside)
