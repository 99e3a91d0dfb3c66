"""Laws of memory: loads, stores and atomic updates of tiles are loops over blocks and elements."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_oracle import Atomic, Element, Fill, Give, Load, Probe, Store, blocks, function, tensor

from tilus.dtypes import (
    DTYPES,
    DataType,
    bf16,
    boolean,
    f16,
    f32,
    float6_e3m2,
    int1,
    int4,
    int32,
    int64,
    uint2,
    uint3,
    uint8,
)
from tilus.errors import TilusError
from tilus.ir.expr import BlockId, Expr, Var, binary, const, evaluate
from tilus.ir.stmt import EMPTY, For, If, Inst, Seq
from tilus.ir.tensor import GlobalTensor, RegisterTensor, SharedTensor
from tilus.runtime.reference import run_reference

SIZES = st.integers(1, 5)
X, Y, Z = map(BlockId, range(3))


def bits_of(data: npt.NDArray[Any], element: int, nbits: int) -> int:
    """The code at an element index of little-endian memory, one bit at a time."""
    raw = data.reshape(-1).view(np.uint8)
    return sum(
        (int(raw[bit >> 3]) >> (bit & 7) & 1) << i
        for i, bit in enumerate(range(element * nbits, (element + 1) * nbits))
    )


def random_memory(kind: DataType, count: int, seed: int) -> npt.NDArray[Any]:
    """Random codes: bytes when packed, otherwise an array of the dtype of memory."""
    rng = np.random.default_rng(seed)
    if kind.nbits < 8:
        return rng.integers(0, 256, -(-count * kind.nbits // 8), dtype=np.uint8)
    if kind == boolean:
        return rng.integers(0, 2, count).astype(np.bool_)
    codes = (
        rng.integers(0, kind.num_codes, count, dtype=kind.storage, endpoint=False)
        if kind.nbits < 64
        else (rng.integers(-(2**63), 2**63 - 1, count).view(kind.storage))
    )
    return codes.view(kind.numpy or kind.storage)


@st.composite
def offset_exprs(draw: st.DrawFn) -> Expr:
    """Uniform, linear in the block, and neither."""
    x, y, z = (const(draw(st.integers(-2, 3))) for _ in range(3))
    linear = binary("+", binary("+", binary("*", X, x), binary("*", Y, y)), draw(st.integers(-2, 3)))
    along_x = binary("+", binary("*", X, x), draw(st.integers(-2, 3)))
    uniform = const(draw(st.integers(-2, 3)))
    others = [
        binary("//", linear, 2),
        binary("%", binary("*", linear, linear), 3),
        binary("+", linear, binary("*", Z, z)),
    ]
    return draw(st.sampled_from([uniform, uniform, along_x, along_x, linear, *others]))


@st.composite
def accesses(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[Expr, ...], tuple[int, ...], tuple[int, ...]]:
    """Shape of a tensor, offsets, shape of the tile, dims."""
    shape = tuple(draw(st.lists(st.integers(1, 7), min_size=1, max_size=3)))
    dims = draw(st.permutations(range(len(shape))))[: draw(st.integers(0, len(shape)))]
    tile = tuple(draw(SIZES) for _ in dims)
    return shape, tuple(draw(offset_exprs()) for _ in shape), tile, tuple(dims)


def elements(
    access: tuple[tuple[int, ...], tuple[Expr, ...], tuple[int, ...], tuple[int, ...]], block: tuple[int, ...]
) -> list[tuple[tuple[int, ...], tuple[int, ...], bool]]:
    """(tile index, tensor index, inside) of every element in a block."""
    shape, offsets, tile, dims = access
    start = [int(evaluate(offset, dict(zip((X, Y, Z), block, strict=True)))) for offset in offsets]
    result = []
    for index in itertools.product(*map(range, tile)):
        position = list(start)
        for axis, dim in enumerate(dims):
            position[dim] += index[axis]
        result.append((index, tuple(position), all(0 <= p < n for p, n in zip(position, shape, strict=True))))
    return result


def strides_of(shape: tuple[int, ...], order: list[int], gap: int) -> tuple[int, ...]:
    """Strides with the dims in any order of nesting, and gaps between them."""
    strides, span = [0] * len(shape), 1
    for dim in order:
        strides[dim], span = span, span * shape[dim] + gap
    return tuple(strides)


GRIDS = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 2))
TYPES = st.sampled_from([f32, f16, bf16, int32, int64, uint8, boolean, *(t for t in DTYPES.values() if t.nbits <= 8)])


@st.composite
def memories(draw: st.DrawFn, shape: tuple[int, ...], kind: DataType) -> Memory:
    """Memory that holds a tensor of a shape, in any order of dims, with gaps and reversed dims; row-major if packed."""
    seed = draw(st.integers(0, 99))
    if kind.nbits < 8:
        packed = random_memory(kind, math.prod(shape), seed)
        indices = np.arange(math.prod(shape)).reshape(shape)
        return Memory(packed, packed, tensor("mem", kind, shape), indices)
    strides = strides_of(shape, draw(st.permutations(range(len(shape)))), draw(st.integers(0, 2)))
    span = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    memory = random_memory(kind, span, seed)
    array = np.lib.stride_tricks.as_strided(memory, shape, tuple(s * memory.itemsize for s in strides))
    indices = np.lib.stride_tricks.as_strided(np.arange(span), shape, tuple(s * 8 for s in strides))
    if draw(st.booleans()):
        array, indices = array[::-1], indices[::-1]
    names = [tuple(Var(f"{letter}{i}", int64) for i in range(len(shape))) for letter in "ns"]
    return Memory(memory, array, tensor("mem", kind, names[0], names[1]), indices)


@dataclass
class Memory:
    """indices: the element of `memory` (its whole extent) that each element of the tensor is."""

    memory: npt.NDArray[Any]
    argument: npt.NDArray[Any]
    tensor: GlobalTensor
    indices: npt.NDArray[np.int64]

    def codes(self) -> list[int]:
        nbits = self.tensor.dtype.nbits
        return [bits_of(self.memory, n, nbits) for n in range(self.memory.nbytes * 8 // nbits)]


def decoded(kind: DataType, code: int) -> Any:
    return kind.decode(np.array([code], kind.storage))[0]


@settings(max_examples=300)
@given(accesses(), GRIDS, TYPES, st.data())
def test_loads_are_loops(access: Any, grid: tuple[int, int, int], kind: DataType, data: st.DataObject) -> None:
    shape, offsets, tile, dims = access
    memory = data.draw(memories(shape, kind))
    out, seen = RegisterTensor(kind, tile), []
    fn = function(Load(out, memory.tensor, offsets, dims), Probe(out, grid, seen), params=(memory.tensor,))
    run_reference(fn, {"mem": memory.argument}, grid)
    codes = memory.codes()
    for block in blocks(grid):
        for index, position, inside in elements(access, block):
            expected = decoded(kind, codes[memory.indices[position]]) if inside else 0
            np.testing.assert_equal(seen[0][block + index], expected)


@settings(max_examples=300)
@given(accesses(), GRIDS, TYPES, st.data())
def test_stores_are_loops(access: Any, grid: tuple[int, int, int], kind: DataType, data: st.DataObject) -> None:
    """Uniform values along some grid axes; blocks and elements that overlap; every other bit of memory stays."""
    shape, offsets, tile, dims = access
    memory = data.draw(memories(shape, kind))
    varying = tuple(n if data.draw(st.booleans()) else 1 for n in grid)
    values = kind.decode(finite_codes(kind, (*varying, *tile), data.draw(st.integers(0, 99))))
    src, condition = RegisterTensor(kind, tile), data.draw(CONDITIONS)
    store = If(condition, Inst(Store(memory.tensor, src, offsets, dims)), EMPTY)
    expected = memory.codes()
    run_reference(function(Give(src, values), store, params=(memory.tensor,)), {"mem": memory.argument}, grid)
    everywhere = np.broadcast_to(values, (*grid, *tile))
    for block in blocks(grid):
        if evaluate(condition, dict(zip((X, Y, Z), block, strict=True))):
            for index, position, inside in elements(access, block):
                if inside:
                    code = kind.encode(everywhere[block + index].reshape(1))[0]
                    expected[memory.indices[position]] = int(code)
    assert memory.codes() == expected


CONDITIONS = st.sampled_from([const(True), binary("!=", X, 1), binary("<", Y, 1), binary("==", binary("+", X, Y), 2)])


def finite_codes(kind: DataType, shape: tuple[int, ...], seed: int) -> npt.NDArray[Any]:
    """Codes that survive decoding and encoding: the canonical ones of the values of random codes."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, min(kind.max_code, 2**62), shape, endpoint=True).astype(kind.storage)
    return kind.encode(kind.decode(codes))


