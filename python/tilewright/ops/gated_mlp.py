"""The MLP of a decoder layer: two quantised matrices with a gate between them, as one call."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from tilewright import _C
from tilewright.ops.activation import gelu_mul, silu_mul
from tilewright.ops.linear import quantized_linear
from tilewright.ops.registry import check_backend, contiguous_last, direct

if TYPE_CHECKING:
    from tilewright.quant.weight import QuantizedWeight

ACTS = ("silu", "gelu", "gelu_tanh")


def gated_mlp(
    x: Tensor,
    gate_up: QuantizedWeight,
    down: QuantizedWeight,
    *,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    residual: Tensor | None = None,
    act: str = "silu",
    activation: str = "int8",
    backend: str = "auto",
) -> Tensor:
    """``residual + (act(x @ gate.T) * (x @ up.T)) @ down.T``.

    x: (..., K); gate_up: QuantizedWeight (2 * inner, K), gate's rows above up's; down: QuantizedWeight (N, inner);
    biases: (2 * inner,) and (N,), or None; residual: (..., N) in x's dtype, or None; result (..., N) in x's dtype.
    act: "silu", "gelu" or "gelu_tanh"; activation: as in `quantized_linear`, for both. For fp32 the bits are those
    of `quantized_linear`, `silu_mul` and `quantized_linear`; for 16-bit x what lies between them is not rounded.
    Weights that read x in an order of their own, or by outliers, and calls that need a gradient take those ops.

    Raises ValueError or TypeError for wrong shapes, dtypes and names, NotImplementedError for a missing backend.
    """
    check_backend("gated_mlp", backend)
    if act not in ACTS:
        raise ValueError(f"gated_mlp: act must be one of {ACTS}, got {act!r}")
    for name, weight in (("gate_up", gate_up), ("down", down)):
        if not hasattr(weight, "packed"):
            raise TypeError(f"gated_mlp: {name} must be a QuantizedWeight, got {type(weight).__name__}")
    if gate_up.shape[0] != 2 * down.shape[1]:
        raise ValueError(
            f"gated_mlp: gate_up must have two rows for each column of down, got {gate_up.shape} and {down.shape}"
        )
    fused = backend in ("auto", "cpu") and fusable(gate_up, down)
    if fused and direct(x, gate_up.packed, down.packed, gate_up_bias, down_bias, residual, gate_up.latent, down.latent):
        x = contiguous_last(x)
        out = x.new_empty((*x.shape[:-1], down.shape[0]))
        if residual is not None:
            residual = contiguous_last(residual)
        biases = [None if bias is None else bias.float().contiguous() for bias in (gate_up_bias, down_bias)]
        _C.gated_mlp(
            x, gate_up.packed, *gate_up.spec(), down.packed, *down.spec(), *biases, residual, act, activation, out
        )
        return out
    gate, up = quantized_linear(x, gate_up, gate_up_bias, activation=activation, backend=backend).chunk(2, dim=-1)
    if act == "silu":
        inner = silu_mul(gate, up, backend=backend)
    else:
        inner = gelu_mul(gate, up, approximate="tanh" if "_" in act else "none", backend=backend)
    return quantized_linear(inner, down, down_bias, residual=residual, activation=activation, backend=backend)


def fusable(gate_up: QuantizedWeight, down: QuantizedWeight) -> bool:
    """Whether the kernel takes these weights: whole blocks of rows, columns in order, no outliers."""
    plain = all(weight.columns is None and not weight.outlier_threshold for weight in (gate_up, down))
    return plain and down.shape[1] % 32 == 0 and down.shape[1] > 0
