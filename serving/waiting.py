"""In which order requests that wait get their turn: as they came, by priority, or in fair shares for each user."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator

from serving.core import Sequence

Rank = tuple[int, int]
INPUT_WEIGHT, OUTPUT_WEIGHT = 1, 2  # what a token of a prompt and of an answer costs its user
MAX_USERS = 10_000  # whose service is remembered at least


class Ranked:
    """Sequences that wait, first come, first served; with `by_priority`, of the lowest priority number that waits."""

    def __init__(self, by_priority: bool = False) -> None:
        self._by_priority = by_priority
        self._sequences: list[Sequence] = []

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences)

    def rank(self, seq: Sequence) -> Rank:
        """Orders also those that run: the last one is the first to lose its pages."""
        return seq.request.priority if self._by_priority else 0, seq.number

    def push(self, seq: Sequence) -> None:
        insort(self._sequences, seq, key=self.rank)

    def first(self) -> Sequence:
        """Whose turn it is; there must be one."""
        return self._sequences[0]

    def remove(self, seq: Sequence) -> None:
        self._sequences.remove(seq)

    def charge(self, user: str, cost: int) -> None:
        """A user has been served."""


class Fair:
    """Of those that wait, the user who was served least comes next: the virtual token counter (Sheng et al., Fairness in Serving
    Large Language Models, OSDI 2024).

    A user who comes back is lifted to the least served of those that wait: idle time earns nothing. Among users who always have
    something waiting, service differs by at most 2 max(INPUT_WEIGHT * the longest prompt, OUTPUT_WEIGHT * the cache's tokens).
    """

    def __init__(self) -> None:
        self._queues: dict[str, Ranked] = {}
        self._served: dict[str, int] = {}
        self._last = 0  # what the user had been served who was the last one to wait

    def __len__(self) -> int:
        return sum(len(queue) for queue in self._queues.values())

    def __iter__(self) -> Iterator[Sequence]:
        return (seq for queue in self._queues.values() for seq in queue)

    def rank(self, seq: Sequence) -> Rank:
        return 0, seq.number

    def push(self, seq: Sequence) -> None:
        user = seq.request.user
        if user not in self._queues:
            level = min((self._served[other] for other in self._queues), default=self._last)
            self._forget_below(level)
            self._served[user] = max(self._served.get(user, 0), level)
            self._queues[user] = Ranked()
        self._queues[user].push(seq)

    def first(self) -> Sequence:
        user = min(self._queues, key=lambda name: (self._served[name], self._queues[name].first().number))
        return self._queues[user].first()

    def remove(self, seq: Sequence) -> None:
        user = seq.request.user
        self._queues[user].remove(seq)
        if not self._queues[user]:
            del self._queues[user]
            self._last = self._served[user]

    def charge(self, user: str, cost: int) -> None:
        self._served[user] = self._served.get(user, 0) + cost

    def _forget_below(self, level: int) -> None:
        """Users who would be lifted anyway."""
        if len(self._served) >= MAX_USERS:
            self._served = {name: n for name, n in self._served.items() if name in self._queues or n > level}


Waiting = Ranked | Fair


def waiting_queue(schedule: str) -> Waiting:
    """The queue of a `--schedule`."""
    return Fair() if schedule == "fair" else Ranked(by_priority=schedule == "priority")
