"""Attention to a QuantizedKV, whose codes the kernel reads as they are."""

from __future__ import annotations

import torch
from torch import Tensor

from tilewright import _C
from tilewright.ops.attention_reference import FLOATS, Operands, Options, reference
from tilewright.ops.quantized_kv import CACHE, QuantizedKV
from tilewright.ops.registry import check_device, contiguous_last, direct, record_reference, register, served_by, twin

_OP = "attention"


def attention_quantized(
    t: Operands, kv: QuantizedKV, options: Options, backend: str, out: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(out, lse) of t.q's attention to ``kv``, with the mask, bias, slopes, sinks and seed of ``t``."""
    q = t.q
    _check(q, kv, out)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, t.bias, t.alibi, t.sinks)):
        raise ValueError(f"{_OP}: a QuantizedKV has no gradient; detach the tensors or use no_grad")
    if backend == "reference" or q.dtype is torch.float64:
        k, v = kv.dequantize()
        wide, lse = reference(t._replace(k=k, v=v), options)
        record_reference(_OP)
        result, lse = wide.to(q.dtype), lse.float()
        return (result if out is None else out.copy_(result)), lse
    arguments = (*kv.tensors(), *kv.spec(), t.mask, t.bias, t.alibi, t.sinks, t.seed, *options)
    if direct(q, *kv.tensors(), t.mask, t.bias, t.alibi, t.sinks, out):
        return _attention_cpu(q, *arguments, out=out)
    result, lse = torch.ops.tilewright.attention_quantized(q, *arguments)
    return (result if out is None else out.copy_(result)), lse


def _check(q: Tensor, kv: QuantizedKV, out: Tensor | None) -> None:
    batch, kv_heads = kv.k_codes.shape[:2]
    if (
        q.dim() != 4
        or q.shape[0] != batch
        or q.shape[3] != kv.head_dim
        or (q.shape[1] % kv_heads if kv_heads else q.shape[1])
    ):
        raise ValueError(
            f"{_OP}: expected q (batch, heads, seq_q, head_dim) for a QuantizedKV of batch {batch}, {kv_heads} "
            f"kv_heads and head_dim {kv.head_dim}, with heads a multiple of kv_heads, got {tuple(q.shape)}"
        )
    if q.dtype not in FLOATS:
        raise ValueError(f"{_OP}: q must have a floating dtype, got {q.dtype}")
    if out is not None and (out.shape != q.shape or out.dtype != q.dtype):
        raise ValueError(f"{_OP}: out must be {q.dtype} of shape {tuple(q.shape)}, got {out.dtype} {tuple(out.shape)}")


def _attention_any(q, *arguments):
    lacks = "" if q.is_cpu else twin("cuda", "attention").attention_lacks(q, arguments[0], q.shape[-1])
    server = served_by(
        _OP, "auto", q, cuda_lacks=lacks, triton_lacks="the Triton kernels of attention do not read a QuantizedKV"
    )
    if server == "cpu":
        return _attention_cpu(q, *arguments)
    bias = arguments[13]
    if bias is not None and bias.dtype is torch.float64:
        arguments = (*arguments[:13], bias.float(), *arguments[14:])
    return twin(server, "attention").attention_quantized(contiguous_last(q), *arguments)


def _attention_cpu(q, *arguments, out=None):
    cache, (mask, bias, alibi, sinks, seed), options = arguments[:12], arguments[12:17], arguments[17:]
    q = contiguous_last(q)
    bias = bias.float() if bias is not None and bias.dtype is torch.float64 else bias
    alibi, sinks = (x if x is None else x.float().contiguous() for x in (alibi, sinks))
    out = torch.empty_like(q) if out is None else out
    lse = torch.empty(q.shape[:3], dtype=torch.float32)
    _C.attention_quantized(q, *cache, mask, bias, alibi, sinks, seed, *options, out, lse)
    return out, lse


def _attention_fake(q, *arguments):
    check_device(_OP, q=q, quantized_kv=arguments[0], mask=arguments[12], bias=arguments[13])
    return torch.empty_like(contiguous_last(q)), q.new_empty(q.shape[:3], dtype=torch.float32)


register(
    f"attention_quantized(Tensor q, {CACHE}, Tensor? mask, Tensor? bias, Tensor? alibi, Tensor? sinks, Tensor? seed, "
    "float scale, float softcap, int causal, int left, int right, float dropout_p) -> (Tensor, Tensor)",
    _attention_any,
    _attention_fake,
    on_gpu=True,
)
