"""HTTP by httptools, which takes a third less time for each piece of a stream than uvicorn's other way, with that one's limit on
the head of a request."""

from __future__ import annotations

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_NBYTES = 64 * 1024


class HttpProtocol(HttpToolsProtocol):
    """A connection. One whose request line and headers do not end within the limit is refused: they are kept until they do."""

    _head_nbytes: int | None = None  # of a request whose headers have not ended, behind the data in which it began

    def on_message_begin(self) -> None:
        self._head_nbytes = 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._head_nbytes = None
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        if self._head_nbytes is not None:
            self._head_nbytes += len(data)
        super().data_received(data)
        if (self._head_nbytes or 0) > MAX_HEAD_NBYTES and not self.transport.is_closing():
            self.send_400_response(f"the request line and headers have more than {MAX_HEAD_NBYTES} bytes")
