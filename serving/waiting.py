"""In which order requests that wait get their turn: as they came, by priority, or in fair shares for each user."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
from itertools import chain

from serving.core import Sequence

Rank = tuple[int, int]
INPUT_WEIGHT, OUTPUT_WEIGHT = 1, 2  # what a token of a prompt and of an answer costs its user
MAX_USERS = 10_000  # whose service is remembered at least


class Waiting:
    """Sequences that wait, in the order of a `--schedule`.

    fcfs and priority: of one queue, the first in rank. fair: of the queues of all users, that of the user who was served least:
    the virtual token counter (Sheng et al., Fairness in Serving Large Language Models, OSDI 2024). A user who comes back is
    lifted to the least served of those that wait: idle time earns nothing. Among users who always have something waiting, service
    differs by at most 2 max(INPUT_WEIGHT * the longest prompt, OUTPUT_WEIGHT * the cache's tokens).
    """

    def __init__(self, schedule: str) -> None:
        self._by_priority = schedule == "priority"
        self._is_fair = schedule == "fair"
        self._queues: dict[str, list[Sequence]] = {}  # of the users who have something waiting, each by rank
        self._served: dict[str, int] = {}
        self._last = 0  # what the user had been served who was the last one to wait

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def __iter__(self) -> Iterator[Sequence]:
        return chain.from_iterable(self._queues.values())

    def rank(self, seq: Sequence) -> Rank:
        """Orders also those that run: the last one is the first to lose its pages."""
        return seq.request.priority if self._by_priority else 0, seq.number

    def push(self, seq: Sequence) -> None:
        user = self._user(seq)
        if user not in self._queues:
            level = min((self._served[other] for other in self._queues), default=self._last)
            self._forget_below(level)
            self._served[user] = max(self._served.get(user, 0), level)
            self._queues[user] = []
        insort(self._queues[user], seq, key=self.rank)

    def first(self) -> Sequence:
        """Whose turn it is; there must be one."""
        user = min(self._queues, key=lambda name: (self._served[name], self._queues[name][0].number))
        return self._queues[user][0]

    def remove(self, seq: Sequence) -> None:
        user = self._user(seq)
        self._queues[user].remove(seq)
        if not self._queues[user]:
            del self._queues[user]
            self._last = self._served[user]

    def charge(self, seq: Sequence, cost: int) -> None:
        """Its user has been served."""
        if self._is_fair:
            self._served[seq.request.user] = self._served.get(seq.request.user, 0) + cost

    def _user(self, seq: Sequence) -> str:
        """Whose queue it is in: but for fair shares, all are one user's."""
        return seq.request.user if self._is_fair else ""

    def _forget_below(self, level: int) -> None:
        """Users who would be lifted anyway."""
        if len(self._served) >= MAX_USERS:
            self._served = {name: n for name, n in self._served.items() if name in self._queues or n > level}
