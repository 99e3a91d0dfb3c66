"""Programmatic dependent launch: a kernel starts while those before it in the stream are still running (PTX ISA,
griddepcontrol). docs/language.md says what a program has to promise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tilus.codegen.c.context import CContext
from tilus.codegen.context import EmitContext
from tilus.errors import TilusError
from tilus.ir.builder import IRBuilder, builtin
from tilus.ir.evaluation import Evaluation
from tilus.ir.instruction import Effects, Instruction
from tilus.ir.tensor import GlobalTensor
from tilus.target import Target


def _has_dependent_launch(target: Target) -> bool:
    return target.sm >= 90


@dataclass(frozen=True, eq=False)
class WaitDependencies(Instruction):
    """Wait until all earlier kernels of the stream are complete and what they wrote is visible.

    constants: tensors that no kernel which may still be running writes; only they may be read before. Nothing may be written
    before. Targets below sm_90 start every kernel after the end of the one before it, so that there is nothing to wait for.
    """

    mnemonic = "wait_dependencies"

    constants: tuple[GlobalTensor, ...] = ()

    def effects(self) -> Effects:
        return Effects(barrier=True, waits_for_kernels=True, constants=self.constants)

    def evaluate(self, env: Evaluation) -> None:
        """Kernels run one after the other."""

    def emit_c(self, ctx: CContext) -> None:
        """Kernels run one after the other."""

    def emit(self, ctx: EmitContext) -> None:
        if _has_dependent_launch(ctx.target):
            ctx.b.emit_to("griddepcontrol.wait")


@dataclass(frozen=True, eq=False)
class LaunchDependents(Instruction):
    """Let the next kernel of the stream start as soon as every block has come here or has ended.

    It says nothing about data: the next kernel waits for the end of this one before it reads what this one writes.
    """

    mnemonic = "launch_dependents"

    def effects(self) -> Effects:
        return Effects(other=True)

    def evaluate(self, env: Evaluation) -> None:
        """Kernels run one after the other."""

    def emit_c(self, ctx: CContext) -> None:
        """Kernels run one after the other."""

    def emit(self, ctx: EmitContext) -> None:
        if _has_dependent_launch(ctx.target):
            ctx.b.emit_to("griddepcontrol.launch_dependents")


@builtin
def wait_dependencies(b: IRBuilder, *, constant: Sequence[Any] = ()) -> None:
    """Wait until all earlier kernels of the stream are complete and what they wrote is visible.

    A kernel that contains it may start before the kernel in front of it ends, so no tensor may be read or written above it,
    but for the parameters in `constant` (None is passed over): the caller promises that neither the last kernel of the stream
    that is launched in the ordinary way nor any later one writes them. Weights are such tensors.
    """
    tensors = tuple(tensor for tensor in constant if tensor is not None)
    for tensor in tensors:
        if not isinstance(tensor, GlobalTensor):
            raise TilusError(
                f"wait_dependencies: constant has a {type(tensor).__name__}, expected tensor parameters",
                hint="list parameters of the kernel: constant=[weight]",
            )
    b.emit(WaitDependencies(tensors))


@builtin
def launch_dependents(b: IRBuilder) -> None:
    """Let the next kernel of the stream start as soon as every block has come here or has ended.

    The earlier the better, as long as blocks of the next kernel, which take up room while they wait, do not push out blocks of
    this one. What this kernel writes is not visible to the next one before that one's `wait_dependencies`.
    """
    b.emit(LaunchDependents())
