"""The only folder that prints: results on stdout, progress and messages on stderr."""

import dataclasses
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from elastic_runtime.contract.artifacts import Artifact, Profile, TrtArtifact, Verification
from elastic_runtime.contract.budget import key
from elastic_runtime.contract.bundle import Bundle
from elastic_runtime.contract.manifest import Cost

JSON_SCHEMA = 1
WIDE = 1000  # columns that no table needs
WORD = 40  # characters of a word that a column of text keeps whole


def fail(message: str) -> None:
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"[red]error:[/red] {escape(message)}")


def note(message: str) -> None:
    """Something a user should know that is not the result."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"[yellow]note:[/yellow] {escape(message)}")


def line(message: str) -> None:
    Console(highlight=False, soft_wrap=True).print(escape(message))


def as_json(command: str, content: dict[str, Any]) -> None:
    """A result for programs: `schema` names the command and the version of its form."""
    sys.stdout.write(document(command, content))


def document(command: str, content: dict[str, Any]) -> str:
    facts = {"schema": f"elastic-export/{command}/{JSON_SCHEMA}"} | _plain(content)
    return json.dumps(msgspec.to_builtins(facts), indent=2) + "\n"


def text(facts: dict[str, Any]) -> str:
    """Facts as one line of JSON, for a picture's metadata."""
    return json.dumps(_plain(facts))


def _plain(value: Any) -> Any:
    """Budgets and records as plain containers."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


@contextmanager
def stages(quiet: bool) -> Iterator[Any]:
    """Yield `on_stage(what)`, shown as a spinner with the time that each stage has taken."""
    with _progress(quiet, SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()) as progress:
        tasks: list[Any] = []

        def on_stage(what: str) -> None:
            if tasks:
                progress.update(tasks[-1], total=1, completed=1)
            tasks.append(progress.add_task(what, total=None))

        yield on_stage
        if tasks:
            progress.update(tasks[-1], total=1, completed=1)


def each_stage(on_stage: Callable[[str], None]) -> Callable[[str, int, int], None]:
    """`on_progress(stage, done, total)` that shows each stage once, as one of `stages`."""
    shown = ""

    def on_progress(stage: str, done: int, total: int) -> None:
        nonlocal shown
        if stage != shown:
            shown = stage
            on_stage(stage)

    return on_progress


@contextmanager
def bar(quiet: bool, what: str, total: int | None) -> Iterator[Any]:
    """Yield `advance(steps=1)` of a progress bar with an estimate of the time that is left, where the total is known."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with _progress(quiet, *columns) as progress:
        task = progress.add_task(what, total=total)
        yield lambda steps=1: progress.advance(task, steps)


@contextmanager
def building(quiet: bool) -> Iterator[Any]:
    """Yield `on_progress(stage, done, total)`, a bar for each stage."""
    with _progress(quiet, TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn()) as progress:
        tasks: dict[str, Any] = {}

        def on_progress(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=total)
            progress.update(tasks[stage], completed=done, total=total)

        yield on_progress


def _progress(quiet: bool, *columns: Any) -> Progress:
    console = Console(stderr=True)
    return Progress(*columns, console=console, disable=quiet or not console.is_terminal, transient=False)


