"""Wrong wgmma kernels: each lacks one instruction, or has one too many, of a kernel that is right."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from wgmma_kernels import (
    COMMIT,
    FENCE,
    WAIT,
    A,
    D,
    Layout,
    a_words,
    braces,
    descriptor,
    fill,
    load_rows,
    matrix_of,
    run_wgmma,
    store_rows,
)

from tilus.runtime.emulator import DeadlockError, EmulatorError, RaceError

N = 16
RNG = np.random.default_rng(0)
MATRIX_A = RNG.integers(-7, 8, (64, 16)).astype(np.float16)
MATRIX_B = RNG.integers(-7, 8, (N, 16)).astype(np.float16)
LAYOUT = Layout(N, 2, 128)
SYNC = f"{FENCE}\nbar.sync 0;\n"
FENCED = "wgmma.fence.sync.aligned;\n"
ZERO = "".join(f"mov.b32 %r{D + i}, 0;\n" for i in range(N // 2))
OUT = store_rows("%d0", D, N // 2)


def mma(scale_d: str = "1", a: int = A, d: int = D, n: int = N, b: str = "%d11") -> str:
    shape = f"m64n{n}k16.f32.f16.f16"
    return f"wgmma.mma_async.sync.aligned.{shape} {braces(d, n // 2)}, {braces(a, 4)}, {b}, {scale_d}, 1, 1, 0;\n"


START = load_rows("%d2", A, 4) + ZERO + fill(LAYOUT.size) + descriptor("%d11", LAYOUT.descriptor())
RIGHT = START + SYNC + FENCED + mma() + COMMIT + WAIT + OUT


def run(body: str, *, threads: int = 128, seed: int | None = 0, shared: int = LAYOUT.size) -> np.ndarray[Any, Any]:
    out = np.zeros((threads, N // 2), np.uint32)
    a = np.tile(a_words(MATRIX_A), (-(-threads // 128), 1))[:threads]
    run_wgmma(body, out, LAYOUT.image(MATRIX_B), np.ascontiguousarray(a), shared=shared, threads=threads, seed=seed)
    return out


def right(body: str, times: int = 1, **options: Any) -> None:
    for seed in (None, 0, 1, 2):
        out = run(body, seed=seed, **options)
        want = times * (MATRIX_A.astype(np.float64) @ MATRIX_B.astype(np.float64).T)
        assert matrix_of(out[:128], N, np.float32).tolist() == want.tolist()


def wrong(body: str, message: str, kind: type[Exception] = EmulatorError, **options: Any) -> None:
    for seed in (None, 0, 1, 2):
        with pytest.raises(kind, match=message):
            run(body, seed=seed, **options)


def without(part: str, body: str = RIGHT) -> str:
    assert body.count(part) == 1
    return body.replace(part, "")


def test_the_right_kernel() -> None:
    right(RIGHT)


def test_the_first_wgmma_needs_a_fence() -> None:
    wrong(without(FENCED), r"register %r\d+ of a wgmma .* wgmma.fence")


@pytest.mark.parametrize("register", [A, A + 3, D, D + N // 2 - 1])
def test_a_fence_between_register_accesses_and_wgmma(register: int) -> None:
    """Writes and reads of accumulators or of A, by any thread of the warpgroup."""
    for access in (f"mov.b32 %r{register}, %r{register};\n", f"mov.b32 %r2, %r{register};\n"):
        right(RIGHT.replace(FENCED, access + FENCED))
        wrong(RIGHT.replace(FENCED, FENCED + access), rf"register %r{register} .*after the last wgmma.fence by\n.*mov")
        one_thread = "setp.eq.u32 %p3, %r0, 77;\n@%p3 " + access
        wrong(RIGHT.replace(FENCED, FENCED + one_thread), rf"register %r{register}(.|\n)*warp 2")


@pytest.mark.parametrize("register", [A, D])
def test_registers_in_flight_are_untouchable_until_the_wait(register: int) -> None:
    for access in (f"mov.b32 %r{register}, 1;\n", f"mov.b32 %r2, %r{register};\n"):
        wrong(RIGHT.replace(WAIT, access + WAIT), rf"%r{register} of a wgmma that is still in flight", RaceError)
        wrong(RIGHT.replace(WAIT, "@!%p7 " + access + WAIT).replace(FENCED, "setp.eq.u32 %p7, %r0, 5;\n" + FENCED),
              rf"%r{register} of a wgmma", RaceError)  # fmt: skip
    right(RIGHT.replace(WAIT, f"mov.b32 %r{A + 9}, 1;\n" + WAIT))


def test_accumulators_need_commit_and_wait() -> None:
    wrong(without(WAIT), "still in flight", RaceError)
    wrong(without(COMMIT), "still in flight", RaceError)


def test_wait_group_counts_groups_from_the_latest() -> None:
    """Two groups on two sets of accumulators: waiting for all but one covers the first set only."""
    second = D + 50
    body = START + ZERO.replace(f"%r{D}", f"%r{second}")
    zero = "".join(f"mov.b32 %r{second + i}, 0;\n" for i in range(N // 2))
    body = START + zero + SYNC + FENCED + mma() + COMMIT + mma(d=second) + COMMIT + "{wait}" + OUT
    for left in ("0", "1"):
        right(body.replace("{wait}", f"wgmma.wait_group.sync.aligned {left};\n"))
    wrong(body.replace("{wait}", "wgmma.wait_group.sync.aligned 2;\n"), "still in flight", RaceError)
    other = body.replace(f"%r{D}, [", "").replace(OUT, store_rows("%d0", second, N // 2))
    right(other.replace("{wait}", "wgmma.wait_group.sync.aligned 0;\n"))
    wrong(other.replace("{wait}", "wgmma.wait_group.sync.aligned 1;\n"), "still in flight", RaceError)


STORE = "@%p6 st.shared.b32 [smem+16], 0;\n"
WRITER = "setp.eq.u32 %p6, %r0, {thread};\n"


@pytest.mark.parametrize("thread", [0, 100])
def test_shared_operands_are_untouchable_until_the_wait(thread: int) -> None:
    body = WRITER.format(thread=thread) + RIGHT
    wrong(body.replace(WAIT, STORE + WAIT), r"writes shared memory(.|\n)*wgmma\.mma_async", RaceError)
    right(body.replace(WAIT, WAIT + "bar.sync 0;\n" + STORE))
    if thread == 0:
        wrong(body.replace(WAIT, WAIT + STORE), "another thread has read", RaceError)


def test_a_barrier_before_the_wait_does_not_free_the_shared_operands() -> None:
    """Another warp overwrites them after a barrier at which the warpgroup arrived too early, before its wait."""
    head = WRITER.format(thread=128) + START + SYNC + "setp.ge.u32 %p7, %r0, 128;\n@%p7 bra WRITER;\n"
    tail = OUT + "bra END;\nWRITER:\nbar.sync 1, 256;\n" + STORE + "END:\n"
    give = "bar.arrive 1, 256;\n"
    right(head + FENCED + mma() + COMMIT + WAIT + give + tail, threads=256)
    wrong(head + FENCED + mma() + COMMIT + give + WAIT + tail, "shared memory", RaceError, threads=256)


def test_stores_need_a_proxy_fence_by_the_storing_threads() -> None:
    wrong(without(FENCE + "\n"), "without a fence.proxy.async")
    wrong(RIGHT.replace(SYNC, "setp.ne.u32 %p7, %r0, 9;\n@%p7 " + SYNC), "without a fence.proxy.async")


def test_copies_by_cp_async_are_stores_of_threads_at_their_wait() -> None:
    copy = (
        "mov.u32 %r2, smem;\nshl.b32 %r1, %r0, 4;\nadd.u32 %r3, %r2, %r1;\nmad.wide.u32 %d20, %r0, 16, %d1;\n"
        "cp.async.cg.shared.global [%r3], [%d20], 16;\n"
    )
    assert LAYOUT.size == 16 * 128
    wait = "cp.async.wait_all;\n"
    body = RIGHT.replace(fill(LAYOUT.size), copy + "{wait}").replace(FENCE, "{fence}")
    right(body.replace("{wait}", wait).replace("{fence}", FENCE))
    wrong(body.replace("{wait}", "").replace("{fence}", FENCE + "\n" + wait), "without a fence.proxy.async")
    wrong(body.replace("{wait}", "").replace("{fence}", FENCE), "asynchronous copy into it is in flight", RaceError)


def test_operands_must_be_there() -> None:
    wrong(without("bar.sync 0;\n"), r"race|uninitialised")
    wrong(RIGHT.replace(fill(LAYOUT.size), fill(LAYOUT.size - 1024)), "uninitialised shared memory")


def test_all_threads_of_the_warpgroup_execute_it() -> None:
    body = START + SYNC + "setp.ge.u32 %p7, %r0, FIRST;\n@%p7 bra END;\n"
    body += FENCED + mma() + COMMIT + WAIT + OUT + "END:\n"
    wrong(body.replace("FIRST", "96"), r"warps \[0, 1, 2\] wait for its warps \[3\]", DeadlockError)
    wrong(body.replace("FIRST", "100"), r"lanes \[4, 5, (.|\n)*do not execute")
    wrong(RIGHT, "warp without a warpgroup", threads=96)


def test_a_warpgroup_starts_at_a_multiple_of_four_warps() -> None:
    """Warps 2 to 5 of 8."""
    body = START + SYNC + "sub.u32 %r6, %r0, 64;\nsetp.ge.u32 %p7, %r6, 128;\n@%p7 bra END;\n"
    body += FENCED + mma() + COMMIT + WAIT + "END:\n"
    wrong(body, r"warpgroup 0: its warps \[2, 3\] wait", DeadlockError, threads=256)


def test_warps_of_a_warpgroup_at_different_instructions() -> None:
    body = START + SYNC + FENCED + "setp.ge.u32 %p7, %r0, 64;\n@%p7 bra OTHER;\n" + mma() + "bra END;\nOTHER:\n"
    wrong(body + mma() + "END:\n" + COMMIT + WAIT, "execute different instructions")


def test_operands_are_the_same_in_all_threads() -> None:
    one = "setp.eq.u32 %p7, %r0, 40;\n@%p7 add.u64 %d11, %d11, 2;\n"
    wrong(RIGHT.replace(FENCED, one + FENCED), r"descriptor \(operand 2\) differs")
    flag = "setp.eq.u32 %p7, %r0, 40;\n"
    wrong(RIGHT.replace(FENCED, flag + FENCED).replace(", %d11, 1,", ", %d11, %p7,"), "scale-d differs")


def test_accumulators_start_somewhere() -> None:
    no_zero = RIGHT.replace(ZERO, "")
    wrong(no_zero, f"uninitialised register %r{D}")
    right(no_zero.replace(", %d11, 1,", ", %d11, 0,"))


def test_chains_are_of_one_shape_and_of_the_same_registers() -> None:
    right(RIGHT.replace(mma(), mma() + mma()), times=2)
    right(RIGHT.replace(mma(), mma() + COMMIT + mma()), times=2)
    wrong(RIGHT.replace(mma(), mma() + mma(n=8)), "another wgmma that is still in flight")
    more = f"mov.b32 %r{D + 8}, 0;\nmov.b32 %r{D + 9}, 0;\n"
    wrong(more + RIGHT.replace(mma(), mma() + mma(d=D + 2)), "another wgmma that is still in flight")
    wrong(RIGHT.replace(mma(), mma() + mma(a=D, d=D + 50, scale_d="0")), "has accumulators as A of another wgmma")
    wrong(RIGHT.replace(mma(), mma() + mma(d=A, n=8)), "accumulates into A registers of another wgmma")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (LAYOUT.descriptor() + (128 >> 4), "in the middle of the pattern of its 128-byte swizzle"),
        (LAYOUT.descriptor() | 1 << 49, "base offset 1, expected 0"),
        (LAYOUT.descriptor() + (1024 >> 4), "outside of every buffer"),
        (LAYOUT.descriptor() + (4096 >> 4 << 32), "outside of every buffer"),
        (Layout(N, 2, 64).descriptor() + (256 >> 4), "in the middle of the pattern of its 64-byte swizzle"),
        (Layout(N, 2, 32).descriptor() + (128 >> 4), "in the middle of the pattern of its 32-byte swizzle"),
    ],
)
def test_descriptors_that_point_elsewhere(fields: int, message: str) -> None:
    old = descriptor("%d11", LAYOUT.descriptor())
    wrong(RIGHT.replace(old, descriptor("%d11", fields)), message)


def test_another_swizzle_than_that_of_the_data_gives_other_results() -> None:
    old = descriptor("%d11", LAYOUT.descriptor())
    body = RIGHT.replace(old, descriptor("%d11", Layout(N, 2, 64).descriptor()))
    want = MATRIX_A.astype(np.float64) @ MATRIX_B.astype(np.float64).T
    assert matrix_of(run(body), N, np.float32).tolist() != want.tolist()


def test_a_guard_is_for_the_whole_warpgroup() -> None:
    setup = "setp.lt.u32 %p7, %r0, 128;\nsetp.eq.u32 %p8, %r0, 3;\n"
    right(setup + RIGHT.replace("wgmma.mma", "@%p7 wgmma.mma"))
    right(setup + RIGHT.replace(mma(), mma() + "@!%p7 " + mma()))
    wrong(setup + RIGHT.replace("wgmma.mma", "@!%p8 wgmma.mma"), r"lanes \[3\] of the warp do not execute")
