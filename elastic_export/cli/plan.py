"""`elastic-export plan`: what a model would take on a device, before it is exported."""

from pathlib import Path
from typing import Annotated

import typer

from elastic_export.cli import options, show


def plan(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|CONFIG",
            help="As for [bold]elastic-export onnx[/bold]: of a diffusers folder the config files are enough, and of a name on the hub no "
            "more is downloaded; or a config.json.",
            show_default=False,
        ),
    ],
    device: Annotated[
        str, typer.Option(metavar="ID", help="A device of [bold]elastic-export devices[/bold]; here: this machine.")
    ] = "here",
    precision: Annotated[str | None, options.precision("Precisions, [bold]fp16,int4w[/bold] [dim](default: all)[/dim].", False)] = None,
    size: Annotated[
        str | None,
        typer.Option(
            parser=options.size,
            metavar="SIDE|HxW",
            help="Sides of the picture in pixels [dim](default: the usual)[/dim].",
            show_default=False,
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Of plan full, or of a budget [dim](default: 20)[/dim].", show_default=False)
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(min=0.0, help="Guidance scale; 1 is off [dim](default: the model's usual)[/dim].", show_default=False),
    ] = None,
    max_sequence_length: Annotated[
        int | None,
        typer.Option(metavar="N", help="Of a diffusers folder: tokens of a prompt [dim](default: its own)[/dim].", show_default=False),
    ] = None,
    config: Annotated[Path | None, typer.Option(metavar="FILE", help="Sizes of a family of the zoo, as JSON.", show_default=False)] = None,
    json: options.Json = False,
) -> None:
    """Forecast memory by precision and seconds a picture by plan or budget on a device, before anything is exported.

    No weights are read. FLOPs are exact; time is what the device's peak rates give at the share of them that a well-tuned runtime reaches,
    and memory holds the weights and what an allocator takes for the values that are alive at once. Measured times replace both once a
    bundle has drawn.

    [bold]Examples[/bold]

      elastic-export plan path/to/FLUX.2-klein-4B --device jetson-agx-orin-64 --steps 4
      elastic-export plan Qwen/Qwen-Image --precision fp16,int4w --size 1024x768
      elastic-export plan elit-sit-xl-256 --device apple-m2 --json
    """
    from elastic_export import api
    from elastic_export.cli.show import forecasts

    forecast = api.plan(
        model, device=device, precisions=precision, size=size, steps=steps, guidance=guidance, max_sequence_length=max_sequence_length,
        config=config,
    )  # fmt: skip
    if json:
        show.as_json("plan", {"forecast": forecast})
    else:
        forecasts.forecast(forecast)
