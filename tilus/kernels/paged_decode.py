"""Attention of few queries a sequence over a paged key-value cache, on Hopper: one launch, no plan, at the speed of memory.

The cached tokens of the whole batch are shared evenly among blocks (`paged_decode_split`). In each block one warp asks for the
pages of its tokens by tensor copies, several tiles ahead, across sequences; the other warps compute. Tokens of the cache are rows
of the products and query heads are columns, so that nothing is padded to more than eight columns:

    scores [tokens, columns] = K Q^T        weights = exp2(scores - highest)        acc [head_dim, columns] += V^T weights

A warp has some tokens of each tile, and its own maximum, sum and accumulator: warps of a block meet at the end of a part only.
Blocks that share a sequence and head meet in global memory, where the last one to come adds up the partial results in order.

Budget: a multiprocessor of an H100 gets 24 bytes in a nanosecond and issues four instructions a clock, at 1.7 GHz 0.28 for each
byte. 16 tokens of 128 elements in 16 bits are 8 KB of keys and values, which leaves 2300 instructions. For eight columns
mma.m16n8k16 takes 24, ldmatrix 16, the accumulator 32, the softmax about 80. So products of a warp will do, and need no
maximum of rows that other warps have, as products of warpgroups would.

Online softmax: M. Milakov and N. Gimelshein, arXiv 1805.02867.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import tilus
from tilus import Const, Tensor, f16, f32, int32
from tilus.kernels.allocate import counters, empty, is_cuda
from tilus.kernels.attention_variant import AS_IT_IS, NO_VARIANT, GivenVariant, Variant
from tilus.kernels.index_checks import check_tables
from tilus.kernels.kv_cache import QuantizedCache
from tilus.kernels.paged_decode_arguments import check_decode, check_given
from tilus.kernels.paged_decode_columns import Columns, Results, padded_columns
from tilus.kernels.paged_decode_operands import operands_of
from tilus.kernels.paged_decode_softmax import Attending, Columnwise
from tilus.kernels.paged_decode_split import (
    Split,
    each_part,
    fewer_blocks,
    find_share,
    parts_of,
    places,
    units_of,
    with_whole_pairs,
)
from tilus.kernels.paged_decode_stages import Filling, TileMemory
from tilus.kernels.plan_choice import by_fitting_plan, num_sms_of
from tilus.kernels.vectors import power_of_two
from tilus.runtime.execute import place
from tilus.target import TARGETS

SHARED_NBYTES = TARGETS["sm_90a"].max_shared_nbytes
HALF_SHARED_NBYTES = TARGETS["sm_90a"].shared_nbytes_per_sm // 2 - 1024  # each block takes 1 KB more than it asks for
RESERVED_NBYTES = 1024  # for barriers and the starts of tensors
USEFUL_NBYTES = 56 * 1024  # on their way to a block with small tiles
CROWDED_PAIRS = 4  # times as many pairs as that are multiprocessors
MOST_FACTORS_NBYTES = 4  # of a token's keys or values
BLOCK_NBYTES_US = (
    45_000  # that a block reads in a microsecond where others leave it the memory (fitted to times of an H100)
)
LEAST_BLOCKS = 0.8  # of those that run at once, so that pairs are cut less (fitted, likewise)
MERGE_US = 1.2  # of a round of partial results that the last block of a pair adds up


_found: dict[tuple[Any, ...], DecodePlan] = {}  # plans that were launched without spills


@dataclass(frozen=True)
class DecodePlan:
    """What a block does. tile: tokens of a stage. stages: tiles on their way. warps: those that compute; `column_groups` of them
    share tokens and compute different columns. blocks_per_sm: blocks that run beside each other on a multiprocessor."""

    tile: int
    stages: int
    warps: int
    column_groups: int = 1
    blocks_per_sm: int = 1


@tilus.kernel(varying=("sequences", "pages", "places", "pairs"))
def paged_decode_kernel(
    q: Tensor["dtype", "sequences", "q_len", "kv_heads", "group", "head_dim"],
    kv_cache: Tensor["unit", "pages", 2, "page_size", "kv_heads", "row"],
    block_tables: Tensor[int32, "sequences", "max_pages"],
    kv_lens: Tensor[int32, "sequences"],
    out: Tensor["out_dtype", "sequences", "q_len", "kv_heads", "group", "head_dim"],
    partial_out: Tensor[f32, "places", "q_len", "group", "head_dim"],
    partial_lse: Tensor[f32, "places", "q_len", "group"],
    tickets: Tensor[int32, "pairs"],
    scale_log2: float,
    lse: Tensor[f32, "sequences", "q_len", "kv_heads", "group"] = None,
    factors: Tensor[f16, "pages", "kv_heads", 2, "kinds", "page_size"] = None,
    parameters: Tensor[f32, "count"] = None,
    bits: Tensor[int32, "queries", "words"] = None,
    *,
    q_len: Const,
    group: Const,
    head_dim: Const,
    page_size: Const,
    blocks: Const,
    split: Const,
    plan: Const,
    kind: Const = None,
    early: Const = False,
    settled: Const = False,
    variant: Const = NO_VARIANT,
    words: Const = 0,
):
    """tickets: zeros, one for each sequence and kv head, and left so. places: as `paged_decode_split.places` says. kind: of a
    quantised cache, whose rows are its codes in units of 16 bits. factors: scales of keys and values (kind 0) and what is added
    (kind 1), if anything is, for each token and head. early: block_tables and kv_lens may be read while the kernel in front still
    runs. settled: and the cache's tokens in front of the queries' own."""
    kv_heads, warps = q.shape[2], plan.warps
    tilus.grid(blocks, warps=warps + 1, blocks_per_sm=plan.blocks_per_sm)
    tilus.launch_dependents()
    memory = TileMemory(kv_cache, head_dim, kind, plan)
    constant = [kv_lens, block_tables, *([kv_cache, factors] if settled else [])] if early else []
    if not early:
        tilus.wait_dependencies()
    block = tilus.block_id(0)
    units, begin, end, start = find_share(kv_lens, kv_heads, split, warps + 1, blocks, block)

    with tilus.warps(warps, 1):
        filling = Filling(memory.stages(), kv_cache, factors, block_tables, constant, q_len if settled else None)
        each_part(kv_lens, kv_heads, start, begin, end, split, filling.fill)
        tilus.wait_dependencies(constant=constant)

    with tilus.warps(0, warps):
        tilus.wait_dependencies(constant=constant)
        columns = Columns(q_len, group, head_dim, warps, plan.column_groups)
        changed = Columnwise.of(variant, columns, parameters, bits, words)
        results = Results(columns, out, lse, partial_out, partial_lse, tickets)
        attending = Attending(columns, operands_of(kind, columns), memory.stages(), scale_log2, memory.kinds, changed)

        def attend(part):
            count, index, place = parts_of(part, units, blocks, split, block)  # while the part's tokens come
            result, result_lse = attending.result_of(part, q)
            results.store(part, count, index, place, result, result_lse)

        each_part(kv_lens, kv_heads, start, begin, end, split, attend)


def paged_decode(
    q: Any, kv_cache: Any, block_tables: Any, kv_lens: Any, scale: float, *, return_lse: bool = False,
    fixed_split: int | None = None, constant_tables: bool = False, constant_past: bool = False,
    variant: Variant = NO_VARIANT, parameters: Any = None, bits: Any = None, device: str | None = None, out: Any = None,
) -> Any:  # fmt: skip
    """Attention of the last few tokens of each sequence over its paged keys and values, causal (sm_90a).

    q: float16 or bfloat16 [S, q_len, Hq, D], q_len from 1 to 8. kv_cache: [pages, 2, page_size, Hkv, D] of the same dtype, keys
    at index 0, values at 1; a strided view with contiguous last dim is fine. Or a `QuantizedCache`, whose codes are multiplied in
    f16. Hq / Hkv is 1 to 16, D 64, 96, 128 or 256, page_size 16, 32, 64 or a multiple of 128. block_tables: int32 [S, max_pages],
    the pages of each sequence in order. kv_lens: int32 [S], tokens in the cache, those of the queries included. scale: what
    scores are multiplied with. Torch tensors. fixed_split: tokens of a part, a multiple of 128. Sequences are then cut at its
    multiples alone, so that the bits of a result do not depend on what else is in the batch; by default they are cut so that all
    multiprocessors have the same to do. constant_tables: block_tables and kv_lens are constant in the sense of "Dependent launch"
    (docs/language.md), and may be read while the kernel in front still runs; constant_past: so is what the cache has of tokens in
    front of the queries' own, and is. variant: functions that change scores, hide keys or add a sink, and a window, in front of
    which only the page that it begins on is read; parameters: their f32 tensor, if any; bits: int32 [S q_len, words], what
    `pack_bits` makes of up to 256 conditions of each query, if any. device: where to run (reference, emulator, cuda), by default
    as the arguments say. out: where the result goes, contiguous, float16 or bfloat16; by default a tensor like q.

    Query j of a sequence sees the first kv_len - q_len + j + 1 tokens of the cache; one that sees none gets zeros. Nothing beyond
    kv_len is looked at, nor are entries of block_tables for it. One launch for up to 64 columns, q_len times Hq / Hkv rounded up
    to a power of two (32 columns with D = 256); more take several, each of which reads the cache. The host reads no tensor, so it
    can be captured in a CUDA graph, and the lengths may change from replay to replay.

    Returns: [S, q_len, Hq, D]; with return_lse also float32 [S, q_len, Hq], the natural logarithm of the sum of exp(scaled
    score), minus infinity where there is no key (`merge_states` takes both). Scores and sums are f32; weights of the softmax are
    rounded to f16, or to two bf16.
    Raises: TilusError when shapes, dtypes or devices do not fit together; with TILUS_DEBUG=1 also for lengths longer than the
    block table and entries that are no pages.
    """
    group = check_decode(q, kv_cache, block_tables, kv_lens, fixed_split)
    given = GivenVariant(variant, parameters, bits)
    check_given(given, q, most_queries(group, q.shape[3]))
    check_tables("paged_decode", block_tables, kv_lens, kv_cache, device=device)
    out = empty(q, tuple(q.shape)) if out is None else out
    if q.shape[0] == 0:
        return (out, empty(q, tuple(q.shape[:3]), "float32")) if return_lse else out
    if q.shape[1] > most_queries(group, q.shape[3]):

        def attend(part: Any, lens: Any) -> tuple[Any, Any]:
            return paged_decode(
                part, kv_cache, block_tables, lens, scale, return_lse=True, fixed_split=fixed_split, variant=variant,
                parameters=parameters, device=device,
            )  # fmt: skip

        found, lse = by_queries(q, kv_lens, most_queries(group, q.shape[3]), attend)
        out.copy_(found)
        return (out, lse) if return_lse else out
    out, lse = by_plans(
        q, kv_cache, block_tables, kv_lens, scale, return_lse, fixed_split, device, constant_tables, given=given, out=out,
        constant_past=constant_past,
    )  # fmt: skip
    return (out, lse) if return_lse else out


def by_plans(
    q: Any, kv_cache: Any, block_tables: Any, kv_lens: Any, scale: float, return_lse: bool, fixed_split: int | None,
    device: str | None, constant_tables: bool, given: GivenVariant = AS_IT_IS, out: Any = None, constant_past: bool = False,
) -> tuple[Any, Any]:  # fmt: skip
    """(output, log-sum-exp or None) by the first plan that the registers suffice for, of arguments that fit."""
    _, _, page_size, kv_heads, head_dim = kv_cache.shape
    out = empty(q, tuple(q.shape)) if out is None else out
    where = place(device, is_cuda(q))
    num_sms, pairs = num_sms_of(q, where), q.shape[0] * kv_heads
    crowded = fixed_split is None and CROWDED_PAIRS * pairs >= num_sms  # else bits would depend on the batch
    shape = (q.shape[1], q.shape[2] // kv_heads, head_dim, page_size, nbits_of(kv_cache), crowded)
    constant = (constant_tables, constant_past)
    parts = (return_lse, fixed_split is None, constant, where, given.variant, given.words)
    key = (*shape, q.dtype, out.dtype, *parts)

    def by(plan: DecodePlan) -> tuple[Any, Any]:
        window = given.variant.window
        recent = None if window is None else window + q.shape[1] - 1
        unit = min(plan.tile, page_size) if fixed_split is None else fixed_split
        split = Split(unit, fixed_split is not None, recent, 1 if recent is None else page_size)
        units = pairs * units_of(block_tables.shape[1] * page_size, split.unit)
        blocks = blocks_of(pairs, units, num_sms, plan)
        if fixed_split is None:
            split = replace(split, fewer=fewer(pairs, blocks, *shape[:3], plan, unit, shape[4]))
        return launch(
            q, kv_cache, block_tables, kv_lens, scale, plan, split, blocks, return_lse, device, constant_tables, given,
            out, constant_past,
        )  # fmt: skip

    return by_fitting_plan(_found, key, plans(*shape), by)


@functools.lru_cache(maxsize=1024)  # layouts take a tenth of a millisecond, several times what the rest of a call does
def fewer(
    pairs: int, blocks: int, q_len: int, group: int, head_dim: int, plan: DecodePlan, unit: int, nbits: int
) -> tuple[tuple[int, int], ...]:  # fmt: skip
    """`Split.fewer` of a launch. unit: tokens; nbits: of a cached element."""
    together, turns = Columns(q_len, group, head_dim, plan.warps, plan.column_groups).merged_parts()
    nbytes = unit * 2 * head_dim * max(nbits, 8) // 8  # 4 bits take as long as 8 to a block that need not wait
    return fewer_blocks(pairs, blocks, nbytes / BLOCK_NBYTES_US, together, turns * MERGE_US)


def launch(
    q: Any, kv_cache: Any, block_tables: Any, kv_lens: Any, scale: float, plan: DecodePlan, split: Split, blocks: int,
    return_lse: bool, device: str | None, constant_tables: bool = False, given: GivenVariant = AS_IT_IS, out: Any = None,
    constant_past: bool = False,
) -> tuple[Any, Any]:  # fmt: skip
    """(output, log-sum-exp or None) by a given plan."""
    sequences, q_len, q_heads, head_dim = q.shape
    page_size, kv_heads = kv_cache.shape[2:4]
    group, pairs = q_heads // kv_heads, sequences * kv_heads
    most = places(pairs, block_tables.shape[1] * page_size, blocks, split)
    out = empty(q, tuple(q.shape)) if out is None else out
    lse = empty(q, (sequences, q_len, kv_heads, group), "float32") if return_lse else None
    rows, factors, kind = kv_cache, None, None
    if isinstance(kv_cache, QuantizedCache):
        rows, factors, kind = units_of_codes(kv_cache), kv_cache.factors, kv_cache.format
    paged_decode_kernel.on(device)(
        q.unflatten(2, (kv_heads, group)), rows, block_tables, kv_lens, out.unflatten(2, (kv_heads, group)),
        empty(q, (most, q_len, group, head_dim), "float32"), empty(q, (most, q_len, group), "float32"),
        counters(q, pairs), scale * math.log2(math.e), lse, factors, given.parameters, given.bits,
        q_len=q_len, group=group, head_dim=head_dim, page_size=page_size, blocks=blocks, split=split, plan=plan, kind=kind,
        early=constant_tables, settled=constant_tables and constant_past, variant=given.variant, words=given.words,
    )  # fmt: skip
    return out, None if lse is None else lse.flatten(2, 3)


def by_queries(q: Any, kv_lens: Any, most: int, attend: Callable[[Any, Any], tuple[Any, Any]]) -> tuple[Any, Any]:
    """(output, log-sum-exp) by several calls of attend(queries, lengths), for `most` queries each; to earlier ones sequences are
    shorter.

    Lengths are computed right in front of the launches, so that they are not constant.
    """
    import torch

    parts = [
        attend(q[:, first : first + most], kv_lens - max(q.shape[1] - first - most, 0))
        for first in range(0, q.shape[1], most)
    ]
    return torch.cat([out for out, _ in parts], dim=1), torch.cat([lse for _, lse in parts], dim=1)


def units_of_codes(cache: QuantizedCache) -> Any:
    """[pages, 2, page_size, Hkv, 16-bit units of a row]"""
    import torch

    return cache.codes.view(torch.int16).permute(0, 2, 3, 1, 4)


def nbits_of(kv_cache: Any) -> int:
    """Of an element of the cache."""
    return kv_cache.format.code.nbits if isinstance(kv_cache, QuantizedCache) else 8 * kv_cache.dtype.itemsize


def most_queries(group: int, head_dim: int) -> int:
    """Of a sequence in one launch: as many as their columns fit into the registers of eight warps."""
    return (64 if head_dim <= 128 else 32) // power_of_two(group)


@functools.cache
def plans(
    q_len: int, group: int, head_dim: int, page_size: int, nbits: int, crowded: bool
) -> tuple[DecodePlan, ...]:  # fmt: skip
    """`offered` once for all launches."""
    return tuple(offered(q_len, group, head_dim, page_size, nbits, crowded))


def offered(q_len: int, group: int, head_dim: int, page_size: int, nbits: int, crowded: bool) -> Iterator[DecodePlan]:
    """The best plan, then those that need fewer registers. nbits: of a cached element.

    crowded: whether there are so many pairs of sequences and heads that two blocks side by side on each multiprocessor do not cut
    them into too many parts; one works on while the other ends one. Otherwise a block takes half of the shared memory all the
    same: the next kernel's fits beside it.

    Codes of 4 bits take more instructions and come in less time, so that more warps work on them. More than eight columns are
    shared out among warps, each of which then reads more of the tokens; eight warps have no registers for those of heads of 256
    elements.
    """
    width = padded_columns(q_len, group, 1)
    few = width == 8 and head_dim <= 128
    if few and crowded:
        yield replace(
            small(planned(64, 4, 1, width, head_dim, nbits, HALF_SHARED_NBYTES), head_dim, nbits), blocks_per_sm=2
        )
    if few and nbits >= 8:
        yield small(planned(64, 4, 1, width, head_dim, nbits, HALF_SHARED_NBYTES), head_dim, nbits)
    elif few:
        yield planned(128, 8, 1, width, head_dim, nbits, HALF_SHARED_NBYTES)
    groups = 1 << (width // 8 - 1).bit_length()  # of eight columns
    padded = padded_columns(q_len, group, groups)
    if width == 16 and head_dim <= 128 and crowded:
        half = planned(64, 4, groups, padded, head_dim, nbits, HALF_SHARED_NBYTES)
        yield replace(small(half, head_dim, nbits), blocks_per_sm=2)
    if width > 8 and head_dim <= 128:
        yield planned(64, 8, groups, padded, head_dim, nbits, SHARED_NBYTES)
    yield planned(64, max(4, groups), groups, padded, head_dim, nbits, SHARED_NBYTES)


def planned(
    tile: int, warps: int, groups: int, width: int, head_dim: int, nbits: int, shared_nbytes: int
) -> DecodePlan:  # fmt: skip
    """With as many stages as the shared memory holds beside the exchange of results."""
    to_merge = head_dim * width * f32.nbytes * (warps // groups)
    stages = (shared_nbytes - RESERVED_NBYTES - to_merge) // stage_nbytes(tile, head_dim, nbits)
    return DecodePlan(tile, stages, warps, groups)


def small(plan: DecodePlan, head_dim: int, nbits: int) -> DecodePlan:
    """With no more on its way than helps: beyond that, blocks get their bytes less evenly."""
    most = max(2, USEFUL_NBYTES // stage_nbytes(plan.tile, head_dim, nbits))
    return replace(plan, stages=min(plan.stages, most))


def stage_nbytes(tile: int, head_dim: int, nbits: int) -> int:
    """Keys, values and their factors."""
    return 2 * tile * (head_dim * nbits // 8 + (0 if nbits == 16 else MOST_FACTORS_NBYTES))


def blocks_of(pairs: int, units: int, num_sms: int, plan: DecodePlan) -> int:
    """As many as run at once, or a few less (`with_whole_pairs`), and no more than there are units."""
    return max(1, min(with_whole_pairs(num_sms * plan.blocks_per_sm, pairs, LEAST_BLOCKS), units))
