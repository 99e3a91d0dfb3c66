"""What the grouped and the 8-bit linear of Hopper share: limits, a ring of stages, the choice of a plan that fits.

`warpgroup_linear` is not among them: its warpgroups share steps, so that it counts stages otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import tilus
from tilus.errors import TilusError
from tilus.kernels.linear import EMULATED_SMS, gpu_of
from tilus.kernels.quantize.packed import QuantizedWeight
from tilus.ptx.assembler import SpillError
from tilus.target import TARGETS

MOST_STAGES = 16
MOST_TOKENS = {4: 16, 2: 64, 1: 64}  # by rows of tiles: registers do not hold the sums of more
SHARED_NBYTES = TARGETS["sm_90a"].max_shared_nbytes - 8192  # for stages; the rest for barriers and starts of tiles
# Warps that copy, registers of each thread that computes and that copies. Only a whole warpgroup can give registers away. Next to
# four others it would keep too few for the addresses of four rows.
COPYING = {1: (4, 232, 40), 2: (4, 232, 40), 4: (1, None, None)}


class Ring:
    """Stages in turn, counted from item to item."""

    def __init__(self, full, empty, stages: int):
        self.full = full
        self.empty = empty
        self.stages = stages
        self.count = 0

    def next_to_fill(self, nbytes):
        stage, turn = self.count % self.stages, self.count // self.stages
        tilus.wait_barrier(self.empty[stage], (turn + 1) % 2)
        tilus.arrive(self.full[stage], nbytes=nbytes)
        self.count += 1
        return stage

    def next_to_use(self):
        stage, turn = self.count % self.stages, self.count // self.stages
        tilus.wait_barrier(self.full[stage], turn % 2)
        self.count += 1
        return stage


def num_sms_of(x: Any, where: str) -> int:
    """Of the GPU that runs it, or that the emulator stands for; the reference likes few blocks."""
    if where == "cuda":
        return gpu_of(x).num_sms
    return EMULATED_SMS if where == "emulator" else 1


def launch_without_spills(
    weight: QuantizedWeight, key: Any, candidates: Iterator[Any], launch_by: Callable[[Any], None]
) -> None:
    """Launch by the first plan that the registers suffice for. The weight remembers it under the key."""
    found, last = weight.schedules.get(key), None
    for plan in candidates if found is None else [found]:
        try:
            launch_by(plan)
        except SpillError as error:
            last = error
        else:
            weight.schedules[key] = plan
            return
    raise last or TilusError(f"no plan fits the shared memory for {weight.header.scheme} {weight.header.dtype}")
