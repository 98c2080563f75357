"""Each check of the PTX interpreter fires on a small kernel that is wrong and is silent on the one that is right."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from ptx import Kernel, Module, PtxError, PtxFault, Report, empty, on_device, undefined_bytes
from ptx.reference import assemble

THREADS = 128


def kernel(body: str, params: str = "u64", declarations: str = "", functions: str = "") -> Kernel:
    return Module(assemble(body, params, declarations, functions)).kernel("test")


def launch(k: Kernel, *args: object, threads: int = THREADS, blocks: int = 1, **options: object) -> Report:
    return k.launch((blocks,), (threads,), args, check=False, **options)


def expect(report: Report, *kinds: str) -> None:
    assert report.kinds == set(kinds), "\n".join(map(str, report.findings))


STORE = "ld.param.u64 %rd0, [p0]; st.global.u32 [%rd0], %r1; ret;"

# ---- races ------------------------------------------------------------------

# Each thread writes a word and reads its neighbour's; {sync} stands between.
NEIGHBOUR = """
  mov.u32 %r0, %tid.x; shl.b32 %r1, %r0, 2; mov.u32 %r2, s; add.u32 %r3, %r2, %r1;
  st.shared.u32 [%r3], %r0;
  {sync}
  add.u32 %r4, %r0, {distance}; and.b32 %r4, %r4, 127; shl.b32 %r4, %r4, 2; add.u32 %r4, %r2, %r4;
  ld.shared.u32 %r5, [%r4];
  {sync_after}
  ld.param.u64 %rd0, [p0]; mad.wide.u32 %rd0, %r0, 4, %rd0; st.global.u32 [%rd0], %r5;
"""


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    ("sync", "distance", "kinds"),
    [
        ("bar.sync 0;", 1, ()),
        ("bar.sync 0;", 64, ()),
        ("barrier.cta.sync.aligned 3;", 64, ()),
        ("bar.sync 0, 128;", 64, ()),
        ("", 1, ("shared race",)),
        ("", 64, ("shared race",)),
        ("bar.warp.sync 0xffffffff;", 32, ("shared race",)),
        ("membar.gl;", 64, ("shared race",)),
    ],
)
def test_a_neighbour_across_warps(sync: str, distance: int, kinds: tuple[str, ...], seed: int) -> None:
    out = np.zeros(THREADS, np.uint32)
    k = kernel(
        NEIGHBOUR.format(sync=sync, distance=distance, sync_after=""), declarations=".shared .align 4 .b8 s[512];"
    )
    report = launch(k, out, seed=seed)
    # What a racing read finds may not have been written at all.
    assert report.kinds - {"undefined data"} == set(kinds), report.findings
    if not kinds:
        assert (out == (np.arange(THREADS) + distance) % THREADS).all()


@pytest.mark.parametrize(
    ("sync", "kinds"),
    [
        ("bar.warp.sync 0xffffffff;", set()),
        ("", {"shared race"}),
        ("bar.warp.sync %r9;", {"shared race"}),  # pairs of lanes; the reader asks for another pair's word
        ("shfl.sync.idx.b32 %r8, %r0, 0, 31, 0xffffffff;", {"shared race"}),  # an exchange does not order memory
    ],
)
def test_a_neighbour_within_a_warp(sync: str, kinds: set[str]) -> None:
    body = """
  mov.u32 %r0, %tid.x; shl.b32 %r1, %r0, 2; mov.u32 %r2, s; add.u32 %r3, %r2, %r1;
  shr.u32 %r8, %r0, 1; shl.b32 %r8, %r8, 1; mov.u32 %r9, 3; shl.b32 %r9, %r9, %r8;
  st.shared.u32 [%r3], %r0;
  """
    body += sync
    body += """
  xor.b32 %r4, %r0, 2; shl.b32 %r4, %r4, 2; add.u32 %r4, %r2, %r4;
  ld.shared.u32 %r5, [%r4];
  ld.param.u64 %rd0, [p0]; mad.wide.u32 %rd0, %r0, 4, %rd0; st.global.u32 [%rd0], %r5;
