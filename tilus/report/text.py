"""How reports are written: titled sections of aligned columns, and mixes of machine instructions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

SHOWN_OPCODES = 12


def render_sections(head: str, sections: Iterable[tuple[str, Iterable[str]]]) -> str:
    lines = [head]
    for title, body in sections:
        rows = list(body)
        lines += ["", title, *(f"  {row}" for row in rows or ["none"])]
    return "\n".join(lines)


def aligned(rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Rows of columns as lines; all columns but the last are padded to the same width."""
    table = list(rows)
    if not table:
        return []
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]) - 1)] + [0]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]


def render_mix(mix: Counter[str]) -> str:
    """How many instructions there are, and of which kinds the most."""
    shown = ", ".join(f"{count} {kind}" for kind, count in mix.most_common(SHOWN_OPCODES))
    rest = sum(mix.values()) - sum(count for _, count in mix.most_common(SHOWN_OPCODES))
    return f"{sum(mix.values())} instructions: {shown}" + (f", {rest} others" if rest else "")
