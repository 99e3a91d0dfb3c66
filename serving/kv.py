"""Pages of the key-value cache: who owns which. Only numbers; the tensor is the runner's.

The pool has `num_pages` pages of `page_size` tokens. A sequence's block table lists its pages in token order. Each page is free,
or kept for what it holds although nobody owns it, or in at least one table: in several where sequences begin alike. `check`
proves it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from serving.prefixes import ROOT, Prefixes
from tilus.errors import TilusError


class PageTables:
    """Block tables by sequence id over one pool of pages.

    reuse: whether pages with known tokens are kept when they are released, and shared: sequences that begin alike then have the
    same pages in front. The one that was released first is taken first when no other page is free.
    """

    def __init__(self, num_pages: int, page_size: int, *, reuse: bool = False) -> None:
        if num_pages < 1 or page_size < 1:
            raise TilusError(f"the cache has {num_pages} pages of {page_size} tokens; both must be at least 1")
        self.num_pages = num_pages
        self.page_size = page_size
        self._free = list(range(num_pages - 1, -1, -1))  # a stack: the page freed last is used first, still in caches
        self._kept: dict[int, None] = {}  # in the order in which they were released
        self._tables: dict[str, tuple[int, ...]] = {}  # most steps ask for one that has not changed
        self._num_owners = Counter[int]()
        self._reuse = reuse
        self._prefixes = Prefixes(page_size)
        self._ends: dict[str, tuple[int, int]] = {}  # of an owner's known pages: how many, the number of the last one

    @property
    def num_free(self) -> int:
        """Pages that can be had: those that are kept, too."""
        return len(self._free) + len(self._kept)

    @property
    def capacity(self) -> int:
        """Tokens that the whole pool holds."""
        return self.num_pages * self.page_size

    def adopt(self, owner: str, tokens: Sequence[int]) -> int:
        """Start the table of an owner, who has none, with pages that hold the beginning of its tokens already. How many tokens
        these are: fewer than all, as the last one must be computed for the next to be sampled."""
        pages = self._prefixes.find(tokens[:-1])
        if not pages:
            return 0
        for page in pages:
            self._kept.pop(page, None)
        self._num_owners.update(pages)
        self._tables[owner] = tuple(pages)
        self._ends[owner] = len(pages), self._prefixes.number(pages[-1])
        return len(pages) * self.page_size

    def publish(self, owner: str, tokens: Sequence[int], count: int) -> None:
        """What an owner's pages hold: the first `count` of its tokens, whose keys and values have been written."""
        known, number = self._ends.get(owner, (0, ROOT))
        size = self.page_size
        if not self._reuse or count // size <= known:
            return
        table = self._tables[owner]
        for index in range(known, count // size):
            number = self._prefixes.add(table[index], number, tokens[index * size : (index + 1) * size])
            self._ends[owner] = index + 1, number

    def reserve(self, owner: str, num_tokens: int) -> bool:
        """Grow the owner's table until it holds `num_tokens`. False, and nothing changed, when pages are lacking."""
        table = self._tables.get(owner, ())
        missing = -(-num_tokens // self.page_size) - len(table)
        if missing <= 0:
            return True
        if missing > self.num_free:
            return False
        self._tables[owner] = (*table, *(self._take() for _ in range(missing)))
        return True

    def release(self, owner: str) -> None:
        """Give back all pages of the owner, who must have a table; the last ones first, without which others are still of use."""
        self._ends.pop(owner, None)
        for page in reversed(self._tables.pop(owner)):
            self._num_owners[page] -= 1
            if self._num_owners[page]:
                continue
            del self._num_owners[page]
            if page in self._prefixes:
                self._kept[page] = None
            else:
                self._free.append(page)

    def table(self, owner: str) -> tuple[int, ...]:
        """Until it grows, the same object."""
        return self._tables[owner]

    def num_pages_of(self, owner: str) -> int:
        return len(self._tables.get(owner, ()))

    def num_shared(self, owner: str) -> int:
        """Pages of an owner that others have, too."""
        return sum(self._num_owners[page] > 1 for page in self._tables.get(owner, ()))

    def owners(self) -> frozenset[str]:
        return frozenset(self._tables)

    def check(self) -> None:
        """Raise unless every page is free, kept or owned, and only one of these, owners are counted right, and only pages with
        known tokens are kept or have several owners."""
        owned = Counter(page for table in self._tables.values() for page in table)
        seen = Counter([*self._free, *self._kept, *owned])
        if seen != Counter(range(self.num_pages)):
            lost = sorted(set(range(self.num_pages)) - set(seen))
            doubled = sorted(page for page, count in seen.items() if count > 1)
            foreign = sorted(set(seen) - set(range(self.num_pages)))
            raise TilusError(
                f"the page tables are corrupt: of {self.num_pages} pages, lost {lost}, owned twice {doubled}, "
                f"out of range {foreign}"
            )
        miscounted = sorted(page for page in owned | self._num_owners if owned[page] != self._num_owners[page])
        shared = [*self._kept, *(page for page, count in owned.items() if count > 1)]
        unknown = sorted(page for page in shared if page not in self._prefixes)
        freed = sorted(page for page in self._free if page in self._prefixes)
        consistent = self._prefixes.is_consistent()
        if miscounted or unknown or freed or not consistent:
            raise TilusError(
                f"the page tables are corrupt: owners counted wrongly {miscounted}, shared or kept with unknown tokens "
                f"{unknown}, free with known tokens {freed}, names {'' if consistent else 'in'}consistent"
            )

    def _take(self) -> int:
        if self._free:
            page = self._free.pop()
        else:
            page = next(iter(self._kept))
            del self._kept[page]
            self._prefixes.forget(page)
        self._num_owners[page] += 1
        return page
