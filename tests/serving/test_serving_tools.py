"""Tool calls: found in any text however it is cut, made by grammars, told to any template, and as OpenAI's client sees them."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import httpx
import openai
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from live_server import CONFIG, MODEL, LiveServer, serve
from test_serving_grammar import set_bits, walk
from tiny_llama import TEMPLATE, byte_tokenizer
from tokenizers import AddedToken

from serving.core import Batch, BatchItem, SampledToken, StepOutput
from serving.grammar import Grammars
from serving.loader import Checkpoint
from serving.tokenizer import Tokenizer
from serving.tools import (
    LIST,
    TAGS,
    WHOLE,
    CallArguments,
    CallParser,
    CallStart,
    CallStyle,
    call_grammar,
    style_of,
    told_in_words,
)

NAMES = frozenset({"f", "g"})
POINT = {
    "type": "object",
    "properties": {"p": {"$ref": "#/$defs/point"}},
    "required": ["p"],
    "additionalProperties": False,
    "$defs": {"point": {"enum": [[1, 2], [3, 4]]}},
}
TOOLS = [
    {"type": "function", "function": {"name": "f", "description": "Draws.", "parameters": POINT}},
    {"type": "function", "function": {"name": "g"}},
]
USER = [{"role": "user", "content": "hi"}]


def tagged(name: str, arguments: object) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


class ToolCall(NamedTuple):
    name: str
    arguments: str = ""


def parsed(style: CallStyle, pieces: Iterable[str]) -> list[str | ToolCall]:
    """All events, with texts and arguments that follow each other put together."""
    parser = CallParser(style, NAMES)
    merged: list[str | ToolCall] = []
    for event in [event for piece in pieces for event in parser.push(piece)] + parser.flush():
        assert event, "events are not empty"
        if isinstance(event, CallStart):
            merged.append(ToolCall(event.name))
        elif not isinstance(event, str):
            merged[-1] = merged[-1]._replace(arguments=merged[-1].arguments + event.text)
        elif merged and isinstance(merged[-1], str):
            merged[-1] += event
        else:
            merged.append(event)
    return merged


def cut(text: str, cuts: list[int]) -> list[str]:
    places = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    return [text[a:b] for a, b in itertools.pairwise(places)]


WORDS = st.sampled_from(
    ["a", "<", "<tool", "tool_call>", "<<tool_call", "}", "</tool_call>", "one  two", '{"name": "f"}']
)
CALLS = st.builds(ToolCall, st.sampled_from("fg"), st.sampled_from(["{}", '{"x": "<tool_call>"}', '{"y": [1, "}"]}']))
SEGMENTS = st.lists(WORDS | CALLS, max_size=6)


@example(segments=["<", "tool_call>", ToolCall("f", "{}")], cuts=[], blank="")  # a tag that opens nothing
@given(segments=SEGMENTS, cuts=st.lists(st.integers(0, 400), max_size=8), blank=st.sampled_from(["", "\n", " \n"]))
def test_calls_between_tags_however_the_text_is_cut(
    segments: list[str | ToolCall], cuts: list[int], blank: str
) -> None:
    expected: list[str | ToolCall] = []
    for segment in segments:
        if isinstance(segment, str) and expected and isinstance(expected[-1], str):
            expected[-1] += blank + segment
        else:
            expected.append(segment)
    written = [s if isinstance(s, str) else tagged(s.name, json.loads(s.arguments)) for s in segments]
    text = blank.join(written)
    assert parsed(TAGS, cut(text, cuts)) == parsed(TAGS, [text]) == expected


ODD = st.lists(
    st.sampled_from(
        ["<tool_call>", "</tool_call>", '{"name": "f", "arguments": ', '{"arguments": {}, "name": "g"', "{", "}", "[", "]", '"',
         "\\", "[TOOL_CALLS]", ",", '"id": "x"', '{"name": "h", "parameters": ', " ", "text", '"arguments": {"a": "}"}']
    ), max_size=12,
)  # fmt: skip


@given(style=st.sampled_from([TAGS, WHOLE, LIST]), words=ODD, cuts=st.lists(st.integers(0, 200), max_size=8))
def test_whatever_is_written_its_pieces_do_not_matter(style: CallStyle, words: list[str], cuts: list[int]) -> None:
    text = "".join(words)
    events = parsed(style, [text])
    assert parsed(style, cut(text, cuts)) == parsed(style, text) == events
    if all(isinstance(event, str) for event in events):
        assert "".join(map(str, events)) == text


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>\nno json\n</tool_call> after",
        tagged("unknown", {}),
        tagged("f", [1]),
        "<tool_call>" + "[" * 100_000,
        "waits <tool_call>",
        '<tool_call>[{"name": "f", "arguments": {}}]</tool_call>',
        '{"name": "f", "parameters": {}}',
    ],
)
def test_what_is_no_call_stays_text(text: str) -> None:
    assert "".join(map(str, parsed(TAGS, list(text) if len(text) < 99 else [text]))) == text


@pytest.mark.parametrize(("style", "begun"), [(TAGS, "<tool_call>{"), (LIST, "[TOOL_CALLS] [{"), (WHOLE, "{")])
def test_a_thousand_calls_that_are_none_take_no_minute(style: CallStyle, begun: str) -> None:
    """Each could be a call up to the end of the answer."""
    text = begun * 10_000
    assert "".join(map(str, parsed(style, [text]))) == text
    if style is not WHOLE:
        assert parsed(style, [text + begun + '"name": "f", "arguments": {}}'])[1:] == [ToolCall("f", "{}")]


def test_a_call_without_its_end_is_one() -> None:
    for missing in ("</tool_call>", "\n</tool_call>", "}\n</tool_call>"):
        text = "so " + tagged("f", {"a": 1}).removesuffix(missing)
        assert parsed(TAGS, text) == ["so", ToolCall("f", '{"a": 1}')], missing
    forgotten = tagged("f", {"a": 1}).replace("}}", "}") + tagged("g", {})  # a bracket
    assert parsed(TAGS, forgotten) == [ToolCall("f", '{"a": 1}'), ToolCall("g", "{}")]


def test_arguments_pass_as_they_come() -> None:
    """Once the name is known, as soon as the next character cannot be the call's last bracket: as the model writes them."""
    parser, seen = CallParser(TAGS, NAMES), ""
    head, arguments = '<tool_call>\n{"name": "f", "arguments": ', '{"x": [tru, "}{\\""],  "y": {}}'
    assert [event for piece in head for event in parser.push(piece)] == []
    assert parser.push("{") == [CallStart("f"), CallArguments("{")]
    for character in arguments[1:]:
        (event,) = parser.push(character)
        seen += event.text
    assert "{" + seen == arguments
    assert parser.push("}\n</tool_call>") + parser.flush() == []
    cut_short = '<tool_call>{"name": "f", "arguments": {"x": '
    assert parsed(TAGS, cut_short) == [ToolCall("f", '{"x": ')]


