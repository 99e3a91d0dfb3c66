"""Positions are exact whatever the text around a function looks like."""

from __future__ import annotations

import pytest
from written import write

import tilus
from tilus.lang.source import source_of

TEXTS = {
    "decorated method": (
        "class A:\n    # comment\n    @staticmethod\n    @tilus.kernel\n    def k(a: int):\n"
        "        tilus.grid(1)\n        v = WRONG\n",
        "A", 7, 13,
    ),
    "tabs": ("if True:\n\t@tilus.kernel\n\tdef k(a: int):\n\t\ttilus.grid(1)\n\t\tv = WRONG\n", "k", 5, 7),
    "several lines": (
        '@tilus.kernel\ndef k(\n    a: int,\n):\n    """Doc\n  of two lines."""\n    tilus.grid(1)\n'
        "    v = (a +\n  WRONG)\n", "k", 9, 3,
    ),
    "not ascii": ("@tilus.kernel\ndef k(a: int):\n    tilus.grid(1)\n    größe = 'äöü', WRONG\n", "k", 4, 20),
    "nested": (
        "def outer():\n    def deeper():\n        @tilus.kernel\n        def k(a: int):\n            tilus.grid(1)\n"
        "            v = WRONG\n        return k\n    return deeper()\nk = outer()\n",
        "k", 6, 17,
    ),
    "same name twice": (
        "def k(a): pass\n@tilus.kernel\ndef k(a: int):\n    tilus.grid(1)\n    v = WRONG\n", "k", 5, 9,
    ),
    "continued": ("@tilus.kernel\ndef k(a: int):\n    tilus.grid(1); v = a + \\\n        WRONG\n", "k", 4, 9),
}  # fmt: skip


@pytest.mark.parametrize("name", TEXTS)
def test_errors_point_at_the_word(name: str) -> None:
    text, key, line, column = TEXTS[name]
    found = write(text, {"tilus": tilus})[key]
    kernel = found if isinstance(found, tilus.Kernel) else found.k
    with pytest.raises(tilus.TilusError) as caught:
        kernel.ir()
    loc = caught.value.loc
    assert loc is not None and (loc.line, loc.column, loc.end_column) == (line, column, column + len("WRONG"))


def test_two_lambdas_of_a_line_are_told_apart() -> None:
    names = write("f, g = (lambda x: x + 1), (lambda x: x + 2)\nh = lambda y: (y)\n", {})
    assert [source_of(names[n]).node.body.right.value for n in "fg"] == [1, 2]  # type: ignore[union-attr]
    assert source_of(names["h"]).node.body.id == "y"  # type: ignore[union-attr]


def test_functions_without_source_are_refused() -> None:
    names: dict[str, object] = {}
    exec("def f(x): return x", names)
    with pytest.raises(tilus.TilusError) as caught:
        source_of(names["f"])  # type: ignore[arg-type]
    assert caught.value.message == "the source of f is not available (<string>)"


def test_errors_in_helpers_say_where_they_were_inlined() -> None:
    text = "def h(x):\n    return x + WRONG\n@tilus.kernel\ndef k(a: int):\n    tilus.grid(1)\n    v = h(a)\n"
    with pytest.raises(tilus.TilusError) as caught:
        write(text, {"tilus": tilus}, "helper.py")["k"].ir()
    assert str(caught.value.loc) == "helper.py:2:16"
    assert caught.value.__notes__ == ["  inlined into helper.py:6:9"]
