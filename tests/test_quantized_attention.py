"""Attention to quantised KV caches against the float64 reference."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from cases import INF, NAN, allowed_keys, seeded
from compare import assert_same_bits
from test_quantized_kv import BITS, check, filled, random_kv

import tilewright
from tilewright import QuantizedKV, attention, kv_append
from tilewright.ops.attention import attention_reference

pytestmark = pytest.mark.usefixtures("one_thread_for_torch")


@dataclass(frozen=True)
class Case:
    name: str
    bits: int
    seq_q: int = 1
    seq_k: int = 70
    head_dim: int = 64
    group: int = 1
    kv_heads: int = 2
    batch: int = 1
    group_size: int = 32
    residual: int = 32

    def __str__(self) -> str:
        return self.name


# Blocks of 16 lanes, 32 codes, 64 keys of a tile, 256 of a prefill block and of a decode chunk.
LENGTHS = (1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 600)
CASES = [
    *(Case(f"{b}bits_keys_{n}_q{s}", b, s, n, 40, 2) for b in BITS for n in LENGTHS for s in (1, 5, 40)),
    *(Case(f"{b}bits_dim_{d}_group_{g}_q{s}", b, s, 150, d, g) for b in BITS for d in (1, 7, 64, 80, 128, 256, 512)
      for g in (1, 3, 5, 8) for s in (1, 2, 40)),
    *(Case(f"{b}bits_rows_{s}x{g}", b, s, 300, 48, g, 2, 2) for b in BITS
      for s, g in ((2, 1), (3, 5), (4, 4), (5, 3), (2, 8), (17, 1))),
    *(Case(f"4bits_group_size_{g}_residual_{r}_q{s}", 4, s, 500, 80, 3, group_size=g, residual=r)
      for g in (32, 64, 128) for r in (0, 1, 40, 700) for s in (1, 40)),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_error_rule(case: Case, dtype: torch.dtype) -> None:
    c, g = case, seeded(case.name)
    k, v = random_kv(c.batch, c.kv_heads, c.seq_k, c.head_dim, generator=g)
    q = torch.randn(c.batch, c.kv_heads * c.group, c.seq_q, c.head_dim, generator=g).to(dtype)
    kv = filled(k, v, c.bits, spare=3, group_size=c.group_size, residual=c.residual)
    check(q, kv, causal="bottom_right")


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("seq_q", [1, 4, 40])
@pytest.mark.parametrize(
    "name",
    ["plain", "top_left", "window", "window_both", "mask", "float_mask", "bias", "alibi", "softcap", "sinks", "all"],
)
def test_every_score_option(name: str, bits: int, seq_q: int, dtype: torch.dtype) -> None:
    g = seeded(f"{name}{bits}{seq_q}")
    k, v = random_kv(2, 2, 330, 48, generator=g)
    q = torch.randn(2, 6, seq_q, 48, generator=g).to(dtype)
    hidden = torch.rand(2, 1, seq_q, 330, generator=g) < 0.4
    bias = torch.randn(6, seq_q, 330, generator=g)
    slopes, sinks = torch.rand(6, generator=g) * 0.1, torch.randn(6, generator=g)
    options = {
        "plain": {},
        "top_left": {"causal": "top_left"},
        "window": {"causal": "bottom_right", "window": (70, -1)},
        "window_both": {"window": (20, 3)},
        "mask": {"mask": ~hidden},
        "float_mask": {"mask": torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -INF)},
        "bias": {"bias": bias.to(dtype)},
        "alibi": {"alibi_slopes": slopes, "causal": "bottom_right"},
        "softcap": {"softcap": 2.0, "scale": 0.5},
        "sinks": {"sinks": sinks},
        "all": {"causal": "bottom_right", "window": (200, -1), "mask": ~hidden, "bias": bias, "alibi_slopes": slopes,
                "softcap": 10.0, "sinks": sinks, "scale": 0.2},
    }[name]  # fmt: skip
    check(q, filled(k, v, bits), **options)


@pytest.mark.parametrize("bits", BITS)
def test_keys_with_a_large_channel(bits: int, dtype: torch.dtype) -> None:
    """A channel that all keys share a large number in, as models with biased keys have."""
    k, v = random_kv(1, 2, 200, 64)
    k[..., 5] += 60
    q = torch.randn(1, 8, 1, 64).to(dtype)
    q[..., 5] *= 0.1
    check(q, filled(k, v, bits))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("seq_q", [1, 3, 40])
@pytest.mark.parametrize("seq_k", [1, 17, 33, 64, 65, 129, 257, 600])
def test_each_key_is_found(bits: int, seq_q: int, seq_k: int, dtype: torch.dtype) -> None:
    """With one dominant key the output is that key's dequantised value, wherever the key lies."""
    marks = (0, 16, 32, 64, 96, 128, 256, 512, seq_k - 64, seq_k - 32, seq_k)
    borders = sorted({p for b in marks for p in (b - 1, b, b + 1) if 0 <= p < seq_k})
    k = torch.zeros(len(borders), 1, seq_k, 8)
    for batch, position in enumerate(borders):
        k[batch, 0, position] = 100
    v = torch.randn(1, 1, seq_k, 16)[..., :8].expand(len(borders), -1, -1, -1)
    kv = filled(k, v, bits)
    out = attention(torch.ones(len(borders), 2, seq_q, 8, dtype=dtype), kv)
    values = kv.dequantize()[1]
    expected = torch.stack([values[i, 0, p] for i, p in enumerate(borders)])[:, None, None].expand(out.shape)
    # Fixed point holds the one weight to 2^-16 for bf16 queries, else to 2^-22.
    tolerance = {torch.bfloat16: 2**-8, torch.float16: 2**-10, torch.float32: 2**-20}[dtype]
    torch.testing.assert_close(out.double(), expected.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("bits", BITS)
def test_long_cache(bits: int, dtype: torch.dtype) -> None:
    k, v = random_kv(1, 1, 5000, 32)
    check(torch.randn(1, 4, 1, 32).to(dtype), filled(k, v, bits))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("seq_q", [1, 3, 40])
def test_attention_has_the_same_bits_for_any_threads(bits: int, seq_q: int, dtype: torch.dtype, same_bits) -> None:
    kv = filled(*random_kv(2, 3, 700, 72), bits)
    q = torch.randn(2, 9, seq_q, 72).to(dtype)
    same_bits(lambda: attention(q, kv, causal="bottom_right", return_lse=True))


@pytest.mark.parametrize("bits", BITS)
def test_prefill_equals_the_plain_kernel_on_dequantised_values(bits: int, dtype: torch.dtype) -> None:
    kv = filled(*random_kv(2, 2, 333, 56), bits)
    q = torch.randn(2, 6, 40, 56).to(dtype)
    # Only bf16 products round the dequantised values.
    wide = torch.bfloat16 if dtype == torch.bfloat16 and tilewright.isa() in ("avx512bf16", "amx") else torch.float32
    k, v = (x.to(wide) for x in kv.dequantize())
    assert_same_bits(attention(q, kv), attention(q.to(wide), k, v).to(dtype))


# --- NaN, infinity, what lies outside ---


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("seq_q", [1, 40])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("position", [0, 40, 149])
def test_nan_shows(bits: int, seq_q: int, value: float, position: int) -> None:
    k, v = random_kv(1, 2, 150, 16)
    q = torch.randn(1, 4, seq_q, 16)
    bad = k.clone()
    bad[0, 0, position, 3] = value
    kv = filled(bad, v, bits)
    out, lse = attention(q, kv, return_lse=True)
    if bits == 4 and position == 149 and math.isinf(value):  # in the tail an infinity is a number like others
        assert torch.equal(out.isnan(), attention_reference(q, *kv.dequantize())[0].isnan())
    else:
        assert out[:, :2].isnan().all() and lse[:, :2].isnan().all()
    assert out[:, 2:].isfinite().all() and lse[:, 2:].isfinite().all()
    bad = v.clone()
    bad[0, 0, position, 3] = value
    out = attention(q, filled(k, bad, bits))
    assert not out[:, :2, :, 3].isfinite().any() and out[:, 2:].isfinite().all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("seq_q", [1, 40])
def test_keys_that_nobody_attends_do_not_leak(bits: int, seq_q: int) -> None:
    k, v = random_kv(1, 2, 260, 24)
    q = torch.randn(1, 4, seq_q, 24)
    dead = torch.zeros(260, dtype=torch.bool)
    dead[96:160] = True  # whole groups, so that a NaN scale is theirs alone
    dead[259] = True
    mask = (~dead).expand(1, 1, seq_q, 260)
    clean = attention(q, filled(k, v, bits), mask=mask, return_lse=True)
    for value in (NAN, INF):
        bad = [x.masked_fill(dead.view(-1, 1), value) for x in (k, v)]
        for a, b in zip(clean, attention(q, filled(*bad, bits), mask=mask, return_lse=True), strict=True):
            assert_same_bits(a, b)
    # A window is the same without a mask.
    bad = [x.clone() for x in (k, v)]
    for x in bad:
        x[:, :, :64] = NAN
    out = attention(q, filled(*bad, bits), window=(100, 0))
    assert_same_bits(out, attention(q, filled(k, v, bits), window=(100, 0)))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("seq_q", [1, 40])
def test_what_lies_behind_the_last_token_does_not_leak(bits: int, seq_q: int) -> None:
    k, v = random_kv(1, 2, 200, 24)
    q = torch.randn(1, 4, seq_q, 24)
    for length in (1, 50, 129, 170):
        kv = filled(torch.full_like(k, NAN), torch.full_like(v, NAN), bits)
        kv.reset()
        assert kv.length == 0
        kv_append(kv, k[:, :, :length], v[:, :, :length])
        fresh = filled(k[:, :, :length], v[:, :, :length], bits)
        assert_same_bits(attention(q, kv), attention(q, fresh))


def test_nan_query_stays_its_own_row() -> None:
    for bits in BITS:
        kv = filled(*random_kv(1, 1, 90, 16), bits)
        q = torch.randn(1, 3, 2, 16)
        q[0, 1, 0, 4] = NAN
        nan = attention(q, kv).isnan()
        assert nan[0, 1, 0].all() and nan.sum() == 16


@pytest.mark.parametrize("bits", BITS)
def test_empty(bits: int, dtype: torch.dtype) -> None:
    kv = QuantizedKV.empty(2, 2, 10, 16, bits)
    for seq_q in (0, 1, 40):
        out, lse = attention(torch.randn(2, 4, seq_q, 16).to(dtype), kv, return_lse=True)
        assert (out == 0).all() and (lse == -INF).all() and out.shape == (2, 4, seq_q, 16)
    assert kv_append(kv, torch.randn(2, 2, 0, 16), torch.randn(2, 2, 0, 16)).length == 0
    nobody = QuantizedKV.empty(0, 2, 10, 16, bits)
    assert attention(torch.randn(0, 4, 1, 16), nobody).shape == (0, 4, 1, 16)
    allowed = allowed_keys(1, 1, 40, 5, {"causal": "bottom_right"})
    kv = filled(*random_kv(1, 1, 5, 16), bits)
    out = attention(torch.randn(1, 1, 40, 16), kv, causal="bottom_right")
    assert torch.equal((out == 0).all(-1), ~allowed.any(-1))
