"""The CUDA kernels of attention's gradient, executed through their PTX: the error rule over shapes and features."""

from __future__ import annotations

import gpu_attention
import pytest
import torch
from compare import assert_close
from cuda_attention import BF16, FP16, each_length, gradients
from gpu_attention import grad_case, naive_gradients, packed, rand, whole
from ptx.compilers import needs_nvcc
from torch import Tensor

from tilewright.ops.attention_reference import Operands, Options, reference_backward

pytestmark = needs_nvcc


# Tiles of 64 keys and 16 or 32 rows, and of 64 rows and 16 to 64 keys.
GRADIENTS = {
    **gpu_attention.GRADIENTS,
    "d64_g3": (lambda: grad_case(BF16, 3, 1, 40, 200, 64), Options(0.125, 0.0, 2)),
    "d256_g3": (lambda: grad_case(FP16, 3, 1, 20, 90, 256), Options(0.06, 0.0, 2)),
    "odd_dims": (lambda: grad_case(BF16, 3, 1, 30, 90, 33, 17), Options(0.15, 0.0, 2)),
    "window_right": (lambda: grad_case(FP16, 1, 1, 60, 150, 32), Options(0.2, 0.0, 0, 40, 9)),
    "softcap_alibi_sinks": (
        lambda: grad_case(FP16, 4, 2, 40, 50, 32, alibi=rand("a", 4).abs(), sinks=rand("s", 4)), Options(0.3, 2.0, 2),
    ),
    "alibi_of_batch_d256": (
        lambda: grad_case(BF16, 2, 1, 20, 40, 256, alibi=rand("a", 2, 2).abs()), Options(0.06, 0.0, 2),
    ),
    "bias": (lambda: grad_case(BF16, 4, 2, 40, 50, 32, bias=rand("b", 4, 40, 50)), Options(0.2, 0.0, 0)),
    "bias_rows_d128": (lambda: grad_case(BF16, 2, 2, 70, 50, 128, bias=rand("b", 2, 1, 70, 1)), Options(0.1, 3.0, 2)),
    "bias_d128": (lambda: grad_case(FP16, 2, 1, 40, 70, 128, bias=rand("b", 2, 1, 40, 70)), Options(0.09, 0.0, 2)),
    "bias_keys_d256": (lambda: grad_case(BF16, 2, 2, 20, 50, 256, bias=rand("b", 1, 2, 1, 50)), Options(0.06, 0.0, 0)),
    "bias_d256": (lambda: grad_case(FP16, 2, 2, 20, 50, 256, bias=rand("b", 1, 1, 1, 1)), Options(0.1, 0.0, 2)),
    "dropout": (lambda: grad_case(FP16, 4, 2, 40, 50, 32, seed=whole(5)), Options(0.2, 0.0, 2, -1, -1, 0.4)),
    "bias_dropout": (
        lambda: grad_case(BF16, 4, 2, 40, 50, 32, bias=rand("b", 4, 40, 50), seed=whole(5)),
        Options(0.2, 0.0, 2, -1, -1, 0.3),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GRADIENTS)
def test_error_rule(name: str) -> None:
    make, options = GRADIENTS[name]
    t = make()
    dtype = t.q.dtype
    t = t._replace(bias=None if t.bias is None else t.bias.to(dtype))
    check(t, options)


def check(t: Operands, options: Options) -> None:
    dtype = t.q.dtype
    grad_out, grad_lse = rand("go", *t.q.shape[:3], t.v.shape[3], dtype=dtype), rand("gl", *t.q.shape[:3])
    found = gradients(t, options, grad_out, grad_lse)
    wide = Operands(*(x.double() if x is not None and x.is_floating_point() else x for x in t))
    exact = reference_backward(grad_out.double(), grad_lse, wide, options)
    bars = naive_gradients(t, options, grad_out, grad_lse)
    compared = [(f.to(dtype), e.double()) for f, e in zip(found, exact, strict=True) if f is not None]
    for (f, e), bar in zip(compared, bars, strict=True):
        assert_close(f, e, bar.to(dtype), dtype)


@each_length
def test_lengths(residue: int, dim: int, group: int, dtype: torch.dtype) -> None:
    """Three tiles of keys; of rows as many as the residue allows."""
    rows = 1 + (residue + 7 * dim) % (40 if group == 1 else 20)
    check(grad_case(dtype, group, 1, rows, 128 + residue, dim), Options(dim**-0.5, 0.0, 2))


def naive_packed(t: Operands, options: Options, grad_out: Tensor, grad_lse: Tensor) -> list[Tensor]:
    """naive_gradients of each sequence."""
    wanted = [x for x in (t.q, t.k, t.v, t.alibi, t.sinks) if x is not None]
    grads = [torch.zeros_like(x) for x in wanted]
    bounds = zip(*(x.tolist() for x in (t.q_start, t.q_end, t.k_start, t.k_end)), strict=True)
    for b, (first, last, k_first, k_last) in enumerate(bounds):
        if first == last:
            continue
        q, k = slice(first, last), slice(k_first, k_last)
        alibi = None if t.alibi is None else t.alibi[b : b + 1]
        one = Operands(t.q[:, :, q], t.k[:, :, k], t.v[:, :, k], alibi=alibi, sinks=t.sinks)
        found = naive_gradients(one, options, grad_out[:, :, q], grad_lse[:, :, q])
        places = [grads[0][:, :, q], grads[1][:, :, k], grads[2][:, :, k]]
        places += [] if alibi is None else [grads[3][b : b + 1]]
        places += [] if t.sinks is None else [grads[-1]]
        for place, x in zip(places, found, strict=True):
            place += x
    return grads


@pytest.mark.parametrize("group", [1, 3])
def test_packed_sequences(group: int) -> None:
    dtype = FP16 if group == 1 else BF16
    t = packed(dtype, group)
    more = t._replace(alibi=rand("a", 5, 2 * group).abs(), sinks=rand("s", 2 * group))
    for operands, options in ((t, Options(0.2, 0.0, 2)), (more, Options(0.2, 0.0, 0, 20, 9))):
        grad_out, grad_lse = rand("go", *t.q.shape[:3], t.v.shape[3], dtype=dtype), rand("gl", *t.q.shape[:3])
        found = [f for f in gradients(operands, options, grad_out, grad_lse) if f is not None]
        wide = Operands(*(x.double() if x is not None and x.is_floating_point() else x for x in operands))
        exact = [e for e in reference_backward(grad_out.double(), grad_lse, wide, options) if e.numel()]
        bars = naive_packed(operands, options, grad_out, grad_lse)
        for f, e, bar in zip(found, exact, bars, strict=True):
            assert_close(f.to(dtype), e, bar.to(dtype), dtype)
