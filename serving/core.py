"""The data that the server's parts exchange: requests, sequences, batches, step results. No torch, no I/O.

A `Request` is what a client asked for. Inside the engine it is a `Sequence`: its tokens and how many of them have their
keys and values in the cache. Each step the scheduler makes a `Batch`, the runner turns it into a `StepOutput`, and the
engine turns that into one `RequestOutput` for each request that moved. What a sequence has in a step is a named tuple: it is
made in a third of the time of a frozen dataclass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as List
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple, Protocol

from serving.errors import RequestError

FinishReason = Literal["stop", "length", "timeout", "error", "grammar"]
Ending = FinishReason | Literal["abort"]  # the client has gone
# The engine's only source of time, in seconds from an arbitrary start; injected, so that tests own it.
Clock = Callable[[], float]
UNKNOWN = -1  # in place of a token that has been sampled, or will be, but is still on the device
MAX_LOGPROBS = 20
MAX_STOPS = 16
MAX_STOP_LENGTH = 256
MAX_BIASES = 1024
MAX_STOP_TOKENS = 128


@dataclass(frozen=True)
class Grammar:
    """What an answer must match: a JSON schema as text ("{}" for any JSON), a regular expression, or a context-free grammar in
    the form of llguidance's dialect of Lark."""

    kind: Literal["json_schema", "regex", "lark"]
    text: str


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens and when to stop.

    max_tokens: None means as many as the context holds. temperature: 0 means greedy. top_k: 0 means no limit.
    min_p: tokens less probable than this times the best one's probability are left out.
    presence_penalty, frequency_penalty: subtracted from the logits of tokens of the answer so far, once or for each time.
    repetition_penalty: by which logits of tokens of the prompt and the answer so far are divided, or multiplied below 0.
    logit_bias: pairs of a token and what is added to its logit. grammar: what the answer must match.
    seed: the only source of randomness; equal requests with equal seeds get equal answers, whoever shares the batch.
    stop, stop_token_ids: texts and tokens that end the answer, as the model's own do unless ignore_eos; it is shown with
    include_stop_str_in_output. min_tokens: before there are so many, nothing of this ends it.
    skip_special_tokens: whether special tokens are left out of the text.
    logprobs: None for none, else how many alternatives to report beside the chosen token (0 to 20). prompt_logprobs: the same of
    the prompt's tokens; such a prompt is computed as a whole, whatever the cache knows of it.
    Raises RequestError for a value outside its range.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    grammar: Grammar | None = None
    seed: int = 0
    stop: tuple[str, ...] = ()
    include_stop_str_in_output: bool = False
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    skip_special_tokens: bool = True
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        biases, stops = dict(self.logit_bias), list(self.stop)
        most = 0 if self.grammar is not None else self.max_tokens or self.min_tokens
        rules = {
            "max_tokens": (self.max_tokens is None or self.max_tokens >= 1, "at least 1"),
            "ignore_eos": (not (self.grammar and self.ignore_eos), "false where a grammar decides"),
            "min_tokens": (0 <= self.min_tokens <= most, "between 0 and max_tokens; 0 where a grammar decides"),
            "temperature": (0.0 <= self.temperature <= 2.0, "between 0 and 2"),
            "top_p": (0.0 < self.top_p <= 1.0, "above 0 and at most 1"),
            "top_k": (self.top_k >= 0, "at least 1, or 0 for no limit"),
            "min_p": (0.0 <= self.min_p <= 1.0, "between 0 and 1"),
            "presence_penalty": (abs(self.presence_penalty) <= 2.0, "between -2 and 2"),
            "frequency_penalty": (abs(self.frequency_penalty) <= 2.0, "between -2 and 2"),
            "repetition_penalty": (0.0 < self.repetition_penalty <= 2.0, "above 0 and at most 2"),
            "logit_bias": (
                len(self.logit_bias) <= MAX_BIASES and all(abs(bias) <= 100 for bias in biases.values()),
                f"at most {MAX_BIASES} tokens with numbers between -100 and 100",
            ),
            "seed": (0 <= self.seed < 2**64, "between 0 and 2^64 - 1"),
            "stop": (
                len(stops) <= MAX_STOPS and all(0 < len(stop) <= MAX_STOP_LENGTH for stop in stops),
                f"at most {MAX_STOPS} strings of 1 to {MAX_STOP_LENGTH} characters",
            ),
            "stop_token_ids": (len(self.stop_token_ids) <= MAX_STOP_TOKENS, f"at most {MAX_STOP_TOKENS} tokens"),
            "logprobs": (0 <= (self.logprobs or 0) <= MAX_LOGPROBS, f"between 0 and {MAX_LOGPROBS}"),
            "prompt_logprobs": (0 <= (self.prompt_logprobs or 0) <= MAX_LOGPROBS, f"between 0 and {MAX_LOGPROBS}"),
        }
        for name, (holds, expected) in rules.items():
            if not holds:
                found = {"logit_bias": biases, "stop": stops}.get(name, getattr(self, name))
                raise RequestError(f"{name} is {found!r:.200}, but must be {expected}", param=name)

    @cached_property
    def needs_history(self) -> bool:
        """Whether the next token's choice depends on the ones before it otherwise than through the model."""
        penalties = (self.presence_penalty, self.frequency_penalty, self.repetition_penalty - 1.0)
        return self.grammar is not None or any(penalties)

    @cached_property
    def edits_logits(self) -> bool:
        """Whether logits are changed before a token is drawn, be it by what came before."""
        return bool(self.logit_bias) or self.needs_history


