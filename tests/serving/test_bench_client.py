"""The client of the load generator: addresses, what is sent, connections that are used again, and answers that are none."""

from __future__ import annotations

import asyncio

import pytest
from scripted_server import Answer, ScriptedServer, client_of
from virtual_time import run_virtually

from serving.bench.client import ConnectionFailed, HttpClient, base_url
from tilus.errors import TilusError


@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("http://there/v1/", "http://there"),
        ("https://api.there/some/path/v1", "https://api.there/some/path"),
        ("http://[::1]:9", "http://[::1]:9"),
    ],
)
def test_addresses(url: str, base: str) -> None:
    assert base_url(url) == base


@pytest.mark.parametrize("url", ["there:80", "ftp://there", "http://", "http://there?a=b", "127.0.0.1"])
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(TilusError) as error:
        base_url(url)
    assert error.value.message == f"{url!r} is no address of a server"
    assert error.value.hint == "it is like http://127.0.0.1:8000"


class RawServer(ScriptedServer):
    """Answers with these bytes, then closes the connection."""

    def __init__(self, raw: bytes) -> None:
        super().__init__(lambda index, body: Answer())
        self._raw = raw

    async def serve_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(self._raw)
        return False


BROKEN = "the server closed the connection before the end of its answer"


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "the server closed the connection without an answer"),
        (b"HTTP/1.1 200 OK\r\n", "the server closed the connection without an answer"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc", BROKEN),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabc", BROKEN),
        (b"SSH-2.0-x\r\n\r\n", "the answer is not HTTP/1.1: Bad status line"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\ndata\r\n", "the answer is not HTTP/1.1: "),
        (b"HTTP/1.1 200 OK\r\nA: " + b"x" * 70_000, "the answer is not HTTP/1.1: Got more than "),
    ],
)
def test_answers_that_are_none(raw: bytes, message: str) -> None:
    async def ask() -> None:
        async with client_of(RawServer(raw)) as http, http.request("GET", "/") as reply:
            await reply.text()

    with pytest.raises(ConnectionFailed) as error:
        run_virtually(ask())
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_as_many_connections_as_requests() -> None:
    """Over TCP, in real time: none is answered before all of them have arrived."""
    count = 150
    arrived = asyncio.Barrier(count)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await arrived.wait()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nConnection: close\r\n\r\nx")
        writer.close()
        await writer.wait_closed()

    async def ask(http: HttpClient) -> str:
        async with http.request("GET", "/") as reply:
            return await reply.text()

    async def ask_all() -> list[str]:
        async with asyncio.timeout(60), await asyncio.start_server(serve, "127.0.0.1", 0, backlog=count) as listener:
            host, port = listener.sockets[0].getsockname()
            http = HttpClient(f"http://{host}:{port}")
            try:
                return await asyncio.gather(*(ask(http) for _ in range(count)))
            finally:
                await http.close()

    assert asyncio.run(ask_all()) == ["x"] * count


def test_connections_are_used_again() -> None:
    async def ask() -> int:
        server = ScriptedServer(lambda index, body: Answer(((0.0, b"x"),)))
        async with client_of(server) as http:
            for _ in range(3):
                async with http.request("POST", "/", b"{}") as reply:
                    assert await reply.text() == "x"
        return server.num_connections

    assert run_virtually(ask()) == 1


def test_an_answer_that_was_left_early_ends_its_connection() -> None:
    async def ask() -> int:
        server = ScriptedServer(lambda index, body: Answer(((0.0, b"x"), (9.0, b"y"))))
        async with client_of(server) as http:
            for _ in range(2):
                async with http.request("POST", "/", b"{}") as reply:
                    assert await reply.content.readany() == b"x"
        return server.num_connections

    assert run_virtually(ask()) == 2


def test_the_answer_of_another_address_is_not_asked_for() -> None:
    """A redirection is an answer as any other: what it leads to is not the server under test."""

    async def ask() -> int:
        server = ScriptedServer(lambda index, body: Answer((), 307, {"location": "/other"}))
        async with client_of(server) as http, http.request("POST", "/", b"{}") as reply:
            assert server.requests == ["POST /"]
            return reply.status

    assert run_virtually(ask()) == 307


@pytest.mark.parametrize("key", ["secret", None])
def test_what_is_sent(key: str | None) -> None:
    """The key if there is one, and no wish for compressed answers, which come in blocks instead of tokens."""

    async def ask() -> ScriptedServer:
        server = ScriptedServer(lambda index, body: Answer())
        async with client_of(server, "http://there:81/x/v1", key) as http:
            async with http.request("GET", "/v1/models") as reply:
                await reply.text()
            async with http.request("POST", "/v1/completions", b'{"a": 1}') as reply:
                await reply.text()
        return server

    server = run_virtually(ask())
    assert server.requests == ["GET /x/v1/models", "POST /x/v1/completions"]
    assert server.bodies == [{}, {"a": 1}]
    for headers in server.headers:
        assert {"Host: there:81", "Content-Type: application/json", "Accept-Encoding: identity"} <= set(headers)
        keys = [line for line in headers if line.startswith("Authorization")]
        assert keys == ([f"Authorization: Bearer {key}"] if key else [])
