"""`elastic-export inspect`: what a bundle says about itself."""

from typing import Annotated

import typer

from elastic_export.cli import options, show


def inspect(
    bundle: options.BundleFolder,
    hashes: Annotated[bool, typer.Option("--hashes", help="Also compare every file's SHA-256.")] = False,
    json: options.Json = False,
) -> None:
    """Show a bundle: its model, axes, graphs, artifacts, what was proven, and what each budget costs.

    [bold]Examples[/bold]

      elastic-export inspect digits
      elastic-export inspect digits --hashes --json
    """
    from elastic_runtime.contract.bundle import Bundle

    opened = Bundle.open(bundle, hashes=hashes)
    if json:
        show.as_json("inspect", {"bundle": str(bundle), "manifest": opened.manifest})
    else:
        show.bundle(opened)
