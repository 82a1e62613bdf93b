"""How drawn digits are graded: the share that a judge names as asked, and the Frechet distance of their features to real digits'."""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from classifier import Judge
from digits import Digits, load_digits
from elastic_runtime import ElasticError


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Squared Frechet distance of Gaussians fitted to features (N, D): |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)).

    (C_a C_b)^(1/2) has the trace of (R C_b R)^(1/2) with R = C_a^(1/2), which is symmetric: no complex square roots.
    """
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(0)).sum()
    return float(max(0.0, ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross))


@dataclass(frozen=True)
class Grader:
    """A judge with the `features` (N, 64) of the real digits that it has never seen, and what `real` digits get."""

    judge: Judge
    features: np.ndarray
    real: dict[str, Any]

    @classmethod
    def of(
        cls, judge: Judge, samples: int, side: int = 32, as_drawn: Callable[[np.ndarray], np.ndarray] = lambda images: images
    ) -> "Grader":
        """To grade `samples` pictures of `side` pixels; `as_drawn` makes of real digits what a perfect model could draw at best."""
        train, held_out = load_digits(side)
        features, named = judge.judge(as_drawn(train.images))
        # As many real digits as pictures, since the distance of few samples is larger. The judge has learned from these.
        others = np.concatenate([np.flatnonzero(held_out.labels == digit)[: samples // 10] for digit in range(10)])
        real = {
            "pictures": len(others),
            "accuracy": float((named == train.labels).mean()),
            "frechet_distance": frechet_distance(judge.judge(as_drawn(held_out.images[others]))[0], features),
        }
        return cls(judge, features, real)

    def grade(self, digits: Digits) -> dict[str, Any]:
        """accuracy, accuracy_by_class and frechet_distance of digits drawn as their labels say."""
        seen, verdicts = self.judge.judge(digits.images)
        right = verdicts == digits.labels
        return {
            "accuracy": float(right.mean()),
            "accuracy_by_class": [float(right[digits.labels == digit].mean()) for digit in range(10)],
            "frechet_distance": frechet_distance(seen, self.features),
        }


def tell(what: str, done: int, pictures: int, begun: float) -> None:
    """Say on stderr how far drawing is: one line that is written over on a terminal, else a line each time."""
    left = (time.perf_counter() - begun) / done * (pictures - done)
    line = f"{what}: {done} of {pictures} pictures, {left:.0f} s left"
    print(f"\r{line}  " if sys.stderr.isatty() else line, end="" if sys.stderr.isatty() and left else "\n", file=sys.stderr, flush=True)


def integers(text: str) -> list[int]:
    """An option's whole numbers, written `16,64,256`."""
    if not all(part.isdigit() for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"these are whole numbers such as 16,64,256, got {text!r}")
    return [int(part) for part in text.split(",")]


def run(main: Callable[[argparse.Namespace], None], options: argparse.ArgumentParser) -> None:
    """Run `main` on a program's own options and those that all share; an error ends in one line and its exit code."""
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--batch", type=int, default=50, help="pictures drawn together (default: %(default)s)")
    options.add_argument("--threads", type=int, default=0, help="0: one a core")
    try:
        main(options.parse_args())
    except ElasticError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
