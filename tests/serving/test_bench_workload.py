"""Arrivals, lengths, traces and prompts: distributions by tests of fixed seeds, readers on files written here."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.bench import burstgpt
from serving.bench.prompts import SAMPLES, WORDS, PromptWriter, TokenCost
from serving.bench.traces import read_trace
from serving.bench.workload import (
    LengthRange,
    Pattern,
    PlannedRequest,
    arrival_times,
    at_rate,
    mean_rate,
    scaled,
    synthetic,
)
from tilus.errors import TilusError

COUNT = 20_000


def is_distributed_as(values: np.ndarray, cdf: Callable[[float], float]) -> bool:
    """Kolmogorov and Smirnov's test: a true distribution is refused once in a thousand seeds."""
    data = np.sort(values)
    expected = np.array([cdf(value) for value in data])
    n = len(data)
    distance = max((np.arange(1, n + 1) / n - expected).max(), (expected - np.arange(n) / n).max())
    return bool(distance * math.sqrt(n) < 1.95)


def exponential(x: float) -> float:
    return 1 - math.exp(-x)


def gamma_half(x: float) -> float:
    """Of shape 1/2 and mean 1: a squared normal variable (cv = sqrt 2)."""
    return math.erf(math.sqrt(x / 2))


def erlang_four(x: float) -> float:
    """Of shape 4 and mean 1: the fourth event of a Poisson process (cv = 1/2)."""
    return 1 - math.exp(-4 * x) * sum((4 * x) ** k / math.factorial(k) for k in range(4))


@pytest.mark.parametrize("rate", [0.1, 30.0])
@pytest.mark.parametrize(
    ("pattern", "cv", "cdf"),
    [
        ("poisson", 1.0, exponential),
        ("gamma", 1.0, exponential),
        ("gamma", math.sqrt(2), gamma_half),
        ("gamma", 0.5, erlang_four),
    ],
)
def test_gaps_have_their_distribution(pattern: Pattern, cv: float, cdf: Callable[[float], float], rate: float) -> None:
    times = arrival_times(pattern, rate, COUNT, np.random.default_rng(1), cv=cv)
    gaps = np.diff(times) * rate
    assert times[0] == 0 and len(times) == COUNT
    assert is_distributed_as(gaps, cdf)
    assert not is_distributed_as(gaps * 1.05, cdf)
    assert abs(gaps.mean() - 1) < 4 * cv / math.sqrt(COUNT)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.05)
    assert abs(np.corrcoef(gaps[1:], gaps[:-1])[0, 1]) < 4 / math.sqrt(COUNT)  # independent of the one before


def test_constant_gaps() -> None:
    times = arrival_times("constant", 4.0, 9, np.random.default_rng(0))
    assert times == pytest.approx(np.arange(9) / 4)
    assert len(arrival_times("poisson", 1.0, 0, np.random.default_rng(0))) == 0


def test_lengths_are_uniform_with_both_ends() -> None:
    plan = synthetic(np.zeros(7000), LengthRange.parse("3:9"), LengthRange.parse("5"), np.random.default_rng(2))
    counts = np.bincount([planned.input_tokens for planned in plan], minlength=10)
    assert counts[:3].sum() == 0 and {planned.output_tokens for planned in plan} == {5}
    assert ((counts[3:] - 1000) ** 2 / 1000).sum() < 22.5  # chi squared with 6 degrees of freedom, once in a thousand


plans = st.lists(
    st.builds(PlannedRequest, st.floats(0, 1e4), st.integers(1, 9000), st.integers(1, 900)), min_size=2, max_size=20
).map(lambda plan: sorted(plan, key=lambda planned: planned.arrival))


@given(plans, st.floats(0.01, 100), st.floats(0.01, 10))
def test_scaling(plan: list[PlannedRequest], rate: float, length: float) -> None:
    found = scaled(plan, rate=rate, length=length)
    for before, after in zip(plan, found, strict=True):
        assert after.arrival == pytest.approx(before.arrival / rate)
        assert after.input_tokens >= 1 and abs(after.input_tokens - before.input_tokens * length) <= 1
        assert after.output_tokens >= 1 and abs(after.output_tokens - before.output_tokens * length) <= 1
    if plan[-1].arrival - plan[0].arrival > 1e-3:
        assert mean_rate(at_rate(plan, rate)) == pytest.approx(rate, rel=1e-6)


