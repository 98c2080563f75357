"""Weights as bitsandbytes stores them: LLM.int8(), and NF4 and FP4 (QLoRA) with plain or quantised scales."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tilewright.quant.int8 import from_int8
from tilewright.quant.pieces import FLOATS, expect, flat_groups, in_pieces
from tilewright.quant.weight import QuantizedWeight, pack

_OP = "from_bitsandbytes"
_STATE = "quant_state.bitsandbytes__"
# The tables that bitsandbytes' kernels use, whatever quant_map says (`get_4bit_type` in its functional.py).
TABLES = {
    "nf4": (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
    "fp4": tuple(
        value / 12
        for value in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0, -0.0, -0.0625, -8.0, -12.0, -4.0, -6.0, -2.0, -3.0)
    ),
}


@dataclass(frozen=True)
class FourBitState:
    """What belongs to a 4-bit weight. absmax: float32 (blocks,), or uint8 codes of `nested`: (table float32 (256,),
    absmax float32 (nested blocks,), blocksize, offset)."""

    kind: str
    shape: tuple[int, int]
    blocksize: int
    absmax: Any
    quant_map: Any = None
    nested: tuple[Any, Any, Any, Any] | None = None

    @classmethod
    def read(cls, state: Any) -> FourBitState:
        """From a `QuantState`, its `as_dict()`, or a checkpoint's tensors, with or without "weight." before the names.
        Raises TypeError or ValueError that names the entry."""
        if not isinstance(state, Mapping):
            as_dict = getattr(state, "as_dict", None)
            if as_dict is None:
                raise TypeError(f"{_OP}: state must be a QuantState or a dict, got {type(state).__name__}")
            state = as_dict()
        entries = {str(key).removeprefix("weight."): value for key, value in state.items()}
        for key in [key for key in entries if key.startswith(_STATE)]:
            entries.update(_json(key, entries.pop(key)))
        kind, shape, blocksize = (entries.get(key) for key in ("quant_type", "shape", "blocksize"))
        if kind not in TABLES:
            raise ValueError(f"{_OP}: state['quant_type'] must be 'nf4' or 'fp4', got {kind!r}")
        if not isinstance(shape, list | tuple) or len(shape) != 2 or not all(_is_positive(size) for size in shape):
            raise ValueError(f"{_OP}: state['shape'] must be two positive integers, got {shape!r}")
        if not _is_positive(blocksize):
            raise ValueError(f"{_OP}: state['blocksize'] must be a positive integer, got {blocksize!r}")
        nested = None
        if "nested_absmax" in entries:
            keys = ("nested_quant_map", "nested_absmax", "nested_blocksize", "nested_offset")
            nested = tuple(entries.get(key) for key in keys)
        return cls(kind, tuple(shape), blocksize, entries.get("absmax"), entries.get("quant_map"), nested)

    def scales(self) -> Tensor:
        """float32 (blocks,). Nested ones in float32 as bitsandbytes computes them: table value times its block's
        absmax, then plus the offset."""
        n, k = self.shape
        blocks = -(-n * k // self.blocksize)
        if self.nested is None:
            return expect(_OP, "state['absmax']", self.absmax, FLOATS, (blocks,)).float()
        codes = expect(_OP, "state['absmax']", self.absmax, (torch.uint8,), (blocks,))
        table, absmax, size, offset = self.nested
        if not _is_positive(size):
            raise ValueError(f"{_OP}: state['nested_blocksize'] must be a positive integer, got {size!r}")
        table = expect(_OP, "state['nested_quant_map']", table, (torch.float32,), (256,))
        absmax = expect(_OP, "state['nested_absmax']", absmax, (torch.float32,), (-(-blocks // size),))
        if isinstance(offset, bool) or not isinstance(offset, int | float) or not abs(offset) < 1e30:
            raise ValueError(f"{_OP}: state['nested_offset'] must be a number, got {offset!r}")
        return table[codes.int()] * absmax.repeat_interleave(size)[:blocks] + torch.tensor(float(offset))

    def check_table(self) -> None:
        """Raises NotImplementedError for a quant_map that is not the kind's own."""
        if self.quant_map is None:
            return
        table = expect(_OP, "state['quant_map']", self.quant_map, FLOATS, (16,)).float()
        if not torch.allclose(table, torch.tensor(TABLES[self.kind]), rtol=0, atol=1e-6):
            raise NotImplementedError(
                f"{_OP}: state['quant_map'] is not {self.kind}'s table; bitsandbytes' own kernels use no other either"
            )


