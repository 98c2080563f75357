"""QuantizedWeight: codes, scales and offsets in the one packed layout that every CPU kernel reads."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tilewright import _C
from tilewright.ops.weight_rows import weight_rows

CODES = (
    "int4", "int5", "int6", "int8", "nf4", "fp4", "iq4_nl", "mxfp4", "iq1", "iq2", "iq3_xxs", "iq3_s", "e4m3", "bf16",
)  # fmt: skip
FLOAT_CODES = ("nf4", "fp4", "e4m3", "bf16")  # no integers stand for them
OFFSETS = ("none", "zero", "min")
SCALES = ("f16", "bf16", "f32", "two_level", "none")
GROUP_SIZES = (16, 32, 64, 128, -1)
_BITS = {"int5": 5, "int6": 6, "int8": 8, "e4m3": 8, "bf16": 16}  # the others: 4
_SCALE_DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A weight of shape (N, K), quantised along K in groups that share a scale.

    ``w = scale * (code - 2**(bits-1))`` (offset "none"), ``scale * (code - zero)`` ("zero") or
    ``scale * code + min`` ("min") for the codes "int4" to "int8"; ``scale * table[code]`` for the 4-bit tables "nf4",
    "fp4", "iq4_nl", "mxfp4", "iq1", "iq2", "iq3_xxs", "iq3_s"; fp8 values for "e4m3"; "bf16" is dense.
    `packed` is uint8 (ceil(N/32), bytes a block of 32 rows); the layout stands in csrc/cpu/kernels.h. The object is
    plain data: it pickles, deep-copies and moves with `to`.
    """

    packed: Tensor
    shape: tuple[int, int]
    codes: str
    group_size: int  # columns a scale: 16, a multiple of 32, or -1: one a row
    offset: str = "none"
    scale: str = "f16"  # how scales are stored; "two_level": int8 factors of an fp16 for each 256 columns
    source: str = ""  # the format that it was read from, for people
    columns: Tensor | None = None  # int64 (K,): packed column j is column columns[j] of the weight (GPTQ's act-order)
    outlier_threshold: float = 0.0  # > 0: |x| from here on is multiplied in fp32 where activations are integers
    latent: Tensor | None = None  # float (N, K): what the straight-through gradient of the weight goes to

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return _BITS.get(self.codes, 4)

    @property
    def format(self) -> str:
        """What is stored, such as "int4_g32" or "int4_g32_min (Q4_1)"."""
        group = "" if self.codes == "bf16" else "_row" if self.group_size == -1 else f"_g{self.group_size}"
        kind = "" if self.offset == "none" else f"_{self.offset}"
        source = f" ({self.source})" if self.source else ""
        return f"{self.codes}{group}{kind}{source}"

    @property
    def nbytes(self) -> int:
        """Bytes of the packed form."""
        return self.packed.nbytes

    @property
    def device(self) -> torch.device:
        return self.packed.device

    def spec(self) -> tuple[int, int, int, int, int, int]:
        """The numbers that describe `packed` to a kernel: n, k, codes, group_size, offset, scale."""
        # DLPack hands torch.uint4 out as bytes, so a kernel cannot tell.
        if self.packed.dtype is not torch.uint8:
            raise ValueError(f"QuantizedWeight: packed must be uint8, got {self.packed.dtype}")
        return (*self.shape, *_numbers(self.codes, self.group_size, self.offset, self.scale))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """torch's functions take tensors only. That this method exists also tells nn.TransformerEncoder, whose fast
        path reads the weights of its linears, to call the linears instead."""
        name = getattr(func, "__name__", func)
        raise TypeError(f"{name}: a QuantizedWeight is not a tensor; call quantized_linear, or dequantize() it first")

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """The same weight with `packed` on ``device``."""
        columns = None if self.columns is None else self.columns.to(device)
        return replace(self, packed=self.packed.to(device), columns=columns)

    def rows(self, index: Tensor) -> Tensor:
        """Dequantised rows: float32 (*index.shape, K) for int64 ``index`` in [0, N)."""
        if index.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"QuantizedWeight.rows: index must be int64 or int32, got {index.dtype}")
        flat = index.reshape(-1).to(torch.int64).contiguous()
        rows = weight_rows(flat, self.packed, self.spec())
        if self.columns is not None:
            rows = torch.empty_like(rows).index_copy_(1, self.columns, rows)
        return rows.view(*index.shape, self.shape[1])

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The whole weight, (N, K)."""
        return self.rows(torch.arange(self.shape[0], device=self.device)).to(dtype)

    def reads_like(self, other: QuantizedWeight) -> bool:
        """Whether both take the columns of x in the same order and treat outliers alike."""
        if self.outlier_threshold != other.outlier_threshold:
            return False
        if self.columns is None or other.columns is None:
            return self.columns is other.columns
        return torch.equal(self.columns, other.columns)

    @staticmethod
    def concat(parts: list[QuantizedWeight]) -> QuantizedWeight:
        """The rows of ``parts`` one below the other. All parts share format and K, and all but the last have a
        multiple of 32 rows."""
        if not parts:
            raise ValueError("QuantizedWeight.concat: expected at least one weight, got none")
        first = parts[0]
        for i, p in enumerate(parts):
            if p.spec()[1:] != first.spec()[1:] or not p.reads_like(first):
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


def _numbers(codes: str, group_size: int, offset: str, scale: str) -> tuple[int, int, int, int]:
    """Names as the kernels' numbers. Raises ValueError for an unknown one."""
    for name, value, known in (("codes", codes, CODES), ("offset", offset, OFFSETS), ("scale", scale, SCALES)):
        if value not in known:
            raise ValueError(f"QuantizedWeight: {name} must be one of {', '.join(known)}, got {value!r}")
    return CODES.index(codes), group_size, OFFSETS.index(offset), SCALES.index(scale)


