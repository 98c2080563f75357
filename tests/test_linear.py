"""Quantised linear: exact int8 arithmetic, the error rule, and which bits may not change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import gguf
import pytest
import torch
from buffers import assert_padding_intact, poisoned
from cases import (
    GGUF_TYPES,
    INF,
    LINEAR,
    NAN,
    ROWS,
    LinearCase,
    assert_ran_natively,
    gguf_blocks,
    gguf_rows,
    linear_inputs,
    seeded,
)
from compare import assert_close, assert_same_bits
from torch import Tensor

import tilewright
from tilewright import QuantizedWeight, quantize_weight, quantized_linear
from tilewright.ops.linear import (
    ACTIVATIONS,
    quantise_activations,
    quantized_linear_reference,
    rounded_activations,
)
from tilewright.quant import from_gguf
from tilewright.quant.weight import FLOAT_CODES, pack

INTEGER = ("int8", "int8_token")


pytestmark = pytest.mark.usefixtures("one_thread_for_torch")


def naive_linear(x: Tensor, weight: QuantizedWeight, bias: Tensor | None, activation: str) -> Tensor:
    """The reference's maths in float32; what does not fit bf16 is rounded where the arithmetic is bf16's."""
    w = weight.dequantize()
    if activation == "bf16" and weight.codes in ("nf4", "fp4"):
        w = w.bfloat16().float()
    out = rounded_activations(x, weight, activation).float() @ w.t()
    return out if bias is None else out + bias.float()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("case", LINEAR, ids=str)
def test_error_rule(case: LinearCase, activation: str, dtype: torch.dtype) -> None:
    x, weight, bias = linear_inputs(case, dtype)
    out = quantized_linear(x, weight, bias, activation=activation)
    assert_ran_natively("quantized_linear")
    ref = quantized_linear_reference(x, weight, bias, activation=activation)
    assert_close(out, ref, naive_linear(x, weight, bias, activation).to(dtype), dtype)


# Integer activations: the formula of csrc/cpu/kernels/linear_int8.cpp, bit for bit.


def codes_of(x: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Activation codes (m, blocks, 32) int64 and scales (m, blocks) float32, after the definition in API.md."""
    blocks = torch.nn.functional.pad(x.float(), (0, -x.shape[-1] % 32)).unflatten(-1, (-1, 32))
    amax = blocks.abs().amax(-1)
    if activation == "int8_token":
        amax = amax.amax(-1, keepdim=True).expand_as(amax).contiguous()
    scale = amax / 127
    codes = torch.where(scale[..., None] > 0, blocks / scale[..., None], 0).round().clamp(-127, 127)
    return codes.long(), scale


