"""What conversations are made of in the bodies of requests: messages, calls in them, and the tools that can be called."""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from serving.errors import RequestError


class Closed(BaseModel):
    """Has no other fields, and nothing is converted."""

    model_config = ConfigDict(extra="forbid", strict=True)


class TextPart(Closed):
    type: Literal["text"]
    text: str


class FunctionCall(Closed):
    """parsed_arguments: what OpenAI's client adds to `arguments` when it has read them from a stream."""

    name: str
    arguments: str
    parsed_arguments: Any = None

    def for_template(self) -> dict[str, Any]:
        """Templates write the arguments themselves, and want them as an object."""
        try:
            arguments = json.loads(self.arguments)
        except (ValueError, RecursionError) as error:
            raise RequestError(
                f"the arguments of a call of {self.name!r} are not valid JSON: {error}", param="messages"
            ) from error
        return {"name": self.name, "arguments": arguments}


class MessageToolCall(Closed):
    id: str
    type: Literal["function"] = "function"
    index: int | None = None
    function: FunctionCall


class Message(Closed):
    """One of a conversation. What only answers have may come back, as clients send answers as they got them."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[MessageToolCall] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None
    annotations: list[Any] | None = None
    parsed: Any = None
    audio: None = None
    function_call: None = None

    def for_template(self) -> dict[str, Any]:
        """As chat templates expect it; `developer` is OpenAI's newer word for `system`."""
        if self.content is None and not self.tool_calls:
            raise RequestError(
                f"a message of the role {self.role!r} has neither content nor tool_calls", param="messages"
            )
        if self.tool_calls and self.role != "assistant":
            raise RequestError(
                f"a message of the role {self.role!r} has tool_calls, but only 'assistant' calls", param="messages"
            )
        content = "".join(part.text for part in self.content) if isinstance(self.content, list) else self.content
        message = {"role": "system" if self.role == "developer" else self.role, "content": content or ""}
        if self.tool_calls:
            calls = [
                {"id": call.id, "type": call.type, "function": call.function.for_template()} for call in self.tool_calls
            ]
            return message | {"tool_calls": calls}
        return message | self.model_dump(include={"name", "tool_call_id"}, exclude_none=True)


class Function(Closed):
    """parameters: a JSON schema; None for a function without any."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Closed):
    type: Literal["function"]
    function: Function


class NamedFunction(Closed):
    name: str


class NamedTool(Closed):
    type: Literal["function"]
    function: NamedFunction
