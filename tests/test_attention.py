"""Attention: the error rule over shapes and features, what may not leak, and which bits may not change."""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from buffers import assert_padding_intact, poisoned
from cases import (
    ATTENTION,
    INF,
    NAN,
    AttentionCase,
    allowed_keys,
    assert_ran_natively,
    attention_inputs,
    naive_attention,
)
from compare import assert_close, assert_same_bits
from torch import Tensor

from tilewright import attention
from tilewright.ops.attention import attention_cached, attention_reference

NORESERVE = 0x4000  # mmap.MAP_NORESERVE, which Python 3.11 does not name


pytestmark = pytest.mark.usefixtures("one_thread_for_torch")


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype)


@pytest.mark.parametrize("case", ATTENTION, ids=str)
def test_error_rule(case: AttentionCase, dtype: torch.dtype) -> None:
    tensors, options = attention_inputs(case, dtype)
    out, lse = attention(*tensors, return_lse=True, **options)
    assert_ran_natively("attention")
    ref, ref_lse = attention_reference(*tensors, **options)
    naive, naive_lse = naive_attention(*tensors, **options)
    assert_close(out, ref, naive, dtype)
    # lse is float32 for every dtype, but the scores' rounding is the dtype's
    assert lse.dtype == torch.float32
    assert_close(lse.to(dtype), ref_lse, naive_lse, dtype)
    if "sinks" not in options:
        nothing = ~allowed_keys(*out.shape[:3], tensors[1].shape[2], options).any(-1)
        assert (out[nothing] == 0).all() and (lse[nothing] == -INF).all()


@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("seq_q", [1, 40])
def test_float32_queries_meet_16_bit_caches(seq_q: int, kv_dtype: torch.dtype) -> None:
    q = random(2, 6, seq_q, 48)
    k, v = random(2, 2, 300, 48, dtype=kv_dtype), random(2, 2, 300, 48, dtype=kv_dtype)
    out = attention(q, k, v, causal="bottom_right")
    ref, _ = attention_reference(q, k, v, causal="bottom_right")
    naive, _ = naive_attention(q.to(kv_dtype), k, v, causal="bottom_right")
    assert out.dtype == torch.float32
    assert_close(out.to(kv_dtype), ref, naive, kv_dtype)


