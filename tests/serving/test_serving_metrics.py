"""Metrics against what a bystander with a clock writes down, as a scraper reads them; and the endpoints around the model."""

from __future__ import annotations

import itertools
import json
import random
from collections import defaultdict
from collections.abc import Mapping
from unittest.mock import Mock

import httpx
import openai
import pytest
from live_server import CONFIG, MODEL, LiveServer, serve
from prometheus_client.parser import text_string_to_metric_families
from serving_fakes import VOCABULARY, FakeRunner, FakeVocabulary, ManualClock, next_token
from tiny_llama import CPU

from serving.config import EngineConfig
from serving.core import Batch, Request, SamplingParams, Sequence, StepOutput
from serving.engine import Engine
from serving.loader import Checkpoint
from serving.metrics import Histogram, Metrics
from serving.model import Model
from serving.runner import TorchRunner

NAMES = {  # vLLM's, by kind
    "gauge": "num_requests_running num_requests_waiting kv_cache_usage_perc cache_config_info",
    "counter": "prompt_tokens generation_tokens num_preemptions prefix_cache_queries prefix_cache_hits request_success "
    "spec_decode_num_drafts spec_decode_num_draft_tokens spec_decode_num_accepted_tokens "
    "spec_decode_num_accepted_tokens_per_pos",
    "histogram": "time_to_first_token_seconds inter_token_latency_seconds request_time_per_output_token_seconds "
    "e2e_request_latency_seconds request_queue_time_seconds request_inference_time_seconds request_prefill_time_seconds "
    "request_decode_time_seconds request_prompt_tokens request_generation_tokens request_params_max_tokens "
    "request_max_num_generation_tokens request_prefill_kv_computed_tokens request_params_n iteration_tokens_total",
}


class SlowRunner(FakeRunner):
    """A step takes a tenth of a second and a hundredth for each token."""

    def __init__(self, page_size: int, clock: ManualClock) -> None:
        super().__init__(page_size)
        self._clock = clock

    def execute(self, batch: Batch) -> StepOutput:
        self._clock.time += 0.1 + 0.01 * sum(len(item.token_ids) for item in batch.items)
        return super().execute(batch)


def scraped(text: str) -> dict[str, float]:
    """Samples by name, with what distinguishes them beyond the model."""
    return {
        " ".join(
            [
                name.removeprefix("vllm:"),
                *(f"{k}={v}" for k, v in labels.items() if k in ("le", "finished_reason", "position")),
            ]
        ): value
        for family in text_string_to_metric_families(text)
        for name, labels, value, *_ in family.samples
    }


