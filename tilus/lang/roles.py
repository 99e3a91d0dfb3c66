"""`with tilus.warps(...)`: what only some warps of a block do, and which names they share with the others.

A role starts with the names as they are in front of it. What it assigns are variables of its own: other warps, and the code
behind the roles, do not know those values, so a name that a role assigns has none behind it.
"""

from __future__ import annotations

import ast
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from tilus.errors import TilusError
from tilus.ir.builder import IRBuilder, builtin
from tilus.ir.stmt import Role, Seq
from tilus.lang.frame import Frame
from tilus.lang.values import describe


@dataclass(frozen=True)
class Warps:
    """What `tilus.warps(...)` gives to `with` (see `ir.stmt.Role`)."""

    first: int
    count: int
    registers: int | None


@builtin
def warps(b: IRBuilder, first: Any, count: Any, registers: Any = None) -> Warps:
    """`with tilus.warps(first, count):` is code for warps first to first + count - 1 of the block; the others pass it by.

    Blocks that follow each other run side by side, in different warps. In each, tiles are spread over its threads, `tilus.sync()`
    waits for them only, and what it assigns is known to them only. They talk through shared memory and `tilus.mbarrier`s.
    registers: a multiple of 8 from 24 to 256, that each thread may have from here on: those that only copy leave theirs to those
    that compute. That needs whole warpgroups (multiples of 4 warps, which roles that follow each other may share if they have the
    same number), the end of the kernel, and sm_90a.
    """
    for name, value, least in (("first", first, 0), ("count", count, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise TilusError(f"{name} is {describe(value)}, expected a compile-time int of {least} or more")
    if isinstance(registers, bool) or not isinstance(registers, (int, type(None))):
        raise TilusError(f"registers is {describe(registers)}, expected a compile-time int or None")
    return Warps(first, count, registers)


@contextmanager
def role(frame: Frame, warps: Warps, node: ast.With) -> Generator[None]:
    """Translate the body of a role and append it.

    Raises: TilusError when it is inside of another one, or assigns what was bound outside of a loop or branch around it.
    """
    translation, scope, builder = frame.translation, frame.scope, frame.builder
    loc, names, loops, outer = builder.loc, scope.names, frame.loops, translation.role_level
    if outer is not None:
        raise TilusError("a role inside of a role, expected them side by side", hint="roles do not nest")
    translation.level += 1
    translation.role_level = translation.level
    scope.names = {name: replace(b, level=translation.level, slot=False) for name, b in names.items()}
    frame.loops = []
    try:
        with builder.block() as stmts:
            yield
        builder.append(Role(warps.first, warps.count, Seq(tuple(stmts)), warps.registers, loc))
        mine = {n for n, b in scope.names.items() if n not in names or b.value is not names[n].value}
    finally:
        translation.level -= 1
        translation.role_level = outer
        scope.names, frame.loops = names, loops
    for name in sorted(mine):
        _forget(frame, name, node)


def _forget(frame: Frame, name: str, node: ast.With) -> None:
    """Behind a role, a name that it assigned stands for nothing."""
    scope = frame.scope
    binding = scope.names.get(name)
    if binding is not None and binding.level < frame.translation.level:
        raise TilusError(
            f"{name} is assigned in a role and was bound outside of the run-time loop or branch around it",
            hint="give it its first value in the role, and put the loop into the role",
        )
    scope.names.pop(name, None)
    why = f"assigned in the role at line {node.lineno}, whose warps alone know the value,"
    scope.lost[name] = (why, "give it a value behind the roles, or in each role that reads it")
