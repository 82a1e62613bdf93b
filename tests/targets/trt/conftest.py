"""Real builds for small graphs: tensorrt-rtx needs no GPU for them. Every test has its own build cache."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import pytest
from fakes import manifest, write_manifest

from elastic_runtime.contract.artifacts import Graph, OnnxArtifact, TensorSpec
from elastic_runtime.contract.axis import Span
from elastic_runtime.contract.bundle import Bundle, entry

WIDTH = 8


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The build cache of this test alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "elastic-export" / "trt"


@pytest.fixture(scope="session")
def room() -> ModuleType:
    """The TensorRT room, where tensorrt-rtx can build."""
    pytest.importorskip("tensorrt_rtx", reason="building engines needs tensorrt-rtx")
    import elastic_targets.trt

    return elastic_targets.trt


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., Bundle]:
    """A bundle of one small hand-made ONNX graph: `make(nodes, initializers, inputs)`, `inputs` beside `sample` (B, 8)."""
    onnx = pytest.importorskip("onnx", reason="writing the graph needs onnx")
    from onnx import TensorProto, helper

    kinds = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64}

    def make(nodes: list[Any], initializers: list[Any] = [], inputs: tuple[TensorSpec, ...] = (), opset: int = 20, **spans: Span) -> Bundle:  # noqa: B006
        specs = (TensorSpec(name="sample", dtype="float32", shape=("B", WIDTH)), *inputs)
        output = TensorSpec(name="prediction", dtype="float32", shape=("B", WIDTH))

        def info(spec: TensorSpec) -> Any:
            return helper.make_tensor_value_info(spec.name, kinds[spec.dtype], list(spec.shape))

        graph = helper.make_graph(nodes, "tiny", [info(spec) for spec in specs], [info(output)], initializers)
        folder = tmp_path / "tiny"
        path = folder / "onnx" / "denoiser.onnx"
        path.parent.mkdir(parents=True)
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10), str(path))
        artifact = OnnxArtifact(precision="fp32", files=(entry(folder, path),), toolchain={}, opset=opset)
        described = Graph(inputs=specs, outputs=(output,), dimensions={"B": Span(1, 4)} | spans, artifacts=(artifact,))
        write_manifest(folder, msgspec.structs.replace(manifest(), graphs={"denoiser": described}))
        return Bundle.open(folder)

    return make
