"""Text to token ids and back, and chats to prompts.

The algorithm comes from the `tokenizers` library; here is how to build one from a Hugging Face directory, how to render a chat
template, and how to turn a stream of tokens into a stream of text. `gguf_tokenizer` builds one from a GGUF file.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import pre_tokenizers

from serving.errors import RequestError
from serving.tools import Json, told_in_words
from tilus.errors import TilusError

_REPLACEMENT = "\ufffd"
_FEW = 2  # tokens, whose text is remembered: of an answer's last two, and of each token that can be a piece
_KEPT = 2**13  # such texts, those asked for last: a server that has run for days is not larger than one that starts
_BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")  # SentencePiece's
# What byte-level vocabularies write bytes as: those that print as themselves, the others as what follows in Unicode.
_SYMBOLS = sorted(pre_tokenizers.ByteLevel.alphabet())
_BYTES = dict(zip(_SYMBOLS, sorted(range(256), key=lambda byte: (chr(byte) not in _SYMBOLS, byte))))


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _tojson(value: object, ensure_ascii: bool = False, indent: int | None = None, sort_keys: bool = False) -> str:
    """As templates expect it: jinja's own escapes what HTML reserves, and sorts."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, sort_keys=sort_keys)


@dataclass(frozen=True)
class TemplateOptions:
    """How a chat template is rendered. starts_answer: whether the prompt ends with the beginning of an answer. continues_final:
    whether it ends with the last message instead, of which the answer is the continuation. variables: more that it may ask for.
    """

    starts_answer: bool = True
    continues_final: bool = False
    variables: Mapping[str, Any] = field(default_factory=dict[str, Any])


