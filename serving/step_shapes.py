"""The shapes that steps are padded to, so that few stand for all: each is compiled before the first client comes, and captured.

A step has rows of sequences that decode, one each, and behind them the rows of prompts. Both are rounded up, and so is the
number of prompts. Rows that are made up cost time and change nothing: where the rows of a step are few, its time is that of
reading the weights; where they are many, they are rounded to the tiles of the products.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch

from serving.core import Batch
from serving.cost_model import StepWork

# Sequences of a step on a CPU: graphs keep their activations, and with more of them kernels take most of the time anyway.
LARGEST_BATCH = 8
_FEW_ROWS = (16, 32, 64, 128, 192, 256, 384, 512)
_MANY_ROWS = 256  # beyond those, multiples of this
_FEW_TOKENS = 128  # of prompts, up to which blocks share keys out, the better the fewer sequences are made up
_PROMPTS = 16  # of a step, more of which are rare
_EACH = 8  # multiples of it keep what lies behind aligned


class StepShape(NamedTuple):
    """decodes: sequences that decode, a row each. rows: of all. others: sequences behind those, one of which owns the rows that
    are made up, if there are any. samples: rows that are sampled."""

    decodes: int
    rows: int
    others: int
    samples: int


@dataclass(frozen=True)
class GraphLimits:
    """max_batch: sequences of a step. max_pages: of a sequence. max_step_tokens: of a step. num_drafts: guesses of a sequence."""

    max_batch: int
    max_pages: int
    max_step_tokens: int
    num_drafts: int = 0


class StepShapes:
    """The shapes of a device: on a CPU of small steps that only decode, on a GPU of all steps."""

    def __init__(self, limits: GraphLimits, device: torch.device) -> None:
        self.limits = limits
        self._least = lru_cache(2**14)(self._search)  # which is asked for many steps that are only considered
        sizes = decode_sizes(limits.max_batch, device)
        self.all = (
            *(StepShape(size, size, 0, size) for size in sizes),
            *(self._mixed() if device.type == "cuda" else ()),
        )

    def of(self, batch: Batch) -> StepShape | None:
        """The least one that a batch fits into; None where there is none."""
        tokens = sum([len(item.token_ids) for item in batch.others])
        return self._least(len(batch.items) - len(batch.others), tokens, len(batch.others))

    def rows(self, work: StepWork) -> int:
        """Of a step, those that are made up included."""
        shape = self._least(work.tokens - work.prompt_tokens, work.prompt_tokens, work.prompts)
        return work.tokens if shape is None else shape.rows

    def _search(self, decodes: int, tokens: int, prompts: int) -> StepShape | None:
        others = prompts + 1 if prompts else 0
        fitting = (s for s in self.all if s.decodes >= decodes and s.rows - s.decodes >= tokens and s.others >= others)
        return next(fitting, None)

    def common(self) -> list[StepShape]:
        """Those that are captured before the first client comes."""
        return [shape for shape in self.all if shape.others <= _PROMPTS + 1]

    def _mixed(self) -> Iterator[StepShape]:
        """Of steps with prompts, or drafts."""
        most, each = self.limits.max_batch, 1 + self.limits.num_drafts
        powers = (size for size in (_EACH * 4**power for power in range(8)) if size < most)
        sizes = (0, *powers, *([-(-most // _EACH) * _EACH] if most > 1 else []))
        for less, size in zip((-1, *sizes), sizes):
            for rows in self._rows(size, size - less - 1):
                for prompts in self._prompts(rows - size):
                    samples = min(size + min(rows - size, prompts * each), most * each)
                    yield StepShape(size, rows, prompts + 1, samples)

    def _rows(self, size: int, made_up: int) -> tuple[int, ...]:
        """Of steps with `size` sequences that decode, of which so many are made up at most: whole steps have those besides."""
        most = self.limits.max_step_tokens
        standard = (*_FEW_ROWS, *range(_FEW_ROWS[-1] + _MANY_ROWS, most, _MANY_ROWS), most)
        largest = -(-(most + made_up) // _EACH) * _EACH if made_up else most
        return tuple(sorted({largest, *(rows for rows in standard if size < rows <= most)}))

    def _prompts(self, rows: int) -> tuple[int, ...]:
        """Of so many rows. Where sequences have drafts, few of them are common."""
        most, few = self.limits.max_batch, (1, 2, 4, 8) if self.limits.num_drafts else (1, 4)
        sizes = (*(few if rows <= _FEW_TOKENS else ()), _PROMPTS, most)
        return tuple(sorted({min(size, rows, most) for size in sizes}))


def decode_sizes(max_batch: int, device: torch.device) -> tuple[int, ...]:
    """Numbers of sequences of steps that only decode: on a CPU each small one, on a GPU powers of two, then multiples of 8."""
    if device.type == "cpu":
        return tuple(range(1, min(LARGEST_BATCH, max_batch) + 1))
    return tuple(sorted({min(size, max_batch) for size in (1, 2, 4, *range(8, max_batch + 8, 8))}))
