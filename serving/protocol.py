"""The bodies of OpenAI's completion requests: which fields there are, what they mean here, and which are refused.

A field that would change the answer is served or refused, never ignored.
"""

from __future__ import annotations

import json
import random
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from serving.core import MAX_LOGPROBS, Grammar, Request, SamplingParams
from serving.errors import RequestError
from serving.messages import Closed, Message, NamedTool, Tool
from serving.tokenizer import TemplateOptions

MAX_CHOICES = 128
_TokenName = Annotated[int, Field(strict=False)]  # JSON knows only texts as names
_SEEDS = 2**64
_CONTINUE = "continue_final_message"

# Fields that mean the same in SamplingParams, which has their defaults.
_AS_GIVEN = (
    "temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "min_tokens",
    "include_stop_str_in_output", "skip_special_tokens", "ignore_eos",
)  # fmt: skip
# Fields that do not change the answer.
_WITHOUT_EFFECT = frozenset(
    ["metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "prediction"]
)  # fmt: skip
# Fields that are not supported, with the values that ask for nothing, as null does for all.
_ONLY_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "best_of": (1,),
    "suffix": ("",),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "echo": (False,),  # of a chat; those below are vLLM's, with what they are there when nothing is said
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "bad_words": ([],),
    "spaces_between_special_tokens": (True,),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
}


class StreamOptions(Closed):
    """include_usage: in a chunk at the end; with continuous_usage_stats (vLLM's) in all others, too. include_obfuscation: the
    padding, which hides lengths from those who listen in, is never sent.
    """

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


