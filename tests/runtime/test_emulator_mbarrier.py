"""mbarriers: phases, counts, order, and what goes wrong when one instruction of a pipeline is missing."""

from __future__ import annotations

import re
import time

import numpy as np
import pytest
from async_kernels import INIT, kernel, pipeline, pipeline_result, run
from hypothesis import given, settings
from hypothesis import strategies as st

from tilus.ptx.assembler import assemble
from tilus.runtime.emulator import DeadlockError, EmulatorError, RaceError
from tilus.target import TARGETS

STEPS, STAGES, NBYTES, CONSUMERS = 9, 3, 256, 2
SOURCE = np.random.default_rng(1).integers(0, 1 << 30, STEPS * NBYTES // 4).astype(np.uint32)
WANT = pipeline_result(SOURCE, steps=STEPS, nbytes=NBYTES, consumers=CONSUMERS)
PIPELINE = pipeline(steps=STEPS, stages=STAGES, nbytes=NBYTES, consumers=CONSUMERS)
SEEDS = (None, 0, 1, 2, 3, 4)


def run_pipeline(body: str, seed: int | None, grid: int = 1) -> list[int]:
    out = np.zeros(32 * CONSUMERS, np.uint32)
    run(body, out, SOURCE, seed=seed, grid=grid, threads=32 * (CONSUMERS + 1), shared=STAGES * NBYTES)
    return out.tolist()


@pytest.mark.parametrize("seed", SEEDS)
def test_a_pipeline_gives_what_it_should_in_every_schedule(seed: int | None) -> None:
    assert run_pipeline(PIPELINE, seed) == WANT
    assert run_pipeline(PIPELINE, seed, grid=3) == WANT


@given(
    steps=st.integers(1, 12), stages=st.integers(1, 4), nbytes=st.sampled_from((16, 64, 256)),
    consumers=st.integers(1, 4), seed=st.integers(0, 1 << 30),
)  # fmt: skip
@settings(max_examples=30)
def test_pipelines_of_all_shapes(steps: int, stages: int, nbytes: int, consumers: int, seed: int) -> None:
    source = np.random.default_rng(seed).integers(0, 1 << 30, steps * nbytes // 4).astype(np.uint32)
    out = np.zeros(32 * consumers, np.uint32)
    body = pipeline(steps=steps, stages=stages, nbytes=nbytes, consumers=consumers)
    run(body, out, source, seed=seed, threads=32 * (consumers + 1), shared=stages * nbytes)
    assert out.tolist() == pipeline_result(source, steps=steps, nbytes=nbytes, consumers=consumers)


def test_ptxas_reads_the_pipeline() -> None:
    assemble(kernel(PIPELINE, threads=32 * (CONSUMERS + 1), shared=STAGES * NBYTES), TARGETS["sm_90a"])


MISSING = {
    "mbarrier.init.shared::cta.b64 [bars+0], 1;": r"no mbarrier is initialised at bars\+0",
    "mbarrier.init.shared::cta.b64 [bars+72], 2;": r"no mbarrier is initialised at bars\+72",
    "fence.mbarrier_init.release.cluster;": "not visible to the asynchronous proxy",
    "bar.sync 0;": "with nothing that orders it after its initialisation|no mbarrier is initialised",
    "@!%p3 bra EMPTY;": "race: (writes|arrives)|while an asynchronous copy into it is in flight|more arrivals",
    "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r13], 256;": r"phase 0 lacks 1 of 1 arrivals and -256 bytes",
    "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r14], [%d1], 256, [%r13];": r"and 256 bytes",
    "@!%p3 bra FULL;": r"reads shared memory(.|\n)*(asynchronous copy|in flight)|uninitialised|race: arrives",
    "fence.acquire.cta;": r"by a copy, which does not wait for loads that are under way\n  read by (.|\n)*ld\.shared\.b32(.|\n)*"
    r"cp\.async\.bulk",
    "bar.warp.sync -1;": r"writes shared memory that another thread has read(.|\n)*ld\.shared\.b32(.|\n)*cp\.async\.bulk",
    "@%p2 mbarrier.arrive.shared::cta.b64 _, [%r13+64];": "phase 0 lacks 2 of 2 arrivals",
    "@%p4 xor.b32 %r12, %r12, 1;": "race: arrives|it has missed phase|lacks 2 of 2 arrivals|more arrivals",
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("instruction", MISSING)
def test_a_pipeline_without_one_instruction_is_an_error_in_every_schedule(instruction: str, seed: int | None) -> None:
    broken = PIPELINE.replace(instruction, "", 1)
    assert broken != PIPELINE
    with pytest.raises(EmulatorError, match=MISSING[instruction]):
        run_pipeline(broken, seed)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("right", "wrong", "message"),
    [
        ("expect_tx.shared::cta.b64 _, [%r13], 256", "expect_tx.shared::cta.b64 _, [%r13], 240", "16 bytes more than"),
        ("expect_tx.shared::cta.b64 _, [%r13], 256", "expect_tx.shared::cta.b64 _, [%r13], 272", "and 16 bytes"),
        ("arrive.expect_tx.shared::cta.b64 _, [%r13], 256", "arrive.shared::cta.b64 _, [%r13]",
         r"reads shared memory(.|\n)*(by an asynchronous copy|is in flight)(.|\n)*cp\.async\.bulk"),
        ("[bars+64], 2;", "[bars+64], 3;", "phase 0 lacks 1 of 3 arrivals"),
        ("[bars+64], 2;", "[bars+64], 1;", "race: (arrives|writes|reads shared memory)|it has missed phase|is in flight"),
        ("mov.u32 %r12, 1;", "mov.u32 %r12, 0;", r"mbarrier bars\+64: warps \[0\] wait for phase 0 .parity 0."),
        ("[%r14], [%d1], 256, [%r13];", "[%r14], [%d1], 256, [%r13+8];", "lacks|bytes|no mbarrier"),
    ],
)  # fmt: skip
def test_wrong_counts_and_parities(right: str, wrong: str, message: str, seed: int | None) -> None:
    broken = PIPELINE.replace(right, wrong, 1)
    assert broken != PIPELINE
    with pytest.raises(EmulatorError, match=message):
        run_pipeline(broken, seed)


def test_a_deadlock_report_tells_all_about_the_waiters() -> None:
    with pytest.raises(DeadlockError) as caught:
        run_pipeline(PIPELINE.replace("@%p2 mbarrier.arrive.shared::cta.b64 _, [%r13+64];", ""), 0)
    text = str(caught.value)
    for part in (
        r"block \(0, 0, 0\), mbarrier bars\+64: warps \[0\] wait for phase 0 \(parity 0\) at PTX line \d+: mbarrier\.try_wait",
        r"phase 0 lacks 2 of 2 arrivals and 0 bytes",
        r"mbarrier bars\+0: warps \[1\] wait for phase 1 \(parity 1\) at PTX line \d+",
        r"phase 1 lacks 1 of 1 arrivals and 0 bytes",
    ):
        assert re.search(part, text), text


ONE = INIT.format(inits="mbarrier.init.shared.b64 [bars], {count};") + "ld.param.u64 %d0, [out];\n"
OUT = "mad.wide.u32 %d2, %r0, 4, %d0;\nst.global.b32 [%d2], %r20;\n"
SPIN = "WAIT{n}:\nmbarrier.{wait}.shared.b64 %p3, [bars], {value};\n@!%p3 bra WAIT{n};\n"


def one(body: str, *, count: int, threads: int = 64, seed: int | None = 0) -> list[int]:
    out = np.zeros(threads, np.uint32)
    run(ONE.format(count=count) + body, out, params=".param .u64 out", threads=threads, seed=seed)
    return out.tolist()


@pytest.mark.parametrize("wait", ["try_wait", "test_wait"])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_barrier_of_all_threads_by_state(seed: int | None, wait: str) -> None:
    """Each thread stores, arrives, waits for its phase and reads what a thread of the other warp has stored."""
    exchange = (
        "shl.b32 %r2, %r0, 2;\nmov.u32 %r3, smem;\nadd.u32 %r3, %r3, %r2;\nxor.b32 %r4, %r2, 128;\nmov.u32 %r5, smem;\n"
        "add.u32 %r5, %r5, %r4;\nmov.u32 %r20, 0;\nmov.u32 %r6, 0;\nAGAIN:\nadd.u32 %r7, %r6, %r0;\n"
        "st.shared.b32 [%r3], %r7;\nmbarrier.arrive.shared.b64 %d4, [bars];\n{first}ld.shared.b32 %r8, [%r5];\n"
        "mad.lo.u32 %r20, %r20, 2, %r8;\nmbarrier.arrive.shared.b64 %d4, [bars];\n{second}"
        "add.u32 %r6, %r6, 1;\nsetp.lt.u32 %p5, %r6, 3;\n@%p5 bra AGAIN;\n"
    )
    first, second = (SPIN.format(n=n, wait=wait, value="%d4") for n in (1, 2))
    got = one(exchange.format(first=first, second=second) + OUT, count=64, seed=seed)
    assert got == [sum((step + (lane ^ 32)) << 2 - step for step in range(3)) for lane in range(64)]
    with pytest.raises(EmulatorError, match=r"race|uninitialised|missed|more arrivals"):
        one(exchange.format(first="", second=second) + OUT, count=64, seed=seed)
    with pytest.raises(EmulatorError, match=r"race|uninitialised|missed|more arrivals"):
        one(exchange.format(first=first, second="") + OUT, count=64, seed=seed)


def test_arrivals_count() -> None:
    """Two arrivals of thread 0 complete a phase of two, and a wait says so; of one, nothing completes."""
    body = "mov.u32 %r20, 7;\n@!%p0 bra END;\n{arrive}mbarrier.test_wait.parity.shared.b64 %p3, [bars], 0;\n"
    body += "selp.u32 %r20, 1, 0, %p3;\nEND:\n" + OUT
    single, double = "mbarrier.arrive.shared.b64 _, [bars];\n", "mbarrier.arrive.shared.b64 _, [bars], 2;\n"
    assert one(body.format(arrive=single), count=2)[0] == 0
    assert one(body.format(arrive=double), count=2)[0] == 1
    assert one(body.format(arrive=single + single), count=2)[0] == 1
    assert (
        one(body.format(arrive=single + "mbarrier.arrive.release.cta.shared::cta.b64 _, [bars], 1;\n"), count=2)[0] == 1
    )
    with pytest.raises(EmulatorError, match="2 more arrivals at the mbarrier bars"):
        one(body.format(arrive=double), count=1)
    with pytest.raises(EmulatorError, match=r"race: arrives in phase 1(.|\n)*it might have arrived in that one"):
        one(body.format(arrive=double + single), count=2)


def test_bytes_count_without_copies() -> None:
    body = (
        "mov.u32 %r20, 7;\n@!%p0 bra END;\nmbarrier.expect_tx.relaxed.cta.shared::cta.b64 [bars], 48;\n"
        "mbarrier.arrive.shared.b64 _, [bars];\nmbarrier.complete_tx.relaxed.cta.shared::cta.b64 [bars], 16;\n"
        "mbarrier.test_wait.parity.shared.b64 %p3, [bars], 0;\n@%p3 trap;\n"
        "mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [bars], {last};\n"
        "mbarrier.test_wait.parity.shared.b64 %p3, [bars], 0;\nselp.u32 %r20, 1, 0, %p3;\nEND:\n" + OUT
    )
    assert one(body.format(last=32), count=1)[0] == 1
    assert one(body.format(last=31), count=1)[0] == 0
    with pytest.raises(EmulatorError, match="1 bytes more than expected"):
        one(body.format(last=33), count=1)
    with pytest.raises(EmulatorError, match="counts 1048576 bytes in phase 0"):
        one(body.format(last=32).replace("], 48", "], 1048576"), count=1)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("mbarrier.init.shared.b64 [bars], 1;", r"a second time(.|\n)*mbarrier\.inval comes first"),
        ("mbarrier.init.shared.b64 [bars+8], 0;", "mbarrier for 0 arrivals, expected 1 to 1048575"),
        ("mbarrier.init.shared.b64 [bars+4], 1;", "misaligned access .not a multiple of 8"),
        ("mbarrier.init.b64 [%d0], 1;", "in global memory"),
        ("mbarrier.arrive.shared.b64 _, [bars+16];", r"no mbarrier is initialised at bars\+16"),
        ("mbarrier.inval.shared.b64 [bars];\nmbarrier.arrive.shared.b64 _, [bars];", r"no mbarrier is initialised at bars\+0"),
        ("ld.shared.b64 %d3, [bars];", r"where an mbarrier object is(.|\n)*initialised by thread 0"),
        ("st.shared.b32 [bars+4], 1;", r"where an mbarrier object is(.|\n)*only mbarrier instructions"),
        ("mbarrier.arrive.shared.b64 _, [bars], 0;", "arrives 0 times"),
        ("mbarrier.test_wait.parity.shared.b64 %p3, [bars], 2;", "parity 2, expected 0 or 1"),
        ("mov.u64 %d4, 99;\nmbarrier.test_wait.shared.b64 %p3, [bars], %d4;", "a state that no arrival there gave"),
        ("mbarrier.arrive.noComplete.shared.b64 %d4, [bars], 1;", r"modifier \.noComplete"),
    ],
)  # fmt: skip
def test_misuse_by_one_thread(body: str, message: str) -> None:
    one("@!%p0 bra END;\n" + "END:\n", count=1)
    with pytest.raises(EmulatorError, match=message):
        one("@!%p0 bra END;\n" + body + "\nEND:\n", count=1)


