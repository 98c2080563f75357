"""`quantize_` on models of every kind, and what one does with a model afterwards: copies, files, devices, wrappers."""

from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_transformers
import torch
import torch.nn.functional as F
from compare import assert_same_bits
from tiny import one_thread  # noqa: F401  (a fixture)
from torch import Tensor, nn

from tilewright import QuantizedLinear, quantize_, quantize_weight


def quantized(model: nn.Module) -> dict[str, QuantizedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def twin(model: nn.Module, **options: Any) -> nn.Module:
    """The model with plain linears whose weights are what quantisation leaves of them."""
    other, names = copy.deepcopy(model), quantized(quantize_(copy.deepcopy(model), **options))
    for name, module in names.items():
        linear, weight = other.get_submodule(name), module.weight.dequantize()
        linear.weight.data.copy_(weight if isinstance(linear, nn.Linear) else weight.t())
    return other.eval()


@pytest.mark.parametrize("name", tiny_transformers.CASES)
def test_transformers_models(name: str) -> None:
    model = tiny_transformers.build(name, "eager")
    given = tiny_transformers.inputs(name, "left" if tiny_transformers.CASES[name].inputs == "text" else "none")
    expected = tiny_transformers.first_output(twin(model, bits=8), given)
    linears = sum(type(m) is nn.Linear or type(m).__name__ == "Conv1D" for m in model.modules())
    quantize_(model, bits=8, activation="fp32")
    skipped = [m for n, m in model.named_modules() if type(m) is nn.Linear]
    assert len(quantized(model)) == linears - len(skipped) >= 8
    assert tiny_transformers.relative_error(tiny_transformers.first_output(model, given), expected) < 1e-4


def test_transformers_generate_and_bfloat16() -> None:
    model = tiny_transformers.build("llama", "sdpa", torch.bfloat16)
    quantize_(model, bits=8)
    ids = torch.randint(3, 99, (1, 8))
    tokens = model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert tokens.shape == (1, 14)
    with torch.no_grad():
        logits = model(tokens[:, :-1]).logits[0, -6:]
    logits[:, 2] = -torch.inf  # the end of the sequence, which min_new_tokens forbids
    assert (logits.argmax(-1) == tokens[0, -6:]).float().mean() >= 5 / 6  # one call or several: bf16 rounds differently


# The kinds of models that people write in plain torch.


class VisionBlock(nn.Module):
    """As timm's: one projection for q, k and v, layer scale, an MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.gamma = nn.Parameter(torch.full((width,), 0.5))
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Dropout(0.1), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, seq, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, seq, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, seq, width)
        x = x + self.gamma * self.proj(attended)
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """As timm's, with an odd number of classes."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 48, 4, 4)
        self.cls_token = nn.Parameter(torch.randn(1, 1, 48))
        self.blocks = nn.Sequential(VisionBlock(48, 3), VisionBlock(48, 3))
        self.norm, self.head = nn.LayerNorm(48), nn.Linear(48, 37)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        return self.head(self.norm(self.blocks(x))[:, 0])


class Encoder(nn.Module):
    """torch's own layers, which read the weights of their linears when torch's fast path is on."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(64, 4, 96, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, x: Tensor) -> Tensor:
        padding = torch.zeros(x.shape[:2], dtype=torch.bool)
        padding[0, -2:] = True
        return self.encoder(x, src_key_padding_mask=padding)[:, :-2]


class Recurrent(nn.Module):
    """A language model with an LSTM, a tied head and a list of linears in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 32)
        self.lstm = nn.LSTM(32, 32, batch_first=True)
        self.towers = nn.ModuleDict({"a": nn.ModuleList([nn.Linear(32, 32), nn.Linear(32, 32, bias=False)])})
        self.tower = self.towers["a"][0]  # registered twice
        self.lm_head = nn.Linear(32, 50, bias=False)
        self.lm_head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.lstm(self.embedding(x[..., 0].abs().long() % 50))
        return self.lm_head(self.towers["a"][1](self.tower(x)))


