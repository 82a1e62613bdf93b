"""Load on a server: who is on time when more is asked for than the best budget can draw.

    python samples/serve_load.py BUNDLE
    python samples/serve_load.py BUNDLE --seconds 20 --page docs/serve.md

A real server process is asked by an open loop: requests come at the times of a Poisson process, whether or not those before are answered.
Each wants its picture within three times what one takes alone at the best budget. The load is a multiple of what the best budget sustains,
which is measured first. Ours is held against the same server whose requests hold the best budget or the cheapest, and against one that
holds the best and refuses nothing. A picture that is refused is not on time. The page holds the table between `<!-- figures serve -->` and
`<!-- end of figures -->`.
"""

import argparse
import asyncio
import contextlib
import itertools
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
from rich.console import Console

from card import filled
from elastic_runtime import Auto, ElasticPipeline, Request
from elastic_runtime.contract.budget import key
from elastic_runtime.files.atomic import save
from record import machine, versions

CREATE = "/v1/images/generations"
DEADLINE = 3.0  # times a picture alone at the best budget
LOADS = (0.5, 1.0, 2.0, 4.0)
EVEN = 1.0  # loads below it last longer, for as many requests
ROUNDS = 2  # in which the ways take turns, so that what else the machine does slows all of them
ALONE = 7  # pictures
TOGETHER = 4  # in flight, where what a budget sustains is measured
# what is asked for, by way; `promised` sends the deadline
WAYS: Mapping[str, dict[str, Any]] = {
    "ours": {"quality": "auto", "promised": True},
    "best budget": {"quality": "high", "promised": True},
    "best, none refused": {"quality": "high", "promised": False},
    "cheapest": {"quality": "low", "promised": True},
}


@dataclass(frozen=True)
class Asked:
    """One request: its status, seconds until the answer, and its steps by budget."""

    status: int
    seconds: float
    budgets: Mapping[str, int]


@contextlib.contextmanager
def server(bundle: Path, backend: str | None) -> Iterator[str]:
    """A server process over the bundle; its address."""
    program = "from elastic_export.cli import main; main()"
    command = [sys.executable, "-c", program, "serve", str(bundle), "--port", "0", "--queue", "100000"]
    running = subprocess.Popen(
        [*command, *(["--backend", backend] if backend else [])], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert running.stdout is not None
    try:
        first = running.stdout.readline()
        address = re.search(r"http://\S+", first)
        if not address:
            raise SystemExit(f"the server did not start: {first}")
        yield address[0]
    finally:
        running.terminate()
        running.wait()
        running.stdout.close()


async def ask(client: httpx2.AsyncClient, body: Mapping[str, Any]) -> Asked:
    begun = time.perf_counter()
    answer = await client.post(CREATE, json=dict(body))
    seconds = time.perf_counter() - begun
    budgets: dict[str, int] = {}
    if answer.status_code == 200:
        for row in answer.json()["data"][0]["elastic"]["budgets"]:
            budgets[row["budget"]] = budgets.get(row["budget"], 0) + row["steps"]
    return Asked(answer.status_code, seconds, budgets)


async def sustained(client: httpx2.AsyncClient, body: Mapping[str, Any], pictures: int) -> float:
    """Pictures a second where there are always some to draw."""
    left = iter(range(pictures))

    async def work() -> None:
        for _ in left:
            await ask(client, body)

    begun = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(TOGETHER)))
    return pictures / (time.perf_counter() - begun)


async def load(client: httpx2.AsyncClient, body: Mapping[str, Any], rate: float, seconds: float, seed: int) -> list[Asked]:
    """An open loop of `rate` requests a second; the same times for the same seed and rate."""
    source = np.random.default_rng(seed)
    times = np.cumsum(source.exponential(1 / rate, size=max(int(3 * rate * seconds), 8)))
    begun = time.perf_counter()
    asked = []
    for number, at in enumerate(times[times < seconds]):
        await asyncio.sleep(max(begun + float(at) - time.perf_counter(), 0.0))
        words = {"class_labels": number % 10, "seed": number}
        asked.append(asyncio.ensure_future(ask(client, dict(body) | words)))
    return list(await asyncio.gather(*asked))


def quality(bundle: Path, backend: str | None, guidance: float) -> dict[str, float]:
    """By the card: what each budget is worth."""
    with ElasticPipeline.from_pretrained(bundle, backend) as pipe:
        outlook = pipe.outlook(Request(class_labels=0, guidance_scale=guidance, policy=Auto()))
        return {key(option.budget): outlook.quality(option) for option in outlook.options()}


