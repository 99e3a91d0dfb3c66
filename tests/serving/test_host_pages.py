"""Pages of the host's memory are conserved, and what comes back is what was saved."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.host_pages import HostPages
from tilus.errors import TilusError

steps = st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 30), st.integers(0, 3)), max_size=40)


@given(st.integers(0, 12), st.integers(1, 5), steps)
def test_what_comes_back_is_what_was_saved(num_pages: int, size: int, steps: list[tuple[str, int, int]]) -> None:
    """Owners are saved and come back in turn; a memory of the host holds (owner, index) of each page."""
    pages, memory, saved = HostPages(num_pages, size), dict[int, tuple[str, int]](), dict[str, int]()
    for owner, num_tokens, known in steps:
        if owner in saved:
            tokens = saved.pop(owner)
            count = -(-tokens // size)
            found = min(known, count) * size
            computed, copies = pages.restore(owner, found, tuple(range(100, 100 + count)))
            assert computed == max(found, tokens)
            assert [(copy.page, memory[copy.host_page]) for copy in copies] == [
                (100 + index, (owner, index)) for index in range(found // size, count)
            ]
            assert not any(copy.to_host for copy in copies)
        else:
            count = -(-num_tokens // size)
            copies = pages.save(owner, num_tokens, tuple(range(count)))
            fits = 0 < count <= num_pages - sum(-(-tokens // size) for tokens in saved.values())
            assert [(copy.page, copy.to_host) for copy in copies] == ([(i, True) for i in range(count)] if fits else [])
            if fits:
                saved[owner] = num_tokens
                memory |= {copy.host_page: (owner, copy.page) for copy in copies}
        pages.check()
        assert pages.owners() == saved.keys()
        assert len(pages._free) == num_pages - sum(-(-tokens // size) for tokens in saved.values())


@pytest.mark.parametrize(
    ("corrupt", "message"),
    [
        (lambda pages: pages._free.pop(), "lost [2], owned twice []"),
        (lambda pages: pages._free.append(0), "lost [], owned twice [0]"),
    ],
)
def test_check_names_the_corruption(corrupt, message: str) -> None:
    pages = HostPages(4, 2)
    pages.save("a", 3, (7, 8))
    corrupt(pages)
    with pytest.raises(TilusError, match="the host's pages are corrupt: of 4 pages") as caught:
        pages.check()
    assert message in str(caught.value)