MODELS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(40, 70), nn.ReLU(), nn.Linear(70, 33, bias=False)), (5, 40), 2),
    "vision": (VisionTransformer, (2, 3, 16, 16), 9),
    "encoder": (Encoder, (3, 7, 64), 4),
    "recurrent": (Recurrent, (2, 5, 1), 2),
}
models = pytest.mark.parametrize("name", MODELS)


def make(name: str) -> tuple[nn.Module, Tensor]:
    build, shape, _ = MODELS[name]
    return build().eval(), torch.randn(shape)


@models
@pytest.mark.parametrize("bits", [4, 8])
def test_plain_models(name: str, bits: int) -> None:
    model, x = make(name)
    with torch.no_grad():
        expected = twin(model, bits=bits)(x)
        quantize_(model, bits=bits, activation="fp32")
        assert len(quantized(model)) == MODELS[name][2]
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


@models
def test_gradients_reach_the_input_and_other_parameters(name: str) -> None:
    model, x = make(name)
    reference = twin(model, bits=8)
    quantize_(model, bits=8, activation="fp32")
    given = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    for m, g in zip((model, reference), given, strict=True):
        m(g).square().mean().backward()
    if name != "recurrent":  # whose inputs are token ids
        torch.testing.assert_close(given[0].grad, given[1].grad, rtol=1e-3, atol=1e-6)
    wanted = dict(reference.named_parameters())
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    assert found or name == "mlp"
    for parameter, grad in found.items():
        torch.testing.assert_close(grad, wanted[parameter].grad, rtol=1e-3, atol=1e-6)


@models
def test_copies_and_files(name: str, tmp_path: Path) -> None:
    dense, x = make(name)
    model = quantize_(copy.deepcopy(dense), group_size=64)
    with torch.no_grad():
        expected = model(x)
        assert not torch.equal(expected, dense(x))
        buffer = io.BytesIO()
        torch.save(model.state_dict(), buffer)
        buffer.seek(0)
        state = torch.load(buffer, weights_only=True)
        fresh = quantize_(make(name)[0], group_size=64)
        assert not torch.equal(fresh(x), expected)
        fresh.load_state_dict(state)
        torch.save(model, tmp_path / "model.pt")
        copies = [
            fresh,
            copy.deepcopy(model),
            pickle.loads(pickle.dumps(model)),
            torch.load(tmp_path / "model.pt", weights_only=False),
        ]
        for other in copies:
            assert_same_bits(other(x), expected)
        for module in quantized(copies[1]).values():  # no memory shared
            module.packed.zero_()
        assert_same_bits(model(x), expected)
    assert quantized(model).keys() == quantized(copies[1]).keys()
    with pytest.raises((ValueError, RuntimeError), match=r"format|size mismatch"):
        quantize_(make(name)[0], bits=8, group_size=64).load_state_dict(state)
    with pytest.raises(RuntimeError, match="Missing key"):
        make(name)[0].load_state_dict(state)


@models
def test_meta_and_back(name: str) -> None:
    """Moving to meta drops the data and keeps shapes; a state dict brings the data back, assigned or copied."""
    model, x = make(name)
    quantize_(model)
    with torch.no_grad():
        expected, state = model(x), model.state_dict()
        empty = copy.deepcopy(model).to("meta")
        assert all(t.is_meta for t in (*empty.parameters(), *empty.buffers()))
        assert {k: tuple(m.weight.shape) for k, m in quantized(empty).items()} == {
            k: tuple(m.weight.shape) for k, m in quantized(model).items()
        }
        if name in ("mlp", "vision"):
            out = empty(x.to("meta"))
            assert out.is_meta and out.shape == expected.shape
        assigned = copy.deepcopy(empty)
        assigned.load_state_dict(state, assign=True)
        assert_same_bits(assigned.eval()(x), expected)
        filled = copy.deepcopy(empty).to_empty(device="cpu")
        filled.load_state_dict(state)
        assert_same_bits(filled.eval()(x), expected)
    with pytest.raises(ValueError, match=r"meta"):
        quantize_(make(name)[0].to("meta"))


