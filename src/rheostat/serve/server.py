"""The web server around the app: binds, serves, and on SIGTERM finishes what it has before it ends."""

from __future__ import annotations

import signal
import socket
from types import FrameType
from typing import Any

import uvicorn

from rheostat.errors import SettingError
from rheostat.serve.engine import Engine


class Server(uvicorn.Server):
    """`uvicorn`'s, which tells the engine as soon as it is told to end."""

    def __init__(self, app: Any, engine: Engine, *, drain_seconds: float) -> None:
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="off",
            timeout_keep_alive=30,
            timeout_graceful_shutdown=max(1, round(drain_seconds)),
            h11_max_incomplete_event_size=64 * 1024,
            ws="none",
        )
        super().__init__(config)
        self.engine = engine

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """First signal: finish. Second: end."""
        self.engine.drain()
        super().handle_exit(sig, frame)

    def serve_until_told(self, listener: socket.socket) -> None:
        """Serve; returns once a signal has come and what was in flight is done, or the time for that is over."""
        # uvicorn raises the signal once more when it is done; to us a wish to end that was granted is no failure.
        before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGTERM, signal.SIGINT)}
        self.engine.start()
        try:
            self.run(sockets=[listener])
        finally:
            self.engine.stop()
            for number, handler in before.items():
                signal.signal(number, handler)


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound and listens.

    Raises:
        SettingError: the address cannot be had.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=512)
    except (OSError, OverflowError) as error:
        raise SettingError(f"host={host!r}, port={port}: cannot listen there ({error})") from None
