"""The hostile checks: each kernel here is wrong in one way, and its right twin passes."""

from __future__ import annotations

import numpy as np
import pytest
from emulator_kernels import kernel_text, run_body

from tilus.errors import TilusError
from tilus.runtime.emulator import DeadlockError, EmulatorError, RaceError, run_kernel

# Each thread stores its number to shared memory and reads that of another one.
ADDRESS = "shl.b32 %r1, %r0, 2;\nmov.u32 %r2, smem;\nadd.u32 %r3, %r2, %r1;\n"
REVERSED = "xor.b32 %r4, %r1, {last};\nadd.u32 %r5, %r2, %r4;\n"
TO_OUT = "mad.wide.u32 %d5, %r0, 4, %d0;\nst.global.b32 [%d5], %r6;\n"


def exchange(between: str, threads: int = 64, seed: int | None = None) -> np.ndarray:
    out = np.zeros(threads, np.uint32)
    body = ADDRESS + REVERSED.format(last=4 * threads - 4) + "st.shared.b32 [%r3], %r0;\n" + between
    run_body(body + "\nld.shared.b32 %r6, [%r5];\n" + TO_OUT, out, threads=threads, shared=4 * threads, seed=seed)
    return out


def test_a_barrier_between_store_and_load_is_needed() -> None:
    assert exchange("bar.sync 0;").tolist() == list(range(63, -1, -1))
    wanted = r"reads shared memory that another thread has written(.|\n)*st\.shared\.b32(.|\n)*put tilus\.sync\(\)"
    with pytest.raises(RaceError, match=wanted):
        exchange("")


def test_a_warp_barrier_orders_one_warp_but_not_two() -> None:
    assert exchange("bar.warp.sync -1;", threads=32).tolist() == list(range(31, -1, -1))
    with pytest.raises(RaceError, match="another thread"):
        exchange("", threads=32)
    with pytest.raises(RaceError, match="another thread"):
        exchange("bar.warp.sync -1;", threads=64)


@pytest.mark.parametrize("seed", range(8))
def test_a_missing_barrier_is_found_in_every_schedule(seed: int) -> None:
    """A reader that runs ahead of the writer finds uninitialised bytes; one that runs behind finds the race."""
    with pytest.raises(EmulatorError, match=r"race|uninitialised"):
        exchange("", threads=128, seed=seed)
    assert exchange("bar.sync 0;", threads=128, seed=seed).tolist() == list(range(127, -1, -1))


def test_write_after_read_needs_a_barrier() -> None:
    body = (
        ADDRESS + REVERSED.format(last=252) + "st.shared.b32 [%r3], %r0;\nbar.sync 0;\nld.shared.b32 %r6, [%r5];\n"
        "{between}\nst.shared.b32 [%r3], 7;\n" + TO_OUT
    )
    out = np.zeros(64, np.uint32)
    run_body(body.format(between="bar.sync 0;"), out, threads=64, shared=256)
    assert out.tolist() == list(range(63, -1, -1))
    with pytest.raises(RaceError, match="writes shared memory that another thread has read"):
        run_body(body.format(between=""), out, threads=64, shared=256, seed=None)


def test_a_broadcast_read_by_a_whole_warp_is_remembered() -> None:
    """All lanes read one word; then a lane that read it, too, overwrites it without a barrier."""
    body = (
        "setp.eq.u32 %p1, %r0, {writer};\n@%p1 st.shared.b32 [smem], 5;\nbar.sync 0;\nld.shared.b32 %r6, [smem];\n"
        "{between}\n@%p1 st.shared.b32 [smem], 6;\n" + TO_OUT
    )
    for writer in (0, 17, 31):
        out = np.zeros(32, np.uint32)
        run_body(body.format(writer=writer, between="bar.sync 0;"), out, shared=16)
        with pytest.raises(RaceError, match="another thread has read"):
            run_body(body.format(writer=writer, between=""), out, shared=16)


def test_reads_one_after_the_other_by_threads_of_a_warp_are_remembered() -> None:
    """Lane 0 reads, later lane 1 reads, then lane 1 writes: the race is with lane 0."""
    body = (
        "setp.eq.u32 %p1, %r0, 0;\nsetp.eq.u32 %p2, %r0, 1;\n@%p1 st.shared.b32 [smem], 5;\nbar.sync 0;\n"
        "@%p1 ld.shared.b32 %r6, [smem];\n@%p2 ld.shared.b32 %r7, [smem];\n{between}\n@%p2 st.shared.b32 [smem], 6;\n"
    )
    run_body(body.format(between="bar.warp.sync -1;"), np.zeros(1, np.uint32), shared=16)
    with pytest.raises(RaceError, match="another thread has read"):
        run_body(body.format(between=""), np.zeros(1, np.uint32), shared=16)