_DEFAULT = TemplateOptions()


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A model's vocabulary and chat template.

    eos_ids: tokens that end an answer. special: the template's variables bos_token and eos_token.
    """

    fast: FastTokenizer
    eos_ids: frozenset[int]
    chat_template: str | None
    special: Mapping[str, str]
    vocab_size: int

    def encode(self, text: str, add_special_tokens: bool = True) -> tuple[int, ...]:
        """Token ids of a plain prompt, with the tokens that the model wants around it (such as bos)."""
        return self._ids(text, "prompt", add_special_tokens=add_special_tokens)

    def encode_chat(
        self, messages: Sequence[Json], tools: Sequence[Json] = (), options: TemplateOptions = _DEFAULT
    ) -> tuple[int, ...]:
        """Token ids of a conversation (role, content, tool_calls with arguments as objects) and of the tools that the model may
        call, in OpenAI's form, up to where the assistant's answer starts.

        Raises RequestError when the model has no chat template, or its template refuses the messages.
        """
        text = self.render_chat(messages, tools, options)
        return self._ids(text, "messages", add_special_tokens=False)

    def render_chat(
        self, messages: Sequence[Json], tools: Sequence[Json] = (), options: TemplateOptions = _DEFAULT
    ) -> str:
        if self._template is None:
            raise RequestError("this model has no chat template; use /v1/completions", param="messages")
        with_tools = bool(tools) or any(message["role"] == "tool" or "tool_calls" in message for message in messages)
        if with_tools and "tools" not in (self.chat_template or ""):
            messages, tools = told_in_words(messages, tools), ()
        end = uuid.uuid4().hex if options.continues_final else ""
        if end:
            messages = [*messages[:-1], {**messages[-1], "content": messages[-1]["content"] + end}]
        own = {"messages": messages, "tools": list(tools) or None, "add_generation_prompt": options.starts_answer}
        try:
            text = self._template.render({**options.variables, **self.special, **own})
        except Exception as error:  # a template is a program that came with the model: it may raise anything
            raise RequestError(f"the model's chat template refuses the messages: {error}", param="messages") from error
        if end and text.count(end) != 1:
            shown = f"shows the last message {text.count(end)} times, but must once for continue_final_message"
            raise RequestError(f"the model's chat template {shown}", param="continue_final_message")
        return text.partition(end)[0] if end else text

    def _ids(self, text: str, param: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON can write half of a surrogate pair
            raise RequestError(
                f"{param} is not valid Unicode: character {error.start} is half of a surrogate pair", param=param
            ) from error
        return tuple(self.fast.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of token ids, without special tokens unless asked; bytes that are not UTF-8 become U+FFFD."""
        if len(ids) <= _FEW:
            return _text(self.fast, tuple(ids), skip_special)
        return self.fast.decode(list(ids), skip_special_tokens=skip_special)

    def token_text(self, token_id: int) -> str:
        """One token as text, special tokens included, as it is behind others: some decoders strip the first space of a text."""
        return _token_text(self.fast, token_id)

    def token_bytes(self, token_id: int) -> bytes:
        """One token in UTF-8, of which it may have only a part of a character."""
        text, symbols = self.token_text(token_id), self.fast.id_to_token(token_id)
        if _REPLACEMENT not in text or symbols is None:
            return text.encode()
        if (found := _BYTE_TOKEN.fullmatch(symbols)) is not None:
            return bytes([int(found[1], 16)])
        return bytes(_BYTES[symbol] for symbol in symbols) if _BYTES.keys() >= {*symbols} else text.encode()

    @cached_property
    def _template(self) -> jinja2.Template | None:
        if self.chat_template is None:
            return None
        # Templates come with model files, which may come from anywhere: no attribute or call outside the sandbox.
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _tojson
        try:
            names = {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
            return environment.from_string(self.chat_template, globals=names)
        except jinja2.TemplateSyntaxError as error:
            raise TilusError(f"the model's chat template is not valid jinja: {error}") from error


@lru_cache(_KEPT)
def _text(fast: FastTokenizer, ids: tuple[int, ...], skip_special: bool) -> str:
    return fast.decode(list(ids), skip_special_tokens=skip_special)


@lru_cache(_KEPT)
def _token_text(fast: FastTokenizer, token_id: int) -> str:
    once, twice = (fast.decode([token_id] * count, skip_special_tokens=False) for count in (1, 2))
    return twice[len(once) :]


class Detokenizer:
    """Tokens to text, piece by piece, never half a character.

    Decoding depends on neighbours (byte tokens form characters, some decoders strip a first space), so the text of a new token is
    what it adds to that of the piece before it. A piece that ends in U+FFFD may end inside a character, and waits.
    Law: the pieces with the final flush make up decode(all tokens).
    """

    def __init__(self, decode: Callable[[tuple[int, ...]], str]) -> None:
        self._decode = decode
        self._window: tuple[int, ...] = ()  # tokens of the last piece, and of what waits behind it
        self._num_shown, self._shown = 0, ""  # of the window, what has been given out

    def push(self, token_id: int) -> str:
        window = (*self._window, token_id)
        piece = self._decode(window)[len(self._shown) :]
        if piece and not piece.endswith(_REPLACEMENT):
            self._window = window[self._num_shown :]
            self._num_shown, self._shown = len(self._window), self._decode(self._window)
            return piece
        # An invisible token (a special one) is forgotten: or a run of them would make the window grow. Not a first space, which
        # would show behind another one.
        if (piece or not self._num_shown) and self._decode((token_id, token_id)):
            self._window = window
        return ""

    def flush(self) -> str:
        """What still waits, when the output ends: half a character shows as U+FFFD."""
        return self._decode(self._window)[len(self._shown) :]


def from_huggingface(directory: Path) -> Tokenizer:
    """The tokenizer of a Hugging Face directory: tokenizer.json, and what the other files say about chats and ends."""
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise TilusError(
            f"{directory} has no tokenizer.json, the only tokenizer format that is supported",
            hint="save it with AutoTokenizer.from_pretrained(...).save_pretrained(...)",
        )
    fast = FastTokenizer.from_file(str(path))
    fast.no_truncation()
    fast.no_padding()
    settings = read_json(directory / "tokenizer_config.json")
    special = {
        name: str(value["content"] if isinstance(value, dict) else value)
        for name in ("bos_token", "eos_token")
        if (value := settings.get(name)) is not None
    }
    template_file = directory / "chat_template.jinja"
    template = template_file.read_text(encoding="utf-8") if template_file.is_file() else settings.get("chat_template")
    return Tokenizer(
        fast=fast,
        eos_ids=_eos_ids(directory, fast, special),
        chat_template=template,
        special=special,
        vocab_size=fast.get_vocab_size(),
    )


def _eos_ids(directory: Path, fast: FastTokenizer, special: Mapping[str, str]) -> frozenset[int]:
    """Ends of an answer: generation_config.json, else config.json, else the tokenizer's own eos token."""
    for name in ("generation_config.json", "config.json"):
        found = read_json(directory / name).get("eos_token_id")
        if found is not None:
            return frozenset(found if isinstance(found, list) else [found])
    token_id = fast.token_to_id(special["eos_token"]) if "eos_token" in special else None
    if token_id is None:
        raise TilusError(
            f"{directory}: neither generation_config.json nor config.json has an eos_token_id, and the tokenizer names "
            "no eos_token, but one of the three must say where answers end"
        )
    return frozenset({token_id})


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty when there is no such file."""
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TilusError(f"{path} is not valid JSON: {error}") from error
