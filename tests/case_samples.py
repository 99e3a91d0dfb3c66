"""Which cases of a long law `make test` runs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping


def sample(cases: Mapping[str, Mapping[str, object]], share: int) -> list[str]:
    """The names of one case in `share`, always the same ones, first such as show a value of a parameter that those before do not.

    cases: by name, with the values of their parameters by name.
    """
    seen, new, others = set[tuple[str, str]](), list[str](), list[str]()
    for name in sorted(cases, key=lambda name: hashlib.sha256(name.encode()).digest()):
        values = {(parameter, repr(value)) for parameter, value in cases[name].items()}
        (others if values <= seen else new).append(name)
        seen |= values
    return (new + others)[: -(-len(cases) // share)]
