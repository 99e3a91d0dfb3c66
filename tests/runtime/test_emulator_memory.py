"""Loads, stores, atomics, asynchronous copies and generic addresses."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from emulator_kernels import kernel_text, run_body

from tilus.runtime.emulator import EmulatorError, RaceError, run_kernel

TO_OUT = "mad.wide.u32 %d5, %r0, 4, %d0;\nst.global.b32 [%d5], %r6;\n"


@pytest.mark.parametrize(
    ("load", "want"),
    [("u8", 0x80), ("s8", 0xFFFFFF80), ("b8", 0x80), ("u16", 0x8180), ("s16", 0xFFFF8180), ("b32", 0x83828180)],
)
def test_narrow_loads_extend_to_their_register(load: str, want: int) -> None:
    out, source = np.zeros(1, np.uint32), np.array([0x80, 0x81, 0x82, 0x83], np.uint8)
    run_body(f"ld.global.{load} %r6, [%d1];\nst.global.b32 [%d0], %r6;", out, source, threads=1)
    assert out.tolist() == [want]


def test_signed_loads_extend_to_64_bits() -> None:
    out = np.zeros(2, np.int64)
    run_body(
        "ld.global.s32 %d5, [%d1];\nst.global.b64 [%d0], %d5;\nld.global.s8 %d6, [%d1+4];\n"
        "st.global.b64 [%d0+8], %d6;",
             out, np.array([-5, 200], np.int32), threads=1)  # fmt: skip
    assert out.tolist() == [-5, -56]


@pytest.mark.parametrize(
    ("count", "nbits"), [(c, n) for c, n in itertools.product((2, 4), (8, 16, 32, 64)) if c * n <= 128]
)  # fmt: skip
def test_vector_loads_and_stores_keep_the_order(count: int, nbits: int) -> None:
    letter = {8: "h", 16: "h", 32: "r", 64: "d"}[nbits]
    registers = "{" + ", ".join(f"%{letter}{20 + i}" for i in range(count)) + "}"
    reverse = "{" + ", ".join(f"%{letter}{20 + i}" for i in reversed(range(count))) + "}"
    size = count * nbits // 8
    source = np.arange(1, 32 * count + 1).astype(f"u{nbits // 8}")
    out = np.zeros_like(source)
    run_body(
        f"mad.wide.u32 %d5, %r0, {size}, %d1;\nmad.wide.u32 %d6, %r0, {size}, %d0;\n"
        f"ld.global.nc.L1::no_allocate.v{count}.b{nbits} {registers}, [%d5];\n"
        f"st.global.cs.v{count}.b{nbits} [%d6], {reverse};",
        out, source,
    )  # fmt: skip
    assert out.tolist() == source.reshape(-1, count)[:, ::-1].reshape(-1).tolist()


def test_scalar_parameters_of_every_type() -> None:
    text = kernel_text(
        "ld.param.u64 %d0, [out];\nld.param.u8 %r1, [a];\nld.param.s16 %r2, [b];\nld.param.f32 %r3, [c];\n"
        "ld.param.b32 %r4, [d+4];\nst.global.v4.b32 [%d0], {%r1, %r2, %r3, %r4};",
        ("u64 out", "u8 a", "s16 b", "f32 c", "u64 d"), threads=1,
    )  # fmt: skip
    out = np.zeros(4, np.uint32)
    run_kernel(text, None, (1, 1, 1), [out, 200, -3, 1.5, 0x1234567800000001])
    assert out.tolist() == [200, 0xFFFFFFFD, 0x3FC00000, 0x12345678]


def test_one_array_twice_is_one_buffer() -> None:
    array = np.array([1, 0], np.uint32)
    run_body("ld.global.b32 %r6, [%d1];\nst.global.b32 [%d0+4], %r6;", array, array, threads=1)
    assert array.tolist() == [1, 1]


def test_overlapping_arrays_share_their_bytes_and_keep_their_distance() -> None:
    whole = np.arange(8, dtype=np.uint32)
    body = (
        "ld.global.b32 %r6, [%d1];\nst.global.b32 [%d0+12], %r6;\nsub.s64 %d5, %d1, %d0;\nst.global.b64 [%d2], %d5;\n"
    )
    distance = np.zeros(1, np.int64)
    run_body(body, whole[:6], whole[2:], distance, threads=1)
    assert (whole.tolist(), distance[0]) == ([0, 1, 2, 2, 4, 5, 6, 7], 8)
    with pytest.raises(EmulatorError, match="out/in0, 32 bytes, at byte 32"):
        run_body("ld.global.b32 %r6, [%d1+24];", whole[:6], whole[2:], threads=1)
    with pytest.raises(EmulatorError, match="out, 24 bytes, at byte 24"):
        run_body("ld.global.b32 %r6, [%d0+24];", whole[:6], whole[6:], threads=1)


def test_generic_addresses_reach_both_spaces() -> None:
    body = (
        "mov.u64 %d5, smem;\ncvta.shared.u64 %d6, %d5;\nst.b32 [%d6], 77;\nld.shared.b32 %r6, [smem];\n"
        "ld.b32 %r7, [%d1];\nadd.u32 %r6, %r6, %r7;\nst.b32 [%d0], %r6;\n"
        "cvta.to.shared.u64 %d7, %d6;\nsetp.ne.u64 %p1, %d5, %d7;\n@%p1 trap;\n"
        "isspacep.shared %p2, %d6;\n@!%p2 trap;\nisspacep.shared %p3, %d0;\n@%p3 trap;\n"
    )
    out = np.zeros(1, np.uint32)
    run_body(body, out, np.array([23], np.uint32), threads=1, shared=16)
    assert out.tolist() == [100]


def test_special_registers() -> None:
    names = ("%tid.x", "%ntid.x", "%ctaid.x", "%ctaid.y", "%ctaid.z", "%nctaid.y", "%laneid", "%warpid", "%lanemask_lt")
    body = (
        "mov.u32 %r1, %ctaid.z;\nmov.u32 %r2, %ctaid.y;\nmov.u32 %r3, %ctaid.x;\nmad.lo.u32 %r1, %r1, 3, %r2;\n"
        "mad.lo.u32 %r1, %r1, 2, %r3;\n"
        f"mad.lo.u32 %r2, %r1, 64, %r0;\nmad.wide.u32 %d5, %r2, {4 * len(names)}, %d0;\n"
    )
    for index, name in enumerate(names):
        body += f"mov.u32 %r6, {name};\nst.global.b32 [%d5+{4 * index}], %r6;\n"
    out = np.zeros((4, 3, 2, 64, len(names)), np.uint32)
    run_body(body, out, threads=64, grid=(2, 3, 4), max_lanes=256)
    for z, y, x, t in np.ndindex(4, 3, 2, 64):
        assert out[z, y, x, t].tolist() == [t, 64, x, y, z, 3, t % 32, t // 32, (1 << t % 32) - 1]


# Atomics.
def atomic(operation: str, initial: Any, values: Any, *, shared: bool, third: str = "") -> tuple[Any, Any]:
    """(final value at the one address, what each thread got back)."""
    values = np.asarray(values)
    cell = np.array([initial], values.dtype)
    size = values.dtype.itemsize
    letter = {2: "h", 4: "r", 8: "d"}[size]
    old = np.zeros_like(values)
    body = (
        f"mad.wide.u32 %d5, %r0, {size}, %d2;\nmad.wide.u32 %d6, %r0, {size}, %d1;\n"
        f"ld.global.b{size * 8} %{letter}20, [%d5];\n"
    )
    if shared:
        body += (
            f"setp.eq.u32 %p1, %r0, 0;\nld.global.b{size * 8} %{letter}21, [%d0];\n"
            f"@%p1 st.shared.b{size * 8} [smem], %{letter}21;\nbar.sync 0;\n"
        )
        body += (
            f"atom.shared.{operation} %{letter}22, [smem], %{letter}20{third};\nbar.sync 0;\n"
            f"ld.shared.b{size * 8} %{letter}23, [smem];\n@%p1 st.global.b{size * 8} [%d0], %{letter}23;\n"
        )
    else:
        body += f"atom.global.{operation} %{letter}22, [%d0], %{letter}20{third};\n"
    body += f"st.global.b{size * 8} [%d6], %{letter}22;\n"
    run_body(body, cell, old, values, threads=len(values), shared=16)
    return cell[0], old


@pytest.mark.parametrize("shared", [False, True])
def test_integer_atomics(shared: bool) -> None:
    rng = np.random.default_rng(3)
    u32, s32, u64 = (
        rng.integers(0, 1 << 32, 64, np.uint32),
        rng.integers(-99, 99, 64).astype(np.int32),
        rng.integers(0, 1 << 63, 64, np.uint64),
    )
    assert atomic("add.u32", 5, u32, shared=shared)[0] == (int(u32.sum(dtype=np.uint64)) + 5) % (1 << 32)
    assert atomic("add.u64", 5, u64, shared=shared)[0] == (sum(map(int, u64)) + 5) % (1 << 64)
    assert atomic("min.s32", 7, s32, shared=shared)[0] == min(7, *s32.tolist())
    assert atomic("max.u32", 7, u32, shared=shared)[0] == max(7, *u32.tolist())
    assert atomic("and.b32", 0xFFFFFFFF, u32, shared=shared)[0] == np.bitwise_and.reduce(u32)
    assert atomic("or.b32", 0, u32, shared=shared)[0] == np.bitwise_or.reduce(u32)
    assert atomic("xor.b32", 1, u32, shared=shared)[0] == np.bitwise_xor.reduce(u32) ^ 1


def test_atomics_are_one_after_another() -> None:
    ones = np.ones(64, np.uint32)
    final, old = atomic("add.u32", 0, ones, shared=False)
    assert (final, sorted(old.tolist())) == (64, list(range(64)))
    final, old = atomic("exch.b32", 1000, np.arange(64, dtype=np.uint32), shared=False)
    assert sorted([*old.tolist(), int(final)]) == [*range(64), 1000]
    final, old = atomic("inc.u32", 0, np.full(64, 9, np.uint32), shared=True)
    assert (final, sorted(old.tolist())) == (4, sorted(i % 10 for i in range(64)))
    final, old = atomic("dec.u32", 0, np.full(64, 9, np.uint32), shared=True)
    assert (final, sorted(old.tolist())) == (6, sorted(-i % 10 for i in range(64)))
    final, old = atomic("cas.b32", 3, np.arange(64, dtype=np.uint32), shared=False, third=", 99")
    assert final == 99
    assert sorted(set(old.tolist())) == [3, 99]


def test_the_order_of_atomics_depends_on_the_seed() -> None:
    orders = set[tuple[int, ...]]()
    for seed in range(3):
        out, cell = np.zeros(32, np.uint32), np.zeros(1, np.uint32)
        run_body("atom.global.add.u32 %r6, [%d1], 1;\n" + TO_OUT, out, cell, seed=seed)
        orders.add(tuple(out.tolist()))
    assert len(orders) > 1


def test_float_atomics() -> None:
    assert atomic("add.f32", 0.5, np.arange(64, dtype=np.float32), shared=True)[0] == 2016.5
    final, _ = atomic("add.noftz.f16x2", 0x3C003C00, np.full(8, 0x40003C00, np.uint32), shared=False)
    assert final == 0x4C404880  # 1 + 8 * 2 = 17 over 1 + 8 * 1 = 9
    final, _ = atomic("add.noftz.bf16x2", 0, np.full(8, 0x40003F80, np.uint32), shared=False)
    assert final == 0x41804100  # 16 over 8


def test_reductions_and_vector_reductions() -> None:
    out = np.zeros(4, np.float32)
    run_body("red.relaxed.gpu.global.add.v4.f32 [%d0], {0f3F800000, 0f40000000, 0f40400000, 0f40800000};", out)
    assert out.tolist() == [32, 64, 96, 128]


def test_an_atomic_does_not_excuse_a_plain_access() -> None:
    body = (
        "setp.eq.u32 %p1, %r0, 0;\n@%p1 st.shared.b32 [smem], 0;\nbar.sync 0;\n"
        "red.shared.add.u32 [smem], 1;\n{}ld.shared.b32 %r6, [smem];\n" + TO_OUT
    )
    out = np.zeros(64, np.uint32)
    run_body(body.format("bar.sync 0;\n"), out, threads=64, shared=16)
    assert out.tolist() == [64] * 64
    with pytest.raises(RaceError):
        run_body(body.format(""), out, threads=64, shared=16, seed=None)


# Asynchronous copies.
COPY = "shl.b32 %r1, %r0, 4;\nmov.u32 %r2, smem;\nadd.u32 %r3, %r2, %r1;\nmad.wide.u32 %d5, %r0, 16, %d1;\n"
READ = "ld.shared.b32 %r6, [%r3];\n" + TO_OUT
SOURCE = np.arange(400, dtype=np.uint32)


def test_a_copy_lands_at_its_wait() -> None:
    out = np.zeros(32, np.uint32)
    body = COPY + "cp.async.cg.shared.global [%r3], [%d5], 16;\ncp.async.commit_group;\n{}\n" + READ
    run_body(body.format("cp.async.wait_group 0;"), out, SOURCE, shared=512)
    assert out.tolist() == list(range(0, 128, 4))
    run_body(body.format("cp.async.wait_all;"), out, SOURCE, shared=512)
    with pytest.raises(RaceError, match=r"reads shared memory.*in flight(.|\n)*cp\.async\.cg"):
        run_body(body.format(""), out, SOURCE, shared=512)


def test_a_wait_for_fewer_groups_leaves_the_last_ones_in_flight() -> None:
    copies = "".join(
        f"cp.async.ca.shared.global [%r3+{512 * stage}], [%d5+{512 * stage}], 16;\ncp.async.commit_group;\n"
        for stage in range(3)
    )
    for left in range(4):
        for stage in range(3):
            body = COPY + copies + f"cp.async.wait_group {left};\nld.shared.b32 %r6, [%r3+{512 * stage}];\n" + TO_OUT
            out = np.zeros(32, np.uint32)
            if stage < 3 - left:
                run_body(body, out, SOURCE, shared=1536)
                assert out.tolist() == [128 * stage + 4 * t for t in range(32)]
            else:
                with pytest.raises(RaceError, match="in flight"):
                    run_body(body, out, SOURCE, shared=1536)


def test_uncommitted_copies_are_not_waited_for_by_a_group() -> None:
    body = COPY + "cp.async.ca.shared.global [%r3], [%d5], 16;\n{}\n" + READ
    run_body(body.format("cp.async.wait_all;"), np.zeros(32, np.uint32), SOURCE, shared=512)
    with pytest.raises(RaceError, match="in flight"):
        run_body(body.format("cp.async.wait_group 0;"), np.zeros(32, np.uint32), SOURCE, shared=512)


def test_other_threads_need_a_barrier_after_the_wait() -> None:
    body = COPY + (
        "cp.async.cg.shared.global [%r3], [%d5], 16;\ncp.async.wait_all;\n{}\nxor.b32 %r4, %r1, 1008;\n"
        "add.u32 %r5, %r2, %r4;\nld.shared.b32 %r6, [%r5];\n" + TO_OUT
    )
    out = np.zeros(64, np.uint32)
    run_body(body.format("bar.sync 0;"), out, SOURCE, threads=64, shared=1024)
    assert out.tolist() == [4 * (63 - t) for t in range(64)]
    with pytest.raises(RaceError, match="another thread has written"):
        run_body(body.format(""), out, SOURCE, threads=64, shared=1024, seed=None)
    early = body.replace("cp.async.wait_all;\n{}", "bar.sync 0;\ncp.async.wait_all;\n")  # the barrier before the wait
    with pytest.raises(RaceError):
        run_body(early, out, SOURCE, threads=64, shared=1024, seed=None)


def test_nobody_writes_to_the_target_of_a_copy_in_flight() -> None:
    body = COPY + "cp.async.cg.shared.global [%r3], [%d5], 16;\n{}st.shared.b32 [%r3], 1;\ncp.async.wait_all;\n"
    with pytest.raises(RaceError, match=r"writes shared memory.*in flight"):
        run_body(body.format(""), np.zeros(32, np.uint32), SOURCE, shared=512)
    run_body(body.format("cp.async.wait_all;\n"), np.zeros(32, np.uint32), SOURCE, shared=512)


def test_a_copy_over_what_others_still_read_is_a_race() -> None:
    """The bug of a pipeline with one stage too few: the copy is issued without a barrier after the last reads."""
    body = COPY + (
        "cp.async.cg.shared.global [%r3], [%d5], 16;\ncp.async.wait_all;\nbar.sync 0;\nxor.b32 %r4, %r1, 1008;\n"
        "add.u32 %r5, %r2, %r4;\nld.shared.b32 %r6, [%r5];\n{}\ncp.async.cg.shared.global [%r3], [%d5], 16;\n"
        "cp.async.wait_all;\n" + TO_OUT
    )
    run_body(body.format("bar.sync 0;"), np.zeros(64, np.uint32), SOURCE, threads=64, shared=1024)
    with pytest.raises(RaceError, match="another thread has read"):
        run_body(body.format(""), np.zeros(64, np.uint32), SOURCE, threads=64, shared=1024, seed=None)


@pytest.mark.parametrize("nbytes", [4, 8, 16])
def test_source_size_fills_the_rest_with_zeros(nbytes: int) -> None:
    """And bytes beyond the source size are not read: the last thread's source ends with the buffer."""
    out, source = np.zeros((32, 4), np.uint32), np.arange(1, 32 * 16 + 1, dtype=np.uint8)[: 31 * 16 + 3]
    body = (
        f"shl.b32 %r1, %r0, 4;\nmov.u32 %r2, smem;\nadd.u32 %r3, %r2, %r1;\nmad.wide.u32 %d5, %r0, 16, %d1;\n"
        f"setp.eq.u32 %p1, %r0, 31;\nselp.u32 %r7, 3, {nbytes}, %p1;\nsetp.eq.u32 %p2, %r0, 5;\n"
        f"selp.u32 %r7, 0, %r7, %p2;\n"
        f"st.shared.v4.b32 [%r3], {{0, 0, 0, 0}};\n"
        f"cp.async.ca.shared.global [%r3], [%d5], {nbytes}, %r7;\ncp.async.wait_all;\n"
        "ld.shared.v4.b32 {%r20, %r21, %r22, %r23}, [%r3];\nmad.wide.u32 %d6, %r0, 16, %d0;\n"
        "st.global.v4.b32 [%d6], {%r20, %r21, %r22, %r23};\n"
    )
    run_body(body, out, source, shared=512)
    want = np.zeros((32, 16), np.uint8)
    padded = np.concatenate([source, np.zeros(13, np.uint8)]).reshape(32, 16)
    for thread in range(32):
        count = 3 if thread == 31 else 0 if thread == 5 else nbytes
        want[thread, :count] = padded[thread, :count]
    assert out.view(np.uint8).tolist() == want.tolist()


