"""Guesses of the next tokens of sequences, which a step of the model checks all at once.

A step computes a sequence's last token and its drafts together, and samples behind each of them. What is sampled behind a draft
that agrees with what was sampled in its place is what would have been sampled without drafts, from the same logits with the same
random number, so answers do not change, greedy or not: their distribution is exactly the model's. Drafts that differ cost their
computation. (Y. Leviathan et al., "Fast Inference from Transformers via Speculative Decoding", arXiv 2211.17192, whose
acceptance by chance this replaces: here a draft model draws with the random numbers that check it.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as List
from typing import Protocol

from serving.config import MAX_DRAFTS
from serving.core import UNKNOWN, Batch, BatchItem, Runner, Sequence, StepOutput
from serving.kv import PageTables

Drafts = dict[str, tuple[int, ...]]  # by request
_KINDS = 6  # of guesses: behind 0, 1, 2, 4, 8, 16 tokens or more that were right
_OF_ALL, _OF_ONE = 256, 16  # guesses of a kind that count, of all requests and of one
_OF_START = 4  # for how many what is known of all stands when a request starts


class Drafter(Protocol):
    """ahead: whether it guesses behind tokens that are still on the device."""

    ahead: bool

    def chances(self, seq: Sequence) -> tuple[float, float]:
        """That the first token that it would propose for a sequence is right, and each one if those in front of it are; zeros
        where there is none."""
        ...

    def propose(self, wanted: Mapping[Sequence, int]) -> Drafts:
        """At most so many guesses for each of some sequences; none for those that are missing."""
        ...

    def forget(self, request_id: str) -> None:
        """A request has ended."""
        ...


class Chances:
    """How often guesses are right, by how many tokens in front of them were: means in which the past fades.

    start: before anything is known. before: of all requests, from which those of one start, and which learn from it.
    """

    def __init__(self, before: Chances | None = None, start: float = 0.5) -> None:
        self._before = before
        self._means = [start] * _KINDS if before is None else before._means.copy()
        self._counts = [1 if before is None else _OF_START] * _KINDS

    def of(self, agreed: int) -> float:
        return self._means[min(agreed.bit_length(), _KINDS - 1)]

    def learn(self, agreed: int, right: bool) -> None:
        kind = min(agreed.bit_length(), _KINDS - 1)
        self._means[kind] += (right - self._means[kind]) / (self._counts[kind] + 1)
        self._counts[kind] = min(self._counts[kind] + 1, _OF_ALL if self._before is None else _OF_ONE)
        if self._before is not None:
            self._before.learn(agreed, right)


class PromptLookup:
    """What followed the last time that a sequence's last tokens occurred in it: cheap, and right where answers quote.

    longest, shortest: how many tokens must occur again, the more the better (A. Saxena, "Prompt Lookup Decoding", 2023). What is
    found is followed, in thought where it is not proposed, until the answer goes another way: so its chances are known for
    nothing.
    """

    ahead = True

    def __init__(self, longest: int = 4, shortest: int = 2) -> None:
        self._sizes = tuple(range(shortest, longest + 1))
        self._chances = Chances()
        self._known: dict[str, _Followed] = {}

    def chances(self, seq: Sequence) -> tuple[float, float]:
        followed = self._follow(seq)
        if followed.place is None:
            return 0.0, 0.0
        each = followed.chances.of(followed.agreed)
        return each ** (1 + followed.num_expected(seq)), each

    def propose(self, wanted: Mapping[Sequence, int]) -> Drafts:
        found = {seq: self._follow(seq) for seq in wanted}
        return {seq.id: of.next(seq, wanted[seq]) for seq, of in found.items() if of.place is not None}

    def forget(self, request_id: str) -> None:
        self._known.pop(request_id, None)

    def _follow(self, seq: Sequence) -> _Followed:
        if (followed := self._known.get(seq.id)) is None:
            followed = self._known[seq.id] = _Followed(seq, Chances(self._chances), self._sizes)
        followed.read(seq)
        return followed


class _Followed:
    """A sequence that may repeat itself. place: of the token in it that should come next, `agreed` in front of which it has
    repeated; None when nothing occurs again."""

    def __init__(self, seq: Sequence, chances: Chances, sizes: tuple[int, ...]) -> None:
        self.chances = chances
        self.place: int | None = None
        self.agreed = 0
        self._num_tokens = seq.num_prompt - 1  # that have been read; of a prompt only what ends it can go on
        prompt = seq.tokens[: self._num_tokens]
        # For each size where runs of so many tokens ended last.
        self._ends = [(size, dict(zip(_runs(prompt, size), range(size, len(prompt) + 1)))) for size in sizes]

    def read(self, seq: Sequence) -> None:
        """The tokens that have become known."""
        tokens, known = seq.tokens, len(seq.tokens) - seq.num_unknown
        for end in range(self._num_tokens + 1, known + 1):
            if self.place is not None:
                right = tokens[self.place] == tokens[end - 1]
                self.chances.learn(self.agreed, right)
                self.place, self.agreed = (self.place + 1, self.agreed + 1) if right else (None, 0)
            is_lost = self.place is None
            for size, ends in self._ends:
                run = tuple(tokens[end - size : end])
                if is_lost and len(run) == size and run in ends:
                    self.place, self.agreed = ends[run], size
                ends[run] = end
        self._num_tokens = known

    def num_expected(self, seq: Sequence) -> int:
        """Tokens that the step on the device will give: drafts in it up to one that was guessed before it was known what is
        followed now, and one more."""
        if seq.num_unknown == 0:
            return 0
        drafts = seq.tokens[self._num_tokens : -1]
        agreed = 0
        while agreed < len(drafts) and drafts[agreed] == self._guess(seq, agreed):
            agreed += 1
        return agreed + 1

    def next(self, seq: Sequence, count: int) -> tuple[int, ...]:
        """So many tokens behind those that are expected."""
        first = self.num_expected(seq)
        return tuple(self._guess(seq, first + index) for index in range(count))

    def _guess(self, seq: Sequence, index: int) -> int:
        """Of the token with this index behind those that are known: what repeats goes on to repeat."""
        place = self.place or 0
        return seq.tokens[place + index % (self._num_tokens - place)]


def _runs(tokens: List[int], size: int) -> Iterable[tuple[int, ...]]:
    """Of so many tokens, all that there are."""
    return zip(*(tokens[first:] for first in range(size)))


class DraftModel:
    """Guesses of a smaller model of the same vocabulary, which has a cache of its own.

    A sequence for which there are no pages gets no drafts. max_step_tokens: of a step of the model.
    """

    ahead = False

    def __init__(self, runner: Runner, pages: PageTables, max_step_tokens: int) -> None:
        self._runner = runner
        self._pages = pages
        self._max_step_tokens = max_step_tokens
        self._cached: dict[str, list[int]] = {}  # the tokens whose keys and values are in the cache
        self._chances = Chances(start=0.8)
        self._of: dict[str, Chances] = {}
        self._guessed: dict[str, tuple[int, tuple[int, ...]]] = {}  # where in the sequence, and what; not yet compared

    def chances(self, seq: Sequence) -> tuple[float, float]:
        each = self._learnt(seq).of(0)
        return each, each

    def _learnt(self, seq: Sequence) -> Chances:
        """Also from its last drafts, when what came in their places is known."""
        own, known = self._of.setdefault(seq.id, Chances(self._chances)), len(seq.tokens) - seq.num_unknown
        if seq.id in self._guessed and self._guessed[seq.id][0] < known:
            start, drafts = self._guessed.pop(seq.id)
            for draft, token in zip(drafts, seq.tokens[start:known]):
                own.learn(0, draft == token)
                if draft != token:
                    break
        return own

    def propose(self, wanted: Mapping[Sequence, int]) -> Drafts:
        growing = {seq: count for seq, count in wanted.items() if self._pages.reserve(seq.id, len(seq.tokens) + count)}
        for seq in growing:
            self._learnt(seq)
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
            self._guessed[seq.id] = len(seq.tokens), drafts.get(seq.id, ())
        return drafts

    def forget(self, request_id: str) -> None:
        self._of.pop(request_id, None)
        self._guessed.pop(request_id, None)
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
