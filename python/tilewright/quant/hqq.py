"""Weights as HQQ (half-quadratic quantisation) stores them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tilewright.quant.pieces import FLOATS, expect, flat_groups, in_pieces
from tilewright.quant.weight import QuantizedWeight, pack

_OP = "from_hqq"
# packing: dtype of a word, and the shift of each part of it; part i is the i-th share of the rows of groups.
_PACKINGS: dict[str, tuple[torch.dtype, tuple[int, ...], int]] = {
    "8bit_u8": (torch.uint8, (0,), 255),
    "4bit_u8": (torch.uint8, (4, 0), 15),
    "3bit_32": (torch.int32, (27, 24, 21, 18, 15, 12, 9, 6, 3, 0), 7),
    "2bit_u8": (torch.uint8, (6, 4, 2, 0), 3),
    "1bit_u8": (torch.uint8, (7, 6, 5, 4, 3, 2, 1, 0), 1),
}


def from_hqq(w_q: Tensor, meta: Mapping[str, Any]) -> QuantizedWeight:
    """``w = (code - zero) * scale``. Kept as ``scale * code + min`` with ``min = -zero * scale``, which is exact for
    float16 and bfloat16 metadata; for float32, min is rounded to float32.

    w_q, meta: of an `HQQLinear`. meta: shape (N, K), group_size (None: K), axis, packing ("8bit_u8", also of 5 and 6
    bits, "4bit_u8", "3bit_32", "2bit_u8", "1bit_u8"), view_as_float (w_q holds the words' bytes as floats), scale and
    zero, one a group of group_size elements of the flattened weight; or, quantised by HQQ itself, scale_q with
    meta_scale, zero_q with meta_zero, which are dequantised as there, in the compute_dtype of their meta.
    Codes are packed in 8 bits for "8bit_u8", else in 4.

    Raises NotImplementedError for axis 0: its groups run along the outputs, so that each column of a row has a scale of
    its own, which the packed form has not (quantise with axis=1); TypeError or ValueError, naming the key, for other
    shapes, dtypes and values.
    """
    meta = _checked(meta)
    shape = meta.get("shape")
    if not (isinstance(shape, list | tuple) and len(shape) == 2 and all(_is_integer(size, 1) for size in shape)):
        raise ValueError(f"{_OP}: meta['shape'] must be two positive integers, got {shape!r}")
    n, k = shape
    axis = meta.get("axis")
    if axis == 0:
        raise NotImplementedError(
            f"{_OP}: meta['axis'] 0 is not supported: its groups run along the outputs, so each column would need a "
            "scale of its own; quantise with axis=1"
        )
    if axis != 1:
        raise ValueError(f"{_OP}: meta['axis'] must be 1 (or 0), got {axis!r}")
    block = k if meta.get("group_size") is None else meta["group_size"]
    if not _is_integer(block, 1) or n * k % block:
        raise ValueError(f"{_OP}: meta['group_size'] must divide {n} * {k}, got {block!r}")
    words, shifts, mask = _words(meta, "w_q", w_q, n * k)
    blocks = n * k // block
    scale = _values(meta, "scale", blocks).float()
    low = -(_values(meta, "zero", blocks).float() * scale)
    group, (scales, minima) = flat_groups(_OP, block, n, k, scale, low)

    def piece(rows: slice) -> QuantizedWeight:
        codes = _slice(words, shifts, mask, rows.start * k, rows.stop * k).view(-1, k)
        kind = "int8" if mask == 255 else "int4"
        return pack(codes, scales[rows].contiguous(), minima[rows].contiguous(), kind, group, "min", "hqq")

    return in_pieces((n, k), piece)


def _slice(words: Tensor, shifts: tuple[int, ...], mask: int, begin: int, end: int) -> Tensor:
    """Codes begin to end, uint8: all words' first parts, then all second parts, ..."""
    if len(shifts) == 1:
        return words[begin:end]
    codes = torch.empty(end - begin, dtype=torch.uint8)
    size = words.numel()
    for part, shift in enumerate(shifts):
        low, high = max(begin, part * size), min(end, (part + 1) * size)
        if low < high:
            codes[low - begin : high - begin] = (words[low - part * size : high - part * size] >> shift) & mask
    return codes


def _words(meta: Mapping[str, Any], name: str, packed: Any, count: int) -> tuple[Tensor, tuple[int, ...], int]:
    """The words of ``packed``, flat, with the shifts and the mask for its ``count`` codes."""
    if meta.get("packing") not in _PACKINGS:
        raise NotImplementedError(
            f"{_OP}: meta['packing'] {meta.get('packing')!r} is not supported; supported: {', '.join(_PACKINGS)}"
        )
    dtype, shifts, mask = _PACKINGS[meta["packing"]]
    if isinstance(packed, Tensor) and packed.dim() == 2 and meta.get("view_as_float"):
        columns = packed.shape[1] * packed.dtype.itemsize
        if columns % dtype.itemsize:
            raise ValueError(
                f"{_OP}: {name} must hold whole words of {dtype.itemsize} bytes, got {columns} bytes a row"
            )
        packed = packed.contiguous().view(dtype)
    words = expect(_OP, name, packed, (dtype,), (None, None)).contiguous().view(-1)
    spare = 9 * max(packed.shape[1], 1) if dtype is torch.int32 else 0  # 3 bits: rows of groups in tens
    if not count <= words.numel() * len(shifts) <= count + spare:
        raise ValueError(f"{_OP}: {name} must hold {count} codes, got {words.numel()} words of {len(shifts)}")
    return words, shifts, mask


def _values(meta: Mapping[str, Any], name: str, count: int) -> Tensor:
    """scale or zero, (count,), as it is or dequantised; in the dtype in which HQQ would have it."""
    if meta.get(f"quant_{name}"):
        inner = _checked(meta.get(f"meta_{name}"), f"meta['meta_{name}']")
        words, shifts, mask = _words(inner, f"meta['{name}_q']", meta.get(f"{name}_q"), count)
        dtype = inner.get("compute_dtype", torch.float16)
        if dtype not in FLOATS:
            raise ValueError(f"{_OP}: meta['meta_{name}']['compute_dtype'] must be one of {FLOATS}, got {dtype!r}")
        codes = _slice(words, shifts, mask, 0, count).to(dtype)
        block = inner.get("group_size") or count
        if not _is_integer(block, 1) or count % block or inner.get("axis", 0) not in (0, 1):
            raise ValueError(f"{_OP}: meta['meta_{name}'] must have a group_size that divides {count}, got {block!r}")
        # Groups are rows (axis 1) or columns (axis 0) of a matrix; with one scale for all it does not matter.
        scale, zero = (_floats(f"meta['meta_{name}']['{key}']", inner.get(key)).to(dtype) for key in ("scale", "zero"))
        if scale.numel() == 1 and zero.numel() == 1:
            values = (codes - zero.view(())) * scale.view(())
        else:
            along = inner.get("axis", 0)
            side = (count // block, 1) if along == 1 else (1, count // block)
            if scale.numel() != count // block or zero.numel() != count // block:
                raise ValueError(
                    f"{_OP}: meta['meta_{name}'] must have {count // block} scales and zeros, "
                    f"got {scale.numel()} and {zero.numel()}"
                )
            grid = codes.view(-1, block) if along == 1 else codes.view(block, -1)
            values = ((grid - zero.view(side)) * scale.view(side)).view(-1)
        if not bool(values.isfinite().all()):
            raise ValueError(f"{_OP}: meta['meta_{name}'] dequantises to NaN or infinity")
        return values
    values = _floats(f"meta['{name}']", meta.get(name))
    if values.numel() == 1:
        return values.reshape(1).expand(count)
    if values.numel() != count:
        raise ValueError(f"{_OP}: meta['{name}'] must have {count} elements, one a group, got {tuple(values.shape)}")
    return values.reshape(-1)


def _floats(name: str, values: Any) -> Tensor:
    dims = (None,) * values.dim() if isinstance(values, Tensor) else ()
    return expect(_OP, name, values, FLOATS, dims)


def _checked(meta: Any, name: str = "meta") -> Mapping[str, Any]:
    if not isinstance(meta, Mapping):
        raise TypeError(f"{_OP}: {name} must be a dict, got {type(meta).__name__}")
    return meta


def _is_integer(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**31
