"""Run a bundle's TensorRT engine on this machine's GPU and hold it against ONNX Runtime on the CPU.

    python samples/gpu_check.py BUNDLE        (or: make gpu-check)

One row a budget: the largest difference without and with a CUDA graph, and the time of a run each way, batch 1. Then the
budgets in turn, A -> B -> A, where a stale graph or context would show. Exit code 1: a difference beyond the tolerance; 3: no
engine of the bundle can run here.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from elastic_runtime import Budget, Bundle, MissingError, Session, Span
from elastic_runtime.contract.artifacts import Graph, TrtArtifact
from elastic_runtime.contract.budget import key
from elastic_runtime.contract.manifest import Manifest
from elastic_runtime.contract.reference import axis_feeds
from elastic_runtime.sessions.opening import obstacles, open_artifact

Arrays = dict[str, np.ndarray]
GRAPH = "denoiser"


@dataclass(frozen=True)
class Row:
    """One budget: differences as a share of max(1, |reference|), times in milliseconds."""

    budget: str
    plain_error: float
    graph_error: float
    plain_ms: float
    graph_ms: float


def engine(bundle: Bundle) -> TrtArtifact:
    """The first engine that runs here; raises MissingError with the reason for each that does not."""
    reasons: list[str] = []
    for artifact in bundle.manifest.graphs[GRAPH].artifacts:
        if isinstance(artifact, TrtArtifact):
            room, why = obstacles(artifact, "trt")
            if room:
                return artifact
            reasons += why
    raise MissingError(" ".join(reasons) or f"{bundle.folder} has no engine: add one with elastic-export trt {bundle.folder}")


def budgets(manifest: Manifest, artifact: TrtArtifact) -> list[Budget]:
    """Each bucket's end, and the budget just above it, which runs in the next profile up."""
    graph = manifest.graphs[GRAPH]
    names = {spec.name for spec in graph.inputs}
    points: dict[Budget, None] = {}
    for axis in (axis for axis in manifest.axes if axis.input in names):
        ends = {axis.max}
        if axis.dimension:
            ends = {profile.dimensions[axis.dimension].max * axis.unit for profile in artifact.profiles}
            spans = [profile.dimensions[axis.dimension] for profile in artifact.profiles]
            ends |= {end + axis.step for end in ends if any(span.min <= axis.length(end + axis.step) <= span.max for span in spans)}
        for value in sorted(value for value in ends if value in axis.values):
            points[Budget(**{other.name: other.default for other in manifest.axes if other.input in names} | {axis.name: value})] = None
    return list(points) or [Budget()]


def feeds(manifest: Manifest, budget: Budget, seed: int, batch: int = 1) -> Arrays:
    """Random inputs at a budget; the same arguments give the same arrays."""
    graph: Graph = manifest.graphs[GRAPH]
    random = np.random.default_rng(seed)
    carried = axis_feeds(tuple(axis for axis in manifest.axes if axis.name in budget), budget)
    arrays: Arrays = {}
    shaped = {str(axis.dimension): Span(budget[axis.name], budget[axis.name]) for axis in manifest.axes if axis.carrier == "shape"}
    sizes = graph.dimensions | {"B": Span(batch, batch)} | shaped
    for spec in graph.inputs:
        shape = tuple(sizes[size].min if isinstance(size, str) else size for size in spec.shape)
        if spec.name in carried:
            arrays[spec.name] = carried[spec.name]
        elif spec.dtype == "int64":
            arrays[spec.name] = random.integers(0, manifest.model.num_classes, shape)
        else:
            arrays[spec.name] = random.standard_normal(shape).astype(np.float32)
    return arrays


def error(got: Arrays, wanted: Arrays) -> float:
    """Largest difference as a share of max(1, |reference|); infinite where a value is not finite."""
    worst = 0.0
    for name, reference in wanted.items():
        difference = np.abs(got[name].astype(np.float64) - reference).max()
        worst = max(worst, float(difference / max(1.0, np.abs(reference).max()))) if np.isfinite(difference) else np.inf
    return worst


def milliseconds(session: Session, arrays: Arrays, runs: int) -> float:
    """Median time of a run, inputs and outputs copied."""
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        session.run(arrays)
        times.append(time.perf_counter() - start)
    return 1e3 * float(np.median(times))


def check(bundle: Bundle, artifact: TrtArtifact, runs: int) -> tuple[list[Row], float, str]:
    """Rows by budget, the worst error of the turns A -> B -> A with graphs, and what ran the engine."""
    manifest = bundle.manifest
    source = next(other for other in manifest.graphs[GRAPH].artifacts if other.path == artifact.source)
    points = budgets(manifest, artifact)
    batch = min(profile.dimensions["B"].min for profile in artifact.profiles)
    inputs = {point: feeds(manifest, point, seed, batch) for seed, point in enumerate(points)}
    with open_artifact(bundle, GRAPH, source, "ort", providers=["CPUExecutionProvider"]) as session:
        wanted = {point: session.run(arrays) for point, arrays in inputs.items()}
    rows = []
    with (
        open_artifact(bundle, GRAPH, artifact, "trt", cuda_graphs=False) as plain,
        open_artifact(bundle, GRAPH, artifact, "trt") as graphs,
    ):
        for point, arrays in inputs.items():
            first = error(plain.run(arrays), wanted[point])
            # The second run captures, the third replays what was captured.
            second = max(error(graphs.run(arrays), wanted[point]) for _ in range(3))
            rows.append(Row(key(point), first, second, milliseconds(plain, arrays, runs), milliseconds(graphs, arrays, runs)))
        turns = 0.0
        for a in points:
            for b in points:
                for point in (a, a, a, b, b, a, a):
                    turns = max(turns, error(graphs.run(inputs[point]), wanted[point]))
        return rows, turns, graphs.where


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", help="a bundle with an engine and the ONNX file that it was built from")
    parser.add_argument("--runs", type=int, default=50, help="timed runs a budget (default 50)")
    options = parser.parse_args(arguments)
    bundle = Bundle.open(options.bundle)
    try:
        artifact = engine(bundle)
    except MissingError as missing:
        print(f"nothing ran: {missing}", file=sys.stderr)
        return missing.exit_code
    rows, turns, where = check(bundle, artifact, options.runs)
    limit = bundle.manifest.graphs["denoiser"].tolerance(artifact)
    print(f"{artifact.path} ({artifact.precision}), {where}; tolerance {limit:.0e}")
    print(f"{'budget':<16}{'error':>10}{'graph':>10}{'ms':>10}{'graph ms':>10}")
    for row in rows:
        print(f"{row.budget:<16}{row.plain_error:>10.1e}{row.graph_error:>10.1e}{row.plain_ms:>10.3f}{row.graph_ms:>10.3f}")
    print(f"{'A -> B -> A':<16}{'':>10}{turns:>10.1e}")
    worst = max(turns, *(max(row.plain_error, row.graph_error) for row in rows))
    print("ok" if worst <= limit else f"FAILS: {worst:.1e} is beyond {limit:.0e}")
    return int(worst > limit)


if __name__ == "__main__":
    sys.exit(main())
