"""Each check of the PTX interpreter fires on a small kernel that is wrong and is silent on the one that is right."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from ptx import Module, PtxError, PtxFault, empty, on_device, undefined_bytes
from ptx.reference import assemble, expect, launch, small_kernel

THREADS = 128


STORE = "ld.param.u64 %rd0, [p0]; st.global.u32 [%rd0], %r1; ret;"

# ---- bounds and alignment ---------------------------------------------------


@pytest.mark.parametrize(("count", "kinds"), [(THREADS, ()), (THREADS - 1, ("out of bounds",))])
@pytest.mark.parametrize(
    "access", ["st.global.u32 [%rd0], %r0;", "ld.global.u32 %r1, [%rd0];", "atom.global.add.u32 %r1, [%rd0], 1;"]
)
def test_one_past_the_end(access: str, count: int, kinds: tuple[str, ...]) -> None:
    k = small_kernel(f"ld.param.u64 %rd0, [p0]; mov.u32 %r0, %tid.x; mad.wide.u32 %rd0, %r0, 4, %rd0; {access} ret;")
    report = launch(k, np.zeros(count, np.uint32))
    expect(report, *kinds)
    if kinds:
        assert "3 bytes behind the end" in report.findings[0].message  # of its last byte
        assert report.findings[0].lanes == 1 << 31
        assert report.findings[0].warp == 3


def test_a_view_has_its_own_bounds() -> None:
    k = small_kernel(
        "ld.param.u64 %rd0, [p0]; mov.u32 %r0, %tid.x; mad.wide.u32 %rd0, %r0, 4, %rd0; st.global.u32 [%rd0], %r0; ret;"
    )
    whole = np.zeros(THREADS, np.uint32)
    expect(launch(k, whole[:100]), "out of bounds")
    assert (whole[100:] == 0).all()


def test_memory_is_registered_once() -> None:
    whole = on_device(np.zeros(16, np.uint32))
    assert on_device(whole) is whole
    with pytest.raises(ValueError, match="memory of its own"):
        on_device(whole[:4])
    part = on_device(np.zeros(16, np.uint32)[:8])
    k = small_kernel("ld.param.u64 %rd0, [p0]; ld.global.u32 %r0, [%rd0]; ret;")
    expect(launch(k, whole[4:8]))
    with pytest.raises(ValueError, match="reaches beyond"):
        launch(k, part.base)


def test_null_and_free_memory() -> None:
    k = small_kernel("ld.param.u64 %rd0, [p0]; ld.global.u32 %r0, [%rd0]; ret;")
    expect(launch(k, None), "out of bounds")
    address = on_device(np.zeros(4, np.uint32)).ctypes.data  # gone at once
    expect(launch(k, np.uint64(address)), "out of bounds")


@pytest.mark.parametrize(
    ("access", "kinds"),
    [
        ("ld.shared.u32 %r1, [s+508];", set()),
        ("ld.shared.u32 %r1, [s+512];", {"out of bounds"}),
        ("ld.shared.u32 %r1, [s+-4];", {"out of bounds"}),
        ("ld.shared.u32 %r1, [s+510];", {"misaligned"}),
        ("ld.shared.v4.u32 {%r1, %r2, %r3, %r4}, [s+496];", set()),
        ("ld.shared.v4.u32 {%r1, %r2, %r3, %r4}, [s+504];", {"misaligned"}),
        ("ld.shared.v2.u32 {%r1, %r2}, [s+512];", {"out of bounds"}),
        ("ld.shared.u32 %r1, [s2];", set()),
        ("ld.shared.u32 %r1, [s2+-4];", {"out of bounds"}),
        ("ld.shared.u32 %r1, [s2+4];", {"out of bounds"}),
        ("ld.shared.u32 %r1, [dynamic+60];", set()),
        ("ld.shared.u32 %r1, [dynamic+64];", {"out of bounds"}),
        ("st.shared.u8 [dynamic+64], 1;", {"out of bounds"}),
        ("ld.local.u32 %r1, [l+12];", set()),
        ("ld.local.u32 %r1, [l+64];", {"out of bounds"}),
        ("ld.param.u32 %r1, [p0+8];", {"out of bounds"}),
        ("ld.const.u32 %r1, [c+12];", set()),
        ("ld.const.u32 %r1, [c+16];", {"out of bounds"}),
        ("ld.global.u32 %r1, [g+4];", set()),
        ("ld.global.u32 %r1, [g+8];", {"out of bounds"}),
        ("mov.u64 %rd0, g; ld.u32 %r1, [%rd0+8];", {"out of bounds"}),
        ("cvta.shared.u64 %rd0, %rd1; mov.u64 %rd1, s; cvta.shared.u64 %rd0, %rd1; ld.u32 %r1, [%rd0+508];", set()),
        ("mov.u64 %rd1, s; cvta.shared.u64 %rd0, %rd1; ld.u32 %r1, [%rd0+512];", {"out of bounds"}),
        ("mov.u64 %rd1, l; cvta.local.u64 %rd0, %rd1; ld.u32 %r1, [%rd0+12];", set()),
        ("mov.b64 %rd1, p0; cvta.param.u64 %rd0, %rd1; ld.u32 %r1, [%rd0+4];", set()),
        ("mov.b64 %rd1, p0; cvta.param.u64 %rd0, %rd1; ld.u32 %r1, [%rd0+8];", {"out of bounds"}),
    ],
)
def test_bounds_of_each_space(access: str, kinds: set[str]) -> None:
    module = ".extern .shared .align 16 .b8 dynamic[]; .const .align 4 .b32 c[4] = {1, 2, 3, 4};"
    module += ".global .align 4 .u32 g[2] = {5, 6};"
    k = small_kernel(
        access + " ret;", "u64", ".shared .align 16 .b8 s[512]; .shared .u32 s2; .local .align 16 .b8 l[16];", module
    )
    report = launch(k, 0, threads=1, shared=64)
    assert report.kinds == kinds, report.findings


# ---- undefined data ---------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "is_reported"),
    [
        ("mov.u32 %r1, 5;", False),
        ("", True),
        ("add.u32 %r1, %r2, 5;", True),
        ("and.b32 %r1, %r2, 0;", False),  # known whatever the other is
        ("and.b32 %r1, %r2, 1;", True),
        ("or.b32 %r1, %r2, -1;", False),
        ("shl.b32 %r1, %r2, 32;", False),
        ("mov.u16 %h0, 1; mov.b32 %r2, {%h0, %h1}; and.b32 %r1, %r2, 0xffff;", False),
        ("mov.u16 %h0, 1; mov.b32 %r2, {%h0, %h1}; mov.b32 {%h2, %h3}, %r2; cvt.u32.u16 %r1, %h2;", False),
        ("mov.u16 %h0, 1; mov.b32 %r2, {%h0, %h1}; mov.b32 {%h2, %h3}, %r2; cvt.u32.u16 %r1, %h3;", True),
        ("mov.u16 %h0, 1; mov.b32 %r2, {%h0, %h1}; add.u32 %r2, %r2, 5; and.b32 %r1, %r2, 0xffff;", False),
        ("mov.u16 %h0, 1; mov.b32 %r2, {%h1, %h0}; add.u32 %r2, %r2, 5; shr.u32 %r1, %r2, 16;", True),
        ("mov.u16 %h0, 1; mov.b32 %r2, {%h1, %h0}; shr.u32 %r1, %r2, 16;", False),
        ("mov.u16 %h0, 1; mov.b32 %r2, {%h1, %h0}; shr.s32 %r1, %r2, 15;", True),
        ("mov.u16 %h0, 1; mov.b32 %r2, {%h0, %h1}; shr.s32 %r2, %r2, 8; and.b32 %r1, %r2, 255;", False),
        ("mov.u16 %h0, 1; mov.b32 %r2, {%h0, %h1}; brev.b32 %r2, %r2; shr.u32 %r1, %r2, 16;", False),
        ("mov.u16 %h0, 1; mov.b32 %r2, {%h0, %h1}; bfi.b32 %r2, 7, %r2, 16, 16; mov.u32 %r1, %r2;", False),
        ("mov.u16 %h0, 1; mov.b32 %r2, {%h0, %h1}; shf.l.wrap.b32 %r2, %r2, 0, 16; mov.u32 %r1, %r2;", True),
        ("mov.u16 %h0, 1; mov.b32 %r2, {%h1, %h0}; shf.l.wrap.b32 %r2, %r2, 0, 16; mov.u32 %r1, %r2;", False),
        ("cvt.s16.s8 %h0, %h1; cvt.u32.u16 %r1, %h0;", True),
        ("mov.u16 %h0, 1; mov.b32 %r2, {%h0, %h1}; cvt.u16.u32 %h2, %r2; cvt.u32.u16 %r1, %h2;", False),
        ("mov.u16 %h0, 1; mov.b32 %r2, {%h0, %h1}; prmt.b32 %r1, %r2, 0, 0x4410;", False),
        ("mov.u16 %h0, 1; mov.b32 %r2, {%h0, %h1}; prmt.b32 %r1, %r2, 0, 0x4420;", True),
        ("mov.u16 %h0, 1; mov.b32 %r2, {%h0, %h1}; bfe.u32 %r1, %r2, 4, 12;", False),
        ("mov.u16 %h0, 1; mov.b32 %r2, {%h0, %h1}; bfe.u32 %r1, %r2, 4, 13;", True),
        ("mov.u32 %r3, 7; setp.eq.u32 %p0, %r3, 7; selp.b32 %r1, %r3, %r2, %p0;", False),
        ("mov.u32 %r3, 7; setp.eq.u32 %p0, %r3, 8; selp.b32 %r1, %r3, %r2, %p0;", True),
        ("mov.u32 %r3, 7; selp.b32 %r1, %r3, %r3, %p0;", False),
        ("mov.u32 %r3, 7; selp.b32 %r1, %r3, 8, %p0;", True),
        ("mov.f32 %f0, 0f3F800000; cvt.rn.bf16x2.f32 %r2, %f1, %f0; and.b32 %r1, %r2, 0xffff;", False),
        ("mov.f32 %f0, 0f3F800000; cvt.rn.bf16x2.f32 %r2, %f0, %f1; and.b32 %r1, %r2, 0xffff;", True),
        ("st.shared.u32 [s], %r2; ld.shared.u32 %r1, [s];", True),
        ("ld.shared.u32 %r1, [s];", True),
        ("st.shared.u16 [s], 3; ld.shared.u16 %h0, [s]; cvt.u32.u16 %r1, %h0;", False),
        ("st.shared.u16 [s], 3; ld.shared.u32 %r1, [s];", True),
        ("ld.local.u32 %r1, [l];", True),
        ("div.u32 %r1, 5, 0;", True),
        ("shfl.sync.idx.b32 %r1, %r2, 0, 31, 1;", True),
    ],
)
def test_undefined_data_in_a_result(body: str, is_reported: bool) -> None:
    k = small_kernel(body + STORE, declarations=".shared .align 4 .b8 s[4]; .local .align 4 .b8 l[4];")
    expect(launch(k, np.zeros(1, np.uint32), threads=1), *["undefined data"] * is_reported)


@pytest.mark.parametrize(
    ("body", "what"),
    [
        ("@%p0 mov.u32 %r1, 5;", "a predicate"),
        ("setp.eq.u32 %p0, %r2, 5; @%p0 bra end;", "a predicate"),
        ("ld.global.u32 %r1, [%rd3];", "an address"),
        ("st.shared.u32 [%r2], 5;", "an address"),
        ("bar.sync %r2;", "a barrier"),
        ("bar.warp.sync %r2;", "the mask of a barrier"),
        ("shfl.sync.idx.b32 %r1, 5, 0, 31, %r2;", "the mask of an exchange"),
    ],
)
def test_undefined_data_elsewhere(body: str, what: str) -> None:
    k = small_kernel(body + "end: ret;", declarations=".shared .align 4 .b8 s[4];")
    report = launch(k, None, threads=32)
    assert "undefined data" in report.kinds
    assert what in report.findings[0].message


def test_an_undefined_predicate_may_not_matter() -> None:
    body = "setp.eq.u32 %p0, %r2, 5; mov.u32 %r3, 1; setp.eq.u32 %p1, %r3, 2;"
    body += "and.pred %p2, %p0, %p1; @%p2 bra end; mov.u32 %r1, 4;"
    expect(launch(small_kernel(body + STORE + "end: ret;"), np.zeros(1, np.uint32), threads=1))


def test_undefined_data_stays_undefined_in_memory() -> None:
    out = on_device(np.zeros(4, np.uint32))
    expect(launch(small_kernel(STORE), out, threads=1), "undefined data")
    assert undefined_bytes(out) == 4
    expect(launch(small_kernel("mov.u32 %r1, 5;" + STORE), out, threads=1))
    assert undefined_bytes(out) == 0


def test_undefined_global_memory() -> None:
    k = small_kernel(
        "ld.param.u64 %rd0, [p0]; ld.param.u64 %rd1, [p1]; ld.global.u32 %r1, [%rd0]; st.global.u32 [%rd1], %r1; ret;",
        "u64 u64",
    )
    out = empty(1, np.uint32)
    assert undefined_bytes(out) == 4
    expect(launch(k, np.ones(1, np.uint32), out, threads=1))
    assert undefined_bytes(out) == 0
    expect(launch(k, empty(1, np.uint32), out, threads=1), "undefined data")


# ---- barriers, masks, progress ----------------------------------------------


@pytest.mark.parametrize(
    ("body", "threads", "kinds"),
    [
        ("setp.lt.u32 %p0, %r0, 16; @%p0 bar.sync 0;", 32, {"divergent barrier"}),
        ("setp.lt.u32 %p0, %r0, 16; @%p0 bra a; bar.sync 0; bra b; a: bar.sync 0; b:", 32, {"divergent barrier"}),
        ("setp.lt.u32 %p0, %r0, 16; @%p0 ret; bar.sync 0;", 32, {"divergent barrier"}),
        ("setp.lt.u32 %p0, %r0, 32; @%p0 bar.sync 0;", 64, set()),  # all of a warp; the other one ends
        ("setp.lt.u32 %p0, %r0, 32; @%p0 bar.sync 0, 64;", 64, {"deadlock"}),
        ("setp.lt.u32 %p0, %r0, 32; @%p0 bar.sync 1; @!%p0 bar.sync 2;", 64, {"deadlock"}),
        ("bar.sync 16;", 32, {"barrier"}),
        ("bar.sync 1, 33;", 32, {"barrier"}),
        ("setp.lt.u32 %p0, %r0, 32; @%p0 bar.sync 1, 64; @!%p0 bar.sync 1, 96;", 64, {"barrier"}),
        ("setp.lt.u32 %p0, %r0, 16; @%p0 bar.warp.sync -1;", 32, set()),  # the others exit, and are not waited for
        (
            "setp.lt.u32 %p0, %r0, 16; @%p0 bra a; bar.warp.sync -1; bra b; a: bar.warp.sync -1; b:",
            32,
            {"deadlock"},
        ),
        ("setp.lt.u32 %p0, %r0, 16; @%p0 bar.warp.sync 0xffff;", 32, set()),
        ("setp.lt.u32 %p0, %r0, 16; @%p0 ret; shfl.sync.idx.b32 %r1, %r0, 20, 31, -1;", 32, set()),
        (
            "setp.lt.u32 %p0, %r0, 16; @%p0 bra a; redux.sync.add.u32 %r1, %r0, -1; bra b; a: bar.warp.sync -1; b:",
            32,
            {"deadlock"},
        ),
        (
            "setp.lt.u32 %p0, %r0, 16; @!%p0 bar.sync 0; shfl.sync.idx.b32 %r1, %r0, 0, 31, -1;",
            32,
            {"divergent barrier"},
        ),
        ("shfl.sync.idx.b32 %r1, %r0, 0, 31, 0xffff;", 32, {"mask"}),
        ("bar.sync 0;", 40, set()),
        ("trap;", 32, {"trap"}),
        ("again: bra again;", 32, {"instruction limit"}),
        ("mov.u32 %r1, %tid.x; brx.idx %r1, targets;", 4, {"out of bounds"}),
    ],
)
def test_barriers_and_progress(body: str, threads: int, kinds: set[str]) -> None:
    text = "mov.u32 %r0, %tid.x; " + body + " ret; t0: ret; targets: .branchtargets t0, t0;"
    report = launch(small_kernel(text), None, threads=threads, max_warp_instructions=10000)
    assert report.kinds == kinds, report.findings


def test_a_block_that_waits_for_another_needs_it_to_run() -> None:
    body = """ld.param.u64 %rd0, [p0]; mov.u32 %r0, %ctaid.x; setp.eq.u32 %p0, %r0, 1; @%p0 bra give;
