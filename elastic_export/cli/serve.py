"""`elastic-export serve`: pictures over HTTP."""

from pathlib import Path
from typing import Annotated

import typer

from elastic_export.cli import options
from elastic_runtime.contract.axis import Span


def serve(
    bundles: Annotated[list[Path], typer.Argument(metavar="BUNDLE...", help="Folders of bundles.", show_default=False)],
    host: Annotated[str, typer.Option(help="Address to listen on; others than this machine reach it on 0.0.0.0.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 is any that is free.")] = 8000,
    server_name: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="Names that it answers to beside localhost, as a proxy on this machine hands them on: [bold]pictures.example.com[/bold].",
            show_default=False,
        ),
    ] = None,
    backend: options.Backend = None,
    precision: options.Precisions = None,
    queue: Annotated[int, typer.Option(min=1, help="Pictures that wait or are drawn, at most.")] = 64,
    target_ms: Annotated[
        float | None,
        typer.Option(
            min=1.0,
            help="In what time a picture is to be done whose request names no deadline [dim](default: three times what it takes at its "
            "best)[/dim].",
            show_default=False,
        ),
    ] = None,
    margin: Annotated[float, typer.Option(min=0.0, max=0.9, help="Share of a deadline kept for what nothing predicts.")] = 0.15,
    batch: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Rows of a run that pictures share, at most [dim](default: what the bundle takes, where it pays)[/dim].",
            show_default=False,
        ),
    ] = None,
    max_pictures: Annotated[int, typer.Option(min=1, help="Pictures of one request, at most.")] = 10,
    max_steps: Annotated[int, typer.Option(min=1, help="Denoising steps of one picture, at most.")] = 250,
    drain_seconds: Annotated[
        float, typer.Option(min=0.0, max=3600.0, help="Time that pictures in flight get when the server ends.")
    ] = 30.0,
    ray: Annotated[bool, typer.Option("--ray", help="Draw on a Ray cluster: that of RAY_ADDRESS, or one on this machine.")] = False,
    replicas: Annotated[
        Span | None,
        typer.Option(
            parser=options.span, metavar="SPAN", help="With --ray: as many as are asked for, [bold]1-4[/bold].", show_default=False
        ),
    ] = None,
    gpus: Annotated[
        float | None, typer.Option(min=0.0, help="With --ray: GPUs of each replica [dim](default: 0)[/dim].", show_default=False)
    ] = None,
) -> None:
    """Serve bundles in the form of the OpenAI Images API: many people, one device, budgets that keep the deadline.

    Where more is asked for than the best budget can draw in time, all pictures in flight go on with smaller ones, and with larger ones
    when the rush is over. A deadline that nothing keeps is refused at once. Set ELASTIC_EXPORT_API_KEY to ask clients for a key.

    [bold]Examples[/bold]

      elastic-export serve digits
      elastic-export serve digits flux --host 0.0.0.0 --port 8080 --queue 200
      elastic-export serve digits --target-ms 500 --precision auto
      elastic-export serve digits --ray --replicas 2-8 --host 0.0.0.0
    """
    from elastic_export.cli import show
    from elastic_export.values import read_words
    from elastic_runtime.errors import MissingError, UsageError

    try:
        from elastic_serve.body import Limits
        from elastic_serve.server import Settings, serve
    except ModuleNotFoundError as error:
        raise MissingError(f"serving needs {error.name}, which is not installed: pip install 'elastic-export[serve]'") from None
    settings = Settings(
        host=host,
        port=port,
        backend=backend,
        precisions=tuple(read_words(precision) or ()),
        queue=queue,
        margin=margin,
        wish=None if target_ms is None else target_ms / 1000,
        batch=batch,
        drain=drain_seconds,
        names=tuple(read_words(server_name) or ()),
        limits=Limits(pictures=max_pictures, steps=max_steps),
    )

    def ready(address: str) -> None:
        show.line(f"serving {', '.join(map(str, bundles))} at {address}")

    if not ray:
        if replicas is not None or gpus is not None:
            raise UsageError("--replicas and --gpus are of a Ray cluster: give --ray, too")
        serve(bundles, settings, ready)
        return
    try:
        from elastic_serve import cluster
    except ModuleNotFoundError as error:
        raise MissingError(f"serving on Ray needs {error.name}, which is not installed: pip install 'elastic-export[ray]'") from None
    cluster.serve(bundles, settings, cluster.Cluster(replicas or Span(1, 4), gpus or 0.0), ready)
