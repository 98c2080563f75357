"""Public functions with ``backend="cuda"``, from Python to the kernels' PTX, and who serves a call."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from types import SimpleNamespace

import cuda_device
import pytest
import torch
from cases import seeded
from compare import assert_same_bits
from ptx.compilers import needs_nvcc
from torch import Tensor
from torch._subclasses import FakeTensorMode

import tilewright
from tilewright import QuantizedKV, cuda_kernels
from tilewright.ops import grouped_linear, registry
from tilewright.triton_kernels.weight import gpu_weight

BF16 = torch.bfloat16


def numbers(name: str, *shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(*shape, generator=seeded(name)).to(dtype)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a.float(), b.float(), rtol=2e-2, atol=2e-2)


@needs_nvcc
def test_ops_reach_the_kernels() -> None:
    x, y = numbers("x", 2, 3, 64), numbers("y", 2, 3, 64)
    expected = tilewright.rms_norm(x, None, 1e-5, residual=y)
    with cuda_device.serving() as launches:
        for found, wanted in zip(tilewright.rms_norm(x, None, 1e-5, residual=y, backend="cuda"), expected, strict=True):
            close(found, wanted)
        assert tilewright.last_impl("rms_norm") == "cuda"
        close(tilewright.layer_norm(x, None, None, 1e-5, backend="cuda"), torch.nn.functional.layer_norm(x, (64,)))
        close(
            tilewright.silu_mul(x[..., :32], x[..., 32:], backend="cuda"), tilewright.silu_mul(x[..., :32], x[..., 32:])
        )
        close(tilewright.gelu_mul(x.mT, y.mT, "tanh", backend="cuda"), tilewright.gelu_mul(x.mT, y.mT, "tanh"))
    assert len(launches) == 4


@needs_nvcc
def test_rope_and_caches_reach_the_kernels() -> None:
    q, k = numbers("q", 1, 4, 3, 16), numbers("k", 1, 2, 3, 16)
    cos, sin = tilewright.rope_tables(10000.0, 16, 8)
    expected, cache = tilewright.rope(q, k, cos, sin), torch.zeros(1, 2, 8, 16, dtype=BF16)
    with cuda_device.serving():
        found = tilewright.rope(q, k, cos, sin, backend="cuda")
        tilewright.kv_append(cache, cache_v := cache.clone(), *(found[1], k), backend="cuda")
        assert tilewright.last_impl("rope") == tilewright.last_impl("kv_append") == "cuda"
        again, other = cache.clone(), cache.clone()
        rotated = cuda_kernels.rope_append(q, k, k, cos, sin, again, other)
        moved = cuda_kernels.gather(cache, torch.zeros(2, 2, 8, 16, dtype=BF16), torch.tensor([0, 0]))
    for a, b in zip((*found, rotated), (*expected, expected[0]), strict=True):
        assert_same_bits(a, b)
    assert torch.equal(cache[:, :, :3], expected[1]) and torch.equal(again, cache) and torch.equal(other, cache_v)
    assert torch.equal(moved, cache.expand(2, -1, -1, -1))
    for bits in (8, 4):
        kv = QuantizedKV.empty(1, 2, 40, 16, bits)
        wanted = tilewright.kv_append(copy.deepcopy(kv), k, k)
        with cuda_device.serving(), torch.library._scoped_library("tilewright", "FRAGMENT"):
            torch.ops.tilewright.kv_append_quantized(*kv.tensors(), *kv.spec(), k, k)
        for a, b in zip(kv.tensors(), wanted.tensors(), strict=True):
            assert_same_bits(a, b)


@needs_nvcc
@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16], ids=str)
def test_linear_reaches_the_kernels(dtype: torch.dtype) -> None:
    weight = tilewright.quantize_weight(numbers("w", 64, 96, dtype=torch.float32))
    x, bias = numbers("x", 2, 3, 96, dtype=dtype), numbers("b", 64, dtype=torch.float32)
    with cuda_device.serving():
        for activation in ("int8", "int8_token", "bf16", "fp32"):
            if dtype == torch.float32 and activation == "fp32":
                with pytest.raises(NotImplementedError, match="not in float32"):
                    tilewright.quantized_linear(x, weight, bias, activation=activation, backend="cuda")
                continue
            found = tilewright.quantized_linear(x, weight, bias, activation=activation, backend="cuda")
            assert found.dtype == dtype and tilewright.last_impl("quantized_linear") == "cuda"
            if activation == "int8":
                assert_same_bits(found, tilewright.quantized_linear(x, weight, bias))
            wanted = tilewright.quantized_linear(x, weight, bias, activation=activation, backend="reference")
            torch.testing.assert_close(found, wanted, rtol=2e-2, atol=0.1)  # the error rule: test_cuda_linear.py
        one = tilewright.quantized_linear(x[0, :1], weight, activation="bf16", backend="cuda")
        close(one, tilewright.quantized_linear(x[0, :1], weight, activation="bf16", backend="reference"))
        sizes = torch.tensor([4, 2])
        close(
            grouped_linear(x.flatten(0, 1), weight, sizes, bias, backend="cuda"),
            grouped_linear(x.flatten(0, 1), weight, sizes, bias),
        )


@needs_nvcc
def test_gradients_and_mistakes() -> None:
    x = numbers("x", 2, 3, 64).requires_grad_()
    with cuda_device.serving():
        tilewright.rms_norm(x, None, 1e-5, backend="cuda").sum().backward()
        with pytest.raises(ValueError, match="rms_norm: weight and bias must be contiguous"):
            tilewright.rms_norm(x.detach(), torch.ones(5), 1e-5, backend="cuda")
        wide = torch.zeros(1, 2, 3, 16)
        with pytest.raises(
            NotImplementedError, match="attention: backend='cuda': the CUDA kernels of attention take bfloat16"
        ):
            tilewright.attention(wide, wide, wide, backend="cuda")
    grad, x.grad = x.grad, None
    tilewright.rms_norm(x, None, 1e-5).sum().backward()
    close(grad, x.grad)


@needs_nvcc
def test_attention_reaches_the_kernels() -> None:
    q, k, v = numbers("q", 2, 4, 5, 64), numbers("k", 2, 2, 70, 64), numbers("v", 2, 2, 70, 64)
    alibi = torch.tensor([0.5, 0.25, 0.125, 0.0625])
    options = {"causal": "bottom_right", "alibi_slopes": alibi}
    results = []
    for backend in ("cuda", "cpu"):
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        with cuda_device.serving() as launches:
            out, lse = tilewright.attention(*leaves, **options, return_lse=True, backend=backend)
            (out.float().square().sum() + lse.sum()).backward()
        assert bool(launches) == (backend == "cuda") and (tilewright.last_impl("attention") == "cuda") == bool(launches)
        results.append((out, lse, *(t.grad for t in leaves)))
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, rtol=3e-2, atol=3e-2)


def test_architectures() -> None:
    built = "80;86;90a;100"
    for capability, expected in (
        ((8, 0), True), ((8, 6), True), ((8, 7), True), ((8, 9), True), ((9, 0), True), ((10, 0), True),
        ((10, 3), True), ((7, 5), False), ((12, 0), False), ((11, 0), False),
    ):  # fmt: skip
        assert cuda_kernels.serves(built, *capability) == expected, capability
    assert not cuda_kernels.serves("86", 8, 0) and not cuda_kernels.serves("90a", 9, 1)
    assert not cuda_kernels.serves("", 8, 0)


def test_a_gpus_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes to the CUDA extension if that has code for the device, else to Triton, and the error names both."""
    with FakeTensorMode():
        x = torch.empty(2, 4, device="cuda")
    monkeypatch.setattr(cuda_kernels, "missing", lambda device: "")
    assert registry.served_by("op", "auto", x) == registry.served_by("op", "cuda", x) == "cuda"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    assert registry.served_by("op", "triton", x) == "triton"
    assert registry.served_by("op", "auto", x, cuda_lacks="it has no op") == "triton"
    with pytest.raises(NotImplementedError, match="op: backend='cuda': it has no op"):
        registry.served_by("op", "cuda", x, cuda_lacks="it has no op")
    monkeypatch.setattr(cuda_kernels, "missing", lambda device: "no code for it")
    assert registry.served_by("op", "auto", x) == "triton"
    with pytest.raises(NotImplementedError, match="op: backend='cuda': no code for it"):
        registry.served_by("op", "cuda", x)
    with pytest.raises(NotImplementedError, match="op: Triton lacks it; no code for it; supported on the CPU"):
        registry.served_by("op", "auto", x, triton_lacks="Triton lacks it")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(NotImplementedError, match=r"need Triton, which is not installed .*because no code for it"):
        registry.served_by("op", "auto", x)


