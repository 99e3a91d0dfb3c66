"""ldmatrix and stmatrix: chosen exactly where every row of every matrix is 16 aligned bytes, and right."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from tile_programs import random_blocks

import tilus
from tilus import Const, Tensor, f16, f32, int4, uint2, uint8
from tilus.compiler import Compiled, compile_function
from tilus.dtypes import DataType, pack_bits
from tilus.instructions import INSTRUCTIONS
from tilus.instructions.matrix import LdMatrix, StMatrix
from tilus.ir.parser import parse_function
from tilus.ir.printer import print_function
from tilus.ir.visit import instructions
from tilus.layout import (
    RegisterLayout,
    SharedLayout,
    auto,
    column_major,
    local,
    padded,
    replicated,
    row_major,
    spatial,
    swizzled,
)
from tilus.layout.atoms import ldmatrix, ldmatrix_trans
from tilus.ptx.assembler import assemble
from tilus.runtime.emulator import run_kernel
from tilus.target import get_target
from tilus.transforms.layout_shared import uses

DTYPES = [uint2, int4, uint8, f16, f32]


@tilus.kernel
def through_shared(
    x: Tensor["t", "m", "n"], y: Tensor["t", "m", "n"], *, memory: Const, write: Const, read: Const, warps: Const
):
    tilus.grid(1, warps=warps)
    s = tilus.shared(x.dtype, memory.shape, layout=memory)
    tilus.store_shared(s, tilus.load(x, [0, 0], shape=memory.shape, layout=write))
    tilus.sync()
    tilus.store(y, [0, 0], tilus.load_shared(s, layout=read))


def compiled_for(
    dtype: DataType, memory: SharedLayout, write: RegisterLayout, read: RegisterLayout, target: str
) -> Compiled:
    m, n = memory.shape
    values: dict[str, Any] = {"memory": memory, "write": write, "read": read, "warps": read.num_threads // 32}
    return compile_function(through_shared.specialize(t=dtype, m=m, n=n, **values).function, get_target(target))


def rows_are_aligned(layout: RegisterLayout, memory: SharedLayout, nbits: int, trans: bool) -> bool:
    """By the ISA's figures, whether lanes' words are matrices whose rows are 16 consecutive bytes at multiples of 16.

    Plain: lane 4 r + c has word c of row r. Transposed: lane 4 j + i // 2 has elements (i, j) and (i + 1, j), i even.
    """
    addresses = memory.table()[tuple(np.moveaxis(layout.table(), -1, 0))] * nbits  # [threads, slots] in bits
    per = 32 // nbits
    words = addresses.reshape(-1, 32, addresses.shape[1] // per, per)
    if trans:  # [warp, column, pair of rows, word, row of the pair] -> [warp, word, row, column]
        rows = words.reshape(-1, 8, 4, *words.shape[2:]).transpose(0, 3, 2, 4, 1).reshape(-1, 8)
    else:  # [warp, row, word of the row, matrix, element] -> [warp, matrix, row, element of the row]
        rows = words.reshape(-1, 8, 4, *words.shape[2:]).transpose(0, 3, 1, 2, 4).reshape(-1, 4 * per)
    return bool((rows[:, :1] % 128 == 0).all() and (rows - rows[:, :1] == np.arange(128 // nbits) * nbits).all())


def random_memory(rng: random.Random, shape: tuple[int, ...], nbits: int) -> SharedLayout:
    choices = [row_major(shape), padded(shape, 128 // nbits), padded(shape, 64 // nbits)]
    if nbits >= 8:  # smaller elements move in runs of whole bytes only
        choices.append(column_major(shape))
    if nbits >= 8 and shape[-1] * nbits % 128 == 0:
        choices.append(swizzled(shape, nbits // 8))
    return rng.choice(choices)


@pytest.mark.sampled(9)
@pytest.mark.parametrize("side", ["write", "read"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(12))
def test_matrices_exactly_where_the_rows_allow(dtype: DataType, seed: int, side: str) -> None:
    """Only one side moves matrices: the other, in 16-byte vectors, would not undo a mistake."""
    rng = random.Random(seed)
    trans = dtype == f16 and rng.random() < 0.5
    fragment = ldmatrix_trans() if trans else ldmatrix(dtype.nbits)
    layout = random_blocks(rng, rng.choice([1, 2]), None) * fragment
    if rng.random() < 0.5 and dtype.nbits >= 8:
        layout = layout.permute((1, 0))
    memory = random_memory(rng, layout.shape, dtype.nbits)
    plain = auto(layout.shape, layout.num_threads, 128 // dtype.nbits)
    write, read = (layout, plain) if side == "write" else (plain, layout)
    compiled = compiled_for(dtype, memory, write, read, "sm_90a")
    forms = [t for t in (False, True) if (dtype == f16 or not t) and rows_are_aligned(layout, memory, dtype.nbits, t)]
    found = [s.inst.trans for s in instructions(compiled.function.body) if isinstance(s.inst, (LdMatrix, StMatrix))]
    assert found == forms, (str(layout), str(memory))
    codes = np.random.default_rng(seed).integers(0, dtype.num_codes, layout.shape).astype(dtype.storage)
    x = pack_bits(codes, dtype)
    y = np.zeros_like(x)
    run_kernel(compiled.ptx, compiled.kernel_name, (1, 1, 1), [x, y])
    assert (x == y).all()


@pytest.mark.parametrize(
    ("memory", "conflicts"), [(row_major((32, 64)), 2 * 7 * 32), (swizzled((32, 64), 2), 0)], ids=str
)
def test_bank_conflicts_are_those_of_the_emulator(memory: SharedLayout, conflicts: int) -> None:
    """Eight rows of 128 bytes at one column all meet in the same banks: 7 extra wavefronts of each of the 32 matrices."""
    layout = spatial(2, 1).local(2, 8) * ldmatrix()
    compiled = compiled_for(f16, memory, layout, layout, "sm_90a")
    x = np.zeros(memory.shape, np.float16)
    stats = run_kernel(compiled.ptx, compiled.kernel_name, (1, 1, 1), [x, x.copy()], profile=True).stats
    assert {site.opcode.split(".")[0] for site in stats.shared.values()} == {"ldmatrix", "stmatrix"}
    found = uses(compiled.function, compiled.target)
    costs = [use.access.cost(memory) for accesses in found.values() for use in accesses]
    assert all(cost is not None and cost.matrices for cost in costs)
    reported = sum(cost.worst_conflicts for cost in costs if cost is not None)
    assert reported == sum(site.conflicts for site in stats.shared.values()) == conflicts


def test_replicated_warps_store_once() -> None:
    """Warps 0 and 1 hold the same rows: one of them writes, or the emulator would see a race."""
    layout = spatial(2, 1) * replicated(2, 2) * local(2, 1) * ldmatrix()
    memory = swizzled((32, 8), 2)
    compiled = compiled_for(f16, memory, layout, layout, "sm_90a")
    (line,) = (line for line in compiled.ptx.splitlines() if "stmatrix" in line)
    assert line.strip().startswith("@%p")
    x = np.arange(256, dtype=np.float16).reshape(32, 8)
    y = np.zeros_like(x)
    run_kernel(compiled.ptx, compiled.kernel_name, (1, 1, 1), [x, y])
    assert (x == y).all()


@pytest.mark.parametrize(
    ("repeats", "groups"),
    [
        (local(1, 1), (1,)),
        (local(2, 1), (2,)),
        (local(2, 2), (4,)),
        (local(8, 1), (4, 4)),
        (local(3, 2), (4, 2)),
        (local(7, 1), (4, 2, 1)),
    ],
    ids=str,
)
@pytest.mark.parametrize("target", ["sm_80", "sm_90a"])
def test_how_many_matrices_an_instruction_moves(repeats: RegisterLayout, groups: tuple[int, ...], target: str) -> None:
    layout = repeats * ldmatrix()
    compiled = compiled_for(f16, row_major(layout.shape), layout, layout, target)
    assemble(compiled.ptx, get_target(target))
    for opcode in ("ldmatrix", "stmatrix"):
        lines = [line.split()[0] for line in compiled.ptx.splitlines() if f" {opcode}." in line]
        wanted = [f"{opcode}.sync.aligned.m8n8.x{count}.shared.b16" for count in groups]
        assert lines == ([] if (opcode, target) == ("stmatrix", "sm_80") else wanted)
        if lines:
            note = ", ".join(f"{groups.count(c)} of x{c}" for c in (4, 2, 1) if c in groups)
            assert f"{opcode} s: {sum(groups)} matrices per warp, {note}" in [
                note.text for note in compiled.lowered.notes
            ]


def test_the_dump_shows_the_form_and_is_read_back() -> None:
    layout = local(2, 2) * ldmatrix_trans()
    values: dict[str, Any] = {"t": f16, "m": 16, "n": 16, "memory": row_major((16, 16)), "warps": 1}
    function = through_shared.ir(after="select_instructions", write=layout, read=layout, **values)
    text = print_function(function)
    assert "ldmatrix(src=%s, offsets=[0, 0], dims=[0, 1], rows=0, trans=true, groups=[4])" in text
    assert "stmatrix(dst=%s, src=%x_1, offsets=[0, 0], dims=[0, 1], rows=0, trans=true, groups=[4])" in text
    assert print_function(parse_function(text, INSTRUCTIONS)) == text


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "fragment"),
    [(uint8, ldmatrix(8)), (f16, ldmatrix()), (f16, ldmatrix_trans()), (f32, ldmatrix(32))],
    ids=str,
)
def test_on_a_gpu(dtype: DataType, fragment: RegisterLayout) -> None:
    layout = spatial(2, 1) * local(3, 4) * fragment
    x = np.random.default_rng(0).integers(0, 100, layout.shape).astype(dtype.numpy)
    y = np.zeros_like(x)
    through_shared.on("cuda")(x, y, memory=swizzled(layout.shape, dtype.nbytes), write=layout, read=layout, warps=2)
    assert (x == y).all()
