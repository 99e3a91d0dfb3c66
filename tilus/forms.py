"""The forms in which `tilus compile` shows a kernel: the IR, and what a GPU or this machine's CPU is given."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from tilus.compiler import Compiled, compile_for_cpu, compile_function
from tilus.dump import Dump
from tilus.ir.function import Function
from tilus.ir.printer import print_function
from tilus.target import DEFAULT_TARGET, CpuTarget, Target
from tilus.transforms import PIPELINE, WITHOUT_LAYOUTS, Pass, run_pipeline

if TYPE_CHECKING:
    from tilus.report import Report


class GpuKernel:
    """A kernel for a GPU; it is compiled when something of it is first asked for. files: gets the stages then."""

    def __init__(self, function: Function, target: Target, files: Dump | None, *, allow_spills: bool) -> None:
        self.function = function
        self.target = target
        self.files = files
        self.allow_spills = allow_spills

    @cached_property
    def compiled(self) -> Compiled:
        return compile_function(self.function, self.target, self.files)

    def ir(self, after: str | None) -> str:
        return _ir(self.function, self.target, PIPELINE, after)

    def product(self, form: str) -> str | bytes:
        """PTX text, machine code or its disassembly."""
        from tilus.ptx import sass
        from tilus.runtime import cache

        if form == "ptx":
            return self.compiled.ptx
        machine_code = cache.assemble(self.compiled.ptx, self.target, allow_spills=self.allow_spills).cubin
        if form == "cubin":
            return machine_code
        return "\n".join(str(line) for kernel in sass.disassemble(machine_code) for line in kernel.instructions) + "\n"

    @cached_property
    def _report(self) -> Report:
        from tilus.report import make_report

        return make_report(self.compiled)

    def report(self) -> str:
        return self._report.render()

    def dump(self, files: Dump) -> None:
        """All stages: also those behind the PTX, which compiling does not make."""
        files.write("kernel.cubin", self._report.cubin.cubin)
        files.write("ptxas.log", self._report.cubin.log)
        files.write("report.txt", self.report() + "\n")
        if self._report.sass is not None:
            files.write("kernel.sass", "\n".join(map(str, self._report.sass.instructions)) + "\n")


class CpuKernel:
    """A kernel for this machine's CPU; it is compiled when something of it is first asked for. files: gets the stages then."""

    def __init__(self, function: Function, target: CpuTarget, files: Dump | None) -> None:
        self.function = function
        self.target = target
        self.files = files

    @cached_property
    def source(self) -> str:
        return compile_for_cpu(self.function, self.target, self.files)

    def ir(self, after: str | None) -> str:
        # The passes themselves are the same for every GPU.
        return _ir(self.function, DEFAULT_TARGET, WITHOUT_LAYOUTS, after)

    @cached_property
    def assembly(self) -> str:
        from tilus.runtime.cpu import build

        return build.assembly(self.source)

    def product(self, form: str) -> str:
        """C, or the assembly that the compiler makes of it."""
        return self.source if form == "c" else self.assembly

    def report(self) -> str:
        from tilus.report.cpu import CpuReport

        return CpuReport(self.function, self.target, self.source, self.assembly).render()

    def dump(self, files: Dump) -> None:
        """All stages: also those behind the C, which compiling does not make."""
        files.write("kernel.s", self.assembly)
        files.write("report.txt", self.report() + "\n")


def _ir(function: Function, target: Target, passes: tuple[Pass, ...], after: str | None) -> str:
    shown = function if after is None else run_pipeline(function, target, passes=passes, after=after)
    return print_function(shown, remarks=True)