def test_write_after_write_of_other_bytes_races_and_of_equal_bytes_does_not() -> None:
    body = "shr.u32 %r1, %r0, 5;\n{value}\nsetp.eq.u32 %p1, %r1, 0;\n@%p1 st.shared.b32 [smem], %r2;\n"
    body += "@!%p1 st.shared.b32 [smem], %r2;\n"
    run_body(body.format(value="mov.u32 %r2, 9;"), np.zeros(1, np.uint32), threads=64, shared=16)
    with pytest.raises(RaceError, match="writes shared memory that another thread has written"):
        run_body(body.format(value="mov.u32 %r2, %r1;"), np.zeros(1, np.uint32), threads=64, shared=16)


def test_threads_that_disagree_in_one_store_race() -> None:
    with pytest.raises(RaceError, match="different values"):
        run_body("st.shared.b32 [smem], %r0;", np.zeros(1, np.uint32), shared=16)
    run_body("st.shared.b32 [smem], 3;", np.zeros(1, np.uint32), shared=16)


def test_tracking_is_exact_to_the_byte() -> None:
    """Two warps write neighbouring bytes of one word: no race."""
    body = "mov.u32 %r2, smem;\nadd.u32 %r3, %r2, %r0;\nst.shared.u8 [%r3], %r0;\nld.shared.u8 %r6, [%r3];\n" + TO_OUT
    out = np.zeros(64, np.uint32)
    run_body(
        body.replace("%r3, %r2, %r0", "%r3, %r2, %r8").replace("mov", "xor.b32 %r8, %r0, 1;\nmov"),
        out,
        threads=64,
        shared=64,
    )
    assert out.tolist() == list(range(64))


def test_named_barriers_order_only_their_warps() -> None:
    """Warps 0 and 1 meet at barrier 1; warp 2 does not, so what it reads of warp 0 is a race."""
    body = ADDRESS + (
        "st.shared.b32 [%r3], %r0;\nshr.u32 %r7, %r0, 5;\nsetp.lt.u32 %p1, %r7, 2;\n"
        "@!%p1 bra AFTER;\nbar.sync 1, 64;\nAFTER:\nsetp.eq.u32 %p2, %r7, {reader};\nmov.u32 %r6, 0;\n"
        "@%p2 ld.shared.b32 %r6, [smem+{word}];\n" + TO_OUT
    )
    out = np.zeros(96, np.uint32)
    run_body(body.format(reader=1, word=12), out, threads=96, shared=384)
    assert out[32:64].tolist() == [3] * 32
    with pytest.raises(RaceError):
        run_body(body.format(reader=2, word=12), out, threads=96, shared=384)


def test_arrive_orders_the_producer_before_the_consumer_only() -> None:
    """bar.arrive by warp 0, bar.sync by warp 1: warp 1 may read what warp 0 wrote; warp 0 has waited for nothing."""
    body = ADDRESS + (
        "mov.u32 %r6, 0;\nshr.u32 %r7, %r0, 5;\nsetp.eq.u32 %p1, %r7, 0;\nst.shared.b32 [%r3], %r0;\n"
        "@!%p1 bra CONSUMER;\nbar.arrive 1, 64;\n{producer}\nbra END;\nCONSUMER:\nbar.sync 1, 64;\n"
        "ld.shared.b32 %r6, [smem+4];\nEND:\n" + TO_OUT
    )
    for seed in range(6):
        out = np.zeros(64, np.uint32)
        run_body(body.format(producer=""), out, threads=64, shared=256, seed=seed)
        assert out.tolist() == [0] * 32 + [1] * 32
        with pytest.raises(EmulatorError, match=r"race|uninitialised"):
            run_body(body.format(producer="ld.shared.b32 %r6, [smem+128];"), out, threads=64, shared=256, seed=seed)


def test_uninitialised_shared_memory() -> None:
    body = "{fill}\nbar.sync 0;\nld.shared.b32 %r6, [smem+4];\n" + TO_OUT
    run_body(body.format(fill="st.shared.b64 [smem], 1;"), np.zeros(32, np.uint32), shared=16)
    with pytest.raises(EmulatorError, match=r"uninitialised shared memory.*smem, 16 bytes, at byte 4"):
        run_body(body.format(fill="st.shared.b32 [smem], 1;"), np.zeros(32, np.uint32), shared=16)


