"""The engine: schedule, launch, commit. Plain Python over an injected clock and runner; one thread calls it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import takewhile

from serving.answer import Answer, Vocabulary
from serving.config import EngineConfig
from serving.core import (
    UNKNOWN,
    Batch,
    BatchItem,
    Clock,
    Ending,
    Grammar,
    Matcher,
    Request,
    RequestOutput,
    Runner,
    SampledToken,
    Sequence,
    StepOutput,
)
from serving.cost_model import CostModel, StepWatch, StepWork
from serving.draft_budget import DraftBudget, Hope, StepKind
from serving.errors import RequestError
from serving.kv import PageTables
from serving.observer import Observer
from serving.scheduler import Scheduler
from serving.speculation import Drafter, Drafts
from serving.trace import Trace
from tilus import config as environment
from tilus.errors import TilusError


@dataclass(eq=False)
class _Live:
    """A sequence with its answer. prompt: its tokens, where their log-probabilities are wanted, as far as known."""

    seq: Sequence
    answer: Answer
    prompt: list[SampledToken]
    needs_more: bool = field(init=False)  # than logits, for sampling

    def __post_init__(self) -> None:
        params = self.seq.request.params
        self.needs_more = params.needs_history or params.min_tokens > 0 or params.prompt_logprobs is not None


@dataclass(frozen=True, eq=False)
class _Launched:
    """A step that runs: what it does and samples, for whom, since when, and how to wait for it. kind: where there are drafts."""

    work: StepWork
    kind: StepKind | None
    since: float
    items: tuple[BatchItem, ...]
    sampled: tuple[_Live, ...]
    wait: Callable[[], StepOutput]

    def decides_the_next(self) -> bool:
        """Whether the next step cannot be scheduled without this one's tokens."""
        return any(item.params and item.params.needs_history for item in self.items)