class JsonSchemaFormat(Closed):
    """A named JSON schema. strict: schemas are always enforced; whether they are supported is found when they are compiled."""

    name: str
    description: str | None = None
    json_schema: dict[str, Any] | bool = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Closed):
    """OpenAI's way to ask for JSON."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    def grammar(self) -> Grammar | None:
        if (self.json_schema is not None) != (self.type == "json_schema"):
            raise RequestError(
                "json_schema must be given with type = 'json_schema', and only then", param="response_format"
            )
        if self.json_schema is not None:
            return Grammar("json_schema", json.dumps(self.json_schema.json_schema))
        return Grammar("json_schema", '{"type": "object"}') if self.type == "json_object" else None


class StructuredOutputs(Closed):
    """vLLM's way to ask for what OpenAI has no word for: one of a JSON schema, a regular expression, or some texts."""

    json_schema: dict[str, Any] | str | None = Field(None, alias="json")
    regex: str | None = None
    choice: list[str] | None = Field(None, min_length=1)

    def grammar(self) -> Grammar:
        asked = [value for value in (self.json_schema, self.regex, self.choice) if value is not None]
        if len(asked) != 1:
            found = f"structured_outputs has {len(asked)} of json, regex and choice"
            raise RequestError(f"{found}, but needs one", param="structured_outputs")
        if self.regex is not None:
            return Grammar("regex", self.regex)
        if self.choice is not None:
            return Grammar("lark", "start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in self.choice))
        schema = self.json_schema
        return Grammar("json_schema", schema if isinstance(schema, str) else json.dumps(schema))


class GenerationBody(BaseModel):
    """What chats and plain completions have in common."""

    model_config = ConfigDict(extra="allow", strict=True)
    model: str
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[_TokenName, float] | None = None
    seed: int | None = None
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    stop: str | list[str] | None = None
    include_stop_str_in_output: bool | None = None
    stop_token_ids: list[int] | None = None
    min_tokens: int | None = None
    skip_special_tokens: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    priority: int | None = None
    user: str | None = None

    @property
    def num_choices(self) -> int:
        return 1 if self.n is None else self.n

    def check(self) -> None:
        """Raise RequestError for what pydantic's types cannot say."""
        for name, value in (self.model_extra or {}).items():
            if value is not None and name not in _WITHOUT_EFFECT and value not in _ONLY_NEUTRAL.get(name, ()):
                raise RequestError(f"{name} = {value!r} is not supported by this server", param=name)
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options is only allowed when stream is true", param="stream_options")

    def grammar(self) -> Grammar | None:
        """What the answer must match, if anything."""
        asked = (
            self.response_format and self.response_format.grammar(),
            self.structured_outputs and self.structured_outputs.grammar(),
        )
        if None not in asked:
            raise RequestError(
                "response_format and structured_outputs both say what the answer must match; give one",
                param="structured_outputs",
            )
        return asked[0] or asked[1]

    @abstractmethod
    def own_params(self) -> dict[str, Any]:
        """What endpoints have different words for: max_tokens, logprobs and prompt_logprobs of `SamplingParams`."""

    def request(self, request_id: str, prompt: tuple[int, ...], choice: int, grammar: Grammar | None) -> Request:
        """One of the `n` choices for a prompt: each has a random stream of its own, following from `seed`."""
        seed = random.getrandbits(64) if self.seed is None else self.seed + choice
        params = SamplingParams(
            top_k=0 if self.top_k in (None, -1) else self.top_k,  # vLLM's word for no limit is -1
            logit_bias=tuple((self.logit_bias or {}).items()),
            grammar=grammar,
            seed=seed % _SEEDS,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            **self.own_params(),
            **{name: value for name in _AS_GIVEN if (value := getattr(self, name)) is not None},
        )
        return Request(request_id, prompt, params, self.priority or 0, self.user or "")


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = None
    echo: bool | None = None
    add_special_tokens: bool = True

    def prompts(self) -> list[str | list[int]]:
        """One prompt or several, as text or token ids."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        if not prompt:
            raise RequestError("prompt is an empty list, but must hold at least one prompt", param="prompt")
        if isinstance(prompt[0], int):
            return [[token for token in prompt if isinstance(token, int)]]
        if len(prompt) * self.num_choices > MAX_CHOICES:
            raise RequestError(
                f"{len(prompt)} prompts with n = {self.num_choices} ask for {len(prompt) * self.num_choices} answers, "
                f"but a request may ask for at most {MAX_CHOICES}",
                param="prompt",
            )
        return [item for item in prompt if not isinstance(item, int)]

    @property
    def is_only_prompt(self) -> bool:
        """Whether nothing but the prompt is wanted. A token is drawn then, too, and not told."""
        return bool(self.echo) and self.max_tokens == 0

    def own_params(self) -> dict[str, Any]:
        limit = 16 if self.max_tokens is None else self.max_tokens
        prompt_logprobs = self.logprobs if self.echo else None
        return {
            "max_tokens": 1 if self.is_only_prompt else limit, "logprobs": self.logprobs, "prompt_logprobs": prompt_logprobs
        }  # fmt: skip


class TemplateFields(Closed):
    """What decides how messages are rendered, beside them; most of it as in vLLM."""

    tools: list[Tool] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def offered_tools(self) -> list[dict[str, Any]]:
        """What the model may call, in OpenAI's form."""
        return [tool.model_dump(exclude_none=True) for tool in self.tools or []]

    def template_options(self, messages: Sequence[Message]) -> TemplateOptions:
        final, continues = messages[-1], bool(self.continue_final_message)
        if continues and self.add_generation_prompt:
            raise RequestError("continue_final_message and add_generation_prompt cannot both be true", param=_CONTINUE)
        if continues and (final.role != "assistant" or not final.content or final.tool_calls):
            found = f"{final.role!r} and {len(final.content or '')} characters"
            raise RequestError(f"{_CONTINUE} needs a text of 'assistant' in the end, not {found}", param=_CONTINUE)
        starts = not continues and self.add_generation_prompt is not False
        return TemplateOptions(starts, continues, self.chat_template_kwargs or {})


class ChatBody(TemplateFields, GenerationBody):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None

    def offered_tools(self) -> list[dict[str, Any]]:
        """Nothing with the choice `none`."""
        return [] if self.tool_choice == "none" else super().offered_tools()

    def required_functions(self) -> list[dict[str, Any]]:
        """Those of which the answer must be a call; none where it may be text."""
        functions = [tool["function"] for tool in self.offered_tools()]
        if isinstance(self.tool_choice, NamedTool):
            return [function for function in functions if function["name"] == self.tool_choice.function.name]
        return functions if self.tool_choice == "required" else []

    def strict_functions(self) -> list[dict[str, Any]]:
        """All that are offered, if one of them is strict: then what the model calls must match its schema."""
        functions = [tool["function"] for tool in self.offered_tools()]
        return functions if any(function.get("strict") for function in functions) else []

    def check(self) -> None:
        super().check()
        if self.tool_choice not in (None, "none", "auto") and not self.required_functions():
            names = [tool.function.name for tool in self.tools or []]
            wanted = self.tool_choice.function.name if isinstance(self.tool_choice, NamedTool) else "a tool"
            raise RequestError(f"tool_choice wants a call of {wanted!r}, but tools has {names}", param="tool_choice")
        if self.offered_tools() and self.grammar() is not None:
            raise RequestError(
                "the answer must match a grammar and may be a call of a tool; give tool_choice = 'none' or no grammar",
                param="tool_choice",
            )
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs is only allowed when logprobs is true", param="top_logprobs")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise RequestError(
                f"max_tokens is {self.max_tokens} and max_completion_tokens is {self.max_completion_tokens}, "
                "but they mean the same; give one",
                param="max_tokens",
            )

    def own_params(self) -> dict[str, Any]:
        limit = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return {"max_tokens": limit, "logprobs": (self.top_logprobs or 0) if self.logprobs else None}


class TokenizeBody(TemplateFields):
    """POST /tokenize, as in vLLM: the tokens of a prompt, or of messages as a chat would have them."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = Field(None, min_length=1)
    add_special_tokens: bool = True
    return_token_strs: bool | None = None

    def text(self) -> str | None:
        """Of the prompt; None where there are messages."""
        if (self.prompt is None) == (self.messages is None):
            raise RequestError("give either a prompt or messages", param="prompt")
        return self.prompt


class DetokenizeBody(Closed):
    """POST /detokenize, as in vLLM."""

    model: str | None = None
    tokens: list[int]
