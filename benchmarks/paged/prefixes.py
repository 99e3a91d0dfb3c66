"""Rows of decoding where sequences begin with the same pages: shared_prefix_decode beside paged_decode, which reads all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from products.reads import Reads
from products.timing import Budget, Timer

from paged.batches import PagedBatch, check, random_batch
from paged.cases import Case
from tilus.kernels import paged_decode
from tilus.kernels.kv_cache import KV_FORMATS, QuantizedCache
from tilus.kernels.shared_prefix import find_shared_prefixes, shared_prefix_decode

COLUMNS = {
    "batch": 7, "prefix": 8, "groups": 8, "own": 6, "us": 9, "found": 8, "find": 7, "decode": 9, "read": 8, "bar": 6,
}  # fmt: skip


@dataclass(frozen=True)
class PrefixCase:
    """batch: sequences, in `groups` equal runs of neighbours that share `prefix` tokens; own: further ones of each. bar: wanted
    microseconds. kv_dtype: see `Case`."""

    batch: int
    prefix: int
    own: int
    groups: int = 1
    bar: float | None = None
    kv_dtype: str = "bfloat16"

    @property
    def case(self) -> Case:
        return Case(self.batch, self.prefix + self.own, kv_dtype=self.kv_dtype)

    @property
    def nbytes(self) -> int:
        """That have to be read once."""
        tokens = self.groups * self.prefix + self.batch * self.own
        return self.case.nbytes // sum(self.case.lengths) * tokens


PREFIXES = [
    PrefixCase(64, 8192, 256, bar=55.0), PrefixCase(16, 8192, 256), PrefixCase(64, 32768, 256), PrefixCase(256, 8192, 256),
    PrefixCase(64, 2048, 256, groups=8), PrefixCase(64, 0, 1024),
]  # fmt: skip
QUANTISED_PREFIXES = [replace(case, bar=None, kv_dtype=name) for name in KV_FORMATS for case in PREFIXES]


def shared_batch(wanted: PrefixCase, l2_nbytes: int, device: str = "cuda") -> PagedBatch:
    """Pages of all sequences in random order; those of a prefix are those of its group's first sequence."""
    own = random_batch(replace(wanted.case, context=wanted.own), 1, device)
    prefixes = random_batch(
        replace(wanted.case, batch=wanted.groups, context=max(wanted.prefix, wanted.case.page)), 1, device
    )
    pages = own.caches[0].shape[0]
    each = wanted.batch // wanted.groups
    tables = prefixes.block_tables[:, : wanted.prefix // wanted.case.page].repeat_interleave(each, dim=0) + pages
    order = torch.randperm(pages + prefixes.caches[0].shape[0], generator=torch.Generator().manual_seed(0)).to(device)
    back = torch.argsort(order)
    tables = order[torch.cat([tables, own.block_tables], dim=1).long()].int()
    copies = max(1, -(-3 * l2_nbytes // wanted.nbytes))
    caches = [joined(own.caches[0], prefixes.caches[0], back) for _ in range(copies)]
    return PagedBatch(wanted.case, own.q, caches, tables, own.kv_lens + wanted.prefix, own.scale)


def joined(first: Any, second: Any, order: torch.Tensor) -> Any:
    """A cache of the pages of two, of which page i is their order[i]-th."""
    if not isinstance(first, QuantizedCache):
        return torch.cat([first, second])[order]
    codes, factors = (
        torch.cat(parts)[order] for parts in ((first.codes, second.codes), (first.factors, second.factors))
    )
    return QuantizedCache(first.format, codes, factors)


def rows(timer: Timer, budget: Budget, peers: bool, cases: Sequence[PrefixCase]) -> Iterator[dict[str, Any]]:
    """peers: of no meaning here; the other suites have them."""
    reads = Reads(timer)
    for wanted in cases:
        if budget.exhausted:
            return
        batch = shared_batch(wanted, timer.l2_nbytes)
        yield row(timer, reads, wanted, batch)
        del batch
        torch.cuda.empty_cache()


def row(timer: Timer, reads: Reads, wanted: PrefixCase, batch: PagedBatch) -> dict[str, Any]:
    case, tables, lens = wanted.case, batch.block_tables, batch.kv_lens
    group = case.heads // case.kv_heads

    def find() -> Any:
        return find_shared_prefixes(tables, lens, case.q_len, group, case.page, constant_tables=True)

    def attend(cache: Any, shared: Any = None) -> torch.Tensor:
        return shared_prefix_decode(batch.q, cache, tables, lens, batch.scale, constant_tables=True, shared=shared)

    def decode(cache: Any) -> torch.Tensor:
        return paged_decode(batch.q, cache, tables, lens, batch.scale, constant_tables=True)

    shared = find()
    error = check(batch, attend(batch.caches[0], shared), "shared_prefix_decode")
    us = timer.us([lambda cache=cache: attend(cache, shared) for cache in batch.caches])
    with_find_us = timer.us([lambda cache=cache: attend(cache) for cache in batch.caches])
    error = max(error, check(batch, attend(batch.caches[-1]), "shared_prefix_decode"))
    check(batch, decode(batch.caches[0]), "paged_decode")
    decode_us = timer.us([lambda cache=cache: decode(cache) for cache in batch.caches])
    return {
        "phase": "decode", "batch": case.batch, "prefix": wanted.prefix, "groups": wanted.groups, "own": wanted.own,
        "heads": case.heads, "kv_heads": case.kv_heads, "head_dim": case.head_dim, "page": case.page,
        "kv_dtype": case.kv_dtype, "us": us, "with_find_us": with_find_us, "find_us": timer.us([find]),
        "paged_decode_us": decode_us, "read_us": reads.us(wanted.nbytes)[0],
        "error": round(error, 6), "bar": wanted.bar, "met": None if wanted.bar is None else with_find_us <= wanted.bar,
        "failures": {},
    }  # fmt: skip


def cells(row: dict[str, Any]) -> list[Any]:
    keys = (
        "batch",
        "prefix",
        "groups",
        "own",
        "us",
        "with_find_us",
        "find_us",
        "paged_decode_us",
        "read_us",
    )
    return [*(row[key] for key in keys), row["bar"]]
