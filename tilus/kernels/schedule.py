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
def schedule(m: int, tiles_n: int, tiles_k: int, nbits: int, num_sms: int) -> Schedule:
    """A schedule for M tokens and a weight of tiles_n x tiles_k tiles, on a GPU of num_sms multiprocessors.

    num_sms 0 stands for the reference execution, which likes few large tiles.
    """
    if num_sms == 0:
        return Schedule(max(8, min(64, -(-m // 8) * 8)), 1, _power_of_two(min(tiles_k, 32)), 1)
    return _few_tokens(m, tiles_n, tiles_k, nbits, num_sms) if m <= 16 else _many_tokens(m, tiles_n, tiles_k, num_sms)


def _few_tokens(m: int, tiles_n: int, tiles_k: int, nbits: int, num_sms: int) -> Schedule:
    """Reading the weight is what takes time. One block of eight warps on every multiprocessor, with few splits of K.

    16 tokens cost as many bytes from the L2 cache as a tile of 4 bits does from memory, so two rows of tiles share them.
    """
    tokens = 8 if m <= 8 else 16
    if tiles_n >= num_sms and tokens == 8 and nbits <= 6:
        warps = _power_of_two(min(8, tiles_k))
        return Schedule(tokens, 1, warps, _stages(nbits, BITS_AHEAD // 2, tiles_k // (2 * warps)), 1, 2)
    rows = 2 if tokens == 16 and tiles_n >= 32 else 1
    warps = _power_of_two(min(8 // rows, tiles_k))
    blocks = -(-tiles_n // rows)
    splits = max(1, min(num_sms // blocks, tiles_k // (2 * warps), 16))
    return Schedule(tokens, rows, warps, _stages(nbits, BITS_AHEAD, tiles_k // (2 * warps * splits)), splits)


def _many_tokens(m: int, tiles_n: int, tiles_k: int, num_sms: int) -> Schedule:
    """Every block dequantises its weights again: 32 tokens a block do so half as often, 16 fill a GPU twice as easily."""
    if 2 * tiles_n * -(-m // 32) >= 3 * num_sms:
        return Schedule(32, 1, _power_of_two(min(2, tiles_k)), 1)
    blocks = tiles_n * -(-m // 16)
    warps = _power_of_two(min(4, tiles_k))
    if blocks >= num_sms:
        return Schedule(16, 1, warps, 1)
    return Schedule(16, 1, warps, 1, max(1, min(2 * num_sms // blocks, tiles_k // (2 * warps), 16)))


def _stages(nbits: int, bits_ahead: int, limit: int) -> int:
    """Tiles on their way to a warp, at most half of all that it gets."""
    return max(1, min(-(-bits_ahead // nbits), limit))


def _power_of_two(count: int) -> int:
    """The largest power of two up to `count`: warps that share factors divide their span."""
    return 1 << (count.bit_length() - 1)
