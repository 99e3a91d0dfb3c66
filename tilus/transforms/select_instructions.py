"""Replace general instructions by the special ones of the target that do the same: products by mma_sync, shared
loads and stores by ldmatrix and stmatrix.

Each instruction says itself what it may become (`specialized`); the dump shows what was chosen.

Requires: layouts of all tiles and shared tensors. Ensures: the program means the same.
"""

from __future__ import annotations

from dataclasses import replace

from tilus.errors import TilusError
from tilus.ir.function import Function
from tilus.ir.stmt import Inst, Stmt
from tilus.ir.visit import rewrite
from tilus.target import Target


def select_instructions(function: Function, target: Target) -> Function:
    def select(stmt: Stmt) -> Stmt:
        if not isinstance(stmt, Inst):
            return stmt
        try:
            special = stmt.inst.specialized(target)
        except TilusError as error:
            raise error.at(stmt.loc) from None
        return stmt if special is None else Inst(special, stmt.loc)

    body = rewrite(function.body, select)
    return function if body is function.body else replace(function, body=body)
