"""The CUDA extension on a real GPU, where one is and it was built: the cases of the tests that execute its PTX."""

from __future__ import annotations

import pytest
import torch
from cases import attention_inputs, naive_attention
from compare import assert_close, assert_same_bits
from torch import Tensor

from tilewright import cuda_kernels

if not torch.cuda.is_available() or cuda_kernels.missing(torch.device("cuda:0")):
    pytest.skip("NO GPU, or no extension for it: nothing of the CUDA kernels runs on one", allow_module_level=True)

import test_cuda_attention as attention_tests
import test_cuda_attention_gradients as gradient_tests
import test_cuda_linear as linear_tests
from cuda_attention import FP32, wide
from gpu_attention import CALLS, naive_gradients, naive_sequences, rand
from test_quantized_kv import filled, random_kv

import tilewright
from tilewright.ops import grouped_linear
from tilewright.ops.attention_reference import Operands, Options, attention_reference, reference, reference_backward
from tilewright.ops.linear import quantized_linear_reference

DEVICES = [f"cuda:{i}" for i in range(min(torch.cuda.device_count(), 2))]
on_each = pytest.mark.parametrize("device", DEVICES)


def moved(x: object, device: str) -> object:
    return x.to(device) if isinstance(x, Tensor) else x


@on_each
@pytest.mark.parametrize(
    ("case", "dtype"), attention_tests.SHAPES + attention_tests.DECODE + attention_tests.FEATURES, ids=str
)
def test_attention(case: object, dtype: torch.dtype, device: str) -> None:
    tensors, options = attention_inputs(case, dtype)
    there = {name: moved(x, device) for name, x in options.items()}
    out, lse = tilewright.attention(
        *(x.to(device) for x in tensors), return_lse=True, backend="cuda", **there
    )  # whichever device is current
    ref, ref_lse = attention_reference(*tensors, **options)
    assert_close(out.cpu(), ref, naive_attention(*tensors, **options)[0], dtype)
    assert_close(lse.cpu(), ref_lse, naive_attention(*(x.float() for x in tensors), **options)[1], FP32)


@on_each
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_sequences(name: str, dtype: torch.dtype, device: str) -> None:
    make, options = CALLS[name]
    t = make(dtype)
    out, lse = cuda_kernels.attention(Operands(*(moved(x, device) for x in t)), options, True)
    ref, ref_lse = reference(t, options)
    assert_close(out.cpu(), ref, naive_sequences(t, options)[0], dtype)
    assert_close(lse.cpu(), ref_lse, naive_sequences(wide(t), options)[1], FP32)


@on_each
@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_cache(bits: int, device: str) -> None:
    k, v = random_kv(2, 2, 150, 80, generator=torch.Generator().manual_seed(bits))
    kv, q = filled(k, v, bits, spare=3), rand("q", 2, 6, 2, 80, dtype=torch.bfloat16)
    out = tilewright.attention(q.to(device), kv.to(device), causal="bottom_right")
    assert tilewright.last_impl("attention") == "cuda"
    keys, values = kv.dequantize()
    ref, _ = attention_reference(q, keys, values, causal="bottom_right")
    naive, _ = naive_attention(q, keys.to(q.dtype), values.to(q.dtype), causal="bottom_right")
    assert_close(out.cpu(), ref, naive, q.dtype)


@on_each
@pytest.mark.parametrize("name", gradient_tests.GRADIENTS)
def test_gradients(name: str, device: str) -> None:
    make, options = gradient_tests.GRADIENTS[name]
    t = make()
    dtype = t.q.dtype
    t = t._replace(bias=None if t.bias is None else t.bias.to(dtype))
    grad_out, grad_lse = rand("go", *t.q.shape[:3], t.v.shape[3], dtype=dtype), rand("gl", *t.q.shape[:3])
    there = Operands(*(moved(x, device) for x in t))
    out, lse = cuda_kernels.attention(there, options, True)
    needs = t.bias is not None, t.alibi is not None
    found = cuda_kernels.attention_backward(grad_out.to(device), grad_lse.to(device), there, options, out, lse, *needs)
    doubles = Operands(*(x.double() if x is not None and x.is_floating_point() else x for x in t))
    exact = reference_backward(grad_out.double(), grad_lse, doubles, options)
    compared = [(f.cpu().to(dtype), e.double()) for f, e in zip(found, exact, strict=True) if f is not None]
    for (f, e), bar in zip(compared, naive_gradients(t, options, grad_out, grad_lse), strict=True):
        assert_close(f, e, bar.to(dtype), dtype)


