"""What lanes of a warp do together on the PTX interpreter: exchanges, matrices, divergence, calls, barriers."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from ptx import Module
from ptx.reference import PRELUDE, assemble

LANES = np.arange(32)
INPUT = """
  mov.u32 %r0, %tid.x; ld.param.u64 %rd0, [p0]; ld.param.u64 %rd1, [p1];
  mad.wide.u32 %rd2, %r0, 4, %rd0; mad.wide.u32 %rd3, %r0, 4, %rd1; ld.global.b32 %r1, [%rd2];
"""


def run(body: str, values: np.ndarray, threads: int = 32, functions: str = "", declarations: str = "") -> np.ndarray:
    """%r0 is the lane, %r1 its value; what the body leaves in %r2 is the result."""
    text = assemble(INPUT + body + "done: st.global.b32 [%rd3], %r2; ret;", "u64 u64", declarations, functions)
    out = np.zeros(threads, np.uint32)
    Module(text).kernel("test").launch((1,), (threads,), [values.astype(np.uint32), out])
    return out


def shuffle(mode: str, lane: int, b: int, c: int) -> tuple[int, bool]:
    """Source lane and whether it is in range: PTX ISA, shfl.sync."""
    limit, segment = c & 31, c >> 8 & 31
    low, high = lane & segment, (lane & segment) | (limit & ~segment)
    source = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": low | (b & ~segment)}[mode]
    inside = source >= high if mode == "up" else source <= high
    return (source if inside else lane), inside


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
def test_shfl(mode: str) -> None:
    values = np.random.default_rng(1).integers(0, 1 << 32, 32)
    for b, width in itertools.product((0, 1, 3, 5, 16, 31), (32, 16, 8)):
        c = (32 - width) << 8 | (0 if mode == "up" else 31)
        body = f"shfl.sync.{mode}.b32 %r3|%p0, %r1, {b}, {c}, -1; selp.u32 %r4, 1, 0, %p0; "
        found = run(body + "mov.u32 %r2, %r3;", values), run(body + "mov.u32 %r2, %r4;", values)
        for lane in range(32):
            source, inside = shuffle(mode, lane, b, c)
            assert (found[0][lane], found[1][lane]) == (values[source], inside), (mode, b, width, lane)


def test_shfl_with_an_index_and_a_mask_of_each_lane() -> None:
    values = np.arange(32) + 100
    half = "and.b32 %r5, %r0, 16; mov.u32 %r6, 0xffff; shl.b32 %r6, %r6, %r5; xor.b32 %r4, %r0, 9;"
    assert (run(half + "shfl.sync.idx.b32 %r2, %r1, %r4, 31, %r6;", values) == 100 + (LANES ^ 9)).all()


@pytest.mark.parametrize("name", ["all", "any", "uni", "ballot"])
@pytest.mark.parametrize("members", [0xFFFFFFFF, 0x0F0F00FF])
def test_vote(name: str, members: int) -> None:
    rng = np.random.default_rng(2)
    for values in (np.zeros(32), np.ones(32), rng.integers(0, 2, 32), np.eye(32)[5]):
        for negated in (False, True):
            d, suffix = ("%r2", "b32") if name == "ballot" else ("%p1", "pred")
            vote = f"vote.sync.{name}.{suffix} {d}, {'!' * negated}%p0, {members};"
            body = f"""mov.u32 %r2, 7; setp.ne.u32 %p0, %r1, 0; mov.u32 %r4, {members}; shr.u32 %r4, %r4, %r0;
              and.b32 %r4, %r4, 1;
              setp.eq.u32 %p2, %r4, 0; @%p2 bra done; {vote}"""
            if name != "ballot":
                body += "selp.u32 %r2, 1, 0, %p1;"
            votes = [(bool(v) != negated) for v, lane in zip(values, range(32), strict=True) if members >> lane & 1]
            ballot = sum(1 << lane for lane in range(32) if members >> lane & 1 and bool(values[lane]) != negated)
            wanted = {"all": all(votes), "any": any(votes), "uni": len(set(votes)) == 1, "ballot": ballot}[name]
            found = run(body, values)
            for lane in range(32):
                assert found[lane] == (int(wanted) if members >> lane & 1 else 7)


def test_match() -> None:
    values = np.random.default_rng(3).integers(0, 4, 32)
    same = [sum(1 << other for other in range(32) if values[other] == values[lane]) for lane in range(32)]
    assert run("match.any.sync.b32 %r2, %r1, -1;", values).tolist() == same
    assert (run("match.all.sync.b32 %r2|%p0, %r1, -1;", values) == 0).all()
    assert (run("match.all.sync.b32 %r3|%p0, %r1, -1; selp.u32 %r2, %r3, 0, %p0;", np.full(32, 9)) == 0xFFFFFFFF).all()


@pytest.mark.parametrize(
    ("name", "reduce"),
    [
        ("add.s32", np.sum),
        ("add.u32", np.sum),
        ("min.u32", np.min),
        ("max.u32", np.max),
        ("min.s32", lambda v: v.view(np.int32).min()),
        ("max.s32", lambda v: v.view(np.int32).max()),
        ("and.b32", lambda v: np.bitwise_and.reduce(v)),
        ("or.b32", lambda v: np.bitwise_or.reduce(v)),
        ("xor.b32", lambda v: np.bitwise_xor.reduce(v)),
    ],
)
def test_redux(name: str, reduce) -> None:
    values = np.random.default_rng(4).integers(0, 1 << 32, 32).astype(np.uint32)
    assert (run(f"redux.sync.{name} %r2, %r1, -1;", values) == int(reduce(values)) % (1 << 32)).all()


def test_special_registers() -> None:
    text = assemble(
        """mov.u32 %r0, %tid.x; mov.u32 %r1, %tid.y; mov.u32 %r2, %tid.z; mov.u32 %r3, %ntid.x; mov.u32 %r4, %ntid.y;
  mad.lo.u32 %r5, %r2, %r4, %r1; mad.lo.u32 %r5, %r5, %r3, %r0;
  mov.u32 %r6, %ctaid.z; mov.u32 %r7, %nctaid.y; mul.lo.u32 %r6, %r6, %r7;
  mov.u32 %r7, %ctaid.y; add.u32 %r6, %r6, %r7;
  mov.u32 %r7, %nctaid.x; mul.lo.u32 %r6, %r6, %r7; mov.u32 %r7, %ctaid.x; add.u32 %r6, %r6, %r7;
  mov.u32 %r8, %laneid; mov.u32 %r9, %warpid; mad.lo.u32 %r8, %r9, 32, %r8; sub.u32 %r8, %r8, %r5;
  mov.u32 %r10, %ntid.z; mul.lo.u32 %r11, %r3, %r4; mul.lo.u32 %r11, %r11, %r10; mad.lo.u32 %r6, %r6, %r11, %r5;
  mov.u32 %r12, %lanemask_lt; mov.u32 %r13, %lanemask_ge; xor.b32 %r12, %r12, %r13; add.u32 %r12, %r12, 1;
  add.u32 %r8, %r8, %r12;
  mov.u32 %r12, %lanemask_le; mov.u32 %r13, %lanemask_gt; xor.b32 %r12, %r12, %r13; add.u32 %r12, %r12, 1;
  add.u32 %r8, %r8, %r12;
  ld.param.u64 %rd0, [p0]; mad.wide.u32 %rd0, %r6, 4, %rd0; add.u32 %r6, %r6, %r8; st.global.u32 [%rd0], %r6; ret;"""
    )
    out = np.zeros(2 * 3 * 2 * 5 * 3 * 4, np.uint32)
    Module(text).kernel().launch((2, 3, 2), (5, 3, 4), [out])
    assert (out == np.arange(out.size)).all()


def test_nested_divergence_meets_again() -> None:
    """Both sides of two branches, a loop of a length for each lane, and all 32 lanes at the end."""
    body = """
  mov.u32 %r2, 0; and.b32 %r3, %r0, 1; setp.eq.u32 %p0, %r3, 0; @%p0 bra even;
  and.b32 %r3, %r0, 2; setp.eq.u32 %p1, %r3, 0; @%p1 bra one;
  add.u32 %r2, %r2, 3; bra.uni join;
