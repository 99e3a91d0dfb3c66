"""ldmatrix, stmatrix, movmatrix and mma.sync against fragment tables written out by hand from the ISA's figures."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from emulator_kernels import run_body

from tilus.runtime.emulator import EmulatorError, RaceError


# PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type": the (row, col) of a0..a7, b0..b3, c0..c3.
def a_m16n8k16(lane: int, i: int) -> tuple[int, int]:
    group, thread = lane >> 2, lane % 4
    row = group if 0 <= i < 2 or 4 <= i < 6 else group + 8
    col = thread * 2 + (i & 1) if i < 4 else thread * 2 + (i & 1) + 8
    return row, col


def b_m16n8k16(lane: int, i: int) -> tuple[int, int]:
    group, thread = lane >> 2, lane % 4
    row = thread * 2 + (i & 1) if i < 2 else thread * 2 + (i & 1) + 8
    return row, group


def c_m16n8(lane: int, i: int) -> tuple[int, int]:
    group, thread = lane >> 2, lane % 4
    return (group if i < 2 else group + 8), thread * 2 + (i & 1)


# "Matrix Fragments for mma.m16n8k8": a0..a3, b0, b1.
def a_m16n8k8(lane: int, i: int) -> tuple[int, int]:
    return (lane >> 2) + (0 if i < 2 else 8), lane % 4 * 2 + (i & 1)


def b_m16n8k8(lane: int, i: int) -> tuple[int, int]:
    return lane % 4 * 2 + i, lane >> 2


# "Matrix Fragments for mma.m16n8k32" with 8-bit types: a0..a15, b0..b7.
def a_m16n8k32(lane: int, i: int) -> tuple[int, int]:
    group, thread = lane >> 2, lane % 4
    row = group if 0 <= i < 4 or 8 <= i < 12 else group + 8
    col = thread * 4 + (i & 3) if i < 8 else thread * 4 + (i & 3) + 16
    return row, col


def b_m16n8k32(lane: int, i: int) -> tuple[int, int]:
    thread = lane % 4
    return (thread * 4 + (i & 3) if i < 4 else thread * 4 + (i & 3) + 16), lane >> 2


# "Matrix Fragments for mma.m16n8k64" with 4-bit types: a0..a31, b0..b15; "m16n8k32": a0..a15, b0..b7.
def a_m16n8k64(lane: int, i: int) -> tuple[int, int]:
    group, thread = lane >> 2, lane % 4
    row = group if 0 <= i < 8 or 16 <= i < 24 else group + 8
    return row, (thread * 8 + (i & 7) if i < 16 else thread * 8 + (i & 7) + 32)


def b_m16n8k64(lane: int, i: int) -> tuple[int, int]:
    thread = lane % 4
    return (thread * 8 + (i & 7) if i < 8 else thread * 8 + (i & 7) + 32), lane >> 2


# "Matrix Fragments for mma.m16n8k8" with .tf32: a0..a3, b0, b1; "m16n8k4": a0, a1, b0.
def a_tf32(lane: int, i: int) -> tuple[int, int]:
    return (lane >> 2) + (0 if i in (0, 2) else 8), lane % 4 + (0 if i < 2 else 4)


def b_tf32(lane: int, i: int) -> tuple[int, int]:
    return lane % 4 + 4 * i, lane >> 2


def pack_nibbles(matrix: npt.NDArray[Any], place: Any, count: int) -> npt.NDArray[np.uint32]:
    """[32, registers] words of fragments of four-bit codes, element 0 in the lowest bits."""
    words = np.zeros((32, count // 8), np.uint32)
    for lane in range(32):
        for i in range(count):
            words[lane, i // 8] |= np.uint32((int(matrix[place(lane, i)]) & 15) << 4 * (i % 8))
    return words


def pack(matrix: npt.NDArray[Any], place: Any, count: int) -> npt.NDArray[np.uint32]:
    """[32, registers] words of a matrix's fragments."""
    fragments = np.array([[matrix[place(lane, i)] for i in range(count)] for lane in range(32)], matrix.dtype)
    return np.ascontiguousarray(fragments).view(np.uint32)


