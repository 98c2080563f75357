"""The CUDA kernels of attention, executed through their PTX: the error rule over shapes and features."""

from __future__ import annotations

import pytest
import torch
from cases import AttentionCase
from cuda_attention import BF16, FP16, run
from ptx.compilers import needs_nvcc

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
    (Case("prefill_d128_g8", 20, 200, 128, heads=8, kv_heads=1, batch=2, causal=BOTTOM), BF16),
    (Case("prefill_d256_g1", 70, 150, 256, heads=1, kv_heads=1, causal=BOTTOM), BF16),
    (Case("prefill_d192_v128", 20, 70, 192, 128, heads=1, kv_heads=1, causal=BOTTOM), FP16),
    (Case("prefill_odd_dims", 70, 140, 33, 17, heads=2, kv_heads=2, causal=BOTTOM, layout="bshd"), FP16),
    (Case("prefill_v_wider", 70, 140, 40, 96, heads=1, kv_heads=1), BF16),
    (Case("prefill_misaligned", 20, 140, 64, heads=1, kv_heads=1, layout="offset"), BF16),
    (Case("prefill_same_heads", 20, 140, 64, heads=2, kv_heads=2, layout="same_heads"), BF16),
    (Case("prefill_split", 20, 700, 64, heads=3, kv_heads=1, causal=BOTTOM), BF16),
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
    (Case("decode_one_key", 1, 1, 128, heads=8, kv_heads=2), BF16),
    (Case("decode_misaligned", 1, 600, 64, heads=3, kv_heads=1, layout="offset"), BF16),
    (Case("decode_strided", 1, 100, 64, 128, heads=3, kv_heads=1, layout="bshd"), BF16),
]
FEATURES = [
    (Case("mask", 40, 200, 64, heads=4, kv_heads=2, batch=2, mask="b1qk"), BF16),
    (Case("bias", 40, 200, 64, heads=4, kv_heads=2, batch=2, bias="1hqk", bias_dtype=BF16), BF16),
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
