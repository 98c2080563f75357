"""The CUDA extension as it is shipped, on a machine without a driver, and ptxas' word on its kernels.

TILEWRIGHT_CUDA_BUILD_DIR names a CMake build directory with TILEWRIGHT_CUDA=ON. Of its
TILEWRIGHT_CUDA_ARCHITECTURES, 999 stands for one that no toolkit knows.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import cuda_device
import pytest
import torch
from gpu_linear import Case, inputs
from ptx.compilers import needs_nvcc
from test_cuda_linear import run

from tilewright.bench import cuda_resources

BUILD = os.environ.get("TILEWRIGHT_CUDA_BUILD_DIR")
needs_build = pytest.mark.skipif(not BUILD, reason="needs TILEWRIGHT_CUDA_BUILD_DIR (a CMake build with CUDA)")
TABLE = Path(__file__).parent.parent / "bench" / "results" / "gpu_resources.json"

PROBE = """
import importlib.machinery, importlib.util, sys, torch
sys.modules["torch"]
loader = importlib.machinery.ExtensionFileLoader("tilewright._cuda", sys.argv[1])
cuda = importlib.util.module_from_spec(importlib.util.spec_from_loader("tilewright._cuda", loader))
loader.exec_module(cuda)
x = torch.ones(2, 8)
print(cuda.built_for())
for kind in (2, 1):  # a CPU tensor is refused; taken for a GPU's, it gets as far as the missing driver
    cuda.use_device_type(kind)
    try:
        cuda.norm(0, 0, x, "rms_norm", None, None, None, torch.empty_like(x), None, 1e-5, False)
    except (ValueError, RuntimeError) as e:
        print(type(e).__name__, e)
"""


@needs_build
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a driver")
def test_imports_without_a_driver_and_says_what_is_missing() -> None:
    (library,) = Path(BUILD).glob("_cuda.*.so")
    done = subprocess.run([sys.executable, "-c", PROBE, str(library)], capture_output=True, text=True, check=True)
    built, refused, failed = done.stdout.splitlines()
    cache = (Path(BUILD) / "CMakeCache.txt").read_text()
    asked = re.search(r"^TILEWRIGHT_CUDA_ARCHITECTURES:\w+=(.+)$", cache, re.MULTILINE)[1]
    assert built == asked.removesuffix(";999")
    assert refused == "ValueError rms_norm: every tensor must be a CUDA tensor"
    assert re.fullmatch(r"RuntimeError CUDA: (CUDA driver version is insufficient.*|no CUDA-capable device.*)", failed)


@needs_build
def test_needs_no_cuda_library() -> None:
    (library,) = Path(BUILD).glob("_cuda.*.so")
    needed = subprocess.run(["readelf", "-d", str(library)], capture_output=True, text=True, check=True).stdout
    assert "NEEDED" in needed and not re.search(r"NEEDED.*(cuda|torch|stdc\+\+)", needed)


@needs_nvcc
@pytest.mark.parametrize("source", ["norm", "linear_gemv"])
def test_no_spills(source: str) -> None:
    """Two files for one architecture; `python -m bench.cuda_resources` looks at all of them."""
    for line in cuda_resources.compiled(
        "sm_90a" if source == "norm" else "sm_80", cuda_device.CSRC / f"cuda/{source}.cu"
    ):
        assert cuda_resources.problems("sm_80", line) == ""


def test_the_table_has_every_kernel_and_no_spills() -> None:
    table = json.loads(TABLE.read_text())["cuda"]
    assert table["columns"] == list(cuda_resources.COLUMNS) and set(table) >= set(cuda_resources.SHIPPED)
    for target in cuda_resources.SHIPPED:
        assert [p for line in table[target] if (p := cuda_resources.problems(target, tuple(line)))] == []
        listed = {line[0].split("<")[0] for line in table[target]}
        written = {
            name
            for source in (cuda_device.CSRC / "cuda").glob("*.cu")
            for name in re.findall(r"(\w+_kernel)\(", source.read_text())
        }
        for_hopper = {name for name in written if name.endswith("wgmma_kernel")}
        assert listed == (written if target == "sm_90a" else written - for_hopper)


@needs_nvcc
@pytest.mark.parametrize(
    ("case", "activation"),
    [
        (Case(m, 64, 64, codes), a)
        for m, codes in ((9, "int4"), (30, "int8"), (60, "int4"), (70, "int8"))
        for a in ("bf16", "int8")
    ],
    ids=str,
)
def test_shared_memory_is_what_the_table_says(case: Case, activation: str) -> None:
    with cuda_device.module().watched() as launches:
        run(*inputs(case, torch.bfloat16), activation)
    names = subprocess.run(["c++filt", launches[-1].kernel], capture_output=True, text=True, check=True).stdout
    # The table is of the most that the integer kernel may need: with an offset and two scales within 32 columns.
    found, listed = launches[-1].shared, cuda_resources.dynamic_shared(names)
    assert 0 < found <= listed and (activation == "int8" or found == listed)