"""
    report = launch(kernel(body, declarations=".shared .align 4 .b8 s[128];"), np.zeros(32, np.uint32), threads=32)
    assert report.kinds == kinds, report.findings


def test_pairs_of_lanes_may_synchronise_alone() -> None:
    body = """
  mov.u32 %r0, %tid.x; shl.b32 %r1, %r0, 2; mov.u32 %r2, s; add.u32 %r3, %r2, %r1;
  shr.u32 %r8, %r0, 1; shl.b32 %r8, %r8, 1; mov.u32 %r9, 3; shl.b32 %r9, %r9, %r8;
  st.shared.u32 [%r3], %r0;
  bar.warp.sync %r9;
  xor.b32 %r4, %r0, 1; shl.b32 %r4, %r4, 2; add.u32 %r4, %r2, %r4;
  ld.shared.u32 %r5, [%r4];
  ld.param.u64 %rd0, [p0]; mad.wide.u32 %rd0, %r0, 4, %rd0; st.global.u32 [%rd0], %r5;
"""
    out = np.zeros(32, np.uint32)
    expect(launch(kernel(body, declarations=".shared .align 4 .b8 s[128];"), out, threads=32))
    assert (out == np.arange(32) ^ 1).all()


# Two rounds through one buffer: without the second barrier the next round's writes meet this round's reads.
ROUNDS = """
  mov.u32 %r0, %tid.x; shl.b32 %r1, %r0, 2; mov.u32 %r2, s; add.u32 %r3, %r2, %r1;
  xor.b32 %r4, %r1, 256; add.u32 %r4, %r4, %r2;
  mov.u32 %r6, 0; mov.u32 %r7, 0;
again:
  add.u32 %r8, %r0, %r6; st.shared.u32 [%r3], %r8;
  bar.sync 0;
  ld.shared.u32 %r5, [%r4]; add.u32 %r7, %r7, %r5;
  {second}
  add.u32 %r6, %r6, 1; setp.lt.u32 %p0, %r6, 2; @%p0 bra again;
  ld.param.u64 %rd0, [p0]; mad.wide.u32 %rd0, %r0, 4, %rd0; st.global.u32 [%rd0], %r7;
"""


@pytest.mark.parametrize(("second", "kinds"), [("bar.sync 0;", ()), ("", ("shared race",))])
def test_a_buffer_used_again(second: str, kinds: tuple[str, ...]) -> None:
    k = kernel(ROUNDS.format(second=second), declarations=".shared .align 4 .b8 s[512];")
    expect(launch(k, np.zeros(THREADS, np.uint32)), *kinds)


def test_named_barriers_order_only_who_takes_part() -> None:
    """Warps 0 and 1 hand data over at barrier 1; warp 2 reads it, too, and has not waited."""
    body = """
  mov.u32 %r0, %tid.x; shr.u32 %r1, %r0, 5; and.b32 %r9, %r0, 31; shl.b32 %r9, %r9, 2;
  mov.u32 %r2, s; add.u32 %r2, %r2, %r9; setp.eq.u32 %p0, %r1, 0; setp.eq.u32 %p1, %r1, 1; setp.eq.u32 %p2, %r1, 2;
  @!%p0 bra second;
  st.shared.u32 [%r2], %r0;
  bar.arrive 1, 64;
  bra.uni done;
second:
  @!%p1 bra third;
  bar.sync 1, 64;
  ld.shared.u32 %r5, [%r2];
  bra.uni done;
third:
  ld.param.u32 %r6, [p1]; setp.eq.u32 %p3, %r6, 0; @%p3 bra done;
  ld.shared.u32 %r5, [%r2];
done:
  ret;
"""
    k = kernel(body, "u64 u32", ".shared .align 4 .b8 s[128];")
    expect(launch(k, None, 0, threads=96))
    expect(launch(k, None, 1, threads=96), "shared race")


def test_a_warp_that_ends_has_arrived_at_every_barrier() -> None:
    body = """mov.u32 %r0, %tid.x; setp.lt.u32 %p0, %r0, 32; @%p0 bra wait; st.shared.u32 [s], 5; ret;
