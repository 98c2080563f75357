"""Float instructions of the PTX interpreter against exact rational arithmetic, rounded once."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from ptx.reference import FORMATS, SIZES, check, combinations, decode, encode, evaluate, finite, special_bits, to_python

Value = Fraction | float
FLOATS = ("f32", "f64")
HALVES = ("f16", "bf16")
SOME = 900


def flush(bits: int, t: str) -> int:
    f = FORMATS[t]
    magnitude = bits & ((1 << (f.bits - 1)) - 1)
    return bits if magnitude >> (f.precision - 1) else bits & 1 << (f.bits - 1)


def add(a: Value, b: Value) -> Value:
    if not finite(a, b):
        return float(a if not finite(a) else 0) + float(b if not finite(b) else 0)
    if a == 0 and b == 0:
        return float(a) + float(b)  # the sign of zero
    return Fraction(a) + Fraction(b) or 0.0


def multiply(a: Value, b: Value) -> Value:
    if finite(a, b) and a != 0 and b != 0:
        return Fraction(a) * Fraction(b)
    return sign_and_kind(a) * sign_and_kind(b)


def sign_and_kind(x: Value) -> float:
    """A float of the same sign, zero, finite, infinite or NaN."""
    if isinstance(x, float) and (not math.isfinite(x) or x == 0):
        return x
    return math.copysign(1.0, x)


def divide(a: Value, b: Value) -> Value:
    if finite(a, b) and a != 0 and b != 0:
        return Fraction(a) / Fraction(b)
    x, y = sign_and_kind(a), sign_and_kind(b)
    if y == 0:
        return math.nan if x == 0 or x != x else math.copysign(math.inf, x) * math.copysign(1, y)
    return x / y


def fma(a: Value, b: Value, c: Value) -> Value:
    return add(multiply(a, b), c)


def rounded_down_zero(value: Value, operands: list[Value], mode: str) -> Value:
    """An exact zero from operands that cancel is -0 when rounding down."""
    if mode == "rm" and value == 0 and math.copysign(1, value) > 0:
        zeros = all(x == 0 and math.copysign(1, x) > 0 for x in operands)
        return value if zeros else -0.0
    return value


def operation(t: str, exact: Callable[..., Value], mode: str = "rn", ftz: bool = False, sat: bool = False):
    def expected(*bits: int) -> int:
        if ftz:
            bits = tuple(flush(b, t) for b in bits)
        values = [decode(b, t) for b in bits]
        value = exact(*values)
        if exact in (add, fma) and value == 0:
            terms = values if exact is add else [multiply(*values[:2]), values[2]]
            value = rounded_down_zero(float(value), terms, mode)
        out = encode(value, t, mode)
        if ftz:
            out = flush(out, t)
        if sat:
            v = decode(out, t)
            out = 0 if v != v or v <= 0 else encode(1.0, t) if v >= 1 else out
        return out

    return expected


@pytest.mark.parametrize("t", FLOATS)
@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
def test_arithmetic(t: str, mode: str) -> None:
    two, three = combinations([t] * 2, SOME), combinations([t] * 3, SOME)
    check(f"add.{mode}.{t} %d, %a, %b;", t, [t] * 2, operation(t, add, mode), operands=two)
    check(
        f"sub.{mode}.{t} %d, %a, %b;",
        t,
        [t] * 2,
        lambda a, b: operation(t, add, mode)(a, b ^ 1 << FORMATS[t].bits - 1 if decode(b, t) == decode(b, t) else b),
        operands=two,
    )
    check(f"mul.{mode}.{t} %d, %a, %b;", t, [t] * 2, operation(t, multiply, mode), operands=two)
    check(f"div.{mode}.{t} %d, %a, %b;", t, [t] * 2, operation(t, divide, mode), operands=two)
    check(f"fma.{mode}.{t} %d, %a, %b, %c;", t, [t] * 3, operation(t, fma, mode), operands=three)
    check(f"rcp.{mode}.{t} %d, %a;", t, [t], operation(t, lambda a: divide(1.0, a), mode))


@pytest.mark.parametrize("t", FLOATS)
def test_no_rounding_means_nearest(t: str) -> None:
    check(f"add.{t} %d, %a, %b;", t, [t] * 2, operation(t, add), operands=combinations([t] * 2, SOME))
    check(f"mul.{t} %d, %a, %b;", t, [t] * 2, operation(t, multiply), operands=combinations([t] * 2, SOME))


@pytest.mark.parametrize(("ftz", "sat"), [(True, False), (False, True), (True, True)])
def test_flush_and_saturate(ftz: bool, sat: bool) -> None:
    t, suffix = "f32", ".ftz" * ftz + ".sat" * sat
    two, three = combinations([t] * 2, SOME), combinations([t] * 3, SOME)
    for mode in ("rn", "rz"):
        check(f"add.{mode}{suffix}.f32 %d, %a, %b;", t, [t] * 2, operation(t, add, mode, ftz, sat), operands=two)
        check(f"mul.{mode}{suffix}.f32 %d, %a, %b;", t, [t] * 2, operation(t, multiply, mode, ftz, sat), operands=two)
        check(f"fma.{mode}{suffix}.f32 %d, %a, %b, %c;", t, [t] * 3, operation(t, fma, mode, ftz, sat), operands=three)


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
@pytest.mark.parametrize("t", FLOATS)
def test_sqrt(t: str, mode: str) -> None:
    def root(bits: int) -> int:
        value = decode(bits, t)
        if not isinstance(value, Fraction):
            return encode(math.sqrt(value) if value >= 0 else math.nan, t)
        if value < 0:
            return encode(math.nan, t)
        # Far more digits than the format has, the last one odd unless the root is exact.
        scaled = value * 4**1300
        whole = math.isqrt(scaled.numerator // scaled.denominator)
        inexact = whole * whole != scaled
        return encode(Fraction(2 * whole + inexact, 2 * 2**1300), t, mode)

    check(f"sqrt.{mode}.{t} %d, %a;", t, [t], root)


def extreme(t: str, is_max: bool, nan: bool, xorsign: bool = False, ftz: bool = False) -> Callable[[int, int], int]:
    sign = 1 << (FORMATS[t].bits - 1)

    def expected(a: int, b: int) -> int:
        if ftz:
            a, b = flush(a, t), flush(b, t)
        out_sign = (a ^ b) & sign
        if xorsign:
            a, b = a & ~sign, b & ~sign
        x, y = decode(a, t), decode(b, t)
        if x != x or y != y:
            if nan or (x != x and y != y):
                return encode(math.nan, t)
            out = b if x != x else a
        elif x == y:
            out = a & b if is_max else a | b  # -0 is below +0
        else:
            out = (a if x > y else b) if is_max else (a if x < y else b)
        return out | out_sign if xorsign else out

    return expected


@pytest.mark.parametrize("t", ["f32", "f64", "f16", "bf16"])
@pytest.mark.parametrize("name", ["min", "max"])
def test_extremes(name: str, t: str) -> None:
    is_max = name == "max"
    check(f"{name}.{t} %d, %a, %b;", t, [t] * 2, extreme(t, is_max, False))
    if t != "f64":
        check(f"{name}.NaN.{t} %d, %a, %b;", t, [t] * 2, extreme(t, is_max, True))
        check(f"{name}.xorsign.abs.{t} %d, %a, %b;", t, [t] * 2, extreme(t, is_max, False, xorsign=True))
    if t == "f32":
        check(f"{name}.ftz.{t} %d, %a, %b;", t, [t] * 2, extreme(t, is_max, False, ftz=True))


@pytest.mark.parametrize("t", ["f32", "f64", "f16", "bf16"])
def test_signs(t: str) -> None:
    sign = 1 << (FORMATS[t].bits - 1)
    check(f"abs.{t} %d, %a;", t, [t], lambda a: a & ~sign)
    check(f"neg.{t} %d, %a;", t, [t], lambda a: a ^ sign)
    if t in FLOATS:
        check(
            f"copysign.{t} %d, %a, %b;",
            t,
            [t] * 2,
            lambda a, b: (a & sign) | (b & ~sign),
            operands=combinations([t] * 2, SOME),
        )


@pytest.mark.parametrize("t", FLOATS)
def test_testp(t: str) -> None:
    def subnormal(v: Value) -> bool:
        return finite(v) and v != 0 and abs(v) < Fraction(2) ** FORMATS[t].low

    for name, is_ in {
        "finite": finite,
        "infinite": lambda v: isinstance(v, float) and math.isinf(v),
        "number": lambda v: v == v,
        "notanumber": lambda v: v != v,
        "normal": lambda v: finite(v) and v != 0 and not subnormal(v),
        "subnormal": subnormal,
    }.items():
        check(f"testp.{name}.{t} %d, %a;", "pred", [t], lambda a, is_=is_: int(is_(decode(a, t))))


def in_pairs(one: Callable[..., int]) -> Callable[..., int]:
    def expected(*bits: int) -> int:
        return one(*(b & 0xFFFF for b in bits)) | one(*(b >> 16 for b in bits)) << 16

    return expected


def pair_operands(t: str, count: int) -> list[tuple[int, ...]]:
    """Random halves of special values."""
    halves = [combinations([t] * count, 700), combinations([t] * count, 700)[::-1]]
    return [tuple(a | b << 16 for a, b in zip(*both, strict=True)) for both in zip(*halves, strict=True)]


@pytest.mark.parametrize("t", HALVES)
def test_halves(t: str) -> None:
    for name, exact, n in (("add", add, 2), ("mul", multiply, 2), ("fma.rn", fma, 3)):
        operands = ", ".join(["%a", "%b", "%c"][:n])
        body = f"{name}.{t} %d, {operands};"
        check(body, t, [t] * n, operation(t, exact), operands=combinations([t] * n, SOME))
        pair = f"{name}.{t}x2 %d, {operands};"
        found = evaluate(pair, "b32", ["b32"] * n, pair_operands(t, n))
        for bits, value in zip(pair_operands(t, n), found, strict=True):
            assert value == in_pairs(operation(t, exact))(*bits), (pair, [hex(b) for b in bits])
    if t == "f16":
        for suffix, ftz, sat in ((".ftz", True, False), (".sat", False, True)):
            check(
                f"add{suffix}.f16 %d, %a, %b;",
                t,
                [t] * 2,
                operation(t, add, "rn", ftz, sat),
                operands=combinations([t] * 2, SOME),
            )


@pytest.mark.parametrize("t", HALVES)
def test_half_relu(t: str) -> None:
    def expected(a: int, b: int, c: int) -> int:
        out = operation(t, fma)(a, b, c)
        return 0 if decode(out, t) <= 0 or (out >> 15 and decode(out, t) == decode(out, t)) else out

    check(f"fma.rn.relu.{t} %d, %a, %b, %c;", t, [t] * 3, expected, operands=combinations([t] * 3, SOME))


# .approx: the result, rounded once, stands for the hardware's; the bound is what the test allows of the double it
# compares with.
APPROXIMATE = {
    "rcp": lambda x: math.inf * math.copysign(1, x) if x == 0 else 1 / x,
    "rsqrt": lambda x: math.inf * math.copysign(1, x) if x == 0 else math.nan if x < 0 else 1 / math.sqrt(x),
    "sqrt": lambda x: math.nan if x < 0 else math.sqrt(x),
    "ex2": lambda x: float(np.exp2(np.float64(x))),
    "lg2": lambda x: -math.inf if x == 0 else math.nan if x < 0 else math.log2(x) if x < math.inf else math.inf,
    "sin": lambda x: math.sin(x) if abs(x) < math.inf else math.nan,
    "cos": lambda x: math.cos(x) if abs(x) < math.inf else math.nan,
    "tanh": math.tanh,
}


@pytest.mark.parametrize("name", APPROXIMATE)
@pytest.mark.parametrize("ftz", [False, True])
def test_approximations(name: str, ftz: bool) -> None:
    if name == "tanh" and ftz:
        return  # there is none
    operands = [(b,) for b in special_bits("f32", 200)]
    found = evaluate(f"{name}.approx{'.ftz' * ftz}.f32 %d, %a;", "f32", ["f32"], operands)
    with np.errstate(all="ignore"):
        for (bits,), value in zip(operands, found, strict=True):
            x = float(decode(flush(bits, "f32") if ftz else bits, "f32"))
            wanted = x if x != x else APPROXIMATE[name](x)
            wanted = decode(encode(wanted, "f32"), "f32") if wanted == wanted else wanted
            wanted_bits = encode(wanted, "f32")
            if ftz:
                wanted_bits = flush(wanted_bits, "f32")
            both_nan = wanted != wanted and decode(value, "f32") != decode(value, "f32")
            assert both_nan or abs(wanted_bits - value) <= 1, (name, x, hex(value), hex(wanted_bits))


def test_approximate_division() -> None:
    operands = combinations(["f32"] * 2, SOME)
    for kind in ("approx", "full"):
        found = evaluate(f"div.{kind}.f32 %d, %a, %b;", "f32", ["f32"] * 2, operands)
        for (a, b), value in zip(operands, found, strict=True):
            divisor = decode(b, "f32")
            if kind == "approx" and finite(divisor) and abs(divisor) > 2**126:
                x = decode(a, "f32")
                assert decode(value, "f32") == 0 if finite(x) else decode(value, "f32") != decode(value, "f32")
                continue
            wanted = operation("f32", divide)(a, b)
            assert value == wanted or decode(wanted, "f32") != decode(wanted, "f32"), (kind, hex(a), hex(b))


@pytest.mark.parametrize("t", HALVES)
@pytest.mark.parametrize("name", ["ex2", "tanh"])
def test_half_functions(name: str, t: str) -> None:
    ftz = ".ftz" if t == "bf16" and name == "ex2" else ""

    def expected(bits: int) -> int:
        x = float(decode(bits, t))
        out = encode(x if x != x else APPROXIMATE[name](x), t)
        return flush(out, t) if ftz else out

    with np.errstate(over="ignore"):
        check(f"{name}.approx{ftz}.{t} %d, %a;", t, [t], expected)


ORDERED = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}


@pytest.mark.parametrize("t", ["f32", "f64", "f16", "bf16"])
def test_comparisons(t: str) -> None:
    operands = combinations([t] * 2, 1200)
    for name, op in ORDERED.items():
        compare = eval(f"lambda a, b: a {op} b")
        for suffix, of_nan in (("", 0), ("u", 1)):

            def expected(a: int, b: int, compare=compare, of_nan=of_nan) -> int:
                x, y = decode(a, t), decode(b, t)
                return of_nan if x != x or y != y else int(compare(x, y))

            check(f"setp.{name}{suffix}.{t} %d, %a, %b;", "pred", [t] * 2, expected, operands=operands)
    nan = lambda a, b: decode(a, t) != decode(a, t) or decode(b, t) != decode(b, t)  # noqa: E731
    check(f"setp.nan.{t} %d, %a, %b;", "pred", [t] * 2, lambda a, b: int(nan(a, b)), operands=operands)
    check(f"setp.num.{t} %d, %a, %b;", "pred", [t] * 2, lambda a, b: int(not nan(a, b)), operands=operands)


def test_set_and_flushed_comparison() -> None:
    operands = combinations(["f32"] * 2, 1200)

    def less(a: int, b: int) -> bool:
        x, y = decode(flush(a, "f32"), "f32"), decode(flush(b, "f32"), "f32")
        return x < y

    check("setp.lt.ftz.f32 %d, %a, %b;", "pred", ["f32"] * 2, lambda a, b: int(less(a, b)), operands=operands)
    check("set.lt.ftz.f32.f32 %d, %a, %b;", "f32", ["f32"] * 2, lambda a, b: 0x3F800000 * less(a, b), operands=operands)
    check("set.lt.ftz.s32.f32 %d, %a, %b;", "s32", ["f32"] * 2, lambda a, b: 0xFFFFFFFF * less(a, b), operands=operands)
    for t, one in (("f16", 0x3C00), ("bf16", 0x3F80)):
        halves = combinations([t] * 2, 400)
        equal = lambda a, b, t=t: decode(a, t) == decode(b, t)  # noqa: E731
        check(
            f"set.eq.{t}.{t} %d, %a, %b;",
            t,
            [t] * 2,
            lambda a, b, one=one, equal=equal: one * equal(a, b),
            operands=halves,
        )
        operands = pair_operands(t, 2)
        check(
            f"set.eq.{t}x2.{t}x2 %d, %a, %b;",
            "b32",
            ["b32"] * 2,
            in_pairs(lambda a, b, one=one, equal=equal: one * equal(a, b)),
            operands=operands,
        )
        check(
            f"setp.eq.{t}x2 %q|%d, %a, %b;",
            "pred",
            ["b32"] * 2,
            lambda a, b, equal=equal: int(equal(a >> 16, b >> 16)),
            operands=operands,
        )


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


def test_torch_agrees() -> None:
    """The reference itself, against torch's conversions and sums."""
    bits = torch.tensor(special_bits("f32", 500)).to(torch.uint32)
    for t, dtype in (("f16", torch.float16), ("bf16", torch.bfloat16)):
        theirs = bits.view(torch.float32).to(dtype)
        ours = torch.tensor([encode(decode(int(b), "f32"), t) for b in bits.tolist()]).to(torch.uint16).view(dtype)
        assert torch.equal(theirs.isnan(), ours.isnan())
        assert torch.equal(theirs.nan_to_num(7), ours.nan_to_num(7))
