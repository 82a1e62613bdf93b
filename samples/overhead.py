"""What a picture takes outside its backend, and how soon a cold process has its first one.

    python samples/overhead.py digits --latents 16 --latents 256

Of 30 pictures of 20 guided steps after five that are not counted: the median of a picture, and of what is left without the backend's own
runs. Cold is a new process from its start to its first picture, the best of three; what the bundle's runtimes take is measured once on a
machine and kept, and that is done before.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from elastic_runtime import Budget, ElasticError, ElasticPipeline

STEPS = 20
PICTURES, WARM = 30, 5
COLD = "import sys, elastic_runtime as er\nwith er.ElasticPipeline.from_pretrained(sys.argv[1]) as pipe: pipe([7], num_inference_steps=20)"


def outside(pipe: ElasticPipeline, budget: Budget) -> tuple[float, float]:
    """Seconds of a picture, and those of them that the denoiser's backend did not run; medians."""
    session = pipe.session("denoiser")
    several, within = session._several, 0.0

    def timed(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, np.ndarray]]:
        nonlocal within
        begun = time.perf_counter()
        outputs = several(runs)
        within += time.perf_counter() - begun
        return outputs

    session._several = timed  # type: ignore[method-assign]
    rows = []
    try:
        for _ in range(WARM + PICTURES):
            within, begun = 0.0, time.perf_counter()
            pipe([7], guidance_scale=2.0, budget=budget, num_inference_steps=STEPS)
            rows.append((whole := time.perf_counter() - begun, whole - within))
    finally:
        session._several = several  # type: ignore[method-assign]
    picture, left = np.median(rows[WARM:], axis=0)
    return float(picture), float(left)


def cold(bundle: Path) -> float:
    """Seconds from the start of a new process to its end, with one picture drawn; the best of three."""
    taken = []
    for _ in range(3):
        begun = time.perf_counter()
        subprocess.run([sys.executable, "-c", COLD, str(bundle)], check=True)
        taken.append(time.perf_counter() - begun)
    return min(taken)


def main(given: argparse.Namespace) -> None:
    with ElasticPipeline.from_pretrained(given.bundle) as pipe:
        for latents in given.latents or [None]:
            budget = Budget(latents=latents) if latents else Budget()
            picture, left = outside(pipe, budget)
            print(
                f"{budget or 'default'}, {pipe.session('denoiser').where}: a picture {1e3 * picture:.1f} ms, outside the backend "
                f"{1e3 * left:.2f} ms, {left / picture:.1%}, {1e3 * left / STEPS:.3f} ms a step"
            )
    print(f"cold process to its first picture: {cold(given.bundle):.2f} s")


def options() -> argparse.ArgumentParser:
    """What the script takes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="a bundle of an ELIT that draws classes")
    parser.add_argument("--latents", type=int, action="append", help="budgets to measure (default: the bundle's own)")
    return parser


if __name__ == "__main__":
    try:
        main(options().parse_args())
    except ElasticError as error:
        raise SystemExit(str(error)) from None
