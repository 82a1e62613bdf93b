"""What the commands that export from torch do after reading their options."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from elastic_export.cli import show
from elastic_export.cli.options import command_line
from elastic_export.cli.records import How, Source
from elastic_runtime.contract.axis import Span
from elastic_runtime.contract.budget import key
from elastic_runtime.contract.bundle import Bundle


def make(
    target: str,
    given: Mapping[str, Any],
    source: Source,
    output: Path,
    spans: Mapping[str, Span],
    batch: Span,
    how: How,
    then: tuple[Any, Any] | None = None,
) -> Bundle | None:
    """Read, capture and export; `given` are the target's own options, `then` another target that takes what was made, with its options.
    None for a dry run, which says what would be done."""
    import elastic_targets
    from elastic_export.exporting import Job
    from elastic_export.preparing import preparing, target_options

    logging.basicConfig(level=logging.INFO if how.verbose else logging.ERROR)
    room = elastic_targets.target(target)
    job = Job(room, target_options(room, given), command_line(), how.overwrite, how.verify, then)
    with (
        show.stages(how.quiet) as on_stage,
        preparing(source.model, job, output, spans, batch, source.weights(), on_stage, how.dry_run) as prepared,
    ):
        peaks, bundle = prepared.capture.peaks, None
        if how.dry_run:
            prepared.check()
            peaks = {graph.name: peaks[graph.name] for graph in prepared.capture.graphs if peaks}
        else:
            bundle = prepared.run(on_stage, show.each_stage(on_stage))
    for note in prepared.notes():
        show.note(note)
    if bundle is None:
        _plan(prepared, peaks, batch, how)
    return bundle


def shown(bundle: Bundle | None, command: str, how: How) -> None:
    """Show what was made."""
    if bundle and how.json:
        show.as_json(command, {"bundle": str(bundle.folder), "manifest": bundle.manifest})
    elif bundle:
        show.bundle(bundle)


def _plan(prepared: Any, peaks: Mapping[str, int], batch: Span, how: How) -> None:
    """Show what would be made."""
    from elastic_export.exporting import proving

    capture, job = prepared.capture, prepared.job
    graphs = capture.graphs if peaks else capture.graphs[:1]  # a folder's have sizes of their own
    proven = {graph.name: proving(graph, job)[0] for graph in graphs}
    points = {name: [key(budget) for budget in budgets] for name, budgets in proven.items()}
    budgets = next(iter(points.values()))
    plan: dict[str, object] = {
        "output": str(prepared.output),
        "target": job.target.name,
        "axes": capture.manifest.axes,
        "batch": str(batch),
    }
    sizes, waiting = {}, {}
    if peaks and job.target.estimate:
        estimates = {graph.name: job.target.estimate(graph, job.options) for graph in capture.graphs}
        peaks = {name: estimate.peak_bytes for name, estimate in estimates.items()}
        sizes = {name: estimate.file_bytes for name, estimate in estimates.items()}
        waiting = {name: estimate.waiting_bytes for name, estimate in estimates.items() if estimate.waiting_bytes}
    plan |= {"verify": budgets} | ({"peak_bytes": peaks} if peaks else {}) | ({"file_bytes": sizes} if sizes else {})
    plan |= {"waiting_bytes": waiting} if waiting else {}
    if how.json:
        show.as_json(job.target.name, {"dry_run": True, "model": capture.manifest.model} | plan)
    else:
        what = f"{capture.manifest.model.name} for {job.target.name}, {job.options.precision}, batch {batch}"
        show.line(f"would write {prepared.output}: {what}, {show.proven(budgets)}")
        show.peaks(peaks, sizes, waiting, points)
