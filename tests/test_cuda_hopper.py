"""The kernels for sm_90a: their source, on a model of TMA, mbarriers and wgmma (tests/hopper). Their machine code is
executed nowhere."""

from __future__ import annotations

import ctypes
import math

import pytest
import torch
from cases import AttentionCase, attention_inputs, naive_attention
from compare import assert_close, assert_same_bits
from cuda_attention import operands_of
from gpu_linear import BF16, FP16, Case, inputs, naive
from hopper import model
from ptx.compilers import needs_nvcc
from torch import Tensor

from tilewright.ops.attention_reference import attention_reference
from tilewright.ops.linear import quantized_linear_reference
from tilewright.quant import QuantizedWeight
from tilewright.triton_kernels.weight import gpu_weight

pytestmark = needs_nvcc
BOTTOM = "bottom_right"
# Copies and products as early, or as late, as they may come.
TIMES = [(products, copies) for products in (False, True) for copies in (False, True)]
# Tiles of 128 queries and 128 or (head_dim 256) 64 keys, in two stages: five tiles and more use a stage three times.
ATTENTION = [
    (AttentionCase("one_tile", 128, 128, 64, heads=1, kv_heads=1), BF16),
    (AttentionCase("d64_g2", 130, 700, 64, heads=2, kv_heads=1, layout="bshd"), FP16),
    (AttentionCase("d64_sinks", 200, 333, 64, heads=2, kv_heads=1, batch=2, causal=BOTTOM, sinks=True), BF16),
    (AttentionCase("d128_g3", 129, 700, 128, heads=3, kv_heads=1, sinks=True), FP16),
    (AttentionCase("d128_causal", 300, 300, 128, heads=2, kv_heads=2, causal=BOTTOM, layout="bshd"), BF16),
    (AttentionCase("d128_top_left", 200, 700, 128, heads=1, kv_heads=1, causal="top_left"), BF16),
    (AttentionCase("d128_rows_without_keys", 400, 150, 128, heads=1, kv_heads=1, causal=BOTTOM, sinks=True), FP16),
    (AttentionCase("d128_no_key_and_no_sink", 300, 100, 128, heads=1, kv_heads=1, causal=BOTTOM), BF16),
    (AttentionCase("d128_window", 300, 900, 128, heads=2, kv_heads=2, causal=BOTTOM, window=(100, -1)), BF16),
    (AttentionCase("d64_window_both", 300, 500, 64, heads=2, kv_heads=2, window=(40, 30)), FP16),
    (AttentionCase("d64_window_one", 300, 300, 64, heads=1, kv_heads=1, causal="top_left", window=(0, 0)), BF16),
    (AttentionCase("d256_causal", 190, 330, 256, heads=2, kv_heads=1, causal=BOTTOM, layout="bshd"), BF16),
    (AttentionCase("d192_v128", 150, 290, 192, 128, heads=1, kv_heads=1, causal=BOTTOM), FP16),
    (AttentionCase("d80_v40", 150, 290, 80, 40, heads=2, kv_heads=1, causal=BOTTOM), BF16),
    (AttentionCase("d40_v200", 100, 90, 40, 200, heads=1, kv_heads=1, window=(-1, 5)), FP16),
]
# Tiles of 128 rows and 128 outputs, steps of 64 columns in four stages.
LINEAR = [
    (Case(128, 128, 256), BF16), (Case(130, 200, 600, "int8", 32, "zero"), FP16),
    (Case(70, 90, 336, "int4", 16, "min", True), BF16), (Case(200, 130, 1000, "int8", 16, "min"), FP16),
    (Case(129, 128, 704, "int4", 128, "zero", True), FP16), (Case(100, 129, 136, "int4", -1), BF16),
    (Case(90, 65, 40, "int8", 32), FP16),
]  # fmt: skip


def launched(library: ctypes.CDLL, call: object, times: tuple[bool, bool], skipped: int = 0) -> None:
    library.hopper_options(*times, 1 + TIMES.index(times), skipped)  # another order of threads each time
    result = call()
    fault = library.hopper_fault().decode()
    assert (result, fault) == (0, "")


def attention(
    tensors: tuple[Tensor, Tensor, Tensor], options: dict, times: tuple[bool, bool], skipped: int = 0
) -> tuple[Tensor, Tensor]:
    t, o = operands_of(tensors, options)
    library = model.library("attention")
    out = torch.full((*t.q.shape[:3], t.v.shape[3]), math.nan, dtype=t.q.dtype)
    lse = torch.full(t.q.shape[:3], math.nan)
    sizes = (t.q.shape[0], t.q.shape[1], t.k.shape[1], t.q.shape[2], t.q.shape[3], t.v.shape[3], t.k.shape[2])
    strides = [x.stride(i) for x in (t.q, t.k, t.v, out) for i in range(3)]
    numbers = (ctypes.c_int64 * 23)(*sizes, o.causal, o.left, o.right, t.q.dtype == FP16, *strides)
    pointers = [None if x is None else ctypes.c_void_p(x.data_ptr()) for x in (t.q, t.k, t.v, out, lse, t.sinks)]
    scale = ctypes.c_float(o.scale)
    launched(library, lambda: library.hopper_attention(*pointers, numbers, scale), times, skipped)
    return out, lse


