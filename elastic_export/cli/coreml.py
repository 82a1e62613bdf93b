"""`elastic-export coreml`: a model to a bundle with a Core ML artifact."""

from typing import Annotated, Any

import typer

from elastic_export.cli import options
from elastic_export.cli.records import How, Source, Spans, opened
from elastic_export.values import BATCH

BUDGETS_HELP = (
    "Budgets to compile, values of the model's axis, [bold]32,64,128,256[/bold] [dim](default: both ends and the doublings between, "
    "or the stages of RALU)[/dim]."
)


@opened
def coreml(
    output: options.Output,
    source: Source,
    spans: Spans,
    how: How,
    budgets: Annotated[str | None, typer.Option(metavar="LIST", help=BUDGETS_HELP, show_default=False)] = None,
    shapes: Annotated[
        str, typer.Option(help="functions (one a budget, sharing weights), enumerated, or range (one for all).")
    ] = "functions",
    target: Annotated[str, typer.Option(help="The oldest system that opens it: iOS15 to iOS26, macOS12 to macOS26.")] = "iOS18",
    batch: options.Batch = BATCH,
    precision: Annotated[str, options.precision("fp16 with float32 positions, timesteps, inputs and outputs, or fp32.")] = "fp16",
    reductions: Annotated[str, typer.Option(help="Norms of an fp16 program: fp32, or fp16 to stay on the Neural Engine.")] = "fp32",
    compress: Annotated[
        str | None,
        typer.Option(
            help="How weights are stored: palette8, palette6, palette4, int8, int4 (blocks of 32), or w8a8: int8, and so are a denoiser's "
            "activations [dim](iOS17)[/dim].",
            show_default=False,
        ),
    ] = None,
    conditions_apart: Annotated[
        bool,
        typer.Option(
            "--conditions-apart",
            help="What depends on time, class and pooled text alone in a function of its own [dim](iOS18)[/dim], run once for all steps of "
            "a picture.",
            show_default=False,
        ),
    ] = False,
) -> None:
    """Export a model to a Core ML package, prove each of its budgets, and write a bundle or add to one.

    It needs no Mac: the saved package is computed here, operation by operation. One run takes the smallest batch of --batch.

    [bold]Examples[/bold]

      elastic-export coreml -o digits --latents 32-256
      elastic-export coreml -o digits --budgets 64,128 --precision fp16 --compress palette8
      elastic-export coreml elt-s-3x4-256 --checkpoint elt.pt -o looped --loops 1-5 --shapes range
      elastic-export coreml elit-sit --checkpoint elit.pt --config elit.json -o out --shapes range --target macOS15
    """
    from elastic_export.cli.making import make, shown

    given: dict[str, Any] = {"shapes": shapes, "target": target, "precision": precision, "reductions": reductions, "compression": compress}
    given |= {"budgets": tuple(options.integers(budgets)) if budgets else (), "conditions_apart": conditions_apart}
    shown(make("coreml", given, source, output, spans, batch, how), "coreml", how)
