"""What the tests of the reference execution share: small instructions, and an oracle that runs one block after the other.

The oracle walks the statements with Python numbers and `ir.expr.evaluate`; it shares no code with the execution.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tilus.dtypes import DataType, int64
from tilus.ir import expr as e
from tilus.ir.evaluation import Evaluation
from tilus.ir.expr import BlockId, Expr, GridDim, Var
from tilus.ir.function import Function, ScalarParam, TensorParam
from tilus.ir.instruction import Effects, Instruction
from tilus.ir.stmt import Break, Continue, For, If, Inst, Return, Seq, SetScalar, Stmt, While
from tilus.ir.tensor import GlobalTensor, RegisterTensor, SharedTensor

MODULUS = 10007


@dataclass(frozen=True, eq=False)
class Mix(Instruction):
    """`out = (31 * src + value + [0, 1, ...]) % MODULUS`: what ran, and in which order, as one number per element."""

    mnemonic = "test.mix"

    out: RegisterTensor
    src: RegisterTensor
    value: Expr

    def evaluate(self, env: Evaluation) -> None:
        value = env.scalar(self.value).astype(np.int64)[..., None]
        env.set_tile(self.out, (env.tile(self.src) * 31 + value + np.arange(self.out.shape[0])) % MODULUS)


@dataclass(frozen=True, eq=False)
class Fill(Instruction):
    """`out[...] = value`"""

    mnemonic = "test.fill"

    out: RegisterTensor
    value: Expr

    def evaluate(self, env: Evaluation) -> None:
        value = env.scalar(self.value).astype(self.out.dtype.compute)
        value = value.reshape(*value.shape, *(1,) * self.out.rank)
        env.set_tile(self.out, np.broadcast_to(value, (*value.shape[:3], *self.out.shape)))


@dataclass(frozen=True, eq=False)
class Give(Instruction):
    """Sets a tile to an array [gx, gy, gz, *shape] (for launches in one chunk)."""

    mnemonic = "test.give"

    out: RegisterTensor
    values: npt.NDArray[Any]

    def evaluate(self, env: Evaluation) -> None:
        env.set_tile(self.out, self.values)


@dataclass(frozen=True, eq=False)
class Probe(Instruction):
    """Appends the value of a tile in all blocks to a list (for launches in one chunk)."""

    mnemonic = "test.probe"

    src: RegisterTensor
    grid: tuple[int, int, int]
    seen: list[npt.NDArray[Any]]

    def effects(self) -> Effects:
        return Effects(other=True)

    def evaluate(self, env: Evaluation) -> None:
        self.seen.append(np.broadcast_to(env.tile(self.src), (*self.grid, *self.src.shape)))


@dataclass(frozen=True, eq=False)
class Load(Instruction):
    mnemonic = "test.load"

    out: RegisterTensor
    src: GlobalTensor | SharedTensor
    offsets: tuple[Expr, ...]
    dims: tuple[int, ...]
    checked: bool = True

    def effects(self) -> Effects:
        return Effects(reads=(self.src,))

    def evaluate(self, env: Evaluation) -> None:
        env.set_tile(self.out, env.load(self.src, self.offsets, self.out.shape, self.dims, checked=self.checked))


@dataclass(frozen=True, eq=False)
class Store(Instruction):
    mnemonic = "test.store"

    dst: GlobalTensor | SharedTensor
    src: RegisterTensor
    offsets: tuple[Expr, ...]
    dims: tuple[int, ...]
    checked: bool = True

    def effects(self) -> Effects:
        return Effects(writes=(self.dst,))

    def evaluate(self, env: Evaluation) -> None:
        env.store(self.dst, self.offsets, self.dims, env.tile(self.src), checked=self.checked)


@dataclass(frozen=True, eq=False)
class Atomic(Instruction):
    mnemonic = "test.atomic"

    out: RegisterTensor
    dst: GlobalTensor | SharedTensor
    src: RegisterTensor
    offsets: tuple[Expr, ...]
    dims: tuple[int, ...]
    op: str
    checked: bool = True

    def effects(self) -> Effects:
        return Effects(reads=(self.dst,), writes=(self.dst,))

    def evaluate(self, env: Evaluation) -> None:
        old = env.update(self.dst, self.offsets, self.dims, env.tile(self.src), self.op, checked=self.checked)
        env.set_tile(self.out, old)


@dataclass(frozen=True, eq=False)
class Element(Instruction):
    """A scalar from a tensor."""

    mnemonic = "test.element"

    out: Var
    src: GlobalTensor
    index: tuple[Expr, ...]

    def effects(self) -> Effects:
        return Effects(reads=(self.src,))

    def evaluate(self, env: Evaluation) -> None:
        env.set_scalar(self.out, env.load(self.src, self.index, (), (), checked=False))


def tensor(name: str, dtype: DataType, shape: tuple[Any, ...], strides: tuple[Any, ...] | None = None) -> GlobalTensor:
    """A tensor parameter; row-major when no strides are given (then the shape must be numbers)."""
    if strides is None:
        strides = tuple(int(np.prod(shape[i + 1 :], dtype=np.int64)) for i in range(len(shape)))
    exprs = [tuple(e.as_expr(x) for x in values) for values in (shape, strides)]
    return GlobalTensor(dtype, exprs[0], exprs[1], Var(f"{name}_ptr", int64), name=name)


def function(*body: Stmt | Instruction, params: tuple[GlobalTensor | Var, ...] = ()) -> Function:
    stmts = tuple(Inst(s) if isinstance(s, Instruction) else s for s in body)
    bound = tuple(ScalarParam(p.name, p) if isinstance(p, Var) else TensorParam(p.name, p) for p in params)
    return Function("kernel", bound, (), 4, Seq(stmts))


class Leave(Exception):
    """Break, Continue or Return of the oracle's block."""