def row(name: str, load: float, asked: Sequence[Asked], deadline: float, seconds: float, worth: Mapping[str, float]) -> str:
    drawn = [each for each in asked if each.status == 200]
    on_time = sum(each.seconds <= deadline for each in drawn)
    waits = sorted(each.seconds for each in drawn) or [float("nan")]
    p50, p95, p99 = (1e3 * float(np.quantile(waits, share)) for share in (0.5, 0.95, 0.99))
    steps = [(worth[budget], count) for each in drawn for budget, count in each.budgets.items()]
    mean = sum(value * count for value, count in steps) / max(sum(count for _, count in steps), 1)
    refused = sum(each.status == 429 for each in asked) / len(asked)
    return (
        f"| {load:g} | {name} | {on_time / len(asked):.1%} | {refused:.1%} | {on_time / max(len(drawn), 1):.1%} | "
        f"{p50:.0f} | {p95:.0f} | {p99:.0f} | {on_time / seconds:.1f} | {mean:.1%} |"
    )


async def measure(given: argparse.Namespace, address: str, worth: Mapping[str, float]) -> tuple[list[str], str]:
    """Rows of the table, and how they came about."""
    common = {"guidance_scale": given.guidance, "steps": given.steps}
    limits = httpx2.Limits(max_connections=None)
    async with httpx2.AsyncClient(base_url=address, timeout=None, limits=limits) as client:
        best = common | {"class_labels": 1, "quality": "high"}
        for quality in ("high", "low", "auto"):
            await asyncio.gather(*(ask(client, best | {"quality": quality}) for _ in range(TOGETHER)))  # shapes and sizes are met once
        alone = float(np.median([(await ask(client, best)).seconds for _ in range(ALONE)]))
        rate, cheap = [await sustained(client, best | {"quality": each}, 6 * TOGETHER) for each in ("high", "low")]
        deadline = DEADLINE * alone
        rows: list[str] = []
        for times in given.loads:
            seconds = given.seconds * max(1.0, EVEN / times) / ROUNDS
            asked: dict[str, list[Asked]] = {name: [] for name in WAYS}
            spent = dict.fromkeys(WAYS, 0.0)
            for number, name in itertools.product(range(ROUNDS), WAYS):
                words = common | {"quality": WAYS[name]["quality"]} | ({"deadline_ms": 1e3 * deadline} if WAYS[name]["promised"] else {})
                begun = time.perf_counter()
                asked[name] += await load(client, words, times * rate, seconds, number)
                spent[name] += time.perf_counter() - begun
            rows += [row(name, times, asked[name], deadline, spent[name], worth) for name in WAYS]
            Console(stderr=True, width=200).print("\n".join(rows[-len(WAYS) :]), highlight=False)
    said = (
        f"One picture alone takes {1e3 * alone:.0f} ms at the best budget, so the deadline is {1e3 * deadline:.0f} ms; load 1 is "
        f"{rate:.1f} pictures a second, what the best budget sustains, and the cheapest sustains {cheap:.1f}."
    )
    return rows, said


def main(given: argparse.Namespace) -> None:
    worth = quality(given.bundle, given.backend, given.guidance)
    with server(given.bundle, given.backend) as address:
        rows, said = asyncio.run(measure(given, address, worth))
    head = "| load | way | on time | refused | of those drawn | p50 ms | p95 ms | p99 ms | on time a second | quality |"
    table = "\n".join([head, "|---:|---|" + "---:|" * 8, *rows])
    backends = ", ".join(f"{name} {version}" for name, version in versions().items())
    how = f"{given.seconds:g} s of each in {ROUNDS} rounds, longer below load {EVEN:g}; {given.steps} steps, guidance {given.guidance:g}"
    text = f"{table}\n\n{said} {how}; {machine()}; {backends}."
    if given.page:
        save(given.page, filled(given.page.read_text(encoding="utf-8"), "serve", text, str(given.page)).encode())
    else:
        print(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--seconds", type=float, default=10.0, help=f"of each way at loads from {EVEN:g}; smaller loads last longer")
    parser.add_argument("--loads", type=lambda text: [float(each) for each in text.split(",")], default=list(LOADS))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--backend")
    parser.add_argument("--page", type=Path, help="fill this page's table in place of printing it")
    main(parser.parse_args())
