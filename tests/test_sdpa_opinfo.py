"""torch's own samples for scaled_dot_product_attention, and its nn modules above it, on Tilewright."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from compare import assert_close
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing._internal.common_methods_invocations import op_db

import tilewright
from tilewright import patch_sdpa

(OP,) = (op for op in op_db if op.name == "nn.functional.scaled_dot_product_attention")
TORCH_SDPA = F.scaled_dot_product_attention


pytestmark = pytest.mark.usefixtures("one_thread_for_torch")


def patched(*tensors: Tensor, **options: object) -> Tensor:
    with patch_sdpa():
        return F.scaled_dot_product_attention(*tensors, **options)


def torch_math(*tensors: Tensor, **options: object) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return TORCH_SDPA(*tensors, **options)


def step_by_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    enable_gqa: bool = False,
) -> Tensor:
    """The same in the tensors' dtype (torch's own computes 16-bit inputs in float32)."""
    if enable_gqa:
        k, v = (t.repeat_interleave(q.shape[-3] // t.shape[-3], -3) for t in (k, v))
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if is_causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    return torch.softmax(scores if attn_mask is None else scores + attn_mask, -1) @ v


def results(function: Callable, tensors: list[Tensor], options: dict, wide: torch.dtype) -> tuple[Tensor, ...]:
    """out, and the gradients of all that want one: of a float mask, too."""
    leaves = [t.detach().to(wide).requires_grad_() for t in tensors]
    mask = options.get("attn_mask")
    if mask is not None and mask.is_floating_point():
        leaves.append(mask.detach().to(wide).requires_grad_())
        options = options | {"attn_mask": leaves[3]}
    out = function(*leaves[:3], **options)
    weight = torch.linspace(-1, 2, out.numel()).view(out.shape).to(tensors[0].dtype).to(wide)
    return out, *torch.autograd.grad((out * weight).sum(), leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("function", [patched, tilewright.scaled_dot_product_attention], ids=["patched", "called"])
def test_samples(function: Callable, dtype: torch.dtype) -> None:
    seen = 0
    for sample in OP.sample_inputs("cpu", dtype, requires_grad=True):
        tensors, options = [sample.input, *sample.args], dict(sample.kwargs)
        if options.get("dropout_p"):
            continue  # other weights are dropped than torch drops
        seen += 1
        tilewright.attention(*torch.zeros(3, 1, 1, 1, 4), backend="reference")
        ours = results(function, tensors, options, dtype)
        assert (tilewright.last_impl("attention") == "reference") == (dtype == torch.float64), "torch computed it"
        reference = results(torch_math, tensors, options, torch.float64)
        naive = results(step_by_step, tensors, options, dtype)
        for a, b, c in zip(ours, reference, naive, strict=True):
            if dtype == torch.float64:
                torch.testing.assert_close(a, b)
            elif dtype == torch.float32:
                # OpInfo's own tolerance for this op: with scores of 100, a near tie makes one product's last bit count.
                torch.testing.assert_close(a.double(), b, atol=5e-5, rtol=5e-6)
            else:
                assert_close(a, b, c, dtype)
    assert seen > 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_samples_with_dropout_run(dtype: torch.dtype) -> None:
    """out is linear in the values, whatever is dropped: <grad_v, v> = <grad_out, out>."""
    for sample in OP.sample_inputs("cpu", dtype, requires_grad=True):
        q, k, v = sample.input, *sample.args
        if sample.kwargs.get("dropout_p"):
            out = patched(q, k, v, **sample.kwargs).float()
            (grad,) = torch.autograd.grad(out.square().sum(), v, retain_graph=True)
            expected = 2 * out.square().sum()
            bound = 1e-4 if dtype == torch.float32 else 3e-2
            torch.testing.assert_close((grad.float() * v.float()).sum(), expected, rtol=bound, atol=bound)
            assert out.shape == torch_math(q, k, v, **sample.kwargs).shape


# The modules, in training.


@pytest.mark.parametrize("bool_mask", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_multihead_attention_gradients(batch_first: bool, bool_mask: bool) -> None:
    """To query, key, value, the parameters and a float mask."""
    module = nn.MultiheadAttention(32, 4, kdim=24, vdim=16, batch_first=batch_first)
    tensors = [torch.randn(5, 5, d) for d in (32, 24, 16)]
    mask = torch.randn(5, 5)
    mask = (mask > 1.5) if bool_mask else mask

    def gradients() -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in (tensors if bool_mask else [*tensors, mask])]
        attn_mask = mask if bool_mask else leaves[3]
        out = module(*leaves[:3], attn_mask=attn_mask, need_weights=False)[0]
        return [out, *torch.autograd.grad(out.square().sum(), [*leaves, *module.parameters()])]

    expected = gradients()
    with patch_sdpa():
        ours = gradients()
    assert len(ours) == 1 + 3 + (not bool_mask) + len(list(module.parameters()))
    for got, want in zip(ours, expected, strict=True):
        assert want.abs().max() > 0
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("padded", [False, True])
def test_transformer_encoder_trains(padded: bool) -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 2).train(), torch.randn(2, 9, 32)
    options: dict = {"mask": nn.Transformer.generate_square_subsequent_mask(9), "is_causal": True}
    if padded:
        options = {"src_key_padding_mask": torch.arange(9).expand(2, 9) >= torch.tensor([[9], [6]])}

    def gradients() -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        out = model(leaf, **options)
        return [out, *torch.autograd.grad(out.square().sum(), [leaf, *model.parameters()])]

    expected = gradients()
    with patch_sdpa():
        ours = gradients()
    for got, want in zip(ours, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("module", ["attention", "layer"])
def test_dropout_gradients_by_differences(module: str) -> None:
    """With one seed for every call the module is a function, and its gradient that function's."""
    net = (
        nn.MultiheadAttention(8, 2, dropout=0.4) if module == "attention" else nn.TransformerEncoderLayer(8, 2, 8, 0.3)
    )
    net = net.double().train()

    def function(*tensors: Tensor) -> Tensor:
        torch.manual_seed(4)
        return net(*tensors, need_weights=False)[0] if module == "attention" else net(*tensors)

    inputs = [torch.randn(4, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    with patch_sdpa():
        assert torch.autograd.gradcheck(function, inputs if module == "attention" else inputs[:1])


def test_dropout_is_what_training_averages_over() -> None:
    """The mean over many masks tends to what eval mode gives, with the spread that torch's dropout has."""
    trained = nn.MultiheadAttention(16, 2, dropout=0.3, batch_first=True)
    still, x = copy.deepcopy(trained).eval(), torch.randn(2, 30, 16)
    with torch.no_grad():
        theirs = torch.stack([trained(x, x, x, need_weights=False)[0] for _ in range(400)])
        with patch_sdpa():
            ours = torch.stack([trained(x, x, x, need_weights=False)[0] for _ in range(400)])
            exact = still(x, x, x, need_weights=False)[0]
    z = (ours.mean(0) - exact) / (theirs.std(0) / 20)
    assert z.abs().max() < 6 and 0.7 < z.std() < 1.3
    assert 0.9 < (ours.std(0) / theirs.std(0)).mean() < 1.1
