"""From records to numbers: percentiles, goodput, conservation, errors, the table, JSON and the picture."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.bench.load import Observations
from serving.bench.plot import draw, in_flight, plot, throughput
from serving.bench.record import Failure, Outcome, Record
from serving.bench.report import report, table, write_json, write_text
from serving.bench.summary import METRICS, Distribution, Slo, Summary, summarise

ROOT = Path(__file__).parents[2]


def a_record(
    index: int = 0, *, outcome: Outcome = "finished", times: tuple[float, ...] = (1.5, 2.0, 3.0), **fields
) -> Record:
    values = {
        "index": index,
        "arrival": 1.0,
        "sent": 1.0,
        "token_times": times,
        "end": 3.25,
        "outcome": outcome,
        "failure": Failure("timeout", "not finished after 2 s") if outcome == "failed" else None,
        "retries": 0,
        "asked_input_tokens": 10,
        "asked_output_tokens": 3,
        "input_tokens": 10,
        "output_tokens": len(times),
    }
    return Record(**(values | fields))


def seen_of(records: list[Record], **fields) -> Observations:
    return Observations(num_planned=len(records), records=records, **fields)


seconds = st.floats(0.001, 50)


@st.composite
def any_record(draw: st.DrawFn) -> Record:
    pauses = draw(st.lists(seconds, max_size=5))
    arrival = draw(st.floats(0, 10))
    times = tuple(arrival + sum(pauses[: i + 1]) for i in range(len(pauses)))
    return a_record(
        outcome=draw(st.sampled_from(["finished", "failed", "cancelled"])),
        times=times,
        arrival=arrival,
        sent=arrival,
        end=(times[-1] if times else arrival) + draw(seconds),
    )


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=200))
def test_percentiles(values: list[float]) -> None:
    """The value at p % of the way from the smallest to the largest, in order; between two of them, in proportion."""

    def percentile(p: float) -> float:
        ordered = sorted(values)
        place = p / 100 * (len(ordered) - 1)
        below = math.floor(place)
        above = min(below + 1, len(ordered) - 1)
        return ordered[below] + (place - below) * (ordered[above] - ordered[below])

    found = Distribution.of(values)
    assert found is not None
    expected = (len(values), sum(values) / len(values), percentile(50), percentile(90), percentile(99), max(values))
    assert dataclasses.astuple(found) == pytest.approx(expected)
    assert found.p50 <= found.p90 <= found.p99 <= found.max


def test_no_values_have_no_distribution() -> None:
    assert Distribution.of([]) is None


def test_metrics_of_a_record() -> None:
    record = a_record(sent=1.25)
    assert (record.ttft, record.gaps, record.tpot, record.e2e, record.late) == (0.5, (0.5, 1.0), 0.75, 2.25, 0.25)
    assert a_record(output_tokens=4).tpot == 0.5  # a chunk held two tokens
    single = a_record(times=(1.5,))
    assert (single.ttft, single.gaps, single.tpot) == (0.5, (), None)
    assert a_record(times=()).ttft is None


@given(st.lists(any_record(), max_size=20), st.sampled_from(METRICS), st.lists(seconds, min_size=2, max_size=2))
def test_goodput_grows_with_its_limit(records: list[Record], metric: str, limits: list[float]) -> None:
    strict, loose = sorted(limits)
    other = Slo("e2e", 20.0)
    few, many, both = (
        summarise(seen_of(records), slos).goodput
        for slos in ([Slo(metric, strict)], [Slo(metric, loose)], [Slo(metric, loose), other])
    )
    finished = sum(record.outcome == "finished" for record in records)
    assert few is not None and many is not None and both is not None
    assert few.count <= many.count <= finished
    assert both.count <= many.count
    assert few.per_second <= many.per_second and few.fraction <= many.fraction <= 1


@pytest.mark.parametrize(
    ("slo", "good"),
    [
        ("ttft=0.5", [True, True, False]),
        ("ttft=0.4", [False, False, False]),
        ("itl=1", [True, True, True]),
        ("itl=0.9", [False, True, True]),
        ("tpot=0.7", [False, True, True]),
        ("e2e=2.25", [True, True, True]),
        ("e2e=2.2", [False, False, False]),
    ],
)
def test_limits(slo: str, good: list[bool]) -> None:
    """Of three answers: of three tokens, of one, and of none."""
    records = [a_record(), a_record(times=(1.5,)), a_record(times=())]
    assert [Slo.parse(slo).holds(record) for record in records] == good


@given(st.lists(any_record(), max_size=20), st.integers(0, 5))
def test_conservation(records: list[Record], unsent: int) -> None:
    summary = summarise(Observations(num_planned=len(records) + unsent, records=records))
    assert summary.planned == summary.sent + summary.unsent and summary.unsent == unsent
    assert summary.sent == summary.finished + summary.failed + summary.cancelled
    assert sum(error.count for error in summary.errors) == summary.failed
    finished = [record for record in records if record.outcome == "finished"]
    tokens = sum(len(record.token_times) for record in finished)
    assert summary.output_tokens_per_second * summary.duration == pytest.approx(tokens)
    assert summary.requests_per_second * summary.duration == pytest.approx(len(finished))
    assert all(record.end <= summary.duration for record in records)


RECORDS = [
    a_record(0, retries=2),
    a_record(1, times=(1.5, 1.75, 2.0), end=4.0),
    a_record(2, outcome="failed"),
    a_record(3, outcome="failed", failure=Failure("http 500", "out of pages")),
    a_record(4, outcome="failed", failure=Failure("http 500", "something else")),
    a_record(5, outcome="cancelled"),
]


def a_summary() -> Summary:
    seen = Observations(num_planned=8, records=RECORDS, lags=[0.001, 0.003], interrupted=True)
    return summarise(seen, [Slo("ttft", 1.0), Slo("itl", 0.5)])


def test_the_table() -> None:
    assert table(a_summary(), "tiny at http://there") == "\n".join(
        [
            "tiny at http://there (interrupted)",
            "  requests    6 sent = 2 finished + 3 failed + 1 cancelled; 2 of 8 not sent; sent again after 429: 2 times",
            "  duration    4.00 s",
            "  throughput  0.50 requests/s",
            "              5.0 input tokens/s, 1.5 output tokens/s",
            "  a request   10.0 input tokens, 3.0 output tokens",
            "  goodput     0.25 requests/s, 16.7% of those sent: ttft <= 1 s, itl <= 0.5 s",
            "",
            "  ms                mean       p50       p90       p99       max     count",
            "  ttft            500.00    500.00    500.00    500.00    500.00         2",
            "  tpot            500.00    500.00    700.00    745.00    750.00         2",
            "  itl             500.00    375.00    850.00    985.00   1000.00         4",
            "  e2e            2625.00   2625.00   2925.00   2992.50   3000.00         2",
            "  late              0.00      0.00      0.00      0.00      0.00         6",
            "  lag               2.00      2.00      2.80      2.98      3.00         2",
            "error: 2 x http 500: out of pages",
            "error: 1 x timeout: not finished after 2 s",
        ]
    )


def test_a_run_without_answers_has_a_table_and_json() -> None:
    summary = summarise(Observations(num_planned=3))
    assert (
        "  ttft                 -         -         -         -         -         0" in table(summary, "t").splitlines()
    )
    json.dumps(report(summary, {}, []), allow_nan=False)
    assert "nothing" in plot([], "nothing")


def test_warnings_say_what_numbers_do_not_mean() -> None:
    records = [a_record(asked_output_tokens=6, asked_input_tokens=12), a_record(output_tokens=None, input_tokens=None)]
    assert summarise(seen_of(records)).warnings == (
        "1 answers came without usage: their chunks were counted as tokens, their prompts not at all",
        "input tokens were 10.0 a request, but 12.0 were asked for",
        "output tokens were 3.0 a request, but 4.5 were asked for; --ignore-eos asks for all of them",
    )


def test_json_holds_everything(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text("older")
    write_json(path, report(a_summary(), {"seed": 3}, RECORDS))
    found = json.loads(path.read_text())
    assert found["format"] == 1 and found["options"] == {"seed": 3}
    assert found["summary"]["tpot"]["p99"] == 0.745
    assert found["summary"]["errors"][0] == {"kind": "http 500", "count": 2, "example": "out of pages"}
    again = [
        Record(
            **(
                row
                | {"token_times": tuple(row["token_times"]), "failure": row["failure"] and Failure(**row["failure"])}
            )
        )
        for row in found["requests"]
    ]
    assert again == RECORDS
    assert "requests" not in report(a_summary(), {}, None)


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text("older")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "new" * 100_000 + "\ud800")
    assert path.read_text() == "older"
    assert list(tmp_path.iterdir()) == [path]
    write_text(path, "new")
    assert path.read_text() == "new" and path.stat().st_mode & 0o777 == 0o644


def test_every_field_is_documented() -> None:
    text = (ROOT / "docs" / "serving_bench.md").read_text()
    for kind in (Summary, Record, Distribution):
        for item in dataclasses.fields(kind):
            assert re.search(rf"^\| .*`{item.name}`.* \|", text, re.M), f"{kind.__name__}.{item.name}"


# The picture


@given(st.lists(any_record(), min_size=1, max_size=9))
def test_the_curve_of_throughput_holds_all_tokens(records: list[Record]) -> None:
    end = max(record.end for record in records)
    rates, edges = throughput(records, end)
    assert edges[0] == 0 and edges[-1] == pytest.approx(end)
    tokens = sum(rate * (after - before) for rate, before, after in zip(rates, edges, edges[1:]))
    assert tokens == pytest.approx(sum(len(record.token_times) for record in records))


@given(st.lists(any_record(), max_size=9), st.floats(0, 1, exclude_max=True))
def test_the_curve_of_requests_in_flight(records: list[Record], part: float) -> None:
    """It goes from 0 to the end, and between two of its times the count is that of the requests then on their way."""
    end = max((record.end for record in records), default=1.0)
    times, counts = in_flight(records, end)
    assert times[0] == 0 and times[-1] == end and list(times) == sorted(set(times))
    for start, after, count in zip(times, times[1:], counts):
        inside = min(start + (after - start) * part, math.nextafter(after, start))
        assert count == sum(record.sent <= inside < record.end for record in records)
    assert counts[-1] == 0


def test_the_picture_shows_what_the_records_say() -> None:
    latencies, tokens, requests = draw(RECORDS, "t").axes
    curves = {line.get_label(): line.get_xydata() for line in latencies.lines}
    assert list(curves) == ["ttft", "tpot", "itl", "e2e"] and latencies.get_xscale() == "log"
    # Gaps of the finished requests: 250, 250, 500 and 1000 ms.
    assert curves["itl"].tolist() == [[250, 0], [250, 0.25], [250, 0.5], [500, 0.75], [1000, 1]]
    assert curves["ttft"].tolist() == [[500, 0], [500, 0.5], [500, 1]]
    (stairs,) = tokens.patches
    assert [list(part) for part in stairs.get_data()[:2]] == [list(part) for part in throughput(RECORDS[:2], 4.0)]
    (steps,) = requests.lines
    assert steps.get_drawstyle() == "steps-post"
    assert steps.get_xydata().tolist() == [[0, 0], [1, 6], [3.25, 1], [4, 0]]


def test_the_text_of_a_picture_is_any_text_and_always_the_same() -> None:
    text = plot(RECORDS, "a < b & $c$ at \u00e9")
    assert text == plot(RECORDS, "a < b & $c$ at \u00e9")
    texts = [part.text for part in ElementTree.fromstring(text.encode()).iter("{http://www.w3.org/2000/svg}text")]
    assert {"a < b & $c$ at \u00e9", "latency (ms)", "output tokens/s", "requests in flight", "itl"} <= set(texts)
