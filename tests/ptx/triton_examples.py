"""Triton kernels for the interpreter's tests. Compiled, never interpreted: Triton wants their source in a file."""

import triton
import triton.language as tl


@triton.jit
def add(x, y, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    tl.store(out + i, tl.load(x + i, mask=inside) + tl.load(y + i, mask=inside), mask=inside)


@triton.jit
def add_without_mask(x, y, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i) + tl.load(y + i))


@triton.jit
def softmax(x, out, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    v = tl.load(x + row * columns + i, mask=i < columns, other=-float("inf"))
    e = tl.exp(v - tl.max(v, 0))
    tl.store(out + row * columns + i, e / tl.sum(e, 0), mask=i < columns)


@triton.jit
def matmul(a, b, c, m, n, k, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """c (m, n) = a (m, k) b (k, n), row major."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    inner = tl.arange(0, BK)
    at_a = a + rows[:, None] * k + inner[None, :]
    at_b = b + inner[:, None] * n + columns[None, :]
    total = tl.zeros((BM, BN), tl.float32)
    for step in range(0, tl.cdiv(k, BK)):
        left = k - step * BK
        tile_a = tl.load(at_a, mask=(rows[:, None] < m) & (inner[None, :] < left), other=0.0)
        tile_b = tl.load(at_b, mask=(inner[:, None] < left) & (columns[None, :] < n), other=0.0)
        total = tl.dot(tile_a, tile_b, total)
        at_a += BK
        at_b += BK * n
    inside = (rows[:, None] < m) & (columns[None, :] < n)
    tl.store(c + rows[:, None] * n + columns[None, :], total.to(c.dtype.element_ty), mask=inside)


@triton.jit
def flash(q, k, v, out, lse, n, scale, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Causal attention of one head for each program; q, k, v, out (heads, n, D), lse (heads, n); scale in base 2."""
    head = tl.program_id(1) * n
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    d = tl.arange(0, D)
    tile_q = tl.load(q + (head + rows[:, None]) * D + d[None, :], mask=rows[:, None] < n, other=0.0)
    top = tl.full((BM,), -float("inf"), tl.float32)
    norm = tl.zeros((BM,), tl.float32)
    total = tl.zeros((BM, D), tl.float32)
    for start in range(0, tl.minimum((tl.program_id(0) + 1) * BM, n), BN):
        keys = start + tl.arange(0, BN)
        tile_k = tl.load(k + (head + keys[None, :]) * D + d[:, None], mask=keys[None, :] < n, other=0.0)
        tile_v = tl.load(v + (head + keys[:, None]) * D + d[None, :], mask=keys[:, None] < n, other=0.0)
        x = tl.dot(tile_q, tile_k) * scale
        x = tl.where((keys[None, :] < n) & (keys[None, :] <= rows[:, None]), x, -float("inf"))
        new_top = tl.maximum(top, tl.max(x, 1))
        p = tl.exp2(x - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        norm = norm * shrink + tl.sum(p, 1)
        total = total * shrink[:, None] + tl.dot(p.to(tile_v.dtype), tile_v)
        top = new_top
    tl.store(
        out + (head + rows[:, None]) * D + d[None, :],
        (total / norm[:, None]).to(out.dtype.element_ty),
        mask=rows[:, None] < n,
    )
    tl.store(lse + head + rows, top + tl.log2(norm), mask=rows < n)


@triton.jit
def histogram(x, counts, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    tl.atomic_add(counts + tl.load(x + i, mask=inside, other=0), 1, mask=inside)


@triton.jit
def running_sum(x, out, columns, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    v = tl.load(x + tl.program_id(0) * columns + i, mask=i < columns, other=0.0)
    tl.store(out + tl.program_id(0) * columns + i, tl.cumsum(v, 0), mask=i < columns)


@triton.jit
def add_in_turn(x, out, lock, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    v = tl.load(x + tl.program_id(0) * BLOCK + i)
    while tl.atomic_cas(lock, 0, 1) == 1:
        pass
    tl.store(out + i, tl.load(out + i) + v)
    tl.debug_barrier()
    tl.atomic_xchg(lock, 0)


@triton.jit
def add_without_lock(x, out, lock, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(out + i) + tl.load(x + tl.program_id(0) * BLOCK + i))


@triton.jit
def int8_matmul(a, b, c, k, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """c (BM, BN) = a (BM, k) times b (BN, k) transposed."""
    rows, columns, inner = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    total = tl.zeros((BM, BN), tl.int32)
    for start in range(0, k, BK):
        tile_a = tl.load(a + rows[:, None] * k + start + inner[None, :])
        total += tl.dot(tile_a, tl.load(b + columns[None, :] * k + (start + inner)[:, None]))
    tl.store(c + rows[:, None] * BN + columns[None, :], total)


@triton.jit
def int4_matmul(a, b, scale, c, k, n, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """b (k / 2, n): the codes of rows 2 i and 2 i + 1 in a byte; scale (k / BK, n)."""
    rows, inner = tl.arange(0, BM), tl.arange(0, BK // 2)
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(0, k, BK):
        packed = tl.load(b + (start // 2 + inner)[:, None] * n + columns[None, :])
        codes = tl.join((packed & 15).to(tl.int8) - 8, (packed >> 4).to(tl.int8) - 8)
        weight = tl.permute(codes, (0, 2, 1)).reshape(BK, BN)
        tile = tl.load(a + rows[:, None] * k + start + tl.arange(0, BK)[None, :])
        total += tl.dot(tile, weight.to(tile.dtype)) * tl.load(scale + start // BK * n + columns)[None, :]
    tl.store(c + rows[:, None] * n + columns[None, :], total)


@triton.jit
def reduce(x, rows, index, columns, turned, M: tl.constexpr, N: tl.constexpr):
    m, n = tl.arange(0, M), tl.arange(0, N)
    v = tl.load(x + m[:, None] * N + n[None, :])
    tl.store(rows + m, tl.sum(v, 1))
    tl.store(index + m, tl.argmax(v, 1))
    tl.store(columns + n, tl.max(v, 0))
    tl.store(turned + n[:, None] * M + m[None, :], tl.trans(v))


@triton.jit
def sort(x, out, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.sort(tl.load(x + i)))


@triton.jit
def dropout(x, out, n, seed, p, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x + i, mask=i < n)
    tl.store(out + i, tl.where(tl.rand(seed, i) > p, v / (1 - p), 0.0), mask=i < n)


@triton.jit
def layer_norm(x, weight, out, n, eps, BLOCK: tl.constexpr):
    x += tl.program_id(0) * n
    out += tl.program_id(0) * n
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(x + i, mask=i < n, other=0.0).to(tl.float32)
    mean = tl.sum(total, 0) / n
    square = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        away = tl.where(i < n, tl.load(x + i, mask=i < n, other=0.0).to(tl.float32) - mean, 0.0)
        square += away * away
    scale = 1 / tl.sqrt(tl.sum(square, 0) / n + eps)
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        v = (tl.load(x + i, mask=i < n).to(tl.float32) - mean) * scale * tl.load(weight + i, mask=i < n)
        tl.store(out + i, v.to(out.dtype.element_ty), mask=i < n)
