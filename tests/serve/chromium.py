"""Headless Chromium through its debugging pipe: one page, commands in JSON, no further packages."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Page:
    """An open page."""

    def __init__(self, to: int, back: int) -> None:
        self.to, self.back = to, back
        self.session: str | None = None
        self.number, self.buffer = 0, b""
        self.messages: list[dict[str, Any]] = []
        """What the browser told unasked."""

    def call(self, method: str, seconds: float = 30, **parameters: Any) -> dict[str, Any]:
        """A command and its result."""
        self.number += 1
        body: dict[str, Any] = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            body["sessionId"] = self.session
        os.write(self.to, json.dumps(body).encode() + b"\0")
        deadline = time.monotonic() + seconds
        while True:
            message = self._receive(deadline)
            if message.get("id") == self.number:
                assert "error" not in message, message
                return message["result"]
            self.messages.append(message)

    def _receive(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self.buffer:
            left = deadline - time.monotonic()
            assert left > 0, "the browser does not answer"
            if select.select([self.back], [], [], left)[0]:
                self.buffer += os.read(self.back, 1 << 20)
        line, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(line)

    def open(self, url: str) -> None:
        """Show a page and wait until it says that it is ready."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.call("Runtime.enable")
        self.call("Log.enable")
        self.call("Page.enable")
        self.call("Page.navigate", url=url)
        self.until("document.body && document.body.dataset.state === 'ready'")

    def run(self, code: str) -> Any:
        """The value of an expression."""
        result = self.call("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def until(self, code: str, seconds: float = 60) -> None:
        """Wait until an expression is true."""
        deadline = time.monotonic() + seconds
        while not self.run(code):
            assert time.monotonic() < deadline, f"not in time: {code}"
            time.sleep(0.05)

    def key(self, key: str, modifiers: int = 0) -> None:
        """Press and release a key; modifiers: 2 is Ctrl."""
        codes = {"Enter": 13, "Escape": 27, "Tab": 9, "ArrowLeft": 37, "ArrowDown": 40}
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=codes[key], modifiers=modifiers
            )

    def look(self, width: int, height: int, *, dark: bool = False) -> None:
        """The size of the window, and what the reader prefers."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=scheme)

    def shoot(self, path: Path) -> None:
        """A picture of the whole page."""
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))

    @property
    def complaints(self) -> list[str]:
        """Errors and exceptions on the page."""
        found = []
        for one in self.messages:
            if one.get("method") == "Runtime.exceptionThrown":
                found.append(str(one["params"]["exceptionDetails"]))
            if one.get("method") == "Log.entryAdded" and one["params"]["entry"]["level"] == "error":
                found.append(str(one["params"]["entry"]))
        return found


@contextmanager
def chromium(profile: Path) -> Iterator[Page]:
    """A browser, until the block ends."""
    assert BROWSER is not None
    to_child, to = os.pipe()
    back, from_child = os.pipe()

    def place_pipes() -> None:
        os.dup2(to_child, 13)
        os.dup2(from_child, 14)
        os.dup2(13, 3)
        os.dup2(14, 4)

    command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
               "--disable-background-networking", f"--user-data-dir={profile}", "--remote-debugging-pipe",
               "about:blank"]  # fmt: skip
    process = subprocess.Popen(
        command, preexec_fn=place_pipes, close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    os.close(to_child)
    os.close(from_child)
    page = Page(to, back)
    try:
        yield page
    finally:
        os.close(to)
        os.close(back)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
