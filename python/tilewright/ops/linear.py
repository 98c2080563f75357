"""Linear layers whose weight is quantised in groups along K."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tilewright import _C
from tilewright.ops.registry import (
    CUDA_DEVICES,
    check_backend,
    contiguous_last,
    direct,
    record_reference,
    register,
    served_by,
    twin,
)
from tilewright.ops.weight_rows import SPEC

if TYPE_CHECKING:
    from tilewright.quant.weight import QuantizedWeight

ACTIVATIONS = ("int8", "int8_token", "bf16", "fp32")
_OP = "quantized_linear"


def quantized_linear(
    x: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    activation: str = "int8",
    backend: str = "auto",
    out: Tensor | None = None,
) -> Tensor:
    """``x @ weight.T + bias + residual``.

    x: (..., K) float32, bfloat16 or float16; weight: QuantizedWeight (N, K); bias: (N,) or None; residual: of the
    result's shape and dtype, or None; result (..., N) in x's dtype. ``activation`` says in what x is multiplied:
    "int8": quantised per row and 32 consecutive k (scale max|x|/127, round half to even); bits of a result row
    depend on that row of x alone. "int8_token": one scale a row. "bf16": x rounded to bf16, fp32 sums. "fp32".
    With `weight.columns`, consecutive are the packed columns. With `weight.outlier_threshold`, larger |x| are left
    out of the integer product and multiplied in fp32, row by row (bitsandbytes does so for a column of the whole
    batch). Codes that are no integers (nf4, fp4, e4m3, bf16) take x rounded like that in fp32 arithmetic, which is
    slower than "bf16". The gradient reaches x and bias, and the weight's `latent`; packed weights are frozen.

    Raises ValueError or TypeError for wrong shapes, dtypes and names, NotImplementedError for a missing backend.
    """
    check_backend(_OP, backend)
    if activation not in ACTIVATIONS:
        raise ValueError(f"{_OP}: activation must be one of {ACTIVATIONS}, got {activation!r}")
    try:
        spec, packed = weight.spec(), weight.packed
    except AttributeError:
        raise TypeError(f"{_OP}: weight must be a QuantizedWeight, got {type(weight).__name__}") from None
    columns, threshold, latent = weight.columns, weight.outlier_threshold, weight.latent
    if backend in ("auto", "cpu") and direct(x, packed, bias, residual, out, latent):
        return _linear(x, packed, bias, None, columns, None, *spec, activation, threshold, out, residual)
    if not isinstance(x, Tensor):
        raise TypeError(f"{_OP}: x must be a tensor, got {type(x).__name__}")
    if out is not None:
        if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
            raise ValueError(f"{_OP}: out= does not support gradients; call it without out")
        if out.shape != (*x.shape[:-1], spec[0]):
            raise ValueError(
                f"{_OP}: out must be a float tensor of x's shape with {spec[0]} columns, got {tuple(out.shape)}"
            )
    if backend == "reference":
        result = quantized_linear_reference(x, weight, bias, activation=activation).to(x.dtype)
        record_reference(_OP)
    else:
        result = _dispatched(x, packed, bias, latent, columns, None, *spec, activation, threshold, backend)
    if residual is not None:
        if residual.shape != result.shape or residual.dtype != result.dtype:
            raise ValueError(
                f"{_OP}: residual must be of the result's shape {tuple(result.shape)} and dtype {result.dtype}, "
                f"got {tuple(residual.shape)} {residual.dtype}"
            )
        result = result + residual
    return result if out is None else out.copy_(result)


def grouped_linear(
    x: Tensor,
    weight: QuantizedWeight,
    group_sizes: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "int8",
    backend: str = "auto",
) -> Tensor:
    """A linear layer for each group of rows of x, as a mixture of experts has them once its tokens are sorted.

    x: (M, K), the rows of the first group first; weight: QuantizedWeight (groups * N, K), the groups' matrices one
    below the other, N a multiple of 32; group_sizes: int64 (groups,), rows of each, 0 allowed, M in all; bias:
    (groups * N,) or None; result (M, N) in x's dtype. Each row has the bits that `quantized_linear` with its
    group's matrix gives it. Gradients as there. Raises ValueError for sizes and shapes that disagree,
    NotImplementedError for a missing backend.
    """
    check_backend("grouped_linear", backend)
    if activation not in ACTIVATIONS:
        raise ValueError(f"grouped_linear: activation must be one of {ACTIVATIONS}, got {activation!r}")
    if backend == "reference":
        record_reference(_OP)
        return quantized_linear_reference(x, weight, bias, activation=activation, group_sizes=group_sizes).to(x.dtype)
    arguments = (*weight.spec(), activation, weight.outlier_threshold)
    if backend in ("auto", "cpu") and direct(x, weight.packed, bias, weight.latent, group_sizes):
        return _linear(x, weight.packed, bias, None, weight.columns, group_sizes, *arguments)
    return _dispatched(x, weight.packed, bias, weight.latent, weight.columns, group_sizes, *arguments, backend)


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


def rounded_activations(x: Tensor, weight: QuantizedWeight, activation: str) -> Tensor:
    """x as `quantized_linear` multiplies it, float64 (..., K), in the weight's order of columns."""
    if not activation.startswith("int8"):
        return x.bfloat16().double() if activation == "bf16" else x.double()
    order = slice(None) if weight.columns is None else weight.columns
    wide = x.float()[..., order]
    outliers = torch.zeros_like(wide, dtype=torch.bool)
    if weight.outlier_threshold > 0:
        outliers = (wide.abs() >= weight.outlier_threshold) & wide.isfinite()
    seen = torch.where(outliers, wide.double(), quantise_activations(wide.masked_fill(outliers, 0), activation))
    result = torch.empty_like(seen)
    result[..., order] = seen
    return result


