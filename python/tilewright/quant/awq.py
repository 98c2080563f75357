"""Weights as AutoAWQ stores them for its "gemm" kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from tilewright.quant.pieces import FLOATS, expect, fit_groups, in_pieces
from tilewright.quant.weight import QuantizedWeight, pack

_OP = "from_awq"
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which of 8 outputs lies in nibble 0, 1, ... of a word


def from_awq(qweight: Tensor, qzeros: Tensor, scales: Tensor, bits: int = 4) -> QuantizedWeight:
    """``w[n, k] = scales[g, n] * (code[k, n] - zero[g, n])`` with ``g = k // group size``, kept exactly.

    bits: 4. qweight: int32 (K, N / 8), a word 8 outputs in the order 0 2 4 6 1 3 5 7 from the lowest nibble up;
    qzeros: int32 (groups, N / 8), packed alike; scales: float (groups, N), groups a divisor of K.

    Raises TypeError or ValueError for other shapes, dtypes and values; NotImplementedError for groups whose size is no
    multiple of 16.
    """
    if bits != 4:
        raise NotImplementedError(f"{_OP}: bits must be 4, got {bits!r}")
    qweight = expect(_OP, "qweight", qweight, (torch.int32,), (None, None))
    k, words = qweight.shape
    n = 8 * words
    scales = expect(_OP, "scales", scales, FLOATS, (None, n)).float().t()
    groups = scales.shape[1]
    if groups == 0 or k % groups:
        raise ValueError(f"{_OP}: scales must have rows that divide K = {k}, got {groups}")
    qzeros = expect(_OP, "qzeros", qzeros, (torch.int32,), (groups, words))
    zeros = _unpack(qzeros.t())
    group, (scales, zeros) = fit_groups(_OP, max(k // groups, 1), k, scales, zeros)
    offsets = None if bool((zeros == 8).all()) else zeros
    columns = qweight.t().contiguous()  # at once: pieces of them are read many times slower

    def piece(rows: slice) -> QuantizedWeight:
        return pack(
            _unpack(columns[rows.start // 8 : rows.stop // 8]),
            scales[rows].contiguous(),
            None if offsets is None else offsets[rows].contiguous(),
            "int4",
            group,
            "none" if offsets is None else "zero",
            "awq",
        )

    return in_pieces((n, k), piece)


def _unpack(words: Tensor) -> Tensor:
    """Codes, uint8 (N, K), of words (N / 8, K)."""
    codes = torch.empty(words.shape[0], 8, words.shape[1], dtype=torch.uint8)
    for nibble, output in enumerate(_ORDER):
        codes[:, output] = (words >> (4 * nibble)).bitwise_and_(15)
    return codes.view(-1, words.shape[1])
