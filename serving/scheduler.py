"""Continuous batching: which tokens of which sequences go through the model in the next step.

Each step has a token budget. Sequences that decode come first (one token each), then prompts in progress, then
newcomers; a prompt that exceeds what is left is cut into chunks, so prefill and decode share steps (SplitFuse,
Sarathi-Serve). Service is first come, first served: running sequences are always older than waiting ones.

Pages: a newcomer is admitted only when pages for all of its tokens are free; those that hold its beginning already count as its
own, and their tokens are not computed again. A decoding sequence that needs a page when
none is free takes those of the youngest running sequence, which goes back to the head of the queue and computes again
later. The oldest sequence therefore always moves on, and, since no request may exceed the pool, nothing can deadlock.

Steps are scheduled while the ones before them run, whose tokens are UNKNOWN: a sequence goes on as if its last token did not end
it. Pages are given back, and given to others, while launched steps still write to them. That is safe because steps take effect in
order: a step that was launched when the page had its old owner writes before any step of the new one reads or writes, and within
a step each page has the owners that it has in the tables.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping

from serving.core import Batch, BatchItem, Sequence
from serving.kv import PageTables
from tilus.errors import TilusError

_NO_DRAFTS: Mapping[str, tuple[int, ...]] = {}


class Scheduler:
    def __init__(self, pages: PageTables, *, max_batch: int, max_step_tokens: int) -> None:
        self.pages = pages
        self.max_batch = max_batch
        self.max_step_tokens = max_step_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # oldest first

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, seq: Sequence) -> None:
        self.waiting.append(seq)

    def remove(self, seq: Sequence) -> None:
        """Forget a sequence, wherever it is, and take its pages back."""
        if seq in self.running:
            self.running.remove(seq)
            self._release(seq)
        else:
            self.waiting.remove(seq)

    def decoding(self) -> list[Sequence]:
        """The sequences that will get a token in the next step if they keep their pages, oldest first."""
        return [seq for seq in self.running if seq.num_pending == 1 and not seq.is_full]

    def schedule(self, drafts: Mapping[str, tuple[int, ...]] = _NO_DRAFTS) -> Batch:
        """The next step's batch; empty only when there is no work, or all that runs is full and waits for its last token.

        drafts: by request, guesses of the next tokens of sequences that decode, taken as far as there are pages and tokens left.
        """
        plan: dict[Sequence, int] = {}
        num_running = len(self.running)
        self._plan_decodes(plan)
        preempted = len(self.running) < num_running
        budget = self.max_step_tokens - sum(plan.values())
        taken = self._plan_drafts(plan, drafts, budget)
        budget -= sum(map(len, taken.values()))
        # One token is what a sequence decodes, in the plan or without a page for it.
        budget = self._plan_prefills(
            plan, (seq for seq in self.running if seq.num_pending > 1 and not seq.is_full), budget
        )
        if not preempted:
            self._plan_newcomers(plan, budget)
        if self.has_work and not plan and not any(seq.is_full for seq in (*self.running, *self.waiting)):
            raise TilusError(
                f"nothing can run: {len(self.waiting)} waiting, {len(self.running)} running, "
                f"{self.pages.num_free} of {self.pages.num_pages} pages free"
            )
        return Batch(tuple(self._item(seq, count, taken.get(seq.id, ())) for seq, count in plan.items()))

    def advance(self, seq: Sequence, count: int) -> None:
        """A step has been launched that computes `count` more tokens of a sequence. Steps after it may read them."""
        seq.num_computed += count
        self._publish(seq)

    def _plan_decodes(self, plan: dict[Sequence, int]) -> None:
        index = 0
        while index < len(self.running):
            seq = self.running[index]
            if seq.num_pending == 1 and not seq.is_full:
                if self.pages.reserve(seq.id, len(seq.tokens)):
                    plan[seq] = 1
                elif not any(other.is_full for other in self.running):  # else pages are free when its end is told
                    self._preempt_youngest()  # never one planned already: those are older than `seq`
                    continue
            index += 1

    def _plan_drafts(
        self, plan: Mapping[Sequence, int], drafts: Mapping[str, tuple[int, ...]], budget: int
    ) -> dict[str, tuple[int, ...]]:
        """Those that are taken. Nobody loses pages for them."""
        taken: dict[str, tuple[int, ...]] = {}
        for seq in plan:
            guesses = drafts.get(seq.id, ())[:budget]
            if guesses and self.pages.reserve(seq.id, len(seq.tokens) + len(guesses)):
                taken[seq.id] = guesses
                budget -= len(guesses)
        return taken

    def _plan_prefills(self, plan: dict[Sequence, int], prompts: Iterable[Sequence], budget: int) -> int:
        for seq in prompts:
            count = min(seq.num_pending, budget)
            if count > 0:
                plan[seq] = count
                budget -= count
        return budget

    def _plan_newcomers(self, plan: dict[Sequence, int], budget: int) -> None:
        free = self.max_batch - sum(not seq.is_full for seq in self.running)  # those that are full have no row any more
        while self.waiting and budget > 0 and free > 0:
            seq = self.waiting[0]
            found = self.pages.adopt(seq.id, seq.tokens)
            if not self.pages.reserve(seq.id, len(seq.tokens)):
                if found:
                    self.pages.release(seq.id)
                return
            seq.num_computed = found
            self.running.append(self.waiting.popleft())
            free -= 1
            budget = self._plan_prefills(plan, [seq], budget)

    def _preempt_youngest(self) -> None:
        seq = self.running.pop()
        self._release(seq)
        seq.num_computed = 0
        seq.num_preemptions += 1
        self.waiting.appendleft(seq)

    def _publish(self, seq: Sequence) -> None:
        """Only pages whose tokens are known have names."""
        self.pages.publish(seq.id, seq.tokens, min(seq.num_computed, len(seq.tokens) - seq.num_unknown))

    def _release(self, seq: Sequence) -> None:
        self._publish(seq)
        self.pages.release(seq.id)

    def _item(self, seq: Sequence, count: int, drafts: tuple[int, ...]) -> BatchItem:
        start, end = seq.num_computed, seq.num_computed + count
        return BatchItem(
            request_id=seq.id,
            token_ids=(*seq.tokens[start:end], *drafts),
            start=start,
            pages=self.pages.table(seq.id),
            params=seq.request.params if end == len(seq.tokens) else None,
            draw=seq.num_output,
            num_drafts=len(drafts),
        )
