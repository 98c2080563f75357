"""Races and early uses of cp.async on the PTX interpreter: found on small kernels that are wrong, not on right ones."""

from __future__ import annotations

import numpy as np
import pytest
from ptx.reference import expect, launch, small_kernel

THREADS = 128

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
    k = small_kernel(
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
    report = launch(
        small_kernel(body, declarations=".shared .align 4 .b8 s[128];"), np.zeros(32, np.uint32), threads=32
    )
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
    expect(launch(small_kernel(body, declarations=".shared .align 4 .b8 s[128];"), out, threads=32))
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
    k = small_kernel(ROUNDS.format(second=second), declarations=".shared .align 4 .b8 s[512];")
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
    k = small_kernel(body, "u64 u32", ".shared .align 4 .b8 s[128];")
    expect(launch(k, None, 0, threads=96))
    expect(launch(k, None, 1, threads=96), "shared race")


def test_a_warp_that_ends_has_arrived_at_every_barrier() -> None:
    body = """mov.u32 %r0, %tid.x; setp.lt.u32 %p0, %r0, 32; @%p0 bra wait; st.shared.u32 [s], 5; ret;
wait: {sync} ld.shared.u32 %r1, [s]; ret;"""
    for sync, kinds in (("bar.sync 0;", ()), ("", ("shared race",))):
        report = launch(small_kernel(body.format(sync=sync), declarations=".shared .u32 s;"), None, threads=64, seed=2)
        expect(report, *kinds)


def test_a_lane_that_takes_no_part_gives_nothing() -> None:
    body = """mov.u32 %r0, %tid.x; setp.gt.u32 %p0, %r0, 15; @%p0 ret;
  shfl.sync.idx.b32 %r1, %r0, {lane}, 31, 0xffff;
  ld.param.u64 %rd0, [p0]; mad.wide.u32 %rd0, %r0, 4, %rd0; st.global.u32 [%rd0], %r1; ret;"""
    for lane, kinds in ((15, ()), (16, ("undefined data",))):
        expect(launch(small_kernel(body.format(lane=lane)), np.zeros(16, np.uint32), threads=32), *kinds)


def test_writes_of_different_values_race_and_of_one_value_do_not() -> None:
    body = "mov.u32 %r0, %tid.x; {value} mov.u32 %r1, s; st.shared.u32 [%r1], %r0; ret;"
    shared = ".shared .align 4 .b8 s[4];"
    expect(launch(small_kernel(body.format(value=""), declarations=shared), None), "shared race")
    expect(launch(small_kernel(body.format(value="and.b32 %r0, %r0, 0;"), declarations=shared), None))


def test_halves_of_a_word_are_separate() -> None:
    body = """mov.u32 %r0, %tid.x; shl.b32 %r1, %r0, 1; mov.u32 %r2, s; add.u32 %r2, %r2, %r1; cvt.u16.u32 %h0, %r0;
  st.shared.u16 [%r2], %h0; ld.shared.u16 %h1, [%r2];
  {more}
  ret;"""
    expect(launch(small_kernel(body.format(more=""), declarations=".shared .align 4 .b8 s[256];"), None))
    wide = "and.b32 %r3, %r2, -4; ld.shared.u32 %r4, [%r3];"
    expect(
        launch(small_kernel(body.format(more=wide), declarations=".shared .align 4 .b8 s[256];"), None), "shared race"
    )


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
    report = launch(small_kernel(GLOBAL.format(body=body)), np.zeros(8, np.uint32), threads=32, blocks=4)
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
    k = small_kernel(
        LAST_BLOCK.format(before=before, fence=fence, after=after), "u64 u64", ".shared .align 4 .b8 s[4];"
    )
    parts, result = np.zeros(128, np.uint32), np.zeros(64, np.uint32)
    report = launch(k, parts, result, threads=32, blocks=4, seed=seed, resident=2 if seed else 1)
    assert report.kinds == kinds, report.findings


def test_launches_are_ordered() -> None:
    k = small_kernel("ld.param.u64 %rd0, [p0]; mov.u32 %r0, %tid.x; st.global.u32 [%rd0], %r0; ret;")
    out = np.zeros(1, np.uint32)
    for _ in range(3):
        expect(launch(k, out, threads=1))


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
    k = small_kernel(body, "u64 u64", ".shared .align 16 .b8 s[2048];")
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
    k = small_kernel(body, "u64 u64 u32", ".shared .align 16 .b8 s[16];")
    source, out = np.arange(1, 17, dtype=np.uint8), np.full(16, 7, np.uint8)
    expect(launch(k, source[:size].copy() if size else None, out, size, threads=1))
    assert out.tolist() == [*range(1, size + 1), *[0] * (16 - size)]


def test_deleting_an_instruction() -> None:
    k = small_kernel(
        NEIGHBOUR.format(sync="bar.sync 0;", distance=64, sync_after=""), declarations=".shared .align 4 .b8 s[512];"
    )
    (barrier,) = k.sync_instructions
    with k.without(barrier):
        assert "shared race" in launch(k, np.zeros(THREADS, np.uint32)).kinds
    expect(launch(k, np.zeros(THREADS, np.uint32)))
