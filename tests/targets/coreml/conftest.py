"""Small captures, a way to lower them, and MIL programs by hand."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

pytest.importorskip("torch", reason="lowering needs torch")
pytest.importorskip("coremltools", reason="the Core ML room needs coremltools")

import coremltools as ct
import torch
from coremltools.converters.mil import Builder as mb  # noqa: N813  its name everywhere
from coremltools.converters.mil.mil import types

from elastic_export.capture.capture import capture
from elastic_export.capture.zoo import Request, load
from elastic_runtime import Budget, Span
from elastic_runtime.contract.artifacts import CoremlArtifact, Graph
from elastic_runtime.sessions.session import Session
from elastic_targets.capture import GraphCapture
from elastic_targets.coreml import CoremlOptions, Evaluator
from elastic_targets.coreml.lower import ensures, lower
from elastic_targets.coreml.options import requires
from elastic_targets.coreml.session import evaluator


class Graphs(msgspec.Struct, frozen=True):
    """As much of a manifest as a session reads."""

    graphs: dict[str, Graph]


class Folder:
    """As much of a bundle as a session reads."""

    def __init__(self, folder: Path, graph: Graph):
        self.folder, self.manifest = folder, Graphs({"denoiser": graph})

    def file(self, relative: str) -> Path:
        return self.folder / relative


@pytest.fixture(scope="session")
def elit(golden: Path) -> Callable[..., GraphCapture]:
    """Capture a golden ELIT, its latents narrowed."""

    def graph(name: str = "c", latents: Span | None = None, batch: Span = Span(1, 4)) -> GraphCapture:  # noqa: B008
        config = golden / f"elit-{name}.json"
        request = Request(json.loads(config.read_text())["family"], config.with_suffix(".pt"), config)
        return capture(load(request), {"latents": latents} if latents else {}, batch).graphs[0]

    return graph


@pytest.fixture
def lowered(tmp_path: Path) -> Callable[..., tuple[CoremlArtifact, Session]]:
    """Lower a capture as asked and open what was saved."""

    def make(graph: GraphCapture, **options: Any) -> tuple[CoremlArtifact, Session]:
        chosen = CoremlOptions(**options)
        requires(graph, chosen)
        (artifact,) = lower(graph, chosen, tmp_path)
        ensures(graph, artifact, tmp_path)
        described = Graph(inputs=graph.inputs, outputs=graph.outputs, dimensions=graph.dimensions, artifacts=(artifact,))
        return artifact, evaluator(Folder(tmp_path, described), described, artifact)  # type: ignore[arg-type]

    return make


@pytest.fixture(scope="session")
def error() -> Callable[[GraphCapture, Session, Budget], float]:
    """Largest difference to torch at a budget, of the largest value (at least 1)."""

    def measure(graph: GraphCapture, session: Session, budget: Budget) -> float:
        feeds = graph.feeds(budget, graph.batch.min)
        with torch.inference_mode():
            wanted = graph.module(**{name: torch.from_numpy(array) for name, array in feeds.items()}).numpy()
        got = session.run(feeds)[graph.outputs[0].name]
        return float(np.abs(got - wanted).max() / max(1.0, np.abs(wanted).max()))

    return measure


@pytest.fixture
def program(tmp_path: Path) -> Callable[..., Callable[..., Any]]:
    """Save a MIL program written by hand, and return what runs it: `program(body, x=(2, 3))(x=array)`."""

    def build(
        body: Callable[..., Any], dtype: Any = types.fp32, opset: Any = ct.target.iOS18, **inputs: tuple[int, ...]
    ) -> Callable[..., Any]:
        # An input whose name begins with i holds indices.
        specs = [mb.TensorSpec(shape=shape, dtype=types.int32 if name.startswith("i") else dtype) for name, shape in inputs.items()]
        made = mb.program(input_specs=specs, opset_version=opset)(
            eval(f"lambda {', '.join(inputs)}: body({', '.join(inputs)})", {"body": body})
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = ct.convert(made, minimum_deployment_target=opset, compute_precision=ct.precision.FLOAT32, skip_model_load=True)
            package = tmp_path / "by-hand.mlpackage"
            model.save(str(package))
        evaluator = Evaluator(package)

        def run(**feeds: Any) -> Any:
            outputs = list(evaluator.run("main", {name: np.asarray(value) for name, value in feeds.items()}).values())
            return outputs[0] if len(outputs) == 1 else outputs

        return run

    return build
