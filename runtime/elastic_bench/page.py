"""Reports as HTML pages, each of which holds everything it shows: plots inline, pictures as data, nothing loaded."""

import base64
import importlib.util
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from elastic_bench.drawing import Album
from elastic_bench.figures import figures, method
from elastic_bench.load import COLUMNS, LoadReport, cells
from elastic_bench.pareto import SAME
from elastic_bench.plots import card_plot, cost_plot, latency_plot, load_plots, trial_plot
from elastic_bench.records import Report
from elastic_runtime.contract.budget import Budget
from elastic_runtime.errors import MissingError

SHOWN = 8  # pictures of each budget


def require() -> None:
    """Raise MissingError where the package that fills the page is not installed."""
    if importlib.util.find_spec("jinja2") is None:
        raise MissingError("the page needs jinja2, which is not installed: pip install 'elastic-export[report]'")


def page(report: Report, albums: Sequence[Album]) -> str:
    """The page; `albums` are the pictures of each bundle (may be empty)."""
    bundles = [_bundle(report, i, album) for i, album in enumerate(albums)]
    return _filled("page.html", report=report, bundles=bundles, method=method(report.settings, report.bundles), SAME=SAME)


def load_page(report: LoadReport) -> str:
    """The page of a server's load."""
    return _filled("load.html", report=report, plots=load_plots(report), columns=COLUMNS, rows=[cells(row) for row in report.rows])


def _filled(template: str, **values: Any) -> str:
    require()
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"ms": _ms, "budget": lambda budget: str(Budget(**budget)), "share": "{:.0%}".format}
    return environment.get_template(template).render(**values)


def _bundle(report: Report, index: int, album: Album) -> dict[str, Any]:
    bundle = report.bundles[index]
    rows = list(figures(bundle, report.settings, report.peaks))
    plots = []
    if bundle.trials:
        plots.append(trial_plot(bundle, report.settings))
    if bundle.trials and bundle.card:
        plots += card_plot(bundle)
    if rows:
        plots.append(latency_plot(bundle, report.settings))
        plots += cost_plot(bundle, rows)
    return {
        "facts": bundle,
        "rows": rows,
        "plots": plots,
        "trials": sorted(bundle.trials, key=lambda trial: trial.seconds),
        "joules": sorted({name for each in rows for name in each.row.joules}),
        "pictures": {where: [png(picture) for picture in pictures[:SHOWN]] for where, pictures in album.items() if _visible(pictures)},
    }


def png(picture: np.ndarray) -> str:
    """A picture (H, W, C) in [0, 1] as a data URI."""
    pixels = (np.clip(picture, 0, 1) * 255).round().astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(stream, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def _visible(pictures: np.ndarray) -> bool:
    """Whether they are pictures, (N, H, W, 1 or 3), and not latents."""
    return pictures.ndim == 4 and pictures.shape[3] in (1, 3)


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:,.{0 if abs(seconds) >= 1 else 1 if abs(seconds) >= 0.1 else 2}f}"