wait: {sync} ld.shared.u32 %r1, [s]; ret;"""
    for sync, kinds in (("bar.sync 0;", ()), ("", ("shared race",))):
        report = launch(kernel(body.format(sync=sync), declarations=".shared .u32 s;"), None, threads=64, seed=2)
        expect(report, *kinds)


def test_a_lane_that_takes_no_part_gives_nothing() -> None:
    body = """mov.u32 %r0, %tid.x; setp.gt.u32 %p0, %r0, 15; @%p0 ret;
  shfl.sync.idx.b32 %r1, %r0, {lane}, 31, 0xffff;
  ld.param.u64 %rd0, [p0]; mad.wide.u32 %rd0, %r0, 4, %rd0; st.global.u32 [%rd0], %r1; ret;"""
    for lane, kinds in ((15, ()), (16, ("undefined data",))):
        expect(launch(kernel(body.format(lane=lane)), np.zeros(16, np.uint32), threads=32), *kinds)


def test_undefined_data_stays_undefined_in_memory() -> None:
    out = on_device(np.zeros(4, np.uint32))
    expect(launch(kernel(STORE), out, threads=1), "undefined data")
    assert undefined_bytes(out) == 4
    expect(launch(kernel("mov.u32 %r1, 5;" + STORE), out, threads=1))
    assert undefined_bytes(out) == 0


def test_writes_of_different_values_race_and_of_one_value_do_not() -> None:
    body = "mov.u32 %r0, %tid.x; {value} mov.u32 %r1, s; st.shared.u32 [%r1], %r0; ret;"
    shared = ".shared .align 4 .b8 s[4];"
    expect(launch(kernel(body.format(value=""), declarations=shared), None), "shared race")
    expect(launch(kernel(body.format(value="and.b32 %r0, %r0, 0;"), declarations=shared), None))


def test_halves_of_a_word_are_separate() -> None:
    body = """mov.u32 %r0, %tid.x; shl.b32 %r1, %r0, 1; mov.u32 %r2, s; add.u32 %r2, %r2, %r1; cvt.u16.u32 %h0, %r0;
  st.shared.u16 [%r2], %h0; ld.shared.u16 %h1, [%r2];
  {more}
  ret;"""
    expect(launch(kernel(body.format(more=""), declarations=".shared .align 4 .b8 s[256];"), None))
    wide = "and.b32 %r3, %r2, -4; ld.shared.u32 %r4, [%r3];"
    expect(launch(kernel(body.format(more=wide), declarations=".shared .align 4 .b8 s[256];"), None), "shared race")


GLOBAL = """
  ld.param.u64 %rd0, [p0]; mov.u32 %r0, %ctaid.x; mov.u32 %r1, %tid.x; setp.ne.u32 %p0, %r1, 0; @%p0 ret;
  {body}
  ret;
"""


@pytest.mark.parametrize(
    ("body", "kinds"),
    [
        ("st.global.u32 [%rd0], %r0;", {"global race"}),
        ("atom.global.add.u32 %r5, [%rd0], 1;", set()),
        ("red.global.add.u32 [%rd0], 1;", set()),
        ("ld.global.u32 %r5, [%rd0];", set()),
        ("ld.global.u32 %r5, [%rd0]; st.global.u32 [%rd0+4], %r5;", set()),  # the same value from each block
        ("ld.global.u32 %r5, [%rd0]; setp.eq.u32 %p1, %r0, 3; @%p1 st.global.u32 [%rd0], 9;", {"global race"}),
        (
            "setp.gt.u32 %p2, %r0, 1; @%p2 ret; ld.global.u32 %r5, [%rd0];"
            "setp.eq.u32 %p1, %r0, 1; @%p1 st.global.u32 [%rd0], 9;",
            {"global race"},
        ),
        ("setp.eq.u32 %p1, %r0, 0; @!%p1 st.global.u32 [%rd0], 9; @%p1 ld.global.u32 %r5, [%rd0];", {"global race"}),
        ("atom.global.add.u32 %r5, [%rd0], 1; ld.global.u32 %r6, [%rd0];", {"global race"}),
        ("atom.global.add.u32 %r5, [%rd0], 1; ld.volatile.global.u32 %r6, [%rd0];", set()),
        ("mad.wide.u32 %rd1, %r0, 4, %rd0; st.global.u32 [%rd1], %r0;", set()),
    ],
)
def test_blocks_race_in_global_memory(body: str, kinds: set[str]) -> None:
    report = launch(kernel(GLOBAL.format(body=body)), np.zeros(8, np.uint32), threads=32, blocks=4)
    assert report.kinds == kinds, report.findings


# Each block writes a result; the last one to count itself adds them up.
LAST_BLOCK = """
  ld.param.u64 %rd0, [p0]; ld.param.u64 %rd1, [p1]; mov.u32 %r0, %ctaid.x; mov.u32 %r1, %tid.x;
  shl.b32 %r2, %r0, 5; add.u32 %r2, %r2, %r1; mad.wide.u32 %rd2, %r2, 4, %rd0; st.global.u32 [%rd2], %r2;
  {before}
  bar.sync 0;
  setp.ne.u32 %p0, %r1, 0; @%p0 bra wait;
  {fence}
  atom.global.add.u32 %r3, [%rd1], 1;
  {after}
  st.shared.u32 [s], %r3;
