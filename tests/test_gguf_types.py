"""Every quantised GGUF type: what from_gguf makes of its blocks, against the gguf package, and on any bytes at all."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import GGUF_TYPES, assert_ran_natively, gguf_blocks, gguf_rows, gguf_values, seeded
from compare import assert_close, assert_same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tilewright import quantized_linear
from tilewright.ops.linear import ACTIVATIONS, quantise_activations, quantized_linear_reference
from tilewright.quant import QuantizedWeight, from_gguf
from tilewright.quant.gguf import TYPES

pytestmark = pytest.mark.usefixtures("one_thread_for_torch")

every_type = pytest.mark.parametrize("type_name", GGUF_TYPES)


def random_bytes(type_name: str, n: int, k: int) -> Tensor:
    """Rows of anything: NaN, infinite, subnormal and negative scales among them."""
    columns, size = gguf_blocks(type_name)
    g = seeded(f"{type_name} {n} {k}")
    return torch.randint(0, 256, (n, k // columns * size), generator=g, dtype=torch.uint8)


def assert_same_values(weight: QuantizedWeight, expected: Tensor) -> None:
    """Bit for bit, but for the sign of zero and what a NaN carries."""
    values = weight.dequantize()
    assert values.shape == expected.shape and values.dtype == torch.float32
    same = (values == expected) | (values.isnan() & expected.isnan())
    assert same.all(), (
        f"{int((~same).sum())} of {same.numel()} values differ, first at {(~same).nonzero()[0].tolist()}: "
        f"expected {expected[~same][0]}, got {values[~same][0]}"
    )


def shapes(type_name: str) -> list[tuple[int, int]]:
    """(N, K): one block, rows that are no multiple of 32, whole and broken multiples of 256 columns, nothing."""
    columns, _ = gguf_blocks(type_name)
    return [(1, columns), (33, 256), (32, 3 * columns), (70, 5 * columns), (2, 9 * 256), (0, 512), (5, 0), (0, 0)]


def test_every_type_of_the_list_is_read() -> None:
    assert set(TYPES) == set(GGUF_TYPES)
    for name, kind in TYPES.items():
        assert (kind.columns, kind.nbytes) == gguf_blocks(name)


@every_type
def test_values_are_those_of_the_gguf_package(type_name: str) -> None:
    for n, k in shapes(type_name):
        for raw in (gguf_rows(type_name, n, k, seeded(type_name)), random_bytes(type_name, n, k)):
            weight = from_gguf(raw, type_name, (n, k))
            assert weight.shape == (n, k) and type_name in weight.format
            assert_same_values(weight, gguf_values(raw, type_name) if raw.numel() else torch.empty(n, k))


@every_type
def test_every_super_scale(type_name: str) -> None:
    """Each of fp16's numbers as a scale: subnormal, zero, negative, infinite, NaN."""
    scales = torch.arange(0, 65536, 3, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    columns, _ = gguf_blocks(type_name)
    k, n = 3 * columns, scales.numel() // 3
    raw = gguf_rows(type_name, n, k, seeded(type_name), scales[: 3 * n])
    assert_same_values(from_gguf(raw, type_name, (n, k)), gguf_values(raw, type_name))


def test_every_exponent_of_mxfp4() -> None:
    """2^(e - 127) times E2M1 by the OCP microscaling specification, in float64; e = 255 is ggml's 2^128, not NaN."""
    raw = torch.empty(256, 17, dtype=torch.uint8)
    raw[:, 0] = torch.arange(256)
    raw[:, 1:] = torch.arange(16) * 17  # columns 0..15 and 16..31 hold every code
    levels = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    levels = np.concatenate([levels, -levels, levels, -levels])
    expected = np.ldexp(levels, np.arange(256)[:, None] - 127)
    with np.errstate(over="ignore"):
        expected = torch.from_numpy(expected.astype(np.float32))
    assert expected.isinf().any() and (expected[0, 1] == 2.0**-128)
    assert_same_values(from_gguf(raw, "MXFP4", (256, 32)), expected)


@every_type
def test_size(type_name: str) -> None:
    """Within a quarter of a bit a weight of the file for 4 bits and more; below, 4-bit codes and their scales."""
    n, k = 64, 2048
    weight = from_gguf(gguf_rows(type_name, n, k, seeded("size")), type_name, (n, k))
    columns, size = gguf_blocks(type_name)
    packed, file = weight.nbytes * 8 / (n * k), size * 8 / columns
    assert packed <= (file + 0.25 if file > 4 else 4 + 8 / TYPES[type_name].group + 1.2)


@every_type
def test_rows(type_name: str) -> None:
    n, k = 70, 512
    weight = from_gguf(gguf_rows(type_name, n, k, seeded("rows")), type_name, (n, k))
    index = torch.tensor([[0, 69, 31], [32, 33, 0]])
    assert_same_bits(weight.rows(index), weight.dequantize()[index])


@every_type
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_linear(type_name: str, activation: str) -> None:
    n, k, g = 70, 768, seeded(type_name)
    raw = gguf_rows(type_name, n, k, g)
    weight, x = from_gguf(raw, type_name, (n, k)), torch.randn(9, k, generator=g)
    for m in (1, 9):
        out = quantized_linear(x[:m], weight, activation=activation)
        assert_ran_natively("quantized_linear")
        ref = quantized_linear_reference(x[:m], weight, activation=activation)
        rounded = x[:m].bfloat16() if activation == "bf16" else x[:m]
        if activation.startswith("int8"):
            rounded = quantise_activations(x[:m], activation)
        assert_close(out, ref, rounded.float() @ gguf_values(raw, type_name).t(), torch.float32)


@every_type
def test_each_weight_is_found(type_name: str) -> None:
    """x = 127 * identity reads the weight back, one column a row: none is dropped, doubled or in another's place."""
    n, k = 33, 512
    weight = from_gguf(gguf_rows(type_name, n, k, seeded("needle")), type_name, (n, k))
    expected = weight.dequantize().t() * 127
    for activation in ("int8", "bf16", "fp32"):
        out = quantized_linear(torch.eye(k) * 127, weight, activation=activation)
        assert_close(out, expected.double(), expected, torch.float32)


@every_type
def test_strided_and_misaligned_bytes(type_name: str) -> None:
    raw = gguf_rows(type_name, 40, 512, seeded("strided"))
    expected = from_gguf(raw, type_name, (40, 512)).packed
    wide = torch.cat([raw[:, :1], raw, raw], 1)
    assert_same_bits(from_gguf(wide[:, 1 : 1 + raw.shape[1]], type_name, (40, 512)).packed, expected)
    flat = torch.cat([raw.view(-1)[:1], raw.view(-1)])[1:].view(raw.shape)
    assert_same_bits(from_gguf(flat, type_name, (40, 512)).packed, expected)


@every_type
def test_wrong_sizes(type_name: str) -> None:
    columns, size = gguf_blocks(type_name)
    raw = torch.zeros(2, size, dtype=torch.uint8)
    for bad, shape, message in (
        (raw, (2, columns + 1), f"blocks of {columns} columns"),
        (raw, (2, columns // 2), f"blocks of {columns} columns"),
        (raw, (3, columns), rf"\(3, {size}\), got \(2, {size}\)"),
        (raw, (2, 2 * columns), rf"\(2, {2 * size}\), got \(2, {size}\)"),
        (raw[:, 1:], (2, columns), rf"got \(2, {size - 1}\)"),
        (raw[0], (2, columns), "rows, bytes"),
        (raw.float(), (2, columns), "uint8"),
        (raw, (-2, columns), "shape"),
        (raw, (2, -columns), "shape"),
        (raw, (1, 2, columns), "shape"),
        (raw, (2**39, 1 << 30), rf"got \(2, {size}\)"),  # said before terabytes are asked for
    ):
        with pytest.raises(ValueError, match=message):
            from_gguf(bad, type_name, shape)


@pytest.mark.parametrize("type_name", ["Q9_9", "", "q4_0", "Q8_1", "TQ1_0", "NVFP4", "I8"])
def test_unsupported_types_name_the_supported(type_name: str) -> None:
    with pytest.raises(NotImplementedError, match=f"type '{type_name}' .*supported: {', '.join(TYPES)}"):
        from_gguf(torch.zeros(1, 1, dtype=torch.uint8), type_name, (1, 32))


@every_type
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_bytes_of_any_length(type_name: str, data: st.DataObject) -> None:
    """Never a crash: values where the sizes agree, a ValueError where they do not."""
    columns, size = gguf_blocks(type_name)
    n, blocks = data.draw(st.integers(0, 40)), data.draw(st.integers(0, 3))
    k = blocks * columns + data.draw(st.sampled_from([0, 0, 0, 1, 32, -1]))
    nbytes = blocks * size + data.draw(st.sampled_from([0, 0, 0, 1, -1, size]))
    rows = n + data.draw(st.sampled_from([0, 0, 0, 1]))
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    raw = torch.randint(0, 256, (rows, max(nbytes, 0)), generator=g, dtype=torch.uint8)
    if k >= 0 and k % columns == 0 and (rows, raw.shape[1]) == (n, k // columns * size):
        weight = from_gguf(raw, type_name, (n, k))
        assert_same_values(weight, gguf_values(raw, type_name) if raw.numel() else torch.empty(n, k))
        quantized_linear(torch.ones(1, k), weight)
    else:
        with pytest.raises(ValueError, match="from_gguf"):
            from_gguf(raw, type_name, (n, k))
