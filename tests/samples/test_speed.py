"""`samples/speed.py` on a report of stand-ins."""

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from bench_fakes import Clock, FakeRuntime, bundle, start
from msgspec.structs import replace

from card import filled
from elastic_bench.machine import machine
from elastic_bench.measure import measure, points
from elastic_bench.records import BundleReport, Peaks, Report, Settings, encode
from elastic_runtime import UsageError
from speed import NAME, beside_torch, main, options, section, table


def reported(settings: Settings, bundle_report: BundleReport) -> Report:
    """A report of one bundle."""
    return Report(
        schema_version=1, created="now", command="elastic-export bench", machine=machine(), settings=settings, energy={},
        bundles=(bundle_report,), peaks=Peaks(flops_per_second=1e9, bytes_per_second=1e9),
    )  # fmt: skip


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    clock, opened = Clock(), bundle(tmp_path_factory.mktemp("speed") / "tiny")
    runtimes = [FakeRuntime("one", clock), FakeRuntime("two", clock, base=0.02), FakeRuntime("three", clock, "absent")]
    settings = Settings(steps=2, duration=0.1, quality=True)
    bundle_report, _ = measure(opened, runtimes, points(opened, [4, 64]), settings, start(clock))
    return reported(settings, bundle_report)


def test_the_table_has_a_row_a_budget_and_a_column_a_runtime(report: Report) -> None:
    assert table(report, report.bundles[0]).splitlines() == [
        "| latents | one ms | two ms | fastest time share | FLOP share | fastest picture ms |",
        "|---:|---:|---:|---:|---:|---:|",
        "| 4 | 14.00 | 24.00 | 19% | 63% | 56 |",
        "| 64 | 74.00 | 84.00 | 100% | 100% | 300 |",
    ]


def test_what_torch_takes_beside_ours_is_computed(tmp_path: Path) -> None:
    clock, opened = Clock(), bundle(tmp_path / "tiny")
    runtimes = [
        FakeRuntime("onnxruntime", clock, base=0.01),
        FakeRuntime("openvino", clock, base=0.001),
        FakeRuntime("torch", clock, base=0.038),
        FakeRuntime("torch-compile", clock, base=0.024),
    ]
    settings = Settings(steps=2, duration=0.1)
    bundle_report, _ = measure(opened, runtimes, points(opened, [4, 64]), settings, start(clock))

    def sentence(*names: str) -> str | None:
        runtimes = tuple(each for each in bundle_report.runtimes if each.runtime in names)
        return beside_torch(reported(settings, replace(bundle_report, runtimes=runtimes)))

    compiled, eager = "1.2 to 2.0 times as long in torch.compile", "1.4 to 3.0 times as long in eager torch"
    words = "On the same weights and threads, a step takes {} as in onnxruntime."
    assert sentence("onnxruntime", "openvino", "torch", "torch-compile") == words.format(f"{compiled} and {eager}")
    assert sentence("onnxruntime", "torch") == words.format(eager)
    assert sentence("onnxruntime", "openvino") is None
    assert sentence("openvino", "torch") is None


def test_the_page_and_the_plot_are_filled_and_checked(report: Report, tmp_path: Path) -> None:
    json, page, plot = tmp_path / "r.json", tmp_path / "page.md", tmp_path / "speed.svg"
    json.write_bytes(encode(report))
    page.write_text("before\n<!-- figures speed -->\nold\n<!-- end of figures -->\nafter\n")
    with pytest.raises(SystemExit, match=r"page\.md does not say what"):
        main(options().parse_args([str(json), str(page), "--check"]))
    main(options().parse_args([str(json), str(page), "--plot", str(plot)]))
    assert page.read_text() == f"before\n<!-- figures speed -->\n{section(report)}\n<!-- end of figures -->\nafter\n"
    assert "`make bench` on a" in section(report)
    assert str(report.bundles[0].recommendation) in section(report)
    drawing = ElementTree.fromstring(plot.read_text())
    assert len(drawing.findall(".//{*}polyline")) == 2
    main(options().parse_args([str(json), str(page), "--check"]))
    with pytest.raises(UsageError, match="cannot read"):
        main(options().parse_args([str(tmp_path / "none.json")]))


def test_the_page_that_make_bench_fills_is_ready_for_it(report: Report) -> None:
    root = Path(__file__).parents[2]
    recipe = re.search(r"samples/speed\.py \S+ (\S+)", (root / "Makefile").read_text(encoding="utf-8"))
    assert recipe
    assert section(report) in filled((root / recipe[1]).read_text(encoding="utf-8"), NAME, section(report), recipe[1])
