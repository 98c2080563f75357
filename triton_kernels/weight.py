"""The order in which a GPU reads a quantised weight, made once from the CPU's packed form by plain torch ops."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from tilewright.quant.weight import CODES, OFFSETS, SCALES

_converted: WeakIdKeyDictionary = WeakIdKeyDictionary()  # packed tensor -> (its version, spec, GpuWeight)
_BITS = {"int4": 4, "int5": 5, "int6": 6, "int8": 8}
_FLOATS = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}


@dataclass(frozen=True)
class GpuWeight:
    """A weight (n, k): w = scale * (code - middle), scale * (code - zero) or scale * code + min.

    codes: uint8 (n, bytes). Columns are padded to a multiple of 64; 8 bits: a byte a column, for 5 and 6 bits too;
    4 bits: of 64 columns, column i in the low nibble of byte i and column i + 32 in the high one, so that either
    nibble of 32 consecutive bytes is 32 consecutive columns, one operand of a dot product.
    scales: floats (groups, n); offsets: uint8 zero points or minima, (groups, n), or None.
    """

    codes: Tensor
    scales: Tensor
    offsets: Tensor | None
    n: int
    k: int
    bits: int  # 4 or 8
    middle: int
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
        zero = float(self.middle) if self.offsets is None else self.offsets.t()[index].float()[:, group]
        return scales * (codes - zero)


def gpu_weight(packed: Tensor, n: int, k: int, codes: int, group_size: int, offset: int, scale: int) -> GpuWeight:
    """The weight that ``packed`` and the numbers of `QuantizedWeight.spec` describe. It is kept as long as the tensor
    ``packed``, and made anew if that was written to. Raises NotImplementedError for codes that are no plain integers.
    """
    spec = (n, k, codes, group_size, offset, scale)
    if packed in _converted:
        version, found_spec, found = _converted[packed]
        if version == packed._version and found_spec == spec:
            return found
    weight = _convert(packed, n, k, CODES[codes], group_size, OFFSETS[offset], SCALES[scale])
    _converted[packed] = (packed._version, spec, weight)
    return weight


def _convert(packed: Tensor, n: int, k: int, kind: str, group_size: int, offset: str, scale: str) -> GpuWeight:
    """Layout of the packed form: csrc/cpu/kernels.h."""
    if kind not in _BITS:
        raise NotImplementedError(f"quantized_linear: Triton kernels read {', '.join(_BITS)}, not {kind!r}")
    blocks, k_blocks, source_bits = packed.shape[0], -(-k // 32), _BITS[kind]
    code_bytes = k_blocks * 128 * source_bits
    steps = packed[:, :code_bytes].reshape(blocks, k_blocks, 128 * source_bits)  # the bytes of 32 columns
    if source_bits == 8:
        codes = steps.unflatten(2, (8, 32, 4))
    else:
        low = steps[:, :, :512].unflatten(2, (8, 16, 4))
        codes = torch.cat((low & 15, low >> 4), 3)  # (blocks, k_blocks, 8 steps, 32 rows, 4 columns)
        step = torch.arange(8, dtype=torch.uint8, device=packed.device)
        if source_bits == 5:
            plane = steps[:, :, 512:].unflatten(2, (1, 32, 4))
            codes |= (plane >> step.view(8, 1, 1) & 1) << 4
        elif source_bits == 6:
            plane = steps[:, :, 512:].unflatten(2, (2, 1, 32, 4))
            codes |= ((plane >> (step[:4] * 2).view(4, 1, 1) & 3) << 4).flatten(2, 3)
    codes = codes.permute(0, 3, 1, 2, 4).reshape(blocks * 32, k_blocks * 32)[:n]
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[1] % 64))
    if source_bits == 4:
        low, high = codes.unflatten(1, (-1, 2, 32)).unbind(2)
        codes = (low | (high << 4)).flatten(1)

    at = code_bytes  # what has been read of a block

    def following(count: int, dtype: torch.dtype) -> Tensor:
        """(count, n) values of type ``dtype`` that lie next in every block, as [count][32 rows]."""
        nonlocal at
        first, at = at, at + count * 32 * dtype.itemsize
        found = packed[:, first:at].reshape(-1).view(dtype).reshape(blocks, count, 32)
        return found.transpose(0, 1).reshape(count, blocks * 32)[:, :n].contiguous()

    group = k if group_size == -1 else group_size
    if group == 16:
        groups = 2 * k_blocks
    else:
        groups = -(-k // group) if k else 0
    if scale == "two_level":
        factors = [following(groups, torch.int8)]
        factors += [following(groups, torch.int8)] if offset == "min" else []
        supers = [following(-(-k // 256), torch.float16) for _ in factors]
        of_group = torch.arange(groups, device=packed.device) * group // 256
        scales, *minima = [f.float() * s.float()[of_group] for f, s in zip(factors, supers, strict=True)]
        offsets = minima[0] if minima else None
    else:
        scales = following(groups, _FLOATS[scale])
        offsets = None
        if offset != "none":
            offsets = following(groups, torch.uint8 if offset == "zero" else scales.dtype)
    return GpuWeight(
        codes.contiguous(), scales, offsets, n, k, 4 if source_bits == 4 else 8, 1 << (source_bits - 1),
        0 if group >= k else group, offset,
    )  # fmt: skip