def check_attention(case: AttentionCase, dtype: torch.dtype, times: tuple[bool, bool], skipped: int = 0) -> None:
    tensors, options = attention_inputs(case, dtype)
    out, lse = attention(tensors, options, times, skipped)
    ref, ref_lse = attention_reference(*tensors, **options)
    naive_out, naive_lse = naive_attention(*tensors, **options)
    assert_close(out, ref, naive_out, dtype)
    assert_close(lse.to(dtype), ref_lse, naive_lse, dtype)


def linear(
    x: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None,
    times: tuple[bool, bool],
    skipped: int = 0,
    sizes: Tensor | None = None,
) -> Tensor:
    library, w = model.library("linear"), gpu_weight(weight.packed, *weight.spec())
    experts = 1 if sizes is None else len(sizes)
    out = torch.full((len(x), w.n // experts), math.nan, dtype=x.dtype)
    shape = (*out.shape, w.k, x.stride(0), w.codes.stride(0))
    scale, offset = (torch.float32, BF16, FP16).index(w.scales.dtype), ("none", "zero", "min").index(w.offset)
    kind = (w.bits, scale, offset, w.middle, w.group, len(w.scales), x.dtype == FP16, experts)
    given = (x, w.codes, w.scales, w.offsets, bias, sizes, out)
    pointers = [None if t is None else ctypes.c_void_p(t.data_ptr()) for t in given]
    numbers = (ctypes.c_int64 * 13)(*shape, *kind)
    launched(library, lambda: library.hopper_linear(*pointers, numbers), times, skipped)
    return out


def check_linear(case: Case, dtype: torch.dtype, times: tuple[bool, bool], skipped: int = 0) -> None:
    x, weight, bias = inputs(case, dtype)
    out = linear(x, weight, bias, times, skipped)
    ref = quantized_linear_reference(x, weight, bias, activation="fp32" if dtype == FP16 else "bf16")
    assert_close(out, ref, naive(x, weight, bias, "fp32" if dtype == FP16 else "bf16"), dtype)


@pytest.fixture(autouse=True)
def _asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TILEWRIGHT_CUDA_WGMMA", "1")


def at_two_times(cases: list[tuple]) -> list[tuple]:
    return [(*case, TIMES[i % 2 :: 2]) for i, case in enumerate(cases)]


@pytest.mark.parametrize(("case", "dtype", "times"), at_two_times(ATTENTION), ids=str)
def test_attention(case: AttentionCase, dtype: torch.dtype, times: list[tuple[bool, bool]]) -> None:
    for t in times:
        check_attention(case, dtype, t)


@pytest.mark.parametrize(("case", "dtype", "times"), at_two_times(LINEAR), ids=str)
def test_linear(case: Case, dtype: torch.dtype, times: list[tuple[bool, bool]]) -> None:
    for t in times:
        check_linear(case, dtype, t)


def test_experts() -> None:
    """Each group of rows has its expert's bits; rows of no expert become NaN."""
    sizes, n, case = [140, 0, 70], 40, Case(230, 120, 200, "int4", 32, "zero")
    x, weight, _ = inputs(case, BF16)
    out = linear(x, weight, None, TIMES[3], sizes=torch.tensor(sizes))
    whole = linear(x, weight, None, TIMES[0])
    assert_same_bits(out[:140], whole[:140, :n])
    assert_same_bits(out[140:210], whole[140:210, 2 * n :])
    assert out[210:].isnan().all()


def test_keys_that_no_query_sees_are_not_read() -> None:
    (q, k, v), options = attention_inputs(
        AttentionCase("window", 100, 400, 64, heads=1, kv_heads=1, causal=BOTTOM, window=(30, -1)), BF16
    )
    k[:, :, :270] = v[:, :, :270] = math.nan
    for times in TIMES:
        assert attention((q, k, v), options, times)[0].isfinite().all()


@pytest.mark.parametrize(
    "case",
    [
        AttentionCase("few_queries", 64, 128),
        AttentionCase("misaligned", 100, 128, layout="offset"),
        AttentionCase("one_head_for_all", 100, 128, layout="same_heads"),
        AttentionCase("no_keys", 100, 0),
    ],
    ids=str,
)
def test_other_calls_are_left_to_other_kernels(case: AttentionCase) -> None:
    with pytest.raises(AssertionError, match="801"):  # cudaErrorNotSupported
        attention(*attention_inputs(case, BF16), TIMES[0])


@pytest.mark.parametrize("name", ["attention", "linear"])
def test_each_wait_is_needed(name: str) -> None:
    """Every wait and arrival of the source, left out in turn, is missed: at one of the times at least."""

    def check(*how: object) -> None:
        if name == "attention":
            check_attention(AttentionCase("d64", 70, 700, 64, heads=1, kv_heads=1), BF16, *how)
        else:
            check_linear(Case(70, 40, 600), BF16, *how)

    check(TIMES[0])
    source = (model.CUDA / f"{name}_wgmma.cu").read_text().splitlines()
    rewritten = model.rewritten("\n".join(source)).splitlines()
    survivors = set()
    for line in model.lines(model.library(name)):
        for times in TIMES:
            try:
                check(times, line)
            except AssertionError:
                break
        else:
            survivors.add(rewritten[line - 1].strip())
    # A warp of the model reads no row of q but its own 16. The PTX ISA does not say so: the barrier stays.
    assert survivors == ({"warpgroup_meet(1 + warpgroup);"} if name == "attention" else set())
