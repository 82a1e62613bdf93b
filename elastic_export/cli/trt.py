"""`elastic-export trt`: TensorRT engines, added to a bundle or made together with one."""

from pathlib import Path
from typing import Annotated, Any

import typer

from elastic_export.cli import options
from elastic_runtime.contract.axis import Span

MODEL_HELP = "A bundle's folder, which needs no torch; or a model to export first, as for [bold]elastic-export onnx[/bold]."
BatchOrAll = Annotated[
    Span | None,
    typer.Option(
        parser=options.span, metavar="SPAN", help="Batch sizes of one run [dim](default: the bundle's, or 1-4)[/dim].", show_default=False
    ),
]


def trt(
    model: Annotated[str, typer.Argument(metavar="[BUNDLE|MODEL]", help=MODEL_HELP)] = "elit-mnist",
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="DIR", help="Where the bundle goes [dim](default: into BUNDLE, or ./MODEL)[/dim].", show_default=False
        ),
    ] = None,
    latents: options.Latents = None,
    tokens: options.Tokens = None,
    loops: options.Loops = None,
    batch: BatchOrAll = None,
    buckets: Annotated[
        str,
        typer.Option(metavar="LIST", help="One profile a bucket, [bold]32,64,128,256[/bold]; none: one range; auto: the span's halvings."),
    ] = "auto",
    sm: Annotated[
        str | None, typer.Option(metavar="LIST", help="GPU generations, [bold]86,89[/bold] [dim](default: all)[/dim].", show_default=False)
    ] = None,
    builder: Annotated[str, typer.Option(help="rtx builds ahead of time anywhere; tensorrt builds on the GPU; auto: what fits.")] = "auto",
    dtype: Annotated[
        str | None, typer.Option(help="fp32, fp16 or bf16 [dim](default: the bundle's, or fp32)[/dim].", show_default=False)
    ] = None,
    refit: Annotated[bool, typer.Option("--refit", help="Weights can be replaced later (the build needs a GPU).")] = False,
    strip: Annotated[bool, typer.Option("--strip", help="Leave the weights in the ONNX file (the build needs a GPU).")] = False,
    weight_streaming: Annotated[bool, typer.Option("--weight-streaming", help="Weights may stay in host memory.")] = False,
    version_compatible: Annotated[bool, typer.Option("--version-compatible", help="Opens in later TensorRT versions.")] = False,
    opset: Annotated[int, typer.Option(help="Of the ONNX file made from MODEL; TensorRT before 10.14 needs 20.")] = 23,
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
    """Build TensorRT engines with one profile a bucket, from a bundle's ONNX artifact, for GPUs that need not be here.

    [bold]Examples[/bold]

      elastic-export trt --latents 32-256
      elastic-export trt digits --sm 86,89 --buckets 64,128,256
      elastic-export trt elit-sit --checkpoint elit.pt --config elit.json -o out --dtype fp16
      elastic-export trt elt-s-3x4-256 --checkpoint elt.pt -o looped --opset 20
    """
    import logging

    from elastic_runtime.contract.bundle import MANIFEST, Bundle
    from elastic_runtime.errors import UsageError
    from elastic_targets import target
    from elastic_targets import trt as room

    logging.basicConfig(level=logging.INFO if verbose else logging.ERROR)
    sms = tuple(options.integers(sm)) if sm else ()
    room.choose(builder, sms)  # its absence should not wait for the model
    spans = {"latents": latents, "tokens": tokens, "loops": loops}
    chosen: dict[str, Any] = {
        "builder": builder, "sms": sms, "precision": dtype, "refit": refit, "strip": strip,
        "weight_streaming": weight_streaming, "version_compatible": version_compatible,
    }  # fmt: skip
    if (Path(model) / MANIFEST).is_file():
        if checkpoint or config or vae or components or size or random_weights or head_blocks is not None:
            raise UsageError(f"{model} is a bundle and has its weights: --checkpoint, --config, --vae and the like are for a MODEL")
        bundle = Bundle.open(model)
        chosen |= {"spans": {name: span for name, span in spans.items() if span}, "batch": batch}
        _finish(bundle, chosen, buckets, output, overwrite, dry_run, json, quiet)
        return
    from elastic_export.cli.making import make

    output = output or Path(Path(model).name)
    exported = make(
        "onnx", target("onnx").options(opset=opset, precision=dtype or "fp32"), model, output, spans, batch or Span(1, 4),
        dtype or "fp32", checkpoint=checkpoint, config=config, vae=vae, components=components, size=size,
        head_blocks=head_blocks, random_weights=random_weights,
        overwrite=overwrite, dry_run=dry_run, json=json, quiet=quiet, verbose=verbose, silent=not dry_run,
    )  # fmt: skip
    if exported:
        _finish(exported, chosen, buckets, None, overwrite, False, json, quiet)


def _finish(
    bundle: Any,
    chosen: dict[str, Any],
    buckets: str,
    output: Path | None,
    overwrite: bool,
    dry_run: bool,
    json: bool,
    quiet: bool,
) -> None:
    """Build into an open bundle and show it, or show what would be built."""
    from elastic_export.cli import show
    from elastic_export.exporting import export_bundle
    from elastic_targets import trt as room
    from elastic_targets.capture import BundleGraph

    wanted = room.TrtOptions(**chosen, buckets=room.read_buckets(buckets, bundle.manifest.axes))
    if not dry_run:
        with show.building(quiet) as on_progress:
            bundle = export_bundle(bundle, "trt", wanted, output, overwrite, on_progress)
        if json:
            show.as_json("trt", {"bundle": str(bundle.folder), "manifest": bundle.manifest})
        else:
            show.bundle(bundle)
        return
    plans = []
    for graph in bundle.manifest.graphs:
        plan = room.plan(BundleGraph(bundle, graph), wanted)
        network, seconds = room.estimate(plan)
        paths = [plan.path(sms) for sms in plan.engines]
        plans.append(
            {
                "graph": graph,
                "builder": str(plan.builder),
                "engines": paths,
                "profiles": plan.profiles,
                "network": network,
                "seconds": seconds,
            }
        )
        if not json:
            show.line(f"would build {', '.join(paths)} with {plan.builder} in about {max(seconds, 1):.0f} s ({network.layers} layers)")
            show.profiles(plan.profiles)
    if json:
        show.as_json("trt", {"dry_run": True, "bundle": str(bundle.folder), "plans": plans})
