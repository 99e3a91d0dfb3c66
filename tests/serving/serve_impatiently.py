"""`python -m serving` for tests of the real process: it waits for clients half a second, puts little into their buffers, and its
engine checks itself after each step."""

from __future__ import annotations

import socket
import sys

from live_server import CheckedEngine

from serving import api, build, server
from serving.__main__ import main


def bind(host: str, port: int) -> socket.socket:
    listener = server_bind(host, port)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)  # so that it shows when a client does not read
    return listener


if __name__ == "__main__":
    api._MAX_SEND_SECONDS = api._MAX_BODY_SECONDS = 0.5
    build.Engine = CheckedEngine
    server_bind, server._bind = server._bind, bind
    sys.exit(main())
