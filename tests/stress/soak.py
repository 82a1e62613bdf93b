"""Thousands of pictures by one pipeline: memory stays flat, and what was drawn before comes out bit by bit the same.

    python tests/stress/soak.py --pictures 10000
    python tests/stress/soak.py BUNDLE --pictures 500

Budgets, steps, batches, guidance, policies and seeds change from picture to picture; one in four is drawn again after others, from the
request that its result gave. Memory is what the process holds after each tenth; the exit status is 1 where the second half of the run holds
more than the first by more than `GROWTH`, or a repeat differs. The first half is for what is taken once: a runtime's arena grows until it
has seen the largest batch.
"""

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from elastic_runtime import Auto, Budget, Bundle, Deadline, ElasticPipeline, FitLatency, Fixed, Request, Result

GROWTH = 0.03  # of the most that is held in the first half
KEPT = 8  # pictures that may be drawn again


def resident(process: int | str = "self") -> int:
    """Bytes that a process holds, this one or another."""
    line = next(line for line in Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024


def asked(bundle: Bundle, rng: random.Random) -> Request:
    """A request unlike the last."""
    model, count = bundle.manifest.model, rng.choice((1, 1, 1, 2, 3))
    (axis,) = bundle.manifest.axes
    policies: tuple[Any, ...] = (Auto(), FitLatency(60.0), Deadline(60.0))
    more: dict[str, Any] = {}
    if model.patches:
        policy = rng.choice((Fixed(), *policies))
        more = {"plan": rng.choice(("4x", "7x"))} if isinstance(policy, Fixed) else {}
    else:
        policy = rng.choice((*policies, *(Fixed(Budget(**{axis.name: rng.choice(axis.values)})) for _ in range(3))))
        more = {"num_inference_steps": rng.randrange(4, 9)}
    return Request(
        class_labels=tuple(rng.randrange(model.num_classes) for _ in range(count)),
        seeds=tuple(rng.randrange(2**31) for _ in range(count)),
        guidance_scale=rng.choice((1.0, 1.5, 3.0)),
        policy=policy,
        output_type="np",
        **more,
    )


def soak(bundle: Bundle, pictures: int, seed: int = 0, backend: str | None = None) -> tuple[list[int], int, int]:
    """Bytes held after each tenth, how many pictures were drawn again, and how many of these differed."""
    rng = random.Random(seed)
    held, again, different = [], 0, 0
    kept: list[tuple[Request, np.ndarray]] = []
    with ElasticPipeline.from_pretrained(bundle, backend) as pipe:
        for number in range(pictures):
            if kept and rng.random() < 0.25:
                request, images = rng.choice(kept)
                again += 1
                different += not np.array_equal(pipe.draw(request).images, images)
            else:
                result: Result = pipe.draw(asked(bundle, rng))
                kept = [*kept[1 - KEPT :], (result.request, result.images)]
            if (number + 1) % max(pictures // 10, 1) == 0:
                held.append(resident())
    return held, again, different


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", nargs="?", type=Path, help="drawn with (default: one of elit-mnist, made for it)")
    parser.add_argument("--pictures", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend")
    given = parser.parse_args(arguments)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        if given.bundle is None:
            import elastic_export

            given.bundle = elastic_export.export("elit-mnist", output=Path(folder) / "b", batch="1-8").folder
        held, again, different = soak(Bundle.open(given.bundle), given.pictures, given.seed, given.backend)
    print(f"{given.pictures} pictures in {time.monotonic() - begun:.0f} s, {again} of them drawn again, {different} differed")
    print(f"MB held after each tenth: {', '.join(f'{each / 1e6:.0f}' for each in held)}")
    return int(different > 0 or max(held) > (1 + GROWTH) * max(held[: len(held) // 2]))


if __name__ == "__main__":
    sys.exit(main())
