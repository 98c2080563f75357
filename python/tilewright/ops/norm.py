"""RMS norm (https://arxiv.org/abs/1910.07467) and layer norm (https://arxiv.org/abs/1607.06450)."""

from __future__ import annotations

import torch
from torch import Tensor

from tilewright import _C
from tilewright.ops.registry import (
    check_backend,
    check_device,
    contiguous_last,
    direct,
    record_reference,
    register,
    served_by,
    twin,
)


def rms_norm(
    x: Tensor, weight: Tensor | None, eps: float, *, residual: Tensor | None = None, backend: str = "auto"
) -> Tensor | tuple[Tensor, Tensor]:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension.

    x: (..., n), float32, bfloat16 or float16 (float64 runs the reference); weight: (n,), x's dtype or float32,
    or None. With ``residual`` (x's shape and dtype) the norm is of ``x + residual`` and the result is the pair
    (normalised, x + residual). Statistics are float32.

    Raises ValueError for other shapes or dtypes, NotImplementedError for a missing backend.
    """
    if backend == "auto" and direct(x, weight, residual):
        out, total = _norm(x, residual, weight, None, eps, False)
    else:
        check_backend("rms_norm", backend)
        out, total = torch.ops.tilewright.norm(x, residual, weight, None, eps, False, backend)
    return out if residual is None else (out, total)


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    residual: Tensor | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """``(x - mean) / sqrt(var + eps) * weight + bias`` over the last dimension; arguments as `rms_norm`."""
    if backend == "auto" and direct(x, weight, bias, residual):
        out, total = _norm(x, residual, weight, bias, eps, True)
    else:
        check_backend("layer_norm", backend)
        out, total = torch.ops.tilewright.norm(x, residual, weight, bias, eps, True, backend)
    return out if residual is None else (out, total)


def norm_reference(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, centred: bool
) -> tuple[Tensor, Tensor]:
    """Both norms in float64: (normalised, x + residual rounded to x's dtype, or x), as the kernels define them."""
    total = x if residual is None else x + residual
    wide = total.double()
    if centred:
        wide = wide - wide.mean(-1, keepdim=True)
    out = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        out = out * weight.double()
    if bias is not None:
        out = out + bias.double()
    return out, total


def rms_norm_reference(
    x: Tensor, weight: Tensor | None, eps: float, *, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """`rms_norm` in float64."""
    out, total = norm_reference(x, residual, weight, None, eps, False)
    return out if residual is None else (out, total)


def layer_norm_reference(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """`layer_norm` in float64."""
    out, total = norm_reference(x, residual, weight, bias, eps, True)
    return out if residual is None else (out, total)


def _norm(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, centred: bool
) -> tuple[Tensor, Tensor | None]:
    op = "layer_norm" if centred else "rms_norm"
    x = contiguous_last(x)
    if x.dtype == torch.float64:
        record_reference(op)
        return norm_reference(x, residual, weight, bias, eps, centred)
    out = torch.empty_like(x)
    total = None
    if residual is not None:
        residual = contiguous_last(residual)
        total = torch.empty_like(x)
    _C.norm(op, x, residual, weight, bias, out, total, eps, centred)
    return out, total


def _norm_any(x, residual, weight, bias, eps, centred, backend):
    op = "layer_norm" if centred else "rms_norm"
    server = served_by(op, backend, x)
    if server == "reference":
        record_reference(op)
        out, total = norm_reference(contiguous_last(x), residual, weight, bias, eps, centred)
        out = out.to(x.dtype)
    elif server != "cpu":
        out, total = twin(server, "norm").norm(x, residual, weight, bias, eps, centred)
    else:
        out, total = _norm(x, residual, weight, bias, eps, centred)
    # The dispatcher wants two tensors, and neither may alias an input.
    return out, x.new_empty(0) if residual is None else total


def _norm_fake(x, residual, weight, bias, eps, centred, backend):
    check_device("layer_norm" if centred else "rms_norm", x=x, residual=residual, weight=weight, bias=bias)
    out = torch.empty_like(contiguous_last(x))  # strides as the kernel's results have them
    return out, x.new_empty(0) if residual is None else torch.empty_like(out)


def _setup_context(ctx, inputs, output):
    x, residual, weight, bias, ctx.eps, ctx.centred, _ = inputs
    ctx.has_residual, ctx.bias_dtype = residual is not None, None if bias is None else bias.dtype
    ctx.save_for_backward(x if residual is None else output[1], weight)


def _sum_rows(t: Tensor) -> Tensor:
    return t.reshape(-1, t.shape[-1]).sum(0)


def _backward(ctx, grad_out, grad_total):
    total, weight = ctx.saved_tensors
    wide = total.double() if total.dtype == torch.float64 else total.float()
    grad = grad_out.to(wide.dtype)
    if ctx.centred:
        wide = wide - wide.mean(-1, keepdim=True)
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + ctx.eps)
    normalised = wide * rstd
    grad_weight = None if weight is None else _sum_rows(grad * normalised).to(weight.dtype)
    grad_bias = None if ctx.bias_dtype is None else _sum_rows(grad).to(ctx.bias_dtype)
    if weight is not None:
        grad = grad * weight.to(wide.dtype)
    grad_x = grad - normalised * (grad * normalised).mean(-1, keepdim=True)
    if ctx.centred:
        grad_x = grad_x - grad.mean(-1, keepdim=True)
    grad_x = (grad_x * rstd).to(total.dtype)
    if ctx.has_residual:
        grad_x = grad_x + grad_total
    return grad_x, grad_x if ctx.has_residual else None, grad_weight, grad_bias, None, None, None


register(
    "norm(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, bool centred, str backend)"
    " -> (Tensor, Tensor)",
    _norm_any,
    _norm_fake,
    on_gpu=True,
    backward=_backward,
    setup_context=_setup_context,
)
