"""patch_sdpa(): torch's SDPA and the nn modules above it run on Tilewright inside, and exactly on torch outside."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import tilewright
from tilewright import patch_sdpa
from tilewright.integrations import sdpa

TORCH_SDPA = F.scaled_dot_product_attention


@pytest.fixture(autouse=True)
def torch_is_untouched() -> Iterator[None]:
    """Every test starts and ends with torch's own function and its fast path on."""
    torch.manual_seed(0)
    assert F.scaled_dot_product_attention is TORCH_SDPA
    yield
    assert F.scaled_dot_product_attention is TORCH_SDPA
    assert torch.backends.mha.get_fastpath_enabled()
    assert sdpa._depth == 0


def forget_last_impl() -> None:
    x = torch.zeros(1, 1, 1, 4)
    tilewright.attention(x, x, x, backend="reference")


def ours_ran() -> bool:
    """Whether a kernel of ours served a call since `forget_last_impl`."""
    return tilewright.last_impl("attention") != "reference"


def torch_math(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return TORCH_SDPA(q, k, v, **options)


def check(out: Tensor, exact: Tensor, naive: Tensor) -> None:
    """The project's error rule: at most twice the error of the same maths in the same dtype."""
    assert out.shape == exact.shape
    assert out.dtype == naive.dtype
    error, allowed = ((t.double() - exact).abs() for t in (out, naive))
    largest = float(exact.abs().max()) if exact.numel() else 0.0
    floor = 2e-6 * largest if out.dtype == torch.float32 else 1e-5 * max(1.0, largest)
    if exact.numel():
        assert not out.isnan().any()
        assert float(error.max()) <= 2 * float(allowed.max()) + floor


@dataclass(frozen=True)
class Case:
    """q (*lead, seq_q, d), k (*lead_k, seq_k, d), v (*lead_k, seq_k, d_v)."""

    q: tuple[int, ...]
    k: tuple[int, ...]
    v: tuple[int, ...]
    mask: tuple[int, ...] | None = None
    bool_mask: bool = False
    options: dict[str, Any] = field(default_factory=dict)


CASES = {
    "2-D": Case((7, 16), (9, 16), (9, 16)),
    "2-D, mask": Case((7, 16), (9, 16), (9, 16), (7, 9)),
    "3-D": Case((3, 7, 16), (3, 9, 16), (3, 9, 16)),
    "3-D, mask a head": Case((3, 7, 16), (3, 9, 16), (3, 9, 16), (3, 7, 9)),
    "4-D": Case((2, 3, 7, 16), (2, 3, 9, 16), (2, 3, 9, 16)),
    "4-D, other v dim": Case((2, 3, 7, 16), (2, 3, 9, 16), (2, 3, 9, 24)),
    "5-D": Case((2, 2, 3, 7, 16), (2, 2, 3, 9, 16), (2, 2, 3, 9, 16)),
    "5-D, mask broadcast in front": Case((2, 2, 3, 7, 16), (2, 2, 3, 9, 16), (2, 2, 3, 9, 16), (2, 1, 1, 7, 9)),
    "5-D, 5-D mask": Case((2, 2, 3, 7, 16), (2, 2, 3, 9, 16), (2, 2, 3, 9, 16), (1, 2, 1, 1, 9)),
    "boolean (q, k)": Case((2, 3, 7, 16), (2, 3, 9, 16), (2, 3, 9, 16), (7, 9), True),
    "boolean padding": Case((2, 3, 7, 16), (2, 3, 9, 16), (2, 3, 9, 16), (2, 1, 1, 9), True),
    "boolean a head": Case((2, 3, 7, 16), (2, 3, 9, 16), (2, 3, 9, 16), (1, 3, 7, 1), True),
    "float (q, k)": Case((2, 3, 7, 16), (2, 3, 9, 16), (2, 3, 9, 16), (7, 9)),
    "float a head": Case((2, 3, 7, 16), (2, 3, 9, 16), (2, 3, 9, 16), (3, 1, 9)),
    "causal": Case((2, 3, 9, 16), (2, 3, 9, 16), (2, 3, 9, 16), options={"is_causal": True}),
    "causal, fewer queries": Case((2, 3, 4, 16), (2, 3, 9, 16), (2, 3, 9, 16), options={"is_causal": True}),
    "causal, more queries": Case((2, 3, 9, 16), (2, 3, 4, 16), (2, 3, 4, 16), options={"is_causal": True}),
    "causal 3-D": Case((3, 9, 16), (3, 9, 16), (3, 9, 16), options={"is_causal": True}),
    "scale": Case((2, 3, 7, 16), (2, 3, 9, 16), (2, 3, 9, 16), options={"scale": 0.7}),
    "enable_gqa": Case((2, 6, 7, 16), (2, 2, 9, 16), (2, 2, 9, 16), options={"enable_gqa": True}),
    "enable_gqa 3-D": Case((6, 7, 16), (2, 9, 16), (2, 9, 16), options={"enable_gqa": True, "is_causal": True}),
    "batch of q broadcast": Case((1, 3, 7, 16), (2, 3, 9, 16), (2, 3, 9, 16)),
    "heads of k broadcast": Case((2, 3, 7, 16), (2, 1, 9, 16), (2, 1, 9, 16)),
    "3-D q, 4-D k": Case((3, 7, 16), (2, 3, 9, 16), (2, 3, 9, 16), (7, 9), True),
    "empty batch": Case((0, 3, 7, 16), (0, 3, 9, 16), (0, 3, 9, 16)),
    "no queries": Case((2, 3, 0, 16), (2, 3, 9, 16), (2, 3, 9, 16)),
    "no keys": Case((2, 3, 7, 16), (2, 3, 0, 16), (2, 3, 0, 16)),
    "one key": Case((2, 3, 7, 16), (2, 3, 1, 16), (2, 3, 1, 16)),
}


def inputs(case: Case, dtype: torch.dtype) -> tuple[list[Tensor], dict[str, Any]]:
    tensors = [torch.randn(shape, dtype=torch.float32).to(dtype) for shape in (case.q, case.k, case.v)]
    options = dict(case.options)
    if case.mask is not None:
        mask = torch.randn(case.mask)
        options["attn_mask"] = mask > -0.5 if case.bool_mask else mask.to(dtype)
    return tensors, options


def double(options: dict[str, Any]) -> dict[str, Any]:
    mask = options.get("attn_mask")
    return options | ({"attn_mask": mask.double()} if mask is not None and mask.dtype != torch.bool else {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_values(name: str, dtype: torch.dtype) -> None:
    tensors, options = inputs(CASES[name], dtype)
    exact = torch_math(*(t.double() for t in tensors), **double(options))
    naive = torch_math(*tensors, **options)
    forget_last_impl()
    with patch_sdpa():
        out = F.scaled_dot_product_attention(*tensors, **options)
    check(out, exact, naive)
    assert ours_ran() or out.numel() == 0


@pytest.mark.parametrize("name", ["boolean padding", "float a head", "causal", "enable_gqa", "5-D", "3-D, mask a head"])
def test_gradients(name: str) -> None:
    tensors, options = inputs(CASES[name], torch.float32)
    float_mask = options.get("attn_mask") is not None and options["attn_mask"].dtype != torch.bool
    if float_mask:
        tensors.append(options.pop("attn_mask"))

    def gradients(function: Callable[..., Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [t.to(dtype).requires_grad_() for t in tensors]
        out = function(*leaves[:3], **(options | ({"attn_mask": leaves[3]} if float_mask else {})))
        weight = torch.linspace(-1, 1, out.numel(), dtype=dtype).view(out.shape)
        return torch.autograd.grad((out * weight).sum(), leaves)

    exact, naive = (gradients(torch_math, dtype) for dtype in (torch.float64, torch.float32))
    with patch_sdpa():
        ours = gradients(F.scaled_dot_product_attention, torch.float32)
    for grads in zip(ours, exact, naive, strict=True):
        check(*grads)


def test_float64_keeps_its_accuracy() -> None:
    q, k, v = torch.randn(3, 2, 3, 7, 16, dtype=torch.float64)
    with patch_sdpa():
        out = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(out, torch_math(q, k, v), rtol=1e-12, atol=1e-12)
    assert tilewright.last_impl("attention") == "reference"


@pytest.mark.parametrize("boolean", [True, False])
def test_a_query_without_keys_gives_zero(boolean: bool) -> None:
    q, k, v = torch.randn(3, 1, 2, 4, 8)
    allowed = torch.ones(4, 4, dtype=torch.bool)
    allowed[1] = False
    mask = allowed if boolean else torch.zeros(4, 4).masked_fill(~allowed, -torch.inf)
    with patch_sdpa():
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert torch.equal(out[:, :, 1], torch.zeros(1, 2, 8))
    torch.testing.assert_close(out[:, :, [0, 2, 3]], torch_math(q, k, v)[:, :, [0, 2, 3]])


def test_nan_stands_where_torch_has_it() -> None:
    q, k, v = torch.randn(3, 1, 2, 6, 8)
    q[0, 0, 2, 3] = torch.nan
    k[0, 1, 5] = torch.nan
    with patch_sdpa():
        out = F.scaled_dot_product_attention(q, k, v)
    expected = torch_math(q, k, v)
    assert torch.equal(out.isnan(), expected.isnan())
    assert expected[0, 0, 2].isnan().all() and not expected[0, 0, 3].isnan().any()


def test_what_no_query_attends_does_not_leak() -> None:
    q, k, v = torch.randn(3, 1, 2, 6, 8)
    k[0, 1, 5] = torch.nan
    v[0, 0, 5] = torch.nan
    mask = torch.ones(6, 6, dtype=torch.bool)
    mask[:, 5] = False
    with patch_sdpa():
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(out, torch_math(q, k[:, :, :5], v[:, :, :5]))


@pytest.mark.parametrize("training", [True, False])
def test_multihead_attention(training: bool) -> None:
    module = nn.MultiheadAttention(32, 4, batch_first=True).train(training)
    x, padding = torch.randn(2, 9, 32), torch.zeros(2, 9, dtype=torch.bool)
    padding[1, 6:] = True
    with torch.set_grad_enabled(training):
        expected = module(x, x, x, key_padding_mask=padding, need_weights=False)[0]
        unpadded = module(x, x, x, need_weights=False)[0]
        forget_last_impl()
        with patch_sdpa():
            out = module(x, x, x, key_padding_mask=padding, need_weights=False)[0]
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    assert (unpadded - expected).abs().max() > 1e-3
    assert ours_ran()


@pytest.mark.parametrize("causal", [False, True])
def test_transformer_encoder_in_eval_mode(causal: bool) -> None:
    """In eval mode torch's fast path computes whole layers without calling SDPA."""
    layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    x, padding = torch.randn(2, 9, 32), torch.zeros(2, 9, dtype=torch.bool)
    padding[1, 6:] = True
    options: dict[str, Any] = {"src_key_padding_mask": padding}
    if causal:
        options |= {"mask": nn.Transformer.generate_square_subsequent_mask(9) < 0, "is_causal": True}
    with torch.no_grad():
        expected = model(x, **options)
        forget_last_impl()
        model(x, **options)
        assert not ours_ran()
        with patch_sdpa():
            assert not torch.backends.mha.get_fastpath_enabled()
            out = model(x, **options)
    assert ours_ran()
    kept = ~padding  # torch's fast path drops the padded rows, which mean nothing
    torch.testing.assert_close(out[kept], expected[kept], rtol=1e-4, atol=1e-5)


def test_transformer_encoder_layer_trains() -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=True)
    x = torch.randn(2, 9, 32)

    def gradients() -> list[Tensor]:
        return list(torch.autograd.grad(layer(x).square().sum(), list(layer.parameters())))

    expected = gradients()
    forget_last_impl()
    with patch_sdpa():
        ours = gradients()
    assert ours_ran()
    for got, want in zip(ours, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_dropout_drops_and_scales() -> None:
    """Values of 1 give the sum of the kept weights: 1 on average, 0 if all are dropped."""
    q, k, v = torch.randn(2, 4, 64, 8), torch.randn(2, 4, 200, 8), torch.ones(2, 4, 200, 8)
    forget_last_impl()
    with patch_sdpa():
        torch.manual_seed(1)
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=0.3)
        torch.manual_seed(1)
        again = F.scaled_dot_product_attention(q, k, v, dropout_p=0.3)
        other = F.scaled_dot_product_attention(q, k, v, dropout_p=0.3)
        none = F.scaled_dot_product_attention(q, k, v, dropout_p=1.0)
        with pytest.raises(ValueError, match=r"dropout_p must be a probability in \[0, 1\], got 1\.5"):
            F.scaled_dot_product_attention(q, k, v, dropout_p=1.5)
    assert ours_ran()
    assert torch.equal(out, again) and not torch.equal(out, other)
    assert 0.02 < out.std() < 0.3 and abs(out.mean() - 1) < 0.02
    assert (none == 0).all()


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("mask", [False, True])
def test_dropout_in_forward_and_backward_is_the_same(mask: bool, backend: str) -> None:
    """out is linear in v whatever is dropped, so <grad_v, v> = <grad_out, out>, if both dropped the same weights."""
    q, k, v = (torch.randn(2, 3, n, 16, requires_grad=True) for n in (40, 70, 70))
    options = {"attn_mask": torch.rand(40, 70) < 0.8} if mask else {"is_causal": True}

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=0.4, **options)

    torch._dynamo.reset()
    step = function if backend == "eager" else torch.compile(function, fullgraph=True, backend=backend)
    with patch_sdpa():
        outs = [step(q, k, v) for _ in range(2)]
    assert not torch.equal(*outs), "the seed became a constant"
    for out in outs:
        weight = torch.randn_like(out)
        grads = torch.autograd.grad((out * weight).sum(), (q, k, v))
        torch.testing.assert_close((grads[2] * v).sum(), (out * weight).sum(), rtol=1e-4, atol=1e-3)
        # In q and k the softmax's invariances hold: moving all keys by one vector changes nothing.
        assert grads[1].sum(-2).abs().max() < 1e-3 < grads[1].abs().max() and grads[0].abs().max() > 1e-3


def served_by_torch() -> dict[str, Callable[[], Tensor]]:
    q, k, v = torch.randn(3, 2, 3, 5, 8)

    def attend(*tensors: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*tensors)

    def jagged() -> Tensor:
        x = torch.nested.nested_tensor([torch.randn(5, 2, 8), torch.randn(3, 2, 8)], layout=torch.jagged)
        x = x.transpose(1, 2)
        return attend(x, x, x).transpose(1, 2).values()

    def nested() -> Tensor:
        x = torch.nested.nested_tensor([torch.randn(2, 5, 8), torch.randn(2, 3, 8)])
        return torch.cat([t.flatten() for t in attend(x, x, x).unbind()])

    class Subclass(Tensor):
        pass

    return {
        "meta": lambda: attend(q.to("meta"), k.to("meta"), v.to("meta")),
        "subclass": lambda: attend(q.as_subclass(Subclass), k, v),
        "jagged": jagged,
        "nested": nested,
        "vmap": lambda: torch.vmap(attend)(q, k, v),
        "func.grad": lambda: torch.func.grad(lambda x: attend(x, k, v).sum())(q),
        "jit.trace": lambda: torch.jit.trace(lambda x: attend(x, k, v), (q,), check_trace=False)(q + 1),
    }


@pytest.mark.parametrize("name", ["meta", "subclass", "jagged", "nested", "vmap", "func.grad", "jit.trace"])
def test_handed_on_to_torch(name: str) -> None:
    call = served_by_torch()[name]
    torch.manual_seed(1)
    expected = call()
    forget_last_impl()
    torch.manual_seed(1)
    with patch_sdpa():
        out = call()
    assert not ours_ran()
    assert out.device == expected.device
    if out.device.type != "meta":
        assert torch.equal(out, expected)


def test_errors_of_torch_stay_for_dtypes_that_are_torchs() -> None:
    q = torch.ones(1, 1, 2, 4, dtype=torch.int32)
    with patch_sdpa(), pytest.raises(RuntimeError, match="expected scalar type"):
        F.scaled_dot_product_attention(q, q, q)


def test_autocast_casts_as_torch_does() -> None:
    q, k, v = torch.randn(3, 2, 3, 7, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = F.scaled_dot_product_attention(q, k, v)
        with patch_sdpa():
            out = F.scaled_dot_product_attention(q, k, v)
    assert out.dtype == expected.dtype == torch.bfloat16
    check(out, torch_math(*(t.bfloat16().double() for t in (q, k, v))), expected)


def test_nesting_and_repetition() -> None:
    with patch_sdpa():
        with patch_sdpa():
            assert F.scaled_dot_product_attention is sdpa._sdpa
        assert F.scaled_dot_product_attention is sdpa._sdpa
        assert not torch.backends.mha.get_fastpath_enabled()
    assert F.scaled_dot_product_attention is TORCH_SDPA
    patch = patch_sdpa()
    with patch, patch:
        patch.enable()
        patch.disable()
        assert F.scaled_dot_product_attention is sdpa._sdpa


def test_enable_and_disable_need_not_be_one_object() -> None:
    assert isinstance(patch_sdpa().enable(), patch_sdpa)
    assert F.scaled_dot_product_attention is sdpa._sdpa
    patch_sdpa().disable()
    assert F.scaled_dot_product_attention is TORCH_SDPA
    with pytest.raises(RuntimeError, match="without a matching enable"):
        patch_sdpa().disable()


def test_an_exception_restores() -> None:
    with pytest.raises(KeyError), patch_sdpa():
        raise KeyError
    assert F.scaled_dot_product_attention is TORCH_SDPA
    assert torch.backends.mha.get_fastpath_enabled()


def test_decorator_restores_each_call() -> None:
    @patch_sdpa()
    def inside() -> bool:
        return F.scaled_dot_product_attention is sdpa._sdpa

    assert inside() and inside()
    assert F.scaled_dot_product_attention is TORCH_SDPA


def test_a_fastpath_that_was_off_stays_off() -> None:
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with patch_sdpa():
            pass
        assert not torch.backends.mha.get_fastpath_enabled()
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_a_name_imported_inside_hands_on_to_torch_afterwards() -> None:
    q, k, v = torch.randn(3, 1, 2, 4, 8)
    with patch_sdpa():
        from torch.nn.functional import scaled_dot_product_attention as kept
    forget_last_impl()
    assert torch.equal(kept(q, k, v, is_causal=True), TORCH_SDPA(q, k, v, is_causal=True))
    assert not ours_ran()


def test_somebody_elses_wrapper_survives() -> None:
    patch = patch_sdpa().enable()
    ours = F.scaled_dot_product_attention

    def wrapper(*args: Any, **options: Any) -> Tensor:
        return ours(*args, **options)

    F.scaled_dot_product_attention = wrapper
    patch.disable()
    assert F.scaled_dot_product_attention is wrapper
    q, k, v = torch.randn(3, 1, 2, 4, 8)
    forget_last_impl()
    assert torch.equal(F.scaled_dot_product_attention(q, k, v), TORCH_SDPA(q, k, v))
    assert not ours_ran()
    F.scaled_dot_product_attention = TORCH_SDPA


def test_threads_share_the_patch() -> None:
    inside, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with patch_sdpa():
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    assert inside.wait(10)
    assert F.scaled_dot_product_attention is sdpa._sdpa
    with patch_sdpa():
        leave.set()
        thread.join()
        assert F.scaled_dot_product_attention is sdpa._sdpa
    assert F.scaled_dot_product_attention is TORCH_SDPA


@pytest.mark.parametrize("causal", [False, True])
def test_compiled_inside(causal: bool) -> None:
    q, k, v = torch.randn(3, 2, 3, 7, 16)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q * 2, k, v, is_causal=causal) + 1

    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    expected = compiled(q, k, v)
    forget_last_impl()
    compiled(q, k, v)
    assert not ours_ran()
    with patch_sdpa():  # recompiles, and again afterwards
        out = compiled(q, k, v)
        assert ours_ran()
    forget_last_impl()
    compiled(q, k, v)
    assert not ours_ran()
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_compiled_module_trains_inside() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)
    x = torch.randn(2, 5, 16)
    torch._dynamo.reset()
    expected = torch.autograd.grad(layer(x).sum(), layer.self_attn.in_proj_weight)[0]
    forget_last_impl()
    with patch_sdpa():
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        grad = torch.autograd.grad(compiled(x).sum(), layer.self_attn.in_proj_weight)[0]
    assert ours_ran()
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spoil", ["column", "sign", "nan", "dtype"])
def test_the_check_itself_fails_on_wrong_results(spoil: str) -> None:
    q, k, v = torch.randn(3, 2, 3, 7, 16)
    exact = torch_math(q.double(), k.double(), v.double())
    naive = torch_math(q, k, v)
    wrong = naive.clone()
    if spoil == "column":
        wrong[1, 2, 6, 15] += 1e-4
    elif spoil == "sign":
        wrong[0, 0, 0] *= -1
    elif spoil == "nan":
        wrong[0, 1, 3, 2] = torch.nan
    else:
        wrong = wrong.double()
    check(naive, exact, naive)
    with pytest.raises(AssertionError):
        check(wrong, exact, naive)
