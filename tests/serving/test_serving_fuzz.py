"""Requests made up from the OpenAPI document: none makes the server fail, and all answers are as the document says."""

from __future__ import annotations

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from live_server import MODEL, LiveServer
from pydantic import TypeAdapter
from test_serving_tools import TOOLS

from serving import schemas

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}
COMPLETION = {"model": MODEL, "prompt": ["a", "b"], "max_tokens": 5}
VALID = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": COMPLETION,
    "/tokenize": {"model": MODEL, "messages": CHAT["messages"]},
    "/detokenize": {"model": MODEL, "tokens": [1]},
}


@pytest.mark.exhaustive
def test_nothing_made_up_from_the_document_breaks_the_server(any_token_server: LiveServer) -> None:
    """Bodies that fit the document and bodies that do not, also with the name of the model, without which none gets far."""
    import schemathesis
    from schemathesis import GenerationMode, checks

    asked = (
        checks.not_a_server_error,
        checks.status_code_conformance,
        checks.content_type_conformance,
        checks.response_schema_conformance,
    )
    schema = schemathesis.openapi.from_url(f"{any_token_server.url}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    statuses: dict[str, set[int]] = {operation.path: set() for operation in operations}
    for operation in operations:
        if operation.path in VALID:  # what is made up is hardly ever right, of a chat's messages
            case = operation.Case(body=VALID[operation.path], media_type="application/json")
            response = case.call(timeout=60)
            assert response.status_code == 200, response.text
            case.validate_response(response, checks=asked)
        for mode in list(GenerationMode) if operation.body else [GenerationMode.POSITIVE]:

            @given(case=operation.as_strategy(generation_mode=mode))
            @settings(
                max_examples=100, derandomize=True, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
            )
            def run(case) -> None:
                has_name, in_path = isinstance(case.body, dict), bool(case.path_parameters)
                for name in [None, MODEL] if has_name or in_path else [None]:
                    if name is not None and has_name:
                        case.body = case.body | {"model": name}
                    if name is not None and in_path:
                        case.path_parameters = {"name": name}
                    response = case.call(timeout=60)
                    statuses[case.operation.path].add(response.status_code)
                    case.validate_response(response, checks=asked)

            run()
    assert VALID.keys() == {operation.path for operation in operations if operation.body}
    answered = [path for path in statuses if path in VALID or 200 in statuses[path]]
    assert len(operations) == len(answered) == 10, statuses
    any_token_server.check_idle()


NAMED = {"type": "function", "function": {"name": "g"}}


@pytest.mark.parametrize(
    ("path", "body", "kind"),
    [
        ("v1/completions", COMPLETION, schemas.Completion),
        ("v1/completions", COMPLETION | {"logprobs": 2, "n": 2}, schemas.Completion),
        ("v1/completions", COMPLETION | {"echo": True, "min_tokens": 2, "stop_token_ids": [3]}, schemas.Completion),
        ("v1/chat/completions", CHAT, schemas.ChatCompletion),
        ("v1/chat/completions", CHAT | {"logprobs": True, "top_logprobs": 2, "stop": "a"}, schemas.ChatCompletion),
        ("v1/chat/completions", CHAT | {"tools": TOOLS[1:], "tool_choice": NAMED, "messages": CHAT["messages"] * 3},
         schemas.ErrorBody),
        ("v1/chat/completions", CHAT | {"tools": [NAMED], "max_tokens": 100, "tool_choice": NAMED}, schemas.ErrorBody),
        ("v1/completions", COMPLETION | {"typo": 1}, schemas.ErrorBody),
        ("tokenize", {"prompt": "a", "return_token_strs": True}, schemas.Tokenized),
        ("detokenize", {"tokens": [1]}, schemas.Detokenized),
        ("v1/models", None, schemas.ModelList),
        (f"v1/models/{MODEL}", None, schemas.ModelCard),
        ("health", None, schemas.Health),
        ("version", None, schemas.Version),
    ],
)  # fmt: skip
def test_answers_are_as_the_document_says(
    any_token_server: LiveServer, path: str, body: dict | None, kind: type
) -> None:
    reply = httpx.request("GET" if body is None else "POST", f"{any_token_server.url}/{path}", json=body)
    assert (reply.status_code == 400) == (kind is schemas.ErrorBody), reply.text
    TypeAdapter(kind).validate_python(reply.json(), strict=True)
