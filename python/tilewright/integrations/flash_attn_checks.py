"""What the flash-attn functions check before they call an op, in flash-attn's layouts and words.

Values inside tensors are not looked at while torch.compile traces: the kernels check them again.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from tilewright.ops.attention_reference import FLOATS
from tilewright.ops.registry import direct

DENSE = "(batch_size, seqlen, heads, headdim)"
PACKED = "(total, heads, headdim)"
PAGES = "(num_blocks, page_size, heads, headdim)"


def score_options(
    op: str, q: Tensor, softmax_scale: float | None, causal: bool, window_size: tuple[int, int], softcap: float
) -> dict:
    """`attention_packed`'s keywords for what flash-attn does to the scores."""
    if len(window_size) != 2 or not all(isinstance(w, int) for w in window_size):
        raise ValueError(f"{op}: window_size must be (left, right), negative for no limit, got {window_size!r}")
    if not softcap < math.inf:
        raise ValueError(f"{op}: softcap must be a finite number, 0 for none, got {softcap!r}")
    return {
        "scale": max(q.shape[-1], 1) ** -0.5 if softmax_scale is None else softmax_scale,
        "softcap": max(softcap, 0.0),
        "causal": "bottom_right" if causal else None,
        "window": (max(window_size[0], -1), max(window_size[1], -1)),
    }


def check_qkv(op: str, q: Tensor, k: Tensor, v: Tensor, q_layout: str, k_layout: str) -> None:
    """q is laid out as q_layout, k and v as k_layout, and all three fit together."""
    for name, t in (("q", q), ("k", k), ("v", v)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(t).__name__}")
        if t.device.type not in ("cpu", "cuda", "meta"):
            raise NotImplementedError(f"{op}: {name} must be on the CPU or a GPU, got {t.device}; move it there")
    if q.dim() != q_layout.count(",") + 1 or not k.dim() == v.dim() == k_layout.count(",") + 1:
        raise ValueError(f"{op}: q must be {q_layout}, k and v {k_layout}, got {_found(q, k, v)}")
    heads, kv_heads = q.shape[-2], k.shape[-2]
    if k.shape[:-1] != v.shape[:-1] or q.shape[-1] != k.shape[-1] or (heads % kv_heads if kv_heads else heads):
        raise ValueError(
            f"{op}: k and v must agree in all but headdim, q and k in headdim, and q's heads must be a multiple of "
            f"k's, got {_found(q, k, v)}"
        )
    if q.dtype not in FLOATS or k.dtype != v.dtype or q.dtype not in (k.dtype, torch.float32):
        raise ValueError(
            f"{op}: q, k and v must be float32, bfloat16, float16 or float64, all the same (a float32 q may meet "
            f"16-bit k and v), got {_found(q, k, v)}"
        )


def _found(q: Tensor, k: Tensor, v: Tensor) -> str:
    return ", ".join(f"{name} {tuple(t.shape)} {t.dtype}" for name, t in (("q", q), ("k", k), ("v", v)))


