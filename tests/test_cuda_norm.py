"""The CUDA kernels of norms and gated activations, executed through their PTX."""

from __future__ import annotations

from itertools import product

import cuda_device
import pytest
import torch
from cases import seeded
from compare import assert_close
from ptx.compilers import needs_nvcc
from torch import Tensor

from tilewright.ops.activation import gelu_mul_reference, silu_mul_reference
from tilewright.ops.norm import norm_reference

pytestmark = needs_nvcc
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Columns: below a vector, around what a warp keeps and a block keeps, beyond; with and without whole vectors.
COLUMNS = (1, 7, 64, 128, 513, 520, 1024, 1025, 1032, 4104, 8192, 8200, 9001)


def numbers(name: str, *shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.randn(*shape, generator=seeded(name)).to(dtype)


def run_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, centred: bool
) -> tuple[Tensor, Tensor | None]:
    out = torch.full_like(x, torch.nan, memory_format=torch.contiguous_format)
    if x.dim() > 2:  # rows in another order
        out = out.transpose(0, 1).contiguous().transpose(0, 1)
    total = None if residual is None else torch.full_like(out, torch.nan)
    name = "layer_norm" if centred else "rms_norm"
    cuda_device.module().norm(x, name, residual, weight, bias, out, total, 1e-5, centred)
    return out, total


def check_norm(x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, centred: bool) -> None:
    out, total = run_norm(x, residual, weight, bias, centred)
    ref, ref_total = norm_reference(x, residual, weight, bias, 1e-5, centred)
    if residual is not None:
        assert torch.equal(total, ref_total)
    wide = ref_total.float()
    wide = wide - wide.mean(-1, keepdim=True) if centred else wide
    naive = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)
    naive = naive if weight is None else naive * weight.float()
    naive = naive if bias is None else naive + bias.float()
    assert_close(out, ref, naive.to(x.dtype), x.dtype)


@pytest.mark.parametrize("columns", COLUMNS)
def test_norm(columns: int) -> None:
    for dtype, centred in ((BF16, False), (FP16, True)) if columns % 2 else ((FP32, True), (BF16, True), (FP16, False)):
        name = f"{columns} {dtype}"
        x, residual = (numbers(f"{name} {i}", 3, columns, dtype=dtype) + 2 for i in range(2))
        weight, bias = (numbers(f"{name} {i}", columns, dtype=FP32 if centred else dtype) for i in range(2, 4))
        check_norm(x, residual, weight, bias if centred else None, centred)
        check_norm(x, None, None, None, centred)


def test_norm_of_strided_rows() -> None:
    """Parts of a fused projection, transposed heads, rows that share memory, rows that begin anywhere."""
    x = numbers("strided", 2, 5, 3 * 64, dtype=BF16)
    check_norm(x[..., 64:128], x[..., 128:], None, None, False)
    check_norm(x.view(2, 5, 3, 64).transpose(1, 2)[:, 1:], None, numbers("w", 64), None, True)
    check_norm(x[:1].expand(4, 5, 192), None, None, None, False)
    check_norm(x.view(-1)[1:1729].view(9, 192), None, None, None, False)
    check_norm(numbers("wide", 2, 3, 2, 2, 2, 16)[:, ::2, :, :1, :, :8], None, None, None, False)


def test_norm_keeps_nan_and_zero_rows() -> None:
    x = numbers("nan", 4, 80, dtype=BF16)
    x[1, 3], x[2], x[3, 7] = torch.nan, 0, torch.inf
    out, _ = run_norm(x, None, None, None, False)
    assert out[1].isnan().all() and (out[2] == 0).all() and out[0].isfinite().all()
    assert out[3, 7].isnan() and (out[3, :7] == 0).all()


def test_norm_of_nothing() -> None:
    x = torch.zeros(0, 64)
    with cuda_device.module().watched() as launches:
        run_norm(x, None, None, None, False)
        run_norm(torch.zeros(3, 0), None, None, None, True)
    assert launches == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 8, dtype=torch.float64)}, "x must be float32"),
        ({"weight": torch.zeros(7)}, r"shape \(8,\)"),
        ({"weight": torch.zeros(8, dtype=FP16)}, "float32 or x's dtype"),
        ({"residual": torch.zeros(2, 7)}, "x's shape and dtype"),
        ({"x": torch.zeros(8, 2).t()}, "contiguous in its last dimension"),
    ],
)
def test_norm_refuses(change: dict, message: str) -> None:
    arguments = {"x": torch.zeros(2, 8), "residual": None, "weight": None, "bias": None, "centred": False}
    with pytest.raises(ValueError, match=message):
        run_norm(**(arguments | change))


