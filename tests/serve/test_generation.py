"""A request's jobs and their events, without a server."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from rheostat.serve import generation
from rheostat.serve.answers import Plain
from rheostat.serve.errors import Refusal
from rheostat.serve.generation import generate
from rheostat.serve.jobs import Done, Failed, Job, RowDone, Token
from rheostat.serve.scheduler import Draining, Full
from rheostat.serve.schema import CompletionRequest
from tests.serve.test_deploy import BILL


class Engine:
    """Has room for so many jobs, and answers each with the events of a script."""

    def __init__(self, events: Any = (), room: int = 9, error: type[Exception] = Full) -> None:
        self.events, self.room, self.error = list(events), room, error
        self.submitted: list[str] = []
        self.cancelled: list[str] = []

    def submit(self, job: Job, sink: Any) -> None:
        if len(self.submitted) == self.room:
            raise self.error
        self.submitted.append(job.id)
        for event in self.events:
            sink(event)

    def cancel(self, id: str) -> None:
        self.cancelled.append(id)

    def retry_after(self) -> int:
        return 3


def service(engine: Engine, num_jobs: int = 1) -> Any:
    jobs = [Job(id=str(place), prompt=[1], max_new_tokens=2) for place in range(num_jobs)]
    return SimpleNamespace(engine=engine, jobs=lambda body, id: jobs, tokenizer=SimpleNamespace(decode=str))


async def answer(service: Any, *, leaves: bool = False, **fields: Any) -> tuple[int, bytes]:
    """Status and body."""

    async def receive() -> Any:
        if not leaves:
            await asyncio.Event().wait()
        return {"type": "http.disconnect"}

    request: Any = SimpleNamespace(state=SimpleNamespace(request_id="r"), receive=receive)
    found = await generate(service, CompletionRequest(model="m", prompt="x", **fields), request, Plain, "cmpl")
    if fields.get("stream") and found.status_code == 200:
        return 200, b"".join([part async for part in found.body_iterator])  # type: ignore[attr-defined]
    return found.status_code, bytes(found.body)


TOKEN = Token(row=0, text="a", token_id=1, width=1.0)
WHOLE = (TOKEN, RowDone(0, "length", "b"), Done(BILL))


def test_a_whole_answer_and_a_stream_carry_the_same_text():
    status, body = asyncio.run(answer(service(Engine(WHOLE))))
    assert status == 200
    assert b'"text":"ab"' in body
    assert b'"finish_reason":"length"' in body
    _, stream = asyncio.run(answer(service(Engine(WHOLE)), stream=True))
    assert stream.count(b'"text":"a"') == stream.count(b'"text":"b"') == 1
    assert stream.endswith(b"data: [DONE]\n\n")
    assert b"usage" not in stream
    _, stream = asyncio.run(answer(service(Engine(WHOLE)), stream=True, stream_options={"include_usage": True}))
    assert stream.count(b'"usage"') == 1


@pytest.mark.parametrize(("error", "status"), [(Full, 429), (Draining, 503)])
def test_all_prompts_of_a_request_find_room_or_none_does(error: type[Exception], status: int):
    engine = Engine(room=2, error=error)
    with pytest.raises(Refusal) as caught:
        asyncio.run(answer(service(engine, num_jobs=3)))
    assert (caught.value.status, caught.value.headers) == (status, {"retry-after": "3"})
    assert engine.cancelled == engine.submitted == ["0", "1"]


@pytest.mark.parametrize("stream", [True, False])
def test_what_fails_before_its_first_token_is_a_status(stream: bool):
    engine = Engine([Failed(429, "overloaded")])
    with pytest.raises(Refusal) as caught:
        asyncio.run(answer(service(engine), stream=stream))
    assert caught.value.status == 429
    assert caught.value.headers["retry-after"] == "3"


def test_what_fails_later_is_an_event_of_the_stream():
    engine = Engine([TOKEN, Failed(504, "too long")])
    status, stream = asyncio.run(answer(service(engine), stream=True))
    assert status == 200
    assert b'"type":"timeout_error"' in stream
    assert stream.endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_before_the_first_token(stream: bool):
    engine = Engine()
    status, _ = asyncio.run(answer(service(engine), leaves=True, stream=stream))
    assert status == 499
    assert engine.cancelled == ["0"]


def test_a_stream_that_nobody_reads_on_is_cancelled():
    engine = Engine([TOKEN])

    async def read_one() -> None:
        jobs = service(engine).jobs(None, "")
        inbox: generation.Inbox = asyncio.Queue()
        shape = Plain(id="i", model="m", decode=str)
        stream = generation._stream(service(engine), shape, jobs, inbox, (0, TOKEN), False)
        await anext(stream)
        await stream.aclose()  # type: ignore[attr-defined]

    asyncio.run(read_one())
    assert engine.cancelled == ["0"]