wait:
  bar.sync 0;
  ld.shared.u32 %r3, [s]; setp.ne.u32 %p1, %r3, 3; @%p1 ret;
  xor.b32 %r4, %r1, 31; mad.wide.u32 %rd3, %r4, 4, %rd0; ld.global.u32 %r5, [%rd3]; ld.global.u32 %r6, [%rd3+128];
  add.u32 %r5, %r5, %r6; mad.wide.u32 %rd4, %r1, 4, %rd1; st.global.u32 [%rd4+64], %r5;
  ret;
"""


@pytest.mark.parametrize("seed", [0, 5])
@pytest.mark.parametrize(
    ("before", "fence", "after", "kinds"),
    [
        ("", "membar.gl;", "membar.gl;", set()),
        ("", "fence.acq_rel.gpu;", "fence.acq_rel.gpu;", set()),
        ("", "", "membar.gl;", {"global race"}),
        ("", "membar.gl;", "", {"global race"}),
        ("", "membar.cta;", "membar.cta;", {"global race"}),
        ("membar.gl;", "", "membar.gl;", {"global race"}),  # a fence of others, before the barrier, is not enough
    ],
)
def test_the_last_block_needs_fences(before: str, fence: str, after: str, kinds: set[str], seed: int) -> None:
    k = kernel(LAST_BLOCK.format(before=before, fence=fence, after=after), "u64 u64", ".shared .align 4 .b8 s[4];")
    parts, result = np.zeros(128, np.uint32), np.zeros(64, np.uint32)
    report = launch(k, parts, result, threads=32, blocks=4, seed=seed, resident=2 if seed else 1)
    assert report.kinds == kinds, report.findings


def test_launches_are_ordered() -> None:
    k = kernel("ld.param.u64 %rd0, [p0]; mov.u32 %r0, %tid.x; st.global.u32 [%rd0], %r0; ret;")
    out = np.zeros(1, np.uint32)
    for _ in range(3):
        expect(launch(k, out, threads=1))


# ---- bounds and alignment ---------------------------------------------------


@pytest.mark.parametrize(("count", "kinds"), [(THREADS, ()), (THREADS - 1, ("out of bounds",))])
@pytest.mark.parametrize(
    "access", ["st.global.u32 [%rd0], %r0;", "ld.global.u32 %r1, [%rd0];", "atom.global.add.u32 %r1, [%rd0], 1;"]
)
def test_one_past_the_end(access: str, count: int, kinds: tuple[str, ...]) -> None:
    k = kernel(f"ld.param.u64 %rd0, [p0]; mov.u32 %r0, %tid.x; mad.wide.u32 %rd0, %r0, 4, %rd0; {access} ret;")
    report = launch(k, np.zeros(count, np.uint32))
    expect(report, *kinds)
    if kinds:
        assert "3 bytes behind the end" in report.findings[0].message  # of its last byte
        assert report.findings[0].lanes == 1 << 31
        assert report.findings[0].warp == 3


def test_a_view_has_its_own_bounds() -> None:
    k = kernel(
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
    k = kernel("ld.param.u64 %rd0, [p0]; ld.global.u32 %r0, [%rd0]; ret;")
    expect(launch(k, whole[4:8]))
    with pytest.raises(ValueError, match="reaches beyond"):
        launch(k, part.base)


def test_null_and_free_memory() -> None:
    k = kernel("ld.param.u64 %rd0, [p0]; ld.global.u32 %r0, [%rd0]; ret;")
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
    k = kernel(
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
    k = kernel(body + STORE, declarations=".shared .align 4 .b8 s[4]; .local .align 4 .b8 l[4];")
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
    k = kernel(body + "end: ret;", declarations=".shared .align 4 .b8 s[4];")
    report = launch(k, None, threads=32)
    assert "undefined data" in report.kinds
    assert what in report.findings[0].message


def test_an_undefined_predicate_may_not_matter() -> None:
    body = "setp.eq.u32 %p0, %r2, 5; mov.u32 %r3, 1; setp.eq.u32 %p1, %r3, 2;"
    body += "and.pred %p2, %p0, %p1; @%p2 bra end; mov.u32 %r1, 4;"
    expect(launch(kernel(body + STORE + "end: ret;"), np.zeros(1, np.uint32), threads=1))


def test_undefined_global_memory() -> None:
    k = kernel(
        "ld.param.u64 %rd0, [p0]; ld.param.u64 %rd1, [p1]; ld.global.u32 %r1, [%rd0]; st.global.u32 [%rd1], %r1; ret;",
        "u64 u64",
    )
    out = empty(1, np.uint32)
    assert undefined_bytes(out) == 4
    expect(launch(k, np.ones(1, np.uint32), out, threads=1))
    assert undefined_bytes(out) == 0
    expect(launch(k, empty(1, np.uint32), out, threads=1), "undefined data")


# ---- cp.async ---------------------------------------------------------------

OTHER = "xor.b32 %r8, %r1, 1024; add.u32 %r8, %r8, %r2;"  # where the thread 64 further on copies to
READ = "st.shared.v4.u32 [%r3], {%r0, %r0, %r0, %r0}; bar.sync 0; " + OTHER + "ld.shared.u32 %r9, [%r8];"
COPY = """
  ld.param.u64 %rd0, [p0]; ld.param.u64 %rd1, [p1]; mov.u32 %r0, %tid.x; shl.b32 %r1, %r0, 4;
  mov.u32 %r2, s; add.u32 %r3, %r2, %r1;
  cvt.u64.u32 %rd2, %r1; add.u64 %rd3, %rd0, %rd2; add.u64 %rd4, %rd1, %rd2;
  {before}
  cp.async.cg.shared.global [%r3], [%rd3], 16;
  cp.async.commit_group;
  {between}
  ld.shared.v4.u32 {{%r4, %r5, %r6, %r7}}, [{from_}];
  st.global.v4.u32 [%rd4], {{%r4, %r5, %r6, %r7}};
  ret;
