"""Stand-ins made without torch: a model description, a manifest, a bundle on disk, and sessions with a known velocity."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from elastic_runtime import Axis, FakeSession, Span
from elastic_runtime.contract.artifacts import Artifact, Graph, OnnxArtifact, TensorSpec
from elastic_runtime.contract.bundle import MANIFEST, Bundle, encode, entry
from elastic_runtime.contract.manifest import SCHEMA_VERSION, Cost, Manifest, Model, Provenance, Vae
from elastic_runtime.contract.precision import Name
from elastic_runtime.contract.schedule import RectifiedFlow

# (x, t, labels, kept) -> velocity: what a fake denoiser computes
Field = Callable[[np.ndarray, np.ndarray, np.ndarray, int], np.ndarray]

LATENTS = Axis(name="latents", min=4, max=64, step=4, default=64, input="latent_ids", carrier="length", unit=4, dimension="J")
CHANNELS = 4
NULL = 10


def model(channels: int = CHANNELS, **changes: Any) -> Model:
    whole = Model(
        name="tiny",
        family="elit-sit",
        config={"depth": 4},
        prediction="velocity",
        schedule=RectifiedFlow(),
        sample_shape=(channels, 8, 8),
        num_classes=NULL,
        null_label=NULL,
        weights="checkpoint",
    )
    return msgspec.structs.replace(whole, **changes)


def denoiser_graph(channels: int = CHANNELS, batch: Span = Span(1, 4), artifacts: tuple[Any, ...] = ()) -> Graph:  # noqa: B008  frozen
    return Graph(
        inputs=(
            TensorSpec(name="sample", dtype="float32", shape=("B", channels, 8, 8)),
            TensorSpec(name="timestep", dtype="float32", shape=("B",)),
            TensorSpec(name="class_labels", dtype="int64", shape=("B",)),
            TensorSpec(name="latent_ids", dtype="int64", shape=("J",)),
        ),
        outputs=(TensorSpec(name="prediction", dtype="float32", shape=("B", channels, 8, 8)),),
        dimensions={"B": batch, "J": Span(1, 16)},
        artifacts=artifacts,
    )


def decoder_graph(channels: int = CHANNELS) -> Graph:
    return Graph(
        inputs=(TensorSpec(name="latent", dtype="float32", shape=("B", channels, 8, 8)),),
        outputs=(TensorSpec(name="image", dtype="float32", shape=("B", 3, 16, 16)),),
        dimensions={"B": Span(1, 4)},
        artifacts=(),
    )


def manifest(channels: int = CHANNELS, batch: Span = Span(1, 4), vae: Vae | None = None, artifacts: tuple[Artifact, ...] = ()) -> Manifest:  # noqa: B008
    graphs = {"denoiser": denoiser_graph(channels, batch, artifacts)} | ({"decoder": decoder_graph(channels)} if vae else {})
    return Manifest(
        schema_version=SCHEMA_VERSION,
        model=model(channels, vae=vae),
        axes=(LATENTS,),
        graphs=graphs,
        cost=(Cost(budget={"latents": 64}, flops=1000, weight_bytes=100, activation_bytes=10),),
        provenance=Provenance(command="elastic-export onnx", created="2026-01-01T00:00:00+00:00", versions={"python": "3.11"}),
    )


def write_bundle(folder: Path, content: bytes = b"not really a graph", channels: int = CHANNELS, precision: Name = "fp32") -> Bundle:
    """A bundle whose one artifact is `content`: whole by size and hash, though nothing can run it."""
    file = folder / "onnx" / "denoiser.onnx"
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    artifact = OnnxArtifact(precision=precision, files=(entry(folder, file),), toolchain={"onnx": "1.21"}, opset=23)
    write_manifest(folder, manifest(channels, artifacts=(artifact,)))
    return Bundle.open(folder)


def session(field: Field, channels: int = CHANNELS, batch: Span = Span(1, 4)) -> FakeSession:  # noqa: B008
    """A denoiser session that answers `field(x, t, labels, kept)`, with t and labels shaped to broadcast over x."""

    def run(feeds: Any) -> dict[str, np.ndarray]:
        shape = (-1, 1, 1, 1)
        value = field(feeds["sample"], feeds["timestep"].reshape(shape), feeds["class_labels"].reshape(shape), len(feeds["latent_ids"]))
        return {"prediction": np.broadcast_to(value, feeds["sample"].shape).astype(np.float32)}

    return FakeSession(denoiser_graph(channels, batch), run)


def answers_stay_with_their_thread(
    run: Callable[[int], np.ndarray], expected: Callable[[int], Any], threads: int = 8, times: int = 25
) -> None:
    """Assert that `run(k)` on thread k answers `expected(k)` each time, while the others run theirs."""
    begin = threading.Barrier(threads)

    def work(k: int) -> int:
        begin.wait()
        return sum(not np.allclose(run(k), expected(k), atol=1e-5) for _ in range(times))

    with ThreadPoolExecutor(threads) as pool:
        assert sum(pool.map(work, range(threads))) == 0


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `elastic.json` beside files that are there already."""
    (folder / MANIFEST).write_bytes(encode(manifest))