def test_what_a_bystander_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forty requests over a cache that is too small, some alike, some given up: counts, sums and buckets of all times."""
    rng, clock = random.Random(4), ManualClock()
    runner = SlowRunner(4, clock)
    config = EngineConfig(
        num_pages=24, max_model_len=60, page_size=4, max_batch=6, max_step_tokens=16, admission="aggressive"
    )
    engine = Engine(runner, FakeVocabulary(), config, clock)
    metrics = Metrics(engine, "m")
    preempt = Mock(wraps=engine.scheduler._preempt_last)
    monkeypatch.setattr(engine.scheduler, "_preempt_last", preempt)
    added, times, ends, seen = {}, defaultdict(list), {}, defaultdict(list)
    prompts = {f"r{i}": tuple(rng.choices(range(1, 64), k=rng.randrange(1, 30))) for i in range(40)}
    prompts |= {f"r{i}": prompts["r0"] * 2 for i in range(20, 25)}
    waiting = list(prompts)
    while waiting or engine.has_work:
        for name in [waiting.pop(0) for _ in range(min(len(waiting), rng.randrange(3)))]:
            params = SamplingParams(max_tokens=rng.randrange(1, 20), ignore_eos=True)
            added[name] = clock()
            engine.add(Request(name, prompts[name][:36], params))
        if rng.random() < 0.1 and (live := [name for name in added if name not in ends]):
            ends[live[0]] = "abort", clock()
            engine.abort(live[0])
        now, num_batches = clock(), len(runner.batches)
        outputs = engine.step()
        for item in (item for batch in runner.batches[num_batches:] for item in batch.items):
            seen[item.request_id].append((now, item.start))
        for output in outputs:
            times[output.request_id].append(clock())
            if output.finish_reason:
                ends[output.request_id] = output.finish_reason, clock()
        if rng.random() < 0.8 and engine.has_work:
            continue
        found = scraped(metrics.exposition().decode())
        assert found["num_requests_running"] == len(engine.scheduler.running)
        assert found["num_requests_running"] + found["num_requests_waiting"] == len(added) - len(ends)
    first = {name: stamps[0] for name, stamps in times.items()}
    expected = {
        "time_to_first_token_seconds": [first[name] - added[name] for name in first],
        "inter_token_latency_seconds": [b - a for stamps in times.values() for a, b in itertools.pairwise(stamps)],
        "e2e_request_latency_seconds": [end - added[name] for name, (_, end) in ends.items()],
        "request_queue_time_seconds": [steps[0][0] - added[name] for name, steps in seen.items()],
        "request_prefill_time_seconds": [first[name] - seen[name][0][0] for name in first],
        "request_decode_time_seconds": [stamps[-1] - stamps[0] for stamps in times.values()],
        "request_inference_time_seconds": [ends[name][1] - steps[0][0] for name, steps in seen.items()],
        "request_prefill_kv_computed_tokens": [len(prompts[name][:36]) - seen[name][0][1] for name in first],
        "request_prompt_tokens": [len(prompts[name][:36]) for name in added],
        "request_generation_tokens": [len(times[name]) for name in added],
        "iteration_tokens_total": [sum(len(item.token_ids) for item in batch.items) for batch in runner.batches],
    }
    for name, values in expected.items():
        assert found[f"{name}_count"] == len(values), name
        assert found[f"{name}_sum"] == pytest.approx(sum(values)), name
        for key in (key for key in found if key.startswith(f"{name}_bucket")):
            bound = float(key.partition("le=")[2])
            assert found[key] == sum(value <= bound for value in values), key
    assert found["generation_tokens_total"] == sum(map(len, times.values()))
    assert found["prompt_tokens_total"] == sum(len(prompts[name][:36]) for name in first)
    assert found["prefix_cache_queries_total"] == sum(len(prompts[name][:36]) for name in seen)
    assert found["prefix_cache_hits_total"] == sum(steps[0][1] for steps in seen.values()) > 0
    assert found["num_preemptions_total"] == preempt.call_count > 0
    for reason in ("length", "abort"):
        assert (
            found[f"request_success_total finished_reason={reason}"]
            == sum(end == reason for end, _ in ends.values())
            > 0
        )
    assert found["kv_cache_usage_perc"] == found["num_requests_waiting"] == 0


class HalfRight:
    """Guesses of which the first ones are right, as many as chance will have, for some of the sequences."""

    ahead = True

    def __init__(self) -> None:
        self._rng = random.Random(3)
        self.num_right: list[int] = []
        self.num_guessed: list[int] = []

    def chances(self, seq: Sequence) -> tuple[float, float]:
        return 1.0, 1.0

    def propose(self, wanted: Mapping[Sequence, int]) -> dict[str, tuple[int, ...]]:
        drafts = {}
        for seq, count in wanted.items():
            tokens, right = list(seq.tokens), self._rng.randrange(count + 1)
            for place in range(count):
                tokens.append((next_token(tokens) + (place >= right)) % VOCABULARY)
            if self._rng.random() < 0.8:
                drafts[seq.id] = tuple(tokens[len(seq.tokens) :])
                self.num_right.append(right)
                self.num_guessed.append(count)
        return drafts

    def forget(self, request_id: str) -> None:
        pass


def test_guesses_are_counted() -> None:
    clock, drafter = ManualClock(), HalfRight()
    config = EngineConfig(num_pages=60, max_model_len=60, page_size=4, max_batch=4, max_step_tokens=30, num_drafts=4)
    engine = Engine(FakeRunner(4), FakeVocabulary(), config, clock, drafter=drafter)
    metrics = Metrics(engine, "m")
    for index in range(4):
        engine.add(Request(str(index), (index + 1,), SamplingParams(max_tokens=40, ignore_eos=True)))
    while engine.has_work:
        engine.step()
    found = scraped(metrics.exposition().decode())
    assert found["spec_decode_num_drafts_total"] == len(drafter.num_right) > 20
    assert found["spec_decode_num_draft_tokens_total"] == sum(drafter.num_guessed)
    assert found["spec_decode_num_accepted_tokens_total"] == sum(drafter.num_right)
    for place in range(4):
        expected = sum(right > place for right in drafter.num_right)
        assert found[f"spec_decode_num_accepted_tokens_per_pos_total position={place}"] == expected > 0


def test_what_the_server_tells_of_requests(any_token_server: LiveServer) -> None:
    """Of each prompt once, when all answers to it have ended: how many, and the tokens of the longest."""
    names = ("request_params_n", "request_max_num_generation_tokens")

    def sums() -> list[float]:
        found = scraped(httpx.get(f"{any_token_server.url}/metrics").text)
        return [found[f"{name}_{kind}"] for name in names for kind in ("count", "sum")]

    before, longest = sums(), []
    for stream in (False, True):
        body = {"model": MODEL, "prompt": ["a", "b"], "n": 3, "max_tokens": 60, "temperature": 1, "logprobs": 0}
        reply = httpx.post(f"{any_token_server.url}/v1/completions", json=body | {"stream": stream}, timeout=60)
        lines = reply.text.split("\n\n")[:-2] if stream else [reply.text]
        counts = [0] * 6
        for choice in (c for line in lines for c in json.loads(line.removeprefix("data: "))["choices"]):
            counts[choice["index"]] += len((choice["logprobs"] or {"tokens": ()})["tokens"])
        longest += [max(counts[:3]), max(counts[3:])]
    httpx.post(f"{any_token_server.url}/v1/completions", json={"model": MODEL, "prompt": "a", "n": 0})  # is refused
    assert [after - first for after, first in zip(sums(), before)] == [4, 12, 4, sum(longest)]
    any_token_server.check_idle()


def test_nothing_is_told_of_who_leaves(any_token_server: LiveServer) -> None:
    """Also where one of the answers has ended."""
    name, url = "request_params_n_count", f"{any_token_server.url}/v1/completions"
    body = {"model": MODEL, "prompt": ["a", "b"], "max_tokens": 30, "ignore_eos": True}
    short, long = (choice["text"] for choice in httpx.post(url, json=body, timeout=60).json()["choices"])
    stop = next(character for character in short if character not in long)
    before = scraped(httpx.get(f"{any_token_server.url}/metrics").text)[name]
    any_token_server.runner.delay = 0.04  # 1.2 seconds for the longer one
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(url, json=body | {"stop": stop}, timeout=0.6)
    any_token_server.check_idle()
    any_token_server.runner.delay = 0.0
    assert scraped(httpx.get(f"{any_token_server.url}/metrics").text)[name] == before
    httpx.post(url, json=body, timeout=60)
    assert scraped(httpx.get(f"{any_token_server.url}/metrics").text)[name] == before + 2


def test_a_page_elsewhere_may_ask(tiny_model: Model, tiny_checkpoint: Checkpoint) -> None:
    """Browsers ask ahead, without the key; pages of other origins are told nothing."""
    runner = TorchRunner(tiny_model, CONFIG.num_pages, CONFIG.page_size, CPU)
    with serve(runner, tiny_checkpoint, CONFIG, api_key="k", origins=("http://chat.example",)) as server:
        url, asked = f"{server.url}/v1/chat/completions", "authorization,content-type"
        ahead = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": asked}
        reply = httpx.options(url, headers=ahead | {"Origin": "http://chat.example"})
        assert reply.status_code == 200 and reply.headers["access-control-allow-headers"] == asked
        assert reply.headers["access-control-allow-origin"] == "http://chat.example"
        assert httpx.options(url, headers=ahead | {"Origin": "http://evil.example"}).status_code == 400
        for origin, allowed in (("http://chat.example", "http://chat.example"), ("http://evil.example", None)):
            reply = httpx.get(f"{server.url}/v1/models", headers={"Origin": origin, "Authorization": "Bearer k"})
            assert (reply.status_code, reply.headers.get("access-control-allow-origin")) == (200, allowed)
    with serve(runner, tiny_checkpoint, CONFIG) as server:
        reply = httpx.get(f"{server.url}/v1/models", headers={"Origin": "http://chat.example"})
        assert "access-control-allow-origin" not in reply.headers


def test_a_value_at_a_bound_is_in_its_bucket() -> None:
    histogram = Histogram((1, 2))
    for value in (0.5, 1, 1.5, 2, 3):
        histogram.observe(value)
    assert histogram.buckets() == [("1.0", 2), ("2.0", 4), ("+Inf", 5)]


def test_the_names_are_those_of_vllm(tiny_server: LiveServer) -> None:
    reply = httpx.get(f"{tiny_server.url}/metrics")
    assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = {family.name: family for family in text_string_to_metric_families(reply.text)}
    found = {(f.type, f.name.removeprefix("vllm:")) for f in families.values() if f.name.startswith("vllm:")}
    assert found == {(kind, name) for kind, names in NAMES.items() for name in names.split()}
    for family in families.values():
        if family.name.startswith("vllm:"):
            assert all((s.labels["model_name"], s.labels["engine"]) == (MODEL, "0") for s in family.samples)
    assert "process_resident_memory_bytes" in families


def test_tokens_of_texts_and_chats(tiny_server: LiveServer, tiny_checkpoint: Checkpoint) -> None:
    tokenizer, messages = tiny_checkpoint.tokenizer, [{"role": "user", "content": "hü"}]

    def post(path: str, **body) -> dict:
        return httpx.post(f"{tiny_server.url}/{path}", json=body).json()

    text = "hi <|im_start|>ü"
    found = post("tokenize", model=MODEL, prompt=text, return_token_strs=True)
    expected = list(tokenizer.encode(text))
    assert found == {
        "count": len(expected),
        "max_model_len": 200,
        "tokens": expected,
        "token_strs": [tokenizer.token_text(t) for t in expected],
    }
    assert post("detokenize", model=MODEL, tokens=expected) == {"prompt": text}
    assert post("tokenize", messages=messages)["tokens"] == list(tokenizer.encode_chat(messages))
    for path, body, message in (
        ("tokenize", {}, "give either a prompt or messages"),
        (
            "tokenize",
            {"prompt": "a", "messages": [{"role": "user", "content": "b"}]},
            "give either a prompt or messages",
        ),
        ("detokenize", {"tokens": [5, 259]}, "tokens contains 259, but token ids go from 0 to 258"),
        ("tokenize", {"model": "x", "prompt": "a"}, "the model 'x' does not exist; this server has 'tiny'"),
    ):
        assert post(path, **body)["error"]["message"] == message


def test_a_key(tiny_model: Model, tiny_checkpoint: Checkpoint) -> None:
    runner = TorchRunner(tiny_model, CONFIG.num_pages, CONFIG.page_size, CPU)
    with serve(runner, tiny_checkpoint, CONFIG, api_key="geheim ü") as server:
        for path in ("v1/completions", "tokenize", "v1/chat/completions", "openapi.json"):
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic geheim ü".encode()}):
                reply = httpx.request("GET" if "." in path else "POST", f"{server.url}/{path}", headers=headers)
                assert (reply.status_code, reply.headers["www-authenticate"]) == (401, "Bearer")
                error = reply.json()["error"]
                found = "another one" if headers else "none"
                assert (
                    error["message"]
                    == f"this server wants its key in the header 'Authorization: Bearer KEY', but found {found}"
                )
                assert error["code"] == "invalid_api_key"
        for path in ("health", "ping", "metrics", "version"):
            assert httpx.get(f"{server.url}/{path}").status_code == 200
        for scheme in ("Bearer", "bearer"):
            key = {"Authorization": f"{scheme} geheim ü".encode()}
            assert httpx.get(f"{server.url}/v1/models", headers=key).status_code == 200
        with server.client() as client, pytest.raises(openai.AuthenticationError, match="wants its key"):
            client.models.list()
