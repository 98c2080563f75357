"""What attention computes, in plain torch: the float64 reference that kernels and tests are held to, and its gradient.

Scores are materialised here, so memory grows with seq_q * seq_k.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

CAUSAL = (None, "top_left", "bottom_right")
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # of q, k and v


class Operands(NamedTuple):
    """The tensors of an attention call, in the order of the schema. q (batch, heads, seq_q, d); k and v
    (batch, kv_heads, seq_k, d); mask and bias broadcast to (batch, heads, seq_q, seq_k).

    q_start, q_end: where each sequence lies in the rows of a q of batch 1 (and in the rows of k and v, if they are of
    batch 1). k_start, k_end: a sequence's valid keys. k_batch: which row of k and v, or of block_table, it reads.
    These are int64 (batch,). block_table: int32 (batch, max_blocks), k and v are pages then, (num_blocks, kv_heads,
    page_size, d). seed: one int64, for dropout.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None = None
    bias: Tensor | None = None
    alibi: Tensor | None = None
    sinks: Tensor | None = None
    q_start: Tensor | None = None
    q_end: Tensor | None = None
    k_start: Tensor | None = None
    k_end: Tensor | None = None
    k_batch: Tensor | None = None
    block_table: Tensor | None = None
    seed: Tensor | None = None


class Options(NamedTuple):
    """The numbers of an attention call. softcap 0: none; causal: an index of CAUSAL; left, right -1: unbounded."""

    scale: float
    softcap: float = 0.0
    causal: int = 0
    left: int = -1
    right: int = -1
    dropout_p: float = 0.0


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
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`attention` in float64: (out, lse). ``seed``: the int64 that dropout's choice depends on."""
    if mask is not None and mask.dtype != torch.bool:
        bias, mask = mask if bias is None else bias.double() + mask.double(), None
    left, right = (-1, -1) if window is None else window
    scale = 1 / math.sqrt(max(q.shape[-1], 1)) if scale is None else scale
    operands = Operands(q, k, v, mask, bias, alibi_slopes, sinks, seed=seed)
    return reference(operands, Options(scale, softcap or 0.0, CAUSAL.index(causal), left, right, dropout_p))


def attention_probabilities(
    t: Operands, longest: tuple[int, int] | None = None, *, scale: float, softcap: float, causal: str | None,
    window: tuple[int, int], dropout_p: float,
) -> Tensor:  # fmt: skip
    """The softmax's probabilities of an `attention_packed` call, float32 (batch, heads, seq_q, seq_k), negative where
    dropout drops them. Of packed queries ``longest`` gives seq_q and seq_k; outside of a sequence there are zeros."""
    options = Options(scale, softcap, CAUSAL.index(causal), *window, dropout_p)
    with torch.no_grad():
        if longest is None:
            return _signed_probabilities(t, options, 0).float()
        assert t.q_start is not None and t.q_end is not None and t.k_start is not None and t.k_end is not None
        out = t.q.new_zeros(len(t.q_start), t.q.shape[1], *longest, dtype=torch.float32)
        bounds = zip(*(x.tolist() for x in (t.q_start, t.q_end, t.k_start, t.k_end)), strict=True)
        for b, (first, last, k_first, k_last) in enumerate(bounds):
            one = _signed_probabilities(_sequence(t, b, first, last), options, b)[..., k_first:k_last]
            out[b, :, : last - first, : k_last - k_first] = one[0]
        return out


def _signed_probabilities(t: Operands, options: Options, sequence: int) -> Tensor:
    t = _gathered(t)
    t = t._replace(q=t.q.double(), k=t.k.double())
    p, _ = probabilities(scores(t, options)[1], t.sinks)
    return torch.where(dropout_keep(t, options.dropout_p, sequence), p, -p) if options.dropout_p else p


def reference(t: Operands, options: Options) -> tuple[Tensor, Tensor]:
    """(out, lse) in float64, as q is laid out; rows of q in no sequence are 0 with an lse of -inf."""
    if t.q_start is None:
        return _dense(_gathered(t), options)
    out, lse = t.q.double().new_zeros(*t.q.shape[:3], t.v.shape[3]), t.q.double().new_full(t.q.shape[:3], -torch.inf)
    outs, lses = list(out.unbind(2)), list(lse.unbind(2))
    for b, (first, last) in enumerate(zip(t.q_start.tolist(), t.q_end.tolist(), strict=True)):
        one, one_lse = _dense(_gathered(_sequence(t, b, first, last)), options, b)
        outs[first:last], lses[first:last] = one.unbind(2), one_lse.unbind(2)
    return (torch.stack(outs, 2), torch.stack(lses, 2)) if outs else (out, lse)


