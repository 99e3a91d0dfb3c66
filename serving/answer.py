"""The text of an answer, token by token, and where it ends."""

from __future__ import annotations

from functools import partial
from typing import Protocol

from serving.core import FinishReason, Sequence
from serving.stop import StopMatcher
from serving.tokenizer import Detokenizer


class Vocabulary(Protocol):
    """What the engine needs of a tokenizer."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def eos_ids(self) -> frozenset[int]: ...
    def decode(self, ids: tuple[int, ...], skip_special: bool = True) -> str: ...


class Answer:
    """Of a sequence. ends: tokens behind which nothing follows, be they allowed."""

    def __init__(self, seq: Sequence, vocabulary: Vocabulary) -> None:
        params = seq.request.params
        self.ends = frozenset(params.stop_token_ids).union(() if params.ignore_eos else vocabulary.eos_ids)
        self._matcher = seq.matcher
        self._shows_end = params.include_stop_str_in_output
        self._detokenizer = Detokenizer(partial(vocabulary.decode, skip_special=params.skip_special_tokens))
        self._stop = StopMatcher(params.stop, include=params.include_stop_str_in_output)
        self._least, self._most = params.min_tokens, seq.max_tokens
        self._size = 0  # tokens

    def push(self, token_id: int) -> tuple[str, FinishReason | None]:
        """The text that can be shown with the next token, and whether the answer ends there."""
        self._size += 1
        if self._matcher is not None:
            self._matcher.consume_token(token_id)
        is_end = token_id in self.ends
        text = self._detokenizer.push(token_id) if self._shows_end or not is_end else ""
        if self._size > self._least:
            text = self._stop.push(text)
        reason: FinishReason | None = None
        if is_end or self._stop.found:
            reason = "stop"
        elif self._matcher is not None and self._matcher.is_error():
            reason = "grammar"
        elif self._size >= self._most:
            reason = "length"
        if reason is not None:
            text += self._stop.push(self._detokenizer.flush())
            text += self._stop.flush()
            if self._stop.found:  # completed by the last half character
                reason = "stop"
        return text, reason
