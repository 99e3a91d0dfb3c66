"""Rows behind drafts are where they would have been made by a host that knows how many agreed."""

from __future__ import annotations

import numpy as np
import pytest

from tilus.errors import TilusError
from tilus.kernels import follow_drafts

PAGE = 4


def test_rows_are_where_agreement_ends(device: str) -> None:
    """Of sequences whose drafts agreed in part, in all or not at all, and of one without drafts, which stays."""
    rng = np.random.default_rng(0)
    sampled = rng.integers(1, 3, 50, np.int32)
    tables = rng.permutation(24).astype(np.int32).reshape(6, 4)
    made = {name: np.zeros(24, np.int32) for name in ("sources", "positions", "slots", "draws")}
    kv_lens, expected, jobs = np.zeros(6, np.int32), list[tuple[int, ...]](), list[list[int]]()
    row, first = 0, 0
    for sequence, count in enumerate((0, 1, 3, 8, 8, 2)):
        drafts = rng.integers(1, 3, count).tolist() if sequence != 4 else sampled[first : first + count].tolist()
        agreed = next((i for i, draft in enumerate(drafts) if draft != sampled[first + i]), count)
        start = int(rng.integers(count, 12))
        for index in range(sequence % 3 + 1):
            made["positions"][row], made["draws"][row], made["sources"][row] = start + index, 30 + index, first + count
            made["slots"][row] = tables[sequence, (start + index) // PAGE] * PAGE + (start + index) % PAGE
            position = start + index - (count - agreed)
            slot = tables[sequence, position // PAGE] * PAGE + position % PAGE
            source = first + (agreed if index == 0 else count)
            expected.append((source, position, slot, 30 + index - (count - agreed)))
            if count:
                fields = [row, sequence, row, first, count, index == 0, 0, 0]
                jobs.append([*fields, *drafts, *[-2] * (8 - count)])
            row += 1
        kv_lens[sequence] = start + sequence % 3 + 1
        first += count + 1
    before = kv_lens.copy()
    follow_drafts(
        np.array(jobs, np.int32), sampled, kv_lens=kv_lens, tables=tables, page_size=PAGE, device=device, **made
    )
    assert list(zip(*(made[name][:row].tolist() for name in ("sources", "positions", "slots", "draws")))) == expected
    ends = [int(position) + 1 for position in made["positions"][:row]]
    lasts = [max(e for e, j in zip(ends, _owners()) if j == sequence) for sequence in range(6)]
    assert kv_lens.tolist() == lasts and (before - kv_lens)[[0, 4]].tolist() == [0, 0] and (before - kv_lens).max() > 1
    assert not made["positions"][row:].any()


def _owners() -> list[int]:
    return [sequence for sequence in range(6) for _ in range(sequence % 3 + 1)]


def test_jobs_have_sixteen_fields() -> None:
    none = np.zeros(1, np.int32)
    with pytest.raises(TilusError) as caught:
        follow_drafts(
            np.zeros((2, 8), np.int32), none, sources=none, positions=none, slots=none, kv_lens=none,
            tables=np.zeros((2, 3), np.int32), draws=none, page_size=4,
        )  # fmt: skip
    assert str(caught.value).startswith(
        "follow_drafts: jobs of shape [2, 8], tables of shape [2, 3] and kv_lens of shape [1], expected [jobs, 16], "
        "[sequences, pages] and [sequences]"
    )
