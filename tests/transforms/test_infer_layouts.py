"""Which layouts programs get: the conversions of small kernels, pins, determinism, and the work that it takes."""

from __future__ import annotations

import math
import os
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_kernels
from layout_checker import check
from tile_programs import function as function_of
from tile_programs import tensor

import tilus
from tilus.dtypes import DataType, f16, f32
from tilus.instructions import INSTRUCTIONS
from tilus.instructions.cast import cast
from tilus.instructions.memory import load, store
from tilus.instructions.mma import dot
from tilus.ir.function import Function
from tilus.ir.parser import parse_function
from tilus.ir.printer import print_function
from tilus.ir.stmt import For, If, Inst, Seq, Stmt
from tilus.ir.tensor import RegisterTensor
from tilus.ir.visit import instructions
from tilus.lang.kernel import Kernel
from tilus.runtime.reference.buffer import storage_dtype
from tilus.target import get_target
from tilus.transforms.infer_layouts import infer_layouts, rounds, uses

KERNELS = {name: kernel for name, kernel in vars(small_kernels).items() if isinstance(kernel, Kernel)}
TARGET = get_target("sm_90a")


def statements(stmt: Stmt, around: tuple[str, ...] = ()) -> Iterator[tuple[Inst, str]]:
    match stmt:
        case Seq(stmts):
            for child in stmts:
                yield from statements(child, around)
        case For():
            yield from statements(stmt.body, (*around, "for"))
        case If():
            yield from statements(stmt.then, (*around, "if"))
            yield from statements(stmt.orelse, (*around, "else"))
        case Inst():
            yield stmt, " ".join(around)
        case _:
            pass


def conversions(function: Function) -> list[tuple[str, str, str]]:
    """(tile, instruction that it is converted for, statements around it) for each conversion that the pass put in."""
    found: list[tuple[str, str, str]] = []
    for stmt, around in statements(function.body):
        for copy in (*stmt.inst.register_results, *stmt.inst.register_operands):
            if stmt.inst.mnemonic == "convert" and "_converted_" in copy.name:
                (other,) = {*stmt.inst.register_results, *stmt.inst.register_operands} - {copy}
                assert isinstance(other, RegisterTensor) and copy.origin is not None
                found.append((other.name, copy.origin.choice, around))
    return found


@pytest.mark.parametrize("name", small_kernels.EXPECTED)
def test_conversions_of_small_kernels(name: str) -> None:
    function = KERNELS[name].ir(after="infer_layouts")
    assert conversions(function) == small_kernels.EXPECTED[name]
    check(function)


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("narrow_and_wide", "tilus.load(x"),
        ("transposed_outside_of_the_loop", "tilus.load(x"),
        ("bias_before_the_tile", "tilus.load(x"),
        ("indices", "tilus.store(y"),
        ("epilogue", "acc = tilus.dot"),
    ],
)
def test_who_chooses(name: str, first: str) -> None:
    """The layout of what is stored follows from this line."""
    function = KERNELS[name].ir(after="infer_layouts")
    (stored,) = (s.inst.register_operands[0] for s in instructions(function.body) if s.inst.mnemonic == "store")
    assert stored.origin is not None and stored.origin.loc is not None
    assert first in Path(small_kernels.__file__).read_text().splitlines()[stored.origin.loc.line - 1]


def test_every_small_kernel_has_an_expectation() -> None:
    assert set(KERNELS) == set(small_kernels.EXPECTED)


def memory(data: np.random.Generator, dtype: DataType, shape: tuple[int, ...]) -> Any:
    """Small whole numbers, whose sums and products are exact; types below a byte as packed bits."""
    if dtype.nbits < 8:
        nbytes = math.prod(shape) * dtype.nbits // 8
        return tilus.packed(data.integers(0, 256, nbytes).astype(np.uint8), dtype, shape)
    return data.integers(-4, 5, shape).astype(storage_dtype(dtype))


def run(kernel: Kernel, device: str) -> list[Any]:
    data = np.random.default_rng(0)
    arguments: list[Any] = []
    for param in kernel.ir().params:
        if hasattr(param, "tensor"):
            shape = tuple(extent.value for extent in param.tensor.shape)
            arguments.append(memory(data, param.tensor.dtype, shape))
        else:
            arguments.append(5)
    kernel.on(device)(*arguments)
    return arguments


