"""Laws of control flow: all blocks in lock step do what each block does alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_oracle import Element, Fill, Load, Mix, Oracle, Store, blocks, function, tensor

from tilus.dtypes import DataType, f16, f32, int32, int64
from tilus.errors import Loc, TilusError
from tilus.ir.expr import BlockId, Expr, GridDim, Var, binary, cast, const, select, unary
from tilus.ir.stmt import EMPTY, Break, Continue, For, If, Inst, Return, Seq, SetScalar, Stmt, While
from tilus.ir.tensor import RegisterTensor
from tilus.runtime.reference import run_reference

SCALARS = tuple(Var(name, int32, mutable=True) for name in "abc")
FUEL = Var("fuel", int32, mutable=True)
OUT = tensor(
    "out", int64, (*(Var(f"g{axis}", int32) for axis in "xyz"), 2), tuple(Var(f"s{i}", int64) for i in range(4))
)
STATE = RegisterTensor(int64, (2,), name="state", mutable=True)
SAVE = Inst(Store(OUT, STATE, (BlockId(0), BlockId(1), BlockId(2), const(0)), (3,)))
GRIDS = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 2))


@st.composite
def integers(draw: st.DrawFn, depth: int = 2, extra: tuple[Var, ...] = ()) -> Expr:
    leaves = st.sampled_from([*SCALARS, *extra, *map(BlockId, range(3)), GridDim(0), *map(const, range(-3, 4))])
    if depth == 0 or draw(st.booleans()):
        return draw(leaves)
    a, b = draw(integers(depth - 1, extra)), draw(integers(depth - 1, extra))
    op = draw(st.sampled_from(["+", "-", "*", "//", "%", "min", "max", "&", "|", "^", "select", "neg", "abs"]))
    if op == "select":
        return select(draw(conditions(1, extra)), a, b)
    if op in ("neg", "abs"):
        return unary(op, a)
    if op in ("//", "%"):
        divisor = draw(st.sampled_from([const(-2), const(2), const(3), binary("+", unary("abs", b), 1)]))
        return binary(op, a, divisor)
    return binary(op, a, b)


@st.composite
def conditions(draw: st.DrawFn, depth: int = 1, extra: tuple[Var, ...] = ()) -> Expr:
    if depth and draw(st.integers(0, 3)) == 0:
        op = draw(st.sampled_from(["and", "or", "not"]))
        a, b = draw(conditions(depth - 1, extra)), draw(conditions(depth - 1, extra))
        return unary("not", a) if op == "not" else binary(op, a, b)
    op = draw(st.sampled_from(["<", "<=", "==", "!=", ">", ">="]))
    return binary(op, draw(integers(1, extra)), draw(integers(1, extra)))


@st.composite
def statements(draw: st.DrawFn, depth: int, in_loop: bool = False, extra: tuple[Var, ...] = ()) -> Stmt:
    kinds = ["set", "mix", "leave"] + (["if", "for", "for", "while"] if depth else [])

    def body(loop: bool, *more: Var) -> Stmt:
        return Seq(tuple(draw(st.lists(statements(depth - 1, loop, extra + more), min_size=1, max_size=4))))

    match draw(st.sampled_from(kinds)):
        case "set":
            return SetScalar(draw(st.sampled_from(SCALARS)), binary("%", draw(integers(2, extra)), 97))
        case "mix":
            return Seq((Inst(Mix(STATE, STATE, binary("%", draw(integers(1, extra)), 97))), SAVE))
        case "if":
            return If(draw(conditions(1, extra)), body(in_loop), body(in_loop) if draw(st.booleans()) else EMPTY)
        case "for":
            var = Var("i", int32)
            start, trips = (binary("%", draw(integers(1, extra)), 4) for _ in range(2))
            stop = binary("+", start, trips)
            return For(var, start, stop, draw(st.integers(1, 2)), body(True, var))
        case "while":
            cond = binary("and", binary("<", FUEL, 12), draw(conditions(1, extra)))
            return While(cond, Seq((SetScalar(FUEL, binary("+", FUEL, 1)), body(True))))
        case _:
            leave = draw(st.sampled_from([Break(), Continue()] * 3 + [Return()])) if in_loop else Return()
            return If(draw(conditions(0, extra)), leave, EMPTY) if draw(st.integers(0, 7)) else leave


PROGRAMS = st.lists(statements(3), min_size=1, max_size=5).map(lambda stmts: Seq(tuple(stmts)))
INITIAL = Seq((*(SetScalar(v, const(i)) for i, v in enumerate((*SCALARS, FUEL))), Inst(Fill(STATE, const(0))), SAVE))


@settings(max_examples=50)
@given(PROGRAMS, GRIDS, st.sampled_from([1, 40, 1 << 20]))
def test_lock_step_is_every_block_alone(program: Stmt, grid: tuple[int, int, int], max_chunk_nbytes: int) -> None:
    found = np.full((*grid, 2), -1, np.int64)
    run_reference(function(INITIAL, program, params=(OUT,)), {"out": found}, grid, max_chunk_nbytes=max_chunk_nbytes)
    for block in blocks(grid):
        oracle = Oracle(block, grid)
        oracle.start(Seq((INITIAL, program)))
        assert found[block].tolist() == oracle.tiles[STATE]


@pytest.mark.parametrize("outer", [Break, Continue, Return])
@pytest.mark.parametrize("inner", [Break, Continue, Return])
@pytest.mark.parametrize("loop", [For, While])
def test_leaving_nested_loops(outer: type[Stmt], inner: type[Stmt], loop: type[Stmt]) -> None:
    """Some blocks leave the outer loop before, some the inner loop within, in different iterations."""
    i, j, grid = Var("i", int32), SCALARS[0], (4, 3, 1)

    def leave_at(kind: type[Stmt], index: Expr, axis: int) -> Stmt:
        return If(binary("==", index, BlockId(axis)), kind(), EMPTY)

    def mix(value: Expr) -> Stmt:
        return Seq((Inst(Mix(STATE, STATE, value)), SAVE))

    if loop is For:
        k = Var("k", int32)
        nested: Stmt = For(k, const(0), const(4), 1, Seq((leave_at(inner, k, 1), mix(k))))
    else:
        step = SetScalar(j, binary("+", j, 1))
        nested = Seq((
            SetScalar(j, const(-1)), While(binary("<", j, 3), Seq((step, leave_at(inner, j, 1), mix(j))))
        ))  # fmt: skip
    program = Seq((For(i, const(0), const(5), 1, Seq((leave_at(outer, i, 0), nested, mix(i)))), mix(const(7))))
    found = np.full((*grid, 2), -1, np.int64)
    run_reference(function(INITIAL, program, params=(OUT,)), {"out": found}, grid)
    for block in blocks(grid):
        oracle = Oracle(block, grid)
        oracle.start(Seq((INITIAL, program)))
        assert found[block].tolist() == oracle.tiles[STATE]


@given(integers(4), conditions(3), GRIDS)
def test_scalars_are_those_of_the_host(number: Expr, cond: Expr, grid: tuple[int, int, int]) -> None:
    program = Seq((Inst(Mix(STATE, STATE, binary("%", number, 97))), Inst(Mix(STATE, STATE, cast(cond, int32))), SAVE))
    found = np.zeros((*grid, 2), np.int64)
    run_reference(function(INITIAL, program, params=(OUT,)), {"out": found}, grid)
    for block in blocks(grid):
        oracle = Oracle(block, grid)
        oracle.start(Seq((INITIAL, program)))
        assert found[block].tolist() == oracle.tiles[STATE]


@pytest.mark.parametrize("dtype", [f32, f16])
def test_float_scalars_round_after_every_operation(dtype: DataType) -> None:
    a, x = Var("a", dtype), cast(BlockId(0), dtype)
    exprs = [binary(op, x, a) for op in ("+", "-", "*", "/", "min", "max")]
    exprs += [unary(op, binary("*", x, a)) for op in ("exp", "exp2", "neg", "abs", "sqrt")]
    exprs += [binary("*", binary("+", x, a), a), binary("-", binary("/", x, const(3.0, dtype)), a)]
    value = dtype.round(np.array([1.2345], np.float32))[0]
    half = np.float16 if dtype == f16 else np.float32

    def rounded(number: object) -> np.floating:
        return half(number)

    for block in range(3):
        b = rounded(block)
        v, third = rounded(value), rounded(3)
        single = np.float32(b) * np.float32(v)
        product = np.float32(rounded(single))
        expected = [
            np.float32(b) + np.float32(v), np.float32(b) - np.float32(v), single, np.float32(b) / np.float32(v),
            min(b, v), max(b, v), np.exp(product), np.exp2(product), -product, abs(product), np.sqrt(product),
            np.float32(rounded(np.float32(b) + np.float32(v))) * np.float32(v),
            np.float32(rounded(np.float32(b) / np.float32(third))) - np.float32(v),
        ]  # fmt: skip
        for expr, wanted in zip(exprs, expected, strict=True):
            out = tensor("out", dtype, (3,))
            tile = RegisterTensor(dtype, (1,))
            found = np.zeros(3, half)
            fn = function(Fill(tile, expr), Store(out, tile, (BlockId(0),), (0,)), params=(out, a))
            run_reference(fn, {"out": found, "a": float(value)}, (3, 1, 1))
            assert found[block] == rounded(wanted), (str(expr), block)


@pytest.mark.parametrize(
    ("number", "expected"), [(2.9, 2), (-2.9, -2), (1e20, 2**31 - 1), (-1e20, -(2**31)), (float("nan"), 0)]
)
def test_float_to_integer_truncates_and_saturates(number: float, expected: int) -> None:
    """PTX ISA, cvt: .rzi rounds towards zero, integer results saturate, and NaN becomes 0."""
    a, out, tile = Var("a", f32), tensor("out", int32, (1,)), RegisterTensor(int32, (1,))
    found = np.zeros(1, np.int32)
    fn = function(Fill(tile, cast(a, int32)), Store(out, tile, (const(0),), (0,)), params=(out, a))
    run_reference(fn, {"out": found, "a": number}, (1, 1, 1))
    assert found[0] == expected


def test_division_by_zero_matters_only_in_blocks_that_divide() -> None:
    x = BlockId(0)
    guarded = SetScalar(SCALARS[0], binary("//", const(6), x))
    program = If(binary(">", x, 0), guarded, EMPTY)
    result = np.zeros((4, 1, 1, 2), np.int64)
    mixed = Inst(Mix(STATE, STATE, select(binary("==", x, 0), const(50), binary("%", const(7), x))))
    run_reference(function(INITIAL, program, mixed, SAVE, params=(OUT,)), {"out": result}, (4, 1, 1))
    assert result[:, 0, 0, 0].tolist() == [50, 0, 1, 1]
    loc = Loc("kernel.py", 7)
    with pytest.raises(TilusError, match="divisor of // is 0") as caught:
        run_reference(function(SetScalar(SCALARS[0], guarded.value, loc)), {}, (4, 1, 1))
    assert caught.value.loc == loc


def test_and_or_guard_their_right_side() -> None:
    x = BlockId(0)
    divides = binary("==", binary("%", const(6), x), 0)
    both, either = binary("and", binary("!=", x, 0), divides), binary("or", binary("==", x, 0), divides)
    value = binary("+", binary("*", cast(both, int32), 2), cast(either, int32))
    result = np.zeros((5, 1, 1, 2), np.int64)
    run_reference(function(INITIAL, Inst(Mix(STATE, STATE, value)), SAVE, params=(OUT,)), {"out": result}, (5, 1, 1))
    assert result[:, 0, 0, 0].tolist() == [1, 3, 3, 3, 0]


def test_inactive_blocks_read_nothing() -> None:
    """The block for which the index is out of range does not run the load, and keeps what it had."""
    data, out = tensor("data", int32, (3,)), tensor("out", int32, (5,))
    tile, item = RegisterTensor(int32, (1,), mutable=True), Var("item", int32)
    inside = binary("<", BlockId(0), 3)
    load = Seq((Inst(Element(item, data, (BlockId(0),))), Inst(Fill(tile, item))))
    fn = function(
        Fill(tile, const(-1)), If(inside, load, EMPTY), Store(out, tile, (BlockId(0),), (0,)), params=(data, out)
    )
    found = np.zeros(5, np.int32)
    run_reference(fn, {"data": np.array([10, 11, 12], np.int32), "out": found}, (5, 1, 1))
    assert found.tolist() == [10, 11, 12, -1, -1]


def test_errors_point_at_the_instruction() -> None:
    data, tile, loc = tensor("data", int32, (3,)), RegisterTensor(int32, (2,)), Loc("kernel.py", 12, 5)
    load = Inst(Load(tile, data, (BlockId(0),), (0,), checked=False), loc)
    with pytest.raises(TilusError) as caught:
        run_reference(
            function(If(const(True), load, EMPTY), params=(data,)), {"data": np.zeros(3, np.int32)}, (4, 1, 1)
        )
    assert caught.value.loc == loc
    assert caught.value.message == (
        "load of data in block (2, 0, 0), tile element [1]: index 3 along dimension 0, expected 0 <= index < 3"
    )


def test_reading_before_writing_is_refused() -> None:
    tile = RegisterTensor(int64, (2,), name="acc")
    with pytest.raises(TilusError, match="tile acc is read before"):
        run_reference(function(Mix(tile, tile, const(0))), {}, (1, 1, 1))
    with pytest.raises(TilusError, match="scalar a is read before"):
        run_reference(function(SetScalar(SCALARS[1], SCALARS[0])), {}, (1, 1, 1))
