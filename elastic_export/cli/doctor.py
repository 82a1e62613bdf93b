"""`elastic-export doctor`: what is here, what is missing, and what to do about it."""

from pathlib import Path
from typing import Annotated

import typer

from elastic_export.cli import options, show


def doctor(
    bundle: Annotated[Path | None, typer.Argument(metavar="[BUNDLE]", help="With --report: what is to be run here.")] = None,
    report: Annotated[Path | None, typer.Option(metavar="FILE", help="Write what is here as JSON, to send to somebody.")] = None,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
) -> None:
    """Show this machine: processor, memory, GPUs, power mode, installed runtimes; and what installing something more would bring.

    A report holds the same and, with a bundle, every artifact of it in every way that this machine has to run it: how far it is from the
    original at each recorded budget, and how long a run takes. It names no user, no host and no path. Exit code 3 where nothing here can
    run a bundle; 1 where something did and missed its tolerance.

    [bold]Examples[/bold]

      elastic-export doctor
      elastic-export doctor digits --report mac.json
    """
    from elastic_bench.trials import Trial, trials
    from elastic_export.cli.show import machine
    from elastic_runtime.choosing.calibration import folder
    from elastic_runtime.contract.bundle import Bundle
    from elastic_runtime.device import advice, matched, peak, probe, runtimes
    from elastic_runtime.errors import UsageError
    from elastic_runtime.files.atomic import refuse_clobber, save
    from elastic_runtime.sessions.opening import limits

    if bundle and not report:
        raise UsageError("doctor runs a bundle for a report: add --report FILE.json")
    if report:
        refuse_clobber(report, overwrite, "name")
    opened = Bundle.open(bundle) if bundle else None
    device = probe()
    entry, usable = matched(device), runtimes(device)
    todo = [*limits(usable), *advice(device)]
    peaks = {"cpu": peak(device, "cpu")} | ({"gpu": peak(device, "gpu")} if device.gpus else {})
    facts = {"device": device, "listed": entry.id if entry else None, "peak": peaks, "runtimes": usable, "advice": todo}
    if not json:
        machine.device(device, peaks, usable, todo, str(folder()))
    rows: list[Trial] = list(trials(opened)) if opened else []
    if report:
        save(report, show.document("doctor-report", facts | {"trials": rows}).encode())
    if json:
        show.as_json("doctor", facts | {"calibrations": str(folder())} | ({"trials": rows} if opened else {}))
    elif opened:
        machine.trials(rows)
    if not usable:
        raise typer.Exit(3)
    if any(row.passed is False for row in rows):
        raise typer.Exit(1)
