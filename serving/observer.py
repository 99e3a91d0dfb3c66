"""What the engine tells about its requests as they move, in its own thread: the next step waits until observers are done."""

from __future__ import annotations

from collections.abc import Sequence as Several
from typing import Protocol

from serving.core import Batch, RequestOutput, Sequence


class Observer(Protocol):
    """now: the engine's clock, in seconds."""

    def queued(self, seq: Sequence, now: float) -> None:
        """A request has been taken up, and waits. The sequence goes on changing."""
        ...

    def scheduled(self, batch: Batch, now: float) -> None:
        """A step starts."""
        ...

    def produced(self, outputs: Several[RequestOutput], now: float) -> None:
        """What a step has given its requests; with a finish reason, their last."""
        ...

    def dropped(self, request_id: str, now: float) -> None:
        """A request has been given up by its client before its end."""
        ...
