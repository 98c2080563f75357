"""out = x @ w.T + bias with w quantised to 4 or 8 bits: x (M, K), w (N, K) as `weight.GpuWeight`, out (M, N).

Up to 4 rows a program multiplies a few rows of w by all of x with plain multiply-adds: N*K*bits/8 bytes decide. More
rows: tiles of w are dequantised to the type that x is multiplied in and go to tensor cores; 2*M*N*K operations decide
from about M = 100 on. Per output, the sum over K is one accumulator in ascending order whatever the tile, so a row's
bits do not depend on M within either kernel. With integer activations codes are multiplied exactly, 32 columns at a
time, and scaled into an fp32 sum.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tilewright.triton_kernels.launch import check_floats, fitting, run
from tilewright.triton_kernels.weight import GpuWeight

_OP = "quantized_linear"
_FEW = 4  # rows of x up to which the kernel without tensor cores runs
# 512 columns a step: 16 rows of 256 or 512 bytes, a warp reads whole lines.
_GEMV = [triton.Config({"BLOCK_N": 8, "BLOCK_K": 512}, num_warps=4, num_stages=1)]


def _tiles(rows: int, fp32: bool) -> list[triton.Config]:
    """Tiles for `rows` rows of x, the preferred one first."""
    if fp32:  # without tensor cores; larger tiles spill
        shapes = [(16, 32, 4, 2)] if rows <= 16 else [(32, 32, 4, 2)]
    elif rows <= 16:
        shapes = [(16, 64, 4, 4), (16, 32, 4, 5)]
    elif rows <= 32:
        shapes = [(32, 64, 4, 4), (32, 128, 4, 3)]
    elif rows <= 64:
        shapes = [(64, 64, 4, 4), (64, 128, 4, 3), (64, 64, 4, 2)]
    else:
        shapes = [(128, 64, 4, 3), (64, 128, 4, 3), (64, 64, 4, 4), (64, 64, 4, 2)]
    return [
        triton.Config({"BLOCK_M": m, "BLOCK_N": n, "GROUPED": 8}, num_warps=warps, num_stages=stages)
        for m, n, warps, stages in shapes
    ]


def _integer_tiles(rows: int) -> list[triton.Config]:
    """Tiles of the integer kernel, the preferred one first; all fit every device."""
    shapes = [(16, 64, 4)] if rows <= 16 else [(32, 64, 4)] if rows <= 32 else [(64, 64, 8)]
    if rows > 64:
        shapes = [(128, 64, 8), *shapes]
    return [
        triton.Config({"BLOCK_M": m, "BLOCK_N": n, "GROUPED": 8}, num_warps=warps, num_stages=3)
        for m, n, warps in shapes
    ]


def linear(x: Tensor, weight: GpuWeight, bias: Tensor | None, activation: str) -> Tensor:
    """`tilewright.quantized_linear`; result in x's dtype. activation "fp32" multiplies in x's dtype ("fp32" sums
    either way), "bf16" in bfloat16, "int8" and "int8_token" in integers."""
    check_floats(_OP, x=x)
    n, k = weight.n, weight.k
    if x.dim() == 0 or x.shape[-1] != k:
        raise ValueError(f"{_OP}: the last dimension of x must be the weight's {k} columns, got x {tuple(x.shape)}")
    if bias is not None and bias.shape != (n,):
        raise ValueError(f"{_OP}: bias must have shape ({n},), got {tuple(bias.shape)}")
    if bias is not None and (bias.dtype != torch.float32 or not bias.is_contiguous()):
        bias = bias.float().contiguous()
    out = x.new_empty((*x.shape[:-1], n))
    if out.numel() == 0:
        return out
    if k == 0:  # an empty sum
        return out.zero_() if bias is None else out.copy_(bias)
    flat = x.reshape(-1, k)
    if flat.stride(1) != 1 and k > 1:
        flat = flat.contiguous()
    m = flat.shape[0]
    arguments = {
        "codes": weight.codes, "scales": weight.scales, "offsets": weight.offsets, "bias": bias, "out": out, "m": m,
        "n": n, "k": k, "code_stride": weight.codes.stride(0), "groups": weight.scales.shape[0], "BITS": weight.bits,
        "MIDDLE": weight.middle, "GROUP": weight.group, "OFFSET": weight.offset,
    }  # fmt: skip
    if activation.startswith("int8"):
        _integer(flat, arguments, activation == "int8_token")
        return out
    dtype = torch.bfloat16 if activation == "bf16" else flat.dtype
    arguments |= {"x": flat, "x_stride": flat.stride(0), "DTYPE": _TYPES[dtype]}
    if m <= _FEW:
        run(_gemv, lambda meta: (triton.cdiv(n, meta["BLOCK_N"]),), arguments | {"ROWS": m}, _GEMV)
        return out
    wide = dtype == torch.float32
    run(
        _gemm,
        lambda meta: (triton.cdiv(m, meta["BLOCK_M"]) * triton.cdiv(n, meta["BLOCK_N"]),),
        arguments,
        fitting(_tiles(m, wide), lambda c: _shared(c, flat.dtype, weight.bits), x.device),
        key=("m", "n", "k"),
    )
    return out


_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def _shared(config: triton.Config, dtype: torch.dtype, bits: int) -> int:
    """An upper bound of the shared memory of `_gemm`: tiles in flight, and the dequantised operands on their way."""
    m, n = config.kwargs["BLOCK_M"], config.kwargs["BLOCK_N"]
    in_flight = m * 64 * dtype.itemsize + n * 8 * bits + 4 * n * 4
    return config.num_stages * in_flight + n * 64 * 4


def _integer(x: Tensor, arguments: dict, per_token: bool) -> None:
    m, k = x.shape
    blocks = triton.cdiv(k, 32)
    padded = blocks * 32
    codes = torch.empty((m, padded), dtype=torch.int8, device=x.device)
    x_scales = torch.empty((m, 1 if per_token else blocks), dtype=torch.float32, device=x.device)
    columns = min(triton.next_power_of_2(blocks), 64) * 32
    run(
        _quantise,
        m * (1 if per_token else triton.cdiv(padded, columns)),
        {"x": x, "codes": codes, "scales": x_scales, "x_stride": x.stride(0), "k": k, "padded": padded,
         "PER_TOKEN": per_token, "COLUMNS": columns},
        [triton.Config({}, num_warps=4, num_stages=1)],
        fuse=False,
    )  # fmt: skip
    run(
        _gemm_integer,
        lambda meta: (triton.cdiv(m, meta["BLOCK_M"]) * triton.cdiv(arguments["n"], meta["BLOCK_N"]),),
        arguments | {"x": codes, "x_scales": x_scales, "x_stride": padded, "PER_TOKEN": per_token},
        _integer_tiles(m),
        key=("m", "n", "k"),
    )


@triton.jit
def _whole(code):
    """Small unsigned integers as float32: the low bits of 2**23, which is cheaper than a conversion."""
    return (code.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def _scaled(code, scales, offsets, at, inside, MIDDLE: tl.constexpr, OFFSET: tl.constexpr):
    """The weights of ``code``, float32; ``at``: where their scales are."""
    scale = tl.load(scales + at, mask=inside, other=0.0).to(tl.float32)
    if OFFSET == "min":
        w = scale * _whole(code) + tl.load(offsets + at, mask=inside, other=0.0).to(tl.float32)
    elif OFFSET == "zero":
        w = scale * (_whole(code) - _whole(tl.load(offsets + at, mask=inside, other=0)))
    else:
        w = scale * (_whole(code) - MIDDLE)
    return w


@triton.jit
def _group(column, groups, GROUP: tl.constexpr):
    """The group of a column; padded columns count to the last one."""
    if GROUP == 0:
        return column * 0
    else:
        return tl.minimum(column // GROUP, groups - 1)


@triton.jit(do_not_specialize=["m", "groups"])
def _gemv(x, codes, scales, offsets, bias, out, m, n, k, x_stride, code_stride, groups, BITS: tl.constexpr,
          MIDDLE: tl.constexpr, GROUP: tl.constexpr, OFFSET: tl.constexpr, DTYPE: tl.constexpr, ROWS: tl.constexpr,
          BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (row < n)[:, None]
    BYTES: tl.constexpr = BLOCK_K * BITS // 8
    byte = tl.arange(0, BYTES)
    # Of 4 bits the byte's low nibble is this column of the step, the high one the column 32 further.
    column = byte if BITS == 8 else byte // 32 * 64 + byte % 32
    start = codes + row.to(tl.int64)[:, None] * code_stride + byte[None, :]
    sums = ()
    for _ in tl.static_range(ROWS):
        sums = sums + (tl.zeros([BLOCK_N, BYTES], tl.float32),)  # noqa: RUF005 (Triton has no *)
    for first in range(0, k, BLOCK_K):
        known = inside & (byte < code_stride - first * BITS // 8)[None, :]
        raw = tl.load(start + first * BITS // 8, mask=known, other=0)
        for half in tl.static_range(8 // BITS):
            at = first + column + 32 * half
            code = raw if BITS == 8 else (raw & 15 if half == 0 else raw >> 4)
            group = _group(at, groups, GROUP)[None, :] * n + row[:, None]
            w = _scaled(code, scales, offsets, group, inside & (at < k)[None, :], MIDDLE, OFFSET).to(DTYPE)
            added = ()
            for r in tl.static_range(ROWS):
                value = tl.load(x + r * x_stride + at, mask=at < k, other=0.0).to(DTYPE).to(tl.float32)
                added = added + (sums[r] + w.to(tl.float32) * value[None, :],)  # noqa: RUF005
            sums = added
    for r in tl.static_range(ROWS):
        total = tl.sum(sums[r], 1)
        if bias is not None:
            total += tl.load(bias + row, mask=row < n, other=0.0)
        tl.store(out + r * n + row, total.to(out.dtype.element_ty), mask=row < n)


@triton.jit
def _tile_of(m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUPED: tl.constexpr):
    """Which rows and columns a program computes: GROUPED tiles below each other share their part of w in the L2."""
    tiles_m, tiles_n = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    band = GROUPED * tiles_n
    first = tl.program_id(0) // band * GROUPED
    height = tl.minimum(tiles_m - first, GROUPED)
    within = tl.program_id(0) % band
    return (first + within % height) * BLOCK_M, within // height * BLOCK_N


@triton.jit(do_not_specialize=["m", "groups"])
def _gemm(x, codes, scales, offsets, bias, out, m, n, k, x_stride, code_stride, groups, BITS: tl.constexpr,
          MIDDLE: tl.constexpr, GROUP: tl.constexpr, OFFSET: tl.constexpr, DTYPE: tl.constexpr, BLOCK_M: tl.constexpr,
          BLOCK_N: tl.constexpr, GROUPED: tl.constexpr):  # fmt: skip
    first_m, first_n = _tile_of(m, n, BLOCK_M, BLOCK_N, GROUPED)
    row, column = first_m + tl.arange(0, BLOCK_M), first_n + tl.arange(0, BLOCK_N)
    lane = tl.arange(0, 32)
    x_at = x + row.to(tl.int64)[:, None] * x_stride + lane[None, :]
    w_at = codes + column.to(tl.int64)[:, None] * code_stride + lane[None, :]
    known = (column < n)[:, None]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, k, 64):
        low = tl.load(w_at + first * BITS // 8, mask=known, other=0)
        if BITS == 4:
            high = low >> 4
            low = low & 15
        else:
            high = tl.load(w_at + first + 32, mask=known, other=0)
        for half in tl.static_range(2):
            at = first + 32 * half
            a = tl.load(x_at + at, mask=(row < m)[:, None] & (lane < k - at)[None, :], other=0.0)
            code = low if half == 0 else high
            if GROUP == 16:
                group = _group(at + lane, groups, GROUP)[None, :] * n + column[:, None]
            else:
                group = _group(at, groups, GROUP) * n + column[:, None]
            w = _scaled(code, scales, offsets, group, known, MIDDLE, OFFSET).to(DTYPE)
            total = tl.dot(a.to(DTYPE), tl.trans(w), total, input_precision="ieee")
    _store(total, bias, out, row, column, m, n)


@triton.jit
def _store(total, bias, out, row, column, m, n):
    if bias is not None:
        total += tl.load(bias + column, mask=column < n, other=0.0)[None, :]
    at = out + row.to(tl.int64)[:, None] * n + column[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=(row < m)[:, None] & (column < n)[None, :])


@triton.jit
def _quantise(x, codes, scales, x_stride, k, padded, PER_TOKEN: tl.constexpr, COLUMNS: tl.constexpr):
    """codes = x / scale to the nearest whole number, half to even, with scale = max|x| / 127 of 32 columns or,
    PER_TOKEN, of a row. Of a block with a NaN or infinity the codes are 0 and the scale is NaN. ``padded``: k rounded
    up to 32."""
    parts = 1 if PER_TOKEN else tl.cdiv(padded, COLUMNS)
    row = (tl.program_id(0) // parts).to(tl.int64)
    start = tl.program_id(0) % parts * COLUMNS
    column = tl.arange(0, COLUMNS)
    block = tl.arange(0, COLUMNS // 32)
    x += row * x_stride
    codes += row * padded
    if PER_TOKEN:
        top = tl.zeros([COLUMNS], tl.float32)
        for first in range(0, k, COLUMNS):
            top = tl.maximum(top, _size(tl.load(x + first + column, mask=first + column < k, other=0.0)))
        scale, good = _scale(tl.max(top, 0))
        tl.store(scales + row, tl.where(good, scale, float("nan")))
        for first in range(0, padded, COLUMNS):
            value = tl.load(x + first + column, mask=first + column < k, other=0.0).to(tl.float32)
            tl.store(codes + first + column, _code(value, scale, good), mask=first + column < padded)
    else:
        value = tl.load(x + start + column, mask=start + column < k, other=0.0).to(tl.float32)
        value = tl.reshape(value, (COLUMNS // 32, 32))
        scale, good = _scale(tl.max(_size(value), 1))
        known = start + block * 32 < padded
        tl.store(scales + row * (padded // 32) + start // 32 + block, tl.where(good, scale, float("nan")), mask=known)
        code = tl.reshape(_code(value, scale[:, None], good[:, None]), (COLUMNS,))
        tl.store(codes + start + column, code, mask=start + column < padded)


@triton.jit
def _size(x):
    """|x| with infinity for NaN."""
    size = tl.abs(x.to(tl.float32))
    return tl.where(size < float("inf"), size, float("inf"))


@triton.jit
def _scale(top):
    """(top / 127, whether it is finite)."""
    scale = tl.math.div_rn(top, 127.0)
    return scale, top < float("inf")


@triton.jit
def _code(x, scale, good):
    ratio = tl.math.div_rn(x, tl.where(good & (scale > 0.0), scale, 1.0))
    whole = (ratio + 12582912.0) - 12582912.0  # 1.5 * 2**23: what is behind the point is rounded away
    return tl.where(good & (scale > 0.0), tl.minimum(tl.maximum(whole, -127.0), 127.0), 0.0).to(tl.int8)


@triton.jit(do_not_specialize=["m", "groups"])
def _gemm_integer(x, x_scales, codes, scales, offsets, bias, out, m, n, k, x_stride, code_stride, groups,
                  BITS: tl.constexpr, MIDDLE: tl.constexpr, GROUP: tl.constexpr, OFFSET: tl.constexpr,
                  PER_TOKEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                  GROUPED: tl.constexpr):  # fmt: skip
    first_m, first_n = _tile_of(m, n, BLOCK_M, BLOCK_N, GROUPED)
    row, column = first_m + tl.arange(0, BLOCK_M), first_n + tl.arange(0, BLOCK_N)
    lane = tl.arange(0, 32)
    x_at = x + row.to(tl.int64)[:, None] * x_stride + lane[None, :]
    w_at = codes + column.to(tl.int64)[:, None] * code_stride + lane[None, :]
    known = (column < n)[:, None]
    blocks = x_stride // 32
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, k, 64):
        low = tl.load(w_at + first * BITS // 8, mask=known, other=0)
        if BITS == 4:
            high = low >> 4
            low = low & 15
        else:
            high = tl.load(w_at + first + 32, mask=known, other=0)
        for half in tl.static_range(2):
            at = first + 32 * half
            inside = (row < m) & (at < x_stride)  # k may end before the second half
            a = tl.load(x_at + at, mask=inside[:, None], other=0)
            x_scale = tl.load(x_scales + (row if PER_TOKEN else row * blocks + at // 32), mask=inside, other=0.0)
            code = ((low if half == 0 else high) - MIDDLE).to(tl.int8, bitcast=True)
            for part in tl.static_range(2 if GROUP == 16 else 1):
                piece = a
                if GROUP == 16:
                    piece = tl.where((lane // 16 == part)[None, :], a, 0)
                dot = tl.dot(piece, tl.trans(code))
                group = _group(at + 16 * part, groups, GROUP) * n + column
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
    _store(total, bias, out, row, column, m, n)
