"""A bundle whose graph is written by hand, so that real backends have something to run: `sample + length of latent_ids`."""

from pathlib import Path

import numpy as np
import pytest
from fakes import manifest, write_manifest

from elastic_runtime import Bundle
from elastic_runtime.contract.artifacts import OnnxArtifact
from elastic_runtime.contract.bundle import entry


def tiny_bundle(folder: Path, *opsets: int) -> Bundle:
    """A bundle with an ONNX artifact for each of `opsets`."""
    onnx = pytest.importorskip("onnx", reason="writing the graph needs onnx")
    from onnx import TensorProto, helper

    described = manifest().graphs["denoiser"]
    kinds = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64}
    inputs, outputs = (
        [helper.make_tensor_value_info(spec.name, kinds[spec.dtype], list(spec.shape)) for spec in specs]
        for specs in (described.inputs, described.outputs)
    )
    nodes = [
        helper.make_node("Shape", ["latent_ids"], ["length"]),
        helper.make_node("Cast", ["length"], ["number"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["sample", "number"], ["prediction"]),
    ]
    graph = helper.make_graph(nodes, "tiny", inputs, outputs)
    artifacts = []
    for opset in opsets:
        path = folder / "onnx" / f"denoiser.opset{opset}.onnx"
        path.parent.mkdir(parents=True, exist_ok=True)
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10), str(path))
        artifacts.append(OnnxArtifact(precision="fp32", files=(entry(folder, path),), toolchain={}, opset=opset))
    write_manifest(folder, manifest(artifacts=tuple(artifacts)))
    return Bundle.open(folder)


def tiny_feeds(batch: int, kept: int) -> dict[str, np.ndarray]:
    sample = np.random.default_rng(batch).standard_normal((batch, 4, 8, 8)).astype(np.float32)
    return {
        "sample": sample,
        "timestep": np.zeros(batch, np.float32),
        "class_labels": np.zeros(batch, np.int64),
        "latent_ids": np.arange(kept),
    }
