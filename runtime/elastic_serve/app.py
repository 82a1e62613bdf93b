"""The HTTP of it: routes, limits, keys, streams; everything else is the engine's."""

import asyncio
import contextlib
import hmac
import itertools
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from elastic_runtime.errors import ElasticError
from elastic_serve import answers, openapi, page
from elastic_serve.address import asked_locally, client_of, same_origin
from elastic_serve.body import ECHOED, Body, Limits, NoModelError, read, requests
from elastic_serve.engine import Drawn, Engine, Event, Failed, Order, Stepped
from elastic_serve.metrics import Metrics
from elastic_serve.relay import Relayed
from elastic_serve.served import Served

_log = logging.getLogger("elastic_serve")
GONE = 499  # what logs call a client that went away
EVENTS = "text/event-stream"
Events = asyncio.Queue[tuple[int, Event]]
# tell(place, event): what became of the picture at a place of a request
Tell = Callable[[int, Event], None]


class App:
    """The server over an engine; `asgi` is the application.

    key: what a client must know, where it is given. local: whether it answers to the names of this machine alone, so that no page from
    elsewhere reaches it under a name of its own (DNS rebinding), and `names`, in lower case, to which it answers all the same.
    """

    def __init__(
        self,
        engine: Engine,
        metrics: Metrics,
        key: str | None = None,
        limits: Limits | None = None,
        local: bool = False,
        names: tuple[str, ...] = (),
    ):
        self._engine, self._metrics, self._key, self._limits = (
            engine,
            metrics,
            None if key is None else key.encode(errors="surrogateescape"),
            limits or Limits(),
        )
        self._local, self._names = local, names
        self._begun, self._numbers = int(time.time()), itertools.count(1)
        routes = [
            Route("/v1/images/generations", self._keyed(self._generate), methods=["POST"]),
            Route("/v1/models", self._keyed(self._models)),
            Route("/v1/models/{name}", self._keyed(self._model)),
            Route("/metrics", self._keyed(self._measured)),
            Route("/health", self._health),
            Route("/openapi.json", self._keyed(self._openapi)),
            Route("/", self._page),
        ]
        handlers: dict[Any, Any] = {HTTPException: _http, Exception: _crash}
        self.asgi = Starlette(routes=routes, exception_handlers=handlers)

    def _keyed(self, endpoint: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        async def checked(request: Request) -> Response:
            # Not `request.url`, which stands in the server's own address for a header that it cannot read.
            host, origin = request.headers.get("host"), request.headers.get("origin")
            if self._local and host is not None and not asked_locally(host, self._names):
                names = f", {', '.join(self._names)}" if self._names else " alone"
                words = f"this server answers to localhost{names}: ask it there, or start it with the --server-name that a proxy hands on"
                return answers.failure(403, words, "wrong_host")
            # A page from elsewhere may send a form without asking first, and would draw with the visitor's rights.
            if origin is not None and not same_origin(origin, host or ""):
                words = "a page from elsewhere asks, and only this server's own may: ask without a browser, or have the proxy hand on Host"
                return answers.failure(403, words, "wrong_origin")
            if self._key is not None:
                scheme, _, given = request.headers.get("authorization", "").partition(" ")
                if scheme.lower() != "bearer" or not hmac.compare_digest(given.encode("latin-1"), self._key):
                    words = "this server asks for its API key: send the header 'Authorization: Bearer KEY'"
                    return answers.failure(401, words, "invalid_api_key", headers={"www-authenticate": "Bearer"})
            return await endpoint(request)

        return checked

    async def _page(self, request: Request) -> Response:
        return Response(page.html(), headers=page.headers(), media_type="text/html")

    async def _health(self, request: Request) -> Response:
        alive = self._engine.alive
        return answers.json(
            200 if alive else 503, {"status": "ok" if alive else "the engine has ended", "models": list(self._engine.models)}
        )

    async def _measured(self, request: Request) -> Response:
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _openapi(self, request: Request) -> Response:
        return answers.json(200, openapi.document(tuple(self._engine.models.values()), self._limits, self._key is not None))

    async def _models(self, request: Request) -> Response:
        models = [answers.model(served, self._begun) for served in self._engine.models.values()]
        return answers.json(200, {"object": "list", "data": models})

    async def _model(self, request: Request) -> Response:
        try:
            return answers.json(200, answers.model(self._served(request.path_params["name"]), self._begun))
        except NoModelError as error:
            return answers.json(*answers.error_of(error))

    def _served(self, name: str | None) -> Served:
        models = self._engine.models
        if name is None:
            return next(iter(models.values()))
        if name not in models:
            raise NoModelError(f"there is no model {name[:ECHOED]!r}; there are {', '.join(models)}", "model")
        return models[name]

    async def _generate(self, request: Request) -> Response:
        begun, number = time.monotonic(), next(self._numbers)
        served: Served | None = None
        body: Body | None = None
        status, drawn, streaming = 500, list[Drawn](), False
        try:
            try:
                text = await asyncio.wait_for(self._text(request), self._limits.reading)
            except asyncio.TimeoutError:
                words = f"the body did not come within {self._limits.reading:g} s: send it with the request"
                raise HTTPException(408, words, {"connection": "close"}) from None
            relayed = Relayed.of(request.scope)
            received = self._engine.now() - relayed.ago
            body = read(text, self._limits)
            served = self._served(body.model)
            events: Events = asyncio.Queue()
            client = client_of(request.client.host if request.client else "")
            tickets = await run_in_threadpool(self._submit, body, served, received, client, _teller(events), relayed.again)
            progress = _progress(request, events)
            if body.stream:
                streaming, outcome = True, _Outcome()

                def ended() -> None:
                    self._cancel(tickets)
                    self._note(number, served, body, outcome.status, begun, outcome.drawn)

                return _Streaming(self._stream(progress, body, outcome), ended)
            drawn = await self._wait(tickets, progress)
            status = 200
            return answers.json(200, await run_in_threadpool(answers.generation, drawn, body))
        except ClientDisconnect:
            status = GONE
            return Response(status_code=GONE)
        except HTTPException as error:
            status = error.status_code
            raise
        except Exception as error:
            status, content, headers = answers.error_of(error)
            if status == 500:
                _failed(error)
            return answers.json(status, content, headers)
        finally:
            if not streaming:
                self._note(number, served, body, status, begun, drawn)

    async def _text(self, request: Request) -> bytes:
        """The body, as long as it is no larger than allowed."""
        limit, parts, size = self._limits.body, list[bytes](), 0
        async for part in request.stream():
            size += len(part)
            if size > limit:
                raise HTTPException(413, f"a request is at most {limit} bytes here: send less")
            parts.append(part)
        return b"".join(parts)

    def _submit(self, body: Body, served: Served, received: float, client: str, tell: Tell, again: bool) -> tuple[int, ...]:
        deadline = None if body.deadline_ms is None else body.deadline_ms / 1e3
        asked = requests(body, served, self._limits)
        held: dict[str, Any] = {
            "quality": body.quality,
            "previews": body.partial_images,
            "most": self._limits.steps,
            "user": body.user or "",
            "again": again,
        }
        return self._engine.submit(
            [Order(served, each, partial(tell, place), received, client, deadline, **held) for place, each in enumerate(asked)]
        )

    def _cancel(self, tickets: Sequence[int]) -> None:
        """On another thread, without waiting for it: the engine may be busy with what comes next."""
        asyncio.get_running_loop().run_in_executor(None, self._engine.cancel, tickets)

    async def _wait(self, tickets: Sequence[int], progress: AsyncGenerator[tuple[int, Event], None]) -> list[Drawn]:
        """All pictures; raises ClientDisconnect where nobody waits for them any more, and what one of them failed with."""
        drawn: dict[int, Drawn] = {}
        try:
            async with contextlib.aclosing(progress):
                async for place, event in progress:
                    if isinstance(event, Failed):
                        raise event.error
                    if isinstance(event, Drawn):
                        drawn[place] = event
                    if len(drawn) == len(tickets):
                        break
        finally:
            if len(drawn) < len(tickets):
                self._cancel(tickets)
        return [drawn[place] for place in range(len(tickets))]

    async def _stream(
        self, progress: AsyncGenerator[tuple[int, Event], None], body: Body, outcome: "_Outcome"
    ) -> AsyncGenerator[bytes, None]:
        """Events up to the picture."""
        previews = 0
        with contextlib.suppress(ClientDisconnect):
            async with contextlib.aclosing(progress):
                async for _, event in progress:
                    if isinstance(event, Stepped) and event.preview is not None:
                        yield await run_in_threadpool(answers.partial, event.preview, previews, event.index, event.steps, body)
                        previews += 1
                    elif isinstance(event, Drawn):
                        outcome.drawn, outcome.status = [event], 200
                        yield await run_in_threadpool(answers.completed, event, body)
                        return
                    elif isinstance(event, Failed):
                        outcome.status, content, _ = answers.error_of(event.error)
                        if outcome.status == 500:
                            _failed(event.error)
                        yield answers.event("error", content)
                        return

    def _note(self, number: int, served: Served | None, body: Body | None, status: int, begun: float, drawn: Sequence[Drawn]) -> None:
        """One line of the log and the counters; what was asked for in words is in neither."""
        name = served.name if served else ""
        self._metrics.requests.labels(name, str(status)).inc()
        facts: dict[str, Any] = {"request": number, "model": name, "status": status, "seconds": round(time.monotonic() - begun, 4)}
        if body is not None:
            facts |= {"n": body.n, "stream": body.stream, "quality": body.quality, "steps": body.steps, "deadline_ms": body.deadline_ms}
        if drawn:
            facts["pictures"] = [answers.facts(each) for each in drawn]
        _log.info("request", extra={"facts": facts})


def _failed(error: Exception) -> None:
    """Into the log, and with its place in the code where nobody foresaw it."""
    _log.error("a picture failed: %s", error, exc_info=None if isinstance(error, ElasticError) else error)


@dataclass
class _Outcome:
    """What became of a stream."""

    status: int = GONE
    drawn: list[Drawn] = field(default_factory=list)


class _Streaming(StreamingResponse):
    """Server-sent events. Starlette leaves a source that is cut off, or was never begun, to the garbage collector; here it ends at once,
    and `ended` is told either way."""

    def __init__(self, source: AsyncGenerator[bytes, None], ended: Callable[[], None]):
        super().__init__(source, headers={"cache-control": "no-store", "x-accel-buffering": "no"}, media_type=EVENTS)
        self._source, self._ended = source, ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._ended()
            await self._source.aclose()


def _teller(events: Events) -> Tell:
    """What the engine's thread tells, put into the queue of this loop's thread."""
    loop = asyncio.get_running_loop()

    def tell(place: int, event: Event) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody listens
            loop.call_soon_threadsafe(events.put_nowait, (place, event))

    return tell


async def _progress(request: Request, events: Events) -> AsyncGenerator[tuple[int, Event], None]:
    """What the engine tells, as it comes; raises ClientDisconnect when the client goes away."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    leaving, event = asyncio.ensure_future(gone()), asyncio.ensure_future(events.get())
    try:
        while True:
            await asyncio.wait({leaving, event}, return_when=asyncio.FIRST_COMPLETED)
            if not event.done():
                raise ClientDisconnect
            yield event.result()
            event = asyncio.ensure_future(events.get())
    finally:
        leaving.cancel()
        event.cancel()


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    words = {404: f"there is nothing at {request.url.path}: see /openapi.json", 405: f"{request.url.path} does not take {request.method}"}
    codes = {404: "not_found", 405: "method_not_allowed", 408: "too_slow", 413: "too_large"}
    message = words.get(error.status_code, error.detail)
    return answers.failure(error.status_code, message, codes.get(error.status_code, "http_error"), headers=error.headers)


async def _crash(request: Request, error: Exception) -> Response:
    status, content, headers = answers.error_of(error)
    return answers.json(status, content, headers)