@dataclass(frozen=True)
class Request:
    """One continuation to generate. `id` is unique among the live requests.

    priority: lower goes first, with `--schedule priority`. user: whom the client asks for, "" if it did not say, for
    `--schedule fair`.
    """

    id: str
    prompt: tuple[int, ...]
    params: SamplingParams
    priority: int = 0
    user: str = ""


class Matcher(Protocol):
    """A grammar's state behind the tokens of one answer, in llguidance's words."""

    def is_error(self) -> bool:
        """Whether it has become too complex to go on, or a token that was not allowed has been consumed: the answer must end, and
        only the tokens that end one are allowed."""
        ...

    def compute_bitmask(self) -> bytes:
        """The tokens that may come next, as `BatchItem.allowed`. Where the grammar may end, so may the answer."""
        ...

    def consume_token(self, token_id: int, /) -> bool: ...


@dataclass(eq=False)
class Sequence:
    """A request inside the engine.

    tokens: the prompt, then the output so far; UNKNOWN at its end stands for what launched steps sample, behind drafts in them,
    as if these agreed: so many, num_unknown, are not sure. num_computed: how many
    of them have keys and values in the cache once the launched steps have run; it falls to 0 when the sequence loses its
    pages, and everything is computed again later, or copied back from the host. max_tokens: the limit on output with the
    default resolved. deadline: the clock's time after which the request is given up. matcher: of the request's grammar, if it
    has one. number: in order of arrival. num_shared: pages that others had already when it was admitted. num_preemptions: how
    often it lost its pages. arrived, started, answered: the clock's times of arrival, of the first step and of the first token.
    num_cached: tokens of the prompt that were in the cache when it first started.
    """

    request: Request
    max_tokens: int
    deadline: float
    matcher: Matcher | None = None
    id: str = field(init=False)
    tokens: list[int] = field(init=False)
    num_prompt: int = field(init=False)
    num_computed: int = 0
    num_unknown: int = 0
    number: int = 0
    num_shared: int = 0
    num_preemptions: int = 0
    num_cached: int = 0
    arrived: float = 0.0
    started: float | None = None
    answered: float | None = None

    def __post_init__(self) -> None:
        self.id = self.request.id
        self.tokens = list(self.request.prompt)
        self.num_prompt = len(self.tokens)

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def num_pending(self) -> int:
        """Tokens that must go through the model before the next one can be sampled; 1 while decoding."""
        return len(self.tokens) - self.num_computed

    @property
    def is_full(self) -> bool:
        """Whether it has as many tokens as it may, known or not: it only waits for its end to be told."""
        return len(self.tokens) >= self.num_prompt + self.max_tokens

    @property
    def is_decoding(self) -> bool:
        """Whether it only waits for its next token."""
        return len(self.tokens) - self.num_computed == 1 and not self.is_full

    def expect(self, drafts: tuple[int, ...]) -> None:
        """A step has been launched that samples a token behind each of some drafts, and one in front of them."""
        self.tokens += drafts
        self.tokens.append(UNKNOWN)
        self.num_unknown += 1 + len(drafts)

    def settle(self, token_ids: List[int], num_drafts: int) -> None:
        """What the first of the launched steps, which had so many drafts, has sampled."""
        if num_drafts:
            position = len(self.tokens) - self.num_unknown
            self.tokens[position : position + num_drafts + 1] = token_ids
            # Keys of those that did not agree are of no use.
            self.num_computed = min(self.num_computed, len(self.tokens) - 1)
        else:
            self.tokens[-self.num_unknown] = token_ids[0]
        self.num_unknown -= 1 + num_drafts


