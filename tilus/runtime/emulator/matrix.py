"""Warp-wide matrix instructions: ldmatrix, stmatrix, movmatrix and mma.sync (PTX ISA 9.7.14.5).

The maps from (lane, register, piece) to matrix coordinates are the formulas of the ISA's figures, with
groupID = lane >> 2 and threadID_in_group = lane % 4.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from tilus.ptx.module import Operand, Vector
from tilus.runtime.emulator.decode import Array, Mask, Site, Step, instruction
from tilus.runtime.emulator.machine import WARP
from tilus.runtime.emulator.matrix_elements import DECODERS, NBITS, encode
from tilus.runtime.emulator.memory import Access, elements_of, write_checked

Coordinates = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]
Warps = npt.NDArray[np.int64]
_GROUP, _THREAD = np.arange(WARP)[:, None] >> 2, np.arange(WARP)[:, None] & 3


def fragment_a(rows: int, depth: int, nbits: int) -> Coordinates:
    """(row, column) of element [lane, i] of the A operand, 16 x depth, elements of nbits in 32-bit registers.

    Registers alternate between the upper and the lower eight rows, then go on to the next 4 * per columns, where
    `per` elements share a register.
    """
    per = 32 // nbits
    i = np.arange(rows * depth // WARP)[None, :]
    register, piece = i // per, i % per
    return _GROUP + 8 * (register % 2) + 0 * _THREAD, _THREAD * per + piece + 4 * per * (register // 2) + 0 * _GROUP


def fragment_b(depth: int, columns: int, nbits: int) -> Coordinates:
    """(row, column) of element [lane, i] of the B operand, depth x 8."""
    per = 32 // nbits
    i = np.arange(depth * columns // WARP)[None, :]
    return _THREAD * per + i % per + 4 * per * (i // per), _GROUP + 0 * i


def fragment_c() -> Coordinates:
    """(row, column) of element [lane, i] of the 16 x 8 accumulator."""
    i = np.arange(4)[None, :]
    return _GROUP + 8 * (i // 2), _THREAD * 2 + i % 2


# Shared-memory matrices of 8 x 8 16-bit elements.
def _matrix_count(site: Site) -> int:
    return int((site.one_of("x1", "x2", "x4") or "x1")[1:])


def _matrices(site: Site, operand: Operand, count: int) -> tuple[Operand, ...]:
    """One register for each matrix; the assembler wants braces around a single one, too."""
    if not isinstance(operand, Vector) or len(operand.elements) != count:
        raise site.fault(f"operand {operand}, expected a brace-enclosed list of {count} registers")
    return operand.elements


@instruction("ldmatrix")
def load_matrices(site: Site) -> Step:
    """Register m of lane l gets two elements of row l/4 of matrix m, whose row r is at the address of lane 8m + r."""
    site.allow("sync", "aligned", "m8n8", "x1", "x2", "x4", "trans", "shared", "shared::cta")
    if "m8n8" not in site.words or site.type() != "b16":
        raise site.unsupported("a matrix shape other than .m8n8.b16")
    count = _matrix_count(site)
    outs = [site.target(operand, "b32") for operand in _matrices(site, site.operands[0], count)]
    access = Access(site, site.operands[1], "shared", 16)
    machine, transposed = site.machine, site.has("trans")

    def step(mask: Mask) -> None:
        warps = site.whole_warps(mask)
        lanes = (warps[:, None] * WARP + np.arange(8 * count)).reshape(-1)
        (_, _, where) = access.split(lanes)[0]
        machine.shared_shadow.read(site.pc, where, 16, lanes, collective=True)
        rows = machine.shared.views[2][(where >> 1)[:, None] + np.arange(8)]
        matrices = rows.reshape(len(warps), count, 8, 8)
        if transposed:
            matrices = matrices.transpose(0, 1, 3, 2)
        fragments = np.ascontiguousarray(matrices).reshape(len(warps), count, 64).view(np.uint32)
        for index, out in enumerate(outs):
            out.reshape(-1, WARP)[warps] = fragments[:, index]

    return step


@instruction("stmatrix")
def store_matrices(site: Site) -> Step:
    """The inverse of ldmatrix."""
    site.allow("sync", "aligned", "m8n8", "x1", "x2", "x4", "trans", "shared", "shared::cta")
    if "m8n8" not in site.words or site.type() != "b16":
        raise site.unsupported("a matrix shape other than .m8n8.b16")
    count = _matrix_count(site)
    sources = [site.source(operand, "b32") for operand in _matrices(site, site.operands[1], count)]
    access = Access(site, site.operands[0], "shared", 16)
    transposed = site.has("trans")

    def step(mask: Mask) -> None:
        warps = site.whole_warps(mask)
        lanes = (warps[:, None] * WARP + np.arange(8 * count)).reshape(-1)
        (_, _, where) = access.split(lanes)[0]
        fragments = np.stack([source.reshape(-1, WARP)[warps] for source in sources], axis=1)
        matrices = np.ascontiguousarray(fragments).view(np.uint16).reshape(len(warps), count, 8, 8)
        if transposed:
            matrices = matrices.transpose(0, 1, 3, 2)
        write_checked(site, True, where, lanes, np.ascontiguousarray(matrices).reshape(-1, 8), 1)

    return step


@instruction("movmatrix")
def move_matrix(site: Site) -> Step:
    """movmatrix.sync.aligned.m8n8.trans.b16 d, a: transposes a matrix held by a warp."""
    site.allow("sync", "aligned", "m8n8", "trans")
    out, source = site.target(0, "b32"), site.source(1, "b32")

    def step(mask: Mask) -> None:
        warps = site.whole_warps(mask)
        matrix = np.ascontiguousarray(source.reshape(-1, WARP)[warps]).view(np.uint16).reshape(-1, 8, 8)
        out.reshape(-1, WARP)[warps] = np.ascontiguousarray(matrix.transpose(0, 2, 1)).reshape(-1, 64).view(np.uint32)

    return step


# mma.sync
_MMA_TYPES = (*NBITS, "f32", "s32")
# Types of A and B that go together, and of C and D with them (PTX ISA, "mma": the tables of .atype, .btype, .ctype, .dtype).
_COMBINATIONS = (
    (("f16",), ("f16", "f32")), (("bf16",), ("f32",)), (("tf32",), ("f32",)),
    (("s8", "u8"), ("s32",)), (("s4", "u4"), ("s32",)), (("e4m3", "e5m2"), ("f32",)),
)  # fmt: skip


@instruction("mma.sync")
def multiply_accumulate(site: Site) -> Step:
    """mma.sync.aligned.m16n8kK.row.col.dtype.atype.btype.ctype d, a, b, c.

    Products are summed exactly in float64 (a GPU keeps fewer bits), added to c and rounded once to the type of d.
    """
    match = re.search(r"\.m16n8k(\d+)\.", site.instr.opcode)
    words = [word for word in site.words if word in _MMA_TYPES]
    shape = f"m16n8k{match.group(1)}" if match else ""
    for word in site.words:
        if word not in ("sync", "aligned", "row", "col", "satfinite", shape, *_MMA_TYPES):
            raise site.unsupported(f"modifier .{word}", f"m16n8 shapes of {', '.join(NBITS)} are modelled")
    if match is None or len(words) != 4:
        raise site.unsupported("the shape or the types")
    d_type, a_type, b_type, c_type = words
    if not any({a_type, b_type} <= set(ab) and {c_type, d_type} <= set(cd) for ab, cd in _COMBINATIONS):
        raise site.unsupported("the combination of types")
    depth, nbits = int(match.group(1)), NBITS[a_type]
    if depth * nbits not in (128, 256):
        raise site.unsupported(f"depth {depth} of .{a_type} and .{b_type}")
    read_a = _operand(site, 1, depth * nbits // 64, fragment_a(16, depth, nbits), a_type)
    read_b = _operand(site, 2, depth * nbits // 128, fragment_b(depth, 8, nbits), b_type)
    read_c = _operand(site, 3, 2 if c_type == "f16" else 4, fragment_c(), c_type)
    write_d = _result(site, d_type)
    c_map = fragment_c()

    def step(mask: Mask) -> None:
        warps = site.whole_warps(mask)
        write_d(warps, (read_a(warps) @ read_b(warps) + read_c(warps))[:, *c_map])

    return step


def _operand(
    site: Site, index: int, count: int, coordinates: Coordinates, type_name: str
) -> Callable[[Warps], npt.NDArray[np.float64]]:
    """Reads an operand of `count` registers as float64 matrices [warps, rows, columns]."""
    registers = elements_of(site, site.operands[index])
    if len(registers) != count:
        raise site.fault(f"operand {index} has {len(registers)} registers, expected {count}")
    rows = [_warp_rows(site, register) for register in registers]
    decode = DECODERS[type_name]
    # Where each matrix element sits in the [registers, 32 lanes * pieces] words of a warp.
    shape = (int(coordinates[0].max()) + 1, int(coordinates[1].max()) + 1)
    per = coordinates[0].shape[1] // count
    element = np.arange(coordinates[0].shape[1])[None, :]
    position = np.zeros(shape, np.int64)
    position[coordinates] = (element // per * WARP + np.arange(WARP)[:, None]) * per + element % per

    def read(warps: Warps) -> npt.NDArray[np.float64]:
        words = np.empty((len(warps), count, WARP), np.uint32)
        for register, row in enumerate(rows):
            words[:, register] = row[warps]
        return decode(words).reshape(len(warps), -1)[:, position]

    return read


def _warp_rows(site: Site, operand: Operand) -> Array:
    return np.broadcast_to(site.source(operand, "b32"), site.machine.lanes).reshape(-1, WARP)


def _result(site: Site, type_name: str) -> Callable[[Warps, Array], None]:
    """Writes d from float64 [warps, 32, 4]."""
    count = 2 if type_name == "f16" else 4
    registers = elements_of(site, site.operands[0])
    if len(registers) != count:
        raise site.fault(f"destination has {len(registers)} registers, expected {count}")
    outs = [site.target(register, "b32").reshape(-1, WARP) for register in registers]
    saturate = site.has("satfinite")

    def write(warps: Warps, values: Array) -> None:
        words = encode(values, type_name, saturate=saturate)
        for index, out in enumerate(outs):
            out[warps] = words[..., index]

    return write