def quantized_linear_reference(
    x: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None = None,
    *,
    activation: str = "int8",
    group_sizes: Tensor | None = None,
) -> Tensor:
    """`quantized_linear` in float64: x quantised or rounded exactly as the kernels do, then plain matmul; with
    ``group_sizes``, `grouped_linear`."""
    rounded, w = rounded_activations(x, weight, activation), weight.dequantize().double()
    if group_sizes is None:
        return torch.nn.functional.linear(rounded, w, None if bias is None else bias.double())
    count = len(group_sizes)
    biases = [None] * count if bias is None else bias.double().view(count, -1)
    parts = zip(rounded.split(group_sizes.tolist()), w.unflatten(0, (count, -1)), biases, strict=True)
    return torch.cat([torch.nn.functional.linear(*part) for part in parts])


def _linear(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    latent: Tensor | None,
    columns: Tensor | None,
    group_sizes: Tensor | None,
    n: int,
    k: int,
    codes: int,
    group_size: int,
    offset: int,
    scale: int,
    activation: str,
    outlier_threshold: float,
    out: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    x = contiguous_last(x)
    if residual is not None:
        residual = contiguous_last(residual)
    if bias is not None and (bias.dtype != torch.float32 or not bias.is_contiguous()):
        bias = bias.float().contiguous()
    if out is None:
        out = x.new_empty((*x.shape[:-1], _outputs(n, group_sizes)))
    if k == 0 and x.dim() and x.shape[-1] == 0:  # an empty sum
        out.copy_(torch.zeros(n) if bias is None else bias)
        return out if residual is None else out.add_(residual)
    _C.linear(
        x,
        packed,
        n,
        k,
        codes,
        group_size,
        offset,
        scale,
        bias,
        residual,
        columns,
        group_sizes,
        activation,
        outlier_threshold,
        out,
    )
    return out


def _linear_any(x, packed, bias, latent, columns, group_sizes, *spec_and_options):
    *spec, activation, threshold, backend = spec_and_options
    lacks = ""
    if x.device.type in CUDA_DEVICES and backend in ("auto", "cuda"):
        lacks = twin("cuda", "linear").linear_lacks(x, spec[2], activation, threshold)
    server = served_by(_OP, backend, x, cuda_lacks=lacks)
    if server not in ("cuda", "triton"):
        return _linear(x, packed, bias, latent, columns, group_sizes, *spec, activation, threshold)
    if columns is not None:
        x = x.index_select(-1, columns)
    weight = twin("triton", "weight").gpu_weight(packed, *spec)
    return twin(server, "linear").linear(x, weight, bias, activation, group_sizes, threshold)


def _outputs(n: int, group_sizes: Tensor | None) -> int:
    return n if group_sizes is None else n // max(1, group_sizes.numel())


def _linear_fake(x, packed, bias, latent, columns, group_sizes, n, k, *_):
    if x.device != packed.device:
        raise ValueError(f"{_OP}: x is on device {x.device}, the weight on {packed.device}; move one with .to")
    if x.shape[-1] != k:
        raise ValueError(f"{_OP}: the last dimension of x must be {k}, got {tuple(x.shape)}")
    return x.new_empty((*x.shape[:-1], _outputs(n, group_sizes)))


def _dispatched(*arguments):
    return torch.ops.tilewright.quantized_linear(*arguments)


def _setup_context(ctx, inputs, output):
    x, packed, bias, latent, columns, group_sizes, *spec, _, _, _ = inputs
    ctx.spec, ctx.x_dtype, ctx.bias_dtype = spec, x.dtype, None if bias is None else bias.dtype
    ctx.latent_dtype = None if latent is None else latent.dtype
    ctx.save_for_backward(packed, columns, group_sizes, None if latent is None else x)


def _backward(ctx, grad):
    packed, columns, group_sizes, x = ctx.saved_tensors
    grad_x = grad_bias = grad_latent = None
    rows = grad.reshape(-1, grad.shape[-1]).float()
    groups = [rows] if group_sizes is None else rows.split(group_sizes.tolist())
    if ctx.needs_input_grad[0]:
        index = torch.arange(ctx.spec[0], device=packed.device)
        w = torch.ops.tilewright.weight_rows(index, packed, *ctx.spec).unflatten(0, (len(groups), -1))
        grad_x = torch.cat([part @ w[i] for i, part in enumerate(groups)])
        if columns is not None:
            grad_x = torch.empty_like(grad_x).index_copy_(-1, columns, grad_x)
        grad_x = grad_x.view(*grad.shape[:-1], -1).to(ctx.x_dtype)
    if ctx.bias_dtype is not None:
        grad_bias = torch.cat([part.sum(0) for part in groups]).to(ctx.bias_dtype)
    if x is not None:  # straight through the rounding
        inputs = x.reshape(-1, x.shape[-1]).float().split([part.shape[0] for part in groups])
        grad_latent = torch.cat([part.t() @ seen for part, seen in zip(groups, inputs, strict=True)])
        grad_latent = grad_latent.to(ctx.latent_dtype)
    return grad_x, None, grad_bias, grad_latent, *(None,) * 11


register(
    "quantized_linear(Tensor x, Tensor packed, Tensor? bias, Tensor? latent, Tensor? columns, Tensor? group_sizes, "
    f"{SPEC}, str activation, float outlier_threshold, str backend) -> Tensor",
    _linear_any,
    _linear_fake,
    on_gpu=True,
    backward=_backward,
    setup_context=_setup_context,
)
