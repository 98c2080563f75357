"""Float instructions of the PTX interpreter against exact rational arithmetic, rounded once."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from ptx.reference import (
    FORMATS,
    Value,
    check,
    combinations,
    decode,
    encode,
    evaluate,
    finite,
    flush,
    special_bits,
)

FLOATS = ("f32", "f64")
HALVES = ("f16", "bf16")
SOME = 900


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


def test_torch_agrees() -> None:
    """The reference itself, against torch's conversions and sums."""
    bits = torch.tensor(special_bits("f32", 500)).to(torch.uint32)
    for t, dtype in (("f16", torch.float16), ("bf16", torch.bfloat16)):
        theirs = bits.view(torch.float32).to(dtype)
        ours = torch.tensor([encode(decode(int(b), "f32"), t) for b in bits.tolist()]).to(torch.uint16).view(dtype)
        assert torch.equal(theirs.isnan(), ours.isnan())
        assert torch.equal(theirs.nan_to_num(7), ours.nan_to_num(7))
