"""Statements compiled to Python closures over the state of the blocks that run.

A branch that only some blocks take runs with the others masked; a loop runs until its last block leaves it. Blocks that
break, continue or return are taken out of the mask, and the loop puts them back where they go on.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import assert_never

from tilus.errors import Loc, TilusError
from tilus.ir.stmt import Break, Continue, For, If, Inst, Return, Seq, SetScalar, Stmt, While
from tilus.ir.visit import walk
from tilus.runtime.reference.mask import invert, join, meet
from tilus.runtime.reference.scalars import Compiled, compare, compile_condition, compile_scalar
from tilus.runtime.reference.state import BlockState

Runner = Callable[[BlockState], None]


def compile_stmt(stmt: Stmt) -> Runner:
    """A closure that runs `stmt` in the active blocks of a state."""
    match stmt:
        case Seq(stmts):
            return _sequence(stmts)
        case Inst(inst, loc):
            return _located(inst.evaluate, loc)
        case SetScalar():
            return _set_scalar(stmt)
        case If():
            return _branch(stmt)
        case For():
            return _for(stmt)
        case While():
            return _while(stmt)
        case Break():
            return _break
        case Continue():
            return _continue
        case Return():
            return _return
        case _:
            assert_never(stmt)


def _located(run: Runner, loc: Loc | None) -> Runner:
    """Errors of `run` point at the user's line."""

    def located(s: BlockState) -> None:
        try:
            run(s)
        except TilusError as error:
            raise error.at(loc) from None

    return located


def _leaves(stmt: Stmt) -> bool:
    """Whether some blocks may not reach the end of the statement."""
    return any(isinstance(child, (Break, Continue, Return)) for child in walk(stmt))


def _sequence(stmts: tuple[Stmt, ...]) -> Runner:
    runners = tuple(compile_stmt(stmt) for stmt in stmts)
    if len(runners) == 1:
        return runners[0]

    def run(s: BlockState) -> None:
        for runner in runners:
            runner(s)

    def run_while_active(s: BlockState) -> None:
        for runner in runners:
            runner(s)
            if s.mask is False:
                return

    return run_while_active if any(map(_leaves, stmts)) else run


def _set_scalar(stmt: SetScalar) -> Runner:
    var, value = stmt.var, compile_scalar(stmt.value)
    return _located(lambda s: s.assign(var, value(s)), stmt.loc)


def _break(s: BlockState) -> None:
    s.broken, s.mask = join(s.broken, s.mask), False


def _continue(s: BlockState) -> None:
    s.continued, s.mask = join(s.continued, s.mask), False


def _return(s: BlockState) -> None:
    s.mask = False


def _branch(stmt: If) -> Runner:
    cond, then, orelse = compile_condition(stmt.cond), compile_stmt(stmt.then), compile_stmt(stmt.orelse)

    def run(s: BlockState) -> None:
        chosen, mask = cond(s), s.mask
        yes = meet(mask, chosen)
        if yes is False:
            return orelse(s)
        no = meet(mask, invert(chosen))
        if no is False:
            return then(s)
        s.mask = yes
        then(s)
        after = s.mask
        s.mask = no
        orelse(s)
        s.mask = mask if after is yes and s.mask is no else join(after, s.mask)
        return None

    return _located(run, stmt.loc)


def _for(stmt: For) -> Runner:
    var, start, stop, step = stmt.var, compile_scalar(stmt.start), compile_scalar(stmt.stop), stmt.step
    body = compile_stmt(stmt.body)
    straight = not _leaves(stmt.body)

    def advance(s: BlockState) -> None:
        s.scalars[var] = s.scalars[var] + step

    def run(s: BlockState) -> None:
        first, end = start(s), stop(s)
        if straight and type(first) is int and type(end) is int:
            for index in range(first, end, step):
                s.scalars[var] = index
                body(s)
        else:
            s.scalars[var] = first
            _loop(s, lambda s: compare(operator.lt, s.scalars[var], end), body, advance)

    return _located(run, stmt.loc)


def _while(stmt: While) -> Runner:
    cond, body = compile_condition(stmt.cond), compile_stmt(stmt.body)
    return _located(lambda s: _loop(s, cond, body, None), stmt.loc)


def _loop(s: BlockState, cond: Compiled, body: Runner, advance: Runner | None) -> None:
    """Run `body` as long as `cond` holds in some active block; a block leaves when it does not hold, or by a break."""
    outer = s.broken, s.continued
    s.broken, finished = False, False
    while True:
        chosen, live = cond(s), s.mask
        s.mask = meet(live, chosen)
        finished = join(finished, meet(live, invert(chosen)))
        if s.mask is False:
            break
        s.continued = False
        body(s)
        s.mask = join(s.mask, s.continued)
        if s.mask is False:
            break
        if advance is not None:
            advance(s)
    s.mask = join(finished, s.broken)
    s.broken, s.continued = outer
