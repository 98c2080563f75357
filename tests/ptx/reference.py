"""What instructions should compute, by plain definitions on Python's exact numbers; and how a test asks for it."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from .machine import Kernel, Module, Report

SIZES = {"pred": 0, "b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "s16": 2, "f16": 2, "bf16": 2}
SIZES |= {"b32": 4, "u32": 4, "s32": 4, "f32": 4, "f16x2": 4, "bf16x2": 4, "tf32": 4}
SIZES |= {"b64": 8, "u64": 8, "s64": 8, "f64": 8}


@dataclass(frozen=True)
class Format:
    """A binary float: bits of the significand with the hidden one, exponents of the normal numbers, bits in all."""

    precision: int
    low: int
    high: int
    bits: int

    @property
    def infinity(self) -> int:
        return (self.high - self.low + 2) << (self.precision - 1)


FORMATS = {
    "f16": Format(11, -14, 15, 16),
    "bf16": Format(8, -126, 127, 16),
    "tf32": Format(11, -126, 127, 19),
    "f32": Format(24, -126, 127, 32),
    "f64": Format(53, -1022, 1023, 64),
}

Value = Fraction | float  # infinities, NaN and -0.0 as floats


def decode(bits: int, name: str) -> Fraction | float:
    """The value of a float's bits; -0.0, infinities and NaN as Python floats."""
    f = FORMATS[name]
    negative = bits >> (f.bits - 1) & 1
    magnitude = bits & ((1 << (f.bits - 1)) - 1)
    if magnitude >= f.infinity:
        return (-math.inf if negative else math.inf) if magnitude == f.infinity else math.nan
    if magnitude == 0:
        return -0.0 if negative else 0.0
    exponent, mantissa = magnitude >> (f.precision - 1), magnitude & ((1 << (f.precision - 1)) - 1)
    if exponent:
        mantissa |= 1 << (f.precision - 1)
    value = Fraction(mantissa) * Fraction(2) ** (max(exponent, 1) - 1 + f.low - f.precision + 1)
    return -value if negative else value


def encode(value: Fraction | float, name: str, mode: str = "rn") -> int:
    """The bits of a value rounded to a format; NaN is all ones below the sign."""
    f = FORMATS[name]
    sign_bit = 1 << (f.bits - 1)
    if isinstance(value, float):
        if math.isnan(value):
            return sign_bit - 1
        sign = sign_bit if math.copysign(1, value) < 0 else 0
        if math.isinf(value):
            return sign | f.infinity
        if value == 0:
            return sign
        value = Fraction(value)
    if value == 0:
        return 0
    sign, magnitude = (sign_bit, -value) if value < 0 else (0, value)
    n, d = magnitude.numerator, magnitude.denominator
    exponent = n.bit_length() - d.bit_length()
    if n << max(-exponent, 0) < d << max(exponent, 0):
        exponent -= 1
    exponent = max(exponent, f.low)  # magnitude < 2 ** (exponent + 1)
    shift = exponent - f.precision + 1  # of the last place
    n, d = n << max(-shift, 0), d << max(shift, 0)
    count, rest = divmod(n, d)
    up = {
        "rn": 2 * rest > d or (2 * rest == d and count % 2 == 1),
        "rna": 2 * rest >= d,
        "rz": False,
        "rm": bool(rest and sign),
        "rp": bool(rest and not sign),
    }[mode]
    # The hidden bit of count, and a carry out of it, raise the exponent's field.
    bits = ((exponent - f.low) << (f.precision - 1)) + count + up
    if bits < f.infinity:
        return sign | bits
    overflows = mode in ("rn", "rna") or (mode == "rp" and not sign) or (mode == "rm" and sign)
    return sign | (f.infinity if overflows else f.infinity - 1)


def flush(bits: int, name: str) -> int:
    """A subnormal number's bits become those of a zero of its sign."""
    f = FORMATS[name]
    magnitude = bits & ((1 << (f.bits - 1)) - 1)
    return bits if magnitude >> (f.precision - 1) else bits & 1 << (f.bits - 1)


def finite(*values: Fraction | float) -> bool:
    return not any(isinstance(v, float) and not math.isfinite(v) for v in values)


def signed(bits: int, size: int) -> int:
    return bits - (1 << 8 * size) if bits >> (8 * size - 1) & 1 else bits


def to_python(bits: int, type_: str) -> int | Fraction | float:
    """The number that a register of a type holds."""
    if type_ in FORMATS:
        return decode(bits, type_)
    return signed(bits, SIZES[type_]) if type_.startswith("s") else bits