def test_requests_at_one_time_have_no_rate() -> None:
    with pytest.raises(TilusError) as error:
        at_rate([PlannedRequest(2.0, 1, 1)] * 3, 5.0)
    assert error.value.message == (
        "the 3 requests of this trace all arrive at the same time, so they have no rate to stretch to 5.0"
    )


# BurstGPT


def test_burstgpt_lengths() -> None:
    plan = burstgpt.generate(60_000, np.random.default_rng(3))
    requests = np.array([planned.input_tokens for planned in plan])
    responses = np.array([planned.output_tokens for planned in plan])
    assert np.median(requests) == pytest.approx(353, rel=0.02)
    assert requests.mean() == pytest.approx(621, rel=0.02)
    assert responses.mean() == pytest.approx(126, rel=0.02)
    spread = math.sqrt(2 * math.log(621 / 353))
    assert is_distributed_as(
        (np.log(requests[:3000]) - math.log(353)) / spread, lambda x: (1 + math.erf(x / math.sqrt(2))) / 2
    )
    flat, long = responses[(requests > 150) & (requests < 400)], responses[(requests > 1950) & (requests < 2050)]
    assert long.mean() / flat.mean() == pytest.approx(450 / 165, rel=0.08)
    assert np.log(flat[flat > 20]).std() == pytest.approx(0.7, rel=0.1)


