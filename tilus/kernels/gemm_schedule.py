"""How a dense product is cut into tiles and blocks on Hopper: plans, the room that they need, and the rule."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tilus.target import TARGETS

BAND = 8  # neighbouring rows of clusters that take turns, so that what they read is found in the L2 cache
GROUP_ROWS = 64  # outputs of a tile for each warpgroup
ROW_NBYTES = 128  # of a stage's rows: the widest swizzle
MOST_STAGES = 16
SLACK_NBYTES = 2048  # barriers, alignment
SHARED_NBYTES = TARGETS["sm_90a"].max_shared_nbytes
HALF_NBYTES = (
    SHARED_NBYTES // 2 - 1024
)  # so that a block of the next kernel, or another of this one, has room beside it


@dataclass(frozen=True)
class Plan:
    """One launch of `gemm_kernel`.

    tokens: columns of a tile. groups: warpgroups along its rows, 64 each. splits: warpgroups along K. stages: steps on their way,
    a multiple of splits, so that a warpgroup sees every phase of its barriers. blocks: of a cluster, along K. share_x, share_w: of
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
    return replace(plan, stages=stages) if stages >= max(2, plan.splits) else None


def launched(plan: Plan, m: int, n: int, num_sms: int) -> Plan:
    """The plan with as many blocks as it has tiles, or as run at once."""
    most = num_sms * plan.blocks_per_sm // plan.team * plan.team
    return replace(plan, launched=min(plan.tiles(m, n), max(most, plan.team)))
