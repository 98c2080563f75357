"""Attention's gradients, torch's own call, and what is rejected."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from cases import INF, NAN, naive_attention, seeded
from compare import assert_close, assert_same_bits
from torch import Tensor

import tilewright
from tilewright import attention, scaled_dot_product_attention
from tilewright.ops.attention import attention_packed, attention_reference
from tilewright.ops.attention_reference import Operands

pytestmark = pytest.mark.usefixtures("one_thread_for_torch")


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype)


# Gradients.

GRADIENTS = {
    "plain": {},
    "causal": {"causal": "top_left"},
    "window": {"causal": "bottom_right", "window": (2, -1)},
    "mask": {"mask": torch.rand(2, 1, 5, 7, generator=seeded("mask")) < 0.5},
    "nothing": {"mask": torch.zeros(1, 1, 5, 1, dtype=torch.bool)},
    "softcap": {"softcap": 1.5, "scale": 1.1},
    "alibi": {"alibi_slopes": torch.rand(4, generator=seeded("alibi"))},
    "bias": {"bias": torch.randn(4, 1, 7, generator=seeded("bias"))},
    "float_mask": {"mask": torch.randn(2, 1, 5, 7, generator=seeded("float_mask"))},
    "sinks": {"sinks": torch.randn(4, generator=seeded("sinks")), "causal": "bottom_right"},
}


def with_gradients(name: str, dtype: torch.dtype) -> tuple[list[Tensor], dict, list[str]]:
    """q, k, v, the options, and which options take a gradient too."""
    tensors = [random(*s, dtype=dtype).requires_grad_() for s in ((2, 4, 5, 6), (2, 2, 7, 6), (2, 2, 7, 3))]
    options, wanted = dict(GRADIENTS[name]), []
    for option in ("bias", "sinks", "mask"):
        if option in options and options[option].is_floating_point():
            options[option] = options[option].to(dtype).requires_grad_()
            wanted.append(option)
    return tensors, options, wanted


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradcheck(name: str) -> None:
    tensors, options, wanted = with_gradients(name, torch.float64)

    def function(q: Tensor, k: Tensor, v: Tensor, *extra: Tensor) -> Tensor:
        return attention(q, k, v, **{**options, **dict(zip(wanted, extra, strict=True))})

    assert torch.autograd.gradcheck(function, (*tensors, *(options[w] for w in wanted)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_keep_the_error_rule(name: str, dtype: torch.dtype) -> None:
    """Gradients of out and lse together, against autograd through the float64 reference."""
    tensors, options, wanted = with_gradients(name, dtype)
    leaves = [*tensors, *(options[w] for w in wanted)]
    weights = [random(2, 4, 5, 3), random(2, 4, 5)]

    def gradients(function: Callable, wide: torch.dtype) -> tuple[Tensor, ...]:
        copies = [t.detach().to(wide).requires_grad_() for t in leaves]
        out, lse = function(*copies[:3], **{**options, **dict(zip(wanted, copies[3:], strict=True))})
        lse = torch.where(lse == -INF, torch.zeros_like(lse), lse)
        loss = (out * weights[0].to(out.dtype)).sum() + (lse * weights[1].to(lse.dtype)).sum()
        return torch.autograd.grad(loss, copies)

    ours = gradients(lambda *a, **o: attention(*a, return_lse=True, **o), dtype)
    reference = gradients(attention_reference, torch.float64)
    naive = gradients(naive_attention, dtype)
    for a, b, c in zip(ours, reference, naive, strict=True):
        c = torch.where(c.isnan(), b.to(dtype), c) if name == "nothing" else c  # torch: NaN without keys
        assert_close(a, b, c, dtype)


def test_gradients_with_infinite_sinks() -> None:
    q, k, v = (random(1, 2, n, 8).requires_grad_() for n in (3, 5, 5))
    sinks = torch.tensor([-INF, 0.0]).requires_grad_()
    attention(q, k, v, sinks=sinks, mask=torch.zeros(3, 5, dtype=torch.bool)).sum().backward()
    for t in (q, k, v, sinks):
        assert torch.equal(t.grad, torch.zeros_like(t))


def test_slopes_with_gradients_are_not_dropped() -> None:
    q, slopes = random(1, 2, 3, 8), torch.rand(2).requires_grad_()
    try:
        out = attention(q, q, q, alibi_slopes=slopes)
    except NotImplementedError:
        return
    (grad,) = torch.autograd.grad(out.square().sum(), slopes, allow_unused=True)
    assert grad is not None and grad.abs().sum() > 0, "alibi_slopes lost its gradient without a word"


# torch's call.


@pytest.mark.parametrize("shape", [(5, 8), (3, 5, 8), (2, 3, 5, 8), (2, 4, 3, 5, 8), (1, 1, 1, 2, 5, 8)], ids=str)
def test_sdpa_like_torch(shape: tuple[int, ...]) -> None:
    q, k, v = random(3, *shape)
    k, v = (torch.cat([t, t.flip(-2)], -2)[..., :7, :] for t in (k, v))
    mask, bias = torch.rand(*shape[:-1], 7) < 0.7, random(5, 7)
    mask[..., 0] = True
    for options in ({}, {"attn_mask": mask}, {"attn_mask": bias}, {"is_causal": True}, {"scale": 0.3}):
        expected = F.scaled_dot_product_attention(q, k, v, **options)
        torch.testing.assert_close(scaled_dot_product_attention(q, k, v, **options), expected)
    if len(shape) >= 4:  # masks of fewer dimensions than the query
        for lead in range(1, len(shape) - 2):
            part = mask[(0,) * lead]
            expected = F.scaled_dot_product_attention(q, k, v, attn_mask=part)
            torch.testing.assert_close(scaled_dot_product_attention(q, k, v, attn_mask=part), expected)


def test_sdpa_groups() -> None:
    q, k = random(2, 6, 5, 8), random(2, 2, 7, 8)
    expected = F.scaled_dot_product_attention(q, k, k, enable_gqa=True)
    torch.testing.assert_close(scaled_dot_product_attention(q, k, k, enable_gqa=True), expected)
    with pytest.raises(ValueError, match="enable_gqa"):
        scaled_dot_product_attention(q, k, k)
    with pytest.raises(ValueError, match="dropout_p"):
        scaled_dot_product_attention(q, q, q, dropout_p=1.5)


def test_sdpa_mask_and_causal_together() -> None:
    """torch's fused CPU kernel applies both; so do we."""
    q, mask = random(2, 3, 20, 16), torch.rand(2, 1, 20, 20) < 0.7
    mask[..., 0] = True
    expected = F.scaled_dot_product_attention(q, q, q, attn_mask=mask.tril())
    torch.testing.assert_close(scaled_dot_product_attention(q, q, q, attn_mask=mask, is_causal=True), expected)


