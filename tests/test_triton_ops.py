"""Triton's norms, activations, rope and appends: against the references, and rope and appends bit for bit against the
CPU."""

from __future__ import annotations

import pytest
import torch
from cases import seeded
from compare import assert_close, assert_same_bits
from torch import Tensor
from triton_device import DTYPES, INTERPRETED, running

import tilewright
from tilewright.ops.activation import gelu_mul_reference, silu_mul_reference
from tilewright.ops.kv_append import kv_append_reference
from tilewright.ops.norm import norm_reference

F = torch.nn.functional
FLOATS = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def rand(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=seeded(name + str(shape))).to(dtype)


# (shape, whether the rows lie one after the other)
SHAPES = [
    ((1,), True),
    ((3, 7), True),
    ((2, 3, 130), True),
    ((2, 3, 4, 48), False),
    ((70, 64), False),
    ((2, 4200), True),
]


def strided(name: str, shape: tuple[int, ...], contiguous: bool, dtype: torch.dtype) -> Tensor:
    if contiguous:
        return rand(name, *shape, dtype=dtype)
    if len(shape) == 4:  # (batch, seq, heads, dim) seen as (batch, heads, seq, dim)
        return rand(name, shape[0], shape[2], shape[1], shape[3], dtype=dtype).transpose(1, 2)
    return rand(name, *shape[:-1], 2 * shape[-1] + 8, dtype=dtype)[..., 8 : 8 + shape[-1]]


@FLOATS
@pytest.mark.parametrize(("shape", "contiguous"), SHAPES, ids=str)
def test_activations(shape: tuple[int, ...], contiguous: bool, dtype: torch.dtype) -> None:
    gate, up = (strided(name, shape, contiguous, dtype) for name in ("gate", "up"))
    for name, ours, reference, naive in (
        ("silu", tilewright.silu_mul, silu_mul_reference, lambda g, u: F.silu(g) * u),
        ("gelu", tilewright.gelu_mul, gelu_mul_reference, lambda g, u: F.gelu(g) * u),
        ("tanh", lambda g, u, **kw: tilewright.gelu_mul(g, u, "tanh", **kw),
         lambda g, u: gelu_mul_reference(g, u, "tanh"), lambda g, u: F.gelu(g, approximate="tanh") * u),
    ):  # fmt: skip
        with running():
            out = ours(gate, up, backend="triton")
        assert_close(out, reference(gate, up), naive(gate, up), dtype)
        assert tilewright.last_impl("silu_mul" if name == "silu" else "gelu_mul") == "triton"


def naive_norm(x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, centred: bool) -> Tensor:
    x = x if residual is None else x + residual
    if centred:
        x = x - x.mean(-1, keepdim=True)
    out = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)
    out = out if weight is None else out * weight.to(x.dtype)
    return out if bias is None else out + bias.to(x.dtype)


@FLOATS
@pytest.mark.parametrize("centred", (False, True), ids=("rms", "layer"))
@pytest.mark.parametrize(("shape", "contiguous"), [*SHAPES, ((2, 8500), True)], ids=str)
def test_norms(shape: tuple[int, ...], contiguous: bool, centred: bool, dtype: torch.dtype) -> None:
    x, residual = (strided(name, shape, contiguous, dtype) for name in ("x", "residual"))
    weight, bias = rand("weight", shape[-1]), rand("bias", shape[-1]) if centred else None
    with running():
        if centred:
            out, total = tilewright.layer_norm(x, weight, bias, 1e-5, residual=residual, backend="triton")
            plain = tilewright.layer_norm(x, None, None, 1e-5, backend="triton")
        else:
            out, total = tilewright.rms_norm(x, weight, 1e-5, residual=residual, backend="triton")
            plain = tilewright.rms_norm(x, None, 1e-5, backend="triton")
    expected, expected_total = norm_reference(x, residual, weight, bias, 1e-5, centred)
    assert_same_bits(total, expected_total)
    assert_close(out, expected, naive_norm(x, residual, weight, bias, centred), dtype)
    assert_close(
        plain, norm_reference(x, None, None, None, 1e-5, centred)[0], naive_norm(x, None, None, None, centred), dtype
    )


COS, SIN = tilewright.rope_tables(10000.0, 48, 40)


