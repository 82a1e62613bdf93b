"""A bundle that a fake session reproduces, runtimes that are right, wrong, broken or absent, and a clock that only work moves."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from fakes import LATENTS, denoiser_graph, manifest, write_manifest

from elastic_bench.records import Settings
from elastic_bench.runtimes import Opened
from elastic_bench.subject import Subject
from elastic_runtime import Budget, FakeSession, InferenceError, MissingError
from elastic_runtime.contract.artifacts import OnnxArtifact
from elastic_runtime.contract.bundle import Bundle, entry
from elastic_runtime.contract.manifest import Cost
from elastic_runtime.contract.reference import pack
from elastic_runtime.device import Processor

BUDGETS = (4, 16, 64)


def answer(feeds: Any) -> np.ndarray:
    """The velocity to a picture that a larger budget draws more exactly."""
    kept = len(feeds["latent_ids"])
    time = feeds["timestep"].reshape(-1, 1, 1, 1)
    target = np.tanh(np.linspace(-2, 2, 64).reshape(1, 1, 8, 8)) * (1 - 0.5 / kept)
    return ((feeds["sample"] - target) / np.maximum(time, 1e-3)).astype(np.float32)


def bundle(folder: Path) -> Bundle:
    """A bundle on disk with a recording at 4, 16 and 64 latents."""
    (folder / "onnx").mkdir(parents=True)
    (folder / "onnx" / "denoiser.onnx").write_bytes(b"not a graph")
    generator = np.random.default_rng(0)
    feeds = {
        "sample": generator.standard_normal((2, 1, 8, 8)).astype(np.float32),
        "timestep": np.array([0.3, 0.8], np.float32),
        "class_labels": np.array([3, 10]),
    }
    outputs = {Budget(latents=value): {"prediction": answer(feeds | {"latent_ids": LATENTS.feed(value)})} for value in BUDGETS}
    np.savez(folder / "reference.npz", **pack("denoiser", feeds, outputs))  # type: ignore[arg-type]
    artifact = OnnxArtifact(precision="fp32", files=(entry(folder, folder / "onnx" / "denoiser.onnx"),), toolchain={}, opset=23)
    costs = tuple(Cost(budget={"latents": n}, flops=1000 + 10 * n, weight_bytes=4000, activation_bytes=n) for n in LATENTS.values)
    whole = msgspec.structs.replace(manifest(1, artifacts=(artifact,)), cost=costs, reference=entry(folder, folder / "reference.npz"))
    write_manifest(folder, whole)
    return Bundle.open(folder)


class Clock:
    """Seconds that pass only when something advances them."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class FakeRuntime:
    """A runtime that takes `base + each * latents` seconds a sample; `kind`: right, wrong, broken, absent, gone."""

    name: str
    clock: Clock
    kind: str = "right"
    base: float = 0.010
    each: float = 0.001
    artifact: str | None = None
    precision: str = "fp32"
    entering: float = 0.004
    last: int = 0
    processor: Processor = "gpu"

    def obstacle(self, opened: Bundle) -> str | None:
        return "it is not installed: pip install it" if self.kind == "absent" else None

    def open(self, opened: Bundle, threads: int) -> Opened:
        self.clock.now += 0.5
        if self.kind == "gone":
            raise MissingError("there is no such device")
        if self.kind == "broken":
            raise InferenceError("it does not open")
        session = FakeSession(denoiser_graph(1), self.run)
        session.processor = self.processor
        return Opened(session, None, 1e-5)

    def run(self, feeds: Any) -> dict[str, np.ndarray]:
        kept = 4 * len(feeds["latent_ids"])
        self.clock.now += len(feeds["sample"]) * (self.base + self.each * kept) + (self.entering if kept != self.last else 0.0)
        self.last = kept
        wrong = 0.5 if self.kind == "wrong" or (self.kind == "sly" and kept == 32) else 0.0
        return {"prediction": answer(feeds) + np.float32(wrong)}


def start(clock: Clock) -> Callable[..., Subject]:
    """Subjects in this process, on a clock of their own; each has a counter of 5 W."""

    def begin(runtime: Any, opened: Bundle, settings: Settings) -> Subject:
        return Subject(runtime, opened, settings, {"meter": lambda: 5 * clock.now}, clock)

    return begin
