"""Codes of a few bits, out of the words that checkpoints pack them into."""

from __future__ import annotations

import torch
from torch import Tensor


def unpack_bits(words: Tensor, bits: int, count: int) -> Tensor:
    """The first ``count`` codes of every row: uint8 (rows, count).

    words: contiguous int32 (rows, n), n * 32 >= count * bits; a row is one stream of bits, lowest bit of the first
    word first, in which code i takes bits i * bits to (i + 1) * bits - 1, across words where it falls so. This is
    how GPTQ (along K, and its zero points along N) and compressed-tensors pack 1 to 8 bits.
    """
    stream = words.view(torch.uint8)
    if bits == 8:
        return stream[:, :count]
    # Eight codes are `bits` bytes; they are read as one integer and then spread to a byte each.
    eights = -(-count // 8)
    needed = eights * bits
    if stream.shape[1] < needed:
        stream = torch.nn.functional.pad(stream, (0, needed - stream.shape[1]))
    stream = stream[:, :needed]
    if bits == 4:
        spread = stream.contiguous().view(torch.int32).to(torch.int64).bitwise_and_(0xFFFFFFFF)
    else:
        eight = stream.reshape(-1, eights, bits)
        spread = eight[..., 0].to(torch.int64)
        for byte in range(1, bits):
            spread |= eight[..., byte].to(torch.int64) << (8 * byte)
    for codes in (4, 2, 1):  # that stay side by side; the upper half of each pair of them moves up
        field = (1 << (codes * bits)) - 1
        lower = sum(field << (16 * codes * i) for i in range(4 // codes))
        upper = (spread << (codes * (8 - bits))).bitwise_and_(lower << (8 * codes))
        spread = spread.bitwise_and_(lower).bitwise_or_(upper)
    return spread.view(torch.uint8)[:, :count]
