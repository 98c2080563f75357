"""Which calls may skip torch's dispatcher, and that all others still come out right.

What DLPack would hand to a kernel without a word: a lazily negated tensor as if it were not, a FakeTensor with a null
pointer, uint4 as uint8. None of these may take the direct path.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from cases import assert_ran_natively
from compare import assert_same_bits
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tilewright import _C, attention, quantize_weight, quantized_linear
from tilewright.ops.registry import direct

WEIGHT = quantize_weight(torch.randn(40, 64, generator=torch.Generator().manual_seed(1)))


class Subclass(Tensor):
    """Without a __torch_function__ of its own: results stay of this class."""


class Functions(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


class Dispatches(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.fixture
def q() -> Tensor:
    return torch.randn(1, 2, 5, 8)


def test_plain_tensors_and_parameters(q: Tensor) -> None:
    assert direct(q) and direct(q, None, q) and direct() and direct(q.bfloat16(), q.bool())
    parameter = nn.Parameter(q.clone())
    assert not direct(parameter) and not direct(q, None, parameter)
    with torch.no_grad():
        assert direct(parameter, q.clone().requires_grad_())
    with torch.inference_mode():
        assert direct(parameter)
        assert_same_bits(attention(parameter, q, q), attention(q, q, q))
    assert direct(nn.Parameter(q.clone(), requires_grad=False))
    assert direct(q.transpose(1, 2), q[:, :, ::2], q[:0], q.expand(3, -1, -1, -1), torch.tensor(1.0))
    assert direct(q.detach().requires_grad_().detach())


def test_other_objects(q: Tensor) -> None:
    with FakeTensorMode():
        fake = torch.empty(2, 3)
    for other in (
        q.as_subclass(Subclass), fake, q.to("meta"), torch.empty(2, dtype=torch.complex64).conj().imag,
        q.numpy(), [1.0], 1.0, "q",
    ):  # fmt: skip
        assert not direct(q, other), type(other)


def test_lazily_negated(q: Tensor) -> None:
    z = torch.complex(q, q.flip(-1))
    negated = z.conj().imag  # shares memory with z and carries the negative bit
    assert negated.is_neg() and not direct(negated)
    plain = -q.flip(-1)
    assert_same_bits(attention(negated, q, q), attention(plain, q, q))
    assert_same_bits(attention(q, q, negated), attention(q, q, plain))
    x = torch.complex(torch.randn(3, 64), torch.randn(3, 64)).conj().imag
    assert_same_bits(quantized_linear(x, WEIGHT), quantized_linear(x.resolve_neg().clone(), WEIGHT))


def test_subclass(q: Tensor) -> None:
    special = q.as_subclass(Subclass)
    out = attention(special, q, q)
    assert type(out) is Subclass
    assert_same_bits(out.as_subclass(Tensor), attention(q, q, q))
    assert type(quantized_linear(torch.ones(3, 64).as_subclass(Subclass), WEIGHT)) is Subclass


def test_fake_and_meta(q: Tensor) -> None:
    mode = FakeTensorMode()
    fake, fake_x = mode.from_tensor(q), mode.from_tensor(torch.ones(3, 64))
    weight = replace(WEIGHT, packed=mode.from_tensor(WEIGHT.packed))
    for inside in (False, True):
        if inside:
            mode.__enter__()
        out, lse = attention(fake, fake, fake, return_lse=True)
        y = quantized_linear(fake_x, weight)
        if inside:
            mode.__exit__(None, None, None)
        assert type(out) is type(lse) is type(y) is FakeTensor
        assert out.shape == q.shape and lse.shape == q.shape[:3] and y.shape == (3, 40)
    meta = q.to("meta")
    assert attention(meta, meta, meta).is_meta
    arguments = (None,) * 11 + (1.0, 0.0, 0, -1, -1, 0.0)
    with pytest.raises(ValueError, match="has no memory behind it"):
        _C.attention(fake, fake, fake, *arguments, fake, None)
    with pytest.raises((ValueError, RuntimeError), match="meta"):
        _C.attention(meta, meta, meta, *arguments, meta, None)


LAYOUTS = {
    "sparse": Tensor.to_sparse,
    "csr": Tensor.to_sparse_csr,
    "mkldnn": Tensor.to_mkldnn,
    "nested": lambda t: torch.nested.nested_tensor([t, t]),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("dlpack", [True, False])
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_without_strides(name: str, dlpack: bool, q: Tensor) -> None:
    """They have no memory that a kernel could read: an error, whichever way tensors are read."""
    matrix = LAYOUTS[name](torch.ones(3, 64))
    _C.use_dlpack(dlpack)
    try:
        with pytest.raises((ValueError, RuntimeError, NotImplementedError)):
            quantized_linear(matrix, WEIGHT)
        with pytest.raises((ValueError, RuntimeError, NotImplementedError)):
            quantized_linear(torch.ones(3, 64), WEIGHT, matrix)
        with pytest.raises((ValueError, RuntimeError, NotImplementedError)):
            _C.weight_rows(torch.tensor([0]), WEIGHT.packed, *WEIGHT.spec(), matrix)
        if name != "csr":
            other = LAYOUTS[name](q)
            with pytest.raises((ValueError, RuntimeError, NotImplementedError)):
                attention(other, q, q)
            with pytest.raises((ValueError, RuntimeError, NotImplementedError)):
                attention(q, q, q, mask=other)
    finally:
        _C.use_dlpack(True)


def test_four_bit_integers_are_not_bytes() -> None:
    """torch.uint4 leaves torch as DLPack's uint8; a packed weight of that dtype is a mistake somewhere."""
    weight = replace(WEIGHT, packed=WEIGHT.packed.view(torch.uint4))
    with pytest.raises((ValueError, TypeError), match="uint8"):
        quantized_linear(torch.ones(3, 64), weight)


