"""Stand-ins for the clock, the model and the tokenizer: exact, fast and with no state of their own."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

from serving.core import Batch, PageCopy, SampledToken, StepOutput

EOS = 0
VOCABULARY = 64


class ManualClock:
    def __init__(self) -> None:
        self.time = 0.0

    def now(self) -> float:
        return self.time


class FakeVocabulary:
    """Token i is the i-th printable character after a space; 0 ends the answer."""

    vocab_size = VOCABULARY
    eos_ids = frozenset({EOS})

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(32 + token_id) for token_id in ids)


def next_token(history: Sequence[int]) -> int:
    """The fake model: the next token as a function of all tokens before it."""
    return zlib.crc32(bytes(history)) % VOCABULARY


class FakeRunner:
    """Checks every batch like a memory would: a token may only read what was written to its own pages before.

    The cache is a dictionary from (page, offset) to (position, token). What a sequence sees of its history is read back
    through its block table, so a wrong page, a lost token or a page in two hands changes the answer. The host's memory is another
    dictionary; a page that was never copied there cannot come back.
    """

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.memory: dict[tuple[int, int], tuple[int, int]] = {}
        self.host: dict[int, dict[int, tuple[int, int]]] = {}
        self.batches: list[Batch] = []

    def execute(self, batch: Batch) -> StepOutput:
        self.batches.append(batch)
        for copy in batch.copies:
            self._copy(copy)
        return StepOutput(tuple(token for item in batch.items if (token := self._run(item)) is not None))

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

    def _run(self, item) -> SampledToken | None:
        for position, token_id in enumerate(item.token_ids, item.start):
            slot = (item.pages[position // self.page_size], position % self.page_size)
            self.memory[slot] = (position, token_id)
        history = []
        for position in range(item.kv_len):
            slot = (item.pages[position // self.page_size], position % self.page_size)
            stored_position, token_id = self.memory[slot]
            assert stored_position == position, f"{item.request_id} reads position {stored_position} at {position}"
            history.append(token_id)
        return SampledToken(next_token(history)) if item.params is not None else None


def reference_answer(prompt: Sequence[int], max_tokens: int, *, ignore_eos: bool = False) -> list[int]:
    """What one request alone must get, computed without any engine."""
    tokens = list(prompt)
    while len(tokens) - len(prompt) < max_tokens:
        tokens.append(next_token(tokens))
        if tokens[-1] == EOS and not ignore_eos:
            break
    return tokens[len(prompt) :]
