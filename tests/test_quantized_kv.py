"""The quantised KV cache: its codes against a plain quantiser, and the object."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from cases import assert_ran_natively, naive_attention
from compare import assert_close, assert_same_bits
from torch import Tensor

import tilewright
from tilewright import QuantizedKV, attention, kv_append
from tilewright.ops.attention import attention_reference

BITS = (8, 4)

pytestmark = pytest.mark.usefixtures("one_thread_for_torch")


def filled(k: Tensor, v: Tensor, bits: int, spare: int = 0, **options: int) -> QuantizedKV:
    """A cache of the tokens of k and v with room for `spare` more."""
    batch, heads, seq, dim = k.shape
    return kv_append(QuantizedKV.empty(batch, heads, seq + spare, dim, bits, **options), k, v)


def random_kv(*shape: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def check(q: Tensor, kv: QuantizedKV, **options: object) -> None:
    """The error rule: naive is the same maths in q's dtype on the dequantised values."""
    out, lse = attention(q, kv, return_lse=True, **options)
    assert_ran_natively("attention")
    k, v = kv.dequantize()
    ref, ref_lse = attention_reference(q, k, v, **options)
    naive, naive_lse = naive_attention(q, k.to(q.dtype), v.to(q.dtype), **options)
    assert_close(out, ref, naive, q.dtype)
    assert lse.dtype == torch.float32
    assert_close(lse.to(q.dtype), ref_lse, naive_lse, q.dtype)


# --- codes ---


def plain_8(x: Tensor) -> tuple[Tensor, Tensor]:
    """(codes, x as the codes have it): one scale for each token and head."""
    x = x.float()
    scale = x.abs().amax(-1, keepdim=True) / 127
    codes = torch.where(scale > 0, (x / scale).round(), torch.zeros_like(x)).to(torch.int8)
    return codes, codes * scale


def plain_4(x: Tensor, dim: int, size: int) -> tuple[Tensor, Tensor]:
    """The same with a scale and a minimum for each `size` elements along `dim`."""
    codes, values = torch.empty(x.shape, dtype=torch.uint8), torch.empty(x.shape)
    for start in range(0, x.shape[dim], size):
        part = x.narrow(dim, start, min(size, x.shape[dim] - start)).float()
        low, high = part.amin(dim, keepdim=True), part.amax(dim, keepdim=True)
        scale = ((high - low) / 15).bfloat16().float()
        code = torch.where(scale > 0, ((part - low) / scale).round().clamp(0, 15), torch.zeros_like(part))
        codes.narrow(dim, start, part.shape[dim]).copy_(code)
        values.narrow(dim, start, part.shape[dim]).copy_(code * scale + low)
    return codes, values


def plain_tail(length: int, group_size: int, residual: int) -> int:
    """How many tokens are codes."""
    return max(0, length - residual) // group_size * group_size


@pytest.mark.parametrize("seq", [1, 31, 32, 33, 64, 65, 200])
@pytest.mark.parametrize("dim", [1, 7, 64, 80, 200])
def test_codes_of_8_bits(seq: int, dim: int, dtype: torch.dtype) -> None:
    k, v = (x.to(dtype) for x in random_kv(2, 3, seq, dim))
    k[0, 0, 0] = 0
    kv = filled(k, v, 8, spare=7)
    for codes, values, x in zip(kv.codes(), kv.dequantize(), (k, v), strict=True):
        expected, expected_values = plain_8(x)
        assert torch.equal(codes, expected)
        assert_same_bits(values, expected_values)
    assert kv.length == seq and kv.max_len == seq + 7


