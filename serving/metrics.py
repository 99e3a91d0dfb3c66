"""Metrics for Prometheus under vLLM's names, so that dashboards, autoscalers and routers made for it work unchanged.

The engine's thread adds up numbers, without locks and in less than a microsecond each; they are read and worded when a scraper
asks. prometheus_client's own histograms would take several times as long for every token.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from collections.abc import Sequence as Several
from dataclasses import dataclass
from itertools import accumulate
from math import inf

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from serving.core import Batch, Ending, Sequence
from serving.engine import Engine
from serving.observer import Observer

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_FIRST_TOKEN = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560
)  # fmt: skip
_NEXT_TOKEN = (
    0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10, 40
)  # fmt: skip
_REQUEST = (0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
_STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16_384)
_HISTOGRAMS: dict[str, tuple[str, Several[float]]] = {
    "time_to_first_token_seconds": ("From being queued to the first token.", _FIRST_TOKEN),
    "inter_token_latency_seconds": ("From one output of a request to its next.", _NEXT_TOKEN),
    "request_time_per_output_token_seconds": ("Mean time of a request's tokens after the first.", _NEXT_TOKEN),
    "e2e_request_latency_seconds": ("From being queued to the end.", _REQUEST),
    "request_queue_time_seconds": ("From being queued to the first step.", _REQUEST),
    "request_inference_time_seconds": ("From the first step to the end.", _REQUEST),
    "request_prefill_time_seconds": ("From the first step to the first token.", _REQUEST),
    "request_decode_time_seconds": ("From the first token to the end.", _REQUEST),
    "request_prompt_tokens": ("Tokens of a request's prompt.", _TOKENS),
    "request_generation_tokens": ("Tokens of a request's answer.", _TOKENS),
    "request_max_num_generation_tokens": ("Tokens of the longest of the answers to a prompt.", _TOKENS),
    "request_prefill_kv_computed_tokens": ("Tokens of a request's prompt that were not found in the cache.", _TOKENS),
    "request_params_n": ("How many answers to a prompt were asked for.", (1, 2, 5, 10, 20)),
    "request_params_max_tokens": ("The most tokens that a request's answer may have.", _TOKENS),
    "iteration_tokens_total": ("Tokens that go through the model in a step.", _STEP_TOKENS),
}
_COUNTERS = {
    "prompt_tokens": "Tokens of prompts, counted when the first token is there.",
    "generation_tokens": "Tokens of answers.",
    "num_preemptions": "How often a running request had to give up its pages.",
    "prefix_cache_queries": "Tokens of prompts that were looked up in the cache.",
    "prefix_cache_hits": "Tokens of prompts that were found in the cache, and not computed again.",
    "spec_decode_num_drafts": "Guesses of what follows in an answer, of one token or more.",
    "spec_decode_num_draft_tokens": "Tokens of guesses.",
    "spec_decode_num_accepted_tokens": "Tokens of guesses that are in answers.",
}


class Histogram:
    """How many values fell into each bucket: those at most `bounds[i]` and above the one before; the last has the rest."""

    def __init__(self, bounds: Several[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def buckets(self) -> list[tuple[str, float]]:
        """Upper bounds and how many values are at most that, as Prometheus wants them."""
        return list(zip(map(floatToGoString, (*self.bounds, inf)), accumulate(self.counts)))


@dataclass(eq=False)
class _Record:
    """A live request. last: the engine's clock when it got its last tokens."""

    seq: Sequence
    last: float = 0.0
    num_tokens: int = 0