def test_burstgpt_hours() -> None:
    """Over whole days, each hour has its part of the requests."""
    times = np.array([planned.arrival for planned in burstgpt.generate(150_000, np.random.default_rng(4))])
    hours = (times // 3600).astype(int)
    num_days = hours[-1] // 24
    counts = np.bincount(hours[hours < 24 * num_days] % 24, minlength=24)
    shares = np.array(burstgpt.HOURS) / sum(burstgpt.HOURS)
    assert counts / counts.sum() == pytest.approx(shares, rel=0.12)


def test_burstgpt_days() -> None:
    """Day by day the rate is log-normal and remembers the day before."""
    expected = np.linspace(1, 0.271 * 86400 * 500, 400_000)
    days = (burstgpt.clock_times(expected, np.random.default_rng(5)) // 86400).astype(int)
    counts = np.bincount(days)[:-1]
    logs = np.log(counts[counts > 0])
    assert logs.std() == pytest.approx(1.13, abs=0.2)
    assert np.corrcoef(logs[1:], logs[:-1])[0, 1] == pytest.approx(0.56, abs=0.15)
    assert len(counts) == pytest.approx(500, rel=0.4)  # the mean rate is 0.271 a second, over a time that varies much


def test_burstgpt_gaps_are_bursty() -> None:
    """Within an hour, gaps are gamma of shape 1/2 around the mean."""
    times = np.array([planned.arrival for planned in burstgpt.generate(30_000, np.random.default_rng(6))])
    hours = (times // 3600).astype(int)
    gaps = [np.diff(times[hours == hour]) for hour in range(hours[-1]) if (hours == hour).sum() > 300]
    together = np.concatenate([found / found.mean() for found in gaps])
    assert len(together) > 10_000
    assert is_distributed_as(together[:4000], gamma_half)
    assert not is_distributed_as(together[:4000], exponential)


def test_burstgpt_follows_from_the_seed() -> None:
    first, again, other = (burstgpt.generate(50, np.random.default_rng(seed)) for seed in (7, 7, 8))
    assert first == again != other
    assert first[0].arrival == 0 and len(first) == 50 and burstgpt.generate(0, np.random.default_rng(7)) == []


# Traces: (arrival in milliseconds, input tokens, output tokens)

rows = st.lists(st.tuples(st.integers(0, 10**7), st.integers(1, 3000), st.integers(1, 2000)), min_size=1, max_size=12)


def written(path: Path, lines: list[str], newline: str = "\n", *, ends: bool = True) -> Path:
    path.write_bytes((newline.join(lines) + (newline if ends else "")).encode())
    return path


def azure(found: list[tuple[int, int, int]]) -> list[str]:
    start = datetime(2023, 11, 16, 18)
    times = [(start + timedelta(milliseconds=time)).strftime("%Y-%m-%d %H:%M:%S.%f") + "0" for time, _, _ in found]
    lines = [f"{time},{inputs},{outputs}" for time, (_, inputs, outputs) in zip(times, found)]
    return ["TIMESTAMP,ContextTokens,GeneratedTokens", *lines]


def burstgpt_csv(found: list[tuple[int, int, int]]) -> list[str]:
    lines = [f"{time / 1000},ChatGPT,{i},{o},{i + o},Conversation log" for time, i, o in found]
    return ["Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type", *lines]


def burstgpt_csv_3(found: list[tuple[int, int, int]]) -> list[str]:
    lines = [f"{time / 1000},,1.5,GPT-4,{i},{o},{i + o},API log" for time, i, o in found]
    header = "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type"
    return [header, *lines]


def blocks_of(inputs: int) -> list[int]:
    return [inputs + i for i in range(-(-inputs // 512))]


def mooncake(found: list[tuple[int, int, int]]) -> list[str]:
    return [
        json.dumps({"timestamp": time, "input_length": i, "output_length": o, "hash_ids": blocks_of(i)})
        for time, i, o in found
    ]


SCHEMAS = {"azure": azure, "burstgpt": burstgpt_csv, "burstgpt 3": burstgpt_csv_3, "mooncake": mooncake}


@pytest.mark.parametrize("schema", SCHEMAS)
@given(found=rows, newline=st.sampled_from(["\n", "\r\n"]), ends=st.booleans())
def test_traces_come_back_as_written(
    schema: str, found: list[tuple[int, int, int]], newline: str, ends: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = written(tmp_path_factory.getbasetemp() / "trace", SCHEMAS[schema](found), newline, ends=ends)
    plan = read_trace(path)
    expected = sorted(found, key=lambda row: row[0])
    start = expected[0][0]
    assert [planned.arrival for planned in plan] == pytest.approx(
        [(row[0] - start) / 1000 for row in expected], abs=1e-6
    )
    assert [(planned.input_tokens, planned.output_tokens) for planned in plan] == [row[1:] for row in expected]
    if schema == "mooncake":
        assert [list(planned.blocks) for planned in plan] == [blocks_of(row[1]) for row in expected]
        assert {planned.block_tokens for planned in plan} == {512.0}
    limit = len(found) // 2 or None
    assert read_trace(path, limit) == plan[:limit]


def test_failed_requests_of_burstgpt_are_left_out(tmp_path: Path) -> None:
    lines = burstgpt_csv([(0, 5, 6), (1000, 7, 8)])
    path = written(tmp_path / "trace", [*lines, "5,ChatGPT,0,0,0,API log"])
    assert [planned.input_tokens for planned in read_trace(path)] == [5, 7]


HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens"
TIME = "2023-11-16 18:15:46.6805900"
MALFORMED = {
    "number": ([HEADER, f"{TIME},1,2", f"{TIME},1x,2"], 3, "ContextTokens is '1x', but must be a number"),
    "negative": ([HEADER, f"{TIME},-1,2"], 2, "ContextTokens is '-1', but must be at least 0 and finite"),
    "fraction": ([HEADER, f"{TIME},1.5,2"], 2, "ContextTokens is '1.5', but must be a whole number of at least 1"),
    "zero": ([HEADER, f"{TIME},1,0"], 2, "GeneratedTokens is '0', but must be a whole number of at least 1"),
    "time": ([HEADER, "noon,1,2"], 2, "TIMESTAMP is 'noon', but must be like 2023-11-16 18:15:46.6805900"),
    "columns": ([HEADER, f"{TIME},1,2", "", f"{TIME},1"], 4, "found 2 columns, but the header names 3"),
    "infinite": (
        ["Timestamp,Request tokens,Response tokens", "inf,1,2"],
        2,
        "Timestamp is 'inf', but must be at least 0 and finite",
    ),
    "json": (['{"timestamp": 0}{'], 1, "the line is not JSON: Extra data: line 1 column 17 (char 16)"),
    "object": ([*mooncake([(0, 1, 1)]), "[1]"], 2, "the line is list, but must be a JSON object"),
    "field": (['{"timestamp": 0}'], 1, "the field input_length is missing; found timestamp"),
    "type": (['{"input_length": true}'], 1, "input_length is True, but must be a number"),
    "blocks": (
        ['{"timestamp": 0, "input_length": 513, "output_length": 1, "hash_ids": [4]}'],
        1,
        "hash_ids has 1 entries, but input_length 513 has 2 blocks of 512 tokens",
    ),
    "ids": (
        ['{"timestamp": 0, "input_length": 5, "output_length": 1, "hash_ids": [-4]}'],
        1,
        "hash_ids is [-4], but must be a list of whole numbers of at least 0",
    ),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_lines_are_shown_with_what_was_expected(case: str, tmp_path: Path) -> None:
    lines, number, message = MALFORMED[case]
    path = written(tmp_path / "trace", lines)
    with pytest.raises(TilusError) as error:
        read_trace(path)
    assert error.value.message == message
    shown = str(error.value).splitlines()
    assert shown[1] == f"  at {path}:{number}:1"
    assert shown[2] == f"{number:>5} | {lines[number - 1]}"


def test_files_that_are_no_traces(tmp_path: Path) -> None:
    for content, message in (
        (b"a,b\n1,2\n", f"the first line of {tmp_path / 'f'} is of no known trace: 'a,b'"),
        (b"", f"the first line of {tmp_path / 'f'} is of no known trace: ''"),
        (HEADER.encode(), f"the trace {tmp_path / 'f'} holds no requests"),
        (b"\xff\xfe", f"the trace {tmp_path / 'f'} is not text in UTF-8: invalid start byte at byte 0"),
    ):
        (tmp_path / "f").write_bytes(content)
        with pytest.raises(TilusError) as error:
            read_trace(tmp_path / "f")
        assert error.value.message == message
    with pytest.raises(TilusError) as error:
        read_trace(tmp_path / "none")
    assert error.value.message == f"cannot read the trace {tmp_path / 'none'}: No such file or directory"


# Prompts


def subwords(text: str) -> int:
    """A vocabulary in which each word is a token, with a mark of the beginning."""
    return 1 + len(text.split(" "))


def letters(text: str) -> int:
    """One of single bytes, with a template around the prompt."""
    return 12 + len(text.encode())


@pytest.mark.parametrize("count", [subwords, letters])
@given(asked=st.integers(1, 4000), blocks=st.lists(st.integers(0, 99), max_size=9), length=st.floats(0.02, 1))
def test_prompts_have_the_tokens_asked_for(
    count: Callable[[str], int], asked: int, blocks: list[int], length: float
) -> None:
    probe = PromptWriter(0, TokenCost(0.0, 1.0))
    few, many = (count(probe.sample(num_words)) for num_words in SAMPLES)
    cost = TokenCost.fit(few, many)
    planned = PlannedRequest(0.0, asked, 1, tuple(blocks), 512 * length)
    found = count(PromptWriter(5, cost).text(0, planned))
    shortest = count(WORDS[0])
    step = 1 if count is subwords else 5
    assert abs(found - max(asked, shortest)) <= step / 2


def test_words_are_equally_long_and_distinct() -> None:
    assert len(set(WORDS)) == len(WORDS) and {len(word) for word in WORDS} == {4}


@pytest.mark.parametrize("block_tokens", [512.0, 25.6])
def test_equal_blocks_are_equal_text_and_others_are_not(block_tokens: float) -> None:
    writer = PromptWriter(1, TokenCost(0.0, 1.0))

    def words(index: int, *blocks: int) -> list[str]:
        planned = PlannedRequest(0.0, round(4 * block_tokens), 1, blocks, block_tokens)
        return writer.text(index, planned).split(" ")

    first, second = words(0, 10, 11, 12, 13), words(1, 10, 11, 14, 15)
    shared = round(2 * block_tokens)
    assert len(first) == len(second) == round(4 * block_tokens)
    assert first[:shared] == second[:shared]
    assert first[shared : shared + 8] != second[shared : shared + 8]
    assert first == words(2, 10, 11, 12, 13)


def test_prompts_without_blocks_share_nothing_and_follow_from_the_seed() -> None:
    planned = PlannedRequest(0.0, 40, 1)
    texts = {(seed, i): PromptWriter(seed, TokenCost(0.0, 1.0)).text(i, planned) for seed in (1, 2) for i in range(50)}
    assert len({tuple(text.split(" ")[:8]) for text in texts.values()}) == 100
    assert texts[1, 7] == PromptWriter(1, TokenCost(0.0, 1.0)).text(7, planned)


def test_shorter_prompts_are_the_beginning_of_longer_ones() -> None:
    """Blocks are cut at the end of a prompt, which must not change their words."""
    writer = PromptWriter(1, TokenCost(0.0, 1.0))
    long, short = (writer.text(0, PlannedRequest(0.0, n, 1, (3, 4), 512.0)) for n in (1000, 700))
    assert long.startswith(short)