class BatchItem(NamedTuple):
    """One sequence's share of a step: `token_ids` at positions start, start + 1, ... with `pages` as its block table.

    A token UNKNOWN is the last one that the step launched just before sampled for the same request. Positions and draw are as if
    all drafts of that step had agreed: for each that did not, the step computes this item one place further in front. params is
    None when this step does not reach the sequence's end, so that nothing is sampled; draw counts the tokens sampled before, and
    picks the random number. history: all tokens of the sequence, the last `draw` of them its answer, where they are needed
    (`params.needs_history`). allowed: a bit for each token of the vocabulary, the first in the lowest bit of the first byte,
    where a grammar decides; None for all.
    num_drafts: how many of the last tokens are guesses, which the step checks: behind the token in front of them and behind
    each of them one is sampled, with draw, draw + 1, ...; none where there is a history, or a mask.
    targets: what follows on the first of the tokens in a prompt, where log-probabilities are wanted of that, and of the
    `num_best` most probable tokens in each place.
    """

    request_id: str
    token_ids: tuple[int, ...]
    start: int
    pages: tuple[int, ...]
    params: SamplingParams | None
    draw: int
    history: tuple[int, ...] = ()
    allowed: bytes | None = None
    num_drafts: int = 0
    targets: tuple[int, ...] = ()
    num_best: int = 0

    @property
    def kv_len(self) -> int:
        """Tokens in the cache after the step."""
        return self.start + len(self.token_ids)

    @property
    def drafts(self) -> tuple[int, ...]:
        return self.token_ids[-self.num_drafts :] if self.num_drafts else ()


def is_decode(item: BatchItem) -> bool:
    """Whether an item is a single token behind which one is sampled."""
    return len(item.token_ids) == 1 and item.params is not None


@dataclass(frozen=True)
class PageCopy:
    """Of one page, between the cache and the host's memory: to the host, or back from there."""

    page: int
    host_page: int
    to_host: bool


@dataclass(frozen=True)
class Batch:
    """A step. Before its items are computed, pages are copied, in order."""

    items: tuple[BatchItem, ...]
    copies: tuple[PageCopy, ...] = ()

    @cached_property
    def sampled(self) -> tuple[BatchItem, ...]:
        """The items that get a new token, in order."""
        return tuple([item for item in self.items if item.params is not None])

    @cached_property
    def others(self) -> tuple[BatchItem, ...]:
        """The items that do not just decode, in order."""
        return tuple([item for item in self.items if not is_decode(item)])

    @cached_property
    def in_rows(self) -> tuple[BatchItem, ...]:
        """The items as their rows lie in the step: those that decode in front."""
        return (*filter(is_decode, self.items), *self.others) if self.others else self.items


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural-log probabilities under the model's own distribution (before temperature): of the token, of the best."""

    logprob: float
    top: tuple[tuple[int, float], ...]


class SampledToken(NamedTuple):
    token_id: int
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True)
class StepOutput:
    """One entry for each of `Batch.sampled`, in order: its new tokens, one, or as many drafts as agreed with what was sampled in
    their places and one more. None where the logits were not numbers. prompts: by request, targets with what was asked of them,
    and where in its tokens the first one is.
    """

    tokens: tuple[tuple[SampledToken, ...] | None, ...]
    prompts: Mapping[str, tuple[int, tuple[SampledToken, ...]]] = field(default_factory=dict[str, Any])


class RequestOutput(NamedTuple):
    """What a request gained in one step. `text` may lag behind `tokens`: half characters and possible beginnings of a
    stop string are held back. After an output with a finish reason there is none. num_cached: as of `Sequence`. prompt: its
    tokens, in a request's first output where `prompt_logprobs` are wanted.
    """

    request_id: str
    text: str
    tokens: tuple[SampledToken, ...]
    finish_reason: FinishReason | None = None
    num_cached: int = 0
    prompt: tuple[SampledToken, ...] = ()


class Runner(Protocol):
    """Executes batches. Whatever runs the model, a GPU or a test's arithmetic, the engine sees only this."""

    def launch(self, batch: Batch) -> Callable[[], StepOutput]:
        """Start a step and return at once; what is returned waits for the step's tokens. Steps take effect in the order of their
        launches, so that a page may be in a later batch with another owner while an earlier step has not ended.
        """
        ...
