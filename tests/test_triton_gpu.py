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

import tilewright
from tilewright.ops.attention_reference import attention_reference
from tilewright.ops.linear import quantized_linear_reference


def moved(x: object) -> object:
    return x.cuda() if isinstance(x, Tensor) else x


@pytest.mark.parametrize(("case", "dtype"), attention_tests.pairs(attention_tests.SHAPES + attention_tests.FEATURES))
def test_attention(case: object, dtype: torch.dtype) -> None:
    tensors, options = attention_inputs(case, dtype)
    out = tilewright.attention(*map(moved, tensors), **{name: moved(x) for name, x in options.items()})
    assert tilewright.last_impl("attention") == "triton"
    assert_close(out.cpu(), attention_reference(*tensors, **options)[0], naive_attention(*tensors, **options)[0], dtype)


@pytest.mark.parametrize(("case", "dtype", "activation"), linear_tests.pairs())
def test_linear(case: object, dtype: torch.dtype, activation: str) -> None:
    x, weight, bias = linear_tests.inputs(case, dtype)
    out = tilewright.quantized_linear(x.cuda(), weight.to("cuda"), moved(bias), activation=activation)
    ref = quantized_linear_reference(x, weight, bias, activation=activation)
    assert_close(out.cpu(), ref, linear_tests.naive(x, weight, bias, activation), dtype)


@pytest.mark.parametrize("name", gradient_tests.GRADIENTS)
def test_gradients(name: str) -> None:
    make, options = gradient_tests.GRADIENTS[name]
    t = make()
    gradient_tests.gradients(t._replace(bias=None if t.bias is None else t.bias.to(t.q.dtype)), options, device="cuda")


def test_a_cuda_graph_captures_the_launches() -> None:
    q, k = torch.randn(2, 8, 1, 64, device="cuda").half(), torch.randn(2, 2, 600, 64, device="cuda").half()
    x = torch.randn(4, 256, device="cuda").half()
    weight = tilewright.quantize_weight(torch.randn(64, 256)).to("cuda")

    def step() -> tuple[Tensor, Tensor]:
        return tilewright.attention(q, k, k), tilewright.quantized_linear(x, weight, activation="fp32")

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
