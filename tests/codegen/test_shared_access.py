"""An access to shared memory costs what the emulator counts when it runs the PTX: instructions, wavefronts and conflicts.

The emulator's count (`emulator.stats`) shares no code with `tilus.layout.banks` or with the code that is tested here.
"""

from __future__ import annotations

from fractions import Fraction
from itertools import product
from math import prod
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import tilus
from tilus import Const, Tensor, TilusError, f16, f32
from tilus.codegen.shared_access import AccessCost, SharedAccess
from tilus.compiler import Compiled, compile_function
from tilus.dtypes import DataType
from tilus.layout import (
    RegisterLayout,
    SharedLayout,
    atoms,
    column_local,
    column_major,
    identity,
    local,
    padded,
    replicated,
    row_major,
    spatial,
    strided,
    swizzled,
)
from tilus.layout.candidates import ELABORATE_KINDS, orders, plain, variants
from tilus.layout.operands import wgmma_operands
from tilus.runtime.emulator import run_kernel
from tilus.target import DEFAULT_TARGET
from tilus.transforms.layout_shared import uses

SHAPE = (32, 64)
MEMORIES = {
    "row-major": row_major(SHAPE),
    "padded": padded(SHAPE, 8),
    "padded by one": padded(SHAPE, 1),
    "column-major": column_major(SHAPE),
    "swizzled": swizzled(SHAPE, 2),
    "swizzled by words": row_major(SHAPE).swizzled(1, 5, 5),
    "core matrices": wgmma_operands(SHAPE, 2)[-1],
    "digits of three": strided(((2, 16), 64), ((3200, 96), 1)),
}
TILES = {
    "rows": spatial(2, 32).local(16, 2),
    "columns": spatial(32, 2).local(1, 32),
    "columns of single elements": spatial(1, 2).column_spatial(32, 1).local(1, 32),
    "replicated in the warp": spatial(8, 4).replicated(2).local(4, 16),
    "replicated over warps": replicated(2, 2).spatial(8, 4).local(4, 16),
    "held twice by a thread": spatial(8, 8).local_replicated(2).local(4, 8),
    "three warps": spatial(1, 1).replicated(3).spatial(4, 8).local(8, 8),
    "a": spatial(2, 1).local(1, 4) * atoms.mma_a(),
    "b": spatial(1, 2).local(2, 4) * atoms.mma_b(),
    "accumulator": spatial(2, 1).local(1, 8) * atoms.mma_c(),
}


