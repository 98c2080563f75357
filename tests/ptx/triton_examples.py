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
