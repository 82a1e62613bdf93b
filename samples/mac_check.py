"""Check the Core ML artifacts of a bundle on this Mac: numbers, times, and which part of the machine runs what.

    elastic-export coreml -o build/mac-check --overwrite
    python samples/mac_check.py build/mac-check

For each artifact, compute unit and budget it prints: the first prediction (the function is loaded then), the median of the steady ones,
the error against the recorded outputs of the original model, and where Core ML says that it prefers to run the operations. Where
conditions are a function of their own, the first prediction computes them and the steady ones have them. Exit code 1 if an error is above
its bound.
"""

import argparse
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from elastic_runtime import Bundle, MissingError
from elastic_runtime.contract.artifacts import CoremlArtifact
from elastic_runtime.contract.budget import key
from elastic_runtime.contract.reference import axis_feeds, cut, unpack
from elastic_runtime.files.cache import folder
from elastic_runtime.sessions import apart
from elastic_runtime.sessions.checking import check
from elastic_runtime.sessions.coreml import COMPUTE_UNITS, CoremlSession, compiled, obstacle, sizes
from elastic_runtime.sessions.session import Session

COLUMNS = "{:<34} {:<8} {:<14} {:>9} {:>9} {:>9} {:>5}  {}"
DEVICES = {"MLCPUComputeDevice": "cpu", "MLGPUComputeDevice": "gpu", "MLNeuralEngineComputeDevice": "ane"}


def artifacts(bundle: Bundle) -> Iterator[tuple[str, CoremlArtifact]]:
    for name, graph in bundle.manifest.graphs.items():
        for artifact in graph.artifacts:
            if isinstance(artifact, CoremlArtifact):
                yield name, artifact


def opened(bundle: Bundle, name: str, artifact: CoremlArtifact, units: str) -> Session:
    graph, options = bundle.manifest.graphs[name], {"compute_units": units}
    if artifact.conditions:
        return apart.opened(bundle, graph, artifact, CoremlSession, options)
    return CoremlSession(bundle, graph, artifact, **options)


def where(package: Path, units: str) -> dict[str, Counter[str]]:
    """Operations of each function by the device that Core ML prefers for them; those without a device are constants."""
    import coremltools
    from coremltools.models.compute_plan import MLComputePlan

    plan = MLComputePlan.load_from_path(str(package), getattr(coremltools.ComputeUnit, COMPUTE_UNITS[units]))
    places: dict[str, Counter[str]] = {}
    for name, function in plan.model_structure.program.functions.items():
        usages: list[Any] = [plan.get_compute_device_usage_for_mlprogram_operation(operation) for operation in function.block.operations]
        places[name] = Counter(DEVICES[type(usage.preferred_compute_device).__name__] for usage in usages if usage)
    return places


def measure(bundle: Bundle, name: str, artifact: CoremlArtifact, units: str, runs: int) -> Iterator[tuple[tuple[object, ...], bool]]:
    """One row of the table for each recorded budget that the artifact offers, and whether it passed."""
    graph, arrays = bundle.manifest.graphs[name], bundle.reference()
    begun = time.perf_counter()
    with opened(bundle, name, artifact, units) as session:
        print(f"# {artifact.package} on {units}: opened in {time.perf_counter() - begun:.2f} s (compiled at the first opening)")
        package, temporary = compiled(bundle, artifact, folder("coreml"))
        plans = where(package, units)
        if temporary is not None:  # where nothing can be kept; it lasts until it is read
            temporary.cleanup()
        shared, outputs = unpack(name, arrays)
        batched = graph.batched
        for budget in session.budgets or tuple(outputs):
            axes = tuple(axis for axis in bundle.manifest.axes if axis.name in budget)
            feeds = cut(graph.inputs, shared, budget, axes) | axis_feeds(axes, budget)
            feeds |= {each: np.ascontiguousarray(feeds[each][: session.batch.min]) for each in batched}
            seconds = []
            for _ in range(runs + 1):
                start = time.perf_counter()
                session.run(feeds)
                seconds.append(time.perf_counter() - start)
            only = {full: array for full, array in arrays.items() if full.split("/")[:2] in ([name, "feed"], [name, key(budget)])}
            session.budgets = (budget,)
            row = next(check(bundle, name, session, graph.tolerance(artifact), only))
            lengths = sizes(graph.inputs, feeds)
            function = next(call.function for call in artifact.calls if call.sizes in ({}, lengths))
            devices = plans.get(function, Counter())
            ran = ", ".join(f"{count} {device}" for device, count in devices.most_common())
            first, steady = 1e3 * seconds[0], 1e3 * statistics.median(seconds[1:])
            figures = (artifact.package, units, key(budget), f"{first:.1f}", f"{steady:.2f}", f"{row.max_abs:.1e}")
            yield (*figures, "ok" if row.passed else "FAIL", ran), row.passed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--units", default="cpu,cpu+gpu,cpu+ane,all", help="compute units to try, separated by commas")
    parser.add_argument("--runs", type=int, default=20, help="steady predictions at each budget")
    options = parser.parse_args()
    bundle = Bundle.open(options.bundle, hashes=True)
    passed = True
    print(COLUMNS.format("package", "units", "budget", "first ms", "ms", "max abs", "", "operations by preferred device"))
    for name, artifact in artifacts(bundle):
        if reason := obstacle(artifact):
            raise MissingError(reason)
        for units in options.units.split(","):
            for row, good in measure(bundle, name, artifact, units, options.runs):
                print(COLUMNS.format(*row), flush=True)
                passed &= good
    return 0 if passed else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except MissingError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