"""


@pytest.mark.parametrize(
    ("before", "between", "from_", "kinds"),
    [
        ("", "cp.async.wait_group 0;", "%r3", set()),
        ("", "cp.async.wait_all;", "%r3", set()),
        ("", "", "%r3", {"early use"}),
        ("", "cp.async.wait_group 1;", "%r3", {"early use"}),
        ("", "bar.sync 0;", "%r3", {"early use"}),
        ("cp.async.commit_group;", "cp.async.wait_group 1;", "%r3", {"early use"}),
        ("", "cp.async.commit_group; cp.async.wait_group 1;", "%r3", set()),
        ("", "st.shared.u32 [%r3], 1; cp.async.wait_all;", "%r3", {"early use"}),
        ("", "st.global.u32 [%rd3], %r0; cp.async.wait_all;", "%r3", {"early use"}),
        # Another thread's copy needs a barrier behind the wait.
        (OTHER, "cp.async.wait_all; bar.sync 0;", "%r8", set()),
        (OTHER, "bar.sync 0; cp.async.wait_all;", "%r8", {"early use", "shared race"}),
        # And so does a copy over what another thread may still read.
        (
            READ,
            "cp.async.wait_all; bar.sync 0;",
            "%r3",
            {"shared race"},
        ),
        (
            READ + "bar.sync 0;",
            "cp.async.wait_all; bar.sync 0;",
            "%r3",
            set(),
        ),
    ],
)
def test_asynchronous_copies(before: str, between: str, from_: str, kinds: set[str]) -> None:
    body = COPY.format(before=before, between=between, from_=from_)
    k = kernel(body, "u64 u64", ".shared .align 16 .b8 s[2048];")
    source, out = np.arange(4 * THREADS, dtype=np.uint32) + 1000, np.zeros(4 * THREADS, np.uint32)
    report = launch(k, source, out)
    assert report.kinds - {"undefined data"} == kinds, report.findings
    if not kinds and from_ == "%r3":
        assert (out == source).all()


@pytest.mark.parametrize("size", [0, 5, 16])
def test_the_rest_of_a_copy_is_zero(size: int) -> None:
    body = COPY.format(before="ld.param.u32 %r10, [p2];", between="cp.async.wait_all;", from_="%r3").replace(
        "16;\n  cp.async.commit", "16, %r10;\n  cp.async.commit"
    )
    k = kernel(body, "u64 u64 u32", ".shared .align 16 .b8 s[16];")
    source, out = np.arange(1, 17, dtype=np.uint8), np.full(16, 7, np.uint8)
    expect(launch(k, source[:size].copy() if size else None, out, size, threads=1))
    assert out.tolist() == [*range(1, size + 1), *[0] * (16 - size)]


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
        ("setp.lt.u32 %p0, %r0, 16; @%p0 bar.warp.sync 0xffffffff;", 32, {"deadlock"}),
        ("setp.lt.u32 %p0, %r0, 16; @%p0 bar.warp.sync 0xffff;", 32, set()),
        ("setp.lt.u32 %p0, %r0, 16; @%p0 shfl.sync.idx.b32 %r1, %r0, 0, 31, 0xffffffff;", 32, {"deadlock"}),
        ("shfl.sync.idx.b32 %r1, %r0, 0, 31, 0xffff;", 32, {"mask"}),
        ("bar.sync 0;", 40, set()),
        ("trap;", 32, {"trap"}),
        ("again: bra again;", 32, {"instruction limit"}),
        ("mov.u32 %r1, %tid.x; brx.idx %r1, targets;", 4, {"out of bounds"}),
    ],
)
def test_barriers_and_progress(body: str, threads: int, kinds: set[str]) -> None:
    text = "mov.u32 %r0, %tid.x; " + body + " ret; t0: ret; targets: .branchtargets t0, t0;"
    report = launch(kernel(text), None, threads=threads, max_warp_instructions=10000)
    assert report.kinds == kinds, report.findings


def test_a_block_that_waits_for_another_needs_it_to_run() -> None:
    body = """ld.param.u64 %rd0, [p0]; mov.u32 %r0, %ctaid.x; setp.eq.u32 %p0, %r0, 1; @%p0 bra give;
