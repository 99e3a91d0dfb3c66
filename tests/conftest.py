"""Settings shared by all tests: hypothesis without deadlines (CI machines are slow and shared), cheap C, samples of long laws."""

from __future__ import annotations

import os
import sys
from collections import defaultdict
from typing import Any

import pytest
from case_samples import sample
from hypothesis import HealthCheck, settings

settings.register_profile("default", deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile(
    "ci", deadline=None, max_examples=30, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
# `pytest --hypothesis-profile thorough`: after a change to what the laws are about.
settings.register_profile("thorough", deadline=None, max_examples=2000, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ci" if os.environ.get("CI") else "default")

# C compilers take most of the time of tests on the CPU. Bits do not depend on it (test_c_bits.py); random programs are optimised
# as for users (`optimized_c`).
os.environ.setdefault("TILUS_CFLAGS", "-Og")


def _forget_launches(event: str, arguments: tuple[Any, ...]) -> None:
    """Kernels read TILUS_DEVICE when they first meet such arguments. In tests it changes, and one that goes on elsewhere than a
    test says would not be the one that is tested."""
    if event in ("os.putenv", "os.unsetenv") and os.fsencode(arguments[0]) == b"TILUS_DEVICE":
        launches = sys.modules.get("tilus.runtime.ahead")
        for prepared in list(launches._prepared.values()) if launches is not None else ():
            prepared.clear()


sys.addaudithook(_forget_launches)


@pytest.fixture
def optimized_c(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that this test is the first to run are compiled as they are for users."""
    monkeypatch.delenv("TILUS_CFLAGS")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a law that is `sampled(n)`, about one case in n is for `make test`; the others are exhaustive."""
    laws: dict[tuple[str, int], list[pytest.Function]] = defaultdict(list)
    for item in items:
        mark, others = item.get_closest_marker("sampled"), {mark.name for mark in item.iter_markers()}
        if mark is not None and isinstance(item, pytest.Function) and not others & {"gpu", "exhaustive", "browser"}:
            laws[item.nodeid.split("[")[0], mark.args[0]].append(item)
    for (_, share), cases in laws.items():
        chosen = set(sample({case.nodeid: case.callspec.params for case in cases}, share))
        for case in cases:
            if case.nodeid not in chosen:
                case.add_marker(pytest.mark.exhaustive)
