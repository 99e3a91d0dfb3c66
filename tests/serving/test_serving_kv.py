"""Page tables: pages are conserved, tables are long enough, and `check` sees every kind of corruption."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.kv import PageTables
from tilus.errors import TilusError

steps = st.lists(st.tuples(st.sampled_from("abcd"), st.one_of(st.none(), st.integers(1, 40))), max_size=40)


@given(st.integers(1, 12), st.integers(1, 5), steps)
def test_pages_are_conserved(num_pages: int, page_size: int, steps: list[tuple[str, int | None]]) -> None:
    tables = PageTables(num_pages, page_size)
    held: dict[str, int] = {}
    for owner, tokens in steps:
        if tokens is None:
            if owner in held:
                tables.release(owner)
                del held[owner]
        else:
            before = {name: tables.table(name) for name in held}
            wanted = max(-(-tokens // page_size), held.get(owner, 0))
            fits = sum(held.values()) - held.get(owner, 0) + wanted <= num_pages
            assert tables.reserve(owner, tokens) is fits
            if fits:
                held[owner] = wanted
            for name, table in before.items():  # growth never moves what is written
                assert tables.table(name)[: len(table)] == table
        tables.check()
        assert {name: len(tables.table(name)) for name in tables.owners()} == held
        assert tables.num_free == num_pages - sum(held.values())


@pytest.mark.parametrize(
    ("corrupt", "message"),
    [
        (lambda t: t._free.pop(), "lost [2], owned twice [], out of range []"),
        (lambda t: t._free.append(3), "lost [], owned twice [3], out of range []"),
        (lambda t: t._tables["a"].append(9), "lost [], owned twice [], out of range [9]"),
        (lambda t: t._free.__setitem__(0, t._tables["a"][0]), "lost [3], owned twice [0], out of range []"),
    ],
)
def test_check_names_the_corruption(corrupt, message: str) -> None:
    tables = PageTables(4, 2)
    tables.reserve("a", 3)
    corrupt(tables)
    with pytest.raises(TilusError, match="the page tables are corrupt: of 4 pages") as caught:
        tables.check()
    assert message in str(caught.value)


def test_a_pool_needs_pages() -> None:
    with pytest.raises(TilusError, match="the cache has 0 pages of 16 tokens; both must be at least 1"):
        PageTables(0, 16)
