"""`elastic-export verify`: prove a bundle on this machine."""

from typing import Annotated

import typer

from elastic_export.cli import options, show


def verify(
    bundle: options.BundleFolder,
    tolerance: Annotated[
        float | None,
        typer.Option(
            help="Error allowed, times the largest output (at least 1) [dim](default: by precision)[/dim].", min=0, show_default=False
        ),
    ] = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Check every file's hash, then run every artifact that this machine can against the original's recorded outputs.

    No torch is needed: the bundle carries what the original model answered at a few budgets. Exit code 1 names the budget that fails.

    [bold]Examples[/bold]

      elastic-export verify digits
      elastic-export verify digits --tolerance 1e-6 --json
    """
    from elastic_export import api
    from elastic_export.verifying import require
    from elastic_runtime.errors import MissingError

    with show.stages(quiet) as on_stage:
        results = api.verify(bundle, tolerance, on_stage)
    if json:
        rows = [
            {"graph": graph, "artifact": artifact.path, "verified": artifact.verified, "unverified": artifact.unverified}
            for graph, artifact in results
        ]
        show.as_json("verify", {"bundle": str(bundle), "results": rows})
    else:
        for graph, artifact in results:
            show.verifications(graph, artifact)
    for graph, artifact in results:
        require(graph, artifact)
    if not any(artifact.verified for _, artifact in results):
        reasons = " ".join(dict.fromkeys(str(artifact.unverified) for _, artifact in results))
        raise MissingError(f"nothing of {bundle} was proven. {reasons}")
