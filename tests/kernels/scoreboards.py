"""Which loads from shared memory a GPU may not have ended where a warp arrives at an mbarrier, read from a cubin's SASS.

An instruction whose result takes a while counts up one of six scoreboards, and down when the result is in its registers. Later
instructions name the scoreboards that must be zero before they start. All of this is in the control bits of each instruction's
encoding, which nvdisasm prints (`-hex`): of the upper 64 bits, 46 to 48 are the scoreboard of the result (7: none) and 52
to 57 the scoreboards that are waited for (Jia et al., "Dissecting the NVIDIA Volta GPU architecture via microbenchmarking", 2018).
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tilus.ptx.sass import find_disassembler

_SCOREBOARDS = 6
_LOADS = ("LDS", "LDSM", "LD")  # LD: of another block's shared memory, by a generic address
_ARRIVAL = "SYNCS.ARRIVE"
_ENDS = ("EXIT", "RET")
_UNKNOWN = ("CALL", "BRX", "JMP", "JMX", "BRXU", "RPCMOV", "BREAK")  # go where no label says

_LINE = re.compile(
    r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;\s*/\* 0x([0-9a-f]{16}) \*/"
)
_UPPER = re.compile(r"^\s*/\* 0x([0-9a-f]{16}) \*/\s*$")
_LABEL = re.compile(r"^(\.L_x_\d+):")
_TARGET = re.compile(r"`\((\.L_x_\d+)\)")
_KERNEL = re.compile(r"^\.text\.(\S+):")
_DEPBAR = re.compile(r"SB(\d), (0x[0-9a-f]+)")


@dataclass
class _Instruction:
    """result: the scoreboard that it counts up until its result is there. waits: those that are zero before it starts."""

    address: int
    predicate: str
    opcode: str
    operands: str
    result: int | None = None
    waits: frozenset[int] = frozenset()

    @property
    def base(self) -> str:
        return self.opcode.partition(".")[0]

    def __str__(self) -> str:
        return f"{self.address:04x}: {self.predicate} {self.opcode} {self.operands}"


def disassemble(cubin: bytes) -> str:
    """With encodings.

    Raises: CalledProcessError when nvdisasm refuses it.
    """
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "kernel.cubin")
        path.write_bytes(cubin)
        command = [find_disassembler().path, "-c", "-hex", path]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def arrivals(cubin: bytes) -> int:
    """How many instructions arrive at an mbarrier and tell of no bytes."""
    return sum(_is_arrival(i) for code, _ in _kernels(disassemble(cubin)) for i in code)


def loads_under_way(cubin: bytes) -> list[str]:
    """For each arrival in front of which loads from shared memory may not have ended: a line with the two instructions."""
    found: list[str] = []
    for code, labels in _kernels(disassemble(cubin)):
        before = _under_way(code, labels)
        for index, instruction in enumerate(code):
            if _is_arrival(instruction):
                pending = sorted(load for scoreboard, load in before[index] if scoreboard not in instruction.waits)
                found += [f"{code[load]} is under way at {instruction}" for load in pending]
    return found


def _is_arrival(instruction: _Instruction) -> bool:
    return instruction.opcode.startswith(_ARRIVAL) and "A1T0" in instruction.opcode.split(".")


def _under_way(code: list[_Instruction], labels: dict[str, int]) -> list[frozenset[tuple[int, int]]]:
    """In front of each instruction: loads from shared memory that may not have ended, each as its scoreboard and its index."""
    before: list[frozenset[tuple[int, int]]] = [frozenset() for _ in code]
    todo, seen = [0], {0}
    joins = {i.operands.split(",")[0]: set[int]() for i in code if i.base == "BSSY"}
    for instruction in code:
        if instruction.base == "BSSY":
            joins[instruction.operands.split(",")[0]].add(_target(instruction, labels))
    while todo:
        index = todo.pop()
        after = frozenset(_after(code[index], index, before[index]))
        for follower in _followers(code, index, labels, joins):
            if follower not in seen or not after <= before[follower]:
                before[follower] |= after
                seen.add(follower)
                todo.append(follower)
    return before


def _after(instruction: _Instruction, index: int, before: frozenset[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    over = set(instruction.waits)
    if instruction.opcode == "DEPBAR.LE" and (match := _DEPBAR.search(instruction.operands)) and int(match[2], 16) == 0:
        over.add(int(match[1]))
    yield from ((scoreboard, load) for scoreboard, load in before if scoreboard not in over)
    if instruction.base in _LOADS and instruction.result is not None:
        yield instruction.result, index


def _followers(
    code: list[_Instruction], index: int, labels: dict[str, int], joins: dict[str, set[int]]
) -> Iterator[int]:
    """Where the program may go on."""
    instruction = code[index]
    if instruction.base in _UNKNOWN:
        raise AssertionError(f"{instruction} goes where this analysis does not follow")
    if instruction.base == "BRA":
        yield _target(instruction, labels)
    if instruction.base == "BSYNC":
        yield from joins[instruction.operands.split(",")[0]]
    always = not instruction.predicate and instruction.base in ("BRA", *_ENDS)
    conditional = instruction.base == "BRA" and instruction.operands.partition(",")[0].lstrip("!")[:1] in ("P", "U")
    if (not always or conditional) and index + 1 < len(code):
        yield index + 1


def _target(instruction: _Instruction, labels: dict[str, int]) -> int:
    match = _TARGET.search(instruction.operands)
    assert match, f"{instruction} has no label"
    return labels[match[1]]


def _kernels(text: str) -> Iterator[tuple[list[_Instruction], dict[str, int]]]:
    """The instructions of each kernel, and the index of the one behind each label."""
    code: list[_Instruction] | None = None
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if _KERNEL.match(line):
            if code:
                yield code, labels
            code, labels = [], {}
        elif code is None:
            continue
        elif match := _LABEL.match(line):
            labels[match[1]] = len(code)
        elif match := _LINE.match(line):
            code.append(_Instruction(int(match[1], 16), match[2] or "", match[3], match[4]))
        elif (match := _UPPER.match(line)) and code:
            upper = int(match[1], 16)
            result, mask = upper >> 46 & 7, upper >> 52 & 63
            code[-1].result = result if result < _SCOREBOARDS else None
            code[-1].waits = frozenset(s for s in range(_SCOREBOARDS) if mask >> s & 1)
    if code:
        yield code, labels
