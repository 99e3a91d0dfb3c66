"""cp.async.bulk and cp.reduce.async.bulk without a tensor map (PTX ISA, "cp.async.bulk"): decoding.

What happens over time is in `bulk_copy`; copies with a tensor map are in `tensor_instructions`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tilus.ptx.module import Imm, Operand
from tilus.runtime.emulator.atomics import addition
from tilus.runtime.emulator.bulk_copy import Reduce, Transfer
from tilus.runtime.emulator.bulk_landing import Landings
from tilus.runtime.emulator.decode import DTYPES, Array, Mask, Site, Step, instruction
from tilus.runtime.emulator.memory import Access

_LOADS = (
    "mbarrier::complete_tx::bytes", "multicast::cluster", "shared::cluster", "shared::cta", "global", "L2::cache_hint",
)  # fmt: skip
_STORES = ("bulk_group", "shared::cta", "global", "L2::cache_hint")
_BETWEEN_BLOCKS = ["shared::cluster", "shared::cta"]
_REDUCED = ("u32", "s32", "u64", "s64", "f16", "bf16", "f32", "f64")


@instruction("cp.async.bulk")
def bulk_copy(site: Site) -> Step:
    if site.has("prefetch"):
        return _prefetch(site)
    return _load(site) if site.has("mbarrier::complete_tx::bytes") else _store(site, reduces=False)


@instruction("cp.reduce.async.bulk")
def bulk_reduce(site: Site) -> Step:
    return _store(site, reduces=True)


def to_shared(site: Site) -> bool:
    """Whether shared memory is the destination: the spaces of an opcode are in the order destination, source."""
    first = next((word for word in site.words if word.startswith(("shared", "global"))), "")
    return first.startswith("shared")


class BulkRange:
    """A range of bytes that a lane names by an address and a size in a register."""

    def __init__(self, site: Site, operand: Operand, space: str) -> None:
        self.site, self.operand, self.space = site, operand, space
        self.accesses: dict[int, Access] = {}

    def place(self, lane: int, nbytes: int) -> int:
        """The position of its first byte in the data of its space, after the checks of bounds and alignment."""
        access = self.accesses.get(nbytes)
        if access is None:
            access = Access(self.site, self.operand, self.space, nbytes, align=16, by_warp=False, asynchronous=True)
            self.accesses[nbytes] = access
        return int(access.split(np.array([lane]))[0][2][0])


class BulkSize:
    """The size operand: a positive multiple of 16 bytes."""

    def __init__(self, site: Site, operand: Operand) -> None:
        self.site, self.values = site, site.source(operand, "u32")

    def of(self, lane: int) -> int:
        nbytes = int(self.values if self.values.ndim == 0 else self.values[lane])
        if nbytes <= 0 or nbytes % 16:
            raise self.site.fault(f"bulk copy of {nbytes} bytes, expected a positive multiple of 16", lane)
        return nbytes


def _check_operands(site: Site, count: int) -> None:
    site.expect_operands(count + site.has("L2::cache_hint"))


def _transfer(shared: int, global_: int, nbytes: int, size: int = 8) -> Transfer:
    piece = np.arange(0, nbytes, size)
    return Transfer(shared, nbytes, size, shared + piece, global_ + piece)


def _load(site: Site) -> Step:
    """[destination], [source], bytes, [mbarrier]{, block mask}{, cache policy}; the source is in global memory, or in
    the own shared memory when the destination is in that of another block."""
    site.allow("async", "bulk", *_LOADS)
    _check_operands(site, 4 + site.has("multicast::cluster"))
    spaces = [word for word in site.words if word in ("global", "shared::cta", "shared::cluster")]
    if len(spaces) != 2 or spaces not in (["shared::cluster", "global"], ["shared::cta", "global"], _BETWEEN_BLOCKS):
        raise site.unsupported("a copy between these spaces")
    target, source = (BulkRange(site, operand, space) for operand, space in zip(site.operands, spaces, strict=False))
    size, landings = BulkSize(site, site.operands[2]), Landings(site, 3)
    copies, pc = site.machine.bulk_copies, site.pc

    def step(mask: Mask) -> None:
        for lane in site.lanes(mask).tolist():
            nbytes = size.of(lane)
            place = target.place(lane, nbytes)
            transfer = _transfer(place, source.place(lane, nbytes), nbytes)
            copies.load(pc, lane, transfer, landings.of(lane, place), from_shared=spaces == _BETWEEN_BLOCKS)

    return step


def _store(site: Site, *, reduces: bool) -> Step:
    """[destination], [source], bytes{, cache policy}."""
    site.allow("async", "bulk", *_STORES, *(("reduce", "add", "noftz") if reduces else ()))
    _check_operands(site, 3)
    if to_shared(site) or not site.has("shared::cta"):
        raise site.unsupported("a copy between these spaces")
    target, source = BulkRange(site, site.operands[0], "global"), BulkRange(site, site.operands[1], "shared")
    size, reduce, element = BulkSize(site, site.operands[2]), None, 8
    if reduces:
        reduce, element = _reduction(site)
    machine, pc = site.machine, site.pc

    def step(mask: Mask) -> None:
        for lane in site.lanes(mask).tolist():
            nbytes = size.of(lane)
            transfer = _transfer(source.place(lane, nbytes), target.place(lane, nbytes), nbytes, element)
            machine.bulk_copies.store(pc, lane, transfer, reduce)

    return step


def _reduction(site: Site) -> tuple[Reduce, int]:
    """(sum of raw elements, bytes of an element)."""
    type_name = site.type()
    if not site.has("add") or type_name not in _REDUCED:
        raise site.unsupported("this reduction", f"modelled here: .add of {', '.join(_REDUCED)}")
    dtype, add = np.dtype(DTYPES[type_name]), addition(type_name)

    def reduce(old: npt.NDArray[np.generic], new: npt.NDArray[np.generic]) -> Array:
        return np.ascontiguousarray(add(old.view(dtype), new.view(dtype))).view(old.dtype)

    return reduce, dtype.itemsize


def _prefetch(site: Site) -> Step:
    """cp.async.bulk.prefetch.L2.global [source], bytes: nothing but the checks of the range."""
    site.allow("async", "bulk", "prefetch", "L2", "global", "L2::cache_hint")
    _check_operands(site, 2)
    source, size = BulkRange(site, site.operands[0], "global"), BulkSize(site, site.operands[1])

    def step(mask: Mask) -> None:
        for lane in site.lanes(mask).tolist():
            source.place(lane, size.of(lane))

    return step


@instruction("cp.async.bulk.commit_group")
def commit_group(site: Site) -> Step:
    copies = site.machine.bulk_copies
    return lambda mask: copies.commit(site.lanes(mask))


@instruction("cp.async.bulk.wait_group")
def wait_group(site: Site) -> Step:
    site.allow("async", "bulk", "wait_group", "read")
    operand = site.operands[0] if site.operands else None
    if not isinstance(operand, Imm):
        raise site.fault(f"wait_group of {operand}, expected an integer")
    copies, read, groups_left = site.machine.bulk_copies, site.has("read"), operand.value
    return lambda mask: copies.wait(site.lanes(mask), groups_left, read=read)
