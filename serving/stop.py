"""Stop strings in a stream of text: found also across pieces, and never shown, not even in part."""

from __future__ import annotations


class StopMatcher:
    """Passes text on until the first stop string; holds back an end that may still become one.

    Law: however the text is cut into pieces, the concatenation of what is passed on is the text before the stop string
    that is complete first (of several complete at once, the longest); with `include`, that stop string, too.
    """

    def __init__(self, stops: tuple[str, ...], *, include: bool = False) -> None:
        self._stops = stops
        self._include = include
        self._held = ""
        self.found = False

    def push(self, piece: str) -> str:
        """The text that can be shown now; once a stop string is found, `found` is set and nothing follows."""
        if self.found:
            return ""
        if not self._stops:
            return piece
        text = self._held + piece
        hits = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        self.found = bool(hits)
        cut = min(hits)[not self._include] if hits else len(text) - self._overlap(text)
        self._held = "" if self.found else text[cut:]
        return text[:cut]

    def flush(self) -> str:
        """The text still held back, when the output ends without a stop string."""
        held, self._held = self._held, ""
        return held

    def _overlap(self, text: str) -> int:
        """Length of the longest end of `text` that begins some stop string."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        for size in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self._stops):
                return size
        return 0