def test_modes(q: Tensor) -> None:
    x = torch.ones(3, 64)
    plain = attention(q, q, q), quantized_linear(x, WEIGHT)
    with Functions() as functions:
        assert not direct(q)
        out = attention(q, q, q), quantized_linear(x, WEIGHT)
    with Dispatches() as dispatches:
        assert not direct(q)
        again = attention(q, q, q), quantized_linear(x, WEIGHT)
    for name in ("attention", "quantized_linear"):
        assert any(f"tilewright.{name}" in seen for seen in functions.seen)
        assert f"tilewright.{name}.default" in dispatches.seen
    for a, b, c in zip(plain, out, again, strict=True):
        assert_same_bits(a, b)
        assert_same_bits(a, c)
    assert direct(q)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_functorch(q: Tensor) -> None:
    batch = torch.randn(3, 2, 5, 8)
    found: list[bool] = []

    def one(t: Tensor) -> Tensor:
        found.append(direct(t) or direct(q))
        return attention(t[None], q, q)[0]

    out = torch.vmap(one)(batch)
    torch.testing.assert_close(out, attention(batch, q.expand(3, -1, -1, -1), q.expand(3, -1, -1, -1)))
    x = torch.randn(4, 3, 64)
    assert_same_bits(torch.vmap(lambda t: quantized_linear(t, WEIGHT))(x), quantized_linear(x, WEIGHT))

    def loss(t: Tensor) -> Tensor:
        found.append(direct(t) or direct(q))
        return attention(t, q, q).square().sum()

    try:
        ours = torch.func.grad(loss)(q)
    except (RuntimeError, NotImplementedError):
        pass  # torch's register_autograd does not support it; silence would be wrong
    else:
        leaf = q.clone().requires_grad_()
        torch.testing.assert_close(ours, torch.autograd.grad(loss(leaf), leaf)[0])
    assert not any(found)


@pytest.mark.parametrize("how", ["jvp", "dual"])
def test_forward_mode_is_not_dropped(how: str, q: Tensor) -> None:
    """There is no forward-mode derivative: a zero tangent, or none, would be a wrong one."""
    x, tangent = torch.randn(3, 64), torch.randn(3, 64)
    with pytest.raises((RuntimeError, NotImplementedError)):
        if how == "jvp":
            torch.func.jvp(lambda t: quantized_linear(t, WEIGHT, activation="fp32"), (x,), (tangent,))
        else:
            with forward_ad.dual_level():
                quantized_linear(forward_ad.make_dual(x, tangent), WEIGHT, activation="fp32")


