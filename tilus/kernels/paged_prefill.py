"""Attention of many queries over a paged key-value cache on Hopper: prefill, chunks of it, and mixed batches in one launch.

As many blocks as run at once take tiles of 128 rows in turns (`paged_prefill_tiles`), or parts of them where they are few
(`paged_prefill_split`). In each block four warps ask for queries and pages by tensor copies (`paged_prefill_stages`); quantised
ones go through the registers of eight (`paged_prefill_codes`). Two warpgroups have 64 rows each (`paged_prefill_softmax`): scores
are products of shared memory, weights stay in registers as left operands of the products with values, which are read transposed.

Budget of 128 rows by 128 tokens of 128 elements, in cycles of a multiprocessor of an H100. The products take 1024 each, 2048
together: 2 x 128 x 128 x 128 multiplications at 2048 a cycle. 128 x 128 exponentials at 16 a cycle take 1024 of another unit. The
machine code of a step without mask has 464 instructions a warp, and each of the four schedulers issues those of two warps: 928,
with mask 1284. The four warps that copy share pages of 16 tokens out: about 140 on each scheduler.
Of shared memory each warpgroup's products read 16 KB of queries, 32 KB of keys and 32 KB of
values: for both of them 160 KB, at 128 bytes a cycle 1280. So the products are the limit, as long as the other warpgroup,
whose turn it is not, has its softmax under them.
Shared memory holds 32 KB of queries and twice 64 KB of keys and values: one block on a multiprocessor.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Any

import tilus
from tilus import Const, Tensor, TilusError, bf16, f16, f32, int32
from tilus.kernels.allocate import counters, empty, is_cuda
from tilus.kernels.attention import group_of
from tilus.kernels.attention_variant import AS_IT_IS, NO_VARIANT, GivenVariant, Variant, check_variant
from tilus.kernels.index_checks import check_tables
from tilus.kernels.kv_cache import QuantizedCache, check_rows
from tilus.kernels.paged_decode import units_of_codes
from tilus.kernels.paged_decode_arguments import HEAD_DIMS
from tilus.kernels.paged_prefill_codes import CodeMemory, Converters, Filling
from tilus.kernels.paged_prefill_softmax import HALF, Kind, Rows, Turns
from tilus.kernels.paged_prefill_split import SplitRows, splits_of
from tilus.kernels.paged_prefill_stages import Copying, Memory
from tilus.kernels.paged_prefill_tiles import LEAST_STEPS, ROWS, Tables, Tiles, Visits, kept_slack, slots, tokens_of
from tilus.kernels.plan_choice import by_fitting_plan, num_sms_of
from tilus.kernels.vectors import power_of_two
from tilus.runtime.execute import place

DTYPES = ("torch.float16", "torch.bfloat16")
CONSUMERS, PRODUCERS = 8, 4  # warps
CONVERTERS = Converters()
FACTORS_NBITS = 32  # of a token's keys or values, at most
MOST_CODE_STAGES = 4
KV_TILE = 128  # tokens of a tile of the cache, mostly
LEAST_SPLIT = 2 * LEAST_STEPS * KV_TILE  # tokens of the longest sequence, from which on tiles may be shared out
CODES_NBYTES = 66 * 1024  # of shared memory for tiles of codes and their factors
_fitting: dict[tuple[Any, ...], PrefillPlan] = {}


@dataclass(frozen=True)
class PrefillPlan:
    """What a block does. heads: query heads of a tile of rows, a power of two up to 16. kv_tile: tokens of the cache in a stage.
    key_stages, value_stages: tiles of keys and of values in shared memory. registers, registers_to_copy: of a thread that
    computes, and that copies. code_stages: of tiles of codes of each, where the cache is quantised."""

    heads: int
    kv_tile: int = KV_TILE
    key_stages: int = 2
    value_stages: int = 2
    registers: int = 232
    registers_to_copy: int = 40
    code_stages: int = 0


@tilus.kernel(varying=("tokens", "sequences", "sequences_plus_1", "tables", "pages"))
def paged_prefill_kernel(
    q: Tensor["dtype", "tokens", "kv_heads", "group", "head_dim"],
    kv_cache: Tensor["unit", "pages", 2, "page_size", "kv_heads", "row"],
    block_tables: Tensor[int32, "tables", "max_pages"],
    q_start: Tensor[int32, "sequences_plus_1"],
    kv_lens: Tensor[int32, "sequences"],
    out: Tensor["out_dtype", "tokens", "kv_heads", "group", "head_dim"],
    scale_log2: float,
    blocks: int32,
    lse: Tensor[f32, "tokens", "kv_heads", "group"] = None,
    parameters: Tensor[f32, "count"] = None,
    bits: Tensor[int32, "tokens", "words"] = None,
    lists: Tensor[int32, "sequences_plus_1"] = None,
    factors: Tensor[f16, "pages", "kv_heads", 2, "kinds", "page_size"] = None,
    splits: int32 = 1,
    partial_out: Tensor[f32, "places", 2, "head_dim", 64] = None,
    partial_lse: Tensor[f32, "places", 128] = None,
    tickets: Tensor[int32, "counters"] = None,
    *,
    kv_heads: Const,
    group: Const,
    head_dim: Const,
    page_size: Const,
    causal: Const,
    plan: Const,
    variant: Const = NO_VARIANT,
    words: Const = 0,
    kind: Const = None,
    q_type: Const = None,
):
    """lists: where the pages of each sequence begin in the only row of block_tables; without it each sequence has a row. kind:
    the format of a quantised cache, whose rows are its codes in units of 16 bits, and whose factors are given. q_type: what the
    bits of q are where they are not those of q's dtype; they become it. splits, partial_out, partial_lse, tickets: where blocks
    share tiles of rows, as `SplitRows` says."""
    visits = Visits(plan.heads, plan.kv_tile, causal, variant.hides, variant.window)
    converting = converting_roles(head_dim)
    warps = CONSUMERS + (PRODUCERS if kind is None else len(converting) * CONVERTERS.warps)
    tilus.grid(blocks, warps=warps)
    tilus.launch_dependents()
    tilus.wait_dependencies()
    slack = kept_slack(q_start, tokens_of(plan.heads), warps)
    parts = None if partial_out is None else splits
    memory = Memory(q.dtype, head_dim, plan)
    tables = Tables(block_tables, lists, page_size)
    tiles = Tiles(q, q_start, kv_lens, blocks, slack, visits, parts)
    if kind is None:
        with tilus.warps(CONSUMERS, PRODUCERS, registers=plan.registers_to_copy):
            tiles.each(Copying(memory.stages(), q, kv_cache, tables, plan.heads).work)
    else:
        codes = CodeMemory(kind, head_dim, page_size, plan, CONVERTERS)
        for role, having in enumerate(converting):
            with tilus.warps(CONSUMERS + role * CONVERTERS.warps, CONVERTERS.warps, registers=plan.registers_to_copy):
                tiles.each(Filling(memory.stages(), codes.of(having), (q, kv_cache, factors), tables, plan.heads).work)

    for half in range(2):
        with tilus.warps(4 * half, 4, registers=plan.registers):
            rows_kind = Kind(plan.heads, causal, variant, words, q_type)
            given = memory.stages(), Turns(memory.turns, half), (out, lse), scale_log2, rows_kind, parameters, bits
            rows = Rows(*given) if parts is None else SplitRows(*given, (partial_out, partial_lse, tickets))
            tiles.each(rows.compute)


def paged_prefill(
    q: Any, kv_cache: Any, block_tables: Any, q_start: Any, kv_lens: Any, scale: float, *, causal: bool = True,
    return_lse: bool = False, variant: Variant = NO_VARIANT, parameters: Any = None, bits: Any = None,
    device: str | None = None, out: Any = None,
) -> Any:  # fmt: skip
    """Attention of ragged queries over paged keys and values (sm_90a): `paged_attention` for many queries a sequence.

    q: float16 or bfloat16 [M, Hq, D], the queries of all sequences one after another. kv_cache: [pages, 2, page_size, Hkv, D]
    of the same dtype, keys at index 0, values at 1; a strided view (one layer of a pool, say) is fine. Or a `QuantizedCache`.
    block_tables: int32 [S, max_pages], the pages of each sequence in order. q_start: int32 [S + 1], where each sequence's queries
    start in q. kv_lens: int32 [S], tokens in the cache, those of the queries included. Hq / Hkv is 1 to 16, D 64, 96, 128 or
    256, page_size 16, 32, 64 or a multiple of 128. scale: what scores are multiplied with, above 0. variant: functions
    that change scores, hide keys or add a sink, and a window; parameters: their f32 tensor, if any; bits: int32 [M, words], what
    `pack_bits` makes of up to 256 conditions of each query, if any. Torch tensors. device: where to run (reference, emulator,
    cuda), by default as the arguments say. out: where the result goes, contiguous, float16 or bfloat16; by default like q.

    Query j of a sequence with q_len queries sees the first kv_len - q_len + j + 1 tokens of the cache, or all of them where it is
    not causal; one that sees none gets zeros. Nothing beyond kv_len is looked at. One launch; the host reads no tensor, so it can
    be captured in a CUDA graph.

    Returns: [M, Hq, D]; with return_lse also float32 [M, Hq], the natural logarithm of the sum of exp(scaled score), minus
    infinity where there is no key (`merge_states` takes both). Scores and sums are f32; the softmax weights are rounded to q's
    dtype. With a quantised cache all products are of f16: queries and weights are rounded to it, and so are elements, code *
    scale or code * scale + centre.
    Raises: TilusError when shapes, dtypes or devices do not fit together; with TILUS_DEBUG=1 also for lengths longer than the
    block table, entries that are no pages, and starts that are not in order.
    """
    check_prefill("paged_prefill", q, kv_cache, q_start, kv_lens, scale)
    if block_tables.ndim != 2 or block_tables.shape[0] != kv_lens.shape[0]:
        raise TilusError(
            f"paged_prefill: block_tables of shape {list(block_tables.shape)} for {kv_lens.shape[0]} sequences, expected "
            f"[{kv_lens.shape[0]}, max_pages]"
        )
    check_variant("paged_prefill", variant, bits, q.shape[0], causal)
    check_tables("paged_prefill", block_tables, kv_lens, kv_cache, q_start=q_start, queries=q.shape[0], device=device)
    given = GivenVariant(variant, parameters, bits)
    out, lse = by_plans(q, kv_cache, block_tables, q_start, kv_lens, scale, causal, return_lse, device, given, out=out)
    return (out, lse) if return_lse else out


def by_plans(
    q: Any, kv_cache: Any, block_tables: Any, q_start: Any, kv_lens: Any, scale: float, causal: bool, return_lse: bool,
    device: str | None, given: GivenVariant, lists: Any = None, out: Any = None,
) -> tuple[Any, Any]:  # fmt: skip
    """(result, logarithms or None) by the first plan that the registers suffice for. lists: see the kernel."""
    sequences, kv_heads = kv_lens.shape[0], kv_cache.shape[3]
    group = q.shape[1] // kv_heads
    out = empty(q, tuple(q.shape)) if out is None else out
    heads = heads_of(q.shape[0], sequences, group)
    tiles = tiles_of(q.shape[0], sequences, kv_heads, group, heads)
    num_sms = num_sms_of(q, place(device, is_cuda(q)))
    longest = block_tables.shape[1] * kv_cache.shape[2]  # tokens
    splits = 1
    if longest >= LEAST_SPLIT and given.variant.sink is None:
        splits = splits_of(likely_tiles(q.shape[0], sequences, kv_heads, group, heads), num_sms, longest // KV_TILE)
    blocks = min(tiles * splits, num_sms)

    def by(plan: PrefillPlan) -> tuple[Any, Any]:
        return launch(
            q, kv_cache, block_tables, q_start, kv_lens, scale, causal, plan, blocks, return_lse, device, given, lists, out,
            splits,
        )  # fmt: skip

    kind = kv_cache.format if isinstance(kv_cache, QuantizedCache) else None
    key = (
        q.dtype, out.dtype, kv_heads, heads, group, kv_cache.shape[2], q.shape[2], causal, return_lse, given.variant, given.words,
        lists is None, kind, splits > 1,
    )  # fmt: skip
    plans = plans_of(heads, q.shape[2]) if kind is None else plans_of_codes(heads, q.shape[2], kind.code.nbits)
    return by_fitting_plan(_fitting, key, plans, by)


def plans_of(heads: int, head_dim: int) -> tuple[PrefillPlan, ...]:
    """The largest tile of the cache first: the fewer tiles, the less what each takes beside its products counts."""
    kv_tiles = (KV_TILE, 64) if head_dim <= 128 else (32, 16)
    registers = {96: (224, 56), 256: (216, 72)}.get(head_dim, (232, 40))  # copies of more boxes take more
    return tuple(PrefillPlan(heads, kv_tile, 2, 2, *registers) for kv_tile in kv_tiles)


@functools.cache
def plans_of_codes(heads: int, head_dim: int, nbits: int) -> tuple[PrefillPlan, ...]:
    """Those for a quantised cache: codes have the memory that elements leave."""
    plans = plans_of(heads, head_dim)
    registers = {"registers": 224, "registers_to_copy": 32} if len(converting_roles(head_dim)) > 1 else {}
    stages = [CODES_NBYTES * 4 // (plan.kv_tile * (head_dim * nbits + FACTORS_NBITS)) for plan in plans]
    return tuple(
        replace(plan, **registers, code_stages=min(count, MOST_CODE_STAGES))
        for plan, count in zip(plans, stages, strict=True)
    )


def converting_roles(head_dim: int) -> tuple[tuple[int, ...], ...]:
    """What each warpgroup that turns codes into elements has, keys (0) and values (1): with heads of 256 those that compute leave
    no registers for two."""
    return ((0,), (1,)) if head_dim <= 128 else ((0, 1),)


def launch(
    q: Any, kv_cache: Any, block_tables: Any, q_start: Any, kv_lens: Any, scale: float, causal: bool, plan: PrefillPlan,
    blocks: int, return_lse: bool, device: str | None, given: GivenVariant = AS_IT_IS, lists: Any = None,
    out: Any = None, splits: int = 1,
) -> tuple[Any, Any]:  # fmt: skip
    """(result, logarithms or None) by a given plan, on so many blocks. splits: parts of a tile of rows, at most."""
    page_size, kv_heads, head_dim = kv_cache.shape[2:]
    by_head = (kv_heads, q.shape[1] // kv_heads)
    out, lse = (
        empty(q, tuple(q.shape)) if out is None else out,
        empty(q, tuple(q.shape[:2]), "float32") if return_lse else None,
    )
    rows, factors, kind, q_type = kv_cache, None, None, None
    if isinstance(kv_cache, QuantizedCache):
        rows, factors, kind = units_of_codes(kv_cache), kv_cache.factors, kv_cache.format
        q, q_type = as_f16(q)
    if q.shape[0]:
        paged_prefill_kernel.on(device)(
            q.unflatten(1, by_head), rows, block_tables, q_start, kv_lens, out.unflatten(1, by_head),
            scale * math.log2(math.e), blocks, None if lse is None else lse.unflatten(1, by_head), given.parameters, given.bits,
            lists, factors, *partials_of(q, tiles_of(q.shape[0], kv_lens.shape[0], *by_head, plan.heads), splits),
            kv_heads=kv_heads, group=by_head[1], head_dim=head_dim, page_size=page_size, causal=causal, plan=plan,
            variant=given.variant, words=given.words, kind=kind, q_type=q_type,
        )  # fmt: skip
    return out, lse


def tiles_of(queries: int, sequences: int, kv_heads: int, group: int, heads: int) -> int:
    """Tiles of rows, at most."""
    return slots(queries, sequences, tokens_of(heads)) * kv_heads * -(-group // heads)


def likely_tiles(queries: int, sequences: int, kv_heads: int, group: int, heads: int) -> int:
    """Those that are not empty, if all sequences have as many queries."""
    tokens = -(-queries // max(sequences, 1))
    return sequences * -(-tokens // tokens_of(heads)) * kv_heads * -(-group // heads)


def partials_of(q: Any, tiles: int, splits: int) -> tuple[Any, ...]:
    """(splits, places for partial results of tiles, for their logarithms, tickets); None where tiles are whole."""
    if splits == 1:
        return 1, None, None, None
    places, head_dim = tiles * splits, q.shape[2]
    results, logs = empty(q, (places, 2, head_dim, HALF), "float32"), empty(q, (places, ROWS), "float32")
    return splits, results, logs, counters(q, 2 * tiles)


def as_f16(q: Any) -> tuple[Any, Any]:
    """(the bits of queries as f16, what they are where they are not f16): tiles of both have one type in the kernel."""
    import torch

    return (q, None) if q.dtype == torch.float16 else (q.view(torch.float16), bf16)


def heads_of(queries: int, sequences: int, group: int) -> int:
    """As many heads a tile of rows as make the fewest tiles, if all sequences have as many queries; of equals the most."""
    tokens = -(-queries // max(sequences, 1))

    def tiles(heads: int) -> int:
        return -(-tokens // tokens_of(heads)) * -(-group // heads)

    return min((h for h in (16, 8, 4, 2, 1) if h <= power_of_two(group)), key=tiles)


def check_prefill(what: str, q: Any, kv_cache: Any, q_start: Any, kv_lens: Any, scale: float) -> None:
    """Raise a TilusError where shapes do not fit a call of the function `what`."""
    if q.ndim != 3 or len(kv_cache.shape) != 5 or kv_lens.ndim != 1:
        raise TilusError(
            f"{what}: shapes q {list(q.shape)}, kv_cache {list(kv_cache.shape)} and kv_lens {list(kv_lens.shape)}, "
            "expected [tokens, q_heads, head_dim], [pages, 2, page_size, kv_heads, head_dim] and [sequences]"
        )
    sequences, (page_size, kv_heads, head_dim) = kv_lens.shape[0], kv_cache.shape[2:]
    if tuple(q_start.shape) != (sequences + 1,):
        raise TilusError(
            f"{what}: q_start of shape {list(q_start.shape)} for {sequences} sequences, expected [{sequences + 1}]",
            hint="the last entry is the number of query tokens",
        )
    group_of(what, q.shape[1], kv_heads)
    if q.shape[2] != head_dim:
        raise TilusError(f"{what}: head_dim {q.shape[2]} of q and {head_dim} of kv_cache, expected the same")
    quantised = isinstance(kv_cache, QuantizedCache)
    if str(q.dtype) not in DTYPES or not (quantised or q.dtype == kv_cache.dtype):
        cached = "codes" if quantised else kv_cache.dtype
        raise TilusError(
            f"{what}: q of {q.dtype} and kv_cache of {cached}, expected float16 or bfloat16, and the same for elements",
            hint="caches of other types are QuantizedCache: tilus.kernels.kv_cache.quantized_cache",
        )
    if head_dim not in HEAD_DIMS:
        raise TilusError(
            f"{what}: head_dim {head_dim}, expected one of {', '.join(map(str, HEAD_DIMS))}",
            hint="pad heads with zeros; scale stays that of the real head_dim",
        )
    check_rows(what, kv_cache)
    if page_size not in (16, 32, 64) and (page_size < 128 or page_size % 128):
        raise TilusError(f"{what}: page_size {page_size}, expected 16, 32, 64 or a multiple of 128")
    if not scale > 0.0:
        raise TilusError(f"{what}: scale {scale}, expected more than 0", hint="negate q for a negative scale")
