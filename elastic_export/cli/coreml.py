"""`elastic-export coreml`: a model to a bundle with a Core ML artifact."""

from typing import Annotated

import typer

from elastic_export.cli import options
from elastic_runtime.contract.axis import Span


def coreml(
    output: options.Output,
    model: options.ModelName = "elit-mnist",
    latents: options.Latents = None,
    tokens: options.Tokens = None,
    loops: options.Loops = None,
    budgets: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="Budgets to compile, [bold]32,64,128,256[/bold]; counts for a looped model, tokens for a diffusers folder "
            "[dim](default: both ends and the doublings between, or the stages of RALU)[/dim].",
            show_default=False,
        ),
    ] = None,
    shapes: Annotated[
        str, typer.Option(help="functions (one a budget, sharing weights), enumerated, or range (one for all).")
    ] = "functions",
    target: Annotated[str, typer.Option(help="The oldest system that opens it: iOS15 to iOS26, macOS12 to macOS26.")] = "iOS18",
    batch: options.Batch = Span(1, 4),  # noqa: B008  frozen
    dtype: Annotated[str, typer.Option(help="fp16 with float32 positions, timesteps, inputs and outputs, or fp32.")] = "fp16",
    reductions: Annotated[str, typer.Option(help="Norms of an fp16 program: fp32, or fp16 to stay on the Neural Engine.")] = "fp32",
    compress: Annotated[
        str | None, typer.Option(help="How weights are stored: palette8, palette6, palette4 or int8.", show_default=False)
    ] = None,
    checkpoint: options.Checkpoint = None,
    config: options.Config = None,
    vae: options.Vae = None,
    components: options.Components = None,
    size: options.Size = None,
    head_blocks: options.HeadBlocks = None,
    random_weights: options.RandomWeights = False,
    overwrite: options.Overwrite = False,
    dry_run: options.DryRun = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Export a model to a Core ML package, prove each of its budgets, and write a bundle or add to one.

    It needs no Mac: the saved package is computed here, operation by operation. One run takes the smallest batch of --batch.

    [bold]Examples[/bold]

      elastic-export coreml -o digits --latents 32-256
      elastic-export coreml -o digits --budgets 64,128 --dtype fp16 --compress palette8
      elastic-export coreml elt-s-3x4-256 --checkpoint elt.pt -o looped --loops 1-5 --shapes range
      elastic-export coreml elit-sit --checkpoint elit.pt --config elit.json -o out --shapes range --target macOS15
    """
    from elastic_export.cli.making import make
    from elastic_targets import target as enter

    room = enter("coreml")
    points = tuple(options.integers(budgets)) if budgets else ()
    make(
        "coreml",
        room.options(shapes, target, dtype, reductions, compress, points),
        model, output, {"latents": latents, "tokens": tokens, "loops": loops}, batch, dtype,
        checkpoint=checkpoint, config=config, vae=vae, components=components, size=size,
        head_blocks=head_blocks, random_weights=random_weights,
        overwrite=overwrite, dry_run=dry_run, json=json, quiet=quiet, verbose=verbose,
    )  # fmt: skip
