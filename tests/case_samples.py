"""Which cases of a long law `make test` runs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping


def sample(cases: Mapping[str, Mapping[str, object]], share: int) -> list[str]:
    """The names of one case in `share`, always the same ones: each shows as many values of parameters as any that those before do
    not.

    cases: by name, with the values of their parameters by name.
    """
    left = {
        name: {(parameter, repr(value)) for parameter, value in cases[name].items()}
        for name in sorted(cases, key=lambda name: hashlib.sha256(name.encode()).digest())
    }
    seen, chosen = set[tuple[str, str]](), list[str]()
    while len(chosen) < -(-len(cases) // share):
        best = max(left, key=lambda name: len(left[name] - seen))
        seen |= left.pop(best)
        chosen.append(best)
    return chosen
