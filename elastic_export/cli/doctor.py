"""`elastic-export doctor`: what is here, what is missing, and what to do about it."""

import typer

from elastic_export.cli import options, show


def doctor(json: options.Json = False) -> None:
    """Show this machine: processor, memory, GPUs, power mode, installed runtimes; and what installing something more would bring.

    Exit code 3 where nothing here can run a bundle.

    [bold]Examples[/bold]

      elastic-export doctor
      elastic-export doctor --json
    """
    from elastic_export.cli.show import machine
    from elastic_runtime.choosing.calibration import folder
    from elastic_runtime.device import advice, matched, peak, probe, runtimes
    from elastic_runtime.sessions.opening import limits

    device = probe()
    entry, usable = matched(device), runtimes(device)
    todo = [*limits(usable), *advice(device)]
    peaks = {"cpu": peak(device, "cpu")} | ({"gpu": peak(device, "gpu")} if device.gpus else {})
    if json:
        facts = {"device": device, "listed": entry.id if entry else None, "peak": peaks, "runtimes": usable, "advice": todo}
        show.as_json("doctor", facts | {"calibrations": str(folder())})
    else:
        machine.device(device, peaks, usable, todo, str(folder()))
    if not usable:
        raise typer.Exit(3)
