"""Answers that match a grammar: JSON schemas and regular expressions as masks over the vocabulary, by the library llguidance.

Grammars are not expanded when they are compiled but as an answer moves through them, so that compiling takes milliseconds and a
step's mask less. (xgrammar does the same, but installs torch, transformers and triton.) The library bounds its work, but for some
schemas: a few patterns that must all match at once can take it minutes. A thread cannot be stopped, but a process can. Each
grammar is therefore compiled there first.
"""

from __future__ import annotations

import json
import select
import subprocess
import sys
import threading
import weakref
from functools import cached_property, lru_cache
from pathlib import Path
from typing import IO, cast

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from serving.core import Grammar
from serving.errors import RequestError
from serving.tokenizer import Tokenizer

MAX_LENGTH = 65536  # characters; schemas of twice this size have taken a second to compile
MAX_SECONDS = 2.0
_START_SECONDS = 30.0
_MAX_CACHED = 128
# Without an end, small models write blanks until their tokens run out.
_WHITESPACE = r"[\x20\x0A\x0D\x09]{1,32}"


class _Trial:
    """A process that compiles grammars to see whether it can be done: it may take too long, or break."""

    def __init__(self) -> None:
        program = Path(__file__).with_name("grammar_trial.py")
        self._process = subprocess.Popen([sys.executable, program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._requests, self._answers = cast(IO[bytes], self._process.stdin), cast(IO[bytes], self._process.stdout)
        self.end = weakref.finalize(self, _end, self._process)
        self._is_ready = self._answers_within(_START_SECONDS)

    def passes(self, source: str) -> bool:
        """Whether the process is done within MAX_SECONDS. If not it is of no more use."""
        if not self._is_ready:
            return False
        try:
            self._requests.write(json.dumps(source).encode() + b"\n")
            self._requests.flush()
        except BrokenPipeError:
            return False
        return self._answers_within(MAX_SECONDS)

    def _answers_within(self, seconds: float) -> bool:
        return bool(select.select([self._answers], [], [], seconds)[0]) and self._answers.readline() == b"\n"


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.communicate()


class Grammars:
    """The compiled grammars of a vocabulary. Any thread may ask; what was asked last is kept."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self._trial: _Trial | None = None
        self._compiled = lru_cache(_MAX_CACHED)(self._compile)

    def matcher(self, grammar: Grammar) -> LLMatcher:
        """At the grammar's start. Raises RequestError for one that is wrong, too large, or uses what is not supported."""
        return self._compiled(grammar).deep_copy()

    def _compile(self, grammar: Grammar) -> LLMatcher:
        name = {"json_schema": "JSON schema", "regex": "regular expression", "lark": "grammar"}[grammar.kind]
        if len(grammar.text) > MAX_LENGTH:
            raise _refusal(f"the {name} has {len(grammar.text)} characters, but at most {MAX_LENGTH} are allowed")
        try:
            source = _source(grammar)
            if not self._can_be_compiled(source):
                raise _refusal(f"the {name} is too complex: it could not be compiled within {MAX_SECONDS:g} seconds")
            limits = LLParserLimits(verbose_errors=False)
            matcher = LLMatcher(self._vocabulary, source, log_level=0, limits=limits)
        except ValueError as error:
            raise _refusal(f"the {name} cannot be used: {error}") from error
        if matcher.is_error():
            raise _refusal(f"the {name} cannot be used: {matcher.get_error()}")
        return matcher

    def _can_be_compiled(self, source: str) -> bool:
        with self._lock:
            self._trial = self._trial or _Trial()
            passes = self._trial.passes(source)
            if not passes:
                self._trial.end()
                self._trial = None
            return passes

    @cached_property
    def _vocabulary(self) -> LLTokenizer:
        """Made when it is first needed: it takes a quarter of a second."""
        tokenizer = self._tokenizer
        return LLTokenizer(tokenizer.fast.to_str(), n_vocab=tokenizer.vocab_size, eos_token=sorted(tokenizer.eos_ids))


def _source(grammar: Grammar) -> str:
    if grammar.kind == "json_schema":
        return LLMatcher.grammar_from_json_schema(grammar.text, overrides={"whitespace_pattern": _WHITESPACE})
    return (LLMatcher.grammar_from_regex if grammar.kind == "regex" else LLMatcher.grammar_from_lark)(grammar.text)


def _refusal(message: str) -> RequestError:
    return RequestError(message, param="response_format")
