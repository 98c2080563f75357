"""rms_norm and layer_norm."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
from buffers import poisoned
from compare import assert_close
from torch import Tensor

import tilewright
from tilewright.ops.norm import layer_norm_reference, norm_reference, rms_norm_reference


@dataclass(frozen=True)
class Case:
    shape: tuple[int, ...]
    residual: bool = False
    weight: bool = True
    float_weight: bool = False  # a float32 weight beside a 16-bit x


CASES = [
    Case((1, 576)),
    Case((2, 7, 576), residual=True),
    Case((3, 1), residual=True),
    Case((5, 2)),
    Case((1, 4096), weight=False),
    Case((4, 3, 2, 5, 33), residual=True),
    Case((64, 2048), float_weight=True),
    Case((37,)),
    *(Case((3, n)) for n in (7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 129)),
]


def tensors(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """x, residual, weight, bias."""
    x = torch.randn(case.shape).to(dtype)
    residual = torch.randn(case.shape).to(dtype) if case.residual else None
    if not case.weight:
        return x, residual, None, None
    weight, bias = torch.randn(2, case.shape[-1]) + 1
    if not case.float_weight:
        weight, bias = weight.to(dtype), bias.to(dtype)
    return x, residual, weight, bias


def naive(x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, centred: bool) -> Tensor:
    """The formula step by step in x's dtype."""
    total = x if residual is None else x + residual
    if centred:
        total = total - total.mean(-1, keepdim=True)
    out = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + 1e-5)
    out = out if weight is None else out * weight.to(x.dtype)
    return out if bias is None else out + bias.to(x.dtype)


def run(x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, centred: bool) -> Tensor:
    if centred:
        out = tilewright.layer_norm(x, weight, bias, 1e-5, residual=residual)
    else:
        out = tilewright.rms_norm(x, weight, 1e-5, residual=residual)
    if residual is None:
        return out
    assert torch.equal(out[1], x + residual)
    return out[0]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("centred", [False, True], ids=["rms", "layer"])
def test_error_rule(case: Case, centred: bool, dtype: torch.dtype, kernel_impl: str) -> None:
    x, residual, weight, bias = tensors(case, dtype)
    bias = bias if centred else None
    ref, _ = norm_reference(x, residual, weight, bias, 1e-5, centred)
    out = run(x, residual, weight, bias, centred)
    assert_close(out, ref, naive(x, residual, weight, bias, centred), dtype)
    assert tilewright.last_impl("layer_norm" if centred else "rms_norm") == kernel_impl
    # Padding of NaN around every row and vector changes nothing.
    padded = [None if t is None else poisoned(t) for t in (x, residual, weight, bias)]
    assert torch.equal(run(*padded, centred), out)


def test_agrees_with_torch(dtype: torch.dtype) -> None:
    x, weight, bias = torch.randn(6, 200).to(dtype), torch.randn(200).to(dtype), torch.randn(200).to(dtype)
    tolerance = {"atol": 2e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.05, "rtol": 0.01}
    expected = torch.nn.functional.layer_norm(x, (200,), weight, bias, 1e-6)
    torch.testing.assert_close(tilewright.layer_norm(x, weight, bias, 1e-6), expected, **tolerance)
    expected = torch.nn.functional.rms_norm(x, (200,), weight, 1e-6)
    torch.testing.assert_close(tilewright.rms_norm(x, weight, 1e-6), expected, **tolerance)


def test_strides_are_read_in_place(dtype: torch.dtype) -> None:
    base = torch.randn(4, 6, 3, 40).to(dtype)
    weight = torch.randn(40).to(dtype)
    for x in (base.transpose(0, 2), base[::2, 1:5], base[:, :, 1], base[:1].expand(4, 6, 3, 40), base[..., 3:29]):
        w = weight[: x.shape[-1]]
        assert torch.equal(tilewright.rms_norm(x, w, 1e-5), tilewright.rms_norm(x.contiguous(), w, 1e-5))
    x = base.transpose(2, 3)  # the last dimension is strided: copied once, in Python
    w = torch.randn(3).to(dtype)
    assert torch.equal(tilewright.rms_norm(x, w, 1e-5), tilewright.rms_norm(x.contiguous(), w, 1e-5))


def test_one_large_element_anywhere(dtype: torch.dtype) -> None:
    for n, at in itertools.product((16, 65, 130), (0, 7, 15, 16, 63, 64, -1)):
        x = torch.randn(1, n).to(dtype)
        x[0, at % n if at > 0 else at] = 100
        ref = rms_norm_reference(x, None, 1e-5)
        assert_close(tilewright.rms_norm(x, None, 1e-5), ref, naive(x, None, None, None, False), dtype)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("centred", [False, True], ids=["rms", "layer"])
