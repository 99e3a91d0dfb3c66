"""What was observed of one request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Outcome = Literal["finished", "failed", "cancelled"]


@dataclass(frozen=True)
class Failure:
    """kind: a short name to count by, such as `http 500` or `timeout`. message: what the server or the connection said."""

    kind: str
    message: str


@dataclass(frozen=True)
class Record:
    """One request that was sent. Times are seconds after the run's start.

    arrival: when it had to be sent by the plan (in a closed loop, when its user was free). sent: when it first was.
    token_times: when each chunk with something of the answer came. end: of the answer, or when it failed or was given up.
    input_tokens, output_tokens: by the server's usage, or None when it told none. retries: how often it was sent again
    after status 429.
    """

    index: int
    arrival: float
    sent: float
    token_times: tuple[float, ...]
    end: float
    outcome: Outcome
    failure: Failure | None
    retries: int
    asked_input_tokens: int
    asked_output_tokens: int
    input_tokens: int | None
    output_tokens: int | None

    @property
    def late(self) -> float:
        """Seconds by which the client itself missed the arrival."""
        return self.sent - self.arrival

    @property
    def num_output(self) -> int:
        """Output tokens; without the server's usage, as many as chunks."""
        return len(self.token_times) if self.output_tokens is None else self.output_tokens

    @property
    def ttft(self) -> float | None:
        """Seconds from the arrival to the first token."""
        return self.token_times[0] - self.arrival if self.token_times else None

    @property
    def gaps(self) -> tuple[float, ...]:
        """Seconds between one chunk of the answer and the next: inter-token latencies."""
        return tuple(after - before for before, after in zip(self.token_times, self.token_times[1:]))

    @property
    def tpot(self) -> float | None:
        """Mean seconds of an output token after the first."""
        if self.num_output < 2 or len(self.token_times) < 2:
            return None
        return (self.token_times[-1] - self.token_times[0]) / (self.num_output - 1)

    @property
    def e2e(self) -> float:
        """Seconds from the arrival to the end."""
        return self.end - self.arrival
