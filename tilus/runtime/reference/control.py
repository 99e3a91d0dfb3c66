"""Statements compiled to Python closures over the state of the blocks that run.

A branch that only some blocks take runs with the others masked; a loop runs until its last block leaves it. Blocks that
break, continue or return are taken out of the mask, and the loop puts them back where they go on.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable
from typing import assert_never

from tilus.errors import Loc, TilusError
from tilus.ir.stmt import Break, Continue, For, If, Inst, Return, Role, Seq, SetScalar, Stmt, While
from tilus.ir.tensor import RegisterTensor
from tilus.ir.visit import instructions, side_by_side, walk
from tilus.runtime.reference.mask import invert, join, meet
from tilus.runtime.reference.roles import Turn, run_side_by_side
from tilus.runtime.reference.scalars import Compiled, compare, compile_condition, compile_scalar
from tilus.runtime.reference.state import BlockState

Runner = Callable[[BlockState], None]
Uses = Counter[RegisterTensor]


def compile_body(body: Stmt) -> Runner:
    """A closure that runs the body of a function in all blocks of a state."""
    return _compile(body, _mentions(body))


def _compile(stmt: Stmt, uses: Uses) -> Runner:
    match stmt:
        case Seq(stmts):
            return _sequence(stmts, uses)
        case Inst(inst, loc):
            return _located(inst.evaluate, loc)
        case SetScalar():
            return _set_scalar(stmt)
        case If():
            return _branch(stmt, uses)
        case For():
            return _for(stmt, uses)
        case While():
            return _while(stmt, uses)
        case Role():
            return _roles((stmt,), uses)
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


def _mentions(stmt: Stmt) -> Uses:
    """How often each immutable tile is an operand or a result in a statement."""
    tiles = (t for s in instructions(stmt) for t in (*s.inst.register_operands, *s.inst.register_results))
    return Counter(tile for tile in tiles if not tile.mutable)


def _sequence(stmts: tuple[Stmt, ...], uses: Uses) -> Runner:
    """One after the other. Tiles that nothing outside of the sequence mentions are dropped after their last use, so that
    numpy finds their memory, still in the cache, for the next ones."""
    runners: list[Runner] = []
    left = _mentions(Seq(stmts))
    local = {tile for tile, count in left.items() if count == uses[tile]}
    items = list(side_by_side(stmts))
    for item in items:
        runners.append(_roles(item, uses) if isinstance(item, tuple) else _compile(item, uses))
        here = _mentions(Seq(item) if isinstance(item, tuple) else item)
        left -= here
        dead = [tile for tile in here if tile in local and tile not in left]
        if dead and item is not items[-1]:
            runners.append(_drop(tuple(dead)))
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


def _drop(dead: tuple[RegisterTensor, ...]) -> Runner:
    def drop(s: BlockState) -> None:
        for tile in dead:
            s.tiles.pop(tile, None)

    return drop


def _set_scalar(stmt: SetScalar) -> Runner:
    var, value = stmt.var, compile_scalar(stmt.value)
    return _located(lambda s: s.assign(var, value(s)), stmt.loc)


def _break(s: BlockState) -> None:
    s.broken, s.mask = join(s.broken, s.mask), False


def _continue(s: BlockState) -> None:
    s.continued, s.mask = join(s.continued, s.mask), False


def _return(s: BlockState) -> None:
    s.mask = False


def _branch(stmt: If, uses: Uses) -> Runner:
    cond, then, orelse = compile_condition(stmt.cond), _compile(stmt.then, uses), _compile(stmt.orelse, uses)

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


def _for(stmt: For, uses: Uses) -> Runner:
    var, start, stop, step = stmt.var, compile_scalar(stmt.start), compile_scalar(stmt.stop), stmt.step
    body = _compile(stmt.body, uses)
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


def _while(stmt: While, uses: Uses) -> Runner:
    cond, body = compile_condition(stmt.cond), _compile(stmt.body, uses)
    return _located(lambda s: _loop(s, cond, body, None), stmt.loc)


def _roles(roles: tuple[Role, ...], uses: Uses) -> Runner:
    """Each with variables of its own, which are gone when all are at their end."""
    compiled = [(role, _compile(role.body, uses)) for role in roles]

    def run(s: BlockState) -> None:
        run_side_by_side([(str(role), _role(role, body, s)) for role, body in compiled], s.turn)

    return run


def _role(role: Role, body: Runner, block: BlockState) -> Callable[[Turn], None]:
    return lambda turn: body(block.of_role(role.num_threads, turn))


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
