"""flash-attn's definition of attention, written out query by query, for the tests of the flash-attn functions."""

from __future__ import annotations

import torch
from cases import INF, naive_attention
from compare import assert_close
from torch import Tensor


def loop_attention(
    q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None = None, keep: Tensor | None = None, *,
    dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """One sequence in float64: q (seqlen_q, heads, d), k and v (seqlen_k, kv_heads, d), slopes (heads,), keep (heads,
    seqlen_q, seqlen_k) -> out (seqlen_q, heads, d_v), lse (heads, seqlen_q), probabilities (heads, seqlen_q,
    seqlen_k)."""
    (seqlen_q, heads, d), seqlen_k = q.shape, k.shape[0]
    q, k, v = q.double(), k.double(), v.double()
    rows, lses, weights = [], [], []
    for i in range(seqlen_q):
        for h in range(heads):
            diagonal, of = i + seqlen_k - seqlen_q, h * k.shape[1] // heads
            keys = [
                j
                for j in range(seqlen_k)
                if not (causal and j > diagonal)
                and not (window_size[0] >= 0 and j < diagonal - window_size[0])
                and not (window_size[1] >= 0 and j > diagonal + window_size[1])
            ]
            s = (k[keys, of] @ q[i, h]) * (d**-0.5 if softmax_scale is None else softmax_scale)
            if softcap > 0:
                s = softcap * torch.tanh(s / softcap)
            if slopes is not None:
                s = s - slopes[h].double() * (torch.tensor(keys) - diagonal).abs()
            p = torch.softmax(s, 0)
            kept = p if keep is None else p * keep[h, i, keys] / (1 - dropout_p)
            rows.append(kept @ v[keys, of])
            lses.append(torch.logsumexp(s, 0) if keys else torch.tensor(-INF, dtype=torch.float64))
            weights.append(torch.zeros(seqlen_k, dtype=torch.float64).index_put((torch.tensor(keys).long(),), p))
    if not rows:
        empty = (q.sum() + v.sum()) * 0  # has a gradient
        return empty.expand(0, heads, v.shape[-1]), empty.expand(heads, 0), empty.expand(heads, 0, seqlen_k)
    return (
        torch.stack(rows).unflatten(0, (seqlen_q, heads)),
        torch.stack(lses).view(seqlen_q, heads).T,
        torch.stack(weights).view(seqlen_q, heads, seqlen_k).transpose(0, 1),
    )


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None = None, *, softmax_scale: float | None = None,
    causal: bool = False, window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out, lse) of one sequence as `loop_attention` has them, in the tensors' dtype: what errors are measured by."""
    q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in (q, k, v))
    out, lse = naive_attention(
        q, k, v, alibi_slopes=slopes, scale=softmax_scale, causal="bottom_right" if causal else None,
        window=window_size, softcap=softcap,
    )  # fmt: skip
    return out[0].transpose(0, 1), lse[0]


def slopes_of(slopes: Tensor | None, b: int) -> Tensor | None:
    return slopes if slopes is None or slopes.dim() == 1 else slopes[b]


def assert_like_loop(
    outs: list[Tensor], lses: list[Tensor], sequences: list[tuple[Tensor, Tensor, Tensor]],
    slopes: Tensor | None = None, naive: list[tuple[Tensor, Tensor, Tensor]] | None = None, **options: object,
) -> None:  # fmt: skip
    """Each sequence's out and lse keep the error rule. ``naive``: the sequences that the plain one takes, where
    something before attention (rotary) rounds, too."""
    dtype = outs[0].dtype
    found: list[list[Tensor]] = [[], [], [], [], [], []]
    for b, (out, lse, one, other) in enumerate(zip(outs, lses, sequences, naive or sequences, strict=True)):
        ref, ref_lse, _ = loop_attention(*one, slopes_of(slopes, b), **options)
        plain, plain_lse = plain_attention(*other, slopes_of(slopes, b), **options)
        for into, t in zip(found, (out, ref, plain, lse, ref_lse, plain_lse), strict=True):
            into.append(t.flatten())
    out, ref, plain, lse, ref_lse, plain_lse = (torch.cat(parts) for parts in found)
    assert_close(out, ref, plain, dtype)
    assert lse.dtype == torch.float32
    assert_close(lse.to(dtype), ref_lse, plain_lse, dtype)  # the scores' rounding is the dtype's
