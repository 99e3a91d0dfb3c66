"""Which pages hold which beginnings of sequences, so that a prompt that starts like an earlier one need not compute it again.

Only whole pages are known. A page's name is its tokens and the number of the page in front of it: two sequences share a page
exactly when all their tokens up to its end are equal.
"""

from __future__ import annotations

from collections.abc import Sequence

ROOT = 0  # the number of the page in front of a sequence's first one

_Name = tuple[int, tuple[int, ...]]


class Prefixes:
    """Names of pages. Numbers are never given twice, so that what followed a forgotten page is not found any more."""

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._pages: dict[_Name, int] = {}
        self._known: dict[int, tuple[int, _Name]] = {}  # by page: its number and its name
        self._next = ROOT + 1

    def __contains__(self, page: int) -> bool:
        return page in self._known

    def find(self, tokens: Sequence[int]) -> list[int]:
        """The pages of the longest known beginning of some tokens."""
        found, number, size = list[int](), ROOT, self._page_size
        tokens = tuple(tokens)  # whose parts are tuples at once
        for end in range(size, len(tokens) + 1, size):
            page = self._pages.get((number, tokens[end - size : end]))
            if page is None:
                break
            found.append(page)
            number = self._known[page][0]
        return found

    def number(self, page: int) -> int:
        return self._known[page][0]

    def add(self, page: int, before: int, tokens: Sequence[int]) -> int:
        """Make the tokens of a page known, behind the page with the number `before`; the number of what is known by these
        tokens, which is another page where one was first."""
        name = before, tuple(tokens)
        known = self._pages.setdefault(name, page)
        if known == page:
            self._known[page] = self._next, name
            self._next += 1
        return self.number(known)

    def forget(self, page: int) -> None:
        _, name = self._known.pop(page)
        del self._pages[name]

    def is_consistent(self) -> bool:
        names = {page: name for page, (_, name) in self._known.items()}
        return {page: name for name, page in self._pages.items()} == names
