"""Checks a function and reports everything that is wrong with it at once."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager

from tilus.errors import Loc, Note, TilusError, raise_all
from tilus.ir.clusters import check_cluster
from tilus.ir.dependencies import check_dependencies
from tilus.ir.expr import Expr, Var, walk
from tilus.ir.function import Function
from tilus.ir.instruction import Instruction
from tilus.ir.stmt import Break, Continue, For, If, Inst, Return, Role, Seq, SetScalar, Stmt, While
from tilus.ir.tensor import RegisterTensor
from tilus.ir.visit import WARPGROUP, register_groups, side_by_side
from tilus.ir.visit import walk as walk_statements

# How many registers a thread may have that sets their number (PTX ISA, setmaxnreg).
MIN_REGISTERS = 24
MAX_REGISTERS = 256


def verify(function: Function) -> None:
    """Raise TilusError unless every tile and scalar is defined before it is read and every instruction is well formed."""
    checker = _Checker(function)
    checker.exprs(function.grid, function.loc)
    checker.statement(function.body)
    raise_all([*checker.errors, *check_dependencies(function), *check_cluster(function)])


class _Checker:
    def __init__(self, function: Function) -> None:
        self.errors: list[TilusError] = []
        self.num_warps = function.num_warps
        self.body = function.body
        self.scalars: set[Var | RegisterTensor] = set(function.kernel_params())
        self.tiles: dict[Var | RegisterTensor, Loc | None] = {}  # with the line that defines each
        self.elsewhere: dict[Var | RegisterTensor, str] = {}  # what only other warps know, with an explanation
        self.role: Role | None = None
        self.loops = 0  # of the role, or of the block outside of roles
        self.branches = 0

    def exprs(self, exprs: tuple[Expr, ...], loc: Loc | None) -> None:
        for expr in exprs:
            for var in walk(expr):
                if isinstance(var, Var) and var not in self.scalars:
                    why = self.elsewhere.get(var, "before it has a value")
                    self.errors.append(TilusError(f"scalar {var.name} is read {why}", loc=loc))

    def statement(self, stmt: Stmt) -> None:
        match stmt:
            case Seq(stmts):
                for item in side_by_side(stmts):
                    if isinstance(item, tuple):
                        self._roles(item, last=stmt is self.body and stmts[-1] is item[-1])
                    else:
                        self.statement(item)
            case Role():
                self._roles((stmt,), last=stmt is self.body)
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
                self._loop(body)
            case While(cond, body, loc):
                self.exprs((cond,), loc)
                self._loop(body)
            case If(cond, then, orelse, loc):
                self.exprs((cond,), loc)
                self.branches += 1
                self.statement(then)
                self.statement(orelse)
                self.branches -= 1
            case Break(loc) | Continue(loc):
                if self.loops == 0:
                    where = "outside of a loop" if self.role is None else f"leaves the role of {self.role}"
                    self.errors.append(TilusError(f"{type(stmt).__name__.lower()} {where}", loc=loc))
            case Return():
                pass

    def _loop(self, body: Stmt) -> None:
        self.loops += 1
        self.statement(body)
        self.loops -= 1

    # Roles.

    def _roles(self, roles: tuple[Role, ...], *, last: bool) -> None:
        """Roles that run side by side: all start from what is known here, and keep for themselves what they assign."""
        taken: dict[int, Role] = {}
        for role in roles:
            self._role_warps(role, taken, last)
            with self._inside(role):
                self.statement(role.body)
        for group in register_groups(roles):
            if group[0].registers is not None:
                self._whole_warpgroups(group)
        for role in roles:
            for result in _assigned(role):
                self.elsewhere[result] = f"behind the role of {role} that assigns it: other warps do not know the value"
                self.scalars.discard(result)
                self.tiles.pop(result, None)

    @contextmanager
    def _inside(self, role: Role) -> Generator[None]:
        scalars, tiles, elsewhere = self.scalars, self.tiles, self.elsewhere
        outside = "in a role and was made outside of it: its layout is for other threads"
        self.scalars, self.tiles, self.elsewhere = set(scalars), {}, elsewhere | dict.fromkeys(tiles, outside)
        loops, branches, outer = self.loops, self.branches, self.role
        self.loops, self.branches, self.role = 0, 0, role
        yield
        self.loops, self.branches, self.role = loops, branches, outer
        self.scalars, self.tiles, self.elsewhere = scalars, tiles, elsewhere

    def _role_warps(self, role: Role, taken: dict[int, Role], last: bool) -> None:
        def refuse(message: str, hint: str) -> None:
            self.errors.append(TilusError(message, loc=role.loc, hint=hint))

        if self.role is not None:
            refuse(f"the role of {role} is inside of the role of {self.role}", "roles do not nest")
        if role.first_warp < 0 or role.num_warps < 1 or role.warps.stop > self.num_warps:
            refuse(
                f"the role has warps {role.first_warp} to {role.warps.stop - 1}, the block has {self.num_warps}",
                "change `warps` in tilus.grid, or tilus.warps(first, count)",
            )
        if shared := [taken[warp] for warp in role.warps if warp in taken]:
            refuse(f"{role} run a role next to one of {shared[0]}", "roles side by side need warps of their own")
        taken.update(dict.fromkeys(role.warps, role))
        if role.registers is not None:
            self._role_registers(role, last)
        if not last and any(isinstance(stmt, Return) for stmt in walk_statements(role.body)):
            refuse(
                f"the role of {role} returns, and statements follow the roles", "make the roles the end of the kernel"
            )

    def _role_registers(self, role: Role, last: bool) -> None:
        registers = role.registers
        if registers is None or registers % 8 or not MIN_REGISTERS <= registers <= MAX_REGISTERS:
            message = f"registers is {registers}, expected a multiple of 8 from {MIN_REGISTERS} to {MAX_REGISTERS}"
            self.errors.append(TilusError(message, loc=role.loc))
        if not last:
            self.errors.append(
                TilusError(
                    f"the role of {role} sets its registers, and is not at the end of the kernel",
                    loc=role.loc,
                    hint="put loops into the roles, and nothing behind them",
                )
            )

    def _whole_warpgroups(self, group: tuple[Role, ...]) -> None:
        role = group[0]
        if role.first_warp % WARPGROUP or group[-1].warps.stop % WARPGROUP:
            self.errors.append(
                TilusError(
                    f"the role of {role} sets its registers, expected whole warpgroups",
                    loc=role.loc,
                    hint=f"first warp and number of warps are multiples of {WARPGROUP}, of a role or of several that follow each "
                    "other and have the same number of registers; warps of a role may be idle",
                )
            )

    # Instructions.

    def instruction(self, inst: Instruction, loc: Loc | None) -> None:
        self.exprs(inst.scalars, loc)
        for tile in inst.register_operands:
            if tile not in self.tiles:
                why = self.elsewhere.get(tile, "before it has a value")
                self.errors.append(TilusError(f"tile {tile.name} is read {why}", loc=loc))
        if inst.once and (self.loops or self.branches or self.role):
            self.errors.append(
                TilusError(
                    f"{inst.mnemonic} in a loop, branch or role, expected where the whole block passes once",
                    loc=loc,
                    hint="put it at the beginning of the kernel",
                )
            )
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
        group, num_warps = ("role", self.role.num_warps) if self.role else ("block", self.num_warps)
        if tile.layout.num_threads != 32 * num_warps:
            self.errors.append(
                TilusError(
                    f"layout {tile.layout} of {tile.name} is for {tile.layout.num_threads} threads, "
                    f"the {group} has {32 * num_warps}",
                    loc=loc,
                    hint="change `warps` in tilus.grid, or the layout"
                    if self.role is None
                    else "change the number of warps in tilus.warps, or the layout",
                )
            )


def _assigned(role: Role) -> Iterator[Var | RegisterTensor]:
    """What the role's statements give a value."""
    for stmt in walk_statements(role.body):
        match stmt:
            case Inst(inst):
                yield from inst.results
            case SetScalar(var) | For(var):
                yield var
            case _:
                pass
