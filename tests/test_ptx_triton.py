"""Kernels that Triton compiled for sm_80 on the PTX interpreter (tests/ptx/triton_examples.py)."""

from __future__ import annotations

import functools
import math
from contextlib import ExitStack

import pytest
import torch
from compare import assert_close
from ptx import Instruction, PtxFault, empty
from ptx.compilers import TritonKernel, needs_triton, triton_kernel

pytestmark = needs_triton


@functools.cache
def compiled(
    name: str,
    signature: str,
    divisible: tuple[str, ...] = (),
    num_warps: int = 4,
    num_stages: int = 3,
    **constexprs: int,
) -> TritonKernel:
    """signature: "x:*fp32 n:i32"."""
    from ptx import triton_examples

    types = dict(part.split(":") for part in signature.split())
    function = getattr(triton_examples, name)
    return triton_kernel(function, types, constexprs, divisible, num_warps=num_warps, num_stages=num_stages)


NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@pytest.mark.parametrize("n", [16, 1000, 1024, 1040])
def test_add(n: int, dtype: torch.dtype) -> None:
    p = f"*{NAMES[dtype]}"
    x, y, out = torch.randn(n).to(dtype), torch.randn(n).to(dtype), torch.zeros(n, dtype=dtype)
    k = compiled("add", f"x:{p} y:{p} out:{p} n:i32", BLOCK=256)
    report = k.launch((math.ceil(n / 256),), [x, y, out, n])
    assert torch.equal(out, x + y)
    assert report.never_executed() == []


def test_a_missing_mask_is_noticed() -> None:
    x, y, out = torch.randn(3, 1000)
    k = compiled("add_without_mask", "x:*fp32 y:*fp32 out:*fp32 n:i32", BLOCK=256)
    k.launch((3,), [x, y, out, 1000])
    with pytest.raises(PtxFault, match="out of bounds"):
        k.launch((4,), [x, y, out, 1000])


def test_a_wrong_promise_of_divisibility_is_noticed() -> None:
    kernel = compiled("softmax", "x:*fp32 out:*fp32 columns:i32", ("columns",), BLOCK=1024)
    with pytest.raises(PtxFault, match="misaligned"):
        kernel.launch((3,), [torch.randn(3, 99), torch.zeros(3, 99), 99])


@pytest.mark.parametrize("columns", [16, 100, 1000, 1024])
def test_softmax(columns: int) -> None:
    x, out = torch.randn(3, columns) * 4, empty((3, columns), "float32")
    divisible = ("columns",) if columns % 16 == 0 else ()
    compiled("softmax", "x:*fp32 out:*fp32 columns:i32", divisible, BLOCK=1024).launch((3,), [x, out, columns])
    torch.testing.assert_close(torch.from_numpy(out), x.softmax(-1), rtol=4e-6, atol=1e-7)


@pytest.mark.parametrize("stages", [1, 3])
@pytest.mark.parametrize("shape", [(64, 64, 128), (80, 48, 160), (16, 80, 32)])
def test_matmul(shape: tuple[int, int, int], stages: int, dtype: torch.dtype) -> None:
    m, n, k = shape
    p = f"*{NAMES[dtype]}"
    signature = f"a:{p} b:{p} c:{p} m:i32 n:i32 k:i32"
    kernel = compiled("matmul", signature, ("m", "n", "k"), num_stages=stages, BM=64, BN=32, BK=32)
    a, b, c = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype), torch.zeros(m, n, dtype=dtype)
    assert bool(kernel.module.kernel().find("cp.async")) == (stages > 1)
    kernel.launch((math.ceil(m / 64), math.ceil(n / 32)), [a, b, c, m, n, k])
    if dtype == torch.float32:  # as tf32, of which the hardware looks at the upper 19 bits
        a, b = ((x.view(torch.int32) & ~0x1FFF).view(torch.float32) for x in (a, b))
        assert_close(c, a.double() @ b.double(), a @ b, dtype)
    else:
        assert_close(c, a.double() @ b.double(), a @ b, dtype)


def test_each_barrier_and_wait_of_matmul() -> None:
    """Triton's pipeline waits twice in places: a wait that nobody misses has a twin, so that without both it fails."""
    signature = "a:*bf16 b:*bf16 c:*bf16 m:i32 n:i32 k:i32"
    kernel = compiled("matmul", signature, ("m", "n", "k"), num_stages=3, BM=64, BN=32, BK=32)
    k = kernel.module.kernel()

    def is_noticed(deleted: list[Instruction]) -> bool:
        with ExitStack() as stack:
            for instruction in deleted:
                stack.enter_context(k.without(instruction))
            for inner in (160, 192, 224):  # each residue of the number of steps by that of the stages
                a, b = torch.randn(64, inner).bfloat16(), torch.randn(inner, 32).bfloat16()
                c = torch.zeros(64, 32).bfloat16()
                args = [a, b, c, 64, 32, inner, *[None] * (len(k.params) - 6)]
                if k.launch((1, 1), (128,), args, shared=kernel.shared, check=False).findings:
                    return True
        return False

    assert not is_noticed([])
    survivors = [i for i in k.sync_instructions if not is_noticed([i])]
    assert len(survivors) <= len(k.sync_instructions) // 2, survivors
    assert is_noticed(survivors)


