"""What all commands that export from torch do after reading their options."""

import logging
from pathlib import Path
from typing import Any

import elastic_targets
from elastic_export.cli import show
from elastic_export.cli.options import command_line
from elastic_runtime.axis import Span
from elastic_runtime.budget import key
from elastic_runtime.bundle import Bundle
from elastic_runtime.errors import MissingError


def make(
    target: str,
    room_options: Any,
    model: str,
    output: Path,
    spans: dict[str, Span | None],
    batch: Span,
    precision: str,
    *,
    checkpoint: Path | None = None,
    config: Path | None = None,
    vae: Path | None = None,
    head_blocks: int | None = None,
    random_weights: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    json: bool = False,
    quiet: bool = False,
    verbose: bool = False,
    silent: bool = False,
) -> Bundle | None:
    """Load, capture, export and show (unless `silent`: the caller goes on with the bundle). None for a dry run."""
    try:
        import safetensors  # noqa: F401  the doors to the hall: their absence is advice, not a traceback
        import torch  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingError(f"exporting needs {error.name}, which is not installed: pip install 'elastic-export[torch]'") from error
    from elastic_export.capture import capture, probe_budgets
    from elastic_export.export import destination, export
    from elastic_export.models.zoo import Request, load

    room = elastic_targets.load(target)
    logging.basicConfig(level=logging.INFO if verbose else logging.ERROR)
    destination(output, overwrite)  # a refusal should not wait for the weights to load
    overrides = {} if head_blocks is None else {"head_blocks": head_blocks}
    with show.stages(quiet) as on_stage:
        on_stage(f"loading {model}")
        loaded = load(Request(model, checkpoint, config, random_weights, overrides))
        captured = capture(loaded, {name: span for name, span in spans.items() if span}, batch, vae)
        del loaded
        for graph in captured.graphs:
            room.requires(graph, room_options)
        del graph  # the export lets each graph's weights go when it is lowered
        bundle = None if dry_run else export(captured, target, room_options, output, command_line(), overwrite, on_stage)
    if captured.ignored:
        show.note(f"ignored {len(captured.ignored)} training-only weights, {captured.ignored[0]} among them")
    if captured.model.weights == "random":
        show.note("the weights are random: fit to measure speed, not to draw")
    if bundle is None:
        budgets = [key(budget) for budget in probe_budgets(captured.axes)]
        plan = {"output": str(output), "target": target, "axes": captured.axes, "batch": str(batch), "verify": budgets}
        if json:
            show.as_json(target, {"dry_run": True, "model": captured.model} | plan)
        else:
            what = f"{captured.model.name} for {target}, {precision}, batch {batch}"
            show.line(f"would write {output}: {what}, verified at {', '.join(budgets)}")
    elif not silent and json:
        show.as_json(target, {"bundle": str(bundle.folder), "manifest": bundle.manifest})
    elif not silent:
        show.bundle(bundle)
    return bundle