def test_a_partly_written_word_is_uninitialised() -> None:
    with pytest.raises(EmulatorError, match="at byte 3 of it"):
        run_body(
            "st.shared.b16 [smem], 1;\nst.shared.u8 [smem+2], 1;\nld.shared.b32 %r6, [smem];",
            np.zeros(1, np.uint32), shared=16, threads=1,
        )  # fmt: skip


def test_uninitialised_registers_on_one_path() -> None:
    body = "setp.lt.u32 %p1, %r0, 31;\n{first}\n@%p1 mov.u32 %r6, 1;\n" + TO_OUT
    run_body(body.format(first="mov.u32 %r6, 0;"), np.zeros(32, np.uint32))
    with pytest.raises(EmulatorError, match=r"uninitialised register %r6(.|\n)*thread 31 "):
        run_body(body.format(first=""), np.zeros(32, np.uint32))


def test_uninitialised_registers_where_branches_meet() -> None:
    body = "setp.lt.u32 %p1, %r0, 31;\n@!%p1 bra SKIP;\nmov.u32 %r6, 1;\nbra MEET;\nSKIP:\n{other}\nMEET:\n" + TO_OUT
    run_body(body.format(other="mov.u32 %r6, 2;"), np.zeros(32, np.uint32))
    with pytest.raises(EmulatorError, match=r"uninitialised register %r6(.|\n)*thread 31 "):
        run_body(body.format(other=""), np.zeros(32, np.uint32))


def test_a_register_set_under_a_guard_may_be_read_under_it() -> None:
    out = np.zeros(32, np.uint32)
    run_body(
        "setp.lt.u32 %p1, %r0, 16;\n@%p1 mov.u32 %r6, 4;\nmad.wide.u32 %d5, %r0, 4, %d0;\n"
        "@%p1 st.global.b32 [%d5], %r6;",
        out,
    )
    assert out.tolist() == [4] * 16 + [0] * 16


@pytest.mark.parametrize("offset", [-4, 128, 1 << 20, -(1 << 40)])
def test_global_accesses_outside_of_a_buffer(offset: int) -> None:
    with pytest.raises(EmulatorError, match=rf"outside of every buffer(.|\n)*out, 128 bytes, at byte {offset}"):
        run_body(f"ld.global.b32 %r1, [%d0+{offset}];", np.zeros(32, np.uint32))


@pytest.mark.parametrize("offset", [-8, 56, 64, 4096])
def test_shared_accesses_outside_of_an_array(offset: int) -> None:
    with pytest.raises(EmulatorError, match=rf"outside of every buffer(.|\n)*smem, 60 bytes, at byte {offset}"):
        run_body(
            f"mov.u32 %r2, smem;\nst.shared.b64 [%r2+{offset}], %d0;", np.zeros(1, np.uint32), shared=60, threads=1
        )


def test_launch_sized_shared_memory_has_the_size_of_the_launch() -> None:
    body = "mov.u32 %r2, dyn;\nst.shared.b32 [%r2+{0}], 1;"
    run_body(body.format(252), np.zeros(1, np.uint32), threads=1, extern=True, dynamic_shared_nbytes=256)
    with pytest.raises(EmulatorError, match="dyn, 256 bytes, at byte 256"):
        run_body(body.format(256), np.zeros(1, np.uint32), threads=1, extern=True, dynamic_shared_nbytes=256)


@pytest.mark.parametrize(("access", "nbytes"), [("b16", 2), ("b32", 4), ("b64", 8), ("v2.b32", 8), ("v4.b32", 16)])
def test_misaligned_accesses(access: str, nbytes: int) -> None:
    registers = {"b16": "%h1", "b32": "%r1", "b64": "%d5", "v2.b32": "{%r1, %r2}", "v4.b32": "{%r1, %r2, %r3, %r4}"}[
        access
    ]
    for offset in (nbytes, 2 * nbytes):
        run_body(f"ld.global.{access} {registers}, [%d0+{offset}];", np.zeros(32, np.uint32))
    with pytest.raises(EmulatorError, match=f"misaligned access .not a multiple of {nbytes}"):
        run_body(f"ld.global.{access} {registers}, [%d0+{nbytes // 2}];", np.zeros(32, np.uint32))


def test_an_address_cut_to_32_bits_is_refused() -> None:
    with pytest.raises(EmulatorError, match="outside of every buffer"):
        run_body("cvt.u32.u64 %r1, %d0;\ncvt.u64.u32 %d1, %r1;\nld.global.b32 %r2, [%d1];", np.zeros(1, np.uint32))