@given(accesses(), GRIDS, st.sampled_from([int32, f32, f16]), st.data())
def test_atomics_are_loops_in_block_order(
    access: Any, grid: tuple[int, int, int], kind: DataType, data: st.DataObject
) -> None:
    shape, offsets, tile, dims = access
    op = data.draw(st.sampled_from(["add", "min", "max", "exch"] + ([] if kind.is_float else ["and", "or", "xor"])))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    memory = rng.integers(-50, 50, shape).astype(kind.numpy)
    values = (rng.integers(-50, 50, (*grid, *tile)) / (8 if kind.is_float else 1)).astype(kind.compute)
    mem, src, old, seen = tensor("mem", kind, shape), RegisterTensor(kind, tile), RegisterTensor(kind, tile), []
    condition = data.draw(CONDITIONS)
    zero = np.zeros((1, 1, 1, *tile), kind.compute)
    atomic = Seq((Inst(Atomic(old, mem, src, offsets, dims, op)), Inst(Probe(old, grid, seen))))
    fn = function(Give(src, values), Give(old, zero), If(condition, atomic, EMPTY), params=(mem,))
    expected, olds = memory.copy(), np.zeros((*grid, *tile), kind.compute)
    for block in blocks(grid):
        if evaluate(condition, dict(zip((X, Y, Z), block, strict=True))):
            for index, position, inside in elements(access, block):
                if inside:
                    olds[block + index] = expected[position]
                    expected[position] = LOOP_OPS[op](expected[position].item(), values[block + index].item())
    run_reference(fn, {"mem": memory}, grid)
    np.testing.assert_array_equal(memory, expected)
    if seen:
        active = np.array([evaluate(condition, dict(zip((X, Y, Z), b, strict=True))) for b in blocks(grid)], np.bool_)
        chosen = active.reshape(grid)
        np.testing.assert_array_equal(seen[0][chosen], olds[chosen])


