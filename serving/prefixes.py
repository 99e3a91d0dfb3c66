"""Which pages hold which beginnings of sequences, so that a prompt that starts like an earlier one need not compute it again.

Only whole pages are known. A page's name is its tokens and the number of the page in front of it: two sequences share a page
exactly when all their tokens up to its end are equal.
"""

from __future__ import annotations

from typing import NamedTuple

from serving.core import TOKEN_NBYTES

ROOT = 0  # the number of the page in front of a sequence's first one


class _Known(NamedTuple):
    """The tokens of a page, and its number."""

    tokens: bytes
    page: int
    number: int


class Prefixes:
    """Names of pages. Numbers are never given twice, so that what followed a forgotten page is not found any more. All tokens are
    packed: a tuple of them is spread over memory that the processor has not seen for long."""

    def __init__(self, page_size: int) -> None:
        self._page_nbytes = page_size * TOKEN_NBYTES
        # Behind most pages one other is known, which is compared without being looked up by its tokens.
        self._first: dict[int, _Known] = {}
        self._others: dict[tuple[int, bytes], _Known] = {}
        self._names: dict[int, tuple[int, bytes]] = {}  # by page: the number of the one in front of it, and its tokens
        self._last = ROOT

    def __contains__(self, page: int) -> bool:
        return page in self._names

    def find(self, tokens: bytes) -> tuple[list[int], int]:
        """The pages of the longest known beginning of some tokens, and the number of the last one."""
        found, number, size = list[int](), ROOT, self._page_nbytes
        for end in range(size, len(tokens) + 1, size):
            known = self._get(number, tokens[end - size : end])
            if known is None:
                break
            _, page, number = known
            found.append(page)
        return found, number

    def add(self, page: int, before: int, tokens: bytes) -> int:
        """Make the tokens of a page known, behind the page with the number `before`; the number of what is known by these
        tokens, which is another page where one was first."""
        known = self._get(before, tokens)
        if known is None:
            self._last += 1
            known = _Known(tokens, page, self._last)
            self._names[page] = before, tokens
            if self._first.setdefault(before, known) is not known:
                self._others[before, tokens] = known
        return known.number

    def forget(self, page: int) -> None:
        before, tokens = self._names.pop(page)
        if before in self._first and self._first[before].page == page:
            del self._first[before]
        else:
            del self._others[before, tokens]

    def is_consistent(self) -> bool:
        names = {known.page: (before, known.tokens) for before, known in self._first.items()}
        others = {known.page: name for name, known in self._others.items()}
        return names | others == self._names and len(names) + len(others) == len(self._names)

    def _get(self, before: int, tokens: bytes) -> _Known | None:
        first = self._first.get(before)
        return first if first is not None and first.tokens == tokens else self._others.get((before, tokens))
