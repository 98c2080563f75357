"""Softmax attention: torch's scaled_dot_product_attention and a wider call of our own.

scores = mask(softcap(scale * q k^T) - alibi + bias), out = softmax(scores) v, computed block by block without
storing the scores (Milakov & Gimelshein, https://arxiv.org/abs/1805.02867; Dao, https://arxiv.org/abs/2307.08691).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tilewright import _C
from tilewright.ops.attention_quantized import attention_quantized
from tilewright.ops.attention_reference import (
    CAUSAL,
    FLOATS,
    Operands,
    Options,
    attention_reference,
    reference,
    reference_backward,
)
from tilewright.ops.quantized_kv import QuantizedKV
from tilewright.ops.registry import (
    CUDA_DEVICES,
    check_backend,
    check_device,
    contiguous_last,
    direct,
    record_reference,
    register,
    served_by,
    twin,
)

__all__ = ["attention", "attention_cached", "attention_packed", "attention_reference", "scaled_dot_product_attention"]

_OP = "attention"


def attention(
    q: Tensor,
    k: Tensor | QuantizedKV,
    v: Tensor | None = None,
    *,
    causal: str | None = None,
    window: tuple[int, int] | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    backend: str = "auto",
    out: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of ``q`` (batch, heads, seq_q, head_dim) to ``k`` (batch, kv_heads, seq_k, head_dim) and ``v``
    (batch, kv_heads, seq_k, v_dim); heads is a multiple of kv_heads. float32, bfloat16, float16 (float64 runs the
    reference); a float32 q may meet 16-bit k and v. Or k is a `QuantizedKV` and v None: keys and values are read as
    codes, and there is no gradient.

    causal: "top_left" lets query i see keys up to i, "bottom_right" up to i + seq_k - seq_q. window: (left, right)
    keys around the diagonal (bottom-right unless causal is "top_left"), -1 = unbounded. mask: boolean, True =
    attend, or additive floats; bias: additive; both broadcast to (batch, heads, seq_q, seq_k) at any stride.
    alibi_slopes: (heads,) or (batch, heads): adds -slope * |distance to the diagonal|. softcap c: c * tanh(score/c),
    before masks. sinks: (heads,), a logit per head that joins the denominator. scale: default 1/sqrt(head_dim).

    Returns out (batch, heads, seq_q, v_dim) in q's dtype, with ``return_lse`` also the log of the softmax's
    denominator, float32 (batch, heads, seq_q). A query that may attend to nothing gives 0 and -inf.

    dropout_p: each weight is dropped with this probability and the others grow by 1 / (1 - dropout_p); which ones is
    drawn from torch's default generator.

    Differentiable in q, k, v, bias, an additive mask, alibi_slopes and sinks.

    Raises ValueError for shapes, dtypes and values that do not fit, NotImplementedError for missing backends.
    """
    check_backend(_OP, backend)
    if causal not in CAUSAL:
        raise ValueError(f"{_OP}: causal must be one of {CAUSAL}, got {causal!r}")
    quantized = isinstance(k, QuantizedKV)
    if quantized and v is not None:
        raise TypeError(f"{_OP}: a QuantizedKV holds keys and values; call attention(q, kv) without v")
    if not (isinstance(q, Tensor) and (quantized or (isinstance(k, Tensor) and isinstance(v, Tensor)))):
        raise TypeError(
            f"{_OP}: q, k and v must be tensors, got {type(q).__name__}, {type(k).__name__}, {type(v).__name__}"
        )
    left, right = (-1, -1) if window is None else _checked_window(window)
    if mask is not None and mask.dtype != torch.bool:
        bias, mask = mask if bias is None else bias + mask, None
    if softcap is not None and not 0 <= softcap < math.inf:
        raise ValueError(f"{_OP}: softcap must be a finite number >= 0, got {softcap!r}")
    if scale is None:
        scale = max(q.size(-1), 1) ** -0.5 if q.dim() else 1.0
    operands = Operands(q, k, v, mask, bias, alibi_slopes, sinks, seed=dropout_seed(dropout_p, q))
    options = Options(scale, softcap or 0.0, CAUSAL.index(causal), left, right, dropout_p)
    if quantized:
        result, lse = attention_quantized(operands, k, options, backend, out)
        return (result, lse) if return_lse else result
    if backend in ("auto", "cpu") and direct(*operands[:7], out):
        try:  # the kernel checks; where it refuses, the wording for all paths stands in _check_shapes
            result, lse = _attention(operands, options, return_lse, out)
        except ValueError:
            _check_shapes(q, k, v)
            raise
        return (result, lse) if return_lse else result
    _check_shapes(q, k, v)
    if out is not None and (out.shape != (*q.shape[:3], v.shape[3]) or out.dtype != q.dtype):
        raise ValueError(
            f"{_OP}: out must be {q.dtype} of shape {(*q.shape[:3], v.shape[3])}, got {out.dtype} {tuple(out.shape)}"
        )
    if backend == "reference":
        wide, lse = reference(operands, options)
        result, lse = wide.to(q.dtype), lse.float()
        record_reference(_OP)
    else:
        if out is not None and torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)):
            raise ValueError(f"{_OP}: out= does not support gradients; call it without out")
        result, lse = torch.ops.tilewright.attention(*operands, *options, backend)
    if out is not None:
        result = out.copy_(result)
    return (result, lse) if return_lse else result