# Rejected.


def call(**changes: object) -> Callable[[], object]:
    """attention on good arguments with some changed; q is (2, 4, 3, 8), k and v (2, 2, 5, 8)."""

    def run() -> object:
        arguments: dict = {"q": random(2, 4, 3, 8), "k": random(2, 2, 5, 8), "v": random(2, 2, 5, 8), **changes}
        return attention(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)

    return run


def shaped(*shape: int) -> Tensor:
    return torch.zeros(shape)


REJECTED = {
    "q_3d": (call(q=shaped(4, 3, 8)), ValueError, r"\(batch, heads, seq, head_dim\)"),
    "k_3d": (call(k=shaped(2, 5, 8)), ValueError, r"\(batch, heads, seq, head_dim\)"),
    "batches": (call(q=shaped(1, 4, 3, 8)), ValueError, "attention: expected q"),
    "head_dims": (call(q=shaped(2, 4, 3, 9)), ValueError, "attention: expected q"),
    "lengths": (call(v=shaped(2, 2, 6, 8)), ValueError, "attention: expected q"),
    "kv_heads": (call(v=shaped(2, 1, 5, 8)), ValueError, "attention: expected q"),
    "group": (call(q=shaped(2, 3, 3, 8)), ValueError, "multiple of kv_heads"),
    "no_kv_heads": (call(k=shaped(2, 0, 5, 8), v=shaped(2, 0, 5, 8)), ValueError, "multiple of kv_heads"),
    "int": (call(q=shaped(2, 4, 3, 8).int()), ValueError, "float.*got torch.int32"),
    "mixed": (call(q=shaped(2, 4, 3, 8).half()), ValueError, "one floating dtype"),
    "mixed_kv": (call(k=shaped(2, 2, 5, 8).half()), ValueError, "one floating dtype"),
    "head_dim_513": (lambda: attention(*[shaped(1, 1, 2, 513)] * 3), NotImplementedError, "head_dim.*513"),
    "causal": (call(causal="diagonal"), ValueError, "causal must be one of.*'diagonal'"),
    "causal_bool": (call(causal=True), ValueError, "causal must be one of"),
    "dropout": (call(dropout_p=1.1), ValueError, "dropout_p"),
    "dropout_negative": (call(dropout_p=-0.1), ValueError, "dropout_p"),
    "backend": (call(backend="gpu"), ValueError, "backend must be one of.*'gpu'"),
    "backend_cuda": (call(backend="cuda"), NotImplementedError, "backend=.cuda.*tensors on a GPU"),
    "softcap": (call(softcap=-1.0), ValueError, "softcap"),
    "softcap_nan": (call(softcap=NAN), ValueError, "softcap"),
    "mask_shape": (call(mask=shaped(3, 4).bool()), ValueError, r"mask must broadcast to \(2, 4, 3, 5\), got \(3, 4\)"),
    "mask_5d": (call(mask=shaped(1, 1, 1, 3, 5).bool()), ValueError, "mask must broadcast"),
    "mask_dtype": (call(mask=shaped(3, 5).long()), ValueError, "float32, bfloat16 or float16"),
    "bias_shape": (call(bias=shaped(3, 3, 5)), ValueError, r"bias must broadcast to \(2, 4, 3, 5\), got \(3, 3, 5\)"),
    "alibi_heads": (call(alibi_slopes=shaped(2)), ValueError, "alibi_slopes must be .*4 heads"),
    "alibi_batch": (
        call(alibi_slopes=shaped(3, 4)),
        ValueError,
        r"alibi_slopes must be \(heads,\) or \(batch, heads\)",
    ),
    "alibi_3d": (call(alibi_slopes=shaped(1, 2, 4)), ValueError, "alibi_slopes"),
    "alibi_0d": (call(alibi_slopes=torch.tensor(1.0)), ValueError, "alibi_slopes"),
    "sinks_heads": (call(sinks=shaped(5)), ValueError, "sinks must be .*4 heads"),
    "sinks_2d": (call(sinks=shaped(2, 4)), ValueError, "sinks"),
    "sinks_0d": (call(sinks=torch.tensor(1.0)), ValueError, "sinks"),
    "window_3": (call(window=(1, 2, 3)), ValueError, "attention: window"),
    "window_negative": (call(window=(-7, 2)), ValueError, "attention: window"),
    "window_float": (call(window=(1.5, 2)), (ValueError, TypeError), "attention: window"),
    "out_shape": (call(out=shaped(2, 4, 3, 9)), ValueError, "attention: out"),
    "out_dtype": (call(out=shaped(2, 4, 3, 8).half()), ValueError, "attention: .*out"),
    "out_last": (call(out=shaped(2, 4, 8, 3).transpose(2, 3)), ValueError, "out must be contiguous in its last"),
    "out_reference": (call(out=shaped(3, 2, 4, 3, 8), backend="reference"), ValueError, "attention: out"),
    "out_reference_dtype": (call(out=shaped(2, 4, 3, 8).int(), backend="reference"), ValueError, "attention: .*out"),
    "out_grad": (call(q=torch.ones(2, 4, 3, 8, requires_grad=True), out=shaped(2, 4, 3, 8)), ValueError, "gradient"),
    "meta": (call(k=shaped(2, 2, 5, 8).to("meta")), (ValueError, RuntimeError, NotImplementedError), "meta|device"),
    "list": (call(q=[[1.0]]), TypeError, "attention: q"),
}


