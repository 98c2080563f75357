"""The Triton kernels on a real GPU, where there is one: the cases of the tests that execute their PTX."""

from __future__ import annotations

import pytest
import torch
from cases import attention_inputs, naive_attention
from compare import assert_close
from torch import Tensor
from triton_device import INTERPRETED

if INTERPRETED or not torch.cuda.is_available():
    pytest.skip("NO GPU: nothing of the Triton kernels runs on one", allow_module_level=True)

import test_triton_attention as attention_tests
import test_triton_gradients as gradient_tests
import test_triton_linear as linear_tests
from gpu_attention import rand

import tilewright
from tilewright.ops import grouped_linear
from tilewright.ops.attention_reference import attention_reference
from tilewright.ops.linear import quantized_linear_reference


def moved(x: object) -> object:
    return x.cuda() if isinstance(x, Tensor) else x


@pytest.mark.parametrize(("case", "dtype"), attention_tests.pairs(attention_tests.SHAPES + attention_tests.FEATURES))
def test_attention(case: object, dtype: torch.dtype) -> None:
    tensors, options = attention_inputs(case, dtype)
    there = {name: moved(x) for name, x in options.items()}
    out = tilewright.attention(*map(moved, tensors), **there, backend="triton")
    assert tilewright.last_impl("attention") == "triton"
    assert_close(out.cpu(), attention_reference(*tensors, **options)[0], naive_attention(*tensors, **options)[0], dtype)


@pytest.mark.parametrize(("case", "dtype", "activation"), linear_tests.pairs())
def test_linear(case: object, dtype: torch.dtype, activation: str) -> None:
    x, weight, bias = linear_tests.inputs(case, dtype)
    out = tilewright.quantized_linear(x.cuda(), weight.to("cuda"), moved(bias), activation=activation, backend="triton")
    ref = quantized_linear_reference(x, weight, bias, activation=activation)
    assert_close(out.cpu(), ref, linear_tests.naive(x, weight, bias, activation), dtype)


@pytest.mark.parametrize("name", gradient_tests.GRADIENTS)
def test_gradients(name: str) -> None:
    make, options = gradient_tests.GRADIENTS[name]
    t = make()
    gradient_tests.gradients(t._replace(bias=None if t.bias is None else t.bias.to(t.q.dtype)), options, device="cuda")


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_other_ops(dtype: torch.dtype) -> None:
    x, y, weight = (
        rand(name, *shape).to(dtype) for name, shape in (("x", (70, 4200)), ("y", (70, 4200)), ("w", (4200,)))
    )
    q, k = rand("q", 2, 6, 7, 80).to(dtype), rand("k", 2, 2, 7, 80).to(dtype)
    cos, sin = tilewright.rope_tables(10000.0, 80, 16)
    cache = torch.zeros(2, 2, 16, 80, dtype=dtype)
    for op, call, tensors in (
        ("silu_mul", tilewright.silu_mul, (x, y)),
        ("gelu_mul", tilewright.gelu_mul, (x, y)),
        (
            "rms_norm",
            lambda x, y, w, backend: tilewright.rms_norm(x, w, 1e-5, residual=y, backend=backend),
            (x, y, weight),
        ),
        ("layer_norm", lambda x, w, backend: tilewright.layer_norm(x, w, w, 1e-5, backend=backend), (x, weight)),
        ("rope", tilewright.rope, (q, k, cos, sin)),
        ("kv_append", lambda c, k, backend: tilewright.kv_append(c, c.clone(), k, k, backend=backend), (cache, k)),
    ):
        found = call(*(moved(t.clone()) for t in tensors), backend="triton")
        assert tilewright.last_impl(op) == "triton"
        expected = call(*(t.clone() for t in tensors), backend="cpu")
        for a, b in zip(*(r if isinstance(r, tuple) else (r,) for r in (found, expected)), strict=True):
            torch.testing.assert_close(a.cpu(), b)


@pytest.mark.parametrize(("codes", "offset", "dtype", "activation"), linear_tests.GROUPED)
def test_grouped_linear(codes: str, offset: str, dtype: torch.dtype, activation: str) -> None:
    sizes, case = torch.tensor([3, 0, 1, 70, 7]), linear_tests.Case(81, 64, 96, codes, 32, offset, True)
    parts = [linear_tests.inputs(case, dtype, i) for i in range(5)]
    x, weight = parts[0][0], tilewright.QuantizedWeight.concat([part[1] for part in parts])
    out = grouped_linear(x.cuda(), weight.to("cuda"), sizes.cuda(), activation=activation, backend="triton")
    ref = quantized_linear_reference(x, weight, activation=activation, group_sizes=sizes)
    bars = [
        linear_tests.naive(rows, part[1], None, activation)
        for rows, part in zip(x.split(sizes.tolist()), parts, strict=True)
    ]
    assert_close(out.cpu(), ref, torch.cat(bars), dtype)


def test_a_cuda_graph_captures_the_launches() -> None:
    q, k = torch.randn(2, 8, 1, 64, device="cuda").half(), torch.randn(2, 2, 600, 64, device="cuda").half()
    x = torch.randn(4, 256, device="cuda").half()
    weight = tilewright.quantize_weight(torch.randn(64, 256)).to("cuda")

    def step() -> tuple[Tensor, Tensor]:
        projected = tilewright.quantized_linear(x, weight, activation="fp32", backend="triton")
        return tilewright.attention(q, k, k, backend="triton"), projected

    expected = step()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    graph.replay()
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
