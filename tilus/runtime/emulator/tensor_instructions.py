"""cp.async.bulk.tensor (PTX ISA, "cp.async.bulk.tensor"), tile mode: decoding.

Which bytes go where is in `tensor_map`, what happens over time in `bulk_copy`.
"""

from __future__ import annotations

import numpy as np

from tilus.ptx.module import Operand, Reg, TensorAddress
from tilus.runtime.emulator.bulk_copy import Transfer
from tilus.runtime.emulator.bulk_instructions import to_shared
from tilus.runtime.emulator.bulk_landing import Landings
from tilus.runtime.emulator.decode import Mask, Site, Step, instruction
from tilus.runtime.emulator.machine import PARAM_BASE, PARAM_WINDOW
from tilus.runtime.emulator.memory import Access
from tilus.runtime.emulator.tensor_map import TENSOR_MAP_NBYTES, Box, decode

_DIMS = ("1d", "2d", "3d", "4d", "5d")
_SHARED_ALIGN = 128
_INNER_ALIGN = 16  # bytes


class TensorPlace:
    """A `[map, {coordinates}]` operand: the box that a lane names."""

    def __init__(self, site: Site, operand: Operand) -> None:
        dims = site.one_of(*_DIMS)
        if not isinstance(operand, TensorAddress) or not isinstance(operand.map, Reg) or dims is None:
            raise site.fault(f"operand {operand}, expected [register, {{coordinates}}] and .1d to .5d")
        self.site, self.rank = site, int(dims[0])
        if len(operand.coordinates.elements) != self.rank:
            raise site.fault(f"{len(operand.coordinates.elements)} coordinates, expected {self.rank}")
        self.maps = site.source(operand.map, "u64")
        self.coordinates = [site.source(element, "s32") for element in operand.coordinates.elements]
        self.boxes: dict[int, Box] = {}

    def box(self, lane: int) -> Box:
        address = int(self.maps if self.maps.ndim == 0 else self.maps[lane])
        if address not in self.boxes:
            machine, start = self.site.machine, address - PARAM_WINDOW - PARAM_BASE
            maps = [param.name for param in machine.program.kernel.params if param.count == TENSOR_MAP_NBYTES]
            if address not in [PARAM_WINDOW + machine.param_symbols[name] for name in maps]:
                raise self.site.fault(
                    f"tensor map at {address:#x}, expected the generic address of one of the parameters {maps}",
                    lane,
                    hint="mov.b64 of a `.param .align 64 .b8 name[128]`, then cvta.param.u64",
                )
            box = decode(machine.params[start : start + TENSOR_MAP_NBYTES])
            if box.rank != self.rank:
                raise self.site.fault(f"a tensor map of rank {box.rank}, expected {self.rank}", lane)
            if box.swizzle_nbytes and box.box[0] * box.element_nbytes != box.swizzle_nbytes:
                raise self.site.unsupported("a box that is narrower than the swizzle")
            self.boxes[address] = box
        return self.boxes[address]

    def start(self, lane: int, *, stores: bool) -> tuple[int, ...]:
        """The coordinates, innermost first; those at which the hardware stops with an illegal instruction are refused."""
        start = tuple(int(values if values.ndim == 0 else values[lane]) for values in self.coordinates)
        inner = start[0] * self.box(lane).element_nbytes
        if inner % _INNER_ALIGN:
            raise self.site.fault(
                f"a box at coordinates {start}, whose innermost one is {inner} bytes, expected a multiple of {_INNER_ALIGN}",
                lane,
            )
        if stores and min(start) < 0:
            raise self.site.fault(
                f"a store to a box at coordinates {start}, expected 0 or more",
                lane,
                hint="loads may start at negative coordinates, stores may not",
            )
        return start

    def transfer(self, lane: int, place: int, *, stores: bool) -> Transfer:
        """place: where the box begins in the data of shared memory."""
        machine, box = self.site.machine, self.box(lane)
        start = self.start(lane, stores=stores)
        address = machine.shared.base + place % machine.shared.nbytes
        transfer = box.transfer(start, place, address, machine.memory.base)
        at = transfer.global_at if transfer.inside is None else transfer.global_at[transfer.inside]
        outside = machine.memory.outside(at, transfer.size)
        if outside.any():
            place = machine.memory.base + int(at[outside][0])
            raise self.site.fault(
                f"the tensor map reaches outside of every buffer\n  {machine.memory.describe(place)}", lane
            )
        return transfer


class BoxInShared:
    """The shared-memory operand of a tensor copy."""

    def __init__(self, site: Site, operand: Operand, tensor: TensorPlace) -> None:
        self.site, self.operand, self.tensor = site, operand, tensor
        self.accesses: dict[int, Access] = {}

    def place(self, lane: int) -> int:
        nbytes = self.tensor.box(lane).nbytes
        if nbytes not in self.accesses:
            space = "shared::cluster" if self.site.has("shared::cluster") else "shared"
            self.accesses[nbytes] = Access(
                self.site, self.operand, space, nbytes, _SHARED_ALIGN, by_warp=False, asynchronous=True
            )
        return int(self.accesses[nbytes].split(np.array([lane]))[0][2][0])


@instruction("cp.async.bulk.tensor")
def tensor_copy(site: Site) -> Step:
    """Load: [destination], [map, {c..}], [mbarrier]. Store: [map, {c..}], [source]. Both {, cache policy}."""
    loads = to_shared(site)
    multicasts = site.has("multicast::cluster")
    words = ("mbarrier::complete_tx::bytes", "multicast::cluster", "shared::cluster") if loads else ("bulk_group",)
    site.allow("async", "bulk", "tensor", "tile", "shared::cta", "global", "L2::cache_hint", *_DIMS, *words)
    site.expect_operands((3 if loads else 2) + multicasts + site.has("L2::cache_hint"))
    tensor = TensorPlace(site, site.operands[1 if loads else 0])
    shared = BoxInShared(site, site.operands[0 if loads else 1], tensor)
    copies, pc = site.machine.bulk_copies, site.pc
    landings = Landings(site, 2) if loads else None

    def step(mask: Mask) -> None:
        for lane in site.lanes(mask).tolist():
            place = shared.place(lane)
            transfer = tensor.transfer(lane, place, stores=landings is None)
            if landings is None:
                copies.store(pc, lane, transfer, None)
            else:
                copies.load(pc, lane, transfer, landings.of(lane, place))

    return step


@instruction("cp.async.bulk.prefetch.tensor")
def prefetch_tensor(site: Site) -> Step:
    """[map, {c..}]{, cache policy}: nothing but the check of the map."""
    site.allow("async", "bulk", "prefetch", "tensor", "tile", "L2", "global", "L2::cache_hint", *_DIMS)
    site.expect_operands(1 + site.has("L2::cache_hint"))
    tensor = TensorPlace(site, site.operands[0])

    def step(mask: Mask) -> None:
        for lane in site.lanes(mask).tolist():
            tensor.box(lane)

    return step
