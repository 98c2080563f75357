"""One linear layer for each group of rows, and the straight-through gradient of weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from cases import LinearCase, linear_inputs, seeded
from compare import assert_same_bits

from tilewright import quantize_weight, quantized_linear
from tilewright.ops import grouped_linear
from tilewright.ops.linear import ACTIVATIONS
from tilewright.quant import QuantizedWeight

pytestmark = pytest.mark.usefixtures("one_thread_for_torch")

SIZES = ([3, 0, 1, 130, 7], [1, 1, 1, 1, 1], [0, 0, 9, 0, 0], [0, 0, 0, 0, 0])


def experts(kind: str, n: int = 64, k: int = 96) -> tuple[list[QuantizedWeight], torch.Tensor]:
    """Five matrices (n, k) and their biases, (5 * n,)."""
    weights = [linear_inputs(LinearCase(f"expert{i}", 1, n, k, kind=kind), torch.float32)[1] for i in range(5)]
    return weights, torch.randn(5 * n, generator=seeded("experts"))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", ["symmetric", "Q4_1", "int6_min", "nf4", "bf16"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_groups_equal_single_calls(sizes: list[int], kind: str, activation: str) -> None:
    weights, bias = experts(kind)
    x = torch.randn(sum(sizes), 96, generator=seeded("x"))
    if sum(sizes) > 8:
        x[-1, 5] = torch.inf
    out = grouped_linear(x, QuantizedWeight.concat(weights), torch.tensor(sizes), bias, activation=activation)
    expected = [
        quantized_linear(part, weight, b, activation=activation)
        for part, weight, b in zip(x.split(sizes), weights, bias.split(64), strict=True)
    ]
    assert_same_bits(out, torch.cat(expected))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
def test_reference(bias: bool) -> None:
    weights, biases = experts("symmetric")
    x, sizes = torch.randn(141, 96, generator=seeded("x")), SIZES[0]
    whole = QuantizedWeight.concat(weights)
    for activation in ACTIVATIONS:
        out = grouped_linear(
            x, whole, torch.tensor(sizes), biases if bias else None, activation=activation, backend="reference"
        )
        expected = [
            quantized_linear(part, w, b if bias else None, activation=activation, backend="reference")
            for part, w, b in zip(x.split(sizes), weights, biases.split(64), strict=True)
        ]
        torch.testing.assert_close(out, torch.cat(expected), rtol=1e-6, atol=1e-6)


def test_bits_do_not_depend_on_threads(same_bits: Callable) -> None:
    weights, bias = experts("zero", 320, 480)
    x, sizes = torch.randn(141, 480, generator=seeded("x")), torch.tensor(SIZES[0])
    same_bits(lambda: (grouped_linear(x, QuantizedWeight.concat(weights), sizes, bias),))


def test_gradients_and_compile() -> None:
    weights, bias = experts("symmetric")
    weight, sizes = QuantizedWeight.concat(weights), torch.tensor(SIZES[0])
    x = torch.randn(141, 96, generator=seeded("x"))
    upstream = torch.randn(141, 64, generator=seeded("upstream"))

    def gradients(function: Callable) -> tuple[torch.Tensor, ...]:
        leaves = [t.clone().requires_grad_() for t in (x, bias)]
        return torch.autograd.grad(function(*leaves), leaves, upstream)

    def dense(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        parts = zip(x.split(SIZES[0]), weights, bias.split(64), strict=True)
        return torch.cat([torch.nn.functional.linear(part, w.dequantize(), b) for part, w, b in parts])

    def ours(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return grouped_linear(x, weight, sizes, bias)

    for a, b in zip(gradients(ours), gradients(dense), strict=True):
        torch.testing.assert_close(a, b)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    assert_same_bits(compiled(x, bias), ours(x, bias))


@pytest.mark.parametrize("activation", ["int8", "fp32"])
def test_straight_through_gradient_of_the_weight(activation: str) -> None:
    w = torch.randn(40, 96, generator=seeded("latent"), requires_grad=True)
    x = torch.randn(2, 5, 96, generator=seeded("x"))
    upstream = torch.randn(2, 5, 40, generator=seeded("upstream"))
    quantized_linear(x, quantize_weight(w, 4, 32, straight_through=True), activation=activation).backward(upstream)
    torch.testing.assert_close(w.grad, upstream.flatten(0, 1).t() @ x.flatten(0, 1))
    assert quantize_weight(w).latent is None  # on request only
    w.grad = None
    quantized_linear(x.requires_grad_(), quantize_weight(w)).backward(upstream)
    assert w.grad is None and x.grad is not None


X, WEIGHT = torch.zeros(6, 96), quantize_weight(torch.zeros(128, 96))


@pytest.mark.parametrize("sizes, weight, message", [
    (torch.tensor([3, 2]), WEIGHT, "add up"), (torch.tensor([3, 4]), WEIGHT, "add up"),
    (torch.tensor([7, -1]), WEIGHT, "add up"), (torch.tensor([2**62, 2**62]), WEIGHT, "add up"),
    (torch.tensor([2, 2, 2]), WEIGHT, "multiple of 32"), (torch.tensor([3.0, 3.0]), WEIGHT, "int64"),
    (torch.tensor([[3, 3]]), WEIGHT, "int64"), (torch.tensor([], dtype=torch.int64), WEIGHT, "one or more"),
    (torch.tensor([3, 3]), replace(WEIGHT, outlier_threshold=6.0), "outlier"),
])  # fmt: skip
def test_rejected(sizes: torch.Tensor, weight: QuantizedWeight, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grouped_linear(X, weight, sizes)


def test_rejected_arguments() -> None:
    with pytest.raises(ValueError, match="activation must be one of"):
        grouped_linear(X, WEIGHT, torch.tensor([3, 3]), activation="int4")
    with pytest.raises(ValueError, match="backend must be one of"):
        grouped_linear(X, WEIGHT, torch.tensor([3, 3]), backend="gpu")
    with pytest.raises(NotImplementedError, match="need tensors on a GPU, got cpu"):
        grouped_linear(X, WEIGHT, torch.tensor([3, 3]), backend="triton")
    with pytest.raises(ValueError, match=r"\(rows, columns\)"):
        grouped_linear(X.view(2, 3, 96), WEIGHT, torch.tensor([3, 3]))
    with pytest.raises(ValueError, match=r"bias must be .*\(128,\)"):
        grouped_linear(X, WEIGHT, torch.tensor([3, 3]), torch.zeros(64))
