"""`elastic-export push`: a bundle to the hub."""

from typing import Annotated

import typer

from elastic_export.cli import options, show


def push(
    bundle: options.BundleFolder,
    repository: Annotated[str, typer.Argument(metavar="ORG/NAME", help="The repository, made where there is none.", show_default=False)],
    private: Annotated[bool, typer.Option("--private", help="Of a repository that is made now: only you see it.")] = False,
    revision: Annotated[
        str | None,
        typer.Option(metavar="BRANCH", help="A branch, made where there is none [dim](default: main)[/dim].", show_default=False),
    ] = None,
    message: Annotated[str | None, typer.Option("--message", "-m", metavar="TEXT", help="Of the commit.", show_default=False)] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an edited card or an unreadable bundle too, and write beside what is none.")
    ] = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Write a bundle to the Hugging Face hub in one commit, with a model card made from its manifest.

    Who draws with it names it: elastic-export generate org/name. The card (README.md) is written anew with every push as long as nobody has
    edited it; an edited one stays as it is.

    [bold]Examples[/bold]

      elastic-export push digits me/digits --private
      elastic-export push flux me/flux-elastic --revision fp16 --message "half precision"
    """
    from elastic_export import publishing

    with show.stages(quiet) as on_stage:
        pushed = publishing.push(
            bundle, repository, private=private, revision=revision, message=message, overwrite=overwrite, on_stage=on_stage
        )
    if json:
        show.as_json("push", {"bundle": str(bundle), "pushed": pushed})
    else:
        gone = f", {len(pushed.removed)} taken away" if pushed.removed else ""
        show.line(f"pushed {len(pushed.files)} files, {pushed.bytes / 1e6:.1f} MB{gone}: {pushed.url}")
    if pushed.kept_card:
        show.note("the repository's model card was edited, and stays as it is; --overwrite replaces it")
    else:
        show.note("the card says nothing of a license: add the one that the model's weights came with")