@pytest.mark.parametrize(
    "fields", ['"arguments": {"a": 1}, "name": "f"', '"type": "function", "name": "f", "parameters": {"a": 1}']
)
@pytest.mark.parametrize(
    ("style", "written"), [(TAGS, "<tool_call>{%s}</tool_call>"), (WHOLE, " {%s}"), (LIST, "[TOOL_CALLS][{%s}]")]
)
def test_a_call_in_another_order(style: CallStyle, written: str, fields: str) -> None:
    assert parsed(style, written % fields) == [ToolCall("f", '{"a": 1}')]


def test_calls_in_a_list() -> None:
    text = 'Yes. [TOOL_CALLS] [{"name": "f", "arguments": {"a": "]"}, "id": "a}"}, {"name": "g", "arguments": {}}]\nDone, [1, 2].'
    assert parsed(LIST, text) == ["Yes.", ToolCall("f", '{"a": "]"}'), ToolCall("g", "{}"), "Done, [1, 2]."]
    unknown = '[TOOL_CALLS] [{"name": "f", "arguments": {}}, {"name": "h", "arguments": {}}]'
    assert parsed(LIST, unknown) == [ToolCall("f", "{}"), ', {"name": "h", "arguments": {}}]']
    assert parsed(LIST, "[TOOL_CALLS] [1]") == ["[TOOL_CALLS] [1]"]


