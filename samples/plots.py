"""How the samples' plots look: panels side by side in one PNG."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PAPER, REAL = "#ffffff", "#7a7a7a"
LINES = (("#1f4e79", "o"), ("#d9822b", "s"), ("#3d8f6a", "^"), ("#8a5fa8", "v"), ("#b03a5b", "D"), ("#2a9db5", "P"), ("#555555", "X"))
IN_A_ROW = 6  # words of a legend
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.edgecolor": "#9a9a9a",
}


@contextmanager
def panels(path: Path, count: int = 2) -> Iterator[Any]:
    """`count` axes side by side; at the end the first one's legend goes below, and all into the PNG at `path`."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(1, count, figsize=(4.5 * count, 3.8), layout="constrained", facecolor=PAPER)
        yield axes
        handles, words = axes[0].get_legend_handles_labels()
        figure.legend(handles, words, frameon=False, loc="outside lower center", ncols=-(-len(words) // (1 + (len(words) > IN_A_ROW))))
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=160)
        pyplot.close(figure)


def real_line(panel: Any, value: float, label: str) -> None:
    """A dashed line at what real pictures get."""
    panel.axhline(value, color=REAL, linestyle=(0, (5, 3)), linewidth=1.2, label=label)
