"""What a call of attention says, checked once and turned into the arguments that its kernels share."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from tilewright.ops.attention_reference import Operands, Options
from tilewright.triton_kernels.attention_scores import LOG2E
from tilewright.triton_kernels.launch import check_floats

_OP = "attention"
_MAX_DIM = 512


def row_count(t: Operands) -> int:
    """Rows of a KV head: (query, head) pairs."""
    return t.q.shape[2] * (t.q.shape[1] // max(t.k.shape[1], 1))


def head_blocks(t: Operands) -> tuple[int, int]:
    """head_dim and v_dim as the tiles have them: powers of two from 16 on."""
    return max(16, triton.next_power_of_2(t.q.shape[3])), max(16, triton.next_power_of_2(t.v.shape[3]))


def score_bytes(t: Operands) -> int:
    """Bytes of mask and bias a score."""
    return (t.mask is not None) + (0 if t.bias is None else t.bias.dtype.itemsize)


def arguments_of(t: Operands, options: Options) -> dict:
    """The arguments that forward and backward kernels share."""
    heads, kv_heads = t.q.shape[1], t.k.shape[1]
    paged, packed = t.block_table is not None, t.q_start is not None
    page_size = t.k.shape[2] if paged else 1
    capacity = t.block_table.shape[1] * page_size if paged else t.k.shape[2]
    keys = t.block_table.shape[0] if paged else t.k.shape[0]
    unit = LOG2E if t.bias is not None else 1.0
    to_unit = 1.0 if t.bias is not None else LOG2E
    softcap = options.softcap
    reach = t.q.shape[2] + capacity  # a window beyond it has no edge
    block_d, block_v = head_blocks(t)
    return {
        "q": t.q, "k": t.k, "v": t.v, "mask": None if t.mask is None else t.mask.view(torch.uint8), "bias": t.bias,
        "alibi": t.alibi, "q_start": t.q_start, "q_end": t.q_end, "k_start": t.k_start, "k_end": t.k_end,
        "k_batch": t.k_batch, "block_table": t.block_table, "seed": t.seed if options.dropout_p else None,
        "q_strides": t.q.stride()[:3], "k_strides": t.k.stride()[:3], "v_strides": t.v.stride()[:3],
        "mask_strides": _broadcast_strides(t.mask), "bias_strides": _broadcast_strides(t.bias),
        "alibi_stride": t.alibi.stride(0) if t.alibi is not None and t.alibi.dim() == 2 else 0,
        "table_stride": t.block_table.stride(0) if paged else 0,
        "batch": len(t.q_start) if packed else t.q.shape[0], "seq_q": t.q.shape[2], "capacity": capacity,
        "k_rows": keys, "page_size": page_size, "num_pages": t.k.shape[0], "kv_heads": kv_heads,
        "scale": options.scale / softcap if softcap else options.scale * to_unit, "cap": softcap * to_unit,
        "left": min(options.left, reach), "right": min(options.right, reach),
        "keep_limit": float(torch.tensor(1 - options.dropout_p, dtype=torch.float32)) * 2**24
        if options.dropout_p else None,
        "HEAD_DIM": t.q.shape[3], "V_DIM": t.v.shape[3], "BLOCK_D": block_d, "BLOCK_V": block_v,
        "GROUP": heads // max(kv_heads, 1), "CAUSAL": options.causal, "LEFT": options.left >= 0,
        "RIGHT": options.right >= 0 and not (options.causal and options.right >= 0), "SOFTCAP": softcap != 0,
        "PACKED_KEYS": packed and not paged and t.k_batch is None and keys == 1, "UNIT": unit, "SLOPE_UNIT": to_unit,
    }  # fmt: skip


def _broadcast_strides(t: Tensor | None) -> tuple[int, int, int, int]:
    """Strides of a mask or bias as if it were (batch, heads, seq_q, seq_k)."""
    if t is None:
        return (0, 0, 0, 0)
    strides = [0 if size == 1 else stride for size, stride in zip(t.shape, t.stride(), strict=True)]
    return (*([0] * (4 - len(strides))), *strides)


def check(t: Operands, options: Options) -> None:
    """Raise ValueError for shapes, dtypes and strides that the kernels do not take."""
    q, k, v = t.q, t.k, t.v
    check_floats(_OP, q=q, k=k, v=v)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(f"{_OP}: {name} must be (batch, heads, seq, head_dim), got {tuple(x.shape)}")
        if x.stride(3) != 1 and x.shape[3] > 1 and x.numel():
            raise ValueError(f"{_OP}: {name} must be contiguous in its last dimension, got stride {x.stride(3)}")
    heads, kv_heads = q.shape[1], k.shape[1]
    if k.dtype != v.dtype or q.dtype not in (k.dtype, torch.float32):
        raise ValueError(
            f"{_OP}: q, k and v must have one dtype (a float32 q may meet 16-bit k, v), got {q.dtype}, {k.dtype}, "
            f"{v.dtype}"
        )
    if k.shape[:3] != v.shape[:3] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"{_OP}: k and v must be (batch, kv_heads, seq_k, head_dim) matching q {tuple(q.shape)}, got k "
            f"{tuple(k.shape)}, v {tuple(v.shape)}"
        )
    if heads % kv_heads if kv_heads else heads:
        raise ValueError(
            f"{_OP}: the number of query heads must be a multiple of the key heads, got {heads} and {kv_heads}"
        )
    if max(q.shape[3], v.shape[3]) > _MAX_DIM:
        raise NotImplementedError(f"{_OP}: head_dim up to {_MAX_DIM} is supported, got {max(q.shape[3], v.shape[3])}")
    if not 0 <= options.dropout_p <= 1:
        raise ValueError(f"{_OP}: dropout_p must be in [0, 1], got {options.dropout_p}")
    if options.dropout_p and (t.seed is None or t.seed.dtype != torch.int64 or t.seed.numel() != 1):
        raise ValueError(f"{_OP}: dropout needs a seed, one int64, got {t.seed}")
    packed = t.q_start is not None
    if packed != (t.q_end is not None) or (packed and q.shape[0] != 1):
        raise ValueError(f"{_OP}: packed queries need q_start, q_end and a batch of 1")
    batch = len(t.q_start) if packed else q.shape[0]
    keys = k.shape[0]
    if t.block_table is not None:
        if t.block_table.dtype != torch.int32 or t.block_table.dim() != 2:
            raise ValueError(f"{_OP}: block_table must be int32 (batch, max_blocks), got {tuple(t.block_table.shape)}")
        if t.block_table.stride(1) != 1 and t.block_table.shape[1] > 1:
            raise ValueError(f"{_OP}: block_table must be contiguous in its last dimension")
        keys = t.block_table.shape[0]
    shared = packed and t.block_table is None and keys == 1
    if t.k_batch is None and not shared and keys != batch:
        raise ValueError(
            f"{_OP}: k and v must be (batch, kv_heads, seq_k, head_dim) matching q {tuple(q.shape)}, got k "
            f"{tuple(k.shape)}, v {tuple(v.shape)}"
        )
    for name in ("q_start", "q_end", "k_start", "k_end", "k_batch"):
        x = getattr(t, name)
        if x is not None and (x.dtype != torch.int64 or x.shape != (batch,)):
            raise ValueError(f"{_OP}: {name} must be int64 of shape ({batch},), got {x.dtype} {tuple(x.shape)}")
    if (packed or t.block_table is not None) and (t.mask is not None or t.bias is not None):
        raise ValueError(f"{_OP}: packed queries and paged keys take no mask and no bias")
    full = (batch, heads, q.shape[2], k.shape[2])
    for name, x in (("mask", t.mask), ("bias", t.bias)):
        if x is not None and (
            x.dim() > 4 or any(s not in (f, 1) for s, f in zip(x.shape[::-1], full[::-1], strict=False))
        ):
            raise ValueError(f"{_OP}: {name} must broadcast to {full}, got {tuple(x.shape)}")
    if t.mask is not None and t.mask.dtype != torch.bool:
        raise ValueError(f"{_OP}: mask must be boolean, got {t.mask.dtype}")
    check_floats(_OP, bias=t.bias)
    for name, x, shapes in (
        ("alibi_slopes", t.alibi, ((heads,), (batch, heads))),
        ("sinks", t.sinks, ((heads,),)),
    ):
        if x is None:
            continue
        if x.shape not in shapes or x.dtype != torch.float32 or (x.stride(-1) != 1 and heads > 1):
            raise ValueError(
                f"{_OP}: {name} must be contiguous float32 of shape {' or '.join(map(str, shapes))}, got {x.dtype} "
                f"{tuple(x.shape)}"
            )
    if row_count(t) >= 1 << 31 or k.shape[2] >= 1 << 31:
        raise NotImplementedError(f"{_OP}: up to 2**31 - 1 rows and keys are supported, got {tuple(q.shape)}")
