"""Gradients of attention, recomputed tile by tile from the log-sum-exp (https://arxiv.org/abs/2307.08691).

With P = exp(S - lse) and delta = rowsum(dO * O) - dlse: dV = P^T dO, dS = P * (dO V^T - delta), dQ = scale dS K,
dK = scale dS^T Q. One kernel takes a tile of keys and walks over all rows of its KV head's queries, one takes a tile of
rows and walks over the keys: no atomics, every sum has one order. 10 and 6 * rows * keys * dim operations decide.
A bias's gradient has a kernel of its own, which walks over whatever the bias is broadcast along.
"""

from __future__ import annotations

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
    query_range,
    scores,
    sequence_bounds,
    tile_of_sequence,
)
from tilewright.triton_kernels.launch import fitting, run, tile
from tilewright.triton_kernels.special import exactly

_OP = "attention"


def attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    t: Operands,
    options: Options,
    out: Tensor,
    lse: Tensor,
    needs_bias: bool,
    needs_alibi: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v (in their dtypes) and of bias, alibi slopes and sinks (float32; None for those that are
    absent or not needed)."""
    if t.block_table is not None or t.k_batch is not None:
        raise NotImplementedError(f"{_OP}: paged and indexed caches have no gradient; detach q, k and v")
    check(t, options)
    heads, seq_q = t.q.shape[1:3]
    grads = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (t.q, t.k, t.v)]
    arguments = arguments_of(t, options)
    delta = torch.empty_like(lse)
    arguments |= {
        "grad_out": grad_out, "lse": lse, "delta": delta, "grad_strides": grad_out.stride()[:3],
        "drop_scale": 1 / ((1 - options.dropout_p) or 1.0), "grad_scale": options.scale,
    }  # fmt: skip
    if lse.numel():
        run(
            _delta,
            triton.cdiv(lse.numel(), 16),
            {"grad_out": grad_out, "out": out, "lse": lse, "grad_lse": grad_lse, "delta": delta,
             "grad_strides": grad_out.stride()[:3], "out_strides": out.stride()[:3], "count": lse.numel(),
             "heads": heads, "seq_q": seq_q, "V_DIM": t.v.shape[3], "BLOCK_V": arguments["BLOCK_V"], "ROWS": 16},
            [triton.Config({}, num_warps=4, num_stages=1)],
            fuse=False,  # else two lanes that reduce one row round differently, and either's sum may be stored
        )  # fmt: skip
    slopes = torch.zeros_like(lse) if t.alibi is not None and needs_alibi else None
    if lse.numel() and t.k.numel() + t.v.numel() and arguments["batch"]:
        _keys_and_values(t, arguments, grads[1], grads[2])
        _queries(t, arguments, grads[0], slopes)
    bias = alibi = sinks = None
    if t.bias is not None and needs_bias:
        bias = _bias(t, arguments)
    if slopes is not None:
        alibi = _slopes(t, slopes)
    if t.sinks is not None:
        weight = torch.exp(t.sinks.float().view(1, -1, 1) - lse.masked_fill(lse == -torch.inf, torch.inf))
        sinks = -(weight * delta).sum((0, 2))
    return *grads, bias, alibi, sinks


def _keys_and_values(t: Operands, arguments: dict, grad_k: Tensor, grad_v: Tensor) -> None:
    kv_heads, capacity, packed = t.k.shape[1], arguments["capacity"], arguments["PACKED_KEYS"]

    def programs(meta: dict) -> tuple[int]:
        if packed:
            return (kv_heads * (capacity // meta["BLOCK_N"] + arguments["batch"]),)
        return (arguments["batch"] * kv_heads * triton.cdiv(capacity, meta["BLOCK_N"]),)

    run(
        _grad_kv,
        programs,
        arguments | {"grad_k": grad_k, "grad_v": grad_v, "grad_k_strides": grad_k.stride()[:3],
                     "grad_v_strides": grad_v.stride()[:3]},
        fitting(_configs(t, True), lambda c: _shared(c, t, True), t.q.device),
        key=("seq_q", "capacity"),
    )  # fmt: skip


def _queries(t: Operands, arguments: dict, grad_q: Tensor, slopes: Tensor | None) -> None:
    kv_heads, batch, rows = t.k.shape[1], arguments["batch"], row_count(t)

    def programs(meta: dict) -> tuple[int]:
        if t.q_start is None:
            return (batch * kv_heads * triton.cdiv(rows, meta["BLOCK_M"]),)
        return (kv_heads * (rows // meta["BLOCK_M"] + batch),)

    run(
        _grad_q,
        programs,
        arguments | {"grad_q": grad_q, "slopes": slopes, "grad_q_strides": grad_q.stride()[:3]},
        fitting(_configs(t, False), lambda c: _shared(c, t, False), t.q.device),
        key=("seq_q", "capacity"),
    )


def _bias(t: Operands, arguments: dict) -> Tensor:
    """The bias's gradient, float32, of its shape."""
    grad = torch.zeros(t.bias.shape, dtype=torch.float32, device=t.q.device)
    if grad.numel() == 0 or t.q.numel() == 0 or t.k.numel() == 0:
        return grad
    full = grad.view((1,) * (4 - grad.dim()) + grad.shape)
    wide, fp32 = max(head_blocks(t)), t.q.dtype == torch.float32
    if wide > 256:
        block_m, block_n, warps = 16, 16 if fp32 else 32, 8
    else:
        block_m, block_n, warps = (16, 16, 4) if fp32 or wide > 128 else (32, 32, 8)
    tiles = (full.shape[0], full.shape[1], triton.cdiv(full.shape[2], block_m), triton.cdiv(full.shape[3], block_n))
    run(
        _grad_bias,
        tiles[0] * tiles[1] * tiles[2] * tiles[3],
        arguments | {"grad_bias": full, "sizes": tuple(full.shape), "heads": t.q.shape[1]},
        [tile({"BLOCK_M": block_m, "BLOCK_N": block_n}, warps, 1, all_registers=fp32)],
    )
    return grad


