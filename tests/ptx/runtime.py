"""The stand-in for the CUDA runtime (cudart.cpp): host code that nvcc compiled launches its kernels on the interpreter.

host = HostLibrary(nvcc_library(source))
launches = host.call("launch_it", x, out, 1000)  # extern "C" int launch_it(float*, float*, int)
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .library import PtxError, checked, load
from .machine import MAX_WARP_INSTRUCTIONS, Kernel, Report, _launch_memory, extent, is_array, parse_report


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel by host code."""

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int
    device: int  # the current one, of two
    stream: int
    report: Report


class HostLibrary:
    """A shared library from ``nvcc_library``."""

    def __init__(self, path: Path) -> None:
        load().ptx_runtime_take.restype = ctypes.c_char_p
        load().ptx_runtime_kernel.restype = ctypes.c_void_p
        load().ptx_runtime_options.argtypes = [ctypes.c_uint64, ctypes.c_int, ctypes.c_uint64, ctypes.c_int]
        self._first = load().ptx_runtime_libraries()
        self._host = ctypes.CDLL(str(path))
        self._end = load().ptx_runtime_libraries()

    def kernel(self, name: str) -> Kernel:
        """A kernel by its mangled name, for its instructions and to run without one of them."""
        handle = load().ptx_runtime_kernel(name.encode(), self._first, self._end)
        if handle is None:
            raise PtxError(f"the library registered no kernel {name!r}")
        return Kernel(checked(handle), self)

    def call(
        self,
        function: str,
        *args: object,
        expect: int = 0,
        seed: int = 0,
        resident: int = 1,
        capturing: bool = False,
        check: bool = True,
    ) -> list[Launch]:
        """Call an extern "C" function that returns a cudaError_t, and return what it launched.

        Args:
            args: arrays and tensors become pointers, floats become float, other numbers int, None a null pointer;
                ctypes values go as they are.
            expect: the error that it must return.
            capturing: as while a CUDA graph is captured: allocation and synchronisation fail.
            check: raise PtxFault if a kernel did something wrong.
        """
        arrays = [a for a in args if is_array(a)]
        with self.running(
            arrays, expect=expect, seed=seed, resident=resident, capturing=capturing, check=check
        ) as found:
            error = getattr(self._host, function)(*map(_as_c, args))
        if check and error != expect:
            raise PtxError(f"{function}: expected error {expect}, got {error}")
        return found

    @contextmanager
    def running(
        self,
        arrays: Sequence[object],
        *,
        expect: int = 0,
        seed: int = 0,
        resident: int = 1,
        capturing: bool = False,
        check: bool = True,
    ) -> Iterator[list[Launch]]:
        """Inside, host code of this library may launch, with the memory of ``arrays`` on the device; afterwards the
        list that it gives holds the launches. Options as for `call`. What a kernel did wrong goes before an exception
        of the host code."""
        lib = load()
        lib.ptx_runtime_options(seed, resident, MAX_WARP_INSTRUCTIONS, capturing)
        lib.ptx_runtime_take()
        launches: list[Launch] = []
        failure = None
        with _launch_memory([a for a in arrays if extent(a)[1] > extent(a)[0]]):
            try:
                yield launches
            except Exception as e:
                failure = e
        for raw in json.loads(lib.ptx_runtime_take()):
            if "error" in raw:
                if raw["error"] and expect:
                    continue
                raise PtxError(f"{raw['kernel']}: {raw['error']}") from failure
            kernel = self.kernel(raw["kernel"])
            report = parse_report(kernel.name, kernel.instructions, json.dumps(raw["report"]).encode())
            if check:
                report.check()
            numbers = (raw["shared"], raw["device"], raw["stream"])
            launches.append(Launch(kernel.name, tuple(raw["grid"]), tuple(raw["block"]), *numbers, report))
        if failure is not None:
            raise failure


def _as_c(value: object) -> object:
    if is_array(value):
        return ctypes.c_void_p(value.ctypes.data if hasattr(value, "ctypes") else value.data_ptr())
    if value is None:
        return ctypes.c_void_p(0)
    if isinstance(value, float):
        return ctypes.c_float(value)
    return ctypes.c_int(value) if isinstance(value, int) else value
