"""From an IR function to PTX or C: the passes and code generation, with everything a report wants to show."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

from tilus import config
from tilus.codegen.c.lower import lower_c
from tilus.codegen.lower import Lowered, lower
from tilus.dump import Dump
from tilus.ir.function import Function
from tilus.ptx.printer import print_module
from tilus.target import DEFAULT_TARGET, CpuTarget, Target
from tilus.transforms import WITHOUT_LAYOUTS, run_pipeline


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


def compile_for_cpu(function: Function, target: CpuTarget, dump: Dump | None = None) -> str:
    """Run the passes that need no layouts and write C (see `tilus.codegen.c.lower`). `dump` as in `compile_function`.

    Raises: TilusError with the user's line for a mistake in the program.
    """
    files = dump or _default_dump(function)
    observe = None
    if files is not None:
        files.function("translated", function)
        observe = files.function
    # The passes themselves are the same for every GPU.
    source = lower_c(run_pipeline(function, DEFAULT_TARGET, passes=WITHOUT_LAYOUTS, observe=observe), target)
    if files is not None:
        files.write("kernel.c", source)
    return source


def _default_dump(function: Function) -> Dump | None:
    """A directory of its own for every specialisation, under TILUS_DUMP_DIR."""
    root = config.dump_dir()
    if root is None:
        return None
    from tilus.ir.printer import print_function

    digest = hashlib.sha256(print_function(function).encode()).hexdigest()[:8]
    return Dump(root / f"{function.name}-{digest}")