def _slopes(t: Operands, rows: Tensor) -> Tensor:
    """The slopes' gradient from that of each row, (batch, heads, seq_q)."""
    if t.q_start is None:
        total = rows.sum(2)
    else:
        row = torch.arange(rows.shape[2], device=rows.device)
        within = (row >= t.q_start.unsqueeze(1)) & (row < t.q_end.unsqueeze(1))
        total = within.to(rows.dtype) @ rows[0].t()
    return total if t.alibi.dim() == 2 else total.sum(0)


def _configs(t: Operands, of_keys: bool) -> list[triton.Config]:
    """Tiles of (rows, keys), the preferred one first. Larger ones spill registers: docs/gpu.md."""
    wide, fp32 = max(head_blocks(t)), t.q.dtype == torch.float32
    features = t.mask is not None or t.bias is not None or t.seed is not None  # they take registers
    if fp32:  # three products each: more registers
        if wide <= 64:
            shapes = [(32, 32, 8, 1)] if of_keys else [(32, 16, 8, 1)]
        else:
            shapes = [(16, 16, 4, 1)] if wide <= 128 and not of_keys else [(16, 16, 8, 1)]
    elif wide <= 64:
        shapes = [(32, 32, 4, 2)] if of_keys else [(64, 32, 4, 2), (32, 32, 4, 2)]
    elif wide <= 128:
        shapes = [(32, 64, 8, 2)] if of_keys else [(32, 32, 8, 2)] if features else [(64, 32, 8, 2)]
        shapes += [(32, 32, 8, 1)]
    else:
        shapes = [(32, 32, 8, 1), (16, 16, 4, 1)] if wide <= 256 else [(16, 16, 8, 1)]
        if wide <= 256 and not of_keys and features:
            shapes = [(32, 16, 8, 1), (16, 16, 4, 1)]
    every = fp32 or features
    return [tile({"BLOCK_M": m, "BLOCK_N": n}, w, s, all_registers=every or m == 16) for m, n, w, s in shapes]


