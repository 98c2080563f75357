"""int8 weights with one scale a row: plain, and in the order of EETQ's CUTLASS kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from tilewright.quant.pieces import FLOATS, expect, in_pieces
from tilewright.quant.weight import QuantizedWeight, pack


def from_int8(
    weight: Tensor, scale: Tensor, *, outlier_threshold: float = 0.0, source: str = "int8"
) -> QuantizedWeight:
    """``w = weight * scale``, kept exactly.

    weight: int8 (N, K); scale: float (N,) or (N, 1), one a row. With an outlier_threshold above 0 the kernels multiply
    every element of x with ``|x| >= outlier_threshold`` in fp32 and leave it out of the rounding of x to 8 bits
    (LLM.int8(), arXiv 2208.07339); bitsandbytes takes whole columns of a batch out, here each row of x is on its own,
    so that its result does not depend on its neighbours.

    Raises TypeError or ValueError for other shapes and dtypes, and for NaN or infinity.
    """
    op = f"from_{source}"
    weight = expect(op, "weight", weight, (torch.int8,), (None, None))
    n, k = weight.shape
    dims = (n, 1) if isinstance(scale, Tensor) and scale.dim() == 2 else (n,)
    scales = expect(op, "scale", scale, FLOATS, dims).float().view(n, 1)

    def piece(rows: slice) -> QuantizedWeight:
        codes = weight[rows].contiguous().view(torch.uint8).bitwise_xor(0x80)
        return pack(codes, scales[rows], None, "int8", -1, source=source, outlier_threshold=outlier_threshold)

    return in_pieces((n, k), piece)


def from_eetq(weight: Tensor, scales: Tensor) -> QuantizedWeight:
    """A weight that EETQ quantised (symmetric int8, one scale an output) for its kernels on sm_75 to sm_89.

    weight: int8 (K, N), K a multiple of 64 and N of 2, in the order that FasterTransformer's
    `preprocess_weights_for_mixed_gemm` makes: of every 16 k, k and k + 8 lie side by side; the 64 k of a tile of one
    output are followed by those of the next, two outputs taking turns; 128 is added. scales: float (N,).
    ``w = code * scale``, kept exactly. Raises TypeError or ValueError for other shapes and dtypes.
    """
    weight = expect("from_eetq", "weight", weight, (torch.int8,), (None, None))
    k, n = weight.shape
    if k == 0 or k % 64 or n % 2:
        raise ValueError(f"from_eetq: weight must have a multiple of 64 rows (inputs) and of 2 columns, got {(k, n)}")
    scales = expect("from_eetq", "scales", scales, FLOATS, (n,)).float().view(n, 1)
    rows_of_pairs = weight.contiguous().view(torch.uint8).view(n // 2, 2 * k)

    def piece(rows: slice) -> QuantizedWeight:
        # A copy, because a file's bytes need not be aligned for words. Tiles of 64 k are 8 of them.
        words = rows_of_pairs[rows.start // 2 : rows.stop // 2].clone().view(torch.int64)
        tiles = words.view(-1, k // 64, 2, 8).transpose(1, 2).contiguous().view(torch.uint8).view(-1, k // 16, 8, 2)
        codes = torch.empty(len(tiles), k // 16, 2, 8, dtype=torch.uint8)
        codes[:, :, 0], codes[:, :, 1] = tiles[..., 0], tiles[..., 1]
        return pack(codes.view(-1, k), scales[rows], None, "int8", -1, source="eetq")

    return in_pieces((n, k), piece)
