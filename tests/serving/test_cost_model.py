"""The cost model finds what made steps take their time, and the budget is the largest that it allows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.core import Batch, BatchItem, SamplingParams
from serving.cost_model import LEAST_CHUNK, NUM_FEATURES, CostModel, StepBudget, StepWork, non_negative_fit

GREEDY = SamplingParams(temperature=0)
factors = st.tuples(
    st.floats(1e-4, 1e-2), *(st.one_of(st.just(0.0), st.floats(low, 100 * low)) for low in (1e-6, 1e-9, 1e-11))
)


def random_work(rng: np.random.Generator) -> StepWork:
    count = int(rng.integers(1, 128))
    keys = int(rng.integers(1, 2000, count).sum())
    decodes = StepWork(count, keys, keys)
    return (
        decodes.with_prompt(int(rng.integers(0, 4000)), int(rng.integers(1, 2000))) if rng.random() < 0.5 else decodes
    )


Truth = tuple[float, ...]


def seconds(truth: Truth, of_prompts: Truth, work: StepWork) -> float:
    step, token, kv_token, pair = of_prompts if work.prompts else truth
    return step + token * work.tokens + kv_token * work.kv_tokens + pair * work.pairs


def fitted(
    truth: Truth, of_prompts: Truth, path: Path | None = None, seed: int = 0, slow: tuple[int, ...] = ()
) -> CostModel:
    rng, model = np.random.default_rng(seed), CostModel(path)
    for index in range(256):
        work = random_work(rng)
        model.device.observe(work, seconds(truth, of_prompts, work) * (100 if index in slow else 1))
    return model


@given(factors, factors, st.integers(0, 2**32))
@settings(max_examples=25)
def test_finds_the_factors_of_steps_that_have_some(truth: Truth, of_prompts: Truth, seed: int) -> None:
    model, rng = fitted(truth, of_prompts, seed=seed), np.random.default_rng(seed + 1)
    for work in (random_work(rng) for _ in range(10)):
        assert model.predict(work) == pytest.approx(seconds(truth, of_prompts, work), rel=1e-3)


def test_of_a_kind_that_never_came_the_other_is_the_best_guess() -> None:
    for prompts in (False, True):
        model = CostModel()
        for tokens in range(1, 65):
            model.host.observe(StepWork(tokens, 100 * tokens, 10, prompts), 1e-3 + 1e-5 * tokens)
        assert model.predict(StepWork(50, 100, 10, not prompts)) == model.predict(StepWork(50, 100, 10, prompts)) > 1e-3


def test_steps_that_were_disturbed_count_little() -> None:
    truth, of_prompts = (1e-3, 2e-5, 3e-8, 0.0), (4e-3, 1e-5, 2e-8, 1e-10)
    model, rng = fitted(truth, of_prompts, slow=tuple(range(0, 256, 50))), np.random.default_rng(1)
    for work in (random_work(rng) for _ in range(10)):
        assert model.predict(work) == pytest.approx(seconds(truth, of_prompts, work), rel=0.1)


def in_steps(work: StepWork) -> int:
    """Rows of 64, 192 or multiples of 256."""
    return next((rows for rows in (64, 192) if work.tokens <= rows), -(-work.tokens // 256) * 256)


def staircase(work: StepWork) -> float:
    """Seconds that grow with the rows, but not as a line, nor always."""
    rows = in_steps(work)
    return 2e-3 + 2e-5 * rows + {192: 2e-3, 512: -1e-3, 768: 2e-3}.get(rows, 0.0) + 5e-8 * work.kv_tokens


def learnt(rng: np.random.Generator) -> CostModel:
    model = CostModel(rows=in_steps)
    for _ in range(500):
        work = random_work(rng)
        model.device.observe(work, staircase(work) * float(rng.uniform(0.98, 1.02)))
    return model


def test_what_each_number_of_rows_takes_is_learnt() -> None:
    """Also where it is not on a line: there a line alone is up to a quarter off."""
    rng = np.random.default_rng(0)
    model = learnt(rng)
    for work in (random_work(rng) for _ in range(200)):
        assert model.predict(work) == pytest.approx(staircase(work), rel=0.05)


def test_rows_are_filled_that_are_paid_for() -> None:
    """A prompt that is longer than what fits gets all rows of a step, also where that takes longer than it may; but where just
    the keys of so many tokens would be too much, which is rare."""
    model, chunks = learnt(np.random.default_rng(0)), list[int]()
    for limit in np.linspace(6e-3, 25e-3, 40):
        for decodes in (1, 17, 60):
            budget = StepBudget(1024, model, float(limit), StepWork(decodes, 500 * decodes, 500 * decodes))
            budget.take(0, 3000)
            chunks.append(budget.work.tokens)
    full = [chunk for chunk in chunks if chunk in (64, 192, 256, 512, 768, 1024)]
    assert len(full) > 0.95 * len(chunks) and len(set(full)) >= 5


@given(st.integers(0, 63), st.integers(1, 5), st.sampled_from([256, 512, 1024]))
def test_without_a_limit_a_step_has_as_many_rows_as_it_may(decodes: int, prompts: int, most: int) -> None:
    """Where sequences that decode are padded to 64, not so many tokens: the rows beyond would take another shape."""
    model = CostModel(rows=lambda work: (64 if decodes else 0) + work.prompt_tokens)
    budget = StepBudget(most, model, None, StepWork(decodes, decodes, decodes))
    for _ in range(prompts):
        budget.take(0, most // prompts + 1)
    assert budget.is_spent and model.rows(budget.work) == most


@given(st.integers(1, 40), st.integers(0, 2**32))
def test_the_fit_is_the_best_without_negative_factors(count: int, seed: int) -> None:
    """The conditions of Karush, Kuhn and Tucker: no factor can be changed, but below 0, for a smaller error."""
    rng = np.random.default_rng(seed)
    features, wanted = rng.standard_normal((count, NUM_FEATURES)), rng.standard_normal(count)
    found = non_negative_fit(features, wanted)
    slope = features.T @ (features @ found - wanted)
    assert (found >= 0).all() and (slope > -1e-6).all() and np.abs(slope * found).max() < 1e-6


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 9)), min_size=1, max_size=5))
def test_the_work_of_a_batch_is_that_of_its_tokens(items: list[tuple[int, int]]) -> None:
    batch = Batch(
        tuple(BatchItem(str(i), (1,) * count, start, (), GREEDY, 0) for i, (start, count) in enumerate(items))
    )
    pairs = sum(position + 1 for start, count in items for position in range(start, start + count))
    keys = sum(start + count for start, count in items)
    chunks = [count for _, count in items if count > 1]
    expected = StepWork(sum(count for _, count in items), keys, pairs, len(chunks), sum(chunks))
    assert StepWork.of(batch) == expected


@given(
    truth=factors,
    limit=st.one_of(st.none(), st.floats(1e-4, 1e-1)),
    contexts=st.lists(st.integers(1, 3000), max_size=20),
    prompts=st.lists(st.tuples(st.integers(0, 3000), st.integers(1, 900)), min_size=1, max_size=4),
    max_tokens=st.integers(20, 1000),
)
@settings(max_examples=40)
def test_a_step_takes_as_much_of_prompts_as_it_may(truth, limit, contexts, prompts, max_tokens: int) -> None:
    model, keys = fitted(truth, truth), sum(contexts)
    budget = StepBudget(max_tokens, model, limit, StepWork(len(contexts), keys, keys))
    extra = 0
    for start, pending in prompts:
        before, spent, least = budget.work, budget.is_spent, min(pending, LEAST_CHUNK - extra)
        count = budget.take(start, pending)
        assert budget.work == (before.with_prompt(start, count) if count else before)
        assert 0 <= count <= pending and budget.work.tokens <= max_tokens
        assert not (spent and count)
        within = limit is None or not contexts or model.predict(budget.work) <= limit
        assert within or not count or model.predict(budget.work) <= model.predict(before.with_prompt(start, least))
        extra += min(count, LEAST_CHUNK - extra)
        if count < pending and budget.work.tokens < max_tokens:  # one more would have been too much
            assert limit is not None and model.predict(before.with_prompt(start, count + 1)) > limit


def test_what_is_known_is_kept_for_the_next_server(tmp_path: Path) -> None:
    path = tmp_path / "steps" / "model.json"
    first = fitted((1e-3, 3e-5, 4e-8, 5e-10), (2e-3, 3e-5, 4e-8, 5e-10), path)
    for tokens in range(1, 65):
        first.host.observe(StepWork(tokens, 1, 1), 1e-2)
    first.save()
    again, work = CostModel(path), StepWork(100, 5000, 5000, True)
    assert again.is_fitted and again.predict(work) == pytest.approx(first.predict(work), rel=1e-6)
    assert again.host.predict(work) == pytest.approx(1e-2)
    good = path.read_text()
    rows = ("[1, -3, 4, 5]", '[1, 0, 1, "x"]', "[1, 2]", "[NaN, 1, 1, 1]")
    for damaged in (
        "", "{}", "[]", good.replace("device", "GPU"), '{"host": [[], []], "device": [[]]}', '{"host": 1, "device": 2}',
        *(f'{{"host": [[], []], "device": [[{row}], []]}}' for row in rows),
    ):  # fmt: skip
        path.write_text(damaged)
        assert not CostModel(path).is_fitted, damaged


def test_a_place_that_cannot_be_written_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    fitted((1e-3, 0.0, 0.0, 0.0), (1e-3, 0.0, 0.0, 0.0), tmp_path / "file" / "model.json").save()
    assert f"cannot keep the times of steps in {tmp_path}/file/model.json (File exists)" in caplog.text


def test_clocks_that_stand_still_teach_nothing() -> None:
    model = CostModel()
    for _ in range(100):
        model.host.observe(StepWork(1, 1, 1), 0.0)
    model.fit()
    assert not model.is_fitted and model.predict(StepWork(1, 1, 1)) == 0
