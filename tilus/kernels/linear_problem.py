"""What a plan of the quantised linear depends on, and the plans worth trying, best first by an analytic model.

A plan is a frozen dataclass of one of `PLANS`; `tilus.kernels.linear.kernel_call` knows how each is launched.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from tilus.dtypes import DataType
from tilus.kernels import warpgroup_schedule
from tilus.kernels.quantize.header import WeightHeader
from tilus.kernels.quantize.tiles import TILE
from tilus.kernels.schedule import Schedule, schedule
from tilus.kernels.warpgroup_plan import WarpgroupPlan
from tilus.kernels.warpgroup_schedule import warpgroup_plans
from tilus.runtime.autotune import bucket
from tilus.runtime.tuned_plans import Key

Plan = Schedule | WarpgroupPlan
PLANS: tuple[type, ...] = (Schedule, WarpgroupPlan)
FAMILY = "linear-4"  # another number where plans get another meaning, or kernels another speed
CANDIDATES = 10
INVARIANT_ROWS = 4096  # of the weight that invariant plans are made for, whatever rows a weight has

# The model's machine, an H100: what one multiprocessor gets from memory and issues, and how long a read is under way.
BYTES_PER_NS = 24.0
INSTRUCTIONS_PER_NS = 4 * 1.7
LATENCY_NS = 800.0
REGISTERS, MOST_REGISTERS, MOST_WARPS = 65536, 255, 64
SPLIT_NS = 1500.0  # partial sums go through the L2 cache, and the last block waits for all others


@dataclass(frozen=True)
class LinearProblem:
    """One product: the weight's header, the tokens m, and the types of activations and results.

    The orders of columns and rows and the global scale do not matter to a plan; `of` leaves them out.
    """

    header: WeightHeader
    m: int
    act: DataType
    out: DataType

    @staticmethod
    def of(header: WeightHeader, m: int, act: DataType, out: DataType) -> LinearProblem:
        return LinearProblem(replace(header, has_columns=False, is_gated=False, global_scale=1.0), m, act, out)

    @property
    def tuned_as(self) -> LinearProblem:
        """The problem that shares its plan with this one, of as many tokens as the bucket has."""
        return replace(self, m=bucket(self.m))

    @property
    def tiles(self) -> tuple[int, int]:
        """Of the weight, along N and K."""
        n, k = self.header.shape
        return -(-n // TILE), -(-k // TILE)

    def key(self, device: str) -> Key:
        """Under which the plan of the bucket is stored. device: the GPU's name."""
        header = self.header
        scheme = (header.scale_dtype, header.mins_dtype, header.has_zeros, header.has_table, header.exact_in_f16)
        parts = (*header.shape, header.dtype.name, header.group, *scheme, header.version, self.act.name, self.out.name)
        return Key(FAMILY, device, json.dumps([*parts, bucket(self.m)]))

    def __str__(self) -> str:
        n, k = self.header.shape
        return f"{n} x {k} {self.header.dtype}, groups of {self.header.group}, M = {self.m}"


@lru_cache(maxsize=4096)  # weights of all layers of a model ask for the same few
def heuristic(problem: LinearProblem, num_sms: int, *, hopper: bool = False) -> Plan:
    """The plan that is used without tuning. hopper: for a GPU with warpgroups (sm_90a)."""
    header = problem.header
    plans = warpgroup_plans(header, problem.m, num_sms, problem.act) if hopper else ()
    return plans[0] if plans else schedule(problem.m, *problem.tiles, header.dtype.nbits, num_sms, header.factor_words)


@lru_cache(maxsize=4096)
def invariant_plans(problem: LinearProblem, num_sms: int, *, hopper: bool = False) -> tuple[Plan, ...]:
    """Plans by which a number of the result has the same bits for every m and N: the best, then those that need fewer
    registers."""
    plans = warpgroup_schedule.invariant_plans(problem.header, problem.m, num_sms) if hopper else ()
    if plans:
        return plans
    planned = replace(problem.header, shape=(INVARIANT_ROWS, problem.header.shape[1]))
    return (heuristic(replace(problem, header=planned, m=1), num_sms),)