class Metrics(Observer, Collector):
    """An observer of an engine, and the collector of what it has seen."""

    def __init__(self, engine: Engine, model_name: str) -> None:
        self._engine = engine
        self._labels = {"model_name": model_name, "engine": "0"}
        self._histograms = {name: Histogram(bounds) for name, (_, bounds) in _HISTOGRAMS.items()}
        self._counts = Counter[str]()
        self._ends = Counter[str](dict.fromkeys(("stop", "length", "abort"), 0))
        self._accepted = [0] * engine.config.num_drafts  # by place in a guess
        self._records: dict[str, _Record] = {}
        self._waiting: set[str] = set()  # those that have been in no step yet
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)
        engine.observers.append(self)

    def exposition(self) -> bytes:
        """All metrics in Prometheus's text format. Any thread may ask."""
        return generate_latest(self._registry)

    def queued(self, seq: Sequence, now: float) -> None:
        self._records[seq.id] = _Record(seq)
        self._waiting.add(seq.id)

    def answered(self, num_choices: int, num_tokens: int) -> None:
        """All answers to a prompt have ended, the longest with so many tokens. Told by the server, in one thread."""
        self._observe("request_params_n", num_choices)
        self._observe("request_max_num_generation_tokens", num_tokens)

    def scheduled(self, batch: Batch, now: float) -> None:
        self._observe("iteration_tokens_total", sum(len(item.token_ids) for item in batch.items))
        for item in batch.items if self._accepted else ():
            self._counts["spec_decode_num_drafts"] += item.num_drafts > 0
            self._counts["spec_decode_num_draft_tokens"] += item.num_drafts
        if not self._waiting:
            return
        for item in batch.items:
            if item.request_id in self._waiting:
                self._waiting.remove(item.request_id)
                seq = self._records[item.request_id].seq
                self._observe("request_queue_time_seconds", now - seq.arrived)
                self._counts["prefix_cache_queries"] += len(seq.request.prompt)
                self._counts["prefix_cache_hits"] += item.start

    def produced(self, seq: Sequence, count: int, now: float) -> None:
        record = self._records[seq.id]
        if not record.num_tokens:
            self._observe("time_to_first_token_seconds", now - seq.arrived)
            self._counts["prompt_tokens"] += len(seq.request.prompt)
            self._observe("request_prefill_kv_computed_tokens", len(seq.request.prompt) - seq.num_cached)
        else:
            self._observe("inter_token_latency_seconds", now - record.last)
        for place in range(count - 1):  # but for its last token, what a step gives was guessed
            self._accepted[place] += 1
        record.last = now
        record.num_tokens += count
        self._counts["generation_tokens"] += count

    def ended(self, seq: Sequence, ending: Ending, now: float) -> None:
        record = self._records.pop(seq.id)
        self._waiting.discard(seq.id)
        self._ends[ending] += 1
        self._counts["num_preemptions"] += seq.num_preemptions
        self._observe("e2e_request_latency_seconds", now - seq.arrived)
        self._observe("request_prompt_tokens", len(seq.request.prompt))
        self._observe("request_generation_tokens", record.num_tokens)
        self._observe("request_params_max_tokens", seq.max_tokens)
        if seq.started is not None:
            self._observe("request_inference_time_seconds", now - seq.started)
        if seq.started is not None and seq.answered is not None:
            self._observe("request_prefill_time_seconds", seq.answered - seq.started)
            self._observe("request_decode_time_seconds", record.last - seq.answered)
            if record.num_tokens > 1:
                each = (record.last - seq.answered) / (record.num_tokens - 1)
                self._observe("request_time_per_output_token_seconds", each)

    def collect(self) -> Iterator[Metric]:
        names, values = list(self._labels), list(self._labels.values())
        scheduler, pages = self._engine.scheduler, self._engine.pages
        taken = 1 - pages.num_free / pages.num_pages
        for name, text, value in (
            ("num_requests_running", "Requests that have a place in the cache.", len(scheduler.running)),
            ("num_requests_waiting", "Requests that wait for one.", len(scheduler.waiting)),
            ("kv_cache_usage_perc", "The part of the cache that is taken: 1 is all.", taken),
        ):
            yield _one(GaugeMetricFamily(f"vllm:{name}", text, labels=names), values, value)
        cache = {"block_size": str(pages.page_size), "num_gpu_blocks": str(pages.num_pages)}
        told = "The key-value cache, whatever it lies on."
        info = GaugeMetricFamily("vllm:cache_config_info", told, labels=[*names, *cache])
        yield _one(info, [*values, *cache.values()], 1)
        accepted, preempted = list(self._accepted), sum(r.seq.num_preemptions for r in list(self._records.values()))
        counts = self._counts + Counter(num_preemptions=preempted, spec_decode_num_accepted_tokens=sum(accepted))
        for name, text in _COUNTERS.items():
            yield _one(CounterMetricFamily(f"vllm:{name}", text, labels=names), values, counts[name])
        for name, text, label, parts in (
            ("request_success", "Requests by how they ended.", "finished_reason", list(self._ends.items())),
            ("spec_decode_num_accepted_tokens_per_pos", "Accepted tokens by place.", "position", enumerate(accepted)),
        ):
            counter = CounterMetricFamily(f"vllm:{name}", text, labels=[*names, label])
            for part, count in parts:
                counter.add_metric([*values, str(part)], count)
            yield counter
        for name, histogram in self._histograms.items():
            family = HistogramMetricFamily(f"vllm:{name}", _HISTOGRAMS[name][0], labels=names)
            family.add_metric(values, histogram.buckets(), histogram.total)
            yield family

    def _observe(self, name: str, value: float) -> None:
        self._histograms[name].observe(value)


def _one(family: GaugeMetricFamily | CounterMetricFamily, labels: Several[str], value: float) -> Metric:
    family.add_metric(labels, value)
    return family