@models
def test_dtypes(name: str) -> None:
    """Moving a quantised model to bf16 leaves the codes alone."""
    model, x = make(name)
    quantize_(model, activation="fp32")
    packed = {key: module.packed.clone() for key, module in quantized(model).items()}
    half = copy.deepcopy(model).to(torch.bfloat16)
    with torch.no_grad():
        out = half(x.bfloat16())
        torch.testing.assert_close(out.float(), model(x), rtol=0.1, atol=0.1)
    assert out.dtype == torch.bfloat16
    for key, module in quantized(half).items():
        assert torch.equal(module.packed, packed[key])


def test_hooks_stay() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    seen: list[str] = []
    model[0].register_forward_pre_hook(lambda *_: seen.append("before"))
    handle = model[0].register_forward_hook(lambda *_: seen.append("after"))
    quantize_(model)
    model(torch.randn(2, 32))
    assert seen == ["before", "after"]
    handle.remove()
    model(torch.randn(2, 32))
    assert seen == ["before", "after", "before"]


def test_weights_that_are_computed_stay() -> None:
    """Weight norm, old and new: the weight is the result of parameters that go on changing."""
    model = nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(32, 32)),
        nn.utils.spectral_norm(nn.Linear(32, 32)),
        nn.Linear(32, 32),
    )
    quantize_(model)
    assert list(quantized(model)) == ["2"]
    model(torch.randn(2, 32))


def test_quantized_weight_is_no_tensor() -> None:
    module = QuantizedLinear.from_linear(nn.Linear(32, 32))
    with pytest.raises(TypeError, match=r"linear: .*QuantizedWeight.*dequantize\(\)"):
        F.linear(torch.randn(2, 32), module.weight)


# Wrappers.


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("name", ["vision", "encoder"])
def test_distributed_data_parallel(name: str) -> None:
    model, x = make(name)
    quantize_(model, bits=8, activation="fp32")
    reference = copy.deepcopy(model)
    wrapped = nn.parallel.DistributedDataParallel(model)
    for m in (wrapped, reference):
        m(x).square().mean().backward()
        with torch.no_grad():
            for p in m.parameters():
                if p.grad is not None:
                    p -= 0.1 * p.grad
    with torch.no_grad():
        assert_same_bits(wrapped(x), reference(x))
    state = wrapped.state_dict()
    assert all(key.startswith("module.") for key in state)
    wrapped.load_state_dict(state)


@pytest.mark.compiles
@pytest.mark.parametrize("name", ["mlp", "vision"])
def test_compiled(name: str) -> None:
    model, x = make(name)
    quantize_(model)
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-2, atol=1e-3)


# Memory.

SWAP = """
import gc, re, sys, torch
from torch import nn
from tilewright import quantize_

def status(key):
    return 1024 * int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1])

def size(model):
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))

bits, dtype = int(sys.argv[1]), getattr(torch, sys.argv[2])
quantize_(nn.Sequential(nn.Linear(2048, 256).to(dtype)), bits)  # the libraries' own pages
gc.collect()
before = status("VmRSS")
blocks = [nn.Sequential(nn.Linear(2048, 1024, dtype=dtype), nn.Linear(1024, 2048, dtype=dtype)) for _ in range(10)]
model = nn.Sequential(*blocks)
del blocks
dense = size(model)
open("/proc/self/clear_refs", "w").write("5")  # VmHWM counts from here
quantize_(model, bits)
print(status("VmHWM") - before, dense, size(model))
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bits", [4, 8])
def test_memory_of_swapping(bits: int, dtype: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SWAP, str(bits), dtype],
        capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    peak, dense, packed = (int(number) for number in done.stdout.split())
    assert packed < dense
    assert peak <= 1.2 * max(dense, packed), f"{peak / 1e6:.0f} MB for {dense / 1e6:.0f} MB"


def test_straight_from_weight() -> None:
    """A module around a weight that GPTQ or another method made computes with it."""
    weight = quantize_weight(torch.randn(64, 96), method="hqq")
    module = QuantizedLinear.from_weight(weight, torch.randn(64), activation="fp32")
    x = torch.randn(3, 96)
    torch.testing.assert_close(module(x), F.linear(x, weight.dequantize(), module.bias), rtol=1e-5, atol=1e-5)
