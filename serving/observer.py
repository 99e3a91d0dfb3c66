"""What the engine tells about its requests as they move, in its own thread: the next step waits until observers are done."""

from __future__ import annotations

from serving.core import Batch, Ending, Sequence


class Observer:
    """Hears of everything; those that watch something say what they do then. now: the engine's clock, in seconds."""

    def queued(self, seq: Sequence, now: float) -> None:
        """A request has been taken up, and waits. The sequence goes on changing."""

    def scheduled(self, batch: Batch, now: float) -> None:
        """A step starts."""

    def produced(self, seq: Sequence, count: int, now: float) -> None:
        """A request has got so many tokens."""

    def ended(self, seq: Sequence, ending: Ending, now: float) -> None:
        """A request is no more."""
