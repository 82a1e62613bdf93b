"""`elastic-export web`: a bundle as a page that draws in the browser itself."""

from pathlib import Path
from typing import Annotated

import typer

from elastic_export.cli import options


def web(
    bundle: options.BundleFolder,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Where the site goes.", show_default=False)],
    precision: Annotated[
        str,
        options.precision(
            "Artifacts that may draw, [bold]fp32,int8[/bold]: the smallest file of them; [bold]auto[/bold]: of those whose pictures the "
            "card found as good."
        ),
    ] = "auto",
    runtime: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="npm's package onnxruntime-web, a folder or an archive [dim](default: from the cache, or once from npm's registry)[/dim].",
            show_default=False,
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the site that the output holds.")] = False,
    port: Annotated[
        int | None,
        typer.Option(min=0, max=65535, help="Show the site on this machine at this port; 0 is any that is free.", show_default=False),
    ] = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Write a static site that draws a bundle in the browser itself, with onnxruntime-web.

    The page has a slider for the budget, what each takes there and is worth, and a deadline that it keeps by choosing budgets from step to
    step. A seed draws what it draws in Python. Any web server can show the site, and nothing is asked of another.

    [bold]Examples[/bold]

      elastic-export web digits -o site --port 8000
      elastic-export web digits -o site --precision int8 --overwrite
      elastic-export web digits -o site --runtime node_modules/onnxruntime-web
    """
    from elastic_export.cli import show
    from elastic_export.values import read_words
    from elastic_runtime.contract.bundle import Bundle
    from elastic_web import server
    from elastic_web.site import write

    with show.stages(quiet or as_json) as on_stage:
        made = write(Bundle.open(bundle), output, tuple(read_words(precision) or ()), runtime, overwrite, on_stage)
    artifact = made.artifacts["denoiser"]
    if as_json:
        facts = {"site": str(made.folder), "precision": artifact.precision, "model": artifact.files[0], "bytes": made.bytes}
        show.as_json("web", facts | {"library": made.version})
    else:
        megabytes = artifact.files[0].bytes / 1e6
        show.line(f"wrote {made.folder}: {bundle} in {artifact.precision}, {megabytes:.1f} MB, with onnxruntime-web {made.version}")
        if port is None:
            show.line(f"show it with any web server, or here: elastic-export web {bundle} -o {output} --overwrite --port 8000")
    if port is not None:
        server.serve(made.folder, port, ready=lambda address: show.line(f"showing {made.folder} at {address}"))
