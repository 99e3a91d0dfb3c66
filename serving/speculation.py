"""Guesses of the next tokens of sequences, which a step of the model checks all at once.

A step computes a sequence's last token and its drafts together, and samples behind each of them. What is sampled behind a draft
that agrees with what was sampled in its place is what would have been sampled without drafts, from the same logits with the same
random number, so answers do not change, greedy or not: their distribution is exactly the model's. Drafts that differ cost their
computation. (Y. Leviathan et al., "Fast Inference from Transformers via Speculative Decoding", arXiv 2211.17192, whose
acceptance by chance this replaces: here a draft model draws with the random numbers that check it.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from serving.config import MAX_DRAFTS
from serving.core import UNKNOWN, Batch, BatchItem, Runner, Sequence, StepOutput
from serving.kv import PageTables

Drafts = dict[str, tuple[int, ...]]  # by request


class Drafter(Protocol):
    def propose(self, wanted: Mapping[Sequence, int]) -> Drafts:
        """At most so many guesses for each of some sequences, all of whose tokens are known; none for those that are missing."""
        ...

    def forget(self, request_id: str) -> None:
        """A request has ended, or lost its place."""
        ...


class PromptLookup:
    """What followed the last time that a sequence's last tokens occurred in it: cheap, and right where answers quote.

    longest, shortest: how many tokens must occur again, tried in this order (A. Saxena, "Prompt Lookup Decoding", 2023).
    """

    def __init__(self, longest: int = 4, shortest: int = 2) -> None:
        self._sizes = range(longest, shortest - 1, -1)
        self._seen: dict[str, _Occurrences] = {}

    def propose(self, wanted: Mapping[Sequence, int]) -> Drafts:
        found = {seq.id: self._following(seq, count) for seq, count in wanted.items()}
        return {request_id: drafts for request_id, drafts in found.items() if drafts}

    def forget(self, request_id: str) -> None:
        self._seen.pop(request_id, None)

    def _following(self, seq: Sequence, count: int) -> tuple[int, ...]:
        tokens, seen = seq.tokens, self._seen.setdefault(seq.id, _Occurrences())
        seen.add(tokens, self._sizes)
        for size in self._sizes:
            end = seen.ends.get(tuple(tokens[-size:])) if len(tokens) > size else None
            if end is not None:
                return tuple(tokens[end : end + count])
        return ()


@dataclass
class _Occurrences:
    """Where runs of tokens ended last, but for those that end with the sequence."""

    ends: dict[tuple[int, ...], int] = field(default_factory=dict[tuple[int, ...], int])
    num_tokens: int = 0

    def add(self, tokens: list[int], sizes: range) -> None:
        for end in range(self.num_tokens, len(tokens)):
            for size in sizes:
                if size <= end:
                    self.ends[tuple(tokens[end - size : end])] = end
        self.num_tokens = len(tokens)


class DraftModel:
    """Guesses of a smaller model of the same vocabulary, which has a cache of its own.

    A sequence for which there are no pages gets no drafts. max_step_tokens: of a step of the model.
    """

    def __init__(self, runner: Runner, pages: PageTables, max_step_tokens: int) -> None:
        self._runner = runner
        self._pages = pages
        self._max_step_tokens = max_step_tokens
        self._cached: dict[str, list[int]] = {}  # the tokens whose keys and values are in the cache

    def propose(self, wanted: Mapping[Sequence, int]) -> Drafts:
        growing = {seq: count for seq, count in wanted.items() if self._pages.reserve(seq.id, len(seq.tokens) + count)}
        for seq in growing:
            self._keep_common(seq)
        self._read(growing)
        steps = [self._launch(growing, number) for number in range(max(growing.values(), default=0))]
        drafts: Drafts = {}
        for items, wait in steps:
            for item, tokens in zip(items, wait().tokens, strict=True):
                if tokens is not None:
                    drafts[item.request_id] = (*drafts.get(item.request_id, ()), tokens[0].token_id)
        for seq in growing:
            # The last draft has not been computed.
            self._cached[seq.id] = [*seq.tokens, *drafts.get(seq.id, ())[:-1]]
        return drafts

    def forget(self, request_id: str) -> None:
        if self._cached.pop(request_id, None) is not None:
            self._pages.release(request_id)

    def _keep_common(self, seq: Sequence) -> None:
        """Drafts that did not agree are computed again, and the last token always: behind it one is sampled."""
        cached, limit = self._cached.setdefault(seq.id, []), len(seq.tokens) - 1
        known = min(len(cached), limit)
        while known and cached[known - 1] != seq.tokens[known - 1]:
            known -= 1
        self._cached[seq.id] = cached[:known]

    def _read(self, growing: Mapping[Sequence, int]) -> None:
        """Compute what is new of a prompt, in steps of a sequence each. A few tokens are left to the first draft's step."""
        for seq in growing:
            start, end = len(self._cached[seq.id]), len(seq.tokens) - 1
            if end - start <= MAX_DRAFTS:
                continue
            for first in range(start, end, self._max_step_tokens):
                part = tuple(seq.tokens[first : min(first + self._max_step_tokens, end)])
                self._runner.launch(Batch((BatchItem(seq.id, part, first, self._pages.table(seq.id), None, 0),)))
            self._cached[seq.id] = seq.tokens[:end]

    def _launch(self, growing: Mapping[Sequence, int], number: int) -> tuple[list[BatchItem], Callable[[], StepOutput]]:
        """The step that samples the draft with this number, behind tokens that only the device knows."""
        items: list[BatchItem] = []
        for seq, count in growing.items():
            if number >= count:
                continue
            params = dataclasses.replace(seq.request.params, logprobs=None)
            start = len(seq.tokens) - 1 + number if number else len(self._cached[seq.id])
            tokens = (UNKNOWN,) if number else tuple(seq.tokens[start:])
            items.append(BatchItem(seq.id, tokens, start, self._pages.table(seq.id), params, seq.num_output + number))
        items.sort(key=lambda item: len(item.token_ids))  # those of one token first, as in all batches
        return items, self._runner.launch(Batch(tuple(items)))