@tilus.kernel
def through(*, dtype: Const, memory: Const, tile: Const, start: Const):
    tilus.grid(1, warps=tile.num_threads // 32)
    s = tilus.shared(dtype, memory.shape, layout=memory)
    there_and_back(s, start, tile)


def there_and_back(s: Any, start: Any, tile: RegisterLayout) -> None:
    """Two writing accesses, between them a reading one."""
    tilus.store_shared(s, tilus.zeros(tile.shape, s.dtype, layout=tile), start)
    tilus.sync()
    value = tilus.load_shared(s, start, tile.shape, layout=tile)
    tilus.sync()
    tilus.store_shared(s, value, start)


@tilus.kernel
def everywhere(*, dtype: Const, memory: Const, tile: Const, steps: Const):
    tilus.grid(1, warps=tile.num_threads // 32)
    s = tilus.shared(dtype, memory.shape, layout=memory)
    for i in tilus.range((memory.shape[0] - tile.shape[0]) // steps[0] + 1):
        for j in tilus.range((memory.shape[1] - tile.shape[1]) // steps[1] + 1):
            there_and_back(s, [i * steps[0], j * steps[1]], tile)
            tilus.sync()


@tilus.kernel
def copies(x: Tensor["t", "m", "n"], *, memory: Const, shape: Const, start: Const):
    tilus.grid(1, warps=2)
    s = tilus.shared(x.dtype, memory.shape, layout=memory)
    tilus.copy_async(x, [0, 0], s, shape=shape, dst_offsets=start)
    tilus.commit()
    tilus.wait(0)


def compiled(kernel: Any, **values: Any) -> Compiled:
    return compile_function(kernel.specialize(**values).function, DEFAULT_TARGET)


def told(code: Compiled) -> dict[bool, list[AccessCost]]:
    """The costs of all reading and of all writing accesses."""
    costs: dict[bool, list[AccessCost]] = {}
    for tensor, accesses in uses(code.function, code.target).items():
        for use in accesses:
            cost = None if tensor.layout is None else use.access.cost(tensor.layout)
            assert cost is not None
            costs.setdefault(use.access.writes, []).append(cost)
    return costs


def counted(code: Compiled, nbytes: int = 0) -> dict[bool, tuple[int, int, int]]:
    """(instructions, phases, wavefronts) of all reading and of all writing instructions while the emulator runs."""
    arrays = [np.zeros(nbytes, np.uint8)] if nbytes else []
    stats = run_kernel(code.ptx, code.kernel_name, (1, 1, 1), arrays, profile=True, seed=None).stats
    totals: dict[bool, tuple[int, int, int]] = {}
    for site in stats.shared.values():
        writes = site.opcode.startswith(("st", "cp.async"))
        old = totals.get(writes, (0, 0, 0))
        totals[writes] = (old[0] + site.accesses, old[1] + site.ideal, old[2] + site.transactions)
    return totals


def expected(code: Compiled, times: int = 1) -> dict[bool, tuple[int, int, Fraction]]:
    """The same as told; `times` is how often every access runs."""
    return {
        writes: (
            times * sum(cost.instructions for cost in costs),
            times * sum(cost.phases for cost in costs),
            times * sum((cost.wavefronts for cost in costs), Fraction(0)),
        )
        for writes, costs in told(code).items()
    }


@pytest.mark.sampled(9)
@pytest.mark.parametrize("memory", MEMORIES.values(), ids=MEMORIES)
@pytest.mark.parametrize("tile", TILES.values(), ids=TILES)
def test_f16_tiles(tile: RegisterLayout, memory: SharedLayout) -> None:
    code = compiled(through, dtype=f16, memory=memory, tile=tile, start=(0, 0))
    assert expected(code) == counted(code)


def test_matrices_are_read_where_rows_are_16_aligned_bytes() -> None:
    """Also along columns of column-major memory; never where rows are 130 bytes apart."""

    def by_matrices(tile: str, memory: str) -> bool:
        code = compiled(through, dtype=f16, memory=MEMORIES[memory], tile=TILES[tile], start=(0, 0))
        (cost,) = told(code)[False]
        assert ("ldmatrix" in code.ptx) == cost.matrices
        return cost.matrices

    for tile in ("a", "b", "accumulator"):
        for memory in ("row-major", "padded", "column-major", "swizzled", "core matrices", "digits of three"):
            assert by_matrices(tile, memory)
        assert not by_matrices(tile, "padded by one")
        assert not by_matrices(tile, "swizzled by words")
    assert not by_matrices("rows", "row-major")


UINTS: dict[int, DataType] = {nbits: getattr(tilus, f"uint{nbits}") for nbits in range(1, 9)}
WIDTHS = [*UINTS.values(), tilus.float8_e4m3, f16, f32, tilus.int64, tilus.boolean]


@pytest.mark.sampled(6)
@pytest.mark.parametrize("dtype", WIDTHS, ids=str)
@pytest.mark.parametrize("memory", [padded(SHAPE, 32), row_major(SHAPE).swizzled(3, 2, 5)], ids=str)
@pytest.mark.parametrize("tile", [spatial(4, 8).local(8, 8), spatial(32, 2).local(1, 32)], ids=str)
def test_every_width(dtype: DataType, tile: RegisterLayout, memory: SharedLayout) -> None:
    code = compiled(through, dtype=dtype, memory=memory, tile=tile, start=(0, 0))
    assert expected(code) == counted(code)


@pytest.mark.parametrize(("nbits", "size"), [(1, 4), (2, 2), (4, 1), (3, 4), (6, 2)])
def test_parts_of_bytes_are_refused(nbits: int, size: int) -> None:
    """Where the rows have no whole bytes, so that no layout of the tile can do."""
    dtype = UINTS[nbits]
    tile = spatial(32, 1).local(1, size)
    with pytest.raises(TilusError, match=rf"runs of \d elements of uint{nbits} of s,"):
        compiled(through, dtype=dtype, memory=padded(tile.shape, 1), tile=tile, start=(0, 0))


@pytest.mark.parametrize("shape", [(32, 64), (2, 8)], ids=str)
@pytest.mark.parametrize("memory", MEMORIES.values(), ids=MEMORIES)
@pytest.mark.parametrize("dtype", [tilus.uint8, f32, tilus.uint4], ids=str)
def test_asynchronous_copies(dtype: DataType, memory: SharedLayout, shape: tuple[int, int]) -> None:
    """Tiles that fewer threads than the block has copy, too."""
    values = {"t": dtype, "m": 32, "n": 64, "memory": memory, "shape": shape, "start": (0, 0)}
    access = only_access(copies, values)
    if not access.moves_whole_units(memory):
        with pytest.raises(TilusError, match=r"cp\.async moves 4, 8 or 16 bytes"):
            compiled(copies, **values)
        assert access.cost(memory) is None
        return
    code = compiled(copies, **values)
    assert expected(code) == counted(code, 32 * 64 * dtype.nbits // 8)


def only_access(kernel: Any, values: dict[str, Any]) -> SharedAccess:
    from tilus.transforms import run_pipeline

    function = run_pipeline(kernel.specialize(**values).function, DEFAULT_TARGET, after="infer_layouts")
    ((use,),) = uses(function, DEFAULT_TARGET).values()
    return use.access


# ---- random accesses


@st.composite
def tiles(draw: st.DrawFn) -> RegisterLayout:
    """Layouts of 1 to 3 warps: factors of any kind in any order."""
    threads = draw(st.sampled_from([32, 64, 96]))
    factors: list[RegisterLayout] = []
    while threads > 1:
        size = draw(st.sampled_from([n for n in (2, 3, 4, 8, 16, 32) if threads % n == 0]))
        kind = draw(st.sampled_from(["row", "row", "column", "column", "replicated"]))
        shape = (size, 1) if kind == "row" else (1, size)
        factors.append(replicated(size, 2) if kind == "replicated" else spatial(*shape))
        threads //= size
    for size in draw(st.lists(st.sampled_from([2, 3, 4, 8]), max_size=3)):
        factors.append(draw(st.sampled_from([local(1, size), local(size, 1), column_local(2, size)])))
    layout = identity(2)
    for factor in draw(st.permutations(factors)):
        layout = layout * factor
    assume(layout.num_locals <= 64 and prod(layout.shape) <= 4096)
    return layout


@st.composite
def fragments(draw: st.DrawFn) -> RegisterLayout:
    """Tiles of 8x8 matrices, upright or not, of one or two warps; three matrices do not fit into one instruction."""
    atom = draw(st.sampled_from([atoms.ldmatrix(), atoms.ldmatrix_trans(), atoms.mma_a(), atoms.ldmatrix(8)]))
    repeat = local(draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2, 4])))
    warps = draw(st.sampled_from([identity(2), spatial(2, 1), spatial(1, 2), replicated(2, 2)]))
    return warps * draw(st.sampled_from([repeat, repeat.permute((1, 0))])) * atom


@st.composite
def memories(draw: st.DrawFn, shape: tuple[int, int], nbits: int) -> SharedLayout:
    """Candidates of all kinds, and strides that are none."""
    order = draw(st.sampled_from(orders(shape)))
    pad = draw(st.integers(0, 9))
    found = [plain(shape, order), strided(shape, (shape[1] + pad, 1)), strided(shape, (1, shape[0] + pad))]
    for kind in ELABORATE_KINDS:
        found += variants(kind, shape, nbits, order)
    return draw(st.sampled_from(found))


@st.composite
def cases(draw: st.DrawFn) -> tuple[DataType, SharedLayout, RegisterLayout, tuple[int, int]]:
    """An access that can be made: dtype, memory, tile, and the steps in which the tile may be placed."""
    dtype = draw(st.sampled_from([tilus.uint8, f16, f16, f32, tilus.int64, tilus.uint4, tilus.uint6]))
    tile = draw(st.one_of(tiles(), fragments()))
    steps = draw(st.tuples(st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 4, 8, 16])))
    rows, columns = (extent + step * draw(st.integers(0, 3)) for extent, step in zip(tile.shape, steps))
    memory = draw(memories((rows, columns), dtype.nbits))
    assume(memory.size * dtype.nbits <= 8 * 20000)
    access = placed_access(dtype, memory, tile, steps)
    assume(access.moves_whole_units(memory))
    return dtype, memory, tile, steps


