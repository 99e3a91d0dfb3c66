"""How a dense product is cut into tiles and blocks on Hopper: plans, and the model by which the rule chooses one.

What decides (measured on an H100, docs/performance.md): up to 128 tokens the read of the weight, which one tile of tokens does
once; beyond that tensor cores, where tiles are large enough that neither shared memory nor the L2 cache keeps them waiting.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from tilus.errors import TilusError
from tilus.target import TARGETS

GROUP_ROWS = 64  # outputs of a tile for each warpgroup
ROW_NBYTES = 128  # of a stage's rows: the widest swizzle
MOST_STAGES = 16
SLACK_NBYTES = 2048  # barriers, alignment
SHARED_NBYTES = TARGETS["sm_90a"].max_shared_nbytes
WIDTHS = (64, 96, 128, 192, 256)  # tokens of a tile, where there are many tiles
FEW_TILES = 4  # of tokens, up to which others make a difference
READ_ONCE_TOKENS = 128  # up to which one tile takes all of them
TURNS_TOKENS = 64  # up to which two warpgroups that take turns along K are never slower than one, and often faster
LEAST_UNDER_WAY = 128 * 1024  # bytes of a block's stages; with fewer, copies take longer than what they wait for
LEAST_STEPS = 4  # of a part of K: below that starting and adding up take longer than the steps

# The model's H100. Times overlap softly: the largest counts most.
START_US = 1.7
STEP_US = 0.05  # of a step, however small
STORE_US = 0.4  # of a tile of 128 x 256
PARTS_US = 5.4  # of the sums of two blocks that meet
READ_NBYTES_PER_US = 3.05e6
CACHE_NBYTES_PER_US = 16e6  # of all multiprocessors
SHARED_NBYTES_PER_US = 390e3  # of one
PRODUCTS_PER_US = 3.565e6  # of one, of 16-bit numbers
REREAD = 1.2  # the memory's time where several tiles read a weight at once
UNALIGNED = 2.5  # the cache's time where rows are no multiples of ROW_NBYTES
SHARING_X, SHARING_W = 1.25, 1.05  # a step's time where blocks bring parts for each other
SHARPNESS = 4


@dataclass(frozen=True)
class Plan:
    """One launch of `gemm_kernel`.

    tokens: columns of a tile. groups: warpgroups along its rows, 64 each. splits: warpgroups along K. stages: steps on their
    way, two or more for each split, as it keeps one until the next has come, and a multiple, so that it sees every phase of its
    barriers; 0 where that is still to be found. blocks: of a cluster, along K. share_x, share_w: of a cluster, that bring parts
    of the same activations and of the same weights. once: each weight is read by one tile only. launched: blocks of the grid,
    whole clusters.
    """

    tokens: int
    groups: int
    splits: int
    stages: int
    blocks: int = 1
    share_x: int = 1
    share_w: int = 1
    once: bool = False
    launched: int = 0

    def __post_init__(self) -> None:
        if self.stages and (self.stages < 2 * self.splits or self.stages % self.splits):
            raise TilusError(
                f"{self.stages} stages for {self.splits} splits, expected a multiple from {2 * self.splits} up"
            )

    @property
    def rows(self) -> int:
        return GROUP_ROWS * self.groups

    @property
    def team(self) -> int:
        """Blocks of a cluster."""
        return self.blocks * self.share_x * self.share_w

    @property
    def warpgroups(self) -> int:
        """That multiply."""
        return self.groups * self.splits

    @property
    def stored(self) -> int:
        """Tokens that are stored at once."""
        return next(part for part in (64, 48, 32, 16, 8) if self.tokens % part == 0)

    @property
    def registers(self) -> int | None:
        """Of a thread that multiplies; None for as many as it is launched with."""
        return None if self.tokens <= 64 else 232

    @property
    def copiers(self) -> int:
        """Warps that bring operands: a warpgroup where it gives registers away."""
        return 1 if self.registers is None else 4

    @property
    def warps(self) -> int:
        return 4 * self.warpgroups + self.copiers

    @property
    def stage_nbytes(self) -> int:
        """Of both operands."""
        return (self.rows + self.tokens) * ROW_NBYTES

    def tiles(self, m: int, n: int) -> int:
        """Of a product [m, n], in whole clusters; those that blocks share along K count for each."""
        rows, tokens = self.rows * self.share_x, self.tokens * self.share_w
        return -(-n // rows) * -(-m // tokens) * self.team


@dataclass(frozen=True)
class Product:
    """What of a product [m, k] x [n, k]^T decides about plans: rows of operands in bytes, and the size of results."""

    m: int
    n: int
    row_nbytes: int
    out_nbytes: int
    num_sms: int

    @property
    def steps(self) -> int:
        return -(-self.row_nbytes // ROW_NBYTES)


def plan(product: Product) -> Plan:
    """The fastest one by the model."""
    return min(possible(product), key=lambda found: estimated_us(found, product))


def invariant_plan(product: Product) -> Plan:
    """The fastest one by the model of those that add up along K in one way."""
    alone = (found for found in possible(product, turns=False) if found.blocks == 1)
    return min(alone, key=lambda found: estimated_us(found, product))


def possible(product: Product, *, turns: bool = True) -> Iterator[Plan]:
    """Plans for which there is room. turns: whether warpgroups may take turns along K."""
    for form in _forms(product, turns):
        stages = stages_of(form, product.out_nbytes)
        if stages >= 2 * form.splits and stages * form.stage_nbytes >= LEAST_UNDER_WAY:
            yield launched(replace(form, stages=stages), product.m, product.n, product.num_sms)


def _forms(product: Product, may_turn: bool) -> Iterator[Plan]:
    """Plans without stages, whose tiles are not mostly padding and whose parts of K are not too short."""
    m, n = product.m, product.n
    for tokens, groups, blocks in itertools.product(_widths(m), (1, 2), (1, 2)):
        if groups > 1 and n <= GROUP_ROWS:
            continue
        turns = may_turn and groups == 1 and tokens <= TURNS_TOKENS and product.steps >= 2 * LEAST_STEPS * blocks
        alone = Plan(tokens, groups, 2 if turns else 1, 0, blocks, once=m <= tokens)
        num_tiles = alone.tiles(m, n)
        if blocks > 1 and (num_tiles > product.num_sms or product.steps < LEAST_STEPS * blocks * alone.splits):
            continue
        yield alone
        for share_x, share_w in ((2, 1), (1, 2)):
            shared = replace(alone, share_x=share_x, share_w=share_w)
            if blocks == 1 and product.num_sms > 1 and shared.tiles(m, n) == num_tiles:
                yield shared


def _widths(m: int) -> tuple[int, ...]:
    """Of tiles for m tokens. A few have as many each: those that the last one lacks are computed all the same."""
    if m <= READ_ONCE_TOKENS:
        return (-(-m // 16) * 16,)
    equal = (-(-m // (count * 16)) * 16 for count in range(1, FEW_TILES + 1))
    return tuple(dict.fromkeys(width for width in (*equal, *WIDTHS) if WIDTHS[0] <= width <= WIDTHS[-1]))


def stages_of(plan: Plan, out_nbytes: int) -> int:
    """How many a plan has room for."""
    sums = (plan.splits - 1 + plan.blocks - 1) * plan.rows * plan.tokens * 4
    stored = 2 * plan.stored * plan.rows * out_nbytes
    room = SHARED_NBYTES - SLACK_NBYTES - sums - stored
    stages = min(room // plan.stage_nbytes, MOST_STAGES)
    return stages - stages % plan.splits


def launched(plan: Plan, m: int, n: int, num_sms: int) -> Plan:
    """The plan with as many blocks as it has tiles, or as run at once."""
    return replace(plan, launched=min(plan.tiles(m, n), max(num_sms // plan.team, 1) * plan.team))


def estimated_us(plan: Plan, product: Product) -> float:
    """Microseconds of a plan: rounds of tiles, beside the read of the weight from memory.

    On 459 measured plans of 36 products it is wrong by 14 % in the mean, and the rule's choice by 1 % of the best one's time.
    """
    rows, tokens = plan.rows, plan.tokens
    brought = rows / plan.share_w + tokens / plan.share_x  # rows of a step that a block asks the cache for
    by_cache = plan.launched * brought * ROW_NBYTES / CACHE_NBYTES_PER_US
    if product.row_nbytes % ROW_NBYTES:
        by_cache *= UNALIGNED
    moved = plan.groups * (GROUP_ROWS + tokens) + rows + tokens  # rows of a step that tensor cores and copies touch
    by_shared_memory = STEP_US + moved * ROW_NBYTES / SHARED_NBYTES_PER_US
    by_products = rows * tokens * (ROW_NBYTES / 2) / PRODUCTS_PER_US
    step = _overlapped(by_products, by_cache, by_shared_memory)
    if plan.share_x > 1:
        step *= SHARING_X
    if plan.share_w > 1:
        step *= SHARING_W
    tile = product.steps / plan.blocks * step + STORE_US * rows * tokens / (128 * 256)
    if plan.blocks > 1:
        tile += PARTS_US
    rounds = -(-plan.tiles(product.m, product.n) // plan.launched)
    read = product.n * product.row_nbytes / READ_NBYTES_PER_US
    if product.m > tokens and plan.share_w == 1:
        read *= REREAD
    return START_US + _overlapped(rounds * tile, read)


def _overlapped(*times: float) -> float:
    """Of what goes on at once."""
    return sum(time**SHARPNESS for time in times) ** (1 / SHARPNESS)