class Engine:
    """Generates for many requests at once: `add` them, call `step` while `has_work`, and hand out its outputs.

    Every request that was added ends in exactly one output with a finish reason, or by `abort`. matcher: makes those of grammars;
    without it, requests with a grammar are refused. drafter: guesses up to `config.num_drafts` tokens of each sequence, where
    that pays. trace: gets the times of the parts of steps. cost: learns what steps take. `observers` are told what happens to
    requests. before_wait: called in front of each wait for the device, when other threads may have Python's lock.
    """

    def __init__(
        self,
        runner: Runner,
        vocabulary: Vocabulary,
        config: EngineConfig,
        clock: Clock,
        matcher: Callable[[Grammar], Matcher] | None = None,
        *,
        drafter: Drafter | None = None,
        trace: Trace | None = None,
        cost: CostModel | None = None,
    ) -> None:
        self._runner = runner
        self._vocabulary = vocabulary
        self._clock = clock
        self._matcher = matcher
        self._drafter = drafter
        self._checks = environment.debug()
        self.trace = trace
        self.config = config
        self.pages = PageTables(config.num_pages, config.page_size, reuse=config.prefix_cache)
        self.cost = CostModel() if cost is None else cost
        self.scheduler = Scheduler(self.pages, config, self.cost)
        self._draft_budget = DraftBudget(self.cost.rows)
        self.observers: list[Observer] = []
        self.before_wait: Callable[[], None] = lambda: None
        self.max_model_len = min(config.max_model_len, self.pages.capacity)
        self._live: dict[str, _Live] = {}
        self._launched: _Launched | None = None
        self._watch = StepWatch(self.cost)

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or self.has_launched

    @property
    def has_launched(self) -> bool:
        """Whether the next `step` will wait for the device."""
        return self._launched is not None

    def validate(self, request: Request) -> None:
        """Raise RequestError unless this engine can serve the request. Reads only constants: any thread may ask."""
        size, limit = len(request.prompt), self.max_model_len
        params, wanted = request.params, request.params.max_tokens
        if size == 0:
            raise RequestError("the prompt has no tokens, but at least 1 is needed", param="prompt")
        for name, param, token_ids in (
            ("the prompt", "prompt", request.prompt),
            ("logit_bias", "logit_bias", dict(params.logit_bias)),
            ("stop_token_ids", "stop_token_ids", params.stop_token_ids),
        ):
            for bad in (min(token_ids, default=0), max(token_ids, default=0)):
                if not 0 <= bad < self._vocabulary.vocab_size:
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
        params = request.params
        limit = params.max_tokens or self.max_model_len - len(request.prompt)
        now = self._clock()
        if not self.has_work:
            self._watch.rest_ends(now)
            self._draft_budget.rest_ends(now)
        matcher = self.new_matcher(request.params.grammar)
        seq = Sequence(request, limit, now + self.config.request_timeout, matcher, arrived=now)
        prompt = [] if params.prompt_logprobs is None else [SampledToken(request.prompt[0])]
        self._live[request.id] = _Live(seq, Answer(seq, self._vocabulary), prompt)
        self.scheduler.add(seq)
        for observer in self.observers:
            observer.queued(seq, now)

    def abort(self, request_id: str) -> None:
        """Drop a request and take its pages back. One that has finished already is no mistake: clients race."""
        if request_id in self._live:
            self._end(request_id, "abort")

    def step(self) -> list[RequestOutput]:
        """Launch one batch; the outputs of the requests that gained something.

        With overlap these are outputs of the batch before, whose tokens are waited for when the next one is in the device's
        queue: so the device does not wait for what is done here. Sequences that turn out to have ended have a row in the next
        batch already, whose token is dropped.
        """
        outputs, guesses = self._expire(), self._num_guesses()
        waits = bool(guesses) and self._drafter is not None and not self._drafter.ahead
        if self._launched is not None and (waits or self._launched.decides_the_next()):
            outputs += self._finish()
        before, self._launched = self._launched, self._launch(guesses)
        outputs += self._commit(before)
        if not self.config.overlap:
            outputs += self._finish()
        if self._checks:
            self.check()
        return outputs

    def check(self) -> None:
        """Raise unless pages, scheduler and requests agree: run after steps in tests and with TILUS_DEBUG, and when idle."""
        self.scheduler.check()
        step = self._launched
        running = {} if step is None else {live: item.num_drafts for live, item in zip(step.sampled, step.items)}
        for name, live in self._live.items():
            unknown, counted = live.seq.tokens.count(UNKNOWN), live.seq.num_unknown
            if unknown != (live in running) or counted != unknown + running.get(live, 0):
                raise TilusError(f"request {name!r} has {unknown} unknown tokens, {counted} by its own count")
        scheduled = sorted(seq.id for seq in (*self.scheduler.running, *self.scheduler.waiting))
        if scheduled != sorted(self._live):
            raise TilusError(f"scheduled are {scheduled}, but live are {sorted(self._live)}")

    def _end(self, request_id: str, ending: Ending) -> None:
        seq = self._live.pop(request_id).seq
        if ending in ("stop", "length", "grammar"):
            self.scheduler.finish(seq)
        else:
            self.scheduler.remove(seq)
        if self._drafter is not None:
            self._drafter.forget(request_id)
        for observer in self.observers:
            observer.ended(seq, ending, self._clock())

    def _span(self, name: str) -> AbstractContextManager[None]:
        return nullcontext() if self.trace is None else self.trace.span(name)

    def _informed(self, batch: Batch) -> Batch:
        """The batch with what sampling must know beyond the logits."""
        if not any(self._live[item.request_id].needs_more for item in batch.items):
            return batch
        return replace(batch, items=tuple(self._informed_item(item) for item in batch.items))

    def _informed_item(self, item: BatchItem) -> BatchItem:
        params, live = item.params, self._live[item.request_id]
        seq, request = live.seq, live.seq.request
        if request.params.prompt_logprobs is not None:
            targets = request.prompt[item.start + 1 : item.kv_len + 1]
            item = item._replace(targets=targets, num_best=request.params.prompt_logprobs)
        if params is not None and item.draw < params.min_tokens:
            item = item._replace(allowed=_all_but(live.answer.ends, self._vocabulary.vocab_size))
        if params is None or not params.needs_history:
            return item
        allowed = seq.matcher.compute_bitmask() if seq.matcher is not None else item.allowed
        return item._replace(history=tuple(seq.tokens), allowed=allowed)

    def _expire(self) -> list[RequestOutput]:
        now = self._clock()
        # They are in the order of their deadlines.
        late = list(takewhile(lambda request_id: self._live[request_id].seq.deadline < now, self._live))
        for request_id in late:
            self._end(request_id, "timeout")
        return [RequestOutput(request_id, "", (), "timeout") for request_id in late]

    def _launch(self, guesses: Mapping[Sequence, int]) -> _Launched | None:
        with self._span("schedule"):
            batch = self._informed(self.scheduler.schedule(self._drafts(guesses)))
        if not batch.items:
            return None
        now, sampled = self._clock(), list[_Live]()
        for observer in self.observers:
            observer.scheduled(batch, now)
        with self._span("launch"):
            wait = self._runner.launch(batch)
        for item in batch.items:
            live = self._live[item.request_id]
            seq = live.seq
            self.scheduler.advance(seq, len(item.token_ids))
            if seq.started is None:
                seq.started, seq.num_cached = now, item.start
            if item.params is not None:
                seq.expect(item.drafts)
                sampled.append(live)
        work = StepWork.of(batch)
        kind = None if self._drafter is None else self._kind(batch, work)
        return _Launched(work, kind, now, batch.sampled, tuple(sampled), wait)

    def _kind(self, batch: Batch, work: StepWork) -> StepKind | None:
        drafts = [item.num_drafts for item in batch.items if item.num_drafts]
        is_prompt = work.prompts > len(drafts)
        return None if is_prompt else self._draft_budget.kind(len(batch.items), len(drafts), sum(drafts))

    def _num_guesses(self) -> dict[Sequence, int]:
        """For sequences whose next tokens depend on nothing but the model and random numbers: no mask, no history."""
        drafter = self._drafter
        if drafter is None:
            return {}
        decoding, hopes = self.scheduler.decoding(), list[Hope]()
        for seq in decoding:
            params, (first, each) = seq.request.params, drafter.chances(seq)
            if first > 0 and not params.needs_history and seq.num_output >= params.min_tokens:
                room = min(self.config.num_drafts, seq.max_tokens - seq.num_output - 1)
                hopes += [Hope(seq, first, each, room)] if room > 0 else []
        return self._draft_budget.counts(hopes, len(decoding))

    def _drafts(self, guesses: Mapping[Sequence, int]) -> Drafts:
        """Of those that are still there."""
        if self._drafter is None or not guesses:
            return {}
        return self._drafter.propose({seq: guesses[seq] for seq in self.scheduler.decoding() if seq in guesses})

    def _finish(self) -> list[RequestOutput]:
        step, self._launched = self._launched, None
        return self._commit(step, alone=True)

    def _commit(self, step: _Launched | None, alone: bool = False) -> list[RequestOutput]:
        """Wait for a step, the next one being launched, unless this one is alone. What was sampled for requests that have gone
        since is dropped.
        """
        if step is None:
            return []
        self.before_wait()
        asked = self._clock()
        with self._span("wait"):
            output = step.wait()
        tokens = output.tokens
        if len(tokens) != len(step.items):
            raise TilusError(f"the runner sampled {len(tokens)} tokens, expected {len(step.items)}")
        now = self._clock()
        if self._drafter is not None:
            behind = step if alone else self._launched
            self._draft_budget.observe(step.kind, behind and behind.kind, now)
        if alone:
            self._watch.alone(step.work, now)
        else:
            self._watch.overlapped(step.work, step.since, self._launched and self._launched.work, asked, now)
        with self._span("commit"):
            for request_id, (start, scored) in output.prompts.items():
                if request_id in self._live:
                    self._live[request_id].prompt[start : start + len(scored)] = scored
            return [
                self._extend(live, item, found, now)
                for item, live, found in zip(step.items, step.sampled, tokens)
                if self._live.get(item.request_id) is live
            ]

    def _extend(
        self, live: _Live, item: BatchItem, tokens: tuple[SampledToken, ...] | None, now: float
    ) -> RequestOutput:
        if tokens is None:  # not-a-number logits: this request ends, the others go on
            self._end(item.request_id, "error")
            return RequestOutput(item.request_id, "", (), "error")
        seq, text, reason, count = live.seq, "", None, 0
        seq.settle([token.token_id for token in tokens], item.num_drafts)
        if seq.answered is None:
            seq.answered = now
        while count < len(tokens) and reason is None:
            piece, reason = live.answer.push(tokens[count].token_id)
            text += piece
            count += 1
        for observer in self.observers:
            observer.produced(seq, count, now)
        if reason is not None:
            self._end(item.request_id, reason)
        prompt = () if item.draw else tuple(live.prompt)
        return RequestOutput(item.request_id, text, tokens[:count], reason, seq.num_cached, prompt)


@lru_cache(64)
def _all_but(tokens: frozenset[int], vocab_size: int) -> bytes:
    """A mask as `BatchItem.allowed`."""
    mask = bytearray(b"\xff" * -(-vocab_size // 8))
    for token_id in tokens:
        mask[token_id // 8] &= ~(1 << token_id % 8)
    return bytes(mask)