wait: ld.volatile.global.u32 %r1, [%rd0]; setp.eq.u32 %p1, %r1, 0; @%p1 bra wait; ret;
give: st.volatile.global.u32 [%rd0], 1; ret;"""
    k, flag = kernel(body), np.zeros(1, np.uint32)
    expect(launch(k, flag, threads=1, blocks=2, max_warp_instructions=50000), "instruction limit")
    flag[:] = 0
    expect(launch(k, flag, threads=1, blocks=2, resident=2, max_warp_instructions=50000))


def test_lanes_that_wait_for_a_lock_let_its_holder_go_on() -> None:
    body = """ld.param.u64 %rd0, [p0];
again: atom.global.cas.b32 %r1, [%rd0], 0, 1; setp.ne.u32 %p0, %r1, 0; @%p0 bra again;
  ld.volatile.global.u32 %r2, [%rd0+4]; add.u32 %r2, %r2, 1; st.volatile.global.u32 [%rd0+4], %r2;
  membar.gl; atom.global.exch.b32 %r1, [%rd0], 0; ret;"""
    memory = np.zeros(2, np.uint32)
    expect(launch(kernel(body), memory, threads=8))
    assert memory[1] == 8


# ---- reports ----------------------------------------------------------------


def test_never_executed_instructions_and_coverage_of_launches() -> None:
    body = "ld.param.u32 %r0, [p0]; setp.eq.u32 %p0, %r0, 0; @%p0 bra zero; mov.u32 %r1, 1; ret;"
    k = kernel(body + "zero: mov.u32 %r1, 2; ret;", "u32")
    first = launch(k, 0)
    assert [i.pc for i in first.never_executed()] == [3, 4]
    assert first.merge(launch(k, 1)).never_executed() == []
    assert first.executed[0] == 8


def test_bank_conflicts_and_sectors() -> None:
    body = """mov.u32 %r0, %tid.x; ld.param.u32 %r1, [p1]; mul.lo.u32 %r2, %r0, %r1; mov.u32 %r3, s;
  add.u32 %r3, %r3, %r2; st.shared.u32 [%r3], %r0; ld.param.u64 %rd0, [p0]; cvt.u64.u32 %rd1, %r2;
  add.u64 %rd1, %rd0, %rd1; ld.global.u32 %r4, [%rd1]; ret;"""
    k = kernel(body, "u64 u32", ".shared .align 128 .b8 s[4096];")
    for stride, ways, sectors in ((4, 1, 1), (8, 2, 2), (12, 1, 3), (64, 16, 8), (128, 32, 8)):
        store, load = (launch(k, torch.zeros(1024), stride, threads=32).traffic[n] for n in (0, 1))
        assert (store.bank_ways, load.sector_ratio) == (ways, sectors), stride
    same = kernel("mov.u32 %r0, 5; st.shared.u32 [s], %r0; ret;", declarations=".shared .align 4 .b8 s[4];")
    assert launch(same, None, threads=32).traffic[0].bank_ways == 1
    body = "mov.u32 %r0, %tid.x; shl.b32 %r1, %r0, 4; mov.u32 %r2, s; add.u32 %r2, %r2, %r1;"
    body += "st.shared.v4.u32 [%r2], {%r0, %r0, %r0, %r0}; ret;"
    wide = kernel(body, declarations=".shared .align 16 .b8 s[512];")
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


def test_deleting_an_instruction() -> None:
    k = kernel(
        NEIGHBOUR.format(sync="bar.sync 0;", distance=64, sync_after=""), declarations=".shared .align 4 .b8 s[512];"
    )
    (barrier,) = k.sync_instructions
    with k.without(barrier):
        assert "shared race" in launch(k, np.zeros(THREADS, np.uint32)).kinds
    expect(launch(k, np.zeros(THREADS, np.uint32)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid": (1 << 12, 1 << 12)}, "grid of more than"),
        ({"block": (1025,)}, "block of more than 1024"),
        ({"block": (0,)}, "size 0"),
        ({"block": (128,)}, "built for 64"),
        ({"shared": 200_000}, "shared memory"),
    ],
)
def test_launches_that_a_driver_refuses(options: dict[str, object], message: str) -> None:
    k = Module(assemble("ret;").replace(".param .u64 p0)", ".param .u64 p0) .maxntid 64, 1, 1")).kernel()
    with pytest.raises(PtxError, match=message):
        k.launch(**{"grid": (1,), "block": (32,), "args": [None], **options})


def test_arguments_that_do_not_fit() -> None:
    k = kernel("ret;", "u64 u32")
    with pytest.raises(ValueError, match="expected 2 arguments, got 1"):
        k.launch((1,), (1,), [None])
    with pytest.raises(ValueError, match="argument 1 has 8 bytes, expected 4"):
        k.launch((1,), (1,), [None, np.zeros(1)])
    with pytest.raises(OverflowError):
        k.launch((1,), (1,), [None, 1 << 40])
