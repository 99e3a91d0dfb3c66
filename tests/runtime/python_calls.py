"""What a statement costs in calls of an empty function: a measure that does not depend on how fast a machine is."""

from __future__ import annotations

import timeit
from typing import Any

# What a launch may cost: 2.4 us where an empty function takes 60 ns.
MOST_CALLS = 40.0


def calls_of(statement: str, **names: Any) -> float:
    """The least of many repetitions of both, in turn: other processes only make them longer."""

    def nothing(*arguments: Any) -> None:
        del arguments

    def least(text: str) -> float:
        return min(timeit.repeat(text, globals=names | {"nothing": nothing}, number=1000, repeat=10))

    pairs = [(least(statement), least("nothing(64, 2, 1, 1, 2, 3, 4, 5, 6, 7.0)")) for _ in range(5)]
    return min(long for long, _ in pairs) / min(short for _, short in pairs)
