"""The order in which a GPU reads a quantised weight, made once from the CPU's packed form by plain torch ops."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

_converted: WeakIdKeyDictionary = WeakIdKeyDictionary()  # packed tensor -> (its version, spec, GpuWeight)
_OFFSETS = ("none", "zero", "min")


@dataclass(frozen=True)
class GpuWeight:
    """A weight (n, k): w = scale * (code - 2**(bits-1)), scale * (code - zero) or scale * code + min.

    codes: uint8 (n, bytes). Columns are padded to a multiple of 64; 8 bits: a byte a column; 4 bits: of 64 columns,
    column i in the low nibble of byte i and column i + 32 in the high one, so that either nibble of 32 consecutive
    bytes is 32 consecutive columns, one operand of a dot product.
    scales: float16 or float32 (groups, n); offsets: uint8 zero points or minima, (groups, n), or None.
    """

    codes: Tensor
    scales: Tensor
    offsets: Tensor | None
    n: int
    k: int
    bits: int
    group: int  # columns that share a scale, 0: all of a row
    offset: str

    def rows(self, index: Tensor) -> Tensor:
        """float32 (len(index), k): the rows ``index`` of the weight, on any device."""
        codes = self.codes[index]
        if self.bits == 4:
            pairs = codes.unflatten(1, (-1, 1, 32))
            codes = torch.cat((pairs & 15, pairs >> 4), 2).flatten(1)
        codes = codes[:, : self.k].float()
        group = torch.arange(self.k, device=codes.device) // (self.group or max(self.k, 1))
        scales = self.scales.t()[index].float()[:, group]
        if self.offset == "min":
            return scales * codes + self.offsets.t()[index].float()[:, group]
        zero = 2.0 ** (self.bits - 1) if self.offsets is None else self.offsets.t()[index].float()[:, group]
        return scales * (codes - zero)


def gpu_weight(packed: Tensor, n: int, k: int, bits: int, group_size: int, offset: int, scale_bits: int) -> GpuWeight:
    """The weight that ``packed`` and the numbers of `QuantizedWeight.spec` describe. It is kept as long as the tensor
    ``packed``, and made anew if that was written to."""
    spec = (n, k, bits, group_size, offset, scale_bits)
    if packed in _converted:
        version, found_spec, found = _converted[packed]
        if version == packed._version and found_spec == spec:
            return found
    weight = _convert(packed, *spec)
    _converted[packed] = (packed._version, spec, weight)
    return weight


def _convert(packed: Tensor, n: int, k: int, bits: int, group_size: int, offset: int, scale_bits: int) -> GpuWeight:
    """Layout of the packed form: csrc/cpu/kernels.h."""
    if bits not in (4, 8):
        raise NotImplementedError(f"quantized_linear: Triton kernels read 4 and 8 bits, got {bits}")
    blocks, k_blocks = packed.shape[0], -(-k // 32)
    groups = 1 if group_size == -1 else -(-k // group_size)
    code_bytes, scale_bytes = k_blocks * 128 * bits, scale_bits // 8
    steps = packed[:, :code_bytes].reshape(blocks, k_blocks, 8, -1, 4)
    if bits == 4:
        steps = torch.cat((steps & 15, steps >> 4), 3)
    codes = steps.permute(0, 3, 1, 2, 4).reshape(blocks * 32, k_blocks * 32)[:n]
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[1] % 64))
    if bits == 4:
        low, high = codes.unflatten(1, (-1, 2, 32)).unbind(2)
        codes = (low | (high << 4)).flatten(1)
    floats = torch.float16 if scale_bits == 16 else torch.float32

    def per_group(first: int, size: int, dtype: torch.dtype) -> Tensor:
        found = packed[:, first : first + groups * 32 * size].contiguous().view(dtype)
        return found.reshape(blocks, groups, 32).transpose(0, 1).reshape(groups, blocks * 32)[:, :n].contiguous()

    scales = per_group(code_bytes, scale_bytes, floats)
    at = code_bytes + groups * 32 * scale_bytes
    offsets = None
    if _OFFSETS[offset] == "zero":
        offsets = per_group(at, 1, torch.uint8)
    elif _OFFSETS[offset] == "min":
        offsets = per_group(at, scale_bytes, floats)
    group = 0 if group_size == -1 or group_size >= k else group_size
    return GpuWeight(codes.contiguous(), scales, offsets, n, k, bits, group, _OFFSETS[offset])
