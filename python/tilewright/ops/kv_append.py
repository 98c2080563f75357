"""Writing new keys and values into a cache, dense or paged (https://arxiv.org/abs/2309.06180)."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

from tilewright import _C
from tilewright.ops.quantized_kv import QuantizedKV, append_quantized
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


@overload
def kv_append(quantized_kv: QuantizedKV, k: Tensor, v: Tensor, /) -> QuantizedKV: ...
@overload
def kv_append(
    cache_k: Tensor,
    cache_v: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor | None = None,
    *,
    block_table: Tensor | None = None,
    cache_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...
def kv_append(
    cache_k, cache_v=None, k=None, v=None, positions=None, *, block_table=None, cache_seqlens=None, backend="auto"
):
    """Writes k and v into their caches in place, in the caches' dtypes, and returns the caches.

    k, v: (batch, kv_heads, seq, head_dim), their head_dims may differ; cache_k, cache_v: (batch, kv_heads,
    max_len, head_dim). All float32, bfloat16 or float16 in any combination (float64 runs in torch). Token t
    of batch element b goes to slot

    - ``positions[t]`` or ``positions[b, t]``: int64, (seq,) or (batch, seq),
    - or ``cache_seqlens[b] + t``: int32 or int64, (batch,),
    - or t.

    With ``block_table``, int32 (batch, max_blocks), the caches are pages, (num_blocks, kv_heads, page_size,
    head_dim), and slot p is slot ``p % page_size`` of page ``block_table[b, p // page_size]``. Of two tokens
    with one slot the later one stays (batch elements in order, tokens in order).

    ``kv_append(quantized_kv, k, v)`` appends the tokens to every sequence of a `QuantizedKV` instead, and returns it;
    k and v have its head_dim, and there are no other arguments.

    Raises ValueError, before anything is written, for slots or pages out of range, other shapes or dtypes,
    memory that overlaps, both positions and cache_seqlens, a QuantizedKV without room, or a tensor that needs a
    gradient; NotImplementedError for a missing backend. On a GPU, where looking at values would wait for it, tokens
    whose slot or page does not exist are not written instead.
    """
    if isinstance(cache_k, QuantizedKV):
        if cache_v is None:
            cache_v, k = k, v  # passed by name
        elif v is not None:
            raise TypeError("kv_append: a QuantizedKV holds keys and values; call kv_append(quantized_kv, k, v)")
        if any(x is not None for x in (positions, block_table, cache_seqlens)):
            raise ValueError(
                "kv_append: a QuantizedKV grows at its end; positions, block_table and cache_seqlens do not apply"
            )
        return append_quantized(cache_k, cache_v, k)
    if cache_v is None or k is None or v is None:
        raise TypeError("kv_append: expected (cache_k, cache_v, k, v) or (quantized_kv, k, v)")
    if backend == "auto" and direct(cache_k, cache_v, k, v, positions, block_table, cache_seqlens):
        _kv_append(cache_k, cache_v, k, v, positions, block_table, cache_seqlens)
        return cache_k, cache_v
    check_backend("kv_append", backend)
    check_device("kv_append", cache_k=cache_k, cache_v=cache_v, k=k, v=v, positions=positions)
    check_device("kv_append", cache_k=cache_k, block_table=block_table, cache_seqlens=cache_seqlens)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (cache_k, cache_v, k, v)):
        raise ValueError("kv_append: writes in place and has no gradient; detach the tensors or use no_grad")
    torch.ops.tilewright.kv_append(cache_k, cache_v, k, v, positions, block_table, cache_seqlens, backend)
    return cache_k, cache_v


def kv_append_reference(
    cache_k: Tensor,
    cache_v: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor | None = None,
    *,
    block_table: Tensor | None = None,
    cache_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What the caches hold after `kv_append`, as new tensors: token by token in plain torch."""
    batch, _, seq, _ = k.shape
    out_k, out_v = cache_k.clone(), cache_v.clone()
    for b in range(batch):
        for t in range(seq):
            slot, outer = t if cache_seqlens is None else int(cache_seqlens[b]) + t, b
            if positions is not None:
                slot = int(positions.expand(batch, seq)[b, t])
            if block_table is not None:
                outer, slot = int(block_table[b, slot // cache_k.shape[2]]), slot % cache_k.shape[2]
            out_k[outer, :, slot] = k[b, :, t].to(out_k.dtype)
            out_v[outer, :, slot] = v[b, :, t].to(out_v.dtype)
    return out_k, out_v


def _kv_append(cache_k, cache_v, k, v, positions, block_table, cache_seqlens, server="cpu"):
    if server == "reference" or torch.float64 in (cache_k.dtype, cache_v.dtype, k.dtype, v.dtype):
        record_reference("kv_append")
        out_k, out_v = kv_append_reference(
            cache_k, cache_v, k, v, positions, block_table=block_table, cache_seqlens=cache_seqlens
        )
        cache_k.copy_(out_k)
        cache_v.copy_(out_v)
        return
    append = _C.kv_append if server == "cpu" else twin(server, "kv_append").kv_append
    append(cache_k, cache_v, contiguous_last(k), contiguous_last(v), positions, block_table, cache_seqlens)
    torch.autograd.graph.increment_version((cache_k, cache_v))  # a graph that saved them must notice


def _kv_append_any(cache_k, cache_v, k, v, positions, block_table, cache_seqlens, backend):
    server = served_by("kv_append", backend, k)
    _kv_append(cache_k, cache_v, k, v, positions, block_table, cache_seqlens, server)


register(
    "kv_append(Tensor(a!) cache_k, Tensor(b!) cache_v, Tensor k, Tensor v, Tensor? positions,"
    " Tensor? block_table, Tensor? cache_seqlens, str backend) -> ()",
    _kv_append_any,
    lambda *_: None,
    on_gpu=True,
)
