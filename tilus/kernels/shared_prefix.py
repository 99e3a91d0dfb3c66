"""Decoding of batches whose sequences begin with the same pages: those are read once for all of them.

Launches that depend on each other: one finds the groups (`shared_prefix_groups`), one attends to their prefixes, with many
queries a product (`shared_prefix_rows`), and one, `paged_decode`'s, to the rest of each sequence, and adds all up. The host
reads nothing. The groups are the same in all layers of a model: found once, they leave two launches.

Budget for 64 sequences with 8192 tokens in common and 256 of their own, 32 query heads and 8 of keys, 128 elements of 16 bits,
on an H100. The prefix is 256 rows a kv head: 16 row tiles by 64 units of 128 tokens, 8 at most for each of 132 multiprocessors,
of 2048 cycles: 10 us at 1.7 GHz, in which 34 MB are read (11 us). Partial results of 148 parts of 64 KB are written and read in
the L2 cache. The rest is 67 MB: 21 us at 3.14 TB/s.

Partial softmax over parts of the keys: see `merge_states`; shared prefixes of a batch: J. Juravsky et al., "Hydragen", arXiv
2402.05099; Z. Ye et al., "FlashInfer", arXiv 2501.01005.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from tilus import TilusError
from tilus.kernels.allocate import counters, empty, is_cuda
from tilus.kernels.index_checks import check_tables
from tilus.kernels.kv_cache import QuantizedCache
from tilus.kernels.paged_decode import by_plans, by_queries, check_decode, paged_decode
from tilus.kernels.paged_prefill import PrefillPlan, by_fitting_plan, plans_of
from tilus.kernels.paged_prefill_tiles import ROWS
from tilus.kernels.plan_choice import num_sms_of
from tilus.kernels.shared_prefix_groups import (
    FIELDS,
    PrefixResults,
    PrefixSplit,
    members_of,
    places,
    shared_prefix_groups_kernel,
)
from tilus.kernels.shared_prefix_rows import shared_prefix_kernel
from tilus.kernels.vectors import power_of_two
from tilus.runtime.execute import place

UNIT = 128  # tokens
LEAST_LANES = 32
MOST_HEAD_DIM = 128
MOST_COLUMNS = 32  # of a launch; with more the registers do not suffice for prefixes and the rest


def shared_prefix_decode(
    q: Any, kv_cache: Any, block_tables: Any, kv_lens: Any, scale: float, *, return_lse: bool = False,
    constant_tables: bool = False, shared: Any = None, device: str | None = None,
) -> Any:  # fmt: skip
    """`paged_decode`, which reads pages that neighbouring sequences begin with once for all of them (sm_90a).

    Arguments, result and errors are those of `paged_decode`, without fixed_split and variants, and so is the meaning, whatever
    the tables hold; bits may differ.
    What counts is equal entries at the start of the block tables of neighbours in the batch: at least 256 tokens that all
    queries of both see whole. There may be several groups with prefixes of different lengths, and sequences that share nothing;
    put those with the same prefix next to each other. Where prefixes are nested, each sequence takes part in one: neighbours
    stay together if they have at least half as much in common as each has with its other neighbour, and all of a group share
    what is common to all.

    shared: what `find_shared_prefixes` gave for these tables and lengths, to use it in all layers of a model: two launches. By
    default it is found here, by one more. More than 32 columns, q_len times Hq / Hkv rounded up to a power of two, take several
    calls, which find their own. Caches of codes and heads of 256 elements, for which the registers do not suffice, are left to
    `paged_decode`, and nothing is shared.
    """
    group = check_decode(q, kv_cache, block_tables, kv_lens, None)
    check_tables("shared_prefix_decode", block_tables, kv_lens, kv_cache, device=device)
    q_len, head_dim = q.shape[1], q.shape[3]
    if isinstance(kv_cache, QuantizedCache) or head_dim > MOST_HEAD_DIM or q.shape[0] < 2:
        return paged_decode(
            q, kv_cache, block_tables, kv_lens, scale, return_lse=return_lse, constant_tables=constant_tables, device=device
        )  # fmt: skip
    most = MOST_COLUMNS // power_of_two(group)
    if q_len > most:

        def attend(part: Any, lens: Any) -> tuple[Any, Any]:
            return shared_prefix_decode(part, kv_cache, block_tables, lens, scale, return_lse=True, device=device)

        out, lse = by_queries(q, kv_lens, most, attend)
        return (out, lse) if return_lse else out
    if shared is None:
        shared = find_shared_prefixes(
            block_tables, kv_lens, q_len, group, kv_cache.shape[2], constant_tables=constant_tables, device=device
        )  # fmt: skip
    elif tuple(shared.shape) != (FIELDS, q.shape[0]):
        raise TilusError(
            f"shared_prefix_decode: shared of shape {list(shared.shape)} for {q.shape[0]} sequences, expected "
            f"[{FIELDS}, {q.shape[0]}]",
            hint="it is what find_shared_prefixes gives for the same block_tables and kv_lens",
        )
    plans = prefix_plans(power_of_two(group), head_dim)
    key = "shared prefix", q.dtype, kv_cache.shape[3], group, kv_cache.shape[2], head_dim, q_len
    prefix = by_fitting_plan(
        key, plans, lambda plan: attend_to_prefixes(q, kv_cache, block_tables, shared, scale, plan, device)
    )
    out, lse = by_plans(q, kv_cache, block_tables, kv_lens, scale, return_lse, None, device, False, prefix)
    return (out, lse) if return_lse else out


def find_shared_prefixes(
    block_tables: Any, kv_lens: Any, q_len: int, group: int, page_size: int, *, constant_tables: bool = False,
    device: str | None = None,
) -> Any:  # fmt: skip
    """What `shared_prefix_decode` takes as `shared`: which sequences share pages. One launch; the host reads nothing.

    block_tables: int32 [S, max_pages]. kv_lens: int32 [S]. q_len: queries a sequence. group: query heads of a kv head.
    constant_tables: as of `paged_decode`. Returns: int32 [6, S], for that function only.
    """
    sequences = kv_lens.shape[0]
    shared = empty(kv_lens, (FIELDS, sequences))
    lanes = max(LEAST_LANES, power_of_two(sequences))
    shared_prefix_groups_kernel.on(device)(
        block_tables, kv_lens, empty(kv_lens, (sequences + 1,)), shared, counters(kv_lens, 1), q_len=q_len,
        page_size=page_size, members=members_of(q_len, group), unit=unit_of(page_size), lanes=lanes, early=constant_tables,
    )  # fmt: skip
    return shared


def attend_to_prefixes(
    q: Any, kv_cache: Any, block_tables: Any, shared: Any, scale: float, plan: PrefillPlan, device: str | None,
    blocks: int | None = None,
) -> PrefixResults:  # fmt: skip
    """Partial results of the prefixes of all groups, by a given plan; on as many blocks as there are multiprocessors."""
    sequences, q_len, q_heads, head_dim = q.shape
    page_size, kv_heads = kv_cache.shape[2:4]
    group = q_heads // kv_heads
    split = PrefixSplit(unit_of(page_size), blocks or num_sms_of(q, place(device, is_cuda(q))))
    shape = places(sequences, members_of(q_len, group), kv_heads, split.blocks), ROWS // plan.heads, plan.heads
    out, lse = empty(q, (*shape, head_dim), "float32"), empty(q, shape, "float32")
    shared_prefix_kernel.on(device)(
        q.flatten(0, 1).unflatten(1, (kv_heads, group)), kv_cache, block_tables, shared, out, lse, scale * math.log2(math.e),
        q_len=q_len, group=group, head_dim=head_dim, page_size=page_size, split=split, plan=plan,
    )  # fmt: skip
    return PrefixResults(shared, out, lse, split)


def prefix_plans(heads: int, head_dim: int) -> tuple[PrefillPlan, ...]:
    """Those of prefill; the warps that copy also look for their tiles, and get registers for it where the others have some."""
    return tuple(
        replace(plan, registers=registers, registers_to_copy=504 - 2 * registers)
        for plan in plans_of(heads, head_dim)
        for registers in (216, 232)
    )


def unit_of(page_size: int) -> int:
    return max(UNIT, page_size)