LOOP_OPS: dict[str, Any] = {
    "add": lambda a, b: a + b, "min": min, "max": max, "exch": lambda a, b: b,
    "and": lambda a, b: a & b, "or": lambda a, b: a | b, "xor": lambda a, b: a ^ b,
}  # fmt: skip


@given(st.integers(1, 40), st.integers(1, 3), st.sampled_from([1, 8, 1 << 20]))
def test_tickets_are_given_once_and_in_order(gx: int, gy: int, max_chunk_nbytes: int) -> None:
    counter, out = tensor("counter", int32, (1,)), tensor("out", int32, (gx, gy))
    one, ticket = RegisterTensor(int32, (1,)), RegisterTensor(int32, (1,))
    fn = function(
        Fill(one, const(1)), Atomic(ticket, counter, one, (const(0),), (0,), "add"), Store(out, ticket, (X, Y), (1,)),
        params=(counter, out),
    )  # fmt: skip
    count, found = np.zeros(1, np.int32), np.zeros((gx, gy), np.int32)
    run_reference(fn, {"counter": count, "out": found}, (gx, gy, 1), max_chunk_nbytes=max_chunk_nbytes)
    assert count[0] == gx * gy
    np.testing.assert_array_equal(found, np.arange(gx * gy).reshape(gx, gy))


