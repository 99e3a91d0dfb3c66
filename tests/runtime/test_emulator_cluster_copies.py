"""mbarriers and bulk copies across the blocks of a cluster."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from async_kernels import kernel

from tilus.runtime.emulator import DeadlockError, EmulatorError, RaceError, TensorMap, run_kernel

SEEDS = (None, 0, 1, 2, 3)
CLUSTER = 2
BARRIER = "barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;\n"
INIT = "@%p0 mbarrier.init.shared::cta.b64 [bars], {count};\n@%p0 fence.mbarrier_init.release.cluster;\n"
RANK = (
    "mov.u32 %r4, %cluster_ctarank;\nmov.u32 %r5, %ctaid.x;\nmov.u32 %r50, smem;\nmov.u32 %r51, bars;\n"
    "ld.param.u64 %d0, [out];\nld.param.u64 %d1, [in0];\n"
)
OTHER = "xor.b32 %r6, %r4, 1;\nmapa.shared::cluster.u32 %r52, %r50, %r6;\nmapa.shared::cluster.u32 %r53, %r51, %r6;\n"
WAIT = "WAIT:\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 %p3, [bars], 0;\n@!%p3 bra WAIT;\n"
# Word of the thread in the 128 bytes at smem -> out[block][thread].
OUT = (
    "shl.b32 %r20, %r0, 2;\nadd.u32 %r21, %r50, %r20;\nld.shared.b32 %r22, [%r21];\n"
    "mad.lo.u32 %r23, %r5, 32, %r0;\nmad.wide.u32 %d5, %r23, 4, %d0;\nst.global.b32 [%d5], %r22;\n"
)
# in0 is [blocks][32] words: the address of this block's row.
ROW = "mul.wide.u32 %d6, %r5, 128;\nadd.s64 %d6, %d6, %d1;\n"


def run(body: str, *, blocks: int = 4, seed: int | None = 0, map_: TensorMap | None = None) -> Any:
    out = np.zeros((blocks, 32), np.uint32)
    source = np.arange(32 * blocks, dtype=np.uint32).reshape(blocks, 32) + 1000
    params = ".param .u64 out, .param .u64 in0" + (", .param .align 64 .b8 map[128]" if map_ else "")
    args = [out, source, *([map_] if map_ else [])]
    run_kernel(kernel(body, params=params, threads=32), None, (blocks, 1, 1), args, seed=seed, cluster=CLUSTER)
    return out, source


def right(body: str, rows: list[int], **options: Any) -> None:
    """Each block gets that row of the source."""
    for seed in SEEDS:
        out, source = run(body, seed=seed, **options)
        assert out.tolist() == source[rows].tolist()


def wrong(body: str, message: str, kind: type[Exception] = EmulatorError, **options: Any) -> None:
    for seed in SEEDS:
        with pytest.raises(kind, match=message):
            run(body, seed=seed, **options)


def without(part: str, body: str) -> str:
    assert body.count(part) == 1
    return body.replace(part, "")


# Each thread stores its word of the block's row into the other block, then arrives at an mbarrier there.
PUSH = (
    RANK + OTHER + ROW + INIT.format(count=32) + BARRIER
    + "mad.wide.u32 %d7, %r0, 4, %d6;\nld.global.b32 %r30, [%d7];\nshl.b32 %r31, %r0, 2;\nadd.u32 %r31, %r31, %r52;\n"
    + "st.shared::cluster.b32 [%r31], %r30;\nmbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r53];\n"
    + WAIT + OUT + "bar.warp.sync -1;\n"
)  # fmt: skip
SWAPPED = [1, 0, 3, 2]


def test_arrivals_at_mbarriers_of_other_blocks() -> None:
    right(PUSH + BARRIER, SWAPPED)
    right(PUSH, SWAPPED)  # a block leaves when it has seen the others' arrivals, which are their last accesses
    wrong(PUSH.replace(".release.cluster.shared", ".relaxed.cluster.shared"), "race: reads", RaceError)
    wrong(PUSH.replace("bars], 32", "bars], 31"), "more arrivals|has begun|again|race|exits")
    wrong(PUSH.replace("bars], 32", "bars], 33"), "lacks 1 of 33 arrivals", DeadlockError)
    wrong(PUSH.replace(BARRIER, ""), "need not have started|no mbarrier is initialised", EmulatorError)
    late = PUSH.replace(INIT.format(count=32) + BARRIER, BARRIER + INIT.format(count=32))
    wrong(late, "no mbarrier is initialised|nothing that orders it after its initialisation")


@pytest.mark.parametrize("arrives", [".release.cluster", ".release.cta", ""])
@pytest.mark.parametrize("waits", [".acquire.cluster", ".acquire.cta", ""])
def test_both_sides_need_the_scope_of_the_cluster(arrives: str, waits: str) -> None:
    """For what threads wrote to be seen in another block. Without a scope it is that of the block (PTX ISA, mbarrier)."""
    body = PUSH.replace(".release.cluster.shared", f"{arrives}.shared").replace(".acquire.cluster", waits) + BARRIER
    if (arrives, waits) == (".release.cluster", ".acquire.cluster"):
        right(body, SWAPPED)
    else:
        wrong(body, "race: reads", RaceError)


def test_a_relaxed_barrier_publishes_mbarriers_after_their_fence() -> None:
    relaxed = BARRIER.replace("release", "relaxed")
    right(PUSH.replace(BARRIER, relaxed) + BARRIER, SWAPPED)
    no_fence = without("@%p0 fence.mbarrier_init.release.cluster;\n", PUSH)
    wrong(no_fence.replace(BARRIER, relaxed), "nothing that orders it after its initialisation")


def test_a_remote_arrival_gives_no_state() -> None:
    body = PUSH.replace(".shared::cluster.b64 _,", ".shared::cluster.b64 %d9,")
    wrong(body, "gives no state")


EXPECT = "@%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [bars], 128;\n"
# Block 0 of each cluster loads its row into both blocks.
MULTICAST = (
    RANK + ROW + INIT.format(count=1) + BARRIER + EXPECT + "setp.eq.and.u32 %p4, %r4, 0, %p0;\nmov.b16 %h1, 3;\n"
    + "@%p4 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
    + "[smem], [%d6], 128, [bars], %h1;\n" + WAIT + OUT
)  # fmt: skip


def test_multicast() -> None:
    right(MULTICAST, [0, 0, 2, 2])
    wrong(MULTICAST.replace("mov.b16 %h1, 3", "mov.b16 %h1, 1"), "lacks 0 of 1 arrivals and 128 bytes", DeadlockError)
    wrong(MULTICAST.replace("mov.b16 %h1, 3", "mov.b16 %h1, 4"), "mask 0x4, in a cluster of 2")
    wrong(without(BARRIER, MULTICAST), "need not have started|no mbarrier|exits", EmulatorError)
    wrong(without(WAIT, MULTICAST), "in flight|uninitialised|exits", EmulatorError)


def test_multicast_of_a_tensor() -> None:
    load = "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
    load += "[smem], [%d10, {%r33, %r5}], [bars], %h1;\n"
    body = MULTICAST.replace(MULTICAST[MULTICAST.index("cp.async") : MULTICAST.index(WAIT)], load)
    map_ = TensorMap(1, 0, 2, 4, 0, (32, 4), (128,), (32, 1))
    right("mov.u32 %r33, 0;\nmov.b64 %d9, map;\ncvta.param.u64 %d10, %d9;\n" + body, [0, 0, 2, 2], map_=map_)


def test_a_copy_into_another_block() -> None:
    copy = "@%p0 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r52], [%d6], 128, [%r53];\n"
    body = RANK + OTHER + ROW + INIT.format(count=1) + BARRIER + EXPECT + copy + WAIT + OUT
    right(body, SWAPPED)
    wrong(body.replace("[%r53]", "[bars]"), "completes an mbarrier of block")


def test_a_copy_from_block_to_block() -> None:
    store = "mad.wide.u32 %d7, %r0, 4, %d6;\nld.global.b32 %r30, [%d7];\nshl.b32 %r31, %r0, 2;\n"
    store += "add.u32 %r31, %r31, %r50;\nst.shared.b32 [%r31+1024], %r30;\nfence.proxy.async;\nbar.warp.sync -1;\n"
    copy = "@%p0 cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes "
    copy += "[%r52], [%r54], 128, [%r53];\n"
    body = RANK + OTHER + ROW + INIT.format(count=1) + BARRIER + store + EXPECT + "add.u32 %r54, %r50, 1024;\n"
    body += copy + WAIT + OUT
    right(body + BARRIER, SWAPPED)
    wrong(without("fence.proxy.async;\n", body) + BARRIER, "without a fence.proxy.async")
    wrong(without("bar.warp.sync -1;\n", body) + BARRIER, "race: reads", RaceError)


# A buffer that block 0 fills for both blocks again and again: both blocks release it at block 0's second mbarrier.
STEPS = 5
PIPELINE = (
    RANK + "@%p0 mbarrier.init.shared::cta.b64 [bars], 1;\n@%p0 mbarrier.init.shared::cta.b64 [bars+8], 2;\n"
    + "@%p0 fence.mbarrier_init.release.cluster;\n" + BARRIER
    + "mov.u32 %r6, 0;\nmapa.shared::cluster.u32 %r53, %r51, %r6;\nmov.b16 %h1, 3;\nmov.u32 %r10, 0;\nmov.u32 %r11, 0;\n"
    + "mov.u32 %r24, 0;\nsetp.eq.and.u32 %p4, %r4, 0, %p0;\nshl.b32 %r20, %r0, 2;\nadd.u32 %r21, %r50, %r20;\nLOOP:\n"
    + EXPECT + "xor.b32 %r12, %r11, 1;\n@!%p4 bra FULL;\n"
    + "EMPTY:\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 %p3, [bars+8], %r12;\n@!%p3 bra EMPTY;\n"
    + "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
    + "[smem], [%d1], 128, [bars], %h1;\nadd.s64 %d1, %d1, 128;\nFULL:\n"
    + "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 %p3, [bars], %r11;\n@!%p3 bra FULL;\n"
    + "ld.shared.b32 %r22, [%r21];\nmad.lo.u32 %r24, %r24, 3, %r22;\nfence.acquire.cta;\nbar.warp.sync -1;\n"
    + "@%p0 mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r53+8];\n"
    + f"xor.b32 %r11, %r11, 1;\nadd.u32 %r10, %r10, 1;\nsetp.lt.u32 %p5, %r10, {STEPS};\n@%p5 bra LOOP;\n"
    + "mad.lo.u32 %r23, %r5, 32, %r0;\nmad.wide.u32 %d5, %r23, 4, %d0;\nst.global.b32 [%d5], %r24;\n"
)  # fmt: skip


def pipeline(body: str, seed: int | None) -> None:
    out, source = np.zeros((4, 32), np.uint32), np.arange(32 * STEPS, dtype=np.uint32).reshape(STEPS, 32)
    run_kernel(kernel(body), None, (4, 1, 1), [out, source], seed=seed, cluster=CLUSTER)
    total = np.zeros(32, np.uint32)
    for row in source:
        total = total * np.uint32(3) + row
    assert out.tolist() == [total.tolist()] * 4


def test_a_buffer_that_is_filled_by_multicast_again_and_again() -> None:
    for seed in (*SEEDS, *range(4, 10)):
        pipeline(PIPELINE + BARRIER, seed)
    for lacking, message in (
        ("bar.warp.sync -1;\n", r"race|has read"),
        ("fence.acquire.cta;\n", r"does not wait for loads that are under way\n  read by .*block . of the cluster"),
        (BARRIER, r"exits with nothing that orders|has exited|exits"),
        ("EMPTY:\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 %p3, [bars+8], %r12;\n@!%p3 bra EMPTY;\n",
         r"race|in flight|bytes"),
    ):  # fmt: skip
        body = PIPELINE if lacking is BARRIER else without(lacking, PIPELINE) + BARRIER
        for seed in SEEDS:
            with pytest.raises(EmulatorError, match=message):
                pipeline(body, seed)


NEAR = PIPELINE.replace(".release.cluster.shared", ".shared").replace(".acquire.cluster.", ".") + BARRIER


def test_reads_are_over_at_any_scope() -> None:
    """So a buffer that threads have only read may be filled again, and one that they have written may not."""
    for seed in (*SEEDS, *range(4, 10)):
        pipeline(NEAR, seed)
    arrival = "@%p0 mbarrier.arrive.shared::cluster"
    assert NEAR.count(arrival) == 1
    wrote = "st.shared.b32 [%r21], %r22;\nfence.proxy.async;\nbar.warp.sync -1;\n"
    for seed in SEEDS:
        for body in (NEAR.replace("bar.warp.sync -1;\n", ""), NEAR.replace(arrival, wrote + arrival)):
            with pytest.raises(RaceError, match="race: writes shared memory"):
                pipeline(body, seed)
        pipeline(PIPELINE.replace("@%p0 mbarrier.arrive.rel", f"{wrote}@%p0 mbarrier.arrive.rel") + BARRIER, seed)


def test_a_copy_hands_on_no_more_than_its_bytes() -> None:
    """Warp 0 has met warp 1 when it starts the copy; warp 2, which waits for the copy, has not."""
    body = (
        RANK + INIT.format(count=1) + "bar.sync 0;\nsetp.eq.u32 %p4, %r1, 2;\n@%p4 bra READER;\n"
        "setp.eq.u32 %p5, %r0, 32;\n@%p5 st.shared.b32 [smem+1024], 5;\nbar.sync 1, 64;\n"
        "@%p0 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [smem], [%d1], 128, [bars];\n"
        "{meet}bra END;\nREADER:\nsetp.eq.u32 %p6, %r0, 64;\n"
        "@%p6 mbarrier.arrive.expect_tx.shared::cta.b64 _, [bars], 128;\n" + WAIT + "{meet}"
        "ld.shared.b32 %r30, [smem+1024];\nEND:\nbar.sync 0;\n"
    )
    for seed in SEEDS:
        args = [np.zeros(1, np.uint32), np.zeros(32, np.uint32)]
        run_kernel(kernel(body.replace("{meet}", "bar.sync 2, 96;\n"), threads=96), None, (1, 1, 1), args, seed=seed)
        with pytest.raises(EmulatorError, match=r"race: reads|uninitialised"):
            run_kernel(kernel(body.replace("{meet}", ""), threads=96), None, (1, 1, 1), args, seed=seed)
