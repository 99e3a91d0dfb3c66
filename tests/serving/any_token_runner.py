"""A model for real tokenizers and real HTTP that costs nothing: any token may come, decided by all those before it."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence

from serving.core import Batch, BatchItem, SampledToken, StepOutput, TokenLogprobs


def next_token(history: Sequence[int], allowed: bytes | None, vocab_size: int) -> int:
    choice = zlib.crc32(str(list(history)).encode())
    if allowed is None:
        return choice % vocab_size
    tokens = [token for token in range(vocab_size) if allowed[token // 8] >> token % 8 & 1]
    return tokens[choice % len(tokens)]


class AnyTokenRunner:
    """Checks every batch like a memory would: what a sequence sees of its history is read back through its block table, so a
    wrong page or a page in two hands fails.
    """

    def __init__(self, page_size: int, vocab_size: int) -> None:
        self._page_size = page_size
        self._vocab_size = vocab_size
        self._memory: dict[int, tuple[int, int]] = {}

    def launch(self, batch: Batch) -> Callable[[], StepOutput]:
        output = StepOutput(tuple((token,) for item in batch.items if (token := self._run(item)) is not None))
        return lambda: output

    def _run(self, item: BatchItem) -> SampledToken | None:
        slots = [
            item.pages[place // self._page_size] * self._page_size + place % self._page_size
            for place in range(item.kv_len)
        ]
        self._memory.update(zip(slots[item.start :], enumerate(item.token_ids, item.start)))
        seen = [self._memory[slot] for slot in slots]
        assert [place for place, _ in seen] == list(range(item.kv_len)), item.request_id
        if item.params is None:
            return None
        token = next_token([token for _, token in seen], item.allowed, self._vocab_size)
        top = tuple((other, -9.0) for other in range(item.params.logprobs or 0))
        return SampledToken(token, None if item.params.logprobs is None else TokenLogprobs(-1.0, top))
