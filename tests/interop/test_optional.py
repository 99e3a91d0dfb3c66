"""The bridges are optional: without their packages they say what to install."""

from __future__ import annotations

import sys

import pytest

from tilus.interop.cute import to_cute
from tilus.layout import LayoutError, row_major


def test_without_cutlass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cutlass.cute", None)
    with pytest.raises(
        LayoutError, match=r"need the package nvidia-cutlass-dsl.*\n  hint: pip install 'tilus\[interop\]'"
    ):
        to_cute(row_major((4, 4)))
