"""The HTTP surface. It handles no tensors: bodies in, jobs to the engine, events to bodies or to a stream."""

from __future__ import annotations

from functools import lru_cache
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, Response
from starlette.exceptions import HTTPException

import rheostat
from rheostat.errors import SettingError
from rheostat.serve.answers import Chat, Plain
from rheostat.serve.errors import Refusal, unusable
from rheostat.serve.gate import Gate
from rheostat.serve.generation import generate
from rheostat.serve.metrics import Metrics
from rheostat.serve.schema import ChatRequest, CompletionRequest, ErrorBody
from rheostat.serve.service import Service, UnknownModel

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": text}
    for status, text in {
        400: "The request cannot be used; `error.message` says why",
        401: "The key is missing or wrong",
        404: "No such model",
        408: "The body did not come in time",
        413: "The body is too large",
        429: "The queue is full; `Retry-After` says when to come back",
        500: "This request failed",
        503: "The server is shutting down",
        504: "The time limit has passed",
    }.items()
}


def create_app(service: Service, metrics: Metrics) -> FastAPI:
    """The application for one model. The engine is started and stopped by whoever serves it."""
    app = FastAPI(
        title="Rheostat",
        version=rheostat.__version__,
        description="An OpenAI-compatible server with a dial for compute in each request.",
        docs_url=None,  # its page fetches scripts from elsewhere
        redoc_url=None,
    )
    rules = service.rules
    app.add_middleware(
        Gate,
        api_key=rules.api_key,
        max_body_bytes=rules.max_body_bytes,
        request_seconds=rules.request_seconds,
        on_refusal=metrics.refused,
    )
    if rules.origins:  # last, so outermost: pages may read what the gate refuses, too
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(rules.origins),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
    _add_errors(app, service)
    _add_generation(app, service)
    _add_rest(app, service, metrics)
    return app


def _add_generation(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions", responses=ERRORS, response_model=None)
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Continue a conversation."""
        return await generate(service, body, request, Chat, "chatcmpl")

    @app.post("/v1/completions", responses=ERRORS, response_model=None)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue one or several prompts."""
        return await generate(service, body, request, Plain, "cmpl")


def _add_rest(app: FastAPI, service: Service, metrics: Metrics) -> None:
    @app.get("/v1/models", responses={401: ERRORS[401]})
    async def models() -> dict[str, Any]:
        """The model, and settings of its dial under names of their own."""
        return {"object": "list", "data": [_model(service, name) for name in service.models()]}

    @app.get("/v1/models/{name:path}", responses={404: ERRORS[404], 400: ERRORS[400], 401: ERRORS[401]})
    async def model(name: str) -> dict[str, Any]:
        """One of them; `name@x` is there for every x in the dial's range."""
        service.virtual(name)
        return _model(service, name)

    @app.head("/health", include_in_schema=False)
    @app.get("/health", responses={503: ERRORS[503]})
    async def health() -> dict[str, Any]:
        """Whether the server takes requests."""
        if not service.engine.is_alive:
            raise Refusal(503, "the engine has stopped")
        if service.engine.scheduler.is_draining:
            raise Refusal(503, "the server is shutting down")
        return {"status": "ok"} | service.engine.state()

    @app.get("/metrics", response_class=Response)
    async def prometheus() -> Response:
        """Metrics for Prometheus."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/dial", response_model=None)
    async def dial() -> dict[str, Any]:
        """The dial's range, the model's sizes, and the measured curve where the artifact holds one: for the page."""
        return _dial(service)

    @app.head("/", include_in_schema=False)
    @app.get("/", response_class=HTMLResponse)
    async def page() -> HTMLResponse:
        """The page."""
        policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
        return HTMLResponse(_page(), headers={"content-security-policy": f"{policy}; img-src data:"})


def _model(service: Service, name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": service.started, "owned_by": "rheostat"}


def _dial(service: Service) -> dict[str, Any]:
    adapted = service.adapted
    return {
        "model": service.rules.name,
        "low": adapted.dial.low,
        "default": service.rules.compute,
        "num_layers": adapted.geometry.num_layers,
        "has_chat": bool(service.tokenizer.chat_template),
        "backend": service.engine.backend.name,
        "needs_key": service.rules.api_key is not None,
        "curves": service.curves,
    }


@lru_cache(maxsize=1)
def _page() -> str:
    return (files("rheostat.serve") / "page.html").read_text(encoding="utf-8")


# -- errors


def _add_errors(app: FastAPI, service: Service) -> None:
    """What nobody foresaw is the gate's: it stands around these."""

    def answer(refusal: Refusal) -> Response:
        return Response(refusal.content, refusal.status, headers=refusal.headers, media_type="application/json")

    @app.exception_handler(Refusal)
    async def refused(request: Request, error: Refusal) -> Response:
        return answer(error)

    @app.exception_handler(SettingError)
    async def setting(request: Request, error: SettingError) -> Response:
        name = str(error).partition("=")[0].partition(":")[0]
        return answer(Refusal(400, str(error), param=name if name.isidentifier() else None))

    @app.exception_handler(UnknownModel)
    async def unknown(request: Request, error: UnknownModel) -> Response:
        name = service.rules.name
        message = f"there is no model {str(error)[:80]!r} here: ask for {name!r}, or for '{name}@x' at compute x"
        return answer(Refusal(404, message, param="model", code="model_not_found"))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return answer(unusable(error.errors(), error.body))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        refusal = Refusal(error.status_code, str(error.detail))
        refusal.headers.update(error.headers or {})
        return answer(refusal)
