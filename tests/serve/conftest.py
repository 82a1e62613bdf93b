"""A real server over a small bundle, on a thread of its own, and what talks to it."""

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import Running, Serving


@pytest.fixture(scope="session")
def serving(digits: Path) -> Serving:
    """`with serving(**settings) as server`: the bundle `digits` served under the name `digits`."""
    pytest.importorskip("uvicorn", reason="serving needs uvicorn")
    pytest.importorskip("openai", reason="the official client draws in these tests")
    from elastic_runtime import ElasticPipeline
    from elastic_serve.served import Served
    from elastic_serve.server import Settings, listening

    @contextlib.contextmanager
    def serve(**settings: Any) -> Iterator[Running]:
        served = Served("digits", ElasticPipeline.from_pretrained(digits, "ort", lanes=1))
        addresses: list[str] = []
        listens = threading.Event()

        def ready(address: str) -> None:
            addresses.append(address)
            listens.set()

        server, engine = listening([served], Settings(port=0, **settings), ready)
        thread = threading.Thread(target=server.run, name="server")
        thread.start()
        try:
            assert listens.wait(20), "the server did not listen"
            running = Running(addresses[0], engine)
            yield running
            for client in running.clients:
                client.close()
        finally:
            server.should_exit = True
            thread.join(30)
            engine.close()
            served.close()
            assert not thread.is_alive()

    return serve


@pytest.fixture(scope="session")
def server(serving: Serving) -> Iterator[Running]:
    """One server for all tests that leave it as it was."""
    with serving() as running:
        yield running
