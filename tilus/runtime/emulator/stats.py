"""What a launch did: dynamic instruction counts, shared-memory wavefronts, global-memory sectors.

Shared memory has 32 banks of 4 bytes. A warp's access of 8 or 16 bytes a lane runs as 2 or 4 phases of half or quarter
warps (ldmatrix: one phase for the 8 rows of a matrix); a phase takes as many wavefronts as distinct words meet in its
worst bank. Global memory moves in sectors of 32 bytes.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from tilus.runtime.emulator.program import Program

Lanes = npt.NDArray[np.int64]
_WARP, _BANKS, _SECTOR = 32, 32, 32


@dataclass(frozen=True)
class AccessStats:
    """One load or store instruction. accesses: how often a warp executed it. transactions: wavefronts (shared) or
    sectors (global) it took; ideal: the fewest that its distinct bytes need; worst: the most that one execution took."""

    line: int
    opcode: str
    accesses: int
    transactions: int
    ideal: int
    worst: int

    @property
    def conflicts(self) -> int:
        return self.transactions - self.ideal


@dataclass(frozen=True)
class Stats:
    """instructions: how many warps executed each opcode, over all blocks. shared, global_: by PTX line; only filled by
    a launch with `profile=True`."""

    instructions: Counter[str]
    shared: dict[int, AccessStats] = field(default_factory=dict[int, AccessStats])
    global_: dict[int, AccessStats] = field(default_factory=dict[int, AccessStats])

    @property
    def total(self) -> int:
        return self.instructions.total()


class Profile:
    """Collects the accesses of a launch."""

    def __init__(self) -> None:
        self.counts: dict[tuple[bool, int], npt.NDArray[np.int64]] = {}  # accesses, transactions, ideal, worst

    def add(self, pc: int, offsets: Lanes, nbytes: int, lanes: Lanes, *, shared: bool) -> None:
        """One execution of the instruction at pc: byte offsets of the lanes' accesses, `nbytes` each."""
        taken, ideal = wavefronts(offsets, nbytes, lanes) if shared else sectors(offsets, nbytes, lanes)
        before = self.counts.get((shared, pc), np.zeros(4, np.int64))
        now = np.array([len(taken), taken.sum(), ideal, 0]) + before
        now[3] = max(before[3], taken.max())
        self.counts[shared, pc] = now

    def sites(self, program: Program, *, shared: bool) -> dict[int, AccessStats]:
        return {
            program.lines[pc]: AccessStats(program.lines[pc], program.instrs[pc].opcode, *map(int, numbers))
            for (is_shared, pc), numbers in sorted(self.counts.items())
            if is_shared == shared
        }


def wavefronts(offsets: Lanes, nbytes: int, lanes: Lanes) -> tuple[Lanes, int]:
    """(wavefronts of each warp, ideal wavefronts of all) of a shared-memory access; byte offsets in shared memory."""
    lanes_per_phase = min(_WARP, 4 * _WARP // nbytes)
    phase = lanes // lanes_per_phase
    words = (offsets >> 2)[:, None] + np.arange(max(1, nbytes // 4))
    touched = np.unique(np.stack([np.broadcast_to(phase[:, None], words.shape), words], axis=-1).reshape(-1, 2), axis=0)
    in_bank = touched[:, 0] * _BANKS + touched[:, 1] % _BANKS
    banks, counts = np.unique(in_bank, return_counts=True)
    phases = np.flatnonzero(np.diff(banks // _BANKS, prepend=-1))
    numbers, distinct = np.unique(touched[:, 0], return_counts=True)
    warps = np.flatnonzero(np.diff(numbers * lanes_per_phase // _WARP, prepend=-1))
    taken = np.add.reduceat(np.maximum.reduceat(counts, phases), warps)
    return taken, int((-(-distinct // _BANKS)).sum())


def sectors(offsets: Lanes, nbytes: int, lanes: Lanes) -> tuple[Lanes, int]:
    """(sectors of each warp, ideal sectors of all) of a global-memory access."""
    warp = np.broadcast_to((lanes // _WARP)[:, None], (len(lanes), nbytes))
    pairs = np.stack([warp, offsets[:, None] + np.arange(nbytes)], axis=-1).reshape(-1, 2)
    distinct = np.unique(pairs, axis=0)
    needed = np.unique(distinct[:, 0], return_counts=True)[1]
    moved = np.unique(np.stack([distinct[:, 0], distinct[:, 1] // _SECTOR], axis=-1), axis=0)
    return np.unique(moved[:, 0], return_counts=True)[1], int((-(-needed // _SECTOR)).sum())
