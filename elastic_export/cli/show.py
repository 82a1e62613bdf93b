"""The only file that prints: results on stdout, progress and messages on stderr."""

import dataclasses
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import msgspec
from rich.console import Console
from rich.markup import escape
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

from elastic_runtime.budget import key
from elastic_runtime.bundle import Bundle
from elastic_runtime.device import Device, Entry, Peak
from elastic_runtime.manifest import Artifact, Cost, Profile, TrtArtifact, Verification

JSON_SCHEMA = 1


def fail(message: str) -> None:
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"[red]error:[/red] {escape(message)}")


def note(message: str) -> None:
    """Something a user should know that is not the result."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"[yellow]note:[/yellow] {escape(message)}")


def line(message: str) -> None:
    Console(highlight=False, soft_wrap=True).print(escape(message))


def as_json(command: str, content: dict[str, Any]) -> None:
    """A result for programs: `schema` names the command and the version of its form."""
    document = {"schema": f"elastic-export/{command}/{JSON_SCHEMA}"} | _plain(content)
    sys.stdout.write(json.dumps(msgspec.to_builtins(document), indent=2) + "\n")


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


@contextmanager
def bar(quiet: bool, what: str, total: int) -> Iterator[Any]:
    """Yield `advance(steps=1)` of a progress bar with an estimate of the time that is left."""
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
    """A table of results; the first column is text, the others are figures."""
    shown = Table(title=title, title_justify="left", header_style="bold")
    for i, column in enumerate(columns):
        shown.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        shown.add_row(*(escape(str(cell)) for cell in row))
    console = Console()
    if not console.is_terminal:  # a file or a pipe has no width to fit
        console = Console(width=200)
    console.print(shown)


def verifications(graph: str, artifact: Artifact) -> None:
    """The rows of one artifact, or why there are none."""
    if not artifact.verified:
        note(f"{artifact.path} was not verified: {artifact.unverified}")
        return
    table(
        f"{graph}: {artifact.path} ({artifact.precision}), {artifact.verified[0].where}",
        ("budget", "max abs", "cosine", "PSNR dB", "tolerance", ""),
        [(key(row.budget), *_figures(row)) for row in artifact.verified],
    )


def _figures(row: Verification) -> tuple[str, ...]:
    figures = (f"{row.max_abs:.1e}", f"{row.cosine:.7f}", f"{row.psnr_db:.1f}") if row.finite else ("not finite", "-", "-")
    return (*figures, f"{row.tolerance:.0e}", "ok" if row.passed else "FAILS")


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


def profiles(rows: Iterable[Profile]) -> None:
    """TensorRT's profiles: the sizes that each takes, and the ones it is tuned for."""
    for i, profile in enumerate(rows):
        sizes = (f"{letter} {size.min}-{size.max} (best {size.opt})" for letter, size in profile.dimensions.items())
        line(f"  profile {i}: {', '.join(sizes)}")


def costs(rows: Iterable[Cost]) -> None:
    """FLOPs and bytes by budget, each next to its share of the largest."""
    rows = list(rows)
    full = max(row.flops for row in rows)
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
    costs(_thin(manifest.cost))
    if manifest.quality:
        rows = [(key(row.budget), f"{row.accuracy:.1%}", f"{row.frechet_distance:.2f}") for row in manifest.quality]
        table("quality, from the model card", ("budget", "accuracy", "Frechet distance"), rows)


def _thin(rows: tuple[Cost, ...], most: int = 9) -> list[Cost]:
    stride = -(-len(rows) // most)
    return [row for i, row in enumerate(rows) if i % stride == 0 or i == len(rows) - 1]


def device(found: Device, peaks: Mapping[str, Peak], runtimes: Mapping[str, str], todo: Iterable[str], calibrations: str) -> None:
    """What was found on this machine, and what is missing."""
    cpu, memory = found.cpu, found.memory
    caches = ", ".join(f"{name} {size / 2**10:.0f} KiB" for name, size in cpu.caches.items())
    clock = f" at {cpu.mhz:.0f} MHz" if cpu.mhz else ""
    line(f"{found.system} {found.machine}{f', {found.board}' if found.board else ''}")
    line(f"processor: {cpu.model}, {cpu.cores} cores ({cpu.usable:g} usable){clock}, {cpu.vector or 'vector unit unknown'}")
    if caches:
        line(f"caches of a core: {caches}")
    if memory.total is not None:
        whose = " (the container's limit)" if memory.limit is not None else ""
        free = f", {memory.available / 1e9:.1f} GB free" if memory.available is not None else ""
        line(f"memory: {memory.total / 1e9:.1f} GB{whose}{free}")
    for gpu in found.gpus:
        own = f", {gpu.memory_total / 1e9:.1f} GB" if gpu.memory_total else ", shares the memory" if gpu.integrated else ""
        free = f" ({gpu.memory_free / 1e9:.1f} GB free)" if gpu.memory_free else ""
        capability = f", compute capability {gpu.compute_capability}" if gpu.compute_capability else ""
        line(f"GPU: {gpu.name}{own}{free}{capability}{f', driver {gpu.driver}' if gpu.driver else ''}")
    if found.power_mode:
        line(f"power mode: {found.power_mode}")
    for name, peak in peaks.items():
        rates = ", ".join(f"{precision} {rate / 1e12:.3g}" for precision, rate in peak.flops.items())
        line(f"peak of the {name}: {rates} TFLOP/s, {peak.bandwidth / 1e9:.0f} GB/s ({peak.origin})")
    line(f"runs bundles with: {', '.join(f'{name} {version}' for name, version in runtimes.items()) or 'nothing'}")
    line(f"calibrations: {calibrations}")
    for each in (*found.notes, *todo):
        note(each)


def devices(entries: Iterable[Entry], here: str | None, forecasts: Mapping[str, Mapping[str, Any]]) -> None:
    """The catalogue, this machine marked, and what a bundle's step would take at best on each."""
    ends = list(next(iter(forecasts.values()))["seconds"]) if forecasts else []
    rows = []
    for entry in entries:
        told = forecasts.get(entry.id)
        times = [f"{1e3 * told['seconds'][end]:.3f}" for end in ends] if told else []
        figures = ((entry.memory, "g"), (entry.bandwidth, "g"), (entry.fp16 or entry.fp32, "g"), (entry.fp8, "g"), (entry.int8, "g"))
        marked = f"{entry.id} <- this machine" if entry.id == here else entry.id
        cells = [f"{figure.value:{form}}" if figure else "-" for figure, form in figures]
        rows.append((marked, *cells, *times, *((told["knee"], f"{told['tokens']:.0f}") if told else ())))
    extra = [*(f"ms at {end}" for end in ends), "knee", "K*"] if forecasts else []
    table("devices", ("id", "memory GB", "GB/s", "fp16 TFLOP/s", "fp8", "int8 TOPS", *extra), rows)
    if forecasts:
        line("ms a step of one sample in fp16 by peak rates alone; up to the knee a larger budget takes no longer.")
        line("K*: tokens below which a block's weights take longer to read than its arithmetic takes, in any model.")
    if here is None:
        line("this machine is not listed; elastic-export doctor estimates its peaks")