def candidates(problem: LinearProblem, num_sms: int, *, hopper: bool = False) -> tuple[Plan, ...]:
    """The heuristic's plan, then others; about ten in all. On Hopper those of warpgroups, then two of the direct kernel."""
    first = heuristic(problem, num_sms)
    others = [plan for plan in _possible(problem, num_sms) if plan != first]
    others.sort(key=lambda plan: estimated_us(plan, problem, num_sms))
    plans = warpgroup_plans(problem.header, problem.m, num_sms, problem.act) if hopper else ()
    if plans:
        direct = (first, *others[:1]) if problem.m <= 16 else ()
        return *plans, *direct
    return first, *others[: CANDIDATES - 1]


def estimated_us(plan: Schedule, problem: LinearProblem, num_sms: int) -> float:
    """Microseconds by a model that is good for an order only: waves of blocks, each as long as its reads or its instructions.

    A multiprocessor reads as fast as memory gives, or as bytes are under way (Little's law); whatever its warps cannot hold in
    registers at once comes in the next wave.
    """
    tiles_n, tiles_k = problem.tiles
    nbits = problem.header.dtype.nbits
    resident = _resident_blocks(plan, problem)
    blocks = -(-tiles_n // plan.rows) * -(-problem.m // plan.tokens) * plan.splits
    busy = min(resident, -(-blocks // num_sms))  # blocks of a multiprocessor in a wave
    step_tiles = plan.warps * plan.stages  # along K in an iteration: the last one may have less to do
    block_tiles = plan.rows * -(-tiles_k // (plan.splits * step_tiles)) * step_tiles
    tile_nbytes = (
        TILE * TILE * nbits // 8 + TILE * plan.tokens * 2 / plan.rows / 4
    )  # activations come from the L2 cache
    under_way = busy * plan.rows * plan.warps * plan.stages * TILE * TILE * nbits // 8
    speed = min(BYTES_PER_NS, under_way / LATENCY_NS)
    reading = busy * block_tiles * tile_nbytes / speed
    issuing = busy * block_tiles * _instructions(plan, problem) / INSTRUCTIONS_PER_NS
    waves = -(-blocks // (num_sms * busy))
    exchange = SPLIT_NS if plan.splits > 1 else 0.0
    return (waves * (max(reading, issuing) + LATENCY_NS) + exchange) / 1000


def _instructions(plan: Schedule, problem: LinearProblem) -> float:
    """Of a warp for a tile of 64 x 64: codes to numbers, products, scales; near the counts in docs/performance.md."""
    return 100 + 20 * problem.header.dtype.nbits + 8 * plan.tokens + problem.header.factor_words


def _registers(plan: Schedule, problem: LinearProblem) -> int:
    """Of a thread: two tiles of sums, codes and factors of every stage, an operand under way, addresses."""
    words = 4 * problem.header.dtype.nbits + problem.header.factor_words
    return 64 + 4 * plan.tokens + plan.tokens // 2 + plan.stages * words


def _resident_blocks(plan: Schedule, problem: LinearProblem) -> int:
    warps = plan.rows * plan.warps
    registers = min(MOST_REGISTERS, max(64, _registers(plan, problem)))
    return max(1, plan.blocks_per_sm, min(MOST_WARPS // warps, REGISTERS // (32 * warps * registers)))


def _possible(problem: LinearProblem, num_sms: int) -> Iterator[Schedule]:
    """Plans that have work for every warp and may have registers enough."""
    tiles_n, tiles_k = problem.tiles
    for tokens in (8,) if problem.m <= 8 else (8, 16, 32):
        for rows, warps in ((1, 2), (1, 4), (1, 8), (1, 16), (2, 4), (2, 8)):
            for stages in (1, 2, 3):
                for splits in _splits(tiles_n, tiles_k, rows, warps, -(-problem.m // tokens), num_sms):
                    plan = Schedule(tokens, rows, warps, stages, splits)
                    for chosen in (plan, replace(plan, blocks_per_sm=2)) if rows * warps == 8 else (plan,):
                        most = min(MOST_REGISTERS, REGISTERS // (32 * rows * warps * chosen.blocks_per_sm))
                        if warps <= tiles_k and rows <= tiles_n and _registers(plan, problem) <= most:
                            yield chosen


def _splits(tiles_n: int, tiles_k: int, rows: int, warps: int, columns: int, num_sms: int) -> Iterator[int]:
    """None, and as many as make one or two blocks for each multiprocessor, each with two steps at least."""
    blocks = -(-tiles_n // rows) * columns
    wanted = {math.floor(share * num_sms / blocks) for share in (1, 2)}
    yield from sorted({1, *(min(count, tiles_k // (2 * warps), 16) for count in wanted if count > 1)} - {0})
