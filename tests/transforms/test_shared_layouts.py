"""The layout of every shared tensor is the cheapest of its candidates, and the one that its instructions can work with."""

from __future__ import annotations

import runpy
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import tilus
from tilus import Const, Tensor, f16, f32
from tilus.codegen.shared_access import SharedAccess, shared_access
from tilus.compiler import compile_function
from tilus.dtypes import DataType
from tilus.ir.expr import as_expr
from tilus.ir.function import Function
from tilus.ir.instruction import Instruction
from tilus.ir.stmt import EMPTY
from tilus.ir.tensor import SharedTensor
from tilus.kernels.attention import paged_attention_kernel
from tilus.layout import (
    RegisterLayout,
    SharedLayout,
    atoms,
    auto,
    column_major,
    local,
    padded,
    row_major,
    spatial,
    strided,
    swizzled,
)
from tilus.layout.candidates import ELABORATE_KINDS, orders, plain, variants
from tilus.runtime.emulator import run_kernel
from tilus.runtime.emulator.stats import wavefronts
from tilus.target import DEFAULT_TARGET, get_target
from tilus.transforms import run_pipeline
from tilus.transforms.layout_shared import Candidate, Use, best, candidates, layout_shared, uses

EXAMPLES = Path(__file__).parents[2] / "examples"


def placed(kernel: Any, target: str = DEFAULT_TARGET.name, **values: Any) -> Function:
    return run_pipeline(kernel.specialize(**values).function, get_target(target))


def layouts(function: Function) -> dict[str, SharedLayout | None]:
    return {tensor.name: tensor.layout for tensor in uses(function, DEFAULT_TARGET)}


# ---- examples and library


PAGED = [
    {
        "dtype": dtype,
        "unit": dtype,
        "out_dtype": dtype,
        "group": group,
        "head_dim": head_dim,
        "page_size": 16,
        "rows": rows,
        "kv_tile": kv_tile,
    }
    for dtype, group, head_dim, rows, kv_tile in (
        (f16, 3, 64, 16, 64),
        (tilus.bf16, 4, 128, 16, 64),
        (tilus.bf16, 4, 128, 64, 32),
        (f16, 1, 96, 64, 32),
        (f16, 1, 80, 16, 64),
    )
]


def check_without_conflicts(function: Function) -> None:
    found = [
        (use.access, tensor.layout) for tensor, accesses in uses(function, DEFAULT_TARGET).items() for use in accesses
    ]
    assert found
    for access, layout in found:
        assert layout is not None
        cost = access.cost(layout)
        assert cost is not None and cost.worst_conflicts == 0 and cost.wavefronts == cost.phases


@pytest.mark.parametrize("name", ["matmul_v1", "matmul_v2", "matmul_v3", "matmul_v4", "attention"])
def test_examples_have_no_conflicts(name: str) -> None:
    module = runpy.run_path(str(EXAMPLES / f"{name}.py"))
    check_without_conflicts(placed(module[name.split("_v")[0]]))


@pytest.mark.parametrize("values", PAGED, ids=lambda v: f"{v['head_dim']}-{v['rows']}")
def test_paged_attention_has_no_conflicts(values: dict[str, Any]) -> None:
    check_without_conflicts(placed(paged_attention_kernel, **values))


# ---- the choice, against all candidates counted by the emulator's counter


def as_uses(accesses: Sequence[tuple[SharedAccess, int]]) -> list[Use]:
    return [Use(access, weight, "access", None) for access, weight in accesses]


def width(addresses_nbits: Any, nbits: int, widest: int) -> int:
    """Elements that every thread can move at once everywhere: addresses [..., slots] that follow each other, aligned."""
    for size in (128, 64, 32, 16, 8, 4, 2):
        if size * nbits > 128 or addresses_nbits.shape[-1] % size or size > widest:
            continue
        groups = addresses_nbits.reshape(-1, size)
        if np.all(groups[:, 0] % (size * nbits) == 0) and np.all(np.diff(groups, axis=1) == nbits):
            return size
    return 1


def addresses_of(access: SharedAccess, memory: SharedLayout) -> Any:
    """In bits: [positions, threads, slots]."""
    assert access.layout is not None
    starts = np.array(list(product(*access.starts)))
    index = access.layout.table()[None] + starts[:, None, None]
    return memory.table()[index[..., 0], index[..., 1]] * access.dtype.nbits


