"""How a quantised product is cut into blocks: by shape and width of the codes, for a number of multiprocessors or threads."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache


@dataclass(frozen=True)
class Schedule:
    """One launch of the linear kernel.

    A block computes `tokens` tokens by `rows` rows of 64 x 64 tiles, each row with `warps` warps along K; each warp has `stages`
    tiles on their way: with none, a tile is loaded when its turn comes. `splits` blocks share a result along K. blocks_per_sm:
    how many blocks must fit, which limits registers.
    """

    tokens: int
    rows: int
    warps: int
    stages: int
    splits: int = 1
    blocks_per_sm: int = 1

    def easier(self) -> Schedule | None:
        """The next one that needs fewer registers; None when there is none."""
        if self.blocks_per_sm > 1:
            return replace(self, blocks_per_sm=1)
        if self.stages > 1:
            return replace(self, stages=1)
        return replace(self, tokens=8) if self.tokens > 8 else None


# For (tokens, stages) and each width of the codes from 1 to 8 bits the most `factor_words` with which no kernel spills
# registers. A thread of up to eight warps has 255, and what ptxas makes of them is no sum of what is live: these limits were
# found by assembling kernels with the types and schemes that need the most; a kernel that needs more all the same gets an easier
# schedule when it is first launched (`linear`). At 16 tokens two stages are only for codes of up to
# 3 bits; codes of 4 bits are faster with one.
MOST_FACTOR_WORDS = {
    (8, 1): (172, 172, 172, 172, 172, 172, 172, 172),  # every scheme
    (8, 2): (26, 26, 26, 26, 13, 13, 0, 0),
    (16, 1): (50, 50, 50, 50, 34, 34, 26, 26),
    (16, 2): (13, 13, 13, 0, 0, 0, 0, 0),
}
# The same for blocks of eight warps that share a multiprocessor with another: 128 registers.
MOST_FACTOR_WORDS_OF_TWO_BLOCKS = (13, 13, 13, 13, 13, 13, 0, 0)


@lru_cache(maxsize=4096)
def schedule(m: int, tiles_n: int, tiles_k: int, nbits: int, num_sms: int, factor_words: int = 13) -> Schedule:
    """A schedule for M tokens and a weight of tiles_n x tiles_k tiles, on a GPU of num_sms multiprocessors.

    factor_words: of the weight's header; 13 are scales of 16 bits, one for all columns of a tile. num_sms 0 stands for the
    reference execution, which likes few large tiles.
    """
    if num_sms == 0:
        return Schedule(max(8, min(64, -(-m // 8) * 8)), 1, _power_of_two(min(tiles_k, 32)), 1)
    tokens = 16 if m > 8 and _fits(16, 1, nbits, factor_words) else 8
    if m > 16:
        return _many_tokens(m, tokens, tiles_n, tiles_k, num_sms)
    return _few_tokens(tokens, tiles_n, tiles_k, nbits, num_sms, factor_words)


# Unpacking a tile of codes on a CPU costs about as much as multiplying it by this many tokens.
UNPACKING_TOKENS = 8
# Bytes of codes that a block has to read to be worth its start.
LEAST_SPLIT_NBYTES = 1 << 15


@lru_cache(maxsize=4096)
def cpu_schedule(m: int, tiles_n: int, tiles_k: int, nbits: int, num_threads: int) -> Schedule:
    """A schedule for M tokens and a weight of tiles_n x tiles_k tiles of nbits-bit codes, on a CPU of num_threads threads.

    Up to eight tokens are one block of just as many. Of more, a block has 16, 32 or 64: every block unpacks its weights, and the
    tokens that the last one lacks are multiplied all the same. K is split only where threads would idle. Nothing is fetched
    ahead: the processor does that by itself.
    """
    tokens = m if m <= 8 else min((64, 32, 16), key=lambda size: -(-m // size) * (UNPACKING_TOKENS + size))
    blocks, wanted = tiles_n * -(-m // tokens), 2 * num_threads if num_threads > 1 else 1
    splits = max(1, min(-(-wanted // blocks), tiles_k * 512 * nbits // LEAST_SPLIT_NBYTES))
    return Schedule(tokens, 1, 1, 0, splits)


def _few_tokens(tokens: int, tiles_n: int, tiles_k: int, nbits: int, num_sms: int, factor_words: int) -> Schedule:
    """Reading the weight is what takes time. Eight warps on every multiprocessor, with few splits of K.

    Two tiles of each warp are on their way where registers hold them: at 8 tokens that was 4 to 13 % faster than one for codes of
    1, 2 and 4 bits, and faster than four. Two rows of tiles in a block, which share activations, were slower than one. Where
    there are more rows of tiles than multiprocessors, two blocks share one, of half as many warps or half as many registers.
    """
    many_rows = tiles_n >= num_sms
    if many_rows and tokens == 8 and factor_words <= MOST_FACTOR_WORDS_OF_TWO_BLOCKS[nbits - 1]:
        return Schedule(tokens, 1, _power_of_two(min(8, tiles_k)), 1, 1, 2)
    warps = _power_of_two(min(4 if many_rows else 8, tiles_k))
    splits = max(1, min(num_sms // tiles_n, tiles_k // (2 * warps), 16))
    two = _fits(tokens, 2, nbits, factor_words) and tiles_k >= 4 * warps * splits
    return Schedule(tokens, 1, warps, 2 if two else 1, splits)


def _many_tokens(m: int, tokens: int, tiles_n: int, tiles_k: int, num_sms: int) -> Schedule:
    """Every block dequantises its weights again, for as many tokens as there are registers for their sums.

    Sums of 32 tokens, one for the group and one for all groups, spill with most types.
    """
    blocks = tiles_n * -(-m // tokens)
    warps = _power_of_two(min(4, tiles_k))
    if blocks >= num_sms:
        return Schedule(tokens, 1, warps, 1)
    return Schedule(tokens, 1, warps, 1, max(1, min(2 * num_sms // blocks, tiles_k // (2 * warps), 16)))


def _fits(tokens: int, stages: int, nbits: int, factor_words: int) -> bool:
    return factor_words <= MOST_FACTOR_WORDS[tokens, stages][nbits - 1]


def _power_of_two(count: int) -> int:
    """The largest power of two up to `count`: warps that share factors divide their span."""
    return 1 << (count.bit_length() - 1)
