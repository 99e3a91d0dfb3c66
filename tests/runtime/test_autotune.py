"""Choosing plans by measurement, with times and kernels that are made up."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tilus import config
from tilus.errors import TilusError
from tilus.ptx.assembler import SpillError
from tilus.runtime import autotune, tuned_plans
from tilus.runtime.autotune import bucket, chosen, tune, tuned
from tilus.runtime.tuned_plans import Key, Measurement, Tuned


@dataclass(frozen=True)
class Plan:
    """A kernel that takes `us` and has a defect."""

    us: float
    defect: str | None = None


@dataclass
class FakeTrial:
    log: list[tuple[str, Plan]] = field(default_factory=list)

    def compile(self, plan: Plan) -> None:
        if plan.defect == "spills":
            raise SpillError("kernel spills\nand a second line")

    def check(self, plan: Plan) -> str | None:
        self.log.append(("check", plan))
        if plan.defect == "launch":
            raise TilusError("cannot launch")
        return "3 of 4 results are wrong" if plan.defect == "wrong" else None

    def actions(self, plan: Plan) -> Sequence[Callable[[], object]]:
        return [lambda: plan, lambda: plan]


def timer(actions: Sequence[Callable[[], object]]) -> float:
    assert len(actions) == 2
    return actions[1]().us


KEY = Key("family", "GPU", "problem")


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("TILUS_CACHE_DIR", str(tmp_path))
    yield
    tuned_plans.forget()


def test_buckets() -> None:
    edges = [1, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192]
    for low, high in zip([0, *edges], edges):
        assert {bucket(m) for m in range(low + 1, high + 1)} == {high}


@given(st.lists(st.floats(1, 100), min_size=1, max_size=12))
def test_the_fastest_wins_and_the_first_wins_within_the_noise(times: list[float]) -> None:
    found = tune([Plan(us) for us in times], FakeTrial(), timer)
    assert [m.us for m in found.measurements] == times
    assert found.us == min(times) if min(times) < 0.99 * times[0] else found.best == 0
    assert found.ratio is not None and found.ratio >= 1


@pytest.mark.parametrize(("other", "best"), [(9.95, 0), (10.0, 0), (9.8, 1)])
def test_another_plan_must_gain_more_than_the_noise(other: float, best: int) -> None:
    assert tune([Plan(10.0), Plan(other)], FakeTrial(), timer).best == best


def test_plans_that_do_not_work_have_a_note_and_no_time() -> None:
    plans = [Plan(9, "spills"), Plan(1, "wrong"), Plan(5), Plan(2, "launch"), Plan(4)]
    trial = FakeTrial()
    found = tune(plans, trial, timer)
    assert found.plan == Plan(4)
    assert [(m.us, m.note) for m in found.measurements] == [
        (None, "kernel spills"), (None, "3 of 4 results are wrong"), (5, None), (None, "cannot launch"), (4, None),
    ]  # fmt: skip
    assert ("check", plans[0]) not in trial.log
    assert found.heuristic_us is None and found.ratio is None


def test_without_a_plan_that_works() -> None:
    with pytest.raises(TilusError) as raised:
        tune([Plan(1, "spills"), Plan(2, "wrong")], FakeTrial(), timer)
    assert raised.value.message == (
        "none of 2 plans can be used:\n"
        "  Plan(us=1, defect='spills'): kernel spills\n"
        "  Plan(us=2, defect='wrong'): 3 of 4 results are wrong"
    )


def test_measured_once_also_by_many_threads() -> None:
    calls: list[int] = []

    def measure() -> Tuned:
        calls.append(1)
        time.sleep(0.05)
        return Tuned((Measurement(Plan(1.0), 1.0),), 0)

    results: list[Tuned] = []
    threads = [threading.Thread(target=lambda: results.append(tuned(KEY, (Plan,), measure))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    tuned_plans.forget()
    results.append(tuned(KEY, (Plan,), measure))
    assert len(calls) == 1 and len(results) == 5 and all(result.plan == Plan(1.0) for result in results)


def test_nothing_is_measured_unless_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TILUS_AUTOTUNE", raising=False)

    def measure() -> Tuned:
        return Tuned((Measurement(Plan(1.0), 1.0),), 0)

    def refused() -> Tuned:
        raise AssertionError("measured")

    assert chosen(KEY, (Plan,), refused) is None
    monkeypatch.setenv("TILUS_AUTOTUNE", "1")
    monkeypatch.setattr(autotune, "is_capturing", lambda: True)
    assert chosen(KEY, (Plan,), refused) is None
    monkeypatch.setattr(autotune, "is_capturing", lambda: False)
    assert chosen(KEY, (Plan,), measure) == Plan(1.0)
    monkeypatch.setenv("TILUS_AUTOTUNE", "0")
    assert chosen(KEY, (Plan,), refused) == Plan(1.0)


def test_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TILUS_AUTOTUNE", "yes")
    with pytest.raises(TilusError) as raised:
        config.autotune()
    assert raised.value.message == "TILUS_AUTOTUNE is 'yes', expected 0 or 1"
