"""The process: opens bundles, listens, and drains when it is told to end."""

import asyncio
import contextlib
import logging
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import msgspec
import uvicorn

from elastic_runtime.errors import UsageError
from elastic_serve.address import NAME, bound, is_local
from elastic_serve.app import App
from elastic_serve.body import Limits
from elastic_serve.engine import Engine
from elastic_serve.metrics import Metrics
from elastic_serve.scheduler import MARGIN, QUEUE, Scheduler
from elastic_serve.served import Served, named

KEY = "ELASTIC_EXPORT_API_KEY"
HEADERS = 1 << 14  # bytes of a request's head
CONNECTIONS = 2048
LONGEST = 3600.0  # seconds that pictures in flight may get when the server ends
ANSWERING = 5  # seconds for the answers, after that, and for the step and the prompt in progress
AT_ONCE = 0.5  # seconds for these where the server is told twice
_log = logging.getLogger("elastic_serve")


@dataclass(frozen=True)
class Settings:
    """How to serve.

    queue: pictures that wait or are drawn, at most. margin: the share of a deadline that is kept for what nothing predicts. wish: seconds
    in which a picture is to be done whose request names no deadline; None: three times what it takes at its best. batch: rows of the
    largest run that pictures share; None: what the bundle takes. drain: seconds that pictures in flight get when the server ends. names:
    of hosts that it answers to beside this machine's own, where it listens to this machine alone: those of a proxy before it.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    backend: str | None = None
    precisions: tuple[str, ...] = ()
    queue: int = QUEUE
    margin: float = MARGIN
    wish: float | None = None
    batch: int | None = None
    drain: float = 30.0
    names: tuple[str, ...] = ()
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if not 0 <= self.drain <= LONGEST:
            raise UsageError(f"--drain-seconds is 0 to {LONGEST:.0f}, got {self.drain}: take a time in which the process may end")
        if odd := [name for name in self.names if not NAME.fullmatch(name)]:
            raise UsageError(f"--server-name is names of hosts, pictures.example.com, without a port; got {odd[0]!r}")


class Lines(logging.Formatter):
    """A line of JSON for each thing that happened."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {"time": round(record.created, 3), "level": record.levelname.lower(), "what": record.getMessage()}
        line |= getattr(record, "facts", {})
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line).decode()


def serve(folders: Sequence[Path], settings: Settings | None = None, ready: Callable[[str], None] | None = None) -> None:
    """Serve bundles until the process is told to end; `ready(address)` is called when it listens.

    Raises: what opening a bundle raises; UsageError for two bundles of one name, a key that no client could send, and an address that
    cannot be had.
    """
    settings = settings or Settings()
    named(folders)
    secret = key()
    log()
    exposed(settings, secret)
    with contextlib.ExitStack() as stack:
        sockets = bound(settings.host, settings.port)  # before the bundles, whose opening takes long
        for each in sockets:
            stack.callback(each.close)
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore", UserWarning)  # which quote a prompt that an encoder cuts
        models = [stack.enter_context(opened(folder, settings)) for folder in folders]
        server, engine = listening(models, settings, ready)
        try:
            server.run(sockets)
        except (KeyboardInterrupt, SystemExit):  # uvicorn hands the signal on when it is done
            pass
        finally:
            if not engine.close(patience=0.0):
                _end()
        _log.info("closed")


def _end() -> NoReturn:
    """End the process though a step or a prompt goes on, in a bundle that cannot be closed under it."""
    _log.info("closed", extra={"facts": {"left": "a step or a prompt that was in progress"}})
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(0)


def exposed(settings: Settings, secret: str | None) -> None:
    """Warn where others can reach the server and need no key."""
    if not is_local(settings.host) and not secret:
        _log.warning("listening on %s, where others can reach it, without an API key: set %s, or take --host 127.0.0.1", settings.host, KEY)


@contextlib.contextmanager
def opened(folder: Path, settings: Settings) -> Iterator[Served]:
    """A bundle as the settings say, told of in the log, for as long as the block lasts."""
    begun = time.perf_counter()
    served = Served.open(folder, settings.backend, settings.precisions, settings.batch)
    try:
        facts = {"model": served.name, "where": served.session.where, "seconds": round(time.perf_counter() - begun, 2)}
        _log.info("opened", extra={"facts": facts})
        if turns := served.batching():
            _log.info("pictures of %s take turns: %s", served.name, turns)
        yield served
    finally:
        served.close()


def key() -> str | None:
    """The key that clients must know, where there is one.

    Raises: UsageError for one that no header carries.
    """
    given = os.environ.get(KEY) or None
    if given and given != given.strip():
        raise UsageError(f"{KEY} begins or ends with white space, which no header carries: take it away")
    return given


def application(models: Sequence[Served], settings: Settings, secret: str | None) -> tuple[App, Engine]:
    """The application over open bundles, for clients who know the `secret` where there is one, and its engine."""
    metrics = Metrics()
    scheduler = partial(Scheduler, queue=settings.queue, margin=settings.margin)
    engine = Engine(models, metrics, scheduler, wish=settings.wish)
    return App(engine, metrics, secret, settings.limits, is_local(settings.host), tuple(name.lower() for name in settings.names)), engine


def listening(models: Sequence[Served], settings: Settings, ready: Callable[[str], None] | None = None) -> tuple["Server", Engine]:
    """A server over open bundles, not yet running, and its engine."""
    app, engine = application(models, settings, key())
    config = uvicorn.Config(
        app.asgi,
        host=settings.host,
        port=settings.port,
        http="h11",  # whatever else is installed: the limit of a head is its own
        log_config=None,
        access_log=False,
        server_header=False,
        h11_max_incomplete_event_size=HEADERS,
        limit_concurrency=CONNECTIONS,
        timeout_keep_alive=10,
        timeout_graceful_shutdown=math.ceil(settings.drain) + ANSWERING,
        ws="none",
    )
    return Server(config, engine, settings.drain, ready), engine


class Server(uvicorn.Server):
    """uvicorn's, which tells when it listens, and where, and closes the engine when it ends."""

    def __init__(self, config: uvicorn.Config, engine: Engine, drain: float, ready: Callable[[str], None] | None = None):
        super().__init__(config)
        self._engine, self._drain, self._ready = engine, drain, ready

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        if self.started and self.servers:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
            _log.info("listening", extra={"facts": {"address": address}})
            if self._ready:
                self._ready(address)

    async def shutdown(self, sockets: Any = None) -> None:
        # The engine first: uvicorn waits for answers, and those whose time is over are the engine's to give.
        closing = asyncio.ensure_future(asyncio.to_thread(self._engine.close, self._drain, ANSWERING))
        await super().shutdown(sockets)
        if self.force_exit and not await asyncio.to_thread(self._engine.close, 0.0, AT_ONCE):  # a second Ctrl-C: nothing more is drawn
            _end()
        await closing


def log() -> None:
    """Lines of JSON on stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Lines())
    for name in ("elastic_serve", "elastic_runtime", "uvicorn.error", "asyncio"):
        logger = logging.getLogger(name)
        logger.handlers[:], logger.propagate = [handler], False
        logger.setLevel(logging.INFO if name.startswith("elastic") else logging.WARNING)
