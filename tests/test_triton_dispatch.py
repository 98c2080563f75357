"""Who serves a call: what a backend's name and a tensor's device decide, and what the errors say."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch._subclasses import FakeTensorMode

import tilewright
from tilewright.ops import registry

X = torch.ones(2, 4)


def calls(backend: str) -> list:
    q = torch.ones(1, 1, 2, 4)
    cos = torch.ones(2, 2)
    weight, wide = tilewright.quantize_weight(torch.randn(3, 4)), tilewright.quantize_weight(torch.randn(32, 4))
    return [
        lambda: tilewright.silu_mul(X, X, backend=backend),
        lambda: tilewright.gelu_mul(X, X, backend=backend),
        lambda: tilewright.rms_norm(X, None, 1e-5, backend=backend),
        lambda: tilewright.layer_norm(X, None, None, 1e-5, backend=backend),
        lambda: tilewright.rope(q, q, cos, cos, backend=backend),
        lambda: tilewright.rope(q.clone(), q.clone(), cos, cos, inplace=True, backend=backend),
        lambda: tilewright.kv_append(q.clone(), q.clone(), q, q, backend=backend),
        lambda: tilewright.quantized_linear(X, weight, backend=backend),
        lambda: tilewright.attention(q, q, q, backend=backend),
        lambda: tilewright.ops.grouped_linear(X, wide, torch.tensor([2]), backend=backend),
        lambda: tilewright.ops.gated_mlp(X, wide, tilewright.quantize_weight(torch.randn(3, 16)), backend=backend),
    ]


OPS = (
    "silu_mul", "gelu_mul", "rms_norm", "layer_norm", "rope", "rope", "kv_append", "quantized_linear", "attention",
    "quantized_linear", "quantized_linear",
)  # fmt: skip


@pytest.mark.parametrize("index", range(len(OPS)), ids=lambda i: f"{i}_{OPS[i]}")
def test_backends_on_the_cpu(index: int) -> None:
    for backend in ("triton", "cuda"):
        with pytest.raises(NotImplementedError, match=f"{OPS[index]}.*(GPU, got cpu|not built.*supported)"):
            calls(backend)[index]()
    with pytest.raises(ValueError, match=r"\w+: backend must be one of"):
        calls("gpu")[index]()
    calls("cpu")[index]()
    assert tilewright.last_impl(OPS[index]) not in ("reference", "triton")
    calls("reference")[index]()
    assert tilewright.last_impl(OPS[index]) == "reference"


def test_a_gpus_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeTensorMode():
        x = torch.empty(2, 4, device="cuda")
    with pytest.raises(NotImplementedError, match="backend='cpu' needs CPU tensors, got cuda"):
        registry.served_by("op", "cpu", x)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for backend in ("auto", "triton"):
        with pytest.raises(NotImplementedError, match="op: tensors on cuda:0 need Triton, which is not installed"):
            registry.served_by("op", backend, x)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    assert registry.served_by("op", "auto", x) == registry.served_by("op", "triton", x) == "triton"


def test_shapes_on_a_gpu_are_known_without_one() -> None:
    """The fake kernels serve every device, so torch.compile sees calls on a GPU."""
    with FakeTensorMode():
        q = torch.empty(2, 4, 3, 8, device="cuda", dtype=torch.bfloat16)
        k = torch.empty(2, 2, 5, 8, device="cuda", dtype=torch.bfloat16)
        assert tilewright.attention(q, k, k).device.type == "cuda"
        assert tilewright.silu_mul(q, q).shape == q.shape
        out, total = tilewright.rms_norm(q, None, 1e-5, residual=q)
        assert out.device == total.device == q.device


def test_import_does_not_import_triton() -> None:
    code = "import sys, tilewright; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
