"""Checks of what callers pass to a model; each error names the argument."""

from __future__ import annotations

import torch
from torch import Tensor


def check_ids(ids: Tensor, vocab_size: int) -> None:
    """Raise TypeError or ValueError unless `ids` is (batch, seq), not empty, integers below `vocab_size`."""
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32):
        got = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(f"input_ids: expected an int64 tensor (batch, seq), got {got}")
    if ids.dim() != 2 or ids.numel() == 0:
        raise ValueError(f"input_ids: expected shape (batch, seq), neither 0, got {tuple(ids.shape)}")
    low, high = (int(bound) for bound in ids.aminmax())
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"input_ids: expected ids from 0 to {vocab_size - 1}, got {low if low < 0 else high}; "
            "is the tokenizer that of another model?"
        )


def check_kept(logits_to_keep: int | Tensor, seq: int) -> int | Tensor:
    """`logits_to_keep` as it is: a number of last positions from 0 (all), or int64 positions (n,)."""
    if isinstance(logits_to_keep, Tensor):
        if logits_to_keep.dim() != 1 or logits_to_keep.dtype != torch.int64:
            raise TypeError(
                "logits_to_keep: expected an integer or int64 positions (n,), got "
                f"{logits_to_keep.dtype} {tuple(logits_to_keep.shape)}"
            )
        if logits_to_keep.numel() and not -seq <= int(logits_to_keep.min()) <= int(logits_to_keep.max()) < seq:
            raise ValueError(f"logits_to_keep: expected positions below {seq}, got {logits_to_keep.tolist()}")
    elif not isinstance(logits_to_keep, int) or logits_to_keep < 0:
        raise ValueError(f"logits_to_keep: expected an integer of at least 0, got {logits_to_keep!r}")
    return logits_to_keep


def check_positions(positions: Tensor | None, batch: int, seq: int) -> Tensor | None:
    """`position_ids` as int64 (seq,) or (batch, seq). Raises ValueError for another shape or negatives."""
    if positions is None:
        return None
    if positions.shape not in ((seq,), (1, seq), (batch, seq)) or positions.is_floating_point():
        raise ValueError(
            f"position_ids: expected integers ({seq},) or ({batch}, {seq}), "
            f"got {positions.dtype} {tuple(positions.shape)}"
        )
    if int(positions.min()) < 0:
        raise ValueError(f"position_ids: expected positions from 0, got {int(positions.min())}")
    positions = positions.long()
    return positions[0] if positions.dim() == 2 and positions.shape[0] == 1 else positions


def left_padding(mask: Tensor | None, batch: int, total: int) -> Tensor | None:
    """The first real token of each row, int64 (batch,), from a 0/1 mask (batch, total) padded on the left.

    Raises ValueError for another shape, NotImplementedError where zeros follow a one.
    """
    if mask is None:
        return None
    if mask.shape != (batch, total):
        raise ValueError(
            f"attention_mask: expected ({batch}, {total}), one entry for every cached and new token, "
            f"got {tuple(mask.shape)}"
        )
    real = mask != 0
    starts = total - real.sum(1)
    if bool((starts == total).any()):
        raise ValueError("attention_mask: expected at least one real token in every row, got a row of zeros")
    if not bool((real == (torch.arange(total) >= starts[:, None])).all()):
        raise NotImplementedError(
            "attention_mask: only padding on the left is supported: zeros, then ones (padding_side='left'); "
            "rows that are padded on the right can be scored without a mask, since causal rows do not see it"
        )
    return starts