def test_ignore_src_and_wrong_sizes() -> None:
    body = (
        COPY + "setp.lt.u32 %p1, %r0, 8;\ncp.async.cg.shared.global [%r3], [%d5], 16, %p1;\ncp.async.wait_all;\n" + READ
    )
    out = np.zeros(32, np.uint32)
    run_body(body, out, SOURCE, shared=512)
    assert out.tolist() == [0] * 8 + list(range(32, 128, 4))
    with pytest.raises(EmulatorError, match=r"expected one of \(16,\)"):
        run_body(COPY + "cp.async.cg.shared.global [%r3], [%d5], 8;", out, SOURCE, shared=512)
    with pytest.raises(EmulatorError, match="source size 17, expected at most 16"):
        run_body(COPY + "mov.u32 %r7, 17;\ncp.async.cg.shared.global [%r3], [%d5], 16, %r7;", out, SOURCE, shared=512)
    with pytest.raises(EmulatorError, match="outside of every buffer"):
        run_body(COPY + "cp.async.cg.shared.global [%r3], [%d5+1600], 16;", out, SOURCE, shared=512)
    with pytest.raises(EmulatorError, match="misaligned"):
        run_body(COPY + "cp.async.cg.shared.global [%r3], [%d5+8], 16;", out, SOURCE, shared=512)
