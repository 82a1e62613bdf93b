"""Write a server's load into docs/serve.md, which quotes it, and plot it.

    elastic-export bench digits --serve --json build/load.json
    python samples/serve_load.py build/load.json docs/serve.md --plot docs/serve-load.svg

The page holds the table between `<!-- figures serve -->` and `<!-- end of figures -->`.
"""

import argparse
from pathlib import Path

from card import filled
from elastic_bench.load import COLUMNS, LoadReport, cells, decode
from elastic_bench.plots import load_plots
from elastic_bench.svg import captioned
from elastic_runtime.errors import ElasticError
from elastic_runtime.files.atomic import save

NAME = "serve"


def section(report: LoadReport) -> str:
    """What stands between the markers."""
    rows = [f"| {' | '.join(cells(row))} |" for row in report.rows]
    head = [f"| {' | '.join(COLUMNS)} |", "|---:|---|" + "---:|" * (len(COLUMNS) - 2)]
    taking_part = ("python", "elastic-export", "numpy", "onnxruntime", "openvino")
    versions = ", ".join(f"{name} {report.machine.versions[name]}" for name in taking_part if name in report.machine.versions)
    return "\n".join(
        [*head, *rows, "", f"`{report.command}` ({report.model}, {report.where}). {report.method} {report.machine}; {versions}."]
    )


def main(given: argparse.Namespace) -> None:
    report = decode(given.report.read_bytes(), str(given.report))
    save(given.page, filled(given.page.read_text(encoding="utf-8"), NAME, section(report), str(given.page)).encode())
    if given.plot:
        save(given.plot, captioned([(plot.title, plot.svg, plot.legend) for plot in load_plots(report)]).encode())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, help="what elastic-export bench --serve --json wrote")
    parser.add_argument("page", type=Path, help="the Markdown page to fill: docs/serve.md")
    parser.add_argument("--plot", type=Path, help="SVG of who is on time, and of quality, by load")
    try:
        main(parser.parse_args())
    except ElasticError as error:
        raise SystemExit(str(error)) from None
