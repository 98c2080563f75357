"""Integer and bit instructions of the PTX interpreter against their definitions on Python's integers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from ptx.reference import SIZES, check, combinations, evaluate, special_bits, to_python

INTEGERS = ("u16", "u32", "u64", "s16", "s32", "s64")
Definition = Callable[..., int]


def on_values(type_: str, definition: Definition, size: int | None = None) -> Definition:
    """The definition applied to values of the type; its result wrapped to a size."""
    mask = (1 << 8 * (size or SIZES[type_])) - 1
    return lambda *bits: int(definition(*(to_python(b, type_) for b in bits))) & mask


def truncated_quotient(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


@pytest.mark.parametrize("t", INTEGERS)
@pytest.mark.parametrize(
    ("name", "definition"),
    [
        ("add", lambda a, b: a + b),
        ("sub", lambda a, b: a - b),
        ("mul.lo", lambda a, b: a * b),
        ("min", min),
        ("max", max),
    ],
)
def test_two_operands(name: str, definition: Definition, t: str) -> None:
    check(f"{name}.{t} %d, %a, %b;", t, [t, t], on_values(t, definition))


@pytest.mark.parametrize("t", INTEGERS)
def test_mul_hi(t: str) -> None:
    check(f"mul.hi.{t} %d, %a, %b;", t, [t, t], on_values(t, lambda a, b: a * b >> 8 * SIZES[t]))


@pytest.mark.parametrize("t", INTEGERS)
def test_division(t: str) -> None:
    operands = [o for o in combinations([t, t]) if o[1]]
    check(f"div.{t} %d, %a, %b;", t, [t, t], on_values(t, truncated_quotient), operands=operands)
    check(
        f"rem.{t} %d, %a, %b;",
        t,
        [t, t],
        on_values(t, lambda a, b: a - b * truncated_quotient(a, b)),
        operands=operands,
    )


@pytest.mark.parametrize("t", INTEGERS)
def test_mad_and_sad(t: str) -> None:
    check(f"mad.lo.{t} %d, %a, %b, %c;", t, [t] * 3, on_values(t, lambda a, b, c: a * b + c))
    check(f"mad.hi.{t} %d, %a, %b, %c;", t, [t] * 3, on_values(t, lambda a, b, c: (a * b >> 8 * SIZES[t]) + c))
    check(f"sad.{t} %d, %a, %b, %c;", t, [t] * 3, on_values(t, lambda a, b, c: c + abs(a - b)))


@pytest.mark.parametrize(("t", "wide"), [("u16", "u32"), ("s16", "s32"), ("u32", "u64"), ("s32", "s64")])
def test_wide(t: str, wide: str) -> None:
    check(f"mul.wide.{t} %d, %a, %b;", wide, [t, t], on_values(t, lambda a, b: a * b, SIZES[wide]))
    mask = (1 << 8 * SIZES[wide]) - 1
    check(
        f"mad.wide.{t} %d, %a, %b, %c;",
        wide,
        [t, t, wide],
        lambda a, b, c: to_python(a, t) * to_python(b, t) + c & mask,
    )


@pytest.mark.parametrize("t", ["u32", "s32"])
def test_24_bits(t: str) -> None:
    def low(x: int) -> int:
        x &= 0xFFFFFF
        return x - (1 << 24) if t == "s32" and x >> 23 else x

    check(f"mul24.lo.{t} %d, %a, %b;", t, [t, t], lambda a, b: low(a) * low(b) & 0xFFFFFFFF)
    check(f"mul24.hi.{t} %d, %a, %b;", t, [t, t], lambda a, b: low(a) * low(b) >> 16 & 0xFFFFFFFF)
    check(f"mad24.lo.{t} %d, %a, %b, %c;", t, [t] * 3, lambda a, b, c: low(a) * low(b) + c & 0xFFFFFFFF)


@pytest.mark.parametrize("t", ["s16", "s32", "s64"])
def test_signs(t: str) -> None:
    check(f"abs.{t} %d, %a;", t, [t], on_values(t, abs))
    check(f"neg.{t} %d, %a;", t, [t], on_values(t, lambda a: -a))


def test_saturation() -> None:
    def clamp(x: int) -> int:
        return max(-(1 << 31), min((1 << 31) - 1, x)) & 0xFFFFFFFF

    check("add.sat.s32 %d, %a, %b;", "s32", ["s32"] * 2, lambda a, b: clamp(to_python(a, "s32") + to_python(b, "s32")))
    check("sub.sat.s32 %d, %a, %b;", "s32", ["s32"] * 2, lambda a, b: clamp(to_python(a, "s32") - to_python(b, "s32")))


@pytest.mark.parametrize("t", ["u32", "s32", "u64", "s64"])
def test_carry(t: str) -> None:
    """A sum, a difference and a product of twice the size, by halves."""
    n = 8 * SIZES[t]
    mask = (1 << 2 * n) - 1
    low = f"b{n}"
    pick = {"add": "add.cc.{t} %x, %a, %b; addc.{t} %y, %c, %e;", "sub": "sub.cc.{t} %x, %a, %b; subc.{t} %y, %c, %e;"}
    for name, sign in (("add", 1), ("sub", -1)):
        for half in (0, 1):
            body = f"{{ .reg .{low} %x, %y; {pick[name].format(t=t)} mov.{low} %d, {'%y' if half else '%x'}; }}"
            check(
                body,
                t,
                [t] * 4,
                lambda a, b, c, e, sign=sign, half=half: (
                    ((c << n | a) + sign * (e << n | b) & mask) >> n * half & ((1 << n) - 1)
                ),
                operands=combinations([t] * 4, 800),
            )
    u = t.replace("s", "u")
    body = f"""{{ .reg .{low} %x, %y; mad.lo.cc.{u} %x, %a, %b, %c; madc.hi.{u} %y, %a, %b, %e; mov.{low} %d, %y; }}"""
    check(
        body,
        u,
        [u] * 4,
        lambda a, b, c, e: (a * b + (e << n | c)) >> n & ((1 << n) - 1),
        operands=combinations([u] * 4, 800),
    )


@pytest.mark.parametrize("t", ["b16", "b32", "b64"])
def test_logic(t: str) -> None:
    mask = (1 << 8 * SIZES[t]) - 1
    check(f"and.{t} %d, %a, %b;", t, [t, t], lambda a, b: a & b)
    check(f"or.{t} %d, %a, %b;", t, [t, t], lambda a, b: a | b)
    check(f"xor.{t} %d, %a, %b;", t, [t, t], lambda a, b: a ^ b)
    check(f"not.{t} %d, %a;", t, [t], lambda a: ~a & mask)
    check(f"cnot.{t} %d, %a;", t, [t], lambda a: int(a == 0))


@pytest.mark.parametrize(
    ("name", "value"), [("and", lambda a, b: a & b), ("or", lambda a, b: a | b), ("xor", lambda a, b: a ^ b)]
)
def test_predicates(name: str, value: Definition) -> None:
    operands = [(a, b) for a in (0, 1) for b in (0, 1)]
    check(f"{name}.pred %d, %a, %b;", "pred", ["pred"] * 2, value, operands=operands)
    check("not.pred %d, %a;", "pred", ["pred"], lambda a: 1 - a, operands=[(0,), (1,)])


@pytest.mark.parametrize("table", [0x00, 0x01, 0x80, 0x96, 0xE8, 0xCA, 0x3A, 0xFE, 0xFF, 0x55])
def test_lop3(table: int) -> None:
    def bitwise(a: int, b: int, c: int) -> int:
        return sum((table >> ((a >> k & 1) << 2 | (b >> k & 1) << 1 | (c >> k & 1)) & 1) << k for k in range(32))

    check(f"lop3.b32 %d, %a, %b, %c, {table};", "b32", ["b32"] * 3, bitwise, operands=combinations(["b32"] * 3, 200))


@pytest.mark.parametrize("t", ["b16", "b32", "b64", "u16", "u32", "u64", "s16", "s32", "s64"])
def test_shifts(t: str) -> None:
    bits = 8 * SIZES[t]
    if t.startswith("b"):
        check(f"shl.{t} %d, %a, %b;", t, [t, "u32"], lambda a, n: 0 if n >= bits else a << n & ((1 << bits) - 1))
    check(f"shr.{t} %d, %a, %b;", t, [t, "u32"], lambda a, n: to_python(a, t) >> min(n, bits) & ((1 << bits) - 1))


def test_funnel_shifts() -> None:
    types = ["b32", "b32", "u32"]
    both = lambda a, b: b << 32 | a  # noqa: E731
    check("shf.l.wrap.b32 %d, %a, %b, %c;", "b32", types, lambda a, b, n: both(a, b) << (n & 31) >> 32 & 0xFFFFFFFF)
    check("shf.l.clamp.b32 %d, %a, %b, %c;", "b32", types, lambda a, b, n: both(a, b) << min(n, 32) >> 32 & 0xFFFFFFFF)
    check("shf.r.wrap.b32 %d, %a, %b, %c;", "b32", types, lambda a, b, n: both(a, b) >> (n & 31) & 0xFFFFFFFF)
    check("shf.r.clamp.b32 %d, %a, %b, %c;", "b32", types, lambda a, b, n: both(a, b) >> min(n, 32) & 0xFFFFFFFF)


def permuted(a: int, b: int, c: int, mode: str) -> int:
    data = [(b << 32 | a) >> 8 * k & 0xFF for k in range(8)]
    s = c & 3
    chosen = {
        "": [c >> 4 * k & 7 for k in range(4)],
        ".f4e": [s + k for k in range(4)],
        ".b4e": [(s - k) % 8 for k in range(4)],
        ".rc8": [s] * 4,
        ".ecl": [max(k, s) for k in range(4)],
        ".ecr": [min(k, s) for k in range(4)],
        ".rc16": [(s & 1) * 2 + k % 2 for k in range(4)],
    }[mode]
    out = [data[k] for k in chosen]
    if not mode:
        out = [(0xFF if x & 0x80 else 0) if c >> (4 * k + 3) & 1 else x for k, x in enumerate(out)]
    return sum(x << 8 * k for k, x in enumerate(out))


@pytest.mark.parametrize("mode", ["", ".f4e", ".b4e", ".rc8", ".ecl", ".ecr", ".rc16"])
def test_prmt(mode: str) -> None:
    check(
        f"prmt.b32{mode} %d, %a, %b, %c;",
        "b32",
        ["b32"] * 3,
        lambda a, b, c: permuted(a, b, c, mode),
        operands=combinations(["b32"] * 3, 1000),
    )


@pytest.mark.parametrize("t", ["u32", "s32", "u64", "s64"])
def test_bit_fields(t: str) -> None:
    bits = 8 * SIZES[t]

    def extract(a: int, at: int, n: int) -> int:
        at, n = at & 0xFF, n & 0xFF
        sign = a >> min(at + n - 1, bits - 1) & 1 if t.startswith("s") and n else 0
        return sum((a >> (at + k) & 1 if k < n and at + k < bits else sign) << k for k in range(bits))

    operands = combinations([t, "u32", "u32"], 1500)
    check(f"bfe.{t} %d, %a, %b, %c;", t, [t, "u32", "u32"], extract, operands=operands)
    if t.startswith("u"):
        b = t.replace("u", "b")

        def insert(a: int, into: int, at: int, n: int) -> int:
            at, n = at & 0xFF, n & 0xFF
            for k in range(n):
                if at + k < bits:
                    into = into & ~(1 << (at + k)) | (a >> k & 1) << (at + k)
            return into

        operands = combinations([b, b, "u32", "u32"], 1500)
        check(f"bfi.{b} %d, %a, %b, %c, %e;", b, [b, b, "u32", "u32"], insert, operands=operands)


@pytest.mark.parametrize("t", ["b32", "b64"])
def test_counts(t: str) -> None:
    bits = 8 * SIZES[t]
    check(f"popc.{t} %d, %a;", "u32", [t], lambda a: bin(a).count("1"))
    check(f"clz.{t} %d, %a;", "u32", [t], lambda a: bits - a.bit_length())
    check(f"brev.{t} %d, %a;", t, [t], lambda a: int(f"{a:0{bits}b}"[::-1], 2))


@pytest.mark.parametrize("t", ["u32", "s32", "u64", "s64"])
def test_bfind(t: str) -> None:
    def highest(bits: int) -> int:
        value = to_python(bits, t)
        value = ~value if value < 0 else value
        return (value.bit_length() - 1) & 0xFFFFFFFF

    check(f"bfind.{t} %d, %a;", "u32", [t], highest)
    top = 8 * SIZES[t] - 1
    check(
        f"bfind.shiftamt.{t} %d, %a;",
        "u32",
        [t],
        lambda a: 0xFFFFFFFF if highest(a) == 0xFFFFFFFF else top - highest(a),
    )


@pytest.mark.parametrize("a_type", ["u32", "s32"])
@pytest.mark.parametrize("b_type", ["u32", "s32"])
def test_dot_products(a_type: str, b_type: str) -> None:
    def part(x: int, k: int, size: int, type_: str) -> int:
        x = x >> 8 * size * k & ((1 << 8 * size) - 1)
        return x - (1 << 8 * size) if type_ == "s32" and x >> (8 * size - 1) else x

    types, some = ["b32"] * 3, combinations(["b32"] * 3, 1000)
    check(
        f"dp4a.{a_type}.{b_type} %d, %a, %b, %c;",
        "b32",
        types,
        lambda a, b, c: sum(part(a, k, 1, a_type) * part(b, k, 1, b_type) for k in range(4)) + c & 0xFFFFFFFF,
        operands=some,
    )
    for name, first in (("lo", 0), ("hi", 2)):
        check(
            f"dp2a.{name}.{a_type}.{b_type} %d, %a, %b, %c;",
            "b32",
            types,
            lambda a, b, c, first=first: (
                sum(part(a, k, 2, a_type) * part(b, k + first, 1, b_type) for k in range(2)) + c & 0xFFFFFFFF
            ),
            operands=some,
        )


COMPARISONS: dict[str, Definition] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}


@pytest.mark.parametrize("t", INTEGERS)
@pytest.mark.parametrize("op", COMPARISONS)
def test_setp(op: str, t: str) -> None:
    check(f"setp.{op}.{t} %d, %a, %b;", "pred", [t, t], on_values(t, COMPARISONS[op]))
    check(
        f"set.{op}.u32.{t} %d, %a, %b;", "u32", [t, t], lambda a, b: -on_values(t, COMPARISONS[op])(a, b) & 0xFFFFFFFF
    )


@pytest.mark.parametrize(("op", "same"), [("lo", "lt"), ("ls", "le"), ("hi", "gt"), ("hs", "ge")])
def test_unsigned_comparisons(op: str, same: str) -> None:
    check(f"setp.{op}.u32 %d, %a, %b;", "pred", ["u32"] * 2, on_values("u32", COMPARISONS[same]))


@pytest.mark.parametrize(
    ("how", "value"), [("and", lambda r, c: r & c), ("or", lambda r, c: r | c), ("xor", lambda r, c: r ^ c)]
)
def test_setp_combines(how: str, value: Definition) -> None:
    operands = [(a, b, c) for a, b in combinations(["s32"] * 2, 100) for c in (0, 1)]

    def less(a: int, b: int) -> int:
        return int(to_python(a, "s32") < to_python(b, "s32"))

    types = ["s32", "s32", "pred"]
    check(f"setp.lt.{how}.s32 %d, %a, %b, %c;", "pred", types, lambda a, b, c: value(less(a, b), c), operands=operands)
    check(
        f"setp.lt.{how}.s32 %d|%q, %a, %b, !%c;",
        "pred",
        types,
        lambda a, b, c: value(less(a, b), 1 - c),
        operands=operands,
    )
    check(
        f"setp.lt.{how}.s32 %q|%d, %a, %b, %c;",
        "pred",
        types,
        lambda a, b, c: value(1 - less(a, b), c),
        operands=operands,
    )


@pytest.mark.parametrize("t", ["b16", "b32", "b64", "f32", "f64", "s32"])
def test_selection(t: str) -> None:
    operands = [(a, b, c) for a, b in combinations([t, t], 300) for c in (0, 1)]
    check(f"selp.{t} %d, %a, %b, %c;", t, [t, t, "pred"], lambda a, b, c: a if c else b, operands=operands)
    check(
        f"slct.{t}.s32 %d, %a, %b, %c;",
        t,
        [t, t, "s32"],
        lambda a, b, c: b if c >> 31 else a,
        operands=combinations([t, t, "s32"], 600),
    )


def test_pack_and_unpack() -> None:
    check("mov.b32 %d, {%a, %b};", "b32", ["b16"] * 2, lambda a, b: a | b << 16)
    check("mov.b64 %d, {%a, %b};", "b64", ["b32"] * 2, lambda a, b: a | b << 32)
    operands = combinations(["b16"] * 4, 500)
    check(
        "mov.b64 %d, {%a, %b, %c, %e};",
        "b64",
        ["b16"] * 4,
        lambda a, b, c, e: a | b << 16 | c << 32 | e << 48,
        operands=operands,
    )
    check("mov.b32 {%h0, %d}, %a;", "b16", ["b32"], lambda a: a >> 16)
    check("mov.b32 {%d, _}, %a;", "b16", ["b32"], lambda a: a & 0xFFFF)
    check("mov.b64 {%d, %r0}, %a;", "b32", ["b64"], lambda a: a & 0xFFFFFFFF)
    check("mov.b64 {%h0, %h1, %d, %h2}, %a;", "b16", ["b64"], lambda a: a >> 32 & 0xFFFF)


def test_immediates() -> None:
    """Every spelling of a constant."""
    for text, value in (
        ("255", 255),
        ("0xfF", 255),
        ("0377", 255),
        ("0b11U", 3),
        ("-1", 0xFFFFFFFF),
        ("0f3F800000", 0x3F800000),
    ):
        check(f"mov.b32 %d, {text};", "b32", ["b32"], lambda _, value=value: value, operands=[(0,)])
    check("mov.b64 %d, 0d3FF0000000000000;", "b64", ["b32"], lambda _: 0x3FF0000000000000, operands=[(0,)])
    check("mov.f32 %d, 0d3FF8000000000000;", "f32", ["b32"], lambda _: 0x3FC00000, operands=[(0,)])
    check("mov.b16 %d, -2;", "b16", ["b32"], lambda _: 0xFFFE, operands=[(0,)])


def test_a_wrong_definition_is_noticed() -> None:
    with pytest.raises(AssertionError, match=r"sub\.u32"):
        check("sub.u32 %d, %a, %b;", "u32", ["u32"] * 2, lambda a, b: a + b & 0xFFFFFFFF)
    assert evaluate("add.u32 %d, %a, 1;", "u32", ["u32"], [(5,)]) == [6]
    assert len(special_bits("u32")) > 25
