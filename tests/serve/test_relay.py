"""A server whose pictures are drawn elsewhere: what was taken in outlives whoever drew it. Nothing here needs Ray."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("starlette", reason="serving needs starlette")

from elastic_runtime import ElasticPipeline
from elastic_serve.body import Limits
from elastic_serve.relay import ATTEMPTS, CREATE, Relay, Relayed, answered, soonest

Message = dict[str, Any]


class LostError(Exception):
    """Whoever answered is gone."""


class Client:
    """One request to an application, and what came of it."""

    def __init__(self, app: Any, body: bytes = b"{}", path: str = CREATE, method: str = "POST", slow: bool = False):
        self.parts: list[bytes] = []
        self.status, self.headers, self.ended = 0, dict[bytes, bytes](), False
        self.leaving = asyncio.Event()
        self._app, self._body, self._slow = app, body, slow
        self._scope = {
            "type": "http",
            "http_version": "1.1",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": [(b"host", b"localhost")],
            "client": ("127.0.0.1", 1),
            "server": ("localhost", 80),
            "scheme": "http",
        }

    async def run(self) -> "Client":
        given = False

        async def receive() -> Message:
            nonlocal given
            if not given and not self._slow:
                given = True
                return {"type": "http.request", "body": self._body, "more_body": False}
            await self.leaving.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            assert not self.ended, "nothing comes after the end"
            if message["type"] == "http.response.start":
                assert not self.status, "an answer begins once"
                self.status, self.headers = message["status"], dict(message["headers"])
            else:
                self.parts.append(message["body"])
                self.ended = not message.get("more_body", False)

        await self._app(self._scope, receive, send)
        return self

    @property
    def text(self) -> str:
        return b"".join(self.parts).decode()

    @property
    def json(self) -> Any:
        return json.loads(self.text)


Asked = list[tuple[Relayed, Any]]


def relay(*lives: Callable[[], AsyncIterator[Message]], limits: Limits | None = None) -> tuple[Relay, Asked]:
    """A relay whose requests are answered by each of `lives` in turn, and how they were asked."""
    asked: Asked = []

    async def ask(scope: Message, body: bytes, model: str | None) -> AsyncGenerator[Message, None]:
        life = lives[min(len(asked), len(lives) - 1)]
        asked.append((Relayed.of(scope), json.loads(body)))
        async for message in life():
            yield message

    return Relay(ask, (LostError,), limits), asked


def life(
    *parts: bytes, status: int = 200, lost: bool = False, head: bool = True, whole: bool = False
) -> Callable[[], AsyncIterator[Message]]:
    """Messages of an answer; where it is `lost`, the end does not come, or (`whole`) is the last thing to come."""

    async def messages() -> AsyncIterator[Message]:
        if head:
            yield {"type": "http.response.start", "status": status, "headers": []}
        for number, part in enumerate(parts):
            yield {"type": "http.response.body", "body": part, "more_body": (lost and not whole) or number < len(parts) - 1}
        if lost:
            raise LostError

    return messages


def preview(number: int) -> bytes:
    return b"event: image_generation.partial_image\ndata: %d\n\n" % number


DONE = b"event: image_generation.completed\ndata: {}\n\n"


def drawn(app: Any, *words: Any, **more: Any) -> Client:
    return asyncio.run(asyncio.wait_for(Client(app, *words, **more).run(), 20))


def test_an_answer_comes_through_as_it_is() -> None:
    app, asked = relay(life(b'{"a": 1}', status=429))
    client = drawn(app, b'{"model": "m", "seed": 3}')
    assert (client.status, client.json, client.ended) == (429, {"a": 1}, True)
    ((relayed, body),) = asked
    assert not relayed.again
    assert body == {"model": "m", "seed": 3}


def test_what_is_lost_is_asked_for_again_with_the_same_seed() -> None:
    app, asked = relay(life(lost=True, head=False), life(lost=True), life(b"{}"))
    client = drawn(app, b'{"seed": null}')
    assert (client.status, client.ended) == (200, True)
    assert [each.again for each, _ in asked] == [False, True, True]
    assert asked[0][0].ago <= asked[1][0].ago <= asked[2][0].ago
    assert len({body["seed"] for _, body in asked}) == 1, "a seed, and one for all"
    assert isinstance(asked[0][1]["seed"], int)


def test_what_is_lost_behind_its_end_was_answered() -> None:
    app, asked = relay(life(b"{}", lost=True, whole=True))
    client = drawn(app)
    assert (client.status, client.json, client.ended) == (200, {}, True)
    assert len(asked) == 1


def test_a_stream_goes_on_where_it_was() -> None:
    first = life(preview(0), preview(1), lost=True)
    app, _ = relay(first, life(preview(0), lost=True), life(preview(0), preview(1), preview(2), DONE, b""))
    client = drawn(app)
    assert client.text == (preview(0) + preview(1) + preview(2) + DONE).decode()
    assert client.ended


def test_a_stream_that_was_lost_behind_its_picture_is_whole() -> None:
    app, asked = relay(life(preview(0), DONE, lost=True))
    client = drawn(app)
    assert client.text == (preview(0) + DONE).decode()
    assert client.ended
    assert len(asked) == 1


def test_an_error_in_the_middle_of_a_stream_is_an_event() -> None:
    app, _ = relay(life(preview(0), lost=True), life(b'{"error": {"code": "closing"}}', status=503))
    client = drawn(app)
    assert client.status == 200
    assert client.text.endswith('event: error\ndata: {"type":"error","error":{"code":"closing"}}\n\n')
    assert client.ended


def test_what_is_lost_each_time_is_told_so() -> None:
    app, asked = relay(life(lost=True))
    client = drawn(app)
    assert (client.status, client.json["error"]["code"]) == (503, "lost")
    assert len(asked) == ATTEMPTS


def test_a_body_that_never_comes_and_one_that_is_too_large() -> None:
    app, asked = relay(life(b"{}"), limits=Limits(body=100, reading=0.2))
    assert drawn(app, slow=True).status == 408
    assert not asked
    large = b'{"prompt": "' + b"x" * 200 + b'"}'
    drawn(app, large)
    assert "seed" not in asked[0][1], "it goes on as it came, to be refused where it is read"


def test_a_client_that_leaves_ends_what_is_drawn_for_it() -> None:
    ended = []

    async def forever() -> AsyncIterator[Message]:
        try:
            yield {"type": "http.response.start", "status": 200, "headers": []}
            yield {"type": "http.response.body", "body": preview(0), "more_body": True}
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    async def leave() -> None:
        app, _ = relay(forever)
        client = Client(app)
        running = asyncio.ensure_future(client.run())
        while not client.parts:
            await asyncio.sleep(0.01)
        client.leaving.set()
        await asyncio.wait_for(running, 10)

    asyncio.run(leave())
    assert ended == [True]


def test_who_is_soonest() -> None:
    slow = {"models": {"a": {"wait": 2.0, "alone": 0.5}, "b": {"wait": 1.0, "alone": 0.1}}}
    fast = {"models": {"a": {"wait": 1.5, "alone": 0.4}, "b": {"wait": 1.25, "alone": 0.1}}}
    assert soonest([(slow, 0), (fast, 0)], "a") == soonest([(slow, 0), (fast, 0)], None) == [1, 0]
    assert soonest([(slow, 0), (fast, 0)], "b") == [0, 1]
    assert soonest([(slow, 3), (fast, 0)], "b") == [1, 0], "by what was sent since"
    assert soonest([(slow, 0), ({}, 0)], "a") == [1, 0], "of whom nothing is known is new, and idle"
    assert soonest([(slow, 0), ({}, 6)], "a") == [0, 1], "and has what was sent there"
    assert soonest([({}, 2), ({}, 1)], "a") == [1, 0]


def test_what_a_request_waits_between_machines_is_of_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    arrivals: list[Relayed] = []

    async def ask(scope: Message, body: bytes, model: str | None) -> AsyncGenerator[Message, None]:
        clock = time.time() + (2.0 if not arrivals else -2.0)  # held up on the way; and a machine whose clock is slow
        monkeypatch.setattr("elastic_serve.relay.time", SimpleNamespace(time=lambda: clock, monotonic=time.monotonic))
        arrivals.append(Relayed.of(scope))
        monkeypatch.undo()
        async for message in life(b"{}", lost=len(arrivals) == 1, head=len(arrivals) > 1)():
            yield message

    drawn(Relay(ask, (LostError,)))
    assert 2.0 <= arrivals[0].ago < 3.0
    assert 0.0 <= arrivals[1].ago < 1.0


@pytest.fixture
def application(digits: Path) -> Iterator[Callable[[], tuple[Any, Any]]]:
    """Applications with engines of their own over one bundle."""
    pytest.importorskip("uvicorn", reason="serving needs uvicorn")
    from elastic_serve.served import Served
    from elastic_serve.server import Settings
    from elastic_serve.server import application as made

    with contextlib.ExitStack() as stack:

        def make() -> tuple[Any, Any]:
            served = Served("digits", ElasticPipeline.from_pretrained(digits, "ort", lanes=1))
            app, engine = made([served], Settings(queue=2), None)
            stack.callback(served.close)
            stack.callback(engine.close)
            return app.asgi, engine

        yield make


def losing(app: Any, engine: Any, after: int) -> Callable[[Message, bytes], AsyncIterator[Message]]:
    """Answers of an application that is lost after some steps of its picture."""

    async def ask(scope: Message, body: bytes) -> AsyncIterator[Message]:
        async with contextlib.aclosing(answered(app, scope, body)) as messages:
            coming = asyncio.ensure_future(anext(messages))
            while not any(job.taken >= after for job in engine.scheduler.jobs):
                await asyncio.sleep(0.002)
                assert not coming.done(), "it was to be lost before"
            coming.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await coming
        raise LostError
        yield {}

    return ask


def test_a_picture_outlives_who_drew_it_though_there_is_no_room_and_it_is_late(application: Callable[[], tuple[Any, Any]]) -> None:
    (first, dying), (second, other) = application(), application()
    body = json.dumps({"class_labels": 4, "steps": 60, "budget": {"latents": 64}, "seed": 11, "deadline_ms": 60_000}).encode()
    times: list[Relayed] = []

    async def ask(scope: Message, sent: bytes, model: str | None) -> AsyncGenerator[Message, None]:
        times.append(Relayed.of(scope))
        if len(times) == 1:
            async for message in losing(first, dying, 5)(scope, sent):
                yield message
        late = dict(scope, extensions={"elastic.relayed": {"ago": 100.0, "sent": time.time(), "again": True}})  # as after a long time
        async for message in answered(second, late, sent):
            yield message

    async def everything() -> tuple[Client, Client, list[Client]]:
        alone = await Client(second, body).run()
        filling = [asyncio.ensure_future(Client(second, b'{"class_labels": 1, "steps": 100}').run()) for _ in range(2)]
        while len(other.scheduler) < 2:  # all that its queue holds
            await asyncio.sleep(0.01)
        refused = await Client(second, body).run()
        assert refused.json["error"]["code"] == "queue_full"
        client = await Client(Relay(ask, (LostError,)), body).run()
        return alone, client, [await each for each in filling]

    alone, client, others = asyncio.run(asyncio.wait_for(everything(), 60))
    assert (client.status, [each.again for each in times]) == (200, [False, True])
    assert client.json["data"][0]["b64_json"] == alone.json["data"][0]["b64_json"]
    assert client.json["data"][0]["elastic"]["late_ms"] >= 40_000, "it says by how much"
    assert [each.status for each in others] == [200, 200]
    assert len(dying.scheduler) == 0


def test_what_an_engine_foresees_grows_with_what_it_has(application: Callable[[], tuple[Any, Any]]) -> None:
    from elastic_serve.server import QUEUE

    app, engine = application()
    engine.scheduler.queue = QUEUE

    async def busy() -> tuple[dict[str, float], dict[str, float]]:
        idle = engine.forecast()["digits"]
        async with contextlib.aclosing(answered(app, Client(app)._scope, b'{"class_labels": 1, "steps": 250, "n": 10}')) as messages:
            coming = asyncio.ensure_future(anext(messages))
            while len(engine.scheduler) < 10:
                await asyncio.sleep(0.001)
            forecast = engine.forecast()["digits"]
            coming.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await coming
        return idle, forecast

    idle, forecast = asyncio.run(asyncio.wait_for(busy(), 30))
    assert idle["wait"] == pytest.approx(idle["alone"])
    assert forecast["wait"] > 2 * forecast["alone"]
