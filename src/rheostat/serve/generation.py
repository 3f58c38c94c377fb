"""From a request's body to jobs for the engine, and from their events to an answer or a stream."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from rheostat.serve.answers import Choice, Shape, total
from rheostat.serve.errors import Refusal, error_body
from rheostat.serve.jobs import Bill, Done, Event, Failed, Job, RowDone, Token
from rheostat.serve.scheduler import Draining, Full
from rheostat.serve.schema import Generation
from rheostat.serve.service import Service

T = TypeVar("T")

Inbox = asyncio.Queue[tuple[int, Event]]
"""(place of the job, event)."""


async def generate(service: Service, body: Generation, request: Request, kind: type[Shape], prefix: str) -> Response:
    """Answer one request.

    Raises:
        Refusal: it cannot be answered, and nothing of the answer has been sent.
    """
    id = f"{prefix}-{request.state.request_id}"
    jobs = await asyncio.to_thread(service.jobs, body, id)  # encoding a long prompt takes a while
    shape = kind(
        id=id,
        model=body.model,
        decode=lambda token: service.tokenizer.decode([token]),
        wants_logprobs=jobs[0].num_top is not None,
        wants_layers=body.compute_trace,
    )
    inbox: Inbox = asyncio.Queue()
    _submit(service, jobs, inbox)
    if body.stream:
        wants_usage = body.stream_options is not None and body.stream_options.include_usage
        first = await _first(service, jobs, inbox, request)
        if first is None:
            return Response(status_code=499)  # nobody reads it
        stream = _stream(service, shape, jobs, inbox, first, wants_usage)
        return StreamingResponse(stream, media_type="text/event-stream", headers={"cache-control": "no-store"})
    return await _whole(service, shape, jobs, inbox, request)


def _submit(service: Service, jobs: list[Job], inbox: Inbox) -> None:
    """All jobs of a request, or none.

    Raises:
        Refusal: there is no room.
    """
    loop = asyncio.get_running_loop()
    for place, job in enumerate(jobs):

        def sink(event: Event, place: int = place) -> None:
            loop.call_soon_threadsafe(inbox.put_nowait, (place, event))

        try:
            service.engine.submit(job, sink)
        except (Full, Draining) as error:
            _cancel(service, jobs[:place])
            raise _no_room(service, error) from None


def _no_room(service: Service, error: Exception) -> Refusal:
    wait = service.engine.retry_after()
    if isinstance(error, Full):
        refusal = Refusal(429, f"the queue is full, come back in {wait} s", code="rate_limit_exceeded")
    else:
        refusal = Refusal(503, "the server is shutting down")
    refusal.headers["retry-after"] = str(wait)
    return refusal


def _cancel(service: Service, jobs: list[Job]) -> None:
    for job in jobs:
        service.engine.cancel(job.id)


async def _whole(service: Service, shape: Shape, jobs: list[Job], inbox: Inbox, request: Request) -> Response:
    try:
        found = await _unless_gone(_collect(service, jobs, inbox), request)
        if found is None:
            return Response(status_code=499)  # nobody reads it
        choices, bills = found
        return JSONResponse(shape.body(choices, total(bills)))
    finally:
        _cancel(service, jobs)


async def _first(service: Service, jobs: list[Job], inbox: Inbox, request: Request) -> tuple[int, Event] | None:
    """The first event, before which a stream can still be refused with a status of its own. None: the client left."""
    try:
        found = await _unless_gone(inbox.get(), request)
    except BaseException:
        _cancel(service, jobs)
        raise
    if found is None:
        _cancel(service, jobs)
    elif isinstance(found[1], Failed):
        _cancel(service, jobs)
        raise _failed(service, found[1])
    return found


async def _unless_gone(wanted: Coroutine[Any, Any, T], request: Request) -> T | None:
    """Its result, or None where the client leaves before."""
    answer = asyncio.ensure_future(wanted)
    gone = asyncio.ensure_future(request.receive())  # the body is read: what comes next is the client's leave
    try:
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        return answer.result() if answer.done() else None
    finally:
        answer.cancel()
        gone.cancel()


def _failed(service: Service, event: Failed) -> Refusal:
    refusal = Refusal(event.status, event.message)
    if event.status == 429:
        refusal.headers["retry-after"] = str(service.engine.retry_after())
    return refusal


async def _collect(service: Service, jobs: list[Job], inbox: Inbox) -> tuple[list[Choice], list[Bill]]:
    choices = [Choice() for _ in range(jobs[0].n * len(jobs))]
    bills: dict[int, Bill] = {}
    while len(bills) < len(jobs):
        place, event = await inbox.get()
        if isinstance(event, Failed):
            raise _failed(service, event)
        if isinstance(event, Done):
            bills[place] = event.bill
            continue
        choice = choices[place * jobs[0].n + event.row]
        choice.text += event.text
        if isinstance(event, Token):
            choice.tokens.append(event)
        else:
            choice.reason = event.reason
    return choices, [bills[place] for place in range(len(jobs))]


async def _stream(
    service: Service, shape: Shape, jobs: list[Job], inbox: Inbox, first: tuple[int, Event], wants_usage: bool
) -> AsyncIterator[bytes]:
    bills: list[Bill] = []
    next_one: tuple[int, Event] | None = first
    try:
        for chunk in shape.chunks_first(jobs[0].n * len(jobs)):
            yield _event(chunk)
        while len(bills) < len(jobs):
            place, event = next_one or await inbox.get()
            next_one = None
            if isinstance(event, Failed):
                yield _event(error_body(event.status, event.message))
                break
            if isinstance(event, Done):
                bills.append(event.bill)
                continue
            index = place * jobs[0].n + event.row
            yield _event(shape.chunk_last(index, event) if isinstance(event, RowDone) else shape.chunk(index, event))
        if wants_usage and len(bills) == len(jobs):
            yield _event(shape.chunk_usage(total(bills)))
        yield b"data: [DONE]\n\n"
    finally:
        _cancel(service, jobs)  # nothing to do for those that are done


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
