"""Weight formats: what quantize_weight rounds to, QuantizedWeight, QuantizedLinear, quantize_."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from cases import INF, NAN, gguf_rows, seeded
from compare import assert_same_bits
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import tilewright
from tilewright import QuantizedLinear, QuantizedWeight, quantize_, quantize_weight, quantized_linear
from tilewright.quant import from_gguf

# quantize_weight.

WEIGHTS = {
    "normal": lambda w: w,
    "shifted": lambda w: w + 3,
    "negative": lambda w: -w.abs() - 1,
    "positive": lambda w: w.abs() + 1,
    "zeros": lambda w: w * 0,
    "zero_rows": lambda w: w * (torch.arange(w.shape[0]) % 2).view(-1, 1),
    "constant": lambda w: w * 0 - 0.37,
    "one_outlier": lambda w: w.index_fill(1, torch.tensor([0]), 1000.0),
    "tiny": lambda w: w * 1e-12,  # scales that fp16 cannot hold
    "subnormal": lambda w: w * 1e-39,
    "smallest": lambda w: (w * 10).round() * 1.4e-45,
    "large": lambda w: w * 1e30,
    "largest": lambda w: w.clamp(-1, 1) * 3.4e38,
    "mixed": lambda w: w * torch.logspace(-30, 30, w.shape[0]).view(-1, 1),
}


def grouped(w: Tensor, group_size: int) -> Tensor:
    size = max(w.shape[1], 1) if group_size == -1 else group_size
    return nn.functional.pad(w.double(), (0, -w.shape[1] % size)).unflatten(1, (-1, size))


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits, group_size", [(4, 16), (4, 32), (8, 64), (4, 128), (8, -1)])
def test_rounding_to_nearest(bits: int, group_size: int, symmetric: bool, kind: str) -> None:
    """No element is farther than half a step from its value (plus the step's own rounding to fp16 or fp32)."""
    w = WEIGHTS[kind](torch.randn(34, 200, generator=seeded(kind)))
    weight = quantize_weight(w, bits, group_size, symmetric)
    back = weight.dequantize()
    assert back.isfinite().all()
    groups, top = grouped(w, group_size), 2**bits - 1
    if symmetric:
        step = groups.abs().amax(-1) / (2 ** (bits - 1) - 1)
    else:
        step = (groups.amax(-1).clamp(min=0) - groups.amin(-1).clamp(max=0)) / top
    slack = 2.0**-10 * top * step if weight.scale == "f16" else 1e-6 * top * step
    # A zero point is a whole number: the ends of an asymmetric range may lie half a step outside.
    limit = (0.5 if symmetric else 1.0) * step + slack + (2**-149) * top
    error = (grouped(back, group_size) - groups).abs().amax(-1)
    assert (error <= limit).all(), f"worst {float((error / step.clamp(min=1e-300)).max()):.3f} steps"


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_values_on_the_grid_survive(bits: int, symmetric: bool) -> None:
    """Integers times a power of two are their own quantisation, with any group size and a short last group."""
    half = 2 ** (bits - 1) - 1
    codes = torch.randint(-half, half + 1, (33, 168), generator=seeded("grid")).float()
    codes[:, ::8] = half  # every group reaches both ends
    codes[:, 1::8] = -half if symmetric else -half - 1
    for group_size in (16, 32, 64, 128, -1):
        weight = quantize_weight(codes * 0.125, bits, group_size, symmetric)
        assert_same_bits(weight.dequantize() + 0.0, codes * 0.125)
        assert weight.scale == "f16"


def test_formats_and_sizes() -> None:
    w = torch.randn(64, 256)
    for bits, group_size, symmetric, name, bytes_a_weight in (
        (4, 32, True, "int4_g32", 0.5 + 2 / 32), (8, 128, True, "int8_g128", 1 + 2 / 128),
        (4, 16, True, "int4_g16", 0.5 + 2 / 16),
        (4, 64, False, "int4_g64_zero", 0.5 + 3 / 64), (8, -1, False, "int8_row_zero", 1 + 3 / 256),
    ):  # fmt: skip
        weight = quantize_weight(w, bits, group_size, symmetric)
        assert (weight.format, weight.bits, weight.group_size, weight.shape) == (name, bits, group_size, (64, 256))
        assert weight.nbytes == weight.packed.nbytes <= bytes_a_weight * w.numel() + 64 * 2
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert_same_bits(quantize_weight(w.to(dtype)).packed, quantize_weight(w.to(dtype).float()).packed)
        assert quantize_weight(w.to(dtype)).dequantize(dtype).dtype == dtype
    assert_same_bits(quantize_weight(w.t()[:40]).packed, quantize_weight(w.t()[:40].contiguous()).packed)


def nan_at(value: float) -> Tensor:
    w = torch.zeros(3, 40)
    w[2, 39] = value
    return w


@pytest.mark.parametrize("run, error, message", [
    (lambda: quantize_weight(torch.zeros(3, 4, 5)), ValueError, r"\(N, K\), got \(3, 4, 5\)"),
    (lambda: quantize_weight(torch.zeros(3, 4).int()), TypeError, "floating-point.*int32"),
    (lambda: quantize_weight([[1.0]]), TypeError, "floating-point"),
    (lambda: quantize_weight(torch.zeros(3, 32), bits=5), ValueError, "bits must be 4 or 8, got 5"),
    (lambda: quantize_weight(torch.zeros(3, 32), group_size=48), ValueError, "group_size must be one of"),
    (lambda: quantize_weight(nan_at(NAN)), ValueError, "NaN or inf"),
    (lambda: quantize_weight(nan_at(INF)), ValueError, "NaN or inf"),
    (lambda: quantize_weight(nan_at(-INF), symmetric=False), ValueError, "NaN or inf"),
])  # fmt: skip
def test_quantize_weight_rejects(run: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        run()


# QuantizedWeight.

FORMATS: dict[str, Callable[[], QuantizedWeight]] = {
    "int4": lambda: quantize_weight(torch.randn(70, 100, generator=seeded("f")), 4, 32),
    "int8_zero": lambda: quantize_weight(torch.randn(70, 100, generator=seeded("f")), 8, 64, False),
    "int4_row_fp32": lambda: quantize_weight(torch.randn(70, 100, generator=seeded("f")) * 1e-9, 4, -1),
    "Q4_1": lambda: from_gguf(gguf_rows("Q4_1", 70, 96, seeded("f")), "Q4_1", (70, 96)),
    "Q4_K": lambda: from_gguf(gguf_rows("Q4_K", 70, 512, seeded("f")), "Q4_K", (70, 512)),
}


@pytest.mark.parametrize("name", FORMATS)
def test_rows(name: str) -> None:
    weight = FORMATS[name]()
    whole, k = weight.dequantize(), weight.shape[1]
    index = torch.tensor([[0, 69, 31], [32, 33, 0]])
    for i in (index, index.int(), index[:, ::2], index.t(), index[0], torch.tensor(5), index[:0], index[:, :0],
              torch.tensor([3]).expand(4)):  # fmt: skip
        rows = weight.rows(i)
        assert rows.shape == (*i.shape, k) and rows.dtype == torch.float32
        assert_same_bits(rows, whole[i.long()])
    for bad in ([70], [-1], [0, 2**40]):
        with pytest.raises(IndexError, match=f"{bad[-1]} is outside the 70 rows"):
            weight.rows(torch.tensor(bad))
    with pytest.raises(TypeError, match=r"int64 or int32, got torch\.float32"):
        weight.rows(torch.zeros(2))


def test_default_dtype_and_device_do_not_matter() -> None:
    """Models are built under torch.set_default_dtype and torch.device("meta")."""
    weight, x = FORMATS["int4"](), torch.randn(3, 100)
    whole, out = weight.dequantize(), quantized_linear(x, weight)
    try:
        torch.set_default_dtype(torch.float64)
        assert_same_bits(weight.dequantize(), whole)
        assert_same_bits(quantized_linear(x, weight), out)
        leaf = x.clone().requires_grad_()
        quantized_linear(leaf, weight).sum().backward()
        assert leaf.grad.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        assert_same_bits(weight.rows(torch.tensor([3, 4], device="cpu")), whole[3:5])
        assert_same_bits(quantized_linear(x, weight), out)


@pytest.mark.parametrize("name", FORMATS)
def test_concat(name: str) -> None:
    weight = FORMATS[name]()
    blocks = [replace(weight, packed=weight.packed[:2], shape=(64, weight.shape[1])),
              replace(weight, packed=weight.packed[2:], shape=(6, weight.shape[1]))]  # fmt: skip
    assert_same_bits(QuantizedWeight.concat(blocks).packed, weight.packed)
    assert QuantizedWeight.concat(blocks).shape == weight.shape
    twice = QuantizedWeight.concat([blocks[0], weight])
    assert_same_bits(twice.dequantize(), torch.cat([weight.dequantize()[:64], weight.dequantize()]))
    with pytest.raises(ValueError, match=r"part 0 has 70 rows.*multiple of 32"):
        QuantizedWeight.concat([weight, weight])
    with pytest.raises(ValueError, match="agree in columns and format"):
        QuantizedWeight.concat([blocks[0], quantize_weight(torch.randn(3, 64), 8)])
    with pytest.raises(ValueError, match="concat"):
        QuantizedWeight.concat([])


@pytest.mark.parametrize("name", FORMATS)
def test_copies_of_a_weight(name: str) -> None:
    weight = FORMATS[name]()
    for other in (pickle.loads(pickle.dumps(weight)), copy.deepcopy(weight), weight.to("cpu")):
        assert other.spec() == weight.spec() and other.format == weight.format
        assert_same_bits(other.packed, weight.packed)
    assert copy.deepcopy(weight).packed.data_ptr() != weight.packed.data_ptr()
    assert weight.to("meta").device.type == "meta"


# QuantizedLinear.


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ["int8", "fp32"])
def test_linear_module(bias: bool, activation: str) -> None:
    linear = nn.Linear(100, 70, bias=bias)
    module = QuantizedLinear.from_linear(linear, 8, 32, symmetric=False, activation=activation)
    x = torch.randn(2, 3, 100)
    expected = quantized_linear(x, quantize_weight(linear.weight, 8, 32, False), linear.bias, activation=activation)
    assert_same_bits(module(x), expected.detach())
    torch.testing.assert_close(module(x), linear(x), rtol=0, atol=0.05)
    assert "int8_g32_zero" in repr(module) and activation in repr(module)
    assert [name for name, _ in module.named_parameters()] == (["bias"] if bias else [])
    assert not any(p.requires_grad for p in module.parameters())
    conv = Conv1D(70, 100)
    with torch.no_grad():
        conv.weight.copy_(linear.weight.t())
        conv.bias.copy_(linear.bias if bias else torch.zeros(70))
    from_conv = QuantizedLinear.from_linear(conv, 8, 32, symmetric=False, activation=activation)
    assert (from_conv.in_features, from_conv.out_features) == (100, 70)
    torch.testing.assert_close(from_conv(x), module(x))


@pytest.mark.parametrize("activation", ["int8", "bf16"])
def test_module_copies(activation: str) -> None:
    module = QuantizedLinear.from_linear(nn.Linear(100, 70), 4, 64, activation=activation)
    x = torch.randn(3, 100)
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    fresh = QuantizedLinear(100, 70, bits=4, group_size=64, activation=activation)
    assert torch.equal(fresh(x), torch.zeros(3, 70))
    fresh.load_state_dict(state)
    copies = [fresh, copy.deepcopy(module), pickle.loads(pickle.dumps(module))]
    with torch.device("meta"):
        empty = QuantizedLinear(100, 70, bits=4, group_size=64, activation=activation)
    empty.to_empty(device="cpu").load_state_dict(state)
    for other in (*copies, empty):
        assert_same_bits(other(x), module(x))
        assert other.activation == activation
    with pytest.raises(ValueError, match=r"format \('int4', 64, 'none', 'f16'\).*this module has \('int8', 64"):
        QuantizedLinear(100, 70, bits=8, group_size=64).set_extra_state(module.get_extra_state())
    with pytest.raises((ValueError, RuntimeError), match=r"format|size mismatch"):
        QuantizedLinear(100, 70, bits=8, group_size=64).load_state_dict(state)
    with pytest.raises(ValueError, match="activation must be one of"):
        QuantizedLinear(8, 8, activation="int3")
    half = copy.deepcopy(module).bfloat16()
    assert_same_bits(
        half(x.bfloat16()), quantized_linear(x.bfloat16(), module.weight, module.bias.bfloat16(), activation=activation)
    )


# quantize_.


class Block(nn.Module):
    """One of everything that quantize_ must tell apart."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.again = self.first  # registered twice
        self.conv = Conv1D(64, 64)
        self.norm = nn.LayerNorm(64)
        self.inner = nn.ModuleDict({"proj": nn.Linear(64, 64, bias=False), "lm_head": nn.Linear(64, 8)})
        self.attention = nn.MultiheadAttention(64, 4)  # its out_proj is a subclass of nn.Linear
        self.embedding = nn.Embedding(8, 64)


def test_quantize_() -> None:
    model = nn.ModuleDict({"a": Block().eval(), "lm_head": nn.Linear(64, 8)})
    model["shared"] = model["a"].inner["proj"]
    kept = model["a"].attention.out_proj
    assert quantize_(model, 4, 64, activation="fp32") is model
    a = model["a"]
    assert isinstance(a.first, QuantizedLinear) and isinstance(a.conv, QuantizedLinear)
    assert a.again is a.first, "a module registered twice in one parent is no longer one"
    assert isinstance(a.inner["proj"], QuantizedLinear) and model["shared"] is a.inner["proj"]
    assert type(model["lm_head"]) is nn.Linear and type(a.inner["lm_head"]) is nn.Linear
    assert a.attention.out_proj is kept and type(a.norm) is nn.LayerNorm
    assert (a.first.weight.bits, a.first.weight.group_size, a.first.activation) == (4, 64, "fp32")
    assert not a.first.training
    quantize_(model)  # a second time changes nothing
    assert a.first.weight.group_size == 64


def test_quantize_selects_by_name() -> None:
    def names(**options: object) -> set[str]:
        model = quantize_(nn.ModuleDict({"a": Block(), "lm_head": nn.Linear(64, 8)}), **options)
        return {name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}

    everything = {"a.first", "a.conv", "a.inner.proj", "a.inner.lm_head", "lm_head"}
    assert names(skip=()) == everything
    assert names() == everything - {"a.inner.lm_head", "lm_head"}
    assert names(skip=["a.inner.lm_head", "conv"]) == everything - {"a.inner.lm_head", "a.conv"}
    assert names(skip=(), filter=lambda module, name: name.startswith("a.inner")) == {"a.inner.proj", "a.inner.lm_head"}
    assert names(skip="lm_head") == everything - {"a.inner.lm_head", "lm_head"}, "one name given as a string"


@pytest.mark.parametrize("options, message", [
    ({"bits": 3}, "bits"), ({"group_size": 48}, "group_size"), ({"activation": "int3"}, "activation"),
])  # fmt: skip
def test_quantize_rejects(options: dict, message: str) -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    with pytest.raises(ValueError, match=message):
        quantize_(model, **options)
    assert all(type(module) is nn.Linear for module in model), "left half converted"
    with pytest.raises(ValueError, match="itself a Linear"):
        quantize_(nn.Linear(32, 32))


def test_quantized_gpt2_still_computes() -> None:
    """A transformers model with Conv1D layers, before and after."""
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=64, vocab_size=100, n_positions=32)).eval()
    ids = torch.arange(20).view(1, 20)
    with torch.no_grad():
        before = model(ids).logits
        quantize_(model, 8, 32)
        after = model(ids).logits
    assert sum(isinstance(m, QuantizedLinear) for m in model.modules()) == 8
    assert type(model.lm_head) is nn.Linear
    assert (before - after).abs().max() < 0.05 * before.abs().max()
    assert tilewright.last_impl("quantized_linear") != "reference"
