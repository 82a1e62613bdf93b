"""Load on a server: requests at the times of a Poisson process, and who is on time when more is asked for than the best budget can draw.

A real server process is asked. Ours, which chooses the budgets, is held against the same server whose requests hold the best budget or
the cheapest, against one that holds the best and refuses nothing, and against that one drawing a picture at a time.
"""

import asyncio
import contextlib
import datetime
import importlib.util
import itertools
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from elastic_bench.load import SCHEMA_VERSION, LoadReport, LoadRow, LoadSettings
from elastic_bench.machine import machine
from elastic_bench.measure import OnStage
from elastic_runtime.choosing.goals import Auto
from elastic_runtime.contract.budget import key
from elastic_runtime.errors import InferenceError, MissingError, UsageError
from elastic_runtime.pipeline import ElasticPipeline
from elastic_runtime.request import Request

CREATE = "/v1/images/generations"
ROUNDS = 2  # in which the ways take turns, so that what else the machine does slows all of them
ALONE = 7  # pictures
TOGETHER = 4  # in flight, where what a way sustains is measured


@dataclass(frozen=True)
class Way:
    """How pictures are asked for: the `quality` of the request, whether it sends its deadline, and whether runs are shared."""

    quality: str
    promised: bool = True
    shared: bool = True


BEST = "best budget"
WAYS: Mapping[str, Way] = {
    "ours": Way("auto"),
    BEST: Way("high"),
    "best, none refused": Way("high", promised=False),
    "best, one at a time": Way("high", promised=False, shared=False),
    "cheapest": Way("low"),
}


@dataclass(frozen=True)
class Answer:
    """One request's: its status (0 where the connection broke), seconds until it came, and the picture's steps by budget."""

    status: int
    seconds: float
    budgets: Mapping[str, int]


def require() -> None:
    """Raise MissingError where the packages that serve and ask are not installed."""
    if absent := [name for name in ("starlette", "uvicorn", "greenlet", "httpx2") if importlib.util.find_spec(name) is None]:
        raise MissingError(f"loading a server needs {', '.join(absent)}: pip install 'elastic-export[serve,report]'")


def measure(
    bundle: Path, settings: LoadSettings, command: str, backend: str | None = None, on_stage: OnStage = lambda what: None
) -> LoadReport:
    """Load servers over a bundle's folder at each of the loads.

    Raises: UsageError for a bundle that makes no pictures of classes, MissingError without the packages, InferenceError where the server
    does not start or answers with an error.
    """
    settings.check()
    require()
    worth, model, classes, where = _facts(bundle, backend, settings.guidance)
    on_stage("starting servers")
    with server(bundle, backend) as shared, server(bundle, backend, "--batch", "1") as single:
        alone, sustained, rows = asyncio.run(_loads({True: shared, False: single}, settings, classes, worth, on_stage))
    return LoadReport(
        schema_version=SCHEMA_VERSION,
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        command=command,
        machine=machine(),
        bundle=bundle.resolve().name,
        model=model,
        where=where,
        settings=settings,
        alone=alone,
        sustained=sustained,
        rows=tuple(rows),
    )


def _facts(bundle: Path, backend: str | None, guidance: float) -> tuple[dict[str, float] | None, str, int, str]:
    """By the card what each budget is worth, the model's name, how many classes it draws, and where it runs here."""
    with ElasticPipeline.from_pretrained(bundle, backend) as pipe:
        model = pipe.bundle.manifest.model
        if not model.num_classes or model.patches is not None:
            raise UsageError(f"{bundle} does not draw classes at budgets, which is what the load asks for: give a bundle as elit-mnist's")
        outlook = pipe.outlook(Request(class_labels=0, guidance_scale=guidance, policy=Auto()))
        worth = {key(option.budget): outlook.quality(option) for option in outlook.options()} if outlook.graded else None
        return worth, model.name, model.num_classes, pipe.session("denoiser").where


@contextlib.contextmanager
def server(bundle: Path, backend: str | None, *options: str) -> Iterator[str]:
    """A server process over the bundle; its address. It ends with the block."""
    program = "from elastic_export.cli import main; main()"
    command = [sys.executable, "-c", program, "serve", str(bundle), "--port", "0", "--queue", "100000", *options]
    running = subprocess.Popen(
        [*command, *(["--backend", backend] if backend else [])], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert running.stdout is not None
    assert running.stderr is not None
    try:
        first = running.stdout.readline()
        if not (address := re.search(r"http://\S+", first)):
            raise InferenceError(f"the server did not start: {(first or running.stderr.read()).strip()[-600:]}")
        with _drained(running.stderr):
            yield address[0]
    finally:
        running.terminate()
        running.wait()
        running.stdout.close()
        running.stderr.close()


@contextlib.contextmanager
def _drained(stream: Any) -> Iterator[None]:
    """What a process says is read meanwhile, so that it never waits for a full pipe."""
    reader = threading.Thread(target=stream.read, daemon=True)
    reader.start()
    yield


async def ask(client: Any, body: Mapping[str, Any]) -> Answer:
    """Ask for one picture and wait for it. A connection that breaks is an answer that failed, and not the end of the measurement."""
    import httpx2

    begun = time.perf_counter()
    try:
        answer = await client.post(CREATE, json=dict(body))
    except httpx2.TransportError:
        return Answer(0, time.perf_counter() - begun, {})
    seconds = time.perf_counter() - begun
    budgets: dict[str, int] = {}
    if answer.status_code == 200:
        for row in answer.json()["data"][0]["elastic"]["budgets"]:
            budgets[row["budget"]] = budgets.get(row["budget"], 0) + row["steps"]
    return Answer(answer.status_code, seconds, budgets)


async def drawn(client: Any, body: Mapping[str, Any]) -> Answer:
    """An answer that is a picture; raises InferenceError for another."""
    answer = await ask(client, body)
    if answer.status != 200:
        raise InferenceError(f"the server answers {answer.status or 'nothing'} to one picture: ask it by hand with elastic-export serve")
    return answer


async def sustained(client: Any, body: Mapping[str, Any], pictures: int) -> float:
    """Pictures a second where there are always some to draw; raises InferenceError where one is not."""
    left = iter(range(pictures))

    async def work() -> None:
        for _ in left:
            await drawn(client, body)

    begun = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(TOGETHER)))
    return pictures / (time.perf_counter() - begun)


