"""Printing: the lines of the reference execution against plain Python, and PTX that the assembler takes."""

from __future__ import annotations

import random
import re

import numpy as np
import pytest
from tile_programs import Array, Build, function, random_layout, tensor, values_of

from tilus.compiler import compile_function
from tilus.dtypes import DataType, bf16, boolean, f16, f32, int8, int16, int32, int64, uint8, uint32
from tilus.errors import TilusError
from tilus.instructions import debug
from tilus.instructions.fill import full
from tilus.instructions.memory import load
from tilus.ir.builder import IRBuilder
from tilus.ir.expr import BlockId, as_expr, binary
from tilus.ir.function import Function
from tilus.ir.stmt import If, Seq
from tilus.ir.tensor import GlobalTensor
from tilus.layout import RegisterLayout, spatial
from tilus.ptx.assembler import assemble
from tilus.runtime.reference import run_reference
from tilus.runtime.reference.buffer import storage_dtype
from tilus.target import get_target

TYPES = (f32, f16, bf16, int8, uint8, int16, int32, uint32, boolean)


def printed(build: Build, x: Array, dtype: DataType, grid: int, capsys: pytest.CaptureFixture[str]) -> list[str]:
    fn = function(build, {"x": tensor("x", dtype, x.shape)}, 1, grid)
    run_reference(fn, {"x": np.asarray(dtype.encode(x)).view(storage_dtype(dtype))}, (grid, 1, 1))
    return capsys.readouterr().out.splitlines()


def number(dtype: DataType, value: float) -> str:
    return "%g" % value if dtype.is_float else "%d" % value  # noqa: UP031 (C's conversions are the point)


@pytest.mark.parametrize("dtype", TYPES)
def test_tiles(dtype: DataType, capsys: pytest.CaptureFixture[str]) -> None:
    """One line per element and block, each with its index, and with scalars of its block."""
    x = values_of(random.Random(str(dtype)), dtype, (3, 2, 16))

    def build(b: IRBuilder, x: GlobalTensor) -> None:
        tile = load.build(b, x, [BlockId(0), 0, 0], shape=(2, 16))
        debug.print.build(b, "{}% x {} {{}}", BlockId(0), tile)

    want = [f"{i}% x [{j}, {k}] {number(dtype, x[i, j, k])} {{}}" for i, j, k in np.ndindex(x.shape)]
    assert printed(build, x, dtype, 3, capsys) == want


def test_scalars_of_active_blocks(capsys: pytest.CaptureFixture[str]) -> None:
    """Blocks that do not reach a print are silent."""

    def build(b: IRBuilder, x: GlobalTensor) -> None:
        debug.print.build(b, "all")
        with b.block() as then:
            debug.print.build(b, "block {} of {} {} {}", BlockId(0), 4, binary("<", BlockId(0), 2), 0.25)
        b.append(If(binary("==", binary("%", BlockId(0), 2), 1), Seq(tuple(then)), Seq(())))

    lines = printed(build, np.zeros(1, np.float32), f32, 4, capsys)
    assert lines == ["all"] * 4 + ["block 1 of 4 1 0.25", "block 3 of 4 0 0.25"]


def a_print(dtype: DataType, layout: RegisterLayout, text: str = "x {} {}%") -> Function:
    def build(b: IRBuilder, x: GlobalTensor) -> None:
        tile = load.build(b, x, [0] * x.rank, shape=layout.shape, layout=layout)
        debug.print.build(b, text, BlockId(0), tile)

    return function(build, {"x": tensor("x", dtype, layout.shape)}, layout.num_threads // 32, 2)


@pytest.mark.parametrize("target", ("sm_80", "sm_90a"))
@pytest.mark.parametrize("dtype", TYPES)
def test_ptx_assembles(dtype: DataType, target: str) -> None:
    layout = random_layout(random.Random(f"{dtype}{target}"), 2, 2, max_locals=4)
    chosen = get_target(target)
    usage = assemble(compile_function(a_print(dtype, layout), chosen).ptx, chosen, allow_spills=True).kernels
    assert len(usage) == 1


def test_ptx_passes_what_c_expects() -> None:
    """The format with its conversions, zero-terminated; ints at 4 bytes, doubles at 8; one call per element of a thread."""
    ptx = compile_function(a_print(f16, spatial(32).local(3), "100% é {} {{{}}}"), get_target("sm_90a")).ptx
    data = re.search(r"string_0\[(\d+)\] = \{([0-9, ]+)\};", ptx)
    assert data is not None
    text = bytes(int(n) for n in data[2].split(","))
    assert text == "100%% é %d {[%d] %g}\n\0".encode()
    assert int(data[1]) == len(text)
    assert re.findall(r"st\.local\.(b\d+) \[local_memory(\+\d+)?\]", ptx) == 3 * [
        ("b32", ""),
        ("b32", "+4"),
        ("b64", "+8"),
    ]
    assert ptx.count("call (result), vprintf") == 3
    assert ".local .align 8 .b8 local_memory[24];" in ptx


def test_elements_that_a_thread_holds_twice_are_printed_once() -> None:
    fn = a_print(f32, spatial(32).local_replicated(2).local(3))
    assert compile_function(fn, get_target("sm_80")).ptx.count("call (result), vprintf") == 3


def test_equal_formats_are_one_string() -> None:
    def build(b: IRBuilder, x: GlobalTensor) -> None:
        for _ in range(3):
            debug.print.build(b, "here")

    ptx = compile_function(function(build, {"x": tensor("x", f32, (1,))}, 1), get_target("sm_80")).ptx
    assert ptx.count(".global .align 1") == 1
    assert ptx.count("call (result)") == 3


def test_a_print_is_not_removed_and_names_only_its_layout() -> None:
    fn = a_print(f32, spatial(32))
    assert not debug.Print("", ()).effects().removable
    assert "vprintf" in compile_function(fn, get_target("sm_80")).ptx


@pytest.mark.parametrize(
    ("text", "count", "message"),
    [
        ("{} {}", 1, "has 2 places, for 1 values"),
        ("x", 1, "has 0 places, for 1 values"),
        ("{0}", 1, r"has \{0\}, expected \{\}"),
        ("{:3d}", 1, r"has \{:3d\}, expected \{\}"),
        ("{", 0, "print format '{'"),
    ],
)
def test_mistakes_in_formats_are_named(text: str, count: int, message: str) -> None:
    with pytest.raises(TilusError, match=message):
        debug.print.build(IRBuilder(), text, *[as_expr(1)] * count)


def test_two_tiles_are_refused() -> None:
    b = IRBuilder()
    tiles = [full.build(b, (32,), 0.0) for _ in range(2)]
    with pytest.raises(TilusError, match="print of the tiles t, t_1, expected at most one"):
        debug.print.build(b, "{} {}", *tiles)
    wide = b.tile(int64, (32,))
    with pytest.raises(TilusError, match="print of a tile of int64, expected at most 32 bits"):
        debug.print.build(b, "{}", wide)
