"""out = x @ w.T + bias with w quantised: x (M, K), w (N, K) as `weight.GpuWeight`, out (M, N); for groups of rows of x,
each with a matrix of its own, in the same kernels.

Up to 4 rows a program multiplies a few rows of w by all of x with plain multiply-adds: N*K*bits/8 bytes decide. More
rows: tiles of w are dequantised to the type that x is multiplied in (fp32: `special.exactly`) and go to tensor cores;
2*M*N*K operations decide from about M = 100 on. Per output, the sum over K is one accumulator in ascending order
whatever the tile, so a row's bits do not depend on M within either kernel. With integer activations codes are
multiplied exactly, 32 columns at a time, and scaled into an fp32 sum.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tilewright.triton_kernels.launch import check_floats, fitting, run, tile
from tilewright.triton_kernels.rounding import quantised, rounded
from tilewright.triton_kernels.special import exactly
from tilewright.triton_kernels.weight import GpuWeight

_OP = "quantized_linear"
_FEW = 4  # rows of x up to which the kernel without tensor cores runs
# 512 columns a step: 16 rows of 256 or 512 bytes, a warp reads whole lines; 16 scales of 2 bytes are a whole sector.
_GEMV = [triton.Config({"BLOCK_N": 16, "BLOCK_K": 512}, num_warps=4, num_stages=1)]


def _tiles(rows: int, fp32: bool) -> list[triton.Config]:
    """Tiles for `rows` rows of x, the preferred one first."""
    if fp32:  # three products each: larger tiles spill
        shapes = [(16, 32, 4, 2)] if rows <= 16 else [(32, 32, 8, 2)]
    elif rows <= 16:
        shapes = [(16, 64, 4, 4), (16, 32, 4, 5)]
    elif rows <= 32:
        shapes = [(32, 64, 4, 4), (32, 128, 4, 3)]
    elif rows <= 64:
        shapes = [(64, 64, 4, 4), (64, 128, 4, 3), (64, 64, 4, 2)]
    else:
        shapes = [(128, 64, 8, 3), (64, 128, 4, 3), (64, 64, 4, 4), (64, 64, 4, 2)]
    return [
        tile({"BLOCK_M": m, "BLOCK_N": n, "GROUPED": 8}, warps, stages, all_registers=True)
        for m, n, warps, stages in shapes
    ]


def _integer_tiles(rows: int) -> list[triton.Config]:
    """Tiles of the integer kernel, the preferred one first; all fit every device."""
    shapes = [(16, 64, 4)] if rows <= 16 else [(32, 64, 4)] if rows <= 32 else [(64, 64, 8)]
    if rows > 64:
        shapes = [(128, 64, 8), *shapes]
    return [
        tile({"BLOCK_M": m, "BLOCK_N": n, "GROUPED": 8}, warps, 3, all_registers=warps == 8) for m, n, warps in shapes
    ]


def linear(
    x: Tensor,
    weight: GpuWeight,
    bias: Tensor | None,
    activation: str,
    group_sizes: Tensor | None = None,
    outlier_threshold: float = 0.0,
) -> Tensor:
    """`tilewright.quantized_linear`, with ``group_sizes`` `grouped_linear`; result in x's dtype. activation "fp32"
    multiplies in x's dtype ("fp32" sums either way), "bf16" in bfloat16, "int8" and "int8_token" in integers, or in
    float32 where the weight's codes are no integers. Sizes are not looked at: rows beyond their sum give NaN."""
    check_floats(_OP, x=x)
    n, k, groups = weight.n, weight.k, None if group_sizes is None else group_sizes.numel()
    if x.dim() == 0 or x.shape[-1] != k:
        raise ValueError(f"{_OP}: the last dimension of x must be the weight's {k} columns, got x {tuple(x.shape)}")
    if bias is not None and bias.shape != (n,):
        raise ValueError(f"{_OP}: bias must have shape ({n},), got {tuple(bias.shape)}")
    if groups is not None:
        _check_groups(x, n, group_sizes, outlier_threshold)
        n //= groups
        group_sizes = group_sizes.contiguous()
    if bias is not None and (bias.dtype != torch.float32 or not bias.is_contiguous()):
        bias = bias.float().contiguous()
    out = x.new_empty((*x.shape[:-1], n))
    if out.numel() == 0:
        return out
    if k == 0 and groups is None:  # an empty sum
        return out.zero_() if bias is None else out.copy_(bias)
    flat = x.reshape(-1, k)
    if flat.stride(1) != 1 and k > 1:
        flat = flat.contiguous()
    m = flat.shape[0]
    arguments = {
        "codes": weight.codes, "scales": weight.scales, "offsets": weight.offsets, "bias": bias, "out": out, "m": m,
        "n": n, "k": k, "code_stride": weight.codes.stride(0), "weight_rows": weight.n,
        "groups": 0 if weight.scales is None else weight.scales.shape[0], "BITS": weight.bits, "MIDDLE": weight.middle,
        "GROUP": weight.group, "OFFSET": weight.offset,
    }  # fmt: skip
    sizes = {"sizes": group_sizes, "count": groups or 0}

    def programs(meta: dict) -> tuple[int]:
        # A group may end in a tile that it does not fill, and so may rows that belong to none.
        tiles = triton.cdiv(m, meta["BLOCK_M"]) if groups is None else m // meta["BLOCK_M"] + groups + 1
        return (tiles * triton.cdiv(n, meta["BLOCK_N"]),)

    if activation.startswith("int8"):
        per_token = activation == "int8_token"
        if weight.table is None and weight.bits != 16 and not outlier_threshold:
            codes, x_scales = quantised(flat, per_token)
            arguments |= sizes | {"x": codes, "x_scales": x_scales, "x_stride": codes.stride(0), "PER_TOKEN": per_token}
            run(_gemm_integer, programs, arguments, _integer_tiles(m), key=("m", "n", "k"))
            return out
        flat = rounded(flat, per_token, outlier_threshold)
    dtype = torch.bfloat16 if activation == "bf16" else flat.dtype
    arguments |= {"x": flat, "x_stride": flat.stride(0), "table": weight.table, "DTYPE": _TYPES[dtype]}
    if m <= _FEW and groups is None:
        run(_gemv, lambda meta: (triton.cdiv(n, meta["BLOCK_N"]),), arguments | {"ROWS": m}, _GEMV)
        return out
    tiles = fitting(_tiles(m, dtype == torch.float32), lambda c: _shared(c, flat.dtype, weight.bits), x.device)
    run(_gemm, programs, arguments | sizes, tiles, key=("m", "n", "k"))
    return out


