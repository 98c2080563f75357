"""cvt of the PTX interpreter, from every type to every type, against exact rational arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from ptx.reference import (
    FORMATS,
    SIZES,
    Value,
    check,
    combinations,
    decode,
    encode,
    evaluate,
    finite,
    flush,
    special_bits,
    to_python,
)

HALVES = ("f16", "bf16")
INTEGERS = ("u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64")
ROUNDINGS = {
    "i": {"rni": "rn", "rzi": "rz", "rmi": "rm", "rpi": "rp"},
    "f": {"rn": "rn", "rz": "rz", "rm": "rm", "rp": "rp"},
}


def clamp(value: int, t: str) -> int:
    bits = 8 * SIZES[t]
    low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if t.startswith("s") else (0, (1 << bits) - 1)
    return max(low, min(high, value))


def masked(value: int, t: str) -> int:
    """In a register of at least 16 bits, extended with the sign."""
    return value & ((1 << max(16, 8 * SIZES[t])) - 1)


def to_integral(value: Value, mode: str) -> int:
    if mode == "rz":
        return math.trunc(value)
    if mode == "rm":
        return math.floor(value)
    if mode == "rp":
        return math.ceil(value)
    return round(Fraction(value))  # Python rounds halves to even


@pytest.mark.parametrize("from_", INTEGERS)
@pytest.mark.parametrize("to", INTEGERS)
def test_integer_conversions(to: str, from_: str) -> None:
    r, source = (t if SIZES[t] > 1 else "b16" for t in (to, from_))
    operands = [(bits,) for bits in special_bits(from_)]

    def plain(bits: int) -> int:
        kept = to_python(bits & ((1 << 8 * SIZES[from_]) - 1), from_)
        return masked(to_python(kept & ((1 << 8 * SIZES[to]) - 1), to), to)

    check(f"cvt.{to}.{from_} %d, %a;", r, [source], plain, operands=operands)
    check(
        f"cvt.sat.{to}.{from_} %d, %a;",
        r,
        [source],
        lambda bits: masked(clamp(to_python(bits, from_), to), to),
        operands=operands,
    )


@pytest.mark.parametrize("from_", ["f16", "bf16", "f32", "f64"])
@pytest.mark.parametrize("to", INTEGERS)
def test_float_to_integer(to: str, from_: str) -> None:
    r = to if SIZES[to] > 1 else "b16"
    for name, mode in ROUNDINGS["i"].items():

        def expected(bits: int, mode: str = mode) -> int:
            value = decode(bits, from_)
            if value != value:
                return 0
            if not finite(value):
                return masked(clamp(10**30 if value > 0 else -(10**30), to), to)
            return masked(clamp(to_integral(value, mode), to), to)

        check(f"cvt.{name}.{to}.{from_} %d, %a;", r, [from_], expected)


@pytest.mark.parametrize("to", ["f16", "bf16", "f32", "f64"])
@pytest.mark.parametrize("from_", INTEGERS)
def test_integer_to_float(to: str, from_: str) -> None:
    source = from_ if SIZES[from_] > 1 else "b16"
    operands = [(bits,) for bits in special_bits(from_, 40)]
    for mode in ROUNDINGS["f"]:

        def expected(bits: int, mode: str = mode) -> int:
            value = to_python(bits, from_)
            return encode(Fraction(value) if value else 0.0, to, mode)

        check(f"cvt.{mode}.{to}.{from_} %d, %a;", to, [source], expected, operands=operands)


@pytest.mark.parametrize("from_", ["f16", "bf16", "f32", "f64"])
@pytest.mark.parametrize("to", ["f16", "bf16", "f32", "f64"])
def test_float_to_float(to: str, from_: str) -> None:
    operands = [(bits,) for bits in special_bits(from_, 60)]
    if to == from_:
        for name, mode in ROUNDINGS["i"].items():

            def integral(bits: int, mode: str = mode) -> int:
                value = decode(bits, to)
                if not finite(value) or value == 0:
                    return encode(value, to)
                out = to_integral(value, mode)
                return encode(Fraction(out) if out else math.copysign(0.0, value), to)

            check(f"cvt.{name}.{to}.{to} %d, %a;", to, [to], integral, operands=operands)
        return
    widens = FORMATS[to].precision >= FORMATS[from_].precision and FORMATS[to].high >= FORMATS[from_].high
    for mode in [""] if widens else ["rn", "rz", "rm", "rp"]:
        check(
            f"cvt.{mode}{'.' * bool(mode)}{to}.{from_} %d, %a;",
            to,
            [from_],
            lambda bits, mode=mode: encode(decode(bits, from_), to, mode or "rn"),
            operands=operands,
        )


def test_special_conversions() -> None:
    operands = [(bits,) for bits in special_bits("f32", 100)]

    def tf32(bits: int) -> int:
        return encode(decode(bits, "f32"), "tf32", "rna") << 13

    found = evaluate("cvt.rna.tf32.f32 %d, %a;", "b32", ["f32"], operands)
    for (bits,), value in zip(operands, found, strict=True):
        nan = decode(bits, "f32") != decode(bits, "f32")
        assert (decode(value, "f32") != decode(value, "f32")) if nan else value == tf32(bits), hex(bits)

    def saturated(bits: int) -> int:
        value = decode(bits, "f32")
        return 0 if value != value or value <= 0 else 0x3F800000 if value >= 1 else bits

    check("cvt.sat.f32.f32 %d, %a;", "f32", ["f32"], saturated, operands=operands)
    check("cvt.ftz.f32.f32 %d, %a;", "f32", ["f32"], lambda bits: flush(bits, "f32"), operands=operands)
    for t in HALVES:

        def relu(bits: int, t: str = t) -> int:
            out = encode(decode(bits, "f32"), t)
            return 0 if out >> 15 else out

        check(f"cvt.rn.relu.{t}.f32 %d, %a;", t, ["f32"], relu, operands=operands)
        check(
            f"cvt.rn.{t}x2.f32 %d, %a, %b;",
            "b32",
            ["f32"] * 2,
            lambda a, b, t=t: encode(decode(a, "f32"), t) << 16 | encode(decode(b, "f32"), t),
            operands=combinations(["f32"] * 2, 900),
        )
        check(
            f"cvt.rz.{t}x2.f32 %d, %a, %b;",
            "b32",
            ["f32"] * 2,
            lambda a, b, t=t: encode(decode(a, "f32"), t, "rz") << 16 | encode(decode(b, "f32"), t, "rz"),
            operands=combinations(["f32"] * 2, 900),
        )


def test_packing_with_saturation() -> None:
    types = ["s32", "s32", "b32"]
    for t in ("s8", "u8"):
        check(
            f"cvt.pack.sat.{t}.s32.b32 %d, %a, %b, %c;",
            "b32",
            types,
            lambda a, b, c, t=t: (
                (c & 0xFFFF) << 16 | (clamp(to_python(a, "s32"), t) & 0xFF) << 8 | clamp(to_python(b, "s32"), t) & 0xFF
            ),
            operands=combinations(types, 900),
        )