@pytest.mark.parametrize(
    "text", ['{"name": "f", "parameters": {"a": "ü"}}', ' \n{"name": "f", "parameters": {"a": "ü"}} ']
)
def test_an_answer_that_is_a_call_as_a_whole(text: str) -> None:
    assert parsed(WHOLE, list(text)) == parsed(WHOLE, [text]) == [ToolCall("f", '{"a": "ü"}')]


@pytest.mark.parametrize("text", ["plain {text}", '{"name": "x", "parameters": {}}', "{broken", "", " "])
def test_an_answer_that_is_no_call_as_a_whole(text: str) -> None:
    assert "".join(map(str, parsed(WHOLE, list(text)))) == text


@pytest.mark.parametrize(
    ("style", "several"), [(TAGS, True), (TAGS, False), (WHOLE, True), (LIST, True), (LIST, False)]
)
def test_every_way_through_the_grammar_is_calls(tiny_checkpoint: Checkpoint, style, several: bool) -> None:
    """Of any of the functions; references of a schema point into it, also where several are together."""
    grammars, rng, seen, most = Grammars(tiny_checkpoint.tokenizer), random.Random(3), set(), 0
    grammar = call_grammar([tool["function"] for tool in TOOLS], style, several=several)
    for _ in range(30):
        events = parsed(style, [walk(grammars, grammar, tiny_checkpoint.tokenizer, rng)])
        assert events and all(isinstance(event, ToolCall) for event in events)
        for call in events:
            arguments = json.loads(call.arguments)
            assert arguments == {} if call.name == "g" else arguments in ({"p": [1, 2]}, {"p": [3, 4]})
        seen |= {(event.name, json.dumps(json.loads(event.arguments))) for event in events}
        most = max(most, len(events))
    assert len(seen) == 3 and (most > 1) == (several and style is not WHOLE)


CALLS = {
    TAGS: '<tool_call>\n{"name": "f", "arguments": {"p": [1, 2]}}\n</tool_call>',
    WHOLE: '{"name": "f", "parameters": {"p": [1, 2]}}',
    LIST: '[TOOL_CALLS] [{"name": "f", "arguments": {"p": [1, 2]}}, {"name": "g", "arguments": {}}]',
}


@pytest.mark.parametrize(("style", "open_id"), [(TAGS, None), (WHOLE, None), (LIST, 259), (LIST, None)])
def test_strict_functions_leave_all_texts_but_calls_that_do_not_match(style: CallStyle, open_id: int | None) -> None:
    fast = byte_tokenizer()
    if open_id is not None:
        fast.add_special_tokens([AddedToken(LIST.open, special=True, normalized=False)])
    tokenizer = Tokenizer(fast, frozenset({258}), None, {}, 259 + (open_id is not None))
    grammar = call_grammar([tool["function"] for tool in TOOLS], style, several=True, text=True, open_id=open_id)
    grammars, call = Grammars(tokenizer), CALLS[style]

    def possible(text: str) -> int:
        """Characters that may be written; all of them, if the answer may end there."""
        matcher = grammars.matcher(grammar)
        for place, token in enumerate((*tokenizer.encode(text), 258)):
            if token not in set_bits(matcher.compute_bitmask()):
                return len(tokenizer.decode(tokenizer.encode(text)[:place], skip_special=False))
            matcher.consume_token(token)
        return len(text)

    whole = [
        "",
        "hello",
        "a { b",
        call,
        call.replace("[1, 2]", "[3, 4]"),
        call.replace(" [1, 2]", "[1 ,2]"),
        "<tool",
        "[TOOL",
    ]
    if style is not WHOLE:
        whole += [f"so\n{call}", f"so {call}\n", f"so {call} and {call}"]
    for text in whole:
        assert possible(text) == len(text), text
    for wrong, kept in (("[1, 2]", "[1, 3]"), ('"f"', '"h"'), ('{"p": [1, 2]}', "{}"), ('"name"', '"nam"')):
        text = call.replace(wrong, kept, 1)
        assert possible(text) < len(text) - 1, text
        assert text.startswith(call[: possible(text)])


