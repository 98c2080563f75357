"""What a model fuses with its products: the residual stream, the gate between two matrices, and the rounding of what
the next product reads."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import LinearCase, linear_inputs, seeded
from compare import assert_same_bits
from torch import Tensor

import tilewright
from tilewright import quantized_linear
from tilewright.ops import gated_mlp, gelu_mul, silu_mul
from tilewright.ops.linear import ACTIVATIONS, quantized_linear_reference
from tilewright.quant import QuantizedWeight

pytestmark = pytest.mark.usefixtures("one_thread_for_torch")

K, INNER, N = 70, 96, 40


def parts(kind: str, second: str | None = None) -> tuple[QuantizedWeight, QuantizedWeight, Tensor, Tensor]:
    """gate_up (2 * INNER, K), down (N, INNER) and their biases."""
    gate_up = linear_inputs(LinearCase("gate_up", 1, 2 * INNER, K, kind=kind), torch.float32)[1]
    down = linear_inputs(LinearCase("down", 1, N, INNER, kind=second or kind), torch.float32)[1]
    biases = [torch.randn(n, generator=seeded(f"bias{n}")) for n in (2 * INNER, N)]
    return gate_up, down, *biases


def composed(
    x: Tensor,
    gate_up: QuantizedWeight,
    down: QuantizedWeight,
    b1: Tensor,
    b2: Tensor,
    residual: Tensor,
    activation: str,
) -> Tensor:
    gate, up = quantized_linear(x, gate_up, b1, activation=activation).chunk(2, dim=-1)
    return quantized_linear(silu_mul(gate, up), down, b2, activation=activation) + residual


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    "kinds",
    [("symmetric", "symmetric"), ("zero", "int8"), ("int6_min", "zero"), ("mxfp4", "e4m3"), ("nf4", "bf16"),
     ("bf16", "int6_min"), ("columns", "symmetric"), ("symmetric", "outliers")],
    ids="-".join,
)  # fmt: skip
def test_same_bits_as_its_parts(kinds: tuple[str, str], activation: str) -> None:
    gate_up, down, b1, b2 = parts(*kinds)
    for m in (1, 2, 9, 130):
        x = torch.randn(m, K, generator=seeded("x"))
        residual = torch.randn(m, N, generator=seeded("residual"))
        if m == 130:  # rows that are computed apart
            x[3, 5], x[100, 0] = torch.inf, torch.nan
        out = gated_mlp(x, gate_up, down, gate_up_bias=b1, down_bias=b2, residual=residual, activation=activation)
        assert_same_bits(out, composed(x, gate_up, down, b1, b2, residual, activation))


def test_without_biases_and_residual_in_any_shape() -> None:
    gate_up, down, _, _ = parts("symmetric")
    x = torch.randn(2, 3, 2 * K, generator=seeded("x"))[..., :K]
    gate, up = quantized_linear(x, gate_up).chunk(2, dim=-1)
    assert_same_bits(gated_mlp(x, gate_up, down), quantized_linear(silu_mul(gate, up), down))
    for act, approximate in (("gelu", "none"), ("gelu_tanh", "tanh")):
        expected = quantized_linear(gelu_mul(gate, up, approximate), down)
        assert_same_bits(gated_mlp(x, gate_up, down, act=act), expected)
    assert gated_mlp(x[:0], gate_up, down).shape == (0, 3, N)


def test_overflow_between_the_products() -> None:
    gate_up, down, b1, b2 = parts("zero")
    x, residual = torch.randn(5, K, generator=seeded("x")), torch.zeros(5, N)
    x[2] *= 1e30
    for activation in ACTIVATIONS:
        out = gated_mlp(x, gate_up, down, gate_up_bias=b1, down_bias=b2, residual=residual, activation=activation)
        assert_same_bits(out, composed(x, gate_up, down, b1, b2, residual, activation))
        assert not out[2].isfinite().all() and out[[0, 1, 3, 4]].isfinite().all()


def test_bits_do_not_depend_on_threads_or_the_batch(same_bits: Callable) -> None:
    gate_up = linear_inputs(LinearCase("gate_up", 1, 640, 480), torch.float32)[1]
    down = linear_inputs(LinearCase("down", 1, 480, 320), torch.float32)[1]
    x = torch.randn(141, 480, generator=seeded("x"))
    same_bits(lambda: (gated_mlp(x, gate_up, down, residual=x),))
    whole = gated_mlp(x, gate_up, down, residual=x)
    for m in (1, 7, 40):
        assert_same_bits(gated_mlp(x[:m], gate_up, down, residual=x[:m]), whole[:m])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_rounded_once(dtype: torch.dtype) -> None:
    gate_up, down, b1, b2 = parts("symmetric")
    x = torch.randn(9, K, generator=seeded("x")).to(dtype)
    residual = torch.randn(9, N, generator=seeded("residual")).to(dtype)
    options = {"gate_up_bias": b1, "down_bias": b2, "activation": "fp32"}
    out = gated_mlp(x, gate_up, down, residual=residual, **options)
    wide = gated_mlp(x.float(), gate_up, down, residual=residual.float(), **options)
    assert_same_bits(out, wide.to(dtype))
    linear = quantized_linear(x, gate_up, b1, residual=torch.ones(9, 2 * INNER, dtype=dtype), activation="fp32")
    assert_same_bits(linear, (quantized_linear(x.float(), gate_up, b1, activation="fp32") + 1).to(dtype))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", ["symmetric", "int6_min", "columns", "outliers"])
def test_residual_of_a_linear_layer(kind: str, activation: str) -> None:
    x, weight, bias = linear_inputs(LinearCase("residual", 41, N, K, kind=kind, bias=torch.float32), torch.float32)
    x[7, 3] = torch.inf
    wide = torch.randn(41, 2 * N, generator=seeded("residual"))
    residual = wide[:, :N]  # any strides of its rows
    plain = quantized_linear(x, weight, bias, activation=activation)
    assert_same_bits(quantized_linear(x, weight, bias, residual=residual, activation=activation), plain + residual)
    assert_same_bits(quantized_linear(x, weight, bias, residual=wide[:, 1::2], activation=activation),
                     plain + wide[:, 1::2])  # fmt: skip
    out = torch.empty(41, N)
    quantized_linear(x, weight, bias, residual=residual, activation=activation, out=out)
    assert_same_bits(out, plain + residual)


def test_gradients_take_the_ops_apart() -> None:
    gate_up, down, b1, b2 = parts("symmetric")
    x = torch.randn(5, K, generator=seeded("x"), requires_grad=True)
    residual = torch.randn(5, N, generator=seeded("residual"), requires_grad=True)
    out = gated_mlp(x, gate_up, down, gate_up_bias=b1, down_bias=b2, residual=residual)
    out.backward(torch.ones(5, N))
    with torch.no_grad():
        assert_same_bits(out.detach(), gated_mlp(x, gate_up, down, gate_up_bias=b1, down_bias=b2, residual=residual))
    assert torch.equal(residual.grad, torch.ones(5, N))
    leaf = x.detach().clone().requires_grad_()
    gate, up = (leaf @ gate_up.dequantize().t() + b1).chunk(2, dim=-1)
    (torch.nn.functional.silu(gate) * up @ down.dequantize().t()).sum().backward()
    torch.testing.assert_close(x.grad, leaf.grad, rtol=0.05, atol=0.02)  # x is rounded to 8 bits in one of them


def test_reference_takes_a_residual() -> None:
    x, weight, _ = linear_inputs(LinearCase("residual", 4, N, K), torch.float32)
    residual = torch.randn(4, N, generator=seeded("residual"))
    out = quantized_linear(x, weight, residual=residual, backend="reference")
    assert_same_bits(out, quantized_linear_reference(x, weight).float() + residual)


def test_refusals() -> None:
    gate_up, down, _, _ = parts("symmetric")
    x = torch.zeros(3, K)
    cases: list[tuple[type[Exception], str, Callable[[], object]]] = [
        (ValueError, "act must be one of", lambda: gated_mlp(x, gate_up, down, act="relu")),
        (TypeError, "down must be a QuantizedWeight", lambda: gated_mlp(x, gate_up, torch.zeros(N, INNER))),
        (ValueError, "two rows for each column", lambda: gated_mlp(x, down, gate_up)),
        (ValueError, "last dimension of x", lambda: gated_mlp(torch.zeros(3, K + 1), gate_up, down)),
        (ValueError, "residual", lambda: gated_mlp(x, gate_up, down, residual=torch.zeros(3, N + 1))),
        (ValueError, "residual", lambda: gated_mlp(x, gate_up, down, residual=torch.zeros(3, N).bfloat16())),
        (ValueError, "gate_up_bias", lambda: gated_mlp(x, gate_up, down, gate_up_bias=torch.zeros(3))),
        (ValueError, "activation", lambda: gated_mlp(x, gate_up, down, activation="int4")),
        (ValueError, "residual", lambda: quantized_linear(x, gate_up, residual=torch.zeros(3, N))),
        (ValueError, "residual", lambda: quantized_linear(x.requires_grad_(), gate_up, residual=torch.zeros(3, N))),
    ]
    for kind, message, call in cases:
        with pytest.raises(kind, match=message):
            call()
    shared = torch.zeros(3, 2 * INNER)
    with pytest.raises(ValueError, match="overlap"), torch.no_grad():
        quantized_linear(x, gate_up, residual=shared, out=shared)
    assert tilewright.last_impl("quantized_linear")
