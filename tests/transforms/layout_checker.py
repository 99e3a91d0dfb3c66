"""Whether every instruction of a function can run in the layouts of its tiles, by enumeration of all threads and slots.

Shares nothing with the layout rules: what a thread holds is looked up element by element, fragments of tensor cores come from
the text of the PTX ISA ("Matrix fragments for mma.m16n8k16"), runs of bytes are counted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product

import numpy as np

from tilus.instructions.elementwise import Pointwise
from tilus.instructions.memory import LoadGlobal, StoreGlobal
from tilus.instructions.mma import Dot
from tilus.instructions.view import Permute, Reshape
from tilus.ir.function import Function
from tilus.ir.instruction import Instruction
from tilus.ir.stmt import Inst
from tilus.ir.tensor import GlobalTensor, RegisterTensor
from tilus.ir.visit import instructions
from tilus.layout import RegisterLayout

Index = tuple[int, ...]


def check(function: Function) -> None:
    """Raise AssertionError with the first instruction that cannot run."""
    for stmt in instructions(function.body):
        for tile in (*stmt.inst.register_results, *stmt.inst.register_operands):
            assert tile.layout is not None, f"{tile.name} has no layout"
            assert tile.layout.shape == tile.shape and tile.layout.num_threads == function.num_threads
        assert runs(stmt.inst), describe(stmt)


def describe(stmt: Inst) -> str:
    tiles = (*stmt.inst.register_results, *stmt.inst.register_operands)
    return f"{stmt.inst.mnemonic}: " + ", ".join(f"{t.name}{list(t.shape)} in {t.layout}" for t in tiles)


def runs(inst: Instruction) -> bool:
    if isinstance(inst, Pointwise) or inst.mnemonic == "broadcast":
        (out,) = inst.register_results
        return all(holds(out, operand, broadcast(out, operand)) for operand in inst.register_operands)
    if isinstance(inst, Reshape):
        return holds(inst.out, inst.src, reshaped(inst.out, inst.src))
    if isinstance(inst, Permute):
        return holds(inst.out, inst.src, permuted(inst))
    if isinstance(inst, Dot):
        return holds_fragments(inst)
    if isinstance(inst, LoadGlobal):
        return whole_bytes(inst.src, inst.out, inst.dims)
    if isinstance(inst, StoreGlobal):
        return whole_bytes(inst.dst, inst.src, inst.dims)
    return True  # constants, reductions, copies and conversions run in any layouts


def table(tile: RegisterTensor) -> np.ndarray:
    """The flat index of each thread's element in each slot: [threads, slots]."""
    assert tile.layout is not None
    indices = tile.layout.table()
    strides = [math.prod(tile.shape[d + 1 :]) for d in range(tile.rank)]
    return (indices * np.array(strides, np.int64).reshape(-1)).sum(-1) if tile.rank else indices.sum(-1)


def holds(out: RegisterTensor, src: RegisterTensor, source: np.ndarray) -> bool:
    """Whether for each slot of `out` there is a slot of `src` in which all threads hold `source[element]`."""
    needed, own = source[table(out)], table(src)
    return bool((needed[:, :, None] == own[:, None, :]).all(0).any(1).all())


def broadcast(out: RegisterTensor, operand: RegisterTensor) -> np.ndarray:
    index = np.arange(operand.size).reshape(operand.shape)
    return np.broadcast_to(index, out.shape).reshape(-1)


def reshaped(out: RegisterTensor, src: RegisterTensor) -> np.ndarray:
    return np.arange(src.size)


def permuted(inst: Permute) -> np.ndarray:
    return np.arange(inst.src.size).reshape(inst.src.shape).transpose(inst.dims).reshape(-1)


def whole_bytes(tensor: GlobalTensor, tile: RegisterTensor, dims: Sequence[int]) -> bool:
    """Whether each thread's slots come in aligned groups of consecutive elements that fill whole bytes."""
    count = 8 // math.gcd(8, tile.dtype.nbits)
    if count == 1:
        return True
    assert tile.layout is not None
    axis = list(dims).index(tensor.rank - 1)  # the programs' tensors are row-major
    indices = tile.layout.table()
    threads, slots, rank = indices.shape
    if slots % count:
        return False
    groups = indices.reshape(threads, slots // count, count, rank)
    step = np.zeros((count, rank), np.int64)
    step[:, axis] = np.arange(count)
    return bool((groups == groups[:, :, :1] + step).all() and (groups[:, :, 0, axis] % count == 0).all())


# Lane -> (row, column) of its elements, in register order: PTX ISA, "Matrix fragments for mma.m16n8k16 with .f16 type".
def fragment_a(lane: int) -> list[Index]:
    group, rest = lane // 4, lane % 4
    return [(group + 8 * (i // 2 % 2), 2 * rest + i % 2 + 8 * (i // 4)) for i in range(8)]


def fragment_b(lane: int) -> list[Index]:
    group, rest = lane // 4, lane % 4
    return [(2 * rest + i % 2 + 8 * (i // 2), group) for i in range(4)]


def fragment_c(lane: int) -> list[Index]:
    group, rest = lane // 4, lane % 4
    return [(group + 8 * (i // 2), 2 * rest + i % 2) for i in range(4)]


def holds_fragments(inst: Dot) -> bool:
    """Whether each warp holds whole fragments of results, and for each of them the fragments of both operands."""
    assert inst.out.layout is not None and inst.a.layout is not None
    assert inst.b.layout is not None and inst.acc.layout is not None
    steps = range(0, inst.a.shape[-1], 16)
    warps = inst.out.layout.num_threads // 32
    for warp in range(warps):
        blocks = {(i // 16 * 16, j // 8 * 8) for i, j in held(inst.out.layout, 32 * warp)}
        for lane in range(32):
            thread = 32 * warp + lane
            results = {(i + di, j + dj) for (i, j), (di, dj) in product(blocks, fragment_c(lane))}
            left = {(i + di, p + dp) for (i, _), p, (di, dp) in product(blocks, steps, fragment_a(lane))}
            right = {(p + dp, j + dj) for (_, j), p, (dp, dj) in product(blocks, steps, fragment_b(lane))}
            if held(inst.out.layout, thread) != results or not results <= held(inst.acc.layout, thread):
                return False
            if not left <= held(inst.a.layout, thread) or not right <= held(inst.b.layout, thread):
                return False
    return True


def held(layout: RegisterLayout, thread: int) -> set[Index]:
    return {layout.index(thread, slot) for slot in range(layout.num_locals)}
