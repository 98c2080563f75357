"""Every barrier and wait of one instantiation of each Triton kernel, deleted in turn: its test must fail then."""

from __future__ import annotations

import pytest
import torch
from triton_device import INTERPRETED, Device, running, using

if INTERPRETED:
    pytest.skip("the interpreter has no barriers", allow_module_level=True)

import test_triton_attention as attention_tests
import test_triton_gradients as gradient_tests
import test_triton_linear as linear_tests
from cases import AttentionCase
from triton_sequences import rand

import tilewright
from tilewright.ops.attention_reference import Options

BF16 = torch.bfloat16
BOTTOM = "bottom_right"


def norm() -> None:
    x = rand("x", 3, 4200, dtype=BF16)
    with running():
        out = tilewright.layer_norm(x, None, None, 1e-5, backend="triton")
    torch.testing.assert_close(out, torch.nn.functional.layer_norm(x, (4200,)), rtol=2e-2, atol=2e-2)


def append() -> None:
    cache, k = torch.zeros(4, 2, 8, 48), rand("k", 2, 2, 9, 48)
    table = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32)
    with running():
        tilewright.kv_append(cache, cache.clone(), k, k, block_table=table, backend="triton")
    assert torch.equal(cache.view(2, 2, 2, 8, 48).transpose(1, 2).reshape(2, 2, 16, 48)[:, :, :9], k)


def inplace_rope() -> None:
    q = rand("q", 2, 1, 3, 8)
    cos, sin = tilewright.rope_tables(10000.0, 8, 3)
    expected = tilewright.rope(q, q, cos, sin)[0]
    with running():
        tilewright.rope(q, q.clone(), cos, sin, inplace=True, backend="triton")
    assert torch.equal(q, expected)


def linear(m: int, activation: str) -> None:
    linear_tests.test_error_rule(linear_tests.Case(m, 70, 400, "int4", 64), BF16, activation)


# What runs each kernel, and how many of its barriers may go unnoticed, with the reason.
CASES = {
    "norm": (norm, {}),
    "append": (append, {}),
    "rope": (inplace_rope, {}),
    "gemv": (lambda: linear(2, "bf16"), {}),
    "gemm": (lambda: linear(40, "bf16"), {}),
    "gemm_integer": (lambda: linear(40, "int8"), {}),
    "quantise": (lambda: linear(5, "int8_token"), {}),
    "forward": (
        lambda: attention_tests.run(AttentionCase("f", 60, 300, 64, heads=3, kv_heads=1, causal=BOTTOM), BF16), {},
    ),
    "forward_split": (
        lambda: attention_tests.run(AttentionCase("s", 1, 600, 64, heads=8, kv_heads=1, causal=BOTTOM), BF16), {},
    ),
    "forward_f32": (
        lambda: attention_tests.run(AttentionCase("w", 30, 100, 32, heads=3, kv_heads=1), torch.float32), {},
    ),
    "backward": (
        lambda: gradient_tests.gradients(gradient_tests.backward_case(BF16, 3, 1, 40, 110, 64), Options(0.125, 0.0, 2)),
        {},
    ),
    "backward_bias": (
        lambda: gradient_tests.gradients(
            gradient_tests.backward_case(BF16, 1, 1, 70, 80, 32, bias=rand("b", 1, 70, 80, dtype=BF16)), Options(0.2)
        ),
        {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_every_barrier_is_needed(name: str) -> None:
    run, allowed = CASES[name]
    missed: dict[str, list] = {}
    with using(Device()) as device:
        run()
        for kernel in list(device.kernels.values()):
            for instruction in kernel.sync_instructions:
                with kernel.without(instruction):
                    try:
                        run()
                    except AssertionError:  # PtxFault is one
                        continue
                missed.setdefault(kernel.name, []).append(str(instruction))
    assert {kernel: len(found) for kernel, found in missed.items()} == allowed, missed
