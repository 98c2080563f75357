"""Softmax attention: torch's scaled_dot_product_attention and a wider call of our own.

scores = mask(softcap(scale * q k^T) - alibi + bias), out = softmax(scores) v, computed block by block without
storing the scores (Milakov & Gimelshein, https://arxiv.org/abs/1805.02867; Dao, https://arxiv.org/abs/2307.08691).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tilewright import _C
from tilewright.ops.registry import check_backend, check_device, contiguous_last, direct, record_reference, register

_OP = "attention"
CAUSAL = (None, "top_left", "bottom_right")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
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
    reference); a float32 q may meet 16-bit k and v.

    causal: "top_left" lets query i see keys up to i, "bottom_right" up to i + seq_k - seq_q. window: (left, right)
    keys around the diagonal (bottom-right unless causal is "top_left"), -1 = unbounded. mask: boolean, True =
    attend, or additive floats; bias: additive; both broadcast to (batch, heads, seq_q, seq_k) at any stride.
    alibi_slopes: (heads,) or (batch, heads): adds -slope * |distance to the diagonal|. softcap c: c * tanh(score/c),
    before masks. sinks: (heads,), a logit per head that joins the denominator. scale: default 1/sqrt(head_dim).

    Returns out (batch, heads, seq_q, v_dim) in q's dtype, with ``return_lse`` also the log of the softmax's
    denominator, float32 (batch, heads, seq_q). A query that may attend to nothing gives 0 and -inf.

    Raises ValueError for shapes, dtypes and values that do not fit, NotImplementedError for dropout and missing
    backends.
    """
    check_backend(_OP, backend)
    if dropout_p:
        raise NotImplementedError(f"{_OP}: dropout_p must be 0, got {dropout_p}; dropout is not supported yet")
    if causal not in CAUSAL:
        raise ValueError(f"{_OP}: causal must be one of {CAUSAL}, got {causal!r}")
    if not (isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor)):
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
    tensors = (q, k, v, mask, bias, alibi_slopes, sinks, None, None)
    options = (scale, softcap or 0.0, CAUSAL.index(causal), left, right)
    if backend != "reference" and direct(*tensors, out):
        try:  # the kernel checks; where it refuses, the wording for all paths stands in _check_shapes
            result, lse = _attention(*tensors, *options, return_lse, out)
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
        wide, lse = _reference(*tensors, *options)
        result, lse = wide.to(q.dtype), lse.float()
        record_reference(_OP)
    else:
        if out is not None and torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)):
            raise ValueError(f"{_OP}: out= does not support gradients; call it without out")
        result, lse = torch.ops.tilewright.attention(*tensors, *options, True)
    if out is not None:
        result = out.copy_(result)
    return (result, lse) if return_lse else result