def _sequence(t: Operands, b: int, first: int, last: int) -> Operands:
    """Sequence b of packed queries, as operands of batch 1."""

    def row(x: Tensor | None, i: int = b) -> Tensor | None:
        return None if x is None else x[i : i + 1]

    k, v, k_batch = t.k, t.v, t.k_batch
    if t.block_table is None:
        i = b if k_batch is None else int(k_batch[b])
        k, v, k_batch = (row(k, i), row(v, i), None) if len(k) > 1 or k_batch is not None else (k, v, None)
    alibi = row(t.alibi) if t.alibi is not None and t.alibi.dim() == 2 else t.alibi
    return t._replace(
        q=t.q[:, :, first:last],
        k=k,
        v=v,
        alibi=alibi,
        q_start=None,
        q_end=None,
        k_start=row(t.k_start),
        k_end=row(t.k_end),
        k_batch=row(k_batch),
        block_table=row(t.block_table) if k_batch is None else t.block_table,
    )


def _gathered(t: Operands) -> Operands:
    """The same call on keys and values that are a row for each sequence."""
    k, v = t.k, t.v
    if t.block_table is not None:
        table = t.block_table if t.k_batch is None else t.block_table[t.k_batch]
        table = table.long().clamp(0, len(k) - 1)  # entries beyond a sequence's length may be anything
        k, v = (x[table].transpose(1, 2).flatten(2, 3) for x in (k, v))
    elif t.k_batch is not None:
        k, v = k[t.k_batch], v[t.k_batch]
    return t._replace(k=k, v=v, k_batch=None, block_table=None)


def scores(t: Operands, options: Options) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(scale * q k^T, scores after softcap and biases with -inf where masked, allowed, distance to the diagonal)."""
    q, k, (scale, softcap, causal, left, right, _) = t.q, t.k, options
    seq_q, seq_k = q.shape[-2], k.shape[-2]
    if k.shape[1] != q.shape[1]:
        k = k.repeat_interleave(q.shape[1] // max(k.shape[1], 1), 1)
    raw = (q @ k.transpose(-1, -2)) * scale
    s = softcap * torch.tanh(raw / softcap) if softcap else raw
    key = torch.arange(seq_k, device=q.device)
    start = torch.zeros(1, dtype=torch.int64, device=q.device) if t.k_start is None else t.k_start
    end = torch.full((1,), seq_k, dtype=torch.int64, device=q.device) if t.k_end is None else t.k_end
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
    if t.mask is not None:
        allowed = allowed & t.mask
    distance = (key - diagonal).abs().to(s.dtype)
    if t.alibi is not None:
        s = s - t.alibi.to(s.dtype).reshape(-1, t.alibi.shape[-1], 1, 1) * distance
    if t.bias is not None:
        s = s + t.bias.to(s.dtype)
        allowed = allowed & (t.bias != -torch.inf)
    return raw, s.masked_fill(~allowed, -torch.inf), allowed, distance


def probabilities(s: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Softmax over keys with the sink in the denominator, and the lse; 0 where nothing is attended."""
    logits = s
    if sinks is not None:
        sink = sinks.to(s.dtype).view(1, -1, 1, 1).expand(*s.shape[:-1], 1)
        logits = torch.cat([s, sink], -1)
    # Without a logit logsumexp's gradient would be NaN.
    nothing = (logits == -torch.inf).all(-1, keepdim=True)
    lse = torch.logsumexp(logits.masked_fill(nothing, 0.0), -1, keepdim=True).masked_fill(nothing, -torch.inf)
    p = torch.exp(s - torch.where(lse == -torch.inf, torch.zeros_like(lse), lse))
    return p, lse