@on_each
@pytest.mark.parametrize(("case", "dtype", "activation"), linear_tests.pairs())
def test_linear(case: object, dtype: torch.dtype, activation: str, device: str) -> None:
    x, weight, bias = linear_tests.inputs(case, dtype)
    out = tilewright.quantized_linear(
        x.to(device), weight.to(device), moved(bias, device), activation=activation, backend="cuda"
    )
    ref = quantized_linear_reference(x, weight, bias, activation=activation)
    assert_close(out.cpu(), ref, linear_tests.naive(x, weight, bias, activation), dtype)
    if activation == "int8":
        assert_same_bits(out.cpu(), tilewright.quantized_linear(x, weight, bias, activation=activation))


@on_each
def test_other_ops(device: str) -> None:
    """The CPU's bits where the kernels have them, else close to them; test_cuda_*.py holds them to the error rule."""
    x, y, w = rand("x", 7, 4200).bfloat16(), rand("y", 7, 4200).bfloat16(), rand("w", 4200)
    q, k = rand("q", 2, 6, 7, 80).bfloat16(), rand("k", 2, 2, 7, 80).bfloat16()
    cos, sin = tilewright.rope_tables(10000.0, 80, 16)
    cache, uniform = torch.zeros(2, 2, 16, 80, dtype=torch.bfloat16), torch.tensor([0.1, 0.9]).double()
    for op, call, tensors, exact in (
        ("silu_mul", tilewright.silu_mul, (x, y), False),
        ("gelu_mul", tilewright.gelu_mul, (x, y), False),
        ("rms_norm", lambda x, y, w: tilewright.rms_norm(x, w, 1e-5, residual=y), (x, y, w), False),
        ("layer_norm", lambda x, w: tilewright.layer_norm(x, w, w, 1e-5), (x, w), False),
        ("rope", tilewright.rope, (q, k, cos, sin), True),
        ("kv_append", lambda c, k: tilewright.kv_append(c, c.clone(), k, k), (cache, k), True),
        ("sample", lambda x, u: torch.ops.tilewright.sample(x[:2], u, 0.8, 50, 0.9, 0.0), (x, uniform), True),
    ):
        found = call(*(moved(t.clone(), device) for t in tensors))
        assert tilewright.last_impl(op) == "cuda"
        expected = call(*(t.clone() for t in tensors))
        for a, b in zip(*(r if isinstance(r, tuple) else (r,) for r in (found, expected)), strict=True):
            (assert_same_bits if exact else torch.testing.assert_close)(a.cpu(), b)


@on_each
@pytest.mark.parametrize("activation", ["bf16", "int8", "int8_token"])
def test_experts(activation: str, device: str) -> None:
    sizes = torch.tensor([3, 0, 20, 1])
    case = linear_tests.Case(24, 128, 136, "int4", -1 if activation == "int8_token" else 32, "zero", True)
    x, weight, bias = linear_tests.inputs(case, torch.bfloat16)
    there = (x.to(device), weight.to(device), sizes.to(device), bias.to(device))
    found = grouped_linear(*there, activation=activation, backend="cuda")
    expected = grouped_linear(x, weight, sizes, bias, activation=activation)
    torch.testing.assert_close(found.cpu(), expected, rtol=2e-2, atol=2e-2)


@on_each
def test_a_cuda_graph_captures_the_launches_in_a_stream_of_its_own(device: str) -> None:
    t, options = attention_tests.dense(torch.float16, 2, 1, 600), Options(0.2, 0.0, 2)
    t = Operands(*(moved(x, device) for x in t))
    x, weight = rand("x", 4, 256).half().to(device), tilewright.quantize_weight(rand("w", 64, 256)).to(device)

    def step() -> tuple[Tensor, ...]:
        projected = tilewright.quantized_linear(x, weight, activation="int8", backend="cuda")
        normed = tilewright.rms_norm(projected, None, 1e-5, backend="cuda")
        return cuda_kernels.attention(t, options, False)[0], tilewright.silu_mul(normed, projected, backend="cuda")

    with torch.cuda.device(device):
        expected, stream = step(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for a, b in zip(step(), expected, strict=True):
                assert_same_bits(a, b)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = step()
        graph.replay()
        torch.cuda.synchronize()
        for a, b in zip(found, expected, strict=True):
            assert_same_bits(a, b)
