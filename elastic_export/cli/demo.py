"""`elastic-export demo`: the whole path on the packaged samples."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from elastic_export.cli import options, show
from elastic_runtime.contract.axis import Span

# Packaged sample -> the letter that heads its columns, its axis, and the budgets to draw at.
SAMPLES = {
    "elit-mnist": ("K", "latents", (16, 32, 64, 128, 256)),
    "elt-mnist": ("L", "loops", (1, 2, 4, 6, 8)),
    "dcdit-mnist": ("T", "tokens", (16, 32, 48, 64, 256)),
}
# The sample that is drawn along plans; at full resolution with all steps and with half of them; and mixed.
PLANNED, PLANS = "ralu-digits", ("4x", "7x")
DIGITS = range(10)


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Where the bundle and the picture go.")] = Path("demo"),
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 20,
    guidance: Annotated[float, typer.Option(help="Guidance scale.")] = 2.0,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same picture.")] = 0,
    overwrite: options.Overwrite = False,
    quiet: options.Quiet = False,
) -> None:
    """Export the packaged digits, prove them, draw every digit at budgets and along plans, and time each.

    [bold]Example[/bold]

      elastic-export demo -o demo
    """
    from elastic_export.pictures import grid, refuse_clobber, save

    picture = output / "digits.png"
    refuse_clobber(picture, overwrite)
    images, names, rows, wheres = [], [], [], []
    for sample, opened in {**dict.fromkeys(SAMPLES, _at_budgets), PLANNED: _along_plans}.items():
        with opened(output / sample, sample, steps, guidance, seed, overwrite, quiet) as (columns, where):
            wheres.append(where)
            with show.bar(quiet, f"drawing {sample}", len(DIGITS) * len(columns)) as advance:
                for column in columns:
                    drawn, row = _drawn(column, advance)
                    images.append(drawn)
                    rows.append(row)
                    names.append(column.head)
    save(grid(list(zip(*images, strict=True)), [str(digit) for digit in DIGITS], names), picture)
    show.table(
        f"{steps} steps, guidance {guidance:g} (two branches), medians over ten pictures, {wheres[0]}",
        ("budget", "ms a step", "ms a picture", "GFLOPs a branch", "share"),
        rows,
    )
    show.line(f"the bundles: {', '.join(str(output / sample) for sample in (*SAMPLES, PLANNED))}")
    heads = ", then ".join([*(f"{axis} {letter}" for letter, axis, _ in SAMPLES.values()), "plans"])
    show.line(f"the picture: {picture} (rows: digits; columns: {heads})")


@dataclass(frozen=True)
class Column:
    """One budget or plan of a sample: how a digit is drawn with it, GFLOPs of a step (a plan's mean), and the picture's share of all."""

    name: str
    head: str
    draw: Callable[[int], Any]
    gflops: float
    share: float


@contextmanager
def _at_budgets(
    folder: Path, sample: str, steps: int, guidance: float, seed: int, overwrite: bool, quiet: bool
) -> Iterator[tuple[list[Column], str]]:
    """Export a sample with an axis: a column for each of its budgets, and what runs it."""
    from elastic_runtime.contract.budget import Budget
    from elastic_runtime.pipeline import ElasticPipeline

    letter, axis, values = SAMPLES[sample]
    bundle = _exported(folder, sample, {axis: Span(min(values), max(values))}, overwrite, quiet)
    flops = {cost.budget[axis]: cost.flops for cost in bundle.manifest.cost}

    def at(pipe: ElasticPipeline, value: int) -> Callable[[int], Any]:
        return lambda digit: pipe(
            [digit],
            num_inference_steps=steps,
            guidance_scale=guidance,
            budget=Budget(**{axis: value}),
            generator=_noise(seed, digit),
        )

    with ElasticPipeline.from_pretrained(bundle) as pipe:
        yield (
            [
                Column(f"{axis} {value}", f"{letter} {value}", at(pipe, value), flops[value] / 1e9, flops[value] / flops[max(values)])
                for value in values
            ],
            pipe.where,
        )


@contextmanager
def _along_plans(
    folder: Path, sample: str, steps: int, guidance: float, seed: int, overwrite: bool, quiet: bool
) -> Iterator[tuple[list[Column], str]]:
    """Export a sample that is drawn along plans: a column for each, and what runs it."""
    from elastic_runtime.choosing.cost import plan_flops
    from elastic_runtime.contract.manifest import plan_label
    from elastic_runtime.drawing.plans import takes
    from elastic_runtime.pipeline import ElasticPipeline
    from elastic_runtime.ralu.plan import FULL, Plan

    bundle = _exported(folder, sample, {}, overwrite, quiet)

    def along(pipe: ElasticPipeline, plan: Plan) -> Callable[[int], Any]:
        return lambda digit: pipe(class_labels=[digit], plan=plan, guidance_scale=guidance, generator=_noise(seed, digit))

    with ElasticPipeline.from_pretrained(bundle) as pipe:
        whole, (size, full) = plan_label(FULL, (steps,)), takes(bundle, FULL)
        counts = {plan_label(FULL, (count,)): count for count in (steps, max(1, steps // 2))}
        plans = {name: full.spread(count) for name, count in counts.items()}
        plans |= {name: takes(bundle, name)[1] for name in PLANS}
        heads = {name: f"full {counts[name]}" if name in counts else name for name in plans}
        flops = {name: plan_flops(bundle.manifest, plan, size) for name, plan in plans.items()}
        yield (
            [
                Column(f"plan {name}", heads[name], along(pipe, plan), flops[name] / plan.total / 1e9, flops[name] / flops[whole])
                for name, plan in plans.items()
            ],
            pipe.where,
        )


def _exported(folder: Path, sample: str, spans: dict[str, Any], overwrite: bool, quiet: bool) -> Any:
    from elastic_export import api

    with show.stages(quiet) as on_stage:
        bundle = api.export(sample, output=folder, overwrite=overwrite, command=options.command_line(), on_stage=on_stage, **spans)
    show.bundle(bundle)
    return bundle


def _noise(seed: int, digit: int) -> Any:
    """The same noise for a digit whatever draws it."""
    import numpy as np

    return np.random.default_rng([seed, digit])


def _drawn(column: Column, advance: Callable[[], None]) -> tuple[list[Any], tuple[str, ...]]:
    """A picture of each digit, and the column's row of figures."""
    from statistics import median

    images, seconds, step_times = [], [], []
    for digit in DIGITS:
        result = column.draw(digit)
        images.append(result.images[0])
        seconds.append(sum(step.seconds for step in result.steps))
        step_times += [step.seconds for step in result.steps]
        advance()
    times = f"{1e3 * median(step_times):.1f}", f"{1e3 * median(seconds):.0f}"
    return images, (column.name, *times, f"{column.gflops:.3f}", f"{column.share:.0%}")
