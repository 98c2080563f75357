"""GGUF tensor data to QuantizedWeight (block layouts: ggml's `ggml-common.h`)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tilewright import _C
from tilewright.quant.weight import CODES, OFFSETS, SCALES, QuantizedWeight, empty_packed


@dataclass(frozen=True)
class GGUFType:
    """A quantised tensor type of GGUF: a block of the file, and what it becomes (see `QuantizedWeight`)."""

    codes: str
    group: int
    offset: str
    scale: str
    columns: int  # of a block
    nbytes: int


# csrc/ops/gguf_blocks.cpp has the table, beside the code that reads the blocks.
TYPES = {
    name: GGUFType(CODES[codes], group, OFFSETS[offset], SCALES[scale], columns, nbytes)
    for name, codes, group, offset, scale, columns, nbytes in _C.gguf_types()
}


def from_gguf(raw: Tensor, type_name: str, shape: tuple[int, int]) -> QuantizedWeight:
    """Repack a quantised GGUF tensor; its dequantised values are kept bit for bit.

    raw: uint8 (N, bytes a row), as in the file; type_name: GGUF's, a key of `TYPES`; shape: (N, K), K a multiple of
    the type's block. Raises NotImplementedError for other types and ValueError where raw contradicts shape.
    """
    if type_name not in TYPES:
        raise NotImplementedError(f"from_gguf: type {type_name!r} is not supported; supported: {', '.join(TYPES)}")
    kind = TYPES[type_name]
    if not isinstance(raw, Tensor) or raw.dtype != torch.uint8 or raw.dim() != 2:
        got = f"{raw.dtype} {tuple(raw.shape)}" if isinstance(raw, Tensor) else type(raw).__name__
        raise ValueError(f"from_gguf: raw must be a uint8 tensor (rows, bytes), got {got}")
    shape = tuple(int(size) for size in shape)
    if len(shape) != 2 or min(shape) < 0 or shape[1] % kind.columns:
        raise ValueError(
            f"from_gguf: shape must be (N, K), {type_name} having blocks of {kind.columns} columns, got {shape}"
        )
    n, k = shape
    expected = (n, k // kind.columns * kind.nbytes)
    if raw.shape != expected:  # before memory for the shape is asked for
        raise ValueError(
            f"from_gguf: {type_name} data for shape {shape} must be uint8 of shape {expected}, got {tuple(raw.shape)}"
        )
    stored = (kind.codes, kind.group, kind.offset, kind.scale)
    packed = empty_packed(shape, *stored, "cpu")
    _C.pack_gguf(raw.contiguous(), type_name, packed, n, k)
    return QuantizedWeight(packed, shape, *stored, type_name)
