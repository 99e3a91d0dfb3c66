"""Remove instructions and scalar assignments whose results nobody reads.

Requires: a verified function. Ensures: every instruction without effects has a used result.
"""

from __future__ import annotations

from dataclasses import replace

from tilus.ir.expr import Expr, Var, walk
from tilus.ir.function import Function
from tilus.ir.stmt import For, If, Inst, Role, Seq, SetScalar, Stmt, While
from tilus.ir.tensor import RegisterTensor
from tilus.ir.visit import rewrite
from tilus.ir.visit import walk as walk_stmts
from tilus.target import Target


def eliminate_dead_code(function: Function, target: Target) -> Function:
    body = function.body
    while True:
        used = _used(body)
        smaller = rewrite(body, lambda stmt, used=used: Seq(()) if _is_dead(stmt, used) else stmt)
        if smaller is body:
            return function if body is function.body else replace(function, body=body)
        body = smaller


def _used(body: Stmt) -> set[RegisterTensor | Var]:
    used: set[RegisterTensor | Var] = set()

    def read(*exprs: Expr) -> None:
        used.update(e for expr in exprs for e in walk(expr) if isinstance(e, Var))

    for stmt in walk_stmts(body):
        match stmt:
            case Inst(inst):
                used.update(inst.register_operands)
                read(*inst.scalars)
            case SetScalar(_, value):
                read(value)
            case For(_, start, stop):
                read(start, stop)
            case While(cond) | If(cond):
                read(cond)
            case _:
                pass
    return used


def _is_dead(stmt: Stmt, used: set[RegisterTensor | Var]) -> bool:
    match stmt:
        case Inst(inst):
            return inst.effects().removable and not any(result in used for result in inst.results)
        case SetScalar(var):
            return var not in used
        case If(_, Seq(()), Seq(())) | Role(body=Seq(()), registers=None):
            return True
        case _:
            return False
