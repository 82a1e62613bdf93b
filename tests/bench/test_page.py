"""The page holds everything that it shows; a real browser opens it from disk."""

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import msgspec
import numpy as np
import pytest
from bench_fakes import Clock, FakeRuntime, bundle, start

from elastic_bench.drawing import Album
from elastic_bench.machine import machine
from elastic_bench.measure import measure, points
from elastic_bench.records import Peaks, Report, Settings
from elastic_runtime.contract.manifest import Quality

pytest.importorskip("jinja2", reason="the page needs jinja2: pip install 'elastic-export[report]'")

from elastic_bench.page import page, png
from elastic_bench.svg import Point, Series, plot

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-headless-shell", "google-chrome", "chromium-browser"))), None)


@pytest.fixture(scope="module")
def measurement(tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, list[Album]]:
    """A report with everything in it: several runtimes, one missing, one wrong, trials, a card, a single stream."""
    clock, opened = Clock(), bundle(tmp_path_factory.mktemp("bench") / "tiny")
    card = tuple(Quality(budget={"latents": n}, accuracy=0.9, frechet_distance=f) for n, f in ((4, 30.0), (16, 11.5), (64, 10.0)))
    opened.manifest = msgspec.structs.replace(opened.manifest, quality=card)
    runtimes = [
        FakeRuntime("one", clock), FakeRuntime("two", clock, base=0.02, precision="fp16"),
        FakeRuntime("<script>three</script>", clock, "absent"), FakeRuntime("four", clock, "wrong"),
    ]  # fmt: skip
    settings = Settings(steps=4, duration=0.1, quality=True, single_stream=True)
    bundle_report, album = measure(opened, runtimes, points(opened), settings, start(clock))
    peaks = Peaks(flops_per_second=1e9, bytes_per_second=1e9)
    energy = {"RAPL": "absent: it is not here", "meter": "counted"}
    report = Report(
        schema_version=1, created="2026-01-01T00:00:00+00:00", command="elastic-export bench 'a & b'", machine=machine(), peaks=peaks,
        energy=energy, settings=settings, bundles=(bundle_report,),
    )  # fmt: skip
    return report, [album]


