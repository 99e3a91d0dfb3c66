"""What all drawings share: an SVG that is filled piece by piece, and its colours.

The eight colours are Paul Tol's "light" scheme (SRON technical note EPS/TN/09-002, 2021): pale enough for dark text, and told
apart by colour-blind readers.
"""

from __future__ import annotations

from collections.abc import Sequence
from xml.sax.saxutils import escape

HUES = ("#77AADD", "#EE8866", "#EEDD88", "#FFAABB", "#99DDFF", "#44BB99", "#BBCC33", "#AAAA00")
TINTS = (0.0, 0.3, 0.55, 0.75)
IDLE, EMPTY, FEW, MANY = "#F2F2F2", "#DDDDDD", "#EE8866", "#CC3311"
INK, FAINT = "#222222", "#666666"
FONT = "'DejaVu Sans Mono',ui-monospace,Menlo,Consolas,monospace"
CHARACTER = 0.61  # width of a character of FONT, in font sizes


def colour(hue: int, tint: int = 0) -> str:
    """The colour of that number, `tint` (0 to 3) steps toward white; both wrap around."""
    code, toward = HUES[hue % len(HUES)], TINTS[tint % len(TINTS)]
    parts = (int(code[at : at + 2], 16) for at in (1, 3, 5))
    return "#" + "".join(f"{round(part + (255 - part) * toward):02X}" for part in parts)


class Picture:
    """An SVG in the making; it is as large as what was put into it. Coordinates and sizes are pixels."""

    def __init__(self) -> None:
        self._parts: list[str] = []
        self._width = self._height = 0.0

    def box(self, x: float, y: float, width: float, height: float, fill: str, note: str = "") -> None:
        """A rectangle; `note` appears when the pointer rests on it."""
        self._grow(x + width, y + height)
        shape = f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}"'
        self._parts.append(f"{shape}><title>{escape(note)}</title></rect>" if note else f"{shape}/>")

    def text(self, x: float, y: float, words: str, *, size: float = 12, anchor: str = "middle", ink: str = INK) -> None:
        """Text on the base line y. anchor: start, middle or end."""
        width = CHARACTER * size * len(words)
        self._grow(x + {"start": width, "middle": width / 2, "end": 0.0}[anchor], y + 4)
        style = f' fill="{ink}"' if ink != INK else ""
        self._parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" text-anchor="{anchor}"{style}>{escape(words)}</text>'
        )

    def lines(self, x: float, y: float, words: Sequence[str], *, size: float = 12, ink: str = INK) -> float:
        """Lines of text from the top y down; returns where they end."""
        for line in words:
            y += size + 5
            self.text(x, y, line, size=size, anchor="start", ink=ink)
        return y + 5

    def legend(self, x: float, y: float, entries: Sequence[tuple[str, str]]) -> float:
        """Colours with their meaning in a row; returns where it ends."""
        for fill, words in entries:
            self.box(x, y + 3, 14, 14, fill)
            self.text(x + 20, y + 14, words, size=11, anchor="start")
            x += 40 + CHARACTER * 11 * len(words)
        return y + 24

    def svg(self) -> str:
        """The whole image. The style of cells is set on each image, so that several of them can stand in one page."""
        width, height = round(self._width) + 8, round(self._height) + 8
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            f'viewBox="0 0 {width} {height}" font-family="{FONT}" fill="{INK}" stroke-width="1">'
            f'<rect width="{width}" height="{height}" fill="#FFFFFF"/>'
            f"<g>{''.join(self._parts)}</g></svg>\n"
        )

    def _grow(self, right: float, bottom: float) -> None:
        self._width, self._height = max(self._width, right), max(self._height, bottom)


def fitting_size(words: str, width: float, largest: float = 12) -> float:
    """The font size at which words fit into a width."""
    return min(largest, (width - 4) / (CHARACTER * max(1, len(words))))