class Oracle:
    """One block of a grid: scalars as Python numbers, tiles (only those of Mix and Fill) as lists."""

    def __init__(self, block: tuple[int, ...], grid: tuple[int, ...], scalars: Mapping[Expr, e.Number] | None = None):
        self.values: dict[Expr, e.Number] = dict(scalars or {})
        for axis in range(3):
            self.values[BlockId(axis)], self.values[GridDim(axis)] = block[axis], grid[axis]
        self.tiles: dict[RegisterTensor, list[int]] = {}

    def start(self, stmt: Stmt) -> None:
        try:
            self.run(stmt)
        except Leave as leave:
            assert leave.args[0] is Return

    def run(self, stmt: Stmt) -> None:
        match stmt:
            case Seq(stmts):
                for child in stmts:
                    self.run(child)
            case Inst(Mix(out, src, value)):
                number = int(self.value(value))
                self.tiles[out] = [(31 * x + number + i) % MODULUS for i, x in enumerate(self.tiles[src])]
            case Inst(Fill(out, value)):
                self.tiles[out] = [int(self.value(value))] * out.shape[0]
            case Inst(Store()):
                pass  # of the state at that point, which the test compares at the end
            case SetScalar(var, value):
                self.values[var] = self.value(value)
            case If(cond, then, orelse):
                self.run(then if self.value(cond) else orelse)
            case For(var, start, stop, step, body):
                for index in range(int(self.value(start)), int(self.value(stop)), step):
                    self.values[var] = index
                    if self.iteration(body):
                        break
            case While(cond, body):
                while self.value(cond):
                    if self.iteration(body):
                        break
            case Break() | Continue() | Return():
                raise Leave(type(stmt))
            case _:
                raise TypeError(stmt)

    def iteration(self, body: Stmt) -> bool:
        """Whether the loop ends by a break."""
        try:
            self.run(body)
        except Leave as leave:
            if leave.args[0] is Return:
                raise
            return leave.args[0] is Break
        return False

    def value(self, expr: Expr) -> e.Number:
        return e.evaluate(expr, self.values)


def blocks(grid: tuple[int, int, int]) -> list[tuple[int, int, int]]:
    """In the order in which blocks count."""
    return list(itertools.product(*map(range, grid)))
