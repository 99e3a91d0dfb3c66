"""Heads of requests: whole ones in whatever pieces, and those that never end."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest
import uvicorn

from serving.http_protocol import MAX_HEAD_NBYTES, HttpProtocol


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Answers with the lengths of the header `x` and of the body."""
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message["body"], message["more_body"]
    told = b"%d %d" % (len(dict(scope["headers"]).get(b"x", b"")), len(body))
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(told))]})
    await send({"type": "http.response.body", "body": told})


@contextlib.asynccontextmanager
async def connection() -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(echo, http=HttpProtocol, log_level="critical", lifespan="off"))
    serving = asyncio.create_task(server.serve([listener]))
    reader, writer = await asyncio.open_connection(*listener.getsockname())
    try:
        yield reader, writer
    finally:
        writer.close()
        server.should_exit = True
        await serving


def request(header: int, body: int) -> bytes:
    return b"POST / HTTP/1.1\r\nhost: t\r\nx: %b\r\ncontent-length: %d\r\n\r\n%b" % (b"h" * header, body, b"b" * body)


@pytest.mark.parametrize("size", [1_000, 50_000, 2**20])
def test_requests_behind_each_other_in_pieces(size: int) -> None:
    """Bodies have no limit here, nor have all heads of a connection together, nor one that comes at once behind a body."""

    async def scenario() -> None:
        async with connection() as (reader, writer):
            pairs = (40_000, 0), (60_000, 300_000), (3, 5)
            data = b"".join(request(*pair) for pair in pairs)
            for begin in range(0, len(data), size):
                writer.write(data[begin : begin + size])
                await writer.drain()
            for pair in pairs:
                answer = await asyncio.wait_for(reader.readuntil(b"%d %d" % pair), 10)
                assert answer.startswith(b"HTTP/1.1 200 OK")

    asyncio.run(scenario())


@pytest.mark.parametrize("start", [b"GET /", b"GET / HTTP/1.1\r\nx: "], ids=["address", "header"])
def test_a_head_that_does_not_end_is_refused(start: bytes) -> None:
    async def scenario() -> None:
        async with connection() as (reader, writer):
            writer.write(start)
            await asyncio.sleep(0.05)  # the server, in the same loop, has read it
            for _ in range(MAX_HEAD_NBYTES // 4096 + 2):
                writer.write(b"a" * 4096)
                await writer.drain()
            answer = await asyncio.wait_for(reader.read(), 10)
            assert answer.startswith(b"HTTP/1.1 400 Bad Request")
            assert answer.endswith(b"the request line and headers have more than 65536 bytes")

    asyncio.run(scenario())
