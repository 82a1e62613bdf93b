"""A server whose pictures are drawn elsewhere: requests are handed on, and again where what they were handed to is lost.

`answered` runs an application on one request without a network, where it is drawn; `Relay` is the application in front. What was taken in
is not lost with whoever drew it: the request goes on to another with the time that it has left, is not refused there, and draws the same
picture, since it has a seed. Nothing here knows what hands it on.
"""

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from elastic_serve import answers
from elastic_serve.body import Limits

ATTEMPTS = 5
RELAYED = "elastic.relayed"  # of a scope's extensions: which no request from outside can have
CREATE = "/v1/images/generations"
PREVIEW = b"event: image_generation.partial_image\n"
LAST = (b"event: image_generation.completed\n", b"event: error\n")
PLAIN = ("type", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path", "headers", "client", "server")
SEEDS = 2**53  # which every reader of JSON has whole
# ask(scope, body, model): the messages of an answer, where it is drawn
Ask = Callable[[dict[str, Any], bytes, str | None], AsyncGenerator[Message, None]]


@dataclass(frozen=True)
class Relayed:
    """How a request came here: `ago` seconds after it was received in front, and whether it was taken in before, elsewhere."""

    ago: float = 0.0
    again: bool = False

    @classmethod
    def of(cls, scope: Mapping[str, Any]) -> "Relayed":
        """What a request's scope says of it."""
        relayed = (scope.get("extensions") or {}).get(RELAYED)
        if not relayed:
            return cls()
        # What hands it on may hold it for long; between machines only the time of day is common, and may be set a little apart.
        return cls(relayed["ago"] + max(time.time() - relayed["sent"], 0.0), relayed["again"])


async def answered(app: ASGIApp, scope: Mapping[str, Any], body: bytes) -> AsyncGenerator[Message, None]:
    """The messages with which an application answers a request; who closes this early is a client that went away."""
    messages: asyncio.Queue[Message | None] = asyncio.Queue()
    left, given = asyncio.Event(), False

    async def receive() -> Message:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": body, "more_body": False}
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        messages.put_nowait(message)

    running = asyncio.ensure_future(app(dict(scope), receive, send))
    running.add_done_callback(lambda _: messages.put_nowait(None))
    try:
        while (message := await messages.get()) is not None:
            yield message
    finally:
        left.set()
        with contextlib.suppress(Exception):  # which it has answered and logged
            await running


class Relay:
    """The application in front. `lost` are the errors of `ask` that tell that whoever answered is gone."""

    def __init__(self, ask: Ask, lost: tuple[type[Exception], ...], limits: Limits | None = None):
        self._ask, self._lost, self._limits = ask, lost, limits or Limits()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        received = time.monotonic()
        try:
            body = await asyncio.wait_for(self._body(receive), self._limits.reading)
        except asyncio.TimeoutError:
            words = f"the body did not come within {self._limits.reading:g} s: send it with the request"
            await answers.failure(408, words, "too_slow", headers={"connection": "close"})(scope, receive, send)
            return
        except ClientDisconnect:
            return
        plain = {name: scope[name] for name in PLAIN if name in scope}
        model = None
        if scope["method"] == "POST" and scope["path"] == CREATE and len(body) <= self._limits.body:
            body, model = _seeded(body)
        answering = asyncio.ensure_future(_Answer(self._ask, self._lost, send).run(plain, body, model, received))
        leaving = asyncio.ensure_future(_left(receive))
        try:
            await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            done = answering.done()
            for task in (answering, leaving):
                task.cancel()
            await asyncio.wait({answering, leaving})
        if done:
            answering.result()

    async def _body(self, receive: Receive) -> bytes:
        """The body, or as much of it as tells that it is too large."""
        parts, size, more = list[bytes](), 0, True
        while more and size <= self._limits.body:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            parts.append(message.get("body", b""))
            size, more = size + len(parts[-1]), message.get("more_body", False)
        return b"".join(parts)


class _Answer:
    """One answer, put together from what one or several gave of it."""

    def __init__(self, ask: Ask, lost: tuple[type[Exception], ...], send: Send):
        self._ask, self._lost, self._send = ask, lost, send
        self._begun = self._ended = self._whole = False
        self._previews = 0

    async def run(self, scope: Mapping[str, Any], body: bytes, model: str | None, received: float) -> None:
        for attempt in range(ATTEMPTS):
            relayed = {"ago": time.monotonic() - received, "sent": time.time(), "again": attempt > 0}
            asked = dict(scope) | {"extensions": {RELAYED: relayed}}
            try:
                async with contextlib.aclosing(self._ask(asked, body, model)) as messages:
                    await self._take(messages)
                return
            except self._lost:
                if self._whole:
                    return
                if self._ended:  # all but the empty message behind it
                    await self._send({"type": "http.response.body", "body": b"", "more_body": False})
                    return
        error = answers.failure(503, f"what draws was lost {ATTEMPTS} times: ask again later", "lost", "server_error")
        await self._take(answered(error, scope, b""))

    async def _take(self, messages: AsyncGenerator[Message, None]) -> None:
        """Send on what comes, but for previews that were sent before."""
        head: Message | None = None
        seen, sent = 0, self._previews
        async for message in messages:
            if message["type"] == "http.response.start":
                head = message
                continue
            part, more = message.get("body", b""), message.get("more_body", False)
            if not self._begun and head is not None:  # with the first part, so that until then another can answer
                await self._send(head)
                self._begun = True
            elif head is not None and head["status"] != 200:  # an error, in the middle of a stream
                part = answers.event("error", msgspec.json.decode(part)) if part else part
            if part.startswith(PREVIEW):
                seen += 1
                if seen <= sent:
                    continue
                self._previews += 1
            self._ended = self._ended or part.startswith(LAST)
            self._whole = not more
            await self._send({"type": "http.response.body", "body": part, "more_body": more})


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _seeded(body: bytes) -> tuple[bytes, str | None]:
    """A body with a seed, so that it draws the same picture wherever it is drawn, and the model that it names."""
    try:
        content = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError):
        return body, None  # which is told so where it is read
    if not isinstance(content, dict):
        return body, None
    if content.get("seed") is None:
        body = msgspec.json.encode(content | {"seed": secrets.randbelow(SEEDS)})
    model = content.get("model")
    return body, model if isinstance(model, str) else None


def soonest(loads: Sequence[tuple[Mapping[str, Any], int]], model: str | None) -> list[int]:
    """Replicas, by their places, in the order in which they would be done with a picture.

    `loads` are what each foresaw when it was last asked, and how many pictures were sent there since. One that has foreseen nothing yet
    is new and idle: what was sent there takes as long as elsewhere.
    """
    rows = [models.get(model) or next(iter(models.values()), None) for models in (forecast.get("models") or {} for forecast, _ in loads)]
    usual = min((row["alone"] for row in rows if row), default=1.0)
    waits = [row["wait"] + sent * row["alone"] if row else sent * usual for row, (_, sent) in zip(rows, loads, strict=True)]
    return sorted(range(len(waits)), key=waits.__getitem__)
