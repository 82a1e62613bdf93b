"""A machine that exists only as arithmetic, and on it a model of FLUX's form that is drawn along plans."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from fake_flux import SCHNELL, decode, denoiser_graph, manifest
from recordings import MACHINES
from simulated import HELD, Machine

from elastic_runtime import Axis, Bundle, ElasticPipeline, FakeSession, probe
from elastic_runtime.choosing.estimates import Gauge
from elastic_runtime.contract.manifest import Cost, Manifest, Quality
from elastic_runtime.denoising.pictures import drawable, previewed

SIDE = 16  # latents, so that a picture is 8 x 8 tokens; its stages have 16, 28 (or 19) and 64
OVERHEAD, PER_TOKEN, DECODE = 2e-3, 1e-4, 5e-3  # seconds a run, a token of a sample, and a whole picture's decoding
TOKENS = Axis(name="tokens", min=4, max=64, step=1, default=64, input="hidden_states", carrier="shape", dimension="S")
# What the card measured: plan, steps, accuracy.
TABLE = (
    ("full", (50,), 0.95), ("full", (20,), 0.94), ("full", (6,), 0.85), ("4x", (5, 6, 7), 0.93), ("4x", (15, 18, 21), 0.96),
    ("4x", (2, 2, 3), 0.80), ("7x", (2, 3, 5), 0.88), ("7x", (1, 1, 2), 0.70),
)  # fmt: skip


def run_seconds(tokens: int, batch: int = 1) -> float:
    """What a run takes on the machine when nothing slows it down."""
    return OVERHEAD + PER_TOKEN * tokens * batch


def plan_seconds(steps: tuple[int, ...], tokens: tuple[int, ...]) -> float:
    """What one unguided picture's steps take."""
    return sum(count * run_seconds(size) for count, size in zip(steps, tokens, strict=True))


def described(graded: bool = True) -> Manifest:
    whole = manifest(SCHNELL, classes=5)
    rows = tuple(Cost(budget={"tokens": n}, flops=1_000_000 * n, weight_bytes=4_000_000, activation_bytes=1000 * n) for n in (4, 34, 64))
    quality = tuple(Quality(budget={}, plan=plan, steps=steps, accuracy=accuracy, frechet_distance=1.0) for plan, steps, accuracy in TABLE)
    return msgspec.structs.replace(whole, axes=(TOKENS,), cost=rows, quality=quality if graded else ())


def pipeline(machine: Machine, graded: bool = True, whole: Manifest | None = None) -> ElasticPipeline:
    """A pipeline on the machine, whose device is a recorded one."""
    bundle = Bundle(Path("bundle"), whole or described(graded))

    def run(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        batch, tokens, _ = feeds["hidden_states"].shape
        machine.advance(run_seconds(tokens, batch))
        return {"prediction": (feeds["hidden_states"] / feeds["timestep"][:, None, None]).astype(np.float32)}

    def decoded(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        machine.advance(DECODE * feeds["latent"].shape[2] * feeds["latent"].shape[3] / SIDE**2)
        return decode(feeds)

    graphs = bundle.manifest.graphs
    sessions: dict[str, Any] = {"denoiser": FakeSession(denoiser_graph(SCHNELL), run)}
    if "decoder" in graphs:
        sessions["decoder"] = FakeSession(graphs["decoder"], decoded)
    pipe = ElasticPipeline(bundle, sessions, machine.clock)
    finish = pipe._finish if drawable(bundle.manifest) else None
    preview = pipe._preview if finish and previewed(bundle.manifest) else None
    device = probe(MACHINES["xeon"])
    words: dict[str, Any] = {"opened": HELD, "device": lambda: device, "memory": lambda: device.memory, "held": lambda: HELD}
    pipe._gauge = Gauge(sessions["denoiser"], bundle.manifest, finish, machine.clock, preview=preview, **words)
    return pipe
