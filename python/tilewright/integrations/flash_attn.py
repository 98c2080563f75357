"""The functions of flash-attn 2.8 (https://github.com/Dao-AILab/flash-attention), with its signatures, for tensors on
the CPU in float32, bfloat16, float16 or (through the reference) float64.

What the functions share, in flash-attn's words:

- q has nheads heads, k and v have nheads_k, of which nheads is a multiple; headdim is 1 to 512, v's may differ.
- softmax_scale: default 1 / sqrt(headdim). softcap c > 0: c * tanh(score / c).
- causal: query i sees the keys up to i + seqlen_k - seqlen_q. window_size (left, right): so many keys to either side
  of that one, negative for all of them.
- alibi_slopes (nheads,) or (batch_size, nheads): adds -slope * |i + seqlen_k - seqlen_q - j| to the score of key j.
- dropout_p: which weights are dropped is drawn from torch's default generator.
- deterministic: accepted; forward and backward always are, for any number of threads.
- return_attn_probs: returns (out, softmax_lse, S_dmask). S_dmask holds the softmax's probabilities, float32, negative
  where dropped; it takes memory for every score.

Differences: a query that may attend to nothing has a softmax_lse of -inf (flash-attn: +inf), its row of out is 0 as
there; softmax_lse has a gradient; S_dmask is there without dropout too, and not padded to blocks.

All raise TypeError for what is no tensor, ValueError for shapes, dtypes and values that do not fit, and
NotImplementedError for a headdim beyond 512.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tilewright.integrations.flash_attn_checks import (
    DENSE,
    PACKED,
    PAGES,
    check_cache_range,
    check_cu_seqlens,
    check_new_keys,
    check_pages,
    check_per_sequence,
    check_qkv,
    check_rotary,
    check_slopes,
    check_stacked,
    score_options,
)
from tilewright.ops.attention import attention_packed, dropout_seed
from tilewright.ops.attention_reference import Operands, attention_probabilities
from tilewright.ops.kv_append import kv_append
from tilewright.ops.registry import contiguous_last
from tilewright.ops.rope import rope


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Attention of q (batch_size, seqlen_q, nheads, headdim) to k and v (batch_size, seqlen_k, nheads_k, headdim):
    out (batch_size, seqlen_q, nheads, headdim of v). Differentiable. The arguments are explained above.

    With return_attn_probs also softmax_lse, float32 (batch_size, nheads, seqlen_q), and S_dmask (batch_size, nheads,
    seqlen_q, seqlen_k).
    """
    op = "flash_attn_func"
    check_qkv(op, q, k, v, DENSE, DENSE)
    if q.shape[0] != k.shape[0]:
        raise ValueError(f"{op}: q and k must have one batch_size, got {q.shape[0]} and {k.shape[0]}")
    options = score_options(op, q, softmax_scale, causal, window_size, softcap) | {"dropout_p": dropout_p}
    check_slopes(op, alibi_slopes, q.shape[0], q.shape[2])
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    operands = Operands(q, k, v, alibi=alibi_slopes, seed=dropout_seed(dropout_p, q))
    out, lse = attention_packed(operands, **options)
    out = out.transpose(1, 2).contiguous()
    return (out, lse, attention_probabilities(operands, **options)) if return_attn_probs else out


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """`flash_attn_func` with k and v in one tensor, kv (batch_size, seqlen_k, 2, nheads_k, headdim)."""
    check_stacked("flash_attn_kvpacked_func", "kv", kv, "(batch_size, seqlen, 2, nheads_k, headdim)")
    return flash_attn_func(
        q, *kv.unbind(2), dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
        return_attn_probs,
    )  # fmt: skip


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """`flash_attn_func` with q, k and v in one tensor, qkv (batch_size, seqlen, 3, nheads, headdim)."""
    check_stacked("flash_attn_qkvpacked_func", "qkv", qkv, "(batch_size, seqlen, 3, nheads, headdim)")
    return flash_attn_func(
        *qkv.unbind(2), dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
        return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """`flash_attn_func` for sequences of any lengths, 0 included, one after the other: q (total_q, nheads, headdim),
    k and v (total_k, nheads_k, headdim) -> out (total_q, nheads, headdim of v).

    cu_seqlens_q, cu_seqlens_k: int32 (batch_size + 1,), where each sequence begins, from 0, and where the last one
    ends; max_seqlen_q, max_seqlen_k: no sequence is longer. Rows of q beyond the last end give 0 and -inf.
    block_table: int32 (batch_size, max_blocks), k and v are pages then, (num_blocks, page_size, nheads_k, headdim),
    key j of sequence b is row j % page_size of page block_table[b, j // page_size], and cu_seqlens_k gives lengths.
    Differentiable without a block_table; with one, the backward raises NotImplementedError.

    With return_attn_probs also softmax_lse, float32 (nheads, total_q), and S_dmask (batch_size, nheads, max_seqlen_q,
    max_seqlen_k), zero outside of the sequences.
    """
    op = "flash_attn_varlen_func"
    check_qkv(op, q, k, v, PACKED, PACKED if block_table is None else PAGES)
    options = score_options(op, q, softmax_scale, causal, window_size, softcap) | {"dropout_p": dropout_p}
    check_cu_seqlens(op, "q", cu_seqlens_q, max_seqlen_q, q.shape[0])
    check_cu_seqlens(op, "k", cu_seqlens_k, max_seqlen_k, k.shape[0] if block_table is None else None)
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            f"{op}: cu_seqlens_q and cu_seqlens_k must have one length, batch_size + 1, got {len(cu_seqlens_q)} and "
            f"{len(cu_seqlens_k)}"
        )
    check_slopes(op, alibi_slopes, len(cu_seqlens_q) - 1, q.shape[1])
    q_bounds, k_bounds = cu_seqlens_q.long(), cu_seqlens_k.long()
    k_start, k_end = k_bounds[:-1], k_bounds[1:]
    if block_table is None:
        k, v = (t.transpose(0, 1).unsqueeze(0) for t in (k, v))
    else:
        k_start, k_end = torch.zeros_like(k_start), k_end - k_start
        check_pages(op, "block_table", block_table, k_end, k)
        block_table = contiguous_last(block_table)
        k, v = k.transpose(1, 2), v.transpose(1, 2)
    operands = Operands(
        q.transpose(0, 1).unsqueeze(0), k, v, alibi=alibi_slopes, q_start=q_bounds[:-1], q_end=q_bounds[1:],
        k_start=k_start, k_end=k_end, block_table=block_table, seed=dropout_seed(dropout_p, q),
    )  # fmt: skip
    out, lse = attention_packed(operands, **options)
    out = out[0].transpose(0, 1).contiguous()
    if not return_attn_probs:
        return out
    return out, lse[0], attention_probabilities(operands, (max_seqlen_q, max_seqlen_k), **options)


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """`flash_attn_varlen_func` with k and v in one tensor, kv (total_k, 2, nheads_k, headdim)."""
    check_stacked("flash_attn_varlen_kvpacked_func", "kv", kv, "(total_k, 2, nheads_k, headdim)")
    return flash_attn_varlen_func(
        q, *kv.unbind(1), cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """`flash_attn_varlen_func` with q, k and v in one tensor, qkv (total, 3, nheads, headdim), of the same lengths."""
    check_stacked("flash_attn_varlen_qkvpacked_func", "qkv", qkv, "(total, 3, nheads, headdim)")
    return flash_attn_varlen_func(
        *qkv.unbind(1), cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p, softmax_scale, causal, window_size,
        softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of q (batch_size, seqlen_q, nheads, headdim) to the caches k_cache and v_cache (batch_size_cache,
    seqlen_cache, nheads_k, headdim), after writing k and v (batch_size, seqlen_new, nheads_k, headdim) into them in
    place: out (batch_size, seqlen_q, nheads, headdim of v), with return_softmax_lse also softmax_lse, float32
    (batch_size, nheads, seqlen_q). Without gradient.

    cache_seqlens: int or int32 (batch_size,): how many keys a sequence has before k; default all of the cache. Token t
    of k becomes key cache_seqlens + t; queries see the keys up to there.
    cache_batch_idx: int32 (batch_size,): the row of the cache that a sequence has, default 0, 1, ...; of sequences that
    share a row the last one writes. cache_leftpad: int32 (batch_size,): a sequence's first key, default 0.
    block_table: int32 (batch_size, max_blocks): the caches are pages, (num_blocks, page_size, nheads_k, headdim), of
    any size, and key j of sequence b is row j % page_size of page block_table[b, j // page_size].
    rotary_cos, rotary_sin: (seqlen_ro, rotary_dim / 2), only with k: rotates k by the positions cache_seqlens + t
    (padding counts), q by cache_seqlens + i if causal or with a window, else by cache_seqlens; rotary_interleaved:
    pairs are the channels (2i, 2i + 1), else (i, i + rotary_dim / 2).
    num_splits: ignored; how keys are split depends on their number alone.

    The caches may be of another dtype than q if that is float32, k and v of any. Raises as the other functions do,
    before anything is written, and ValueError for a tensor that needs a gradient.
    """
    op = "flash_attn_with_kvcache"
    check_qkv(op, q, k_cache, v_cache, DENSE, DENSE if block_table is None else PAGES)
    check_new_keys(op, k, v, q, k_cache, v_cache)
    options = score_options(op, q, softmax_scale, causal, window_size, softcap)
    batch, seqlen_q, nheads, head_dim = q.shape
    check_slopes(op, alibi_slopes, batch, nheads)
    seqlen_new = 0 if k is None else k.shape[1]

    # Where each sequence's keys lie. A row of a cache that cache_batch_idx names is a page, too.
    pages, name = block_table, "block_table"
    if cache_batch_idx is not None:
        if block_table is not None:
            raise ValueError(f"{op}: cache_batch_idx is for a cache without pages; index block_table with it instead")
        check_per_sequence(op, "cache_batch_idx", cache_batch_idx, batch)
        pages, name = cache_batch_idx.unsqueeze(1), "cache_batch_idx"
    elif block_table is None:
        if k_cache.shape[0] < batch:
            raise ValueError(f"{op}: the cache must have a row for each of {batch} sequences, got {k_cache.shape[0]}")
        k_cache, v_cache = k_cache[:batch], v_cache[:batch]
    else:
        check_per_sequence(op, name, block_table, batch, dims=2)
    capacity = k_cache.shape[1] * (1 if pages is None else pages.shape[1])
    if cache_seqlens is None and k is not None:
        raise ValueError(f"{op}: k and v need cache_seqlens, which says where in the cache they go")
    if cache_seqlens is None or isinstance(cache_seqlens, int):
        length = capacity if cache_seqlens is None else cache_seqlens
        cache_seqlens = torch.full((batch,), length, dtype=torch.int32, device=q.device)
    check_per_sequence(op, "cache_seqlens", cache_seqlens, batch)
    if cache_leftpad is not None:
        check_per_sequence(op, "cache_leftpad", cache_leftpad, batch)
    check_cache_range(op, cache_leftpad, cache_seqlens, seqlen_new, capacity)
    end = cache_seqlens.long() + seqlen_new
    if pages is not None:
        check_pages(op, name, pages, end, k_cache)
        pages = contiguous_last(pages)

    q, k_cache, v_cache = (t.transpose(1, 2) for t in (q, k_cache, v_cache))
    if rotary_cos is not None or rotary_sin is not None:
        if k is None:
            raise ValueError(f"{op}: rotary_cos and rotary_sin need k and v: keys in the cache are rotated already")
        moving = causal or options["window"] != (-1, -1)
        steps = max(seqlen_new, seqlen_q if moving else 1)
        check_rotary(op, rotary_cos, rotary_sin, head_dim, cache_seqlens, steps)
        start = cache_seqlens.long().unsqueeze(1)
        positions = start + torch.arange(seqlen_q, device=q.device) if moving else start.expand(batch, seqlen_q)
        q = _rotated(q, rotary_cos, rotary_sin, positions, rotary_interleaved)
        new_positions = start + torch.arange(seqlen_new, device=q.device)
        k = _rotated(k.transpose(1, 2), rotary_cos, rotary_sin, new_positions, rotary_interleaved).transpose(1, 2)
    if k is not None:
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        kv_append(k_cache, v_cache, k, v, cache_seqlens=cache_seqlens, block_table=pages)
    k_start = None if cache_leftpad is None else cache_leftpad.long()
    operands = Operands(q, k_cache, v_cache, alibi=alibi_slopes, k_start=k_start, k_end=end, block_table=pages)
    out, lse = attention_packed(operands, **options)
    out = out.transpose(1, 2).contiguous()
    return (out, lse) if return_softmax_lse else out


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    if x.dtype != torch.float64:
        cos, sin = cos.float(), sin.float()
    return rope(x, x[:, :0], cos, sin, positions=positions, interleaved=interleaved)[0]