def placed_access(
    dtype: DataType, memory: SharedLayout, tile: RegisterLayout, steps: tuple[int, int], writes: bool = False
) -> SharedAccess:
    starts = tuple(range(0, extent - part + 1, step) for extent, part, step in zip(memory.shape, tile.shape, steps))
    return SharedAccess(dtype, memory.shape, tile, starts, (0, 1), writes, by_matrices=not writes)


@settings(max_examples=40)
@given(cases())
def test_the_emulator_counts_the_same_at_all_positions(
    case: tuple[DataType, SharedLayout, RegisterLayout, tuple[int, int]],
) -> None:
    dtype, memory, tile, steps = case
    try:
        code = compiled(everywhere, dtype=dtype, memory=memory, tile=tile, steps=steps)
    except TilusError as error:  # address arithmetic for digits of a weight such as 3
        assume("digits of weight" not in error.message)
        raise
    positions = prod((m - t) // step + 1 for m, t, step in zip(memory.shape, tile.shape, steps))
    assert expected(code, positions) == counted(code)


@settings(max_examples=40)
@given(cases(), st.booleans())
def test_the_mean_and_the_worst_are_those_of_the_single_positions(
    case: tuple[DataType, SharedLayout, RegisterLayout, tuple[int, int]], writes: bool
) -> None:
    dtype, memory, tile, steps = case
    access = placed_access(dtype, memory, tile, steps, writes)
    cost = access.cost(memory)
    assert cost is not None
    counts: list[int] = []
    for start in product(*access.starts):
        # The width must hold at every position, so each range keeps the divisor of all of them.
        slots = slice(None, None, 16 * 8 // dtype.nbits if cost.matrices else access.vector_size(memory))
        matrices = access.matrices(memory)
        layout = tile if matrices is None else matrices.rows
        index = layout.table()[:, slots] + np.array(start)
        addresses = memory.table()[index[..., 0], index[..., 1]] * dtype.nbits // 8
        counts.append(serve(addresses, tile, cost, writes, dtype, access.vector_size(memory)))
    assert cost.wavefronts == Fraction(sum(counts), len(counts))
    assert cost.worst == max(counts)


def serve(addresses: Any, tile: RegisterLayout, cost: AccessCost, writes: bool, dtype: DataType, size: int) -> int:
    """Wavefronts of a block, bank by bank: addresses [threads, accesses]."""
    acting = {tile.owner(index)[0][0] for index in np.ndindex(*tile.shape)}  # the first of the owners of an element
    lanes = 8 if cost.matrices else 32
    pieces = 1 if cost.nbytes * 8 >= size * dtype.nbits or cost.matrices else size * dtype.nbits // 8
    per_phase = 128 // max(4, cost.nbytes)
    total = 0
    for warp in range(0, len(addresses), lanes):
        for column in range(addresses.shape[1]):
            for piece in range(pieces):
                for phase in range(warp, warp + lanes, per_phase):
                    threads = [
                        t for t in range(phase, min(phase + per_phase, warp + lanes)) if not writes or t in acting
                    ]
                    words = {(addresses[t, column] + piece + byte) // 4 for t in threads for byte in range(cost.nbytes)}
                    total += max((sum(w % 32 == bank for w in words) for bank in range(32)), default=0)
    return total


@tilus.kernel
def a_word(*, memory: Const, steps: Const):
    tilus.grid(1, warps=1)
    s = tilus.shared(f32, memory.shape, layout=memory)
    for i in tilus.range((memory.shape[0] - 2) // steps + 1):
        there_and_back(s, [i * steps, 0], replicated(16, 2) * spatial(2, 1))
        tilus.sync()


@pytest.mark.parametrize(("steps", "mean", "worst"), [(1, Fraction(4, 3), 2), (2, Fraction(1), 1)])
def test_the_worst_is_what_the_emulator_sees(steps: int, mean: Fraction, worst: int) -> None:
    """Rows 0 to 3 are words 0, 1, 33 and 34: only rows 1 and 2 share a bank."""
    code = compiled(a_word, memory=strided(((2, 2), 1), ((33, 1), 1)), steps=steps)
    assert {(cost.wavefronts, cost.worst) for costs in told(code).values() for cost in costs} == {(mean, worst)}
    stats = run_kernel(code.ptx, code.kernel_name, (1, 1, 1), [], profile=True).stats
    assert {site.worst for site in stats.shared.values()} == {worst}


def test_of_warps_with_the_same_matrices_one_writes() -> None:
    tile = replicated(2, 2) * local(1, 4) * atoms.ldmatrix()
    costs = [
        SharedAccess(f16, (8, 32), tile, (range(1), range(1)), (0, 1), writes, by_matrices=True).cost(
            padded((8, 32), 8)
        )
        for writes in (False, True)
    ]
    assert [(c.matrices, c.instructions, c.phases, c.wavefronts) for c in costs if c is not None] == [
        (True, 2, 8, 8),
        (True, 1, 4, 4),
    ]


def test_where_words_begin_counts() -> None:
    """Bytes p and p + 127 are in words of one bank unless p is a multiple of 4."""
    memory = strided((2, 4), (127, 1))
    tile = replicated(16, 2) * spatial(2, 1)
    cost = SharedAccess(tilus.uint8, (2, 4), tile, (range(1), range(4)), (0, 1)).cost(memory)
    assert cost is not None and (cost.wavefronts, cost.worst) == (Fraction(7, 4), 2)


def test_bounds_and_divisors_limit_the_positions() -> None:
    from tilus.codegen.shared_access import shared_access
    from tilus.ir.expr import Var, as_expr, binary
    from tilus.ir.tensor import SharedTensor

    tensor = SharedTensor(f16, (5, 64, 64), None, "s")
    stage, row = Var("stage", tilus.int32), Var("row", tilus.int32, lower=10, multiple_of=8)
    offsets = (binary("%", stage, as_expr(4)), row, as_expr(8))
    access = shared_access(tensor, spatial(16, 2).local(1, 8), offsets, (1, 2), (16, 16))
    assert access.starts == (range(4), range(16, 49, 8), range(8, 9))
