"""Triton's gradients of attention: the error rule over shapes and features."""

from __future__ import annotations

from contextlib import nullcontext

import gpu_attention
import pytest
import torch
from compare import assert_close
from gpu_attention import grad_case, naive_gradients, packed, rand, whole
from triton_device import DTYPES, INTERPRETED, SWEEP, running

import tilewright
from tilewright.ops.attention_reference import CAUSAL, Operands, Options, reference_backward

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


# Tiles of 16 to 64 rows and keys.
GRADIENTS = {
    **gpu_attention.GRADIENTS,
    "d64_g3": (lambda: grad_case(BF16, 3, 1, 40, 110, 64), Options(0.125, 0.0, 2)),
    "d64_f32": (lambda: grad_case(FP32, 3, 1, 30, 100, 64), Options(0.125, 0.0, 2)),
    "d128_f32": (lambda: grad_case(FP32, 1, 1, 50, 50, 128), Options(0.09, 0.0, 2)),
    "softcap_alibi_sinks": (
        lambda: grad_case(FP32, 4, 2, 40, 50, 32, alibi=rand("a", 4).abs(), sinks=rand("s", 4)),
        Options(0.3, 2.0, 2),
    ),
    "alibi_d128_f32": (
        lambda: grad_case(FP32, 2, 1, 30, 40, 128, alibi=rand("a", 2).abs()), Options(0.09, 0.0, 2),
    ),
    "alibi_d256_f32": (
        lambda: grad_case(FP32, 2, 1, 20, 40, 256, alibi=rand("a", 2).abs()), Options(0.06, 0.0, 2),
    ),
    "bias": (lambda: grad_case(FP32, 4, 2, 40, 50, 32, bias=rand("b", 4, 40, 50)), Options(0.2, 0.0, 0)),
    "dropout": (lambda: grad_case(FP32, 4, 2, 40, 50, 32, seed=whole(5)), Options(0.2, 0.0, 2, -1, -1, 0.4)),
}  # fmt: skip


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients(name: str) -> None:
    make, options = GRADIENTS[name]
    t = make()
    dtype = t.q.dtype
    if dtype not in DTYPES:
        dtype = FP16
        t = Operands(*(x.to(dtype) if x is not None and x.dtype == BF16 else x for x in t))
    t = t._replace(bias=None if t.bias is None else t.bias.to(dtype))
    gradients(t, options)


@pytest.mark.skipif(INTERPRETED, reason="the PTX has the configurations that this is about")
@pytest.mark.parametrize("name", ("d64_g3", "d128_g3", "d256_g1"))
def test_other_configurations(name: str) -> None:
    make, options = GRADIENTS[name]
    gradients(make(), options, choice=1)


def gradients(t: Operands, options: Options, device: str = "cpu", choice: int = 0) -> None:
    from tilewright.triton_kernels.attention import attention
    from tilewright.triton_kernels.attention_backward import attention_backward

    dtype = t.q.dtype
    moved = Operands(*(None if x is None else x.to(device) for x in t))
    with running(choice=choice) if device == "cpu" else nullcontext():
        out, lse = attention(moved, options, True)
        grad_out, grad_lse = rand("go", *out.shape, dtype=dtype), rand("gl", *lse.shape)
        found = attention_backward(grad_out.to(device), grad_lse.to(device), moved, options, out, lse, True, True)
    wide = Operands(*(x.double() if x is not None and x.is_floating_point() else x for x in t))
    exact = reference_backward(grad_out.double(), grad_lse, wide, options)
    bars = naive_gradients(t, options, grad_out, grad_lse)
    compared = [(f.cpu().to(dtype), e.double()) for f, e in zip(found, exact, strict=True) if f is not None]
    for (f, e), bar in zip(compared, bars, strict=True):
        assert_close(f, e, bar.to(dtype), dtype)


@pytest.mark.parametrize("group", (1, 3))
def test_gradients_of_packed_sequences(group: int) -> None:
    t = packed(FP32, group)
    more = t._replace(alibi=rand("a", 5, 2 * group).abs(), sinks=rand("s", 2 * group))
    for operands, options in ((t, Options(0.2, 0.0, 2)), (more, Options(0.2, 0.0, 0, 20, 9))):
        gradients_of_packed(operands, options)


def gradients_of_packed(t: Operands, options: Options) -> None:
    from tilewright.triton_kernels.attention import attention
    from tilewright.triton_kernels.attention_backward import attention_backward

    with running():
        out, lse = attention(t, options, True)
        grad_out, grad_lse = rand("go", *out.shape), rand("gl", *lse.shape)
        found = attention_backward(grad_out, grad_lse, t, options, out, lse, True, True)
    for f, e in zip(found, reference_backward(grad_out, grad_lse, t, options), strict=True):
        if f is not None:
            torch.testing.assert_close(f, e.float(), rtol=2e-5, atol=2e-6)


@pytest.mark.skipif(INTERPRETED, reason="the PTX has the tiles that this is about")
@pytest.mark.parametrize("residue", range(64) if SWEEP else (0, 1, 7, 15, 17, 33, 63))
def test_gradients_at_every_residue_of_the_length(residue: int) -> None:
    gradients(grad_case(BF16, 3, 1, 12 + residue, 70 + residue, 64), Options(0.125, 0.0, 2))


def test_autograd_reaches_the_kernels() -> None:
    q, k, v = (rand(n, 1, 2, 20, 16).requires_grad_() for n in "qkv")
    upstream = rand("upstream", 1, 2, 20, 16)
    with running():
        out = tilewright.attention(q, k, v, causal="top_left", backend="triton")
        out.backward(upstream)
    assert tilewright.last_impl("attention") == "triton"
    options = Options(0.25, 0.0, CAUSAL.index("top_left"))
    exact = reference_backward(upstream.double(), None, Operands(*(x.detach().double() for x in (q, k, v))), options)
    bars = naive_gradients(Operands(q, k, v), options, upstream, None)
    for x, e, bar in zip((q, k, v), exact, bars, strict=False):
        assert_close(x.grad, e, bar, FP32)


def test_gradients_without_rows_or_keys_are_zero() -> None:
    for seq_q, seq_k in ((0, 5), (3, 0)):
        q, k = rand("q", 1, 2, seq_q, 16).requires_grad_(), rand("k", 1, 2, seq_k, 16).requires_grad_()
        with running():
            out = tilewright.attention(q, k, k, backend="triton")
            out.sum().backward()
        assert (q.grad == 0).all() and (k.grad == 0).all()