@given(st.data())
def test_vectors_are_aligned_runs_under_any_digits(data: st.DataObject) -> None:
    """What the symbolic derivation allows, the addresses allow; never the other way round by more than caution."""
    sizes = data.draw(st.tuples(*(st.lists(st.sampled_from([2, 3, 4, 5, 15]), min_size=1, max_size=2) for _ in "ab")))
    strides = [1, 2, 4, 6, 8, 16, 24, 40, 64]
    steps = [[data.draw(st.sampled_from(strides)) for _ in dim] for dim in sizes]
    inner = data.draw(st.sampled_from([8, 16, 32]))
    memory = strided([(*sizes[0],), (*sizes[1], inner)], [(*steps[0],), (*(32 * s for s in steps[1]), 1)])
    shape = memory.shape
    step = data.draw(st.sampled_from([1, 2, 6, 10, 20]))
    columns = data.draw(st.sampled_from([n for n in (8, 16) if n <= shape[1]]))
    starts = (range(0, shape[0], step), range(0, shape[1] - columns + 1, data.draw(st.sampled_from([4, 8, 16]))))
    access = SharedAccess(tilus.uint8, (shape[0], shape[1]), spatial(1, 1).local(1, columns), starts, (0, 1))
    assert access.vector_size(memory) <= width(addresses_of(access, memory), 8, 128)


def test_a_digit_of_four_at_multiples_of_ten() -> None:
    """Row 20 begins at 5 * 24 bytes, though row 10 begins at 2 * 24."""
    memory = strided(((15, 4), 16), ((24, 360), 1))
    access = SharedAccess(tilus.uint8, (60, 16), spatial(1, 1).local(1, 16), (range(0, 60, 10), range(1)), (0, 1))
    assert access.vector_size(memory) == width(addresses_of(access, memory), 8, 128) == 8


def emulated_cost(access: SharedAccess, memory: SharedLayout) -> Fraction | None:
    """Instructions plus mean wavefronts of an access by vectors."""
    assert access.layout is not None
    nbits = access.dtype.nbits
    addresses = addresses_of(access, memory)
    size = width(addresses, nbits, access.widest)
    nbytes, rest = divmod(size * nbits, 8)
    if rest or nbytes < access.least_nbytes:
        return None
    moved = addresses[:, :, ::size].transpose(0, 2, 1) // 8  # [positions, accesses, threads]
    # Every position and access becomes a block of threads of its own, so that the emulator counts them all at once.
    threads = np.arange(moved.size).reshape(moved.shape)
    if access.writes:
        owners = sorted({access.layout.owner(i)[0][0] for i in np.ndindex(*access.layout.shape)})
        moved, threads = moved[..., owners], threads[..., owners]
    taken, _ = wavefronts(moved.reshape(-1), nbytes, threads.reshape(-1))
    return Fraction(int(taken.sum()) + len(taken), len(addresses))


def all_layouts(shape: tuple[int, int], nbits: int) -> list[SharedLayout]:
    found = [plain(shape, order) for order in orders(shape)]
    for kind, order in product(ELABORATE_KINDS, orders(shape)):
        found += variants(kind, shape, nbits, order)
    return found