@given(accesses(), GRIDS, st.data())
def test_unchecked_accesses_outside_are_refused_exactly_when_there_are_some(
    access: Any, grid: tuple[int, int, int], data: st.DataObject
) -> None:
    shape, offsets, tile, dims = access
    mem, t = tensor("mem", int32, shape), RegisterTensor(int32, tile)
    condition, writes = data.draw(CONDITIONS), data.draw(st.booleans())
    load, store = Load(t, mem, offsets, dims, checked=False), Store(mem, t, offsets, dims, checked=False)
    fn = function(Fill(t, const(1)), If(condition, Inst(store if writes else load), EMPTY), params=(mem,))
    outside = any(
        not inside
        for block in blocks(grid) if evaluate(condition, dict(zip((X, Y, Z), block, strict=True)))
        for _, _, inside in elements(access, block)
    )  # fmt: skip
    if outside:
        with pytest.raises(
            TilusError, match=r"of mem in block .*: index -?\d+ along dimension \d, expected 0 <= index < \d"
        ):
            run_reference(fn, {"mem": np.zeros(shape, np.int32)}, grid)
    else:
        run_reference(fn, {"mem": np.zeros(shape, np.int32)}, grid)


def test_a_tile_keeps_its_values_when_memory_changes() -> None:
    """Loads may share memory with the argument only where nobody writes it, be it through another argument."""
    a, b = tensor("a", f32, (4,)), tensor("b", f32, (4,))
    t, one, seen = RegisterTensor(f32, (4,)), RegisterTensor(f32, (4,)), []
    at = ((const(0),), (0,))
    body = [Load(t, a, *at), Fill(one, const(1.0)), Store(b, one, *at), Probe(t, (1, 1, 1), seen)]
    memory = np.zeros(8, np.float32)
    run_reference(function(*body, params=(a, b)), {"a": memory[2:6], "b": memory[:4]}, (1, 1, 1))
    assert memory.tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    assert seen[0].ravel().tolist() == [0, 0, 0, 0]


def test_loads_of_memory_that_is_only_read_copy_nothing() -> None:
    a, t, seen = tensor("a", f32, (8, 8)), RegisterTensor(f32, (4, 4)), []
    fn = function(Load(t, a, (binary("*", X, 4), const(4)), (0, 1)), Probe(t, (2, 1, 1), seen), params=(a,))
    memory = np.arange(64, dtype=np.float32).reshape(8, 8)
    run_reference(fn, {"a": memory}, (2, 1, 1))
    assert np.shares_memory(seen[0], memory)
    assert not seen[0].flags.writeable


