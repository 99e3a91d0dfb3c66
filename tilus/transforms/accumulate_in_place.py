"""Let accumulating instructions write their variable's storage directly: `t = dot(a, b, acc); acc = t` becomes one dot.

Requires: a verified function. Ensures: no instruction with `accumulates` is followed by a copy of its only use.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from tilus.instructions.view import Assign
from tilus.ir.function import Function
from tilus.ir.stmt import For, If, Inst, Role, Seq, Stmt, While
from tilus.ir.tensor import RegisterTensor
from tilus.ir.visit import instructions
from tilus.target import Target


def accumulate_in_place(function: Function, target: Target) -> Function:
    uses = Counter(t for stmt in instructions(function.body) for t in stmt.inst.register_operands)
    body = _rewrite(function.body, uses)
    return function if body is function.body else replace(function, body=body)


def _rewrite(stmt: Stmt, uses: Counter[RegisterTensor]) -> Stmt:
    match stmt:
        case Seq(stmts):
            merged = _merge([_rewrite(child, uses) for child in stmts], uses)
            same = len(merged) == len(stmts) and all(a is b for a, b in zip(merged, stmts, strict=True))
            return stmt if same else Seq(tuple(merged))
        case For(body=body) | While(body=body) | Role(body=body):
            new = _rewrite(body, uses)
            return stmt if new is body else replace(stmt, body=new)
        case If(_, then, orelse):
            sides = _rewrite(then, uses), _rewrite(orelse, uses)
            same = sides[0] is then and sides[1] is orelse
            return stmt if same else replace(stmt, then=sides[0], orelse=sides[1])
        case _:
            return stmt


def _merge(stmts: list[Stmt], uses: Counter[RegisterTensor]) -> list[Stmt]:
    result: list[Stmt] = []
    for stmt in stmts:
        last = result[-1] if result else None
        if isinstance(stmt, Inst) and isinstance(stmt.inst, Assign) and isinstance(last, Inst):
            temporary, storage = stmt.inst.src, stmt.inst.out
            if last.inst.accumulates and last.inst.results == (temporary,) and uses[temporary] == 1:
                result[-1] = Inst(replace(last.inst, out=storage), last.loc)
                continue
        result.append(stmt)
    return result
