"""Kernels that start before earlier kernels of the stream end: what they may touch before they have waited for those.

A kernel that waits nowhere starts after the end of the one before it, and may do everything. In one that waits, every path
of a block must pass a wait before its first access to memory that other kernels write, and before the block ends: the
end of a kernel tells the next one that all earlier ones have ended, too. A wait in a role is one of its warps: it keeps the
block from ending, and lets these warps do everything.
"""

from __future__ import annotations

from tilus.errors import Loc, TilusError
from tilus.ir.expr import Var
from tilus.ir.function import Function, TensorParam
from tilus.ir.instruction import Instruction
from tilus.ir.order import Order
from tilus.ir.tensor import GlobalTensor, Tensor
from tilus.ir.visit import instructions


def waits_for_kernels(function: Function) -> bool:
    """Whether the kernel contains a wait for earlier kernels."""
    return any(stmt.inst.effects().waits_for_kernels for stmt in instructions(function.body))


def constants(function: Function) -> frozenset[Var]:
    """The pointers of tensors which, as the kernel promises, no kernel that may still be running writes."""
    return frozenset(base for stmt in instructions(function.body) for base in _bases(stmt.inst.effects().constants))


def check_dependencies(function: Function) -> list[TilusError]:
    """The accesses and ends of a block that come too early, in program order."""
    if not waits_for_kernels(function):
        return []
    checker = _Checker(function)
    Order(lambda inst: inst.effects().waits_for_kernels, checker.instruction, checker.ends).follow(function)
    return checker.errors


class _Checker:
    def __init__(self, function: Function) -> None:
        self.errors: list[TilusError] = []
        self.constants = constants(function)
        self.names = {p.tensor.base: p.name for p in function.params if isinstance(p, TensorParam)}

    def instruction(self, inst: Instruction, waited: bool, loc: Loc | None) -> None:
        effects = inst.effects()
        for base in _bases(effects.writes):
            if base in self.constants:
                self.errors.append(
                    TilusError(
                        f"{self.name(base)} is written, but promised to be constant by tilus.wait_dependencies",
                        loc=loc,
                        hint="leave it out of constant=[...]",
                    )
                )
            elif not waited:
                self.errors.append(
                    TilusError(
                        f"{self.name(base)} is written before tilus.wait_dependencies, when earlier kernels may still use it",
                        loc=loc,
                        hint="write it after the wait",
                    )
                )
        for base in _bases(effects.reads):
            if not waited and base not in self.constants:
                self.errors.append(
                    TilusError(
                        f"{self.name(base)} is read before tilus.wait_dependencies, when earlier kernels may still write it",
                        loc=loc,
                        hint="read it after the wait, or promise that no kernel that may still be running writes it: "
                        f"tilus.wait_dependencies(constant=[{self.name(base)}])",
                    )
                )

    def ends(self, loc: Loc | None) -> None:
        self.errors.append(
            TilusError(
                "a block may end before tilus.wait_dependencies, expected a wait on every path: the next kernel takes the end "
                "of this one for the end of all earlier ones",
                loc=loc,
                hint="wait before the `return`, outside of branches and loops",
            )
        )

    def name(self, base: Var) -> str:
        return self.names.get(base, base.name)


def _bases(tensors: tuple[Tensor, ...]) -> tuple[Var, ...]:
    """The pointers of those in global memory."""
    return tuple(tensor.base for tensor in tensors if isinstance(tensor, GlobalTensor))