one: add.u32 %r2, %r2, 1; bra.uni join;
even: add.u32 %r2, %r2, 100;
loop: add.u32 %r2, %r2, 10; add.u32 %r3, %r3, 1; setp.lt.u32 %p2, %r3, %r0; @%p2 bra loop;
join: activemask.b32 %r4; popc.b32 %r4, %r4; mad.lo.u32 %r2, %r4, 1000, %r2;
"""
    wanted = [32000 + ([100 + 10 * max(n, 1), 1, 100 + 10 * max(n, 1), 3][n % 4]) for n in range(32)]
    assert run(body, LANES).tolist() == wanted


def test_brx() -> None:
    body = """mov.u32 %r2, 0; and.b32 %r3, %r0, 3; brx.idx %r3, targets;
targets: .branchtargets a, b, c, a;
a: add.u32 %r2, %r2, 1; bra done;
b: add.u32 %r2, %r2, 2; bra done;
c: add.u32 %r2, %r2, 3;"""
    assert run(body, LANES).tolist() == [1, 2, 3, 1] * 8


FUNCTIONS = """
.func (.param .b32 result) power(.param .b32 x, .param .b32 n)
{
  .reg .b32 %r<8>; .reg .pred %p<2>; .local .align 4 .b8 kept[4]; .reg .b64 %SPL;
  mov.u64 %SPL, kept;
  ld.param.u32 %r1, [x]; ld.param.u32 %r2, [n];
  setp.ne.u32 %p0, %r2, 0; @%p0 bra more;
  st.param.b32 [result], 1; ret;
more:
  st.local.u32 [%SPL], %r1;
  sub.u32 %r2, %r2, 1;
  { .param .b32 a; .param .b32 b; .param .b32 back; st.param.b32 [a], %r1; st.param.b32 [b], %r2;
    call.uni (back), power, (a, b); ld.param.b32 %r3, [back]; }
  ld.local.u32 %r4, [%SPL];
  mul.lo.u32 %r3, %r3, %r4;
  st.param.b32 [result], %r3;
  ret;
}
"""


def test_recursive_calls_diverge_and_keep_their_locals() -> None:
    body = """and.b32 %r3, %r0, 7; { .param .b32 a; .param .b32 b; .param .b32 back;
      st.param.b32 [a], %r1; st.param.b32 [b], %r3;
      call (back), power, (a, b); ld.param.b32 %r2, [back]; }"""
    values = LANES % 5 + 1
    assert run(body, values, functions=FUNCTIONS).tolist() == [int(values[n]) ** (n & 7) for n in range(32)]
    guarded = "mov.u32 %r2, 9; setp.lt.u32 %p0, %r0, 8; " + body.replace("call (", "@%p0 call (").replace(
        "ld.param.b32 %r2", "@%p0 ld.param.b32 %r2"
    )
    expected = [int(values[n]) ** (n & 7) if n < 8 else 9 for n in range(32)]
    assert run(guarded, values, functions=FUNCTIONS).tolist() == expected


@pytest.mark.parametrize(
    ("op", "wanted"), [("popc.u32", lambda v: v.sum()), ("and.pred", lambda v: v.all()), ("or.pred", lambda v: v.any())]
)
def test_barrier_reductions(op: str, wanted) -> None:
    for values in (np.zeros(96), np.ones(96), np.arange(96) % 3 == 0):
        d = "%r2" if op.startswith("popc") else "%p1"
        body = f"setp.ne.u32 %p0, %r1, 0; barrier.cta.red.{op.split('.')[0]}.aligned.{op.split('.')[1]} {d}, 0, %p0;"
        if d == "%p1":
            body += "selp.u32 %r2, 1, 0, %p1;"
        assert (run(body, values, threads=96) == int(wanted(values.astype(bool) if d == "%p1" else values))).all()


def fragment_rows(size: int, registers: int, k: int) -> np.ndarray:
    """(register, lane, element) -> (row, column) of an operand of mma with rows of k elements, `size` bytes each.

    PTX ISA, "Warp-level matrix instructions": lane / 4 is the row, lane % 4 the piece of 32 bits; odd registers are
    eight rows below, and the upper half of the registers in the second half of the columns.
    """
    per = 4 // size
    out = np.zeros((registers, 32, per, 2), int)
    for r, lane, e in itertools.product(range(registers), range(32), range(per)):
        right = r >> 1 if registers > 1 else 0
        out[r, lane, e] = lane // 4 + 8 * (r & 1), right * k // 2 + lane % 4 * per + e
    return out


def pack(matrix: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Registers (register, lane) of 32 bits with the matrix's elements at their places."""
    rows, columns = places[..., 0], places[..., 1]
    return np.ascontiguousarray(matrix[rows, columns]).view(np.uint32)[..., 0]