def attention_packed(
    operands: Operands, *, scale: float | None = None, softcap: float = 0.0, causal: str | None = None,
    window: tuple[int, int] = (-1, -1), dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention of sequences that are packed, paged or padded as the fields of `Operands` say: (out, lse), laid out
    as q. Rows of q that belong to no sequence give 0 and -inf. Differentiable where there is no block_table and no
    k_batch. A seed is drawn where dropout needs one."""
    if dropout_p and operands.seed is None:
        operands = operands._replace(seed=dropout_seed(dropout_p, operands.q))
    scale = max(operands.q.size(-1), 1) ** -0.5 if scale is None else scale
    options = Options(scale, softcap, CAUSAL.index(causal), *window, dropout_p)
    if direct(*operands):
        return _attention(operands, options, True)
    return torch.ops.tilewright.attention(*operands, *options, "auto")


def attention_cached(
    q: Tensor, k: Tensor, v: Tensor, *, k_start: Tensor, k_end: Tensor, scale: float, left: int = -1
) -> Tensor:
    """Causal attention over caches that are valid in [k_start[b], k_end[b]) (int64 (batch,)); the queries sit at the
    end of that range. The result for a batch element does not depend on its padding."""
    operands = Operands(q, k, v, k_start=k_start, k_end=k_end)
    options = Options(scale, 0.0, CAUSAL.index("bottom_right"), left)
    if not direct(*operands):
        return torch.ops.tilewright.attention(*operands, *options, "auto")[0]
    # (batch, seq, heads, v_dim) in memory: the output projection reads it without a copy.
    batch, heads, seq, _ = q.shape
    out = q.new_empty((batch, seq, heads, v.shape[3])).transpose(1, 2)
    return _attention(operands, options, False, out)[0]


def dropout_seed(dropout_p: float, like: Tensor | None = None) -> Tensor | None:
    """A seed for dropout from the default generator of ``like``'s device, the CPU's without it; int64 (1,)."""
    if not dropout_p:
        return None
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"{_OP}: dropout_p must be a probability in [0, 1], got {dropout_p!r}")
    device = None if like is None else like.device
    return torch.randint(-(1 << 63), (1 << 63) - 1, (1,), dtype=torch.int64, device=device)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch's ``F.scaled_dot_product_attention``, argument for argument; query (..., heads, seq, head_dim), leading
    dimensions broadcast.

    Differs from torch where a query may attend to nothing: the row is 0 rather than NaN.
    """
    if query.dim() < 2 or key.dim() < 2 or value.dim() < 2:
        raise ValueError("scaled_dot_product_attention: query, key and value must have at least 2 dimensions")
    kept = -3 if enable_gqa else -2  # the dimensions from here on do not broadcast
    if not query.shape[:kept] == key.shape[:kept] == value.shape[:kept]:
        try:
            lead = torch.broadcast_shapes(query.shape[:kept], key.shape[:kept], value.shape[:kept])
        except RuntimeError as error:
            raise ValueError(
                "scaled_dot_product_attention: the batch and heads of query, key and value must be the same or "
                f"broadcast, got {tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}; enable_gqa=True lets "
                "groups of heads share a key head"
            ) from error
        query, key, value = (t.expand(*lead, *t.shape[kept:]) for t in (query, key, value))
    dims, q, k, v = query.dim(), _four_dims(query), _four_dims(key), _four_dims(value)
    mask = attn_mask
    if mask is not None and dims > 4:
        mask = mask.expand(*query.shape[:-1], key.shape[-2]).flatten(0, -4)
    elif mask is not None and dims == 3 and mask.dim() == 3:
        mask = mask.unsqueeze(0)
    causal = "top_left" if is_causal else None
    out = attention(q, k, v, causal=causal, mask=mask, scale=scale, dropout_p=dropout_p)
    if dims == 4:
        return out
    if dims == 2:
        return out[0, 0]
    return out[0] if dims == 3 else out.unflatten(0, query.shape[:-3])


def _checked_window(window: tuple[int, int]) -> tuple[int, int]:
    if not (
        isinstance(window, tuple | list) and len(window) == 2 and all(isinstance(w, int) and w >= -1 for w in window)
    ):
        raise ValueError(f"{_OP}: window must be (left, right), whole numbers >= -1 (-1: unbounded), got {window!r}")
    return window[0], window[1]


def _four_dims(t: Tensor) -> Tensor:
    if t.dim() == 4:
        return t
    return t.flatten(0, -4) if t.dim() > 4 else t.reshape((1,) * (4 - t.dim()) + t.shape)


def _check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise ValueError(
            f"{_OP}: q, k and v must be (batch, heads, seq, head_dim), got {tuple(q.shape)}, {tuple(k.shape)}, "
            f"{tuple(v.shape)}"
        )
    if (
        k.shape[:3] != v.shape[:3]
        or q.shape[0] != k.shape[0]
        or q.shape[3] != k.shape[3]
        or (q.shape[1] % k.shape[1] if k.shape[1] else q.shape[1])
    ):
        raise ValueError(
            f"{_OP}: expected q (batch, heads, seq_q, d), k (batch, kv_heads, seq_k, d), v (batch, kv_heads, seq_k, "
            f"d_v) with heads a multiple of kv_heads, got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if q.dtype not in FLOATS or k.dtype != v.dtype or (q.dtype != k.dtype and q.dtype != torch.float32):
        raise ValueError(
            f"{_OP}: q, k and v must have one floating dtype (a float32 q may meet 16-bit k and v), got "
            f"{q.dtype}, {k.dtype}, {v.dtype}"
        )


def _attention(
    t: Operands, options: Options, return_lse: bool, out: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """(out, lse or None) from the kernel; float64 runs the reference."""
    if t.q.dtype is torch.float64 or t.k.dtype is torch.float64:
        if t.q_start is None and t.k_batch is None and t.block_table is None:
            _check_shapes(t.q, t.k, t.v)
        record_reference(_OP)
        wide, lse = reference(t, options)
        wide = wide.to(t.q.dtype)
        return (wide if out is None else out.copy_(wide)), lse.float()
    t = _for_kernel(t)
    if out is None:
        out = _empty_out(t.q, t.v)
    lse = t.q.new_empty(t.q.shape[:3], dtype=torch.float32) if return_lse else None
    if t.q_start is not None:  # rows that belong to no sequence
        out.zero_()
        if lse is not None:
            lse.fill_(-math.inf)
    _C.attention(*t, *options, out, lse)
    return out, lse


def _for_kernel(t: Operands) -> Operands:
    """The operands in the dtypes and layouts that the kernels read."""
    q, k, v, _, bias, alibi, sinks = t[:7]
    if (
        q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
        and (bias is None or bias.dtype is not torch.float64)
        and alibi is None
        and sinks is None
    ):
        return t
    return t._replace(
        q=contiguous_last(q),
        k=contiguous_last(k),
        v=contiguous_last(v),
        bias=bias if bias is None or bias.dtype is not torch.float64 else bias.float(),
        alibi=None if alibi is None else alibi.float().contiguous(),
        sinks=None if sinks is None else sinks.float().contiguous(),
    )


def _empty_out(q: Tensor, v: Tensor) -> Tensor:
    """Room for the result, laid out as q where the shapes agree."""
    if q.dim() == 4 and v.dim() == 4 and q.size(3) != v.size(3):
        return q.new_empty((*q.shape[:3], v.size(3)))
    return torch.empty_like(q)


def _attention_any(*arguments):
    t, options, backend = Operands(*arguments[:14]), Options(*arguments[14:20]), arguments[20]
    if _wide(t) or (server := _served_by(backend, t)) == "cpu":
        return _attention(t, options, True)
    return twin(server, "attention").attention(_for_kernel(t), options, True)


def _served_by(backend: str, t: Operands) -> str:
    on_gpu = t.q.device.type in CUDA_DEVICES and backend in ("auto", "cuda")
    lacks = twin("cuda", "attention").attention_lacks(t.q, t.k, t.v.shape[-1]) if on_gpu else ""
    return served_by(_OP, backend, t.q, cuda_lacks=lacks)


def _wide(t: Operands) -> bool:
    return t.q.dtype is torch.float64 or t.k.dtype is torch.float64


def _attention_fake(*arguments):
    t = Operands(*arguments[:14])
    check_device(_OP, **{name: x for name, x in t._asdict().items() if name != "seed"})
    return _empty_out(contiguous_last(t.q), t.v), t.q.new_empty(t.q.shape[:3], dtype=torch.float32)


def _setup_context(ctx, inputs, output):
    ctx.options, ctx.backend = Options(*inputs[14:20]), inputs[20]
    ctx.save_for_backward(*inputs[:14], *output)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out, grad_lse):
    *tensors, out, lse = ctx.saved_tensors
    t = Operands(*tensors)
    if t.block_table is not None or t.k_batch is not None:
        raise NotImplementedError(f"{_OP}: paged and indexed caches have no gradient; detach q, k and v")
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    needs = ctx.needs_input_grad
    grads = torch.ops.tilewright.attention_backward(
        grad_out, grad_lse, *t, out, lse, *ctx.options, needs[4], needs[5], ctx.backend
    )
    grads = [g if need else None for g, need in zip(grads, (*needs[:3], *needs[4:7]), strict=True)]
    return *grads[:3], None, *grads[3:], *(None,) * 14


def _attention_backward_any(grad_out, grad_lse, *arguments):
    """Gradients of q, k, v, bias, alibi and sinks; empty for those that are absent or not needed."""
    t, out, lse, options = Operands(*arguments[:14]), *arguments[14:16], Options(*arguments[16:22])
    needs_bias, needs_alibi, backend = arguments[22:]
    if _wide(t):
        return reference_backward(grad_out, grad_lse, t, options)
    kernel = _for_kernel(t)
    grad_out = contiguous_last(grad_out.to(t.q.dtype))
    grad_lse = None if grad_lse is None else grad_lse.float().contiguous()
    out, lse = contiguous_last(out), lse.contiguous()
    empty = grad_out.new_empty(0)
    if (server := _served_by(backend, t)) != "cpu":
        grads = twin(server, "attention_backward").attention_backward(
            grad_out, grad_lse, kernel, options, out, lse, needs_bias, needs_alibi
        )
        wanted = zip((t.q, t.k, t.v, t.bias, t.alibi, t.sinks), grads, strict=True)
        return tuple(empty.clone() if g is None else g.to(x.dtype) for x, g in wanted)
    # Keys and rows that belong to no sequence have a gradient of 0, and so have keys without any row.
    ragged = t.q_start is not None or t.k_start is not None or t.k_end is not None
    like = torch.zeros_like if ragged or t.q.shape[2] == 0 else torch.empty_like
    contiguous = torch.contiguous_format
    grads = [like(x, memory_format=contiguous) for x in (t.q, t.k, t.v)]
    extra = [
        torch.zeros_like(x, dtype=torch.float32, memory_format=contiguous) if x is not None and needed else None
        for x, needed in ((t.bias, needs_bias), (t.alibi, needs_alibi), (t.sinks, True))
    ]
    delta = torch.empty_like(lse)
    _C.attention_backward(*kernel, *options, out, lse, grad_out, grad_lse, delta, *grads, *extra)
    wanted = zip((t.bias, t.alibi, t.sinks), extra, strict=True)
    return *grads, *(empty.clone() if g is None else g.to(x.dtype) for x, g in wanted)


def _attention_backward_fake(grad_out, grad_lse, *arguments):
    t, (needs_bias, needs_alibi, _) = Operands(*arguments[:14]), arguments[22:]
    full = _wide(t)
    found = (
        t.q,
        t.k,
        t.v,
        *(x if need or full else None for x, need in ((t.bias, needs_bias), (t.alibi, needs_alibi))),
    )
    return tuple(
        grad_out.new_empty(0) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)
        for x in (*found, t.sinks)
    )


_OPERANDS = (
    "Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? bias, Tensor? alibi, Tensor? sinks, Tensor? q_start, "
    "Tensor? q_end, Tensor? k_start, Tensor? k_end, Tensor? k_batch, Tensor? block_table, Tensor? seed"
)
_OPTIONS = "float scale, float softcap, int causal, int left, int right, float dropout_p"

register(
    f"attention({_OPERANDS}, {_OPTIONS}, str backend) -> (Tensor, Tensor)",
    _attention_any,
    _attention_fake,
    on_gpu=True,
    backward=_backward,
    setup_context=_setup_context,
)
register(
    f"attention_backward(Tensor grad_out, Tensor? grad_lse, {_OPERANDS}, Tensor out, Tensor lse, {_OPTIONS}, "
    "bool needs_bias, bool needs_alibi, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _attention_backward_any,
    _attention_backward_fake,
    on_gpu=True,
)
