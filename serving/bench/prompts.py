"""Prompts of a given number of tokens for any model: four-letter words, and what the server says they are."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from serving.bench.workload import PlannedRequest

# Frequent and all of one length: with the space before it, each is one token in vocabularies of subwords and five in those of
# single bytes, so that tokens grow evenly with words.
_TEXT = (
    "that with have this will your from they know want been good much some time very when come here just like long make many "
    "more only over such take than them well were what work year back call came each even find give hand high keep last life "
    "line live look most move must name need next open part play read room same show side tell then turn used ways week went"
)
WORDS = tuple(_TEXT.split(" "))
_SPACED = np.array([f"{word} " for word in WORDS], "S5")  # for numpy, which puts long prompts together faster

# How many words the server is asked to count, to learn the tokens of a word and of what it puts around a prompt.
SAMPLES = (8, 24)


@dataclass(frozen=True)
class TokenCost:
    """A prompt of w words has base + per_word * w tokens: base is the template around it and the mark of its beginning."""

    base: float
    per_word: float

    @classmethod
    def fit(cls, few: int, many: int) -> TokenCost:
        """From the tokens of prompts of SAMPLES words."""
        per_word = (many - few) / (SAMPLES[1] - SAMPLES[0])
        return cls(few - per_word * SAMPLES[0], per_word)

    def words(self, num_tokens: float) -> int:
        """The words whose prompt comes closest to `num_tokens`; at least one."""
        return max(1, round((num_tokens - self.base) / self.per_word))


class PromptWriter:
    """Writes the prompt of any planned request. The same seed gives the same prompts, another one shares nothing."""

    def __init__(self, seed: int, cost: TokenCost) -> None:
        self._seed = seed
        self._cost = cost
        self._block = functools.lru_cache(maxsize=4096)(self._words)  # blocks come again; some MB at the most

    def sample(self, num_words: int) -> str:
        """A prompt of so many words, to have its tokens counted."""
        return self._words(0, num_words, num_words)

    def text(self, index: int, planned: PlannedRequest) -> str:
        """The prompt of the planned request number `index`, which says which words it has of its own."""
        num_words = self._cost.words(planned.input_tokens)
        ends = [round((i + 1) * planned.block_tokens / self._cost.per_word) for i in range(len(planned.blocks))]
        pieces: list[str] = []
        start = 0
        for name, end in zip(planned.blocks, ends):
            if start < (end := min(end, num_words)):
                pieces.append(self._block(1, name, end - start))
                start = end
        if start < num_words:
            pieces.append(self._words(2, index, num_words - start))
        return " ".join(pieces)

    def _words(self, kind: int, name: int, count: int) -> str:
        """`count` words that follow from the seed, the kind and the name; fewer are the beginning of more."""
        rng = np.random.default_rng([self._seed, kind, name])
        return _SPACED[rng.integers(0, len(WORDS), count)].tobytes().decode()[:-1]