@pytest.mark.parametrize("group_size, residual", [(32, 32), (32, 0), (32, 5), (64, 128), (128, 1)])
@pytest.mark.parametrize("seq, dim", [(1, 7), (32, 64), (63, 1), (64, 80), (65, 33), (300, 80), (300, 200)])
def test_codes_of_4_bits(seq: int, dim: int, group_size: int, residual: int, dtype: torch.dtype) -> None:
    k, v = (x.to(dtype) for x in random_kv(2, 2, seq, dim))
    k[0, 0] = 1.5  # no range
    kv = filled(k, v, 4, group_size=group_size, residual=residual)
    n = plain_tail(seq, group_size, residual)
    (k_codes, v_codes), (k_values, v_values) = kv.codes(), kv.dequantize()
    k, v = k.bfloat16(), v.bfloat16()
    for codes, values, x, along in ((k_codes, k_values, k, 2), (v_codes, v_values, v, 3)):
        expected, expected_values = plain_4(x[:, :, :n], along, group_size)
        assert torch.equal(codes, expected)
        assert torch.equal(values[:, :, :n], expected_values)
        assert torch.equal(values[:, :, n:], x[:, :, n:].float())
    assert kv.length == seq


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("steps", [[1] * 170, [100, 1, 1, 68], [0, 33, 31, 64, 42], [169, 1]], ids=str)
def test_how_tokens_are_appended_does_not_matter(bits: int, steps: list[int]) -> None:
    k, v = random_kv(2, 2, 170, 40)
    at_once = filled(k, v, bits)
    kv, position = QuantizedKV.empty(2, 2, 170, 40, bits), 0
    for n in steps:
        assert kv_append(kv, k[:, :, position : position + n], v[:, :, position : position + n]) is kv
        position += n
        assert kv.length == position
    for a, b in zip(kv.tensors()[:4], at_once.tensors()[:4], strict=True):
        assert_same_bits(a, b)
    for a, b in zip(kv.dequantize(), at_once.dequantize(), strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("bits", BITS)
def test_append_has_the_same_bits_for_any_threads(bits: int, same_bits) -> None:
    k, v = random_kv(3, 2, 300, 72)
    same_bits(lambda: filled(k, v, bits).tensors())


@pytest.mark.parametrize("bits", BITS)
def test_strided_tokens(bits: int) -> None:
    k, v = (torch.randn(2, 50, 3, 24).transpose(1, 2) for _ in "kv")
    last = torch.randn(2, 3, 24, 50).transpose(2, 3)
    for a, b in ((k, v), (last, k)):
        for x, y in zip(
            filled(a, b, bits).tensors(), filled(a.contiguous(), b.contiguous(), bits).tensors(), strict=True
        ):
            assert_same_bits(x, y)


# --- the object ---


@pytest.mark.parametrize("bits", BITS)
def test_copies(bits: int) -> None:
    kv = filled(*random_kv(1, 2, 100, 32), bits, spare=5)
    q = torch.randn(1, 4, 1, 32)
    expected = attention(q, kv)
    buffer = io.BytesIO()
    torch.save(kv, buffer)
    buffer.seek(0)
    copies = (copy.deepcopy(kv), pickle.loads(pickle.dumps(kv)), torch.load(buffer, weights_only=False))
    kv_append(kv, *random_kv(1, 2, 5, 32))
    for other in copies:
        assert other.length == 100 and kv.length == 105
        assert_same_bits(attention(q, other), expected)
    assert kv.to("cpu") is kv and kv.to("meta").device.type == "meta"


def test_memory() -> None:
    plain = 2 * 8 * 16384 * 128 * 2
    assert QuantizedKV.empty(1, 8, 16384, 128, 8).nbytes < plain * 0.52
    assert QuantizedKV.empty(1, 8, 16384, 128, 4).nbytes < plain * 0.32


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("to", [0, 1, 31, 32, 50, 64, 65, 99, 100, 200, -1, -30, -200])
def test_crop(bits: int, to: int) -> None:
    k, v = random_kv(1, 2, 100, 24)
    kv = filled(k, v, bits, spare=60)
    before = kv.dequantize()
    kv.crop(to)
    length = min(100, to) if to >= 0 else max(0, 100 + to)
    assert kv.length == length
    for a, b in zip(kv.dequantize(), before, strict=True):
        # 4 bits: tokens of a cut group are bf16 again
        torch.testing.assert_close(a, b[:, :, :length], rtol=2**-8 if bits == 4 else 0, atol=0)
    more = random_kv(1, 2, 60, 24)
    kv_append(kv, *more)
    assert kv.length == length + 60
    for a, x in zip(kv.dequantize(), more, strict=True):
        worst = (a[:, :, length:] - x).abs().max()
        assert worst < (0.02 if bits == 8 else 0.3)
    check(torch.randn(1, 2, 1, 24), kv)


@pytest.mark.parametrize("bits", BITS)
def test_reference_backend_and_float64(bits: int) -> None:
    kv = filled(*random_kv(1, 2, 60, 16), bits)
    q = torch.randn(1, 4, 3, 16)
    ref, ref_lse = attention_reference(q, *kv.dequantize(), causal="bottom_right")
    out = attention(q, kv, causal="bottom_right", backend="reference")
    assert tilewright.last_impl("attention") == "reference"
    assert_same_bits(out, ref.float())
    wide, lse = attention(q.double(), kv, causal="bottom_right", return_lse=True)
    assert_same_bits(wide, ref)
    torch.testing.assert_close(lse, ref_lse.float())
    room = torch.empty_like(q)
    assert attention(q, kv, out=room) is room
    assert_same_bits(room, attention(q, kv))


def test_dropout() -> None:
    kv = filled(torch.zeros(1, 1, 4000, 8), torch.ones(1, 1, 4000, 8), 8)
    q = torch.randn(1, 1, 1, 8)
    torch.manual_seed(1)
    out = attention(q, kv, dropout_p=0.5)
    assert 0.9 < out.mean() < 1.1 and not torch.equal(out, attention(q, kv, dropout_p=0.5))


KV = QuantizedKV.empty(2, 2, 8, 16)
X = torch.randn(2, 2, 4, 16)


@pytest.mark.parametrize(
    "error, message, call",
    [
        (ValueError, "bits must be 4 or 8, got 3", lambda: QuantizedKV.empty(1, 1, 1, 8, 3)),
        (ValueError, "head_dim must be in [1, 512], got 0", lambda: QuantizedKV.empty(1, 1, 1, 0)),
        (ValueError, "head_dim must be in [1, 512], got 513", lambda: QuantizedKV.empty(1, 1, 1, 513)),
        (ValueError, "max_len must be a whole number >= 0, got -1", lambda: QuantizedKV.empty(1, 1, -1, 8)),
        (ValueError, "group_size must be one of (32, 64, 128), got 16",
         lambda: QuantizedKV.empty(1, 1, 1, 8, 4, group_size=16)),
        (ValueError, "residual must be a whole number >= 0", lambda: QuantizedKV.empty(1, 1, 1, 8, 4, residual=-2)),
        (ValueError, "room for max_len = 8 tokens and holds 0, got 9 more",
         lambda: kv_append(KV, torch.randn(2, 2, 9, 16), torch.randn(2, 2, 9, 16))),
        (ValueError, "k must be (batch, kv_heads, seq, head_dim) = (2, 2, seq, 16)",
         lambda: kv_append(KV, X[..., :8], X)),
        (ValueError, "v must be (batch, kv_heads, seq, head_dim)", lambda: kv_append(KV, X, X[:, :, :3])),
        (ValueError, "k must be (batch", lambda: kv_append(KV, X[:1], X[:1])),
        (ValueError, "k must be float32, bfloat16 or float16, got float64",
         lambda: kv_append(KV, X.double(), X.double())),
        (ValueError, "on one device", lambda: kv_append(KV, X.to("meta"), X)),
        (ValueError, "has no gradient", lambda: kv_append(KV, X.clone().requires_grad_(), X)),
        (ValueError, "positions, block_table and cache_seqlens do not apply",
         lambda: kv_append(KV, X, X, positions=torch.arange(4))),
        (TypeError, "call kv_append(quantized_kv, k, v)", lambda: kv_append(KV, X, X, X)),
        (TypeError, "k and v must be tensors", lambda: kv_append(KV, X)),
        (TypeError, "expected (cache_k, cache_v, k, v) or (quantized_kv, k, v)", lambda: kv_append(X, X, X)),
        (TypeError, "call attention(q, kv) without v", lambda: attention(X, KV, X)),
        (TypeError, "q, k and v must be tensors", lambda: attention(X, X)),
        (ValueError, "expected q (batch, heads, seq_q, head_dim)", lambda: attention(X[..., :8], KV)),
        (ValueError, "expected q (batch, heads, seq_q, head_dim)", lambda: attention(X[:1], KV)),
        (ValueError, "expected q (batch, heads, seq_q, head_dim)", lambda: attention(torch.randn(2, 3, 1, 16), KV)),
        (ValueError, "q must have a floating dtype", lambda: attention(X.int(), KV)),
        (ValueError, "mask must broadcast to (2, 2, 4, 0)",
         lambda: attention(X, KV, mask=torch.ones(4, 7, dtype=torch.bool))),
        (ValueError, "has no gradient", lambda: attention(X.clone().requires_grad_(), KV)),
        (ValueError, "out must be", lambda: attention(X, KV, out=X.half())),
    ],
)  # fmt: skip
def test_rejected(error: type[Exception], message: str, call) -> None:
    with pytest.raises(error) as raised:
        call()
    assert message in str(raised.value)
    assert KV.length == 0


def test_tampered_tensors_are_refused() -> None:
    kv = filled(*random_kv(1, 1, 5, 16), 8)
    q = torch.randn(1, 1, 1, 16)
    for change in ({"k_codes": kv.k_codes[..., :64]}, {"v_scales": kv.v_scales.half()}, {"counts": kv.counts + 1000}):
        broken = copy.copy(kv)
        for name, value in change.items():
            setattr(broken, name, value)
        with pytest.raises(ValueError, match="QuantizedKV"):
            attention(q, broken)


@pytest.mark.compiles
def test_registration() -> None:
    for bits in BITS:
        kv = filled(*random_kv(2, 2, 40, 16), bits, spare=40)
        options = (None, None, None, None, None, 0.25, 0.0, 2, -1, -1, 0.0)
        q = torch.randn(2, 4, 3, 16)
        torch.library.opcheck(torch.ops.tilewright.attention_quantized, (q, *kv.tensors(), *kv.spec(), *options))
        torch.library.opcheck(
            torch.ops.tilewright.kv_append_quantized, (*kv.tensors(), *kv.spec(), *random_kv(2, 2, 3, 16))
        )


@pytest.mark.compiles
@pytest.mark.parametrize("bits", BITS)
def test_compiles_whole(bits: int) -> None:
    def step(q: Tensor, kv: QuantizedKV, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        kv_append(kv, k * 2, v)
        return attention(q, kv, causal="bottom_right", return_lse=True)

    torch.compiler.reset()
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list):
        graphs.append(graph)
        return graph.forward

    k, v = random_kv(1, 2, 40, 16)
    eager, traced, counted = (filled(k, v, bits, spare=60) for _ in range(3))
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    recompiled = torch.compile(step, fullgraph=True, backend=backend)
    for _ in range(3):
        q, new = torch.randn(1, 4, 1, 16), random_kv(1, 2, 1, 16)
        expected = step(q, eager, *new)
        for a, b, c in zip(expected, compiled(q, traced, *new), recompiled(q, counted, *new), strict=True):
            assert_same_bits(a, b)
            assert_same_bits(a, c)
    assert traced.length == counted.length == 43
    assert len(graphs) == 1, "a longer cache must not compile anew"