def test_the_error_names_ptx_line_user_line_thread_and_block() -> None:
    text = kernel_text(
        "ld.param.u64 %d0, [out];\n.loc 1 7 3\nld.global.b32 %r1, [%d0+512];", threads=1
    ).replace(".visible", '.file 1 "user.py"\n.visible')  # fmt: skip
    with pytest.raises(EmulatorError) as caught:
        run_kernel(text, None, (1, 1, 1), [np.zeros(4, np.uint32)])
    line = 1 + text.split("\n").index("ld.global.b32 %r1, [%d0+512];")
    for part in (f"PTX line {line}: ld.global.b32 %r1", "user.py:7:3", "thread 0 (warp 0, lane 0)", "block (0, 0, 0)"):
        assert part in str(caught.value)
    assert caught.value.loc is not None
    assert caught.value.loc.line == 7


def test_a_barrier_in_a_divergent_branch() -> None:
    body = "setp.lt.u32 %p1, %r0, {bound};\n@!%p1 bra SKIP;\nbar.sync 0;\nSKIP:\n"
    run_body(body.format(bound=64), np.zeros(1, np.uint32), threads=64)
    with pytest.raises(EmulatorError, match=r"diverge.*lanes \[8, 9, 10"):
        run_body(body.format(bound=8), np.zeros(1, np.uint32), threads=64)


def test_threads_that_have_exited_do_not_count_for_a_barrier() -> None:
    run_body("setp.lt.u32 %p1, %r0, 40;\n@!%p1 exit;\nbar.sync 0;", np.zeros(1, np.uint32), threads=64)


def test_a_deadlock_tells_who_waits_for_what() -> None:
    body = "setp.lt.u32 %p1, %r0, 32;\n@%p1 bra OTHER;\nbar.sync 1;\nbra END;\nOTHER:\nbar.sync 2;\nEND:\n"
    with pytest.raises(DeadlockError) as caught:
        run_body(body, np.zeros(1, np.uint32), threads=64)
    for part in ("barrier 1: 32 of 64", "warps [1] wait at", "barrier 2: 32 of 64", "warps [0] wait at", "bar.sync 2;"):
        assert part in str(caught.value)


def test_a_barrier_for_more_threads_than_come_is_a_deadlock() -> None:
    run_body("bar.sync 3, 64;", np.zeros(1, np.uint32), threads=64)
    with pytest.raises(DeadlockError, match="barrier 3: 64 of 96"):
        run_body("bar.sync 3, 96;", np.zeros(1, np.uint32), threads=64)


def test_an_endless_loop_is_reported() -> None:
    with pytest.raises(DeadlockError, match="does not end"):
        run_body("AGAIN:\nbra AGAIN;", np.zeros(1, np.uint32), max_blocks=1000)


@pytest.mark.parametrize("waiter", [0, 1])
def test_a_spinning_warp_lets_the_one_it_waits_for_run(waiter: int) -> None:
    body = (
        f"shr.u32 %r7, %r0, 5;\nsetp.eq.u32 %p1, %r7, {waiter};\n@%p1 bra WAIT;\n"
        f"red.release.gpu.global.add.u32 [%d0], 1;\n"
        "bra END;\nWAIT:\nld.acquire.gpu.global.u32 %r1, [%d0];\nsetp.lt.u32 %p2, %r1, 32;\n@%p2 bra WAIT;\nEND:\n"
    )
    for seed in (None, 0, 1, 2):
        out = np.zeros(1, np.uint32)
        run_body(body, out, threads=64, seed=seed, max_blocks=100_000)
        assert out.tolist() == [32]


def test_lanes_of_one_warp_that_wait_for_each_other_make_progress() -> None:
    """Independent thread scheduling: lane 1 spins, at a lower pc than lane 0, on what lane 0 writes."""
    body = (
        "setp.ne.u32 %p1, %r0, 0;\n@!%p1 bra FIRST;\nWAIT:\nld.acquire.gpu.global.u32 %r1, [%d0];\n"
        "setp.eq.u32 %p2, %r1, 0;\n@%p2 bra WAIT;\nbra END;\nFIRST:\nred.release.gpu.global.add.u32 [%d0], 1;\nEND:\n"
        "bar.warp.sync -1;"
    )
    out = np.zeros(1, np.uint32)
    run_body(body, out, max_blocks=100_000)
    assert out.tolist() == [1]


