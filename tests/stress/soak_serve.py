"""Thousands of pictures through a server's process, several clients at once: its memory stays flat, and a seed draws what it drew before.

    python tests/stress/soak_serve.py --pictures 10000
    python tests/stress/soak_serve.py BUNDLE --pictures 500

Requests change from one to the next: budgets, steps, guidance, deadlines, streams with previews, clients that go away, and bodies that are
refused. Memory is what the server holds after each tenth; the exit status is 1 where the second half of the run holds more than the first
by more than `GROWTH`, where a picture that is asked for again differs by more than rounding, or where an answer is the server's fault. The
first half is for what is taken once: a runtime's arena grows until it has seen the largest batch.
"""

import argparse
import base64
import io
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
from PIL import Image
from soak import GROWTH, resident

from elastic_runtime import Bundle

CLIENTS = 4
CREATE = "/v1/images/generations"
PROGRAM = "from elastic_export.cli import main; main()"
ROUNDING = 1  # of 255: runs of other sizes round otherwise


@dataclass
class Tally:
    """What came: pictures, those that were drawn again, those of them that differed, and answers that are the server's fault."""

    pictures: int = 0
    again: int = 0
    different: int = 0
    refused: int = 0
    gone: int = 0
    faults: list[str] = field(default_factory=list)
    kept: dict[str, np.ndarray] = field(default_factory=dict)


def asked(bundle: Bundle, rng: random.Random) -> dict[str, Any]:
    """A request unlike the last; a few of them are wrong."""
    (axis,) = bundle.manifest.axes
    label = rng.randrange(bundle.manifest.model.num_classes)
    if rng.random() < 0.1:
        return rng.choice(({"class_labels": 10**6}, {"nonsense": "x" * rng.randrange(10_000)}, {"class_labels": label, "deadline_ms": 1}))
    if rng.random() < 0.25:  # one of twenty or so, which come again and again
        budget = rng.choice((axis.min, axis.max))
        return {"class_labels": label, "steps": 4, "seed": 1, "budget": {axis.name: budget}}
    body: dict[str, Any] = {"class_labels": label, "steps": rng.randrange(2, 7), "seed": rng.randrange(4)}
    body |= {"guidance_scale": rng.choice((1.5, 3.0))} if rng.random() < 0.3 else {}
    return body | rng.choice(
        (
            {},
            {"budget": {axis.name: rng.choice(axis.values)}},
            {"quality": rng.choice(("low", "medium", "high"))},
            {"deadline_ms": 60_000.0},
            {"stream": True, "partial_images": rng.randrange(4)},
            {"n": 2},
        )
    )


def ask(http: Any, body: dict[str, Any], tally: Tally, lock: threading.Lock, leave: bool) -> None:
    """One request, and what came of it."""
    if leave:
        with http.stream("POST", CREATE, json=body | {"stream": True, "partial_images": 3, "n": 1}):
            tally.gone += 1
            return
    answer = http.post(CREATE, json=body)
    with lock:
        if answer.status_code not in (200, 400, 429) or "event: error" in answer.text:
            tally.faults.append(f"{answer.status_code} {answer.text[:200]} to {str(body)[:200]}")
        elif answer.status_code != 200:
            tally.refused += 1
        else:
            tally.pictures += body.get("n", 1)
            if body.get("seed") == 1 and "budget" in body and not body.get("guidance_scale"):
                again = str(sorted(body.items()))
                picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(answer.json()["data"][0]["b64_json"]))), int)
                before = tally.kept.setdefault(again, picture)
                tally.again += before is not picture
                tally.different += bool(np.abs(before - picture).max() > ROUNDING)


def client(address: str, bundle: Bundle, pictures: int, seed: int, tally: Tally, lock: threading.Lock) -> None:
    rng, asks = random.Random(seed), 0
    with httpx2.Client(base_url=address, timeout=120.0) as http:
        while tally.pictures < pictures and asks < 2 * pictures:  # which ends where nothing is drawn
            asks += 1
            try:
                body = asked(bundle, rng)
                ask(http, body, tally, lock, leave=rng.random() < 0.03 and "steps" in body)
            except Exception as error:
                with lock:
                    tally.faults.append(repr(error))
                return


def soak(folder: Path, pictures: int, seed: int = 0) -> tuple[list[int], Tally]:
    """Bytes that the server held after each tenth, and what its clients saw."""
    bundle, tally, lock, held = Bundle.open(folder), Tally(), threading.Lock(), list[int]()
    command = [sys.executable, "-c", PROGRAM, "serve", str(folder), "--backend", "ort", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        try:
            assert server.stdout is not None
            address = re.search(r"http://\S+", server.stdout.readline())
            assert address, "the server did not start"
            for tenth in range(1, 11):
                goal = pictures * tenth // 10
                seeds = (seed + 1000 * tenth + number for number in range(CLIENTS))
                threads = [threading.Thread(target=client, args=(address[0], bundle, goal, each, tally, lock)) for each in seeds]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
                held.append(resident(server.pid))
            server.send_signal(signal.SIGTERM)
            if (code := server.wait(60)) != 0:
                tally.faults.append(f"it ended with {code}")
        finally:
            server.kill()
    return held, tally


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", nargs="?", type=Path, help="drawn with (default: one of elit-mnist, made for it)")
    parser.add_argument("--pictures", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        if given.bundle is None:
            import elastic_export

            given.bundle = elastic_export.export("elit-mnist", output=Path(folder) / "b", batch="1-8").folder
        held, tally = soak(given.bundle, given.pictures, given.seed)
    print(f"{tally.pictures} pictures in {time.monotonic() - begun:.0f} s, {tally.again} of them again, {tally.different} differed")
    print(f"{tally.refused} requests refused, {tally.gone} clients went away, faults: {tally.faults or 'none'}")
    print(f"MB held after each tenth: {', '.join(f'{each / 1e6:.1f}' for each in held)}")
    grown = max(held) > (1 + GROWTH) * max(held[: len(held) // 2])
    return int(tally.pictures < given.pictures or tally.different > 0 or bool(tally.faults) or grown)


if __name__ == "__main__":
    sys.exit(main())
