"""Attention forward: out = softmax(scores(q k^T)) v without storing the scores
(https://arxiv.org/abs/2307.08691), and for few rows the keys split over programs and merged in order.

A program takes a tile of (query, head) rows of one KV head and walks over its keys, tile by tile: 4*rows*keys*dim
operations decide. Blocks of keys that every row sees whole are not checked. With few rows (decoding), reading k and v
decides: a program takes 256 keys, counted from the sequence's first, and leaves a partial result; a second kernel
merges them in ascending order. How keys are split depends on shapes alone. All of the sequence's bounds are read and
checked on the device, where nothing can raise: what does not exist gives NaN.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from tilewright.ops.attention_reference import Operands, Options
from tilewright.triton_kernels.attention_call import arguments_of, check, head_blocks, row_count, score_bytes
from tilewright.triton_kernels.attention_scores import (
    ANY_VALUE,
    diagonal_shift,
    dropout_rows,
    kept,
    key_range,
    scores,
    sequence_bounds,
    tile_of_sequence,
)
from tilewright.triton_kernels.launch import fitting, run, tile, with_room
from tilewright.triton_kernels.special import exactly

_CHUNK = 256  # keys of a program where keys are split
_FEW = 64  # rows up to which they are


def attention(t: Operands, options: Options, return_lse: bool) -> tuple[Tensor, Tensor | None]:
    """`tilewright.attention_packed`: (out, lse or None), out laid out as q."""
    check(t, options)
    batch, heads, seq_q, _ = t.q.shape
    v_dim = t.v.shape[3]
    out = torch.empty_like(t.q) if v_dim == t.q.shape[3] else t.q.new_empty((batch, heads, seq_q, v_dim))
    lse = torch.empty((batch, heads, seq_q), dtype=torch.float32, device=t.q.device) if return_lse else None
    if t.q_start is not None:  # rows that belong to no sequence
        out.zero_()
        if lse is not None:
            lse.fill_(-math.inf)
    if (out.numel() == 0 and (lse is None or lse.numel() == 0)) or (t.q_start is not None and len(t.q_start) == 0):
        return out, lse
    arguments = arguments_of(t, options) | {
        "out": out, "lse": lse, "out_strides": out.stride()[:3], "sinks": t.sinks,
        "drop_scale": 1 / ((1 - options.dropout_p) or 1.0),
    }  # fmt: skip
    rows, capacity = row_count(t), arguments["capacity"]
    # Where a tile of all of them fits: float32 rows of 512 columns are too large, and for AMD many are.
    few = t.q_start is None and rows <= _FEW
    configs = with_room(_few_rows(t, rows), lambda c: _shared(c, t), t.q.device) if few else []
    if configs and capacity > _CHUNK:
        _split(t, arguments, rows, capacity, configs)
        return out, lse
    kv_heads, group = t.k.shape[1], heads // t.k.shape[1]

    def programs(meta: dict) -> tuple[int]:
        if t.q_start is None:
            return (batch * kv_heads * triton.cdiv(rows, meta["BLOCK_M"]),)
        return (kv_heads * (seq_q * group // meta["BLOCK_M"] + len(t.q_start)),)

    run(
        _forward,
        programs,
        arguments | {"partial": None, "partial_stats": None, "splits": 1, "SPLIT": False, "CHUNK": 0},
        configs or fitting(_many_rows(t), lambda c: _shared(c, t), t.q.device),
        key=("seq_q", "capacity"),
    )
    return out, lse


def _split(t: Operands, arguments: dict, rows: int, capacity: int, configs: list[triton.Config]) -> None:
    batch, kv_heads, v_dim = t.q.shape[0], t.k.shape[1], t.v.shape[3]
    splits = triton.cdiv(capacity, _CHUNK)
    partial = torch.empty((batch * kv_heads, splits, rows, v_dim), dtype=torch.float32, device=t.q.device)
    # A row's together: one access reads those of many splits.
    stats = torch.empty((batch * kv_heads, rows, 2, splits), dtype=torch.float32, device=t.q.device)
    arguments = arguments | {"partial": partial, "partial_stats": stats, "splits": splits, "CHUNK": _CHUNK}
    run(
        _forward,
        batch * kv_heads * splits,
        arguments | {"SPLIT": True},
        configs,
        key=("capacity",),
    )
    names = ("partial", "partial_stats", "out", "lse", "sinks", "out_strides", "q_start", "q_end", "k_start", "k_end",
             "k_batch", "seq_q", "capacity", "k_rows", "kv_heads", "left", "right", "drop_scale", "splits", "CHUNK",
             "GROUP", "V_DIM", "BLOCK_V", "CAUSAL", "LEFT", "RIGHT", "UNIT", "SLOPE_UNIT")  # fmt: skip
    run(
        _merge,
        batch * kv_heads * rows,
        {name: arguments[name] for name in names},
        # One warp: sums stay in it, and rows are plenty.
        [triton.Config({"SPLITS": max(1, 2048 // arguments["BLOCK_V"])}, num_warps=1, num_stages=1)],
        fuse=False,  # lanes that reduce one value must round alike
    )


def _many_rows(t: Operands) -> list[triton.Config]:
    """Tiles of (rows, keys), the preferred one first. Larger ones spill registers: docs/gpu.md."""
    wide, fp32 = max(head_blocks(t)), t.q.dtype == torch.float32
    features = t.mask is not None or t.bias is not None or t.seed is not None
    if fp32:  # three products each: more registers
        shapes = [(32, 32, 4, 1)] if wide <= 64 else [(32, 16, 8, 1)] if wide <= 128 else [(16, 16, 8, 1)]
    elif features:  # what they load and hash takes registers
        if wide <= 64:
            shapes = [(64, 32, 4, 2), (32, 32, 4, 2)]
        elif wide <= 128:
            shapes = [(64, 32, 8, 2), (32, 32, 4, 2)]
        else:
            shapes = [(32, 32, 8, 1), (32, 16, 4, 1)] if wide <= 256 else [(16, 16, 8, 1)]
    elif wide <= 64:
        shapes = [(128, 64, 8, 3), (64, 64, 4, 2)]
    elif wide <= 128:
        # 4 stages: for devices with more shared memory than sm_80's, where 64 keys a step do not spill.
        shapes = [(64, 64, 8, 2)] if t.block_table is not None else [(128, 64, 8, 4), (128, 32, 8, 3), (64, 64, 8, 2)]
        shapes += [(64, 32, 8, 2)]
    elif wide <= 256:
        shapes = [(64, 64, 8, 2), (64, 32, 8, 2), (32, 32, 4, 2), (32, 16, 4, 1)]
    else:
        shapes = [(32, 16, 8, 2), (16, 16, 4, 1)]
    return [tile({"BLOCK_M": m, "BLOCK_N": n}, w, s, all_registers=fp32 or features) for m, n, w, s in shapes]


def _few_rows(t: Operands, rows: int) -> list[triton.Config]:
    """One tile of all ``rows`` rows, where reading keys and values decides."""
    wide, block, fp32 = max(head_blocks(t)), max(16, triton.next_power_of_2(rows)), t.q.dtype == torch.float32
    if fp32:
        if block == 64 and wide > 64:
            shapes = []
        else:
            shapes = [(16, 4, 1)] if wide <= 128 and block == 16 else [(16, 8, 1)]
    elif wide <= 128:
        shapes = [(32, 8, 3), (32, 8, 2)] if block == 64 and score_bytes(t) else [(64, 4, 3), (32, 4, 3), (32, 4, 2)]
    elif wide <= 256:
        shapes = [(32, 4, 3), (16, 4, 1)] if block == 16 else [(32, 8, 2), (16, 8, 1)]
    else:
        shapes = [(32, 8, 2), (16, 8, 1)] if block <= 32 else []
    every = fp32 or block == 32 or score_bytes(t) > 0
    return [tile({"BLOCK_M": block, "BLOCK_N": n}, w, s, all_registers=every) for n, w, s in shapes]


def _shared(config: triton.Config, t: Operands) -> int:
    """An upper bound of the shared memory of `_forward`: tiles of k, v, mask and bias in flight, and q and the
    probabilities on their way into an operand's layout."""
    m, n = config.kwargs["BLOCK_M"], config.kwargs["BLOCK_N"]
    block_d, block_v = head_blocks(t)
    in_flight = n * (block_d + block_v) * t.k.dtype.itemsize + m * n * score_bytes(t)
    return config.num_stages * in_flight + m * max(block_d, n) * t.q.dtype.itemsize + m * n * 4 + 1024


