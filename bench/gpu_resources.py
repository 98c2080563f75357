"""Registers, shared memory and occupancy of every configuration of every Triton kernel, without a GPU.

    python -m bench.gpu_resources [--targets sm_80 sm_90 ...] [--json bench/results/gpu_resources.json]

Compiles what the launchers would launch and asks each target's assembler. Fails if a configuration spills registers or
takes more shared memory than the target has.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import tilewright
from tilewright.bench.triton_compile import TARGETS, compiling, resources
from tilewright.ops.attention_reference import CAUSAL, Operands, Options
from tilewright.quant.weight import pack

SHIPPED = ("sm_80", "sm_90", "sm_100", "gfx942")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Of a multiprocessor: threads, registers, shared memory (a block also takes 1 KiB of it on NVIDIA's).
_PROCESSOR = {
    "sm_80": (2048, 65536, 167_936), "sm_89": (1536, 65536, 102_400), "sm_90": (2048, 65536, 233_472),
    "sm_100": (2048, 65536, 233_472), "sm_120": (1536, 65536, 102_400), "gfx942": (2048, 4 * 512 * 64, 65_536),
}  # fmt: skip


def cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """(name, call) for every kernel in the shapes that choose its configurations."""
    from tilewright.triton_kernels.activation import act_mul
    from tilewright.triton_kernels.kv_append import kv_append
    from tilewright.triton_kernels.norm import norm
    from tilewright.triton_kernels.rope import rope_append, rope_into

    def empty(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    x, weight = empty(64, 4096), empty(4096)
    for activation in ("silu", "gelu", "gelu_tanh"):
        yield activation, lambda activation=activation: act_mul(x, x, activation)
    for n, rows in ((4096, x), (128, empty(64, 32, 128)), (20000, empty(4, 20000))):
        w = empty(n)
        yield f"rms_norm n={n}, residual", lambda rows=rows, w=w: norm(rows, rows, w, None, 1e-5, False)
        yield f"layer_norm n={n}", lambda rows=rows, w=w: norm(rows, None, w, w, 1e-5, True)
    q, k = empty(2, 32, 8, 128), empty(2, 8, 8, 128)
    cos, sin = tilewright.rope_tables(10000.0, 128, 64)
    pages, table = empty(16, 8, 16, 128), torch.zeros(2, 8, dtype=torch.int32)
    seqlens = torch.zeros(2, dtype=torch.int32)
    for interleaved in (False, True):
        name = "interleaved" if interleaved else "halves"
        yield f"rope {name}", lambda i=interleaved: rope_into(q, k, q, k, cos, sin, None, i, None)
        yield (
            f"rope + append {name}, paged",
            lambda i=interleaved: rope_append(q, k, k, cos, sin, pages, pages, block_table=table,
                                              cache_seqlens=seqlens, interleaved=i),
        )  # fmt: skip
    yield "kv_append dense", lambda: kv_append(pages[:2], pages[:2], k, k)
    yield "kv_append paged", lambda: kv_append(pages, pages, k, k, None, table, seqlens)
    yield from _linear()
    yield from _attention()
    del weight


def _linear() -> Iterator[tuple[str, Callable[[], object]]]:
    from tilewright.triton_kernels.linear import linear
    from tilewright.triton_kernels.weight import gpu_weight

    n, k = 256, 512
    for kind, group, offset in (("int4", 32, "none"), ("int4", 128, "zero"), ("int4", 32, "min"), ("int8", -1, "none")):
        groups = 1 if group == -1 else k // group
        codes, scales = torch.zeros(n, k, dtype=torch.uint8), torch.ones(n, groups)
        zeros = torch.zeros(n, groups, dtype=torch.uint8)
        offsets = {"none": None, "zero": zeros, "min": scales}[offset]
        packed = pack(codes, scales, offsets, kind, group, offset)
        weight = gpu_weight(packed.packed, *packed.spec())
        for m in (1, 4, 16, 32, 64, 128):
            for dtype, activation in (
                (BF16, "bf16"),
                (FP16, "fp32"),
                (FP32, "fp32"),
                (BF16, "int8"),
                (BF16, "int8_token"),
            ):
                name = f"linear {packed.format} m={m} {str(dtype)[6:]} {activation}"
                x = torch.empty(m, k, dtype=dtype)
                yield name, lambda x=x, weight=weight, a=activation: linear(x, weight, None, a)


def _attention() -> Iterator[tuple[str, Callable[[], object]]]:
    from tilewright.triton_kernels.attention import attention
    from tilewright.triton_kernels.attention_backward import attention_backward

    def operands(d: int, seq_q: int, seq_k: int, heads: int, dtype: torch.dtype, **more: object) -> Operands:
        q, k = torch.empty(1, heads, seq_q, d, dtype=dtype), torch.empty(1, 2, seq_k, d, dtype=dtype)
        return Operands(q, k, k.clone(), **more)

    causal = CAUSAL.index("bottom_right")
    for dtype in (BF16, FP16, FP32):
        for d in (64, 128, 256, 512):
            scale = d**-0.5
            many = operands(d, 1024, 1024, 8, dtype)
            name = f"{str(dtype)[6:]} head_dim={d}"
            yield f"attention {name} causal", lambda t=many, s=scale: attention(t, Options(s, 0.0, causal), True)
            for rows in (16, 32, 64):
                few = operands(d, 1, 4096, 2 * rows, dtype)
                yield f"decode {name} rows={rows}", lambda t=few, s=scale: attention(t, Options(s, 0.0, causal), True)
            lse = torch.empty(1, 8, 1024)
            yield (
                f"backward {name} causal",
                lambda t=many, s=scale, lse=lse: attention_backward(
                    t.q, None, t, Options(s, 0.0, causal), t.q, lse, False, False
                ),
            )
    # One case with every feature for each kernel: more registers than those above.
    t = operands(128, 512, 512, 8, BF16)
    seed, starts = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    full = t._replace(
        mask=torch.ones(1, 1, 512, 512, dtype=torch.bool), bias=torch.empty(1, 8, 512, 512), alibi=torch.empty(8),
        sinks=torch.empty(8), seed=seed, k_start=starts,
    )  # fmt: skip
    options = Options(0.1, 20.0, causal, 300, -1, 0.1)
    lse = torch.empty(1, 8, 512)
    yield "attention bfloat16 head_dim=128 with every feature", lambda: attention(full, options, True)
    yield (
        "backward bfloat16 head_dim=128 with every feature",
        lambda: attention_backward(t.q, lse, full, options, t.q, lse, True, True),
    )
    packed = t._replace(q_start=starts, q_end=starts + 512, k_start=starts, k_end=starts + 512)
    yield "attention bfloat16 head_dim=128 packed", lambda: attention(packed, options._replace(dropout_p=0.0), True)
    yield (
        "backward bfloat16 head_dim=128 packed",
        lambda: attention_backward(t.q, None, packed, options._replace(dropout_p=0.0), t.q, lse, False, False),
    )
    pages = torch.empty(64, 2, 16, 128, dtype=BF16)
    table = torch.zeros(1, 64, dtype=torch.int32)
    for name, seq_q in (("decode", 1), ("attention", 512)):
        q = torch.empty(1, 8, seq_q, 128, dtype=BF16)
        paged = Operands(q, pages, pages.clone(), k_end=starts + 800, block_table=table)
        yield f"{name} bfloat16 head_dim=128 paged", lambda t=paged: attention(t, Options(0.1, 0.0, causal), True)


def occupancy(target: str, found: dict[str, int]) -> float:
    """Warps that fit a multiprocessor at once, of those that it can hold."""
    threads, registers, shared = _PROCESSOR[target]
    lanes = 64 if target.startswith("gfx") else 32
    warps = found["warps"]
    if lanes == 64:
        per_warp = -(-found["registers"] // 8) * 8 * lanes
        blocks = [registers // per_warp // warps, shared // max(found["shared"], 1)]
    else:
        per_warp = -(-found["registers"] * lanes // 256) * 256
        blocks = [registers // per_warp // warps, shared // (found["shared"] + 1024), 32]
    return min(*blocks, threads // (warps * lanes)) * warps * lanes / threads


def rows(target: str) -> Iterator[dict]:
    """A line of the table for every configuration."""
    seen = set()
    for name, call in cases():
        with compiling(target, every=True) as launches:
            call()
        for one in launches:
            key = (one.compiled.metadata.hash, name)
            if key in seen:
                continue
            seen.add(key)
            found = resources(one.compiled)
            blocks = {n: v for n, v in one.arguments.items() if n.isupper() and n.startswith("BLOCK")}
            yield {
                "target": target, "case": name, "kernel": one.compiled.metadata.name.lstrip("_"), "blocks": blocks,
                "stages": one.compiled.metadata.num_stages, **found, "occupancy": round(occupancy(target, found), 3),
                "shared_limit": TARGETS[target][1],
            }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="*", default=SHIPPED, choices=TARGETS)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    table = []
    for target in options.targets:
        for row in rows(target):
            bad = row["spilled"] > 0 or row["shared"] > row["shared_limit"]
            print(
                f"{'BAD ' if bad else ''}{row}" if bad or sys.stdout.isatty() else ".",
                flush=True,
                end="\n" if bad else "",
            )
            table.append(row)
    if options.json:
        options.json.write_text(json.dumps(table, indent=0) + "\n")
    bad = [r for r in table if r["spilled"] or r["shared"] > r["shared_limit"]]
    print(f"\n{len(table)} configurations, {len(bad)} spill or need too much shared memory")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
