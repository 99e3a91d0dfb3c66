"""An HTTP/1.1 client that is small because it is in the way: what it takes for each chunk is measured as the server's.

(httpx took three times as long for a token of a stream, and searched its pool of connections for each request.)
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit

from tilus.errors import TilusError

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Connect = Callable[[], Awaitable[Streams]]

_READ_NBYTES = 2**16
_IDLE = (
    2.0  # seconds after which a connection is not used again: servers close them (uvicorn after 5), perhaps just then
)


class ConnectionFailed(Exception):
    """No connection, or it broke, or what came over it is not HTTP/1.1."""


@dataclass(frozen=True)
class Address:
    """Where a server is. prefix: what stands before the paths of all requests."""

    host: str
    port: int
    is_secure: bool
    prefix: str

    @classmethod
    def parse(cls, url: str) -> Address:
        """Raises: TilusError when it is not `http[s]://host[:port][/prefix]`, where a prefix of `/v1` does not count."""
        try:
            parts = urlsplit(url)
            port = parts.port or (443 if parts.scheme == "https" else 80)
        except ValueError as error:
            raise TilusError(f"{url!r} is no address: {error}", hint="it is like http://127.0.0.1:8000") from None
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise TilusError(f"{url!r} is no address of a server", hint="it is like http://127.0.0.1:8000")
        return cls(parts.hostname, port, parts.scheme == "https", parts.path.rstrip("/").removesuffix("/v1"))

    async def connect(self) -> Streams:
        context = ssl.create_default_context() if self.is_secure else None
        return await asyncio.open_connection(self.host, self.port, ssl=context)


class Body:
    """Takes the frame off a response's body, however its bytes are cut. is_complete: whether its end has come."""

    def __init__(self, headers: Mapping[str, str]) -> None:
        self._is_chunked = "chunked" in headers.get("transfer-encoding", "").lower()
        length = headers.get("content-length")
        self._ends_with_connection = not self._is_chunked and length is None
        self._left = int(length) if length is not None and not self._is_chunked else 0
        self._buffer = b""
        self._in_trailer = False
        self.is_complete = not self._is_chunked and not self._ends_with_connection and self._left == 0

    def feed(self, data: bytes) -> bytes:
        """What of the body is in this data; empty data is the end of the connection. Raises ConnectionFailed."""
        if not data:
            if not self._ends_with_connection:
                raise ConnectionFailed("the server closed the connection before the end of its answer")
            self.is_complete = True
            return b""
        if self._is_chunked:
            return self._unchunk(data)
        if not self._ends_with_connection:
            self._left -= len(data)
            self.is_complete = self._left <= 0
        return data

    def _unchunk(self, data: bytes) -> bytes:
        """`left` counts what a chunk still has, with the line's end after it."""
        parts: list[bytes] = []
        data = self._buffer + data
        while data and not self.is_complete:
            if self._left:
                taken = min(self._left, len(data))
                parts.append(data[: min(taken, max(0, self._left - 2))])
                self._left -= taken
                data = data[taken:]
                continue
            line, found, rest = data.partition(b"\r\n")
            if not found:
                break
            data = rest
            if self._in_trailer:
                self.is_complete = not line
            else:
                self._begin_chunk(line)
        self._buffer = data
        return b"".join(parts)

    def _begin_chunk(self, line: bytes) -> None:
        try:
            size = int(line.partition(b";")[0], 16)
        except ValueError:
            raise ConnectionFailed(f"a chunk of the answer begins with {line[:40]!r}, which is no size") from None
        self._in_trailer = size == 0
        self._left = size + 2 if size else 0


@dataclass(frozen=True)
class Response:
    status: int
    headers: Mapping[str, str]
    body: Body
    reader: asyncio.StreamReader

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body as it arrives. Raises ConnectionFailed when it does not arrive whole."""
        while not self.body.is_complete:
            if chunk := self.body.feed(await self.reader.read(_READ_NBYTES)):
                yield chunk

    async def text(self) -> str:
        return b"".join([chunk async for chunk in self.chunks()]).decode(errors="replace")


class HttpClient:
    """Requests to one server over as many connections as there are requests at a time."""

    def __init__(self, url: str, api_key: str | None = None, connect: Connect | None = None) -> None:
        """connect: how to get a connection, if not to the address. Raises TilusError when the URL is none of a server."""
        self.url = url
        address = Address.parse(url)
        self._connect = connect or address.connect
        self._prefix = address.prefix
        host = f"[{address.host}]" if ":" in address.host else address.host
        self._headers = f"Host: {host}:{address.port}\r\nUser-Agent: tilus-bench\r\nContent-Type: application/json\r\n"
        self._headers += f"Authorization: Bearer {api_key}\r\n" if api_key else ""
        self._idle: list[tuple[float, Streams]] = []

    @asynccontextmanager
    async def request(self, method: str, path: str, body: bytes = b"") -> AsyncGenerator[Response]:
        """The answer, from its headers on. Raises ConnectionFailed, also inside of the block."""
        streams: Streams | None = None
        is_reusable = False
        try:
            streams = self._take() or await self._connect()
            reader, writer = streams
            head = f"{method} {self._prefix}{path} HTTP/1.1\r\n{self._headers}Content-Length: {len(body)}\r\n\r\n"
            writer.write(head.encode() + body)
            await writer.drain()
            response = await _read_head(reader)
            yield response
            is_reusable = response.body.is_complete and response.headers.get("connection", "").lower() != "close"
        except OSError as error:
            raise ConnectionFailed(error.strerror or str(error) or type(error).__name__) from error
        finally:
            if is_reusable and streams is not None:
                self._idle.append((asyncio.get_running_loop().time(), streams))
            elif streams is not None:
                streams[1].transport.abort()

    def _take(self) -> Streams | None:
        """The connection that was used last, as it is the least likely to be closed by the server."""
        now = asyncio.get_running_loop().time()
        while self._idle:
            since, streams = self._idle.pop()
            if now - since < _IDLE and not streams[0].at_eof():
                return streams
            streams[1].transport.abort()
        return None

    async def close(self) -> None:
        for _, (_, writer) in self._idle:
            writer.transport.abort()
        self._idle.clear()
        await asyncio.sleep(0)  # closed transports say so in the loop's next round


async def _read_head(reader: asyncio.StreamReader) -> Response:
    while True:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError:
            raise ConnectionFailed("the server closed the connection without an answer") from None
        except asyncio.LimitOverrunError:
            raise ConnectionFailed("the answer's headers are too long") from None
        first, *lines = head.decode("latin-1").split("\r\n")
        version, _, rest = first.partition(" ")
        status = rest[:3]
        if version not in ("HTTP/1.1", "HTTP/1.0") or not status.isdecimal():
            raise ConnectionFailed(f"the answer begins with {first[:40]!r}, which is not HTTP/1.1")
        if not status.startswith("1"):  # 100 Continue and the like come before the answer
            break
    pairs = (line.partition(":") for line in lines if line)
    headers = {name.strip().lower(): value.strip() for name, _, value in pairs}
    if version == "HTTP/1.0":
        headers["connection"] = "close"
    try:
        return Response(int(status), headers, Body(headers), reader)
    except ValueError:
        raise ConnectionFailed(f"content-length is {headers['content-length']!r}, which is no number") from None
