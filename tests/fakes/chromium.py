"""A real headless Chromium, driven over its DevTools protocol through a pair of pipes."""

import base64
import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PROGRAMS = ("chromium", "chromium-headless-shell", "google-chrome", "chromium-browser")
CHROMIUM = next(filter(None, map(shutil.which, PROGRAMS)), None)
PATIENCE = 60.0  # seconds
SWIFTSHADER = ("--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan", "--use-vulkan=swiftshader")

# The browser reads from descriptor 3 and writes to 4: become it with the two that are given there.
PIPED = """
import fcntl, os, sys
read, write = (fcntl.fcntl(int(each), fcntl.F_DUPFD, 10) for each in sys.argv[1:3])
os.dup2(read, 3)
os.dup2(write, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


class LeftError(AssertionError):
    """A page was left while it was asked: what it was to run is gone with it."""


class Browser:
    """One page of a browser. What the page says on its console, and what goes wrong in it, is in `console`."""

    def __init__(self, write: Any, read: Any):
        self._write, self._read, self._number = write, read, 0
        self._session: str | None = None
        self.console: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One call of the protocol, and its answer."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters} | ({"sessionId": self._session} if self._session else {})
        self._write.write(json.dumps(message).encode() + b"\0")
        self._write.flush()
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                reason = str(answer.get("error", {}).get("message", ""))
                if "context" in reason or "navigated" in reason:
                    raise LeftError(reason)
                assert "error" not in answer, answer
                return dict(answer["result"])

    def open(self, address: str) -> None:
        self.call("Page.navigate", url=address)

    def value(self, expression: str) -> Any:
        """What an expression gives in the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def until(self, expression: str) -> Any:
        """Wait until an expression is true in the page."""
        end = time.monotonic() + PATIENCE
        while not (value := self._yet(expression)):
            assert time.monotonic() < end, f"{expression} did not become true; the console: {self.console}"
            time.sleep(0.02)
        return value

    def _yet(self, expression: str) -> Any:
        try:
            return self.value(expression)
        except LeftError:
            return None

    def screenshot(self, path: Path, width: int = 1200, height: int = 900) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def _next(self) -> dict[str, Any]:
        text = bytearray()
        while not text.endswith(b"\0"):
            part = self._read.read(1)
            assert part, "the browser has ended"
            text += part
        message: dict[str, Any] = json.loads(text[:-1])
        details = message.get("params", {})
        if message.get("method") == "Runtime.consoleAPICalled":
            self.console.append(" ".join(str(each.get("value")) for each in details["args"]))
        if message.get("method") == "Runtime.exceptionThrown":
            self.console.append(details["exceptionDetails"]["text"])
        if message.get("method") == "Log.entryAdded":
            self.console.append(details["entry"]["text"])
        return message


@contextlib.contextmanager
def browser(folder: Path, gpu: bool = False) -> Iterator[Browser]:
    """A browser with a profile of its own in `folder`; `gpu` gives it one for WebGPU, which SwiftShader computes on the CPU."""
    assert CHROMIUM is not None
    to_read, to_write = os.pipe()
    from_read, from_write = os.pipe()
    command = [sys.executable, "-c", PIPED, str(to_read), str(from_write), CHROMIUM, "--headless", "--no-sandbox",
               "--remote-debugging-pipe", f"--user-data-dir={folder}", "--no-first-run", "--disable-background-networking",
               *(SWIFTSHADER if gpu else ("--disable-gpu",))]  # fmt: skip
    running = subprocess.Popen(command, pass_fds=(to_read, from_write), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    os.close(to_read)
    os.close(from_write)
    with os.fdopen(to_write, "wb") as write, os.fdopen(from_read, "rb") as read:
        try:
            yield Browser(write, read)
        finally:
            running.kill()
            running.wait()
