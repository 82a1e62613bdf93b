"""`elastic-export models`: what may stand as MODEL."""

from elastic_export.cli import options, show
from elastic_runtime.errors import MissingError


def models(json: options.Json = False) -> None:
    """List the packaged samples, the families and their presets, with their axes and cost.

    [bold]Examples[/bold]

      elastic-export models
      elastic-export onnx elit-sit-xl-256 --checkpoint xl.pt -o xl
    """
    try:
        from elastic_export.capture.catalogue import catalogue
        from elastic_export.capture.zoo import FAMILIES
    except ModuleNotFoundError as error:
        raise MissingError(f"the model zoo needs torch ({error}): pip install 'elastic-export[torch]'") from error
    rows = catalogue()
    if json:
        show.as_json("models", {"models": rows})
        return
    show.table(
        "models",
        ("name", "family", "weights", "axes", "GFLOPs", "parameters M"),
        [
            (
                *(row[name] for name in ("name", "family", "weights", "axes")),
                "-".join(f"{g:.2f}" for g in row["gflops"]),
                row["parameters"] // 100000 / 10,
            )
            for row in rows
        ],
    )
    show.line(f"Any other size: name a family ({', '.join(FAMILIES)}) with --checkpoint and --config. FLUX and SD3: a diffusers folder.")
