"""Which plans the quantised product on Hopper has: the rule, and others worth trying beside it.

What decides (measured on an H100, docs/performance.md): blocks that read a weight all run at once and share the memory's
bandwidth evenly, whatever their number; partial sums that cross blocks cost 2 us and more, those of warpgroups in a block
almost nothing. So K is split inside of blocks, and across blocks only where too few of them would read too much each.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from tilus.dtypes import DataType, bf16, f16
from tilus.kernels.quantize.header import WeightHeader
from tilus.kernels.quantize.tiles import SMALLEST_GROUP, TILE, WHOLE
from tilus.kernels.warpgroup_plan import HALF_NBYTES, SHARED_NBYTES, Overlap, Unit, WarpgroupPlan, planned

# Bytes of codes of a row of tiles, beyond which another block along K is worth it: while they are read, or multiplied, too.
LEAST_SPLIT_NBYTES = {"reading": 256 * 1024, "computing": 128 * 1024 - 1}
# Tiles along K up to which half as many tokens a block, and so twice as many blocks, cost less than sums across two blocks along
# K: where a block without either has more tokens than so many.
MOST_HALVED_K = {64: 176, 32: 96}

LEAST_IDLE, MUCH_IDLE = 1.05, 1.3  # waves of tiles, in times of full ones
LONG_K = 96  # tiles along K from which on equal shares of steps save more, where much would be idle, than meeting costs
# Waves of tiles from which on blocks that take several save more than idle ones at the end cost.
LEAST_WAVES = 4
# Tokens of a tile, of plans for more than 64; with equal shares no registers are left for more than MOST_STREAMED.
LEAST_TILE, MOST_TILE, MOST_STREAMED = 80, 256, 208
# What tensor cores of an H100 take for a step of 128 columns, microseconds of a block and of each of its tokens, by rows of
# tiles, whether it is scaled, and streamed, and blocks a multiprocessor: fitted to results/h100/gemm_plans_any_tokens.json.
STEP_US = {
    (1, False, False, 1): (0.146, 2.36e-3),
    (2, False, False, 1): (0.310, 3.62e-3),
    (1, False, False, 2): (0.182, 4.98e-3),
    (1, True, False, 1): (0.282, 1.70e-3),
    (2, True, False, 1): (0.245, 4.42e-3),
    (2, False, True, 1): (0.300, 5.00e-3),
    (2, True, True, 1): (0.292, 4.34e-3),
}
TOKEN_US = 22.9e-6  # the same columns of a token take to arrive for a row of tiles, while all blocks ask for theirs
# Where blocks with equal shares meet in tiles, and for sums of two blocks along K.
MEETING_US, CROSSING_US = 5.9, 2.2
MOST_COMPUTING = 7  # plans in the order of their times by this model


def warpgroup_plans(header: WeightHeader, m: int, num_sms: int, act: DataType = f16) -> tuple[WarpgroupPlan, ...]:
    """Plans for m tokens of a type, the rule's choice first; none where the kernel cannot run."""
    n, k = header.shape
    tiles_n, tiles_k = -(-n // TILE), -(-k // TILE)
    if k % TILE:  # factors end with K, steps with a tile
        return ()
    found = [plan for plan in _plans(header, m, tiles_n, tiles_k, num_sms, act) if plan is not None]
    return tuple(dict.fromkeys(found))


def invariant_plans(header: WeightHeader, m: int, num_sms: int) -> tuple[WarpgroupPlan, ...]:
    """Plans that add up in one order whatever m and N are, as only the tokens of a block differ; the best first, then fewer
    tokens."""
    _, k = header.shape
    if k % TILE:
        return ()
    tiles_k = k // TILE
    blocks, depth = _blocks(header, 1, tiles_k, num_sms, 1), _depths(tiles_k, 2)[0]
    most = next((tokens for tokens in (8, 16, 32) if m <= tokens), 64)
    found = (
        planned(header, tokens, 1, 2, blocks, depth, SHARED_NBYTES) for tokens in (64, 32, 16, 8) if tokens <= most
    )
    return tuple(plan for plan in found if plan is not None)


def _blocks(header: WeightHeader, tiles_n: int, tiles_k: int, num_sms: int, m: int) -> int:
    """Along K: two where there are few rows of tiles, and much to do in each."""
    least = LEAST_SPLIT_NBYTES["reading" if m <= 32 else "computing"]
    return 2 if 2 * tiles_n <= num_sms and tiles_k * 512 * header.dtype.nbits > least else 1


def _plans(
    header: WeightHeader, m: int, tiles_n: int, tiles_k: int, num_sms: int, act: DataType
) -> Iterator[WarpgroupPlan | None]:
    tokens = _tokens(m, tiles_n, tiles_k, num_sms)
    shared = -(-m // tokens)  # blocks with the same rows
    blocks = _blocks(header, tiles_n * shared, tiles_k, num_sms, m)
    if _scales_weights(header, act) and m > _least_scaled(header) and tokens <= 64:
        yield from _scaling(header, tokens, blocks, tiles_n, tiles_k, num_sms)
    if m <= 16:
        yield from _reading(header, 8 if m <= 8 else 16, blocks, tiles_n, tiles_k, num_sms)
    elif tokens <= 64:
        yield from _between(header, tokens, shared > 1, blocks, tiles_n, tiles_k, num_sms)
    if m > 64:
        blocks = _blocks(header, tiles_n, tiles_k, num_sms, m)
        yield from _computing(header, m, blocks, tiles_n, tiles_k, num_sms, act)


def _tokens(m: int, tiles_n: int, tiles_k: int, num_sms: int) -> int:
    """Of a block: as many as there are, or half of them, or a quarter, where there are too few rows of tiles for the GPU."""
    parts = -(-m // 128)
    while True:
        tokens = -(-m // parts)
        most = next((most for least, most in MOST_HALVED_K.items() if tokens > least), 0)
        if 2 * tiles_n * parts > num_sms or tiles_k > most:
            return width_of(tokens)
        parts *= 2


def width_of(tokens: int, most_eights: int = 64) -> int:
    """Of a tile for so many tokens: those behind the last one take long to copy (docs/performance.md). A multiple of 8, beyond
    most_eights of 16, so that there are not too many kernels."""
    unit = 8 if tokens <= most_eights else 16
    return -(-tokens // unit) * unit


def _depths(tiles_k: int, *wanted: int) -> list[int]:
    """The largest power of two up to each wanted one that divides K in tiles, without repetitions."""
    powers = [next(d for d in (8, 4, 2, 1) if d <= depth and tiles_k % d == 0) for depth in wanted]
    return list(dict.fromkeys(powers))


def _reading(
    header: WeightHeader, tokens: int, blocks: int, tiles_n: int, tiles_k: int, num_sms: int
) -> Iterator[WarpgroupPlan | None]:
    """The time is that of reading the weight: many warpgroups take turns, each with much on its way.

    wgmma takes as long for 8 or 16 columns as for 26, so up to 8 tokens single warps multiply faster; at 16 that is so only for
    what takes long to unpack, or has sums of activations to multiply, too.
    """
    nbits, many = header.dtype.nbits, tiles_n > num_sms
    slow = nbits == 2 or (nbits == 3 and header.has_zeros) or header.mins_dtype is not None
    if nbits > 2 and not slow:
        yield from _four_warpgroups(header, tokens, tiles_n, tiles_k, num_sms)
    units: tuple[Unit, ...] = ("mma", "wgmma") if blocks == 1 and (tokens == 8 or slow) else ("wgmma", "mma")
    first = 2 if many or blocks == 2 else 4
    if units[0] == "mma" and (tokens == 16 or nbits <= 2):  # few bytes on their way: deep steps
        depth = _depths(tiles_k, 4 if tokens == 16 else 8)[0]
        deep = [planned(header, tokens, 1, 3, blocks, depth, room, unit="mma") for room in (HALF_NBYTES, SHARED_NBYTES)]
        yield from (plan for plan in deep if plan is not None and plan.stages >= 2 * plan.splits)
    # Scales of four tiles of short groups leave no registers for 16 tokens, but where two blocks share K.
    depths = _depths(tiles_k, 2) if _is_short(header) and tokens == 16 and blocks == 1 else _depths(tiles_k, 4, 2)
    for unit in units:
        for splits in (first, 6 - first) if unit == units[0] else (first,):
            for depth in depths:
                overlap: Overlap = "step" if splits == 2 and blocks == 2 and unit == "wgmma" else "none"
                half = planned(header, tokens, 1, splits, blocks, depth, HALF_NBYTES, overlap=overlap, unit=unit)
                whole = planned(header, tokens, 1, splits, blocks, depth, SHARED_NBYTES, overlap=overlap, unit=unit)
                enough = half is not None and half.stages >= 2 * splits  # else a warpgroup waits for its only stage
                yield half if enough else whole
                if unit == units[0] and splits == first:
                    yield whole if enough else half
    depth = _depths(tiles_k, 4)[0]
    yield planned(header, tokens, 1, 2, 3 - blocks, depth, HALF_NBYTES)
    yield planned(header, tokens, 1, 2, blocks, depth, HALF_NBYTES, blocks_per_sm=2)


def _streams(tiles: int, num_sms: int) -> bool:
    """Whether waves of whole tiles leave so many blocks idle that equal shares of all steps, of a tile at least, are worth a try.

    Up to 64 tokens whole tiles are mostly faster all the same: blocks in step find each other's activations in the L2 cache.
    """
    waves = -(-tiles // num_sms)
    return tiles >= num_sms and waves * num_sms > LEAST_IDLE * tiles


def _scaling(
    header: WeightHeader, tokens: int, blocks: int, tiles_n: int, tiles_k: int, num_sms: int
) -> Iterator[WarpgroupPlan | None]:
    """Weights times scales, in as many warpgroups as registers suffice for."""
    fit = partial(planned, header, tokens, depth=_depths(tiles_k, 2)[0], scaled=True)
    if tiles_n > num_sms:
        yield fit(rows=2, splits=1, blocks=1, nbytes=HALF_NBYTES, blocks_per_sm=2)
    first = 4 if tokens <= 16 else 2 if blocks == 2 and tokens > 32 else 3
    for splits in (first, 3 if first != 3 else 2):
        yield fit(rows=1, splits=splits, blocks=blocks, nbytes=SHARED_NBYTES)


def _between(
    header: WeightHeader, tokens: int, shared: bool, blocks: int, tiles_n: int, tiles_k: int, num_sms: int
) -> Iterator[WarpgroupPlan | None]:
    """Reading, unpacking and multiplying take about as long: two or three warpgroups, or two blocks, overlap them.

    shared: several blocks have the same rows, and other tokens.
    """
    wide, narrow, many = _depths(tiles_k, 4)[0], _depths(tiles_k, 2)[0], tiles_n > num_sms
    half = {"blocks_per_sm": 2}
    yield from _four_warpgroups(header, tokens, tiles_n, tiles_k, num_sms)
    plans = [
        planned(header, tokens, 1, 2, blocks, wide, SHARED_NBYTES, overlap="step"),
        planned(header, tokens, 1, 3, blocks, narrow, SHARED_NBYTES, overlap="steps" if tokens > 32 else "none"),
        planned(header, tokens, 1, 2, blocks, narrow, SHARED_NBYTES),
        planned(header, tokens, 1, 2 if tokens <= 32 else 1, blocks, narrow, HALF_NBYTES, **half),
        planned(header, tokens, 2, 1, blocks, narrow, SHARED_NBYTES),
        planned(header, tokens, 1, 2, 3 - blocks, wide, SHARED_NBYTES, overlap="step"),
        planned(header, tokens, 1, 1, blocks, narrow, HALF_NBYTES, **half),
    ]
    if many and tokens > 32 and tiles_k >= LONG_K and -(-tiles_n // num_sms) * num_sms > MUCH_IDLE * tiles_n:
        yield _equal_shares(header, tokens, tiles_n, tiles_k, num_sms)
    if shared and tokens <= 32:  # room for blocks of the next kernel beside them
        yield planned(header, tokens, 1, 3, blocks, narrow, HALF_NBYTES)
    yield plans[3 if many else 1 if tokens == 32 and blocks == 1 else 0]
    yield from plans
    # Two rows of tiles that share activations write half as many bytes to shared memory, whose speed limits single rows.
    along = 1 if many else 2 * blocks
    for overlap in ("step", "steps") if tokens > 32 else ():
        yield planned(header, tokens, 2, 1, along, narrow, SHARED_NBYTES, registers=232, overlap=overlap)
    yield _equal_shares(header, tokens, tiles_n, tiles_k, num_sms)


def _equal_shares(header: WeightHeader, tokens: int, tiles_n: int, tiles_k: int, num_sms: int) -> WarpgroupPlan | None:
    """Of the steps of all tiles, one for each multiprocessor; None where whole tiles leave too few of them idle."""
    if not _streams(tiles_n, num_sms):
        return None
    return planned(
        header, tokens, 1, 2, 1, _depths(tiles_k, 4)[0], SHARED_NBYTES, registers=232, overlap="step", launched=num_sms,
        streamed=True,
    )  # fmt: skip


def _four_warpgroups(
    header: WeightHeader, tokens: int, tiles_n: int, tiles_k: int, num_sms: int
) -> Iterator[WarpgroupPlan | None]:
    """Of more than two rows of tiles for each multiprocessor: as many warps as registers suffice for hide what each waits for.

    Two rows that share activations, of which half as many bytes come then, unless multiprocessors then have more rows to do; else
    equal shares for more than 16 tokens, and two warpgroups along K.
    """
    if tiles_n <= 2 * num_sms or header.mins_dtype is not None or header.dtype.nbits > 6:
        return
    pairs, overlap = -(-tiles_n // 2), "others" if tokens > 32 else "none"
    rows, unit = 2 if 2 * -(-pairs // num_sms) <= -(-tiles_n // num_sms) else 1, "mma" if tokens == 8 else "wgmma"
    if rows == 1 and tokens > 16:
        yield _equal_shares(header, tokens, tiles_n, tiles_k, num_sms)
    for depth in _depths(tiles_k, 4, 2) if (rows, tokens) == (2, 64) else _depths(tiles_k, 2):
        yield planned(
            header, tokens, rows, 3 - rows, 1, depth, HALF_NBYTES, blocks_per_sm=2, overlap=overlap, unit=unit
        )


def _computing(
    header: WeightHeader, m: int, blocks: int, tiles_n: int, tiles_k: int, num_sms: int, act: DataType
) -> Iterator[WarpgroupPlan | None]:
    """The time is that of tensor cores, or of activations on their way: plans by `_computing_us`, those first that may have
    registers enough. Two rows of tiles take turns with two warpgroups in one."""
    depth = _depths(tiles_k, 2)[0]
    blocks_of_all, pairs = -(-tiles_n // 2) * -(-m // MOST_TILE), num_sms // 2 * 2
    if blocks_of_all >= LEAST_WAVES * num_sms and _has_range(header, act):
        for sharing in (2, 1):
            yield planned(
                header, MOST_TILE, 2, 1, 1, depth, SHARED_NBYTES, registers=208, scaled=True, sharing=sharing, launched=pairs
            )  # fmt: skip
    plans = [
        plan for tokens in _widths(m) for plan in _of_width(header, m, tokens, blocks, depth, tiles_n, num_sms, act)
    ]

    def preference(plan: WarpgroupPlan) -> tuple[bool, float]:
        return not _may_fit(header, plan, act), _computing_us(plan, m, tiles_n, tiles_k, num_sms)

    yield from sorted((plan for plan in plans if plan is not None), key=preference)[:MOST_COMPUTING]
    yield planned(header, 128, 2, 1, 1, depth, SHARED_NBYTES, registers=232)
    yield planned(header, 128, 1, 1, 1, depth, HALF_NBYTES, blocks_per_sm=2)


def _is_short(header: WeightHeader) -> bool:
    """Whether groups have so few columns that their sums take longer to scale than to be made, for more than 16 tokens."""
    return header.span != WHOLE and header.span < TILE


def _scales_weights(header: WeightHeader, act: DataType) -> bool:
    """Whether weights are multiplied by scales, and rounded, instead (`scaled`), for more than `_least_scaled` tokens: of short
    groups, and with minimums, since those times sums of activations take as many products as the weights.

    The type of the activations must hold what factors there are: powers of two, by which no code is rounded, but bf16 holds
    minimums only roughly, whose error all weights of a group share.
    """
    factors = {header.scale_dtype, header.mins_dtype or header.scale_dtype}
    if factors == {"float8_e8m0"}:
        return _has_range(header, act) and _is_short(header) and header.mins_dtype is None
    fit = factors <= {"f16", "float8_e4m3"}
    return fit and (_is_short(header) or (header.mins_dtype is not None and act == f16))


def _has_range(header: WeightHeader, act: DataType) -> bool:
    """Whether weights may be multiplied by scales in the type of the activations: f16 does not hold all powers of two."""
    return act == bf16 or header.scale_dtype != "float8_e8m0" or (act == f16 and header.exact_in_f16)


def _least_scaled(header: WeightHeader) -> int:
    """Tokens up to which no weight is rounded: 8 where each tile of 16 has so much beside its products, else 16."""
    return 8 if header.mins_dtype is not None or header.span == SMALLEST_GROUP else 16


def _widths(m: int) -> list[int]:
    """Of tiles of tokens, all of which but the last have as many, and that one not many fewer."""
    counts = range(-(-m // MOST_TILE), -(-m // LEAST_TILE) + 1)
    widths = dict.fromkeys(width_of(-(-m // count)) for count in counts)
    return [width for width in widths if width >= LEAST_TILE]


def _of_width(
    header: WeightHeader, m: int, tokens: int, blocks: int, depth: int, tiles_n: int, num_sms: int, act: DataType
) -> Iterator[WarpgroupPlan | None]:
    """Plans of tiles with so many tokens. blocks: along K, where one tile has all tokens. Up to 128 tokens
    no weight is rounded, but where `_scales_weights` says so."""
    fit = partial(planned, header, tokens, splits=1, blocks=1, depth=depth, nbytes=SHARED_NBYTES, registers=232)
    blocks, scales = blocks if m <= tokens else 1, _scales_weights(header, act)
    scaled = scales or (m > 128 and _has_range(header, act))
    if tokens <= 128 and not scales:
        yield planned(header, tokens, 1, 2, blocks, depth, SHARED_NBYTES, registers=232)
        yield fit(rows=2, overlap="steps")
        yield planned(header, tokens, 1, 1, 1, depth, HALF_NBYTES, blocks_per_sm=2)
    if scaled:
        yield fit(rows=1, blocks=blocks if tokens <= 128 else 1, scaled=True)
        yield fit(rows=2, scaled=True)
    if tokens <= (MOST_STREAMED if scaled else 128) and _streams(-(-tiles_n // 2) * -(-m // tokens), num_sms):
        yield fit(rows=2, scaled=scaled, launched=num_sms, streamed=True)


def _may_fit(header: WeightHeader, plan: WarpgroupPlan, act: DataType) -> bool:
    """Whether registers may suffice for 128 tokens or more: they do not for the sums of a group beside those of all groups where
    there are minimums. And whether factors that f16 holds only roughly leave weights of long groups at least."""
    if plan.scaled:
        return _scales_weights(header, act) or not _is_short(header)
    return header.mins_dtype is None


def _computing_us(plan: WarpgroupPlan, m: int, tiles_n: int, tiles_k: int, num_sms: int) -> float:
    """Microseconds of all steps: waves of whole tiles, or equal shares, as fast as tensor cores work or activations arrive. What
    comes before and behind takes all plans as long, but where blocks meet in tiles, or along K."""
    row_tiles, token_tiles = -(-tiles_n // plan.rows), -(-m // plan.tokens)
    blocks, slots = row_tiles * token_tiles * plan.blocks, num_sms * plan.blocks_per_sm
    waves = blocks / slots if plan.streamed else -(-blocks // slots)
    once, each = STEP_US[plan.rows, plan.scaled, plan.streamed, plan.blocks_per_sm]
    step = max(waves * (once + each * plan.tokens), blocks * plan.tokens * TOKEN_US)
    meeting = MEETING_US * plan.streamed + CROSSING_US * (plan.blocks > 1)
    return tiles_k * TILE / (128 * plan.blocks) * step + meeting
