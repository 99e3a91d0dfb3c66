"""Checks a function and reports everything that is wrong with it at once."""

from __future__ import annotations

from tilus.errors import Loc, Note, TilusError, raise_all
from tilus.ir.clusters import check_cluster
from tilus.ir.dependencies import check_dependencies
from tilus.ir.expr import Expr, Var, walk
from tilus.ir.function import Function
from tilus.ir.instruction import Instruction
from tilus.ir.stmt import Break, Continue, For, If, Inst, Return, Seq, SetScalar, Stmt, While
from tilus.ir.tensor import RegisterTensor


def verify(function: Function) -> None:
    """Raise TilusError unless every tile and scalar is defined before it is read and every instruction is well formed."""
    checker = _Checker(function)
    checker.exprs(function.grid, function.loc)
    checker.statement(function.body, 0)
    raise_all([*checker.errors, *check_dependencies(function), *check_cluster(function)])


class _Checker:
    def __init__(self, function: Function) -> None:
        self.errors: list[TilusError] = []
        self.num_threads = function.num_threads
        self.scalars: set[Var] = set(function.kernel_params())
        self.tiles: dict[RegisterTensor, Loc | None] = {}  # with the line that defines each

    def exprs(self, exprs: tuple[Expr, ...], loc: Loc | None) -> None:
        for expr in exprs:
            for var in walk(expr):
                if isinstance(var, Var) and var not in self.scalars:
                    self.errors.append(TilusError(f"scalar {var.name} is read before it has a value", loc=loc))

    def statement(self, stmt: Stmt, loops: int) -> None:
        match stmt:
            case Seq(stmts):
                for child in stmts:
                    self.statement(child, loops)
            case Inst(inst, loc):
                self.instruction(inst, loc)
            case SetScalar(var, value, loc):
                self.exprs((value,), loc)
                self.scalars.add(var)
            case For(var, start, stop, step, body, _, loc):
                self.exprs((start, stop), loc)
                if step <= 0:
                    self.errors.append(TilusError(f"loop step is {step}, expected a positive constant", loc=loc))
                self.scalars.add(var)
                self.statement(body, loops + 1)
            case While(cond, body, loc):
                self.exprs((cond,), loc)
                self.statement(body, loops + 1)
            case If(cond, then, orelse, loc):
                self.exprs((cond,), loc)
                self.statement(then, loops)
                self.statement(orelse, loops)
            case Break(loc) | Continue(loc):
                if loops == 0:
                    self.errors.append(TilusError(f"{type(stmt).__name__.lower()} outside of a loop", loc=loc))
            case Return():
                pass

    def instruction(self, inst: Instruction, loc: Loc | None) -> None:
        self.exprs(inst.scalars, loc)
        for tile in inst.register_operands:
            if tile not in self.tiles:
                self.errors.append(TilusError(f"tile {tile.name} is read before it has a value", loc=loc))
        for tile in inst.register_results:
            if tile not in self.tiles:
                self._layout(tile, inst, loc)
        try:
            inst.verify()
        except TilusError as error:
            self.errors.append(error.at(loc))
        for result in inst.results:
            if isinstance(result, RegisterTensor):
                self.tiles.setdefault(result, loc)
            else:
                self.scalars.add(result)

    def _layout(self, tile: RegisterTensor, inst: Instruction, loc: Loc | None) -> None:
        """Whether a pinned layout fits the tile that `inst` defines; an error shows where the tile has its shape from, too."""
        if tile.layout is None:
            return
        if tile.layout.shape != tile.shape:
            self.errors.append(
                TilusError(
                    f"layout {tile.layout} has shape {list(tile.layout.shape)}, tile {tile.name} {list(tile.shape)}",
                    loc=loc,
                    notes=[
                        Note(f"{operand.name} has shape {list(operand.shape)} here", self.tiles.get(operand))
                        for operand in inst.register_operands
                        if operand.shape == tile.shape
                    ],
                    hint="a layout covers the whole tile: repeat it with .local(...) or .spatial(...)",
                )
            )
        if tile.layout.num_threads != self.num_threads:
            self.errors.append(
                TilusError(
                    f"layout {tile.layout} of {tile.name} is for {tile.layout.num_threads} threads, "
                    f"the block has {self.num_threads}",
                    loc=loc,
                    hint="change `warps` in tilus.grid, or the layout",
                )
            )
