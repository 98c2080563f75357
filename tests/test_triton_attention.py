"""Triton's attention: the error rule over shapes and features, and what may not leak."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from cases import ATTENTION, AttentionCase, attention_inputs, naive_attention, seeded
from compare import assert_close, assert_same_bits
from gpu_attention import CALLS, naive_sequences, rand, whole
from torch import Tensor
from triton_device import DTYPES, INTERPRETED, SWEEP, Device, running

import tilewright
from tilewright.ops.attention_reference import Operands, Options, attention_reference, reference

if INTERPRETED or SWEEP:
    # What the CPU's kernels are held to, in the interpreter: a choice that has every feature.
    MEANING = ATTENTION if SWEEP else ATTENTION[::7]
else:
    MEANING = []
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
Case = AttentionCase
BOTTOM = "bottom_right"
# (case, dtype). Tiles of 16 to 128 (query, head) rows and 16 to 64 keys, chunks of 256 keys below 65 rows.
SHAPES = [
    (Case("prefill_d64_g3", 40, 200, 64, heads=3, kv_heads=1, causal=BOTTOM), BF16),
    (Case("prefill_d64_g1", 70, 200, 64, heads=2, kv_heads=2, causal="top_left"), FP16),
    (Case("prefill_d80_g3", 40, 195, 80, heads=6, kv_heads=2, causal=BOTTOM), FP16),
    (Case("prefill_d128_g8", 20, 200, 128, heads=8, kv_heads=1, batch=2, causal=BOTTOM), BF16),
    (Case("prefill_d256_g1", 70, 150, 256, heads=1, kv_heads=1, causal=BOTTOM), BF16),
    (Case("prefill_d64_f32", 30, 110, 64, heads=3, kv_heads=1, causal=BOTTOM), FP32),
    (Case("prefill_d128_f32", 70, 60, 128, heads=1, kv_heads=1), FP32),
    (Case("prefill_d256_f32", 66, 50, 256, heads=1, kv_heads=1, causal=BOTTOM), FP32),
    (Case("prefill_odd_dims", 70, 140, 33, 17, heads=2, kv_heads=2, causal=BOTTOM, layout="bshd"), FP16),
    (Case("prefill_v_wider", 70, 140, 40, 96, heads=1, kv_heads=1), BF16),
    (Case("short_g8", 5, 190, 64, heads=8, kv_heads=1, causal=BOTTOM), BF16),
    (Case("decode_d64_g1", 1, 700, 64, heads=2, kv_heads=2, causal=BOTTOM), FP16),
    (Case("decode_d64_g8", 1, 700, 64, heads=8, kv_heads=1, batch=2, causal=BOTTOM), BF16),
    (Case("decode_d80_g3", 2, 700, 80, heads=6, kv_heads=2, causal=BOTTOM), BF16),
    (Case("decode_d128_g3", 3, 700, 128, heads=3, kv_heads=1, causal=BOTTOM), BF16),
    (Case("decode_d128_g33", 1, 600, 128, heads=33, kv_heads=1, causal=BOTTOM), FP16),
    (Case("decode_d256_g1", 1, 600, 256, heads=1, kv_heads=1, causal=BOTTOM), BF16),
    (Case("decode_d64_f32", 1, 600, 64, heads=8, kv_heads=1, causal=BOTTOM), FP32),
    (Case("decode_d128_f32", 2, 560, 128, heads=1, kv_heads=1, causal=BOTTOM), FP32),
    (Case("decode_short", 1, 90, 128, heads=8, kv_heads=2), BF16),
]
FEATURES = [
    (Case("mask", 40, 200, 64, heads=4, kv_heads=2, batch=2, mask="b1qk"), BF16),
    (Case("mask_of_keys_decode", 1, 600, 64, heads=4, kv_heads=2, batch=2, mask="b11k"), FP16),
    (Case("bias", 40, 200, 64, heads=4, kv_heads=2, batch=2, bias="1hqk", bias_dtype=BF16), BF16),
    (Case("bias_and_float_mask", 33, 190, 64, heads=4, kv_heads=2, batch=2, bias="1h1k", float_mask="b1qk"), FP16),
    (Case("alibi_top_left", 40, 200, 64, heads=6, kv_heads=2, batch=2, alibi="bh", causal="top_left"), BF16),
    (Case("alibi_decode", 1, 600, 64, heads=6, kv_heads=2, alibi="h"), BF16),
    (Case("softcap", 40, 200, 64, heads=4, kv_heads=2, softcap=5.0, scale=1.0), FP16),
    (Case("sinks", 40, 200, 64, heads=4, kv_heads=2, sinks=True), BF16),
    (Case("sinks_decode", 1, 600, 64, heads=4, kv_heads=2, sinks=True), BF16),
    (Case("window", 80, 300, 64, heads=3, kv_heads=1, causal=BOTTOM, window=(70, -1)), BF16),
    (Case("window_both", 80, 300, 64, heads=1, kv_heads=1, window=(70, 20)), FP16),
    (Case("window_decode", 1, 900, 64, heads=3, kv_heads=1, causal=BOTTOM, window=(300, -1)), BF16),
    (Case("more_queries_than_keys", 200, 48, 64, heads=1, kv_heads=1, causal=BOTTOM), BF16),
    (Case("everything", 60, 300, 40, 24, 6, 2, 2, BOTTOM, (200, -1), "b1qk", None, "1hqk", FP16, "h", 20.0, True, 0.2),
     FP16),
    (Case("everything_decode", 2, 520, 40, 24, 6, 2, 2, BOTTOM, (300, -1), "b1qk", None, "1hqk", BF16, "bh", 20.0, True,
          0.2), BF16),
]  # fmt: skip


def run(case: AttentionCase, dtype: torch.dtype, choice: int = 0) -> None:
    tensors, options = attention_inputs(case, dtype)
    with running(choice=choice):
        out, lse = tilewright.attention(*tensors, return_lse=True, backend="triton", **options)
    assert tilewright.last_impl("attention") == "triton"
    ref, ref_lse = attention_reference(*tensors, **options)
    naive, naive_lse = naive_attention(*tensors, **options)
    assert_close(out, ref, naive, dtype)
    assert_close(lse.to(dtype), ref_lse, naive_lse, dtype)


def pairs(cases: list) -> list:
    found = [(case, dtype) for case, dtype in cases if dtype in DTYPES]
    return [pytest.param(case, dtype, id=f"{case}_{str(dtype)[6:]}") for case, dtype in found]


@pytest.mark.parametrize(("case", "dtype"), pairs(SHAPES + FEATURES))
def test_error_rule(case: AttentionCase, dtype: torch.dtype) -> None:
    run(case, dtype)


OTHERS = SHAPES + FEATURES if SWEEP else [SHAPES[0], SHAPES[3], FEATURES[0]]


@pytest.mark.skipif(INTERPRETED, reason="the PTX has the configurations that this is about")
@pytest.mark.parametrize("choice", (1, 2, 3))
@pytest.mark.parametrize(("case", "dtype"), pairs(OTHERS))
def test_other_configurations(case: AttentionCase, dtype: torch.dtype, choice: int) -> None:
    run(case, dtype, choice)


if MEANING:

    @pytest.mark.parametrize("case", MEANING, ids=str)
    def test_what_the_cpu_is_held_to(case: AttentionCase) -> None:
        for dtype in DTYPES:
            run(case, dtype)


RESIDUES = range(64) if SWEEP else (0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 23, 31, 32, 33, 47, 48, 62, 63)


@pytest.mark.skipif(INTERPRETED, reason="the PTX has the tiles that this is about")
@pytest.mark.parametrize("residue", RESIDUES)
def test_every_residue_of_the_length(residue: int) -> None:
    prefill = Case(f"prefill_{residue}", 25, 128 + residue, 64, heads=3, kv_heads=1, causal=BOTTOM)
    run(prefill, BF16)
    run(replace(prefill, name=f"decode_{residue}", seq_q=1, seq_k=512 + residue), BF16)
    run(replace(prefill, name=f"rows_{residue}", seq_q=22 + residue, seq_k=130, heads=3), BF16)


# --- sequences that are packed, paged or padded ---


def direct(t: Operands, options: Options) -> tuple[Tensor, Tensor]:
    from tilewright.triton_kernels.attention import attention

    with running():
        return attention(t, options, True)


@pytest.mark.parametrize("name", CALLS)
def test_sequences(name: str) -> None:
    make, options = CALLS[name]
    for dtype in DTYPES if SWEEP else DTYPES[1:2]:
        t = make(dtype)
        out, lse = direct(t, options)
        ref, ref_lse = reference(t, options)
        naive, naive_lse = naive_sequences(t, options)
        assert_close(out, ref, naive, dtype)
        assert_close(lse.to(dtype), ref_lse, naive_lse, dtype)


@pytest.mark.parametrize("seq_q", (1, 40))
def test_float32_queries_meet_16_bit_caches(seq_q: int) -> None:
    q, k, v = rand("q", 2, 4, seq_q, 48), rand("k", 2, 2, 300, 48, dtype=FP16), rand("v", 2, 2, 300, 48, dtype=FP16)
    with running():
        out = tilewright.attention(q, k, v, causal=BOTTOM, backend="triton")
    ref, _ = attention_reference(q, k, v, causal=BOTTOM)
    assert_close(out, ref, naive_attention(q, k.float(), v.float(), causal=BOTTOM)[0], FP32)


# --- what may not leak, and what must not go unseen ---


@pytest.mark.parametrize("seq_q", (1, 30))
def test_one_key_dominates(seq_q: int) -> None:
    """A lost key at a border of tiles or chunks would change everything."""
    dtype = DTYPES[1]
    keys = [0, 31, 32, 63, 64, 65, 127, 128, 255, 256, 257, 300, 319]
    q, v = rand("q", 1, 3, seq_q, 64), rand("v", 1, 1, 320, 64).to(dtype)
    for key in keys if SWEEP or seq_q == 1 else keys[::3]:
        k = rand("k", 1, 1, 320, 64) * 0.01
        k[0, 0, key] = q.mean((0, 1, 2)).sign() * 20
        one = q + k[0, 0, key] * 0.2
        tensors = one.to(dtype), k.to(dtype), v
        with running():
            out = tilewright.attention(*tensors, backend="triton")
        assert_close(out, attention_reference(*tensors)[0], naive_attention(*tensors)[0], dtype)


@pytest.mark.parametrize("seq_q", (1, 40))
def test_what_is_hidden_from_all_may_be_anything(seq_q: int) -> None:
    dtype = DTYPES[1]
    q, k, v = (rand(n, 2, h, s, 64, dtype=dtype) for n, h, s in (("q", 4, seq_q), ("k", 2, 400), ("v", 2, 400)))
    mask = torch.rand(2, 1, 1, 400, generator=seeded("mask")) < 0.6
    bias = torch.zeros(400).masked_fill(~mask[0, 0, 0], -math.inf)
    ends = whole(390, 300)
    for hidden, operands in (
        (~mask.expand(2, 2, 1, 400), Operands(q, k, v, mask=mask)),
        (~mask[:1].expand(2, 2, 1, 400), Operands(q, k, v, bias=bias)),
        ((torch.arange(400) >= ends.view(2, 1, 1, 1)).expand(2, 2, 1, 400), Operands(q, k, v, k_end=ends)),
    ):
        poison = hidden.transpose(2, 3)
        for value in (math.nan, math.inf):
            dirty = operands._replace(k=k.masked_fill(poison, value), v=v.masked_fill(poison, value))
            for a, b in zip(direct(dirty, Options(0.1)), direct(operands, Options(0.1)), strict=True):
                assert_same_bits(a, b)


def test_what_does_not_exist_gives_nan() -> None:
    q, k = rand("q", 3, 4, 2, 64), rand("k", 3, 2, 300, 64)
    for operands, bad in (
        (Operands(q, k, k, k_end=whole(300, 301, 3)), [1]), (Operands(q, k, k, k_start=whole(-1, 0, 300)), [0]),
        (Operands(q, k, k, k_batch=whole(2, 0, 3)), [2]),
        (Operands(q, k[:, :, :16], k[:, :, :16], k_end=whole(20, 20, 16), block_table=torch.tensor(
            [[0, 1], [2, 3], [1, -1]], dtype=torch.int32)), [1]),
        (Operands(rand("q", 3, 4, 40, 64), k, k, k_end=whole(300, 301, 3)), [1]),
    ):  # fmt: skip
        out, lse = direct(operands, Options(0.1))
        for b in range(3):
            assert out[b].isnan().all() == lse[b].isnan().all() == (b in bad)
            assert out[b].isnan().any() == (b in bad)


def test_empty() -> None:
    with running():
        for shape, keys in (((0, 2, 3, 8), 5), ((2, 2, 0, 8), 5), ((2, 2, 3, 8), 0)):
            q, k = torch.randn(shape), torch.randn(shape[0], 2, keys, 8)
            out, lse = tilewright.attention(q, k, k, return_lse=True, backend="triton")
            assert out.shape == shape and (out == 0).all() and (lse == -math.inf).all()


@pytest.mark.skipif(INTERPRETED, reason="one thread after the other")
def test_bits_do_not_depend_on_the_schedule() -> None:
    """Warps and blocks in other orders, and again in the same one."""
    dtype = BF16
    cases = [FEATURES[0][0], SHAPES[12][0]]
    for case in cases:
        tensors, options = attention_inputs(case, dtype)
        found = []
        for seed in (0, 1, 2):
            with running(Device(seed)):
                found.append(tilewright.attention(*tensors, backend="triton", **options))
        assert_same_bits(found[0], found[1])
        assert_same_bits(found[0], found[2])


def ones(*shape: int) -> Tensor:
    return torch.ones(shape)


def public(q: Tensor, k: Tensor, **options: object) -> Tensor:
    return tilewright.attention(q, k, k, backend="triton", **options)


X = ones(1, 1, 2, 8)
REJECTED = {
    "dims": (lambda: public(ones(1, 1, 2, 513), ones(1, 1, 2, 513)), "up to 512"),
    "heads": (lambda: public(ones(1, 3, 2, 8), ones(1, 2, 2, 8)), "multiple"),
    "mask": (lambda: public(X, X, mask=ones(3, 3).bool()), "mask must broadcast"),
    "sinks": (lambda: public(X, X, sinks=ones(2)), "sinks must be"),
    "dropout": (lambda: direct(Operands(X, X, X), Options(1.0, 0.0, 0, -1, -1, 0.5)), "needs a seed"),
    "dtypes": (lambda: direct(Operands(X.half(), X, X), Options(1.0)), "one dtype"),
    "strides": (lambda: direct(Operands(X.transpose(2, 3), X[..., :2], X), Options(1.0)), "contiguous in"),
    "packed": (lambda: direct(Operands(X, X, X, q_start=whole(0)), Options(1.0)), "q_start, q_end"),
}


@pytest.mark.parametrize("name", REJECTED)
def test_rejected(name: str) -> None:
    call, message = REJECTED[name]
    with running(), pytest.raises((ValueError, NotImplementedError), match=message):
        call()
