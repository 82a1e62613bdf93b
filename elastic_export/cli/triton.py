"""`elastic-export triton`: a bundle as models of Triton Inference Server."""

from pathlib import Path
from typing import Annotated

import typer

from elastic_export.cli import options, show


def triton(
    bundle: options.BundleFolder,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="The model repository.", show_default=False)],
    instances: Annotated[int, typer.Option(min=1, help="Copies of each model that run at the same time.")] = 1,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
) -> None:
    """Write a Triton model repository: each graph in each artifact that Triton opens, with its dimensions open, the budget's among them.

    Models of other bundles, and what else the repository holds, stay as they are.

    [bold]Examples[/bold]

      elastic-export triton digits -o repository
      elastic-export triton digits -o repository --instances 2 --overwrite
    """
    from elastic_export.triton import BACKENDS, write
    from elastic_runtime.contract.bundle import Bundle

    made = write(Bundle.open(bundle, hashes=True), output, overwrite, instances)
    if json:
        rows = [{"name": each.name, "graph": each.graph, "platform": BACKENDS[each.artifact.target]} for each in made.models]
        show.as_json("triton", {"repository": str(output), "models": rows, "readme": str(made.readme), "left_out": made.left_out})
        return
    for why in made.left_out:
        show.note(f"left out: {why}")
    for each in made.models:
        show.line(f"{output / each.name}")
    show.line(f"how to start it and how the budget travels: {made.readme}")
