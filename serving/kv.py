"""Pages of the key-value cache: who owns which. Only numbers; the tensor is the runner's.

The pool has `num_pages` pages of `page_size` tokens. A sequence's block table lists its pages in token order. Each page
is either free or in exactly one table; `check` proves it.
"""

from __future__ import annotations

from collections import Counter

from tilus.errors import TilusError


class PageTables:
    """Block tables by sequence id over one pool of pages."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        if num_pages < 1 or page_size < 1:
            raise TilusError(f"the cache has {num_pages} pages of {page_size} tokens; both must be at least 1")
        self.num_pages = num_pages
        self.page_size = page_size
        self._free = list(range(num_pages - 1, -1, -1))  # a stack: the page freed last is used first, still in caches
        self._tables: dict[str, list[int]] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def capacity(self) -> int:
        """Tokens that the whole pool holds."""
        return self.num_pages * self.page_size

    def reserve(self, owner: str, num_tokens: int) -> bool:
        """Grow the owner's table until it holds `num_tokens`. False, and nothing changed, when pages are lacking."""
        missing = -(-num_tokens // self.page_size) - len(self._tables.get(owner, ()))
        if missing > len(self._free):
            return False
        table = self._tables.setdefault(owner, [])
        table.extend(self._free.pop() for _ in range(missing))
        return True

    def release(self, owner: str) -> None:
        """Give back all pages of the owner, who must have a table."""
        self._free.extend(reversed(self._tables.pop(owner)))

    def table(self, owner: str) -> tuple[int, ...]:
        return tuple(self._tables[owner])

    def owners(self) -> frozenset[str]:
        return frozenset(self._tables)

    def check(self) -> None:
        """Raise unless every page is free or in one table, exactly once."""
        seen = Counter(self._free)
        for table in self._tables.values():
            seen.update(table)
        if seen != Counter(range(self.num_pages)):
            lost = sorted(set(range(self.num_pages)) - set(seen))
            doubled = sorted(page for page, count in seen.items() if count > 1)
            foreign = sorted(set(seen) - set(range(self.num_pages)))
            raise TilusError(
                f"the page tables are corrupt: of {self.num_pages} pages, lost {lost}, owned twice {doubled}, "
                f"out of range {foreign}"
            )
