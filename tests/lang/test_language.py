"""Kernels end to end on the reference execution: names, helpers, objects, views, and defects that others had."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tilus
from tilus import Const, Tensor, cdiv, f16, f32, int32
from tilus.ir.stmt import For
from tilus.ir.visit import instructions, walk

SCALE = 3  # a global that kernels below read, and one of them shadows


@tilus.kernel
def axpy(x: Tensor[f32, "n"], y: Tensor[f32, "n"], a: f32, *, block: Const = 1024):
    tilus.grid(cdiv(x.shape[0], block), warps=4)
    i = tilus.block_id(0) * block
    xs = tilus.load(x, [i], shape=[block])  # out-of-bounds elements read as zero
    tilus.store(y, [i], a * xs + tilus.load(y, [i], shape=[block]))  # and are not written


@given(n=st.integers(0, 3000), a=st.integers(-8, 8), block=st.sampled_from([32, 128, 1024]))
def test_axpy_of_the_design_page(n: int, a: int, block: int) -> None:
    x, y = np.arange(n, dtype=np.float32), np.ones(n, np.float32)
    axpy(x, y, a / 4, block=block)
    np.testing.assert_array_equal(y, np.float32(a / 4) * np.arange(n, dtype=np.float32) + 1)


def test_axpy_compiles_to_ptx_and_reports() -> None:
    assert ".visible .entry axpy(" in axpy.ptx()
    assert ".target sm_80" in axpy.ptx(target="sm_80", block=256)
    assert "2 x 128 bits" in axpy.report()
    assert axpy.ir(after="infer_layouts") is not axpy.ir()


def test_import_is_light() -> None:
    code = "import tilus, sys; tilus.kernel; print([m for m in ('torch', 'cuda', 'lark') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


# Names.


def test_defect_4_chained_comparisons_are_conjunctions() -> None:
    @tilus.kernel
    def chained(out: Tensor[int32, "size"], n: int32):
        tilus.grid(1)
        tile = tilus.arange(8)
        inside = tilus.where(3 < tile < 5, 1, tilus.zeros([8], int32))
        tilus.store(out, [0], inside)
        tilus.store(out, [8], tilus.full([1], 1 if 3 < n < 5 else 0, int32))

    for n in range(2, 7):
        out = np.zeros(9, np.int32)
        chained(out, n)
        assert out.tolist() == [0, 0, 0, 0, 1, 0, 0, 0, int(3 < n < 5)]


def test_defect_5_slices_of_shared_tensors_are_refused() -> None:
    @tilus.kernel
    def sliced(x: Tensor[f32, "n"]):
        tilus.grid(1)
        s = tilus.shared(f32, [4, 8])
        s[1:3]

    with pytest.raises(tilus.TilusError) as caught:
        sliced.ir()
    assert caught.value.message == "this expression has no effect"

    @tilus.kernel
    def bound(x: Tensor[f32, "n"]):
        tilus.grid(1)
        s = tilus.shared(f32, [4, 8])
        part = s[1:3]  # noqa: F841

    with pytest.raises(tilus.TilusError) as caught:
        bound.ir()
    assert caught.value.message == "a slice with bounds of shared tensor shared is not supported"


def test_defect_7_a_local_may_be_named_like_a_global() -> None:
    @tilus.kernel
    def shadow(out: Tensor[int32, "n"]):
        tilus.grid(1)
        SCALE = 5
        SCALE = SCALE + 1
        tilus.store(out, [0], tilus.full([1], SCALE, int32))

    out = np.zeros(1, np.int32)
    shadow(out)
    assert out[0] == 6 and SCALE == 3


@given(start=st.integers(-5, 9), stop=st.integers(-5, 9), step=st.integers(1, 4))
def test_defect_8_range_with_bounds_and_continue(start: int, stop: int, step: int) -> None:
    out = np.zeros(1, np.int32)
    _ranged(out, start, stop, step=step)
    assert out[0] == sum(i * i for i in range(start, stop, step) if i % 2)


@tilus.kernel
def _ranged(out: Tensor[int32, "n"], start: int32, stop: int32, *, step: Const):
    tilus.grid(1)
    total = 0
    for i in range(start, stop, step):
        if i % 2 == 0:
            continue
        total += i * i
    tilus.store(out, [0], tilus.full([1], total, int32))


def test_closures_globals_and_constants_are_compile_time() -> None:
    table, offset = {"a": (1, 2)}, 7

    def helper(x: Any, factor: int = 2) -> Any:
        return x * factor + offset

    @tilus.kernel
    def closure(out: Tensor[int32, "n"], p: int32):
        tilus.grid(1)

        def local(x, *, y=table["a"][1]):
            return helper(x) + y

        parts = [local(p), helper(p, factor=SCALE), max(len(table), 3)]
        for index, value in enumerate(reversed(parts)):
            tilus.store(out, [index], tilus.full([1], value, int32))

    out = np.zeros(3, np.int32)
    closure(out, 10)
    assert out.tolist() == [3, 37, 29]


def test_assignment_copies_what_a_loop_changes() -> None:
    @tilus.kernel
    def fibonacci(out: Tensor[int32, "size"], n: int32):
        tilus.grid(1)
        a, b = tilus.full([4], 0, int32), tilus.full([4], 1, int32)
        before = a
        i = last = 0
        for k in tilus.range(n):
            before = a
            a, b = b, a + b
            last = i
            i += k
        tilus.store(out, [0], before)
        tilus.store(out, [4], a)
        tilus.store(out, [8], tilus.full([1], last, int32))

    out = np.zeros(9, np.int32)
    fibonacci(out, 10)
    assert out.tolist() == [34] * 4 + [55] * 4 + [sum(range(9))]


def test_a_name_keeps_the_value_it_was_given() -> None:
    @tilus.kernel
    def kept(x: Tensor[int32, "s"], out: Tensor[int32, "rows", 4], n: int32):
        tilus.grid(1)
        i, t = 0, tilus.zeros([4], int32)
        for _ in tilus.range(n):
            old = t
            scalar = i + 1
            row = out[i]
            pair = (t, i)
            t += 10
            i = i + 1
            tilus.store(row, [0], old + scalar + pair[0] * pair[1])

    out = np.full((4, 4), -1, np.int32)
    kept(np.zeros(1, np.int32), out, 3)
    assert out.tolist() == [[10 * k + k + 1 + 10 * k * k] * 4 for k in range(3)] + [[-1] * 4]


def test_names_of_both_sides_of_a_branch_live_on() -> None:
    @tilus.kernel
    def merged(out: Tensor[int32, "n"], p: int32):
        tilus.grid(1)
        if p > 3:
            t = tilus.arange(4)
            s = 2
        elif p < 0:
            return
        else:
            s = p
            t = tilus.full([4], 9, int32)
        tilus.store(out, [0], t * s)

    for p, expected in ((5, [0, 2, 4, 6]), (2, [18] * 4), (-1, [-1] * 4)):
        out = np.full(4, -1, np.int32)
        merged(out, p)
        assert out.tolist() == expected


def test_short_circuits_do_not_load_what_python_would_not() -> None:
    @tilus.kernel
    def count(x: Tensor[int32, "n"], out: Tensor[int32, 1]):
        tilus.grid(1)
        i = 0
        while i < x.shape[0] and x[i] > 0:
            i += 1
        first = x[0] if x.shape[0] > 0 else -7
        tilus.store(out, [0], tilus.full([1], i * 100 + first, int32))

    for values in ([3, 2, 0, 5], [1, 1], [0], []):
        out = np.zeros(1, np.int32)
        count(np.array(values, np.int32), out)
        positive = next((i for i, v in enumerate(values) if v <= 0), len(values))
        assert out[0] == positive * 100 + (values[0] if values else -7)


@pytest.mark.parametrize("device", ["reference", "emulator", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_conditions_may_be_variables_that_change(device: str) -> None:
    @tilus.kernel
    def mark(out: Tensor[int32, "n"]):
        tilus.grid(1)
        odd = out.shape[0] < 0
        for i in tilus.range(out.shape[0]):
            if i < 2 or odd:
                tilus.store(out, [i], tilus.full([1], i + 1, int32))
            odd = not odd

    out = np.zeros(7, np.int32)
    mark.on(device)(out)
    assert out.tolist() == [1, 2, 0, 4, 0, 6, 0]


# Helpers and objects.


@dataclass(frozen=True)
class Shape:
    rows: int
    width: int


class Ring:
    """A two-stage ring: tensors and a position that changes in the loop."""

    def __init__(self, source: Any, shape: Shape) -> None:
        self.source = source
        self.shape = shape
        self.total = tilus.zeros([shape.width], tilus.int32)
        self.position = 0

    def step(self, row: Any) -> None:
        self.total += tilus.load(self.source[row], [0], shape=[self.shape.width])
        self.position = (self.position + 1) % self.shape.rows

    @property
    def parity(self) -> Any:
        return self.position % 2


@tilus.kernel
def ring(x: Tensor[int32, "m", "n"], out: Tensor[int32, "k"], *, shape: Const):
    tilus.grid(1)
    state = Ring(x, shape)
    for row in tilus.range(x.shape[0]):
        if row % 3 != 1:
            state.step(row)
    tilus.store(out, [0], state.total)
    tilus.store(out, [shape.width], tilus.full([1], state.position * 10 + state.parity, tilus.int32))


def test_objects_change_in_loops_and_branches() -> None:
    x = np.arange(7 * 8, dtype=np.int32).reshape(7, 8)
    out = np.zeros(9, np.int32)
    ring(x, out, shape=Shape(3, 8))
    rows = [r for r in range(7) if r % 3 != 1]
    assert out[:8].tolist() == x[rows].sum(0).tolist()
    assert out[8] == len(rows) % 3 * 10 + len(rows) % 3 % 2


def test_views_of_global_tensors() -> None:
    @tilus.kernel
    def views(x: Tensor[int32, "a", "b", "c"], out: Tensor[int32, "n"], p: int32):
        tilus.grid(1)
        tilus.store(out, [0], tilus.load(x[p], [1, 0], shape=[4], dims=[1]))
        tilus.store(out, [4], tilus.load(x[p, -1], [0], shape=[4]))
        tilus.store(out, [8], tilus.load(x[:, 1, p], [0], shape=[2]))
        tilus.store(out, [10], tilus.full([1], x[1, p, -2], int32))
        tilus.store(out, [11], tilus.load(x[p, 1:9, 0], [0], shape=[4]))
        tilus.store(out, [15], tilus.load(x[0, -1, -3:-1], [0], shape=[4]))

    x = np.arange(2 * 3 * 4, dtype=np.int32).reshape(2, 3, 4)
    for array in (x, np.ascontiguousarray(x.transpose(2, 0, 1)).transpose(1, 2, 0)):
        out = np.zeros(19, np.int32)
        views(array, out, 1)
        expected = [*x[1, 1], *x[1, -1], *x[:, 1, 1], x[1, 1, -2], *x[1, 1:9, 0], 0, 0, *x[0, -1, -3:-1], 0, 0]
        assert out.tolist() == expected


def test_shared_stages_are_views() -> None:
    @tilus.kernel
    def stages(out: Tensor[f32, "n"], p: int32):
        tilus.grid(1, warps=1)
        s = tilus.shared(f32, [2, 32])
        for stage in tilus.static_range(2):
            tilus.store_shared(s[stage], tilus.full([32], stage + 1.0))
        tilus.sync()
        tilus.store(out, [0], tilus.load_shared(s[p % 2]) + tilus.load_shared(s[-1]))

    for p in (0, 1):
        out = np.zeros(32, np.float32)
        stages(out, p)
        assert out.tolist() == [p + 1.0 + 2.0] * 32


def test_tiles_have_methods_and_new_dims() -> None:
    @tilus.kernel
    def methods(out: Tensor[f16, "m", "n"]):
        tilus.grid(1)
        rows, cols = tilus.arange(4), tilus.arange(8)
        tile = (rows[:, None] * 10 + cols[None, :]).to(f16)
        assert tile.shape == (4, 8) and tile.dtype == f16 and tile.rank == 2
        tilus.store(out, [0, 0], tile.T.reshape([4, 8]) if out.shape[0] == 4 else tile)

    out = np.zeros((4, 8), np.float16)
    methods(out)
    tile = np.arange(4)[:, None] * 10 + np.arange(8)[None, :]
    assert out.tolist() == tile.T.reshape(4, 8).tolist()


def test_optional_tensors_and_dtype_names() -> None:
    @tilus.kernel
    def biased(x: Tensor["t", "n"], y: Tensor["t", "n"], bias: Tensor["t", "n"] = None):
        tilus.grid(1)
        tile = tilus.load(x, [0], shape=[16])
        if bias is not None:
            tile += tilus.load(bias, [0], shape=[16])
        elif x.dtype == f16:
            tile = tile * 2
        tilus.store(y, [0], tile)

    for dtype, scale in ((np.float16, 2), (np.float32, 1)):
        x, y = np.arange(16, dtype=dtype), np.zeros(16, dtype)
        biased(x, y)
        assert y.tolist() == (x * scale).tolist()
        biased(x, y, x)
        assert y.tolist() == (x + x).tolist()


def test_postponed_and_local_annotations() -> None:
    local = tilus.int8

    @tilus.kernel
    def annotated(x: Tensor[local, "n"], a: int):
        tilus.grid(1)

    assert annotated.ir().params[0].tensor.dtype == tilus.int8  # type: ignore[union-attr]


# Positions, loops and facts in the IR.


def test_every_statement_has_its_position() -> None:
    with open(__file__, encoding="utf-8") as file:
        lines = file.read().splitlines()
    for stmt in walk(axpy.ir().body):
        loc = getattr(stmt, "loc", None)
        if loc is not None:
            text = lines[loc.line - 1][loc.column - 1 : loc.end_column - 1]
            assert text.startswith(("tilus.load(", "tilus.store(", "a * xs")), text
    assert len(list(instructions(axpy.ir().body))) == 6


def test_loop_variables_know_their_range() -> None:
    @tilus.kernel
    def loop(x: Tensor[f32, "n"]):
        tilus.grid(1)
        for k in tilus.range(32, x.shape[0], 16, unroll=2):
            tilus.store(x, [k], tilus.zeros([16]))

    (stmt,) = [s for s in walk(loop.ir().body) if isinstance(s, For)]
    assert (stmt.var.lower, stmt.var.upper, stmt.var.multiple_of, stmt.unroll) == (32, 2**31 - 2, 16, 2)


def test_builtins_explain_themselves_outside_of_kernels() -> None:
    with pytest.raises(tilus.TilusError) as caught:
        tilus.load(1, 2, 3)
    assert caught.value.message == "tilus.load was called outside of a kernel"
    with pytest.raises(tilus.TilusError) as caught:
        tilus.range(3)
    assert caught.value.message == "tilus.range was called outside of a kernel"
    assert [tilus.cdiv(n, 4) for n in range(6)] == [0, 1, 1, 1, 1, 2]
