"""Warp-wide exchanges, barriers with results, control flow, and the random schedule."""

from __future__ import annotations

import numpy as np
import pytest
from emulator_kernels import run_body

from tilus.runtime.emulator import EmulatorError, RaceError

TO_OUT = "mad.wide.u32 %d5, %r0, 4, %d0;\nst.global.b32 [%d5], %r6;\n"


def shuffle_by_the_manual(mode: str, lane: int, b: int, c: int) -> tuple[int, bool]:
    """The pseudo code of shfl.sync: (source lane, predicate)."""
    bval, cval, segmask = b & 31, c & 31, c >> 8 & 31
    max_lane = (lane & segmask) | (cval & ~segmask & 31)
    min_lane = lane & segmask
    j, p = {
        "up": (lane - bval, lane - bval >= max_lane),
        "down": (lane + bval, lane + bval <= max_lane),
        "bfly": (lane ^ bval, lane ^ bval <= max_lane),
        "idx": (min_lane | (bval & ~segmask & 31), (min_lane | (bval & ~segmask & 31)) <= max_lane),
    }[mode]
    return (j, p) if p else (lane, p)


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
@pytest.mark.parametrize("width", [32, 16, 8, 2])
def test_shuffles_follow_the_pseudo_code(mode: str, width: int) -> None:
    clamp = (32 - width) << 8 | (0 if mode == "up" else 31)
    for b in (0, 1, 2, 5, 16, 31):
        out = np.zeros((64, 2), np.uint32)
        run_body(
            f"mul.lo.u32 %r1, %r0, 10;\nshfl.sync.{mode}.b32 %r6|%p1, %r1, {b}, {clamp}, -1;\n"
            f"selp.u32 %r7, 1, 0, %p1;\n"
            "mad.wide.u32 %d5, %r0, 8, %d0;\nst.global.v2.b32 [%d5], {%r6, %r7};", out, threads=64,
        )  # fmt: skip
        for thread in range(64):
            source, valid = shuffle_by_the_manual(mode, thread % 32, b, clamp)
            assert out[thread].tolist() == [10 * (thread // 32 * 32 + source), int(valid)]


def test_a_shuffle_with_a_lane_per_thread() -> None:
    out = np.zeros(32, np.uint32)
    run_body("mul.lo.u32 %r1, %r0, 7;\nshfl.sync.idx.b32 %r6, %r0, %r1, 31, -1;\n" + TO_OUT, out)
    assert out.tolist() == [7 * t % 32 for t in range(32)]


def test_a_shuffle_within_a_divergent_half() -> None:
    """The member mask names the lanes that take part; a lane outside of it, or one that is missing, is an error."""
    body = (
        "mov.u32 %r6, 0;\nsetp.lt.u32 %p1, %r0, 16;\n@!%p1 bra END;\n"
        "shfl.sync.bfly.b32 %r6, %r0, {b}, 31, {mask};\nEND:\n" + TO_OUT
    )
    out = np.zeros(32, np.uint32)
    run_body(body.format(b=1, mask=0xFFFF), out)
    assert out.tolist() == [t ^ 1 for t in range(16)] + [0] * 16
    with pytest.raises(EmulatorError, match=r"lanes \[16, 17"):
        run_body(body.format(b=1, mask=-1), out)
    with pytest.raises(EmulatorError, match="lane 8 executes but is not in the member mask 0xff"):
        run_body(body.format(b=1, mask=0xFF), out)
    with pytest.raises(EmulatorError, match="reads from lane 16, which does not execute"):
        run_body(body.format(b=16, mask=0xFFFF), out)


@pytest.mark.parametrize("bound", [0, 5, 31, 32])
def test_votes(bound: int) -> None:
    body = f"setp.lt.u32 %p1, %r0, {bound};\n"
    for mode, want in (("all", bound == 32), ("any", bound > 0), ("uni", bound in (0, 32))):
        out = np.zeros(32, np.uint32)
        run_body(body + f"vote.sync.{mode}.pred %p2, %p1, -1;\nselp.u32 %r6, 1, 0, %p2;\n" + TO_OUT, out)
        assert out.tolist() == [int(want)] * 32
    for negation, want in (("", (1 << bound) - 1), ("!", ~((1 << bound) - 1) & 0xFFFFFFFF)):
        out = np.zeros(32, np.uint32)
        run_body(body + f"vote.sync.ballot.b32 %r6, {negation}%p1, -1;\n" + TO_OUT, out)
        assert out.tolist() == [want] * 32


def test_active_mask_and_election() -> None:
    body = "mov.u32 %r6, 0;\nsetp.ge.u32 %p1, %r0, 7;\n@%p1 activemask.b32 %r6;\n" + TO_OUT
    out = np.zeros(32, np.uint32)
    run_body(body, out)
    assert out.tolist() == [0] * 7 + [0xFFFFFF80] * 25


def test_an_election_has_one_leader_a_warp_and_the_same_one_each_time() -> None:
    """Which lane leads is open: over some seeds it is not always the same, and never one that does not take part."""
    body = (
        "setp.ge.u32 %p3, %r0, 7;\nmov.u32 %r7, 200;\n{guard}elect.sync %r1|%p1, {members};\n"
        "{guard}elect.sync %r2|%p2, {members};\n{guard}selp.u32 %r6, 1, 0, %p1;\n{guard}selp.u32 %r3, 1, 0, %p2;\n"
        "{guard}shl.b32 %r4, %r3, 1;\n{guard}add.u32 %r6, %r6, %r4;\n{guard}shl.b32 %r1, %r1, 8;\n"
        "{guard}add.u32 %r7, %r6, %r1;\nmov.u32 %r6, %r7;\n" + TO_OUT
    )
    leaders: set[int] = set()
    for seed in range(6):
        out = np.zeros(64, np.uint32)
        run_body(body.format(guard="", members=-1), out, threads=64, seed=seed)
        for warp in out.reshape(2, 32):
            leader = int(warp[0]) >> 8
            assert warp.tolist() == [leader << 8 | (3 if lane == leader else 0) for lane in range(32)]
            leaders.add(leader)
        out = np.zeros(32, np.uint32)
        run_body(body.format(guard="@%p3 ", members=0xFFFFFF80), out, seed=seed)
        assert out[:7].tolist() == [200] * 7
        assert sorted(out[7:].tolist() & np.uint32(3)) == [0] * 24 + [3]
    assert len(leaders) > 1


@pytest.mark.parametrize(
    ("operation", "law"),
    [("add.s32", lambda v: sum(v)), ("min.s32", min), ("max.s32", max), ("and.b32", lambda v: np.bitwise_and.reduce(v)),
     ("or.b32", lambda v: np.bitwise_or.reduce(v)), ("xor.b32", lambda v: np.bitwise_xor.reduce(v))],
)  # fmt: skip
def test_warp_reductions_over_member_groups(operation: str, law: object) -> None:
    values = np.random.default_rng(2).integers(-99, 99, 32).astype(np.int32)
    body = (
        "mad.wide.u32 %d5, %r0, 4, %d1;\nld.global.b32 %r1, [%d5];\nsetp.lt.u32 %p1, %r0, 10;\n"
        "selp.b32 %r2, 1023, -1024, %p1;\nredux.sync." + operation + " %r6, %r1, %r2;\n" + TO_OUT
    )
    out = np.zeros(32, np.int32)
    run_body(body, out, values)
    assert callable(law)
    assert out.tolist() == [int(law(values[:10]))] * 10 + [int(law(values[10:]))] * 22


def test_match() -> None:
    out = np.zeros(32, np.uint32)
    run_body("rem.u32 %r1, %r0, 3;\nmatch.any.sync.b32 %r6, %r1, -1;\n" + TO_OUT, out)
    assert out.tolist() == [sum(1 << k for k in range(t % 3, 32, 3)) for t in range(32)]
    run_body("match.all.sync.b32 %r1|%p1, 5, -1;\nselp.b32 %r6, %r1, 0, %p1;\n" + TO_OUT, out)
    assert out.tolist() == [0xFFFFFFFF] * 32


def test_barrier_reductions() -> None:
    body = "setp.lt.u32 %p1, %r0, {};\n{}\n" + TO_OUT
    for bound in (0, 40, 64):
        out = np.zeros(64, np.uint32)
        run_body(body.format(bound, "bar.red.popc.u32 %r6, 0, %p1;"), out, threads=64)
        assert out.tolist() == [bound] * 64
        for kind, want in (("and", bound == 64), ("or", bound > 0)):
            run_body(body.format(bound, f"bar.red.{kind}.pred %p2, 0, %p1;\nselp.u32 %r6, 1, 0, %p2;"), out, threads=64)
            assert out.tolist() == [int(want)] * 64


# Control flow.
def test_a_loop_with_a_trip_count_per_thread_and_reconvergence() -> None:
    """Lanes leave the loop one after another; after it the warp is whole again, or the shuffle would fail."""
    body = (
        "mov.u32 %r1, 0;\nmov.u32 %r2, 0;\nLOOP:\nadd.u32 %r2, %r2, %r1;\nadd.u32 %r1, %r1, 1;\n"
        "setp.le.u32 %p1, %r1, %r0;\n@%p1 bra LOOP;\nshfl.sync.bfly.b32 %r6, %r2, 1, 31, -1;\n" + TO_OUT
    )
    for seed in (None, 0, 1):
        out = np.zeros(96, np.uint32)
        run_body(body, out, threads=96, seed=seed)
        assert out.tolist() == [(t ^ 1) * ((t ^ 1) + 1) // 2 for t in range(96)]


def test_if_else_chains_against_a_table() -> None:
    body = (
        "setp.lt.u32 %p1, %r0, 5;\n@%p1 bra A;\nsetp.lt.u32 %p2, %r0, 20;\n@%p2 bra B;\nmov.u32 %r6, 3;\nbra END;\n"
        "A:\nmov.u32 %r6, 1;\nbra END;\nB:\nmov.u32 %r6, 2;\nEND:\nbar.warp.sync -1;\n" + TO_OUT
    )
    out = np.zeros(32, np.uint32)
    run_body(body, out)
    assert out.tolist() == [1] * 5 + [2] * 15 + [3] * 12


def test_a_uniform_branch_must_be_uniform() -> None:
    body = "setp.lt.u32 %p1, %r0, {};\n@%p1 bra.uni END;\nEND:\n"
    run_body(body.format(32), np.zeros(1, np.uint32), threads=64)
    with pytest.raises(EmulatorError, match="diverge"):
        run_body(body.format(8), np.zeros(1, np.uint32))


def test_every_seed_gives_the_same_results_and_different_orders() -> None:
    """A correct tree reduction through shared memory, blocks and warps in random order."""
    body = (
        "mov.u32 %r8, %ctaid.x;\nmad.lo.u32 %r9, %r8, 128, %r0;\nshl.b32 %r1, %r0, 2;\nmov.u32 %r2, smem;\n"
        "add.u32 %r3, %r2, %r1;\nst.shared.b32 [%r3], %r9;\nmov.u32 %r4, 64;\nLOOP:\nbar.sync 0;\n"
        "setp.lt.u32 %p1, %r0, %r4;\nshl.b32 %r5, %r4, 2;\nadd.u32 %r5, %r3, %r5;\n@%p1 ld.shared.b32 %r6, [%r5];\n"
        "@%p1 ld.shared.b32 %r7, [%r3];\n@%p1 add.u32 %r6, %r6, %r7;\n{}@%p1 st.shared.b32 [%r3], %r6;\n"
        "shr.u32 %r4, %r4, 1;\n"
        "setp.ne.u32 %p2, %r4, 0;\n@%p2 bra LOOP;\nsetp.eq.u32 %p3, %r0, 0;\nmad.wide.u32 %d5, %r8, 4, %d0;\n"
        "@%p3 st.global.b32 [%d5], %r6;\n"
    )
    for seed in (None, 0, 1, 2, 3):
        out = np.zeros(5, np.uint32)
        run_body(body.format(""), out, threads=128, shared=512, grid=(5, 1, 1), seed=seed, max_lanes=256)
        assert out.tolist() == [sum(range(128 * b, 128 * b + 128)) for b in range(5)]
        with pytest.raises(RaceError):
            broken = body.format("").replace("LOOP:\nbar.sync 0;", "bar.sync 0;\nLOOP:\n")
            run_body(broken, out, threads=128, shared=512, grid=(5, 1, 1), seed=seed)


def test_a_block_whose_size_is_no_multiple_of_a_warp() -> None:
    out = np.zeros(45, np.uint32)
    run_body("bar.sync 0;\nmov.u32 %r6, %ntid.x;\nadd.u32 %r6, %r6, %r0;\n" + TO_OUT, out, threads=45)
    assert out.tolist() == [45 + t for t in range(45)]