@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("n", [1, 65, 200])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_flash(n: int, stages: int, dtype: torch.dtype) -> None:
    heads, d = 2, 32
    p = f"*{NAMES[dtype]}"
    signature = f"q:{p} k:{p} v:{p} out:{p} lse:*fp32 n:i32 scale:fp32"
    kernel = compiled("flash", signature, num_stages=stages, D=d, BM=64, BN=32)
    q, k, v = torch.randn(3, heads, n, d).to(dtype)
    out, lse = torch.zeros_like(q), torch.zeros(heads, n)
    kernel.launch((math.ceil(n / 64), heads), [q, k, v, out, lse, n, d**-0.5 * math.log2(math.e)], seed=n)
    x = (q.double() @ k.double().mT * d**-0.5).masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf)
    naive = (x.to(dtype).softmax(-1) @ v).to(dtype)
    assert_close(out, x.softmax(-1) @ v.double(), naive, dtype)
    torch.testing.assert_close(lse.double() * math.log(2), x.logsumexp(-1), atol=1e-4, rtol=1e-4)


def test_atomics_and_scans() -> None:
    x = torch.randint(0, 7, (1000,), dtype=torch.int32)
    counts = torch.zeros(7, dtype=torch.int32)
    compiled("histogram", "x:*i32 counts:*i32 n:i32", BLOCK=256).launch((4,), [x, counts, 1000], seed=1)
    assert torch.equal(counts, x.bincount(minlength=7).int())
    y = torch.randn(2, 500)
    out = torch.zeros_like(y)
    compiled("running_sum", "x:*fp32 out:*fp32 columns:i32", BLOCK=512).launch((2,), [y, out, 500])
    torch.testing.assert_close(out, y.cumsum(-1), atol=1e-4, rtol=1e-4)


WARPS = pytest.mark.parametrize("warps", [1, 2, 4, 8])


@pytest.mark.parametrize("seed", [0, 7])
@WARPS
def test_a_lock_between_blocks(warps: int, seed: int) -> None:
    """Triton's acquire and release order plain loads and stores of different blocks."""
    x, out, lock = torch.randn(6, 256), torch.zeros(256), torch.zeros(1, dtype=torch.int32)
    kernel = compiled("add_in_turn", "x:*fp32 out:*fp32 lock:*i32", num_warps=warps, BLOCK=256)
    kernel.launch((6,), [x, out, lock], seed=seed, resident=3 if seed else 1)
    torch.testing.assert_close(out, x.sum(0))
    unlocked = compiled("add_without_lock", "x:*fp32 out:*fp32 lock:*i32", num_warps=warps, BLOCK=256)
    with pytest.raises(PtxFault, match="global race"):
        unlocked.launch((6,), [x, out, lock], seed=seed)


@WARPS
def test_int8_product(warps: int) -> None:
    a, b = torch.randint(-128, 128, (64, 128)).to(torch.int8), torch.randint(-128, 128, (32, 128)).to(torch.int8)
    c = torch.zeros(64, 32, dtype=torch.int32)
    kernel = compiled("int8_matmul", "a:*i8 b:*i8 c:*i32 k:i32", ("k",), warps, 3, BM=64, BN=32, BK=64)
    kernel.launch((1,), [a, b, c, 128])
    assert torch.equal(c.long(), a.long() @ b.long().T)


@WARPS
def test_int4_weights(warps: int) -> None:
    k, n = 128, 64
    a, codes, scale = torch.randn(16, k).bfloat16(), torch.randint(0, 16, (k, n)), torch.rand(k // 32, n)
    packed = (codes[0::2] | codes[1::2] << 4).to(torch.uint8)
    c = torch.zeros(16, n)
    signature = "a:*bf16 b:*u8 scale:*fp32 c:*fp32 k:i32 n:i32"
    kernel = compiled("int4_matmul", signature, ("k", "n"), warps, 3, BM=16, BN=32, BK=32)
    kernel.launch((2,), [a, packed, scale, c, k, n])
    weight = (codes - 8).double() * scale.double().repeat_interleave(32, 0)
    assert_close(c, a.double() @ weight, a.float() @ weight.float(), torch.float32)


@WARPS
def test_reductions_transposition_and_sort(warps: int) -> None:
    x = torch.randn(64, 32)
    rows, index, columns, turned = (
        torch.zeros(64),
        torch.zeros(64, dtype=torch.int32),
        torch.zeros(32),
        torch.zeros(32, 64),
    )
    names = "x:*fp32 rows:*fp32 index:*i32 columns:*fp32 turned:*fp32"
    compiled("reduce", names, num_warps=warps, M=64, N=32).launch((1,), [x, rows, index, columns, turned])
    torch.testing.assert_close(rows, x.sum(1))
    assert torch.equal(index.long(), x.argmax(1))
    assert torch.equal(columns, x.max(0).values)
    assert torch.equal(turned, x.T)
    out = torch.zeros(2, 256)
    y = torch.randn(2, 256)
    compiled("sort", "x:*fp32 out:*fp32", num_warps=warps, BLOCK=256).launch((2,), [y, out])
    assert torch.equal(out, y.sort(-1).values)


def test_dropout() -> None:
    x, out = torch.ones(4000), torch.zeros(4000)
    compiled("dropout", "x:*fp32 out:*fp32 n:i32 seed:i32 p:fp32", BLOCK=256).launch((16,), [x, out, 4000, 1234, 0.25])
    assert set(out.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert abs((out == 0).float().mean() - 0.25) < 0.03


def test_layer_norm() -> None:
    x, weight, out = torch.randn(3, 777).bfloat16(), torch.randn(777), empty((3, 777), "uint16")
    compiled("layer_norm", "x:*bf16 weight:*fp32 out:*bf16 n:i32 eps:fp32", BLOCK=256).launch(
        (3,), [x, weight, out, 777, 1e-5]
    )
    ref = torch.nn.functional.layer_norm(x.double(), (777,), weight.double())
    naive = torch.nn.functional.layer_norm(x, (777,), weight.bfloat16())
    assert_close(torch.from_numpy(out).view(torch.bfloat16), ref, naive, torch.bfloat16)
