"""Settings shared by all tests: hypothesis without deadlines (CI machines are slow and shared), and cheap C."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("default", deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile(
    "ci", deadline=None, max_examples=50, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
# `pytest --hypothesis-profile thorough`: after a change to what the laws are about.
settings.register_profile("thorough", deadline=None, max_examples=2000, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ci" if os.environ.get("CI") else "default")

# C compilers take most of the time of tests on the CPU. What C means does not depend on it; examples and random programs
# are optimised as for users (`optimized_c`).
os.environ.setdefault("TILUS_CFLAGS", "-O1")


@pytest.fixture
def optimized_c(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that this test is the first to run are compiled as they are for users."""
    monkeypatch.delenv("TILUS_CFLAGS")
