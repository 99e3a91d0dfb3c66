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


@given(
    st.integers(1, 10),
    st.integers(1, 3),
    st.lists(st.tuples(st.sampled_from("abc"), st.text("xy", max_size=9)), max_size=30),
)
def test_pages_are_shared_by_what_they_hold(num_pages: int, size: int, steps: list[tuple[str, str]]) -> None:
    """A memory tells what is in a page: an adopted one holds the adopter's own tokens, and all in front of them, to its end.

    A step ends the owner's sequence, if it has one, and starts another one, which is written token by token.
    """
    tables = PageTables(num_pages, size, reuse=True)
    memory, texts = dict[int, list[int]](), dict[str, list[int]]()
    for owner, text in steps:
        if owner in tables.owners():
            tables.release(owner)
        tokens = [ord(letter) for letter in text]
        found = tables.adopt(owner, tokens)
        assert found % size == 0 and (found < len(tokens) or found == 0)
        for index in range(found // size):
            assert memory[tables.table(owner)[index]] == tokens[: (index + 1) * size]
        if not tokens or not tables.reserve(owner, len(tokens)):
            if found:
                tables.release(owner)
            continue
        table = tables.table(owner)
        assert len(table) == -(-len(tokens) // size)
        for count in range(found + 1, len(tokens) + 1):
            memory[table[(count - 1) // size]] = tokens[:count]
            tables.publish(owner, tokens, count)
        tables.check()
        again = tables.num_free
        if (repeated := tables.adopt("again", tokens)) > 0:
            tables.release("again")
        assert repeated == (len(tokens) - 1) // size * size and tables.num_free == again
        texts[owner] = tokens
        for other in tables.owners():  # nobody's pages were written by others
            for index, page in enumerate(tables.table(other)):
                assert memory[page] == texts[other][: (index + 1) * size]


def test_what_was_released_first_goes_first_and_ends_before_beginnings() -> None:
    tables = PageTables(6, 1, reuse=True)
    for owner, tokens in (("a", [1, 2, 3]), ("b", [4, 5, 6])):
        assert tables.reserve(owner, 3)
        tables.publish(owner, tokens, 3)
    for owner in "ab":
        tables.release(owner)
    assert tables.num_free == 6
    assert tables.reserve("c", 2)
    assert [tables.adopt(name, tokens) for name, tokens in (("a", [1, 2, 3, 0]), ("b", [4, 5, 6, 0]))] == [1, 3]
    assert not tables.reserve("d", 1)
    tables.check()


def test_without_reuse_nothing_is_found() -> None:
    tables = PageTables(4, 1)
    assert tables.reserve("a", 2)
    tables.publish("a", [1, 2], 2)
    assert tables.adopt("b", [1, 2, 3]) == 0 and tables.owners() == {"a"}


@pytest.mark.parametrize(
    ("corrupt", "message"),
    [
        (lambda t: t._num_owners.update([t._tables["a"][0]]), "owners counted wrongly [0]"),
        (lambda t: t._prefixes.forget(0), "shared or kept with unknown tokens [0]"),
        (lambda t: t._free.append(t._kept.popitem()[0]), "free with known tokens [1]"),
        (lambda t: t._prefixes._pages.clear(), "names inconsistent"),
    ],
)
def test_check_names_wrong_sharing(corrupt, message: str) -> None:
    tables = PageTables(4, 2, reuse=True)
    tables.reserve("a", 4)
    tables.publish("a", [1, 2, 3, 4], 4)
    tables.adopt("b", [1, 2, 5])
    tables.release("a")
    tables.reserve("a", 1)
    tables.adopt("c", [1, 2, 6])
    tables._tables["a"], tables._tables["b"] = tables._tables["b"], tables._tables["a"]
    tables.check()
    corrupt(tables)
    with pytest.raises(TilusError, match="the page tables are corrupt: owners") as caught:
        tables.check()
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("corrupt", "message"),
    [
        (lambda t: t._free.pop(), "lost [2], owned twice [], out of range []"),
        (lambda t: t._free.append(3), "lost [], owned twice [3], out of range []"),
        (lambda t: t._tables.update(a=(*t._tables["a"], 9)), "lost [], owned twice [], out of range [9]"),
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
