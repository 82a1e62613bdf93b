"""`elastic-export trt`: TensorRT engines, added to a bundle or made together with one."""

from pathlib import Path
from typing import Annotated, Any

import typer

from elastic_export.cli import options
from elastic_export.cli.records import BundleOrSource, How, Spans, opened
from elastic_runtime.contract.axis import Span


@opened
def trt(
    source: BundleOrSource,
    spans: Spans,
    how: How,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="DIR", help="Where the bundle goes [dim](default: into BUNDLE, or ./MODEL)[/dim].", show_default=False
        ),
    ] = None,
    batch: Annotated[
        Span | None,
        typer.Option(
            parser=options.span,
            metavar="SPAN",
            help="Batch sizes of one run [dim](default: the bundle's, or 1-4)[/dim].",
            show_default=False,
        ),
    ] = None,
    buckets: Annotated[
        str,
        typer.Option(metavar="LIST", help="One profile a bucket, [bold]32,64,128,256[/bold]; none: one range; auto: the span's halvings."),
    ] = "auto",
    sm: Annotated[
        str | None, typer.Option(metavar="LIST", help="GPU generations, [bold]86,89[/bold] [dim](default: all)[/dim].", show_default=False)
    ] = None,
    builder: Annotated[str, typer.Option(help="rtx builds ahead of time anywhere; tensorrt builds on the GPU; auto: what fits.")] = "auto",
    precision: Annotated[
        str | None,
        options.precision(
            "fp32, fp16, bf16, fp8, int8qdq, int4qdq or nvfp4 [dim](default: the bundle's most exact, or fp32)[/dim].", show_default=False
        ),
    ] = None,
    refit: Annotated[bool, typer.Option("--refit", help="Weights can be replaced later (the build needs a GPU).")] = False,
    strip: Annotated[bool, typer.Option("--strip", help="Leave the weights in the ONNX file (the build needs a GPU).")] = False,
    weight_streaming: Annotated[bool, typer.Option("--weight-streaming", help="Weights may stay in host memory.")] = False,
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="Opens in later TensorRT versions, with a runtime that it brings.")
    ] = False,
    conditions_apart: Annotated[
        bool, typer.Option("--conditions-apart", help="Two engines: what time, class and pooled text ask for alone is run once a picture.")
    ] = False,
    opset: Annotated[
        int | None,
        typer.Option(help="Of the ONNX file made from MODEL; TensorRT before 10.14 needs 20 [dim](default: 23)[/dim].", show_default=False),
    ] = None,
) -> None:
    """Build TensorRT engines with one profile a bucket, from a bundle's ONNX artifact, for GPUs that need not be here.

    [bold]Examples[/bold]

      elastic-export trt --latents 32-256
      elastic-export trt digits --sm 86,89 --buckets 64,128,256
      elastic-export trt elit-sit --checkpoint elit.pt --config elit.json -o out --precision fp16
      elastic-export trt elit-mnist -o digits --precision fp8 --sm 89,120
      elastic-export trt elt-s-3x4-256 --checkpoint elt.pt -o looped --opset 20
    """
    import logging

    import elastic_targets
    from elastic_export.cli.making import make, shown
    from elastic_export.exporting import require_model
    from elastic_export.preparing import bundle_at
    from elastic_export.values import BATCH
    from elastic_runtime import hub
    from elastic_targets.trt import TrtOptions, available

    logging.basicConfig(level=logging.INFO if how.verbose else logging.ERROR)
    sms = tuple(options.integers(sm)) if sm else ()
    flags = (refit, strip, weight_streaming, version_compatible, conditions_apart)
    engine_options = TrtOptions(builder, sms, precision, spans, batch, buckets, *flags)
    available(engine_options)  # what it refuses should not wait for the model
    bundle = bundle_at(source.model, source.weights())
    if bundle and (repository := hub.named(source.model)):
        output = output or Path(repository.name)  # and not into the hub's cache
    require_model(bundle, opset, how.verify)
    if bundle is None:
        onnx = {"precision": precision or "fp32", "conditions_apart": conditions_apart} | ({"opset": opset} if opset else {})
        folder, engines = output or Path(Path(source.model).name), (elastic_targets.target("trt"), engine_options)
        shown(make("onnx", onnx, source, folder, spans, batch or BATCH, how, engines), "trt", how)
    elif how.dry_run:
        _plan(bundle, engine_options, how)
    else:
        _build(bundle, engine_options, output, how)


def _build(bundle: Any, engine_options: Any, output: Path | None, how: How) -> None:
    from elastic_export.cli import show
    from elastic_export.cli.making import shown
    from elastic_export.exporting import export_bundle

    with show.building(how.quiet) as on_progress:
        bundle = export_bundle(bundle, "trt", engine_options, output, how.overwrite, on_progress)
    shown(bundle, "trt", how)


def _plan(bundle: Any, engine_options: Any, how: How) -> None:
    """Show what would be built."""
    from elastic_export.cli import show
    from elastic_targets.capture import BundleGraph
    from elastic_targets.trt import estimate, plan

    plans = []
    for graph in bundle.manifest.graphs:
        chosen = plan(BundleGraph(bundle, graph), engine_options)
        network, seconds = estimate(chosen)
        paths = [path for sms in chosen.engines for path in chosen.paths(sms)]
        plans.append(
            {
                "graph": graph,
                "builder": str(chosen.builder),
                "engines": paths,
                "profiles": chosen.profiles,
                "network": network,
                "seconds": seconds,
            }
        )
        if not how.json:
            show.line(f"would build {', '.join(paths)} with {chosen.builder} in about {max(seconds, 1):.0f} s ({network.layers} layers)")
            show.profiles(chosen.profiles)
    if how.json:
        show.as_json("trt", {"dry_run": True, "bundle": str(bundle.folder), "plans": plans})
