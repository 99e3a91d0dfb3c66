"""The HTTP client of the load generator: frames of bodies, connections that are used again, and answers that are none."""

from __future__ import annotations

import asyncio
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted_server import Answer, ScriptedServer, client_of
from virtual_time import run_virtually

from serving.bench.http_client import Address, Body, ConnectionFailed, HttpClient, Streams
from tilus.errors import TilusError

CHUNKED = {"transfer-encoding": "chunked"}


def fed(body: Body, data: bytes, cuts: list[int]) -> bytes:
    """What the body makes of the data in pieces of these sizes, in turn."""
    found, turn = b"", 0
    while data:
        assert not body.is_complete
        size = cuts[turn % len(cuts)]
        found += body.feed(data[:size])
        data, turn = data[size:], turn + 1
    return found


cuts = st.lists(st.integers(1, 9), min_size=1, max_size=5)


@given(st.lists(st.binary(min_size=1, max_size=40), max_size=5), cuts, st.sampled_from([b"", b";a=b"]), st.booleans())
def test_chunks_however_they_are_cut(parts: list[bytes], cuts: list[int], extension: bytes, trailer: bool) -> None:
    frames = b"".join(b"%X%b\r\n%b\r\n" % (len(part), extension, part) for part in parts)
    body = Body(CHUNKED)
    assert fed(body, frames + b"0\r\n" + (b"Name: value\r\n" if trailer else b"") + b"\r\n", cuts) == b"".join(parts)
    assert body.is_complete


@given(st.binary(max_size=60), cuts)
def test_bodies_of_known_length_and_those_that_end_with_the_connection(data: bytes, cuts: list[int]) -> None:
    known, unknown = Body({"content-length": str(len(data))}), Body({})
    assert fed(known, data, cuts) == data and known.is_complete
    assert fed(unknown, data, cuts) == data and not unknown.is_complete
    assert unknown.feed(b"") == b"" and unknown.is_complete


@given(st.integers(0, 30))
def test_a_connection_that_ends_too_early_is_noticed(length: int) -> None:
    frames = b"5\r\n12345\r\n6\r\n123456\r\n0\r\n\r\n"
    for body, data in (
        (Body(CHUNKED), frames[: min(length, len(frames) - 1)]),
        (Body({"content-length": "31"}), b"x" * length),
    ):
        if data:
            body.feed(data)
        with pytest.raises(ConnectionFailed, match="before the end of its answer"):
            body.feed(b"")


def test_a_chunk_without_a_size() -> None:
    with pytest.raises(ConnectionFailed, match="a chunk of the answer begins with b'data', which is no size"):
        Body(CHUNKED).feed(b"data\r\n")


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("http://127.0.0.1:8000", Address("127.0.0.1", 8000, False, "")),
        ("http://there/v1/", Address("there", 80, False, "")),
        ("https://api.there/some/path/v1", Address("api.there", 443, True, "/some/path")),
        ("http://[::1]:9", Address("::1", 9, False, "")),
    ],
)
def test_addresses(url: str, address: Address) -> None:
    assert Address.parse(url) == address


@pytest.mark.parametrize("url", ["there:80", "ftp://there", "http://", "http://there?a=b", "127.0.0.1"])
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(TilusError) as error:
        Address.parse(url)
    assert error.value.message == f"{url!r} is no address of a server"
    assert error.value.hint == "it is like http://127.0.0.1:8000"


def answered(raw: bytes, *, then_close: bool = True) -> tuple[int, str]:
    """Status and body of an answer of these bytes."""

    async def ask() -> tuple[int, str]:
        ours, theirs = socket.socketpair()
        with theirs:

            async def connect() -> Streams:
                return await asyncio.open_connection(sock=ours)

            theirs.sendall(raw)
            if then_close:
                theirs.shutdown(socket.SHUT_WR)
            http = HttpClient("http://there", connect=connect)
            try:
                async with http.request("GET", "/") as reply:
                    return reply.status, await reply.text()
            finally:
                await http.close()

    return run_virtually(ask())


def test_answers_in_all_frames() -> None:
    assert answered(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc", then_close=False) == (200, "abc")
    assert answered(b"HTTP/1.1 404 \r\nTransfer-Encoding: Chunked\r\n\r\n1\r\na\r\n0\r\n\r\n", then_close=False) == (
        404,
        "a",
    )
    assert answered(b"HTTP/1.0 200 OK\r\n\r\nabc") == (200, "abc")
    assert answered(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 201 Yes\r\nContent-Length: 0\r\n\r\n") == (201, "")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "the server closed the connection without an answer"),
        (b"HTTP/1.1 200 OK\r\n", "the server closed the connection without an answer"),
        (b"SSH-2.0-x\r\n\r\n", "the answer begins with 'SSH-2.0-x', which is not HTTP/1.1"),
        (
            b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc",
            "the server closed the connection before the end of its answer",
        ),
        (b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n", "content-length is 'x', which is no number"),
        (b"HTTP/1.1 200 OK\r\nA: " + b"x" * 70_000, "the answer's headers are too long"),
    ],
)
def test_answers_that_are_none(raw: bytes, message: str) -> None:
    with pytest.raises(ConnectionFailed) as error:
        answered(raw)
    assert str(error.value) == message


def test_connections_are_used_again_but_not_after_long() -> None:
    async def ask(pauses: list[float]) -> int:
        server = ScriptedServer(lambda index, body: Answer(((0.0, b"x"),)))
        async with client_of(server) as http:
            for pause in pauses:
                async with http.request("POST", "/", b"{}") as reply:
                    assert await reply.text() == "x"
                await asyncio.sleep(pause)
            return len(server.connections)

    assert run_virtually(ask([0.0, 0.5, 1.9, 0.0])) == 1
    assert run_virtually(ask([0.0, 2.1, 0.5, 2.1, 0.0])) == 3


def test_an_answer_that_was_left_early_ends_its_connection() -> None:
    async def ask() -> int:
        server = ScriptedServer(lambda index, body: Answer(((0.0, b"x"), (9.0, b"y"))))
        async with client_of(server) as http:
            for _ in range(2):
                async with http.request("POST", "/", b"{}") as reply:
                    async for chunk in reply.chunks():
                        assert chunk == b"x"
                        break
            return len(server.connections)

    assert run_virtually(ask()) == 2


def test_the_key_is_sent() -> None:
    async def ask(key: str | None) -> list[str]:
        server = ScriptedServer(lambda index, body: Answer())
        http = HttpClient("http://there:81/x/v1", key, server.connect)
        async with http.request("GET", "/v1/models") as reply:
            await reply.text()
        await http.close()
        await server.close()
        assert server.requests == ["GET /x/v1/models"]
        return server.headers[0]

    assert "Authorization: Bearer secret" in run_virtually(ask("secret"))
    without = run_virtually(ask(None))
    assert "Host: there:81" in without and not any(line.startswith("Authorization") for line in without)
