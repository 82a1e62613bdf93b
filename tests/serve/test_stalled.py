"""A client that stops reading and goes away, as a server tells the application of it."""

import asyncio
import json
from typing import Any

import pytest
from serving import Running

from elastic_serve.app import App

BODY = {"class_labels": 1, "steps": 200, "stream": True, "partial_images": 16}
ALONE = {"class_labels": 1, "steps": 250, "n": 4}


@pytest.mark.parametrize("stalled", ["http.response.start", "http.response.body"])
def test_a_stream_that_nobody_reads_ends_when_its_client_goes(server: Running, stalled: str) -> None:
    app = App(server.engine, server.engine.metrics)
    gone = server.engine.metrics.requests.labels("digits", "499")
    before = gone._value.get()
    asyncio.run(asyncio.wait_for(asked(app, stalled), 30))
    assert len(server.engine.scheduler) == 0
    assert gone._value.get() == before + 1, "it is counted, and in the log, though nothing of it was sent"


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_leaves_nothing_waiting(server: Running, stream: bool) -> None:
    left: list[asyncio.Task[Any]] = []

    async def leave() -> None:
        await asked(App(server.engine, server.engine.metrics), "nothing", BODY if stream else ALONE, leave_at=0.2)
        await asyncio.sleep(0.1)
        left.extend(asyncio.all_tasks() - {asyncio.current_task()})

    asyncio.run(leave())
    assert not left
    assert len(server.engine.scheduler) == 0


async def asked(app: App, stalled: str, body: dict[str, Any] = BODY, leave_at: float | None = None) -> None:
    """Send a request, take nothing from the first message of a kind on, and go, after a time at the latest."""
    full, given = asyncio.Event(), False
    if leave_at is not None:
        asyncio.get_running_loop().call_later(leave_at, full.set)

    async def receive() -> dict[str, Any]:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}
        await full.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if message["type"] == stalled:
            full.set()
            await asyncio.Event().wait()

    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": "/v1/images/generations",
        "query_string": b"",
        "headers": [(b"host", b"localhost")],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
    }
    await app.asgi(scope, receive, send)