def test_reference_against_torch_and_by_hand() -> None:
    """The reference that everything else trusts: equal to torch where torch has the feature, and by hand elsewhere."""
    q, k, v = random(2, 6, 9, 8), random(2, 3, 14, 8), random(2, 3, 14, 5)
    mask, bias = torch.rand(2, 1, 9, 14) < 0.6, random(6, 9, 14)
    mask[..., 0] = True  # torch gives NaN to rows without keys
    wide = [t.double() for t in (q, k, v)]
    for ours, theirs in (
        ({}, {}),
        ({"causal": "top_left"}, {"is_causal": True}),
        ({"mask": mask, "scale": 0.7}, {"attn_mask": mask, "scale": 0.7}),
        ({"bias": bias}, {"attn_mask": bias.double()}),
    ):
        out, _ = attention_reference(q, k, v, **ours)
        torch.testing.assert_close(out, F.scaled_dot_product_attention(*wide, enable_gqa=True, **theirs))

    slopes, sinks = torch.rand(2, 6), random(6)
    options = {"causal": "bottom_right", "window": (6, -1), "bias": bias, "mask": mask, "softcap": 2.0, "scale": 0.9}
    out, lse = attention_reference(q, k, v, alibi_slopes=slopes, sinks=sinks, **options)
    for b, h, i in ((0, 0, 0), (0, 5, 8), (1, 2, 3), (1, 3, 7)):
        diagonal, weights, total = i + 14 - 9, [], math.exp(float(sinks[h]))
        for j in range(14):
            score = 2.0 * math.tanh(0.9 * float(wide[0][b, h, i] @ wide[1][b, h // 2, j]) / 2.0)
            score += float(bias[h, i, j]) - float(slopes[b, h]) * abs(j - diagonal)
            attended = diagonal - 6 <= j <= diagonal and bool(mask[b, 0, i, j])
            weights.append(math.exp(score) if attended else 0.0)
        total += sum(weights)
        expected = sum(w / total * wide[2][b, h // 2, j] for j, w in enumerate(weights))
        torch.testing.assert_close(out[b, h, i], expected)
        assert math.isclose(lse[b, h, i], math.log(total), rel_tol=1e-12)


# Needles: a dropped or doubled key hardly shows in random data.


@pytest.mark.parametrize("seq_q", [1, 3, 50])
@pytest.mark.parametrize("seq_k", [1, 17, 64, 65, 129, 257, 600])
def test_each_key_is_found(seq_q: int, seq_k: int, dtype: torch.dtype) -> None:
    """With one dominant key the output is that key's value, wherever the key lies."""
    borders = sorted({p for b in (0, 8, 16, 48, 64, 128, 256, 512, seq_k) for p in (b - 1, b, b + 1) if 0 <= p < seq_k})
    v = random(1, 1, seq_k, 16, dtype=dtype)
    q = torch.ones(len(borders), 1, seq_q, 8, dtype=dtype)
    k = torch.zeros(len(borders), 1, seq_k, 8, dtype=dtype)
    for batch, position in enumerate(borders):
        k[batch, 0, position] = 100
    out = attention(q, k, v.expand(len(borders), -1, -1, -1))
    assert torch.equal(out, v[0, :, borders].transpose(0, 1)[:, :, None].expand_as(out))


@pytest.mark.parametrize("last", [True, False], ids=["last_key", "first_key"])
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("seq_q, seq_k", [(1, 300), (4, 270), (49, 49), (130, 300), (300, 130), (16, 257)])
def test_staircase(seq_q: int, seq_k: int, group: int, last: bool, dtype: torch.dtype) -> None:
    """Scores that climb (or fall) steeply with the key: each row's output is its last (first) visible key's value, so
    every border of causality and window is seen from both sides."""
    v = random(1, 2, seq_k, 8, dtype=dtype)
    q = torch.ones(1, 2 * group, seq_q, 2, dtype=dtype)
    index = torch.arange(seq_k) if last else -torch.arange(seq_k)
    k = torch.stack([index // 16 * 16, index % 16], -1).mul(32).to(dtype).expand(1, 2, -1, -1)  # exact in bf16
    for causal in (None, "top_left", "bottom_right"):
        for window in ((-1, -1), (0, 0), (7, 9), (64, -1), (-1, 128)):
            allowed = allowed_keys(1, 2 * group, seq_q, seq_k, {"causal": causal, "window": window})[0, 0]
            some = allowed.any(-1)
            key = (allowed * torch.arange(1, seq_k + 1)).argmax(-1) if last else allowed.int().argmax(-1)
            expected = torch.where(some.view(-1, 1), v[0][:, key], 0).repeat_interleave(group, 0)[None]
            out = attention(q, k, v, causal=causal, window=window, scale=1.0)
            assert torch.equal(out, expected), (causal, window)


# NaN, infinities and memory that is not ours.

LEAK_CASES = [c for c in ATTENTION if c.name.startswith(("mask_", "window_", "rect_", "group_3"))]


@pytest.mark.parametrize("case", LEAK_CASES[::3], ids=str)
def test_keys_that_nobody_attends_do_not_leak(case: AttentionCase, dtype: torch.dtype) -> None:
    (q, k, v), options = attention_inputs(case, dtype)
    allowed = allowed_keys(*q.shape[:3], k.shape[2], options)
    dead = ~allowed.unflatten(1, (k.shape[1], -1)).any(2).any(2).unsqueeze(-1)
    clean = attention(q, k, v, return_lse=True, **options)
    for value in (NAN, INF):
        bad = [t.masked_fill(dead, value) for t in (k, v)]
        for a, b in zip(clean, attention(q, *bad, return_lse=True, **options), strict=True):
            assert_same_bits(a, b)


@pytest.mark.parametrize("case", LEAK_CASES[::3], ids=str)
def test_nan_reaches_whom_it_must(case: AttentionCase, dtype: torch.dtype) -> None:
    (q, k, v), options = attention_inputs(case, dtype)
    group, allowed = q.shape[1] // k.shape[1], allowed_keys(*q.shape[:3], k.shape[2], options)
    for key in (0, k.shape[2] // 2, k.shape[2] - 1):
        attends = allowed[:1, :group, :, key]  # batch 0, the heads that share KV head 0
        bad = k.clone()
        bad[0, 0, key] = NAN
        out, lse = attention(q, bad, v, return_lse=True, **options)
        expected = torch.zeros_like(lse, dtype=torch.bool)
        expected[:1, :group] = attends
        assert torch.equal(out.isnan().all(-1), expected) and torch.equal(out.isnan().any(-1), expected)
        assert torch.equal(lse.isnan(), expected), "a masked K leaked, or a NaN was lost"
        bad = v.clone()
        bad[0, 0, key] = NAN
        out = attention(q, k, bad, **options)
        assert out[:1, :group][attends].isnan().all(), "a NaN of V was lost"
        may = torch.zeros_like(expected)
        may[:1, :group] = attends.any()  # as in torch, it may reach other rows of a V that some row attends
        assert not out.isnan().any(-1)[~may].any()
    bad = q.clone()
    bad[0, 0, 0] = NAN
    nan = attention(bad, k, v, **options).isnan().any(-1)
    assert nan[0, 0, 0] == allowed[0, 0, 0].any() and nan.sum() == nan[0, 0, 0]


@pytest.mark.parametrize("dominant", [10, 69])
@pytest.mark.parametrize("seq_q", [1, 40])
def test_nan_in_a_value_whose_weight_vanishes(seq_q: int, dominant: int) -> None:
    """0 * NaN is NaN: an attended V is never dropped, however small its probability."""
    q, k, v = torch.ones(1, 1, seq_q, 4), torch.zeros(1, 1, 70, 4), random(1, 1, 70, 4)
    k[:, :, dominant] = 1000
    v[:, :, 3] = NAN
    ref, _ = attention_reference(q, k, v)
    assert ref.isnan().all()
    assert attention(q, k, v).isnan().all()


@pytest.mark.parametrize("seq_q", [1, 40])
def test_infinities(seq_q: int, dtype: torch.dtype) -> None:
    q, k, v = (random(1, 2, n, 16, dtype=dtype) for n in (seq_q, 150, 150))
    bias = torch.zeros(1, 2, 1, 150, dtype=dtype)
    for position, value in ((3, -INF), (140, -INF), (70, INF), (149, NAN)):
        bias[..., position] = value
        ref, _ = attention_reference(q, k, v, bias=bias)
        assert_close(attention(q, k, v, bias=bias), ref, naive_attention(q, k, v, bias=bias)[0], dtype)
    # values: +inf attended gives +inf, both signs NaN
    v[0, 0, 5], v[0, 1, 6], v[0, 1, 100] = INF, INF, -INF
    ref, _ = attention_reference(q, k, v)
    assert_close(attention(q, k, v), ref, naive_attention(q, k, v)[0], dtype)


@pytest.mark.parametrize("position", [0, 70, 149])
@pytest.mark.parametrize("seq_q", [1, 40])
def test_lse_of_an_infinite_score(seq_q: int, position: int) -> None:
    q, k, v = (random(1, 2, n, 16) for n in (seq_q, 150, 150))
    bias = torch.zeros(150)
    bias[position] = INF
    _, lse = attention(q, k, v, bias=bias, return_lse=True)
    assert (attention_reference(q, k, v, bias=bias)[1] == INF).all()
    assert (lse == INF).all(), lse.flatten()[:3]


@pytest.mark.parametrize("sink", [-INF, INF, 0.0, 1e4])
@pytest.mark.parametrize("seq_q, seq_k", [(1, 0), (1, 300), (20, 0), (20, 70)])
def test_extreme_sinks(seq_q: int, seq_k: int, sink: float) -> None:
    q, k, v = (random(1, 2, n, 16) for n in (seq_q, seq_k, seq_k))
    options = {"sinks": torch.tensor([sink, 0.5]), "causal": "bottom_right"}
    ref, ref_lse = attention_reference(q, k, v, **options)
    naive, naive_lse = naive_attention(q, k, v, **options)
    out, lse = attention(q, k, v, return_lse=True, **options)
    assert_close(out, ref, naive, torch.float32)
    assert_close(lse, ref_lse, naive_lse, torch.float32)


def test_huge_scores_do_not_overflow(dtype: torch.dtype) -> None:
    """Scores near 3e4: exp must never see them without the maximum taken off, fp16 sums must not be fp16."""
    q, k, v = (random(1, 2, n, 64, dtype=dtype) * s for n, s in ((33, 60), (200, 60), (200, 1)))
    for rows in (1, 33):
        ref, _ = attention_reference(q[:, :, :rows], k, v, scale=1.0)
        naive = naive_attention(q[:, :, :rows].float(), k.float(), v.float(), scale=1.0)[0].to(dtype)
        if dtype == torch.bfloat16:
            naive = naive_attention(q[:, :, :rows], k, v, scale=1.0)[0]
        assert_close(attention(q[:, :, :rows], k, v, scale=1.0), ref, naive, dtype)


@pytest.mark.parametrize("seq_q, head_dim", [(1, 33), (2, 8), (40, 33), (17, 64)])
def test_poisoned_surroundings(seq_q: int, head_dim: int, dtype: torch.dtype) -> None:
    """NaN around and between the rows of every input never shows, nothing outside of out is written."""
    q, k, v = (random(2, 4, n, head_dim, dtype=dtype) for n in (seq_q, 131, 131))
    options = {"causal": "bottom_right", "bias": random(2, 4, seq_q, 131, dtype=dtype)}
    mask = torch.rand(2, 4, seq_q, 131) < 0.7
    expected, lse = attention(q, k, v, mask=mask, return_lse=True, **options)
    options["bias"] = poisoned(options["bias"])
    out = poisoned(torch.zeros_like(expected))
    wide_mask = torch.zeros(2, 4, seq_q, 140, dtype=torch.bool)
    wide_mask[..., 3:134] = mask
    result, got = attention(
        *(poisoned(t) for t in (q, k, v)), mask=wide_mask[..., 3:134], return_lse=True, out=out, **options
    )
    assert result is out
    assert_same_bits(out, expected)
    assert_same_bits(got, lse)
    assert_padding_intact(out)


@pytest.mark.parametrize("head_dim", [1, 16, 17, 33, 48, 100])
def test_memory_that_another_call_left(head_dim: int, dtype: torch.dtype) -> None:
    """Packed operands are padded in memory that threads keep from call to call: NaN there must not show."""
    for seq_q, seq_k in ((1, 40), (20, 40), (33, 129), (48, 17)):
        q, k, v = (random(1, 2, n, head_dim, dtype=dtype) for n in (seq_q, seq_k, seq_k))
        expected = attention(q, k, v, return_lse=True)
        nan = torch.full((1, 2, 300, 256), NAN, dtype=dtype)
        assert attention(nan[:, :, : seq_q * 2], nan, nan).isnan().all()
        for out, same in zip(attention(q, k, v, return_lse=True), expected, strict=True):
            assert not out.isnan().any()
            assert_same_bits(out, same)


@pytest.mark.parametrize("seq_q", [1, 40])
def test_masks_and_biases_at_any_stride(seq_q: int) -> None:
    q, k, v = (random(2, 3, n, 16) for n in (seq_q, 70, 70))
    wide = random(2, 3, 70 * 2, seq_q + 3)
    strided = (
        wide[:, :, ::2, :seq_q].transpose(-1, -2),  # both dimensions strided
        wide[:, :, :70, 1 : seq_q + 1].transpose(-1, -2),
        wide[:1, :1, :70, :1].transpose(-1, -2).expand(2, 3, seq_q, 70),  # stride 0
        wide[..., :1, :1].expand(2, 3, seq_q, 70),
        wide.transpose(0, 1)[:1, :, :70, :seq_q].transpose(-1, -2).expand(2, -1, -1, -1)[:, :1],
    )
    for t in strided:
        for name, value in (("bias", t), ("bias", t.bfloat16()), ("bias", t.half()), ("mask", t > 0), ("mask", t)):
            out = attention(q, k, v, **{name: value})
            assert_same_bits(out, attention(q, k, v, **{name: value.contiguous()}))


def test_offsets_past_two_gibi_elements() -> None:
    """int would overflow: a row stride of 2^24 elements over 200 keys, in memory of which only those rows exist."""
    keys, stride = 200, 2**24
    memory = mmap.mmap(-1, keys * stride * 2, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE)
    buffer = torch.frombuffer(memory, dtype=torch.bfloat16)
    k = buffer.as_strided((1, 1, keys, 16), (keys * stride, keys * stride, stride, 1))
    k.copy_(random(1, 1, keys, 16))
    for seq_q in (1, 20):
        q = random(1, 1, seq_q, 16, dtype=torch.bfloat16)
        assert_same_bits(attention(q, k, k), attention(q, k.contiguous(), k.contiguous()))


# Empty dimensions.


@pytest.mark.parametrize("batch, heads, kv_heads, seq_q, seq_k, dim, v_dim", [
    (0, 2, 2, 3, 5, 8, 8), (2, 0, 0, 3, 5, 8, 8), (2, 2, 1, 0, 5, 8, 8), (2, 2, 1, 1, 0, 8, 8), (2, 4, 2, 30, 0, 8, 8),
    (2, 2, 2, 3, 5, 0, 8), (2, 2, 2, 30, 5, 0, 8), (2, 2, 2, 3, 5, 8, 0), (0, 0, 0, 0, 0, 0, 0),
])  # fmt: skip
def test_empty(
    batch: int, heads: int, kv_heads: int, seq_q: int, seq_k: int, dim: int, v_dim: int, dtype: torch.dtype
) -> None:
    q = random(batch, heads, seq_q, dim, dtype=dtype)
    k, v = random(batch, kv_heads, seq_k, dim, dtype=dtype), random(batch, kv_heads, seq_k, v_dim, dtype=dtype)
    out, lse = attention(q, k, v, return_lse=True)
    ref, ref_lse = attention_reference(q, k, v)
    naive, naive_lse = naive_attention(q, k, v) if kv_heads else (ref, ref_lse)
    assert_close(out, ref, naive, dtype)
    assert_close(lse.to(dtype), ref_lse, naive_lse, dtype)
    mask = torch.ones(batch, 1, seq_q, seq_k, dtype=torch.bool)
    assert_same_bits(attention(q, k, v, mask=mask, causal="bottom_right"), attention(q, k, v, causal="bottom_right"))


# Caches: valid keys are [k_start, k_end).


@pytest.mark.parametrize("seq_q, group", [(1, 1), (1, 5), (4, 3), (5, 8), (33, 2)])
@pytest.mark.parametrize("left", [-1, 0, 40])
def test_batch_equals_alone(seq_q: int, group: int, left: int, dtype: torch.dtype) -> None:
    """Each element of a padded batch has the bits that it has alone, whatever stands in its padding."""
    start = torch.tensor([0, 3, 17, 64, 130, 300, 599, 600])
    end = torch.tensor([600, 300, 17, 128, 131, 600, 600, 600])
    batch = len(start)
    q, k, v = (random(batch, h, n, 40, dtype=dtype) for h, n in ((2 * group, seq_q), (2, 600), (2, 600)))
    position = torch.arange(600)
    outside = ((position < start.view(-1, 1)) | (position >= end.view(-1, 1)))[:, None, :, None]
    k, v = k.masked_fill(outside, NAN), v.masked_fill(outside, INF)
    out = attention_cached(q, k, v, k_start=start, k_end=end, scale=0.2, left=left)
    for b, (first, last) in enumerate(zip(start.tolist(), end.tolist(), strict=True)):
        window = (left, -1) if left >= 0 else None
        one = [t[b : b + 1, :, first:last] for t in (k, v)]
        alone = attention(q[b : b + 1], *one, causal="bottom_right", scale=0.2, window=window)
        assert torch.equal(out[b : b + 1], alone), f"batch element {b}"


@pytest.mark.parametrize("start, end", [([-1], [5]), ([0], [6]), ([3], [2]), ([0, 0], [5, 5])])
def test_impossible_key_ranges(start: list[int], end: list[int]) -> None:
    q = random(1, 1, 1, 8)
    with pytest.raises(ValueError, match="k_start"):
        attention_cached(q, *random(2, 1, 1, 5, 8), k_start=torch.tensor(start), k_end=torch.tensor(end), scale=1.0)


@pytest.mark.parametrize(
    "name", ["decode_keys_513", "everything_decode", "everything_prefill", "self_257", "group_7_q6"]
)
def test_bits_do_not_depend_on_threads(name: str, dtype: torch.dtype, same_bits: Callable) -> None:
    case = next(c for c in ATTENTION if c.name == name)
    tensors, options = attention_inputs(replace(case, batch=3), dtype)
    for option in ("bias", "mask", "alibi_slopes"):
        if option in options and options[option].shape[0] == 2:
            options[option] = options[option][:1]
    same_bits(lambda: attention(*tensors, return_lse=True, **options))