def unpack(words: npt.NDArray[np.uint32], dtype: Any, shape: tuple[int, int], place: Any) -> npt.NDArray[Any]:
    values = words.view(dtype)
    matrix = np.zeros(shape, dtype)
    for lane in range(32):
        for i in range(values.shape[1]):
            matrix[place(lane, i)] = values[lane, i]
    return matrix


def run_mma(
    opcode: str, fragments: list[npt.NDArray[np.uint32]], outputs: int, warps: int = 1
) -> npt.NDArray[np.uint32]:
    """Run one mma with operand words [32, registers]; each warp adds its number to nothing: all compute the same."""
    body, names = "and.b32 %r1, %r0, 31;\n", []
    for index, words in enumerate(fragments, start=1):
        count = words.shape[1]
        base = 10 * index
        body += f"mad.wide.u32 %d20, %r1, {4 * count}, %d{index};\n"
        for register in range(count):
            body += f"ld.global.b32 %r{base + register}, [%d20+{4 * register}];\n"
        names.append("{" + ", ".join(f"%r{base + register}" for register in range(count)) + "}")
    result = "{" + ", ".join(f"%r{80 + i}" for i in range(outputs)) + "}"
    body += f"{opcode} {result}, {', '.join(names)};\nmad.wide.u32 %d20, %r0, {4 * outputs}, %d0;\n"
    body += "".join(f"st.global.b32 [%d20+{4 * i}], %r{80 + i};\n" for i in range(outputs))
    out = np.zeros((32 * warps, outputs), np.uint32)
    run_body(body, out, *map(np.ascontiguousarray, fragments), threads=32 * warps)
    return out


def one_hot_products(a: Any, b: Any) -> npt.NDArray[Any]:
    return a.astype(np.float64) @ b.astype(np.float64)


