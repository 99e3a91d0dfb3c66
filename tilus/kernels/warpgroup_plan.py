"""One launch of the quantised product on Hopper: how it is cut into blocks of warpgroups, and what it needs of shared memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from tilus.errors import TilusError
from tilus.kernels.quantize.header import FACTOR_NBYTES, ZERO_NBYTES, WeightHeader
from tilus.kernels.quantize.tiles import TILE, WHOLE
from tilus.kernels.warpgroup_operands import Shape

SHARED_NBYTES = 227 * 1024
HALF_NBYTES = 112 * 1024  # so that a block of the next kernel, or another of this one, has room beside it
STORED_TOKENS = 32  # of a block at a time: results pass through shared memory
SLACK_NBYTES = 2048  # barriers, alignment
MOST_STAGES = 24

Overlap = Literal["none", "others", "step", "steps"]
Unit = Literal["wgmma", "mma"]


@dataclass(frozen=True)
class WarpgroupPlan:
    """One launch of `warpgroup_linear`.

    tokens: columns of a block's result. rows: tiles of 64 rows a block, each with warpgroups of its own. splits: warpgroups along
    K in a block. blocks: blocks along K, a cluster. depth: tiles of 64 columns a step. stages: steps on their way, a multiple of
    splits, so that a warpgroup sees every phase of its barriers. registers: of each thread that computes, None for as many as fit
    without asking. blocks_per_sm: how many blocks must fit on a multiprocessor. overlap: unpack the next piece while the product
    of the last one is under way, within a step, or that of the next step, too; "others": wait for it, in few registers, while
    other warpgroups unpack. scaled: multiply weights by their scales, and round them, not sums: for so many tokens that there
    are no registers for the sums of a group beside those of all groups, for groups of few columns, and for minimums. unit: what
    multiplies, warpgroups, or the products of single warps, for which each loads all activations. sharing: blocks of a cluster,
    with different rows, that bring parts of the same activations for each other. launched: so many blocks compute tiles one
    after the other, 0: each block one. streamed: they have equal shares of the steps of all tiles.
    """

    tokens: int
    rows: int
    splits: int
    blocks: int
    depth: int
    stages: int
    registers: int | None = None
    blocks_per_sm: int = 1
    overlap: Overlap = "none"
    scaled: bool = False
    unit: Unit = "wgmma"
    sharing: int = 1
    launched: int = 0
    streamed: bool = False

    def __post_init__(self) -> None:
        held = 2 if self.overlap == "steps" or self.scaled else 1  # they keep a stage until their next one has come
        least = self.splits * held
        if self.stages % self.splits or self.stages < least:
            raise TilusError(f"{self.stages} stages for {self.splits} splits, expected a multiple from {least} up")
        if self.launched and self.blocks > 1:
            raise TilusError(f"{self.launched} blocks that take turns with {self.blocks} along K, expected 1 along K")
        if self.launched % self.sharing:
            raise TilusError(f"{self.launched} blocks of which {self.sharing} share tokens, expected a multiple")
        if self.streamed and (not self.launched or self.sharing > 1):
            raise TilusError(
                f"{self.launched} blocks with equal shares of all steps, {self.sharing} sharing tokens, expected 1 or more, 1"
            )

    @property
    def overlaps(self) -> bool:
        """Whether the last of several tiles begins with tokens of the one in front, so that none lie behind the end: copies take
        long for those (docs/performance.md). Small tiles have so few of them that it shows less than what it takes. With equal
        shares of steps a token's bits would depend on which of its two tiles is stored last, as they are cut in different places.
        """
        return self.tokens > 64 and not self.streamed

    def shape(self, span: int) -> Shape:
        """Of its steps. More pieces a step, where registers of one are to be free while tensor cores read those of another."""
        widest = TILE if self.scaled or self.overlap in ("others", "steps") else 2 * TILE
        return Shape(span, self.rows, self.depth, self.tokens, widest)

    def easier(self) -> WarpgroupPlan | None:
        """The next one that needs fewer registers; None when there is none."""
        if self.launched:
            return replace(self, launched=0, streamed=False, sharing=1)
        if self.overlap in ("step", "steps"):
            return replace(self, overlap="none")
        if self.blocks_per_sm > 1:
            return replace(self, blocks_per_sm=1)
        if self.splits > 1 and self.depth > 2:  # fewer factors at a time, but not twice as many sets of them
            stages = min(2 * self.stages - self.splits, MOST_STAGES)
            return replace(self, depth=self.depth // 2, stages=stages - stages % self.splits)
        if self.splits > 1:
            return replace(self, splits=1)
        if self.scaled:
            return replace(self, scaled=False, tokens=_half(self.tokens))
        return self.narrower()

    def with_wide_results(self, header: WeightHeader) -> WarpgroupPlan:
        """With fewer stages where there would be no room beside results of 32 bits: plans are made for those of 16."""
        plan, each = self, stage_nbytes(header, self.tokens, self.rows, self.depth)
        stored = min(self.tokens, STORED_TOKENS) * self.rows * TILE * 4
        sums = (self.splits - 1 + self.blocks - 1) * self.tokens * self.rows * TILE * 4
        held = 2 if self.overlap == "steps" or self.scaled else 1
        while (
            plan.stages * each + stored + sums > SHARED_NBYTES - SLACK_NBYTES
            and plan.stages - plan.splits >= plan.splits * held
        ):
            plan = replace(plan, stages=plan.stages - plan.splits)
        return plan

    def narrower(self) -> WarpgroupPlan | None:
        """The same for half as many tokens, or fewer: a row of the result keeps its bits. None when there is none."""
        return replace(self, tokens=_half(self.tokens)) if self.tokens > 8 and not self.scaled else None


def _half(tokens: int) -> int:
    """Of the tokens of a block, or some fewer."""
    half = tokens // 2
    return half // (least := STORED_TOKENS if half >= STORED_TOKENS else 8) * least


def stage_nbytes(header: WeightHeader, tokens: int, rows: int, depth: int, act_nbytes: int = 2) -> int:
    """Shared memory of a step: codes, factors and activations."""
    sets = 0 if header.span == WHOLE else max(1, depth * TILE // header.span)
    names = [name for name in (header.scale_dtype, header.mins_dtype) if name is not None]
    factors = sets * TILE * (sum(FACTOR_NBYTES[name] for name in names) + ZERO_NBYTES * header.has_zeros)
    return rows * (depth * 512 * header.dtype.nbits + factors) + tokens * depth * TILE * act_nbytes


def planned(
    header: WeightHeader, tokens: int, rows: int, splits: int, blocks: int, depth: int, nbytes: int, *,
    registers: int | None = None, blocks_per_sm: int = 1, overlap: Overlap = "none", scaled: bool = False,
    unit: Unit = "wgmma", sharing: int = 1, launched: int = 0, streamed: bool = False, act_nbytes: int = 2,
) -> WarpgroupPlan | None:  # fmt: skip
    """The plan with as many stages as `nbytes` of shared memory hold; None when they are too few."""
    sums = (splits - 1 + blocks - 1) * tokens * rows * TILE * 4
    stored = min(tokens, STORED_TOKENS) * rows * TILE * 2
    stages = min(
        (nbytes - SLACK_NBYTES - stored - sums) // stage_nbytes(header, tokens, rows, depth, act_nbytes), MOST_STAGES
    )
    stages -= stages % splits
    if stages < max(2, splits * (2 if overlap == "steps" or scaled else 1)):
        return None
    return WarpgroupPlan(
        tokens, rows, splits, blocks, depth, stages, registers, blocks_per_sm, overlap, scaled, unit, sharing, launched,
        streamed,
    )  # fmt: skip
