"""Registers, shared memory and occupancy of every configuration of every Triton kernel, without a GPU.

    python -m bench.gpu_resources [--targets sm_80 sm_90 ...] [--cases TEXT] [--json FILE] [--docs FILE]

Compiles what the launchers would launch and asks each target's assembler. --json writes the table, --docs the part of
it that docs/gpu.md shows; with --cases only cases whose name has the text are compiled, and the file's lines of the
others stay. Exits with 1 if a configuration spills registers or takes more shared memory than its target
has.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import tilewright
from tilewright.bench.cuda_resources import section
from tilewright.bench.triton_compile import TARGETS, Launch, launches, resources
from tilewright.ops.attention_reference import CAUSAL, Operands, Options
from tilewright.quant.weight import QuantizedWeight, pack, pack_bf16

SHIPPED = ("sm_80", "sm_90", "sm_100", "gfx942")
COLUMNS = ("case", "kernel", "blocks", "warps", "stages", "registers", "spilled", "shared", "occupancy")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Of a multiprocessor: threads, registers, shared memory (a block also takes 1 KiB of it on NVIDIA's).
_PROCESSOR = {
    "sm_80": (2048, 65536, 167_936), "sm_89": (1536, 65536, 102_400), "sm_90": (2048, 65536, 233_472),
    "sm_100": (2048, 65536, 233_472), "sm_120": (1536, 65536, 102_400), "gfx942": (2048, 4 * 512 * 64, 65_536),
}  # fmt: skip
# Cases for which a target has too little shared memory: they raise.
_100_KIB = re.compile(r"gradients float32 head_dim=512|(attention|decode) float32 head_dim=512.* every feature")
REFUSED = {
    "sm_89": _100_KIB,
    "sm_120": _100_KIB,
    "gfx942": re.compile(
        r"gradients \S+ head_dim=512|gradients float32 head_dim=256|(attention|decode) float32 head_dim=512"
    ),
}
Call = Callable[[], object]


def empty(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


def cases() -> Iterator[tuple[str, Call]]:
    """(name, call) for every kernel in the shapes that choose its configurations."""
    yield from _elementwise()
    yield from _linear()
    yield from _attention()


def _elementwise() -> Iterator[tuple[str, Call]]:
    from tilewright.triton_kernels.activation import act_mul
    from tilewright.triton_kernels.kv_append import kv_append
    from tilewright.triton_kernels.norm import norm
    from tilewright.triton_kernels.rope import rope_append, rope_into

    x = empty(64, 4096)
    for activation in ("silu", "gelu", "gelu_tanh"):
        yield activation, lambda a=activation: act_mul(x, x, a)
    for rows in (x, empty(64, 32, 128), empty(4, 20000)):
        n = rows.shape[-1]
        yield f"rms_norm n={n}, residual", lambda r=rows, n=n: norm(r, r, empty(n), None, 1e-5, False)
        yield f"layer_norm n={n}", lambda r=rows, n=n: norm(r, None, empty(n), empty(n), 1e-5, True)
    q, k = empty(2, 32, 8, 128), empty(2, 8, 8, 128)
    cos, sin = tilewright.rope_tables(10000.0, 128, 64)
    pages, table = empty(16, 8, 16, 128), torch.zeros(2, 8, dtype=torch.int32)
    lengths = torch.zeros(2, dtype=torch.int32)
    for i, name in enumerate(("halves", "interleaved")):
        yield f"rope {name}", lambda i=i: rope_into(q, k, q, k, cos, sin, None, bool(i), None)
        paged = {"block_table": table, "cache_seqlens": lengths, "interleaved": bool(i)}
        yield f"rope_append {name}", lambda p=paged: rope_append(q, k, k, cos, sin, pages, pages, **p)
    yield "kv_append", lambda: kv_append(pages[:2], pages[:2], k, k)
    yield "kv_append paged", lambda: kv_append(pages, pages, k, k, None, table, lengths)


def _linear() -> Iterator[tuple[str, Call]]:
    from tilewright.triton_kernels.linear import linear
    from tilewright.triton_kernels.weight import gpu_weight

    n, k = 256, 512
    sizes = torch.zeros(4, dtype=torch.int64)

    def calls(packed: QuantizedWeight, dtype: torch.dtype, activation: str, rows: tuple[int, ...]) -> Iterator:
        weight = gpu_weight(packed.packed, *packed.spec())
        for m in rows:
            x, name = empty(m, k, dtype=dtype), f"{packed.format} {str(dtype)[6:]} {activation} m={m}"
            yield f"linear {name}", lambda x=x: linear(x, weight, None, activation)
            if m >= 64 and packed.group_size == 32:
                yield f"grouped linear {name}", lambda x=x: linear(x, weight, None, activation, sizes)

    ways = [(BF16, "bf16"), (BF16, "int8")]
    for kind, group, offset, more in (
        ("int4", 32, "none", [(FP16, "fp32"), (FP32, "fp32"), (BF16, "int8_token")]),
        ("int4", 128, "zero", []), ("int4", 32, "min", []), ("int8", -1, "none", []), ("int8", 16, "none", []),
    ):  # fmt: skip
        groups = 1 if group == -1 else k // group
        codes, scales = torch.zeros(n, k, dtype=torch.uint8), torch.ones(n, groups)
        zeros = torch.zeros(n, groups, dtype=torch.uint8)
        packed = pack(codes, scales, {"none": None, "zero": zeros, "min": scales}[offset], kind, group, offset)
        for dtype, activation in ways + more:
            yield from calls(packed, dtype, activation, (1, 4, 16, 32, 64, 128))
    for packed in (
        pack(codes, torch.ones(n, k // 64), None, "nf4", 64), pack(codes, torch.ones(n, 1), None, "e4m3", -1),
        pack_bf16(torch.zeros(n, k)),
    ):  # fmt: skip
        yield from calls(packed, BF16, "bf16", (1, 16, 64, 128))


def _attention() -> Iterator[tuple[str, Call]]:
    from tilewright.triton_kernels.attention import attention
    from tilewright.triton_kernels.attention_backward import attention_backward

    causal = CAUSAL.index("bottom_right")

    def operands(d: int, seq_q: int, seq_k: int, heads: int, dtype: torch.dtype) -> Operands:
        k = empty(1, 2, seq_k, d, dtype=dtype)
        return Operands(empty(1, heads, seq_q, d, dtype=dtype), k, k.clone())

    def both(name: str, t: Operands, options: Options) -> Iterator[tuple[str, Call]]:
        lse = empty(*t.q.shape[:3], dtype=FP32)
        yield f"attention {name}", lambda: attention(t, options, True)
        yield f"gradients {name}", lambda: attention_backward(t.q, lse, t, options, t.q, lse, True, True)

    starts, seed = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    for dtype in (BF16, FP16, FP32):
        for d in (64, 128, 256, 512) if dtype != FP16 else (128,):  # float16 takes bfloat16's configurations
            name, plain = f"{str(dtype)[6:]} head_dim={d}", Options(d**-0.5, 0.0, causal)
            t = operands(d, 1024, 1024, 8, dtype)
            yield from both(name, t, plain)
            for rows in (16, 32, 64):
                few = operands(d, 1, 4096, 2 * rows, dtype)
                yield f"decode {name} rows={rows}", lambda t=few, o=plain: attention(t, o, True)
            if dtype == FP16:
                continue
            mask, bias = torch.ones(1, 1, 1024, 1024, dtype=torch.bool), empty(1, 8, 1024, 1024, dtype=dtype)
            everything = t._replace(
                mask=mask, bias=bias, alibi=empty(8, dtype=FP32), sinks=empty(8, dtype=FP32), seed=seed
            )
            options = Options(0.1, 20.0, causal, 300, -1, 0.1)
            yield from both(f"{name} every feature", everything, options)
            for heads, seq_q in ((16, 1), (16, 8)):
                few = everything._replace(q=empty(1, heads, seq_q, d, dtype=dtype), alibi=None, sinks=None)
                few = few._replace(mask=mask[:, :, :seq_q], bias=bias[:, :1, :seq_q])
                yield f"decode {name} rows={8 * seq_q} every feature", lambda t=few, o=options: attention(t, o, True)
    t = operands(128, 512, 512, 8, BF16)
    ends = starts + 512
    options = Options(0.1, 0.0, causal)
    yield from both("bfloat16 packed", t._replace(q_start=starts, q_end=ends, k_start=starts, k_end=ends), options)
    pages, table = empty(64, 2, 16, 128), torch.zeros(1, 64, dtype=torch.int32)
    for name, seq_q in (("decode", 1), ("attention", 512)):
        paged = Operands(empty(1, 8, seq_q, 128), pages, pages.clone(), k_end=ends, block_table=table)
        yield f"{name} bfloat16 paged", lambda t=paged: attention(t, options, True)


def configurations(target: str) -> Iterator[tuple[str, Launch]]:
    """(case, launch) of every configuration that the target may run, once a case; nothing is compiled."""
    for name, call in cases():
        if target in REFUSED and REFUSED[target].match(name):
            continue
        with launches(target, choice=None) as found:
            call()
        seen = set()
        for one in found:
            key = (one.kernel.fn.__name__, str(one.blocks()), str(one.options))
            if key not in seen:
                seen.add(key)
                yield name, one


def describe(launch: Launch) -> tuple[str, str, int, int]:
    """The columns kernel, blocks, warps, stages."""
    blocks = " ".join(f"{name.removeprefix('BLOCK_').lower()}={size}" for name, size in launch.blocks().items())
    return launch.kernel.fn.__name__.lstrip("_"), blocks, launch.options["num_warps"], launch.options["num_stages"]


def occupancy(target: str, found: dict[str, int]) -> float:
    """Warps that fit a multiprocessor at once, of those that it can hold."""
    threads, registers, shared = _PROCESSOR[target]
    warps = found["warps"]
    if target.startswith("gfx"):
        lanes, per_warp, blocks = 64, -(-found["registers"] // 8) * 8 * 64, shared // max(found["shared"], 1)
    else:
        lanes, per_warp = 32, -(-found["registers"] * 32 // 256) * 256
        blocks = min(shared // (found["shared"] + 1024), 32)
    return min(blocks, registers // per_warp // warps, threads // (warps * lanes)) * warps * lanes / threads


_known: dict[str, dict[str, int]] = {}  # by the hash of what was compiled: cases share kernels


def row(target: str, case: str, launch: Launch) -> tuple:
    """A line of the table."""
    compiled = launch.compiled()
    key = compiled.metadata.hash
    if key not in _known:
        _known[key] = resources(compiled)
    found = _known[key]
    numbers = found["registers"], found["spilled"], found["shared"], round(occupancy(target, found), 3)
    return case, *describe(launch), *numbers


def problems(target: str, line: tuple) -> str:
    """What is wrong with a line of the table, if anything."""
    spilled, shared = line[6], line[7]
    # AMD's are only listed. On sm_89 and sm_120 a few tiles that sm_80, 90 and 100 were tuned for spill 16 to 44 bytes.
    if spilled and target in SHIPPED and not target.startswith("gfx"):
        return f"{target} {line}: spills {spilled} bytes of registers"
    if shared > TARGETS[target][1]:
        return f"{target} {line}: needs {shared} bytes of shared memory, the limit is {TARGETS[target][1]}"
    return ""


def markdown(table: dict[str, list[tuple]]) -> str:
    """The preferred configuration of each case: registers, KiB of shared memory and occupancy on each target."""
    head = ["case", "kernel", "blocks", *table]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    first: dict[tuple[str, str], dict[str, tuple]] = {}
    for target, found in table.items():
        for line in found:
            first.setdefault((line[0], line[1]), {}).setdefault(target, line)
    for (case, kernel), by_target in first.items():
        any_line = next(iter(by_target.values()))
        blocks = f"{any_line[2]}, {any_line[3]} warps"
        cells = []
        for target in table:
            line = by_target.get(target)
            other = "" if line is None or line[2:5] == any_line[2:5] else f" ({line[2]}, {line[3]} warps)"
            cells.append("" if line is None else f"{line[5]} / {line[7] / 1024:.0f} / {line[8]:.0%}{other}")
        lines.append(f"| {case} | {kernel} | {blocks} | {' | '.join(cells)} |")
    return "\n".join(lines)


def write(path: Path, table: dict[str, list]) -> None:
    """A line of the file for each line of the tables; the section of the CUDA kernels stays (cuda_resources.py)."""
    cuda = json.loads(path.read_text()).get("cuda") if path.exists() else None
    body = ",\n".join(
        f' "{name}": [\n' + ",\n".join(f"  {json.dumps(line)}" for line in found) + "\n ]"
        for name, found in table.items()
    )
    if cuda is not None:
        body += f',\n "cuda": {section(cuda)}'
    path.write_text(f'{{\n "columns": {json.dumps(COLUMNS)},\n{body}\n}}\n')


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="*", default=SHIPPED, choices=TARGETS)
    parser.add_argument("--cases", default="")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--docs", type=Path)
    options = parser.parse_args()
    if options.cases and not options.json:
        parser.error("--cases needs --json FILE, whose lines of the other cases stay")
    before = json.loads(options.json.read_text()) if options.json and options.json.exists() else {}
    table: dict[str, list[tuple]] = {}
    bad = 0
    for target in options.targets:
        lines = table.setdefault(target, [])
        known = {tuple(line[:5]): tuple(line) for line in before.get(target, [])}
        for case, launch in configurations(target):
            line = None if options.cases in case else known.get((case, *describe(launch)))
            lines.append(line or row(target, case, launch))
            message = problems(target, lines[-1])
            bad += bool(message)
            print(message or ".", end="\n" if message else "", flush=True)
        print(f" {target}: {len(lines)} configurations")
    if options.json:
        if before:
            table = {name: table.get(name, before.get(name, [])) for name in SHIPPED} | table
        write(options.json, table)
    if options.docs:
        head, _, rest = options.docs.read_text().partition("<!-- resources -->\n")
        _, _, tail = rest.partition("<!-- /resources -->\n")
        options.docs.write_text(f"{head}<!-- resources -->\n{markdown(table)}\n<!-- /resources -->\n{tail}")
    print(f"{bad} spill registers or need too much shared memory")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
