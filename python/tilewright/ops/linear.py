"""Linear layers whose weight is quantised in groups along K."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tilewright import _C
from tilewright.ops.registry import check_backend, contiguous_last, direct, register

if TYPE_CHECKING:
    from tilewright.quant.weight import QuantizedWeight

ACTIVATIONS = ("int8", "int8_token", "bf16", "fp32")
_OP = "quantized_linear"


def quantized_linear(
    x: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None = None,
    *,
    activation: str = "int8",
    backend: str = "auto",
    out: Tensor | None = None,
) -> Tensor:
    """``x @ weight.T + bias``.

    x: (..., K) float32, bfloat16 or float16; weight: QuantizedWeight (N, K); bias: (N,) or None; result (..., N) in
    x's dtype. ``activation`` says in what x is multiplied:
    "int8": quantised per row and 32 consecutive k (scale max|x|/127, round half to even); bits of a result row
    depend on that row of x alone. "int8_token": one scale a row. "bf16": x rounded to bf16, fp32 sums. "fp32".
    The gradient reaches x and bias; the weight is frozen.

    Raises ValueError or TypeError for wrong shapes, dtypes and names, NotImplementedError for a missing backend.
    """
    check_backend(_OP, backend)
    if activation not in ACTIVATIONS:
        raise ValueError(f"{_OP}: activation must be one of {ACTIVATIONS}, got {activation!r}")
    spec = weight.spec()
    if backend == "reference":
        result = quantized_linear_reference(x, weight, bias, activation=activation).to(x.dtype)
        _C.record(_OP, "reference")
    elif direct(x, weight.packed, bias, out):
        return _linear_cpu(x, weight.packed, bias, *spec, activation, out)
    else:
        if out is not None and torch.is_grad_enabled() and x.requires_grad:
            raise ValueError(f"{_OP}: out= does not support gradients; call it without out")
        result = torch.ops.tilewright.quantized_linear(x, weight.packed, bias, *spec, activation)
    return result if out is None else out.copy_(result)


def quantise_activations(x: Tensor, activation: str) -> Tensor:
    """x as the integer kernels see it: codes times scale, float64, (..., K)."""
    k = x.shape[-1]
    pad = -k % 32
    blocks = torch.nn.functional.pad(x.float(), (0, pad)).unflatten(-1, (-1, 32))
    amax = blocks.abs().amax(-1, keepdim=True)
    if activation == "int8_token":
        amax = amax.amax(-2, keepdim=True)
    scale = amax / 127
    codes = torch.where(scale > 0, (blocks / scale).round().clamp(-127, 127), torch.zeros_like(blocks))
    codes = torch.where(torch.isfinite(amax), codes, torch.full_like(codes, torch.nan))
    return (codes.double() * scale.double()).flatten(-2)[..., :k]


def quantized_linear_reference(
    x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None, *, activation: str = "int8"
) -> Tensor:
    """`quantized_linear` in float64: x quantised or rounded exactly as the kernels do, then plain matmul."""
    if activation.startswith("int8"):
        wide = quantise_activations(x, activation)
    else:
        wide = x.bfloat16().double() if activation == "bf16" else x.double()
    out = wide @ weight.dequantize().double().t()
    return out if bias is None else out + bias.double()


def _linear_cpu(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    n: int,
    k: int,
    bits: int,
    group_size: int,
    offset: int,
    scale_bits: int,
    activation: str,
    out: Tensor | None = None,
) -> Tensor:
    x = contiguous_last(x)
    if bias is not None and (bias.dtype != torch.float32 or not bias.is_contiguous()):
        bias = bias.float().contiguous()
    if out is None:
        out = x.new_empty((*x.shape[:-1], n))
    _C.linear(x, packed, n, k, bits, group_size, offset, scale_bits, bias, activation, out)
    return out


def _linear_fake(x, packed, bias, n, k, bits, group_size, offset, scale_bits, activation):
    if x.shape[-1] != k:
        raise ValueError(f"{_OP}: the last dimension of x must be {k}, got {tuple(x.shape)}")
    return x.new_empty((*x.shape[:-1], n))


def _setup_context(ctx, inputs, output):
    x, packed, bias, *spec, _ = inputs
    ctx.spec, ctx.x_dtype, ctx.bias_dtype = spec, x.dtype, None if bias is None else bias.dtype
    ctx.save_for_backward(packed)


def _backward(ctx, grad):
    (packed,) = ctx.saved_tensors
    w = torch.ops.tilewright.dequantize_weight(packed, *ctx.spec)
    grad_x = (grad.float() @ w).to(ctx.x_dtype)
    grad_bias = None
    if ctx.bias_dtype is not None:
        grad_bias = grad.sum(tuple(range(grad.dim() - 1))).to(ctx.bias_dtype)
    return grad_x, None, grad_bias, *(None,) * 7


def _dequantize_cpu(packed: Tensor, n: int, k: int, bits: int, group_size: int, offset: int, scale_bits: int) -> Tensor:
    out = torch.empty(n, k)
    _C.weight_rows(torch.arange(n), packed, n, k, bits, group_size, offset, scale_bits, out)
    return out


_SPEC = "int n, int k, int bits, int group_size, int offset, int scale_bits"
register(
    f"dequantize_weight(Tensor packed, {_SPEC}) -> Tensor",
    _dequantize_cpu,
    lambda packed, n, k, *_: packed.new_empty((n, k), dtype=torch.float32),
)
register(
    f"quantized_linear(Tensor x, Tensor packed, Tensor? bias, {_SPEC}, str activation) -> Tensor",
    _linear_cpu,
    _linear_fake,
    backward=_backward,
    setup_context=_setup_context,
)
