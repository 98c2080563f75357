"""silu_mul and gelu_mul, and through them exp and the conversions of each ISA level."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from buffers import poisoned
from compare import assert_close, assert_same_bits
from torch import Tensor

import tilewright
from tilewright.ops.activation import gelu_mul_reference, silu_mul_reference


@dataclass(frozen=True)
class Op:
    name: str
    ours: Callable[[Tensor, Tensor], Tensor]
    reference: Callable[[Tensor, Tensor], Tensor]
    act: Callable[[Tensor], Tensor]

    def naive(self, gate: Tensor, up: Tensor) -> Tensor:
        return self.act(gate) * up


OPS = [
    Op("silu_mul", tilewright.silu_mul, silu_mul_reference, torch.nn.functional.silu),
    Op("gelu_mul", tilewright.gelu_mul, gelu_mul_reference, torch.nn.functional.gelu),
    Op(
        "gelu_mul",
        lambda gate, up: tilewright.gelu_mul(gate, up, approximate="tanh"),
        lambda gate, up: gelu_mul_reference(gate, up, "tanh"),
        lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    ),
]
SHAPES = [(1, 1536), (3, 1), (2, 3, 33), (4097,), (), *((2, n) for n in (7, 8, 9, 15, 16, 17, 31, 32, 65))]


@pytest.fixture(params=OPS, ids=["silu", "gelu", "gelu_tanh"])
def op(request: pytest.FixtureRequest) -> Op:
    return request.param


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_rule(op: Op, shape: tuple[int, ...], dtype: torch.dtype, kernel_impl: str) -> None:
    gate, up = (torch.randn(2, *shape) * 3).to(dtype)
    out = op.ours(gate, up)
    assert_close(out, op.reference(gate, up), op.naive(gate, up), dtype)
    assert tilewright.last_impl(op.name) == kernel_impl and out.is_contiguous()
    if shape:
        assert_same_bits(op.ours(poisoned(gate), poisoned(up)), out)


def test_halves_of_one_tensor_and_other_strides(op: Op, dtype: torch.dtype) -> None:
    fused = torch.randn(5, 7, 2 * 45).to(dtype)
    gate, up = fused.chunk(2, -1)
    want = op.ours(gate.contiguous(), up.contiguous())
    assert_same_bits(op.ours(gate, up), want)
    assert_same_bits(op.ours(gate.transpose(0, 1), up.transpose(0, 1)), want.transpose(0, 1).contiguous())
    assert_same_bits(op.ours(gate[:1, :1].expand(5, 7, 45), up)[0, 0], want[0, 0])
    assert_same_bits(op.ours(gate[..., ::3], up[..., ::3]), want[..., ::3].contiguous())


def test_relative_precision_over_the_whole_range() -> None:
    x = torch.cat((torch.linspace(-13, 20, 30011), torch.randn(5000) * 1e-3, torch.logspace(-38, 30, 2000)))
    one, wide = torch.ones_like(x), x.double()
    tanh_form = wide * torch.sigmoid(2 * 0.7978845608028654 * (wide + 0.044715 * wide**3))  # keeps the lower tail
    references = silu_mul_reference(x, one), gelu_mul_reference(x, one), tanh_form
    # The exponents of the lower tails, -x, -x^2 / 2 and the cubic, are rounded to float32 before exp.
    for op, ref, exponent in zip(OPS, references, (wide, wide**2 / 2, tanh_form / wide), strict=True):
        exponent = exponent.abs() if op is not OPS[2] else -exponent.log()
        bound = torch.where(x < 0, 4e-7 + 2.5e-7 * exponent, 4e-7)
        error = (op.ours(x, one) - ref).abs() / ref.abs()
        worse = (error > bound) & (ref.abs() > 1e-36) & (ref.abs() < 3e38)
        assert not worse.any(), f"{op.name}: {error[worse][:3]} at {x[worse][:3]}, allowed {bound[worse][:3]}"


def test_special_values(op: Op, dtype: torch.dtype) -> None:
    inf, nan = float("inf"), float("nan")
    for n in (1, 9, 40):  # tails and whole vectors
        for value in (
            nan,
            inf,
            -inf,
            0.0,
            -0.0,
            100.0,
            -100.0,
            1e4,
            -1e4,
            torch.finfo(dtype).max,
            torch.finfo(dtype).min,
        ):
            gate, up = torch.full((n,), value).to(dtype), torch.ones(n, dtype=dtype)
            out, ref = op.ours(gate, up), op.reference(gate, up)
            assert torch.equal(out.isnan(), ref.isnan()), value
            torch.testing.assert_close(out.double(), ref.to(dtype).double(), atol=1e-6, rtol=1e-2, equal_nan=True)
    gate = torch.tensor([0.0, 1.0, 2.0, 3.0]).to(dtype)
    out = op.ours(gate, torch.tensor([inf, nan, -inf, 5.0]).to(dtype))
    assert out[:2].isnan().all() and out[2] == -inf and out[3].isfinite()


def test_every_16_bit_value_is_read_as_torch_reads_it() -> None:
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        x = bits.view(dtype)
        out = tilewright.silu_mul(torch.full_like(x, 30), x)  # silu(30) = 30 in every dtype
        want = (30 * x.float()).to(dtype)
        assert torch.equal(out.isnan(), want.isnan())
        assert torch.equal(out[~out.isnan()], want[~want.isnan()])


@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0)])
def test_empty(op: Op, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    out = op.ours(torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype))
    assert out.shape == shape and out.dtype == dtype


def test_bits_do_not_depend_on_threads(op: Op, same_bits, dtype: torch.dtype) -> None:
    for shape in ((1, 1536), (67, 1001), (100_003,)):
        gate, up = torch.randn(2, *shape).to(dtype)
        same_bits(lambda gate=gate, up=up: (op.ours(gate, up),))
    fused = torch.randn(300, 200).to(dtype)
    same_bits(lambda: (op.ours(*fused.chunk(2, -1)),))


REJECTED: list[tuple[type[Exception], str, Callable[[], object]]] = [
    (ValueError, "silu_mul: gate and up must have one shape and dtype, got (2, 3) float32 and (3,) float32",
     lambda: tilewright.silu_mul(torch.ones(2, 3), torch.ones(3))),
    (ValueError, "gelu_mul: gate and up must have one shape and dtype",
     lambda: tilewright.gelu_mul(torch.ones(3), torch.ones(3).half())),
    (ValueError, "silu_mul: gate must be float32, bfloat16 or float16, got int64",
     lambda: tilewright.silu_mul(torch.ones(3).long(), torch.ones(3).long())),
    (ValueError, 'gelu_mul: approximate must be "none" or "tanh", got \'erf\'',
     lambda: tilewright.gelu_mul(torch.ones(3), torch.ones(3), "erf")),
    (ValueError, "gelu_mul: all tensors must be on one device, got gate on cpu, up on meta",
     lambda: tilewright.gelu_mul(torch.ones(3), torch.ones(3, device="meta"))),
    (ValueError, "activation must be silu, gelu or gelu_tanh",
     lambda: torch.ops.tilewright.act_mul(torch.ones(3), torch.ones(3), "relu", "auto")),
]  # fmt: skip


@pytest.mark.parametrize("kind,message,call", REJECTED, ids=[m for _, m, _ in REJECTED])
def test_rejected(kind: type[Exception], message: str, call: Callable[[], object]) -> None:
    with pytest.raises(kind) as error:
        call()
    assert message in str(error.value)


def test_gradients(op: Op, dtype: torch.dtype) -> None:
    gate, up = torch.randn(2, 5, 7, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(op.ours, (gate, up))
    assert torch.autograd.gradgradcheck(op.ours, (gate, up))
    grad = torch.randn(5, 7).to(dtype)
    leaves = [t.detach().to(dtype).requires_grad_() for t in (gate, up)]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    ours = torch.autograd.grad(op.ours(*leaves), leaves, grad)
    plain = torch.autograd.grad(op.naive(*leaves), leaves, grad)
    ref = torch.autograd.grad(op.reference(*wide), wide, grad.double())
    for a, r, n in zip(ours, ref, plain, strict=True):
        assert_close(a, r, n, dtype)


def test_registration() -> None:
    op = torch.ops.tilewright.act_mul
    torch.library.opcheck(op, (torch.randn(3, 4, requires_grad=True), torch.randn(3, 4), "gelu", "auto"))
    for x in (torch.randn(4, 3).t(), torch.randn(2, 3, 4).transpose(0, 1), torch.randn(3, 8)[:, ::2]):
        for dtype in (torch.float32, torch.float64):
            torch.library.opcheck(op, (x.to(dtype), x.to(dtype), "silu", "auto"), test_utils="test_faketensor")


def test_compiles_whole(op: Op) -> None:
    def f(x: Tensor) -> Tensor:
        return op.ours(*(x * 2).chunk(2, -1)) + 1

    x = torch.randn(4, 64, requires_grad=True)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), f(x))
    grads = [torch.autograd.grad(g(x).square().sum(), x)[0] for g in (compiled, f)]
    torch.testing.assert_close(*grads)
