"""Random programs with random pins: either every instruction can run and all executions agree, or the error shows both lines."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from layout_checker import check, holds
from tile_graphs import BOUND, DTYPES, SIDE, Graph
from tile_programs import emulate, function, run_c, tensor

from tilus.compiler import compile_function
from tilus.dtypes import DataType
from tilus.errors import TilusError
from tilus.instructions.convert import Convert
from tilus.ir.function import Function
from tilus.ir.visit import instructions
from tilus.runtime.reference import run_reference
from tilus.runtime.reference.buffer import storage_dtype
from tilus.target import get_target
from tilus.transforms import run_pipeline
from tilus.transforms.infer_layouts import infer_layouts

TARGET = get_target("sm_90a")


def outcome(seed: int) -> str:
    """Infer the layouts of one random program and check them; `refused` when its pins contradict each other."""
    rng = random.Random(seed)
    graph = Graph(rng, rng.choice([1, 2, 4]), rng.choice([0.0, 0.3, 1.0]))
    tensors = {name: tensor(name, dtype, (SIDE, SIDE)) for name, dtype in DTYPES.items()}
    program = function(graph.build, tensors, graph.num_warps)
    try:
        placed = run_pipeline(program, TARGET, after="infer_layouts")
    except TilusError as error:
        places = {error.loc, *(note.loc for note in error.notes)}
        assert len(error.notes) == 2 and None not in places and len(places) >= 2, str(error)
        return "refused"
    check(placed)
    check_conversions(placed)
    assert infer_layouts(placed, TARGET) is placed
    return "placed"


def check_conversions(placed: Function) -> None:
    """Each one moves something; only memory cares for the order of a thread's elements."""
    for stmt in instructions(placed.body):
        if isinstance(stmt.inst, Convert):
            copy = next((t for t in (stmt.inst.out, stmt.inst.src) if "_converted_" in t.name), None)
            if copy is not None and copy.origin is not None and copy.origin.choice not in ("load", "store"):
                assert not holds(stmt.inst.out, stmt.inst.src, np.arange(copy.size))


@given(seed=st.integers(0, 2**32))
@example(186506562)  # a loop that needs nothing but what was converted in front of it
def test_every_instruction_can_run_in_the_layouts_of_its_tiles(seed: int) -> None:
    outcome(seed)


def test_both_outcomes_are_common() -> None:
    counts = Counter(outcome(seed) for seed in range(40))
    assert counts["placed"] >= 10 and counts["refused"] >= 2


def executions_agree(seed: int) -> None:
    rng, data = random.Random(seed), np.random.default_rng(seed)
    graph = Graph(rng, rng.choice([1, 2, 4]), 0.4)
    tensors = {name: tensor(name, dtype, (SIDE, SIDE)) for name, dtype in DTYPES.items()}
    program = function(graph.build, tensors, graph.num_warps)
    try:
        compiled = compile_function(program, TARGET)
    except TilusError as error:
        assert len(error.notes) == 2, str(error)
        return
    arrays = {name: memory(data, dtype) for name, dtype in DTYPES.items()}
    emulated, native = ({name: array.copy() for name, array in arrays.items()} for _ in range(2))
    run_reference(program, arrays, (1, 1, 1))
    emulate(compiled, list(emulated.values()), 1, seed)
    run_c(program, list(native.values()))
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, emulated[name])
        np.testing.assert_array_equal(array, native[name])


def memory(data: np.random.Generator, dtype: DataType) -> np.ndarray:
    """Small whole numbers; elements of four bits are two to a byte."""
    if dtype.nbits == 4:
        return data.integers(0, 256, (SIDE, SIDE // 2)).astype(np.uint8)
    return data.integers(-BOUND, BOUND, (SIDE, SIDE)).astype(storage_dtype(dtype))


@pytest.mark.sampled(6)
@pytest.mark.parametrize("seed", range(12))
def test_executions_agree(seed: int) -> None:
    executions_agree(seed)


@pytest.mark.sampled(9)
@pytest.mark.slow
@pytest.mark.parametrize(
    "seed", [pytest.param(n, marks=() if n < 60 else pytest.mark.exhaustive) for n in range(12, 150)]
)
def test_executions_agree_on_more_programs(seed: int) -> None:
    executions_agree(seed)
