"""Weights as GPTQ's tools (AutoGPTQ, GPTQModel) store them."""

from __future__ import annotations

import torch
from torch import Tensor

from tilewright.quant.bitstream import unpack_bits
from tilewright.quant.pieces import FLOATS, INDICES, expect, fit_groups, in_pieces, sort_groups
from tilewright.quant.weight import QuantizedWeight, pack

_OP = "from_gptq"


def from_gptq(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor | None, bits: int, *, zero_offset: int
) -> QuantizedWeight:
    """``w[n, k] = scales[g, n] * (code[k, n] - zero[g, n])`` with ``g = g_idx[k]``, kept exactly.

    bits: 2, 3, 4 or 8. qweight: int32 (K * bits / 32, N), a column one stream of bits along K; qzeros: int32
    (groups, ceil(N * bits / 32)), a row one stream along N; scales: float (groups, N); g_idx: (K,), None for groups of
    K / groups consecutive columns. zero_offset: what is added to stored zero points: 1 for files of format "gptq"
    (a sum of 2**bits does not wrap), 0 for "gptq_v2". Act-order, where g_idx is not ascending, sorts the columns by
    group and keeps their order with the weight. 2 and 3 bits become 4-bit codes.

    Raises TypeError or ValueError for other shapes, dtypes and values, and for groups of different sizes;
    NotImplementedError for groups whose size is no multiple of 16.
    """
    if not isinstance(bits, int) or bits not in (2, 3, 4, 8):
        raise ValueError(f"{_OP}: bits must be 2, 3, 4 or 8, got {bits!r}")
    if zero_offset not in (0, 1):
        raise ValueError(f"{_OP}: zero_offset must be 0 or 1, got {zero_offset!r}")
    qweight = expect(_OP, "qweight", qweight, (torch.int32,), (None, None))
    words, n = qweight.shape
    if words * 32 % bits:
        raise ValueError(f"{_OP}: qweight must have a multiple of {bits} rows for {bits} bits, got {words}")
    k = words * 32 // bits
    scales = expect(_OP, "scales", scales, FLOATS, (None, n)).float().t()
    groups = scales.shape[1]
    qzeros = expect(_OP, "qzeros", qzeros, (torch.int32,), (groups, -(-n * bits // 32)))
    zeros = (unpack_bits(qzeros.contiguous(), bits, n).to(torch.int16) + zero_offset).t()

    group, columns = _groups(g_idx, k, groups)
    group, (scales, zeros) = fit_groups(_OP, group, k, scales, zeros)
    kind, bias = ("int8", 0) if bits == 8 else ("int4", 8 - 2 ** (bits - 1))
    if bool((zeros == 2 ** (bits - 1)).all()):
        offsets, offset = None, "none"
    elif bool((zeros > 255).any()):  # only 255 + 1
        offsets, offset, bias = -zeros * scales, "min", 0
    else:
        offsets, offset, bias = zeros.to(torch.uint8), "zero", 0

    streams = qweight.t().contiguous()  # at once: pieces of columns are read many times slower

    def piece(rows: slice) -> QuantizedWeight:
        codes = unpack_bits(streams[rows], bits, k)
        if columns is not None:
            codes = codes.gather(1, columns.expand(len(codes), -1))
        return pack(
            (codes + bias if bias else codes).contiguous(),
            scales[rows].contiguous(),
            None if offsets is None else offsets[rows].contiguous(),
            kind,
            group,
            offset,
            f"gptq {bits} bits",
            columns=columns,
        )

    return in_pieces((n, k), piece)


def _groups(g_idx: Tensor | None, k: int, groups: int) -> tuple[int, Tensor | None]:
    """The group size, and the order of columns for act-order."""
    if g_idx is not None and g_idx.numel():
        return sort_groups(_OP, "g_idx", expect(_OP, "g_idx", g_idx, INDICES, (k,)), groups)
    if groups == 0 or k % groups:
        raise ValueError(f"{_OP}: scales must have rows that divide K = {k} where there is no g_idx, got {groups}")
    return max(k // groups, 1), None