def test_blocks_that_write_different_values_to_one_place() -> None:
    body = "mov.u32 %r1, %ctaid.x;\nst.global.b32 [%d0], {0};"
    run_body(body.format("7"), np.zeros(1, np.uint32), threads=1, grid=(4, 1, 1))
    with pytest.raises(RaceError, match="two blocks write different values"):
        run_body(body.format("%r1"), np.zeros(1, np.uint32), threads=1, grid=(4, 1, 1))
    with pytest.raises(RaceError, match="two blocks write different values"):  # blocks of different waves, too
        run_body(body.format("%r1"), np.zeros(1, np.uint32), threads=1, grid=(4, 1, 1), max_lanes=32)


@pytest.mark.parametrize("seed", range(6))
def test_a_block_that_has_acquired_may_overwrite(seed: int) -> None:
    """The last block to arrive, as told by an atomic counter, writes what another one wrote before."""
    body = (
        "mov.u32 %r1, %ctaid.x;\n{plain}atom.acq_rel.gpu.global.add.u32 %r2, [%d0], 1;\nsetp.eq.u32 %p1, %r2, 3;\n"
        "@%p1 st.global.b32 [%d0+4], 99;\n"
    )
    first = "setp.eq.u32 %p2, %r1, 2;\n@%p2 st.global.b32 [%d0+4], 5;\n"
    out = np.zeros(2, np.uint32)
    run_body(body.format(plain=first), out, threads=1, grid=(4, 1, 1), seed=seed)
    assert out.tolist() == [4, 99]


def test_an_acquire_before_the_other_write_does_not_order_it() -> None:
    body = "red.relaxed.gpu.global.add.u32 [%d0], 1;\nmov.u32 %r1, %ctaid.x;\nst.global.b32 [%d0+4], %r1;\n"
    for lanes in (8192, 32):  # together, and one block after the other
        with pytest.raises(RaceError, match="two blocks write different values"):
            run_body(body, np.zeros(2, np.uint32), threads=1, grid=(2, 1, 1), max_lanes=lanes)


def test_register_width_mistakes() -> None:
    for bad in ("add.u32 %d5, %r0, %r0;", "add.u64 %d5, %r0, %d0;", "ld.global.b64 %r1, [%d0];", "mov.b32 %h1, %r0;"):
        with pytest.raises(EmulatorError, match=r"\d+ bits, expected"):
            run_body(bad, np.zeros(4, np.uint32))


def test_what_is_not_modelled_is_refused_by_name() -> None:
    with pytest.raises(TilusError, match=r"does not know the instruction `frobnicate\.b32`"):
        run_body("frobnicate.b32 %r1, %r0;", np.zeros(1, np.uint32))
    with pytest.raises(TilusError, match=r"modifier \.cc"):
        run_body("add.cc.u32 %r1, %r0, %r0;", np.zeros(1, np.uint32))
    with pytest.raises(TilusError, match="read it with mov first"):
        run_body("add.u32 %r1, %r0, %tid.y;", np.zeros(1, np.uint32))
    with pytest.raises(TilusError, match="special register %globaltimer_hi"):
        run_body("mov.u32 %r1, %globaltimer_hi;", np.zeros(1, np.uint32))


def test_trap() -> None:
    with pytest.raises(EmulatorError, match=r"trap executed(.|\n)*thread 5 "):
        run_body("setp.eq.u32 %p1, %r0, 5;\n@%p1 trap;", np.zeros(1, np.uint32))


def test_bad_launches() -> None:
    text = kernel_text("", ("u64 out", "u32 n"))
    array = np.zeros(4, np.uint32)
    for args, message in (
        ([array], "got 1 arguments, expected 2: out, n"),
        ([array, array], "expected a number"),
        ([array, 1 << 32], "expected an integer in range"),
        ([np.zeros((4, 4))[:, 1], 1], "C-contiguous"),
    ):
        with pytest.raises(TilusError, match=message):
            run_kernel(text, None, (1, 1, 1), args)
    with pytest.raises(TilusError, match=r"no kernel 'missing' in the module, expected one of \['kernel'\]"):
        run_kernel(text, "missing", (1, 1, 1), [array, 1])
    with pytest.raises(TilusError, match="expected at most 49152 static"):
        run_body("", array, shared=50000)
    frozen = np.zeros(1, np.uint32)
    frozen.flags.writeable = False
    with pytest.raises(TilusError, match="writes to argument 'out', which is read-only"):
        run_body("st.global.b32 [%d0], 1;", frozen)
