"""The CUDA kernels of attention to quantised caches, executed through their PTX."""

from __future__ import annotations

import pytest
import torch
from cases import seeded
from cuda_attention import BF16, FP16, check_quantized, each_length
from ptx.compilers import needs_nvcc
from test_quantized_attention import Case
from test_quantized_kv import BITS, filled, random_kv
from torch import Tensor

pytestmark = needs_nvcc
# Blocks of 32 tokens for each of 4 warps (2 with more than 128 channels), tiles of 64, chunks of 256 and more.
CASES = [
    *((Case(f"{b}bits_keys_{n}", b, 1, n, 64, 3), BF16) for b in BITS for n in (1, 31, 32, 33, 64, 129, 200, 600)),
    *((Case(f"{b}bits_dim_{d}", b, 2, 150, d, 3), FP16) for b in BITS for d in (1, 7, 30, 40, 70, 80, 128, 130, 256)),
    *((Case(f"{b}bits_d256_{n}", b, 1, n, 256, 8, 1), BF16) for b in BITS for n in (70, 300)),
    *((Case(f"{b}bits_rows_40", b, 40, 150, 128, 1), BF16) for b in BITS),
    *((Case(f"4bits_group_{g}_residual_{r}", 4, 1, 300, 80, 2, group_size=g, residual=r), BF16)
      for g, r in ((64, 0), (128, 40), (32, 700))),
]  # fmt: skip


@pytest.mark.parametrize(("case", "dtype"), CASES, ids=str)
def test_error_rule(case: Case, dtype: torch.dtype) -> None:
    c, g = case, seeded(case.name)
    k, v = random_kv(c.batch, c.kv_heads, c.seq_k, c.head_dim, generator=g)
    q = torch.randn(c.batch, c.kv_heads * c.group, c.seq_q, c.head_dim, generator=g).to(dtype)
    kv = filled(k, v, c.bits, spare=3, group_size=c.group_size, residual=c.residual)
    check_quantized(q, kv, causal="bottom_right")


def numbers(name: str, *shape: int) -> Tensor:
    return torch.randn(shape, generator=seeded(name))


# Of 6 heads, 2 queries and 150 keys.
FEATURES = {
    "bias": lambda d: {"bias": numbers("b", 1, 6, 2, 150).to(d)},
    "bias_of_keys_float32": lambda d: {"bias": numbers("b", 2, 1, 1, 150)},
    "mask": lambda d: {"mask": torch.rand(2, 1, 2, 150, generator=seeded("m")) < 0.7, "causal": None},
    "alibi_window": lambda d: {"alibi_slopes": numbers("a", 2, 6).abs(), "window": (90, -1)},
    "softcap_sinks": lambda d: {"softcap": 3.0, "sinks": numbers("s", 6), "scale": 0.4},
    "dropout": lambda d: {"dropout_p": 0.3, "seed": torch.tensor([5])},
}


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize(("bits", "dtype"), [(8, FP16), (8, BF16), (4, BF16), (4, FP16)], ids=str)
def test_features(bits: int, dtype: torch.dtype, feature: str) -> None:
    k, v = random_kv(2, 2, 150, 80, generator=seeded(feature))
    kv = filled(k, v, bits, spare=3, residual=40)
    check_quantized(numbers("q", 2, 6, 2, 80).to(dtype), kv, **{"causal": "bottom_right"} | FEATURES[feature](dtype))


@each_length
def test_lengths(residue: int, dim: int, group: int, dtype: torch.dtype) -> None:
    for bits in BITS:
        test_error_rule(Case(f"{bits}bits_{residue}_{dim}_{group}", bits, 1, 130 + residue, dim, group), dtype)
