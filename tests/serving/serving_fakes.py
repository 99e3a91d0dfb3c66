"""Stand-ins for the clock, the model and the tokenizer: exact, fast and with no state of their own."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence

from serving.core import UNKNOWN, Batch, BatchItem, PageCopy, SampledToken, StepOutput

EOS = 0
VOCABULARY = 64


class ManualClock:
    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self) -> float:
        return self.time


class FakeVocabulary:
    """Token i is the i-th printable character after a space; 0 ends the answer."""

    vocab_size = VOCABULARY
    eos_ids = frozenset({EOS})

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        return "".join(chr(32 + token_id) for token_id in ids)


def next_token(history: Sequence[int]) -> int:
    """The fake model: the next token as a function of all tokens before it."""
    return zlib.crc32(bytes(history)) % VOCABULARY


class FakeRunner:
    """Checks every batch like a memory would: a token may only read what was written to its own pages before.

    The cache is a dictionary from (page, offset) to (position, token). What a sequence sees of its history is read back
    through its block table, so a wrong page, a lost token or a page in two hands changes the answer. The host's memory is another
    dictionary; a page that was never copied there cannot come back.

    lazy: steps run as late as they may, when the tokens of one behind them are waited for.
    """

    def __init__(self, page_size: int, *, lazy: bool = False) -> None:
        self.page_size = page_size
        self.memory: dict[tuple[int, int], tuple[int, int]] = {}
        self.host: dict[int, dict[int, tuple[int, int]]] = {}
        self.batches: list[Batch] = []
        self._lazy = lazy
        self._outputs: list[StepOutput] = []
        self._last: dict[str, int] = {}  # what the last step that ran sampled
        self._disagreed: dict[str, int] = {}  # its drafts that did not agree

    def launch(self, batch: Batch) -> Callable[[], StepOutput]:
        self.batches.append(batch)
        number = len(self.batches)
        if not self._lazy:
            self._run_until(number)
        return lambda: self._run_until(number)

    def execute(self, batch: Batch) -> StepOutput:
        for copy in batch.copies:
            self._copy(copy)
        results = [(item, self._run(self._known(item))) for item in batch.items]
        sampled = [(item, tokens) for item, tokens in results if tokens is not None]
        self._last = {item.request_id: tokens[-1].token_id for item, tokens in sampled}
        self._disagreed = {item.request_id: 1 + item.num_drafts - len(tokens) for item, tokens in sampled}
        return StepOutput(tuple(tokens for _, tokens in sampled))

    def _known(self, item: BatchItem) -> BatchItem:
        """The item behind what the step before has sampled."""
        if UNKNOWN not in item.token_ids:
            return item
        last, wrong = self._last[item.request_id], self._disagreed[item.request_id]
        token_ids = tuple(last if token_id == UNKNOWN else token_id for token_id in item.token_ids)
        return item._replace(token_ids=token_ids, start=item.start - wrong, draw=item.draw - wrong)

    def _run_until(self, number: int) -> StepOutput:
        while len(self._outputs) < number:
            self._outputs.append(self.execute(self.batches[len(self._outputs)]))
        return self._outputs[number - 1]

    def _copy(self, copy: PageCopy) -> None:
        if copy.to_host:
            self.host[copy.host_page] = {
                i: self.memory[copy.page, i] for i in range(self.page_size) if (copy.page, i) in self.memory
            }
            return
        for offset in range(self.page_size):
            self.memory.pop((copy.page, offset), None)
        for offset, stored in self.host[copy.host_page].items():
            self.memory[copy.page, offset] = stored

    def _run(self, item: BatchItem) -> tuple[SampledToken, ...] | None:
        for position, token_id in enumerate(item.token_ids, item.start):
            slot = (item.pages[position // self.page_size], position % self.page_size)
            self.memory[slot] = (position, token_id)
        history = []
        for position in range(item.kv_len):
            slot = (item.pages[position // self.page_size], position % self.page_size)
            stored_position, token_id = self.memory[slot]
            assert stored_position == position, f"{item.request_id} reads position {stored_position} at {position}"
            history.append(token_id)
        return None if item.params is None else accepted(history, item.num_drafts)


def accepted(history: Sequence[int], num_drafts: int) -> tuple[SampledToken, ...]:
    """The drafts at the end of `history` that agree with the model, and the token behind them."""
    tokens: list[int] = []
    for end in range(len(history) - num_drafts, len(history) + 1):
        tokens.append(next_token(history[:end]))
        if end < len(history) and history[end] != tokens[-1]:
            break
    return tuple(SampledToken(token_id) for token_id in tokens)


def reference_answer(prompt: Sequence[int], max_tokens: int, *, ignore_eos: bool = False) -> list[int]:
    """What one request alone must get, computed without any engine."""
    tokens = list(prompt)
    while len(tokens) - len(prompt) < max_tokens:
        tokens.append(next_token(tokens))
        if tokens[-1] == EOS and not ignore_eos:
            break
    return tokens[len(prompt) :]