def _check_groups(x: Tensor, n: int, group_sizes: Tensor, outlier_threshold: float) -> None:
    op, count = "grouped_linear", group_sizes.numel()
    if x.dim() != 2:
        raise ValueError(f"{op}: x must be (rows, columns), got {tuple(x.shape)}")
    if group_sizes.dtype != torch.int64 or group_sizes.dim() != 1 or count == 0:
        found = f"{group_sizes.dtype} {tuple(group_sizes.shape)}"
        raise ValueError(f"{op}: group_sizes must be int64 with one or more sizes, got {found}")
    if n % count or n // count % 32:
        raise ValueError(f"{op}: {count} groups need a multiple of 32 rows of the weight each, got {n} in all")
    if outlier_threshold:
        raise ValueError(f"{op}: weights with outliers have no groups")


_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def _shared(config: triton.Config, dtype: torch.dtype, bits: int) -> int:
    """An upper bound of the shared memory of `_gemm`: tiles in flight, and the dequantised operands on their way."""
    m, n = config.kwargs["BLOCK_M"], config.kwargs["BLOCK_N"]
    in_flight = m * 64 * dtype.itemsize + n * 8 * bits + 4 * n * 4
    return config.num_stages * in_flight + n * 64 * 4


@triton.jit
def _whole(code):
    """Small unsigned integers as float32: the low bits of 2**23, which is cheaper than a conversion."""
    return (code.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def _scaled(code, scales, offsets, table, at, inside, MIDDLE: tl.constexpr, OFFSET: tl.constexpr):
    """The weights of ``code``, float32; ``at``: where their scales are, of one dimension less if that shares them."""
    if scales is None:
        w = code.to(tl.float32)
    else:
        scale = _spread(tl.load(scales + at, mask=inside, other=0.0).to(tl.float32), code)
        if table is not None:
            w = scale * tl.load(table + code)
        elif OFFSET == "min":
            offset = tl.load(offsets + at, mask=inside, other=0.0).to(tl.float32)
            w = scale * _whole(code) + _spread(offset, code)
        elif OFFSET == "zero":
            w = scale * (_whole(code) - _spread(_whole(tl.load(offsets + at, mask=inside, other=0)), code))
        else:
            w = scale * (_whole(code) - MIDDLE)
    return w


@triton.jit
def _spread(value, code):
    """``value`` with the number of dimensions of ``code``."""
    if len(value.shape) < len(code.shape):
        value = tl.expand_dims(value, -1)
    return value


@triton.jit
def _group(column, groups, GROUP: tl.constexpr):
    """The group of a column; padded columns count to the last one."""
    if GROUP == 0:
        return column * 0
    else:
        return tl.minimum(column // GROUP, groups - 1)


@triton.jit(do_not_specialize=["m", "groups"])
def _gemv(x, codes, scales, offsets, table, bias, out, m, n, k, x_stride, code_stride, weight_rows, groups,
          BITS: tl.constexpr, MIDDLE: tl.constexpr, GROUP: tl.constexpr, OFFSET: tl.constexpr, DTYPE: tl.constexpr,
          ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (row < n)[:, None]
    PACKED: tl.constexpr = 2 if BITS == 4 else 1  # columns of an element
    WIDTH: tl.constexpr = 8 if BITS == 16 else 16  # elements of a piece: 16 bytes, and columns that share a scale
    PIECES: tl.constexpr = BLOCK_K // PACKED // WIDTH
    piece, within = tl.arange(0, PIECES), tl.arange(0, WIDTH)
    # Of 4 bits the byte's low nibble is this column of the step, the high one the column 32 further.
    column = piece * WIDTH if PACKED == 1 else piece // 2 * 64 + piece % 2 * 16
    element = piece[:, None] * WIDTH + within[None, :]
    start = codes + row.to(tl.int64)[:, None, None] * code_stride + element[None, :, :]
    sums = ()
    for _ in tl.static_range(ROWS):
        sums = sums + (tl.zeros([BLOCK_N, PIECES], tl.float32),)  # noqa: RUF005 (Triton has no *)
    for first in range(0, k, BLOCK_K):
        known = inside & (piece * WIDTH < code_stride - first // PACKED)[None, :]
        raw = tl.load(start + first // PACKED, mask=known[:, :, None], other=0)
        for half in tl.static_range(PACKED):
            at = first + column + 32 * half
            code = raw if PACKED == 1 else (raw & 15 if half == 0 else raw >> 4)
            group = _group(at, groups, GROUP)[None, :] * weight_rows + row[:, None]
            w = _scaled(code, scales, offsets, table, group, inside & (at < k)[None, :], MIDDLE, OFFSET).to(DTYPE)
            columns = at[:, None] + within[None, :]
            added = ()
            for r in tl.static_range(ROWS):
                value = tl.load(x + r * x_stride + columns, mask=columns < k, other=0.0).to(DTYPE)
                part = tl.sum(w.to(tl.float32) * value[None, :, :].to(tl.float32), 2)
                added = added + (sums[r] + part,)  # noqa: RUF005
            sums = added
    for r in tl.static_range(ROWS):
        total = tl.sum(sums[r], 1)
        if bias is not None:
            total += tl.load(bias + row, mask=row < n, other=0.0)
        tl.store(out + r * n + row, total.to(out.dtype.element_ty), mask=row < n)


@triton.jit
def _tile_of(m, n, k, sizes, count, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUPED: tl.constexpr):
    """What a program computes: (first row, end of rows, first column, its group, columns of x to sum over). Group -1:
    rows that belong to none."""
    tiles_n = tl.cdiv(n, BLOCK_N)
    if sizes is None:
        # GROUPED tiles below each other share their part of w in the L2.
        band = GROUPED * tiles_n
        above = tl.program_id(0) // band * GROUPED
        height = tl.minimum(tl.cdiv(m, BLOCK_M) - above, GROUPED)
        within = tl.program_id(0) % band
        return (above + within % height) * BLOCK_M, m, within // height * BLOCK_N, 0, k
    else:
        tile = tl.program_id(0) // tiles_n
        first, start, end, group = m, m * 0, m, m * 0 - 1
        for g in range(count):
            size = tl.minimum(tl.maximum(tl.load(sizes + g), 0), m - start).to(tl.int32)
            here = (tile >= 0) & (tile * BLOCK_M < size)
            first = tl.where(here, start + tile * BLOCK_M, first)
            end = tl.where(here, start + size, end)
            group = tl.where(here, g, group)
            tile = tl.where(here, -1, tile - tl.cdiv(size, BLOCK_M))
            start += size
        first = tl.where(tile >= 0, start + tile * BLOCK_M, first)
        return first, end, tl.program_id(0) % tiles_n * BLOCK_N, group, tl.where(group >= 0, k, 0)


@triton.jit(do_not_specialize=["m", "groups", "count"])
def _gemm(x, codes, scales, offsets, table, bias, out, sizes, m, n, k, x_stride, code_stride, weight_rows, groups,
          count, BITS: tl.constexpr, MIDDLE: tl.constexpr, GROUP: tl.constexpr, OFFSET: tl.constexpr,
          DTYPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUPED: tl.constexpr):  # fmt: skip
    first_m, end, first_n, of_rows, columns = _tile_of(m, n, k, sizes, count, BLOCK_M, BLOCK_N, GROUPED)
    row, column = first_m + tl.arange(0, BLOCK_M), first_n + tl.arange(0, BLOCK_N)
    w_row = of_rows * n + column
    lane, lanes = tl.arange(0, 32), tl.arange(0, 64)
    x_at = x + row.to(tl.int64)[:, None] * x_stride + lanes[None, :]
    w_at = codes + w_row.to(tl.int64)[:, None] * code_stride + lane[None, :]
    known = (column < n)[:, None]
    PACKED: tl.constexpr = 2 if BITS == 4 else 1  # columns of an element
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, columns, 64):
        low = tl.load(w_at + first // PACKED, mask=known, other=0)
        if BITS == 4:
            high = low >> 4
            low = low & 15
        else:
            high = tl.load(w_at + first + 32, mask=known, other=0)
        # Not in two products of 32 columns: a tile of x as large as one of codes would get 16 elements a thread, too.
        a = tl.load(x_at + first, mask=(row < end)[:, None] & (lanes < k - first)[None, :], other=0.0)
        halves = ()
        for half in tl.static_range(2):
            at = first + 32 * half
            if GROUP == 16:
                group = _group(at + lane, groups, GROUP)[None, :] * weight_rows + w_row[:, None]
            else:
                group = _group(at, groups, GROUP) * weight_rows + w_row[:, None]
            code = low if half == 0 else high
            w = _scaled(code, scales, offsets, table, group, known, MIDDLE, OFFSET).to(DTYPE)
            halves = halves + (w,)  # noqa: RUF005
        w = tl.reshape(tl.permute(tl.join(halves[0], halves[1]), (0, 2, 1)), (BLOCK_N, 64))
        total = tl.dot(a.to(DTYPE), tl.trans(w), total, input_precision=exactly(64))
    _store(total, bias, out, row, end, column, n, of_rows)


@triton.jit
def _store(total, bias, out, row, end, column, n, of_rows):
    if bias is not None:
        total += tl.load(bias + of_rows * n + column, mask=(column < n) & (of_rows >= 0), other=0.0)[None, :]
    total = tl.where(of_rows >= 0, total, float("nan"))
    at = out + row.to(tl.int64)[:, None] * n + column[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=(row < end)[:, None] & (column < n)[None, :])


@triton.jit(do_not_specialize=["m", "groups", "count"])
def _gemm_integer(x, x_scales, codes, scales, offsets, bias, out, sizes, m, n, k, x_stride, code_stride, weight_rows,
                  groups, count, BITS: tl.constexpr, MIDDLE: tl.constexpr, GROUP: tl.constexpr, OFFSET: tl.constexpr,
                  PER_TOKEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                  GROUPED: tl.constexpr):  # fmt: skip
    first_m, end, first_n, of_rows, columns = _tile_of(m, n, k, sizes, count, BLOCK_M, BLOCK_N, GROUPED)
    row, column = first_m + tl.arange(0, BLOCK_M), first_n + tl.arange(0, BLOCK_N)
    w_row = of_rows * n + column
    lane = tl.arange(0, 32)
    x_at = x + row.to(tl.int64)[:, None] * x_stride + lane[None, :]
    w_at = codes + w_row.to(tl.int64)[:, None] * code_stride + lane[None, :]
    known = (column < n)[:, None]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, columns, 64):
        low = tl.load(w_at + first * BITS // 8, mask=known, other=0)
        if BITS == 4:
            high = low >> 4
            low = low & 15
        else:
            high = tl.load(w_at + first + 32, mask=known, other=0)
        for half in tl.static_range(2):
            at = first + 32 * half
            inside = (row < end) & (at < x_stride)  # k may end before the second half
            a = tl.load(x_at + at, mask=inside[:, None], other=0)
            x_scale = tl.load(x_scales + (0 if PER_TOKEN else at // 32 * m) + row, mask=inside, other=0.0)
            code = ((low if half == 0 else high) - MIDDLE).to(tl.int8, bitcast=True)
            for part in tl.static_range(2 if GROUP == 16 else 1):
                piece = a
                if GROUP == 16:
                    piece = tl.where((lane // 16 == part)[None, :], a, 0)
                dot = tl.dot(piece, tl.trans(code))
                group = _group(at + 16 * part, groups, GROUP) * weight_rows + w_row
                w_scale = tl.load(scales + group, mask=column < n, other=0.0).to(tl.float32)
                if OFFSET != "none":
                    sums = tl.sum(piece.to(tl.int32), 1)
                    offset = tl.load(offsets + group, mask=column < n, other=0)
                if OFFSET == "zero":
                    dot += sums[:, None] * (MIDDLE - offset.to(tl.int32))[None, :]
                elif OFFSET == "min":
                    dot += sums[:, None] * MIDDLE
                    total += (sums.to(tl.float32) * x_scale)[:, None] * offset.to(tl.float32)[None, :]
                total += dot.to(tl.float32) * (x_scale[:, None] * w_scale[None, :])
    _store(total, bias, out, row, end, column, n, of_rows)
