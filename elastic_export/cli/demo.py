"""`elastic-export demo`: the whole path on the packaged sample."""

from pathlib import Path
from typing import Annotated

import typer

from elastic_export.cli import options, show
from elastic_runtime.axis import Span

BUDGETS = (16, 32, 64, 128, 256)


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Where the bundle and the picture go.")] = Path("demo"),
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 20,
    guidance: Annotated[float, typer.Option(help="Guidance scale.")] = 2.0,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same picture.")] = 0,
    quiet: options.Quiet = False,
) -> None:
    """Export the packaged digits, prove them, draw every digit at five budgets, and time each budget.

    [bold]Example[/bold]

      elastic-export demo -o demo
    """
    import numpy as np

    from elastic_export.cli.making import make
    from elastic_export.pictures import grid, save
    from elastic_runtime.budget import Budget
    from elastic_runtime.bundle import Bundle
    from elastic_runtime.pipeline import ElasticPipeline
    from elastic_targets import load

    folder, picture = output / "elit-mnist", output / "digits.png"
    make(
        "onnx", load("onnx").OnnxOptions(), "elit-mnist", folder, {"latents": Span(min(BUDGETS), max(BUDGETS))}, Span(1, 4), "fp32",
        overwrite=True, quiet=quiet,
    )  # fmt: skip
    columns, rows = [], []
    costs = {cost.budget["latents"]: cost for cost in Bundle.open(folder).manifest.cost}
    with ElasticPipeline.from_pretrained(folder) as pipe, show.bar(quiet, "drawing", 10 * len(BUDGETS)) as advance:
        for latents in BUDGETS:
            images, seconds, step_times = [], [], []
            for digit in range(10):
                result = pipe(
                    [digit],
                    num_inference_steps=steps,
                    guidance_scale=guidance,
                    budget=Budget(latents=latents),
                    generator=np.random.default_rng([seed, digit]),  # the same noise at every budget
                )
                images.append(result.images[0])
                seconds.append(sum(step.seconds for step in result.steps))
                step_times += [step.seconds for step in result.steps]
                advance()
            columns.append(images)
            gflops, share = costs[latents].flops / 1e9, costs[latents].flops / costs[256].flops
            times = f"{1e3 * np.median(step_times):.1f}", f"{1e3 * np.median(seconds):.0f}"
            rows.append((latents, *times, f"{gflops:.3f}", f"{share:.0%}"))
        where = pipe.where
    digits, budgets = [str(digit) for digit in range(10)], [str(latents) for latents in BUDGETS]
    save(grid(list(zip(*columns, strict=True)), digits, budgets), picture)
    show.table(
        f"{steps} Euler steps, guidance {guidance:g} (two branches in one run), medians over ten pictures, {where}",
        ("latents", "ms a step", "ms a picture", "GFLOPs a branch", "share"),
        rows,
    )
    show.line(f"the bundle: {folder}\nthe picture: {picture} (rows: digits, columns: latents)")
