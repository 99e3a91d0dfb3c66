"""Which loads from shared memory may be on their way where a warp arrives at an mbarrier or starts a copy, from a cubin's SASS.

An instruction whose result takes a while counts up one of six scoreboards, and down when the result is in its registers. Later
instructions name the scoreboards that must be zero before they start. All of this is in the control bits of each instruction's
encoding, which nvdisasm prints (`-hex`): of the upper 64 bits, 46 to 48 are the scoreboard of the result (7: none) and 52
to 57 the scoreboards that are waited for (Jia et al., "Dissecting the NVIDIA Volta GPU Architecture via Microbenchmarking").
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
_COPIES = ("UBLKCP.S.G", "UTMALDG")  # into shared memory
_ENDS = ("EXIT", "RET")
_UNKNOWN = ("BRX", "JMP", "JMX", "BRXU", "BREAK")  # go where no label says; CALL: of a division, which loads nothing

_LINE = re.compile(
    r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;\s*/\* 0x([0-9a-f]{16}) \*/"
)
_UPPER = re.compile(r"^\s*/\* 0x([0-9a-f]{16}) \*/\s*$")
_LABEL = re.compile(r"^(\.L_x_\d+):")
_TARGET = re.compile(r"`\((\.L_x_\d+)\)")
_SOURCE = re.compile(r'^\s*//## File "(.*?)", line (\d+)')
_KERNEL = re.compile(r"^\.text\.(\S+):")
_DEPBAR = re.compile(r"SB(\d), (0x[0-9a-f]+)")


@dataclass
class _Instruction:
    """source: the line that it comes from, FILE:LINE; empty where it is not known. result: the scoreboard that it counts up until
    its result is there. waits: those that are zero before it starts."""

    address: int
    predicate: str
    opcode: str
    operands: str
    source: str
    result: int | None = None
    waits: frozenset[int] = frozenset()

    @property
    def base(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def first(self) -> str:
        """Its first operand."""
        return self.operands.partition(",")[0]

    def __str__(self) -> str:
        return f"{self.address:04x}: {self.predicate} {self.opcode} {self.operands} {self.source}".rstrip()


@dataclass(frozen=True)
class UnderWay:
    """A load that may not have ended at an instruction that hands memory on. source: of the latter, see `_Instruction`."""

    load: str
    handed_on: str
    source: str

    def __str__(self) -> str:
        return f"{self.load} is under way at {self.handed_on}"


def disassemble(cubin: bytes) -> str:
    """With encodings, and with lines where it was assembled with them.

    Raises: CalledProcessError when nvdisasm refuses it.
    """
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "kernel.cubin")
        path.write_bytes(cubin)
        command = [find_disassembler().path, "-c", "-hex", "-g", path]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def arrivals(cubin: bytes) -> int:
    """How many instructions arrive at an mbarrier."""
    return sum(i.opcode.startswith("SYNCS.ARRIVE") for code, _ in _kernels(disassemble(cubin)) for i in code)


def loads_under_way(cubin: bytes) -> list[UnderWay]:
    """Each load from shared memory with each arrival or copy in front of which it may not have ended."""
    found: list[UnderWay] = []
    for code, labels in _kernels(disassemble(cubin)):
        before = _states(code, labels)
        for index, instruction in enumerate(code):
            if instruction.opcode.startswith(("SYNCS.ARRIVE", *_COPIES)):
                pending = {load for scoreboard, load in before[index].loads if scoreboard not in instruction.waits}
                found += [UnderWay(str(code[load]), str(instruction), instruction.source) for load in sorted(pending)]
    return found


@dataclass(frozen=True)
class _State:
    """Loads that may be on their way, each as its scoreboard and its index; where threads go on that have waited for each other
    at a convergence barrier (B0 and so on)."""

    loads: frozenset[tuple[int, int]] = frozenset()
    joins: frozenset[tuple[str, int]] = frozenset()

    def __or__(self, other: _State) -> _State:
        return _State(self.loads | other.loads, self.joins | other.joins)

    def after(self, instruction: _Instruction, index: int, labels: dict[str, int]) -> _State:
        over = set(instruction.waits)
        if instruction.opcode == "DEPBAR.LE" and (match := _DEPBAR.search(instruction.operands)):
            over |= {int(match[1])} if int(match[2], 16) == 0 else set()
        loads = {(scoreboard, load) for scoreboard, load in self.loads if scoreboard not in over}
        if instruction.base in _LOADS and instruction.result is not None:
            loads.add((instruction.result, index))
        joins = set(self.joins)
        if instruction.base == "BSSY":
            joins = {(name, target) for name, target in joins if name != instruction.first}
            joins.add((instruction.first, _target(instruction, labels)))
        return _State(frozenset(loads), frozenset(joins))


def _states(code: list[_Instruction], labels: dict[str, int]) -> list[_State]:
    """In front of each instruction, over all paths."""
    before = [_State() for _ in code]
    todo, seen = [0], {0}
    while todo:
        index = todo.pop()
        after = before[index].after(code[index], index, labels)
        for follower in _followers(code, index, labels, after):
            joined = before[follower] | after
            if follower not in seen or joined != before[follower]:
                before[follower] = joined
                seen.add(follower)
                todo.append(follower)
    return before


def _followers(code: list[_Instruction], index: int, labels: dict[str, int], state: _State) -> Iterator[int]:
    """Where the program may go on."""
    instruction = code[index]
    assert instruction.base not in _UNKNOWN, f"{instruction} goes where this analysis does not follow"
    if instruction.base == "BRA":
        yield _target(instruction, labels)
    if instruction.base == "BSYNC":
        targets = [target for name, target in state.joins if name == instruction.first]
        assert targets, f"{instruction} ends nothing that has begun"
        yield from targets
        return
    conditional = bool(instruction.predicate) or instruction.first.lstrip("!")[:1] in ("P", "U")
    if (conditional or instruction.base not in ("BRA", *_ENDS)) and index + 1 < len(code):
        yield index + 1


def _target(instruction: _Instruction, labels: dict[str, int]) -> int:
    match = _TARGET.search(instruction.operands)
    assert match, f"{instruction} has no label"
    return labels[match[1]]


def _kernels(text: str) -> Iterator[tuple[list[_Instruction], dict[str, int]]]:
    """The instructions of each kernel, and the index of the one behind each label."""
    code: list[_Instruction] | None = None
    labels: dict[str, int] = {}
    source = ""
    for line in text.splitlines():
        if _KERNEL.match(line):
            if code:
                yield code, labels
            code, labels, source = [], {}, ""
        elif code is None:
            continue
        elif match := _SOURCE.match(line):
            source = f"{match[1]}:{match[2]}"
        elif match := _LABEL.match(line):
            labels[match[1]] = len(code)
        elif match := _LINE.match(line):
            code.append(_Instruction(int(match[1], 16), match[2] or "", match[3], match[4], source))
        elif (match := _UPPER.match(line)) and code:
            upper = int(match[1], 16)
            result, mask = upper >> 46 & 7, upper >> 52 & 63
            code[-1].result = result if result < _SCOREBOARDS else None
            code[-1].waits = frozenset(s for s in range(_SCOREBOARDS) if mask >> s & 1)
    if code:
        yield code, labels
