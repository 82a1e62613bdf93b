"""`elastic-export demo`: the whole path on the packaged samples."""

from pathlib import Path
from typing import Annotated, Any

import typer

from elastic_export.cli import options, show
from elastic_runtime.axis import Span

# Packaged sample -> the letter that heads its columns, its axis, and the budgets to draw at.
SAMPLES = {
    "elit-mnist": ("K", "latents", (16, 32, 64, 128, 256)),
    "elt-mnist": ("L", "loops", (1, 2, 4, 6, 8)),
    "dcdit-mnist": ("T", "tokens", (16, 32, 48, 64, 256)),
}
DIGITS = range(10)


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Where the bundle and the picture go.")] = Path("demo"),
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 20,
    guidance: Annotated[float, typer.Option(help="Guidance scale.")] = 2.0,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same picture.")] = 0,
    quiet: options.Quiet = False,
) -> None:
    """Export the packaged digits, prove them, draw every digit at five budgets of each model, and time each budget.

    [bold]Example[/bold]

      elastic-export demo -o demo
    """
    from elastic_export.pictures import grid, save

    picture = output / "digits.png"
    columns, names, rows, wheres = [], [], [], []
    for sample, (letter, axis, values) in SAMPLES.items():
        drawn, figures, where = _drawn(output / sample, sample, axis, values, steps, guidance, seed, quiet)
        columns += drawn
        names += [f"{letter} {value}" for value in values]
        rows += figures
        wheres.append(where)
    save(grid(list(zip(*columns, strict=True)), [str(digit) for digit in DIGITS], names), picture)
    show.table(
        f"{steps} steps, guidance {guidance:g} (two branches), medians over ten pictures, {wheres[0]}",
        ("budget", "ms a step", "ms a picture", "GFLOPs a branch", "share"),
        rows,
    )
    show.line(f"the bundles: {', '.join(str(output / sample) for sample in SAMPLES)}")
    show.line(
        f"the picture: {picture} (rows: digits; columns: {', then '.join(f'{axis} {letter}' for letter, axis, _ in SAMPLES.values())})"
    )


def _drawn(
    folder: Path, sample: str, axis: str, values: tuple[int, ...], steps: int, guidance: float, seed: int, quiet: bool
) -> tuple[list[list[Any]], list[tuple[str, ...]], str]:
    """Export one sample and draw with it: a column of pictures and a row of figures for each budget, and what ran it."""
    import numpy as np

    from elastic_export.cli.making import make
    from elastic_runtime.budget import Budget
    from elastic_runtime.bundle import Bundle
    from elastic_runtime.pipeline import ElasticPipeline
    from elastic_targets import load

    make(
        "onnx", load("onnx").OnnxOptions(), sample, folder, {axis: Span(min(values), max(values))}, Span(1, 4), "fp32",
        overwrite=True, quiet=quiet,
    )  # fmt: skip
    columns: list[list[Any]] = []
    rows: list[tuple[str, ...]] = []
    costs = {cost.budget[axis]: cost for cost in Bundle.open(folder).manifest.cost}
    with ElasticPipeline.from_pretrained(folder) as pipe, show.bar(quiet, f"drawing {sample}", len(DIGITS) * len(values)) as advance:
        for value in values:
            images, seconds, step_times = [], [], []
            for digit in DIGITS:
                result = pipe(
                    [digit],
                    num_inference_steps=steps,
                    guidance_scale=guidance,
                    budget=Budget(**{axis: value}),
                    generator=np.random.default_rng([seed, digit]),  # the same noise at every budget
                )
                images.append(result.images[0])
                seconds.append(sum(step.seconds for step in result.steps))
                step_times += [step.seconds for step in result.steps]
                advance()
            columns.append(images)
            gflops, share = costs[value].flops / 1e9, costs[value].flops / costs[max(values)].flops
            times = f"{1e3 * np.median(step_times):.1f}", f"{1e3 * np.median(seconds):.0f}"
            rows.append((f"{axis} {value}", *times, f"{gflops:.3f}", f"{share:.0%}"))
        return columns, rows, pipe.where
