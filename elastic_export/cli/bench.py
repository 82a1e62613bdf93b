"""`elastic-export bench`: runtimes and budgets side by side, time against quality; or a server under load."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from elastic_export.cli import options, show


def bench(
    bundles: Annotated[list[Path] | None, typer.Argument(metavar="BUNDLE...", help="Folders of bundles.", show_default=False)] = None,
    runtimes: Annotated[
        str | None,
        typer.Option(
            metavar="NAME[,NAME...]",
            help="onnxruntime, onnxruntime-cuda, openvino, openvino-bf16, trt, coreml, torch, torch-compile, torch-cuda, "
            "torch-compile-cuda [dim](default: these)[/dim]; and peers that take minutes to compile: torch-bf16, torch-int8, "
            "torch-openvino, torch-openvino-bf16.",
            show_default=False,
        ),
    ] = None,
    budgets: Annotated[
        str | None,
        typer.Option(metavar="N[,N...]", help="Budgets on the bundle's axis [dim](default: its doublings)[/dim].", show_default=False),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Samples of one step.")] = 1,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps of a picture.")] = 20,
    guidance: Annotated[float, typer.Option(help="Guidance scale of pictures; 1 is off.")] = 2.0,
    duration: Annotated[
        float | None,
        typer.Option(
            help="Seconds for each runtime and budget, or with --serve for each way and load [dim](default: 3, or 10)[/dim].",
            show_default=False,
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of each runtime [dim](default: all)[/dim].", show_default=False)
    ] = None,
    quality: Annotated[
        bool, typer.Option("--quality", help="Also draw with fewer steps and cheaper guidance, and say what is best.")
    ] = False,
    single_stream: Annotated[
        bool, typer.Option("--single-stream", help="Also pictures one after another, MLPerf-style: p90 of up to 1,024.")
    ] = False,
    serve: Annotated[
        bool, typer.Option("--serve", help="Load a server over the bundle, and say who is on time, ours beside fixed budgets.")
    ] = False,
    loads: Annotated[
        str | None,
        typer.Option(
            metavar="N[,N...]",
            help="With --serve: multiples of what the best budget sustains [dim](default: 0.5,1,2,4)[/dim].",
            show_default=False,
        ),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH", help="The original's weights, for torch: .pt, .safetensors, or a diffusers folder.", show_default=False
        ),
    ] = None,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write everything, each sample too.", show_default=False)] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page with plots and pictures.", show_default=False)] = None,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(metavar="OLD NEW", help="Measure nothing; say what changed between two --json files.", show_default=False),
    ] = None,
    tolerance: Annotated[float, typer.Option(help="With --compare: slower by more than this share is a regression.")] = 0.05,
    overwrite: options.Overwrite = False,
    quiet: options.Quiet = False,
) -> None:
    """Time bundles in every runtime at several budgets, and what each budget is worth.

    Runtimes take turns, each in its own process. Nothing is told of one whose outputs were not first held against the original's.
    Exit code 1: a runtime was wrong, or with --compare something became slower.

    [bold]Examples[/bold]

      elastic-export bench digits
      elastic-export bench digits --runtimes onnxruntime,openvino --budgets 32,128 --quality --html digits.html
      elastic-export bench digits --serve --html load.html
      elastic-export bench digits --json new.json
      elastic-export bench --compare old.json new.json --tolerance 0.1
    """
    from elastic_export.cli.show import benchmark as shown
    from elastic_runtime.device import usable_cores
    from elastic_runtime.errors import RegressionError, UsageError, VerificationError

    if compare:
        others: dict[str, object] = {
            "the bundles": bundles, "--json": json, "--html": html, "--serve": serve, "--loads": loads, "--quality": quality,
            "--runtimes": runtimes, "--budgets": budgets, "--single-stream": single_stream, "--checkpoint": checkpoint,
            "--duration": duration,
            "--threads": threads, "--batch": batch > 1, "--overwrite": overwrite,
        }  # fmt: skip
        if idle := [name for name, value in others.items() if value]:
            raise UsageError(f"--compare reads two files, and measures and writes nothing: leave {idle[0]} out")
        from elastic_bench.compare import changes, other_machine, other_models
        from elastic_bench.files import read

        old, new = (read(path) for path in compare)
        if different := other_machine(old, new):
            show.note(f"these are two machines: {different}")
        for difference in other_models(old, new):
            show.note(f"these are two models: {difference}")
        differences = changes(old, new, tolerance)
        shown.changes(differences, tolerance)
        if worse := [change for change in differences if change.verdict in ("slower", "lost")]:
            raise RegressionError(f"{len(worse)} of {len(differences)} rows are worse, {' '.join(worse[0].place)} the first")
        return
    if not bundles:
        raise UsageError("give a bundle's folder; make one with: elastic-export onnx -o digits")

    if serve:
        if checkpoint or quality or single_stream or budgets or batch > 1 or threads:
            raise UsageError(
                "--serve goes with --runtimes (one of them), --loads, --steps, --guidance, --duration, --json and --html: "
                "the server chooses budgets and batches"
            )
        _load(bundles, runtimes, loads, steps, guidance, duration, json, html, overwrite, quiet)
        return
    if loads:
        raise UsageError("--loads are those of a server: give --serve, too")

    from elastic_bench.records import Settings
    from elastic_export.bench.run import DEFAULT, nothing
    from elastic_export.bench.run import bench as run

    _writable(json, html, overwrite)
    settings = Settings(
        batch=batch, steps=steps, duration=3.0 if duration is None else duration, guidance=guidance, threads=threads or usable_cores(),
        quality=quality, single_stream=single_stream,
    )  # fmt: skip
    names = [name.strip() for name in runtimes.split(",")] if runtimes else DEFAULT
    values = options.integers(budgets) if budgets else None
    with show.stages(quiet) as on_stage:
        report, albums = run(bundles, names, values, settings, options.command_line(), checkpoint, on_stage)
    shown.benchmark(report)

    def whole() -> str:
        from elastic_bench.page import page

        return page(report, albums)

    _written(json, html, report, whole)
    every = [runtime for bundle in report.bundles for runtime in bundle.runtimes]
    if wrong := [runtime for runtime in every if runtime.failure]:
        raise VerificationError(f"{wrong[0].runtime} has no figures: {wrong[0].failure}")
    if not any(runtime.rows for runtime in every):
        raise nothing(
            f"{runtime.runtime}: {runtime.missing or '; '.join(f'{what}: {why}' for what, why in runtime.skipped.items())}"
            for runtime in every
        )


def _load(
    bundles: list[Path],
    runtimes: str | None,
    loads: str | None,
    steps: int,
    guidance: float,
    duration: float | None,
    json: Path | None,
    html: Path | None,
    overwrite: bool,
    quiet: bool,
) -> None:
    """`bench --serve`: who is on time when more is asked for than the best budget can draw."""
    from elastic_bench.load import LOADS, LoadSettings
    from elastic_bench.openloop import measure
    from elastic_bench.page import load_page
    from elastic_bench.runtimes import ways
    from elastic_export.cli.show import benchmark as shown
    from elastic_runtime.errors import UsageError

    if len(bundles) > 1:
        raise UsageError(f"--serve loads a server over one bundle, got {len(bundles)}: give them one after the other")
    backends = {next(iter(backend.ways)): backend.name for backend, _ in ways().values()}
    if runtimes and runtimes not in backends:
        raise UsageError(f"--serve runs in one of {', '.join(backends)}, got {runtimes!r}")
    _writable(json, html, overwrite)
    settings = LoadSettings(
        duration=10.0 if duration is None else duration,
        loads=tuple(options.numbers(loads)) if loads else LOADS,
        steps=steps,
        guidance=guidance,
    )
    backend = backends[runtimes] if runtimes else None
    with show.stages(quiet) as on_stage:
        report = measure(bundles[0], settings, options.command_line(), backend, on_stage)
    shown.load(report)
    _written(json, html, report, lambda: load_page(report))


def _writable(json: Path | None, html: Path | None, overwrite: bool) -> None:
    """Refuse files that could not be written, before anything is measured."""
    from elastic_runtime.errors import UsageError
    from elastic_runtime.files.atomic import refuse_clobber

    if json and html and json.resolve() == html.resolve():
        raise UsageError(f"--json and --html are both {json}: give two names")
    if html:
        from elastic_bench.page import require

        require()
    for path in (json, html):
        if path:
            refuse_clobber(path, overwrite, "name")


def _written(json: Path | None, html: Path | None, report: Any, page: Callable[[], str]) -> None:
    """Write a report's files, those that were asked for; it was shown before, and is not lost where a disk is full."""
    from elastic_bench.records import encode
    from elastic_runtime.files.atomic import save

    if json:
        save(json, encode(report))
    if html:
        save(html, page().encode())
