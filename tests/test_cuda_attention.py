"""The CUDA kernels of attention, executed through their PTX: the error rule over shapes and features."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from cases import AttentionCase
from compare import assert_close, assert_same_bits
from cuda_attention import BF16, FP16, FP32, attention, check, each_length, run, wide
from gpu_attention import CALLS, dense, naive_sequences, paged, rand, whole
from ptx.compilers import needs_nvcc

from tilewright.ops.attention_reference import Operands, Options, reference

pytestmark = needs_nvcc
Case = AttentionCase
BOTTOM = "bottom_right"
# (case, dtype). Tiles of 64 or 128 (query, head) rows and 32 or 64 keys.
SHAPES = [
    (Case("prefill_d64_g3", 50, 200, 64, heads=3, kv_heads=1, causal=BOTTOM), BF16),
    (Case("prefill_d64_g1", 70, 200, 64, heads=2, kv_heads=2, causal="top_left"), FP16),
    (Case("prefill_d80_g3", 40, 195, 80, heads=6, kv_heads=2, causal=BOTTOM), FP16),
    (Case("prefill_d80_whole", 20, 128, 80, heads=1, kv_heads=1), BF16),
    (Case("prefill_d96_g2", 70, 150, 96, heads=2, kv_heads=1), BF16),
    (Case("prefill_d96_g3", 40, 150, 96, heads=3, kv_heads=1, causal=BOTTOM), FP16),
    (Case("prefill_d128_g8", 20, 200, 128, heads=8, kv_heads=1, batch=2, causal=BOTTOM), BF16),
    (Case("prefill_d256_g1", 70, 150, 256, heads=1, kv_heads=1, causal=BOTTOM), BF16),
    (Case("prefill_d192_v128", 20, 70, 192, 128, heads=1, kv_heads=1, causal=BOTTOM), FP16),
    (Case("prefill_odd_dims", 70, 140, 33, 17, heads=2, kv_heads=2, causal=BOTTOM, layout="bshd"), FP16),
    (Case("prefill_v_wider", 70, 140, 40, 96, heads=1, kv_heads=1), BF16),
    (Case("prefill_misaligned", 20, 140, 64, heads=1, kv_heads=1, layout="offset"), BF16),
    (Case("prefill_same_heads", 20, 140, 64, heads=2, kv_heads=2, layout="same_heads"), BF16),
    (Case("prefill_split", 20, 700, 64, heads=3, kv_heads=1, causal=BOTTOM), BF16),
    (Case("prefill_split_odd", 20, 700, 120, 97, heads=3, kv_heads=1, causal=BOTTOM), FP16),
]
DECODE = [
    (Case("decode_d64_g1", 1, 300, 64, heads=2, kv_heads=2, causal=BOTTOM), FP16),
    (Case("decode_d64_g8", 1, 700, 64, heads=8, kv_heads=1, batch=2, causal=BOTTOM), BF16),
    (Case("decode_d80_g3", 2, 200, 80, heads=6, kv_heads=2, causal=BOTTOM), BF16),
    (Case("decode_d128_g3", 3, 700, 128, heads=3, kv_heads=1, causal=BOTTOM), BF16),
    (Case("decode_d128_16_rows", 16, 250, 128, heads=1, kv_heads=1, causal=BOTTOM), FP16),
    (Case("decode_d128_g33", 1, 600, 128, heads=33, kv_heads=1, causal=BOTTOM), FP16),
    (Case("decode_d256_g1", 1, 600, 256, heads=1, kv_heads=1, causal=BOTTOM), BF16),
    (Case("decode_d256_g5", 2, 110, 256, heads=5, kv_heads=1, causal=BOTTOM), FP16),
    (Case("decode_odd_dims", 2, 140, 33, 17, heads=2, kv_heads=2, causal=BOTTOM, layout="bshd"), FP16),
    (Case("decode_odd_dims_split", 2, 600, 33, 17, heads=2, kv_heads=2, causal=BOTTOM), FP16),
    (Case("decode_one_key", 1, 1, 128, heads=8, kv_heads=2), BF16),
    (Case("decode_misaligned", 1, 600, 64, heads=3, kv_heads=1, layout="offset"), BF16),
    (Case("decode_strided", 1, 100, 64, 128, heads=3, kv_heads=1, layout="bshd"), BF16),
]
FEATURES = [
    (Case("mask", 40, 200, 64, heads=4, kv_heads=2, batch=2, mask="b1qk"), BF16),
    (Case("mask_d128", 20, 150, 128, heads=3, kv_heads=1, mask="b1qk"), FP16),
    (Case("bias", 40, 200, 64, heads=4, kv_heads=2, batch=2, bias="1hqk", bias_dtype=BF16), BF16),
    (Case("bias_fp32", 20, 132, 64, heads=4, kv_heads=2, batch=2, bias="bhqk"), BF16),
    (Case("bias_mask_of_queries", 20, 200, 64, heads=4, kv_heads=2, mask="b1q1", bias="1hqk", bias_dtype=BF16), FP16),
    (Case("bias_and_float_mask", 33, 190, 64, heads=4, kv_heads=2, batch=2, bias="1h1k", float_mask="b1qk"), FP16),
    (Case("alibi_top_left", 40, 200, 64, heads=6, kv_heads=2, batch=2, alibi="bh", causal="top_left"), BF16),
    (Case("softcap", 40, 200, 64, heads=4, kv_heads=2, softcap=5.0, scale=1.0), FP16),
    (Case("sinks", 40, 200, 64, heads=4, kv_heads=2, sinks=True), BF16),
    (Case("window", 80, 300, 64, heads=3, kv_heads=1, causal=BOTTOM, window=(70, -1)), BF16),
    (Case("window_both", 80, 300, 64, heads=1, kv_heads=1, window=(70, 20)), FP16),
    (Case("more_queries_than_keys", 200, 48, 64, heads=1, kv_heads=1, causal=BOTTOM), BF16),
    (Case("scale_negative", 20, 70, scale=-0.3), BF16),
    (Case("everything", 60, 300, 40, 24, 6, 2, 2, BOTTOM, (200, -1), "b1qk", None, "1hqk", FP16, "h", 20.0, True, 0.2),
     FP16),
    (Case("mask_of_keys_decode", 1, 600, 64, heads=4, kv_heads=2, batch=2, mask="b11k"), FP16),
    (Case("alibi_decode", 1, 600, 64, heads=6, kv_heads=2, alibi="h"), BF16),
    (Case("sinks_decode", 1, 600, 64, heads=4, kv_heads=2, sinks=True), BF16),
    (Case("sinks_decode_short", 1, 60, 64, heads=4, kv_heads=2, sinks=True), BF16),
    (Case("window_decode", 1, 900, 64, heads=3, kv_heads=1, causal=BOTTOM, window=(300, -1)), BF16),
    (Case("everything_decode", 2, 520, 40, 24, 6, 2, 2, BOTTOM, (300, -1), "b1qk", None, "1hqk", BF16, "bh", 20.0, True,
          0.2), BF16),
    (Case("everything_d128", 20, 150, 128, 128, 3, 1, 1, BOTTOM, (100, -1), "b1qk", None, "1hqk", FP16, "h", 20.0, True,
          0.2), BF16),
    (Case("everything_d256", 20, 100, 256, 256, 3, 1, 1, BOTTOM, (60, -1), "b1qk", None, "1hqk", BF16, "h", 20.0, True,
          0.2), BF16),
]  # fmt: skip


@pytest.mark.parametrize(("case", "dtype"), SHAPES + DECODE + FEATURES, ids=str)
def test_error_rule(case: AttentionCase, dtype: torch.dtype) -> None:
    run(case, dtype)


@each_length
def test_lengths(residue: int, dim: int, group: int, dtype: torch.dtype) -> None:
    """Three tiles of keys and more."""
    name = f"{residue}_{dim}_{group}_{dtype}"
    prefill = Case(f"prefill_{name}", 20, 128 + residue, dim, heads=group, kv_heads=1, causal=BOTTOM)
    run(prefill, dtype)
    run(replace(prefill, name=f"decode_{name}", seq_q=1, seq_k=512 + residue), dtype)
    run(replace(prefill, name=f"rows_{name}", seq_q=22 + residue, seq_k=130), dtype)


# --- sequences that are packed, paged or padded ---


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_sequences(name: str, dtype: torch.dtype) -> None:
    make, options = CALLS[name]
    t = make(dtype)
    out, lse = attention(t, options)
    ref, ref_lse = reference(t, options)
    naive, naive_lse = naive_sequences(t, options)[0], naive_sequences(wide(t), options)[1]
    if t.q_start is not None:  # rows of no sequence are left as they are
        row = torch.arange(t.q.shape[2])
        inside = ((row >= t.q_start[:, None]) & (row < t.q_end[:, None])).any(0)
        assert out[:, :, ~inside].isnan().all() and lse[:, :, ~inside].isnan().all()
        out, ref, naive = (x[:, :, inside] for x in (out, ref, naive))
        lse, ref_lse, naive_lse = (x[:, :, inside] for x in (lse, ref_lse, naive_lse))
    assert_close(out, ref, naive, dtype)
    assert_close(lse, ref_lse, naive_lse, FP32)


@pytest.mark.parametrize("seq_q", [1, 40])
def test_what_does_not_exist_gives_nan(seq_q: int) -> None:
    options = Options(0.2, 0.0, 2)
    t = paged(FP16, seq_q, 16)
    good, _ = attention(t, options)
    t.block_table[0, 5] = 70
    out, lse = attention(t, options)
    assert out[0].isnan().any() and torch.equal(out[1:], good[1:])
    t = dense(FP16, 4, seq_q, 300, k_start=whole(0, 5, -1, 0), k_end=whole(300, 4, 3, 301))
    out, lse = attention(t, options)
    assert out[0].isfinite().all() and out[1:].isnan().all() and lse[1:].isnan().all()


# --- what may not leak ---


@pytest.mark.parametrize("seq_q", [1, 40])
@pytest.mark.parametrize("general", [False, True])
def test_keys_that_nothing_attends_may_be_anything(seq_q: int, general: bool) -> None:
    t = dense(BF16, 2, seq_q, 300, k_start=whole(3, 0), k_end=whole(280, 150))
    if general:
        t = t._replace(mask=torch.ones(1, 1, 1, 300, dtype=torch.bool).index_fill(3, whole(20, 77, 149), False))
    options = Options(0.2, 0.0, 2, 250)
    out, lse = attention(t, options)
    for bad in (math.nan, math.inf):
        k, v = t.k.clone(), t.v.clone()
        for x in (k, v):
            x[0, :, :3], x[0, :, 280:], x[1, :, 150:] = bad, bad, bad
            if general:
                x[:, :, [20, 77, 149]] = bad
        again, lse_again = attention(t._replace(k=k, v=v), options)
        assert_same_bits(again, out)
        assert_same_bits(lse_again, lse)


@pytest.mark.parametrize("seq_q", [2, 40])
@pytest.mark.parametrize("what", ["q", "k", "v"])
def test_nan_stands_where_the_reference_has_it(seq_q: int, what: str) -> None:
    t, options = dense(BF16, 1, seq_q, 300), Options(0.2)
    getattr(t, what)[0, 1, 1, 5] = math.nan
    out, lse = attention(t, options)
    ref, ref_lse = reference(t, options)
    assert torch.equal(out.isnan(), ref.isnan()) and torch.equal(lse.isnan(), ref_lse.isnan())
    getattr(t, what)[0, 1, 1, 5] = math.inf
    out, lse = attention(t, options)
    ref, ref_lse = reference(t, options)
    assert torch.equal(out.isnan(), ref.isnan()) and torch.equal(lse.isposinf(), ref_lse.isposinf())


@pytest.mark.parametrize("seq_q", [1, 40])
@pytest.mark.parametrize("seq_k", [192, 193])
def test_one_dominant_key(seq_q: int, seq_k: int) -> None:
    """A dropped key would show, at each tile's borders."""
    for at in (0, 15, 16, 31, 32, 63, 64, 127, 128, 191, seq_k - 1):
        q, k, v = (
            rand(f"{n}{at}", 1, 1, s, 64, dtype=BF16) * 0.1 for n, s in (("q", seq_q), ("k", seq_k), ("v", seq_k))
        )
        k[..., at, :] = 8
        q = q + 2
        v[..., at, :] += 4
        check((q, k, v), {})


