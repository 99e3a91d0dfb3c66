"""Errors of the server: what a client did wrong, in the shape that OpenAI's clients expect."""

from __future__ import annotations

from tilus.errors import TilusError


class RequestError(TilusError):
    """A request that cannot be served. `status` is the HTTP status; `param` names the field at fault."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.param = param
        self.code = code

    def body(self) -> dict[str, dict[str, str | None]]:
        """OpenAI's error body."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


class Overloaded(RequestError):
    """The waiting queue is full; the client should come back later."""

    def __init__(self, message: str) -> None:
        super().__init__(message, status=429, kind="rate_limit_error", code="queue_full")


class EngineFailure(RequestError):
    """The engine stopped: a kernel failed, or the server is shutting down. No request can be served any more."""

    def __init__(self, message: str) -> None:
        super().__init__(message, status=503, kind="server_error", code="engine_stopped")
