"""A machine that exists only as arithmetic: a clock, a speed that changes with time, and a session whose runs take their time."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from fakes import LATENTS, denoiser_graph, manifest
from recordings import MACHINES

from elastic_runtime import Bundle, ElasticPipeline, FakeSession, Span, probe
from elastic_runtime.choosing.estimates import Gauge
from elastic_runtime.contract.manifest import Cost, Manifest, Quality

OVERHEAD, PER_LATENT = 2e-3, 5e-5  # seconds a run, and a latent of a sample
PER_FLOP = 1e6  # FLOPs of a latent
HELD = 100_000_000  # bytes of the process, whatever runs
Speed = Callable[[float], float]


class Machine:
    """A clock that only runs advance. `slowness(now)` multiplies what a run takes; `jitter` is its standard deviation, as a share."""

    def __init__(self, slowness: Speed = lambda now: 1.0, jitter: float = 0.0, seed: int = 0):
        self.now, self.slowness, self.jitter = 100.0, slowness, jitter
        self._noise = np.random.default_rng(seed)

    def clock(self) -> float:
        return self.now

    def spend(self, latents: int, batch: int) -> None:
        self.advance(run_seconds(latents, batch))

    def advance(self, seconds: float) -> None:
        """Let pass what takes so long when nothing slows the machine down."""
        noise = max(1 + self.jitter * self._noise.standard_normal(), 0.2)
        self.now += seconds * self.slowness(self.now) * noise


def run_seconds(latents: int, batch: int = 1) -> float:
    """What a run takes on the machine when nothing slows it down."""
    return OVERHEAD + PER_LATENT * latents * batch


def described(graded: bool = True) -> Manifest:
    """A model with a cost for each budget and a card whose accuracy rises from 0.80 to 0.98."""
    rows = tuple(
        Cost(budget={"latents": n}, flops=int(PER_FLOP * (40 + n)), weight_bytes=4_000_000, activation_bytes=1000 * (100 + n))
        for n in LATENTS.values
    )
    table = {4: 0.80, 16: 0.90, 32: 0.95, 64: 0.98}
    quality = tuple(Quality(budget={"latents": n}, accuracy=share, frechet_distance=1.0) for n, share in table.items())
    return msgspec.structs.replace(manifest(1), cost=rows, quality=quality if graded else ())


def session(machine: Machine, batch: Span = Span(1, 4)) -> FakeSession:  # noqa: B008  frozen
    def run(feeds: Any) -> dict[str, np.ndarray]:
        machine.spend(4 * len(feeds["latent_ids"]), len(feeds["sample"]))
        return {"prediction": np.zeros_like(feeds["sample"])}

    fake = FakeSession(denoiser_graph(1, batch), run)
    fake.calls = _Forgetful()
    return fake


class _Forgetful(list[Any]):
    def append(self, value: Any) -> None:
        """Keep nothing: thousands of pictures are drawn."""


def pipeline(machine: Machine, graded: bool = True, recording: str = "xeon", **changes: Any) -> ElasticPipeline:
    """A pipeline on the machine, whose device is a recorded one."""
    bundle = Bundle(Path("bundle"), msgspec.structs.replace(described(graded), **changes))
    fake = session(machine)
    pipe = ElasticPipeline(bundle, {"denoiser": fake}, machine.clock)
    device = probe(MACHINES[recording])
    words: dict[str, Any] = {"opened": HELD, "device": lambda: device, "memory": lambda: device.memory, "held": lambda: HELD}
    pipe._gauge = Gauge(fake, bundle.manifest, None, machine.clock, **words)
    return pipe
