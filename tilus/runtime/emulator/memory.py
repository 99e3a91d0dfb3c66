"""Loads and stores (PTX ISA 9.7.9): ld, ldu, st, prefetch, fences."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NoReturn

import numpy as np
import numpy.typing as npt

from tilus.ptx.module import Address, Instr, Operand, Reg, Special, Symbol, Vector
from tilus.runtime.emulator.arguments import param_offsets
from tilus.runtime.emulator.cluster import RANK_SHIFT, rank_field
from tilus.runtime.emulator.decode import DTYPES, Array, Mask, Site, Step, instruction
from tilus.runtime.emulator.errors import RaceError
from tilus.runtime.emulator.machine import SHARED_WINDOW
from tilus.runtime.emulator.memory_space import MemorySpace

Lanes = npt.NDArray[np.int64]
SPACES = ("global", "shared", "shared::cta", "shared::cluster", "param", "const", "local")
_SHARED = ("shared", "shared::cta", "shared::cluster")
_HINTS = (
    "ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc", "weak", "volatile", "relaxed", "acquire", "release", "cta",
    "cluster", "gpu", "sys", "v2", "v4", "v8", "L1::evict_normal", "L1::evict_unchanged", "L1::evict_first",
    "L1::evict_last", "L1::no_allocate", "L2::evict_first", "L2::evict_last", "L2::evict_normal", "L2::64B",
    "L2::128B", "L2::256B", "L2::cache_hint",
)  # fmt: skip
_STRONG = ("volatile", "relaxed", "acquire", "release")


def access_nbytes(instr: Instr) -> tuple[tuple[str, ...], int]:
    """The state spaces an instruction may access and the bytes of the smallest piece (for granules)."""
    base, *words = instr.opcode.split(".")
    if base in ("ldmatrix", "stmatrix"):
        return ("shared",), 16
    if base == "mbarrier" or "mbarrier" in words:
        return ("shared",), 8
    if base == "cp" and "async" in words and "bulk" not in words:
        size = instr.operands[2] if len(instr.operands) > 2 else None
        nbytes = getattr(size, "value", 4)
        return ("shared",), nbytes if nbytes in (4, 8, 16) else 4
    if base == "cp" and "bulk" in words:
        return ("shared", "global"), 16
    if base not in ("ld", "ldu", "st", "atom", "red"):
        return (), 16
    nbits = [int(match.group(1)) for word in words if (match := re.fullmatch(r"[busf](8|16|32|64|128)", word))]
    pair = 4 if any(word in ("f16x2", "bf16x2") for word in words) else 2
    nbytes = nbits[-1] // 8 if nbits else pair
    nbytes *= next((int(word[1:]) for word in words if re.fullmatch(r"v[248]", word)), 1)
    spaces = tuple(word.partition("::")[0] for word in words if word in SPACES)
    return spaces or ("global", "shared"), nbytes


class Access:
    """Where a memory operand points, for the lanes of a mask, checked for bounds and alignment.

    by_warp: whether it is an access of a warp, as the statistics count them. asynchronous: whether it happens later; who
    waits for it is checked elsewhere.
    """

    def __init__(
        self,
        site: Site,
        operand: Operand,
        space: str | None,
        nbytes: int,
        align: int | None = None,
        *,
        by_warp: bool = True,
        asynchronous: bool = False,
    ) -> None:
        if not isinstance(operand, Address):
            raise site.fault(f"memory operand {operand}, expected an address in brackets")
        self.site, self.space, self.nbytes, self.align = site, space, nbytes, align or nbytes
        self.offset, self.by_warp, self.asynchronous = operand.offset, by_warp, asynchronous
        self.base = self._base(operand.base)

    def _base(self, base: Reg | Symbol) -> Array:
        machine = self.site.machine
        if isinstance(base, Symbol):
            if base.name not in machine.shared_symbols:
                raise self.site.fault(
                    f"unknown variable {base.name!r}, expected one of {sorted(machine.shared_symbols)}"
                )
            address = machine.shared.address_of(machine.shared_symbols[base.name])
            return np.full(machine.lanes, address if self.space else address + SHARED_WINDOW, np.int64)
        row = self.site.row(base)
        if row.dtype.itemsize == 8:
            return row.view(np.int64)
        if self.space in _SHARED and row.dtype.itemsize == 4:
            return row
        raise self.site.fault(
            f"address register of {row.dtype.itemsize * 8} bits, expected 64 (or 32 for shared memory)"
        )

    def split(self, lanes: Lanes) -> list[tuple[bool, Lanes, Lanes]]:
        """(is shared, lanes, byte positions in the data of that space) for the accesses of these lanes."""
        addresses = self.base[lanes].astype(np.int64) + self.offset
        if self.space in _SHARED:
            return [(True, lanes, self._locate_shared(addresses, lanes))]
        memory = self.site.machine.memory
        in_window = addresses >= SHARED_WINDOW
        if self.space is None and in_window.any():
            who = lanes[in_window]
            shared = (True, who, self._locate_shared(addresses[in_window] - SHARED_WINDOW, who))
            if in_window.all():
                return [shared]
            who = lanes[~in_window]
            return [shared, (False, who, self._locate(memory, addresses[~in_window], who, shared=False))]
        return [(False, lanes, self._locate(memory, addresses, lanes, shared=False))]

    def _locate_shared(self, addresses: Lanes, lanes: Lanes) -> Lanes:
        """Positions in the data of all blocks. Addresses of other blocks are valid unless the space is shared::cta."""
        machine = self.site.machine
        ranks = rank_field(addresses)
        if self.space in ("shared", "shared::cta") or not ranks.any():
            return self._locate(machine.shared, addresses, lanes, shared=True) + machine.shared_origin[lanes]
        if (ranks > machine.cluster).any():
            index = int(np.flatnonzero(ranks > machine.cluster)[0])
            self._fail(machine.shared, int(addresses[index]), int(lanes[index]), "address of no block of the cluster")
        offsets = self._locate(machine.shared, addresses & (1 << RANK_SHIFT) - 1, lanes, shared=True)
        own = machine.slot_of[lanes]
        slots = np.where(ranks > 0, own - own % machine.cluster + ranks - 1, own)
        machine.clusters.touch(self.site.pc, lanes, slots, remember=not self.asynchronous)
        return offsets + slots * machine.shared.nbytes

    def _locate(self, space: MemorySpace, addresses: Lanes, lanes: Lanes, *, shared: bool) -> Lanes:
        """Offsets in a space, after the checks."""
        offsets = addresses - space.base
        if (addresses & (self.align - 1)).any():
            index = int(np.flatnonzero(addresses & (self.align - 1))[0])
            self._fail(
                space, int(addresses[index]), int(lanes[index]), f"misaligned access (not a multiple of {self.align})"
            )
        outside = space.outside(offsets, self.nbytes)
        if outside.any():
            index = int(np.flatnonzero(outside)[0])
            self._fail(space, int(addresses[index]), int(lanes[index]), "access outside of every buffer")
        machine = self.site.machine
        if machine.profile is not None and self.by_warp and len(lanes):
            machine.profile.add(self.site.pc, offsets, self.nbytes, lanes, shared=shared)
        return offsets

    def _fail(self, space: MemorySpace, address: int, lane: int, what: str) -> None:
        raise self.site.fault(
            f"{what}: {self.nbytes} bytes at address {address:#x}\n  {space.describe(address)}",
            lane,
        )


def space_of(site: Site) -> str | None:
    """The state space named in the opcode; None for generic addresses."""
    return site.one_of(*SPACES)


def elements_of(site: Site, operand: Operand) -> tuple[Operand, ...]:
    return operand.elements if isinstance(operand, Vector) else (operand,)


def _data_type(site: Site) -> tuple[str, int]:
    """The type of one element and how many there are."""
    count = next((int(word[1:]) for word in site.words if word in ("v2", "v4", "v8")), 1)
    return site.type(), count


def _raw(type_name: str) -> str:
    return f"u{np.dtype(DTYPES[type_name]).itemsize * (16 if type_name.endswith('x2') else 8)}"


@instruction("ld", "ldu")
def load(site: Site) -> Step:
    site.allow(*SPACES, *_HINTS)
    type_name, count = _data_type(site)
    targets = elements_of(site, site.operands[0])
    if len(targets) != count:
        raise site.fault(f"{len(targets)} destinations, expected {count}")
    space = space_of(site)
    if space in ("local", "const"):
        raise site.unsupported(f"state space .{space}")
    writers = [_extending_writer(site, target, type_name) for target in targets]
    if space == "param":
        return _load_param(site, type_name, writers)
    size = np.dtype(DTYPES[type_name]).itemsize * (2 if type_name.endswith("x2") else 1)
    access = Access(site, site.operands[1], space, size * count)
    shift = size.bit_length() - 1
    machine, pc, strong = site.machine, site.pc, site.one_of(*_STRONG) is not None
    acquire = site.has("acquire")

    def step(mask: Mask) -> None:
        for shared, lanes, where in access.split(site.lanes(mask)):
            if shared:
                machine.shared_shadow.read(pc, where, size * count, lanes, strong=strong)
            else:
                machine.bulk_copies.check_read(pc, where, size * count, lanes)
                if acquire:
                    machine.global_shadow.acquire(lanes)
            data = (machine.shared if shared else machine.memory).views[size]
            first = where >> shift
            for index, write in enumerate(writers):
                write(lanes, data[first + index])

    return step


def _extending_writer(site: Site, target: Operand, type_name: str) -> Callable[[Lanes, Array], None]:
    """Writes loaded raw elements to a register at least as wide: sign-extended for .s types, else zero-extended."""
    if isinstance(target, Special) and target.name == "_":
        return lambda lanes, values: None
    if not isinstance(target, Reg):
        raise site.fault(f"destination {target}, expected a register")
    row = site.row(target)
    raw = np.dtype(f"u{np.dtype(DTYPES[type_name]).itemsize * (2 if type_name.endswith('x2') else 1)}")
    if row.dtype == np.bool_ or row.dtype.itemsize < raw.itemsize:
        raise site.fault(f"destination register of {row.dtype.itemsize * 8} bits, expected at least {raw.itemsize * 8}")
    signed = np.dtype(f"i{raw.itemsize}")
    wide = np.dtype(f"i{row.dtype.itemsize}")
    extend = type_name[0] == "s" and wide != signed

    def write(lanes: Lanes, values: Array) -> None:
        row[lanes] = values.view(signed).astype(wide).view(row.dtype) if extend else values

    return write


def _load_param(site: Site, type_name: str, writers: list[Callable[[Lanes, Array], None]]) -> Step:
    operand = site.operands[1]
    kernel = site.machine.program.kernel
    names = [param.name for param in kernel.params]
    if not isinstance(operand, Address) or not isinstance(operand.base, Symbol) or operand.base.name not in names:
        raise site.fault(f"ld.param of {operand}, expected one of the parameters {names}")
    index = names.index(operand.base.name)
    param = kernel.params[index]
    size = np.dtype(DTYPES[type_name]).itemsize
    total = int(param.type[1:]) // 8 * (param.count or 1)
    if not 0 <= operand.offset <= total - size * len(writers):
        raise site.fault(f"reads byte {operand.offset} of parameter {param.name!r}, which has {total} bytes")
    start = param_offsets(kernel)[index] + operand.offset
    raw = np.frombuffer(site.machine.params, f"u{size}", len(writers), start)

    def step(mask: Mask) -> None:
        lanes = site.lanes(mask)
        for element, write in enumerate(writers):
            write(lanes, raw[element : element + 1])

    return step


@instruction("st")
def store(site: Site) -> Step:
    site.allow(*SPACES, *_HINTS)
    type_name, count = _data_type(site)
    sources = [site.source(element, _raw(type_name)) for element in elements_of(site, site.operands[1])]
    if len(sources) != count:
        raise site.fault(f"{len(sources)} values, expected {count}")
    size = sources[0].dtype.itemsize
    access = Access(site, site.operands[0], space_of(site), size * count)
    shift = size.bit_length() - 1
    strong = site.one_of(*_STRONG) is not None
    lanes_total = site.machine.lanes

    def step(mask: Mask) -> None:
        for shared, lanes, where in access.split(site.lanes(mask)):
            values = np.stack([np.broadcast_to(source, lanes_total)[lanes] for source in sources], axis=1)
            write_checked(site, shared, where, lanes, values, shift, strong=strong)

    return step


def write_checked(
    site: Site, shared: bool, where: Lanes, lanes: Lanes, values: Array, shift: int, *, strong: bool = False
) -> None:
    """Store values [accesses, elements] of raw bits, after the race checks; lanes must not disagree on an address."""
    machine = site.machine
    values = np.ascontiguousarray(values)
    new = values.view(np.uint8)
    nbytes = new.shape[1]
    if shared:
        machine.shared_shadow.write(site.pc, where, nbytes, lanes, new, atomic=strong)
    elif not strong:
        machine.global_shadow.write(site.pc, where, nbytes, lanes, new)
    data = (machine.shared if shared else machine.memory).views[values.dtype.itemsize]
    index = (where >> shift)[:, None] + np.arange(values.shape[1])
    data[index] = values
    lost = data[index] != values
    if lost.any():
        row, column = np.argwhere(lost)[0]
        _fail_torn_store(site, shared, int(index[row, column] << shift), lanes[index[:, column] == index[row, column]])


def _fail_torn_store(site: Site, shared: bool, place: int, lanes: Lanes) -> NoReturn:
    machine = site.machine
    space = machine.shared if shared else machine.memory
    blocks = "two blocks write" if len(set(machine.slot_of[lanes].tolist())) > 1 else "threads write"
    raise machine.fault(
        site.pc,
        f"race: {blocks} different values to one address in one instruction\n"
        f"  {space.describe(space.base + place % space.nbytes)}",
        int(lanes[0]),
        hint="which value stays is not defined",
        kind=RaceError,
    )


@instruction("prefetch", "prefetchu", "discard", "applypriority")
def prefetch(site: Site) -> Step:
    return lambda mask: None


@instruction("membar", "fence")
def fence(site: Site) -> Step:
    """Fences order this thread's accesses, which here happen in order anyway; they let a block acquire, and finish its loads.

    A proxy fence makes what this thread has stored to shared memory visible to bulk copies and wgmma;
    fence.mbarrier_init and proxy fences do so for the mbarriers it has initialised.
    """
    site.allow(
        "cta", "gl", "sys", "gpu", "cluster", "sc", "acq_rel", "acquire", "release", "proxy", "async", "shared::cta",
        "shared::cluster", "global", "alias", "mbarrier_init",
    )  # fmt: skip
    machine = site.machine
    publishes = site.has("async") or site.has("mbarrier_init")
    reaches_cluster = machine.cluster > 1 and not site.has("proxy") and site.one_of("cta", "gl") != "cta"
    finishes = not site.has("mbarrier_init") and not site.has("alias")
    reaches_shared = site.has("async") and not site.has("global")

    def step(mask: Mask) -> None:
        lanes = site.lanes(mask)
        machine.global_shadow.acquire(lanes)
        if finishes:
            machine.shared_shadow.proxy.finish_loads(lanes)
        if reaches_shared:
            machine.shared_shadow.proxy.fence(lanes)
        if publishes:
            machine.mbarriers.publish(lanes)
        if reaches_cluster:
            machine.clusters.fence(lanes)

    return step
