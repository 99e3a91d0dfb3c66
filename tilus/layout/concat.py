"""Concatenation of layouts: one whose index joins the indices of two."""

from __future__ import annotations

from typing import TypeVar

from tilus.layout.register import RegisterLayout
from tilus.layout.shared import SharedLayout

Layout = TypeVar("Layout", RegisterLayout, SharedLayout)


def concat(f: Layout, g: Layout) -> Layout:
    """The layout of shape f.shape + g.shape: each element of `f` is a tile of `g` in dimensions of its own.

    Register layouts: `h(t, i) == (*f(t // T_g, i // L_g), *g(t % T_g, i % L_g))`. Memory layouts:
    `h((*x, *y)) == f(x) * g.size + g(y)`. Raises LayoutError where memory layouts have no product (see `SharedLayout.__mul__`).
    """
    outer, inner = f, g
    for _ in range(g.rank):
        outer = outer.unsqueeze(outer.rank)
    for _ in range(f.rank):
        inner = inner.unsqueeze(0)
    return outer * inner
