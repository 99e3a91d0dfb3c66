"""The engine: schedule, run, commit. Plain Python over an injected clock and runner; one thread calls it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from serving.config import EngineConfig
from serving.core import Batch, BatchItem, Clock, FinishReason, Request, RequestOutput, Runner, SampledToken, Sequence
from serving.cost_model import CostModel, StepWork
from serving.errors import RequestError
from serving.kv import PageTables
from serving.scheduler import Scheduler
from serving.stop import StopMatcher
from serving.tokenizer import Detokenizer
from tilus.errors import TilusError


class Vocabulary(Protocol):
    """What the engine needs of a tokenizer."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def eos_ids(self) -> frozenset[int]: ...
    def decode(self, ids: list[int]) -> str: ...


@dataclass(eq=False)
class _Live:
    """A sequence with the state of its text."""

    seq: Sequence
    detokenizer: Detokenizer
    stop: StopMatcher


class Engine:
    """Generates for many requests at once: `add` them, call `step` while `has_work`, and hand out its outputs.

    Every request that was added ends in exactly one output with a finish reason, or by `abort`.
    """

    def __init__(
        self, runner: Runner, vocabulary: Vocabulary, config: EngineConfig, clock: Clock, cost: CostModel | None = None
    ) -> None:
        self._runner = runner
        self._vocabulary = vocabulary
        self._clock = clock
        self.config = config
        self.pages = PageTables(config.num_pages, config.page_size, reuse=config.prefix_cache)
        self.cost = CostModel() if cost is None else cost
        self.scheduler = Scheduler(self.pages, config, self.cost)
        self.max_model_len = min(config.max_model_len, self.pages.capacity)
        self._live: dict[str, _Live] = {}
        self._waited = True  # for the last step's end

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def validate(self, request: Request) -> None:
        """Raise RequestError unless this engine can serve the request. Reads only constants: any thread may ask."""
        size, limit, wanted = len(request.prompt), self.max_model_len, request.params.max_tokens
        if size == 0:
            raise RequestError("the prompt has no tokens, but at least 1 is needed", param="prompt")
        bad = next((t for t in request.prompt if not 0 <= t < self._vocabulary.vocab_size), None)
        if bad is not None:
            raise RequestError(
                f"the prompt contains token {bad}, but token ids go from 0 to {self._vocabulary.vocab_size - 1}",
                param="prompt",
            )
        if size + (wanted or 1) > limit:
            asked = f" and max_tokens is {wanted}, together {size + wanted}" if wanted else ""
            room = "" if wanted else "; it must leave room for at least 1 token"
            raise RequestError(
                f"the prompt has {size} tokens{asked}, but this model's context holds {limit} tokens{room}",
                param="max_tokens" if wanted and size < limit else "prompt",
                code="context_length_exceeded",
            )

    def add(self, request: Request) -> None:
        """Queue a request. Raises RequestError when it can never be served."""
        self.validate(request)
        if request.id in self._live:
            raise TilusError(f"request id {request.id!r} is live already, but ids must be unique")
        limit = request.params.max_tokens or self.max_model_len - len(request.prompt)
        seq = Sequence(request, max_tokens=limit, deadline=self._clock.now() + self.config.request_timeout)
        self._live[request.id] = _Live(seq, Detokenizer(self._vocabulary.decode), StopMatcher(request.params.stop))
        self.scheduler.add(seq)

    def abort(self, request_id: str) -> None:
        """Drop a request and take its pages back. One that has finished already is no mistake: clients race."""
        live = self._live.pop(request_id, None)
        if live is not None:
            self.scheduler.remove(live.seq)

    def step(self) -> list[RequestOutput]:
        """Run one batch; the outputs of the requests that gained something."""
        started = self._clock.now()
        outputs = self._expire()
        batch = self.scheduler.schedule()
        if not batch.items:
            return outputs
        result = self._runner.execute(batch)
        if len(result.tokens) != len(batch.sampled):
            raise TilusError(f"the runner sampled {len(result.tokens)} tokens, expected {len(batch.sampled)}")
        for item in batch.items:
            self.scheduler.advance(self._live[item.request_id].seq, len(item.token_ids))
        outputs += [self._commit(item, token) for item, token in zip(batch.sampled, result.tokens)]
        self._observe(batch, self._clock.now() - started)
        return outputs

    def check(self) -> None:
        """Raise unless pages, scheduler and requests agree: run after steps in tests, and when idle in production."""
        self.scheduler.check()
        scheduled = sorted(seq.id for seq in (*self.scheduler.running, *self.scheduler.waiting))
        if scheduled != sorted(self._live):
            raise TilusError(f"scheduled are {scheduled}, but live are {sorted(self._live)}")

    def _observe(self, batch: Batch, seconds: float) -> None:
        """The end of a step that samples nothing is not waited for on a GPU: neither its time is known nor the next one's."""
        if batch.sampled and self._waited:
            self.cost.observe(StepWork.of(batch), seconds)
        self._waited = bool(batch.sampled)

    def _expire(self) -> list[RequestOutput]:
        now = self._clock.now()
        late = [request_id for request_id, live in self._live.items() if live.seq.deadline < now]
        for request_id in late:
            self.abort(request_id)
        return [RequestOutput(request_id, "", (), "timeout") for request_id in late]

    def _commit(self, item: BatchItem, token: SampledToken | None) -> RequestOutput:
        live = self._live[item.request_id]
        if token is None:  # not-a-number logits: this request ends, the others go on
            self.abort(item.request_id)
            return RequestOutput(item.request_id, "", (), "error")
        live.seq.tokens.append(token.token_id)
        is_eos = token.token_id in self._vocabulary.eos_ids and not live.seq.request.params.ignore_eos
        text = live.stop.push("" if is_eos else live.detokenizer.push(token.token_id))
        reason: FinishReason | None = None
        if is_eos or live.stop.found:
            reason = "stop"
        elif live.seq.num_output >= live.seq.max_tokens:
            reason = "length"
        if reason is not None:
            text += live.stop.push(live.detokenizer.flush())
            text += live.stop.flush()
            if live.stop.found:  # completed by the last half character
                reason = "stop"
            self.scheduler.finish(self._live.pop(item.request_id).seq)
        return RequestOutput(item.request_id, text, (token,), reason)