def attention_cached(
    q: Tensor, k: Tensor, v: Tensor, *, k_start: Tensor, k_end: Tensor, scale: float, left: int = -1
) -> Tensor:
    """Causal attention over caches that are valid in [k_start[b], k_end[b]) (int64 (batch,)); the queries sit at the
    end of that range. The result for a batch element does not depend on its padding."""
    tensors = (q, k, v, None, None, None, None, k_start, k_end)
    options = (scale, 0.0, CAUSAL.index("bottom_right"), left, -1)
    if not direct(*tensors):
        return torch.ops.tilewright.attention(*tensors, *options, False)[0]
    # (batch, seq, heads, v_dim) in memory: the output projection reads it without a copy.
    batch, heads, seq, _ = q.shape
    out = q.new_empty((batch, seq, heads, v.shape[3])).transpose(1, 2)
    return _attention(*tensors, *options, False, out)[0]


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
    """torch's ``F.scaled_dot_product_attention``, argument for argument; query (..., heads, seq, head_dim).

    Differs from torch where a query may attend to nothing: the row is 0 rather than NaN.
    """
    if is_causal and attn_mask is not None:
        raise ValueError("scaled_dot_product_attention: attn_mask must be None when is_causal=True")
    dims = query.dim()
    if dims < 2 or key.dim() < 2 or value.dim() < 2:
        raise ValueError("scaled_dot_product_attention: query, key and value must have at least 2 dimensions")
    q, k, v = _four_dims(query), _four_dims(key), _four_dims(value)
    if not enable_gqa and not q.size(1) == k.size(1) == v.size(1):
        raise ValueError(
            "scaled_dot_product_attention: query, key and value must have the same number of heads, got "
            f"{q.shape[1]}, {k.shape[1]}, {v.shape[1]}; enable_gqa=True lets groups of heads share a key head"
        )
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


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: str | None = None,
    window: tuple[int, int] | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`attention` in float64: (out, lse)."""
    if mask is not None and mask.dtype != torch.bool:
        bias, mask = mask if bias is None else bias.double() + mask.double(), None
    left, right = (-1, -1) if window is None else window
    scale = 1 / math.sqrt(max(q.shape[-1], 1)) if scale is None else scale
    tensors = (q, k, v, mask, bias, alibi_slopes, sinks, None, None)
    return _reference(*tensors, scale, softcap or 0.0, CAUSAL.index(causal), left, right)


def _scores(q, k, v, mask, bias, alibi, sinks, k_start, k_end, scale, softcap, causal, left, right):
    """(raw scores scale * q k^T, scores after softcap and biases with -inf where masked, allowed, distance)."""
    seq_q, seq_k = q.shape[-2], k.shape[-2]
    if k.shape[1] != q.shape[1]:
        k = k.repeat_interleave(q.shape[1] // max(k.shape[1], 1), 1)
    raw = (q @ k.transpose(-1, -2)) * scale
    s = softcap * torch.tanh(raw / softcap) if softcap else raw
    key = torch.arange(seq_k, device=q.device)
    start = torch.zeros(1, dtype=torch.int64, device=q.device) if k_start is None else k_start
    end = torch.full((1,), seq_k, dtype=torch.int64, device=q.device) if k_end is None else k_end
    start, end = start.view(-1, 1, 1, 1), end.view(-1, 1, 1, 1)
    query = torch.arange(seq_q, device=q.device).view(-1, 1)
    diagonal = start + query if causal == 1 else end - seq_q + query
    allowed = (key >= start) & (key < end)
    if causal:
        allowed = allowed & (key <= diagonal)
    if left >= 0:
        allowed = allowed & (key >= diagonal - left)
    if right >= 0:
        allowed = allowed & (key <= diagonal + right)
    if mask is not None:
        allowed = allowed & mask
    distance = (key - diagonal).abs().to(s.dtype)
    if alibi is not None:
        s = s - alibi.to(s.dtype).reshape(-1, alibi.shape[-1], 1, 1) * distance
    if bias is not None:
        s = s + bias.to(s.dtype)
        allowed = allowed & (bias != -torch.inf)
    return raw, s.masked_fill(~allowed, -torch.inf), allowed, distance


def _probabilities(s, sinks):
    """Softmax over keys with the sink in the denominator; 0 where nothing is attended."""
    logits = s
    if sinks is not None:
        sink = sinks.to(s.dtype).view(1, -1, 1, 1).expand(*s.shape[:-1], 1)
        logits = torch.cat([s, sink], -1)
    lse = torch.logsumexp(logits, -1, keepdim=True)
    p = torch.exp(s - torch.where(lse == -torch.inf, torch.zeros_like(lse), lse))
    return p, lse


def _reference(q, k, v, mask, bias, alibi, sinks, k_start, k_end, scale, softcap, causal, left, right):
    wide = [t.double() for t in (q, k, v)]
    _, s, allowed, _ = _scores(*wide, mask, bias, alibi, sinks, k_start, k_end, scale, softcap, causal, left, right)
    p, lse = _probabilities(s, sinks)
    values = wide[2]
    if values.shape[1] != q.shape[1]:
        values = values.repeat_interleave(q.shape[1] // max(values.shape[1], 1), 1)
    # 0 * NaN: a value that no query attends must not leak.
    seen = allowed.any(-2).unsqueeze(-1).expand(*values.shape[:-1], 1)
    return p @ torch.where(seen, values, torch.zeros_like(values)), lse.squeeze(-1)


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
    if q.dtype not in _FLOATS or k.dtype != v.dtype or (q.dtype != k.dtype and q.dtype != torch.float32):
        raise ValueError(
            f"{_OP}: q, k and v must have one floating dtype (a float32 q may meet 16-bit k and v), got "
            f"{q.dtype}, {k.dtype}, {v.dtype}"
        )


def _attention(
    q, k, v, mask, bias, alibi, sinks, k_start, k_end, scale, softcap, causal, left, right, return_lse, out=None
):
    """(out, lse or None) from the kernel; float64 runs the reference."""
    if q.dtype is torch.float64 or k.dtype is torch.float64:
        _check_shapes(q, k, v)
        record_reference(_OP)
        wide, lse = _reference(q, k, v, mask, bias, alibi, sinks, k_start, k_end, scale, softcap, causal, left, right)
        wide = wide.to(q.dtype)
        return (wide if out is None else out.copy_(wide)), lse.float()
    q, k, v = contiguous_last(q), contiguous_last(k), contiguous_last(v)
    if bias is not None and bias.dtype is torch.float64:
        bias = bias.float()
    if alibi is not None:
        alibi = alibi.float().contiguous()
    if sinks is not None:
        sinks = sinks.float().contiguous()
    if out is None:
        out = _empty_out(q, v)
    lse = torch.empty(q.shape[:3], dtype=torch.float32) if return_lse else None
    _C.attention(q, k, v, mask, bias, alibi, sinks, k_start, k_end, scale, softcap, causal, left, right, out, lse)
    return out, lse


def _empty_out(q: Tensor, v: Tensor) -> Tensor:
    """Room for the result, laid out as q where the shapes agree."""
    if q.dim() == 4 and v.dim() == 4 and q.size(3) != v.size(3):
        return q.new_empty((*q.shape[:3], v.size(3)))
    return torch.empty_like(q)


def _attention_cpu(q, k, v, mask, bias, alibi, sinks, k_start, k_end, scale, softcap, causal, left, right, return_lse):
    out, lse = _attention(
        q, k, v, mask, bias, alibi, sinks, k_start, k_end, scale, softcap, causal, left, right, return_lse
    )
    return out, torch.empty(0) if not return_lse else lse


def _attention_fake(q, k, v, mask, bias, alibi, sinks, k_start, k_end, scale, softcap, causal, left, right, lse):
    check_device(_OP, q=q, k=k, v=v, mask=mask, bias=bias, sinks=sinks)
    out = _empty_out(contiguous_last(q), v)
    return out, q.new_empty(q.shape[:3] if lse else (0,), dtype=torch.float32)


def _setup_context(ctx, inputs, output):
    ctx.options, ctx.return_lse = inputs[9:14], inputs[14]
    ctx.save_for_backward(*inputs[:9], output[0])
    ctx.set_materialize_grads(False)


def _sum_to(grad: Tensor, like: Tensor) -> Tensor:
    return grad.sum_to_size(like.shape).to(like.dtype)


def _backward(ctx, grad_out, grad_lse):
    """Plain torch, scores materialised: memory grows with seq_q * seq_k."""
    q, k, v, mask, bias, alibi, sinks, k_start, k_end, out = ctx.saved_tensors
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    qw, kw, vw = (t.to(wide) for t in (q, k, v))
    scale, softcap = ctx.options[0], ctx.options[1]
    raw, s, _, distance = _scores(qw, kw, vw, mask, bias, alibi, sinks, k_start, k_end, *ctx.options)
    p, lse = _probabilities(s, sinks)
    group = q.shape[1] // max(k.shape[1], 1)
    grad_v = None
    grad_s = torch.zeros_like(p)
    grad_sinks = torch.zeros_like(lse)
    if grad_out is not None:
        g = grad_out.to(wide)
        delta = (g * out.to(wide)).sum(-1, keepdim=True)
        grad_s = p * (g @ vw.repeat_interleave(group, 1).transpose(-1, -2) - delta)
        grad_v = (p.transpose(-1, -2) @ g).unflatten(1, (-1, group)).sum(2).to(v.dtype)
        grad_sinks = -delta
    if grad_lse is not None and ctx.return_lse:
        g = torch.where(lse == -torch.inf, torch.zeros_like(lse), grad_lse.to(wide).unsqueeze(-1))
        grad_s = grad_s + p * g
        grad_sinks = grad_sinks + g
    grad_alibi = grad_bias = grad_sink = None
    if bias is not None and bias.requires_grad:
        grad_bias = _sum_to(grad_s, bias)
    if alibi is not None and alibi.requires_grad:
        grad_alibi = _sum_to(-(grad_s * distance).sum((2, 3)), alibi)
    if sinks is not None:
        weight = torch.exp(sinks.to(wide).view(1, -1, 1, 1) - lse)
        weight = torch.where(lse == -torch.inf, torch.zeros_like(weight), weight)
        grad_sink = (weight * grad_sinks).sum((0, 2, 3)).to(sinks.dtype)
    if softcap:
        grad_s = grad_s * (1 - torch.tanh(raw / softcap).square())
    grad_s = grad_s * scale
    grad_q = (grad_s @ kw.repeat_interleave(group, 1)).to(q.dtype)
    grad_k = (grad_s.transpose(-1, -2) @ qw).unflatten(1, (-1, group)).sum(2).to(k.dtype)
    return grad_q, grad_k, grad_v, None, grad_bias, grad_alibi, grad_sink, *(None,) * 8


register(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? bias, Tensor? alibi, Tensor? sinks, "
    "Tensor? k_start, Tensor? k_end, float scale, float softcap, int causal, int left, int right, "
    "bool return_lse) -> (Tensor, Tensor)",
    _attention_cpu,
    _attention_fake,
    backward=_backward,
    setup_context=_setup_context,
)