def test_a_place_can_be_a_barrier_again_after_inval() -> None:
    again = "mbarrier.inval.shared.b64 [bars];\nmbarrier.init.shared.b64 [bars], 1;\nmbarrier.arrive.shared.b64 _, [bars];\n"
    ask = "mbarrier.test_wait.parity.shared.b64 %p3, [bars], 0;\n@!%p3 trap;\n"
    one("@!%p0 bra END;\n" + again + ask + "END:\n", count=5)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_wait_that_has_missed_two_phases(seed: int | None) -> None:
    """Warp 1 comes to phase 0 when phases 0 and 1 have passed: on a GPU it would hang."""
    body = (
        "setp.ne.u32 %p1, %r1, 0;\n@%p1 bra LATE;\n@!%p0 bra MEET;\n"
        + "".join(
            f"mbarrier.arrive.shared.b64 _, [bars];\nWAIT{n}:\nmbarrier.try_wait.parity.shared.b64 %p3, [bars], {n};\n"
            f"@!%p3 bra WAIT{n};\n"
            for n in (0, 1)
        )
        + "MEET:\nbar.arrive 1, 64;\nbra END;\nLATE:\nbar.sync 1, 64;\n"
        "WAIT3:\nmbarrier.try_wait.parity.shared.b64 %p3, [bars], 0;\n@!%p3 bra WAIT3;\nEND:\n"
    )
    # What warp 0 knows reaches warp 1 by the named barrier; a third phase is what it then waits for.
    with pytest.raises(DeadlockError, match=r"wait for phase 2 \(parity 0\)"):
        one(body, count=1, seed=seed)
    with pytest.raises(EmulatorError, match=r"for phase 0 .parity 0. when phase 2 has begun: it has missed phase 1"):
        one(body.replace("bar.sync 1, 64;", "nanosleep.u32 1;").replace("bar.arrive 1, 64;", ""), count=1, seed=None)