class Outline(HTMLParser):
    """Every tag with its attributes, and the text."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_the_page_loads_nothing(measurement: tuple[Report, list[Album]]) -> None:
    text = page(*measurement)
    outline = Outline(text)
    loading = {"src", "href", "srcset", "action", "data", "poster"}
    addresses = [value for _, attributes in outline.tags for name, value in attributes.items() if name in loading]
    assert addresses
    assert all(value and value.startswith("data:") for value in addresses)
    assert not re.search(r"@import|url\(", text)
    assert not {"script", "iframe", "object", "link"} & {tag for tag, attributes in outline.tags if attributes.get("rel") != "icon"}
    # the only address is the name of SVG's namespace, which nothing fetches
    assert set(re.findall(r"https?://[^\"'\s<]+", text)) == {"http://www.w3.org/2000/svg"}


def test_the_page_says_what_the_report_holds(measurement: tuple[Report, list[Album]]) -> None:
    report, albums = measurement
    words = " ".join(" ".join(Outline(page(report, albums)).words).split())
    for phrase in (
        "tiny", str(report.bundles[0].recommendation), "missing: it is not installed", "failed: wrong at latents=4",
        "elastic-export bench 'a & b'", "took turns in 10 rounds", "MLPerf-style, not MLPerf", "RAPL absent: it is not here",
        "<script>three</script>", "90.0%", "dominated",
    ):  # fmt: skip
        assert phrase in words, phrase


def test_every_plot_is_well_formed_and_has_a_mark_for_every_figure(measurement: tuple[Report, list[Album]]) -> None:
    report, albums = measurement
    plots = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page(report, albums), re.DOTALL)]
    circles = [len(svg.findall(".//{*}circle")) for svg in plots]
    trials = report.bundles[0].trials
    front = sum(trial.front for trial in trials)
    assert front > 1
    assert circles == [len(trials), 3, 10, 10], "trials; the card's budgets; two runtimes at five budgets, twice"
    assert all(svg.get("aria-label") for svg in plots)


def test_a_page_of_nothing_but_what_is_missing(measurement: tuple[Report, list[Album]]) -> None:
    report, _ = measurement
    only = msgspec.structs.replace(report.bundles[0], runtimes=report.bundles[0].runtimes[2:3], trials=(), card=(), recommendation=None)
    text = page(msgspec.structs.replace(report, bundles=(only,)), [{}])
    assert "missing: it is not installed" in text
    assert "<svg" not in text


def test_pictures_of_one_and_of_three_channels_become_png() -> None:
    for channels in (1, 3):
        assert png(np.zeros((4, 4, channels), np.float32)).startswith("data:image/png;base64,iVBOR")


@pytest.mark.parametrize("values", [[1.0], [0.0, 0.0], [1e-9, 1e9], [5.0, 5.0, 5.0]])
def test_a_plot_of_any_range_stays_within_its_frame(values: list[float]) -> None:
    drawn = plot([Series("a", [Point(i + 1, value) for i, value in enumerate(values)], "#000")], "x", "y", "title")
    for circle in ElementTree.fromstring(drawn).findall(".//{*}circle"):
        assert 0 <= float(circle.get("cx", "nan")) <= 640
        assert 0 <= float(circle.get("cy", "nan")) <= 340


# What the browser tells, written into the page's own title by a script that only the test adds
PROBE = """<script>addEventListener("load", () => {
  const drawn = [...document.querySelectorAll("svg")].filter(e => e.getBBox().width > 300 && e.getBoundingClientRect().height > 100).length;
  const shown = [...document.images].filter(e => e.naturalWidth > 0).length;
  const loaded = performance.getEntriesByType("resource").filter(e => !e.name.startsWith("data:")).length;
  const wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  document.title = `drawn ${drawn} shown ${shown} loaded ${loaded} wide ${wide}`;
});</script>"""


def opened(text: str, folder: Path) -> tuple[str, list[str]]:
    """The title and the console's lines after a browser has opened `text` from disk."""
    path = folder / "page.html"
    path.write_text(text, encoding="utf-8")
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", f"--user-data-dir={folder / 'user'}",
        "--window-size=1200,1600", "--virtual-time-budget=2000", "--dump-dom", path.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title is not None
    return title[1], [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here: apt-get install chromium-headless-shell")
def test_a_browser_opens_it_from_disk_without_a_word_on_the_console(measurement: tuple[Report, list[Album]], tmp_path: Path) -> None:
    title, console = opened(page(*measurement) + PROBE, tmp_path)
    pictures = sum(min(len(pictures), 8) for pictures in measurement[1][0].values())
    assert title == f"drawn 4 shown {pictures} loaded 0 wide 0"
    assert console == []
    _, console = opened(page(*measurement) + "<script>throw Error('planted')</script>", tmp_path)
    assert "planted" in console[0], "a mistake would be seen"


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here: apt-get install chromium-headless-shell")
def test_it_prints(measurement: tuple[Report, list[Album]], tmp_path: Path) -> None:
    path, printed = tmp_path / "page.html", tmp_path / "page.pdf"
    path.write_text(page(*measurement), encoding="utf-8")
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'user'}", "--no-pdf-header-footer",
        f"--print-to-pdf={printed}", path.as_uri(),
    ]  # fmt: skip
    subprocess.run(command, capture_output=True, timeout=180, check=True)
    sheets = printed.read_bytes()
    assert sheets.startswith(b"%PDF")
    assert re.search(rb"/MediaBox\s*\[0 0 84[12][.\d]* 59[45]", sheets), "A4, lying"
    assert len(re.findall(rb"/Type\s*/Page\b", sheets)) <= 8
