"""Attention on the CUDA kernels, executed through their PTX, and what its tests compare it with."""

from __future__ import annotations

import math
from itertools import product

import cuda_device
import pytest
import torch
from cases import AttentionCase, attention_inputs, naive_attention
from compare import assert_close
from torch import Tensor

from tilewright import QuantizedKV
from tilewright.ops.attention_reference import CAUSAL, Operands, Options, attention_reference

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# (head_dim, query heads a key head, dtype): all of them with as many residues of the length modulo 64, in a sweep with
# all residues.
KINDS = tuple(product((64, 80, 128, 256), (1, 3, 8), (BF16, FP16)))
RESIDUES = (*range(0, 64, 3), 62, 1)
LENGTHS = [
    (residue, *KINDS[(i + 7 * turn) % len(KINDS)])
    for turn in range(3 if cuda_device.SWEEP else 1)
    for i, residue in enumerate(range(64) if cuda_device.SWEEP else RESIDUES)
]
each_length = pytest.mark.parametrize(
    ("residue", "dim", "group", "dtype"), LENGTHS, ids=lambda x: str(x).removeprefix("torch.")
)


def attention(t: Operands, options: Options) -> tuple[Tensor, Tensor]:
    """(out, lse) of the kernels. What they leave as it is, is NaN."""
    cuda = cuda_device.module()
    out = torch.full((*t.q.shape[:3], t.v.shape[3]), math.nan, dtype=t.q.dtype)
    lse = torch.full(t.q.shape[:3], math.nan)
    size = cuda.module.attention_workspace(0, t.q, t.k, t.v, t.q_start, t.q_end, t.k_batch, t.block_table)
    workspace = torch.full((size // 4,), math.nan)
    cuda.attention(*t, *options, out, lse, workspace)
    return out, lse


def operands_of(tensors: tuple[Tensor, Tensor, Tensor], options: dict) -> tuple[Operands, Options]:
    """A call of `tilewright.attention` as the kernels see it."""
    q, k, v = tensors
    mask, bias = options.get("mask"), options.get("bias")
    if mask is not None and mask.dtype != torch.bool:
        bias, mask = mask if bias is None else bias + mask, None
    alibi, sinks = options.get("alibi_slopes"), options.get("sinks")
    left, right = options.get("window") or (-1, -1)
    scale = options.get("scale")
    scale = max(q.shape[3], 1) ** -0.5 if scale is None else scale
    causal = CAUSAL.index(options.get("causal"))
    numbers = Options(scale, options.get("softcap") or 0.0, causal, left, right, options.get("dropout_p", 0.0))
    return Operands(q, k, v, mask, bias, alibi, sinks, seed=options.get("seed")), numbers


def wide(t: Operands) -> Operands:
    """In float32, for what is computed and left in it: log-sum-exp."""
    return Operands(*(x.float() if x is not None and x.is_floating_point() else x for x in t))


def check(tensors: tuple[Tensor, Tensor, Tensor], options: dict) -> tuple[Tensor, Tensor]:
    """The kernels keep the error rule."""
    dtype = tensors[0].dtype
    out, lse = attention(*operands_of(tensors, options))
    ref, ref_lse = attention_reference(*tensors, **options)
    assert_close(out, ref, naive_attention(*tensors, **options)[0], dtype)
    assert_close(lse, ref_lse, naive_attention(*(x.float() for x in tensors), **options)[1], FP32)
    return out, lse


def run(case: AttentionCase, dtype: torch.dtype) -> None:
    check(*attention_inputs(case, dtype))


def attention_quantized(q: Tensor, kv: QuantizedKV, t: Operands, options: Options) -> tuple[Tensor, Tensor]:
    cuda = cuda_device.module()
    out, lse = torch.full_like(q, math.nan, memory_format=torch.contiguous_format), torch.full(q.shape[:3], math.nan)
    cache = (*kv.tensors(), *kv.spec())
    workspace = torch.full((cuda.module.attention_quantized_workspace(0, q, *cache) // 4,), math.nan)
    extras = (t.mask, t.bias, t.alibi, t.sinks, t.seed)
    cuda.attention_quantized(q, *cache, *extras, *options, out, lse, workspace)
    return out, lse


def check_quantized(q: Tensor, kv: QuantizedKV, **options: object) -> None:
    k, v = kv.dequantize()
    out, lse = attention_quantized(q, kv, *operands_of((q, k, v), options))
    ref, ref_lse = attention_reference(q, k, v, **options)
    k, v = k.to(q.dtype), v.to(q.dtype)  # as the kernels multiply them
    assert_close(out, ref, naive_attention(q, k, v, **options)[0], q.dtype)
    assert_close(lse, ref_lse, naive_attention(*(x.float() for x in (q, k, v)), **options)[1], FP32)


def gradients(t: Operands, options: Options, grad_out: Tensor, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, and float32 ones of bias, alibi and sinks, where they are."""
    cuda = cuda_device.module()
    out, lse = attention(t, options)
    if t.q_start is not None:  # rows of no sequence
        lse = lse.nan_to_num(0.0, neginf=-math.inf)
    ragged = t.q_start is not None
    like = torch.zeros_like if ragged else lambda x: torch.full_like(x, math.nan)
    grads = [like(x.contiguous()) for x in (t.q, t.k, t.v)]
    extra = [None if x is None else torch.full(x.shape, math.nan) for x in (t.bias, t.alibi, t.sinks)]
    delta, slopes = (torch.full_like(lse, math.nan) for _ in range(2))
    cuda.attention_backward(*t, *options, out, lse, grad_out, grad_lse, delta, *grads, *extra, slopes)
    return *grads, *extra