def test_launches_go_to_the_tensors_device_and_current_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the launchers make of them: cuda_device.Interpreted asserts it of every launch."""
    streams = {torch.device("cuda:1"): SimpleNamespace(cuda_stream=77)}
    seen: list[tuple] = []
    monkeypatch.setattr(torch.cuda, "current_stream", streams.__getitem__)
    monkeypatch.setattr(cuda_kernels, "extension", lambda: SimpleNamespace(norm=lambda *a: seen.append(a)))
    with FakeTensorMode():
        x = torch.empty(2, 4, device="cuda:1")
    cuda_kernels.launch("norm", x, "rms_norm")
    assert seen == [(1, 77, x, "rms_norm")]


@pytest.mark.parametrize(
    "op",
    [
        *("norm", "act_mul", "rope", "rope_", "kv_append", "kv_append_quantized", "sample", "quantized_linear"),
        *("attention", "attention_backward", "attention_quantized"),
    ],
)
def test_tensors_of_two_devices_are_refused(op: str) -> None:
    """Eager calls too: a kernel would take another GPU's address for its own."""
    overload = getattr(torch.ops.tilewright, op).default
    with FakeTensorMode():
        devices = iter(torch.empty(2, 4, device=f"cuda:{i}") for i in (0, *(1,) * 30))
        arguments = [
            next(devices) if "Tensor" in str(a.type) else {"str": "auto", "bool": False}.get(str(a.type), 1)
            for a in overload._schema.arguments
        ]
    name = op.rstrip("_")
    with pytest.raises(ValueError, match=f"{name}: all tensors must be on one device, got some on cuda:0, cuda:1"):
        overload.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), *arguments)


class OnGpu(Tensor):
    """Says that it is there."""

    is_cuda = True


def test_a_weight_is_ordered_once_and_before_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls in other streams may follow at once, and a graph's memory is not the weight's."""
    waits: list[torch.device] = []

    def stream(device: torch.device) -> SimpleNamespace:
        return SimpleNamespace(synchronize=lambda: waits.append(device))

    capturing = True
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(torch.cuda, "current_stream", stream)
    weight = tilewright.quantize_weight(numbers("w", 64, 96, dtype=torch.float32))
    packed = torch.Tensor._make_subclass(OnGpu, weight.packed)
    with pytest.raises(RuntimeError, match="call the layer once before capturing"):
        gpu_weight(packed, *weight.spec())
    capturing = False
    made = gpu_weight(packed, *weight.spec())
    capturing = True
    assert gpu_weight(packed, *weight.spec()) is made and waits == [packed.device]


def test_without_the_extension() -> None:
    assert tilewright.info()["cuda"] == "not built" or tilewright.info()["cuda"].startswith("built for ")
    with pytest.raises(NotImplementedError, match="backend='cuda': the CUDA kernels need tensors on a GPU, got cpu"):
        tilewright.rms_norm(torch.ones(2, 4), None, 1e-5, backend="cuda")
