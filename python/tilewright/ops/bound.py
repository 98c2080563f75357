"""Ops bound to fixed tensors: each function returns a call without arguments that overwrites `out`.

A public op takes some microseconds to look at its arguments, find out whether the dispatcher may be passed by,
and allocate its result. A decoding step makes the same ten calls a layer on the same buffers each time, so all
that is done once, here; what remains of a call is the binding's own microsecond.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from tilewright import _C
from tilewright.ops.attention_reference import CAUSAL, Operands, Options
from tilewright.ops.gated_mlp import fusable
from tilewright.quant import QuantizedLinear

Call = Callable[[], object]


def norm(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> Call:
    """out = rms_norm(x)."""
    return partial(_C.norm, "rms_norm", x, None, weight, None, out, None, eps, False)


def linear(x: Tensor, module: nn.Module, out: Tensor, residual: Tensor | None = None) -> Call:
    """out = module(x) + residual, for a module of `models.linear`."""
    if isinstance(module, QuantizedLinear):
        weight = module.weight
        options = (module.bias, residual, weight.columns, None, module.activation, weight.outlier_threshold)
        return partial(_C.linear, x, weight.packed, *weight.spec(), *options, out)
    if residual is None:
        return lambda: out.copy_(module(x))
    return lambda: torch.add(module(x), residual, out=out)


def mlp(x: Tensor, gate_up: nn.Module, down: nn.Module, inner: int, out: Tensor, residual: Tensor) -> list[Call]:
    """out = residual + down(silu(gate(x)) * up(x)), for modules of `models.linear`; inner: rows of gate and of up."""
    if fusable_modules(gate_up, down):
        weights = (gate_up.weight.packed, *gate_up.weight.spec(), down.weight.packed, *down.weight.spec())
        options = (gate_up.bias, down.bias, residual, "silu", down.activation)
        return [partial(_C.gated_mlp, x, *weights, *options, out)]
    both, product = x.new_empty((*x.shape[:-1], 2 * inner)), x.new_empty((*x.shape[:-1], inner))
    gate, up = both.chunk(2, dim=-1)
    return [linear(x, gate_up, both), silu_mul(gate, up, product), linear(product, down, out, residual)]


def fusable_modules(gate_up: nn.Module, down: nn.Module) -> bool:
    """Whether one call serves both."""
    return (
        isinstance(gate_up, QuantizedLinear)
        and isinstance(down, QuantizedLinear)
        and gate_up.activation == down.activation
        and fusable(gate_up.weight, down.weight)
    )


def embedding(ids: Tensor, matrix: nn.Module, out: Tensor) -> Call:
    """out = rows `ids` (int64 (n,)) of the matrix, out: fp32 (n, hidden)."""
    if isinstance(matrix, QuantizedLinear):
        weight = matrix.weight
        if weight.columns is not None:
            return lambda: out.copy_(weight.rows(ids))
        return partial(_C.weight_rows, ids, weight.packed, *weight.spec(), out)
    return lambda: out.copy_(matrix.weight[ids])


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool, dim: int | None) -> Call:
    """Rotate q and k in place."""
    return partial(_C.rope, q, k, cos, sin, positions, q, k, interleaved, dim)


def kv_append(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> Call:
    """Write k and v into the rows `rows` of the cache."""
    return partial(_C.kv_append, keys, values, k, v, rows, None, None)


def attention(
    q: Tensor, keys: Tensor, values: Tensor, start: Tensor, end: Tensor, scale: float, left: int, out: Tensor
) -> Call:
    """out = `attention_cached`."""
    operands = Operands(q, keys, values, k_start=start, k_end=end)
    return partial(_C.attention, *operands, *Options(scale, 0.0, CAUSAL.index("bottom_right"), left), out, None)


def silu_mul(gate: Tensor, up: Tensor, out: Tensor) -> Call:
    """out = silu(gate) * up."""
    return partial(_C.act_mul, gate, up, out, "silu")