HERMES = (
    "{% if tools %}{{ '<|im_start|>system\n' }}{% for t in tools %}{{ t | tojson }}\n{% endfor %}<tool_call></tool_call>"
    "{{ '<|im_end|>\n' }}{% endif %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.name }} {{ c.function.arguments | tojson(indent=2) }}</tool_call>"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TURN = [
    {"role": "user", "content": "draw <b>"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": {"z": "<ü>", "a": 1}}}],
    },
    {"role": "tool", "tool_call_id": "1", "content": "done"},
]


def with_template(template: str) -> Tokenizer:
    return Tokenizer(byte_tokenizer(), frozenset({258}), template, {"bos_token": "", "eos_token": ""}, 259)


def test_a_template_that_knows_tools_gets_them_as_in_transformers() -> None:
    from transformers import PreTrainedTokenizerFast

    reference = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer(), chat_template=HERMES)
    expected = reference.apply_chat_template(TURN, tools=TOOLS, add_generation_prompt=True, tokenize=False)
    assert with_template(HERMES).render_chat(TURN, TOOLS) == expected
    assert '"name": "f", "description": "Draws."' in expected and "<ü>" in expected
    assert (style_of(HERMES), style_of(None)) == (TAGS, TAGS)
    assert style_of("""'{"name": "' + name + '", "parameters": '""") == WHOLE
    assert style_of("{{ '[TOOL_CALLS] [' }}") == LIST


def test_a_template_that_knows_no_tools_gets_them_in_words() -> None:
    told = with_template(TEMPLATE).render_chat([{"role": "system", "content": "Be brief."}, *TURN], TOOLS)
    assert told.startswith("<|im_start|>system\nBe brief.\n\nYou can call these functions")
    for tool in TOOLS:
        assert json.dumps(tool) in told
    assert '<|im_start|>assistant\n<tool_call>\n{"name": "f", "arguments": {"z": "<ü>", "a": 1}}\n</tool_call>' in told
    assert told.endswith("user\n<tool_response>\ndone\n</tool_response><|im_end|>\n<|im_start|>assistant\n")
    assert with_template(TEMPLATE).render_chat(USER) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert told_in_words(USER, ()) == USER


class ScriptRunner:
    """Writes one text, whatever it is asked, then ends; where a grammar decides, anything that it allows."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.text = ""

    def launch(self, batch: Batch) -> Callable[[], StepOutput]:
        output = StepOutput(tuple((SampledToken(self._next(item)),) for item in batch.sampled))
        return lambda: output

    def _next(self, item: BatchItem) -> int:
        if item.allowed is not None:
            return random.Random(f"{item.params.seed} {item.draw}").choice(set_bits(item.allowed))
        return (*self._tokenizer.encode(self.text), *self._tokenizer.eos_ids)[item.draw]


@pytest.fixture(scope="module")
def script(tiny_checkpoint: Checkpoint) -> ScriptRunner:
    return ScriptRunner(tiny_checkpoint.tokenizer)


@pytest.fixture(scope="module")
def scripted(script: ScriptRunner, tiny_checkpoint: Checkpoint) -> Iterator[LiveServer]:
    with serve(script, tiny_checkpoint, dataclasses.replace(CONFIG, num_pages=800, max_model_len=3000)) as live:
        yield live


def final(client: openai.OpenAI, **params):
    """Streamed, and put together by OpenAI's own client."""
    with client.chat.completions.stream(model=MODEL, messages=USER, **params) as stream:
        return stream.get_final_completion().choices[0]


def test_calls_of_a_free_answer(scripted: LiveServer, script: ScriptRunner) -> None:
    script.text = f"I draw.\n{tagged('f', {'p': [1, 2]})}\n{tagged('g', {})}"
    with scripted.client() as client:
        whole = client.chat.completions.create(model=MODEL, messages=USER, tools=TOOLS).choices[0]
        for choice in (whole, final(client, tools=TOOLS)):
            assert (choice.finish_reason, choice.message.content) == ("tool_calls", "I draw.")
            calls = choice.message.tool_calls
            assert [(c.type, c.function.name, json.loads(c.function.arguments)) for c in calls] == [
                ("function", "f", {"p": [1, 2]}),
                ("function", "g", {}),
            ]
            assert len({c.id for c in calls}) == 2
        streamed = final(client, tools=TOOLS)
        script.text = "Drawn."
        for message in (whole.message, streamed.message):  # answers come back as the client has them
            history = [*USER, message, {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "done"}]
            reply = client.chat.completions.create(model=MODEL, messages=history, tools=TOOLS)
            assert reply.choices[0].message.content == "Drawn."
        script.text = tagged("g", {})
        for more in ({}, {"tools": TOOLS, "tool_choice": "none"}):  # who offers no tools gets text
            choice = client.chat.completions.create(model=MODEL, messages=USER, **more).choices[0]
            assert (choice.finish_reason, choice.message.content) == ("stop", script.text)
            assert choice.message.tool_calls is None
    scripted.check_idle()


