"""Clusters: ranks, shared memory of other blocks, the barrier; what is wrong with a kernel that lacks one of its parts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from emulator_kernels import kernel_text, run_body

from tilus.errors import TilusError
from tilus.ptx.parser import parse
from tilus.ptx.printer import print_module
from tilus.runtime.emulator import DeadlockError, EmulatorError, RaceError, run_kernel

SEEDS = (None, 0, 1, 2, 3)
ARRIVE, WAIT = "barrier.cluster.arrive.release.aligned;\n", "barrier.cluster.wait.acquire.aligned;\n"
BARRIER = ARRIVE + WAIT
GLOBAL_ID = "mov.u32 %r7, %ctaid.x;\nmov.u32 %r8, %ntid.x;\nmad.lo.u32 %r9, %r7, %r8, %r0;\n"
OUT = "mad.wide.u32 %d5, %r9, 4, %d0;\nst.global.b32 [%d5], %r6;\n"
# Each thread stores its global number at its own place and reads the one at its place in the next block.
OWN = "shl.b32 %r1, %r0, 2;\nmov.u32 %r2, smem;\nadd.u32 %r3, %r2, %r1;\n"
STORE = "st.shared.b32 [%r3], %r9;\n"
NEXT = (
    "mov.u32 %r10, %cluster_ctarank;\nmov.u32 %r11, %cluster_nctarank;\nadd.u32 %r10, %r10, 1;\n"
    "rem.u32 %r10, %r10, %r11;\nmapa.shared::cluster.u32 %r12, %r3, %r10;\n"
)
LOAD = "ld.shared::cluster.b32 %r6, [%r12];\n"
HEAD = GLOBAL_ID + OWN + NEXT
EXCHANGE = HEAD + STORE + BARRIER + LOAD + BARRIER + OUT
THREADS = 64


def run(body: str, *, cluster: int = 2, blocks: int = 4, seed: int | None = 0, **options: Any) -> np.ndarray[Any, Any]:
    threads = options.pop("threads", THREADS)
    out = np.zeros(blocks * threads, np.uint32)
    run_body(body, out, threads=threads, shared=4 * threads, grid=(blocks, 1, 1), cluster=cluster, seed=seed, **options)
    return out


def neighbours(blocks: int, cluster: int) -> list[int]:
    ids = np.arange(blocks * THREADS).reshape(-1, cluster, THREADS)
    return np.roll(ids, -1, axis=1).reshape(-1).tolist()


def wrong(body: str, message: str, kind: type[Exception] = EmulatorError, **options: Any) -> None:
    for seed in SEEDS:
        with pytest.raises(kind, match=message):
            run(body, seed=seed, **options)


@pytest.mark.parametrize("cluster", [1, 2, 4, 8])
@pytest.mark.parametrize("seed", SEEDS)
def test_blocks_read_each_others_shared_memory(cluster: int, seed: int | None) -> None:
    for max_lanes in (8192, 64):  # all clusters at once; one after the other
        assert run(EXCHANGE, cluster=cluster, blocks=8, seed=seed, max_lanes=max_lanes).tolist() == neighbours(
            8, cluster
        )


@pytest.mark.parametrize("lacking", ["store", "load"])
def test_each_barrier_is_needed(lacking: str) -> None:
    if lacking == "store":
        wrong(HEAD + STORE + LOAD + BARRIER + OUT, "which need not have started", RaceError)
        wrong(HEAD + BARRIER + STORE + LOAD + BARRIER + OUT, r"race: reads shared memory|uninitialised")
    else:
        wrong(HEAD + STORE + BARRIER + LOAD + OUT, "which exits with nothing that orders|has exited", RaceError)


def test_remote_stores_need_a_barrier_before_and_after() -> None:
    push = "st.shared::cluster.b32 [%r12], %r9;\n"
    read = "ld.shared.b32 %r6, [%r3];\n"
    right = HEAD + BARRIER + push + BARRIER + read + OUT
    for seed in SEEDS:
        ids = np.arange(4 * THREADS).reshape(2, 2, THREADS)
        assert run(right, seed=seed).tolist() == np.roll(ids, 1, axis=1).reshape(-1).tolist()
    wrong(HEAD + push + BARRIER + read + OUT, "which need not have started", RaceError)
    wrong(HEAD + BARRIER + push + read + BARRIER + OUT, r"race: reads shared memory|uninitialised|race: writes")
    wrong(HEAD + STORE + BARRIER + read + push + BARRIER + OUT, r"race: (writes|reads)", RaceError)
    wrong(HEAD + BARRIER + push, "which exits with nothing that orders|has exited", RaceError)


def test_relaxed_arrival_orders_nothing_but_what_a_fence_before_it_does() -> None:
    relaxed = "barrier.cluster.arrive.relaxed.aligned;\n" + WAIT
    fence = "fence.acq_rel.cluster;\n"
    body = HEAD + "{store}" + LOAD + BARRIER + OUT
    for seed in SEEDS:
        assert run(body.replace("{store}", STORE + fence + relaxed), seed=seed).tolist() == neighbours(4, 2)
    wrong(body.replace("{store}", STORE + relaxed), "race: reads", RaceError)
    wrong(body.replace("{store}", fence + STORE + relaxed), "race: reads", RaceError)
    wrong(body.replace("{store}", STORE + "fence.acq_rel.cta;\n" + relaxed), "race: reads", RaceError)


def test_accesses_between_arrive_and_wait_are_not_ordered() -> None:
    wrong(HEAD + ARRIVE + STORE + WAIT + LOAD + BARRIER + OUT, r"race: reads|uninitialised")
    wrong(HEAD + STORE + ARRIVE + LOAD + WAIT + OUT, "which need not have started", RaceError)
    for seed in SEEDS:
        between = HEAD + STORE + ARRIVE + "add.u32 %r14, %r9, 1;\n" + WAIT + LOAD + BARRIER + OUT
        assert run(between, seed=seed).tolist() == neighbours(4, 2)


def test_arrive_and_wait_alternate() -> None:
    wrong(HEAD + ARRIVE + ARRIVE + WAIT, "arrives at the barrier of the cluster a second time")
    wrong(HEAD + WAIT, "without having arrived")
    wrong(HEAD + ARRIVE + WAIT + WAIT, "without having arrived")


def test_a_block_that_does_not_arrive() -> None:
    """Block 1 waits at a barrier of its own for threads that never come."""
    rank = "mov.u32 %r10, %cluster_ctarank;\nsetp.eq.u32 %p1, %r10, 1;\n"
    stuck = rank + "@%p1 bar.sync 1, 128;\n" + BARRIER
    wrong(stuck, r"barrier of the cluster of block \(\d, 0, 0\): 64 threads wait(.|\n)*have not arrived", DeadlockError)
    for seed in SEEDS:  # threads that have exited are not waited for
        run(rank + "@%p1 exit;\n" + BARRIER, seed=seed)


def test_aligned_barriers_are_for_whole_warps() -> None:
    some = "setp.eq.u32 %p1, %r0, 3;\n@%p1 "
    wrong(some + ARRIVE, "diverge")
    every_thread = "setp.lt.u32 %p1, %r0, 3;\n@%p1 bra SOME;\nbarrier.cluster.arrive;\nbra DONE;\nSOME:\n"
    every_thread += "barrier.cluster.arrive;\nDONE:\nbarrier.cluster.wait;\n"
    for seed in SEEDS:
        got = run(HEAD + STORE + every_thread + LOAD + BARRIER + OUT, seed=seed)
        assert got.tolist() == neighbours(4, 2)


def test_atomics_on_shared_memory_of_another_block() -> None:
    """All threads of a cluster count in block 0."""
    body = GLOBAL_ID + "mov.u32 %r2, smem;\nsetp.eq.u32 %p1, %r0, 0;\n@%p1 st.shared.b32 [smem], 0;\n" + BARRIER
    body += "mapa.shared::cluster.u32 %r12, %r2, 0;\nred.shared::cluster.add.u32 [%r12], 1;\n"
    body += "atom.shared::cluster.add.u32 %r13, [%r12], 1;\n" + BARRIER + "ld.shared::cluster.u32 %r6, [%r12];\n"
    body += BARRIER + OUT
    for seed in SEEDS:
        assert run(body, seed=seed).tolist() == [4 * THREADS] * (4 * THREADS)


def test_generic_addresses_reach_other_blocks() -> None:
    generic = "cvta.shared.u64 %d10, %d11;\nmapa.u64 %d12, %d10, %r10;\n"
    body = HEAD + "cvt.u64.u32 %d11, %r3;\n" + generic + STORE + BARRIER + "ld.b32 %r6, [%d12];\n" + BARRIER + OUT
    assert run(body).tolist() == neighbours(4, 2)


def test_a_shared_address_is_one_of_the_own_block() -> None:
    body = HEAD + STORE + "ld.shared::cluster.b32 %r6, [%r3];\n" + OUT
    assert run(body).tolist() == list(range(4 * THREADS))
    own = "mov.u32 %r10, %cluster_ctarank;\nmapa.shared::cluster.u32 %r12, %r3, %r10;\n"
    assert run(HEAD + own + STORE + LOAD + OUT).tolist() == list(range(4 * THREADS))


def test_an_address_of_another_block_is_none_of_the_own() -> None:
    wrong(HEAD + STORE + BARRIER + "ld.shared.b32 %r6, [%r12];\n" + BARRIER, "outside of every buffer")
    wrong(HEAD + "mapa.shared::cluster.u32 %r12, %r3, 2;\n", "block 2 of a cluster of 2")
    far = HEAD + BARRIER + "add.u32 %r12, %r12, 4096;\n" + LOAD + BARRIER
    wrong(far, "outside of every buffer")


def test_special_registers() -> None:
    names = [
        "%cluster_ctarank", "%cluster_nctarank", "%clusterid.x", "%clusterid.y", "%nclusterid.x", "%nclusterid.y",
        "%cluster_ctaid.x", "%cluster_ctaid.y", "%cluster_nctaid.x", "%cluster_nctaid.y", "%ctaid.x",
    ]  # fmt: skip
    body = "mov.u32 %r7, %ctaid.x;\nmov.u32 %r8, %ctaid.y;\nmad.lo.u32 %r9, %r8, 6, %r7;\n"
    body += f"mad.wide.u32 %d5, %r9, {4 * (len(names) + 2)}, %d0;\n"
    for index, name in enumerate(names):
        body += f"mov.u32 %r6, {name};\nst.global.b32 [%d5+{4 * index}], %r6;\n"
    body += "mov.pred %p1, %is_explicit_cluster;\nselp.u32 %r6, 1, 0, %p1;\n"
    body += f"st.global.b32 [%d5+{4 * len(names)}], %r6;\n"
    body += "mov.u32 %r2, smem;\nmapa.shared::cluster.u32 %r3, %r2, 1;\ngetctarank.shared::cluster.u32 %r6, %r3;\n"
    body += "getctarank.shared::cluster.u32 %r4, %r2;\nmad.lo.u32 %r6, %r6, 10, %r4;\n"
    body += f"st.global.b32 [%d5+{4 * len(names) + 4}], %r6;\n"
    out = np.zeros((2, 6, len(names) + 2), np.uint32)
    run_body(body, out, threads=1, shared=16, grid=(6, 2, 1), cluster=3)
    for y in range(2):
        for x in range(6):
            rank = x % 3
            want = [rank, 3, x // 3, y, 2, 2, rank, 0, 3, 1, x, 1, 10 + rank]
            assert out[y, x].tolist() == want


def test_the_directives() -> None:
    text = kernel_text(EXCHANGE.replace("ld.param", "ld.param"), threads=THREADS, shared=4 * THREADS)
    loads = "ld.param.u64 %d0, [out];\nmov.u32 %r0, %tid.x;\n"
    text = text.replace(GLOBAL_ID, loads + GLOBAL_ID)
    required = text.replace("{\n.reg .pred", ".reqnctapercluster 2, 1, 1\n{\n.reg .pred")
    explicit = text.replace("{\n.reg .pred", ".explicitcluster\n{\n.reg .pred")
    for source, cluster in ((required, None), (required, 2), (explicit, 2), (text, 2)):
        module = parse(source)
        again = print_module(module)
        assert parse(again) == module
        assert (".reqnctapercluster 2, 1, 1" in again) == (source is required)
        assert (".explicitcluster" in again) == (source is explicit)
        out = np.zeros(4 * THREADS, np.uint32)
        run_kernel(source, None, (4, 1, 1), [out], cluster=cluster)
        assert out.tolist() == neighbours(4, 2)
    for source, cluster, grid, message in (
        (required, 4, 4, "clusters of 4 blocks, expected 2"),
        (explicit, None, 4, "needs a cluster size"),
        (text, 9, 9, "expected 1 to 8"),
        (text, 2, 3, "expected a multiple of the cluster's 2"),
    ):
        with pytest.raises(TilusError, match=message):
            run_kernel(source, None, (grid, 1, 1), [np.zeros(4 * THREADS, np.uint32)], cluster=cluster)
