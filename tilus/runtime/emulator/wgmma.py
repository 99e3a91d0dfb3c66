"""The wgmma instructions (PTX ISA, "Asynchronous Warpgroup Level Matrix Multiply-Accumulate Instructions"): decoding.

They end basic blocks, because warps stop at them until their warpgroup is complete. What happens over time is in
`wgmma_pending`.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from tilus.ptx.module import Imm, Operand, Reg, RegClass, Vector
from tilus.runtime.emulator.decode import Array, Site, Step
from tilus.runtime.emulator.descriptor import PIECE_NBYTES, Descriptor, decode_descriptor, piece_addresses
from tilus.runtime.emulator.guards import initialisation_check, mark_initialised
from tilus.runtime.emulator.matrix_elements import NBITS
from tilus.runtime.emulator.program import accumulators
from tilus.runtime.emulator.warpgroups import WARP, Action, Mask
from tilus.runtime.emulator.wgmma_pending import Lanes
from tilus.runtime.emulator.wgmma_product import M, Multiply, SharedMatrix

Arrive = Callable[[Mask], list[tuple[int, Mask]]]
# Types of A and B that go together, and of D with them.
_COMBINATIONS = (
    (("f16",), ("f16", "f32")), (("bf16",), ("f32",)), (("tf32",), ("f32",)), (("e4m3", "e5m2"), ("f16", "f32")),
    (("s8", "u8"), ("s32",)),
)  # fmt: skip
_TYPES = ("f16", "bf16", "tf32", "e4m3", "e5m2", "s8", "u8", "f32", "s32")


def decode_wgmma(site: Site) -> Arrive:
    """What the lanes do that reach the instruction: they wait for their warpgroup, then all of it executes."""
    wgmmas = site.machine.wgmmas
    match site.words[:1]:
        case ["fence"]:
            site.allow("fence", "sync", "aligned")
            action: Action = wgmmas.fence
        case ["commit_group"]:
            site.allow("commit_group", "sync", "aligned")
            action = wgmmas.commit
        case ["wait_group"]:
            action = _wait(site)
        case ["mma_async"]:
            action = _multiply(site)
        case _:
            raise site.unsupported("the operation")
    for word in ("sync", "aligned"):
        if not site.has(word):
            raise site.fault(f"wgmma without .{word}")
    return lambda mask: wgmmas.groups.arrive(site, mask, action)


def _wait(site: Site) -> Action:
    site.allow("wait_group", "sync", "aligned")
    site.expect_operands(1)
    left = site.operands[0]
    if not isinstance(left, Imm) or left.value < 0:
        raise site.fault(f"wait_group of {left}, expected an integer constant of at least 0")
    return lambda groups: site.machine.wgmmas.wait(groups, left.value)


def _multiply(site: Site) -> Action:
    """mma_async.sync.aligned.m64nNkK{.satfinite}.dtype.atype.btype d, a | a-desc, b-desc, scale-d{, imm-scale-a,
    imm-scale-b{, imm-trans-a}{, imm-trans-b}}; the transpositions only for 16-bit types."""
    op = _operation(site)
    a = None if op.a.size else _MatrixOperand(site, 1, M, op.a_type, op.k_major_a)
    b = _MatrixOperand(site, 2, op.n, op.b_type, op.k_major_b)
    scale_d = site.predicate(site.operands[3])
    # D is read only when scale-d is true.
    check_d, mark_d = initialisation_check(site, accumulators(site.instr)), mark_initialised(site)
    wgmmas, lanes_total = site.machine.wgmmas, site.machine.lanes

    def issue(groups: list[int]) -> None:
        for group in groups:
            lanes = wgmmas.groups.lanes(group)
            add = bool(_uniform(site, np.broadcast_to(scale_d(), lanes_total), lanes, "scale-d"))
            mask = np.zeros(lanes_total, np.bool_)
            mask[lanes] = True
            if add and check_d is not None:
                check_d(mask)
            wgmmas.issue(op, group, a.find(group) if a is not None else None, b.find(group), add=add)
            if mark_d is not None:
                mark_d(mask)

    return issue


def _operation(site: Site) -> Multiply:
    n, d_type, a_type, b_type = _types(site)
    in_registers = isinstance(site.operands[1], Vector)
    is_float, transposable = d_type != "s32", NBITS[a_type] == 16
    site.expect_operands(4 + 2 * is_float + transposable * (1 if in_registers else 2))
    scale_a, scale_b = (_immediate(site, index, (-1, 1)) for index in (4, 5)) if is_float else (1, 1)
    trans_a = _immediate(site, 6, (0, 1)) if transposable and not in_registers else 0
    trans_b = _immediate(site, len(site.operands) - 1, (0, 1)) if transposable else 0
    return Multiply(
        pc=site.pc, n=n, d_type=d_type, a_type=a_type, b_type=b_type,
        d=_registers(site, 0, n // 4 if d_type == "f16" else n // 2),
        a=_registers(site, 1, 4) if in_registers else np.zeros(0, np.int64),
        k_major_a=not trans_a, k_major_b=not trans_b, sign=scale_a * scale_b, saturate=site.has("satfinite"),
    )  # fmt: skip


def _types(site: Site) -> tuple[int, str, str, str]:
    """(n, type of D, of A, of B), checked against the shapes that exist."""
    shape = re.search(r"\.m64n(\d+)k(\d+)\.", site.instr.opcode)
    types = [word for word in site.words if word in _TYPES]
    if shape is None or len(types) != 3:
        raise site.unsupported("the shape or the types", f"m64nNkK of {', '.join(NBITS)} are modelled")
    d_type, a_type, b_type = types
    if not any({a_type, b_type} <= set(ab) and d_type in d for ab, d in _COMBINATIONS):
        raise site.unsupported("the combination of types")
    site.allow("mma_async", "sync", "aligned", shape.group().strip("."), *_TYPES, *["satfinite"] * (d_type == "s32"))
    n, k = int(shape.group(1)), int(shape.group(2))
    step = 16 if d_type == "s32" and n > 32 else 8
    if n % step or not 8 <= n <= 256 or k != 256 // NBITS[a_type]:
        raise site.unsupported(f"shape m64n{n}k{k} of .{a_type}", "n is a multiple of 8 (integers above 32: 16)")
    return n, d_type, a_type, b_type


def _registers(site: Site, index: int, count: int) -> Lanes:
    operand = site.operands[index]
    elements: tuple[Operand, ...] = operand.elements if isinstance(operand, Vector) else (operand,)
    registers = [reg for reg in elements if isinstance(reg, Reg) and reg.cls is RegClass.B32]
    if len(registers) != len(elements) or len(set(registers)) != count:
        raise site.fault(f"operand {index} is {operand}, expected {count} different 32-bit registers in braces")
    return np.array([reg.index for reg in registers])


def _immediate(site: Site, index: int, allowed: tuple[int, int]) -> int:
    operand = site.operands[index]
    if not isinstance(operand, Imm) or operand.value not in allowed:
        raise site.fault(f"operand {index} is {operand}, expected {allowed[0]} or {allowed[1]}")
    return operand.value


def _uniform(site: Site, values: Array, lanes: slice, what: str) -> int:
    """The value of an operand that must be the same in all threads of a warpgroup."""
    here = values[lanes]
    different = np.flatnonzero(here != here[0])
    if different.size:
        lane = int(different[0])
        raise site.fault(
            f"{what} differs within the warpgroup: {int(here[0]):#x} in its first thread, {int(here[lane]):#x} in",
            lanes.start + lane,
        )
    return int(here[0])


class _MatrixOperand:
    """A matrix in shared memory, given by a descriptor."""

    def __init__(self, site: Site, index: int, mn: int, type_name: str, k_major: bool) -> None:
        self.site, self.index, self.mn = site, index, mn
        self.element_nbytes, self.k_major = NBITS[type_name] // 8, k_major
        operand = site.operands[index]
        if not isinstance(operand, Reg) or operand.cls is not RegClass.B64:
            raise site.fault(f"operand {index} is {operand}, expected a matrix descriptor in a 64-bit register")
        self.row = site.row(operand)
        self.found: dict[tuple[int, int], SharedMatrix] = {}  # by descriptor and slot

    def find(self, group: int) -> SharedMatrix:
        """The matrix that the descriptor of a warpgroup means now."""
        groups = self.site.machine.wgmmas.groups
        lanes = groups.lanes(group)
        bits = _uniform(self.site, self.row, lanes, f"descriptor (operand {self.index})")
        key = (bits, groups.slot(group))
        if key not in self.found:
            self.found[key] = self._locate(decode_descriptor(bits), lanes)
        return self.found[key]

    def _locate(self, descriptor: Descriptor, lanes: slice) -> SharedMatrix:
        machine = self.site.machine
        self._check(descriptor, lanes.start)
        offsets = piece_addresses(descriptor, self.mn, self.element_nbytes, k_major=self.k_major) - machine.shared.base
        outside = machine.shared.outside(offsets, PIECE_NBYTES)
        if outside.any():
            address = int(offsets[outside][0]) + machine.shared.base
            raise self.site.fault(
                f"descriptor (operand {self.index}) reads outside of every buffer, at address {address:#x}\n"
                f"  {descriptor}\n  {machine.shared.describe(address)}",
                lanes.start,
            )
        flat = offsets + machine.shared_origin[lanes.start]
        granules = machine.shared_shadow.granules(np.unique(flat), PIECE_NBYTES)
        return SharedMatrix(flat // PIECE_NBYTES, granules.reshape(-1), descriptor.swizzle_nbytes)

    def _check(self, descriptor: Descriptor, lane: int) -> None:
        if descriptor.base_offset:
            raise self.site.fault(
                f"descriptor (operand {self.index}) has base offset {descriptor.base_offset}, expected 0",
                lane,
                hint="let the matrix start at a multiple of 1024 bytes",
            )
        within = descriptor.start % descriptor.period_nbytes
        if descriptor.swizzle_nbytes and within >> 7:
            raise self.site.fault(
                f"descriptor (operand {self.index}) starts at {descriptor.start:#x}, in the middle of the pattern of its "
                f"{descriptor.swizzle_nbytes}-byte swizzle, which starts at multiples of {descriptor.period_nbytes} bytes",
                lane,
                hint="align the tile to the pattern; steps inside a row of the swizzle are fine",
            )


def with_wgmma_registers(site: Site, step: Step) -> Step:
    """Around an instruction that accesses registers of wgmmas: those in flight must not be touched."""
    wgmmas = site.machine.wgmmas
    rows = wgmmas.rows_of(site.instr)
    if not rows.size:
        return step
    warps = np.arange(site.machine.lanes // WARP)

    def checked(mask: Mask | None) -> None:
        wgmmas.touch(site.pc, rows, warps if mask is None else np.flatnonzero(mask.reshape(-1, WARP).any(axis=1)))
        step(mask)

    return checked
