"""How a quantised product is cut into blocks of warpgroups on Hopper: the rule, and plans worth trying beside it.

What decides (measured on an H100, docs/performance.md): blocks that read a weight all run at once and share the memory's
bandwidth evenly, whatever their number; partial sums that cross blocks cost 2 us and more, those of warpgroups in a block
almost nothing. So K is split inside of blocks, and across blocks only where too few of them would read too much each.
"""

from __future__ import annotations

from collections.abc import Iterator
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
# Bytes of codes from which on a block is worth another one along K.
LEAST_SPLIT_NBYTES = 256 * 1024


Overlap = Literal["none", "step", "steps"]


@dataclass(frozen=True)
class WarpgroupPlan:
    """One launch of `warpgroup_linear`.

    tokens: columns of a block's result. rows: tiles of 64 rows a block, each with warpgroups of its own. splits: warpgroups along
    K in a block. blocks: blocks along K, a cluster. depth: tiles of 64 columns a step. stages: steps on their way, a multiple of
    splits, so that a warpgroup sees every phase of its barriers. registers: of each thread that computes, None for as many as fit
    without asking. blocks_per_sm: how many blocks must fit on a multiprocessor. overlap: unpack the next piece while the product
    of the last one is under way, within a step, or that of the next step, too. scaled: multiply weights by their scales, and
    round them, not sums: for so many tokens that there are no registers for the sums of a group beside those of all groups.
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

    def __post_init__(self) -> None:
        held = 2 if self.overlap == "steps" or self.scaled else 1  # they keep a stage until their next one has come
        least = self.splits * held
        if self.stages % self.splits or self.stages < least:
            raise TilusError(f"{self.stages} stages for {self.splits} splits, expected a multiple from {least} up")

    def shape(self, span: int) -> Shape:
        """Of its steps. More pieces a step, where registers of one are to be free while tensor cores read those of another."""
        widest = TILE if self.scaled or self.overlap == "steps" else 2 * TILE
        return Shape(span, self.rows, self.depth, self.tokens, widest)

    def easier(self) -> WarpgroupPlan | None:
        """The next one that needs fewer registers; None when there is none."""
        if self.overlap != "none":
            return replace(self, overlap="none")
        if self.blocks_per_sm > 1:
            return replace(self, blocks_per_sm=1)
        if self.splits > 1:
            return replace(self, splits=1)
        return self.narrower()

    def narrower(self) -> WarpgroupPlan | None:
        """The same for half as many tokens: a row of the result keeps its bits. None when there is none."""
        return replace(self, tokens=self.tokens // 2) if self.tokens > 8 and not self.scaled else None


def stage_nbytes(header: WeightHeader, tokens: int, rows: int, depth: int, act_nbytes: int = 2) -> int:
    """Shared memory of a step: codes, factors and activations."""
    sets = 0 if header.span == WHOLE else max(1, depth * TILE // header.span)
    names = [name for name in (header.scale_dtype, header.mins_dtype) if name is not None]
    factors = sets * TILE * (sum(FACTOR_NBYTES[name] for name in names) + ZERO_NBYTES * header.has_zeros)
    return rows * (depth * 512 * header.dtype.nbits + factors) + tokens * depth * TILE * act_nbytes


def planned(
    header: WeightHeader, tokens: int, rows: int, splits: int, blocks: int, depth: int, nbytes: int, *,
    registers: int | None = None, blocks_per_sm: int = 1, overlap: Overlap = "none", scaled: bool = False, act_nbytes: int = 2,
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
    return WarpgroupPlan(tokens, rows, splits, blocks, depth, stages, registers, blocks_per_sm, overlap, scaled)


def warpgroup_plans(header: WeightHeader, m: int, num_sms: int) -> tuple[WarpgroupPlan, ...]:
    """Plans for m tokens, the rule's choice first; none where the kernel cannot run."""
    n, k = header.shape
    tiles_n, tiles_k = -(-n // TILE), -(-k // TILE)
    if k % TILE:  # factors end with K, steps with a tile
        return ()
    found = [plan for plan in _plans(header, m, tiles_n, tiles_k, num_sms) if plan is not None]
    return tuple(dict.fromkeys(found))


def invariant_plans(header: WeightHeader, m: int, num_sms: int) -> tuple[WarpgroupPlan, ...]:
    """Plans that add up in one order whatever m is, as only the tokens of a block differ; the best first, then fewer tokens."""
    n, k = header.shape
    if k % TILE:
        return ()
    tiles_n, tiles_k = -(-n // TILE), k // TILE
    blocks, depth = _blocks(header, tiles_n, tiles_k, num_sms), _depths(tiles_k, 2)[0]
    most = next((tokens for tokens in (8, 16, 32) if m <= tokens), 64)
    found = (
        planned(header, tokens, 1, 2, blocks, depth, SHARED_NBYTES) for tokens in (64, 32, 16, 8) if tokens <= most
    )
    return tuple(plan for plan in found if plan is not None)


def _blocks(header: WeightHeader, tiles_n: int, tiles_k: int, num_sms: int) -> int:
    """Along K: two where there are few rows of tiles, and much to read in each."""
    return 2 if 2 * tiles_n <= num_sms and tiles_k * 512 * header.dtype.nbits > LEAST_SPLIT_NBYTES else 1


def _plans(header: WeightHeader, m: int, tiles_n: int, tiles_k: int, num_sms: int) -> Iterator[WarpgroupPlan | None]:
    blocks = _blocks(header, tiles_n, tiles_k, num_sms)
    many = tiles_n > num_sms
    if m <= 16:
        yield from _reading(header, 8 if m <= 8 else 16, blocks, many, tiles_k)
    elif m <= 64:
        yield from _between(header, 32 if m <= 32 else 64, blocks, many, tiles_k)
    else:
        yield from _computing(header, m, blocks, tiles_n, tiles_k, num_sms)


def _depths(tiles_k: int, *wanted: int) -> list[int]:
    """The largest power of two up to each wanted one that divides K in tiles, without repetitions."""
    powers = [next(d for d in (8, 4, 2, 1) if d <= depth and tiles_k % d == 0) for depth in wanted]
    return list(dict.fromkeys(powers))


def _reading(
    header: WeightHeader, tokens: int, blocks: int, many: bool, tiles_k: int
) -> Iterator[WarpgroupPlan | None]:
    """The time is that of reading the weight: many warpgroups take turns, each with much on its way."""
    first = 2 if many or blocks == 2 else 4
    for splits in (first, 6 - first):
        for depth in _depths(tiles_k, 4, 2):
            overlap: Overlap = "step" if splits == 2 and blocks == 2 else "none"
            half = planned(header, tokens, 1, splits, blocks, depth, HALF_NBYTES, overlap=overlap)
            whole = planned(header, tokens, 1, splits, blocks, depth, SHARED_NBYTES, overlap=overlap)
            enough = half is not None and half.stages >= 2 * splits  # else a warpgroup waits for its only stage
            yield from (half, whole) if enough else (whole, half)
    for depth in _depths(tiles_k, 4, 2):
        yield planned(header, tokens, 1, 2, 3 - blocks, depth, HALF_NBYTES)
        yield planned(header, tokens, 1, 2, blocks, depth, HALF_NBYTES, blocks_per_sm=2)
        yield planned(header, tokens, 2, 2, blocks, depth, HALF_NBYTES)


def _between(
    header: WeightHeader, tokens: int, blocks: int, many: bool, tiles_k: int
) -> Iterator[WarpgroupPlan | None]:
    """Reading, unpacking and multiplying take about as long: two or three warpgroups, or two blocks, overlap them."""
    wide, narrow = _depths(tiles_k, 4)[0], _depths(tiles_k, 2)[0]
    half = {"blocks_per_sm": 2}
    plans = [
        planned(header, tokens, 1, 2, blocks, wide, SHARED_NBYTES, overlap="step"),
        planned(header, tokens, 1, 3, blocks, narrow, SHARED_NBYTES, overlap="steps" if tokens == 64 else "none"),
        planned(header, tokens, 1, 2, blocks, narrow, SHARED_NBYTES),
        planned(header, tokens, 1, 2 if tokens == 32 else 1, blocks, narrow, HALF_NBYTES, **half),
        planned(header, tokens, 2, 1, blocks, narrow, SHARED_NBYTES),
        planned(header, tokens, 1, 2, 3 - blocks, wide, SHARED_NBYTES, overlap="step"),
        planned(header, tokens, 1, 1, blocks, narrow, HALF_NBYTES, **half),
    ]
    first = 3 if many else 2 if tokens == 64 and blocks == 2 else 1 if tokens == 32 and blocks == 1 else 0
    yield plans[first]
    yield from plans


# Microseconds of an H100 for a step of 128 columns, by the rows and tokens of a block.
STEP_US = {(1, 128): 0.43, (2, 128): 0.79, (1, 256): 0.70, (2, 256): 1.33}


def _computing(
    header: WeightHeader, m: int, blocks: int, tiles_n: int, tiles_k: int, num_sms: int
) -> Iterator[WarpgroupPlan | None]:
    """The time is that of tensor cores: the tiles whose waves take least. Two row tiles take turns with two warpgroups in one."""
    depth = _depths(tiles_k, 2)[0]
    shapes = {
        (1, 128): planned(header, 128, 1, 2, blocks if m <= 128 else 1, depth, SHARED_NBYTES, registers=208),
        (2, 128): planned(header, 128, 2, 1, 1, depth, SHARED_NBYTES, registers=232, overlap="steps"),
        (1, 256): planned(header, 256, 1, 1, 1, depth, SHARED_NBYTES, registers=232, scaled=True),
        (2, 256): planned(header, 256, 2, 1, 1, depth, SHARED_NBYTES, registers=232, scaled=True),
    }

    def waves_us(shape: tuple[int, int]) -> float:
        rows, tokens = shape
        return -(-(-(-tiles_n // rows) * -(-m // tokens)) // num_sms) * STEP_US[shape]

    fitting = [shape for shape in shapes if m > 128 or shape[1] == 128]
    yield from (shapes[shape] for shape in sorted(fitting, key=waves_us))
    yield planned(header, 128, 2, 1, 1, depth, SHARED_NBYTES, registers=232)
    yield planned(header, 128, 1, 1, 1, depth, HALF_NBYTES, blocks_per_sm=2)
