"""Loads, stores, atomics and variables on the PTX interpreter, and the text that it accepts and refuses."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from fractions import Fraction

import numpy as np
import pytest
from ptx import Module, PtxError
from ptx.reference import PRELUDE, SIZES, assemble, check, combinations, decode, encode, to_python


@pytest.mark.parametrize("space", ["global", "shared", "local"])
@pytest.mark.parametrize("t", ["u8", "s8", "u16", "s16", "u32", "s32", "b32", "u64", "s64", "b64", "f32", "f64"])
def test_load_and_store(t: str, space: str) -> None:
    """Through each space, and extended into a larger register; generic addresses reach the same bytes."""
    generic = "" if space == "global" else f"mov.u64 %rd5, m; cvta.{space}.u64 %rd5, %rd5;"
    address = "%rd5" if space == "global" else "m"
    declare = f".{space} .align 8 .b8 m[8];" if space != "global" else ""
    start = "ld.param.u64 %rd0, [p0]; ld.param.u64 %rd1, [p1]; " + (
        "mov.u64 %rd5, %rd0;" if space == "global" else generic
    )
    wide = SIZES[t] <= 4 and not t.startswith(("b", "f"))
    results = []
    for load_space in (f".{space}", ""):
        at = address if load_space else "%rd5"
        body = start
        if space != "global":
            body += f"ld.global.b64 %rd6, [%rd0]; st.{space}.b64 [m], %rd6;"
        if wide:
            body += f"ld{load_space}.{t} %rd7, [{at}]; st.global.b64 [%rd1], %rd7; ret;"
        else:
            r = "%rd7" if SIZES[t] == 8 else "%r7"
            body += f"ld{load_space}.{t} {r}, [{at}]; mov.u64 %rd8, 0;"
            body += f"st.global.b64 [%rd1], %rd8; st.global.{t} [%rd1], {r}; ret;"
        bits = 0x8123456789ABCDEF
        out = np.zeros(1, np.uint64)
        Module(assemble(body, "u64 u64", declare)).kernel().launch((1,), (1,), [np.array([bits], np.uint64), out])
        results.append(int(out[0]))
    kept = bits & ((1 << 8 * SIZES[t]) - 1)
    wanted = to_python(kept, t) & 0xFFFFFFFFFFFFFFFF if wide else kept
    assert results == [wanted, wanted]


@pytest.mark.parametrize(
    "modifiers",
    [
        "",
        ".volatile",
        ".relaxed.gpu",
        ".weak",
        ".nc",
        ".ca",
        ".cg",
        ".cs",
        ".L1::no_allocate",
        ".nc.L1::evict_last.L2::128B",
    ],
)
def test_loads_of_every_kind(modifiers: str) -> None:
    nc, space = (".nc", modifiers.replace(".nc", "")) if ".nc" in modifiers else ("", modifiers)
    order = f"ld{space}.global" if modifiers in (".volatile", ".relaxed.gpu", ".weak") else f"ld.global{nc}{space}"
    body = f"ld.param.u64 %rd0, [p0]; {order}.v2.u32 {{%r1, _}}, [%rd0+8]; st.global.wb.u32 [%rd0], %r1; ret;"
    memory = np.arange(4, dtype=np.uint32)
    Module(assemble(body)).kernel().launch((1,), (1,), [memory])
    assert memory[0] == 2


def test_cache_hints_are_accepted() -> None:
    body = """createpolicy.fractional.L2::evict_first.b64 %rd5, 1.0; ld.param.u64 %rd0, [p0];
      ld.global.L1::evict_first.L2::cache_hint.v4.b32 {%r1, %r2, %r3, %r4}, [%rd0], %rd5;
      st.global.L2::cache_hint.b32 [%rd0], %r4, %rd5; ret;"""
    memory = np.arange(4, dtype=np.uint32)
    Module(assemble(body)).kernel().launch((1,), (1,), [memory])
    assert memory[0] == 3


Definition = Callable[[int, int], int]
OWN_WORD = """.shared .align 8 .b8 m[512]; .reg .b32 %at, %m;
  mov.u32 %at, %tid.x; mul.lo.u32 %at, %at, 16; mov.u32 %m, m; add.u32 %at, %at, %m;"""
ATOMICS: list[tuple[str, str, Definition]] = [
    *(("add", t, lambda a, b: a + b) for t in ("u32", "s32", "u64")),
    *(("min", t, min) for t in ("u32", "s32", "u64", "s64")),
    *(("max", t, max) for t in ("u32", "s32", "u64", "s64")),
    *(("and", t, lambda a, b: a & b) for t in ("b32", "b64")),
    *(("or", t, lambda a, b: a | b) for t in ("b32", "b64")),
    *(("xor", t, lambda a, b: a ^ b) for t in ("b32", "b64")),
    *(("exch", t, lambda a, b: b) for t in ("b32", "b64")),
    ("inc", "u32", lambda a, b: 0 if a >= b else a + 1),
    ("dec", "u32", lambda a, b: b if a == 0 or a > b else a - 1),
]


@pytest.mark.parametrize(("op", "t", "definition"), ATOMICS, ids=[f"{a[0]}-{a[1]}" for a in ATOMICS])
def test_integer_atomics(op: str, t: str, definition: Definition) -> None:
    """Both in shared memory: the old value, and what stands there then."""
    mask = (1 << 8 * SIZES[t]) - 1
    b = f"b{8 * SIZES[t]}"

    def new(a: int, x: int) -> int:
        return definition(to_python(a, t), to_python(x, t)) & mask

    declare = OWN_WORD
    before = f"{{ {declare} st.shared.{b} [%at], %a; "
    check(f"{before} atom.shared.{op}.{t} %d, [%at], %b; }}", b, [t, t], lambda a, x: a)
    check(f"{before} .reg .{b} %o; atom.shared.{op}.{t} %o, [%at], %b; ld.shared.{b} %d, [%at]; }}", b, [t, t], new)
    if op != "exch":
        check(f"{before} red.shared.{op}.{t} [%at], %b; ld.shared.{b} %d, [%at]; }}", b, [t, t], new)


@pytest.mark.parametrize("b", ["b16", "b32", "b64"])
def test_compare_and_swap(b: str) -> None:
    declare = OWN_WORD + f".reg .{b} %o;"
    body = f"{{ {declare} st.shared.{b} [%at], %a; atom.shared.cas.{b} %o, [%at], %b, %c; ld.shared.{b} %d, [%at]; }}"
    operands = [o for x, y, z in combinations([b] * 3, 300) for o in ((x, y, z), (x, x, z))]
    check(body, b, [b] * 3, lambda a, x, y: y if a == x else a, operands=operands)


@pytest.mark.parametrize("t", ["f32", "f64", "f16", "bf16", "f16x2", "bf16x2"])
def test_float_atomics(t: str) -> None:
    one = t.removesuffix("x2")
    noftz = ".noftz" if one in ("f16", "bf16") else ""
    values = np.random.default_rng(8).standard_normal((32, 2))
    bits = [[encode(float(x), one) for x in pair] for pair in values]
    packed = [p[0] | p[1] << 16 if t != one else p[0] for p in bits]
    array = np.array(packed, f"u{SIZES[t]}")
    register = f"b{8 * SIZES[t]}"
    body = f"""{{ .reg .{register} %x; mov.u32 %r0, %tid.x; ld.param.u64 %rd0, [p0]; ld.param.u64 %rd1, [p1];
      mad.wide.u32 %rd0, %r0, {SIZES[t]}, %rd0; ld.global.{register} %x, [%rd0];
      red.global.gpu.add{noftz}.{t} [%rd1], %x; ret; }}"""
    out = np.zeros(1, f"u{SIZES[t]}")
    Module(assemble(body, "u64 u64")).kernel().launch((1,), (32,), [array, out])
    for half in range(1 if t == one else 2):
        total = 0.0
        for pair in bits:  # in the order of the lanes
            total = decode(encode(Fraction(total) + Fraction(decode(pair[half], one)), one), one)
        assert int(out[0]) >> 16 * half & ((1 << 8 * SIZES[one]) - 1) == encode(total, one)


def test_variables_and_their_initial_values() -> None:
    module = """
