"""Errors in the shape of OpenAI's API."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
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

UNIONS = {
    "compute": "a number in (0, 1], or an object with the keys prefill and decode",
    "content": "a string, or a list of parts",
    "prompt": "a string, token ids, or a list of either",
    "stop": "a string, or a list of strings",
}
"""Fields of several forms -> what they may be: pydantic has an error for each form, and none says it all."""

WORDS = {
    "missing": "must be given",
    "extra_forbidden": "must be left out, there is no such key",
    "dict_type": "must be an object",
    "model_attributes_type": "must be an object",
}
"""Kinds of pydantic's errors that it words for programmers -> our words."""


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

    @property
    def content(self) -> bytes:
        """It as ASCII: what a client sent may come back in the message, half surrogate pairs too."""
        return json.dumps(self.body).encode()


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


# -- bodies that are not of the form the schema has


def unusable(errors: Sequence[Any], body: Any) -> Refusal:
    """The refusal for what pydantic found in a body: of the first field that is wrong, what says most about it."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return Refusal(400, f"the body must be JSON: {first['ctx']['error']}, at character {first['loc'][-1]}")
    if len(first["loc"]) < 2:
        return Refusal(400, _no_object(body))
    of_field = [(_place(one, body), one) for one in errors if one["loc"][:2] == first["loc"][:2]]
    place, error = max(of_field, key=lambda pair: len(pair[0]))
    last = max(at for at, part in enumerate(place) if isinstance(part, str))
    wanted = re.sub(r"^\w+ should ", "must ", WORDS.get(error["type"], error["msg"]))
    if place[last] in UNIONS and error["type"] != "missing":
        place, wanted = place[: last + 1], f"must be {UNIONS[place[last]]}"
    elif error["type"] == "extra_forbidden":
        wanted += f" ({place[0]} is {UNIONS[place[0]]})"  # of several forms, one of which has set keys
    where = ".".join(map(str, place))
    return Refusal(400, f"{where}{_shown(place, body)}: {wanted}", param=where)


def _no_object(body: Any) -> str:
    if isinstance(body, bytes) and body:  # FastAPI parses nothing that does not say it is JSON
        return "the body must be JSON, with the header Content-Type: application/json"
    return "the body must be a JSON object"


def _place(error: Any, body: Any) -> list[Any]:
    """The way to an error through what was sent: `loc` names the forms of unions too."""
    place: list[Any] = []
    for part in error["loc"][1:]:
        if part in body if isinstance(body, dict) else isinstance(body, list) and isinstance(part, int):
            place.append(part)
            body = body[part]
    return [*place, error["loc"][-1]] if error["type"] == "missing" else place


def _shown(place: Sequence[Any], body: Any) -> str:
    """`=value`, where the value is there and short."""
    try:
        for part in place:
            body = body[part]
    except KeyError:
        return ""
    return "" if isinstance(body, dict | list) or len(repr(body)) > 40 else f"={body!r}"
