"""From an IR function to a cubin: the passes, code generation and the assembler, with everything a report wants to show."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

from tilus import config
from tilus.codegen.lower import Lowered, lower
from tilus.dump import Dump
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


def compile_function(function: Function, target: Target, dump: Dump | None = None) -> Compiled:
    """Run the passes and generate PTX. `dump` gets every stage; by default, what TILUS_DUMP_DIR asks for.

    Raises: TilusError with the user's line for a mistake in the program.
    """
    files = dump or _default_dump(function)
    if files is not None:
        files.function("translated", function)
    placed = run_pipeline(function, target, observe=None if files is None else files.function)
    compiled = Compiled(placed, target, lower(placed, target))
    if files is not None:
        files.write("kernel.ptx", compiled.ptx)
    return compiled


def _default_dump(function: Function) -> Dump | None:
    """A directory of its own for every specialisation, under TILUS_DUMP_DIR."""
    root = config.dump_dir()
    if root is None:
        return None
    from tilus.ir.printer import print_function

    digest = hashlib.sha256(print_function(function).encode()).hexdigest()[:8]
    return Dump(root / f"{function.name}-{digest}")
