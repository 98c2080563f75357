"""The order in which a GPU reads a quantised weight, made once from the CPU's packed form by plain torch ops."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from tilewright.quant.weight import CODES, OFFSETS, SCALES, QuantizedWeight, empty_packed, pack

_converted: WeakIdKeyDictionary = WeakIdKeyDictionary()  # packed tensor -> (its version, spec, GpuWeight)
_BITS = {"int5": 5, "int6": 6, "int8": 8, "e4m3": 8}  # the others: 4
_FLOATS = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}


@dataclass(frozen=True)
class GpuWeight:
    """A weight (n, k): w = scale * (code - middle), scale * (code - zero), scale * code + min, scale * table[code], or
    the codes themselves where they are bfloat16.

    codes: uint8 (n, bytes) or bfloat16 (n, columns). Columns are padded to a multiple of 64; 8 bits: a byte a column,
    for 5 and 6 bits too; 4 bits: of 64 columns, column i in the low nibble of byte i and column i + 32 in the high one,
    so that either nibble of 32 consecutive bytes is 32 consecutive columns, one operand of a dot product.
    scales: floats (groups, n), None for bfloat16; offsets: uint8 zero points or minima, (groups, n), or None;
    table: float32, what each code stands for, or None.
    """

    codes: Tensor
    scales: Tensor | None
    offsets: Tensor | None
    table: Tensor | None
    n: int
    k: int
    bits: int  # 4, 8 or 16
    middle: int
    group: int  # columns that share a scale, 0: all of a row
    offset: str  # "none", "zero" or "min"

    def rows(self, index: Tensor) -> Tensor:
        """float32 (len(index), k): the rows ``index`` of the weight, on any device."""
        codes = self.codes[index]
        if self.bits == 16:
            return codes[:, : self.k].float()
        if self.bits == 4:
            pairs = codes.unflatten(1, (-1, 1, 32))
            codes = torch.cat((pairs & 15, pairs >> 4), 2).flatten(1)
        codes = codes[:, : self.k]
        codes = codes.float() if self.table is None else self.table[codes.long()]
        group = torch.arange(self.k, device=codes.device) // (self.group or max(self.k, 1))
        scales = self.scales.t()[index].float()[:, group]
        if self.offset == "min":
            return scales * codes + self.offsets.t()[index].float()[:, group]
        if self.table is not None:
            return scales * codes
        zero = float(self.middle) if self.offsets is None else self.offsets.t()[index].float()[:, group]
        return scales * (codes - zero)


def gpu_weight(packed: Tensor, n: int, k: int, codes: int, group_size: int, offset: int, scale: int) -> GpuWeight:
    """The weight that ``packed`` and the numbers of `QuantizedWeight.spec` describe. It is kept as long as the tensor
    ``packed``, and made anew if that was written to. Making it waits for the GPU, once, so that calls in any stream may
    read it; RuntimeError while a CUDA graph is captured, whose memory it would be."""
    spec = (n, k, codes, group_size, offset, scale)
    if packed in _converted:
        version, found_spec, found = _converted[packed]
        if version == packed._version and found_spec == spec:
            return found
    if packed.is_cuda:
        with torch.cuda.device(packed.device):
            if torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "quantized_linear: the first call with a weight puts it into the GPU's order, which a CUDA graph "
                    "cannot capture; call the layer once before capturing"
                )
    if CODES[codes] == "bf16":
        weight = _dense(packed, n, k)
    else:
        weight = _convert(packed, n, k, CODES[codes], group_size, OFFSETS[offset], SCALES[scale])
    if packed.is_cuda:
        torch.cuda.current_stream(packed.device).synchronize()
    _converted[packed] = (packed._version, spec, weight)
    return weight


def _dense(packed: Tensor, n: int, k: int) -> GpuWeight:
    """By way of the CPU, whose order of bfloat16 is made for its own instructions."""
    rows = QuantizedWeight(packed.cpu(), (n, k), "bf16", -1, "none", "none").dequantize(torch.bfloat16)
    codes = torch.nn.functional.pad(rows, (0, -k % 64)).to(packed.device)
    return GpuWeight(codes, None, None, None, n, k, 16, 0, 0, "none")


@functools.cache
def _table(kind: str) -> Tensor:
    """float32 (16,) or (256,): what the codes of ``kind`` stand for, as the CPU knows it."""
    if kind in ("iq1", "iq2", "iq3_xxs", "iq3_s"):  # scales of two levels only
        packed = empty_packed((1, 16), kind, 32, "none", "two_level", "cpu").zero_()
        packed[0, :512].view(8, 16, 4)[:4, 0] = torch.arange(16, dtype=torch.uint8).view(4, 4)
        packed[0, 512] = 1
        packed[0, 544:546] = torch.ones(1, dtype=torch.float16).view(torch.uint8)
        return QuantizedWeight(packed, (1, 16), kind, 32, "none", "two_level").dequantize()[0]
    codes = torch.arange(1 << _BITS.get(kind, 4), dtype=torch.uint8).unsqueeze(0)
    return pack(codes, torch.ones(1, 1), None, kind, -1).dequantize()[0]


def _convert(packed: Tensor, n: int, k: int, kind: str, group_size: int, offset: str, scale: str) -> GpuWeight:
    """Layout of the packed form: csrc/cpu/kernels.h."""
    blocks, k_blocks, source_bits = packed.shape[0], -(-k // 32), _BITS.get(kind, 4)
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
    table = None if kind.startswith("int") else _table(kind).to(packed.device)
    return GpuWeight(
        codes.contiguous(), scales, offsets, table, n, k, 4 if source_bits == 4 else 8, 1 << (source_bits - 1),
        0 if group >= k else group, offset,
    )  # fmt: skip
