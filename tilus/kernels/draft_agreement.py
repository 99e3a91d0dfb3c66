"""The step behind guesses of tokens, put in its place on the device: the host prepares it before it knows how many were right."""

from __future__ import annotations

from typing import Any

import tilus
from tilus import Const, Tensor, TilusError, int32

MAX_DRAFTS = 8
NUM_FIELDS = 16  # of a job


@tilus.kernel(varying=("moved", "before", "rows", "sequences", "samples"))
def follow_drafts_kernel(
    jobs: Tensor[int32, "moved", 16],
    sampled: Tensor[int32, "before"],
    sources: Tensor[int32, "rows"],
    positions: Tensor[int32, "rows"],
    slots: Tensor[int32, "rows"],
    kv_lens: Tensor[int32, "sequences"],
    tables: Tensor[int32, "sequences", "pages"],
    draws: Tensor[int32, "samples"],
    *,
    page_size: Const,
):
    """One row a block."""
    tilus.grid(jobs.shape[0], warps=1)
    job = tilus.block_id(0)
    row, sequence, draw, first, count, leads = [jobs[job, field] for field in range(6)]
    drafts = tilus.load(jobs, [job, 8], [1, 8]).reshape([8])
    differing = tilus.where(tilus.load(sampled, [first], [8]) == drafts, count, tilus.arange(8))
    wrong = count - min(count, tilus.item(tilus.min(differing)))
    position = positions[row] - wrong
    slot = tables[sequence, position // page_size] * page_size + position % page_size
    tilus.store(positions, [row], tilus.full([1], position, int32))
    tilus.store(slots, [row], tilus.full([1], slot, int32))
    tilus.store(draws, [draw], tilus.full([1], draws[draw] - wrong, int32))
    if leads == 1:
        tilus.store(sources, [row], tilus.full([1], sources[row] - wrong, int32))
        tilus.store(kv_lens, [sequence], tilus.full([1], kv_lens[sequence] - wrong, int32))


def follow_drafts(
    jobs: Any, sampled: Any, *, sources: Any, positions: Any, slots: Any, kv_lens: Any, tables: Any, draws: Any,
    page_size: int, device: str | None = None,
) -> None:  # fmt: skip
    """Change rows of a step that were made as if all drafts of their sequence had agreed, in the step before, with what was
    sampled in their places: for each draft from the first that did not, they are one place further in front. In one launch.

    jobs: int32 [jobs, 16], one for each row: the row; its sequence; the row's place in draws; the place in sampled of the first
    draft's token; how many drafts there were, up to 8; 1 for one row of each sequence, else 0; two zeros; 8 drafts, behind those
    that there were what no token is. sampled: int32, what the step before sampled. sources: int32 [rows], the place in sampled of
    the token behind the last draft, for the rows with a 1. positions, slots: int32 [rows]. kv_lens: int32 [sequences]. tables:
    int32 [sequences, pages]. draws: int32, how many tokens had been sampled before. No row and no sequence with a 1 comes twice.
    Torch tensors or numpy arrays. device: where to run (reference, emulator, cpu, cuda), by default as the arguments say.

    Raises: TilusError when shapes do not fit together.
    """
    if jobs.ndim != 2 or jobs.shape[1] != NUM_FIELDS or tables.shape[0] != kv_lens.shape[0]:
        raise TilusError(
            f"follow_drafts: jobs of shape {list(jobs.shape)}, tables of shape {list(tables.shape)} and kv_lens of shape "
            f"{list(kv_lens.shape)}, expected [jobs, {NUM_FIELDS}], [sequences, pages] and [sequences]"
        )
    if jobs.shape[0]:
        arrays = (sources, positions, slots, kv_lens, tables, draws)
        follow_drafts_kernel.on(device)(jobs, sampled, *arrays, page_size=page_size)
