"""Walking and rewriting statements. A rewrite gives back the same object where nothing changed."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence

from tilus.ir.expr import Expr, substitute
from tilus.ir.stmt import Break, Continue, For, If, Inst, Return, Role, Seq, SetScalar, Stmt, While
from tilus.ir.tensor import Tensor

WARPGROUP = 4  # warps that set their registers together (PTX ISA, setmaxnreg)


def walk(stmt: Stmt) -> Iterator[Stmt]:
    """The statement and all statements inside it, in program order."""
    yield stmt
    match stmt:
        case Seq():
            for child in stmt.stmts:
                yield from walk(child)
        case For() | While() | Role():
            yield from walk(stmt.body)
        case If():
            yield from walk(stmt.then)
            yield from walk(stmt.orelse)
        case Inst() | SetScalar() | Break() | Continue() | Return():
            pass


def instructions(stmt: Stmt) -> Iterator[Inst]:
    return (s for s in walk(stmt) if isinstance(s, Inst))


def by_warps(stmt: Stmt, warps: range) -> Iterator[tuple[Inst, range]]:
    """All instructions with the warps that run them; `warps` run the statement itself."""
    match stmt:
        case Seq():
            for child in stmt.stmts:
                yield from by_warps(child, warps)
        case Role():
            yield from by_warps(stmt.body, stmt.warps)
        case For() | While():
            yield from by_warps(stmt.body, warps)
        case If():
            yield from by_warps(stmt.then, warps)
            yield from by_warps(stmt.orelse, warps)
        case Inst():
            yield stmt, warps
        case SetScalar() | Break() | Continue() | Return():
            pass


def side_by_side(stmts: Sequence[Stmt]) -> Iterator[Stmt | tuple[Role, ...]]:
    """The statements of a sequence, where roles that follow each other, and so run at the same time, are one item."""
    for is_role, group in itertools.groupby(stmts, lambda stmt: isinstance(stmt, Role)):
        if is_role:
            yield tuple(stmt for stmt in group if isinstance(stmt, Role))
        else:
            yield from group


def register_groups(roles: Sequence[Role]) -> list[tuple[Role, ...]]:
    """Roles that follow each other in the same warpgroup, with the same number of registers: they set it together."""
    groups: list[list[Role]] = []
    for role in roles:
        last = groups[-1][-1] if groups else None
        inside = last is not None and last.warps.stop % WARPGROUP and role.first_warp == last.warps.stop
        if last is not None and inside and role.registers is not None and role.registers == last.registers:
            groups[-1].append(role)
        else:
            groups.append([role])
    return [tuple(group) for group in groups]


def rewrite(stmt: Stmt, leaf: Callable[[Stmt], Stmt]) -> Stmt:
    """Rebuild a statement with `leaf` applied to every statement that is not a Seq, children first."""
    match stmt:
        case Seq():
            stmts = tuple(rewrite(child, leaf) for child in stmt.stmts)
            return stmt if all(a is b for a, b in zip(stmts, stmt.stmts, strict=True)) else seq(*stmts)
        case For() | While() | Role():
            body = rewrite(stmt.body, leaf)
            return leaf(stmt if body is stmt.body else dataclasses.replace(stmt, body=body))
        case If():
            then, orelse = rewrite(stmt.then, leaf), rewrite(stmt.orelse, leaf)
            same = then is stmt.then and orelse is stmt.orelse
            return leaf(stmt if same else dataclasses.replace(stmt, then=then, orelse=orelse))
        case _:
            return leaf(stmt)


def seq(*stmts: Stmt) -> Seq:
    """A flat sequence."""
    flat: list[Stmt] = []
    for stmt in stmts:
        flat.extend(stmt.stmts if isinstance(stmt, Seq) else (stmt,))
    return Seq(tuple(flat))


def replace(stmt: Stmt, tensors: Mapping[Tensor, Tensor], exprs: Mapping[Expr, Expr] | None = None) -> Stmt:
    """The statement over other tensors and with scalars substituted."""
    values = exprs or {}

    def leaf(s: Stmt) -> Stmt:
        match s:
            case Inst():
                inst = s.inst.replace(tensors, values)
                return s if inst is s.inst else Inst(inst, s.loc)
            case SetScalar() if values:
                return dataclasses.replace(s, value=substitute(s.value, values))
            case For() if values:
                return dataclasses.replace(s, start=substitute(s.start, values), stop=substitute(s.stop, values))
            case While() | If() if values:
                return dataclasses.replace(s, cond=substitute(s.cond, values))
            case _:
                return s

    return rewrite(stmt, leaf)