@FLOATS
@pytest.mark.parametrize("interleaved", (False, True), ids=("halves", "interleaved"))
@pytest.mark.parametrize("head_dim", (48, 80))
@pytest.mark.parametrize("inplace", (False, True), ids=("new", "inplace"))
def test_rope_has_the_cpus_bits(inplace: bool, head_dim: int, interleaved: bool, dtype: torch.dtype) -> None:
    q = rand("q", 2, 7, 6, head_dim, dtype=dtype).transpose(1, 2)
    k = rand("k", 2, 2, 7, head_dim, dtype=dtype)
    for positions in (None, torch.tensor([3, 0, 39, 5, 5, 6, 1]), torch.arange(14).view(2, 7)):
        options = {"positions": positions, "interleaved": interleaved}
        expected = tilewright.rope(q, k, COS, SIN, **options)
        with running():
            a, b = q.clone(), k.clone()
            found = tilewright.rope(a, b, COS, SIN, **options, inplace=inplace, backend="triton")
        for x, y, given in zip(found, expected, (a, b), strict=True):
            assert_same_bits(x, y)
            assert (x is given) == inplace


def test_rope_beyond_the_tables_is_nan() -> None:
    q, k = rand("q", 1, 2, 3, 48), rand("k", 1, 1, 3, 48)
    with running():
        out, _ = tilewright.rope(q, k, COS, SIN, positions=torch.tensor([0, 40, -1]), backend="triton")
    assert out.isnan().all(-1)[0].tolist() == [[False, True, True]] * 2


TABLE = torch.tensor([[0, 3, 2], [1, 5, 5], [6, 4, 1]], dtype=torch.int32)
SLOTS = {
    "in order": {},
    "positions": {"positions": torch.tensor([4, 0, 1, 1, 5])},
    "positions of each": {"positions": torch.tensor([[4, 0, 1, 2, 5], [0, 0, 0, 3, 3], [5, 4, 3, 2, 1]])},
    "lengths": {"cache_seqlens": torch.tensor([1, 0, 2], dtype=torch.int32)},
    "pages": {"block_table": TABLE},
    "pages by length": {"block_table": TABLE, "cache_seqlens": torch.tensor([1, 4, 7])},
    "pages by position": {"block_table": TABLE, "positions": torch.tensor([0, 3, 3, 6, 10])},
}


