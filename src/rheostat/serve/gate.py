"""What every request passes before the app sees it: an id, the key, the size of the body, the time it may take.

Plain ASGI, so that streams are not buffered and a client that leaves is noticed.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from rheostat.serve.errors import Refusal

logger = logging.getLogger("rheostat.serve.access")

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

GUARDED = "/v1/"
"""Paths that need the key."""

ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
"""What a client may send as its own request id: it goes into headers and logs."""

GRACE = 10.0
"""Seconds beyond the time limit that a client gets to read its answer."""


class Gate:
    """See the module."""

    def __init__(
        self,
        app: App,
        *,
        api_key: str | None,
        max_body_bytes: int,
        request_seconds: float,
        body_seconds: float = 30.0,
        on_refusal: Callable[[int], None] | None = None,
    ) -> None:
        self.app, self.api_key, self.on_refusal = app, api_key, on_refusal
        self.max_body_bytes, self.request_seconds, self.body_seconds = max_body_bytes, request_seconds, body_seconds

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """One connection's request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.monotonic(), 0
        id = self._id(scope)
        scope.setdefault("state", {})["request_id"] = id

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), (b"x-request-id", id.encode())]}
            await send(message)

        try:
            await self._pass(scope, receive, answer)
        except Refusal as refusal:
            if not status:
                await _refuse(answer, refusal)
        except TimeoutError:
            if status:
                raise  # in the middle of an answer that nobody reads: the connection is cut
            await _refuse(answer, Refusal(504, "the time limit of this server has passed"))
        except Exception:
            if not status:
                await _refuse(answer, Refusal(500, "the server failed at this request"))
            raise  # the server logs it
        finally:
            path, seconds = scope["path"], time.monotonic() - started
            fields = {"request_id": id, "method": scope["method"], "path": path, "status": status}
            if status >= 400 and self.on_refusal is not None:
                self.on_refusal(status)
            logger.info("request", extra={"fields": fields | {"ms": round(1e3 * seconds, 1)}})

    async def _pass(self, scope: Message, receive: Receive, send: Send) -> None:
        guarded = scope["path"].startswith(GUARDED)
        if guarded and scope["method"] != "OPTIONS":
            self._check_key(scope)
        if guarded and scope["method"] == "POST":
            receive = _replay(await self._body(scope, receive), receive)
        if not guarded:
            await self.app(scope, receive, send)
            return
        async with asyncio.timeout(self.request_seconds + GRACE):
            await self.app(scope, receive, send)

    def _id(self, scope: Message) -> str:
        given = _header(scope, b"x-request-id")
        return given if given and ID.fullmatch(given) else secrets.token_hex(12)

    def _check_key(self, scope: Message) -> None:
        if self.api_key is None:
            return
        given = _header(scope, b"authorization") or ""
        kind, _, key = given.partition(" ")
        if kind.lower() != "bearer" or not hmac.compare_digest(key.strip().encode(), self.api_key.encode()):
            raise Refusal(401, "a valid key is needed (Authorization: Bearer ...)", code="invalid_api_key")

    async def _body(self, scope: Message, receive: Receive) -> bytes:
        stated = _header(scope, b"content-length") or "0"
        if stated.isdigit() and int(stated) > self.max_body_bytes:
            raise self._too_large()
        parts, size = [], 0
        try:
            async with asyncio.timeout(self.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Refusal(400, "the body ended too early")
                    size += len(message.get("body", b""))
                    if size > self.max_body_bytes:
                        raise self._too_large()
                    parts.append(message.get("body", b""))
                    if not message.get("more_body"):
                        return b"".join(parts)
        except TimeoutError:
            raise Refusal(408, "the body did not come in time") from None

    def _too_large(self) -> Refusal:
        refusal = Refusal(413, f"the body must be at most {self.max_body_bytes} bytes")
        refusal.headers["connection"] = "close"
        return refusal


def _replay(body: bytes, receive: Receive) -> Receive:
    is_given = False

    async def again() -> Message:
        nonlocal is_given
        if is_given:
            return await receive()
        is_given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def _header(scope: Message, name: bytes) -> str | None:
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), None)


async def _refuse(send: Send, refusal: Refusal) -> None:
    body = refusal.content
    headers = {"content-type": "application/json", "content-length": str(len(body)), **refusal.headers}
    if refusal.status == 401:
        headers["www-authenticate"] = "Bearer"
    pairs = [(key.encode(), value.encode()) for key, value in headers.items()]
    await send({"type": "http.response.start", "status": refusal.status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})
