"""What the assembler made of a kernel: SASS instructions, their mix, and the innermost loop, from nvdisasm's text."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tilus.errors import TilusError
from tilus.ptx import toolchain
from tilus.ptx.toolchain import Tool

_TIMEOUT_S = 120

_KERNEL = re.compile(r"^\.text\.(\S+):$")
_LABEL = re.compile(r"^(\.L_x_\d+):$")
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:(@!?\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_TARGET = re.compile(r"`\((\.L_x_\d+)\)")

# Opcodes that move data between memory and registers, counted by the width of one thread's access (LDSM: by matrices).
_MEMORY = {"LDG", "STG", "LDS", "STS", "LDGSTS", "LDL", "STL", "LD", "ST"}
_MATRIX_MEMORY = {"LDSM", "STSM"}
_WIDTHS = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}


@dataclass(frozen=True)
class SassInstruction:
    """`opcode` has all its modifiers (`LDG.E.128`); `predicate` is `@P0`, `@!UP1` or empty."""

    address: int
    predicate: str
    opcode: str
    operands: str

    def __str__(self) -> str:
        return f"{self.address:04x}: {self.predicate:>5} {self.opcode} {self.operands}".rstrip()

    @property
    def kind(self) -> str:
        """The class that `instruction_mix` counts it under: `HMMA`, `LOP3`, `LDG.128`, `LDSM.4`, `IMAD.MOV` ..."""
        base, *modifiers = self.opcode.split(".")
        if base in _MEMORY:
            return f"{base}.{next((_WIDTHS[m] for m in modifiers if m in _WIDTHS), 32)}"
        if base in _MATRIX_MEMORY:
            return f"{base}.{next((m for m in modifiers if m in ('2', '4')), '1')}"
        if base == "IMAD" and "MOV" in modifiers:
            return "IMAD.MOV"  # a copy, not arithmetic
        return base


@dataclass(frozen=True)
class SassKernel:
    """The instructions of one kernel in order, and the address that each branch instruction jumps to."""

    name: str
    instructions: tuple[SassInstruction, ...]
    branches: tuple[tuple[int, int], ...]  # (address of the branch, address of its target)

    def innermost_loop(self) -> tuple[SassInstruction, ...]:
        """The body, branch included, of the most deeply nested loop (of several, the longest); empty without a loop.

        A loop is what a backward branch spans; the branch to itself that pads the end of a kernel is none.
        """
        loops = {(target, branch) for branch, target in self.branches if target < branch}

        def depth_and_length(loop: tuple[int, int]) -> tuple[int, int]:
            return sum(start <= loop[0] and loop[1] <= end for start, end in loops), loop[1] - loop[0]

        if not loops:
            return ()
        start, end = max(loops, key=depth_and_length)
        return tuple(i for i in self.instructions if start <= i.address <= end)


def instruction_mix(instructions: Sequence[SassInstruction]) -> Counter[str]:
    """How many instructions of each `kind`, without the NOP padding."""
    return Counter(i.kind for i in instructions if i.kind != "NOP")


def find_disassembler() -> Tool:
    """nvdisasm from NVIDIA's wheels, PATH, CUDA_HOME or triton.

    Raises: TilusError when there is none.
    """
    for path in toolchain.candidates("nvdisasm"):
        return toolchain.probe(path)
    raise TilusError("no disassembler found (nvdisasm)", hint="pip install 'tilus[sass]'")


def disassemble(cubin: bytes, disassembler: Tool | None = None) -> tuple[SassKernel, ...]:
    """The kernels of a cubin.

    Raises: TilusError when nvdisasm is missing or refuses the cubin.
    """
    tool = disassembler or find_disassembler()
    with tempfile.TemporaryDirectory(prefix="tilus-") as directory:
        path = Path(directory, "kernel.cubin")
        path.write_bytes(cubin)
        try:
            done = subprocess.run([tool.path, "-c", path], capture_output=True, text=True, timeout=_TIMEOUT_S)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise TilusError(f"cannot run {tool}: {error}") from error
    if done.returncode != 0:
        raise TilusError(f"{tool} failed: {done.stderr.strip() or done.stdout.strip()}")
    return parse(done.stdout)


def parse(text: str) -> tuple[SassKernel, ...]:
    """The kernels in the output of `nvdisasm -c`."""
    sections: list[tuple[str, list[str]]] = []
    for line in text.splitlines():
        if match := _KERNEL.match(line):
            sections.append((match[1], []))
        elif sections:
            sections[-1][1].append(line)
    return tuple(_kernel(name, lines) for name, lines in sections)


def _kernel(name: str, lines: Sequence[str]) -> SassKernel:
    instructions: list[SassInstruction] = []
    pending: list[str] = []  # labels of the next instruction
    labels: dict[str, int] = {}
    for line in lines:
        if match := _LABEL.match(line):
            pending.append(match[1])
        elif match := _INSTRUCTION.match(line):
            instruction = SassInstruction(int(match[1], 16), match[2] or "", match[3], match[4])
            labels.update(dict.fromkeys(pending, instruction.address))
            pending.clear()
            instructions.append(instruction)
    branches = [
        (instruction.address, labels[match[1]])
        for instruction in instructions
        if instruction.opcode.startswith("BRA")
        and (match := _TARGET.search(instruction.operands))
        and match[1] in labels
    ]
    return SassKernel(name, tuple(instructions), tuple(branches))