def check_stacked(op: str, name: str, t: Tensor, layout: str) -> None:
    """``t``, whose name has a letter for each tensor in it, holds them in its third last dimension."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(t).__name__}")
    if t.dim() != layout.count(",") + 1 or t.shape[-3] != len(name):
        raise ValueError(f"{op}: {name} must be {layout}, got {tuple(t.shape)}")


def check_slopes(op: str, slopes: Tensor | None, batch: int, heads: int) -> None:
    if slopes is not None and slopes.shape not in ((heads,), (batch, heads)):
        raise ValueError(
            f"{op}: alibi_slopes must be (nheads,) or (batch_size, nheads), here ({heads},) or ({batch}, {heads}), "
            f"got {tuple(slopes.shape)}"
        )


def check_cu_seqlens(op: str, of: str, bounds: Tensor, max_seqlen: int, total: int | None) -> None:
    """cu_seqlens_q or _k: from 0, never falling, at most ``total``, and no step longer than max_seqlen."""
    name = f"cu_seqlens_{of}"
    if not isinstance(bounds, Tensor) or bounds.dtype != torch.int32 or bounds.dim() != 1 or not len(bounds):
        found = f"{bounds.dtype} {tuple(bounds.shape)}" if isinstance(bounds, Tensor) else type(bounds).__name__
        raise ValueError(f"{op}: {name} must be int32 of shape (batch_size + 1,), got {found}")
    if not direct(bounds):
        return
    values = bounds.tolist()
    lengths = [b - a for a, b in itertools.pairwise(values)]
    if values[0] != 0 or min(lengths, default=0) < 0:
        raise ValueError(f"{op}: {name} must begin with 0 and never fall, got {values}")
    if total is not None and values[-1] > total:
        raise ValueError(f"{op}: {name} must end within the {total} rows of {of}, got {values[-1]}")
    if max(lengths, default=0) > max_seqlen:
        raise ValueError(
            f"{op}: max_seqlen_{of} must be at least the longest sequence, {max(lengths)}, got {max_seqlen}"
        )


def check_per_sequence(op: str, name: str, t: Tensor, batch: int, dims: int = 1) -> None:
    """``t`` is int32 with a row for each sequence."""
    if not isinstance(t, Tensor) or t.dtype != torch.int32 or t.dim() != dims or t.shape[0] != batch:
        wanted = f"({batch},)" if dims == 1 else f"({batch}, max_blocks)"
        found = f"{t.dtype} {tuple(t.shape)}" if isinstance(t, Tensor) else type(t).__name__
        raise ValueError(f"{op}: {name} must be int32 of shape {wanted}, got {found}")


def check_pages(op: str, name: str, table: Tensor, lengths: Tensor, pages: Tensor) -> None:
    """``table`` has a page for every key of sequences of these lengths."""
    check_per_sequence(op, name, table, lengths.shape[0], dims=2)
    if not direct(table, lengths):
        return
    num_blocks, page_size = pages.shape[:2]
    if (lengths > table.shape[1] * page_size).any():
        raise ValueError(
            f"{op}: {name}'s {table.shape[1]} pages of {page_size} keys must hold each sequence, got one of "
            f"{int(lengths.max())}"
        )
    used = torch.arange(table.shape[1]) * page_size < lengths.unsqueeze(1)
    for b, i in (used & ((table < 0) | (table >= num_blocks))).nonzero().tolist():
        raise ValueError(f"{op}: {name}[{b}, {i}] must be in [0, {num_blocks}), got {int(table[b, i])}")


def check_new_keys(op: str, k: Tensor | None, v: Tensor | None, q: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
    """k and v fit into the caches, and nothing that is written or read wants a gradient."""
    if (k is None) != (v is None):
        raise ValueError(f"{op}: k and v must come together, got {'v' if k is None else 'k'} alone")
    if k is not None:
        wanted = [(q.shape[0], k.shape[1] if k.dim() > 1 else "seqlen_new", *c.shape[2:]) for c in (k_cache, v_cache)]
        if [tuple(k.shape), tuple(v.shape)] != wanted or k.dtype not in FLOATS or v.dtype not in FLOATS:
            raise ValueError(
                f"{op}: k and v must be floats of shape {wanted[0]} and {wanted[1]}, got {k.dtype} {tuple(k.shape)} "
                f"and {v.dtype} {tuple(v.shape)}"
            )
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (q, k_cache, v_cache, k, v)):
        raise ValueError(f"{op}: has no gradient; detach the tensors or call it under torch.no_grad()")


def check_cache_range(op: str, first: Tensor | None, last: Tensor, new: int, capacity: int) -> None:
    """0 <= cache_leftpad <= cache_seqlens and the new keys end within the cache."""
    if not direct(first, last):
        return
    starts, ends = [0] * len(last) if first is None else first.tolist(), last.tolist()
    for b, (start, end) in enumerate(zip(starts, ends, strict=True)):
        if not 0 <= start <= end <= capacity - new:
            raise ValueError(
                f"{op}: 0 <= cache_leftpad <= cache_seqlens <= {capacity - new}, the cache's {capacity} keys less "
                f"{new} new ones, must hold, got {start} and {end} for sequence {b}"
            )


def check_rotary(op: str, cos: Tensor | None, sin: Tensor | None, head_dim: int, last: Tensor, steps: int) -> None:
    """The tables fit head_dim and reach ``steps`` positions beyond the longest sequence."""
    if cos is None or sin is None or cos.dim() != 2 or cos.shape != sin.shape or 2 * cos.shape[1] > head_dim:
        found = ["None" if t is None else str(tuple(t.shape)) for t in (cos, sin)]
        raise ValueError(
            f"{op}: rotary_cos and rotary_sin must both be (seqlen_ro, rotary_dim / 2), rotary_dim at most headdim "
            f"({head_dim}), got {' and '.join(found)}"
        )
    longest = int(last.max()) if direct(last) and len(last) else 0
    if longest + steps > cos.shape[0]:
        raise ValueError(f"{op}: rotary_cos and rotary_sin must reach {longest + steps} positions, got {cos.shape[0]}")