def caches(paged: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    shape = (7, 2, 4) if paged else (3, 2, 7)
    return rand("cache_k", *shape, 48, dtype=dtype), rand("cache_v", *shape, 20, dtype=dtype)


@FLOATS
@pytest.mark.parametrize("where", SLOTS)
def test_kv_append(where: str, dtype: torch.dtype) -> None:
    slots = SLOTS[where]
    k, v = rand("k", 3, 5, 2, 48, dtype=dtype).transpose(1, 2), rand("v", 3, 2, 5, 20, dtype=dtype)
    for cache_dtype in (dtype, torch.float32):
        cache_k, cache_v = caches("block_table" in slots, cache_dtype)
        expected = kv_append_reference(cache_k, cache_v, k, v, **slots)
        with running():
            tilewright.kv_append(cache_k, cache_v, k, v, **slots, backend="triton")
        assert_same_bits(cache_k, expected[0])
        assert_same_bits(cache_v, expected[1])


def test_what_has_no_slot_is_not_written() -> None:
    k, v = rand("k", 3, 2, 5, 48), rand("v", 3, 2, 5, 20)
    for paged, slots in (
        (False, {"positions": torch.tensor([0, -1, 7, 2**40, 1])}),
        (True, {"positions": torch.tensor([0, -1, 12, 2**40, 1]), "block_table": torch.where(TABLE == 6, 7, TABLE)}),
    ):
        cache_k, cache_v = caches(paged, torch.float32)
        wanted = [cache_k.clone(), cache_v.clone()]
        for b in range(2 if paged else 3):  # the third sequence's first page does not exist
            for t, slot in ((0, 0), (4, 1)):
                wanted[0][int(TABLE[b, 0]) if paged else b, :, slot] = k[b, :, t]
                wanted[1][int(TABLE[b, 0]) if paged else b, :, slot] = v[b, :, t]
        with running():
            tilewright.kv_append(cache_k, cache_v, k, v, **slots, backend="triton")
        assert_same_bits(cache_k, wanted[0])
        assert_same_bits(cache_v, wanted[1])


@FLOATS
@pytest.mark.parametrize("where", ("in order", "lengths", "pages by length"))
def test_rope_append_is_rope_and_append(where: str, dtype: torch.dtype) -> None:
    from tilewright.triton_kernels.rope import rope_append

    slots = SLOTS[where]
    q, k = rand("q", 3, 6, 5, 48, dtype=dtype), rand("k", 3, 2, 5, 48, dtype=dtype)
    v = rand("v", 3, 2, 5, 20, dtype=dtype)
    start = slots.get("cache_seqlens", torch.zeros(3, dtype=torch.int64)).long().unsqueeze(1)
    for interleaved, dim in ((False, 48), (True, 32)):
        cos, sin = COS[:, : dim // 2].contiguous(), SIN[:, : dim // 2].contiguous()
        rotated = tilewright.rope(q, k, cos, sin, positions=start + torch.arange(5), interleaved=interleaved)
        cache_k, cache_v = caches("block_table" in slots, torch.float32)
        expected = kv_append_reference(cache_k, cache_v, rotated[1], v, **slots)
        given = q.clone()
        with running():
            out = rope_append(given, k, v, cos, sin, cache_k, cache_v, **slots, interleaved=interleaved)
            rope_append(given, k, v, cos, sin, cache_k, cache_v, **slots, interleaved=interleaved, out=given)
        for a, b in ((out, rotated[0]), (given, rotated[0]), (cache_k, expected[0]), (cache_v, expected[1])):
            assert_same_bits(a, b)


def test_empty() -> None:
    with running():
        assert tilewright.silu_mul(torch.empty(0, 4), torch.empty(0, 4), backend="triton").shape == (0, 4)
        assert tilewright.rms_norm(torch.empty(3, 0), None, 1e-5, backend="triton").shape == (3, 0)
        q, k = tilewright.rope(torch.empty(2, 0, 3, 48), rand("k", 2, 1, 3, 48), COS, SIN, backend="triton")
        assert q.shape == (2, 0, 3, 48) and k.isfinite().all()
        cache = torch.zeros(1, 2, 4, 8)
        tilewright.kv_append(cache, cache.clone(), cache[:, :, :0], cache[:, :, :0], backend="triton")


@pytest.mark.skipif(INTERPRETED, reason="torch.compile compiles, which Triton's interpreter does not allow")
@pytest.mark.compiles
def test_under_torch_compile() -> None:
    def f(x: Tensor, y: Tensor) -> Tensor:
        return tilewright.rms_norm(tilewright.silu_mul(x, y, backend="triton"), None, 1e-5, backend="triton") * 2

    x, y = rand("x", 3, 64), rand("y", 3, 64)
    torch.compiler.reset()
    with running():
        eager = f(x, y)
        assert_same_bits(torch.compile(f, fullgraph=True)(x, y), eager)


REJECTED = {
    "shapes": (lambda: tilewright.silu_mul(torch.ones(3), torch.ones(4), backend="triton"), "one shape and dtype"),
    "dtype": (lambda: tilewright.silu_mul(torch.ones(3).int(), torch.ones(3).int(), backend="triton"), "float16, got"),
    "weight": (lambda: tilewright.rms_norm(torch.ones(3), torch.ones(4), 1e-5, backend="triton"), "weight must be"),
    "residual": (
        lambda: tilewright.rms_norm(torch.ones(3), None, 1e-5, residual=torch.ones(4), backend="triton"),
        "residual must have",
    ),
    "rope tables": (
        lambda: tilewright.rope(torch.ones(1, 1, 41, 48), torch.ones(1, 1, 41, 48), COS, SIN, backend="triton"),
        "must reach 41",
    ),
    "rope dims": (
        lambda: tilewright.rope(torch.ones(1, 1, 4, 40), torch.ones(1, 1, 4, 40), COS, SIN, backend="triton"),
        "rotary_dim must be",
    ),
    "positions": (
        lambda: tilewright.rope(
            torch.ones(1, 1, 4, 48), torch.ones(1, 1, 4, 48), COS, SIN, positions=torch.arange(3), backend="triton"
        ),
        "positions must be int64",
    ),
    "cache": (
        lambda: tilewright.kv_append(
            torch.ones(1, 2, 4, 8), torch.ones(1, 2, 4, 8), torch.ones(1, 3, 1, 8), torch.ones(1, 3, 1, 8),
            backend="triton",
        ),
        "k must be",
    ),
    "backend": (lambda: tilewright.silu_mul(torch.ones(3), torch.ones(3), backend="gpu"), "backend must be one of"),
}  # fmt: skip


@pytest.mark.parametrize("name", REJECTED)
def test_rejected(name: str) -> None:
    call, message = REJECTED[name]
    with running(), pytest.raises(ValueError, match=message):
        call()