.global .align 4 .b8 text[8] = {104, 105, 0};
.global .align 8 .u64 pointer = generic(table) + 8;
.const .align 4 .f32 table[4] = {0f3F800000, 0f40000000, 0f40400000, 0f40800000};
.global .align 4 .u32 zero;
.shared .align 4 .u32 across;
"""
    body = """ld.param.u64 %rd0, [p0]; ld.global.u64 %rd1, [pointer]; ld.f32 %f0, [%rd1]; st.global.f32 [%rd0], %f0;
      ld.global.u8 %r1, [text+1]; st.global.u32 [%rd0+4], %r1; ld.global.u32 %r2, [zero]; st.global.u32 [%rd0+8], %r2;
      st.shared.u32 [across], 77; ld.shared.u32 %r3, [across]; st.global.u32 [%rd0+12], %r3; ret;"""
    m = Module(assemble(body, functions=module))
    out = np.full(4, 5, np.uint32)
    m.kernel().launch((1,), (1,), [out])
    assert out.tolist() == [0x40400000, 105, 0, 77]
    assert m.symbol("text") > 0
    with pytest.raises(PtxError, match="no global variable 'nothing'"):
        m.symbol("nothing")


def test_parameters_by_value() -> None:
    text = assemble("REST").replace(".param .u64 p0", ".param .u32 n, .param .align 8 .b8 s[24], .param .u64 p0")
    body = """ld.param.u64 %rd0, [p0]; ld.param.u32 %r1, [n]; ld.param.v2.u32 {%r2, %r3}, [s+8];
      add.u32 %r1, %r1, %r2; add.u32 %r1, %r1, %r3; st.global.u32 [%rd0], %r1; ret;"""
    out = np.zeros(1, np.uint32)
    struct = np.array([1, 2, 30, 400, 5, 6], np.uint32).tobytes()
    Module(text.replace("REST", body)).kernel().launch((1,), (1,), [1000, struct, out])
    assert out[0] == 1430


def test_scopes_hide_names() -> None:
    body = """ld.param.u64 %rd0, [p0]; .reg .b32 x; mov.u32 x, 1;
      { .reg .b32 x; mov.u32 x, 2; bra end; end: st.global.u32 [%rd0], x; }
      bra end; end: st.global.u32 [%rd0+4], x; ret;"""
    out = np.zeros(2, np.uint32)
    Module(assemble(body)).kernel().launch((1,), (1,), [out])
    assert out.tolist() == [2, 1]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("tex.2d.v4.f32.f32 {%f0, %f1, %f2, %f3}, [p0, {%f0, %f1}];", "tex|expected"),
        ("wmma.load.a.sync.aligned.row.m16n16k16.f16 {%r0}, [%rd0];", r"unsupported instruction 'wmma\.load"),
        ("add.u32.quickly %r0, %r1, %r2;", r"unsupported instruction 'add\.u32\.quickly'"),
        ("add.b32 %r0, %r1, %r2;", r"unsupported instruction 'add\.b32'"),
        ("mul.u32 %r0, %r1, %r2;", r"unsupported instruction 'mul\.u32'"),
        ("shfl.idx.b32 %r0, %r1, 0, 31;", "without .sync"),
        ("add.u32 %r0, %r1;", "2 operands, expected 3"),
        ("add.u64 %rd0, %r1, %rd2;", "register %r1 has 4 bytes, the instruction 8"),
        ("add.f32 %f0, %f1, 1;", "an integer where a float belongs"),
        ("mov.u32 %r0, %nothing;", "'%nothing'"),
        ("bra nowhere;", "no label 'nowhere'"),
        ("call nothing;", "no function 'nothing'"),
        ("call %rd0, (), proto;", "call through a pointer"),
        ("cvt.f32.s32 %f0, %r0;", "without float rounding"),
        ("ld.global.v3.u32 {%r0, %r1, %r2}, [%rd0];", "unsupported"),
        (
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.f16.f32 {%f0}, {%r0}, {%r4}, {%f0};",
            "unsupported instruction 'mma",
        ),
        ("cp.async.bulk.commit_group;", "unsupported instruction 'cp.async.bulk"),
        ("@%r0 ret;", "a guard must be a predicate"),
        ("mov.u32 %r0, 0f3;;", "expected"),
        ("mov.u32 %r0, 99999999999999999999;", "not a number of 64 bits"),
        (".reg .b32 %huge<9999999999>;", "registers"),
        ("{ mov.u32 %r0, 1;", "no end"),
        ("ld.shared.u32 %r0, [%rd0", "expected"),
        ("mov.u32 %r0, 0x;", "not a number"),
    ],
)
def test_what_is_refused_is_named_with_its_line(body: str, message: str) -> None:
    text = assemble("\n" + body)
    line = text[: text.index(body)].count("\n") + 1
    with pytest.raises(PtxError, match=message) as caught:
        Module(text).kernel("test")
    named = int(str(caught.value).split("line ")[1].split(":")[0])
    assert named >= line and (named == line or "no end" in str(caught.value) or "expected" in str(caught.value))


def test_unsupported_instructions_matter_only_where_they_are() -> None:
    text = assemble("ret;") + ".visible .entry other() { .reg .b32 %r; quux.b32 %r; ret; }"
    m = Module(text)
    m.kernel("test").launch((1,), (1,), [None])
    with pytest.raises(PtxError, match=r"unsupported instruction 'quux\.b32'"):
        m.kernel("other")
    with pytest.raises(PtxError, match="expected one kernel named 'third'"):
        m.kernel("third")


def test_any_cut_or_garbled_text_is_an_error_and_not_a_crash() -> None:
    text = assemble(
        "ld.param.u64 %rd0, [p0]; .loc 1 2 3\n@%p0 bra end; { .reg .b32 x; mov.b64 %rd1, {%r1, x}; }"
        "setp.lt.and.s32 %p1|%p2, 1, -2, !%p3; end: ret;",
        functions='.file 1 "a.cu"\n.global .align 4 .b8 t[4] = {1, 2, 0x3};',
    )
    rng = np.random.default_rng(9)
    alphabet = list('{}[]();:.,%@!-+0x19afgr \n"/*_$|')
    for n in range(400):
        if n < 200:
            broken = text[: int(rng.integers(len(text)))]
        else:
            letters = list(text)
            for _ in range(3):
                letters[int(rng.integers(len(letters)))] = alphabet[int(rng.integers(len(alphabet)))]
            broken = "".join(letters)
        with suppress(PtxError):
            Module(broken).kernel()


def test_nothing_is_left_registered() -> None:
    """A module's variables go with it; a new one may get the same addresses."""
    for _ in range(50):
        Module(PRELUDE + ".global .align 4 .b8 t[4000]; .visible .entry k() { ret; }").kernel().launch((1,), (1,), [])
