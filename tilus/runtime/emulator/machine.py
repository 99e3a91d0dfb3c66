"""The state of the blocks that run together: one numpy axis of threads ("lanes") for all of them.

Lane = (block slot, warp, lane of the warp); the last warp of a block is padded with lanes that never live. A register
is one row of a [registers, lanes] array.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from tilus.ptx.module import Kernel, RegClass
from tilus.runtime.emulator.arguments import param_offsets
from tilus.runtime.emulator.async_copy import AsyncCopies
from tilus.runtime.emulator.bulk_copy import BulkCopies
from tilus.runtime.emulator.clocks import MAX_THREADS, Clock, WarpClocks
from tilus.runtime.emulator.cluster import Clusters
from tilus.runtime.emulator.errors import EmulatorError
from tilus.runtime.emulator.global_shadow import GlobalShadow
from tilus.runtime.emulator.mbarrier import Mbarriers
from tilus.runtime.emulator.memory_space import MemorySpace
from tilus.runtime.emulator.program import Program, read, written
from tilus.runtime.emulator.shared_shadow import SharedShadow
from tilus.runtime.emulator.stats import Profile
from tilus.runtime.emulator.wgmma_pending import Wgmmas

WARP = 32
SHARED_BASE = 0x400
# Where the shared window appears in the generic address space; any place that global buffers never reach.
SHARED_WINDOW = 0x7F00_0000_0000_0000
PARAM_BASE = 0x240
# Where the parameter space appears in the generic address space.
PARAM_WINDOW = 0x7E00_0000_0000_0000
_REGISTER_DTYPE = {RegClass.B16: np.uint16, RegClass.B32: np.uint32, RegClass.B64: np.uint64}
Array = npt.NDArray[Any]


class Machine:
    """Registers, memories and lane numbering of up to `slots` resident blocks of one kernel."""

    def __init__(
        self,
        program: Program,
        memory: MemorySpace,
        params: bytes,
        grid: tuple[int, int, int],
        num_threads: int,
        slots: int,
        dynamic_shared_nbytes: int,
        granules: tuple[int, int],
        rng: np.random.Generator,
        random_times: bool,
        cluster: int,
    ) -> None:
        """granules: bytes per unit in which (shared, global) accesses are tracked. random_times: whether asynchronous
        operations happen at random times or when they are waited for. cluster: blocks of a cluster, along x; slots is a
        multiple of it."""
        self.program, self.memory, self.params, self.grid = program, memory, params, grid
        self.num_threads, self.slots, self.rng = num_threads, slots, rng
        self.warps = -(-num_threads // WARP)
        self.lanes = slots * self.warps * WARP
        lane = np.arange(self.lanes)
        self.slot_of = lane // (self.warps * WARP)
        self.thread_of = lane % (self.warps * WARP)
        self.warp_of = self.thread_of // WARP
        self.cluster = cluster
        self.rank_of = self.slot_of % cluster
        self.agent_of = self.rank_of * MAX_THREADS + self.thread_of
        self.column_of = self.rank_of * self.warps + self.warp_of  # of the lane's warp, among the clocks
        self.all_lanes = lane
        self.alive = np.zeros(self.lanes, np.bool_)
        self.block_ids = np.full(slots, -1, np.int64)
        self.param_symbols = {
            param.name: PARAM_BASE + offset
            for param, offset in zip(program.kernel.params, param_offsets(program.kernel), strict=True)
        }
        self.shared_symbols, sizes = _place_shared(program.kernel, dynamic_shared_nbytes)
        self.shared = MemorySpace(SHARED_BASE, 16, sizes, copies=slots)
        self.shared_origin = self.slot_of * self.shared.nbytes
        self.clocks = WarpClocks(slots, self.warps, cluster)
        self.shared_shadow = SharedShadow(self, granules[0])
        self.global_shadow = GlobalShadow(self, granules[1])
        self.async_copies = AsyncCopies(self)
        self.mbarriers = Mbarriers(self)
        self.bulk_copies = BulkCopies(self)
        self.leadership = rng.spawn(1)[0].permuted(np.tile(np.arange(WARP), (self.lanes // WARP, 1)), axis=1)
        """[warps, 32]: of the lanes that take part in an election, the one with the highest number leads."""
        self.clusters = Clusters(self)
        self.wgmmas = Wgmmas(self, random_times=random_times)
        self.profile: Profile | None = None
        self.special = self._special_registers()
        self.regs = {cls: np.zeros((count, self.lanes), dtype) for cls, count, dtype in _register_files(program)}
        tracked = sorted(
            {reg for regs in program.unproven.values() for reg in regs}, key=lambda r: (r.cls.value, r.index)
        )
        self.initialised = {reg: np.zeros(self.lanes, np.bool_) for reg in tracked}

    def start(self, block_ids: npt.NDArray[np.int64]) -> None:
        """Put new blocks into the slots, with nothing initialised."""
        self.block_ids[:] = -1
        self.block_ids[: len(block_ids)] = block_ids
        block = self.block_ids[self.slot_of]
        x, y, _ = self.grid
        for axis, values in zip("xyz", (block % x, block // x % y, block // (x * y)), strict=True):
            self.special[f"%ctaid.{axis}"][:] = values
            self.special[f"%clusterid.{axis}"][:] = values // self.cluster if axis == "x" else values
        for cls, file in self.regs.items():
            file.view(np.uint8)[...] = 0xFF if cls is not RegClass.PRED else 1
        for flags in self.initialised.values():
            flags[:] = False
        self.shared.data[:] = 0xFF
        self.clocks.reset()
        self.shared_shadow.reset()
        self.global_shadow.next_wave()
        self.async_copies.reset()
        self.mbarriers.reset()
        self.bulk_copies.reset()
        self.wgmmas.reset()
        self.clusters.reset()
        self.alive = (block >= 0) & (self.thread_of < self.num_threads)

    def hand_on(self, lanes: npt.NDArray[np.int64]) -> Clock:
        """The clock that these threads of one warp release: what is ordered before this moment for them."""
        slot, warp = int(self.slot_of[lanes[0]]), int(self.warp_of[lanes[0]])
        self.shared_shadow.hold_back(slot, warp, lanes)
        return self.clocks.release(slot, warp, lanes)

    def clocks_moved(self) -> None:
        """Bring what depends on the clocks of the warps up to date."""
        live = np.logical_or.reduce(self.alive.reshape(self.slots, -1, WARP), axis=2)
        self.clocks.refresh(live)
        self.shared_shadow.step()

    def _special_registers(self) -> dict[str, Array]:
        lane = (self.thread_of % WARP).astype(np.uint32)
        zero = np.zeros(self.lanes, np.uint32)
        one = np.uint32(1) << lane
        bits = {"eq": one, "lt": one - np.uint32(1), "le": (one - np.uint32(1)) | one}
        bits |= {"ge": ~bits["lt"], "gt": ~bits["le"]}
        grid = dict(zip("xyz", self.grid, strict=True))
        special: dict[str, Array] = {
            "%laneid": lane,
            "%warpid": self.warp_of.astype(np.uint32),
            "%nwarpid": zero + np.uint32(self.warps),
            "%smid": (self.slot_of % 132).astype(np.uint32),
            "%nsmid": zero + np.uint32(132),
            "%gridid": zero.astype(np.uint64),
            "%clock": zero.copy(),
            "%clock_hi": zero,
            "%clock64": zero.astype(np.uint64),
            "%globaltimer": zero.astype(np.uint64),
            "%dynamic_smem_size": zero + np.uint32(self._dynamic_nbytes()),
            "%total_smem_size": zero + np.uint32(sum(buffer.nbytes for buffer in self.shared.buffers)),
            "%tid.x": self.thread_of.astype(np.uint32),
            "%tid.y": zero,
            "%tid.z": zero,
            "%cluster_ctarank": self.rank_of.astype(np.uint32),
            "%cluster_nctarank": zero + np.uint32(self.cluster),
            "%is_explicit_cluster": np.full(self.lanes, self.cluster > 1),
        }
        special |= {f"%lanemask_{name}": mask for name, mask in bits.items()}
        for axis in "xyz":
            special[f"%ntid.{axis}"] = zero + np.uint32(self.num_threads if axis == "x" else 1)
            special[f"%nctaid.{axis}"] = zero + np.uint32(grid[axis])
            special[f"%ctaid.{axis}"] = zero.copy()
            along = self.cluster if axis == "x" else 1
            special[f"%clusterid.{axis}"] = zero.copy()
            special[f"%nclusterid.{axis}"] = zero + np.uint32(grid[axis] // along)
            special[f"%cluster_nctaid.{axis}"] = zero + np.uint32(along)
            special[f"%cluster_ctaid.{axis}"] = self.rank_of.astype(np.uint32) if axis == "x" else zero
        return special

    def _dynamic_nbytes(self) -> int:
        names = {array.name for array in self.program.kernel.shared if array.dynamic}
        return max((b.nbytes for b in self.shared.buffers if set(b.name.split("/")) & names), default=0)

    def advance_clock(self, cycles: int) -> None:
        for name in ("%clock", "%clock64", "%globaltimer"):
            self.special[name] += np.asarray(cycles, self.special[name].dtype)

    def block_name(self, slot: int) -> str:
        x, y, _ = self.grid
        block = int(self.block_ids[slot])
        return f"({block % x}, {block // x % y}, {block // (x * y)})"

    def place(self, lane: int) -> str:
        """A lane in words."""
        thread, slot = int(self.thread_of[lane]), int(self.slot_of[lane])
        return f"thread {thread} (warp {thread // WARP}, lane {thread % WARP}) of block {self.block_name(slot)}"

    def site_text(self, pc: int) -> str:
        """The PTX line of an instruction and, when known, the user's line."""
        line, loc = self.program.lines[pc], self.program.instrs[pc].loc
        return f"PTX line {line}: {self.program.source.line_text(line)}" + (f"  (from {loc})" if loc else "")

    def fault(
        self,
        pc: int,
        message: str,
        lane: int | None = None,
        hint: str | None = None,
        kind: type[EmulatorError] = EmulatorError,
    ) -> EmulatorError:
        """An error at an instruction, with all that is known about the place."""
        where = f"\n  {self.place(lane)}" if lane is not None else ""
        return kind(f"{message}{where}\n  {self.site_text(pc)}", loc=self.program.instrs[pc].loc, hint=hint)


def _place_shared(kernel: Kernel, dynamic_nbytes: int) -> tuple[dict[str, int], list[tuple[str, int, int]]]:
    """Buffer index of each shared symbol, and the buffers. All launch-sized arrays are one and the same memory."""
    static = [array for array in kernel.shared if not array.dynamic]
    dynamic = [array for array in kernel.shared if array.dynamic]
    sizes = [(array.name, array.nbytes, array.align) for array in static]
    symbols = {array.name: index for index, array in enumerate(static)}
    if dynamic:
        symbols |= {array.name: len(sizes) for array in dynamic}
        sizes.append(("/".join(a.name for a in dynamic), dynamic_nbytes, max(a.align for a in dynamic)))
    return symbols, sizes


def _register_files(program: Program) -> list[tuple[RegClass, int, Any]]:
    counts = dict.fromkeys(RegClass, 0)
    for instr in program.instrs:
        for reg in read(instr) | written(instr):
            counts[reg.cls] = max(counts[reg.cls], reg.index + 1)
    return [(cls, count, _REGISTER_DTYPE.get(cls, np.bool_)) for cls, count in counts.items()]
