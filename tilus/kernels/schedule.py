"""How a quantised product is cut into blocks: chosen by shape and width of the codes, for a number of multiprocessors."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True)
class Schedule:
    """One launch of the linear kernel.

    A block computes `tokens` tokens by `rows` rows of 64 x 64 tiles, each row with `warps` warps along K; each warp has `stages`
    tiles on their way. `splits` blocks share a result along K. blocks_per_sm: how many blocks must fit, which limits registers.
    """

    tokens: int
    rows: int
    warps: int
    stages: int
    splits: int = 1
    blocks_per_sm: int = 1


# stages * nbits that eight warps of a multiprocessor need: each waits for 4 KB then, 32 KB in all, which is about what an H100
# must have on its way to read at full speed.
BITS_AHEAD = 8


@lru_cache(maxsize=4096)
def schedule(m: int, tiles_n: int, tiles_k: int, nbits: int, num_sms: int, factor_words: int = 4) -> Schedule:
    """A schedule for M tokens and a weight of tiles_n x tiles_k tiles, on a GPU of num_sms multiprocessors.

    factor_words: registers that a thread needs for the factors of a tile; 4 are scales of 16 bits, one for all of its columns.
    num_sms 0 stands for the reference execution, which likes few large tiles.
    """
    if num_sms == 0:
        return Schedule(max(8, min(64, -(-m // 8) * 8)), 1, _power_of_two(min(tiles_k, 32)), 1)
    if m <= 16:
        return _few_tokens(m, tiles_n, tiles_k, nbits, num_sms, factor_words)
    return _many_tokens(m, tiles_n, tiles_k, num_sms, factor_words)


def _few_tokens(m: int, tiles_n: int, tiles_k: int, nbits: int, num_sms: int, factor_words: int) -> Schedule:
    """Reading the weight is what takes time. One block of eight warps on every multiprocessor, with few splits of K.

    16 tokens cost as many bytes from the L2 cache as a tile of 4 bits does from memory, so two rows of tiles share them.
    """
    tokens = 8 if m <= 8 else _most_tokens(factor_words)
    # More stages would need more registers than there are.
    most = max(1, (4 if tokens == 8 else 2) // (1 if factor_words <= 4 else 2 if factor_words <= 16 else 4))
    if tiles_n >= num_sms and tokens == 8:
        if nbits <= 6 and factor_words <= 4:
            return Schedule(tokens, 1, _power_of_two(min(8, tiles_k)), 1, 1, 2)
        return Schedule(tokens, 1, _power_of_two(min(4, tiles_k)), 1)
    rows = 2 if tokens == 16 and tiles_n >= 32 else 1
    warps = _power_of_two(min(8 // rows, tiles_k))
    blocks = -(-tiles_n // rows)
    splits = max(1, min(num_sms // blocks, tiles_k // (2 * warps), 16))
    stages = max(1, min(BITS_AHEAD // nbits, most, tiles_k // (2 * warps * splits)))
    return Schedule(tokens, rows, warps, stages, splits)


def _many_tokens(m: int, tiles_n: int, tiles_k: int, num_sms: int, factor_words: int) -> Schedule:
    """Every block dequantises its weights again; it has registers for the sums of 16 tokens."""
    tokens = _most_tokens(factor_words)
    blocks = tiles_n * -(-m // tokens)
    warps = _power_of_two(min(4, tiles_k))
    if blocks >= num_sms:
        return Schedule(tokens, 1, warps, 1)
    return Schedule(tokens, 1, warps, 1, max(1, min(2 * num_sms // blocks, tiles_k // (2 * warps), 16)))


def _most_tokens(factor_words: int) -> int:
    return 16 if factor_words <= 16 else 8


def _power_of_two(count: int) -> int:
    """The largest power of two up to `count`: warps that share factors divide their span."""
    return 1 << (count.bit_length() - 1)