wait: ld.volatile.global.u32 %r1, [%rd0]; setp.eq.u32 %p1, %r1, 0; @%p1 bra wait; ret;
give: st.volatile.global.u32 [%rd0], 1; ret;"""
    k, flag = small_kernel(body), np.zeros(1, np.uint32)
    expect(launch(k, flag, threads=1, blocks=2, max_warp_instructions=50000), "instruction limit")
    flag[:] = 0
    expect(launch(k, flag, threads=1, blocks=2, resident=2, max_warp_instructions=50000))


def test_lanes_that_wait_for_a_lock_let_its_holder_go_on() -> None:
    body = """ld.param.u64 %rd0, [p0];
again: atom.global.cas.b32 %r1, [%rd0], 0, 1; setp.ne.u32 %p0, %r1, 0; @%p0 bra again;
  ld.volatile.global.u32 %r2, [%rd0+4]; add.u32 %r2, %r2, 1; st.volatile.global.u32 [%rd0+4], %r2;
  membar.gl; atom.global.exch.b32 %r1, [%rd0], 0; ret;"""
    memory = np.zeros(2, np.uint32)
    expect(launch(small_kernel(body), memory, threads=8))
    assert memory[1] == 8


# ---- reports ----------------------------------------------------------------


def test_never_executed_instructions_and_coverage_of_launches() -> None:
    body = "ld.param.u32 %r0, [p0]; setp.eq.u32 %p0, %r0, 0; @%p0 bra zero; mov.u32 %r1, 1; ret;"
    k = small_kernel(body + "zero: mov.u32 %r1, 2; ret;", "u32")
    first = launch(k, 0)
    assert [i.pc for i in first.never_executed()] == [3, 4]
    assert first.merge(launch(k, 1)).never_executed() == []
    assert first.executed[0] == 8


def test_bank_conflicts_and_sectors() -> None:
    body = """mov.u32 %r0, %tid.x; ld.param.u32 %r1, [p1]; mul.lo.u32 %r2, %r0, %r1; mov.u32 %r3, s;
  add.u32 %r3, %r3, %r2; st.shared.u32 [%r3], %r0; ld.param.u64 %rd0, [p0]; cvt.u64.u32 %rd1, %r2;
  add.u64 %rd1, %rd0, %rd1; ld.global.u32 %r4, [%rd1]; ret;"""
    k = small_kernel(body, "u64 u32", ".shared .align 128 .b8 s[4096];")
    for stride, ways, sectors in ((4, 1, 1), (8, 2, 2), (12, 1, 3), (64, 16, 8), (128, 32, 8)):
        store, load = (launch(k, torch.zeros(1024), stride, threads=32).traffic[n] for n in (0, 1))
        assert (store.bank_ways, load.sector_ratio) == (ways, sectors), stride
    same = small_kernel("mov.u32 %r0, 5; st.shared.u32 [s], %r0; ret;", declarations=".shared .align 4 .b8 s[4];")
    assert launch(same, None, threads=32).traffic[0].bank_ways == 1
    body = "mov.u32 %r0, %tid.x; shl.b32 %r1, %r0, 4; mov.u32 %r2, s; add.u32 %r2, %r2, %r1;"
    body += "st.shared.v4.u32 [%r2], {%r0, %r0, %r0, %r0}; ret;"
    wide = small_kernel(body, declarations=".shared .align 16 .b8 s[512];")
    traffic = launch(wide, None, threads=32).traffic[0]
    assert (traffic.wavefronts, traffic.ideal_wavefronts) == (4, 4)


def test_findings_name_lines() -> None:
    text = (
        assemble("""
  .loc 1 12 3
  ld.param.u64 %rd0, [p0];
  .loc 1 13 5, function_name $L__info, inlined_at 1 40 2
  ld.global.u32 %r0, [%rd0];
  ret;""")
        + '\n.file 1 "/some/where/kernel.cu"\n.section .debug_str { $L__info: .b8 1,2 }'
    )
    with pytest.raises(PtxFault) as caught:
        Module(text).kernel().launch((1,), (1,), [None])
    line = text.splitlines().index("  ld.global.u32 %r0, [%rd0];") + 1
    assert re.search(
        rf"out of bounds at ld.global.u32 %r0, \[%rd0\]; \(PTX line {line}, kernel.cu:13, inlined at kernel.cu:40\)",
        str(caught.value),
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid": (1 << 12, 1 << 12)}, "grid of more than"),
        ({"block": (1025,)}, "block of more than 1024"),
        ({"block": (0,)}, "size 0"),
        ({"block": (96,)}, "96 threads, built for up to 64"),
        ({"shared": 200_000}, "shared memory"),
    ],
)
def test_launches_that_a_driver_refuses(options: dict[str, object], message: str) -> None:
    text = assemble("ret;")
    k = Module(text.replace(".param .u64 p0)", ".param .u64 p0) .maxntid 64, 1, 1")).kernel()
    k.launch((1,), (32,), [None])
    with pytest.raises(PtxError, match=message):
        k.launch(**{"grid": (1,), "block": (32,), "args": [None], **options})
    k = Module(text.replace(".param .u64 p0)", ".param .u64 p0) .reqntid 64")).kernel()
    with pytest.raises(PtxError, match="32 threads, built for 64"):
        k.launch((1,), (32,), [None])


def test_arguments_that_do_not_fit() -> None:
    k = small_kernel("ret;", "u64 u32")
    with pytest.raises(ValueError, match="expected 2 arguments, got 1"):
        k.launch((1,), (1,), [None])
    with pytest.raises(ValueError, match="argument 1 has 8 bytes, expected 4"):
        k.launch((1,), (1,), [None, np.zeros(1)])
    with pytest.raises(OverflowError):
        k.launch((1,), (1,), [None, 1 << 40])