@given(
    st.lists(st.tuples(st.booleans(), st.integers(0, 2), offset_exprs(), st.booleans()), max_size=6), GRIDS, st.data()
)
def test_shared_memory_is_private_and_unknown_until_written(
    steps: list[tuple[bool, int, Expr, bool]], grid: tuple[int, int, int], data: st.DataObject
) -> None:
    """Random stores and loads of a shared [3, 4] tensor; None marks an element that was never written."""
    shared, seen = SharedTensor(f16, (3, 4), name="buf"), []
    body, expected = [], []
    model: dict[tuple[int, ...], list[list[float | None]]] = {b: [[None] * 4 for _ in range(3)] for b in blocks(grid)}
    poisoned = False
    for number, (is_store, row, column, masked) in enumerate(steps):
        condition = data.draw(CONDITIONS) if masked else const(True)
        t, offsets = RegisterTensor(f16, (3,)), (const(row), column)
        value = np.arange(3, dtype=np.float32) + 10 * number + np.arange(grid[0], dtype=np.float32).reshape(-1, 1, 1, 1)
        store = Seq((Inst(Give(t, value)), Inst(Store(shared, t, offsets, (1,)))))
        load = Seq((Inst(Load(t, shared, offsets, (1,))), Inst(Probe(t, grid, seen))))
        body.append(If(condition, store if is_store else load, EMPTY))
        loaded: dict[tuple[int, ...], list[float | None]] = {}
        for block in blocks(grid):
            values: dict[Expr, Any] = dict(zip((X, Y, Z), block, strict=True))
            if not evaluate(condition, values):
                continue
            inside = [(i, int(evaluate(column, values)) + i) for i in range(3)]
            if is_store:
                for i, c in inside:
                    if 0 <= c < 4:
                        model[block][row][c] = float(value[block[0], 0, 0, i])
            else:
                loaded[block] = [model[block][row][c] if 0 <= c < 4 else 0.0 for _, c in inside]
        poisoned = any(None in row_values for row_values in loaded.values())
        if poisoned:
            break
        expected += [loaded] if loaded else []
    if poisoned:
        with pytest.raises(TilusError, match=r"shared tensor buf in block .* was never written"):
            run_reference(function(*body), {}, grid)
    else:
        run_reference(function(*body), {}, grid)
    assert len(seen) == len(expected)
    for found, loaded in zip(seen, expected, strict=True):
        for block, row_values in loaded.items():
            assert found[block].tolist() == row_values


def test_shared_atomics_count_per_block() -> None:
    shared, t, old, seen = SharedTensor(int32, (2,)), RegisterTensor(int32, (2,)), RegisterTensor(int32, (2,)), []
    add = Atomic(old, shared, t, (const(0),), (0,), "add")
    loop = For(Var("i", int32), const(0), binary("+", X, 1), 1, Inst(add))
    fn = function(
        Fill(t, const(0)), Store(shared, t, (const(0),), (0,)), Fill(t, const(2)), loop,
        Load(t, shared, (const(0),), (0,)), Probe(t, (3, 2, 1), seen),
    )  # fmt: skip
    run_reference(fn, {}, (3, 2, 1))
    np.testing.assert_array_equal(seen[0], np.array([2, 4, 6]).reshape(3, 1, 1, 1) * np.ones((3, 2, 1, 2)))


@given(st.integers(1, 30), st.integers(1, 8), st.data())
def test_gathered_rows(rows: int, columns: int, data: st.DataObject) -> None:
    """An index read from memory chooses a row of a pool, as pages of a cache are found; blocks beyond the list stop."""
    table = np.array(data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=6)), np.int32)
    pool = np.arange(rows * columns, dtype=np.float16).reshape(rows, columns)
    index, mem, out = (
        tensor("index", int32, table.shape),
        tensor("pool", f16, pool.shape),
        tensor("out", f16, (6, columns)),
    )
    row, t = Var("row", int32), RegisterTensor(f16, (columns,))
    body = [
        Element(row, index, (X,)),
        Load(t, mem.select(row), (const(0),), (0,), checked=False),
        Store(out, t, (X, const(0)), (1,)),
    ]
    guard = If(binary("<", X, table.size), Seq(tuple(map(Inst, body))), EMPTY)
    found = np.zeros((6, columns), np.float16)
    run_reference(function(guard, params=(index, mem, out)), {"index": table, "pool": pool, "out": found}, (6, 1, 1))
    np.testing.assert_array_equal(found, np.vstack([pool[table], np.zeros((6 - table.size, columns))]))


