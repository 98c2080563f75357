"""Rotary position embedding (https://arxiv.org/abs/2104.09864), alone or with the append to a cache behind it.

A program takes one token and a block of heads of q, k or v. Each element is read and written once, so memory
decides; every product and sum is rounded by itself, as on the CPU. Positions are checked on the device, where nothing
can raise: a token whose position the tables do not have becomes NaN.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tilewright.triton_kernels.kv_append import (
    ANY_VALUE,
    check_caches,
    check_positions,
    copy_heads,
    position_strides,
    slot_arguments,
    slot_of,
)
from tilewright.triton_kernels.launch import check_floats, run

_TILE = 1024  # pairs of a program: 8 a thread
_CONFIGS = [triton.Config({}, num_warps=4, num_stages=1)]


def rope_into(
    out_q: Tensor, out_k: Tensor, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None,
    interleaved: bool, rotary_dim: int | None,
) -> None:  # fmt: skip
    """out_q, out_k = `tilewright.rope`; they may be q and k themselves."""
    _check("rope", q, k, cos, sin, positions, rotary_dim)
    if positions is None and q.shape[2] > cos.shape[0]:
        raise ValueError(f"rope: cos and sin must reach {q.shape[2]} positions, got {tuple(cos.shape)}")
    batch, heads, seq, dim = q.shape
    kv_heads, half = k.shape[1], cos.shape[1]
    inplace = out_q.data_ptr() == q.data_ptr() or out_k.data_ptr() == k.data_ptr()
    rest = 0 if inplace or dim == 2 * half else triton.next_power_of_2(dim - 2 * half)
    block = _heads(max(heads, kv_heads), half)
    run(
        _rope,
        batch * seq * (triton.cdiv(heads, block) + triton.cdiv(kv_heads, block)),
        {
            "q": q, "k": k, "out_q": out_q, "out_k": out_k, "cos": cos, "sin": sin, "positions": positions,
            "q_strides": q.stride()[:3], "k_strides": k.stride()[:3], "out_q_strides": out_q.stride()[:3],
            "out_k_strides": out_k.stride()[:3], "cos_strides": (cos.stride(0), sin.stride(0)),
            "position_strides": position_strides(positions), "seq": seq, "heads": heads, "kv_heads": kv_heads,
            "dim": dim, "half": half, "max_positions": cos.shape[0], "INTERLEAVED": interleaved, "INPLACE": inplace,
            "HEADS": block, "HALF": triton.next_power_of_2(half), "REST": rest,
        },
        _CONFIGS,
        fuse=False,
    )  # fmt: skip


def rope_append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    cache_k: Tensor,
    cache_v: Tensor,
    positions: Tensor | None = None,
    *,
    block_table: Tensor | None = None,
    cache_seqlens: Tensor | None = None,
    interleaved: bool = False,
    rotary_dim: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`tilewright.rope` and `tilewright.kv_append` in one launch: the rotated q, in ``out`` (which may be q itself),
    while the rotated k and v go to the caches. A token's angle is that of its slot's number: ``positions``, or
    ``cache_seqlens + t``, or t."""
    _check("rope_append", q, k, cos, sin, positions, rotary_dim)
    check_caches("rope_append", cache_k, cache_v, k, v, positions, block_table, cache_seqlens)
    batch, heads, seq, dim = q.shape
    kv_heads, half = k.shape[1], cos.shape[1]
    out = torch.empty_like(q) if out is None else out
    if out.shape != q.shape or out.dtype != q.dtype or (out.stride(3) != 1 and dim > 1):
        raise ValueError(
            f"rope_append: out must be as q, {q.dtype} {tuple(q.shape)}, got {out.dtype} {tuple(out.shape)}"
        )
    block = _heads(max(heads, kv_heads), max(half, v.shape[3] // 2))
    blocks = triton.cdiv(heads, block) + 2 * triton.cdiv(kv_heads, block)
    run(
        _rope_append,
        batch * seq * blocks,
        {
            "q": q, "k": k, "v": v, "out": out, "cache_k": cache_k, "cache_v": cache_v, "cos": cos, "sin": sin,
            "q_strides": q.stride()[:3], "k_strides": k.stride()[:3], "v_strides": v.stride()[:3],
            "out_strides": out.stride()[:3], "k_cache_strides": cache_k.stride()[:3],
            "v_cache_strides": cache_v.stride()[:3], "cos_strides": (cos.stride(0), sin.stride(0)), "seq": seq,
            "heads": heads, "kv_heads": kv_heads, "dim": dim, "half": half, "v_dim": v.shape[3],
            "max_positions": cos.shape[0], "INTERLEAVED": interleaved, "INPLACE": out.data_ptr() == q.data_ptr(),
            "HEADS": block, "HALF": triton.next_power_of_2(half), "V_COLUMNS": triton.next_power_of_2(v.shape[3]),
            "REST": 0 if dim == 2 * half else triton.next_power_of_2(dim - 2 * half),
        } | slot_arguments(cache_k, batch, positions, block_table, cache_seqlens),
        _CONFIGS,
        fuse=False,
    )  # fmt: skip
    return out


def _heads(heads: int, half: int) -> int:
    """Heads that a program takes."""
    return max(1, min(_TILE // triton.next_power_of_2(max(half, 1)), triton.next_power_of_2(max(heads, 1))))


def _check(
    op: str, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, rotary_dim: int | None
) -> None:
    if q.dim() != 4 or k.dim() != 4:
        raise ValueError(
            f"{op}: q and k must be (batch, heads, seq, head_dim), got {tuple(q.shape)} and {tuple(k.shape)}"
        )
    check_floats(op, q=q)
    if k.dtype != q.dtype:
        raise ValueError(f"{op}: q and k must have one dtype, got {q.dtype} and {k.dtype}")
    if (k.shape[0], *k.shape[2:]) != (q.shape[0], *q.shape[2:]):
        raise ValueError(
            f"{op}: q and k must agree in batch, seq and head_dim, got {tuple(q.shape)} and {tuple(k.shape)}"
        )
    for name, t in (("q", q), ("k", k), ("cos", cos), ("sin", sin)):
        if t.stride(-1) != 1 and t.shape[-1] > 1 and t.numel():
            raise ValueError(f"{op}: {name} must be contiguous in its last dimension, got stride {t.stride(-1)}")
    if cos.dim() != 2 or cos.shape != sin.shape or cos.dtype != torch.float32 or sin.dtype != torch.float32:
        raise ValueError(
            f"{op}: cos and sin must be float32 of one shape (max_positions, rotary_dim / 2), got {cos.dtype} "
            f"{tuple(cos.shape)} and {sin.dtype} {tuple(sin.shape)}"
        )
    rotary = 2 * cos.shape[1] if rotary_dim is None else rotary_dim
    if rotary != 2 * cos.shape[1] or not 0 < rotary <= q.shape[3]:
        raise ValueError(
            f"{op}: rotary_dim must be twice the last dimension of cos ({cos.shape[1]}), positive and at most head_dim "
            f"({q.shape[3]}), got {rotary}"
        )
    if positions is not None:
        check_positions(op, positions, q.shape[0], q.shape[2])


@triton.jit
def _rotate(x, out, start, head_stride, to, out_head_stride, first, heads, dim, half, cos, sin, write,
            INTERLEAVED: tl.constexpr, INPLACE: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
            REST: tl.constexpr):  # fmt: skip
    """Rotate heads [first, first + HEADS) of the token at x + start into out + to; cos and sin are its angles."""
    head = first + tl.arange(0, HEADS)
    known = (head < heads) & write
    x += start + head.to(tl.int64)[:, None] * head_stride
    out += to + head.to(tl.int64)[:, None] * out_head_stride
    if INTERLEAVED:
        column = tl.arange(0, 2 * HALF)[None, :]
        inside = known[:, None] & (column < 2 * half)
        a, b = tl.split(tl.reshape(tl.load(x + column, mask=inside), (HEADS, HALF, 2)))
    else:
        column = tl.arange(0, HALF)[None, :]
        inside = known[:, None] & (column < half)
        a = tl.load(x + column, mask=inside)
        b = tl.load(x + half + column, mask=inside)
    a, b = a.to(tl.float32), b.to(tl.float32)
    # Rounded to x's dtype first: a cache of another dtype gets what rope alone gives.
    left = (a * cos[None, :] - b * sin[None, :]).to(x.dtype.element_ty).to(out.dtype.element_ty)
    right = (b * cos[None, :] + a * sin[None, :]).to(x.dtype.element_ty).to(out.dtype.element_ty)
    if INPLACE:  # where the tile is smaller than the program, several threads read one element
        tl.debug_barrier()
    if INTERLEAVED:
        tl.store(out + column, tl.reshape(tl.join(left, right), (HEADS, 2 * HALF)), mask=inside)
    else:
        tl.store(out + column, left, mask=inside)
        tl.store(out + half + column, right, mask=inside)
    if REST > 0:
        column = 2 * half + tl.arange(0, REST)[None, :]
        inside = known[:, None] & (column < dim)
        tl.store(out + column, tl.load(x + column, mask=inside).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _angles(cos, sin, position, strides, half, max_positions, HALF: tl.constexpr):
    """cos and sin of a position; NaN where the tables do not have it."""
    column = tl.arange(0, HALF)
    known = (column < half) & (position >= 0) & (position < max_positions)
    nothing = float("nan")
    c = tl.load(cos + position * strides[0] + column, mask=known, other=nothing)
    s = tl.load(sin + position * strides[1] + column, mask=known, other=nothing)
    return c, s


@triton.jit(do_not_specialize=ANY_VALUE)
def _rope(q, k, out_q, out_k, cos, sin, positions, q_strides, k_strides, out_q_strides, out_k_strides, cos_strides,
          position_strides, seq, heads, kv_heads, dim, half, max_positions, INTERLEAVED: tl.constexpr,
          INPLACE: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr):  # fmt: skip
    q_blocks = tl.cdiv(heads, HEADS)
    blocks = q_blocks + tl.cdiv(kv_heads, HEADS)
    token = tl.program_id(0) // blocks
    part = tl.program_id(0) % blocks
    b, t = (token // seq).to(tl.int64), (token % seq).to(tl.int64)
    position = t
    if positions is not None:
        position = tl.load(positions + b * position_strides[0] + t * position_strides[1])
    c, s = _angles(cos, sin, position, cos_strides, half, max_positions, HALF)
    if part < q_blocks:
        _rotate(q, out_q, b * q_strides[0] + t * q_strides[2], q_strides[1],
                b * out_q_strides[0] + t * out_q_strides[2], out_q_strides[1], part * HEADS, heads, dim, half, c, s,
                True, INTERLEAVED, INPLACE, HEADS, HALF, REST)  # fmt: skip
    else:
        _rotate(k, out_k, b * k_strides[0] + t * k_strides[2], k_strides[1],
                b * out_k_strides[0] + t * out_k_strides[2], out_k_strides[1], (part - q_blocks) * HEADS, kv_heads, dim,
                half, c, s, True, INTERLEAVED, INPLACE, HEADS, HALF, REST)  # fmt: skip


@triton.jit(do_not_specialize=ANY_VALUE)
def _rope_append(q, k, v, out, cache_k, cache_v, cos, sin, q_strides, k_strides, v_strides, out_strides,
                 k_cache_strides, v_cache_strides, cos_strides, seq, heads, kv_heads, dim, half, v_dim, max_positions,
                 positions, block_table, cache_seqlens, position_strides, table_strides, seqlens_stride, table_blocks,
                 num_blocks, page_size, batch, INTERLEAVED: tl.constexpr, INPLACE: tl.constexpr, HEADS: tl.constexpr,
                 HALF: tl.constexpr, V_COLUMNS: tl.constexpr, REST: tl.constexpr):  # fmt: skip
    q_blocks, kv_blocks = tl.cdiv(heads, HEADS), tl.cdiv(kv_heads, HEADS)
    blocks = q_blocks + 2 * kv_blocks
    token = tl.program_id(0) // blocks
    part = tl.program_id(0) % blocks
    b, t = (token // seq).to(tl.int64), (token % seq).to(tl.int64)
    outer, slot, position, write = slot_of(token, seq, batch, positions, block_table, cache_seqlens, position_strides,
                                           table_strides, seqlens_stride, table_blocks, num_blocks,
                                           page_size)  # fmt: skip
    c, s = _angles(cos, sin, position, cos_strides, half, max_positions, HALF)
    if part < q_blocks:
        # In place, what is behind the rotated channels is copied onto itself.
        _rotate(q, out, b * q_strides[0] + t * q_strides[2], q_strides[1], b * out_strides[0] + t * out_strides[2],
                out_strides[1], part * HEADS, heads, dim, half, c, s, True, INTERLEAVED, INPLACE, HEADS, HALF,
                REST)  # fmt: skip
    elif part < q_blocks + kv_blocks:
        _rotate(k, cache_k, b * k_strides[0] + t * k_strides[2], k_strides[1],
                outer * k_cache_strides[0] + slot * k_cache_strides[2], k_cache_strides[1], (part - q_blocks) * HEADS,
                kv_heads, dim, half, c, s, write, INTERLEAVED, False, HEADS, HALF, REST)  # fmt: skip
    else:
        copy_heads(v, cache_v, b * v_strides[0] + t * v_strides[2], v_strides,
                   outer * v_cache_strides[0] + slot * v_cache_strides[2], v_cache_strides[1],
                   (part - q_blocks - kv_blocks) * HEADS, kv_heads, v_dim, write, HEADS, V_COLUMNS)  # fmt: skip
