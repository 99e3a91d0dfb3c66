"""The report of a CPU kernel: the machine, how much C it became, its largest arrays, the machine instructions."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from tilus.ir.function import Function
from tilus.report.text import aligned, render_mix, render_sections
from tilus.runtime.cpu import toolchain
from tilus.target import CpuTarget

SHOWN_ARRAYS = 8

# As `tilus.codegen.c` declares tiles and shared tensors.
_ARRAY = re.compile(
    r"^ *(static _Thread_local )?(\w+) (\w+)\[(\d+)\] __attribute__\(\(aligned\(64\)\)\);$", re.MULTILINE
)
_KERNEL = re.compile(r"^static .*\bvoid run_block\(.*?^}$", re.MULTILINE | re.DOTALL)
_OPCODE = re.compile(r"^\t([a-z][\w.]*)", re.MULTILINE)


@dataclass(frozen=True)
class CArray:
    """An array in the C text. is_static: one for each thread, because it is too large for a stack."""

    name: str
    kind: str
    size: int
    is_static: bool

    @property
    def nbytes(self) -> int:
        bits = re.search(r"\d+", self.kind)
        return self.size * (int(bits[0]) // 8 if bits else 4)


@dataclass(frozen=True)
class CpuReport:
    """Everything that `render` shows, as data. source: the C text. assembly: what the compiler made of it."""

    function: Function
    target: CpuTarget
    source: str
    assembly: str

    @property
    def arrays(self) -> list[CArray]:
        """The largest first."""
        found = [
            CArray(name, kind, int(size), bool(static)) for static, kind, name, size in _ARRAY.findall(self.source)
        ]
        return sorted(found, key=lambda array: -array.nbytes)

    def render(self) -> str:
        """The report as text: a section each for the machine, the C text, its largest arrays and the machine code."""
        head = f"{self.function.name} for {self.target}: {self.target.arch}, vectors of {self.target.lanes} float32"
        opcodes = Counter[str](_OPCODE.findall(self.assembly))
        sections = [
            ("machine", self._machine()),
            ("C", self._text()),
            ("largest arrays", self._largest()),
            ("machine code", [f"all  {render_mix(opcodes)}"]),
        ]
        return render_sections(head, sections)

    def _machine(self) -> Iterable[str]:
        features = sorted(macro.strip("_").removeprefix("ARM_FEATURE_") for macro in self.target.features)
        return aligned([("compiler", str(toolchain.find_compiler())), ("features", ", ".join(features) or "none")])

    def _text(self) -> Iterable[str]:
        kernel = _KERNEL.search(self.source)
        lines = kernel[0].count("\n") + 1 if kernel else 0
        stack = sum(array.nbytes for array in self.arrays if not array.is_static)
        static = sum(array.nbytes for array in self.arrays if array.is_static)
        return aligned(
            [
                ("lines", f"{lines} of the kernel, {self.source.count(chr(10)) - lines} around it"),
                ("arrays", f"{stack} bytes on a thread's stack if none share their place, {static} beside it"),
            ]
        )

    def _largest(self) -> Iterator[str]:
        yield from aligned(
            (array.name, f"{array.kind}[{array.size}]", f"{array.nbytes} bytes") for array in self.arrays[:SHOWN_ARRAYS]
        )
