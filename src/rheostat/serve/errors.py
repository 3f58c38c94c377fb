"""Errors in the shape of OpenAI's API."""

from __future__ import annotations

from typing import Any

KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}


class Refusal(Exception):
    """A request is not answered, and why."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers: dict[str, str] = {}

    @property
    def body(self) -> dict[str, Any]:
        """The JSON to answer with."""
        return error_body(self.status, self.message, param=self.param, code=self.code)


def error_body(status: int, message: str, *, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The JSON of an error."""
    kind = KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def failure(error: Exception) -> tuple[int, str]:
    """Status and message for a request that broke while it ran."""
    if is_memory(error):
        return 503, "the server has not enough memory for this request now; a shorter one may fit"
    return 500, "this request failed; others did not"


def is_memory(error: Exception) -> bool:
    """Whether memory has run out: PyTorch says so in words only."""
    return isinstance(error, MemoryError) or "can't allocate memory" in str(error)
