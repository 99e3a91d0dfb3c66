"""The engine: schedule, run, commit. Plain Python over an injected clock and runner; one thread calls it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from serving.config import EngineConfig
from serving.core import (
    Batch,
    BatchItem,
    Clock,
    FinishReason,
    Grammar,
    Matcher,
    Request,
    RequestOutput,
    Runner,
    SampledToken,
    Sequence,
)
from serving.errors import RequestError
from serving.kv import PageTables
from serving.observer import Observer
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

    Every request that was added ends in exactly one output with a finish reason, or by `abort`. matcher: makes those of grammars;
    without it, requests with a grammar are refused.
    """

    def __init__(
        self,
        runner: Runner,
        vocabulary: Vocabulary,
        config: EngineConfig,
        clock: Clock,
        matcher: Callable[[Grammar], Matcher] | None = None,
    ) -> None:
        self._runner = runner
        self._vocabulary = vocabulary
        self._clock = clock
        self._matcher = matcher
        self.config = config
        self.pages = PageTables(config.num_pages, config.page_size, reuse=config.prefix_cache)
        self.scheduler = Scheduler(self.pages, max_batch=config.max_batch, max_step_tokens=config.max_step_tokens)
        self.observers: list[Observer] = []
        self.max_model_len = min(config.max_model_len, self.pages.capacity)
        self._live: dict[str, _Live] = {}

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def validate(self, request: Request) -> None:
        """Raise RequestError unless this engine can serve the request. Reads only constants: any thread may ask."""
        size, limit, wanted = len(request.prompt), self.max_model_len, request.params.max_tokens
        if size == 0:
            raise RequestError("the prompt has no tokens, but at least 1 is needed", param="prompt")
        biased = (token_id for token_id, _ in request.params.logit_bias)
        for name, param, token_ids in (("the prompt", "prompt", request.prompt), ("logit_bias", "logit_bias", biased)):
            bad = next((t for t in token_ids if not 0 <= t < self._vocabulary.vocab_size), None)
            if bad is not None:
                raise RequestError(
                    f"{name} contains token {bad}, but token ids go from 0 to {self._vocabulary.vocab_size - 1}",
                    param=param,
                )
        if size + (wanted or 1) > limit:
            asked = f" and max_tokens is {wanted}, together {size + wanted}" if wanted else ""
            room = "" if wanted else "; it must leave room for at least 1 token"
            raise RequestError(
                f"the prompt has {size} tokens{asked}, but this model's context holds {limit} tokens{room}",
                param="max_tokens" if wanted and size < limit else "prompt",
                code="context_length_exceeded",
            )

    def new_matcher(self, grammar: Grammar | None) -> Matcher | None:
        """At the start of a grammar; None for none. The first time it may take a tenth of a second: any thread may ask ahead.

        Raises RequestError for a grammar that cannot be used.
        """
        if grammar is None:
            return None
        if self._matcher is None:
            raise RequestError("this server has no grammars, but the answer must match one", param="response_format")
        return self._matcher(grammar)

    def add(self, request: Request) -> None:
        """Queue a request. Raises RequestError when it can never be served."""
        self.validate(request)
        if request.id in self._live:
            raise TilusError(f"request id {request.id!r} is live already, but ids must be unique")
        limit = request.params.max_tokens or self.max_model_len - len(request.prompt)
        deadline = self._clock.now() + self.config.request_timeout
        seq = Sequence(request, limit, deadline, self.new_matcher(request.params.grammar))
        self._live[request.id] = _Live(seq, Detokenizer(self._vocabulary.decode), StopMatcher(request.params.stop))
        self.scheduler.add(seq)
        for observer in self.observers:
            observer.queued(seq, self._clock.now())

    def abort(self, request_id: str) -> None:
        """Drop a request and take its pages back. One that has finished already is no mistake: clients race."""
        if request_id in self._live:
            self._remove(request_id)
            for observer in self.observers:
                observer.dropped(request_id, self._clock.now())

    def _remove(self, request_id: str) -> None:
        self.scheduler.remove(self._live.pop(request_id).seq)

    def step(self) -> list[RequestOutput]:
        """Run one batch; the outputs of the requests that gained something."""
        outputs = self._expire() + self._run()
        for observer in self.observers:
            observer.produced(outputs, self._clock.now())
        return outputs

    def _run(self) -> list[RequestOutput]:
        batch = self._informed(self.scheduler.schedule())
        if not batch.items:
            return []
        for observer in self.observers:
            observer.scheduled(batch, self._clock.now())
        result = self._runner.execute(batch)
        if len(result.tokens) != len(batch.sampled):
            raise TilusError(f"the runner sampled {len(result.tokens)} tokens, expected {len(batch.sampled)}")
        for item in batch.items:
            self.scheduler.advance(self._live[item.request_id].seq, len(item.token_ids))
        pairs = zip(batch.sampled, result.tokens)
        return [self._commit(item, token) for item, token in pairs]

    def check(self) -> None:
        """Raise unless pages, scheduler and requests agree: run after steps in tests, and when idle in production."""
        self.pages.check()
        running = frozenset(seq.id for seq in self.scheduler.running)
        waiting = [seq.id for seq in self.scheduler.waiting]
        if self.pages.owners() != running:
            raise TilusError(f"pages belong to {sorted(self.pages.owners())}, but {sorted(running)} are running")
        if sorted([*running, *waiting]) != sorted(self._live):
            raise TilusError(f"scheduled are {sorted([*running, *waiting])}, but live are {sorted(self._live)}")

    def _informed(self, batch: Batch) -> Batch:
        """The batch with what sampling must know beyond the logits."""
        return Batch(tuple(self._informed_item(item) for item in batch.items))

    def _informed_item(self, item: BatchItem) -> BatchItem:
        if item.params is None or not item.params.needs_history:
            return item
        seq = self._live[item.request_id].seq
        allowed = seq.matcher.allowed() if seq.matcher is not None else None
        return dataclasses.replace(item, history=tuple(seq.tokens), allowed=allowed)

    def _expire(self) -> list[RequestOutput]:
        now = self._clock.now()
        late = [request_id for request_id, live in self._live.items() if live.seq.deadline < now]
        for request_id in late:
            self._remove(request_id)
        return [RequestOutput(request_id, "", (), "timeout") for request_id in late]

    def _commit(self, item: BatchItem, token: SampledToken | None) -> RequestOutput:
        live = self._live[item.request_id]
        if token is None:  # not-a-number logits: this request ends, the others go on
            self._remove(item.request_id)
            return RequestOutput(item.request_id, "", (), "error")
        live.seq.tokens.append(token.token_id)
        if live.seq.matcher is not None:
            live.seq.matcher.accept(token.token_id)
        is_eos = token.token_id in self._vocabulary.eos_ids and not live.seq.request.params.ignore_eos
        text = live.stop.push("" if is_eos else live.detokenizer.push(token.token_id))
        reason: FinishReason | None = None
        if is_eos or live.stop.found:
            reason = "stop"
        elif live.seq.matcher is not None and live.seq.matcher.failed:
            reason = "grammar"
        elif live.seq.num_output >= live.seq.max_tokens:
            reason = "length"
        if reason is not None:
            text += live.stop.push(live.detokenizer.flush())
            text += live.stop.flush()
            if live.stop.found:  # completed by the last half character
                reason = "stop"
            self._remove(item.request_id)
        return RequestOutput(item.request_id, text, (token,), reason)