def test_calls_as_chunks(scripted: LiveServer, script: ScriptRunner) -> None:
    """First who is called, then the arguments in pieces, none of them before its call; text is never repeated."""
    arguments = '{"p": [1, 2],  "q": "ü"}'
    script.text = f'I draw.\n<tool_call>\n{{"name": "f", "arguments": {arguments}}}\n</tool_call>\n{tagged("g", {})}'
    scripted.runner.delay = 0.005
    with scripted.client() as client:
        content, calls, reasons = "", list[list[str]](), list[str | None]()
        for chunk in client.chat.completions.create(model=MODEL, messages=USER, tools=TOOLS, stream=True):
            (choice,) = chunk.choices
            content += choice.delta.content or ""
            reasons.append(choice.finish_reason)
            for call in choice.delta.tool_calls or []:
                if call.index == len(calls):
                    assert call.id and call.type == "function"
                    calls.append([call.function.name])
                else:
                    assert call.index == len(calls) - 1 and (call.id, call.function.name) == (None, None)
                calls[-1].append(call.function.arguments)
        assert reasons == [None] * (len(reasons) - 1) + ["tool_calls"] and content == "I draw."
        assert [(name, "".join(pieces)) for name, *pieces in calls] == [("f", arguments), ("g", "{}")]
        assert len(calls[0]) > 3  # or the reader is many times slower than the engine
        scripted.runner.delay = 0.0
        single = {"tools": TOOLS, "parallel_tool_calls": False}
        whole = client.chat.completions.create(model=MODEL, messages=USER, **single).choices[0]
        for choice in (whole, final(client, **single)):
            assert [call.function.name for call in choice.message.tool_calls] == ["f"]
        size = len('I draw.\n<tool_call>\n{"name": "f", "arguments": {"p": [1')
        short = client.chat.completions.create(model=MODEL, messages=USER, max_tokens=size, **single).choices[0]
        assert (short.finish_reason, short.message.tool_calls[0].function.arguments) == ("length", '{"p": [1')
    scripted.check_idle()


LISTS = (
    "{% for m in messages %}{{ m.role + ': ' }}{% for c in m.tool_calls or [] %}{% if c.id | length != 9 %}"
    "{{ raise_exception('ids have nine characters') }}{% endif %}[TOOL_CALLS] [{{ c.function | tojson }}]{% endfor %}"
    "{{ m.content }}{% endfor %}{{ tools | length if tools }}"
)


def test_calls_behind_a_special_token(tiny_checkpoint: Checkpoint) -> None:
    """A list of calls behind a token that texts do not show; what has been called goes into the next prompt."""
    fast = byte_tokenizer()
    fast.add_special_tokens([AddedToken(LIST.open, special=True, normalized=False)])
    tokenizer = Tokenizer(fast, frozenset({258}), LISTS, {}, 260)
    script = ScriptRunner(tokenizer)
    script.text = 'Yes.[TOOL_CALLS] [{"name": "f", "arguments": {"p": [1, 2]}}, {"name": "g", "arguments": {}}]'
    checkpoint = dataclasses.replace(tiny_checkpoint, tokenizer=tokenizer)
    config = dataclasses.replace(CONFIG, num_pages=800, max_model_len=3000)
    with serve(script, checkpoint, config) as server, server.client() as client:
        params = {"model": MODEL, "messages": USER, "tools": TOOLS}
        for choice in (client.chat.completions.create(**params).choices[0], final(client, tools=TOOLS)):
            assert (choice.finish_reason, choice.message.content) == ("tool_calls", "Yes.")
            calls = [(call.function.name, json.loads(call.function.arguments)) for call in choice.message.tool_calls]
            assert calls == [("f", {"p": [1, 2]}), ("g", {})]
            history = [*USER, choice.message, {"role": "tool", "tool_call_id": "x", "content": "done"}]
            client.chat.completions.create(model=MODEL, messages=history, tools=TOOLS)
        plain = client.chat.completions.create(model=MODEL, messages=USER).choices[0]
        assert plain.message.content == script.text.replace("[TOOL_CALLS]", "")
        found = list[str]()
        for seed in range(4):  # what a grammar wants begins with the token
            required = params | {"tool_choice": "required", "seed": seed}
            reply = client.chat.completions.create(**required, logprobs=False).choices[0]
            found += [call.function.name for call in reply.message.tool_calls]
            assert reply.finish_reason == "tool_calls" and reply.message.content is None
        assert set(found) == {"f", "g"} and len(found) > 4
        server.check_idle()
    grammar = call_grammar([TOOLS[1]["function"]], LIST, several=False, open_id=259)
    assert set_bits(Grammars(tokenizer).matcher(grammar).compute_bitmask()) == [259]


