"""A kernel prepared for execution: instructions by index, labels, basic blocks, and which reads may be uninitialised.

Definite assignment is a forward data-flow analysis ("must be assigned on every path"): only reads that it cannot prove
are checked while the kernel runs, so that ordinary registers cost nothing.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from dataclasses import dataclass

from tilus.errors import TilusError
from tilus.ptx.module import Address, Guard, Instr, Kernel, Label, LabelRef, Operand, Pair, Reg, TensorAddress, Vector
from tilus.ptx.parser import Source

# Opcodes (without modifiers) that end a basic block.
CONTROL = frozenset({"bra", "bar", "barrier", "exit", "ret", "trap", "wgmma"})
# Opcodes whose first operand is read although it may be a register.
_NO_RESULT = frozenset({"bar", "barrier", "bra", "nanosleep", "st", "red", "cp", "setmaxnreg"})


@dataclass(frozen=True, eq=False)
class Program:
    """instrs[pc] with lines[pc]; `labels` -> pc; `leaders`: first pcs of basic blocks, ascending; `unproven[pc]`:
    registers whose initialisation must be checked when pc executes."""

    source: Source
    kernel: Kernel
    instrs: tuple[Instr, ...]
    lines: tuple[int, ...]
    labels: dict[str, int]
    leaders: tuple[int, ...]
    unproven: dict[int, frozenset[Reg]]

    def block_end(self, start: int) -> int:
        """One past the last pc of the basic block that starts at `start`."""
        index = bisect.bisect_right(self.leaders, start)
        return self.leaders[index] if index < len(self.leaders) else len(self.instrs)


def load_program(source: Source, kernel_name: str | None) -> Program:
    """Prepare one kernel of a parsed module.

    Raises: TilusError when there is no such kernel or a label is missing or defined twice.
    """
    kernel = _find(source, kernel_name)
    instrs: list[Instr] = []
    lines: list[int] = []
    labels: dict[str, int] = {}
    for item, line in zip(kernel.body, source.lines[kernel.name], strict=True):
        if isinstance(item, Label):
            if item.name in labels:
                raise TilusError(f"PTX line {line}: label {item.name!r} is defined twice in kernel {kernel.name!r}")
            labels[item.name] = len(instrs)
        elif isinstance(item, Instr):
            instrs.append(item)
            lines.append(line)
    for instr, line in zip(instrs, lines, strict=True):
        for operand in instr.operands:
            if isinstance(operand, LabelRef) and operand.name not in labels:
                raise TilusError(f"PTX line {line}: label {operand.name!r} does not exist, expected one of {[*labels]}")
    instrs.append(Instr("exit", ()))
    lines.append(lines[-1] if lines else 1)
    after_control = {pc + 1 for pc, instr in enumerate(instrs[:-1]) if is_control(instr)}
    leaders = tuple(sorted({0, *labels.values(), *after_control}))
    unproven = _unproven_reads(instrs, labels, leaders)
    return Program(source, kernel, tuple(instrs), tuple(lines), labels, leaders, unproven)


def _find(source: Source, name: str | None) -> Kernel:
    kernels = {kernel.name: kernel for kernel in source.module.kernels}
    if name is None and len(kernels) == 1:
        return next(iter(kernels.values()))
    if name is None or name not in kernels:
        raise TilusError(f"no kernel {name!r} in the module, expected one of {sorted(kernels)}")
    return kernels[name]


def is_control(instr: Instr) -> bool:
    """Whether an instruction ends a basic block: it jumps, or its threads may have to wait there."""
    if instr.opcode.startswith(("mbarrier.test_wait", "mbarrier.try_wait")):
        return True
    return instr.opcode.partition(".")[0] in CONTROL and not instr.opcode.startswith("bar.warp")


def result_operand(instr: Instr) -> Operand | None:
    """The operand an instruction writes, if it has one."""
    base, *words = instr.opcode.split(".")
    if not instr.operands or (base in _NO_RESULT and "red" not in words):
        return None
    first = instr.operands[0]
    return first if isinstance(first, Reg | Vector | Pair) else None


def written(instr: Instr) -> frozenset[Reg]:
    result = result_operand(instr)
    return frozenset(_registers([result])) if result is not None else frozenset()


def read(instr: Instr) -> frozenset[Reg]:
    sources = instr.operands if result_operand(instr) is None else instr.operands[1:]
    guards = [instr.guard] if instr.guard else []
    return frozenset(_registers([*guards, *sources])) | accumulators(instr)


def accumulators(instr: Instr) -> frozenset[Reg]:
    """Registers that the instruction may read as well as write: D of wgmma."""
    return written(instr) if instr.opcode.startswith("wgmma.mma_async") else frozenset()


def _registers(operands: Iterable[Operand]) -> Iterable[Reg]:
    for operand in operands:
        match operand:
            case Reg():
                yield operand
            case Address(base=Reg() as reg) | Guard(reg=reg):
                yield reg
            case TensorAddress(map=base, coordinates=coordinates):
                yield from _registers((base, coordinates))
            case Vector(elements=elements):
                yield from (element for element in elements if isinstance(element, Reg))
            case Pair(first=first, second=second):
                yield from (element for element in (first, second) if isinstance(element, Reg))
            case _:
                pass


def _unproven_reads(instrs: list[Instr], labels: dict[str, int], leaders: tuple[int, ...]) -> dict[int, frozenset[Reg]]:
    """For each pc, the registers it reads that some path leaves unassigned. Register sets are bits of an int."""
    bit: dict[Reg, int] = {}
    reads = [_bits(read(instr), bit) for instr in instrs]
    writes = [0 if instr.guard else _bits(written(instr), bit) for instr in instrs]
    ends = [*leaders[1:], len(instrs)]
    everything = (1 << len(bit)) - 1
    assigned = dict.fromkeys(leaders, everything)
    assigned[0] = 0
    todo = [0]
    block_end = dict(zip(leaders, ends, strict=True))
    visited: set[int] = set()
    while todo:
        start = todo.pop()
        state = assigned[start]
        for pc in range(start, block_end[start]):
            state |= writes[pc]
        visited.add(start)
        for successor in _successors(instrs, labels, block_end[start] - 1):
            merged = assigned[successor] & state
            if merged != assigned[successor] or successor not in visited:
                assigned[successor] = merged
                todo.append(successor)
    regs = list(bit)
    result: dict[int, frozenset[Reg]] = {}
    for start in visited:
        state = assigned[start]
        for pc in range(start, block_end[start]):
            if missing := reads[pc] & ~state:
                result[pc] = frozenset(reg for index, reg in enumerate(regs) if missing >> index & 1)
            state |= writes[pc]
    return result


def _bits(regs: frozenset[Reg], bit: dict[Reg, int]) -> int:
    value = 0
    for reg in regs:
        value |= 1 << bit.setdefault(reg, len(bit))
    return value


def _successors(instrs: list[Instr], labels: dict[str, int], pc: int) -> list[int]:
    instr = instrs[pc]
    base = instr.opcode.partition(".")[0]
    targets = [labels[operand.name] for operand in instr.operands if isinstance(operand, LabelRef)]
    falls = base not in ("bra", "exit", "ret", "trap") or instr.guard is not None
    return targets + ([pc + 1] if falls and pc + 1 < len(instrs) else [])