def _shared(config: triton.Config, t: Operands, of_keys: bool) -> int:
    """An upper bound of the shared memory of `_grad_kv` or `_grad_q`: the tiles that stay, those in flight, and scores
    on their way into an operand's layout."""
    m, n = config.kwargs["BLOCK_M"], config.kwargs["BLOCK_N"]
    moving, staying = (m, n) if of_keys else (n, m)
    per_row = sum(head_blocks(t)) * t.q.dtype.itemsize
    in_flight = moving * per_row + m * n * score_bytes(t)
    return config.num_stages * in_flight + staying * per_row + m * n * 8


@triton.jit(do_not_specialize=["count", "heads", "seq_q"])
def _delta(grad_out, out, lse, grad_lse, delta, grad_strides, out_strides, count, heads, seq_q, V_DIM: tl.constexpr,
           BLOCK_V: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """rowsum(dO * O) - dlse of ROWS rows, counted over (batch, heads, seq_q)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    ok = row < count
    e = tl.arange(0, BLOCK_V)
    inside = ok[:, None] & (e < V_DIM)[None, :]
    i, head, b = (row % seq_q).to(tl.int64), (row // seq_q % heads).to(tl.int64), (row // seq_q // heads).to(tl.int64)
    at = b * grad_strides[0] + head * grad_strides[1] + i * grad_strides[2]
    g = tl.load(grad_out + at[:, None] + e[None, :], mask=inside, other=0.0).to(tl.float32)
    at = b * out_strides[0] + head * out_strides[1] + i * out_strides[2]
    o = tl.load(out + at[:, None] + e[None, :], mask=inside, other=0.0).to(tl.float32)
    total = tl.sum(g * o, 1)
    if grad_lse is not None:
        known = ok & (tl.load(lse + row, mask=ok, other=0.0) != float("-inf"))
        total -= tl.load(grad_lse + row, mask=known, other=0.0)
    tl.store(delta + row, total, mask=ok)


@triton.jit
def _tile_gradient(
    q_tile, k_tile, v_tile, g_tile, lse_row, delta_row, query, head, row_ok, key, last, b, begin, length, shift, mask,
    bias, alibi, seed, mask_strides, bias_strides, alibi_stride, scale, cap, left, right, keep_limit, drop_scale,
    CAUSAL: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, UNIT: tl.constexpr,
    SLOPE_UNIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(weights after dropout, gradient of the scores, that times softcap's derivative) of a tile (rows, keys)."""
    raw = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
    s, t = scores(
        raw, query, head, row_ok, key, last, b, begin, length, shift, mask, bias, alibi, mask_strides, bias_strides,
        alibi_stride, scale, cap, left, right, True, CAUSAL, LEFT, RIGHT, SOFTCAP, SLOPE_UNIT,
    )  # fmt: skip
    s = tl.where(row_ok[:, None] & (key >= 0)[None, :], s, float("-inf"))
    whole = tl.where(lse_row == float("-inf"), 0.0, lse_row) * SLOPE_UNIT
    p = tl.exp2((s - whole[:, None]) * UNIT)
    grad_p = tl.dot(g_tile, tl.trans(v_tile), input_precision=PRECISION)
    used = p
    if keep_limit is not None:
        first, second = dropout_rows(seed, b, head, query)
        keep = kept(first, second, key, keep_limit)
        used = tl.where(keep, p * drop_scale, 0.0)
        grad_p = tl.where(keep, grad_p * drop_scale, 0.0)
    grad_s = tl.where(s == float("-inf"), 0.0, p * (grad_p - delta_row[:, None]))
    grad_raw = grad_s
    if SOFTCAP:
        grad_raw = tl.where(s == float("-inf"), 0.0, grad_s * (1.0 - t * t))
    return used, grad_s, grad_raw


@triton.jit(do_not_specialize=ANY_VALUE)
def _grad_kv(
    q, k, v, grad_out, lse, delta, grad_k, grad_v, mask, bias, alibi, q_start, q_end, k_start, k_end, k_batch,
    block_table, seed, q_strides, k_strides, v_strides, grad_strides, grad_k_strides, grad_v_strides, mask_strides,
    bias_strides, alibi_stride, table_stride, batch, seq_q, capacity, k_rows, page_size, num_pages, kv_heads, scale,
    cap, left, right, keep_limit, drop_scale, grad_scale, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, GROUP: tl.constexpr, CAUSAL: tl.constexpr, LEFT: tl.constexpr,
    RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, PACKED_KEYS: tl.constexpr, UNIT: tl.constexpr,
    SLOPE_UNIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    if PACKED_KEYS:
        tiles = tl.num_programs(0) // kv_heads
        b, tile = tile_of_sequence(k_start, batch, pid % tiles, BLOCK_N, 1)
        kv_head = pid // tiles
    else:
        tiles = tl.cdiv(capacity, BLOCK_N)
        tile = pid % tiles  # the first keys are seen by most rows
        kv_head, b = pid // tiles % kv_heads, pid // tiles // kv_heads
    b = b.to(tl.int64)
    first_row, count, k_row, begin, length, known = sequence_bounds(
        b, q_start, q_end, k_start, k_end, k_batch, seq_q, capacity, k_rows, PACKED_KEYS
    )
    if tile * BLOCK_N < length:
        shift = diagonal_shift(count, length, CAUSAL)
        key = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        last = tile * BLOCK_N + BLOCK_N - 1
        key_ok = key < length
        d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
        inside_k, inside_v = key_ok[:, None] & (d < HEAD_DIM)[None, :], key_ok[:, None] & (e < V_DIM)[None, :]
        at = k_row * k_strides[0] + kv_head.to(tl.int64) * k_strides[1] + (begin + key) * k_strides[2]
        k_tile = tl.load(k + at[:, None] + d[None, :], mask=inside_k, other=0.0).to(q.dtype.element_ty)
        at = k_row * v_strides[0] + kv_head.to(tl.int64) * v_strides[1] + (begin + key) * v_strides[2]
        v_tile = tl.load(v + at[:, None] + e[None, :], mask=inside_v, other=0.0).to(q.dtype.element_ty)
        dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        dv = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
        low, high = query_range(
            tile * BLOCK_N, tl.minimum(tile * BLOCK_N + BLOCK_N, length) - 1, shift, count, left, right, CAUSAL, LEFT,
            RIGHT,
        )  # fmt: skip
        outer = b * 0
        if q_start is None:
            outer = b
        for start in range(low * GROUP // BLOCK_M * BLOCK_M, high * GROUP, BLOCK_M):
            row = start + tl.arange(0, BLOCK_M)
            row_ok = row < count * GROUP
            query, head = row // GROUP, kv_head * GROUP + row % GROUP
            q_row = first_row + query
            row_at = outer * q_strides[0] + head.to(tl.int64) * q_strides[1] + q_row * q_strides[2]
            q_tile = tl.load(
                q + row_at[:, None] + d[None, :], mask=row_ok[:, None] & (d < HEAD_DIM)[None, :], other=0.0
            )
            row_at = outer * grad_strides[0] + head.to(tl.int64) * grad_strides[1] + q_row * grad_strides[2]
            inside_g = row_ok[:, None] & (e < V_DIM)[None, :]
            g_tile = tl.load(grad_out + row_at[:, None] + e[None, :], mask=inside_g, other=0.0)
            row_at = (outer * (kv_heads * GROUP) + head) * seq_q + q_row
            lse_row = tl.load(lse + row_at, mask=row_ok, other=0.0)
            delta_row = tl.load(delta + row_at, mask=row_ok, other=0.0)
            used, _grad_s, grad_raw = _tile_gradient(
                q_tile, k_tile, v_tile, g_tile, lse_row, delta_row, query, head, row_ok, key, last, b, begin, length,
                shift, mask, bias, alibi, seed, mask_strides, bias_strides, alibi_stride, scale, cap, left, right,
                keep_limit, drop_scale, CAUSAL, LEFT, RIGHT, SOFTCAP, UNIT, SLOPE_UNIT, exactly(BLOCK_D, BLOCK_V),
            )  # fmt: skip
            dv = tl.dot(tl.trans(used.to(g_tile.dtype)), g_tile, dv, input_precision=exactly(BLOCK_D, BLOCK_V))
            dk = tl.dot(tl.trans(grad_raw.to(q_tile.dtype)), q_tile, dk, input_precision=exactly(BLOCK_D, BLOCK_V))
        dk *= grad_scale
        if not known:
            dk = tl.full([BLOCK_N, BLOCK_D], float("nan"), tl.float32)
        at = k_row * grad_k_strides[0] + kv_head.to(tl.int64) * grad_k_strides[1] + (begin + key) * grad_k_strides[2]
        tl.store(grad_k + at[:, None] + d[None, :], dk.to(grad_k.dtype.element_ty), mask=inside_k)
        at = k_row * grad_v_strides[0] + kv_head.to(tl.int64) * grad_v_strides[1] + (begin + key) * grad_v_strides[2]
        tl.store(grad_v + at[:, None] + e[None, :], dv.to(grad_v.dtype.element_ty), mask=inside_v)


@triton.jit(do_not_specialize=ANY_VALUE)
def _grad_q(
    q, k, v, grad_out, lse, delta, grad_q, slopes, mask, bias, alibi, q_start, q_end, k_start, k_end, k_batch,
    block_table, seed, q_strides, k_strides, v_strides, grad_strides, grad_q_strides, mask_strides, bias_strides,
    alibi_stride, table_stride, batch, seq_q, capacity, k_rows, page_size, num_pages, kv_heads, scale, cap, left, right,
    keep_limit, drop_scale, grad_scale, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, GROUP: tl.constexpr, CAUSAL: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr, PACKED_KEYS: tl.constexpr, UNIT: tl.constexpr, SLOPE_UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    if q_start is None:
        tiles = tl.cdiv(seq_q * GROUP, BLOCK_M)
        tile = tiles - 1 - pid % tiles
        kv_head, b = pid // tiles % kv_heads, pid // tiles // kv_heads
    else:
        tiles = tl.num_programs(0) // kv_heads
        b, tile = tile_of_sequence(q_start, batch, tiles - 1 - pid % tiles, BLOCK_M, GROUP)
        kv_head = pid // tiles
    b = b.to(tl.int64)
    first_row, count, k_row, begin, length, known = sequence_bounds(
        b, q_start, q_end, k_start, k_end, k_batch, seq_q, capacity, k_rows, PACKED_KEYS
    )
    if tile * BLOCK_M < count * GROUP:
        row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        row_ok = row < count * GROUP
        query, head = row // GROUP, kv_head * GROUP + row % GROUP
        shift = diagonal_shift(count, length, CAUSAL)
        first, end, _whole_first, _whole_end = key_range(
            tile * BLOCK_M // GROUP, tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // GROUP, count - 1), shift, length,
            left, right, CAUSAL, LEFT, RIGHT,
        )  # fmt: skip
        outer = b * 0
        if q_start is None:
            outer = b
        q_row = first_row + query
        d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
        inside = row_ok[:, None] & (d < HEAD_DIM)[None, :]
        at = outer * q_strides[0] + head.to(tl.int64) * q_strides[1] + q_row * q_strides[2]
        q_tile = tl.load(q + at[:, None] + d[None, :], mask=inside, other=0.0)
        at = outer * grad_strides[0] + head.to(tl.int64) * grad_strides[1] + q_row * grad_strides[2]
        g_tile = tl.load(grad_out + at[:, None] + e[None, :], mask=row_ok[:, None] & (e < V_DIM)[None, :], other=0.0)
        lse_at = (outer * (kv_heads * GROUP) + head) * seq_q + q_row
        lse_row = tl.load(lse + lse_at, mask=row_ok, other=0.0)
        delta_row = tl.load(delta + lse_at, mask=row_ok, other=0.0)
        k += k_row * k_strides[0] + kv_head.to(tl.int64) * k_strides[1] + begin * k_strides[2]
        v += k_row * v_strides[0] + kv_head.to(tl.int64) * v_strides[1] + begin * v_strides[2]
        dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        slope = tl.zeros([BLOCK_M], tl.float32)
        for n in range(first // BLOCK_N * BLOCK_N, end, BLOCK_N):
            key, last = n + tl.arange(0, BLOCK_N), n + BLOCK_N - 1
            seen = (key >= first) & (key < end)
            k_tile = tl.load(
                k + key.to(tl.int64)[:, None] * k_strides[2] + d[None, :],
                mask=seen[:, None] & (d < HEAD_DIM)[None, :], other=0.0,
            ).to(q_tile.dtype)  # fmt: skip
            v_tile = tl.load(
                v + key.to(tl.int64)[:, None] * v_strides[2] + e[None, :],
                mask=seen[:, None] & (e < V_DIM)[None, :], other=0.0,
            ).to(q_tile.dtype)  # fmt: skip
            _used, grad_s, grad_raw = _tile_gradient(
                q_tile, k_tile, v_tile, g_tile, lse_row, delta_row, query, head, row_ok, key, last, b, begin, length,
                shift, mask, bias, alibi, seed, mask_strides, bias_strides, alibi_stride, scale, cap, left, right,
                keep_limit, drop_scale, CAUSAL, LEFT, RIGHT, SOFTCAP, UNIT, SLOPE_UNIT, exactly(BLOCK_D, BLOCK_V),
            )  # fmt: skip
            if mask is not None or bias is not None:  # what no row attends may be anything
                attended = tl.max((grad_s != 0.0).to(tl.int32), 0) > 0
                k_tile = tl.where(attended[:, None], k_tile, 0.0)
            if slopes is not None:
                distance = tl.abs(key[None, :] - (query + shift)[:, None]).to(tl.float32)
                # Not the product itself: contracted with the sum, it would round differently in lanes that share a row.
                slope -= tl.sum(tl.where(grad_s != 0.0, grad_s * distance, 0.0), 1)
            dq = tl.dot(grad_raw.to(q_tile.dtype), k_tile, dq, input_precision=exactly(BLOCK_D, BLOCK_V))
        dq *= grad_scale
        if not known:
            dq = tl.full([BLOCK_M, BLOCK_D], float("nan"), tl.float32)
        at = outer * grad_q_strides[0] + head.to(tl.int64) * grad_q_strides[1] + q_row * grad_q_strides[2]
        tl.store(grad_q + at[:, None] + d[None, :], dq.to(grad_q.dtype.element_ty), mask=inside)
        if slopes is not None:
            tl.store(slopes + lse_at, slope, mask=row_ok)


@triton.jit(do_not_specialize=ANY_VALUE)
def _grad_bias(
    q, k, v, grad_out, lse, delta, grad_bias, mask, bias, alibi, q_start, q_end, k_start, k_end, k_batch, block_table,
    seed, q_strides, k_strides, v_strides, grad_strides, mask_strides, bias_strides, alibi_stride, table_stride, sizes,
    batch, heads, seq_q, capacity, k_rows, page_size, num_pages, kv_heads, scale, cap, left, right, keep_limit,
    drop_scale, grad_scale, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr,
    PACKED_KEYS: tl.constexpr, UNIT: tl.constexpr, SLOPE_UNIT: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A tile of the bias's gradient, summed over the batch elements, heads, rows and keys that share it."""
    tiles_n = tl.cdiv(sizes[3], BLOCK_N)
    tiles_m = tl.cdiv(sizes[2], BLOCK_M)
    pid = tl.program_id(0)
    tile_n, tile_m = pid % tiles_n, pid // tiles_n % tiles_m
    own_head, own_batch = pid // tiles_n // tiles_m % sizes[1], pid // tiles_n // tiles_m // sizes[1]
    # What the bias has one of, all of the call's are summed into.
    first_b, last_b = own_batch, own_batch + 1
    if sizes[0] == 1:
        first_b, last_b = own_batch * 0, batch
    first_h, last_h = own_head, own_head + 1
    if sizes[1] == 1:
        first_h, last_h = own_head * 0, heads
    first_m, last_m = tile_m * BLOCK_M, tile_m * BLOCK_M + 1
    if sizes[2] == 1:
        first_m, last_m = tile_m * 0, seq_q
    first_n, last_n = tile_n * BLOCK_N, tile_n * BLOCK_N + 1
    if sizes[3] == 1:
        first_n, last_n = tile_n * 0, capacity
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    for one in range(first_b, last_b):
        b = first_b.to(tl.int64) * 0 + one
        _first_row, _count, k_row, begin, length, _known = sequence_bounds(
            b, q_start, q_end, k_start, k_end, k_batch, seq_q, capacity, k_rows, PACKED_KEYS
        )
        shift = diagonal_shift(seq_q, length, CAUSAL)
        for h in range(first_h, last_h):
            kv_head = (first_h.to(tl.int64) * 0 + h) // GROUP
            for m in range(first_m, last_m, BLOCK_M):
                query = m + tl.arange(0, BLOCK_M)
                row_ok = query < seq_q
                head = h + query * 0
                wide = head.to(tl.int64)
                at = b * q_strides[0] + wide * q_strides[1] + query.to(tl.int64) * q_strides[2]
                inside_q = row_ok[:, None] & (d < HEAD_DIM)[None, :]
                q_tile = tl.load(q + at[:, None] + d[None, :], mask=inside_q, other=0.0)
                at = b * grad_strides[0] + wide * grad_strides[1] + query.to(tl.int64) * grad_strides[2]
                inside_g = row_ok[:, None] & (e < V_DIM)[None, :]
                g_tile = tl.load(grad_out + at[:, None] + e[None, :], mask=inside_g, other=0.0)
                at = (b * heads + head) * seq_q + query
                lse_row = tl.load(lse + at, mask=row_ok, other=0.0)
                delta_row = tl.load(delta + at, mask=row_ok, other=0.0)
                for n in range(first_n, last_n, BLOCK_N):
                    key = (n - begin).to(tl.int32) + tl.arange(0, BLOCK_N)
                    last = (n - begin).to(tl.int32) + BLOCK_N - 1
                    seen = (key >= 0) & (key < length)
                    column = begin + key
                    key_at = k_row * k_strides[0] + kv_head * k_strides[1] + column * k_strides[2]
                    known_k = seen[:, None] & (d < HEAD_DIM)[None, :]
                    k_tile = tl.load(k + key_at[:, None] + d[None, :], mask=known_k, other=0.0).to(q_tile.dtype)
                    key_at = k_row * v_strides[0] + kv_head * v_strides[1] + column * v_strides[2]
                    known_v = seen[:, None] & (e < V_DIM)[None, :]
                    v_tile = tl.load(v + key_at[:, None] + e[None, :], mask=known_v, other=0.0).to(q_tile.dtype)
                    _used, grad_s, _grad_raw = _tile_gradient(
                        q_tile, k_tile, v_tile, g_tile, lse_row, delta_row, query, head, row_ok, key, last, b, begin,
                        length, shift, mask, bias, alibi, seed, mask_strides, bias_strides, alibi_stride, scale, cap,
                        left, right, keep_limit, drop_scale, CAUSAL, LEFT, RIGHT, SOFTCAP, UNIT, SLOPE_UNIT,
                        exactly(BLOCK_D + BLOCK_V),  # registers hold the parts of both products' operands at once
                    )  # fmt: skip
                    total += grad_s
    row, column = tile_m * BLOCK_M + tl.arange(0, BLOCK_M), tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    if sizes[3] == 1:
        total = tl.where(column[None, :] == 0, tl.sum(total, 1)[:, None], 0.0)
    if sizes[2] == 1:
        total = tl.where(row[:, None] == 0, tl.sum(total, 0)[None, :], 0.0)
    at = ((own_batch.to(tl.int64) * sizes[1] + own_head) * sizes[2] + row)[:, None] * sizes[3] + column[None, :]
    tl.store(grad_bias + at, total, mask=(row < sizes[2])[:, None] & (column < sizes[3])[None, :])
