"""Continuous batching: which tokens of which sequences go through the model in the next step.

Each step has a budget of tokens, and with a limit on the time between two tokens of what the cost model says that fits into it.
Sequences that decode come first (one token each), then prompts in progress, then newcomers; a prompt that exceeds what is left is
cut into chunks, so prefill and decode share steps (SplitFuse, Sarathi-Serve). Those that wait and those that run are both ranked:
as they came, or by priority.

Pages: a newcomer is admitted only when pages for all of its tokens are free and the policy of `admission` agrees; those that
hold its beginning already count as its own, and their tokens are not computed again. A decoding sequence that needs a page when
none is free takes those of the running sequence of the last rank, which goes back to those that wait. It is copied to the
host's memory and back, or computed again, whichever takes less time. The first in rank therefore always moves on, and, since no
request may exceed the pool, nothing can deadlock.

Steps are scheduled while the ones before them run, whose tokens are UNKNOWN: a sequence goes on as if its last token did not end
it. Pages are given back, and given to others, while launched steps still write to them. That is safe because steps take effect in
order: a step that was launched when the page had its old owner writes before any step of the new one reads or writes, and within
a step each page has the owners that it has in the tables. Copies wait for the steps in front of them.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable, Mapping

from serving.admission import admission_policy
from serving.config import EngineConfig
from serving.core import Batch, BatchItem, PageCopy, Sequence
from serving.cost_model import CostModel, StepBudget, StepWork
from serving.host_pages import HostPages
from serving.kv import PageTables
from serving.waiting import INPUT_WEIGHT, OUTPUT_WEIGHT, Waiting
from tilus.errors import TilusError

_NO_DRAFTS: Mapping[str, tuple[int, ...]] = {}


class Scheduler:
    def __init__(self, pages: PageTables, config: EngineConfig, cost: CostModel) -> None:
        self.pages = pages
        self.host = HostPages(config.num_host_pages, config.page_size)
        self.waiting = Waiting(config.schedule)
        self.running: list[Sequence] = []  # by rank
        self.num_recomputed = 0  # preemptions of either kind
        self.num_swapped = 0
        self._config = config
        self._cost = cost
        self._admission = admission_policy(config.admission)
        self._copies: list[PageCopy] = []
        self._num_arrived = 0

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, seq: Sequence) -> None:
        seq.number = self._num_arrived
        self._num_arrived += 1
        self.waiting.push(seq)

    def remove(self, seq: Sequence) -> None:
        """Forget a sequence, wherever it is, and take its pages back."""
        if seq in self.running:
            self.running.remove(seq)
            self._release(seq)
        else:
            self.waiting.remove(seq)
            self.host.release(seq.id)

    def finish(self, seq: Sequence) -> None:
        """Forget a sequence whose answer has come to its end."""
        self._admission.learn(seq.num_output - seq.num_unknown)
        self.remove(seq)

    def decoding(self) -> list[Sequence]:
        """The sequences that will get a token in the next step if they keep their pages, first in rank first."""
        return [seq for seq in self.running if seq.is_decoding]

    def forget_past(self) -> None:
        """Lengths of answers that nobody asked for: those of a warm-up."""
        self._admission = admission_policy(self._config.admission)

    def schedule(self, drafts: Mapping[str, tuple[int, ...]] = _NO_DRAFTS) -> Batch:
        """The next step's batch; empty only when there is no work, or all that runs is full and waits for its last token.

        drafts: by request, guesses of the next tokens of sequences that decode, taken as far as there are pages and tokens left.
        """
        plan: dict[Sequence, int] = {}
        taken: dict[str, tuple[int, ...]] = {}
        if self._config.prefill_first:
            self._plan_prompts(plan, StepWork())
        if not plan:
            self._make_room()
            num_running = len(self.running)
            self._plan_decodes(plan)
            preempted = len(self.running) < num_running
            keys = sum(len(seq.tokens) for seq in plan)
            decodes = self._plan_drafts(plan, drafts, taken, StepWork(len(plan), keys, keys))
            self._plan_prompts(plan, decodes, newcomers=not (preempted or self._config.prefill_first))
        if self.has_work and not plan and not any(seq.is_full for seq in (*self.running, *self.waiting)):
            raise TilusError(
                f"nothing can run: {len(self.waiting)} waiting, {len(self.running)} running, "
                f"{self.pages.num_free} of {self.pages.num_pages} pages free"
            )
        items = tuple(self._item(seq, count, taken.get(seq.id, ())) for seq, count in plan.items())
        if not items:
            return Batch(())  # copies go with the next step
        copies, self._copies = tuple(self._copies), []
        return Batch(items, copies)

    def advance(self, seq: Sequence, count: int) -> None:
        """A step has been launched that computes `count` more tokens of a sequence. Steps after it may read them."""
        seq.num_computed += count
        self._publish(seq)
        if seq.num_pending <= 0:  # drafts are in front of what it has
            self.waiting.charge(seq, OUTPUT_WEIGHT)

    def check(self) -> None:
        """Raise unless every page of the cache is in the hands of those that run, and of the host of those that wait."""
        self.pages.check()
        self.host.check()
        running = frozenset(seq.id for seq in self.running)
        if self.pages.owners() != running:
            raise TilusError(f"pages belong to {sorted(self.pages.owners())}, but {sorted(running)} are running")
        strangers = self.host.owners() - {seq.id for seq in self.waiting}
        if strangers:
            raise TilusError(f"the host keeps pages of {sorted(strangers)}, who do not wait")

    def _make_room(self) -> None:
        """One that waits takes the place of those that run with less priority."""
        while self.waiting and self.running:
            first, last = self.waiting.first(), self.running[-1]
            if self.waiting.rank(first)[0] >= self.waiting.rank(last)[0] or self._fits(first):
                return
            self._preempt_last()

    def _fits(self, seq: Sequence) -> bool:
        return (
            len(self.running) < self._config.max_batch
            and len(seq.tokens) <= self.pages.num_free * self.pages.page_size
            and self._admission.admits(self.running, seq, self.pages)
        )

    def _plan_decodes(self, plan: dict[Sequence, int]) -> None:
        index = 0
        while index < len(self.running):
            seq = self.running[index]
            if seq.is_decoding:
                if self.pages.reserve(seq.id, len(seq.tokens)):
                    plan[seq] = 1
                elif not any(other.is_full for other in self.running):  # else pages are free when its end is told
                    self._preempt_last()  # never one planned already: those come before `seq`
                    continue
            index += 1

    def _plan_drafts(
        self, plan: Mapping[Sequence, int], drafts: Mapping[str, tuple[int, ...]], taken: dict[str, tuple[int, ...]],
        work: StepWork,
    ) -> StepWork:  # fmt: skip
        """Fill `taken` with those for which there is room, for which nobody loses pages; the step's work with them."""
        for seq in plan if drafts else ():
            guesses = drafts.get(seq.id, ())[: self._config.max_step_tokens - work.tokens]
            if guesses and self.pages.reserve(seq.id, len(seq.tokens) + len(guesses)):
                taken[seq.id] = guesses
                work = work.with_prompt(len(seq.tokens), len(guesses))
        return work

    def _plan_prompts(self, plan: dict[Sequence, int], decodes: StepWork, newcomers: bool = True) -> None:
        budget = StepBudget(self._config.max_step_tokens, self._cost, self._config.itl_slo, decodes)
        others = [seq for seq in self.running if seq not in plan]
        self._plan_prefills(plan, [seq for seq in others if seq.num_pending > 1 and not seq.is_full], budget)
        # Those that are full have no row any more.
        free = self._config.max_batch - len(self.running) + sum(seq.is_full for seq in others)
        while newcomers and self.waiting and not budget.is_spent and free > 0:
            seq = self.waiting.first()
            if not self._admit(seq):
                return
            free -= 1
            # Else it decodes in the next step: its pages are on their way.
            if seq.num_pending > 1 or not self._copies or not plan:
                self._plan_prefills(plan, [seq], budget)

    def _plan_prefills(self, plan: dict[Sequence, int], prompts: Iterable[Sequence], budget: StepBudget) -> None:
        for seq in prompts:
            count = budget.take(seq.num_computed, seq.num_pending)
            if count > 0:
                plan[seq] = count

    def _admit(self, seq: Sequence) -> bool:
        """Whether a sequence that waits runs from now on."""
        if seq.num_unknown > 1:  # it has lost its place just now, and nobody knows which of its drafts agreed
            return False
        is_scored = seq.request.params.prompt_logprobs is not None  # what is found in the cache would have no logits
        found = 0 if is_scored else self.pages.adopt(seq.id, seq.tokens)
        seq.num_shared = self.pages.num_shared(seq.id)
        if not (self._admission.admits(self.running, seq, self.pages) and self.pages.reserve(seq.id, len(seq.tokens))):
            if found:
                self.pages.release(seq.id)
            return False
        seq.num_computed = found
        if seq.id in self.host.owners():
            seq.num_computed, copies = self.host.restore(seq.id, found, self.pages.table(seq.id))
            self._copies.extend(copies)
        self.waiting.remove(seq)
        insort(self.running, seq, key=self.waiting.rank)
        if seq.num_preemptions == 0:
            self.waiting.charge(seq, INPUT_WEIGHT * len(seq.request.prompt))
        return True

    def _preempt_last(self) -> None:
        seq = self.running.pop()
        copies = self._swap_out(seq)
        self._copies.extend(copies)
        self.num_swapped += bool(copies)
        self.num_recomputed += not copies
        self._release(seq)
        seq.num_computed = seq.num_shared = 0
        seq.num_preemptions += 1
        self.waiting.push(seq)

    def _swap_out(self, seq: Sequence) -> tuple[PageCopy, ...]:
        """The copies that save a sequence; none where computing it again takes less time, or the host has no room."""
        count = self._num_sure(seq)
        pages = -(-count // self.pages.page_size)
        again = self._cost.predict(StepWork().with_prompt(0, count)) - self._cost.predict(StepWork(prompts=1))
        if self._cost.is_fitted and 2 * pages * self._cost.page_copy_seconds > again:
            return ()
        return self.host.save(seq.id, count, self.pages.table(seq.id))

    def _publish(self, seq: Sequence) -> None:
        """Only pages whose tokens are known have names."""
        self.pages.publish(seq.id, seq.tokens, self._num_sure(seq))

    def _num_sure(self, seq: Sequence) -> int:
        """Tokens in the cache that are known."""
        return min(seq.num_computed, len(seq.tokens) - seq.num_unknown)

    def _release(self, seq: Sequence) -> None:
        self._publish(seq)
        self.pages.release(seq.id)

    def _item(self, seq: Sequence, count: int, drafts: tuple[int, ...]) -> BatchItem:
        start, tokens = seq.num_computed, seq.tokens
        end = start + count
        params = seq.request.params if end == len(tokens) else None
        token_ids = (tokens[start],) if count == 1 else tuple(tokens[start:end])
        item = BatchItem(seq.id, token_ids, start, self.pages.table(seq.id), params, seq.num_output)
        return item._replace(token_ids=token_ids + drafts, num_drafts=len(drafts)) if drafts else item