@pytest.mark.sampled(9)
@pytest.mark.parametrize("device", ["emulator", "cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", small_kernels.EXPECTED)
def test_small_kernels_compute_what_they_mean(name: str, device: str) -> None:
    for expected, found in zip(run(KERNELS[name], "reference"), run(KERNELS[name], device), strict=True):
        np.testing.assert_array_equal(bits(found), bits(expected))


def bits(argument: Any) -> Any:
    return getattr(argument, "storage", argument)


def test_a_pinned_tile_keeps_its_layout() -> None:
    before = KERNELS["pinned_accumulator"].ir()
    pins = {
        t.name: t.layout for s in instructions(before.body) for t in s.inst.register_results if t.layout is not None
    }
    after = infer_layouts(before, TARGET)
    found = {t.name: t.layout for s in instructions(after.body) for t in s.inst.register_results}
    assert pins and {name: found[name] for name in pins} == pins


@pytest.mark.parametrize("name", small_kernels.EXPECTED)
def test_a_second_time_nothing_changes(name: str) -> None:
    function = KERNELS[name].ir(after="infer_layouts")
    assert infer_layouts(function, TARGET) is function


LOAD_OF_CODES = "codes = tilus.load(w, [0, k], [64, 64])"
PRODUCT = "acc = tilus.dot(tilus.load(x, [0, k], [32, 64]), turned, acc)"


def test_every_layout_tells_where_it_comes_from() -> None:
    """The codes are as their load wants them, the converted copy is as the product wants it, the rest follows."""
    function = KERNELS["bytes_for_a_product"].ir(after="infer_layouts")
    tiles = {t.name: t for s in instructions(function.body) for t in s.inst.register_results}
    source = Path(small_kernels.__file__).read_text().splitlines()

    def origin(name: str) -> tuple[str, str]:
        origin = tiles[name].origin
        assert origin is not None and origin.loc is not None
        return origin.choice, source[origin.loc.line - 1].strip()

    load, dot = ("load", LOAD_OF_CODES), ("dot", PRODUCT)
    assert origin("codes") == origin("turned") == load
    assert origin("turned_converted_1") == origin("acc") == origin("x_1") == dot
    pinned = KERNELS["pinned_accumulator"].ir(after="infer_layouts")
    acc = next(t for s in instructions(pinned.body) for t in s.inst.register_results if t.name == "acc")
    assert acc.origin is not None and acc.origin.choice == "pinned"


def test_the_dump_says_what_a_conversion_is_for() -> None:
    """In a comment, which is no part of the program."""
    function = KERNELS["bytes_for_a_product"].ir(after="infer_layouts")
    text = print_function(function, remarks=True)
    source = Path(small_kernels.__file__).read_text().splitlines()
    load, dot = (1 + next(i for i, line in enumerate(source) if code in line) for code in (LOAD_OF_CODES, PRODUCT))
    (line,) = (line for line in text.splitlines() if "convert(" in line)
    assert line.endswith(f"convert(src=%turned)  # load small_kernels.py:{load} -> dot small_kernels.py:{dot}")
    plain = print_function(function)
    assert "#" not in plain and print_function(parse_function(text, INSTRUCTIONS)) == plain


BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "inference.py"
DUMP = f"""
import runpy, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import small_kernels
from tilus.ir.printer import print_function
from tilus.target import get_target
from tilus.transforms import run_pipeline

for name in small_kernels.EXPECTED:
    print(print_function(getattr(small_kernels, name).ir(after="infer_layouts")))
generated = runpy.run_path({str(BENCHMARK)!r})["kernel"](100)
print(print_function(run_pipeline(generated, get_target("sm_90a"))))
"""


def test_the_same_text_in_every_process() -> None:
    """Whatever the order in which sets and dicts of other processes hold their elements."""
    texts = [
        subprocess.run(
            [sys.executable, "-W", "error", "-c", DUMP],
            env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True,
        ).stdout
        for seed in ("1", "2")
    ]  # fmt: skip
    assert texts[0] == texts[1] and texts[0].count("kernel ") == len(small_kernels.EXPECTED) + 1


def test_the_work_is_linear_in_the_size_of_the_program() -> None:
    """Each instruction is asked at most once per tile and round; so the work grows as the program does."""
    kernel = runpy.run_path(str(BENCHMARK))["kernel"]
    asked: dict[int, int] = {}
    for size in (100, 400):
        program = uses(kernel(size))
        inferences = list(rounds(program))
        assert len(inferences) == 2  # loads of single bytes insist on another layout
        asked[len(program)] = sum(x.evaluations for x in inferences)
        assert all(x.evaluations <= sum(len(use.tiles) for use in program) for x in inferences)
    (small, few), (large, many) = sorted(asked.items())
    assert abs(many / few - large / small) < 0.1 * large / small


def test_the_number_of_rounds_is_bounded() -> None:
    """Pairs of products that do not agree on a way to share themselves among the warps, with more choices than are tried."""
    function = many_products(4)
    inferences = list(rounds(uses(function)))
    assert len(inferences) == 17
    check(infer_layouts(function, TARGET))


def many_products(count: int) -> Function:
    def build(b: Any, x: Any, y: Any) -> None:
        for _ in range(count):
            tile = load.build(b, x, [0, 0], shape=[64, 64])
            store.build(b, y, [0, 0], dot.build(b, cast.build(b, dot.build(b, tile, tile), f16), tile))

    return function_of(build, {"x": tensor("x", f16, (64, 64)), "y": tensor("y", f32, (64, 64))}, 4)
