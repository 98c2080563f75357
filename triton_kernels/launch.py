"""How kernels of this package reach a device: rows of strided tensors, choice of a configuration, launch."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# Time every configuration that fits when a kernel meets a new key, instead of taking the first one.
AUTOTUNE = os.environ.get("TILEWRIGHT_TRITON_AUTOTUNE", "") == "1"
_tuners: dict[tuple, Callable] = {}


def run(
    kernel: triton.JITFunction,
    programs: int | Callable[[Mapping[str, int]], tuple[int]],
    arguments: dict,
    configs: Sequence[triton.Config],
    key: Sequence[str] = (),
    *,
    fuse: bool = True,
) -> None:
    """Launch ``kernel`` on the device and current stream of its first tensor.

    ``programs`` is the size of the grid's one axis, or a function of the block sizes that gives it. ``configs`` fit
    the device, the preferred one first; ``key`` names the arguments that another choice may depend on. With ``fuse``
    the compiler may contract a product and a sum.
    """
    if programs == 0:
        return
    grid = programs if callable(programs) else (programs,)
    start(kernel, grid, arguments, configs, key, {"enable_fp_fusion": fuse})


def start(
    kernel: triton.JITFunction, grid: object, arguments: dict, configs: Sequence[triton.Config], key: Sequence[str],
    options: dict,
) -> None:  # fmt: skip
    """The launch itself; tests put a compiler or an interpreter of the compiled code in its place."""
    device = next(t for t in arguments.values() if isinstance(t, Tensor)).device
    if device.type != "cuda":  # Triton's interpreter
        kernel[grid](**arguments, **configs[0].all_kwargs(), **options)
        return
    if AUTOTUNE and len(configs) > 1:
        name = (kernel, *map(str, configs))
        if name not in _tuners:
            _tuners[name] = triton.autotune(list(configs), list(key))(kernel)
        kernel = _tuners[name]
    else:
        options = options | configs[0].all_kwargs()
    with torch.cuda.device(device):
        kernel[grid](**arguments, **options)


def shared_limit(device: torch.device) -> int:
    """Bytes of shared memory that one program may use."""
    if device.type != "cuda":
        return 166_912
    return triton.runtime.driver.active.utils.get_device_properties(device.index or 0)["max_shared_mem"]


def tile(blocks: dict[str, int], warps: int, stages: int, all_registers: bool = False) -> triton.Config:
    """A configuration. ``all_registers``: where ptxas would spill a few bytes so that more programs run at once (AMD's
    compiler has no such option)."""
    most = 255 if all_registers and not torch.version.hip else None
    return triton.Config(blocks, num_warps=warps, num_stages=stages, maxnreg=most)


def with_room(configs: Sequence[triton.Config], shared: Callable[[triton.Config], int], device: torch.device) -> list:
    """The configurations whose need of shared memory, at most ``shared(config)`` bytes, the device has."""
    limit = shared_limit(device)
    return [c for c in configs if shared(c) <= limit]


def fitting(configs: Sequence[triton.Config], shared: Callable[[triton.Config], int], device: torch.device) -> list:
    """`with_room`; raises NotImplementedError if there is none."""
    found = with_room(configs, shared, device)
    if not found:
        raise NotImplementedError(
            f"triton: every configuration needs more than the {shared_limit(device)} bytes of shared memory of "
            f"{device}; the smallest needs {min(shared(c) for c in configs)}"
        )
    return found


def rows(t: Tensor) -> tuple[Tensor, tuple[int, int], tuple[int, int, int]]:
    """``t`` as rows along its contiguous last dimension: (t, (size1, size2), (stride0, stride1, stride2)), where row r
    begins at `row_offset`. Leading dimensions that lie one after the other are merged; a tensor that needs more than
    three of them, or whose last dimension is not contiguous, is copied."""
    if t.dim() and t.stride(-1) != 1 and t.shape[-1] > 1:
        t = t.contiguous()
    merged: list[list[int]] = []
    for size, stride in zip(t.shape[:-1], t.stride()[:-1], strict=True):
        if size == 1:
            continue
        if merged and merged[-1][1] == size * stride:
            merged[-1] = [merged[-1][0] * size, stride]
        else:
            merged.append([size, stride])
    if len(merged) > 3:
        return rows(t.contiguous())
    if t.shape[:-1].numel() >= 1 << 31:
        raise NotImplementedError(f"triton: up to 2**31 - 1 rows are supported, got {tuple(t.shape)}")
    merged = [[1, 0]] * (3 - len(merged)) + merged
    return t, (merged[1][0], merged[2][0]), (merged[0][1], merged[1][1], merged[2][1])


@triton.jit
def row_offset(row, sizes, strides):
    """Elements before row ``row`` (int32) of a tensor described by `rows`."""
    # Divisions stay in 32 bits: one of 64 bits is a call of many instructions.
    outer = row // sizes[1]
    first, second, third = outer // sizes[0], outer % sizes[0], row % sizes[1]
    return first.to(tl.int64) * strides[0] + second.to(tl.int64) * strides[1] + third.to(tl.int64) * strides[2]


def check_floats(op: str, **tensors: Tensor | None) -> None:
    """Raise ValueError unless every tensor is float32, bfloat16 or float16."""
    for name, t in tensors.items():
        if t is not None and t.dtype not in FLOATS:
            raise ValueError(f"{op}: {name} must be float32, bfloat16 or float16, got {t.dtype}")
