"""A tiny model with a dial, and a real server for it on a loopback port."""

from __future__ import annotations

import asyncio
import copy
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import openai
import pytest
import torch
import uvicorn
from transformers import LlamaConfig, LlamaForCausalLM

from rheostat.adapted import Adapted
from rheostat.calibration import calibrate
from rheostat.decode import stream
from rheostat.methods import DynaMoE
from rheostat.serve.adaptive import Adaptive
from rheostat.serve.app import create_app
from rheostat.serve.backend import Backend, make_backend
from rheostat.serve.engine import Engine
from rheostat.serve.metrics import Metrics
from rheostat.serve.scheduler import Limits, Scheduler
from rheostat.serve.server import Server, listen
from rheostat.serve.service import Rules, Service
from rheostat.spending import Compute, spend
from tests.tiny import SIZES

TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}:{{ m['content'] }}]{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)


@dataclass(frozen=True)
class Tiny:
    """A model with a dial and its tokenizer."""

    adapted: Adapted
    tokenizer: Any

    def offline(
        self,
        prompt: str,
        compute: Compute | Mapping[str, Compute],
        num_new: int,
        runtime: str = "auto",
        hold: bool = True,
    ) -> str:
        """The greedy answer without a server."""
        ids = self.tokenizer(prompt, return_tensors="pt")["input_ids"]
        return self.offline_ids(ids, compute, num_new, runtime, hold)

    def offline_chat(self, content: str, compute: float, num_new: int) -> str:
        """Likewise, for a chat."""
        return self.offline(f"[user:{content}]>", compute, num_new)

    def offline_ids(
        self,
        ids: torch.Tensor,
        compute: Compute | Mapping[str, Compute],
        num_new: int,
        runtime: str = "auto",
        hold: bool = True,
    ) -> str:
        """Likewise, for token ids [1, T]."""
        end = self.tokenizer.eos_token_id
        with spend(compute, hold=hold):
            steps = stream(self.adapted, ids, max_new_tokens=num_new, eos_token_ids=(end,), runtime=runtime)
            found = [int(step.token_ids[0]) for step in steps]
        return self.tokenizer.decode(found, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def byte_model(vocab_size: int) -> Any:
    """A random Llama of bytes whose answers wander: head and embedding differ, else it repeats itself."""
    torch.manual_seed(3)
    config = LlamaConfig(**SIZES | {"vocab_size": vocab_size, "tie_word_embeddings": False, "num_hidden_layers": 3})
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(6)
        model.lm_head.weight[:3] = model.lm_head.weight[97:] = 0  # answers are printable ASCII, and do not end early
    return model


@pytest.fixture(scope="session")
def tiny(tiny_tokenizer: Any) -> Tiny:
    """The tiny model, adapted."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = TEMPLATE
    model = byte_model(len(tokenizer))
    adapted = Adapted(model, DynaMoE(tile=4, router_width=8, router_steps=30))
    draws = [torch.randint(3, 259, (12, 32), generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    adapted.method.fit(adapted.model, draws[0], generator=torch.Generator().manual_seed(0))
    adapted.dial = calibrate(adapted, draws[1])
    assert adapted.dial.low < 0.8
    return Tiny(adapted, tokenizer)


@dataclass(frozen=True)
class Live:
    """A server that runs."""

    engine: Engine
    metrics: Metrics
    server: Server
    base: str
    port: int
    clients: list[openai.OpenAI]

    def client(self, **settings: Any) -> openai.OpenAI:
        """OpenAI's own client, which does not try again by itself."""
        defaults: dict[str, Any] = {"api_key": "none", "max_retries": 0, "timeout": 30}
        self.clients.append(openai.OpenAI(base_url=f"{self.base}/v1", **defaults | settings))
        return self.clients[-1]

    def wait_idle(self, seconds: float = 60.0) -> None:
        """Until the engine has nothing left."""
        until(lambda: self.engine.scheduler.is_idle, seconds)


def until(holds: Callable[[], bool], seconds: float = 60.0) -> None:
    """Wait for a condition."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


@contextmanager
def live(
    tiny: Tiny,
    *,
    backend: Backend | None = None,
    limits: Limits | None = None,
    adaptive: Adaptive | None = None,
    curves: Sequence[dict[str, Any]] = (),
    **rules: Any,
) -> Iterator[Live]:
    """Serve the tiny model on a free port until the block ends."""
    metrics = Metrics("tiny")
    engine = Engine(
        tiny.adapted,
        tiny.tokenizer,
        backend or make_backend(tiny.adapted),
        Scheduler(limits or Limits()),
        adaptive=adaptive,
        watcher=metrics,
    )
    metrics.watch(engine)
    service = Service(tiny.adapted, tiny.tokenizer, engine, replace(Rules(name="tiny"), **rules), list(curves))
    server = Server(create_app(service, metrics), engine, drain_seconds=2)
    with listen("127.0.0.1", 0) as listener:
        thread = threading.Thread(target=lambda: asyncio.run(serve(server, listener)))
        engine.start()
        thread.start()
        port = listener.getsockname()[1]
        try:
            until(lambda: server.started)
            one = Live(engine, metrics, server, f"http://127.0.0.1:{port}", port, [])
            yield one
        finally:
            for client in one.clients:
                client.close()
            server.should_exit = True
            thread.join(20)
            engine.stop()
            assert not thread.is_alive()
            assert not engine.is_alive


async def serve(server: uvicorn.Server, listener: Any) -> None:
    """Until told to end."""
    await server.serve(sockets=[listener])


@pytest.fixture(scope="package")
def running(tiny: Tiny) -> Iterator[Live]:
    """One server for the tests that leave it as they found it."""
    with live(tiny) as one:
        yield one


@pytest.fixture
def client(running: Live) -> openai.OpenAI:
    """OpenAI's client for it."""
    return running.client()
