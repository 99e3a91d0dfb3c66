"""What every request passes before an endpoint sees it: a limit on its size, and a key where the server has one."""

from __future__ import annotations

import asyncio
import hmac
import json

from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.errors import RequestError

_HEADERS = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}}
_OPEN = frozenset({"/", "/health", "/ping", "/version", "/metrics"})


class BodyLimit:
    """Bodies beyond a size are refused while they arrive, before anything parses them, and so are those that take too long."""

    def __init__(self, app: ASGIApp, max_nbytes: int, seconds: float) -> None:
        self._app = app
        self._max_nbytes = max_nbytes
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        nbytes, is_whole = 0, False
        end = asyncio.get_running_loop().time() + self._seconds

        async def limited() -> Message:
            nonlocal nbytes, is_whole
            try:
                # Behind the body comes nothing but the client's leaving, for which there is no hurry.
                async with asyncio.timeout_at(None if is_whole else end):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, f"the body did not arrive within {self._seconds:g} seconds") from None
            is_whole = not message.get("more_body", False)
            nbytes += len(message.get("body", b""))
            if nbytes > self._max_nbytes:
                raise HTTPException(413, f"the body has more than {self._max_nbytes} bytes")
            return message

        await self._app(scope, limited, send)


class KeyCheck:
    """Requests without the header `Authorization: Bearer KEY` get status 401, but for what tells nothing of anyone's prompts."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app = app
        self._key = key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in _OPEN:
            given = dict(scope["headers"]).get(b"authorization", b"")
            scheme, _, found_key = given.partition(b" ")  # whose letters may be large or small (RFC 9110)
            if scheme.lower() != b"bearer" or not hmac.compare_digest(found_key, self._key):
                found = "another one" if given else "none"
                message = f"this server wants its key in the header 'Authorization: Bearer KEY', but found {found}"
                error = RequestError(message, status=401, code="invalid_api_key")
                await error_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def error_response(error: RequestError) -> Response:
    """OpenAI's error body, escaped as ASCII: what clients sent, and messages quote, may not be encodable."""
    return Response(json.dumps(error.body()), error.status, _HEADERS.get(error.status), "application/json")