def empty_packed(
    shape: tuple[int, int], codes: str, group_size: int, offset: str, scale: str, device: str | torch.device
) -> Tensor:
    """Uninitialised storage for a weight of this description."""
    row_bytes = _C.packed_block_bytes(*shape, *_numbers(codes, group_size, offset, scale))
    return torch.empty((shape[0] + 31) // 32, row_bytes, dtype=torch.uint8, device=device)


def pack(
    codes: Tensor,
    scales: Tensor,
    offsets: Tensor | None,
    kind: str = "int4",
    group_size: int = 32,
    offset: str = "none",
    source: str = "",
    *,
    columns: Tensor | None = None,
    outlier_threshold: float = 0.0,
) -> QuantizedWeight:
    """Pack ``codes`` uint8 (N, K), ``scales`` float32 (N, groups) and ``offsets`` (N, groups) (uint8 zero points,
    float32 minima). ``kind`` is one of CODES but "bf16"; e4m3 codes are the bytes. Scales and minima are stored in
    fp16 or bf16 where that is exact for all of them, else in fp32. See `QuantizedWeight` for ``columns`` and
    ``outlier_threshold``. Raises ValueError for shapes and dtypes that disagree."""
    values = [scales] if offset != "min" or offsets is None else [scales, offsets]
    scale = next(
        name for name, dtype in _SCALE_DTYPES.items() if all(torch.equal(v.to(dtype).float(), v) for v in values)
    )
    shape = (codes.shape[0], codes.shape[1])
    if columns is not None:
        columns = columns.to(torch.int64).contiguous()
        if columns.shape != shape[1:] or not torch.equal(columns.sort().values, torch.arange(shape[1])):
            raise ValueError(f"pack: columns must be a permutation of {shape[1]} columns, got {tuple(columns.shape)}")
    packed = empty_packed(shape, kind, group_size, offset, scale, "cpu")
    weight = QuantizedWeight(packed, shape, kind, group_size, offset, scale, source, columns, outlier_threshold)
    _C.pack_codes(
        codes.contiguous(),
        scales.contiguous(),
        None if offsets is None else offsets.contiguous(),
        packed,
        *weight.spec(),
    )
    return weight


def pack_bf16(*parts: Tensor, source: str = "") -> QuantizedWeight:
    """Dense ``parts`` (rows, K), any float dtype, one below the other, as the layout of bfloat16 that the kernels read.
    All but the last have a multiple of 32 rows."""
    shape = (sum(part.shape[0] for part in parts), parts[0].shape[1])
    if any(part.shape[1] != shape[1] for part in parts) or any(part.shape[0] % 32 for part in parts[:-1]):
        raise ValueError(
            "pack_bf16: parts must have the same columns, and all but the last a multiple of 32 rows; got "
            + ", ".join(str(tuple(part.shape)) for part in parts)
        )
    packed = empty_packed(shape, "bf16", -1, "none", "none", "cpu")
    weight = QuantizedWeight(packed, shape, "bf16", -1, "none", "none", source)
    first = 0
    for part in parts:
        blocks = packed[first // 32 : (first + part.shape[0] + 31) // 32]
        first += part.shape[0]
        _C.pack_bf16(part.detach().bfloat16().contiguous(), blocks, part.shape[0], *weight.spec()[1:])
    return weight
