"""GGUF tensor data to QuantizedWeight (block layouts: ggml's `ggml-common.h`)."""

from __future__ import annotations

import torch
from torch import Tensor

from tilewright import _C
from tilewright.quant.weight import QuantizedWeight, empty_packed

# type: codes, offset. All three have groups of 32 and fp16 scales, which the packed form keeps as they are.
SUPPORTED = {"Q4_0": ("int4", "none"), "Q4_1": ("int4", "min"), "Q8_0": ("int8", "none")}


def from_gguf(raw: Tensor, type_name: str, shape: tuple[int, int]) -> QuantizedWeight:
    """Repack a quantised GGUF tensor; its dequantised values are kept bit for bit.

    raw: uint8 (N, bytes a row), as in the file; type_name: "Q4_0", "Q4_1" or "Q8_0"; shape: (N, K), K a multiple
    of 32. Raises NotImplementedError for other types and ValueError where raw contradicts shape.
    """
    if type_name not in SUPPORTED:
        raise NotImplementedError(
            f"from_gguf: type {type_name} is not supported yet; supported: {', '.join(SUPPORTED)}"
        )
    n, k = (int(s) for s in shape)
    if k % 32:
        raise ValueError(f"from_gguf: {type_name} has blocks of 32 columns, got shape {(n, k)}")
    if raw.dtype != torch.uint8 or raw.dim() != 2:
        raise ValueError(f"from_gguf: raw must be uint8 (rows, bytes), got {raw.dtype} {tuple(raw.shape)}")
    codes, offset = SUPPORTED[type_name]
    packed = empty_packed((n, k), codes, 32, offset, "f16", "cpu")
    _C.pack_gguf(raw.contiguous(), type_name, packed, n, k)
    return QuantizedWeight(packed, (n, k), codes, 32, offset, "f16", type_name)