@triton.jit(do_not_specialize=ANY_VALUE)
def _forward(
    q, k, v, out, lse, mask, bias, alibi, sinks, q_start, q_end, k_start, k_end, k_batch, block_table, seed, partial,
    partial_stats, q_strides, k_strides, v_strides, out_strides, mask_strides, bias_strides, alibi_stride, table_stride,
    batch, seq_q, capacity, k_rows, page_size, num_pages, kv_heads, splits, scale, cap, left, right, keep_limit,
    drop_scale, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr,
    PACKED_KEYS: tl.constexpr, UNIT: tl.constexpr, SLOPE_UNIT: tl.constexpr, SPLIT: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    if SPLIT:
        split, pid = pid % splits, pid // splits
        kv_head, b, tile = pid % kv_heads, pid // kv_heads, 0
    elif q_start is None:
        tiles = tl.cdiv(seq_q * GROUP, BLOCK_M)
        tile = tiles - 1 - pid % tiles  # the last rows see most keys: first come the longest
        kv_head, b = pid // tiles % kv_heads, pid // tiles // kv_heads
    else:
        tiles = tl.num_programs(0) // kv_heads
        b, tile = tile_of_sequence(q_start, batch, tiles - 1 - pid % tiles, BLOCK_M, GROUP)
        kv_head = pid // tiles
    first_row, count, k_row, begin, length, known = sequence_bounds(
        b.to(tl.int64), q_start, q_end, k_start, k_end, k_batch, seq_q, capacity, k_rows, PACKED_KEYS
    )
    if tile * BLOCK_M < count * GROUP:
        row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        row_ok = row < count * GROUP
        query, head = row // GROUP, kv_head * GROUP + row % GROUP
        shift = diagonal_shift(count, length, CAUSAL)
        low_query = tile * BLOCK_M // GROUP
        high_query = tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // GROUP, count - 1)
        first, end, whole_first, whole_end = key_range(
            low_query, high_query, shift, length, left, right, CAUSAL, LEFT, RIGHT
        )
        if SPLIT:
            first = tl.maximum(first, split * CHUNK)
            end = tl.minimum(end, split * CHUNK + CHUNK)

        batch_row = b.to(tl.int64)
        q_row = first_row + query
        outer = batch_row * 0
        if q_start is None:
            outer = batch_row
        d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
        at = outer * q_strides[0] + head.to(tl.int64) * q_strides[1] + q_row * q_strides[2]
        q_tile = tl.load(q + at[:, None] + d[None, :], mask=row_ok[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
        if block_table is None:
            k += k_row * k_strides[0] + begin * k_strides[2]
            v += k_row * v_strides[0] + begin * v_strides[2]
        else:
            block_table += k_row * table_stride
        k += kv_head.to(tl.int64) * k_strides[1]
        v += kv_head.to(tl.int64) * v_strides[1]
        if keep_limit is not None:
            hash_first, hash_second = dropout_rows(seed, b, head, query)

        # In units of UNIT; the sink is one more logit, once.
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        weight = tl.zeros([BLOCK_M], tl.float32)
        if sinks is not None and not SPLIT:
            top = tl.load(sinks + head, mask=row_ok, other=float("-inf")) * SLOPE_UNIT
            weight = tl.where(top == float("-inf"), 0.0, 1.0)
        total = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)

        # Parts: blocks of keys that a window's left edge cuts; blocks that all rows see whole; the others. Each begins
        # at a multiple of BLOCK_N, for the compiler to see what may be loaded together.
        start = first // BLOCK_N * BLOCK_N
        whole_start = tl.maximum(tl.cdiv(whole_first, BLOCK_N) * BLOCK_N, start)
        whole_stop = tl.maximum(whole_end // BLOCK_N * BLOCK_N, whole_start)
        PRECISION: tl.constexpr = exactly(BLOCK_D, BLOCK_V)
        SIMPLE: tl.constexpr = SPLIT or q.dtype.element_ty == tl.float32  # one loop: less code
        for part in tl.static_range(2 if SIMPLE else 0 if LEFT else 1, 3):
            if SIMPLE:
                part_start, part_stop = start, end
            elif part == 0:
                part_start, part_stop = start, tl.minimum(whole_start, end)
            elif part == 1:
                part_start, part_stop = whole_start if LEFT else start, whole_stop
            else:
                part_start, part_stop = whole_stop, end
            for n in range(part_start, part_stop, BLOCK_N):
                key = n + tl.arange(0, BLOCK_N)
                seen = (key >= first) & (key < end)
                if block_table is None:
                    k_at, v_at = key.to(tl.int64) * k_strides[2], key.to(tl.int64) * v_strides[2]
                    present = key < end
                else:
                    slot = (begin + key).to(tl.int32)
                    page = tl.load(block_table + slot // page_size, mask=key < end, other=0)
                    present = (key < end) & (page >= 0) & (page < num_pages)
                    place = (slot % page_size).to(tl.int64)
                    k_at = page.to(tl.int64) * k_strides[0] + place * k_strides[2]
                    v_at = page.to(tl.int64) * v_strides[0] + place * v_strides[2]
                    seen &= present
                if part != 1 or block_table is not None:
                    k_tile = tl.load(
                        k + k_at[:, None] + d[None, :], mask=present[:, None] & (d < HEAD_DIM)[None, :], other=0.0
                    )
                    v_tile = tl.load(
                        v + v_at[:, None] + e[None, :], mask=seen[:, None] & (e < V_DIM)[None, :], other=0.0
                    )
                else:
                    k_tile = tl.load(k + k_at[:, None] + d[None, :], mask=(d < HEAD_DIM)[None, :], other=0.0)
                    v_tile = tl.load(v + v_at[:, None] + e[None, :], mask=(e < V_DIM)[None, :], other=0.0)
                raw = tl.dot(q_tile, tl.trans(k_tile.to(q_tile.dtype)), input_precision=PRECISION)
                s, _capped = scores(
                    raw, query, head, row_ok, key, n + BLOCK_N - 1, batch_row, begin, length, shift, mask, bias, alibi,
                    mask_strides, bias_strides, alibi_stride, scale, cap, left, right, part != 1, CAUSAL, LEFT, RIGHT,
                    SOFTCAP, SLOPE_UNIT,
                )  # fmt: skip
                if block_table is not None:  # a page that does not exist
                    s = tl.where(((key < end) & ~present)[None, :] & (s != float("-inf")), float("nan"), s)
                if mask is not None or bias is not None:  # what no row attends may be anything
                    attended = tl.max(((s != float("-inf")) & row_ok[:, None]).to(tl.int32), 0) > 0
                    v_tile = tl.where(attended[:, None], v_tile, 0.0)
                if SPLIT:
                    s = tl.where((key < end)[None, :] & (key >= first)[None, :], s, float("-inf"))
                new_top = tl.maximum(top, tl.max(s, 1))
                safe = tl.where(new_top == float("-inf"), 0.0, new_top)
                p = tl.exp2((s - safe[:, None]) * UNIT)
                shrink = tl.exp2((top - safe) * UNIT)
                weight = weight * shrink + tl.sum(p, 1)
                if keep_limit is not None:
                    p = tl.where(kept(hash_first, hash_second, key, keep_limit), p, 0.0)
                total = total * shrink[:, None]
                total = tl.dot(p.to(q_tile.dtype), v_tile.to(q_tile.dtype), total, input_precision=PRECISION)
                top = new_top

        if not known:
            weight = tl.full([BLOCK_M], float("nan"), tl.float32)
        if SPLIT:
            pair = (b * kv_heads + kv_head).to(tl.int64)
            at = (pair * splits + split) * (count * GROUP) + row
            tl.store(partial + at[:, None] * V_DIM + e[None, :], total, mask=row_ok[:, None] & (e < V_DIM)[None, :])
            stats_at = (pair * (count * GROUP) + row) * 2 * splits + split
            tl.store(partial_stats + stats_at, top, mask=row_ok)
            tl.store(partial_stats + stats_at + splits, weight, mask=row_ok)
        else:
            o_at = outer * out_strides[0] + head.to(tl.int64) * out_strides[1] + q_row * out_strides[2]
            result = total * _inverse(weight, drop_scale)[:, None]
            inside = row_ok[:, None] & (e < V_DIM)[None, :]
            tl.store(out + o_at[:, None] + e[None, :], result.to(out.dtype.element_ty), mask=inside)
            if lse is not None:
                at = (outer * (kv_heads * GROUP) + head) * seq_q + q_row
                tl.store(lse + at, _log_sum(top, weight, UNIT), mask=row_ok)


@triton.jit
def _inverse(weight, drop_scale):
    """drop_scale / weight, 0 for a row without keys."""
    return tl.where(weight == 0.0, 0.0, drop_scale / tl.where(weight == 0.0, 1.0, weight))


@triton.jit
def _log_sum(top, weight, UNIT: tl.constexpr):
    """Logarithm of the softmax's denominator."""
    value = (top * UNIT + tl.log2(weight)) * 0.6931471805599453
    value = tl.where(top == float("inf"), top, value)
    return tl.where(weight == 0.0, float("-inf"), value)


@triton.jit(do_not_specialize=ANY_VALUE)
def _merge(
    partial, partial_stats, out, lse, sinks, out_strides, q_start, q_end, k_start, k_end, k_batch, seq_q, capacity,
    k_rows, kv_heads, left, right, drop_scale, splits, CHUNK: tl.constexpr, GROUP: tl.constexpr, V_DIM: tl.constexpr,
    BLOCK_V: tl.constexpr, CAUSAL: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, UNIT: tl.constexpr,
    SLOPE_UNIT: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """One row of out from its partial results, SPLITS of them a step, in ascending order."""
    rows = seq_q * GROUP
    row = tl.program_id(0) % rows
    pair = tl.program_id(0) // rows
    b, head, query = (pair // kv_heads).to(tl.int64), pair % kv_heads * GROUP + row % GROUP, row // GROUP
    _first_row, count, _k_row, _begin, length, known = sequence_bounds(
        b, q_start, q_end, k_start, k_end, k_batch, seq_q, capacity, k_rows, False
    )
    shift = diagonal_shift(count, length, CAUSAL)
    first, end, _whole_first, _whole_end = key_range(0, seq_q - 1, shift, length, left, right, CAUSAL, LEFT, RIGHT)
    first_split, last_split = first // CHUNK, tl.cdiv(end, CHUNK)
    if not known:
        first_split, last_split = 0, 1
    one = tl.arange(0, SPLITS)
    e = tl.arange(0, BLOCK_V)
    start = pair.to(tl.int64) * splits
    stats = partial_stats + (pair.to(tl.int64) * rows + row) * 2 * splits + one
    top = tl.full([], float("-inf"), tl.float32)
    if sinks is not None:
        top = tl.load(sinks + head) * SLOPE_UNIT
    tops = tl.full([SPLITS], float("-inf"), tl.float32)
    for s in range(first_split, last_split, SPLITS):
        tops = tl.maximum(tops, tl.load(stats + s, mask=s + one < last_split, other=float("-inf")))
    new_top = tl.maximum(top, tl.max(tops, 0))
    safe = tl.where(new_top == float("-inf"), 0.0, new_top)
    weight = tl.exp2((top - safe) * UNIT)
    total = tl.zeros([BLOCK_V], tl.float32)
    for s in range(first_split, last_split, SPLITS):
        at = (start + s + one) * rows + row
        there = s + one < last_split
        shrink = tl.exp2((tl.load(stats + s, mask=there, other=float("-inf")) - safe) * UNIT)
        weight += tl.sum(shrink * tl.load(stats + splits + s, mask=there, other=0.0), 0)
        value = tl.load(
            partial + at[:, None] * V_DIM + e[None, :], mask=there[:, None] & (e < V_DIM)[None, :], other=0.0
        )
        total += tl.sum(value * shrink[:, None], 0)
    result = total * _inverse(weight, drop_scale)
    o_at = b * out_strides[0] + head.to(tl.int64) * out_strides[1] + query.to(tl.int64) * out_strides[2]
    tl.store(out + o_at + e, result.to(out.dtype.element_ty), mask=e < V_DIM)
    if lse is not None:
        tl.store(lse + (b * (kv_heads * GROUP) + head) * seq_q + query, _log_sum(new_top, weight, UNIT))
