"""rope: rotation of q and k by tables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from buffers import assert_padding_intact, poisoned
from compare import assert_close, assert_same_bits
from torch import Tensor

import tilewright
from tilewright.ops.rope import rope_reference


@dataclass(frozen=True)
class Case:
    batch: int
    heads: int
    kv_heads: int
    seq: int
    head_dim: int
    rotary_dim: int | None = None
    positions: str | None = None  # None, "seq", "batch", "one"


CASES = [
    Case(1, 9, 3, 1, 64, positions="one"),  # decode
    Case(4, 9, 3, 1, 64, positions="batch"),
    Case(1, 9, 3, 37, 64),  # prefill
    Case(2, 5, 1, 17, 80, 32, "batch"),
    Case(2, 7, 7, 16, 128, positions="seq"),
    Case(1, 3, 1, 15, 256, positions="seq"),
    Case(1, 2, 1, 5, 33, 24),
    *(Case(2, 2, 1, 3, d, positions="batch") for d in (2, 4, 6, 14, 16, 18, 30, 34, 62, 66)),
    *(Case(1, 2, 2, 4, 70, d, "seq") for d in (2, 30, 64, 68)),
]
MAX_POSITIONS = 50


def tensors(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """q, k, cos, sin, positions."""
    q = torch.randn(case.batch, case.heads, case.seq, case.head_dim).to(dtype)
    k = torch.randn(case.batch, case.kv_heads, case.seq, case.head_dim).to(dtype)
    cos, sin = tilewright.rope_tables(10000.0, case.rotary_dim or case.head_dim, MAX_POSITIONS)
    shape = {"seq": (case.seq,), "batch": (case.batch, case.seq), "one": (1, case.seq)}.get(case.positions)
    return q, k, cos, sin, None if shape is None else torch.randint(0, MAX_POSITIONS, shape)


def naive(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool) -> Tensor:
    """transformers' apply_rotary_pos_emb in x's dtype."""
    positions = torch.arange(x.shape[2]) if positions is None else positions
    c, s = cos.to(x.dtype)[positions], sin.to(x.dtype)[positions]
    if positions.dim() == 2:
        c, s = c.unsqueeze(1), s.unsqueeze(1)
    dim = 2 * cos.shape[-1]
    rotary, rest = x[..., :dim], x[..., dim:]
    if interleaved:
        c, s = c.repeat_interleave(2, -1), s.repeat_interleave(2, -1)
        turned = torch.stack((-rotary[..., 1::2], rotary[..., 0::2]), -1).flatten(-2)
    else:
        c, s = torch.cat((c, c), -1), torch.cat((s, s), -1)
        a, b = rotary.chunk(2, -1)
        turned = torch.cat((-b, a), -1)
    return torch.cat((rotary * c + turned * s, rest), -1)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "pairs"])
def test_error_rule(case: Case, interleaved: bool, dtype: torch.dtype, kernel_impl: str) -> None:
    q, k, cos, sin, positions = tensors(case, dtype)
    kwargs = {"positions": positions, "interleaved": interleaved, "rotary_dim": case.rotary_dim}
    outs = tilewright.rope(q, k, cos, sin, **kwargs)
    assert tilewright.last_impl("rope") == kernel_impl
    for x, out, ref in zip((q, k), outs, rope_reference(q, k, cos, sin, **kwargs), strict=True):
        plain = naive(x, cos, sin, positions, interleaved)
        assert_close(out, ref, plain, dtype)
        if dtype == torch.float32:  # the same roundings as transformers
            assert_same_bits(out, plain)
    # In place, inside NaN padding.
    padded = [poisoned(t) for t in (q, k)]
    results = tilewright.rope(*padded, poisoned(cos), poisoned(sin), inplace=True, **kwargs)
    for view, result, out in zip(padded, results, outs, strict=True):
        assert result is view
        assert_same_bits(view, out)
        assert_padding_intact(view)


def test_every_layout_is_read_in_place(dtype: torch.dtype) -> None:
    cos, sin = tilewright.rope_tables(500000.0, 32, 64)
    fused = torch.randn(2, 11, (6 + 2 + 2) * 32).to(dtype)  # q, k and v of one projection
    q = fused[..., :192].view(2, 11, 6, 32).transpose(1, 2)
    k = fused[..., 192:256].view(2, 11, 2, 32).transpose(1, 2)
    expected = tilewright.rope(q.contiguous(), k.contiguous(), cos, sin)
    for out, want in zip(tilewright.rope(q, k, cos, sin), expected, strict=True):
        assert_same_bits(out.contiguous(), want)
    v = fused[..., 256:].clone()
    tilewright.rope(q, k, cos, sin, inplace=True)
    assert_same_bits(q.contiguous(), expected[0])
    assert_same_bits(k.contiguous(), expected[1])
    assert_same_bits(fused[..., 256:].contiguous(), v.contiguous())

    x = torch.randn(1, 1, 1, 32).to(dtype).expand(3, 4, 5, 32)  # stride 0
    want = tilewright.rope(x.contiguous(), x.contiguous(), cos, sin)
    assert_same_bits(tilewright.rope(x, x, cos, sin)[0], want[0])
    y = torch.randn(2, 2, 32, 5).to(dtype).transpose(2, 3)  # strided last dimension: copied, not misread
    assert_same_bits(tilewright.rope(y, y, cos, sin)[0], tilewright.rope(y.contiguous(), y, cos, sin)[0])
    wide = torch.randn(64, 40)  # tables inside wider rows, positions with a stride
    rows = torch.arange(20).view(10, 2)[:, 1]
    z = torch.randn(1, 2, 10, 32).to(dtype)
    got = tilewright.rope(z, z, wide[:, 3:19], wide[:, 20:36], positions=rows)
    want = tilewright.rope(z, z, wide[:, 3:19].clone(), wide[:, 20:36].clone(), positions=rows.clone())
    assert_same_bits(got[0], want[0])


def test_nan_stays_in_its_pair(dtype: torch.dtype) -> None:
    cos, sin = tilewright.rope_tables(10000.0, 40, 8)
    q = torch.randn(1, 2, 3, 48).to(dtype)
    k = q.clone()
    k[0, 1, 2, 7] = float("nan")
    clean, out = tilewright.rope(q, k, cos, sin)
    hit = torch.zeros_like(out, dtype=torch.bool)
    hit[0, 1, 2, [7, 27]] = True
    assert torch.equal(out.isnan(), hit) and torch.equal(out[~hit], clean[~hit])


@pytest.mark.parametrize("shape", [(0, 4, 3, 16), (2, 4, 0, 16), (2, 0, 3, 16)])
@pytest.mark.parametrize("inplace", [False, True])
def test_empty(shape: tuple[int, ...], inplace: bool, dtype: torch.dtype) -> None:
    q = torch.empty(shape, dtype=dtype)
    cos, sin = tilewright.rope_tables(10000.0, 16, 8)
    for out in tilewright.rope(q, q.clone(), cos, sin, inplace=inplace):
        assert out.shape == shape and out.dtype == dtype


def test_bits_do_not_depend_on_threads(same_bits, dtype: torch.dtype) -> None:
    for case in (CASES[0], Case(2, 9, 3, 61, 64, positions="batch"), Case(1, 32, 8, 129, 128)):
        q, k, cos, sin, positions = tensors(case, dtype)
        cos, sin = tilewright.rope_tables(10000.0, case.head_dim, 200)
        same_bits(lambda a=(q, k, cos, sin), p=positions: tilewright.rope(*a, positions=p))


def arguments() -> dict[str, Tensor]:
    cos, sin = tilewright.rope_tables(10000.0, 16, 8)
    return {"q": torch.randn(2, 4, 3, 16), "k": torch.randn(2, 2, 3, 16), "cos": cos, "sin": sin}


def shared() -> dict[str, Tensor]:
    x = torch.randn(2, 6, 3, 16)
    return {"q": x[:, :4], "k": x[:, 3:5], "inplace": True}


REJECTED: list[tuple[str, dict[str, object]]] = [
    ("q and k must be (batch, heads, seq, head_dim), got (4, 3, 16)", {"q": torch.randn(4, 3, 16)}),
    ("q must be float32, bfloat16 or float16, got int64", {"q": torch.ones(2, 4, 3, 16).long()}),
    ("one dtype, got float32 and bfloat16", {"k": torch.randn(2, 2, 3, 16).bfloat16()}),
    ("agree in batch, seq and head_dim", {"k": torch.randn(2, 2, 4, 16)}),
    ("agree in batch, seq and head_dim", {"k": torch.randn(1, 2, 3, 16)}),
    ("cos and sin must be float32", {"cos": torch.randn(8, 8).double()}),
    ("of one shape", {"cos": torch.randn(7, 8)}),
    ("rotary_dim must be twice the last dimension of cos (8)", {"rotary_dim": 8}),
    ("at most head_dim (16)", {"cos": torch.randn(8, 9), "sin": torch.randn(8, 9)}),
    ("cos and sin must reach 3 positions", {"cos": torch.randn(2, 8), "sin": torch.randn(2, 8)}),
    ("positions must have shape (3,) or (2, 3), got (4,)", {"positions": torch.arange(4)}),
    ("positions must have shape", {"positions": torch.zeros(3, 3).long()}),
    ("positions must be int64, got int32", {"positions": torch.arange(3).int()}),
    ("positions must be in [0, 8), the rows of cos and sin, got 8", {"positions": torch.tensor([0, 8, 1])}),
    ("got -1", {"positions": torch.tensor([[0, 1, 2], [0, 1, -1]])}),
    ("one device, got q on cpu, k on meta, cos on cpu, sin on cpu", {"k": torch.empty(2, 2, 3, 16, device="meta")}),
    ("must not share memory", shared()),
    ("must not share memory", {"q": torch.randn(2, 1, 3, 16).expand(2, 4, 3, 16), "inplace": True}),
    ("contiguous in its last dimension", {"q": torch.randn(2, 4, 16, 3).transpose(2, 3), "inplace": True}),
]


@pytest.mark.parametrize("message,changed", REJECTED, ids=[m for m, _ in REJECTED])
def test_rejected(message: str, changed: dict[str, object]) -> None:
    kwargs = {**arguments(), **changed}
    before = kwargs["q"].clone(), kwargs["k"].clone()
    on_meta = kwargs["k"].is_meta
    for inplace in {bool(kwargs.get("inplace")), True}:
        with pytest.raises(ValueError) as error:
            tilewright.rope(**{**kwargs, "inplace": inplace})
        assert "rope: " in str(error.value) and message in str(error.value)
    # Nothing was written.
    assert torch.equal(kwargs["q"], before[0]) and (on_meta or torch.equal(kwargs["k"], before[1]))


def test_inplace_takes_parts_of_one_tensor() -> None:
    cos, sin = tilewright.rope_tables(10000.0, 16, 8)

    def parts(x: Tensor, cut: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
        want = tilewright.rope(*cut(x.clone()), cos, sin)
        tilewright.rope(*cut(x), cos, sin, inplace=True)
        for got, expected in zip(cut(x), want, strict=True):
            assert torch.equal(got, expected)

    parts(torch.randn(2, 6, 5, 16), lambda x: (x[:, :4], x[:, 4:]))
    parts(torch.randn(2, 5, 6, 16), lambda x: (x[:, :, :4].transpose(1, 2), x[:, :, 4:].transpose(1, 2)))
    parts(torch.randn(2, 2, 3, 5, 16), lambda x: (x[0], x[1]))
    parts(torch.randn(2, 3, 5, 32), lambda x: (x[..., :16], x[..., 16:]))
    parts(torch.randn(2, 3, 10, 16), lambda x: (x[:, :, 0::2], x[:, :, 1::2]))
    parts(torch.randn(1, 5, 6, 16), lambda x: (x[:, :, :5].transpose(1, 2), x[:, :, 5:].transpose(1, 2)))


@pytest.mark.parametrize("interleaved", [False, True])
def test_gradients(interleaved: bool, dtype: torch.dtype) -> None:
    cos, sin = tilewright.rope_tables(
        10000.0, 8, 9, {"type": "yarn", "factor": 2, "original_max_position_embeddings": 4}
    )
    positions = torch.tensor([[1, 8, 0], [5, 2, 2]])
    q = torch.randn(2, 3, 3, 10, dtype=torch.float64, requires_grad=True)
    k = torch.randn(2, 1, 3, 10, dtype=torch.float64, requires_grad=True)

    def f(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return tilewright.rope(q, k, cos, sin, positions=positions, interleaved=interleaved)

    assert torch.autograd.gradcheck(f, (q, k))
    assert torch.autograd.gradgradcheck(f, (q, k))
    # The error rule for the 32 and 16 bit kernels, in the backward.
    leaf, up = q.detach().to(dtype).requires_grad_(), torch.randn_like(q).to(dtype)
    grad = torch.autograd.grad(f(leaf, k.detach().to(dtype))[0], leaf, up)[0]
    ref = torch.autograd.grad(f(q, k)[0], q, up.double())[0]
    plain = torch.autograd.grad(naive(leaf, cos, sin, positions, interleaved), leaf, up)[0]
    assert_close(grad, ref, plain, dtype)


def test_inplace_and_autograd() -> None:
    kwargs = arguments()
    with pytest.raises(ValueError, match="inplace=True needs tensors without gradient"):
        tilewright.rope(**{**kwargs, "q": kwargs["q"].requires_grad_()}, inplace=True)
    with torch.no_grad():
        tilewright.rope(**kwargs, inplace=True)
    with pytest.raises(NotImplementedError, match="cos and sin have no gradient"):
        tilewright.rope(**{**kwargs, "cos": kwargs["cos"].requires_grad_()})
    kwargs = arguments()
    saved = kwargs["q"].clone()
    loss = (saved * torch.randn(2, 4, 3, 16, requires_grad=True)).sum()
    tilewright.rope(**{**kwargs, "q": saved}, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with torch.inference_mode():
        kwargs = arguments()
        assert tilewright.rope(**kwargs, inplace=True)[0] is kwargs["q"]


def test_float64_runs_the_reference() -> None:
    kwargs = arguments()
    wide = {**kwargs, "q": kwargs["q"].double(), "k": kwargs["k"].double()}
    ref = rope_reference(**wide)
    assert torch.equal(tilewright.rope(**wide)[0], ref[0]) and tilewright.last_impl("rope") == "reference"
    tilewright.rope(**wide, inplace=True)
    assert torch.equal(wide["k"], ref[1])


def test_registration() -> None:
    q, k, cos, sin = arguments().values()
    positions = torch.tensor([2, 0, 5])
    grad = q.requires_grad_(), k.requires_grad_(), cos, sin, positions, False, None, "auto"
    torch.library.opcheck(torch.ops.tilewright.rope, grad)
    plain = q.detach(), k.detach(), cos, sin, positions, True, 16, "auto"
    torch.library.opcheck(torch.ops.tilewright.rope_, plain)
    for q in (
        torch.randn(2, 3, 4, 16).transpose(1, 2),
        torch.randn(2, 4, 16, 3).transpose(2, 3),
        torch.randn(5, 4, 3, 16)[::3],
    ):
        for dtype in (torch.float32, torch.float64):
            args = q.to(dtype), k.detach().to(dtype), cos, sin, None, False, None, "auto"
            torch.library.opcheck(torch.ops.tilewright.rope, args, test_utils="test_faketensor")


def test_compiles_whole() -> None:
    def f(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inplace: bool) -> tuple[Tensor, Tensor]:
        q, k = tilewright.rope(q * 2, k + 1, cos, sin, inplace=inplace)
        return q + 1, k

    args = tuple(arguments().values())
    for inplace in (False, True):
        compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
        for got, want in zip(compiled(*args, inplace), f(*args, False), strict=True):
            assert torch.equal(got, want)
    leaf = args[0].clone().requires_grad_()
    compiled(leaf, *args[1:], False)[0].square().sum().backward()
    want = torch.autograd.grad(f(leaf, *args[1:], False)[0].square().sum(), leaf)[0]
    torch.testing.assert_close(leaf.grad, want)
