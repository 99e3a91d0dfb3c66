"""Pages in the host's memory, to which sequences that lose their place in the cache are copied. Only numbers, like `kv`."""

from __future__ import annotations

from collections import Counter

from serving.core import PageCopy
from tilus.errors import TilusError


class HostPages:
    """Who has which of `num_pages` pages of `page_size` tokens. Every page is free or has one owner: `check` proves it."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages = num_pages
        self._page_size = page_size
        self._free = list(range(num_pages - 1, -1, -1))
        # By owner: how many tokens, and the pages that hold them.
        self._saved: dict[str, tuple[int, tuple[int, ...]]] = {}

    def owners(self) -> frozenset[str]:
        return frozenset(self._saved)

    def save(self, owner: str, num_tokens: int, table: tuple[int, ...]) -> tuple[PageCopy, ...]:
        """The copies that keep the first `num_tokens` tokens of an owner, whose pages in the cache are `table`; none, and nothing
        is kept, when pages are lacking."""
        count = -(-num_tokens // self._page_size)
        if not 0 < count <= len(self._free):
            return ()
        host_pages = tuple(self._free.pop() for _ in range(count))
        self._saved[owner] = num_tokens, host_pages
        return tuple(PageCopy(page, host, to_host=True) for page, host in zip(table, host_pages))

    def restore(self, owner: str, found: int, table: tuple[int, ...]) -> tuple[int, tuple[PageCopy, ...]]:
        """How many of an owner's tokens are in its pages of the cache, `table`, after the copies, which leave out the first
        `found` tokens: whole pages that are there already. Its host pages are free then, for copies that come later."""
        num_tokens, host_pages = self._saved[owner]
        self.release(owner)
        first = found // self._page_size
        pairs = list(zip(table, host_pages))[first:]
        return max(found, num_tokens), tuple(PageCopy(page, host, to_host=False) for page, host in pairs)

    def release(self, owner: str) -> None:
        """Give the pages of an owner back; one that has none is no mistake."""
        _, host_pages = self._saved.pop(owner, (0, ()))
        self._free.extend(reversed(host_pages))

    def check(self) -> None:
        """Raise unless every page is free or owned, once."""
        seen = Counter([*self._free, *(page for _, pages in self._saved.values() for page in pages)])
        if seen != Counter(range(self.num_pages)):
            lost = sorted(set(range(self.num_pages)) - set(seen))
            doubled = sorted(page for page, count in seen.items() if count > 1)
            raise TilusError(
                f"the host's pages are corrupt: of {self.num_pages} pages, lost {lost}, owned twice {doubled}"
            )
