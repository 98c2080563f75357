"""Registers, shared memory and occupancy of every CUDA kernel, without a GPU.

    python -m bench.cuda_resources [--targets sm_80 sm_90a ...] [--json FILE]

Compiles csrc/cuda with nvcc and reads what ptxas says of each kernel. --json puts the table into the file's section
"cuda" and leaves the others as they are. Exits with 1 if a kernel spills registers or needs more shared memory than
its target has.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

CSRC = Path(__file__).resolve().parent.parent / "csrc"
SHIPPED = ("sm_80", "sm_90a", "sm_100")
COLUMNS = ("kernel", "threads", "registers", "spilled", "shared", "occupancy")
# Of a multiprocessor: threads, bytes of shared memory (a block takes 1 KiB more than it asks for); of a block: bytes.
_PROCESSOR = {
    "sm_80": (2048, 167_936, 166_912), "sm_86": (1536, 102_400, 101_376), "sm_89": (1536, 102_400, 101_376),
    "sm_90a": (2048, 233_472, 232_448), "sm_100": (2048, 233_472, 232_448), "sm_120": (1536, 102_400, 101_376),
}  # fmt: skip


def dynamic_shared(kernel: str) -> int:
    """Bytes that a launcher asks for at most, of a kernel's demangled name: the `Layout` or `kSharedBytes` of its
    file."""
    if wgmma := re.search(r"wgmma_kernel<\w+, ([48])>", kernel):
        return 1024 + 4 * (16384 + 1024 * int(wgmma[1])) + 2 * 4 * 136 * 8 + 32
    if wgmma := re.search(r"attention_wgmma_kernel<\w+, (\d+), (\d+)>", kernel):
        dim, keys = int(wgmma[1]), int(wgmma[2])
        return 1024 + 128 * dim * 2 + 2 * 2 * keys * dim * 2 + (1 + 4 * 2) * 8
    attention = re.search(r"attention_(\w+)_kernel<.*?Tiling<(\d+), (\d+)(?:, (\d+))?", kernel)
    if attention:
        dim, second, third = int(attention[2]), int(attention[3]), int(attention[4] or 0)
        tiles = {
            "tiles": 16 * second * 4 + 4 * third,
            "grad_keys": 2 * 64 + 4 * second,
            "grad_rows": 2 * 64 + 4 * second,
            "grad_bias": 2 * 64 + 2 * second,
        }[attention[1]]
        return tiles * dim * 2 + (2 * second * 48 if attention[1] == "grad_keys" else 0)
    shape = r"(gemm|integer)_kernel<(?:\w+, )?([48]), .*?Shape<(\d+), (\d+), \d+, \d+, \d+>\s?(?:, (\w+))?"
    numbers = re.search(shape, kernel)
    if numbers is None:
        return 0
    bits, bm, bn = int(numbers[2]), int(numbers[3]), int(numbers[4])
    if numbers[1] == "gemm":
        return 3 * (bm * 128 + bn * 8 * bits) + 2 * 4 * (bn + 8) * 8
    parts = 2 if bm < 128 else 1  # scales within 32 columns; the largest tile is not used with two
    row = numbers[5] in ("true", "1")
    return 3 * (bm * 128 + bn * 16 * bits + bm * 16 * (1 if row else 1 + parts)) + 2 * 4 * parts * (bn + 8) * 8


def occupancy(target: str, threads: int, registers: int, shared: int) -> float:
    """Warps that fit a multiprocessor at once, of those that it can hold."""
    most, memory, _ = _PROCESSOR[target]
    warps = -(-threads // 32)
    per_warp = -(-registers * 32 // 256) * 256
    blocks = min(memory // (shared + 1024), 32, 65536 // per_warp // warps, most // threads)
    return blocks * warps * 32 / most


def short_names(kernels: list[str]) -> list[str]:
    """Demangled names of kernels without namespaces and parameters."""
    done = subprocess.run(["c++filt"], input="\n".join(kernels), capture_output=True, text=True, check=True)
    noise = r"tw::cuda::|\(anonymous namespace\)::|^void |\((?:int|bool)\)|\(.*$"
    return [re.sub(noise, "", name) for name in done.stdout.splitlines()]


def compiled(target: str, source: Path) -> Iterator[tuple]:
    """A line of the table for each kernel of a .cu file."""
    with tempfile.TemporaryDirectory() as folder:
        wgmma = ["-DTILEWRIGHT_CUDA_WGMMA"] if target == "sm_90a" else []  # as cmake/cuda.cmake has it
        command = ["nvcc", "-O3", "-std=c++17", *wgmma, f"-arch={target}", "-cubin", "-Xptxas", "-v"]
        command += ["-keep", "-keep-dir", folder]
        done = subprocess.run(
            [*command, "-I", str(source.resolve().parent.parent), str(source), "-o", f"{folder}/out.cubin"],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} {source}\n{done.stderr}")
        # ptxas adds a fence that wgmma lacks, runs products one by one whose registers are touched before their wait,
        # or ignores setmaxnreg: with a note only.
        if lost := re.findall(r".*\(C75\d\d\).*", done.stderr):
            raise RuntimeError("\n".join(lost))
        ptx = next(Path(folder).glob("*.ptx")).read_text()
    threads = dict(re.findall(r"\.entry (\w+)\(.*?\.maxntid (\d+)", ptx, re.DOTALL))
    report = re.findall(
        r"entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers(.*?)\n",
        done.stderr,
        re.DOTALL,
    )
    names = short_names([line[0] for line in report])
    for (mangled, stores, loads, registers, rest), name in zip(report, names, strict=True):
        static = re.search(r"(\d+) bytes smem", rest)
        block = int(threads.get(mangled, 1))
        shared = (int(static[1]) if static else 0) + dynamic_shared(name)
        spilled = int(stores) + int(loads)
        yield name, block, int(registers), spilled, shared, round(occupancy(target, block, int(registers), shared), 3)


def problems(target: str, line: tuple) -> str:
    """What is wrong with a line of the table, if anything."""
    if line[3]:
        return f"{target} {line[0]}: spills {line[3]} bytes of registers"
    if line[4] > _PROCESSOR[target][2]:
        return f"{target} {line[0]}: needs {line[4]} bytes of shared memory, the limit is {_PROCESSOR[target][2]}"
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="*", default=SHIPPED, choices=_PROCESSOR)
    parser.add_argument("--sources", nargs="*", type=Path, default=sorted((CSRC / "cuda").glob("*.cu")))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    table = {target: [line for s in options.sources for line in compiled(target, s)] for target in options.targets}
    bad = [p for target, lines in table.items() for line in lines if (p := problems(target, line))]
    for target, lines in table.items():
        for line in lines:
            print(target, *line)
    print(*bad, f"{len(bad)} spill registers or need too much shared memory", sep="\n")
    if options.json:
        whole = json.loads(options.json.read_text()) if options.json.exists() else {}
        before = whole.get("cuda", {})
        for target, lines in table.items():  # what was not compiled now stays
            new = {line[0] for line in lines}
            lines.extend(line for line in before.get(target, []) if line[0] not in new)
        whole["cuda"] = {"columns": COLUMNS} | {k: v for k, v in before.items() if k != "columns"} | table
        body = [
            f' "{name}": ' + (section(value) if isinstance(value, dict) else _lines(name, value, " "))
            for name, value in whole.items()
        ]
        options.json.write_text("{\n" + ",\n".join(body) + "\n}\n")
    return bool(bad)


def section(table: dict) -> str:
    """The table as JSON, a line for each of its lines."""
    return "{\n" + ",\n".join(f'  "{name}": ' + _lines(name, rows, "  ") for name, rows in table.items()) + "\n }"


def _lines(name: str, rows: list, indent: str) -> str:
    if name == "columns":
        return json.dumps(rows)
    return "[\n" + ",\n".join(f"{indent} {json.dumps(row)}" for row in rows) + f"\n{indent}]"


if __name__ == "__main__":
    sys.exit(main())
