"""Serve a model over HTTP, as OpenAI's API, with the dial in each request and a page that shows the compute.

Clients set `compute` in the body (`extra_body` in OpenAI's client), or ask for the model `name@0.7`. The page is at
`/`, metrics are at `/metrics`. Ends on SIGTERM or Ctrl-C, after what is being written is done.

Example:
  rheostat serve smol-dial
  rheostat serve smol-dial --port 9000 --dtype bfloat16 --weights int8 --rows 16
  RHEOSTAT_API_KEY=secret rheostat serve smol-dial --host 0.0.0.0 --adaptive --compute-min 0.7
"""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rheostat import terminal
from rheostat.commands import Loaded, check_computes, load
from rheostat.config import Common, setting
from rheostat.errors import SettingError, bad_setting

if TYPE_CHECKING:
    from rheostat.serve.server import Server

KEY = "RHEOSTAT_API_KEY"
"""Where the key may come from, other than the command line, which others can read."""


@dataclass(frozen=True, kw_only=True)
class Config(Common):
    """Settings of `rheostat serve`."""

    model: str = setting(help="an adapted model, or a dense one (which has compute 1 only)", flag=False)
    host: str = setting("127.0.0.1", help="address to listen on; the default is reachable from this machine only")
    port: int = setting(8000, help="port to listen on; 0 takes a free one")
    name: str = setting("", help="what clients call the model (default: the model's own name)")
    api_key: str = setting("", help=f"key that clients must send (default: from the environment, {KEY})")
    origins: tuple[str, ...] = setting((), help="web origins whose pages may call the server")
    compute: float = setting(1.0, help="where a request does not say")
    hold: bool = setting(
        True, help="steer each request by what it has spent, to end at its compute, unless it says not"
    )
    adaptive: bool = setting(False, help="lower the dial under load, as far as requests allow (compute_min)")
    adaptive_target: float = setting(1.0, help="seconds that requests may wait before the dial is lowered")
    compute_min: float | None = setting(None, help="how far it may be lowered where a request does not say")
    report: str = setting("", help="report of eval to show on the page (default: MODEL/report/report.json)")
    runtime: str = setting("auto", help="auto: our own where it can; native: insist on it; stock: transformers")
    weights: str = setting("auto", help="our runtime's weights: fp32, bf16, fp16, int8, int4, mixed; auto: as --dtype")
    rows: int = setting(8, help="answers written at once")
    queue: int = setting(64, help="requests that may wait; more are sent away with 429")
    queue_seconds: float = setting(float("inf"), help="longest wait in the queue; then a request is sent away with 429")
    cache_tokens: int = setting(65536, help="rows times the longest row, in tokens: bounds the cache's memory")
    prefill_tokens: int = setting(512, help="prompt tokens read between two steps; longer prompts go in pieces")
    max_prompt_tokens: int = setting(4096, help="longest prompt")
    max_new_tokens: int = setting(2048, help="longest answer")
    new_tokens: int = setting(256, help="longest answer where a request does not say")
    max_body_bytes: int = setting(1 << 20, help="largest request")
    request_seconds: float = setting(300.0, help="longest time for a request")
    drain_seconds: float = setting(30.0, help="time for what is in flight, once told to end")
    log_level: str = setting("info", help="debug, info, warning or error")


def run(config: Config) -> dict[str, Any]:
    """Serve until told to end.

    Raises:
        SettingError: a setting is out of range, or the extra is not installed.
    """
    # Torch's threads would spin for a while after each operation, on cores that our own kernels need; it looks at
    # this when it is loaded, which nobody has done yet where this is the command of a process of its own.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    check_extra()
    _check(config)
    from rheostat.serve import logs
    from rheostat.serve.server import listen

    listener = listen(config.host, config.port)
    with listener:
        loaded = load(config.model, config)
        server, name = build(config, loaded)
        logs.set_up(config.log_level)
        host, port = listener.getsockname()[:2]
        out = terminal.console()
        out.print(f"serving  {name}, compute {loaded.adapted.dial.low:.3f} to 1 ({server.engine.backend.name})")
        out.print(f"page     http://{_shown(host)}:{port}/", soft_wrap=True)
        out.print(f"API      http://{_shown(host)}:{port}/v1", soft_wrap=True)
        server.serve_until_told(listener)
    return {"model": config.model, "name": name, "port": port}


def build(config: Config, loaded: Loaded) -> tuple[Server, str]:
    """The server, not yet serving, and the model's name."""
    from rheostat.report import schema
    from rheostat.serve.adaptive import Adaptive
    from rheostat.serve.app import create_app
    from rheostat.serve.backend import make_backend
    from rheostat.serve.curves import curves, find_report
    from rheostat.serve.engine import Engine
    from rheostat.serve.metrics import Metrics
    from rheostat.serve.scheduler import Limits, Scheduler
    from rheostat.serve.server import Server
    from rheostat.serve.service import Rules, Service

    computes = [config.compute] + ([] if config.compute_min is None else [config.compute_min])
    check_computes(loaded.adapted, computes)
    limits = Limits(
        rows=config.rows,
        queue=config.queue,
        queue_seconds=config.queue_seconds,
        cache_tokens=config.cache_tokens,
        prefill_tokens=config.prefill_tokens,
    )
    rules = Rules(
        name=config.name or Path(config.model).name or "model",
        compute=config.compute,
        compute_min=config.compute_min,
        hold=config.hold,
        max_prompt_tokens=config.max_prompt_tokens,
        max_new_tokens=config.max_new_tokens,
        new_tokens=config.new_tokens,
        request_seconds=config.request_seconds,
        max_body_bytes=config.max_body_bytes,
        api_key=config.api_key or os.environ.get(KEY) or None,
        origins=config.origins,
    )
    metrics = Metrics(rules.name)
    engine = Engine(
        loaded.adapted,
        loaded.tokenizer,
        make_backend(loaded.adapted, config.runtime, config.weights),
        Scheduler(limits),
        adaptive=Adaptive(config.adaptive_target) if config.adaptive else None,
        watcher=metrics,
    )
    metrics.watch(engine)
    report = find_report(config.model, config.report)
    shown = [] if report is None else curves(schema.read(report))
    app = create_app(Service(loaded.adapted, loaded.tokenizer, engine, rules, shown), metrics)
    return Server(app, engine, drain_seconds=config.drain_seconds), rules.name


def check_extra() -> None:
    """Refuse early, in one line, where the web server is not installed.

    Raises:
        SettingError: it is not.
    """
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise SettingError(f"serve: needs the package {error.name}: pip install 'rheostat[serve]'") from None


def _check(config: Config) -> None:
    for name in ("max_prompt_tokens", "max_new_tokens", "new_tokens", "max_body_bytes"):
        if getattr(config, name) < 1:
            raise bad_setting(name, getattr(config, name), "1 or more")
    for name in ("request_seconds", "drain_seconds"):
        if not getattr(config, name) > 0:
            raise bad_setting(name, getattr(config, name), "a number of seconds above 0")
    if config.log_level not in ("debug", "info", "warning", "error"):
        raise bad_setting("log_level", config.log_level, "debug, info, warning or error")
    if not 0 <= config.port <= 65535:
        raise bad_setting("port", config.port, "from 0 to 65535")
    if "@" in config.name:
        raise bad_setting("name", config.name, "without @, which sets the dial")


def _shown(host: str) -> str:
    """The address as it stands in a URL."""
    try:
        return f"[{host}]" if ipaddress.ip_address(host).version == 6 else host
    except ValueError:
        return host
