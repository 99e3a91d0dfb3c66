"""How a dense product is cut into tiles and blocks on Hopper: plans, the room that they need, and the rule."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from tilus.errors import TilusError
from tilus.target import TARGETS

BAND = 8  # neighbouring rows of clusters that take turns, so that what they read is found in the L2 cache
GROUP_ROWS = 64  # outputs of a tile for each warpgroup
ROW_NBYTES = 128  # of a stage's rows: the widest swizzle
MOST_STAGES = 24
WIDTHS = (16, 32, 64, 96, 128, 192, 256)  # tokens of a tile
MOST_OF_TWO = 192  # tokens of the warpgroups of a block that leaves registers for another one
LEAST_STEPS = 4  # of a part of K: below that starting and adding up take longer than the steps
SLACK_NBYTES = 2048  # barriers, alignment
SHARED_NBYTES = TARGETS["sm_90a"].max_shared_nbytes
HALF_NBYTES = (
    SHARED_NBYTES // 2 - 1024
)  # so that a block of the next kernel, or another of this one, has room beside it


@dataclass(frozen=True)
class Plan:
    """One launch of `gemm_kernel`.

    tokens: columns of a tile. groups: warpgroups along its rows, 64 each. splits: warpgroups along K. stages: steps on their way,
    two or more for each split, as it keeps one until the next has come, and a multiple, so that it sees every phase of its
    barriers. blocks: of a cluster, along K. share_x, share_w: of
    a cluster, that bring parts of the same activations and of the same weights. stored: tokens that are stored at once.
    blocks_per_sm: how many must fit on a multiprocessor. launched: blocks of the grid, whole clusters.
    """

    tokens: int
    groups: int
    splits: int
    stages: int
    blocks: int = 1
    share_x: int = 1
    share_w: int = 1
    stored: int = 64
    blocks_per_sm: int = 1
    band: int = 8
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
    def registers(self) -> int | None:
        """Of a thread that multiplies; None for as many as it is launched with."""
        if self.tokens <= 64 or self.warpgroups > 3 or (self.warpgroups == 3 and self.tokens <= 128):
            return None
        if self.blocks_per_sm > 1:
            return None
        return 160 if self.warpgroups == 3 else 232

    @property
    def copiers(self) -> int:
        """Warps that bring operands: a warpgroup where it gives registers away."""
        return 1 if self.registers is None else 4

    @property
    def copier_registers(self) -> int | None:
        return None if self.registers is None else 24 if self.warpgroups == 3 else 40

    @property
    def warps(self) -> int:
        return 4 * self.warpgroups + self.copiers

    def tiles(self, m: int, n: int) -> int:
        """Of a product [m, n], in whole clusters."""
        rows, tokens = self.rows * self.share_x, self.tokens * self.share_w
        return -(-n // rows) * -(-m // tokens) * self.team


def with_stages(plan: Plan, out_nbytes: int, nbytes: int = SHARED_NBYTES) -> Plan | None:
    """The plan with as many stages as `nbytes` of shared memory hold; None where that is less than it takes."""
    sums = (plan.splits - 1 + plan.blocks - 1) * plan.rows * plan.tokens * 4
    stored = 2 * plan.stored * plan.rows * out_nbytes
    stages = min((nbytes - SLACK_NBYTES - sums - stored) // ((plan.rows + plan.tokens) * ROW_NBYTES), MOST_STAGES)
    stages -= stages % plan.splits
    return replace(plan, stages=stages) if stages >= 2 * plan.splits else None


def launched(plan: Plan, m: int, n: int, num_sms: int) -> Plan:
    """The plan with as many blocks as it has tiles, or as run at once."""
    most = num_sms * plan.blocks_per_sm // plan.team * plan.team
    return replace(plan, launched=min(plan.tiles(m, n), max(most, plan.team)))


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


def estimated_us(plan: Plan, product: Product) -> float:
    return 1.0


def possible(product: Product) -> Iterator[Plan]:
    """Plans whose tiles are not mostly padding and whose parts of K are not too short."""
    fewest = next((tokens for tokens in WIDTHS if tokens >= product.m), WIDTHS[-1])
    for tokens, groups, splits, blocks in itertools.product(WIDTHS, (1, 2, 3), (1, 2), (1, 2, 4)):
        if not fewest // 8 <= tokens <= fewest or (groups > 1 and product.n <= GROUP_ROWS * (groups - 1)):
            continue
        if groups * splits > (2 if tokens > 192 else 3) or splits * blocks > max(1, product.steps // LEAST_STEPS):
            continue
        stored = next(part for part in (64, 48, 32, 16) if tokens % part == 0 and part <= tokens)
        plan = Plan(tokens, groups, splits, 0, blocks, stored=stored)
        if blocks > 1:
            if plan.tiles(product.m, product.n) <= product.num_sms:
                yield from _rooms(plan, product)
            continue
        yield from _rooms(plan, product)
        for share_x, share_w in ((2, 1), (1, 2)):
            shared = replace(plan, share_x=share_x, share_w=share_w)
            if (
                tokens >= 64
                and product.num_sms > 1
                and shared.tiles(product.m, product.n) == plan.tiles(product.m, product.n)
            ):
                yield from _rooms(shared, product)


def _rooms(plan: Plan, product: Product) -> Iterator[Plan]:
    """With all the shared memory of a multiprocessor, and with half of it, so that two blocks have room."""
    whole = with_stages(plan, product.out_nbytes)
    if whole is not None:
        yield launched(whole, product.m, product.n, product.num_sms)
    if plan.warpgroups * plan.tokens <= MOST_OF_TWO and plan.warpgroups <= 2 and plan.team == plan.blocks:
        half = with_stages(replace(plan, blocks_per_sm=2), product.out_nbytes, HALF_NBYTES)
        if half is not None:
            yield launched(half, product.m, product.n, product.num_sms)
