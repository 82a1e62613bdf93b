"""What correlated noise costs: RALU's closed form against sampling the same normal densely, at the last transition of a picture.

    python samples/ralu_noise.py --pixels 1024

The dense one builds the covariance of all tokens, factors it once for all channels and multiplies, as a general sampler must;
`svd` is numpy's default method, `cholesky` its fastest. Times are of the processor, so that what else the machine does is not in
them: the fastest of the rounds for the closed form, one round for the dense one. Run it on one thread (OMP_NUM_THREADS=1).
"""

import argparse
import time
from collections.abc import Sequence

import numpy as np

from elastic_runtime.ralu.noise import SLACK, renoising
from elastic_runtime.ralu.plan import PRESETS

CHANNELS = 64  # of a token of FLUX
PIXELS = 16  # of a token's side


def dense(source: np.random.Generator, tokens: int, blocks: int, z: float, method: str) -> np.ndarray:
    """Noise (tokens, CHANNELS), the first `blocks` * 4 of them in correlated fours."""
    covariance = np.eye(tokens)
    for block in range(blocks):
        place = slice(4 * block, 4 * block + 4)
        covariance[place, place] += -1 / z**2 + SLACK
    drawn = source.multivariate_normal(np.zeros(tokens), covariance, CHANNELS, method=method)  # type: ignore[call-overload]
    return np.ascontiguousarray(drawn.T)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pixels", type=int, default=1024, help="side of the picture")
    parser.add_argument("--plan", choices=PRESETS, default="4x")
    parser.add_argument("--method", choices=("svd", "eigh", "cholesky"), nargs="+", default=["cholesky", "svd"])
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args(arguments)
    plan, side, source = PRESETS[options.plan], options.pixels // PIXELS, np.random.default_rng(0)
    tokens, low = side**2, side**2 // 4
    blocks = low - plan.grown(low)
    assert plan.z is not None
    times = []
    for _ in range(options.rounds):
        begun = time.process_time()
        renoising(source.standard_normal((1, tokens, CHANNELS)), slice(0, 4 * blocks), plan.z)
        times.append(time.process_time() - begun)
    closed = min(times)
    print(f"{tokens} tokens of {CHANNELS} channels, {blocks} blocks of four; closed form: {1e3 * closed:.2f} ms")
    for method in options.method:
        begun = time.process_time()
        dense(source, tokens, blocks, plan.z, method)
        seconds = time.process_time() - begun
        print(f"dense, {method}: {seconds:.2f} s, {seconds / closed:.0f} times as long")


if __name__ == "__main__":
    main()
