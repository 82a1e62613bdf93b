"""`elastic-export devices`: the catalogue, with this machine marked."""

from pathlib import Path
from typing import Annotated

import typer

from elastic_export.cli import options, show


def devices(
    bundle: Annotated[
        Path | None, typer.Argument(metavar="[BUNDLE]", help="Also predict a bundle's step on each device.", show_default=False)
    ] = None,
    json: options.Json = False,
) -> None:
    """List the devices whose peak figures are known; what is not listed is estimated from cores, clock and bus.

    With a bundle: what a step would take at best at its smallest and largest budget, by peak rates alone, in fp16. Below the knee a
    smaller budget saves no time, because reading the weights takes longer than the arithmetic.

    [bold]Examples[/bold]

      elastic-export devices
      elastic-export devices digits --json
    """
    from elastic_export.cli.show import machine
    from elastic_runtime.choosing.cost import forecast
    from elastic_runtime.contract.bundle import Bundle
    from elastic_runtime.device import catalogue, listed_peak, matched, probe

    entries, here = catalogue(), matched(probe())
    manifest = Bundle.open(bundle).manifest if bundle else None
    forecasts = {entry.id: forecast(manifest, listed_peak(entry)) for entry in entries} if manifest else {}
    if json:
        show.as_json("devices", {"devices": entries, "here": here.id if here else None, "forecasts": forecasts})
    else:
        machine.devices(entries, here.id if here else None, forecasts)