def table(title: str, columns: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """A table of results; the first column is text, whose words stay whole unless they are very long, the others are figures, which no
    terminal is too narrow for."""
    shown = Table(title=title, title_justify="left", header_style="bold")
    cells = [[str(cell) for cell in row] for row in rows]
    word = max((len(word) for row in cells for word in row[0].split()), default=0)
    for i, column in enumerate(columns):
        text = i == 0
        shown.add_column(
            column, justify="left" if text else "right", no_wrap=not text, overflow="fold", min_width=min(word, WORD) if text else None
        )
    for row in cells:
        shown.add_row(*(escape(cell) for cell in row))
    console = Console()
    if not console.is_terminal:  # a file or a pipe has no width to fit
        console = Console(width=200)
    least = Measurement.get(console, console.options.update(width=WIDE), shown).minimum
    (Console(width=least) if least > console.width else console).print(shown)


def verifications(graph: str, artifact: Artifact) -> None:
    """The rows of one artifact, or why there are none."""
    if not artifact.verified:
        note(f"{artifact.path} ({artifact.held}) was not verified: {artifact.unverified}")
        return
    table(
        f"{graph}: {artifact.path} ({artifact.held}), {artifact.verified[0].where}",
        ("budget", "max abs", "bound", "cosine", "PSNR dB", ""),
        [(key(row.budget), *_figures(row)) for row in artifact.verified],
    )


def _figures(row: Verification) -> tuple[str, ...]:
    if not row.finite:
        return ("not finite", row.bounded, "-", "-", "FAILS")
    figures = (f"{row.max_abs:.1e}", row.bounded, f"{row.cosine:.7f}", f"{row.psnr_db:.1f}")
    return (*figures, "ok" if row.passed else "FAILS")


def engine(graph: str, artifact: TrtArtifact) -> None:
    """What a TensorRT engine is for, and its profiles."""
    options = ("refit", "stripped", "weight_streaming", "version_compatible")
    extra = "".join(f", {option.replace('_', ' ')}" for option in options if getattr(artifact, option))
    line(
        f"{graph}: {artifact.path} ({artifact.precision}, {artifact.files[0].bytes / 1e6:.1f} MB), {artifact.builder} "
        f"{artifact.builder_version} for sm {', '.join(map(str, artifact.sms))}, "
        f"{artifact.network.layers} layers from {artifact.source}{extra}"
    )
    profiles(artifact.profiles)


def peaks(held: Mapping[str, int], written: Mapping[str, int], waiting: Mapping[str, int], points: Mapping[str, list[str]]) -> None:
    """What exporting each graph of a folder is likely to take of memory and of disk, one at a time, and the sizes it is proven at;
    `waiting` are bytes on disk besides, until it is written."""
    for graph, size in held.items():
        more = f" and {_amount(waiting[graph])} until it is written" if graph in waiting else ""
        disk = f"{_amount(written[graph])} on disk{more}, " if graph in written else ""
        line(f"{graph}: {disk}about {_amount(size)} of memory at most while exporting, {proven(points[graph])}")


def proven(points: Sequence[str]) -> str:
    """The budgets that an export proves, in words."""
    return f"verified at {', '.join(points)}" if points else "not verified"


def _amount(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def profiles(rows: Iterable[Profile]) -> None:
    """TensorRT's profiles: the sizes that each takes, and the ones it is tuned for."""
    for i, profile in enumerate(rows):
        sizes = (f"{letter} {size.min}-{size.max} (best {size.opt})" for letter, size in profile.dimensions.items())
        line(f"  profile {i}: {', '.join(sizes)}")


def costs(rows: Iterable[Cost]) -> None:
    """FLOPs and bytes by budget, each next to its share of the largest."""
    rows = list(rows)
    full = max(row.flops for row in rows) or 1  # a manifest may know of none
    table(
        "cost of one sample's forward pass",
        ("budget", "GFLOPs", "share", "weights MB", "activations MB"),
        [
            (
                key(row.budget),
                f"{row.flops / 1e9:.3f}",
                f"{row.flops / full:.0%}",
                *(f"{size / 1e6:.2f}" for size in (row.weight_bytes, row.activation_bytes)),
            )
            for row in rows
        ],
    )


def bundle(opened: Bundle) -> None:
    """Everything a bundle says about itself."""
    manifest = opened.manifest
    model, channels = manifest.model, "x".join(map(str, manifest.model.sample_shape))
    line(f"{opened.folder}: {model.name} ({model.family}, {model.weights} weights), samples {channels}, {model.num_classes} classes")
    for axis in manifest.axes:
        line(f"axis {axis.name}: {axis.span} in steps of {axis.step}, default {axis.default}, as the {axis.carrier} of {axis.input}")
    for name, graph in manifest.graphs.items():
        for direction, specs in (("in", graph.inputs), ("out", graph.outputs)):
            for spec in specs:
                line(f"{name} {direction:>3}: {spec.name} {spec.dtype}[{', '.join(map(str, spec.shape))}]")
        line(f"{name} open dimensions: {', '.join(f'{letter} {span}' for letter, span in graph.dimensions.items())}")
        for artifact in graph.artifacts:
            if isinstance(artifact, TrtArtifact):
                engine(name, artifact)
            verifications(name, artifact)
    if manifest.cost:
        costs(_thin(manifest.cost))
    if manifest.quality:
        rows = [(row.where, f"{row.accuracy:.1%}", f"{row.frechet_distance:.2f}") for row in manifest.quality]
        table("quality, from the model card", ("plan" if manifest.quality[0].plan else "budget", "accuracy", "Frechet distance"), rows)
    if manifest.precisions:
        graded = [
            (
                row.where,
                row.precision,
                f"{row.accuracy:.1%}",
                f"{row.frechet_distance:.2f}",
                "same" if row.psnr_db is None else f"{row.psnr_db:.1f}",
            )
            for row in manifest.precisions
        ]
        place = "plan" if manifest.precisions[0].plan else "budget"
        table("precisions, from the model card", (place, "precision", "accuracy", "Frechet distance", "pictures dB"), graded)


def _thin(rows: tuple[Cost, ...], most: int = 9) -> list[Cost]:
    stride = -(-len(rows) // most)
    return [row for i, row in enumerate(rows) if i % stride == 0 or i == len(rows) - 1]