MMA = [
    # shape, type of A and B, of the sum, torch type, K
    ("m16n8k8", "f16", "f16", "f32", 8),
    ("m16n8k16", "f16", "f16", "f32", 16),
    ("m16n8k16", "f16", "f16", "f16", 16),
    ("m16n8k8", "f16", "f16", "f16", 8),
    ("m16n8k8", "bf16", "bf16", "f32", 8),
    ("m16n8k16", "bf16", "bf16", "f32", 16),
    ("m16n8k4", "tf32", "tf32", "f32", 4),
    ("m16n8k8", "tf32", "tf32", "f32", 8),
    *((f"m16n8k{k}", a, b, "s32", k) for k in (16, 32) for a in ("s8", "u8") for b in ("s8", "u8")),
]


def raw(x: torch.Tensor) -> np.ndarray:
    """A tensor's bits as numpy integers."""
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()]).numpy()


def mma(
    shape: str,
    a_type: str,
    b_type: str,
    sum_type: str,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    modifier: str = "",
) -> torch.Tensor:
    """c + a @ b.T by one instruction: a (16, k), b (8, k), c (16, 8)."""
    size, k = a.element_size(), a.shape[1]
    a_count, b_count, c_count = 16 * k * size // 128, 8 * k * size // 128, 2 if sum_type == "f16" else 4
    a_registers = pack(raw(a), fragment_rows(size, a_count, k))
    # B by columns is like the upper rows of A.
    places = np.stack([fragment_rows(size, 4 if b_count == 2 else 1, k)[r] for r in ((0, 2) if b_count == 2 else (0,))])
    b_registers = pack(raw(b), places)
    c_places = np.zeros((c_count, 32, 4 // c.element_size(), 2), int)
    for r, lane, e in itertools.product(range(c_count), range(32), range(4 // c.element_size())):
        element = r * (4 // c.element_size()) + e
        c_places[r, lane, e] = lane // 4 + element // 2 * 8, lane % 4 * 2 + element % 2
    c_registers = pack(raw(c), c_places)
    registers = np.concatenate([a_registers, b_registers, c_registers])
    names = [f"%r{n + 1}" for n in range(len(registers))]
    lists = iter(names)
    groups = [[next(lists) for _ in range(count)] for count in (a_count, b_count, c_count)]
    sink = [f"%r{n + 20}" for n in range(c_count)]
    loads = " ".join(f"ld.global.b32 {name}, [%rd2+{128 * n}];" for n, name in enumerate(names))
    stores = " ".join(f"st.global.b32 [%rd3+{128 * n}], {name};" for n, name in enumerate(sink))
    vectors = ", ".join("{" + ", ".join(g) + "}" for g in [sink, *groups])
    body = f"""mov.u32 %r0, %tid.x; ld.param.u64 %rd0, [p0]; ld.param.u64 %rd1, [p1];
  mad.wide.u32 %rd2, %r0, 4, %rd0; mad.wide.u32 %rd3, %r0, 4, %rd1; {loads}
  mma.sync.aligned.{shape}.row.col{modifier}.{sum_type}.{a_type}.{b_type}.{sum_type} {vectors}; {stores} ret;"""
    out = np.zeros((c_count, 32), np.uint32)
    Module(assemble(body, "u64 u64")).kernel().launch((1,), (32,), [np.ascontiguousarray(registers), out])
    result = np.zeros((16, 8), raw(c).dtype)
    elements = out.view(result.dtype).reshape(c_count, 32, -1)
    result[c_places[..., 0], c_places[..., 1]] = elements
    return torch.from_numpy(result).view(c.dtype)


@pytest.mark.parametrize(("shape", "a_type", "b_type", "sum_type", "k"), MMA)
def test_mma(shape: str, a_type: str, b_type: str, sum_type: str, k: int) -> None:
    torch.manual_seed(k)
    dtypes = {
        "f16": torch.float16,
        "bf16": torch.bfloat16,
        "tf32": torch.float32,
        "f32": torch.float32,
        "s32": torch.int32,
    }
    if sum_type == "s32":
        a, b = (torch.randint(-128, 128, (n, k)).to(torch.int8) for n in (16, 8))
        a, b = (x.view(torch.uint8) if t == "u8" else x for x, t in ((a, a_type), (b, b_type)))
        c = torch.randint(-(1 << 31), 1 << 31, (16, 8)).to(torch.int32)
        wanted = (a.long() @ b.long().T + c.long()).to(torch.int32)
        assert torch.equal(mma(shape, a_type, b_type, sum_type, a, b, c), wanted)
        clamped = (a.long() @ b.long().T + c.long()).clamp(-(1 << 31), (1 << 31) - 1).to(torch.int32)
        assert torch.equal(mma(shape, a_type, b_type, sum_type, a, b, c, ".satfinite"), clamped)
        return
    a, b = (torch.randn(n, k).to(dtypes[a_type]) for n in (16, 8))
    c = torch.randn(16, 8).to(dtypes[sum_type])
    found = mma(shape, a_type, b_type, sum_type, a, b, c)
    if a_type == "tf32":
        a, b = ((x.view(torch.int32) & ~0x1FFF).view(torch.float32) for x in (a, b))
    wanted = (a.double() @ b.double().T + c.double()).to(dtypes[sum_type])
    torch.testing.assert_close(found, wanted, rtol=1e-6 if sum_type == "f32" else 1e-3, atol=0)


def test_mma_keeps_nan_and_inf_in_their_rows_and_columns() -> None:
    a, b, c = torch.ones(16, 16).bfloat16(), torch.ones(8, 16).bfloat16(), torch.zeros(16, 8)
    a[3, 5], b[6, 2], c[9, 1] = torch.nan, torch.inf, -torch.inf
    found = mma("m16n8k16", "bf16", "bf16", "f32", a, b, c)
    wanted = a.float() @ b.float().T + c
    assert torch.equal(found.isnan(), wanted.isnan())
    assert torch.equal(found.nan_to_num(), wanted.nan_to_num())


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix(count: int, transposed: bool) -> None:
    """Rows of 16 bytes, in an order of their own, from the lanes' addresses."""
    values = np.random.default_rng(5).integers(0, 1 << 16, (8 * count, 8)).astype(np.uint16)
    order = np.random.default_rng(6).permutation(8 * count)
    names = ", ".join(f"%r{n + 10}" for n in range(count))
    stores = " ".join(f"st.global.u32 [%rd1+{4 * n}], %r{n + 10};" for n in range(count))
    body = f"""mov.u32 %r0, %tid.x; ld.param.u64 %rd0, [p0]; ld.param.u64 %rd1, [p1]; ld.param.u64 %rd2, [p2];
  mov.u32 %r2, s; setp.ge.u32 %p0, %r0, {8 * count}; @%p0 bra ready;
  mad.wide.u32 %rd0, %r0, 16, %rd0; ld.global.v4.u32 {{%r3, %r4, %r5, %r6}}, [%rd0];
  mad.lo.u32 %r7, %r0, 16, %r2; st.shared.v4.u32 [%r7], {{%r3, %r4, %r5, %r6}};
ready: bar.warp.sync -1;
  rem.u32 %r8, %r0, {8 * count}; mad.wide.u32 %rd2, %r8, 4, %rd2; ld.global.u32 %r8, [%rd2];
  mad.lo.u32 %r8, %r8, 16, %r2;
  ldmatrix.sync.aligned.m8n8.x{count}{".trans" * transposed}.shared.b16 {{{names}}}, [%r8];
  mad.wide.u32 %rd1, %r0, {4 * count}, %rd1; {stores} ret;"""
    out = np.zeros((32, count, 2), np.uint16)
    k = Module(assemble(body, "u64 u64 u64", f".shared .align 16 .b8 s[{128 * count}];")).kernel()
    k.launch((1,), (32,), [values, out, order.astype(np.uint32)])
    for lane, n, e in itertools.product(range(32), range(count), range(2)):
        matrix = values[order[8 * n : 8 * n + 8]]
        row, column = lane // 4, lane % 4 * 2 + e
        assert out[lane, n, e] == (matrix[column, row] if transposed else matrix[row, column])


def test_movmatrix() -> None:
    matrix = np.arange(64, dtype=np.uint16).reshape(8, 8)
    found = run("movmatrix.sync.aligned.m8n8.trans.b16 %r2, %r1;", matrix.reshape(32, 2).view(np.uint32)[:, 0])
    assert (found.view(np.uint16).reshape(8, 8) == matrix.T).all()


def test_undefined_data_spreads_through_mma_by_rows_and_columns() -> None:
    """An undefined register of A spoils its rows of the sum; the others may be stored."""
    body = """mov.u32 %r1, 0; mov.f32 %f1, 0f00000000;
  mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32
    {%f2, %f3, %f4, %f5}, {%r1, %r2, %r1, %r1}, {%r1, %r1}, {%f1, %f1, %f1, %f1};
  ld.param.u64 %rd0, [p0]; mov.u32 %r5, %tid.x; mad.wide.u32 %rd0, %r5, 4, %rd0; st.global.f32 [%rd0], """
    for register, is_reported in (("%f2", False), ("%f5", True)):
        text = assemble(body + f"{register}; ret;")
        report = Module(text).kernel().launch((1,), (32,), [np.zeros(32, np.float32)], check=False)
        assert bool(report.findings) == is_reported


@pytest.mark.parametrize("threads", [16, 40])
def test_a_part_of_a_warp_cannot_multiply(threads: int) -> None:
    text = f"""{PRELUDE} .visible .entry k() {{ .reg .b32 %r<4>; .shared .align 16 .b8 s[512]; mov.u32 %r0, s;
      ldmatrix.sync.aligned.m8n8.x1.shared.b16 {{%r1}}, [%r0]; ret; }}"""
    report = Module(text).kernel().launch((1,), (threads,), [], check=False)
    assert report.kinds == {"mask"}
