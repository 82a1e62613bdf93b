"""Bundles with TensorRT engines that hold nothing, for the stand-in of a GPU, and what their sessions are fed."""

from pathlib import Path
from typing import Any

import numpy as np
from fakes import manifest, write_bundle, write_manifest

from elastic_runtime.contract.artifacts import Network, Profile, Range, TrtArtifact
from elastic_runtime.contract.bundle import Bundle, entry

VERSION = "1.7.1.116"
BUCKETS = ((1, 4), (5, 8), (9, 16))


COMPATIBLE = {"builder": "tensorrt", "builder_version": "10.3.0", "sms": (87,), "version_compatible": True}


def profile(low: int, high: int) -> Profile:
    return Profile(dimensions={"B": Range(1, 2, 4), "J": Range(low, high, high)})


def trt_bundle(folder: Path, content: bytes = b"an engine", others: tuple[dict[str, Any], ...] = (), **changes: Any) -> Bundle:
    """A bundle with an ONNX file that nothing here can run, and an engine (and `others` like it)."""
    plain = write_bundle(folder)
    onnx = plain.manifest.graphs["denoiser"].artifacts[0]
    artifacts = []
    for i, more in enumerate(({}, *others)):
        file = folder / "trt" / f"{i}.engine"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content)
        whole: dict[str, Any] = {
            "precision": "fp32", "files": (entry(folder, file),), "toolchain": {"tensorrt_rtx": VERSION}, "builder": "tensorrt_rtx",
            "builder_version": VERSION, "sms": (86, 89), "source": onnx.path, "source_sha256": onnx.files[0].sha256,
            "profiles": tuple(profile(*bucket) for bucket in BUCKETS), "network": Network(layers=10, attentions=1, loops=0),
        }  # fmt: skip
        artifacts.append(TrtArtifact(**whole | changes | more))
    write_manifest(folder, manifest(artifacts=(onnx, *artifacts)))
    return Bundle.open(folder)


def feeds(latents: int, batch: int = 2, value: float = 0.0) -> dict[str, np.ndarray]:
    return {
        "sample": np.full((batch, 4, 8, 8), value, np.float32),
        "timestep": np.zeros(batch, np.float32),
        "class_labels": np.zeros(batch, np.int64),
        "latent_ids": np.arange(latents),
    }