def test_compiling(q: Tensor) -> None:
    found = []

    @torch.compile(backend="eager", fullgraph=True)
    def function(t: Tensor) -> Tensor:
        found.append(direct(t))
        return attention(t, t, t)

    assert_same_bits(function(q), attention(q, q, q))
    assert found == [False]
    assert direct(q)


def test_gradients_take_the_dispatcher(q: Tensor) -> None:
    leaf = q.clone().requires_grad_()
    out = attention(q, q, leaf)
    assert out.requires_grad
    assert_same_bits(out.detach(), attention(q, q, q))
    with torch.no_grad():
        assert not attention(q, q, leaf).requires_grad
    bias = torch.randn(40, requires_grad=True)
    assert quantized_linear(torch.ones(3, 64), WEIGHT, bias).requires_grad
    sinks = torch.randn(2, requires_grad=True)
    assert attention(q, q, q, sinks=sinks).requires_grad
    assert attention(q, q, q, bias=torch.zeros(5, 5, requires_grad=True)).requires_grad


@pytest.fixture
def attribute_path() -> Iterator[None]:
    """Tensors read attribute by attribute, as on a torch without DLPack's C exchange API."""
    assert _C.uses_dlpack()
    _C.use_dlpack(False)
    yield
    _C.use_dlpack(True)
    assert _C.uses_dlpack()


def results(q: Tensor) -> list[Tensor]:
    """Ops over tensors of many layouts and dtypes."""
    x = torch.randn(2, 1, 3, 70, 64, generator=torch.Generator().manual_seed(3))
    wide = torch.cat([q, q], -1)
    out = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        t = wide.to(dtype)[..., 1:9]
        mask = torch.ones(5, 1, dtype=torch.bool).expand(5, 5)
        out += attention(t, t.transpose(1, 2).contiguous().transpose(1, 2), t[:, :1].expand_as(t), mask=mask,
                         alibi_slopes=torch.tensor([0.1, 0.2]), return_lse=True)  # fmt: skip
        out += [quantized_linear(x.transpose(1, 3).to(dtype), WEIGHT, torch.ones(40, dtype=dtype))]
    out += [attention(q[:0], q[:0], q[:0]), quantized_linear(x[:0], WEIGHT), WEIGHT.rows(torch.tensor([[39, 0]]))]
    out += [attention(q.double(), q.double(), q.double())]
    return out


def test_attribute_path_gives_the_same(q: Tensor, attribute_path: None) -> None:
    slow = results(q)
    assert_ran_natively("quantized_linear")
    _C.use_dlpack(True)
    for a, b in zip(slow, results(q), strict=True):
        assert_same_bits(a, b)


def test_attribute_path_rejects_the_same(q: Tensor, attribute_path: None) -> None:
    with pytest.raises(ValueError, match="6 dimensions"):
        quantized_linear(torch.ones(1, 1, 1, 1, 1, 1, 64), WEIGHT)
    with pytest.raises(ValueError, match="x must be float32"):
        quantized_linear(torch.ones(3, 64).double(), WEIGHT)
    with pytest.raises(ValueError, match="uint8"):
        quantized_linear(torch.ones(3, 64), replace(WEIGHT, packed=WEIGHT.packed.view(torch.uint4)))
    meta = q.to("meta")
    with pytest.raises((ValueError, RuntimeError), match="no memory"):
        _C.attention(meta, meta, meta, *(None,) * 11, 1.0, 0.0, 0, -1, -1, 0.0, meta, None)


def test_bindings_want_tensors(q: Tensor) -> None:
    for bad in (q.numpy(), [1.0], 3, "x"):
        with pytest.raises(TypeError, match="incompatible function arguments"):
            _C.weight_rows(bad, WEIGHT.packed, *WEIGHT.spec(), torch.empty(1, 64))
