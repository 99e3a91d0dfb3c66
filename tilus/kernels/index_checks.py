"""Indices that the arguments of a kernel hold, checked before it runs: a debug mode, TILUS_DEBUG=1, which waits for the device.

A kernel of its own looks for the first index of each row that is out of range, so that the checked kernels stay as they are, no
wrong index is ever used, and the device can go on. Without the debug mode nothing is launched.
"""

from __future__ import annotations

from typing import Any

import numpy as np

import tilus
from tilus import Tensor, TilusError, config, int32
from tilus.kernels.allocate import empty, is_torch
from tilus.runtime.ahead import is_dry
from tilus.runtime.graph_timer import is_capturing

WARPS = 4
COLUMNS = 1024  # indices that a block looks at together
NONE = 2**31 - 1


@tilus.kernel
def first_outside_kernel(
    indices: Tensor[int32, "rows", "columns"],
    found: Tensor[int32, "rows", 2],
    low: int,
    limit: int,
    tokens: Tensor[int32, "rows"] = None,
    page_size: int = 1,
):
    """Of each row the first column with an index below low or not below limit, and that index; NONE where there is no such.

    tokens: of a row, only the first tokens / page_size columns, rounded up, count.
    """
    tilus.grid(indices.shape[0], warps=WARPS)
    row = tilus.block_id(0)
    count = indices.shape[1]
    if tokens is not None:
        count = min(count, tilus.cdiv(max(tokens[row], 0), page_size))
    first = NONE
    for at in tilus.range(0, count, COLUMNS):
        columns = tilus.arange(COLUMNS, start=at)
        index = tilus.load(indices, [row, at], [1, COLUMNS]).reshape([COLUMNS])
        outside = ((index < low) | (index >= limit)) & (columns < count)
        first = min(first, tilus.item(tilus.min(tilus.where(outside, columns, NONE))))
    tilus.store(found, [row, 0], tilus.full([1, 1], first, int32))
    if first < NONE:
        tilus.store(found, [row, 1], tilus.full([1, 1], indices[row, first], int32))


def check_tables(
    what: str, block_tables: Any, kv_lens: Any, kv_cache: Any, *, q_start: Any = None, queries: int = 0,
    device: str | None = None,
) -> None:  # fmt: skip
    """Raise, in the debug mode, unless block tables have pages for all lengths, and these are pages of the cache.

    what: the name of the function that is checked. q_start: of ragged batches of so many queries, where those of each start.
    Raises: TilusError that names the request, what it has and what was expected.
    """
    if not _checking(what):
        return
    pages, _, page_size = kv_cache.shape[:3]
    entries = block_tables.shape[1]
    if q_start is not None:
        _check_starts(what, _on_host(q_start), queries)
    for request, length in enumerate(_on_host(kv_lens).tolist()):
        if not 0 <= length <= entries * page_size:
            raise TilusError(
                f"{what}: request {request} has kv_len {length}, expected 0 to {entries * page_size}: its block table has "
                f"{entries} entries for pages of {page_size} tokens"
            )
    wrong = _first_outside(block_tables, 0, pages, kv_lens, page_size, device)
    if wrong is not None:
        request, entry, page = wrong
        raise TilusError(
            f"{what}: entry {entry} of the block table of request {request} is page {page}, expected 0 to {pages - 1}, the "
            "pages of kv_cache",
            hint=f"kv_len {_on_host(kv_lens).tolist()[request]} takes {page_size} tokens of each entry, from entry 0 on",
        )


def check_lists(
    what: str, block_start: Any, blocks: Any, kv_lens: Any, kv_cache: Any, *, device: str | None = None
) -> None:
    """Raise, in the debug mode, unless lists of blocks follow each other, have blocks for all lengths, and these are there.

    Raises: TilusError that names the row or the entry, what it has and what was expected.
    """
    if not _checking(what):
        return
    starts, lens, page_size = _on_host(block_start).tolist(), _on_host(kv_lens).tolist(), kv_cache.shape[2]
    for row, (start, end, length) in enumerate(zip(starts[:-1], starts[1:], lens, strict=True)):
        if not 0 <= start <= end <= blocks.shape[0] or not 0 <= length <= (end - start) * page_size:
            raise TilusError(
                f"{what}: row {row} has entries {start} to {end} and kv_len {length}, expected entries in order up to "
                f"{blocks.shape[0]} and up to {page_size} tokens for each"
            )
    wrong = _first_outside(blocks.reshape((1, -1)), 0, kv_cache.shape[0], None, 1, device) if blocks.shape[0] else None
    if wrong is not None:
        _, entry, block = wrong
        raise TilusError(f"{what}: entry {entry} of blocks is {block}, expected 0 to {kv_cache.shape[0] - 1}")


def check_tokens(
    what: str, positions: Any, slots: Any, max_positions: int, kv_cache: Any, *, device: str | None = None
) -> None:
    """Raise, in the debug mode, unless positions have angles and slots are in the cache; negative slots mean no write.

    Raises: TilusError that names the token, what it has and what was expected.
    """
    if not _checking(what):
        return
    size = kv_cache.shape[0] * kv_cache.shape[2]
    for name, indices, low, limit, expected in (
        ("position", positions, 0, max_positions, f"0 to {max_positions - 1}, the rows of cos_sin"),
        ("slot", slots, -(2**31), size, f"less than {size}, pages * page_size (negative: not written)"),
    ):
        wrong = _first_outside(indices.reshape((1, -1)), low, limit, None, 1, device) if indices.shape[0] else None
        if wrong is not None:
            _, token, index = wrong
            raise TilusError(f"{what}: token {token} has {name} {index}, expected {expected}")


def _checking(what: str) -> bool:
    if not config.debug() or is_dry():  # a dry run's indices are whatever the memory held
        return False
    if is_capturing():
        raise TilusError(
            f"{what}: TILUS_DEBUG=1 reads indices on the host, which the capture of a CUDA graph does not allow",
            hint="call it once without a graph, or unset TILUS_DEBUG",
        )
    return True


def _check_starts(what: str, starts: Any, queries: int) -> None:
    for request, (start, end) in enumerate(zip(starts[:-1].tolist(), starts[1:].tolist())):
        if not 0 <= start <= end <= queries or (request == 0 and start != 0):
            raise TilusError(
                f"{what}: queries {start} to {end} of request {request} in q_start, expected to start at "
                f"{0 if request == 0 else 'the end of the request before'} and to end there or later, by {queries}"
            )


def _first_outside(
    indices: Any, low: int, limit: int, tokens: Any, page_size: int, device: str | None
) -> tuple[int, int, int] | None:
    """(row, column, index) of the first one that is out of range."""
    if not indices.shape[0]:
        return None
    found = empty(indices, (indices.shape[0], 2))
    first_outside_kernel.on(device)(indices, found, low, limit, tokens, page_size)
    columns, values = _on_host(found).T
    rows = np.flatnonzero(columns < NONE)
    return None if not len(rows) else (int(rows[0]), int(columns[rows[0]]), int(values[rows[0]]))


def _on_host(array: Any) -> Any:
    return array.cpu().numpy() if is_torch(array) else np.asarray(array)