@functools.cache
def special_bits(type_: str, random: int = 12) -> tuple[int, ...]:
    """Bit patterns worth trying: the borders of a type and a few in between."""
    size = 8 * SIZES[type_]
    rng = np.random.default_rng(7)
    others = [int.from_bytes(rng.bytes(size // 8), "little") for _ in range(random)]
    if type_ in FORMATS:
        f = FORMATS[type_]
        one = -f.low + 1 << (f.precision - 1)
        picked = [0, 1, (1 << (f.precision - 1)) - 1, 1 << (f.precision - 1), one - 1, one, one + 1]
        picked += [
            one + (1 << (f.precision - 2)),
            f.infinity - 1,
            f.infinity,
            f.infinity + 1,
            f.infinity | 1 << (f.precision - 2),
        ]
        # Halfway between two values of a smaller format, the lower one even and odd.
        for other in FORMATS.values():
            if (cut := f.precision - other.precision) > 0:
                picked += [one | 1 << (cut - 1), one | 3 << (cut - 1)]
        picked += [p | 1 << (size - 1) for p in picked]
        # Near to one another, so that sums cancel and products stay in range.
        near = [
            one + int(rng.integers(-(4 << f.precision), 4 << f.precision)) | int(rng.integers(2)) << (size - 1)
            for _ in range(random)
        ]
        return tuple(dict.fromkeys(picked + near + others))
    small = [0, 1, 2, 3, 5, 7, 8, 15, 16, 31, 32, 33, 63, 64, 255]
    edges = [1 << k for k in (size - 1, size - 2, size // 2)] + [
        (1 << size) - 1,
        (1 << size) - 2,
        (1 << (size - 1)) - 1,
    ]
    return tuple(dict.fromkeys(s % (1 << size) for s in small + edges + others))


def combinations(types: Sequence[str], most: int = 4096) -> list[tuple[int, ...]]:
    """Operand bits: all combinations of the special values, or a fixed random choice of so many."""
    lists = [special_bits(t) for t in types]
    if math.prod(map(len, lists)) <= most:
        return list(itertools.product(*lists))
    rng = np.random.default_rng(11)
    return [tuple(ls[int(rng.integers(len(ls)))] for ls in lists) for _ in range(most)]


PRELUDE = """
.version 8.8
.target sm_80
.address_size 64
"""


def evaluate(body: str, result: str, types: Sequence[str], operands: Sequence[tuple[int, ...]]) -> list[int]:
    """Run ``body`` on %a, %b, %c, ... for each tuple of operand bits, and return the bits of %d.

    A predicate is a byte in memory; registers %p, %q, %r0..%r9, %rd0..%rd9 and %h0..%h9 are free.
    """
    names = "abcefg"[: len(types)]

    def register(type_: str) -> str:
        return "pred" if type_ == "pred" else f"b{max(8 * SIZES[type_], 16)}"

    def width(type_: str) -> int:
        return max(SIZES[type_], 1)

    loads, declarations = [], [f".reg .{register(result)} %d;"]
    for n, (name, type_) in enumerate(zip(names, types, strict=True)):
        declarations.append(f".reg .{register(type_)} %{name};")
        loads.append(f"ld.param.u64 %at, [p{n}]; mad.wide.u32 %at, %i, {width(type_)}, %at;")
        if type_ == "pred":
            loads.append(f"ld.global.u8 %byte, [%at]; setp.ne.u16 %{name}, %byte, 0;")
        else:
            loads.append(f"ld.global.b{8 * width(type_)} %{name}, [%at];")
    params = ", ".join(f".param .u64 p{n}" for n in range(len(types) + 2))
    store = f"st.global.b{8 * width(result)} [%at], %d;"
    if result == "pred":
        store = "selp.u16 %byte, 1, 0, %d; st.global.u8 [%at], %byte;"
    text = f"""{PRELUDE}
.visible .entry test({params})
{{
  {" ".join(declarations)}
  .reg .b64 %at, %rd<10>; .reg .b32 %i, %n, %r<10>; .reg .b16 %byte, %h<10>; .reg .pred %p, %q, %out;
  mov.u32 %i, %tid.x; mov.u32 %n, %ctaid.x; shl.b32 %n, %n, 5; add.u32 %i, %i, %n;
  ld.param.u32 %n, [p{len(types) + 1}];
  setp.ge.u32 %out, %i, %n;
  @%out ret;
  {" ".join(loads)}
  {body}
  ld.param.u64 %at, [p{len(types)}]; mad.wide.u32 %at, %i, {width(result)}, %at;
  {store}
  ret;
}}"""
    count = len(operands)
    arrays = [np.array([o[n] for o in operands], f"u{width(t)}") for n, t in enumerate(types)]
    out = np.zeros(count, f"u{width(result)}")
    Module(text).kernel().launch(((count + 31) // 32,), (32,), [*arrays, out, count])
    return [int(x) for x in out]


def check(
    body: str,
    result: str,
    types: Sequence[str],
    expected: Callable[..., int],
    *,
    operands: Sequence[tuple[int, ...]] | None = None,
) -> None:
    """``body`` computes ``expected(*bits of the operands)`` for many operands; NaN equals NaN."""
    operands = operands or combinations(types)
    found = evaluate(body, result, types, operands)
    for bits, value in zip(operands, found, strict=True):
        wanted = expected(*bits)
        if wanted == value:
            continue
        both_nan = result in FORMATS and all(v != v for v in (to_python(x, result) for x in (wanted, value)))
        assert both_nan, f"{body} of {[hex(b) for b in bits]}: expected {wanted:#x}, got {value:#x}"


def assemble(body: str, params: str = "u64", declarations: str = "", functions: str = "") -> str:
    """A module with the kernel ``test``: parameters p0, p1, ... of the types named, and some registers of each kind."""
    parameters = ", ".join(f".param .{t} p{n}" for n, t in enumerate(params.split()))
    return f"""{PRELUDE}
{functions}
.visible .entry test({parameters})
{{
  .reg .pred %p<10>; .reg .b16 %h<20>; .reg .b32 %r<40>; .reg .b64 %rd<20>; .reg .f32 %f<20>;
  {declarations}
  {body}
}}"""


def small_kernel(body: str, params: str = "u64", declarations: str = "", functions: str = "") -> Kernel:
    return Module(assemble(body, params, declarations, functions)).kernel("test")


def launch(k: Kernel, *args: object, threads: int = 128, blocks: int = 1, **options: object) -> Report:
    """A launch whose findings the test looks at itself."""
    return k.launch((blocks,), (threads,), args, check=False, **options)


def expect(report: Report, *kinds: str) -> None:
    assert report.kinds == set(kinds), "\n".join(map(str, report.findings))
