"""`elastic-export onnx`: a model to a bundle with an ONNX artifact."""

from typing import Annotated

import typer

from elastic_export.cli import options
from elastic_runtime.contract.axis import Span


def onnx(
    output: options.Output,
    model: options.ModelName = "elit-mnist",
    latents: options.Latents = None,
    tokens: options.Tokens = None,
    loops: options.Loops = None,
    batch: options.Batch = Span(1, 4),  # noqa: B008  frozen
    opset: Annotated[int, typer.Option(help="23 keeps attention in one node; 20 spells it out, for TensorRT.")] = 23,
    dtype: Annotated[str, typer.Option(help="fp32, or fp16 or bf16 (for TensorRT) with float32 reductions, inputs and outputs.")] = "fp32",
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
    """Export a model to ONNX with its compute axis open, prove it against torch, and write a bundle.

    [bold]Examples[/bold]

      elastic-export onnx -o digits --latents 32-256
      elastic-export onnx elt-4x8-256 --random-weights -o looped --loops 1-8
      elastic-export onnx elit-sit --checkpoint elit.pt --config elit.json -o out
      elastic-export onnx elit-sit-xl-256 --checkpoint xl.pt --vae sd-vae -o xl --dtype fp16
      elastic-export onnx path/to/FLUX.1-dev -o flux --size 512-1024 --components transformer,vae
    """
    from elastic_export.cli.making import make
    from elastic_targets import target

    make(
        "onnx", target("onnx").options(opset=opset, precision=dtype), model, output,
        {"latents": latents, "tokens": tokens, "loops": loops}, batch, dtype,
        checkpoint=checkpoint, config=config, vae=vae, components=components, size=size,
        head_blocks=head_blocks, random_weights=random_weights,
        overwrite=overwrite, dry_run=dry_run, json=json, quiet=quiet, verbose=verbose,
    )  # fmt: skip