def from_bitsandbytes(weight: Tensor, state: Any) -> QuantizedWeight:
    """A weight that bitsandbytes quantised to int8, NF4 or FP4.

    int8 (weight int8 (N, K)): ``w = weight * (SCB / 127)``; state: a dict or object with SCB, float32 (N,), and maybe
    threshold: above 0, outliers of x are multiplied apart, see `from_int8`; there bitsandbytes takes the columns that
    hold an outlier in any row of the batch, here each row of x is decomposed on its own.

    4 bits: ``w = table[code] * absmax`` in float32, of which bitsandbytes returns the value rounded to its dtype.
    weight: N * K / 2 bytes in any dtype and shape, element 2i of the flattened weight in the high nibble of byte i;
    state: a `QuantState`, its `as_dict()`, or the dict of tensors that a checkpoint has beside the weight (absmax,
    quant_map, nested_absmax, nested_quant_map, quant_state.bitsandbytes__nf4). Blocks run over the flattened weight;
    where they cross rows, the packed groups are their common divisor.

    Raises TypeError or ValueError that names the entry, NotImplementedError for tables other than NF4's and FP4's and
    for blocks that share no multiple of 16 with the rows.
    """
    if isinstance(weight, Tensor) and weight.dtype is torch.int8 and not _is_four_bit(state):
        return _from_llm_int8(weight, state)
    four = FourBitState.read(state)
    four.check_table()
    (n, k), scales = four.shape, four.scales()
    if not isinstance(weight, Tensor):
        raise TypeError(f"{_OP}: weight must be a tensor, got {type(weight).__name__}")
    if weight.numel() * weight.dtype.itemsize != (n * k + 1) // 2 or weight.device.type != "cpu":
        raise ValueError(
            f"{_OP}: weight must hold {n} x {k} 4-bit codes in {(n * k + 1) // 2} bytes of CPU memory, got "
            f"{weight.numel() * weight.dtype.itemsize} on {weight.device}"
        )
    packed = weight.detach().contiguous().view(-1).view(torch.uint8)
    group, (scales,) = flat_groups(_OP, four.blocksize, n, k, scales)

    def piece(rows: slice) -> QuantizedWeight:
        begin, end = rows.start * k, rows.stop * k
        pairs = packed[begin // 2 : -(-end // 2)].to(torch.int16)
        # The high nibble comes first, and the low byte of a word does.
        codes = (pairs >> 4).bitwise_or_((pairs & 15) << 8).view(torch.uint8)
        codes = codes[begin % 2 : begin % 2 + end - begin].reshape(-1, k)
        return pack(codes, scales[rows].contiguous(), None, four.kind, group, source=f"bitsandbytes {four.kind}")

    return in_pieces((n, k), piece)


def _from_llm_int8(weight: Tensor, state: Any) -> QuantizedWeight:
    def entry(key: str) -> Any:
        return state.get(key) if isinstance(state, Mapping) else getattr(state, key, None)

    threshold = 0.0 if entry("threshold") is None else entry("threshold")
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 <= threshold < 1e30:
        raise ValueError(f"{_OP}: state.threshold must be a number from 0, got {threshold!r}")
    layout = entry("weight_format")
    if isinstance(layout, Tensor):
        layout = layout.tolist()
    if layout not in (None, 0, "row"):
        raise NotImplementedError(f"{_OP}: state.weight_format {layout!r} is not supported, only 0 (rows)")
    weight = expect(_OP, "weight", weight, (torch.int8,), (None, None))
    scb = expect(_OP, "state.SCB", entry("SCB"), FLOATS, (weight.shape[0],)).float()
    return from_int8(weight, scb / 127, outlier_threshold=float(threshold), source="bitsandbytes")


def _is_four_bit(state: Any) -> bool:
    if not isinstance(state, Mapping):
        return hasattr(state, "as_dict")
    return "quant_type" in state or any(_STATE in str(key) for key in state)


def _json(key: str, packed: Any) -> dict[str, Any]:
    """The entries that a checkpoint keeps as the bytes of a JSON object."""
    name = f"state['{key}']"
    text = bytes(expect(_OP, name, packed, (torch.uint8,), (None,)).numpy())
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{_OP}: {name} must be JSON, {error}") from None
    if not isinstance(entries, dict):
        raise ValueError(f"{_OP}: {name} must be a JSON object, got {text[:40]!r}")
    return {**entries, "quant_type": entries.get("quant_type", key.removeprefix(_STATE))}


def _is_positive(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31