def test_masked_blocks_need_not_have_written() -> None:
    """Block 1 neither stores nor loads; the other blocks read what they wrote."""
    shared, t, grid, seen = SharedTensor(f32, (2,)), RegisterTensor(f32, (2,)), (3, 1, 1), []
    store = Store(shared, t, (const(0),), (0,))
    others = Seq(tuple(map(Inst, (store, Load(t, shared, (const(0),), (0,)), Probe(t, grid, seen)))))
    run_reference(function(Fill(t, const(1.5)), If(binary("!=", X, 1), others, EMPTY)), {}, grid)
    assert seen[0][[0, 2]].ravel().tolist() == [1.5] * 4


@given(
    st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.sampled_from([int1, uint2, int4, uint3, float6_e3m2])
)
def test_packed_rows_that_share_bytes(rows: int, columns: int, groups: int, kind: DataType) -> None:
    """Tiles of whole bytes from rows that begin within a byte."""
    width = 8 * groups + columns
    memory = random_memory(kind, (rows + 1) * width, columns)
    mem, t, grid, seen = tensor("mem", kind, (rows + 1, width)), RegisterTensor(kind, (2, 8)), (rows, 1, 1), []
    run_reference(
        function(Load(t, mem, (X, const(0)), (0, 1)), Probe(t, grid, seen), params=(mem,)), {"mem": memory}, grid
    )
    for block, i, j in itertools.product(range(rows), range(2), range(8)):
        code = bits_of(memory, (block + i) * width + j, kind.nbits)
        np.testing.assert_equal(seen[0][block, 0, 0, i, j], decoded(kind, code))


@given(st.integers(1, 9), st.sampled_from([1, 8, 1 << 20]))
def test_views_of_a_block_are_its_own_in_every_chunk(count: int, max_chunk_nbytes: int) -> None:
    mem, out = tensor("mem", int32, (count, 2)), tensor("out", int32, (count, 2))
    t = RegisterTensor(int32, (2,))
    fn = function(
        Load(t, mem.select(X), (const(0),), (0,)), Store(out.select(X), t, (const(0),), (0,)), params=(mem, out)
    )
    data, found = np.arange(2 * count, dtype=np.int32).reshape(count, 2), np.zeros((count, 2), np.int32)
    run_reference(fn, {"mem": data, "out": found}, (count, 1, 1), max_chunk_nbytes=max_chunk_nbytes)
    np.testing.assert_array_equal(found, data)


@pytest.mark.parametrize("dims", [(0, 1), (1, 0), (0,), (1,)])
@pytest.mark.parametrize("step", [0, 1, 2, -3])
def test_every_overlap_of_a_tile_with_an_edge(dims: tuple[int, ...], step: int) -> None:
    """A [4, 5] tensor and tiles that begin anywhere around it, in blocks along x that move by `step` rows.

    All blocks along y write the same place: the last one's values stay.
    """
    grid, shape, tile = (3, 2, 1), (4, 5), (2, 3)[: len(dims)]
    numbers = np.arange(1, 1 + math.prod((*grid, *tile)), dtype=np.float32).reshape(*grid, *tile)
    mem, t = tensor("mem", f32, shape), RegisterTensor(f32, tile)
    for row, column in itertools.product(range(-4, 6), range(-4, 7)):
        offsets = (binary("+", binary("*", X, step), row), const(column))
        access = (shape, offsets, tile, dims)
        before = np.arange(100, 120, dtype=np.float32).reshape(shape)
        seen: list[npt.NDArray[Any]] = []
        run_reference(function(Load(t, mem, offsets, dims), Probe(t, grid, seen), params=(mem,)), {"mem": before}, grid)
        stored, expected = before.copy(), before.copy()
        run_reference(function(Give(t, numbers), Store(mem, t, offsets, dims), params=(mem,)), {"mem": stored}, grid)
        for block in blocks(grid):
            for index, position, inside in elements(access, block):
                assert seen[0][block + index] == (before[position] if inside else 0)
                if inside:
                    expected[position] = numbers[block + index]
        np.testing.assert_array_equal(stored, expected)
