"""ONNX Runtime on the GPU, as the product opens it: numerics at each recorded budget, plain, captured and replayed, and step times.

python sessions.py BUNDLE...        (RECORDED=1: no times between the recorded budgets; CHECK_DEVICE=cpu tries it without a GPU)
"""

import logging
import os
import sys
import time
from pathlib import Path

import numpy as np
from rows import DEVICE, Table, left, timed

from elastic_runtime import Session
from elastic_runtime.contract.artifacts import OnnxArtifact
from elastic_runtime.contract.budget import Budget, key
from elastic_runtime.contract.bundle import Bundle
from elastic_runtime.contract.precision import EXACT
from elastic_runtime.contract.reference import axis_feeds, cut, unpack
from elastic_runtime.errors import ElasticError
from elastic_runtime.sessions.checking import check
from elastic_runtime.sessions.opening import open_artifact

Arrays = dict[str, np.ndarray]
TF32 = [("CUDAExecutionProvider", {"use_tf32": 1}), "CPUExecutionProvider"]


def main(folders: list[str]) -> None:
    table = Table(os.environ.get("TABLE", "sessions"))
    messages: list[str] = []
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: messages.append(record.getMessage()[:300])  # type: ignore[method-assign]
    logging.getLogger("elastic_runtime").addHandler(handler)
    logging.getLogger("elastic_runtime").setLevel(logging.INFO)
    for bundle in map(Bundle.open, folders):
        for graph, described in bundle.manifest.graphs.items():
            for artifact in (one for one in described.artifacts if isinstance(one, OnnxArtifact)):
                if left() < 15:
                    return
                about = {"bundle": bundle.folder.name, "graph": graph, "precision": artifact.precision}
                messages.clear()
                try:
                    measure(table, bundle, graph, artifact, about)
                except ElasticError as error:
                    table.row(**about, check="failed", failed=f"{type(error).__name__}: {error}"[:600])
                table.row(**about, check="log", said=messages)


def measure(table: Table, bundle: Bundle, graph: str, artifact: OnnxArtifact, about: dict[str, str]) -> None:
    described = bundle.manifest.graphs[graph]
    limit = described.tolerance(artifact)
    plain_options = {"cuda_graphs": False} if DEVICE == "cuda" else {}
    begun = time.perf_counter()
    with (
        open_artifact(bundle, graph, artifact, "ort", device=DEVICE) as product,
        open_artifact(bundle, graph, artifact, "ort", device=DEVICE, **plain_options) as plain,
    ):
        table.row(**about, check="opened", seconds=time.perf_counter() - begun, where=product.where)
        for name in ("plain", "captured", "replayed"):  # the first, second and third run of each shape
            proven(table, bundle, graph, product, limit, {**about, "check": name})
        if artifact.precision == EXACT and DEVICE == "cuda":
            with open_artifact(bundle, graph, artifact, "ort", providers=TF32) as loose:
                proven(table, bundle, graph, loose, limit, {**about, "check": "tf32"})
        budgets = points(bundle, graph)
        for batch in sorted({1, min(2, described.batch.max), described.batch.max}):
            for budget in budgets:
                if left() < 8:
                    return
                arrays = feeds(bundle, graph, budget, batch)
                for name, session in (("time", product), ("time, plain", plain)):
                    facts = timed(lambda session=session, arrays=arrays: session.run(arrays), 0.15)
                    table.row(**about, check=name, budget=key(budget), batch=batch, **facts)
            worst = 0.0
            for turn, budget in enumerate([*budgets, *budgets[::-1]], 1):  # other shapes in between, with numbers they have not seen
                arrays = feeds(bundle, graph, budget, batch, turn)
                worst = max(worst, distance(product.run(arrays), plain.run(arrays)))
            table.row(**about, check="graph against plain", batch=batch, max_abs=worst)


def proven(table: Table, bundle: Bundle, graph: str, session: Session, limit: float, about: dict[str, str]) -> None:
    for row in check(bundle, graph, session, limit):
        facts = {"max_abs": row.max_abs, "psnr_db": row.psnr_db, "passed": row.passed, "limit": limit, "where": row.where}
        table.row(**about, budget=key(row.budget), **facts)


def points(bundle: Bundle, graph: str) -> list[Budget]:
    """The recorded budgets and, unless RECORDED is set, the doublings between them."""
    _, outputs = unpack(graph, bundle.reference())
    budgets = dict.fromkeys(outputs)
    if bundle.manifest.axes and graph == "denoiser" and "RECORDED" not in os.environ:
        axis = bundle.manifest.axes[0]
        budgets |= dict.fromkeys(Budget(**{axis.name: value}).on(bundle.manifest.axes) for value in axis.doublings())
    return sorted(budgets, key=lambda budget: list(dict(budget).values()))


def feeds(bundle: Bundle, graph: str, budget: Budget, batch: int, turn: int = 0) -> Arrays:
    """The recorded feeds at a budget, repeated to a batch; with a `turn`, other samples, times and labels."""
    recorded, _ = unpack(graph, bundle.reference())
    described = bundle.manifest.graphs[graph]
    axes = tuple(axis for axis in bundle.manifest.axes if axis.name in budget)
    arrays: Arrays = cut(described.inputs, recorded, budget, axes) | axis_feeds(axes, budget)
    random = np.random.default_rng(turn)
    for name in described.batched:
        array = np.ascontiguousarray(np.resize(arrays[name], (batch, *arrays[name].shape[1:])))
        if turn and array.ndim > 1:
            array = np.roll(array, turn, -1)
        elif turn:
            array = random.random(batch, np.float32) if array.dtype == np.float32 else random.permutation(array)
        arrays[name] = array
    return arrays


def distance(got: Arrays, wanted: Arrays) -> float:
    """The largest difference, in units of max(1, max |wanted|)."""
    worst = [float(np.abs(got[name] - array).max()) / max(1.0, float(np.abs(array).max())) for name, array in wanted.items()]
    return max(value if np.isfinite(value) else float("inf") for value in worst)


if __name__ == "__main__":
    if not sys.argv[1:] or not all(Path(folder).is_dir() for folder in sys.argv[1:]):
        sys.exit(__doc__)
    main(sys.argv[1:])