def test_strict_functions(scripted: LiveServer, script: ScriptRunner) -> None:
    """One that is strict is enough: a grammar decides. Without any the model may write what it likes."""
    script.text = '<tool_call>{"name": "f", "arguments": {"q": 1}}</tool_call>'

    def ask(name: str, **function: object) -> openai.types.chat.chat_completion.Choice:
        tools = [*TOOLS, {"type": "function", "function": {"name": name} | function}]
        return client.chat.completions.create(model=MODEL, messages=USER, tools=tools, seed=1, max_tokens=70).choices[0]

    with scripted.client() as client:
        for strict in (None, False):
            (call,) = ask("h", strict=strict).message.tool_calls
            assert call.function.arguments == '{"q": 1}'
        assert ask("h", strict=True).message.content not in ("", script.text)
        with pytest.raises(openai.BadRequestError, match="the grammar cannot be used: "):
            ask("h", strict=True, parameters={"type": "odd"})
        assert ask("h", parameters={"type": "odd"}).message.tool_calls
    scripted.check_idle()


def test_calls_that_are_required(scripted: LiveServer) -> None:
    named = {"type": "function", "function": {"name": "g"}}
    with scripted.client() as client:
        for seed in range(3):
            params = {"messages": USER, "tools": TOOLS, "seed": seed, "model": MODEL}
            whole = client.chat.completions.create(**params, tool_choice=named, n=2, parallel_tool_calls=False)
            for choice in whole.choices:
                (call,) = choice.message.tool_calls
                assert (call.function.name, json.loads(call.function.arguments)) == ("g", {})
                assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
            streamed = final(client, tools=TOOLS, tool_choice="required", seed=seed)
            assert streamed.finish_reason == "tool_calls" and not streamed.message.content
            for call in streamed.message.tool_calls:
                assert json.loads(call.function.arguments) in ({}, {"p": [1, 2]}, {"p": [3, 4]})
            cut = client.chat.completions.create(**params, tool_choice=named, max_tokens=9).choices[0]
            assert cut.finish_reason == "length" and tagged("g", {}).startswith(cut.message.content)
    scripted.check_idle()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tool_choice": "required"}, "tool_choice wants a call of 'a tool', but tools has []"),
        (
            {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "h"}}},
            "tool_choice wants a call of 'h', but tools has ['f', 'g']",
        ),
        (
            {"tools": TOOLS, "response_format": {"type": "json_object"}},
            "the answer must match a grammar and may be a call of a tool; give tool_choice = 'none' or no grammar",
        ),
        (
            {"tools": [TOOLS[1], {"type": "function", "function": {"name": "f", "parameters": {"type": "odd"}}}],
             "tool_choice": "required"},
            "the grammar cannot be used: ",
        ),
        (
            {"messages": [*USER, {"role": "assistant", "content": None}]},
            "a message of the role 'assistant' has neither content nor tool_calls",
        ),
        (
            {"messages": [{"role": "user", "content": "x", "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]}]},
            "a message of the role 'user' has tool_calls, but only 'assistant' calls",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{"}}]}]},
            "the arguments of a call of 'f' are not valid JSON: ",
        ),
    ],
)  # fmt: skip
def test_refusals(tiny_server: LiveServer, fields: dict[str, object], message: str) -> None:
    reply = httpx.post(f"{tiny_server.url}/v1/chat/completions", json={"model": MODEL, "messages": USER} | fields)
    assert reply.status_code == 400 and reply.json()["error"]["message"].startswith(message)