def test_nan_and_inf_stay_in_their_row(value: float, centred: bool, dtype: torch.dtype) -> None:
    for n, at in ((33, 32), (64, 3), (5, 4)):
        x = torch.randn(3, n).to(dtype)
        clean = run(x, None, None, None, centred)
        x[1, at] = value
        out, (ref, _) = run(x, None, None, None, centred), norm_reference(x, None, None, None, 1e-5, centred)
        assert torch.equal(out[[0, 2]], clean[[0, 2]])
        assert torch.equal(out.isnan(), ref.isnan()) and torch.equal(out.isinf(), ref.isinf())


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0,), (2, 0, 5)])
def test_empty(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = torch.empty(shape, dtype=dtype), torch.ones(shape[-1], dtype=dtype)
    out, total = tilewright.layer_norm(x, weight, weight, 1e-5, residual=x)
    assert out.shape == total.shape == shape and out.dtype == dtype


def test_bits_do_not_depend_on_threads(same_bits, dtype: torch.dtype) -> None:
    for shape in ((1, 576), (301, 577), (8, 8192)):
        x, residual, weight, bias = tensors(Case(shape, residual=True), dtype)
        same_bits(lambda x=x, r=residual, w=weight, b=bias: tilewright.layer_norm(x, w, b, 1e-5, residual=r))


def test_bits_do_not_depend_on_the_batch(dtype: torch.dtype) -> None:
    x, weight = torch.randn(40, 333).to(dtype), torch.randn(333).to(dtype)
    whole = tilewright.rms_norm(x, weight, 1e-5)
    assert torch.equal(torch.stack([tilewright.rms_norm(row, weight, 1e-5) for row in x]), whole)


REJECTED = [
    ("weight and bias must be contiguous with shape (8,)", lambda x: tilewright.rms_norm(x, torch.ones(7), 1e-5)),
    ("weight and bias must be contiguous", lambda x: tilewright.rms_norm(x, torch.ones(16)[::2], 1e-5)),
    ("weight and bias must be float32", lambda x: tilewright.rms_norm(x, torch.ones(8, dtype=torch.float16), 1e-5)),
    ("residual and outputs must have x's shape", lambda x: tilewright.rms_norm(x, None, 1e-5, residual=x[:1])),
    ("residual and outputs must have x's shape", lambda x: tilewright.rms_norm(x, None, 1e-5, residual=x.bfloat16())),
    ("x must be float32, bfloat16 or float16, got int64", lambda x: tilewright.rms_norm(x.long(), None, 1e-5)),
]


@pytest.mark.parametrize("message,call", REJECTED, ids=[m for m, _ in REJECTED])
def test_rejected(message: str, call) -> None:
    with pytest.raises(ValueError) as error:
        call(torch.randn(2, 8))
    assert "rms_norm: " in str(error.value) and message in str(error.value)


@pytest.mark.parametrize("centred", [False, True], ids=["rms", "layer"])
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
def test_gradients(centred: bool, residual: bool) -> None:
    x, r = torch.randn(2, 2, 3, 9, dtype=torch.float64).requires_grad_()
    weight, bias = torch.randn(2, 9, dtype=torch.float64).requires_grad_()

    def f(x: Tensor, r: Tensor, weight: Tensor, bias: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        if centred:
            return tilewright.layer_norm(x, weight, bias, 1e-3, residual=r if residual else None)
        return tilewright.rms_norm(x, weight + 0 * bias, 1e-3, residual=r if residual else None)

    assert torch.autograd.gradcheck(f, (x, r, weight, bias))


def test_backward_error_rule(dtype: torch.dtype) -> None:
    x, weight, bias, up = (torch.randn(n, 65).to(dtype) for n in (9, 1, 1, 9))
    weight, bias = weight[0], bias[0]

    def gradients(f, dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [t.to(dtype).detach().requires_grad_() for t in (x, weight, bias)]
        return torch.autograd.grad(f(*leaves), leaves, up.to(dtype))

    ref = gradients(lambda x, w, b: layer_norm_reference(x, w, b, 1e-5), torch.float64)
    plain = gradients(lambda x, w, b: naive(x, None, w, b, True), dtype)
    ours = gradients(lambda x, w, b: tilewright.layer_norm(x, w, b, 1e-5), dtype)
    for a, r, n in zip(ours, ref, plain, strict=True):
        assert_close(a, r, n, dtype)


def test_registration() -> None:
    op, weight = torch.ops.tilewright.norm, torch.randn(6, requires_grad=True)
    torch.library.opcheck(op, (torch.randn(4, 6, requires_grad=True), None, weight, None, 1e-5, False, "auto"))
    for x in (torch.randn(6, 4).t(), torch.randn(2, 6, 3).transpose(1, 2), torch.randn(9, 2, 6)[::2].transpose(0, 1)):
        for dtype in (torch.float32, torch.float64):
            y, w = x.to(dtype), weight.detach().to(dtype)
            torch.library.opcheck(op, (y, y + 1, w, w, 1e-5, True, "auto"), test_utils="test_faketensor")


def test_compiles_whole() -> None:
    def f(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
        out, total = tilewright.rms_norm(x * 2, weight, 1e-5, residual=residual)
        return tilewright.layer_norm((out + total).t(), None, None, 1e-5)

    args = torch.randn(4, 32, requires_grad=True), torch.randn(32), torch.randn(4, 32)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*args), f(*args))
    grads = [torch.autograd.grad(g(*args).square().sum(), args[0])[0] for g in (compiled, f)]
    torch.testing.assert_close(*grads)
