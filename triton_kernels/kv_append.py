"""Writing new keys and values into a cache, dense or paged: a copy with a dtype conversion, where memory decides.

A program takes one token and a block of heads, of k or of v. Slots and pages are checked on the device, where nothing
can raise: a token whose slot or page does not exist is not written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tilewright.triton_kernels.launch import check_floats, run

_OP = "kv_append"
_TILE = 2048  # elements of a program: 16 a thread
# Sizes that bound loops and masks of tokens and heads: other values need no other code.
ANY_VALUE = [
    "seq", "batch", "heads", "kv_heads", "table_blocks", "num_blocks", "page_size", "max_positions", "seqlens_stride",
    "position_strides", "table_strides",
]  # fmt: skip
_CONFIGS = [triton.Config({}, num_warps=4, num_stages=1)]


def kv_append(
    cache_k: Tensor,
    cache_v: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor | None = None,
    block_table: Tensor | None = None,
    cache_seqlens: Tensor | None = None,
) -> None:
    """`tilewright.kv_append`, whose docstring says what goes where."""
    check_caches(_OP, cache_k, cache_v, k, v, positions, block_table, cache_seqlens)
    batch, heads, seq, dim = k.shape
    v_dim = v.shape[3]
    columns = triton.next_power_of_2(max(dim, v_dim, 1))
    block = max(1, min(_TILE // columns, triton.next_power_of_2(heads)))
    blocks = triton.cdiv(heads, block)
    run(
        _append,
        batch * seq * 2 * blocks,
        {
            "k": k, "v": v, "cache_k": cache_k, "cache_v": cache_v, "k_strides": k.stride()[:3],
            "v_strides": v.stride()[:3], "k_cache_strides": cache_k.stride()[:3],
            "v_cache_strides": cache_v.stride()[:3], "heads": heads, "seq": seq, "dim": dim, "v_dim": v_dim,
            "HEADS": block, "COLUMNS": columns,
        } | slot_arguments(cache_k, batch, positions, block_table, cache_seqlens),
        _CONFIGS,
    )  # fmt: skip


def check_caches(
    op: str, cache_k: Tensor, cache_v: Tensor, k: Tensor, v: Tensor, positions: Tensor | None,
    block_table: Tensor | None, cache_seqlens: Tensor | None,
) -> None:  # fmt: skip
    """Raise ValueError for shapes, dtypes and strides that `kv_append` does not take."""
    check_floats(op, cache_k=cache_k, cache_v=cache_v, k=k, v=v)
    for name, cache, x in (("k", cache_k, k), ("v", cache_v, v)):
        if (
            cache.dim() != 4
            or x.dim() != 4
            or (cache.shape[1], cache.shape[3]) != (x.shape[1], x.shape[3])
            or (block_table is None and cache.shape[0] != x.shape[0])
        ):
            raise ValueError(
                f"{op}: {name} must be (batch, kv_heads, seq, head_dim) and its cache (batch, kv_heads, max_len, "
                f"head_dim) or, with a block_table, (num_blocks, kv_heads, page_size, head_dim), got {tuple(x.shape)} "
                f"and {tuple(cache.shape)}"
            )
        for what, t in ((name, x), (f"cache_{name}", cache)):
            if t.stride(3) != 1 and t.shape[3] > 1 and t.numel():
                raise ValueError(f"{op}: {what} must be contiguous in its last dimension, got stride {t.stride(3)}")
    if k.shape[:3] != v.shape[:3] or cache_k.shape[:3] != cache_v.shape[:3]:
        raise ValueError(
            f"{op}: k and v, and their caches, may differ in head_dim only, got {tuple(k.shape)}, {tuple(v.shape)} and "
            f"{tuple(cache_k.shape)}, {tuple(cache_v.shape)}"
        )
    for name, cache in (("cache_k", cache_k), ("cache_v", cache_v)):
        if any(size > 1 and stride == 0 for size, stride in zip(cache.shape, cache.stride(), strict=True)):
            raise ValueError(f"{op}: {name} must not share memory within itself (expanded)")
    batch, _, seq, _ = k.shape
    if positions is not None and cache_seqlens is not None:
        raise ValueError(f"{op}: positions and cache_seqlens exclude each other, got both")
    if positions is not None:
        check_positions(op, positions, batch, seq)
    if cache_seqlens is not None and (
        cache_seqlens.shape != (batch,) or cache_seqlens.dtype not in (torch.int32, torch.int64)
    ):
        raise ValueError(
            f"{op}: cache_seqlens must be int32 or int64 of shape ({batch},), got {cache_seqlens.dtype} "
            f"{tuple(cache_seqlens.shape)}"
        )
    if block_table is not None and (
        block_table.dim() != 2 or block_table.shape[0] != batch or block_table.dtype != torch.int32
    ):
        raise ValueError(
            f"{op}: block_table must be int32 of shape ({batch}, max_blocks), got {block_table.dtype} "
            f"{tuple(block_table.shape)}"
        )


def check_positions(op: str, positions: Tensor, batch: int, seq: int) -> None:
    """Raise ValueError unless ``positions`` is int64 of shape (seq,), (1, seq) or (batch, seq)."""
    if positions.dtype != torch.int64 or positions.shape not in ((seq,), (1, seq), (batch, seq)):
        raise ValueError(
            f"{op}: positions must be int64 of shape ({seq},) or ({batch}, {seq}), got {positions.dtype} "
            f"{tuple(positions.shape)}"
        )


def position_strides(positions: Tensor | None) -> tuple[int, int]:
    """Elements between batch elements and between tokens."""
    if positions is None:
        return 0, 0
    return (positions.stride(0) if positions.dim() == 2 and positions.shape[0] > 1 else 0), positions.stride(-1)


def slot_arguments(
    cache: Tensor, batch: int, positions: Tensor | None, block_table: Tensor | None, cache_seqlens: Tensor | None
) -> dict:
    """What `slot_of` reads."""
    return {
        "positions": positions,
        "block_table": block_table,
        "cache_seqlens": cache_seqlens,
        "position_strides": position_strides(positions),
        "table_strides": (0, 0) if block_table is None else block_table.stride(),
        "seqlens_stride": 0 if cache_seqlens is None else cache_seqlens.stride(0),
        "table_blocks": 0 if block_table is None else block_table.shape[1],
        "num_blocks": cache.shape[0],
        "page_size": cache.shape[2],
        "batch": batch,
    }


@triton.jit
def _place(token, seq, positions, block_table, cache_seqlens, position_strides, table_strides, seqlens_stride,
           table_blocks, num_blocks, page_size):  # fmt: skip
    """(outer index of the cache or -1, slot, position) of tokens, counted over (batch, seq); all int32."""
    b, t = token // seq, token % seq
    if positions is not None:
        position = tl.load(positions + b.to(tl.int64) * position_strides[0] + t.to(tl.int64) * position_strides[1])
    elif cache_seqlens is not None:
        position = tl.load(cache_seqlens + b.to(tl.int64) * seqlens_stride).to(tl.int64) + t
    else:
        position = t
    # Beyond int32 there are no slots. Divisions of 64 bits are calls of many instructions.
    position = tl.minimum(tl.maximum(position, -1), 0x7FFFFFFF).to(tl.int32)
    if block_table is None:
        outer, slot = tl.where((position >= 0) & (position < page_size), b, -1), position
    else:
        index, slot = position // page_size, position % page_size
        known = (position >= 0) & (index < table_blocks)
        at = b.to(tl.int64) * table_strides[0] + index.to(tl.int64) * table_strides[1]
        page = tl.load(block_table + at, mask=known, other=-1)
        outer = tl.where(page < num_blocks, page, -1)
    return outer, slot, position


@triton.jit
def slot_of(token, seq, batch, positions, block_table, cache_seqlens, position_strides, table_strides, seqlens_stride,
            table_blocks, num_blocks, page_size):  # fmt: skip
    """(outer index of the cache, slot, position, whether to write) of one token, int64. Of tokens with one slot the
    last one writes."""
    outer, slot, position = _place(token, seq, positions, block_table, cache_seqlens, position_strides, table_strides,
                                   seqlens_stride, table_blocks, num_blocks, page_size)  # fmt: skip
    write = outer >= 0
    if positions is not None or block_table is not None:  # otherwise no two tokens share a slot
        rivals = 0
        last = batch * seq
        for first in range(token + 1, last, 128):
            other = tl.minimum(first + tl.arange(0, 128), last - 1)
            place, at, _position = _place(other, seq, positions, block_table, cache_seqlens, position_strides,
                                          table_strides, seqlens_stride, table_blocks, num_blocks,
                                          page_size)  # fmt: skip
            rivals += tl.sum(((place == outer) & (at == slot)).to(tl.int32), 0)
        write = write & (rivals == 0)
    return outer.to(tl.int64), slot.to(tl.int64), position.to(tl.int64), write


@triton.jit
def copy_heads(x, cache, start, strides, to, head_stride, first, heads, dim, write, HEADS: tl.constexpr,
               COLUMNS: tl.constexpr):  # fmt: skip
    """Copy heads [first, first + HEADS) of a token that begins at x + start to cache + to."""
    head = first + tl.arange(0, HEADS)
    column = tl.arange(0, COLUMNS)
    inside = ((head < heads) & write)[:, None] & (column < dim)[None, :]
    value = tl.load(x + start + head.to(tl.int64)[:, None] * strides[1] + column[None, :], mask=inside)
    at = to + head.to(tl.int64)[:, None] * head_stride + column[None, :]
    tl.store(cache + at, value.to(cache.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=ANY_VALUE)
def _append(k, v, cache_k, cache_v, k_strides, v_strides, k_cache_strides, v_cache_strides, heads, seq, dim, v_dim,
            positions, block_table, cache_seqlens, position_strides, table_strides, seqlens_stride, table_blocks,
            num_blocks, page_size, batch, HEADS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    blocks = tl.cdiv(heads, HEADS)
    token = tl.program_id(0) // (2 * blocks)
    part = tl.program_id(0) % (2 * blocks)
    outer, slot, _position, write = slot_of(token, seq, batch, positions, block_table, cache_seqlens, position_strides,
                                    table_strides, seqlens_stride, table_blocks, num_blocks, page_size)  # fmt: skip
    b, t = (token // seq).to(tl.int64), (token % seq).to(tl.int64)
    if part < blocks:
        copy_heads(k, cache_k, b * k_strides[0] + t * k_strides[2], k_strides,
                   outer * k_cache_strides[0] + slot * k_cache_strides[2], k_cache_strides[1], part * HEADS, heads, dim,
                   write, HEADS, COLUMNS)  # fmt: skip
    else:
        copy_heads(v, cache_v, b * v_strides[0] + t * v_strides[2], v_strides,
                   outer * v_cache_strides[0] + slot * v_cache_strides[2], v_cache_strides[1], (part - blocks) * HEADS,
                   heads, v_dim, write, HEADS, COLUMNS)  # fmt: skip
