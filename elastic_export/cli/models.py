"""`elastic-export models`: what may stand as MODEL."""

from elastic_export.cli import options, show


def models(json: options.Json = False) -> None:
    """List the packaged samples, the families and their presets, with their axes and cost.

    [bold]Examples[/bold]

      elastic-export models
      elastic-export onnx elit-sit-xl-256 --checkpoint xl.pt -o xl
    """
    from elastic_export import api

    rows = api.models()
    if json:
        show.as_json("models", {"models": rows})
        return
    show.table(
        "models",
        ("name", "family", "weights", "axes", "GFLOPs", "parameters M"),
        [
            (
                *(row[name] for name in ("name", "family", "weights", "axes")),
                "-".join(dict.fromkeys(f"{g:.2f}" for g in row["gflops"])),
                row["parameters"] // 100000 / 10,
            )
            for row in rows
        ],
    )
    from elastic_export.capture.zoo import FAMILIES

    show.line(f"Any other size: name a family ({', '.join(FAMILIES)}) with --checkpoint and --config.")
    show.line("FLUX, FLUX.2, SD3, Qwen-Image, Z-Image and Krea 2: a diffusers folder.")
