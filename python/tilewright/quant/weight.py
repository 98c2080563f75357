"""QuantizedWeight: codes, scales and offsets in the one packed layout that every CPU kernel reads."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tilewright import _C
from tilewright.ops.weight_rows import weight_rows

OFFSETS = ("none", "zero", "min")
GROUP_SIZES = (32, 64, 128, -1)
_FP16_MIN_NORMAL, _FP16_MAX = 6.103515625e-05, 65504.0


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A weight of shape (N, K), quantised along K in groups that share a scale.

    ``w = scale * (code - 2**(bits-1))`` (offset "none"), ``scale * (code - zero)`` ("zero") or
    ``scale * code + min`` ("min"). `packed` is uint8 (ceil(N/32), bytes a block of 32 rows); the layout stands
    in csrc/cpu/kernels.h. The object is plain data: it pickles, deep-copies and moves with `to`.
    """

    packed: Tensor
    shape: tuple[int, int]
    bits: int
    group_size: int  # columns a scale; -1: one a row
    offset: str = "none"
    scale_bits: int = 16
    source: str = ""  # the format that it was read from, for people

    @property
    def format(self) -> str:
        """What is stored, such as "int4_g32" or "int4_g32_min (Q4_1)"."""
        group = "row" if self.group_size == -1 else f"g{self.group_size}"
        kind = "" if self.offset == "none" else f"_{self.offset}"
        source = f" ({self.source})" if self.source else ""
        return f"int{self.bits}_{group}{kind}{source}"

    @property
    def nbytes(self) -> int:
        """Bytes of the packed form."""
        return self.packed.nbytes

    @property
    def device(self) -> torch.device:
        return self.packed.device

    def spec(self) -> tuple[int, int, int, int, int, int]:
        """The numbers that describe `packed` to a kernel: n, k, bits, group_size, offset kind, scale bits."""
        # DLPack hands torch.uint4 out as bytes, so a kernel cannot tell.
        if self.packed.dtype is not torch.uint8:
            raise ValueError(f"QuantizedWeight: packed must be uint8, got {self.packed.dtype}")
        return (*self.shape, self.bits, self.group_size, OFFSETS.index(self.offset), self.scale_bits)

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """The same weight with `packed` on ``device``."""
        return replace(self, packed=self.packed.to(device))

    def rows(self, index: Tensor) -> Tensor:
        """Dequantised rows: float32 (*index.shape, K) for int64 ``index`` in [0, N)."""
        if index.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"QuantizedWeight.rows: index must be int64 or int32, got {index.dtype}")
        flat = index.reshape(-1).to(torch.int64).contiguous()
        return weight_rows(flat, self.packed, self.spec()).view(*index.shape, self.shape[1])

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The whole weight, (N, K)."""
        return self.rows(torch.arange(self.shape[0], device=self.device)).to(dtype)

    @staticmethod
    def concat(parts: list[QuantizedWeight]) -> QuantizedWeight:
        """The rows of ``parts`` one below the other. All parts share format and K, and all but the last have a
        multiple of 32 rows."""
        if not parts:
            raise ValueError("QuantizedWeight.concat: expected at least one weight, got none")
        first = parts[0]
        for i, p in enumerate(parts):
            if p.spec()[1:] != first.spec()[1:]:
                raise ValueError(
                    "QuantizedWeight.concat: parts must agree in columns and format, got "
                    f"{first.shape} {first.format} and {p.shape} {p.format}"
                )
            if i + 1 < len(parts) and p.shape[0] % 32:
                raise ValueError(
                    f"QuantizedWeight.concat: part {i} has {p.shape[0]} rows; all but the last need a multiple of 32"
                )
        rows = sum(p.shape[0] for p in parts)
        return replace(first, packed=torch.cat([p.packed for p in parts]), shape=(rows, first.shape[1]))


def empty_packed(
    shape: tuple[int, int],
    bits: int,
    group_size: int,
    offset: str,
    scale_bits: int,
    device: str | torch.device,
) -> Tensor:
    """Uninitialised storage for a weight of this description."""
    row_bytes = _C.packed_block_bytes(shape[1], bits, group_size, OFFSETS.index(offset), scale_bits)
    return torch.empty((shape[0] + 31) // 32, row_bytes, dtype=torch.uint8, device=device)


def pack(
    codes: Tensor,
    scales: Tensor,
    offsets: Tensor | None,
    bits: int,
    group_size: int,
    offset: str = "none",
    source: str = "",
) -> QuantizedWeight:
    """Pack unsigned ``codes`` uint8 (N, K), ``scales`` float32 (N, groups) and ``offsets`` (N, groups) (uint8
    zero points, float32 minima). Scales and minima are stored in fp16 where that is exact for all of them,
    else in fp32."""
    exact = torch.equal(scales.half().float(), scales) and (
        offset != "min" or torch.equal(offsets.half().float(), offsets)
    )
    scale_bits = 16 if exact else 32
    shape = (codes.shape[0], codes.shape[1])
    packed = empty_packed(shape, bits, group_size, offset, scale_bits, "cpu")
    weight = QuantizedWeight(packed, shape, bits, group_size, offset, scale_bits, source)
    _C.pack_codes(
        codes.contiguous(),
        scales.contiguous(),
        None if offsets is None else offsets.contiguous(),
        packed,
        *weight.spec(),
    )
    return weight


def quantize_weight(w: Tensor, bits: int = 4, group_size: int = 32, symmetric: bool = True) -> QuantizedWeight:
    """Quantise ``w`` (N, K) by rounding to nearest.

    Each group of ``group_size`` (32, 64, 128, or -1 = a whole row) consecutive columns has one scale; the last
    group of a row may be short. Symmetric: ``scale = max|w| / (2**(bits-1) - 1)``. Otherwise the range [min, max],
    widened to include 0, is spread over all codes with an integer zero point. Scales are rounded to fp16, where
    all of a weight's scales are normal numbers there, before the codes are chosen.

    Raises ValueError for other bits, group sizes, shapes, and for NaN or inf in ``w``.
    """
    if not isinstance(w, Tensor) or not w.is_floating_point():
        raise TypeError(f"quantize_weight: w must be a floating-point tensor, got {getattr(w, 'dtype', type(w))}")
    if w.dim() != 2:
        raise ValueError(f"quantize_weight: w must have shape (N, K), got {tuple(w.shape)}")
    if bits not in (4, 8):
        raise ValueError(f"quantize_weight: bits must be 4 or 8, got {bits!r}")
    if group_size not in GROUP_SIZES:
        raise ValueError(f"quantize_weight: group_size must be one of {GROUP_SIZES}, got {group_size!r}")
    w = w.detach().float()
    n, k = w.shape
    size = k if group_size == -1 else group_size
    groups = -(-k // size) if k else 0
    if groups * size != k:  # zeros never widen a range that includes 0
        w = torch.nn.functional.pad(w, (0, groups * size - k))
    grouped = w.reshape(n, groups, size) if k else w.reshape(n, 0, 1)
    low, high = torch.aminmax(grouped, dim=-1) if grouped.numel() else (grouped.sum(-1), grouped.sum(-1))
    if not bool(torch.isfinite(low).all() & torch.isfinite(high).all()):
        raise ValueError("quantize_weight: w contains NaN or infinity")
    top = 2**bits - 1
    if symmetric:
        scale = torch.maximum(-low, high) / (2 ** (bits - 1) - 1)
    else:
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = high / top - low / top  # high - low may overflow
    nonzero = scale[scale > 0]
    if nonzero.numel() and float(nonzero.min()) >= _FP16_MIN_NORMAL and float(nonzero.max()) <= _FP16_MAX:
        scale = scale.half().float()
    step = torch.where(scale > 0, scale, torch.full_like(scale, torch.inf)).unsqueeze(-1)  # no step: all codes 0
    zeros = None
    if symmetric:
        codes = (grouped / step).round_().add_(2 ** (bits - 1)).clamp_(1, top)
    else:
        zero = (-low / step.squeeze(-1)).round().clamp(0, top)
        reach = torch.floor(torch.finfo(torch.float32).max / step)  # farther from zero a value would be infinite
        codes = (grouped / step).round_().clamp_(-reach, reach).add_(zero.unsqueeze(-1)).clamp_(0, top)
        zeros = zero.to(torch.uint8)
    codes = codes.to(torch.uint8).reshape(n, groups * size)[:, :k]
    return pack(codes, scale, zeros, bits, group_size, "none" if symmetric else "zero")
