"""`elastic-export onnx`: a model to a bundle with an ONNX artifact."""

from typing import Annotated

import typer

from elastic_export.cli import options
from elastic_export.cli.records import How, Source, Spans, opened
from elastic_export.values import BATCH


@opened
def onnx(
    output: options.Output,
    source: Source,
    spans: Spans,
    how: How,
    batch: options.Batch = BATCH,
    precision: Annotated[
        str,
        options.precision(
            "fp32, fp16, bf16, int8, int8w or int4w; for TensorRT fp8, int8qdq, int4qdq or nvfp4; or one a graph, "
            "[bold]denoiser=int4w,text=int8w,decoder=fp16[/bold]."
        ),
    ] = "fp32",
    conditions_apart: Annotated[
        bool,
        typer.Option(
            "--conditions-apart",
            help="What depends on time, class and pooled text alone in a file of its own, run once for all steps of a picture.",
            show_default=False,
        ),
    ] = False,
    rounding: Annotated[
        str,
        typer.Option(
            help="How int8w and int4w round a denoiser's weights: nearest, or gptq, after a few runs of the model: more exact, and slower."
        ),
    ] = "nearest",
    keep: Annotated[
        int,
        typer.Option(help="How many of a denoiser's matrices in int8, int8w or int4w keep their floats: those whose rounding costs most."),
    ] = 0,
    opset: Annotated[int, typer.Option(help="23 keeps attention in one node; 20 spells it out, for TensorRT.")] = 23,
) -> None:
    """Export a model to ONNX with its compute axis open, prove it against torch, and write a bundle.

    [bold]Examples[/bold]

      elastic-export onnx -o digits --latents 32-256
      elastic-export onnx elt-4x8-256 --random-weights -o looped --loops 1-8
      elastic-export onnx elit-sit --checkpoint elit.pt --config elit.json -o out
      elastic-export onnx elit-sit-xl-256 --checkpoint xl.pt --vae sd-vae -o xl --precision fp16
      elastic-export onnx path/to/FLUX.1-dev -o flux --size 512-1024 --components transformer,vae
      elastic-export onnx path/to/FLUX.1-dev -o drawn --adapter ink.safetensors:0.8 --adapter turbo.safetensors
    """
    from elastic_export.cli.making import make, shown

    asked = {"opset": opset, "precision": precision, "rounding": rounding, "keep": keep, "conditions_apart": conditions_apart}
    shown(make("onnx", asked, source, output, spans, batch, how), "onnx", how)
