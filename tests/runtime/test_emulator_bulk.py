"""Bulk copies without tensor maps: values, what may happen while they are in flight, and the asynchronous proxy."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from async_kernels import INIT, run

from tilus.runtime.emulator import EmulatorError, RaceError

SEEDS = (None, 0, 1, 2, 3, 4)
PARAMS = "ld.param.u64 %d0, [out];\nld.param.u64 %d1, [in0];\n"
TWO = INIT.format(inits="mbarrier.init.shared.b64 [bars], 1;\nmbarrier.init.shared.b64 [bars+8], 1;") + PARAMS
WAIT = "WAIT{n}:\nmbarrier.try_wait.parity.shared.b64 %p3, [bars+{at}], 0;\n@!%p3 bra WAIT{n};\n"
COPY = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [smem+{to}], [%d1+{at}], {nbytes}, [bars+{bar}];\n"
EXPECT = "mbarrier.arrive.expect_tx.shared.b64 _, [bars+{bar}], {nbytes};\n"
# Each thread stores to `out` the word that it finds at `smem` plus 4 times its number (plus an offset).
READ = "shl.b32 %r2, %r0, 2;\nmov.u32 %r3, smem;\nadd.u32 %r3, %r3, %r2;\nld.shared.b32 %r4, [%r3+{at}];\n"
OUT = "mad.wide.u32 %d5, %r0, 4, %d0;\nst.global.b32 [%d5], %r4;\n"
SOURCE = np.arange(1000, 2024, dtype=np.uint32)


def words(body: str, *, threads: int = 32, seed: int | None = 0, shared: int = 4096) -> list[int]:
    out = np.zeros(threads, np.uint32)
    run(TWO + body, out, SOURCE, threads=threads, seed=seed, shared=shared)
    return out.tolist()


@pytest.mark.parametrize("nbytes", [16, 48, 128, 1008, 4096])
@pytest.mark.parametrize("space", ["shared::cluster", "shared::cta"])
def test_a_load_brings_its_bytes(nbytes: int, space: str) -> None:
    copy = COPY.replace("shared::cluster", space).format(to=0, at=0, nbytes=nbytes, bar=0)
    body = "@!%p0 bra WAIT0;\n" + EXPECT.format(bar=0, nbytes=nbytes) + copy + WAIT.format(n=0, at=0)
    threads = nbytes // 4
    assert words(body + READ.format(at=0) + OUT, threads=threads) == SOURCE[:threads].tolist()


def two_copies(wait_first: str, wait_second: str, read_at: int) -> str:
    issue = "".join(
        EXPECT.format(bar=bar, nbytes=128) + COPY.format(to=2 * 64 * bar // 4, at=16 * bar, nbytes=128, bar=bar)
        for bar in (0, 8)
    )
    return "@!%p0 bra MEET;\n" + issue + "MEET:\n" + wait_first + wait_second + READ.format(at=read_at) + OUT


@pytest.mark.parametrize("seed", range(10))
def test_each_copy_has_its_own_mbarrier(seed: int) -> None:
    """Copies land in any order: waiting for one says nothing about the other, in no schedule."""
    first, second = WAIT.format(n=1, at=0), WAIT.format(n=2, at=8)
    assert words(two_copies(first, second, 0), seed=seed) == SOURCE[:32].tolist()
    assert words(two_copies(first, second, 256), seed=seed) == SOURCE[32:64].tolist()
    for right, wrong, at in ((first, second, 0), (second, first, 256)):
        with pytest.raises(
            EmulatorError, match=r"in flight|by an asynchronous copy(.|\n)*wait for the copy's mbarrier"
        ):
            words(two_copies(wrong, "bar.sync 0;\n", at) + right, seed=seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_barrier_hands_on_what_one_thread_has_waited_for(seed: int | None) -> None:
    body = (
        "@!%p0 bra MEET;\n" + EXPECT.format(bar=0, nbytes=256) + COPY.format(to=0, at=0, nbytes=256, bar=0)
        + WAIT.format(n=1, at=0) + "MEET:\n{sync}" + READ.format(at=0) + OUT
    )  # fmt: skip
    assert words(body.format(sync="bar.sync 0;\n"), threads=64, seed=seed) == SOURCE[:64].tolist()
    with pytest.raises(EmulatorError, match=r"asynchronous copy|in flight|uninitialised"):
        words(body.format(sync=""), threads=64, seed=seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_nobody_touches_the_destination_while_a_copy_is_in_flight(seed: int | None) -> None:
    """Thread 0 itself, between issue and wait; and the copy must not start on what others still read."""
    body = "@!%p0 bra END;\n" + EXPECT.format(bar=0, nbytes=128) + COPY.format(to=0, at=0, nbytes=128, bar=0)
    after = WAIT.format(n=1, at=0) + "END:\n"
    words(body + after, seed=seed)
    for touch, verb in (("ld.shared.b32 %r4, [smem+124];\n", "reads"), ("st.shared.b32 [smem+64], 1;\n", "writes")):
        with pytest.raises(
            RaceError, match=rf"{verb} shared memory(.|\n)*(in flight|asynchronous copy)(.|\n)*cp\.async\.bulk"
        ):
            words(body + touch + after, seed=seed)
        words(body + after.replace("END:", touch + "END:"), seed=seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_copy_over_what_other_threads_read_needs_a_barrier(seed: int | None) -> None:
    body = (
        "@%p0 st.shared.b32 [smem], 7;\nfence.proxy.async;\nbar.sync 0;\nld.shared.b32 %r4, [smem];\n{sync}@!%p0 bra MEET;\n"
        + EXPECT.format(bar=0, nbytes=128) + COPY.format(to=0, at=0, nbytes=128, bar=0) + WAIT.format(n=1, at=0) + "MEET:\n" + OUT
    )  # fmt: skip
    for fence in ("fence.acquire.cta;\n", "fence.acq_rel.gpu;\n", "fence.proxy.async;\n", "membar.cta;\n"):
        assert words(body.format(sync=fence + "bar.sync 0;\n"), threads=64, seed=seed) == [7] * 64
    with pytest.raises(EmulatorError, match=r"writes shared memory that another thread has read|reads shared memory"):
        words(body.format(sync="fence.acquire.cta;\n"), threads=64, seed=seed)
    for fence in ("", "fence.mbarrier_init.release.cluster;\n"):
        with pytest.raises(RaceError, match=r"does not wait for loads that are under way\n  read by (.|\n)*ld\.shared"):
            words(body.format(sync=fence + "bar.sync 0;\n"), threads=64, seed=seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_copy_over_what_the_same_thread_loads(seed: int | None) -> None:
    """It does not wait for the load either; a fence in front of the load, or of another warp, does not help."""
    body = (
        "@%p0 st.shared.b32 [smem], 7;\nfence.proxy.async;\nbar.sync 0;\n{before}@%p0 ld.shared.b32 %r4, [smem];\n{after}"
        "@!%p0 bra MEET;\n" + EXPECT.format(bar=0, nbytes=128) + COPY.format(to=0, at=0, nbytes=128, bar=0)
        + WAIT.format(n=1, at=0) + "MEET:\n"
    )  # fmt: skip
    fence = "fence.acquire.cta;\n"
    words(body.format(before="", after=fence), threads=64, seed=seed)
    other_warp = "setp.eq.u32 %p9, %r1, 1;\n@%p9 " + fence
    for before, after in (("", ""), (fence, ""), ("", other_warp)):
        with pytest.raises(RaceError, match="loads that are under way"):
            words(body.format(before=before, after=after), threads=64, seed=seed)


def test_a_copy_over_ordinary_stores_needs_a_proxy_fence() -> None:
    body = (
        "@%p0 st.shared.b32 [smem], 7;\n{fence}@!%p0 bra MEET;\n" + EXPECT.format(bar=0, nbytes=128)
        + COPY.format(to=0, at=0, nbytes=128, bar=0) + "MEET:\n" + WAIT.format(n=1, at=0) + READ.format(at=0) + OUT
    )  # fmt: skip
    for fence in ("fence.proxy.async;\n", "fence.proxy.async.shared::cta;\n"):
        assert words(body.format(fence=fence)) == SOURCE[:32].tolist()
    for fence in ("", "fence.proxy.async.global;\n", "fence.acq_rel.cta;\n"):
        with pytest.raises(
            EmulatorError, match=r"without a fence\.proxy\.async\n  stored by thread 0(.|\n)*st\.shared"
        ):
            words(body.format(fence=fence))


@pytest.mark.parametrize("seed", SEEDS)
def test_a_phase_that_completes_before_its_copies(seed: int | None) -> None:
    """The arrival without bytes comes after the copy."""
    body = (
        "@!%p0 bra END;\n" + COPY.format(to=0, at=0, nbytes=128, bar=0) + "{arrive}" + WAIT.format(n=1, at=0) + "END:\n"
    )
    words(body.format(arrive=EXPECT.format(bar=0, nbytes=128)), seed=seed)
    with pytest.raises(
        EmulatorError, match=r"completes while copies for it are on their way|128 bytes more than expected"
    ):
        words(body.format(arrive="mbarrier.arrive.shared.b64 _, [bars];\n"), seed=seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_block_must_not_end_while_a_copy_into_it_is_in_flight(seed: int | None) -> None:
    body = "@!%p0 bra END;\n" + EXPECT.format(bar=0, nbytes=128) + COPY.format(to=0, at=0, nbytes=128, bar=0)
    with pytest.raises(
        EmulatorError, match=r"last thread of a block exits while a bulk copy(.|\n)*wait for the mbarrier"
    ):
        words(body + "END:\n", seed=seed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("128, [bars]", "120, [bars]"), "bulk copy of 120 bytes, expected a positive multiple of 16"),
        (("128, [bars]", "0, [bars]"), "bulk copy of 0 bytes"),
        (("[smem+0]", "[smem+8]"), r"misaligned access .not a multiple of 16"),
        (("[%d1+0]", "[%d1+4]"), r"misaligned access .not a multiple of 16"),
        (("[%d1+0]", "[%d1+4000]"), r"outside of every buffer: 128 bytes(.|\n)*in0, 4096 bytes, at byte 4000"),
        (("[smem+0]", "[smem+4000]"), r"outside of every buffer: 128 bytes(.|\n)*smem, 4096 bytes, at byte 4000"),
        (("[bars]", "[bars+16]"), r"no mbarrier is initialised at bars\+16"),
        ((".mbarrier::complete_tx::bytes", ".mbarrier::complete_tx::bytes.multicast::cluster"), "multicast"),
    ],
)
def test_loads_that_do_not_fit(change: tuple[str, str], message: str) -> None:
    copy = COPY.format(to=0, at=0, nbytes=128, bar=0).replace("[bars+0]", "[bars]")
    body = "@!%p0 bra END;\n" + EXPECT.format(bar=0, nbytes=128) + "{copy}" + WAIT.format(n=1, at=0) + "END:\n"
    words(body.format(copy=copy))
    with pytest.raises(EmulatorError, match=message):
        words(body.format(copy=copy.replace(*change)))


# Stores.
FILL = READ.replace("ld.shared.b32 %r4, [%r3+{at}];", "add.u32 %r5, %r0, 50;\nst.shared.b32 [%r3+{at}], %r5;")
STORE = "cp.async.bulk.global.shared::cta.bulk_group [%d0+{to}], [smem+{at}], {nbytes};\n"
COMMIT, WAIT_READ, WAIT_ALL = (
    f"cp.async.bulk.{what};\n" for what in ("commit_group", "wait_group.read 0", "wait_group 0")
)
FENCE, MEET = "fence.proxy.async.shared::cta;\n", "bar.sync 0;\n"
LEADER = "@!%p0 bra END;\n"


def stored(body: str, seed: int | None = 0, nwords: int = 64) -> list[int]:
    out = np.zeros(nwords, np.uint32)
    run(PARAMS + body, out, SOURCE, threads=64, seed=seed)
    return out.tolist()


@pytest.mark.parametrize("seed", SEEDS)
def test_a_store_and_all_that_it_needs(seed: int | None) -> None:
    steps = [FILL.format(at=0), FENCE, MEET, LEADER, STORE.format(to=0, at=0, nbytes=256), COMMIT, WAIT_READ, "END:\n"]
    assert stored("".join(steps), seed) == list(range(50, 114))
    for missing, message in (
        (FENCE, r"reads shared memory at .* stored to without a fence\.proxy\.async(.|\n)*st\.shared\.b32"),
        (MEET, r"race: reads shared memory that another thread has written|reads uninitialised"),
        (COMMIT, r"exits while a bulk copy of this thread may still read shared memory"),
        (WAIT_READ, r"exits while a bulk copy of this thread may still read(.|\n)*wait_group\.read 0 come first"),
    ):
        with pytest.raises(EmulatorError, match=message):
            stored("".join(step for step in steps if step != missing), seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_fence_before_the_store_or_of_another_thread_is_none(seed: int | None) -> None:
    tail = LEADER + STORE.format(to=0, at=0, nbytes=256) + COMMIT + WAIT_READ + "END:\n"
    for wrong in (FENCE + FILL.format(at=0) + MEET, FILL.format(at=0) + "@%p0 " + FENCE + MEET):
        with pytest.raises(EmulatorError, match=r"without a fence\.proxy\.async"):
            stored(wrong + tail, seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_source_of_a_store_is_on_loan_until_it_is_read(seed: int | None) -> None:
    """Another warp overwrites the source: after wait_group.read and a barrier it may, before it must not."""
    body = (
        FILL.format(at=0) + FENCE + MEET + "@%p0 " + STORE.format(to=0, at=0, nbytes=256) + "@%p0 " + COMMIT
        + "{wait}{meet}st.shared.b32 [%r3], 3;\n{late}"
    )  # fmt: skip
    wait = "@%p0 " + WAIT_READ
    assert stored(body.format(wait=wait, meet=MEET, late=""), seed) == list(range(50, 114))
    with pytest.raises(RaceError, match=r"writes shared memory at .* asynchronous operation may still read it"):
        stored(body.format(wait="", meet=MEET, late=wait), seed)
    with pytest.raises(
        EmulatorError, match=r"may still read it|writes shared memory that another thread has read|race: reads"
    ):
        stored(body.format(wait=wait, meet="", late=""), seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_groups_of_stores_are_waited_for_in_order(seed: int | None) -> None:
    """With one group left, the older one has been read, and only that one."""
    two = "".join(STORE.format(to=128 * n, at=128 * n, nbytes=128) + COMMIT for n in (0, 1))
    body = (
        FILL.format(at=0)
        + FENCE
        + MEET
        + LEADER
        + two
        + "cp.async.bulk.wait_group{kind} 1;\n{touch}"
        + WAIT_READ
        + "END:\n"
    )
    for kind in ("", ".read"):
        got = stored(body.format(kind=kind, touch="st.shared.b32 [smem+124], 1;\n"), seed)
        assert got == list(range(50, 114))
        with pytest.raises(RaceError, match=r"may still read it"):
            stored(body.format(kind=kind, touch="st.shared.b32 [smem+128], 1;\n"), seed)


def test_stores_land_in_any_order() -> None:
    """Two stores of one group to one place: over some seeds each is the one that stays."""
    two = "".join(STORE.format(to=0, at=128 * n, nbytes=128) for n in (0, 1))
    body = FILL.format(at=0) + FENCE + MEET + LEADER + two + COMMIT + WAIT_READ + "END:\n"
    assert {stored(body, seed)[0] for seed in range(16)} == {50, 82}


@pytest.mark.parametrize("seed", range(10))
def test_results_are_there_after_a_wait_that_is_not_only_for_the_read(seed: int) -> None:
    """The thread copies on, in global memory, what its store has written."""
    body = (
        FILL.format(at=0) + FENCE + MEET + LEADER + STORE.format(to=0, at=0, nbytes=256) + COMMIT
        + "{wait}ld.global.b32 %r4, [%d0+4];\nst.global.b32 [%d0+256], %r4;\nEND:\n"
    )  # fmt: skip
    assert stored(body.format(wait=WAIT_ALL), seed, nwords=65)[64] == 51
    if seed == 0:
        with pytest.raises(RaceError, match=r"has perhaps not yet written(.|\n)*cp\.async\.bulk\.global"):
            stored(body.format(wait=WAIT_READ), seed, nwords=65)


@pytest.mark.parametrize(
    ("type_name", "dtype"),
    [("u32", np.uint32), ("s32", np.int32), ("u64", np.uint64), ("f32", np.float32), ("f64", np.float64),
     ("noftz.f16", np.float16), ("noftz.bf16", ml_dtypes.bfloat16)],
)  # fmt: skip
def test_reductions_add(type_name: str, dtype: Any) -> None:
    rng = np.random.default_rng(5)
    count = 256 // np.dtype(dtype).itemsize
    low = 0 if np.dtype(dtype).kind == "u" else -1000
    old, new = (rng.integers(low, 1000, count).astype(dtype) * np.array(3, dtype) for _ in range(2))
    raw = np.dtype(f"u{np.dtype(dtype).itemsize}")
    out = old.view(raw).copy()
    body = (
        PARAMS + "shl.b32 %r2, %r0, 2;\nmov.u32 %r3, smem;\nadd.u32 %r3, %r3, %r2;\nmad.wide.u32 %d5, %r0, 4, %d1;\n"
        "ld.global.b32 %r4, [%d5];\nst.shared.b32 [%r3], %r4;\n" + FENCE + MEET + LEADER
        + f"cp.reduce.async.bulk.global.shared::cta.bulk_group.add.{type_name} [%d0], [smem], 256;\n"
        + COMMIT + WAIT_ALL + "END:\n"
    )  # fmt: skip
    run(body, out, new.view(raw), threads=64, grid=2)
    want = (old + new).astype(dtype)
    assert out.tolist() == (want + new).astype(dtype).view(raw).tolist()


def test_prefetches_policies_and_profiles() -> None:
    """None of them changes anything; a prefetch is checked for its range."""
    body = (
        "createpolicy.fractional.L2::evict_first.b64 %d9, 1.0;\n@!%p0 bra MEET;\ncp.async.bulk.prefetch.L2.global [%d1], {n};\n"
        + EXPECT.format(bar=0, nbytes=128)
        + COPY.format(to=0, at=0, nbytes=128, bar=0).replace("bytes ", "bytes.L2::cache_hint ").replace("];\n", "], %d9;\n")
        + "MEET:\n" + WAIT.format(n=1, at=0) + READ.format(at=0) + OUT
    )  # fmt: skip
    assert words(body.format(n=4096)) == SOURCE[:32].tolist()
    with pytest.raises(EmulatorError, match=r"outside of every buffer: 4112 bytes"):
        words(body.format(n=4112))


# cp.async with an mbarrier.
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("noinc", "count"), [(".noinc", 64), ("", 1)])
def test_an_mbarrier_that_tracks_ordinary_asynchronous_copies(noinc: str, count: int, seed: int | None) -> None:
    """Warps 0 and 1 copy 16 bytes a thread; warp 2 waits for all of it. Without .noinc a thread arrives besides."""
    arrive = f"cp.async.mbarrier.arrive{noinc}.shared::cta.b64 [bars];\n" + ("" if noinc else "bar.arrive 1, 96;\n")
    body = (
        INIT.format(inits=f"mbarrier.init.shared.b64 [bars], {count};") + PARAMS
        + "setp.ge.u32 %p1, %r0, 64;\n@%p1 bra OTHER;\nshl.b32 %r2, %r0, 4;\nmov.u32 %r3, smem;\nadd.u32 %r3, %r3, %r2;\n"
        "mad.wide.u32 %d5, %r0, 16, %d1;\ncp.async.cg.shared.global [%r3], [%d5], 16;\n{arrive}bra END;\nOTHER:\n"
        + ("" if noinc else "bar.sync 1, 96;\nsetp.eq.u32 %p5, %r0, 64;\n@%p5 mbarrier.arrive.shared.b64 _, [bars];\n")
        + "{wait}shl.b32 %r2, %r0, 2;\nmov.u32 %r3, smem;\nadd.u32 %r3, %r3, %r2;\nld.shared.b32 %r4, [%r3];\n"
        "sub.u32 %r0, %r0, 64;\n" + OUT + "END:\n"
    )  # fmt: skip

    def copied(text: str) -> list[int]:
        out = np.zeros(32, np.uint32)
        run(text, out, SOURCE, threads=96, seed=seed)
        return out.tolist()

    wait = WAIT.format(n=1, at=0)
    assert copied(body.format(arrive=arrive, wait=wait)) == SOURCE[64:96].tolist()
    with pytest.raises(EmulatorError, match=r"in flight|asynchronous copy|uninitialised"):
        copied(body.format(arrive=arrive, wait=""))
    with pytest.raises(EmulatorError, match=r"deadlock|in flight|more arrivals"):
        copied(body.format(arrive="" if noinc else "bar.arrive 1, 96;\n", wait=wait))


@pytest.mark.parametrize("seed", SEEDS)
def test_an_mbarrier_tracks_only_the_copies_before_its_arrival(seed: int | None) -> None:
    copy = "cp.async.cg.shared.global [smem+{at}], [%d1], 16;\n"
    body = (
        INIT.format(inits="mbarrier.init.shared.b64 [bars], 1;") + PARAMS + "@!%p0 bra END;\n" + copy.format(at=0)
        + "cp.async.mbarrier.arrive.noinc.shared.b64 [bars];\n" + copy.format(at=16) + WAIT.format(n=1, at=0)
        + "ld.shared.b32 %r4, [smem+{at}];\ncp.async.wait_all;\nst.global.b32 [%d0], %r4;\nEND:\n"
    )  # fmt: skip
    run(body.format(at=12), out := np.zeros(1, np.uint32), SOURCE, seed=seed)
    assert out.tolist() == [1003]
    with pytest.raises(RaceError, match="in flight"):
        run(body.format(at=16), out, SOURCE, seed=seed)
