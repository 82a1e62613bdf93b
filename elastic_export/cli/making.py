"""What all commands that export from torch do after reading their options."""

import contextlib
import logging
from pathlib import Path
from typing import Any

import elastic_targets
from elastic_export.cli import show
from elastic_export.cli.options import command_line, words
from elastic_runtime.contract.axis import Span
from elastic_runtime.contract.budget import key
from elastic_runtime.contract.bundle import Bundle
from elastic_runtime.errors import MissingError, UsageError


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
    components: str | None = None,
    size: Span | None = None,
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
    from elastic_export.capture.capture import capture, probe_budgets
    from elastic_export.capture.zoo import Request, load, locate, samples
    from elastic_export.exporting import export_into, prepare
    from elastic_runtime.files.folder import standing, writing

    room = elastic_targets.target(target)
    logging.basicConfig(level=logging.INFO if verbose else logging.ERROR)
    overrides = {} if head_blocks is None else {"head_blocks": head_blocks}
    with contextlib.ExitStack() as stack:
        # A refusal should not wait for the weights to load, and nobody else should come to write there meanwhile.
        draft = None if dry_run else stack.enter_context(writing(output, overwrite))
        old = draft.old if draft else standing(output, overwrite).bundle
        on_stage = stack.enter_context(show.stages(quiet))
        on_stage(f"loading {model}")
        given = {name: span for name, span in spans.items() if span}
        if folder := locate(model):
            from elastic_export.capture.folders import capture_folder

            others = {f"--{name}": span for name, span in given.items() if name != "tokens"}
            options: dict[str, object] = {**others, "--checkpoint": checkpoint, "--config": config, "--vae": vae}
            options |= {"--head-blocks": head_blocks is not None, "--random-weights": random_weights}
            if wrong := [name for name, value in options.items() if value]:
                verb = "does" if len(wrong) == 1 else "do"
                raise UsageError(
                    f"{model} is a diffusers folder and has its own sizes and weights: {', '.join(wrong)} {verb} not go with it"
                )
            chosen, name = words(components) if components else None, Path(model).name
            captured = capture_folder(folder, chosen, size, batch, name, not dry_run, model in samples(), given)
        else:
            if components or size:
                raise UsageError(f"--components and --size are for a diffusers folder, and {model} is none")
            captured = capture(load(Request(model, checkpoint, config, random_weights, overrides)), given, batch, vae)
        bundle = None
        if draft:
            bundle = export_into(draft, captured, target, room_options, command_line(), overwrite, on_stage)
        else:
            prepare(captured, room, room_options, old, command_line(), overwrite)
    for note in captured.notes:
        show.note(note)
    if captured.ignored:
        show.note(f"ignored {len(captured.ignored)} training-only weights, {captured.ignored[0]} among them")
    if captured.model.weights == "random":
        show.note("the weights are random: fit to measure speed, not to draw")
    if bundle is None:
        graphs = captured.graphs if captured.peaks else captured.graphs[:1]  # a folder's have sizes of their own
        points = {graph.name: [key(budget) for budget in probe_budgets(graph.axes, graph.open_dimensions)] for graph in graphs}
        budgets = next(iter(points.values()))
        plan: dict[str, object] = {"output": str(output), "target": target, "axes": captured.axes, "batch": str(batch), "verify": budgets}
        plan |= {"peak_bytes": captured.peaks} if captured.peaks else {}
        if json:
            show.as_json(target, {"dry_run": True, "model": captured.model} | plan)
        else:
            what = f"{captured.model.name} for {target}, {precision}, batch {batch}"
            show.line(f"would write {output}: {what}, verified at {', '.join(budgets)}")
            show.peaks(captured.peaks, points)
    elif not silent and json:
        show.as_json(target, {"bundle": str(bundle.folder), "manifest": bundle.manifest})
    elif not silent:
        show.bundle(bundle)
    return bundle
