"""Rotary position embedding (https://arxiv.org/abs/2104.09864)."""

from __future__ import annotations

from collections.abc import Callable

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


def rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    positions: Tensor | None = None,
    interleaved: bool = False,
    rotary_dim: int | None = None,
    inplace: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """q and k rotated by their positions' angles: ``(a cos - b sin, b cos + a sin)`` for each pair (a, b).

    q: (batch, heads, seq, head_dim), k: (batch, kv_heads, seq, head_dim), both float32, bfloat16 or float16
    (float64 runs the reference); cos, sin: (max_positions, rotary_dim / 2), float32, as `rope_tables` makes
    them; positions: int64, (seq,) or (batch, seq), None for 0 .. seq - 1. Pairs are the channels
    (i, i + rotary_dim / 2), or (2i, 2i + 1) with ``interleaved``; channels from ``rotary_dim`` (default
    2 * cos.shape[-1]) on are copied. With ``inplace`` q and k are overwritten and returned. Arithmetic is
    float32, each product and sum rounded by itself.

    Raises ValueError for other shapes or dtypes, positions outside the tables, and inplace on tensors that
    need a gradient, overlap, or are not contiguous in their last dimension; NotImplementedError if cos or
    sin needs a gradient, or for a missing backend. On a GPU, where looking at values would wait for it, a position
    outside the tables gives NaN instead.
    """
    if backend == "auto" and direct(q, k, cos, sin, positions):
        if not inplace:
            return _rope_new(q, k, cos, sin, positions, interleaved, rotary_dim)
        _rope_inplace(q, k, cos, sin, positions, interleaved, rotary_dim)
        return q, k
    check_backend("rope", backend)
    check_device("rope", q=q, k=k, cos=cos, sin=sin, positions=positions)
    if torch.is_grad_enabled():
        if cos.requires_grad or sin.requires_grad:
            raise NotImplementedError("rope: cos and sin have no gradient; detach them")
        if inplace and (q.requires_grad or k.requires_grad):
            raise ValueError("rope: inplace=True needs tensors without gradient; use inplace=False or no_grad")
    if not inplace:
        return torch.ops.tilewright.rope(q, k, cos, sin, positions, interleaved, rotary_dim, backend)
    torch.ops.tilewright.rope_(q, k, cos, sin, positions, interleaved, rotary_dim, backend)
    return q, k


def rope_reference(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    positions: Tensor | None = None,
    interleaved: bool = False,
    rotary_dim: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`rope` in float64."""
    if positions is None:
        positions = torch.arange(q.shape[2], device=q.device)
    rows = positions if positions.dim() == 1 else positions.unsqueeze(1)  # broadcast over the heads
    c, s = cos.double()[rows], sin.double()[rows]
    dim = 2 * cos.shape[-1] if rotary_dim is None else rotary_dim

    def rotate(x: Tensor) -> Tensor:
        wide = x.double()
        rotary, rest = wide[..., :dim], wide[..., dim:]
        if interleaved:
            a, b = rotary[..., 0::2], rotary[..., 1::2]
            rotary = torch.stack((a * c - b * s, b * c + a * s), -1).flatten(-2)
        else:
            a, b = rotary.chunk(2, -1)
            rotary = torch.cat((a * c - b * s, b * c + a * s), -1)
        return torch.cat((rotary, rest), -1)

    return rotate(q), rotate(k)


def _rope_new(q, k, cos, sin, positions, interleaved, rotary_dim, server="cpu"):
    q, k = contiguous_last(q), contiguous_last(k)
    out_q, out_k = torch.empty_like(q), torch.empty_like(k)
    _rope_into(out_q, out_k, q, k, cos, sin, positions, interleaved, rotary_dim, server)
    return out_q, out_k


def _rope_inplace(q, k, cos, sin, positions, interleaved, rotary_dim, server="cpu"):
    _rope_into(q, k, q, k, cos, sin, positions, interleaved, rotary_dim, server)
    torch.autograd.graph.increment_version((q, k))  # a graph that saved them must notice


def _rope_into(out_q, out_k, q, k, cos, sin, positions, interleaved, rotary_dim, server):
    if server == "reference" or q.dtype == torch.float64:
        record_reference("rope")
        results = rope_reference(q, k, cos, sin, positions=positions, interleaved=interleaved, rotary_dim=rotary_dim)
        out_q.copy_(results[0])
        out_k.copy_(results[1])
    elif server == "cpu":
        _C.rope(q, k, cos, sin, positions, out_q, out_k, interleaved, rotary_dim)
    else:
        twin(server, "rope").rope_into(out_q, out_k, q, k, cos, sin, positions, interleaved, rotary_dim)


def _by_backend(kernel: Callable) -> Callable:
    """``kernel`` with ``backend`` as its last argument instead of who serves the call."""

    def choose(q, *arguments):
        return kernel(q, *arguments[:-1], served_by("rope", arguments[-1], q))

    return choose


def _rope_fake(q, k, cos, sin, positions, interleaved, rotary_dim, backend):
    return torch.empty_like(contiguous_last(q)), torch.empty_like(contiguous_last(k))


def _setup_context(ctx, inputs, output):
    _, _, cos, sin, positions, *ctx.layout = inputs
    ctx.save_for_backward(cos, sin, positions)


def _backward(ctx, grad_q, grad_k):
    cos, sin, positions = ctx.saved_tensors
    # The rotation by -angle is the transpose of the rotation by angle, scaled tables included.
    grad_q, grad_k = torch.ops.tilewright.rope(grad_q, grad_k, cos, -sin, positions, *ctx.layout)
    return grad_q, grad_k, *(None,) * 6


register(
    "rope(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor? positions, bool interleaved, int? rotary_dim,"
    " str backend) -> (Tensor, Tensor)",
    _by_backend(_rope_new),
    _rope_fake,
    on_gpu=True,
    backward=_backward,
    setup_context=_setup_context,
)
register(
    "rope_(Tensor(a!) q, Tensor(b!) k, Tensor cos, Tensor sin, Tensor? positions, bool interleaved,"
    " int? rotary_dim, str backend) -> ()",
    _by_backend(_rope_inplace),
    lambda *_: None,
    on_gpu=True,
)
