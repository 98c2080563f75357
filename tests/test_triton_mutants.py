"""Every barrier and wait of one instantiation of each Triton kernel, deleted in turn: its test must fail then."""

from __future__ import annotations

import pytest
import torch
from triton_device import INTERPRETED, SWEEP, Device, running, using

if INTERPRETED:
    pytest.skip("the interpreter has no barriers", allow_module_level=True)

import test_triton_attention as attention_tests
import test_triton_gradients as gradient_tests
import test_triton_linear as linear_tests
from cases import AttentionCase
from gpu_attention import grad_case, rand

import tilewright
from tilewright.ops.attention_reference import CAUSAL, Options

BF16 = torch.bfloat16
BOTTOM = "bottom_right"


def norm() -> None:
    x = rand("x", 3, 4200, dtype=BF16)
    with running():
        out = tilewright.layer_norm(x, None, None, 1e-5, backend="triton")
    torch.testing.assert_close(out, torch.nn.functional.layer_norm(x, (4200,)), rtol=2e-2, atol=2e-2)


def append() -> None:
    cache, k = torch.zeros(40, 1, 8, 48), rand("k", 2, 1, 150, 48)  # slots are compared 128 at a time
    table = torch.arange(40, dtype=torch.int32).view(2, 20)
    with running():
        tilewright.kv_append(cache, cache.clone(), k, k, block_table=table, backend="triton")
    assert torch.equal(cache.view(2, 1, 160, 48)[:, :, :150], k)


def inplace_rope() -> None:
    q = rand("q", 2, 1, 3, 8)
    cos, sin = tilewright.rope_tables(10000.0, 8, 3)
    expected = tilewright.rope(q, q, cos, sin)[0]
    with running():
        tilewright.rope(q, q.clone(), cos, sin, inplace=True, backend="triton")
    assert torch.equal(q, expected)


def linear(m: int, activation: str, k: int = 400, dtype: torch.dtype = BF16) -> None:
    linear_tests.test_error_rule(linear_tests.Case(m, 128, k, "int4", 64), dtype, activation)


def grouped() -> None:
    linear_tests.test_groups_are_single_calls("int4", "zero", BF16, "bf16", [16, 16, 32, 0, 17])


def forward(name: str, dtype: torch.dtype = BF16, **sizes: object) -> None:
    attention_tests.run(AttentionCase(name, **sizes, causal=BOTTOM), dtype)


def backward(heads: int, seq_q: int, seq_k: int, dim: int, scale: float, **more: object) -> None:
    t = grad_case(BF16, heads, 1, seq_q, seq_k, dim, **more)
    gradient_tests.gradients(t, Options(scale, 0.0, CAUSAL.index(BOTTOM)))


def bias(*shape: int) -> None:
    backward(2, 40, 50, 32, 0.2, bias=rand("b", *shape, dtype=BF16))


# Why a kernel stays right without one of these.
LOOP = "the barrier before a loop's last copies is behind its last reads: no warp reads what the next copies overwrite"
DRAIN = "waits behind the last loop for copies that fill nothing anybody reads or overwrites"
AFTER_DRAIN = "orders what DRAIN waited for"
ONE_STEP = "stands between steps of a loop, and here is one; the case merge has more"
ONE_TILE = "stands between tiles of keys, of which there is one; bias_of_rows has more"
NOT_RUN = "a sum over rows, which this bias does not have; bias_of_keys does"
ENDS = {"_forward": [LOOP, DRAIN, AFTER_DRAIN], "_grad_kv": [DRAIN, AFTER_DRAIN], "_grad_q": [DRAIN, AFTER_DRAIN]}

# What runs each kernel, and the reasons why barriers and waits go unnoticed, one for each that does.
CASES = {
    "norm": (norm, {}),
    "append": (append, {}),
    "rope": (inplace_rope, {}),
    "gemv": (lambda: linear(2, "bf16", 1040), {}),
    "gemm": (lambda: linear(40, "bf16"), {}),
    "gemm_integer": (lambda: linear(40, "int8"), {}),
    "gemm_grouped": (grouped, {}),
    "gemm_f32": (lambda: linear(5, "fp32", dtype=torch.float32), {}),
    "quantise": (lambda: linear(5, "int8_token"), {}),
    "forward": (
        lambda: forward("f", seq_q=60, seq_k=300, head_dim=64, heads=3, kv_heads=1), {"_forward": ENDS["_forward"]},
    ),
    "forward_split": (
        lambda: forward("s", seq_q=1, seq_k=600, head_dim=64, heads=8, kv_heads=1), {"_merge": [ONE_STEP]},
    ),
    # 4 partial results a step.
    "merge": (lambda: forward("m", seq_q=1, seq_k=1300, head_dim=16, v_dim=512, heads=2, kv_heads=1), {}),
    "forward_f32": (
        lambda: forward("w", torch.float32, seq_q=30, seq_k=100, head_dim=32, heads=3, kv_heads=1), {},
    ),
    "backward": (lambda: backward(3, 40, 110, 64, 0.125), ENDS),
    # A bias that is broadcast along heads, rows and keys: each walks over something else.
    "bias_of_rows_and_keys": (lambda: bias(1, 40, 50), {"_grad_bias": [ONE_TILE, *[NOT_RUN] * 4]}),
    "bias_of_keys": (lambda: bias(1, 1, 50), {"_grad_bias": [ONE_TILE]}),
    "bias_of_rows": (lambda: bias(1, 40, 1), {"_grad_bias": [NOT_RUN] * 4}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES if SWEEP else ("norm", "gemv", "gemm", "forward", "forward_split"))
def test_every_barrier_is_needed(name: str) -> None:
    run, allowed = CASES[name]
    missed: dict[str, list] = {}
    with using(Device()) as device:
        run()
        for kernel in list(device.kernels.values()):
            if name.startswith("bias") and kernel.name != "_grad_bias":
                continue  # the others have cases of their own
            for instruction in kernel.sync_instructions:
                with kernel.without(instruction):
                    try:
                        run()
                    except AssertionError:  # PtxFault is one
                        continue
                missed.setdefault(kernel.name, []).append(str(instruction))
    expected = {kernel: len(reasons) for kernel, reasons in allowed.items()}
    assert {kernel: len(found) for kernel, found in missed.items()} == expected, missed
