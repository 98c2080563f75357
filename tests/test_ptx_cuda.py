"""Kernels that nvcc compiled, and their host launchers, on the PTX interpreter (tests/ptx/example.cu)."""

from __future__ import annotations

import ctypes
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from ptx import Kernel, PtxError, PtxFault, empty, undefined_bytes
from ptx.compilers import needs_nvcc, nvcc_library, nvcc_module
from ptx.library import load
from ptx.runtime import HostLibrary
from torch import Tensor

pytestmark = needs_nvcc
SOURCE = Path(__file__).parent / "ptx" / "example.cu"


# CUDA's own functions, in whose code (polynomials, tables, slow paths, calls) many instructions meet. Each: the
# arguments, numpy's function, and the error in units of the last place that NVIDIA documents, or a little more.
EVERYWHERE = np.concatenate([np.linspace(-20, 20, 997), [0.0, -0.0, 1e-30, -3e5, 1e9, 3e38, np.inf, -np.inf, np.nan]])
POSITIVE = np.concatenate([np.geomspace(1e-38, 1e38, 1001), [0.0, 1e-42, np.inf, np.nan]])
UNIT = np.concatenate([np.linspace(-1, 1, 1001), [np.nan]])
FUNCTIONS = {
    "sinf": (EVERYWHERE, np.sin, 2),
    "cosf": (EVERYWHERE, np.cos, 2),
    "tanf": (EVERYWHERE, np.tan, 4),
    "expf": (EVERYWHERE, np.exp, 2),
    "exp2f": (EVERYWHERE, np.exp2, 2),
    "expm1f": (EVERYWHERE, np.expm1, 2),
    "logf": (POSITIVE, np.log, 2),
    "log2f": (POSITIVE, np.log2, 2),
    "log1pf": (POSITIVE, np.log1p, 2),
    "sqrtf": (POSITIVE, np.sqrt, 0.5),
    "rsqrtf": (POSITIVE, lambda x: 1 / np.sqrt(x), 2),
    "cbrtf": (EVERYWHERE, np.cbrt, 2),
    "tanhf": (EVERYWHERE, np.tanh, 2),
    "atanf": (EVERYWHERE, np.arctan, 2),
    "asinf": (UNIT, np.arcsin, 4),
    "erff": (EVERYWHERE, np.vectorize(math.erf), 2),
    "roundf": (EVERYWHERE, lambda x: np.copysign(np.floor(np.abs(x) + 0.5), x), 0.5),
    "rintf": (EVERYWHERE, np.rint, 0.5),
    "exp": (EVERYWHERE, np.exp, 2),
    "log": (POSITIVE, np.log, 2),
    "sin": (EVERYWHERE, np.sin, 2),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_of_cuda(name: str) -> None:
    values, function, ulps = FUNCTIONS[name]
    kernels = "".join(
        f'extern "C" __global__ void test_{f}({t}* x, int n)'
        f" {{ int i = blockIdx.x * 64 + threadIdx.x; if (i < n) x[i] = {f}(x[i]); }}\n"
        for f, t in ((f, "float" if f.endswith("f") else "double") for f in FUNCTIONS)
    )
    x = values.astype(np.float32 if name.endswith("f") else np.float64)
    with np.errstate(all="ignore"):
        # A double's function in long double: numpy's own double may be half an ulp off.
        wanted = function(x.astype(np.float64 if name.endswith("f") else np.longdouble))
        rounded = wanted.astype(x.dtype)
        ulp = np.spacing(np.maximum(np.abs(rounded), np.finfo(x.dtype).smallest_normal))
    found = x.copy()
    nvcc_module(kernels).kernel(f"test_{name}").launch((math.ceil(len(x) / 64),), (64,), [found, len(x)])
    finite = np.isfinite(rounded)
    assert np.array_equal(found[~finite], rounded[~finite], equal_nan=True)
    error = np.abs(found[finite].astype(wanted.dtype) - wanted[finite]) / ulp[finite]
    assert error.max() <= ulps, (x[finite][error.argmax()], error.max())


def test_integer_division_by_constants_and_in_64_bits() -> None:
    source = """extern "C" __global__ void k(const long long* a, const long long* b, long long* out, int n) {
      int i = threadIdx.x; if (i >= n) return;
      out[4 * i] = a[i] / b[i]; out[4 * i + 1] = a[i] % b[i];
      out[4 * i + 2] = (unsigned long long)a[i] / 10; out[4 * i + 3] = (int)a[i] / 7 + (int)b[i] % 1000003; }"""
    rng = np.random.default_rng(3)
    a = rng.integers(-(2**63), 2**63, 100) >> rng.integers(0, 60, 100)
    b = (rng.integers(-(2**63), 2**63, 100) >> rng.integers(0, 60, 100)) | 1
    out = np.zeros((100, 4), np.int64)
    nvcc_module(source).kernel().launch((1,), (128,), [a, b, out, 100])
    for x, y, row in zip(a.tolist(), b.tolist(), out.tolist(), strict=True):
        q = math.trunc(Fraction(x, y))
        low = [int(np.int64(v).astype(np.int32)) for v in (x, y)]
        last = math.trunc(Fraction(low[0], 7)) + low[1] - 1000003 * math.trunc(Fraction(low[1], 1000003))
        assert row == [q, x - q * y, (x % 2**64) // 10, last]


@pytest.fixture(scope="module")
def host() -> HostLibrary:
    return HostLibrary(nvcc_library(SOURCE))


def kernel(name: str) -> Kernel:
    return nvcc_module(SOURCE).kernel(name)


def gemm_inputs(m: int, n: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    a, b = torch.randn(m, k).bfloat16(), torch.randn(k, n).bfloat16()
    return a, b, torch.full((m, n), torch.nan)


def launch_gemm(k: Kernel, a: Tensor, b: Tensor, c: Tensor, **options: object):
    m, n = c.shape
    grid = (math.ceil(n / 64), math.ceil(m / 64))
    return k.launch(grid, (128,), [a, b, c, m, n, a.shape[1]], **options)


@pytest.mark.parametrize("seed", [0, 3])
@pytest.mark.parametrize(("m", "n", "k"), [(64, 64, 96), (1, 8, 8), (65, 72, 40), (130, 64, 128)])
def test_gemm(m: int, n: int, k: int, seed: int) -> None:
    a, b, c = gemm_inputs(m, n, k)
    launch_gemm(kernel("gemm"), a, b, c, seed=seed)
    ref = a.double() @ b.double()
    assert (c - ref).abs().max() <= 1e-5 * ref.abs().max()


def test_gemm_has_no_bank_conflicts_and_runs_everywhere() -> None:
    k = kernel("gemm")
    report = launch_gemm(k, *gemm_inputs(65, 72, 40))
    for shape in ((64, 64, 96), (1, 8, 0)):
        report.merge(launch_gemm(k, *gemm_inputs(*shape)))
    assert report.never_executed() == []
    ways = {t.instruction.text.split()[0]: t.bank_ways for t in report.traffic if t.wavefronts}
    assert set(ways) == {
        "ldmatrix.sync.aligned.m8n8.x4.shared.b16",
        "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16",
        "cp.async.cg.shared.global",
    }
    assert all(w == 1 for w in ways.values()), ways


def test_every_barrier_and_wait_of_the_gemm_is_needed() -> None:
    k = kernel("gemm")
    inputs = gemm_inputs(64, 64, 160)
    launch_gemm(k, *inputs)
    assert {i.text.split()[0].rstrip(";") for i in k.sync_instructions} == {"bar.sync", "cp.async.wait_group"}
    assert len(k.sync_instructions) >= 4
    for instruction in k.sync_instructions:
        with k.without(instruction), pytest.raises(PtxFault):
            launch_gemm(k, *inputs)


def test_gemm_with_poisoned_borders() -> None:
    """Elements around the operands are never looked at: they are not allocated."""
    m, n, k = 70, 72, 40
    a, b, c = gemm_inputs(m, n, k)
    guarded = torch.full((m * k + 64,), torch.nan).bfloat16()
    inner = guarded[32 : 32 + m * k].view(m, k)
    inner.copy_(a)
    launch_gemm(kernel("gemm"), inner, b, c)
    assert not c.isnan().any()


@pytest.mark.parametrize("columns", [1, 31, 32, 100, 1000])
def test_softmax(columns: int) -> None:
    x = torch.randn(3, columns) * 4
    out = empty((3, columns), "float32")
    k = kernel("softmax")
    k.launch((3,), (128,), [x, out, columns])
    assert undefined_bytes(out) == 0
    torch.testing.assert_close(torch.from_numpy(out), x.softmax(-1), rtol=2e-6, atol=1e-7)


def test_every_barrier_of_softmax_is_needed() -> None:
    k, x, out = kernel("softmax"), torch.randn(2, 300), torch.zeros(2, 300)
    assert len(k.sync_instructions) >= 3
    for instruction in k.sync_instructions:
        with k.without(instruction), pytest.raises(PtxFault):
            k.launch((2,), (128,), [x, out, 300])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_sums(seed: int) -> None:
    x, out = torch.randn(1000), torch.zeros(1)
    options = {"seed": seed, "resident": 3 if seed else 1}
    kernel("sum_by_atomics").launch((4,), (64,), [x, out, 1000], **options)
    torch.testing.assert_close(out[0], x.sum(), atol=1e-4, rtol=1e-5)
    parts, count = torch.zeros(4), torch.zeros(1, dtype=torch.int32)
    kernel("sum_by_last_block").launch((4,), (32,), [x, parts, count, out, 1000], **options)
    torch.testing.assert_close(out[0], x.sum(), atol=1e-4, rtol=1e-5)


def test_every_fence_of_the_last_block_is_needed() -> None:
    k = kernel("sum_by_last_block")
    fences = k.find("membar") + k.find("fence")
    assert len(fences) == 2
    for instruction in k.sync_instructions:
        args = [torch.randn(500), torch.zeros(4), torch.zeros(1, dtype=torch.int32), torch.zeros(1), 500]
        with k.without(instruction), pytest.raises(PtxFault):
            k.launch((4,), (32,), args)


def test_host_launches_gemm(host: HostLibrary) -> None:
    a, b, c = gemm_inputs(100, 136, 64)
    (launch,) = host.call("launch_gemm", a, b, c, 100, 136, 64, None)
    assert (launch.grid, launch.block, launch.shared) == ((3, 2, 1), (128, 1, 1), 0)
    assert (c - a.double() @ b.double()).abs().max() < 1e-4
    assert host.call("launch_gemm", a, b, c, 0, 136, 64, None) == []


def test_host_mutants_fail(host: HostLibrary) -> None:
    a, b, c = gemm_inputs(64, 64, 96)
    (launch,) = host.call("launch_gemm", a, b, c, 64, 64, 96, None)
    k = host.kernel(launch.kernel)
    with k.without(k.sync_instructions[0]), pytest.raises(PtxFault):
        host.call("launch_gemm", a, b, c, 64, 64, 96, None)


@pytest.mark.parametrize("n", [1, 64, 101, 7000])
def test_host_heuristics_symbols_and_calls(host: HostLibrary, n: int) -> None:
    x = torch.randn(n)
    before = x.clone()
    (launch,) = host.call("launch_scale", x, n, 2.0, 3.0, 60 << 10, None)
    assert launch.block[0] == (128 if n > 64 * 108 else 64)
    index = torch.arange(n)
    partner = torch.where((index + 1 < n) | (index % 2 == 1), index ^ 1, index)
    expected = before[partner] * torch.tensor([2.0, 3.0])[index % 2] + index % 4
    torch.testing.assert_close(x, expected)


def test_host_streams_and_devices(host: HostLibrary) -> None:
    x, runtime = torch.randn(10), load()
    (launch,) = host.call("launch_scale", x, 10, 1.0, 1.0, 1024, None)
    assert (launch.device, launch.stream) == (0, 0)
    assert runtime.cudaSetDevice(2) == runtime.cudaSetDevice(-1) == 101
    assert runtime.cudaSetDevice(1) == 0
    try:
        (launch,) = host.call("launch_scale", x, 10, 1.0, 1.0, 1024, ctypes.c_void_p(77))
    finally:
        runtime.cudaSetDevice(0)
    assert (launch.device, launch.stream) == (1, 77)


def test_host_errors(host: HostLibrary) -> None:
    x = torch.randn(10)
    host.call("launch_scale", x, 10, 1.0, 1.0, 170_000, None, expect=1)  # more than a block can have
    with pytest.raises(PtxFault, match="out of bounds"):
        host.call("launch_scale", x, 11, 1.0, 1.0, 1024, None)
    with pytest.raises(PtxFault, match="out of bounds"):
        host.call("launch_scale", x, 10, 1.0, 1.0, 16, None)
    launches = host.call("launch_scale", x, 11, 1.0, 1.0, 1024, None, check=False, expect=719)
    assert launches[0].report.kinds >= {"out of bounds"}


def test_host_memory_of_its_own(host: HostLibrary) -> None:
    x, out = torch.randn(777), torch.zeros(1)
    host.call("launch_sum", x, out, 777, None)
    torch.testing.assert_close(out[0], x.sum(), atol=1e-4, rtol=1e-5)
    with pytest.raises(PtxError, match="expected error 0, got 2"):  # no allocation while a graph is captured
        host.call("launch_sum", x, out, 777, None, capturing=True)


def test_a_library_without_ptx_says_so() -> None:
    source = '__global__ void k() {}\nextern "C" int go() { k<<<1, 1>>>(); return cudaGetLastError(); }'
    plain = HostLibrary(nvcc_library(source))
    assert len(plain.call("go")) == 1
    compressed = HostLibrary(
        nvcc_library(source.replace("k()", "other()").replace("k<<<", "other<<<"), flags=("--compress-mode=size",))
    )
    with pytest.raises(PtxError, match="compress-mode=none"):
        compressed.call("go")