def test_what_one_thread_waits_for_is_not_known_to_its_warp() -> None:
    """Thread 32 waits for warp 0; the other threads of warp 1 may read only after a barrier of their warp."""
    body = (
        "mov.u32 %r20, 0;\nsetp.ne.u32 %p1, %r1, 0;\n@%p1 bra READ;\nst.shared.b32 [smem], 5;\nbar.warp.sync -1;\n"
        "@%p0 mbarrier.arrive.shared.b64 _, [bars];\nbra END;\nREAD:\nsetp.ne.u32 %p2, %r0, 32;\n@%p2 bra JOIN;\n"
        "WAIT:\nmbarrier.try_wait.parity.shared.b64 %p3, [bars], 0;\n@!%p3 bra WAIT;\nJOIN:\n{sync}{guard}ld.shared.b32 %r20, "
        "[smem];\nEND:\n" + OUT
    )
    for seed in SEEDS:
        assert one(body.format(sync="bar.warp.sync -1;\n", guard=""), count=1, seed=seed)[32:] == [5] * 32
        assert one(body.format(sync="", guard="@!%p2 "), count=1, seed=seed)[32] == 5
        with pytest.raises(EmulatorError, match=r"race: reads shared memory|uninitialised"):
            one(body.format(sync="", guard=""), count=1, seed=seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_an_arrival_hands_on_what_its_thread_did_but_not_its_warp(seed: int | None) -> None:
    body = (
        "mov.u32 %r20, 0;\nsetp.ne.u32 %p1, %r1, 0;\n@%p1 bra READ;\nshl.b32 %r2, %r0, 2;\nmov.u32 %r3, smem;\n"
        "add.u32 %r3, %r3, %r2;\nst.shared.b32 [%r3], 6;\n{sync}@%p0 mbarrier.arrive.shared.b64 _, [bars];\nbra END;\n"
        "READ:\nWAIT:\nmbarrier.try_wait.parity.shared.b64 %p3, [bars], 0;\n@!%p3 bra WAIT;\n"
        "ld.shared.b32 %r20, [smem+{at}];\nEND:\n" + OUT
    )
    assert one(body.format(sync="", at=0), count=1, seed=seed)[32:] == [6] * 32
    assert one(body.format(sync="bar.warp.sync -1;\n", at=4), count=1, seed=seed)[32:] == [6] * 32
    with pytest.raises(RaceError, match=r"another thread has written(.|\n)*thread 1 .warp 0."):
        one(body.format(sync="", at=4), count=1, seed=seed)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("arriving", [0, 31])
def test_an_arrival_does_not_hand_on_a_read_of_the_whole_warp(arriving: int, seed: int | None) -> None:
    """All of warp 0 reads one word, one thread arrives, warp 1 overwrites the word."""
    body = (
        "@%p0 st.shared.b32 [smem], 6;\nbar.sync 0;\nmov.u32 %r20, 0;\nsetp.ne.u32 %p1, %r1, 0;\n@%p1 bra WRITE;\n"
        "ld.shared.b32 %r20, [smem];\n{sync}setp.eq.u32 %p7, %r0, {lane};\n@%p7 mbarrier.arrive.shared.b64 _, [bars];\n"
        "bra END;\nWRITE:\n"
        "WAIT:\nmbarrier.try_wait.parity.shared.b64 %p3, [bars], 0;\n@!%p3 bra WAIT;\nst.shared.b32 [smem], 7;\nEND:\n"
        + OUT
    )
    assert one(body.format(sync="bar.warp.sync -1;\n", lane=arriving), count=1, seed=seed)[:32] == [6] * 32
    with pytest.raises(RaceError, match="writes shared memory that another thread has read"):
        one(body.format(sync="", lane=arriving), count=1, seed=seed)


def test_relaxed_arrivals_order_nothing() -> None:
    body = (
        "mov.u32 %r20, 0;\nsetp.ne.u32 %p1, %r1, 0;\n@%p1 bra WAIT;\n@%p0 st.shared.b32 [smem], 6;\n"
        "@%p0 mbarrier.arrive.{sem}.cta.shared::cta.b64 _, [bars];\nbra END;\n"
        "WAIT:\nmbarrier.try_wait.parity.acquire.cta.shared::cta.b64 %p3, [bars], 0, 1000;\n@!%p3 bra WAIT;\n"
        "ld.shared.b32 %r20, [smem];\nEND:\n" + OUT
    )
    assert one(body.format(sem="release"), count=1)[32:] == [6] * 32
    with pytest.raises(RaceError, match="another thread has written"):
        one(body.format(sem="relaxed"), count=1)


def test_lanes_that_wait_keep_their_warp_from_a_warp_wide_instruction() -> None:
    """Lane 3 of warp 1 waits; the others come to bar.warp.sync first, and stay there until it has come."""
    body = (
        "mov.u32 %r20, 0;\nsetp.ne.u32 %p1, %r1, 0;\n@%p1 bra OTHER;\nnanosleep.u32 20;\n"
        "@%p0 mbarrier.arrive.shared.b64 _, [bars];\nbra END;\nOTHER:\nsetp.ne.u32 %p2, %r0, 35;\n@%p2 bra MEET;\n"
        "WAIT:\nmbarrier.try_wait.parity.shared.b64 %p3, [bars], 0;\n@!%p3 bra WAIT;\n@!%p2 mov.u32 %r20, 9;\nMEET:\n"
        "shfl.sync.idx.b32 %r20, %r20, 3, 31, -1;\nEND:\n" + OUT
    )
    for seed in SEEDS:
        assert one(body, count=1, seed=seed)[32:] == [9] * 32
    with pytest.raises(DeadlockError, match=r"warps \[1\] wait for the other threads of their warp before(.|\n)*"):
        one(body.replace("@%p0 mbarrier.arrive.shared.b64 _, [bars];", ""), count=1)


def test_a_kernel_that_does_not_end_tells_who_waits() -> None:
    """Warp 1 spins on global memory, warp 0 waits at an mbarrier."""
    body = (
        "mov.u32 %r20, 0;\nsetp.ne.u32 %p1, %r1, 0;\n@%p1 bra SPIN;\n" + SPIN.format(n=1, wait="try_wait.parity", value=0)
        + "SPIN:\nld.relaxed.gpu.global.u32 %r3, [%d0];\nsetp.eq.u32 %p4, %r3, 0;\n@%p4 bra SPIN;\n"
    )  # fmt: skip
    with pytest.raises(DeadlockError, match=r"does not end(.|\n)*mbarrier bars\+0: warps \[0\] wait for phase 0"):
        run(ONE.format(count=1) + body, np.zeros(64, np.uint32), params=".param .u64 out", threads=64, max_blocks=2000)


def test_hints_change_nothing() -> None:
    body = (
        "griddepcontrol.wait;\nsetmaxnreg.dec.sync.aligned.u32 40;\ngriddepcontrol.launch_dependents;\n"
        "nanosleep.u32 100;\nmov.u32 %r20, %r0;\n" + OUT
    )
    assert one(body, count=1) == list(range(64))
    with pytest.raises(EmulatorError, match="expected a multiple of 8 from 24 to 256"):
        one("setmaxnreg.inc.sync.aligned.u32 42;\n", count=1)


def test_a_pipeline_of_a_full_block_runs_in_a_second() -> None:
    """The promise of the emulator's speed, with a margin for a busy machine: 12 warps, 200 steps."""
    steps, nbytes, consumers = 200, 4096, 11
    source = np.random.default_rng(1).integers(0, 1 << 30, steps * nbytes // 4).astype(np.uint32)
    out = np.zeros(32 * consumers, np.uint32)
    body = pipeline(steps=steps, stages=4, nbytes=nbytes, consumers=consumers)
    start = time.process_time()
    run(body, out, source, threads=384, shared=4 * nbytes)
    assert time.process_time() - start < 5
    assert out.tolist() == pipeline_result(source, steps=steps, nbytes=nbytes, consumers=consumers)
