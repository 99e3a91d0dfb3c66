"""Where answers end and what of the end is shown: tokens, texts and the least length that clients ask for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import httpx
import pytest
from any_token_runner import AnyTokenRunner
from hypothesis import given
from hypothesis import strategies as st
from live_server import MODEL, LiveServer, serve
from serving_fakes import EOS, VOCABULARY, FakeRunner, FakeVocabulary, ManualClock, next_token

from serving.config import EngineConfig
from serving.core import Batch, BatchItem, Request, SampledToken, SamplingParams, StepOutput
from serving.engine import Engine
from serving.errors import RequestError
from serving.loader import Checkpoint

CONFIG = EngineConfig(num_pages=40, max_model_len=60, page_size=4, max_batch=4, max_step_tokens=8)
TOKENS = st.integers(0, VOCABULARY - 1)
PARAMS = st.builds(
    SamplingParams,
    max_tokens=st.just(30),
    min_tokens=st.integers(0, 30),
    stop=st.lists(st.text([chr(32 + token) for token in range(8, 40)], min_size=1, max_size=1), max_size=16).map(tuple),
    include_stop_str_in_output=st.booleans(),
    stop_token_ids=st.lists(TOKENS, max_size=6).map(tuple),
    ignore_eos=st.booleans(),
)


class MaskedRunner(FakeRunner):
    """Samples the next token that is allowed."""

    def _run(self, item: BatchItem) -> tuple[SampledToken, ...] | None:
        tokens = super()._run(item)
        if tokens is None or item.allowed is None:
            return tokens
        ((token, _),) = tokens
        while not item.allowed[token // 8] >> token % 8 & 1:
            token = (token + 1) % VOCABULARY
        return (SampledToken(token),)


def expected(prompt: list[int], params: SamplingParams) -> tuple[str, int, str]:
    """The text, how many tokens, and why it ends: token by token, without any engine."""
    ends = {*params.stop_token_ids, *([] if params.ignore_eos else [EOS])}
    tokens, text = list(prompt), ""
    for count in range(1, params.max_tokens + 1):
        token = next_token(tokens)
        while count <= params.min_tokens and token in ends:
            token = (token + 1) % VOCABULARY
        tokens.append(token)
        character = chr(32 + tokens[-1])
        if tokens[-1] in ends:
            return text + character * params.include_stop_str_in_output, count, "stop"
        if count > params.min_tokens and character in params.stop:
            return text + character * params.include_stop_str_in_output, count, "stop"
        text += character
    return text, params.max_tokens, "length"


PROMPTS = st.lists(st.lists(TOKENS, min_size=1, max_size=6), min_size=1, max_size=3)


@given(prompts=PROMPTS, params=PARAMS, overlap=st.booleans())
def test_answers_end_where_they_should(prompts: list[list[int]], params: SamplingParams, overlap: bool) -> None:
    """Also where the next step is scheduled before a token is known."""
    config = replace(CONFIG, overlap=overlap)
    engine = Engine(MaskedRunner(config.page_size, lazy=overlap), FakeVocabulary(), config, ManualClock())
    for index, prompt in enumerate(prompts):
        engine.add(Request(str(index), tuple(prompt), params))
    found = {str(index): ("", 0, "") for index in range(len(prompts))}
    while engine.has_work:
        for output in engine.step():
            text, count, _ = found[output.request_id]
            found[output.request_id] = text + output.text, count + len(output.tokens), output.finish_reason
    assert list(found.values()) == [expected(prompt, params) for prompt in prompts]


def test_no_draft_is_checked_where_ends_are_masked() -> None:
    """All rows of a step with drafts have one mask, but the answer may end behind its min_tokens-th token."""

    class Zeros:
        ahead = True

        def chances(self, seq):
            return 1.0, 1.0

        def propose(self, wanted):
            return {seq.id: (EOS,) * count for seq, count in wanted.items()}

        def forget(self, request_id: str) -> None:
            pass

    class Spy(AnyTokenRunner):
        def launch(self, batch: Batch) -> Callable[[], StepOutput]:
            steps.extend((item.draw, item.num_drafts) for item in batch.items)
            return super().launch(batch)

    steps: list[tuple[int, int]] = []
    config = EngineConfig(num_pages=40, max_model_len=60, page_size=4, max_step_tokens=40, num_drafts=4)
    engine = Engine(Spy(4, VOCABULARY), FakeVocabulary(), config, ManualClock(), drafter=Zeros())
    engine.add(Request("r", (1,), SamplingParams(max_tokens=9, min_tokens=5, ignore_eos=True)))
    while engine.has_work:
        engine.step()
    assert steps == [(0, 0), (1, 0), (2, 0), (3, 0), (4, 0), (5, 3), (6, 2), (7, 1), (8, 0)]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (
            {"min_tokens": -1},
            "min_tokens is -1, but must be between 0 and max_tokens; 0 where a grammar decides",
        ),
        (
            {"min_tokens": 5, "max_tokens": 4},
            "min_tokens is 5, but must be between 0 and max_tokens; 0 where a grammar decides",
        ),
        ({"stop_token_ids": (1,) * 129}, f"stop_token_ids is ({'1, ' * 66}1, but must be at most 128 tokens"),
    ],
)
def test_refused_parameters(params: dict, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**params)
    assert caught.value.message == message and caught.value.param == next(iter(params))


def test_fields_of_ends_reach_the_engine(tiny_checkpoint: Checkpoint) -> None:
    """The answer to any prompt is known: it goes on from its last token, through letters and special tokens."""
    tokenizer = tiny_checkpoint.tokenizer
    (start, end, other) = tokenizer.encode("<|im_start|><|im_end|><unk>")
    script = [*tokenizer.encode("one"), start, *tokenizer.encode("two"), other, *tokenizer.encode("six"), end]

    class Script(AnyTokenRunner):
        def _run(self, item):
            token = super()._run(item)
            return token and token._replace(token_id=script[item.draw % len(script)])

    config = EngineConfig(num_pages=60, max_model_len=200, page_size=4, max_batch=4, max_step_tokens=24)
    with serve(Script(4, tokenizer.vocab_size), tiny_checkpoint, config) as server, server.client() as client:

        def answer(**fields) -> tuple[str, str, int]:
            reply = client.completions.create(model=MODEL, prompt="x", max_tokens=20, extra_body=fields)
            return reply.choices[0].text, reply.choices[0].finish_reason, reply.usage.completion_tokens

        assert answer() == ("onetwosix", "stop", 12)
        shown = "one<|im_start|>two<unk>six"
        assert answer(skip_special_tokens=False) == (shown, "stop", 12)
        assert answer(skip_special_tokens=False, include_stop_str_in_output=True) == (shown + "<|im_end|>", "stop", 12)
        assert answer(stop_token_ids=[other], ignore_eos=True) == ("onetwo", "stop", 8)
        assert answer(stop_token_ids=[script[5]], include_stop_str_in_output=True) == ("onetw", "stop", 6)
        assert answer(stop="w") == ("onet", "stop", 6)
        assert answer(stop="w", include_stop_str_in_output=True) == ("onetw", "stop", 6)
        assert answer(stop="o", min_tokens=4) == ("onetw", "stop", 7)
        assert answer(stop=["e", "n", "t", "o"], min_tokens=8) == ("onetwosix", "stop", 12)
        server.check_idle()


def test_a_grammar_has_its_own_end(tiny_server: LiveServer) -> None:
    tools = [{"type": "function", "function": {"name": "f", "strict": True}}]
    grammars = (
        ("completions", {"prompt": "x", "structured_outputs": {"regex": "a"}}),
        ("chat/completions", {"messages": [{"role": "user", "content": "x"}], "tools": tools}),
    )
    for path, body in grammars:
        for name, value, expected in (
            ("min_tokens", 2, "between 0 and max_tokens; 0 where a grammar decides"),
            ("ignore_eos", True, "false where a grammar decides"),
        ):
            reply = httpx.post(f"{tiny_server.url}/v1/{path}", json={"model": MODEL, name: value} | body)
            error = reply.json()["error"]
            assert (reply.status_code, error["param"]) == (400, name)
            assert error["message"] == f"{name} is {value}, but must be {expected}"