def _dense(t: Operands, options: Options, sequence: int = 0) -> tuple[Tensor, Tensor]:
    t = t._replace(q=t.q.double(), k=t.k.double(), v=t.v.double())
    _, s, allowed, _ = scores(t, options)
    p, lse = probabilities(s, t.sinks)
    values = t.v
    if values.shape[1] != t.q.shape[1]:
        values = values.repeat_interleave(t.q.shape[1] // max(values.shape[1], 1), 1)
    # 0 * NaN: a value that no query attends must not leak.
    seen = allowed.any(-2).unsqueeze(-1).expand(*values.shape[:-1], 1)
    if options.dropout_p:
        p = p * dropout_keep(t, options.dropout_p, sequence) / ((1 - options.dropout_p) or 1.0)
    return p @ torch.where(seen, values, torch.zeros_like(values)), lse.squeeze(-1)


def dropout_keep(t: Operands, dropout_p: float, sequence: int = 0) -> Tensor:
    """Which attention weights dropout keeps, boolean (batch, heads, seq_q, seq_k): a hash of the seed, the sequence
    (the first one counts as ``sequence``), the head, the query and the key, counted from the first valid one. The
    kernels compute the same (csrc/cpu/kernels/attention_rows.h)."""
    (batch, heads, seq_q, _), seq_k, device = t.q.shape, t.k.shape[2], t.q.device

    def mixed(x: Tensor, coordinate: Tensor) -> Tensor:  # splitmix64; int64 wraps as uint64 does
        x = x + (coordinate + 1) * _int64(0x9E3779B97F4A7C15)
        x = (x ^ _shifted(x, 30)) * _int64(0xBF58476D1CE4E5B9)
        x = (x ^ _shifted(x, 27)) * _int64(0x94D049BB133111EB)
        return x ^ _shifted(x, 31)

    assert t.seed is not None
    b = torch.arange(sequence, sequence + batch, device=device).view(-1, 1, 1, 1)
    head, query = torch.arange(heads, device=device).view(-1, 1, 1), torch.arange(seq_q, device=device).view(-1, 1)
    x = mixed(mixed(mixed(t.seed.view(1, 1, 1, 1), b), head), query)
    first, second = x & 0xFFFFFFFF, _shifted(x, 32)
    key = torch.arange(seq_k, device=device) - (0 if t.k_start is None else t.k_start.view(-1, 1, 1, 1))
    h = (key + first) & 0xFFFFFFFF
    h = ((h ^ (h >> 16)) * 0x21F0AAAD) & 0xFFFFFFFF
    h = ((h ^ (h >> 15)) + second) & 0xFFFFFFFF
    h = ((h ^ (h >> 15)) * 0x735A2D97) & 0xFFFFFFFF
    h = h ^ (h >> 15)
    limit = torch.tensor(1 - dropout_p, dtype=torch.float32).item() * 16777216.0
    return (h >> 8).float() < limit


def _int64(x: int) -> int:
    return x - (1 << 64) if x >= 1 << 63 else x


def _shifted(x: Tensor, n: int) -> Tensor:  # zeros shifted in
    return (x >> n) & ((1 << (64 - n)) - 1)


def reference_backward(
    grad_out: Tensor, grad_lse: Tensor | None, t: Operands, options: Options
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, bias, alibi and sinks in float64 arithmetic and the operands' dtypes; empty ones for
    operands that are absent. There is no block_table and no k_batch."""
    wanted = (t.q, t.k, t.v, t.bias, t.alibi, t.sinks)
    grads = [None if x is None else x.double().new_zeros(x.shape) for x in wanted]
    if t.q_start is None:
        _dense_backward(grad_out, grad_lse, t, options, 0, grads)
    else:
        for b, (first, last) in enumerate(zip(t.q_start.tolist(), t.q_end.tolist(), strict=True)):
            part = _sequence(t, b, first, last)
            i = slice(b, b + 1) if len(t.k) > 1 else slice(None)
            views = [grads[0][:, :, first:last], grads[1][i], grads[2][i], grads[3], grads[4], grads[5]]
            if t.alibi is not None and t.alibi.dim() == 2:
                views[4] = grads[4][b : b + 1]
            rows = None if grad_lse is None else grad_lse[:, :, first:last]
            _dense_backward(grad_out[:, :, first:last], rows, part, options, b, views)
    empty = grad_out.new_empty(0)
    q, k, v, bias, alibi, sinks = (
        empty.clone() if x is None else g.to(x.dtype) for x, g in zip(wanted, grads, strict=True)
    )
    return q, k, v, bias, alibi, sinks


def _dense_backward(
    grad_out: Tensor, grad_lse: Tensor | None, t: Operands, options: Options, sequence: int, grads: list
) -> None:
    """Adds the gradients to ``grads``."""
    t = t._replace(q=t.q.double(), k=t.k.double(), v=t.v.double())
    g, group = grad_out.double(), t.q.shape[1] // max(t.k.shape[1], 1)
    raw, s, _, distance = scores(t, options)
    p, lse = probabilities(s, t.sinks)
    kept = torch.ones_like(p)
    if options.dropout_p:
        kept = dropout_keep(t, options.dropout_p, sequence).double() / ((1 - options.dropout_p) or 1.0)
    # A value that nothing attends may be anything, as in `_dense`.
    seen = (s > -torch.inf).unflatten(1, (-1, group)).any(2).any(-2).unsqueeze(-1)
    v = torch.where(seen, t.v, torch.zeros_like(t.v)).repeat_interleave(group, 1)
    k = torch.where(seen, t.k, torch.zeros_like(t.k)).repeat_interleave(group, 1)
    grad_p = (g @ v.transpose(-1, -2)) * kept
    delta = (grad_p * p).sum(-1, keepdim=True)
    if grad_lse is not None:
        delta = delta - torch.where(lse == -torch.inf, torch.zeros_like(lse), grad_lse.double().unsqueeze(-1))
    grad_s = p * (grad_p - delta)
    grads[2] += ((p * kept).transpose(-1, -2) @ g).unflatten(1, (-1, group)).sum(2)
    if t.bias is not None:
        grads[3] += grad_s.sum_to_size(t.bias.shape)
    if t.alibi is not None:
        grads[4] += -(grad_s * distance).sum((2, 3)).sum_to_size(t.alibi.shape)
    if t.sinks is not None:
        weight = torch.exp(t.sinks.double().view(1, -1, 1, 1) - lse.masked_fill(lse == -torch.inf, torch.inf))
        grads[5] -= (weight * delta).sum((0, 2, 3))
    if options.softcap:
        slant = 1 - torch.tanh(raw / options.softcap).square()
        grad_s = grad_s * slant.masked_fill(s == -torch.inf, 0.0)  # a masked key may be NaN
    grad_s = grad_s * options.scale
    grads[0] += grad_s @ k
    grads[1] += (grad_s.transpose(-1, -2) @ t.q).unflatten(1, (-1, group)).sum(2)