async def load(client: Any, body: Mapping[str, Any], rate: float, seconds: float, classes: int, seed: int) -> list[Answer]:
    """An open loop of `rate` requests a second for pictures of each of the classes; the same times for the same seed and rate."""
    source = np.random.default_rng(seed)
    times = np.cumsum(source.exponential(1 / rate, size=max(int(3 * rate * seconds), 8)))
    begun = time.perf_counter()
    asked = []
    for number, at in enumerate(times[times < max(seconds, times[0] + 1e-9)]):
        await asyncio.sleep(max(begun + float(at) - time.perf_counter(), 0.0))
        words = {"class_labels": number % classes, "seed": number}
        asked.append(asyncio.ensure_future(ask(client, dict(body) | words)))
    return list(await asyncio.gather(*asked))


async def _loads(
    addresses: Mapping[bool, str], settings: LoadSettings, classes: int, worth: Mapping[str, float] | None, on_stage: OnStage
) -> tuple[float, dict[str, float], list[LoadRow]]:
    """Seconds of one picture alone, what each way sustains, and the rows; `addresses` by whether the server shares runs."""
    import httpx2

    common = {"guidance_scale": settings.guidance, "steps": settings.steps}
    async with contextlib.AsyncExitStack() as stack:
        limits = httpx2.Limits(max_connections=None)
        clients = {
            shared: await stack.enter_async_context(httpx2.AsyncClient(base_url=address, timeout=None, limits=limits))
            for shared, address in addresses.items()
        }

        def words(way: Way) -> dict[str, Any]:
            return common | {"class_labels": 0, "quality": way.quality}

        on_stage("asking for one picture")
        for way in WAYS.values():  # shapes and sizes are met once
            await asyncio.gather(*(drawn(clients[way.shared], words(way)) for _ in range(TOGETHER)))
        best = WAYS[BEST]
        alone = float(np.median([(await drawn(clients[best.shared], words(best))).seconds for _ in range(ALONE)]))
        on_stage("asking for pictures without a pause")
        rates = {
            name: await sustained(clients[way.shared], words(way), 6 * TOGETHER) for name, way in WAYS.items() if way.quality != "auto"
        }
        rates = {name: rate for name, rate in rates.items() if name != "best, none refused"}  # the same as the best, without a deadline
        deadline = settings.patience * alone
        rows: list[LoadRow] = []
        for times in settings.loads:
            seconds = settings.duration * max(1.0, 1.0 / times) / ROUNDS
            answers_of: dict[str, list[Answer]] = {name: [] for name in WAYS}
            spans = dict.fromkeys(WAYS, 0.0)
            for number, name in itertools.product(range(ROUNDS), WAYS):
                on_stage(f"load {times:g}: {name}, round {number + 1} of {ROUNDS}")
                way = WAYS[name]
                body = words(way) | ({"deadline_ms": 1e3 * deadline} if way.promised else {})
                begun = time.perf_counter()
                answers_of[name] += await load(clients[way.shared], body, times * rates[BEST], seconds, classes, number)
                spans[name] += time.perf_counter() - begun
            rows += [row(name, times, answers_of[name], deadline, spans[name], worth) for name in WAYS]
    return alone, rates, rows


def row(name: str, times: float, answers: Sequence[Answer], deadline: float, span: float, worth: Mapping[str, float] | None) -> LoadRow:
    """What became of a way's requests at one load."""
    pictures = [answer for answer in answers if answer.status == 200]
    steps = [(worth[budget], count) for answer in pictures for budget, count in answer.budgets.items()] if worth else []
    refused = sum(answer.status == 429 for answer in answers)
    return LoadRow(
        load=times,
        way=name,
        asked=len(answers),
        refused=refused,
        failed=len(answers) - len(pictures) - refused,
        span=span,
        late_after=deadline,
        latencies=tuple(answer.seconds for answer in pictures),
        quality=sum(value * count for value, count in steps) / sum(count for _, count in steps) if steps else None,
    )