def test_every_barrier_of_norm_is_needed() -> None:
    x = numbers("mutants", 2, 9000, dtype=BF16)
    assert cuda_device.surviving_mutants(lambda: check_norm(x, None, None, None, True)) == {}
    short = x[:, :4096]
    assert cuda_device.surviving_mutants(lambda: check_norm(short, None, None, None, True)) == {}


def test_norm_runs_everywhere() -> None:
    with cuda_device.module().watched() as launches:
        for dtype in (BF16, FP16, FP32):
            for n in (77, 128, 500, 1024, 1023, 1031, 4096, 8192, 9000, 9001):
                x = numbers(f"everywhere {n}", 1, n, dtype=dtype)
                for weights in (numbers("w", n), numbers("w", n).to(dtype), numbers("w", n + 1)[1:]):
                    check_norm(x, x, weights, weights, True)
                    check_norm(x, None, weights, weights, True)
                    check_norm(x, None, None, weights, True)
                rows = numbers(f"more {n}", n + 64, dtype=dtype).as_strided((2, 2, 2, 2, 2, n), (8, 0, 16, 0, 8, 1))
                check_norm(rows, rows, None, None, False)
                check_norm(rows[:, 0, 0, 0], None, None, None, False)
    left = cuda_device.unexecuted(launches, "norm", merged=True)
    assert left == [], "\n".join(left)


def run_act(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    out = torch.full_like(gate, torch.nan, memory_format=torch.contiguous_format)
    cuda_device.module().act_mul(gate, up, out, activation)
    return out


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
def test_act_mul(dtype: torch.dtype, activation: str) -> None:
    both = numbers("act", 5, 2 * 344, dtype=dtype) * 4
    both[0, :6] = torch.tensor([0.0, -0.0, 30.0, -30.0, 100.0, -100.0]).to(dtype)
    for gate, up in (
        both.chunk(2, -1),
        (both, both.roll(1, 0)),
        (both[:, 1:8], both[:, 9:16]),
        (both[0, 0], both[1, 1]),
        (both[:0], both[:0]),
    ):
        if activation == "silu":
            ref, naive = silu_mul_reference(gate, up), torch.nn.functional.silu(gate) * up
        else:
            approximate = "tanh" if activation == "gelu_tanh" else "none"
            ref = gelu_mul_reference(gate, up, approximate)
            naive = torch.nn.functional.gelu(gate, approximate=approximate) * up
        assert_close(run_act(gate, up, activation), ref, naive, dtype)


def test_act_mul_at_the_ends() -> None:
    """What is not finite stands where torch has it."""
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0, 3e38, -3e38])
    for activation in ("silu", "gelu", "gelu_tanh"):
        if activation == "silu":
            expected = silu_mul_reference(x, torch.ones(6)).float()
        else:
            expected = gelu_mul_reference(x, torch.ones(6), "tanh" if activation == "gelu_tanh" else "none").float()
        found = run_act(x, torch.ones(6), activation)
        assert torch.equal(found.isnan(), expected.isnan()) and torch.equal(found.isinf(), expected.isinf())


def test_act_mul_runs_everywhere() -> None:
    with cuda_device.module().watched() as launches:
        for dtype, activation in product((FP32, BF16, FP16), ("silu", "gelu", "gelu_tanh")):
            flat = numbers("everywhere", 200, dtype=dtype) * 4
            run_act(flat, flat, activation)
            for n in (7, 80):
                rows = flat.as_strided((2, 2, 2, 2, 2, n), (8, 0, 16, 0, 8, 1))
                expected = run_act(rows, rows, activation)
                out = torch.full((*(4,) * 5, 96), torch.nan, dtype=dtype)[::2, ::2, ::2, ::2, ::2, :n]
                cuda_device.module().act_mul(rows, rows, out, activation)
                assert torch.equal(out, expected)
    left = cuda_device.unexecuted(launches, "act_mul")
    assert left == [], "\n".join(left)


def test_act_mul_refuses() -> None:
    gate, up = numbers("refuses", 4, 64, dtype=BF16).chunk(2, -1)
    with pytest.raises(ValueError, match="activation must be"):
        run_act(gate, up, "relu")
    with pytest.raises(ValueError, match="one shape and dtype"):
        run_act(gate, up[:, 1:], "silu")
