"""A line for each request that ends: how it ended, and where its time went."""

from __future__ import annotations

from serving.core import Ending, Sequence
from serving.observer import Observer
from serving.progress import say


class RequestLog(Observer):
    """Says it on stderr."""

    def ended(self, seq: Sequence, ending: Ending, now: float) -> None:
        say(request_line(seq, ending, now))


def request_line(seq: Sequence, ending: Ending, now: float) -> str:
    """Phases in milliseconds: in the queue, the prompt up to the first token, and the rest with the mean between two tokens.

    now: the clock's time at the end. A phase that was not reached is left out.
    """
    started, answered = seq.started, seq.answered
    num_output = seq.num_output - seq.num_unknown
    parts = [f"queued {((started if started is not None else now) - seq.arrived) * 1e3:.1f} ms"]
    if started is not None:
        parts.append(f"prefill {((answered if answered is not None else now) - started) * 1e3:.1f} ms")
    if answered is not None:
        decode = (now - answered) * 1e3
        parts.append(
            f"decode {decode:.1f} ms" + (f" ({decode / (num_output - 1):.2f} a token)" if num_output > 1 else "")
        )
    if seq.num_preemptions:
        parts.append(f"lost its pages {seq.num_preemptions} times")
    return f"request {seq.id} {ending}: {len(seq.request.prompt)} tokens in, {num_output} out; {', '.join(parts)}"
