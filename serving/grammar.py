"""Answers that match a grammar: JSON schemas and regular expressions as masks over the vocabulary, by the library llguidance.

Grammars are not expanded when they are compiled but as an answer moves through them, so that compiling takes milliseconds and a
step's mask less; the library bounds the work of both. (xgrammar does the same, but installs torch, transformers and triton.)
"""

from __future__ import annotations

import threading
from collections.abc import Collection
from functools import lru_cache

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from serving.core import Grammar
from serving.errors import RequestError
from serving.tokenizer import Tokenizer

MAX_LENGTH = 65536  # characters; schemas of twice this size have taken a second to compile
_MAX_CACHED = 128
# Without an end, small models write blanks until their tokens run out.
_WHITESPACE = r"[\x20\x0A\x0D\x09]{1,32}"


class GrammarMatcher:
    """Where one answer is in its grammar.

    failed: the grammar has become too complex to go on, or a token that was not allowed has been accepted. From then on only
    the tokens that end an answer are allowed.
    """

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    @property
    def failed(self) -> bool:
        return self._matcher.is_error()

    def allowed(self) -> bytes:
        """A bit for each token of the vocabulary, the first in the lowest bit of the first byte: which may come next. Where the
        grammar may end, so may the answer.
        """
        return self._matcher.compute_bitmask()

    def accept(self, token_id: int) -> None:
        self._matcher.consume_token(token_id)


class Grammars:
    """The compiled grammars of a vocabulary. Any thread may ask; what was asked last is kept."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self._vocabulary: LLTokenizer | None = None
        self._compiled = lru_cache(_MAX_CACHED)(self._compile)

    def matcher(self, grammar: Grammar) -> GrammarMatcher:
        """At the grammar's start. Raises RequestError for one that is wrong, too large, or uses what is not supported."""
        return GrammarMatcher(self._compiled(grammar).deep_copy())

    def _compile(self, grammar: Grammar) -> LLMatcher:
        name = {"json_schema": "JSON schema", "regex": "regular expression", "lark": "grammar"}[grammar.kind]
        if len(grammar.text) > MAX_LENGTH:
            raise _refusal(f"the {name} has {len(grammar.text)} characters, but at most {MAX_LENGTH} are allowed")
        try:
            limits = LLParserLimits(verbose_errors=False)
            matcher = LLMatcher(self._known_vocabulary(), _source(grammar), log_level=0, limits=limits)
        except ValueError as error:
            raise _refusal(f"the {name} cannot be used: {error}") from error
        if matcher.is_error():
            raise _refusal(f"the {name} cannot be used: {matcher.get_error()}")
        return matcher

    def _known_vocabulary(self) -> LLTokenizer:
        """Made when it is first needed: it takes a quarter of a second."""
        with self._lock:
            if self._vocabulary is None:
                tokenizer = self._tokenizer
                self._vocabulary = _vocabulary(tokenizer.fast.to_str(), tokenizer.vocab_size, tokenizer.eos_ids)
            return self._vocabulary


def _vocabulary(tokenizer_json: str, size: int, eos_ids: Collection[int]) -> LLTokenizer:
    return LLTokenizer(tokenizer_json, n_vocab=size, eos_token=sorted(eos_ids))


def _source(grammar: Grammar) -> str:
    if grammar.kind == "json_schema":
        return LLMatcher.grammar_from_json_schema(grammar.text, overrides={"whitespace_pattern": _WHITESPACE})
    return (LLMatcher.grammar_from_regex if grammar.kind == "regex" else LLMatcher.grammar_from_lark)(grammar.text)


def _refusal(message: str) -> RequestError:
    return RequestError(message, param="response_format")
