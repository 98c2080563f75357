"""What the attention kernels share: where a sequence's rows and keys lie, its scores, its dropout.

Rows of a tile are (query, head) pairs of one KV head, heads fastest: row t is query t // GROUP of head t % GROUP of
the KV head's group, so any number of heads a KV head fills a tile and reads a key once. Keys count from the sequence's
first valid one. Where no bias is given, scores are in units of log2: exp2 needs no factor then. With one they are
natural, because a bias near float32's end would overflow: UNIT is the factor that is left for exp2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tilewright.triton_kernels.special import tanh

LOG2E = 1.4426950408889634
# Sizes that bound loops and masks of rows: other values need no other code.
ANY_VALUE = [
    "batch", "seq_q", "capacity", "k_rows", "num_pages", "page_size", "kv_heads", "splits", "left", "right", "heads",
    "sizes",
]  # fmt: skip


@triton.jit
def tile_of_sequence(start, batch, tile, SIZE: tl.constexpr, STEP: tl.constexpr):
    """(sequence, its tile) of tile number ``tile`` of packed sequences that begin at rows ``start``, ascending, with
    STEP elements a row: sequence b's tiles of SIZE elements count from start[b] * STEP // SIZE + b on."""
    low, high = tile * 0, tile * 0 + batch
    while high - low > 1:
        middle = (low + high) // 2
        first = (tl.load(start + middle) * STEP // SIZE).to(tl.int32) + middle
        if first <= tile:
            low = middle
        else:
            high = middle
    return low, tile - (tl.load(start + low) * STEP // SIZE).to(tl.int32) - low


@triton.jit
def sequence_bounds(b, q_start, q_end, k_start, k_end, k_batch, seq_q, capacity, k_rows, PACKED_KEYS: tl.constexpr):
    """(first row, rows, row of k and v, first key, keys, whether all of that exists) of sequence b. Of what does not
    exist there are no keys."""
    first, count = tl.full([], 0, tl.int64), seq_q
    if q_start is not None:
        first = tl.load(q_start + b)
        last = tl.load(q_end + b)
        good = (first >= 0) & (first <= last) & (last <= seq_q)
        first = tl.where(good, first, 0)
        count = tl.where(good, last - first, 0).to(tl.int32)
    begin, end = tl.full([], 0, tl.int64), tl.full([], 0, tl.int64) + capacity
    if k_start is not None:
        begin = tl.load(k_start + b)
    if k_end is not None:
        end = tl.load(k_end + b)
    row = tl.full([], 0, tl.int64)
    if k_batch is not None:
        row = tl.load(k_batch + b)
    elif not PACKED_KEYS:
        row += b
    known = (begin >= 0) & (begin <= end) & (end <= capacity) & (row >= 0) & (row < k_rows)
    begin = tl.where(known, begin, 0)
    return first, count, tl.where(known, row, 0), begin, tl.where(known, end - begin, 0).to(tl.int32), known


@triton.jit
def diagonal_shift(count, length, CAUSAL: tl.constexpr):
    """What to add to a query's number to get the key on its diagonal."""
    if CAUSAL == 1:  # top left
        return count * 0
    else:
        return length - count


@triton.jit
def key_range(low_query, high_query, shift, length, left, right, CAUSAL: tl.constexpr, LEFT: tl.constexpr,
              RIGHT: tl.constexpr):  # fmt: skip
    """(first, end) of the keys that some query in [low_query, high_query] may attend, and of those that all may."""
    first, end, all_first, all_end = length * 0, length, length * 0, length
    if CAUSAL != 0:
        end = tl.minimum(end, high_query + shift + 1)
        all_end = tl.minimum(all_end, low_query + shift + 1)
    if RIGHT:
        end = tl.minimum(end, high_query + shift + right + 1)
        all_end = tl.minimum(all_end, low_query + shift + right + 1)
    if LEFT:
        first = tl.maximum(first, low_query + shift - left)
        all_first = tl.maximum(all_first, high_query + shift - left)
    end = tl.maximum(end, 0)
    first = tl.minimum(first, end)
    all_first = tl.minimum(tl.maximum(all_first, first), end)
    return first, end, all_first, tl.minimum(tl.maximum(all_end, all_first), end)


@triton.jit
def query_range(low_key, high_key, shift, count, left, right, CAUSAL: tl.constexpr, LEFT: tl.constexpr,
                RIGHT: tl.constexpr):  # fmt: skip
    """(first, end) of the queries that may attend some key in [low_key, high_key]."""
    first, end = count * 0, count
    if CAUSAL != 0:
        first = tl.maximum(first, low_key - shift)
    if RIGHT:
        first = tl.maximum(first, low_key - shift - right)
    if LEFT:
        end = tl.minimum(end, high_key - shift + left + 1)
    end = tl.maximum(end, 0)
    return tl.minimum(first, end), end


@triton.jit
def _elements(row, stride, row_ok, begin, key, last, length, CHECKED: tl.constexpr):
    """A mask's or a bias's elements (rows, keys): where keys end within the tile a thread loads one at a time."""
    place = row[:, None] + (begin + key)[None, :] * stride
    inside = row_ok[:, None]
    if CHECKED:
        if last < length:
            value = tl.load(place, mask=inside, other=0)
        else:
            value = tl.load(place, mask=inside & (key < length)[None, :], other=0)
    else:
        value = tl.load(place, mask=inside, other=0)
    return value


@triton.jit
def scores(raw, query, head, row_ok, key, last, b, begin, length, shift, mask, bias, alibi, mask_strides, bias_strides,
           alibi_stride, scale, cap, left, right, CHECKED: tl.constexpr, CAUSAL: tl.constexpr, LEFT: tl.constexpr,
           RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, SLOPE_UNIT: tl.constexpr):  # fmt: skip
    """(scores, softcap's tanh or the scores again) of q k^T = ``raw`` (rows, keys), -inf where hidden. ``last``:
    the tile's last key. CHECKED: the range of keys may end within the tile."""
    t = raw * scale
    s = t
    if SOFTCAP:
        t = tanh(t)
        s = t * cap
    distance = key[None, :] - (query + shift)[:, None]
    if alibi is not None:
        slope = tl.load(alibi + b * alibi_stride + head, mask=row_ok, other=0.0) * SLOPE_UNIT
        s -= slope[:, None] * tl.abs(distance).to(tl.float32)
    hidden = tl.zeros(raw.shape, tl.int1)
    if CHECKED:
        hidden = (key >= length)[None, :] | hidden
        if CAUSAL != 0:
            hidden |= distance > 0
        if RIGHT:
            hidden |= distance > right
        if LEFT:
            hidden |= distance < -left
    if bias is not None:
        row = bias + b * bias_strides[0] + head.to(tl.int64) * bias_strides[1] + query.to(tl.int64) * bias_strides[2]
        value = _elements(row, bias_strides[3], row_ok, begin, key, last, length, CHECKED).to(tl.float32)
        s += value
        hidden |= value == float("-inf")
    if mask is not None:
        row = mask + b * mask_strides[0] + head.to(tl.int64) * mask_strides[1] + query.to(tl.int64) * mask_strides[2]
        hidden |= _elements(row, mask_strides[3], row_ok, begin, key, last, length, CHECKED) == 0
    return tl.where(hidden, float("-inf"), s), t


@triton.jit
def _mixed(x, coordinate):
    """splitmix64 (https://prng.di.unimi.it/splitmix64.c) of x moved by a coordinate."""
    x += (coordinate.to(tl.uint64) + 1) * 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def dropout_rows(seed, b, head, query):
    """Two numbers, uint32, for each row: where its keys' hashes start."""
    x = _mixed(tl.load(seed).to(tl.uint64, bitcast=True), b)
    x = _mixed(_mixed(x + head.to(tl.uint64) * 0, head), query)
    return (x & 0xFFFFFFFF).to(tl.uint32), (x >> 32).to(tl.uint32)


@triton.jit
def kept(first, second, key, limit):
    """Which weights dropout keeps, (rows, keys): those whose hash, 24 bits, is below ``limit``; the same as
    `tilewright.ops.attention_reference.dropout_keep`."""
    h = key.to(tl.uint32)[None, :] + first[:, None]
    h = (h ^ (h >> 16)) * 0x21F0AAAD
    h = (h ^ (h >> 15)) + second[:, None]
    h = (h ^ (h >> 15)) * 0x735A2D97
    h ^= h >> 15
    return (h >> 8).to(tl.float32) < limit
