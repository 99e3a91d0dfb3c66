"""Unroll loops that ask for it: `unroll` copies of the body per trip, and a loop for the rest.

The copies see the loop variable plus a constant, so that pipeline-stage arithmetic on it folds.

Requires: a verified function. Ensures: every For has unroll 1.
"""

from __future__ import annotations

import dataclasses

from tilus.ir.expr import Const, Expr, binary
from tilus.ir.function import Function
from tilus.ir.stmt import Break, Continue, For, Seq, Stmt
from tilus.ir.tensor import RegisterTensor, Tensor
from tilus.ir.visit import instructions, replace, rewrite, seq, walk
from tilus.target import Target


def unroll(function: Function, target: Target) -> Function:
    body = rewrite(function.body, lambda stmt: _unrolled(stmt) if isinstance(stmt, For) and stmt.unroll > 1 else stmt)
    return function if body is function.body else dataclasses.replace(function, body=body)


def _unrolled(loop: For) -> Stmt:
    if any(isinstance(stmt, (Break, Continue)) for stmt in walk(loop.body)):
        return dataclasses.replace(loop, unroll=1)
    chunk = loop.step * loop.unroll
    trips = binary("//", binary("-", loop.stop, loop.start), chunk)
    if isinstance(trips, Const) and trips.value < 0:
        return dataclasses.replace(loop, unroll=1)
    span = binary("*", binary("max", trips, 0), chunk)
    middle = binary("+", loop.start, span)
    copies = [_copy(loop, loop.step * i) for i in range(loop.unroll)]
    main = dataclasses.replace(loop, stop=middle, step=chunk, unroll=1, body=seq(*copies))
    rest_var = dataclasses.replace(loop.var)
    rest_body = replace(_renamed(loop.body, "rest"), {}, {loop.var: rest_var})
    rest = dataclasses.replace(loop, var=rest_var, start=middle, unroll=1, body=rest_body)
    if isinstance(middle, Const) and isinstance(loop.stop, Const) and middle.value >= loop.stop.value:
        return main
    return Seq((main, rest))


def _copy(loop: For, shift: int) -> Stmt:
    if shift == 0:
        return loop.body
    return replace(_renamed(loop.body, str(shift)), {}, {loop.var: binary("+", loop.var, shift)})


def _renamed(body: Stmt, suffix: str) -> Stmt:
    """The body with fresh tiles and scalars for everything that it defines for itself."""
    fresh: dict[Tensor, Tensor] = {}
    scalars: dict[Expr, Expr] = {}
    for stmt in instructions(body):
        for result in stmt.inst.results:
            if isinstance(result, RegisterTensor):
                if not result.mutable:
                    fresh[result] = dataclasses.replace(result, name=f"{result.name}_{suffix}")
            elif not result.mutable:
                scalars[result] = dataclasses.replace(result, name=f"{result.name}_{suffix}")
    return replace(body, fresh, scalars)