@pytest.mark.parametrize("c_type", ["f32", "f16"])
@pytest.mark.parametrize(("name", "dtype"), [("f16", np.float16), ("bf16", ml_dtypes.bfloat16)])
@pytest.mark.parametrize("depth", [8, 16])
def test_mma_of_16_bit_floats(name: str, dtype: Any, depth: int, c_type: str) -> None:
    if name == "bf16" and c_type == "f16":
        c_type = "f32"
    rng = np.random.default_rng(depth)
    a = rng.integers(-8, 9, (16, depth)).astype(np.float32).astype(dtype)  # small integers: every sum is exact
    b = rng.integers(-8, 9, (depth, 8)).astype(np.float32).astype(dtype)
    accumulator = np.float32 if c_type == "f32" else np.float16
    c = rng.integers(-8, 9, (16, 8)).astype(accumulator)
    places = (a_m16n8k16, b_m16n8k16) if depth == 16 else (a_m16n8k8, b_m16n8k8)
    words = [pack(a, places[0], depth // 2), pack(b, places[1], depth // 4), pack(c, c_m16n8, 4)]
    opcode = f"mma.sync.aligned.m16n8k{depth}.row.col.{c_type}.{name}.{name}.{c_type}"
    out = run_mma(opcode, words, 4 if c_type == "f32" else 2, warps=2)
    want = one_hot_products(a, b) + c
    for warp in range(2):
        got = unpack(out[32 * warp : 32 * warp + 32], accumulator, (16, 8), c_m16n8)
        assert got.tolist() == want.tolist()


@pytest.mark.parametrize(("name", "dtype"), [("s8", np.int8), ("u8", np.uint8)])
@pytest.mark.parametrize("depth", [16, 32])
def test_mma_of_bytes(name: str, dtype: Any, depth: int) -> None:
    rng = np.random.default_rng(3)
    a, b = (
        rng.integers(0, 256, (16, depth)).astype(np.uint8).view(dtype),
        rng.integers(0, 256, (depth, 8)).astype(np.uint8).view(dtype),
    )
    c = rng.integers(-(1 << 30), 1 << 30, (16, 8)).astype(np.int32)
    words = [pack(a, a_m16n8k32, depth // 2), pack(b, b_m16n8k32, depth // 4), pack(c, c_m16n8, 4)]
    out = run_mma(f"mma.sync.aligned.m16n8k{depth}.row.col.s32.{name}.{name}.s32", words, 4)
    assert unpack(out, np.int32, (16, 8), c_m16n8).tolist() == (a.astype(np.int64) @ b.astype(np.int64) + c).tolist()


@pytest.mark.parametrize(("a_name", "b_name"), [("s8", "u8"), ("u8", "s8")])
def test_mma_of_bytes_of_different_signs(a_name: str, b_name: str) -> None:
    rng = np.random.default_rng(5)
    types = {"s8": np.int8, "u8": np.uint8}
    a = rng.integers(0, 256, (16, 32)).astype(np.uint8).view(types[a_name])
    b = rng.integers(0, 256, (32, 8)).astype(np.uint8).view(types[b_name])
    words = [pack(a, a_m16n8k32, 16), pack(b, b_m16n8k32, 8), np.zeros((32, 4), np.uint32)]
    out = run_mma(f"mma.sync.aligned.m16n8k32.row.col.s32.{a_name}.{b_name}.s32", words, 4)
    assert unpack(out, np.int32, (16, 8), c_m16n8).tolist() == (a.astype(np.int64) @ b.astype(np.int64)).tolist()


@pytest.mark.parametrize(("a_name", "b_name"), [("s4", "s4"), ("u4", "u4"), ("s4", "u4"), ("u4", "s4")])
@pytest.mark.parametrize("depth", [32, 64])
def test_mma_of_nibbles(a_name: str, b_name: str, depth: int) -> None:
    rng = np.random.default_rng(6)
    low = {"s4": -8, "u4": 0}
    a = rng.integers(low[a_name], low[a_name] + 16, (16, depth))
    b = rng.integers(low[b_name], low[b_name] + 16, (depth, 8))
    c = rng.integers(-(1 << 20), 1 << 20, (16, 8)).astype(np.int32)
    words = [pack_nibbles(a, a_m16n8k64, depth // 2), pack_nibbles(b, b_m16n8k64, depth // 4), pack(c, c_m16n8, 4)]
    out = run_mma(f"mma.sync.aligned.m16n8k{depth}.row.col.s32.{a_name}.{b_name}.s32", words, 4)
    assert unpack(out, np.int32, (16, 8), c_m16n8).tolist() == (a @ b + c).tolist()


@pytest.mark.parametrize("depth", [4, 8])
def test_mma_of_tf32_ignores_the_lower_bits(depth: int) -> None:
    rng = np.random.default_rng(7)
    a, b = (rng.integers(-1000, 1001, shape).astype(np.float32) for shape in ((16, depth), (depth, 8)))
    c = rng.integers(-1000, 1001, (16, 8)).astype(np.float32)
    noise = rng.integers(0, 1 << 13, (32, depth // 2)).astype(np.uint32)
    words = [pack(a, a_tf32, depth // 2) | noise, pack(b, b_tf32, depth // 4), pack(c, c_m16n8, 4)]
    out = run_mma(f"mma.sync.aligned.m16n8k{depth}.row.col.f32.tf32.tf32.f32", words, 4)
    assert unpack(out, np.float32, (16, 8), c_m16n8).tolist() == (one_hot_products(a, b) + c).tolist()


@pytest.mark.parametrize(("name", "dtype"), [("e4m3", ml_dtypes.float8_e4m3fn), ("e5m2", ml_dtypes.float8_e5m2)])
def test_mma_of_fp8(name: str, dtype: Any) -> None:
    rng = np.random.default_rng(4)
    a, b = (rng.integers(-3, 4, shape).astype(np.float32).astype(dtype) for shape in ((16, 32), (32, 8)))
    c = np.zeros((16, 8), np.float32)
    words = [pack(a, a_m16n8k32, 16), pack(b, b_m16n8k32, 8), pack(c, c_m16n8, 4)]
    out = run_mma(f"mma.sync.aligned.m16n8k32.row.col.f32.{name}.{name}.f32", words, 4)
    assert unpack(out, np.float32, (16, 8), c_m16n8).tolist() == one_hot_products(a, b).tolist()


def test_mma_adds_to_its_accumulator_in_place_and_needs_the_whole_warp() -> None:
    body = (
        "mov.b32 %r10, 0f00000000;\nmov.b32 %r11, %r10;\nmov.b32 %r12, %r10;\nmov.b32 %r13, %r10;\n"
        "mov.b32 %r20, 0x3C003C00;\n"
        "mov.u32 %r3, 0;\nLOOP:\n{guard}mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {{%r10, %r11, %r12, %r13}}, "
        "{{%r20, %r20, %r20, %r20}}, {{%r20, %r20}}, {{%r10, %r11, %r12, %r13}};\nadd.u32 %r3, %r3, 1;\n"
        "setp.lt.u32 %p1, %r3, 3;\n@%p1 bra LOOP;\nmad.wide.u32 %d5, %r0, 4, %d0;\nst.global.b32 [%d5], %r13;\n"
    )
    out = np.zeros(32, np.float32)
    run_body(body.format(guard=""), out)
    assert out.tolist() == [48.0] * 32
    guarded = body.format(guard="setp.ne.u32 %p2, %r0, 9;\n@%p2 ")
    with pytest.raises(EmulatorError, match=r"lanes \[9\] of the warp do not execute"):
        run_body(guarded, out)


def test_unknown_shapes_and_types_are_refused() -> None:
    for opcode in (
        "m16n8k128.row.col.s32.s4.s4.s32", "m8n8k4.row.col.f32.f16.f16.f32", "m16n8k16.row.col.f32.f16.bf16.f32",
        "m16n8k32.row.col.s32.s8.s4.s32", "m16n8k16.row.col.f16.bf16.bf16.f16", "m16n8k32.row.col.f32.s8.s8.f32",
    ):  # fmt: skip
        with pytest.raises(EmulatorError, match="does not know"):
            run_body(f"mma.sync.aligned.{opcode} {{%r1}}, {{%r1}}, {{%r1}}, {{%r1}};", np.zeros(1, np.uint32))


# ldmatrix: 8 x 8 matrices of 16-bit elements, row r of matrix m at the address of lane 8 m + r.
FILL = "shl.b32 %r1, %r0, 4;\nmov.u32 %r2, smem;\nadd.u32 %r3, %r2, %r1;\nmad.wide.u32 %d5, %r0, 16, %d1;\n"
FILL += (
    "ld.global.v4.b32 {%r20, %r21, %r22, %r23}, [%d5];\n"
    "st.shared.v4.b32 [%r3], {%r20, %r21, %r22, %r23};\nbar.sync 0;\n"
)


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix_distributes_rows(count: int, transposed: bool) -> None:
    matrices = np.arange(4 * 64, dtype=np.uint16).reshape(4, 8, 8)
    registers = "{" + ", ".join(f"%r{30 + i}" for i in range(count)) + "}"
    trans = ".trans" if transposed else ""
    # Lane l addresses row 31 - l of the stack of rows: the rows come in reverse.
    body = FILL + "sub.u32 %r4, 31, %r0;\nshl.b32 %r4, %r4, 4;\nadd.u32 %r4, %r2, %r4;\n"
    body += f"ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {registers}, [%r4];\n"
    body += f"mad.wide.u32 %d6, %r0, {4 * count}, %d0;\n"
    body += "".join(f"st.global.b32 [%d6+{4 * i}], %r{30 + i};\n" for i in range(count))
    out = np.zeros((32, count), np.uint32)
    run_body(body, out, matrices, shared=512)
    rows = matrices.reshape(32, 8)[::-1]
    for lane in range(32):
        for m in range(count):
            for piece in range(2):
                row, col = lane // 4, 2 * (lane % 4) + piece
                if transposed:
                    row, col = col, row
                assert out.view(np.uint16)[lane, 2 * m + piece] == rows[8 * m + row, col]


def test_ldmatrix_ignores_the_addresses_of_other_lanes() -> None:
    """For .x1 only lanes 0 to 7 give addresses; the others may point anywhere."""
    body = FILL + "setp.lt.u32 %p1, %r0, 8;\nselp.b32 %r4, %r3, 1, %p1;\n"
    body += "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r30}, [%r4];\n"
    run_body(body, np.zeros(1, np.uint32), np.zeros((32, 8), np.uint16), shared=512)
    with pytest.raises(EmulatorError, match=r"misaligned access .not a multiple of 16"):
        run_body(body.replace("0, 8", "0, 7"), np.zeros(1, np.uint32), np.zeros((32, 8), np.uint16), shared=512)


def test_ldmatrix_sees_races_uninitialised_bytes_and_missing_lanes() -> None:
    args = (np.zeros(1, np.uint32), np.zeros((32, 8), np.uint16))
    body = FILL + "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r30, %r31, %r32, %r33}, [%r3];\n"
    run_body(body, *args, shared=512)
    reversed_rows = body.replace("bar.sync 0;", "{}\nxor.b32 %r1, %r1, 496;\nadd.u32 %r3, %r2, %r1;")
    run_body(reversed_rows.replace("{}", "bar.warp.sync -1;"), *args, shared=512)
    with pytest.raises(RaceError):
        run_body(reversed_rows.replace("{}", ""), *args, shared=512)
    with pytest.raises(EmulatorError, match="uninitialised shared memory"):
        run_body(
            body.replace("st.shared.v4", "@%p1 st.shared.v4").replace("shl", "setp.ne.u32 %p1, %r0, 31;\nshl"),
            *args,
            shared=512,
        )
    with pytest.raises(EmulatorError, match="do not execute"):
        run_body(
            FILL + "setp.ne.u32 %p1, %r0, 3;\n@%p1 ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r30}, [%r3];",
            *args,
            shared=512,
        )


@pytest.mark.parametrize("transposed", ["", ".trans"])
def test_stmatrix_undoes_ldmatrix(transposed: str) -> None:
    matrices = np.random.default_rng(6).integers(0, 1 << 16, (32, 8)).astype(np.uint16)
    regs = "{%r30, %r31, %r32, %r33}"
    body = FILL + (
        f"ldmatrix.sync.aligned.m8n8.x4{transposed}.shared.b16 {regs}, [%r3];\nbar.sync 0;\n"
        f"stmatrix.sync.aligned.m8n8.x4{transposed}.shared.b16 [%r3], {regs};\nbar.sync 0;\n"
        "ld.shared.v4.b32 {%r40, %r41, %r42, %r43}, [%r3];\nmad.wide.u32 %d6, %r0, 16, %d0;\n"
        "st.global.v4.b32 [%d6], {%r40, %r41, %r42, %r43};\n"
    )
    out = np.zeros((32, 8), np.uint16)
    run_body(body, out, matrices, shared=512)
    assert out.tolist() == matrices.tolist()


def test_movmatrix_transposes() -> None:
    matrix = np.arange(64, dtype=np.uint16).reshape(8, 8)
    out = np.zeros((8, 8), np.uint16)
    body = (
        "mad.wide.u32 %d5, %r0, 4, %d1;\nld.global.b32 %r1, [%d5];\nmovmatrix.sync.aligned.m8n8.trans.b16 %r2, %r1;\n"
    )
    run_body(body + "mad.wide.u32 %d6, %r0, 4, %d0;\nst.global.b32 [%d6], %r2;", out, matrix)
    assert out.tolist() == matrix.T.tolist()
