"""A client that stops reading and goes away, as a server tells the application of it."""

import asyncio
import json
from typing import Any

import pytest
from serving import Running

from elastic_serve.app import App

BODY = {"class_labels": 1, "steps": 200, "stream": True, "partial_images": 16}


@pytest.mark.parametrize("stalled", ["http.response.start", "http.response.body"])
def test_a_stream_that_nobody_reads_ends_when_its_client_goes(server: Running, stalled: str) -> None:
    app = App(server.engine, server.engine.metrics)
    gone = server.engine.metrics.requests.labels("digits", "499")
    before = gone._value.get()
    asyncio.run(asyncio.wait_for(asked(app, stalled), 30))
    assert len(server.engine.scheduler) == 0
    assert gone._value.get() == before + 1, "it is counted, and in the log, though nothing of it was sent"


async def asked(app: App, stalled: str) -> None:
    """Send a request, take nothing from the first message of a kind on, and go."""
    full, given = asyncio.Event(), False

    async def receive() -> dict[str, Any]:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": json.dumps(BODY).encode(), "more_body": False}
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
