"""From an IR function to a cubin: the passes, code generation and the assembler, with everything a report wants to show."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from tilus.codegen.lower import Lowered, lower
from tilus.ir.function import Function
from tilus.ptx.printer import print_module
from tilus.target import Target
from tilus.transforms import run_pipeline


@dataclass(frozen=True, eq=False)
class Compiled:
    """A kernel compiled to PTX. `function` is the IR after all passes."""

    function: Function
    target: Target
    lowered: Lowered

    @cached_property
    def ptx(self) -> str:
        return print_module(self.lowered.module)

    @property
    def kernel_name(self) -> str:
        return self.lowered.module.kernels[0].name


def compile_function(function: Function, target: Target) -> Compiled:
    """Run the passes and generate PTX.

    Raises: TilusError with the user's line for a mistake in the program.
    """
    placed = run_pipeline(function, target)
    return Compiled(placed, target, lower(placed, target))