def stored_codes(weight: QuantizedWeight) -> Tensor:
    """Codes (n, blocks * 32) int64, read from the packed bytes by the layout in csrc/cpu/kernels.h."""
    (n, k), bits = weight.shape, weight.bits
    blocks = -(-k // 32)
    raw = weight.packed[:, : blocks * 128 * bits].long().view(-1, blocks, 128 * bits)
    if bits == 8:  # [block][step of 4 k][32 rows][4 k]
        codes = raw.view(-1, blocks, 8, 32, 4)
    else:  # [16 rows][4 k], rows 16 and up in the high nibbles
        low = raw[..., :512].view(-1, blocks, 8, 16, 4)
        codes = torch.cat([low & 15, low >> 4], 3)
        if bits > 4:  # planes of the upper bits: [plane][half][16 rows][4 k]
            steps = 8 // (bits - 4)
            planes = raw[..., 512:].view(-1, blocks, 8 // steps, 32, 4)
            upper = torch.stack([planes >> (s * (bits - 4)) & (2 ** (bits - 4) - 1) for s in range(steps)], 3)
            codes = codes | upper.flatten(2, 3) << 4
    return codes.permute(0, 3, 1, 2, 4).reshape(-1, blocks * 32)[:n]


# unit, and what each code stands for in units: bit 3 is a sign, of the levels or (iq1) of the eighth beside them.
TABLES = {
    "iq4_nl": (1.0, list(gguf.quants.IQ4_NL.kvalues)),
    "mxfp4": (1.0, list(gguf.quants.MXFP4.kvalues)),
    "iq1": (0.125, [8 * level + sign for sign in (1, -1) for level in (-1, 0, 1, 0, 0, 0, 0, 0)]),
    "iq2": (0.125, [sign * level for sign in (1, -1) for level in (8, 25, 43, 0, 0, 0, 0, 0)]),
    "iq3_xxs": (0.25, [sign * level for sign in (1, -1) for level in gguf.quants.IQ3_XXS.grid_map]),
    "iq3_s": (1.0, [sign * level for sign in (1, -1) for level in gguf.quants.IQ3_S.grid_map]),
}


def weight_parts(weight: QuantizedWeight, run: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes less their zero point (n, runs, run) int64, scales and minima (n, runs) float32."""
    n, k = weight.shape
    columns = -(-k // 32) * 32
    group = columns if weight.group_size == -1 else weight.group_size
    groups, size = -(-columns // group), {"f32": 4, "two_level": 1}.get(weight.scale, 2)
    first = columns * 4 * weight.bits
    starts = torch.arange(0, columns, run) // group

    def spread(first: int, count: int, dtype: torch.dtype, groups: int = groups) -> Tensor:  # one value a column
        values = weight.packed[:, first : first + count].contiguous().view(dtype).view(-1, groups, 32)
        return values.transpose(1, 2).reshape(-1, groups)[:n]

    number = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32, "two_level": torch.int8}[weight.scale]
    scales, minima = spread(first, groups * 32 * size, number).float()[:, starts], torch.zeros(n, len(starts))
    codes = stored_codes(weight)
    unit = 1.0
    if weight.codes in TABLES:
        unit, table = TABLES[weight.codes]
        codes = torch.tensor(table)[codes]
    elif weight.offset == "none":
        codes = codes - 2 ** (weight.bits - 1)
    first += groups * 32 * size
    if weight.offset == "zero":
        zeros = spread(first, groups * 32, torch.uint8).long()
        codes = codes - zeros.repeat_interleave(group, 1)[:, :columns]
    elif weight.offset == "min":
        minima = spread(first, groups * 32 * size, number).float()[:, starts]
        first += groups * 32 * size
    if weight.scale == "two_level":
        supers = -(-k // 256)
        which = torch.arange(0, columns, run) // 256
        scales = scales * unit * spread(first, supers * 64, torch.float16, supers).float()[:, which]
        if weight.offset == "min":
            minima = minima * spread(first + supers * 64, supers * 64, torch.float16, supers).float()[:, which]
    codes = codes.masked_fill(torch.arange(columns) >= k, 0)
    return torch.nn.functional.pad(codes, (0, -columns % run)).view(n, -1, run), scales, minima


def emulated(x: Tensor, weight: QuantizedWeight, activation: str) -> Tensor:
    """float32 (m, n): one accumulator per output, k ascending. float64 holds every product of a fma exactly and its
    sum to 29 bits more than float32 keeps; at scalar level multiply and add round one after the other."""
    if weight.columns is not None:
        x = x[:, weight.columns]
    cx, sx = codes_of(x, activation)
    # As long as both scales last, and with one scale a row at most 256 columns.
    group = cx.shape[1] * 32 if weight.group_size == -1 else weight.group_size
    run = min(group, 32 if activation == "int8" else 256)
    cw, sw, minima = weight_parts(weight, run)
    cx = torch.nn.functional.pad(cx.flatten(1), (0, cw.shape[1] * run - cx.shape[1] * 32)).view(x.shape[0], -1, run)
    sx = sx[:, torch.arange(0, cw.shape[1] * run, run) // 32]
    fused = tilewright.isa() != "scalar"

    def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        product = a.double() * b.double()
        return ((product if fused else product.float().double()) + c.double()).float()

    acc = torch.zeros(x.shape[0], cw.shape[0])
    for i in range(cw.shape[1]):
        dot = (cx[:, i].double() @ cw[:, i].double().t()).float()  # exact integers
        acc = fma(dot, sw[:, i] * sx[:, i, None], acc)
        if weight.offset == "min":
            sums = cx[:, i].sum(-1).float() * sx[:, i]
            acc = fma(minima[:, i].expand_as(acc), sums[:, None].expand_as(acc), acc)
    return acc


# A single output has no distribution of errors, so it stands here only.
EXACT = [
    *(c for c in LINEAR if c.bias is None and c.kind not in FLOAT_CODES),
    LinearCase("single", 1, 1, 96),
    LinearCase("two", 1, 2, 33, 8),
]


@pytest.mark.parametrize("activation", INTEGER)
@pytest.mark.parametrize("case", EXACT, ids=str)
def test_int8_bits(case: LinearCase, activation: str) -> None:
    x, weight, _ = linear_inputs(case, torch.float32)
    assert_same_bits(quantized_linear(x, weight, activation=activation) + 0.0, emulated(x, weight, activation) + 0.0)


def scaled_rows(k: int) -> Tensor:
    """Rows of every magnitude: subnormal, tiny, one element, halves that must round to even, huge, zero."""
    x = torch.randn(9, k, generator=seeded("rows"))
    x[0] *= 1e-40
    x[1] *= 1e-30
    x[2] = 0
    x[2, k // 2] = 3.0
    x[3] = torch.arange(k) % 32 - 15.5  # with amax 127: codes end in .5
    x[3, ::32] = 127.0
    x[4] = 2.0**120
    x[5] *= 1e-3
    x[5, 1] = 1e4
    x[6] = 0
    x[7] = torch.finfo(torch.float32).tiny
    x[8] = 1.4e-45
    return x


@pytest.mark.parametrize("activation", INTEGER)
def test_int8_rows_of_every_magnitude(activation: str) -> None:
    x = scaled_rows(160)
    weight = quantize_weight(torch.randn(40, 160, generator=seeded("weight")), 4, 32, False)
    out, expected = quantized_linear(x, weight, activation=activation), emulated(x, weight, activation)
    assert_same_bits(out + 0.0, expected + 0.0)
    assert (out[[2, 3, 4, 5, 7]] != 0).any(-1).all() and (out[6] == 0).all()


@pytest.mark.parametrize("offset", ["none", "zero", "min"])
@pytest.mark.parametrize("bits", [4, 5, 6, 8])
@pytest.mark.parametrize("m", [1, 6, 14])
def test_extreme_codes_do_not_saturate(bits: int, m: int, offset: str) -> None:
    """All products at their limits, where a 16-bit sum of u8 x s8 pairs would saturate."""
    n, k, top = 64, 256, 2**bits - 1
    codes = torch.full((n, k), top, dtype=torch.uint8)
    codes[1::4] = 0
    codes[2::4, ::2] = 0
    codes[3::4] = torch.tensor([top, 0, 0, top]).to(torch.uint8).repeat(k // 4)
    offsets = {"none": None, "zero": torch.tensor([[0], [top]]).to(torch.uint8), "min": torch.tensor([[-1.0], [2.0]])}
    offsets = offsets[offset] if offset == "none" else offsets[offset].repeat(n // 2, k // 32)
    weight = pack(codes, torch.ones(n, k // 32), offsets, f"int{bits}", 32, offset)
    signs = torch.tensor([[1.0, 1], [-1, -1], [1, -1], [-1, 1]]).repeat(4, k // 2)[:m]
    for x in (signs, signs * torch.linspace(1, 2, k)):
        for activation in INTEGER:
            out = quantized_linear(x, weight, activation=activation)
            assert_same_bits(out + 0.0, emulated(x, weight, activation) + 0.0)
    ref = signs.double() @ weight.dequantize().double().t()
    torch.testing.assert_close(quantized_linear(signs, weight), ref.float(), rtol=1e-6, atol=1e-4)


# Needles.


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bits", [4, 8])
def test_each_weight_is_found(bits: int, activation: str) -> None:
    """x = 127 * identity reads the weight back, one column a row: no element is dropped, doubled or misplaced."""
    n, k = 97, 161
    weight = quantize_weight(torch.randn(n, k, generator=seeded("needle")), bits, 64, False)
    x = torch.eye(k) * (127 if activation != "int8_token" else 1)
    out = quantized_linear(x, weight, activation=activation)
    expected = weight.dequantize().t() * x.max()
    torch.testing.assert_close(out, expected, rtol=3e-7, atol=0)
    for m in (1, 3, 7):
        torch.testing.assert_close(
            quantized_linear(x[-m:], weight, activation=activation), expected[-m:], rtol=3e-7, atol=0
        )


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("m", [1, 7, 40])
def test_each_activation_is_found(m: int, activation: str) -> None:
    """A weight of 7 * identity reads x back."""
    size = 161
    weight = quantize_weight(torch.eye(size) * 7, 4, 32)
    x = torch.randn(m, size, generator=seeded("needle"))
    out = quantized_linear(x, weight, activation=activation)
    if activation in INTEGER:
        expected = 7 * quantise_activations(x, activation)
        torch.testing.assert_close(out, expected.float(), rtol=3e-7, atol=0)
    else:  # the zero point's share is taken off a sum of 32: exact to that sum's rounding only
        ref = quantized_linear_reference(x, weight, activation=activation)
        assert_close(out, ref, naive_linear(x, weight, None, activation), torch.float32)


# What may not change the bits.


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", ["symmetric", "zero", "Q4_1", "Q8_0", "int5_min", "nf4", "mxfp4", "e4m3", "bf16",
                                  "columns", "outliers"])  # fmt: skip
def test_row_bits_do_not_depend_on_the_batch(kind: str, activation: str) -> None:
    x, weight, _ = linear_inputs(LinearCase("batch", 200, 70, 288, kind=kind), torch.float32)
    whole = quantized_linear(x, weight, activation=activation)
    # AMX adds the products of bf16 in another order than vectors do, which few rows take.
    tiles = activation == "bf16" and tilewright.isa() == "amx"
    for m in ROWS if not tiles else (13, 16, 17, 33, 64):
        for first in (0, 200 - m):
            part = quantized_linear(x[first : first + m], weight, activation=activation)
            assert_same_bits(part, whole[first : first + m])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("m", [1, 8, 9, 200])
def test_bits_do_not_depend_on_threads(m: int, activation: str, same_bits: Callable) -> None:
    x, weight, bias = linear_inputs(LinearCase("threads", m, 300, 480, bias=torch.float32), torch.float32)
    same_bits(lambda: (quantized_linear(x, weight, bias, activation=activation),))


# NaN, infinities, memory that is not ours.


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("kind", ["symmetric", "Q4_1"])
def test_rows_that_are_not_finite(kind: str, value: float, activation: str, dtype: torch.dtype) -> None:
    for m in (2, 9):
        x, weight, _ = linear_inputs(LinearCase("bad", m, 40, 96, kind=kind), dtype)
        clean = quantized_linear(x, weight, activation=activation)
        for column in (0, 31, 32, 95):
            bad = x.clone()
            bad[1, column] = value
            out = quantized_linear(bad, weight, activation=activation)
            ref = quantized_linear_reference(bad, weight, activation=activation)
            assert_close(out, ref, naive_linear(bad, weight, None, activation).to(dtype), dtype)
            assert not out[1].isfinite().any()
            keep = torch.arange(m) != 1
            assert_same_bits(out[keep], clean[keep])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("m, n, k", [(1, 33, 65), (7, 31, 96), (30, 70, 33)])
def test_poisoned_surroundings(m: int, n: int, k: int, activation: str, dtype: torch.dtype) -> None:
    x, weight, bias = linear_inputs(LinearCase("poison", m, n, k, bias=torch.float32), dtype)
    expected = quantized_linear(x, weight, bias, activation=activation)
    out = poisoned(torch.zeros(m, n, dtype=dtype))
    packed = poisoned(weight.packed.view(1, -1), 255).view(weight.packed.shape)  # a misaligned weight
    result = quantized_linear(
        poisoned(x), replace(weight, packed=packed), poisoned(bias), activation=activation, out=out
    )
    assert result is out
    assert_same_bits(out, expected)
    assert_padding_intact(out)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_layouts_of_x(activation: str, dtype: torch.dtype) -> None:
    weight = quantize_weight(torch.randn(40, 96, generator=seeded("layouts")))
    wide = torch.randn(5, 6, 200, generator=seeded("x")).to(dtype)
    layouts = (
        wide[..., 3:99],  # rows apart
        wide[:, ::2, 1:97],
        wide.transpose(0, 1)[..., :96],
        wide[..., :192:2],  # last dimension strided
        wide[:1, :1, :96].expand(4, 9, 96),  # stride 0
        wide[:, :1, :96].expand(5, 9, 96),
        wide[..., :1].expand(5, 6, 96),
        wide[0, 0, :96],
        wide[:, :, :96].view(5, 2, 1, 3, 96).transpose(0, 3),
        wide[:, :, :96].view(1, 5, 1, 2, 3, 96),
    )
    for x in layouts:
        out = quantized_linear(x, weight, activation=activation)
        assert out.shape == (*x.shape[:-1], 40)
        flat = quantized_linear(x.reshape(-1, 96).contiguous(), weight, activation=activation)
        assert_same_bits(out.reshape(-1, 40), flat)


def test_out_of_another_layout_and_dtype(dtype: torch.dtype) -> None:
    x, weight, _ = linear_inputs(LinearCase("out", 9, 40, 96), dtype)
    expected = quantized_linear(x.float(), weight)
    for other in (torch.float32, torch.bfloat16, torch.float16):
        wide = torch.full((3, 3, 50), NAN, dtype=other)
        out = wide.transpose(0, 1)[..., 4:44]
        assert quantized_linear(x.view(3, 3, 96), weight, out=out) is out
        assert_same_bits(out.reshape(9, 40), expected.to(other))
        assert wide[..., :4].isnan().all() and wide[..., 44:].isnan().all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("m, n, k", [(0, 40, 96), (3, 0, 96), (3, 40, 0), (0, 0, 0), (1, 1, 0)])
def test_empty(m: int, n: int, k: int, activation: str) -> None:
    weight = quantize_weight(torch.randn(n, k))
    bias = torch.randn(n)
    assert weight.dequantize().shape == (n, k)
    torch.empty(m, n).fill_(NAN)  # so that memory that is not written is unlikely to hold the right result
    for b in (bias, None):
        expected = torch.nn.functional.linear(torch.zeros(m, k), torch.zeros(n, k), b)
        assert_same_bits(quantized_linear(torch.randn(m, k), weight, b, activation=activation), expected)
    assert quantized_linear(torch.randn(2, 0, k), weight).shape == (2, 0, n)


# Gradients.


@pytest.mark.parametrize("kind", ["zero", "Q4_1"])
@pytest.mark.parametrize("shape", [(96,), (5, 96), (2, 1, 3, 96)], ids=str)
def test_gradients(shape: tuple[int, ...], kind: str, dtype: torch.dtype) -> None:
    """The gradient is the dense layer's, whatever the activation mode: rounding has derivative 1."""
    _, weight, _ = linear_inputs(LinearCase("gradient", 1, 40, 96, kind=kind), dtype)
    g = seeded("gradient")
    x, bias, upstream = (torch.randn(s, generator=g).to(dtype) for s in (shape, (40,), (*shape[:-1], 40)))

    def gradients(function: Callable, wide: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [t.to(wide).requires_grad_() for t in (x, bias)]
        return torch.autograd.grad(function(*leaves), leaves, upstream.to(wide))

    dense = weight.dequantize()
    ref = gradients(lambda a, b: torch.nn.functional.linear(a, dense.double(), b), torch.float64)
    naive = gradients(lambda a, b: torch.nn.functional.linear(a, dense.to(dtype), b), dtype)
    for activation in ACTIVATIONS:

        def run(a: Tensor, b: Tensor, activation: str = activation) -> Tensor:
            return quantized_linear(a, weight, b, activation=activation)

        for a, b, c in zip(gradients(run, dtype), ref, naive, strict=True):
            assert_close(a, b, c, dtype)


# Rejected.

WEIGHT = quantize_weight(torch.zeros(40, 96))


def call(x: object = None, weight: object = WEIGHT, bias: object = None, **options: object) -> Callable[[], object]:
    return lambda: quantized_linear(torch.zeros(3, 96) if x is None else x, weight, bias, **options)


REJECTED = {
    "columns": (call(torch.zeros(3, 95)), ValueError, "96 columns, got x"),
    "x_0d": (call(torch.tensor(1.0)), ValueError, "quantized_linear: "),
    "x_7d": (call(torch.zeros(1, 1, 1, 1, 1, 1, 96)), ValueError, "6 dimensions"),
    "x_double": (call(torch.zeros(3, 96).double()), ValueError, "x must be float32, bfloat16 or float16, got float64"),
    "x_int": (call(torch.zeros(3, 96).int()), ValueError, "x must be float32"),
    "x_list": (call([[0.0] * 96]), TypeError, "quantized_linear: x"),
    "weight_tensor": (call(weight=torch.zeros(40, 96)), TypeError, "quantized_linear: weight"),
    "bias_shape": (call(bias=torch.zeros(41)), ValueError, r"bias must be .* \(40,\)"),
    "bias_2d": (call(bias=torch.zeros(1, 40)), ValueError, "bias"),
    "activation": (call(activation="int4"), ValueError, "activation must be one of.*'int4'"),
    "backend": (call(backend="gpu"), ValueError, "backend must be one of"),
    "backend_triton": (call(backend="triton"), NotImplementedError, "Triton.*got cpu"),
    "backend_cuda": (call(backend="cuda"), NotImplementedError, "backend=.cuda.*tensors on a GPU"),
    "out_shape": (call(out=torch.zeros(3, 41)), ValueError, "out must be .* 40 columns, got"),
    "out_rows": (call(out=torch.zeros(4, 40)), ValueError, "out must be"),
    "out_dims": (call(out=torch.zeros(1, 3, 40)), ValueError, "out must be"),
    "out_int": (call(out=torch.zeros(3, 40).int()), ValueError, "out must be a float"),
    "out_last": (call(out=torch.zeros(40, 3).t()), ValueError, "out must be contiguous in its last"),
    "out_reference": (call(out=torch.zeros(2, 3, 40), backend="reference"), ValueError, "out must be"),
    "out_grad": (call(torch.ones(3, 96, requires_grad=True), out=torch.zeros(3, 40)), ValueError, "gradient"),
    "out_bias_grad": (call(bias=torch.ones(40, requires_grad=True), out=torch.zeros(3, 40)), ValueError, "gradient"),
    "lying_shape": (call(weight=replace(WEIGHT, shape=(72, 96))), ValueError, "packed weight must be contiguous uint8"),
    "lying_codes": (call(weight=replace(WEIGHT, codes="int8")), ValueError, "packed weight must be"),
    "unknown_codes": (call(weight=replace(WEIGHT, codes="int3")), ValueError, "codes must be one of.*int3"),
    "unknown_scale": (call(weight=replace(WEIGHT, scale="f64")), ValueError, "scale must be one of.*f64"),
    "table_offset": (call(weight=replace(WEIGHT, codes="nf4", offset="zero")), ValueError, "no offsets"),
    "iq_scale": (call(weight=replace(WEIGHT, codes="iq2")), ValueError, "two-level"),
    "dense_scale": (call(weight=replace(WEIGHT, codes="bf16")), ValueError, "bf16 codes"),
    "columns_shape": (call(weight=replace(WEIGHT, columns=torch.arange(95))), ValueError, r"columns must be .*\(96,\)"),
    "columns_range": (call(weight=replace(WEIGHT, columns=torch.arange(1, 97))), ValueError, r"columns must lie in"),
    "columns_dtype": (call(weight=replace(WEIGHT, columns=torch.arange(96.0))), ValueError, "columns must be .*int64"),
    "lying_group": (call(weight=replace(WEIGHT, group_size=17)), ValueError, "group_size must be"),
    "packed_dtype": (call(weight=replace(WEIGHT, packed=WEIGHT.packed.to(torch.int8))), ValueError, "uint8"),
    "packed_strided": (
        call(weight=replace(WEIGHT, packed=torch.cat([WEIGHT.packed] * 2, 1)[:, : WEIGHT.packed.shape[1]])),
        ValueError, "packed weight must be contiguous",
    ),
    "meta_weight": (call(weight=WEIGHT.to("meta")), (ValueError, RuntimeError, NotImplementedError), "meta|device"),
}  # fmt: skip


@pytest.mark.parametrize("name", REJECTED)
def test_rejected(name: str) -> None:
    function, error, message = REJECTED[name]
    with pytest.raises(error, match=message):
        function()


def test_reference_backend() -> None:
    x, weight, bias = linear_inputs(LinearCase("reference", 5, 40, 96, bias=torch.float32), torch.float32)
    out = quantized_linear(x, weight, bias, backend="reference")
    assert tilewright.last_impl("quantized_linear") == "reference"
    assert_same_bits(out, quantized_linear_reference(x, weight, bias).float())


@pytest.mark.parametrize("type_name", GGUF_TYPES)
def test_gguf_scales_of_every_sign_and_size(type_name: str) -> None:
    """Negative, zero, subnormal and huge fp16 scales, through every activation mode."""
    g, k = seeded("scales"), 6 * gguf_blocks(type_name)[0]
    scales = torch.tensor([-0.1, 0.0, -0.0, 6e-8, -3e-6, 60000.0]).repeat(33)
    weight = from_gguf(gguf_rows(type_name, 33, k, g, scales), type_name, (33, k))
    x = torch.randn(9, k, generator=g)
    for m in (1, 9):
        for activation in INTEGER:
            out = quantized_linear(x[:m], weight, activation=activation)
            assert_same_bits(out + 0.0, emulated(x[:m], weight, activation) + 0.0)
        for activation in ("bf16", "fp32"):
            ref = quantized_linear_reference(x[:m], weight, activation=activation)
            naive = naive_linear(x[:m], weight, None, activation)
            assert_close(quantized_linear(x[:m], weight, activation=activation), ref, naive, torch.float32)
