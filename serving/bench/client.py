"""Requests to the server under test, over as many connections as there are requests at a time."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import aiohttp

from tilus.errors import TilusError

_IDLE = (
    2.0  # seconds after which a connection is not used again: servers close them, uvicorn after 5, perhaps just then
)


class ConnectionFailed(Exception):
    """No connection, or it broke, or what came over it is not HTTP/1.1."""


class HttpClient:
    """One server, by its URL. Belongs to the event loop that runs when it is made."""

    def __init__(self, url: str, api_key: str | None = None, connector: aiohttp.BaseConnector | None = None) -> None:
        """connector: where connections come from, if not from the URL. Raises TilusError when that is none of a server."""
        self.url = url
        self._base = base_url(url)
        self._session = aiohttp.ClientSession(
            connector=connector or aiohttp.TCPConnector(limit=0, keepalive_timeout=_IDLE),
            headers={"Content-Type": "application/json", "User-Agent": "tilus-bench", "Accept-Encoding": "identity"}
            | ({"Authorization": f"Bearer {api_key}"} if api_key else {}),
            cookie_jar=aiohttp.DummyCookieJar(),  # requests are those of many users
            timeout=aiohttp.ClientTimeout(),  # none: it is part of what is measured, see `Exchange`
        )

    @asynccontextmanager
    async def request(
        self, method: str, path: str, body: bytes | None = None
    ) -> AsyncGenerator[aiohttp.ClientResponse]:
        """The answer, from its headers on. Raises ConnectionFailed, also inside of the block."""
        try:
            async with self._session.request(method, self._base + path, data=body, allow_redirects=False) as reply:
                yield reply
        except aiohttp.ClientError as error:
            raise ConnectionFailed(_reason(error)) from error

    async def close(self) -> None:
        await self._session.close()


def base_url(url: str) -> str:
    """What stands before the paths of all requests.

    Raises: TilusError when the URL is not `http[s]://host[:port][/prefix]`, where a prefix of `/v1` does not count.
    """
    hint = "it is like http://127.0.0.1:8000"
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:
        raise TilusError(f"{url!r} is no address: {error}", hint=hint) from None
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise TilusError(f"{url!r} is no address of a server", hint=hint)
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/').removesuffix('/v1')}"


def _reason(error: aiohttp.ClientError) -> str:
    """What aiohttp found, in words for a report."""
    if isinstance(error, aiohttp.ServerDisconnectedError):
        return "the server closed the connection without an answer"
    if isinstance(error, aiohttp.ClientPayloadError):
        return "the server closed the connection before the end of its answer"
    if isinstance(error, aiohttp.ClientResponseError):
        return f"the answer is not HTTP/1.1: {error.message.splitlines()[0].rstrip(':')}"  # the next ones show where
    return (isinstance(error, OSError) and error.strerror) or str(error)