@pytest.mark.parametrize("name", REJECTED)
def test_rejected(name: str) -> None:
    function, error, message = REJECTED[name]
    with pytest.raises(error, match=message):
        function()


def test_backends_by_name() -> None:
    q, k, v = random(1, 2, 3, 8), random(1, 2, 5, 8), random(1, 2, 5, 8)
    assert_same_bits(attention(q, k, v, backend="cpu"), attention(q, k, v))
    out = attention(q, k, v, backend="reference", out=torch.empty_like(q))
    assert tilewright.last_impl("attention") == "reference"
    assert_same_bits(out, attention_reference(q, k, v)[0].float())


MEASURE = """
import re, torch, tilewright
def high_water():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
q, k, v = (torch.randn(1, 1, 8192, 64, requires_grad=True) for _ in "qkv")
mask = (torch.arange(8192) % 7 > 0).expand(1, 1, 8192, 8192)
tilewright.attention(q[:, :, :64], k, v, mask=mask[:, :, :64]).sum().backward()  # what is loaded on first use
open("/proc/self/clear_refs", "w").write("5")  # VmHWM counts from here
before = high_water()
tilewright.attention(q, k, v, mask=mask, causal="bottom_right").sum().backward()
print(high_water() - before)
"""


@pytest.mark.measures
def test_memory_does_not_grow_with_the_square_of_the_length() -> None:
    """8,192 x 8,192 scores would be 268 MB and bytes 67 MB; q, k, v are 2 MB each, and so are the 16 parts of dQ."""
    output = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True).stdout
    assert int(output) < 60e6, f"{int(output) / 1e6:.0f} MB"


def test_gradient_of_a_bias_that_sequences_with_other_first_keys_share(same_bits: Callable) -> None:
    """Blocks of keys count from a sequence's first key: two threads with a block of one sequence each would add to the
    same elements of the bias's gradient."""
    q, k, v = (random(4, 2, n, 16) for n in (24, 512, 512))
    values, upstream = random(24, 512), random(4, 2, 24, 16)
    starts, ends = torch.tensor([0, 17, 40, 3]), torch.full((4,), 512)

    def gradient(bias: Tensor) -> Tensor:
        out, _ = attention_packed(Operands(q, k, v, bias=bias, k_start=starts, k_end=ends))
        return torch.autograd.grad(out, bias, upstream)[0]

    for _ in range(10):
        same_bits(lambda: (gradient(values.clone().requires_grad_()),))
    wide = values.double().requires_grad_()
    hidden = torch.arange(512) < starts[:, None]
    scores = (q.double() @ k.double().mT / 4 + wide).masked_fill(hidden[:, None, None], -INF)
    expected = torch.autograd.grad(scores.softmax(-1) @ v.double(), wide, upstream.double())[0]
    torch.testing.assert_close(gradient(values.clone().requires_grad_()).double(), expected, rtol=1e-4, atol=1e-5)