@st.composite
def access_sets(draw: st.DrawFn, matrices: bool = False) -> tuple[SharedTensor, list[tuple[SharedAccess, int]]]:
    """One to three accesses of a small matrix by one or two warps, with weights. matrices: perhaps one by ldmatrix, too."""
    dtype: DataType = draw(st.sampled_from([tilus.uint8, f16, f32, tilus.uint4]))
    shape = draw(st.sampled_from([(8, 32), (32, 16), (16, 24), (4, 64), (64, 8), (8, 36)]))
    accesses: list[tuple[SharedAccess, int]] = []
    for _ in range(draw(st.integers(1, 3))):
        rows = draw(st.sampled_from([n for n in (1, 2, 4, 8, 16, 32, 64) if shape[0] % n == 0]))
        columns = draw(st.sampled_from([n for n in (1, 3, 8, 16, 32, 64) if n <= shape[1]]))
        order = draw(st.sampled_from([(0, 1), (1, 0)]))
        tile = auto((rows, columns), draw(st.sampled_from([32, 64])), draw(st.sampled_from([1, 2, 4, 8, 16])), order)
        starts = (range(0, shape[0] - rows + 1, rows), range(0, shape[1] - columns + 1, columns))
        copies = draw(st.sampled_from([1, 1, 4]))
        access = SharedAccess(
            dtype, shape, tile, starts, (0, 1), draw(st.booleans()) or copies == 4, least_nbytes=copies
        )
        accesses.append((access, draw(st.sampled_from([1, 8]))))
    if matrices and dtype == f16 and shape != (8, 36) and shape != (4, 64):
        atom = draw(st.sampled_from([atoms.ldmatrix(), atoms.ldmatrix_trans()]))
        tile = local(shape[0] // 8, shape[1] // 8) * atom
        accesses.append((SharedAccess(dtype, shape, tile, (range(1), range(1)), (0, 1), by_matrices=True), 8))
    return SharedTensor(dtype, shape), accesses


@settings(max_examples=12)
@given(access_sets())
def test_no_candidate_is_better_than_the_choice(found: tuple[SharedTensor, list[tuple[SharedAccess, int]]]) -> None:
    tensor, accesses = found
    costs: dict[SharedLayout, Fraction] = {}
    for layout in all_layouts((tensor.shape[0], tensor.shape[1]), tensor.dtype.nbits):
        parts = [(emulated_cost(access, layout), weight) for access, weight in accesses]
        possible = [cost * weight for cost, weight in parts if cost is not None]
        if len(possible) == len(parts):
            costs[layout] = sum(possible, Fraction(0))
    assume(costs)
    choice = best(tensor, as_uses(accesses))
    assert choice.cost == costs[choice.layout] == min(costs.values())
    assert choice.layout.size == min(layout.size for layout, cost in costs.items() if cost == choice.cost)


@settings(max_examples=30)
@given(access_sets(matrices=True), st.booleans())
def test_the_choice_is_the_first_of_the_ranking(
    found: tuple[SharedTensor, list[tuple[SharedAccess, int]]], compact: bool
) -> None:
    """The search leaves out candidates that cannot win; the ranking does not."""
    tensor, accesses = found
    ranked = candidates(tensor, as_uses(accesses))
    if compact:
        ranked = [candidate for candidate in ranked if candidate.layout.size == prod(tensor.shape)]
    choice = best(tensor, as_uses(accesses), compact=compact)
    if ranked:
        assert choice.rank == ranked[0].rank and choice == ranked[0]
    else:
        assert choice.layout == row_major(tensor.shape)
    assert choice == best(tensor, as_uses(accesses[::-1]), compact=compact)


def chosen(dtype: DataType, shape: tuple[int, ...], *tiles: tuple[RegisterLayout, bool]) -> Candidate:
    tensor = SharedTensor(dtype, shape)
    offsets = tuple(as_expr(0) for _ in shape)
    accesses = [
        shared_access(
            tensor, tile, offsets, tuple(range(len(shape))), tile.shape, writes=writes, by_matrices=not writes
        )
        for tile, writes in tiles
    ]
    return best(tensor, as_uses([(access, 1) for access in accesses]))


def test_the_simplest_of_the_best() -> None:
    rows, columns = spatial(8, 4).local(1, 8), spatial(32, 1).local(1, 32)
    assert chosen(f16, (8, 32), (rows, True)).kind == "row-major"
    assert chosen(f32, (32, 32), (spatial(1, 32).local(32, 1), True), (columns, False)).kind == "swizzled"
    transposed = auto((32, 32), 32, 4, order=(0, 1))
    assert chosen(f32, (32, 32), (transposed, True), (transposed, False)).layout == column_major((32, 32))
    fragments = spatial(2, 1).local(1, 4) * atoms.mma_a()
    assert chosen(f16, (32, 64), (auto((32, 64), 64, 8), True), (fragments, False)).layout == swizzled((32, 64), 2)
    assert chosen(tilus.uint8, (8, 4), (spatial(8, 4), True)).kind == "row-major"


def test_dims_of_one_index_do_not_hide_the_contiguous_one() -> None:
    rows, columns = spatial(16, 2).local(1, 16), auto((16, 32), 32, 8, order=(0, 1))
    flat = chosen(f16, (16, 32), (rows, True), (columns, False))
    upright = chosen(f16, (16, 32, 1), (rows.unsqueeze(2), True), (columns.unsqueeze(2), False))
    assert (flat.cost, flat.kind) == (upright.cost, upright.kind) and flat.layout.unsqueeze(2) == upright.layout


def test_the_smallest_of_the_best() -> None:
    """Twelve rows of 128 bytes are three periods of the swizzle by two bits, and one and a half of that by three."""
    rows, columns = auto((12, 32), 32, 4), auto((12, 32), 32, 1, order=(0, 1))
    choice = chosen(f32, (12, 32), (rows, True), (columns, False))
    assert choice.layout == row_major((12, 32)).swizzled(2, 2, 3) and choice.layout.size == 12 * 32
    assert row_major((12, 32)).swizzled(2, 3, 3).size == 512


@tilus.kernel
def rows_and_columns(y: Tensor[f32, 64, 64], n: int, *, trips: Const):
    tilus.grid(1, warps=2)
    s = tilus.shared(f32, [64, 64])
    tilus.store_shared(s, tilus.zeros([64, 64], f32, layout=spatial(2, 32).local(32, 2)))
    tilus.sync()
    acc = tilus.zeros([64, 64], f32, layout=spatial(64, 1).local(1, 64))
    for _ in tilus.range(n if trips is None else trips):
        acc = acc + tilus.load_shared(s, layout=spatial(64, 1).local(1, 64))
    tilus.store(y, [0, 0], acc)


def test_accesses_in_loops_count_more() -> None:
    def weights(trips: int | None) -> dict[str, int]:
        (accesses,) = uses(placed(rows_and_columns, trips=trips), DEFAULT_TARGET).values()
        return {use.mnemonic: use.weight for use in accesses}

    assert weights(None) == {"store_shared": 1, "load_shared": 8}
    assert weights(5) == {"store_shared": 1, "load_shared": 5}


# ---- memory


@tilus.kernel
def large(y: Tensor[f16, "m", "n"], first: int, *, rows: Const):
    tilus.grid(1, warps=1)
    s = tilus.shared(f16, [rows, 36])
    tilus.store(y, [0, 0], tilus.load_shared(s, [first, 0], [32, 32], layout=spatial(32, 1).local(1, 32)))


def test_padding_gives_way_when_memory_is_short() -> None:
    """Rows of 72 bytes can be read 16 bytes at a time if they are padded to 80, but not if that is more than there is."""
    limit = DEFAULT_TARGET.max_shared_nbytes

    def layout(rows: int) -> SharedLayout:
        (found,) = layouts(placed(large, rows=rows)).values()
        assert found is not None
        return found

    assert layout(96) == padded((96, 36), 4)
    assert layout(limit // 72).size * 2 <= limit < padded((limit // 72, 36), 4).size * 2


def test_the_pass_gives_back_the_same_object_without_shared_tensors() -> None:
    function = placed(rows_and_columns, trips=1)
    assert layout_shared(function, DEFAULT_TARGET) is function
    bare = replace(function, body=EMPTY)
    assert layout_shared(bare, DEFAULT_TARGET) is bare


def test_every_instruction_with_a_shared_operand_says_what_it_moves() -> None:
    from tilus.instructions import INSTRUCTIONS

    shared = [
        cls
        for cls in INSTRUCTIONS.values()
        if any(
            "SharedTensor" in str(kind)
            for name, kind in cls.__annotations__.items()
            if name not in ("mnemonic", "barrier")
        )
    ]
    assert {cls.mnemonic for cls in shared} >= {"load_shared", "store_shared", "ldmatrix", "copy_async"}
    assert [cls for cls in shared if cls.shared_accesses is Instruction.shared_accesses] == []


def test_the_emulator_sees_no_conflicts_in_a_matrix_product() -> None:
    """Tiles through a ring of asynchronous copies and ldmatrix, and the result through shared memory."""
    matmul = runpy.run_path(str(EXAMPLES / "matmul_v4.py"))["matmul"]
    code = compile_function(matmul.specialize(m=64, n=64, k=64, bm=64, bn=64).function, DEFAULT_TARGET)
    arrays = [np.zeros((64, 64), np.float16) for _ in range(3)]
    stats = run_kernel(code.ptx, code.kernel_name, (1, 1, 1), arrays, profile=True, seed=None).stats
    opcodes = {site.opcode.partition(".")[0] for site in stats.shared.values()}
    assert opcodes == {"cp", "ldmatrix", "stmatrix", "ld"}
    assert [site for site in stats.shared.values() if site.conflicts] == []