def test_bits_do_not_depend_on_the_batch() -> None:
    options = Options(0.125, 0.0, 2)
    t = dense(BF16, 3, 40, 150)
    out, _ = attention(t, options)
    alone, _ = attention(t._replace(q=t.q[1:2], k=t.k[1:2], v=t.v[1:2]), options)
    assert_same_bits(out[1:2].contiguous(), alone)


def test_empty_calls() -> None:
    options = Options(0.2, 0.0, 2)
    for t in (dense(BF16, 1, 3, 0), dense(BF16, 1, 30, 0)):
        out, lse = attention(t, options)
        assert (out == 0).all() and (lse == -math.inf).all()
    out, _ = attention(dense(BF16, 0, 3, 5), options)
    assert out.shape == (0, 6, 3, 64)


def test_what_the_kernels_do_not_take_is_said() -> None:
    options = Options(0.2)
    wide = [rand(n, 1, 1, 2, 257, dtype=BF16) for n in "qkv"]
    with pytest.raises(NotImplementedError, match="head_dim up to 256"):
        attention(Operands(*wide), options)
    t = dense(BF16, 1, 2, 5)
    for wrong, text in (
        (t._replace(q=t.q.float()), "bfloat16 and float16"),
        (t._replace(k=t.k.half()), "k must be bfloat16"),
        (t._replace(v=t.v[:, :, 1:]), "k and v may differ"),
        (t._replace(q=t.q[:, :5]), "multiple of the key heads"),
        (t._replace(mask=torch.ones(4, 5, dtype=torch.bool)), "mask must broadcast"),
        (t._replace(k_end=torch.ones(2, dtype=torch.int64)), "k_end must be contiguous int64"),
    ):
        with pytest.raises(ValueError, match=text):
            attention(wrong, options)
