"""Decoding of batches whose sequences begin with the same pages: those are read once for all of them.

Launches that depend on each other: one finds the groups (`shared_prefix_groups`), one attends to their prefixes, with many
queries a product, and at the same time to the rest of each sequence (`shared_prefix_kernel`), and one adds all up
(`shared_prefix_merge`). The host reads nothing. The groups are the same in all layers of a model: found once, they leave two
launches.

Budget for 64 sequences with 8192 tokens in common and 256 of their own, 32 query heads and 8 of keys, 128 elements of 16 bits,
on an H100. The prefix is 256 rows a kv head: 16 row tiles by 64 units of 128 tokens, 8 for each of 128 multiprocessors,
of 2048 cycles: 10 us at 1.7 GHz. 34 MB of it and 67 MB of the rest take 32 us to read. Partial results are 128 parts of 64 KB,
written and read in the L2 cache.

Partial softmax over parts of the keys: see `merge_states`; shared prefixes of a batch: J. Juravsky et al., "Hydragen", arXiv
2402.05099; Z. Ye et al., "FlashInfer", arXiv 2501.01005.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from tilus import TilusError, f32
from tilus.kernels.allocate import counters, empty, is_cuda
from tilus.kernels.attention_variant import NO_VARIANT, GivenVariant, Variant, check_variant
from tilus.kernels.index_checks import check_tables
from tilus.kernels.kv_cache import QuantizedCache
from tilus.kernels.paged_decode import (
    RESERVED_NBYTES,
    SHARED_NBYTES,
    by_queries,
    nbits_of,
    paged_decode,
    stage_nbytes,
    units_of_codes,
)
from tilus.kernels.paged_decode_arguments import check_decode
from tilus.kernels.paged_decode_columns import padded_columns
from tilus.kernels.paged_decode_split import Split, with_whole_pairs
from tilus.kernels.paged_decode_split import places as own_places
from tilus.kernels.paged_prefill import MOST_CODE_STAGES, PrefillPlan, as_f16
from tilus.kernels.paged_prefill_tiles import ROWS
from tilus.kernels.plan_choice import by_fitting_plan, num_sms_of
from tilus.kernels.shared_prefix_groups import FIELDS, members_of, places, row_heads, shared_prefix_groups_kernel
from tilus.kernels.shared_prefix_kernel import WARPGROUP, SharedPlan, SharedProblem, shared_prefix_kernel
from tilus.kernels.shared_prefix_merge import NOTES, shared_prefix_merge_kernel
from tilus.kernels.vectors import power_of_two
from tilus.runtime.execute import place

UNIT = 128  # tokens
LEAST_LANES = 32
MOST_HEAD_DIM = 128
MOST_COLUMNS = 32  # of a launch; with more the registers do not suffice for prefixes and the rest
OWN_TILE = 64  # tokens
OWN_STAGES = 2  # of elements; of codes as many as take no more memory
MOST_STAGES = 8  # of prefixes
ELEMENT_STAGES = 1  # of prefixes that codes become: two were slower
# Tokens of a tile of a prefix; registers of threads for prefixes, for the rest, and that copy: 512 in all.
PLANS = ((64, 160, 152, 40), (32, 144, 176, 48))
PLANS_OF_CODES = ((32, 136, 176, 64), (32, 128, 176, 80), (16, 136, 160, 80))  # those that copy make elements, too
_fitting: dict[tuple[Any, ...], SharedPlan | None] = {}


def shared_prefix_decode(
    q: Any, kv_cache: Any, block_tables: Any, kv_lens: Any, scale: float, *, return_lse: bool = False,
    constant_tables: bool = False, variant: Variant = NO_VARIANT, parameters: Any = None, bits: Any = None, shared: Any = None,
    device: str | None = None, out: Any = None,
) -> Any:  # fmt: skip
    """`paged_decode`, which reads pages that several sequences begin with once for all of them (sm_90a).

    Arguments, result and errors are those of `paged_decode`, without fixed_split and constant_past, and so is the meaning,
    whatever the tables hold; bits may differ. Codes of prefixes become code * scale or code * scale + centre, rounded to f16.
    What counts is equal entries at the start of block tables: at least 256 tokens that all queries of both sequences see whole.
    There may be several groups with prefixes of different lengths, and sequences that share nothing, in any order. Where
    prefixes are nested, each sequence takes part in one: of those with the first 256 tokens in common, neighbours (put those
    next to each other that share the most) stay together if they have at least half as much in common as each has with its
    other neighbour, and all of a group share what is common to all. What a window hides from all sequences is not read.

    shared: what `find_shared_prefixes` gave for these tables and lengths, to use it in all layers of a model, whatever their
    windows: two launches. By default it is found here, by one more. More than 32 columns, q_len times Hq / Hkv rounded up to a
    power of two, take several calls, which find their own. Heads of 256 elements, for which the registers do not suffice,
    variants for which they do not, and bits for more columns are left to `paged_decode`, and nothing is shared.
    """
    group = check_decode(q, kv_cache, block_tables, kv_lens, None)
    check_variant("shared_prefix_decode", variant, bits, q.shape[0] * q.shape[1], causal=True)
    check_tables("shared_prefix_decode", block_tables, kv_lens, kv_cache, device=device)
    given = GivenVariant(variant, parameters, bits)
    q_len, most = q.shape[1], MOST_COLUMNS // power_of_two(group)
    if q.shape[3] > MOST_HEAD_DIM or q.shape[0] < 2 or (bits is not None and q_len > most):
        return paged_decode(
            q, kv_cache, block_tables, kv_lens, scale, return_lse=return_lse, constant_tables=constant_tables, device=device,
            out=out, **vars(given),
        )  # fmt: skip
    out = empty(q, tuple(q.shape)) if out is None else out
    if q_len > most:

        def attend(part: Any, lens: Any) -> tuple[Any, Any]:
            return shared_prefix_decode(
                part, kv_cache, block_tables, lens, scale, return_lse=True, device=device, variant=variant,
                parameters=parameters,
            )  # fmt: skip

        found, lse = by_queries(q, kv_lens, most, attend)
        out.copy_(found)
        return (out, lse) if return_lse else out
    if shared is None:
        shared = find_shared_prefixes(
            block_tables, kv_lens, q_len, group, kv_cache.shape[2], constant_tables=constant_tables, device=device
        )  # fmt: skip
    check_shared(shared, q.shape[0])

    def unshared() -> Any:
        return paged_decode(
            q, kv_cache, block_tables, kv_lens, scale, return_lse=True, constant_tables=constant_tables, device=device, out=out,
            **vars(given),
        )[1]  # fmt: skip

    lse = by_plans(q, kv_cache, block_tables, shared, scale, return_lse, device, given, out, unshared)
    return (out, lse) if return_lse else out


def check_shared(shared: Any, sequences: int) -> None:
    """Raise a TilusError for what `find_shared_prefixes` does not give for so many sequences."""
    if tuple(shared.shape) != (FIELDS, sequences):
        raise TilusError(
            f"shared_prefix_decode: shared of shape {list(shared.shape)} for {sequences} sequences, expected "
            f"[{FIELDS}, {sequences}]",
            hint="it is what find_shared_prefixes gives for the same block_tables and kv_lens",
        )


def find_shared_prefixes(
    block_tables: Any, kv_lens: Any, q_len: int, group: int, page_size: int, *, constant_tables: bool = False,
    device: str | None = None,
) -> Any:  # fmt: skip
    """What `shared_prefix_decode` takes as `shared`: which sequences share pages. One launch; the host reads nothing.

    block_tables: int32 [S, max_pages]. kv_lens: int32 [S]. q_len: queries a sequence. group: query heads of a kv head.
    constant_tables: as of `paged_decode`. Returns: int32 [7, S], for that function only.
    """
    sequences = kv_lens.shape[0]
    shared = empty(kv_lens, (FIELDS, sequences))
    lanes = max(LEAST_LANES, power_of_two(sequences))
    shared_prefix_groups_kernel.on(device)(
        block_tables, kv_lens, empty(kv_lens, (2, sequences + 1)), shared, counters(kv_lens, 1), q_len=q_len,
        page_size=page_size, members=members_of(q_len, group), unit=unit_of(page_size), lanes=lanes, early=constant_tables,
    )  # fmt: skip
    return shared


def by_plans(
    q: Any, kv_cache: Any, block_tables: Any, shared: Any, scale: float, return_lse: bool, device: str | None,
    given: GivenVariant, out: Any, unshared: Callable[[], Any],
) -> Any:  # fmt: skip
    """The result into `out` by the first plan that the registers suffice for, which is remembered, or by `unshared`, where
    functions of a variant leave too few; the logarithms or None."""
    page_size, kv_heads, head_dim = kv_cache.shape[2:]
    nbits, shape = nbits_of(kv_cache), (q.shape[1], q.shape[2] // kv_heads, head_dim)
    key = (*shape, nbits, page_size, kv_heads, q.dtype, given.variant, given.words)

    def by(plan: SharedPlan | None) -> Any:
        if plan is None:
            return unshared()
        return launch(q, kv_cache, block_tables, shared, scale, plan, return_lse, device, given, out)

    return by_fitting_plan(_fitting, key, [*shared_plans(*shape, nbits), None], by)


def launch(
    q: Any, kv_cache: Any, block_tables: Any, shared: Any, scale: float, plan: SharedPlan, return_lse: bool,
    device: str | None, given: GivenVariant, out: Any,
) -> Any:  # fmt: skip
    """The result into `out` by a given plan, on about as many blocks as there are multiprocessors; the logarithms or None."""
    sequences, q_len, q_heads, head_dim = q.shape
    page_size, kv_heads = kv_cache.shape[2:4]
    group, pairs, heads = q_heads // kv_heads, sequences * kv_heads, plan.prefix.heads
    blocks = with_whole_pairs(num_sms_of(q, place(device, is_cuda(q))), pairs)
    split = split_of(plan, page_size, q_len, given.variant.window)
    of_prefix = places(sequences, members_of(q_len, group), kv_heads, blocks), ROWS
    of_own = own_places(pairs, block_tables.shape[1] * page_size, blocks, split), q_len, group
    prefix, own = ([empty(q, shape, "float32") for shape in ((*rows, head_dim), rows)] for rows in (of_prefix, of_own))
    by_head = q.unflatten(2, (kv_heads, group))
    lse = empty(q, (sequences, q_len, kv_heads, group), "float32") if return_lse else None
    notes = empty(q, (NOTES, pairs), "int32")
    rows, factors, kind, (q_rows, q_type) = kv_cache, None, None, (by_head.flatten(0, 1), None)
    if isinstance(kv_cache, QuantizedCache):
        rows, factors, kind, (q_rows, q_type) = (
            units_of_codes(kv_cache),
            kv_cache.factors,
            kv_cache.format,
            as_f16(q_rows),
        )
    shape = {"q_len": q_len, "kv_heads": kv_heads, "group": group, "head_dim": head_dim}
    problem = SharedProblem(plan, unit_of(page_size), split, kind, q_type, given.variant, given.words)
    shared_prefix_kernel.on(device)(
        by_head, q_rows, rows, block_tables, shared, notes, *prefix, *own, scale * math.log2(math.e), factors,
        given.parameters, given.bits, **shape, page_size=page_size, blocks=blocks, problem=problem,
    )  # fmt: skip
    by_token = [part.unflatten(1, (ROWS // heads, heads)) for part in prefix]
    shared_prefix_merge_kernel.on(device)(
        shared, notes, *by_token, *own, out.unflatten(2, (kv_heads, group)), lse, **shape, heads=heads, row_tokens=ROWS // heads
    )  # fmt: skip
    return None if lse is None else lse.flatten(2, 3)


def shared_plans(q_len: int, group: int, head_dim: int, nbits: int = 16) -> Iterator[SharedPlan]:
    """The one whose prefixes have the largest tiles first. nbits: of an element of the cache."""
    groups = 1 << (padded_columns(q_len, group, 1) // 8 - 1).bit_length()  # of eight columns
    width = padded_columns(q_len, group, groups)
    to_merge = head_dim * width * f32.nbytes * (WARPGROUP // groups)
    rest = stage_nbytes(OWN_TILE, head_dim, nbits)
    own_stages = OWN_STAGES * stage_nbytes(OWN_TILE, head_dim, 16) // rest
    left = SHARED_NBYTES - 2 * RESERVED_NBYTES - to_merge - ROWS * head_dim * 2 - own_stages * rest
    for kv_tile, prefix, own, copying in PLANS if nbits == 16 else PLANS_OF_CODES:
        each = stage_nbytes(kv_tile, head_dim, 16)
        stages = min(left // each, MOST_STAGES) if nbits == 16 else ELEMENT_STAGES
        of_codes = (left - stages * each) // stage_nbytes(kv_tile, head_dim, nbits) if nbits < 16 else 0
        plan = PrefillPlan(row_heads(group), kv_tile, stages, stages, prefix, copying, min(of_codes, MOST_CODE_STAGES))
        yield SharedPlan(plan, OWN_TILE, own_stages, own, groups)


def split_of(plan: SharedPlan, page_size: int, q_len: int, window: int | None) -> Split:
    """How blocks share what is behind prefixes; the last page that a window hides is where it begins."""
    recent = None if window is None else window + q_len - 1
    return Split(min(plan.tile, page_size), False, recent, 1 if recent is None else page_size)


def unit_of(page_size: int) -> int:
    return max(UNIT, page_size)
