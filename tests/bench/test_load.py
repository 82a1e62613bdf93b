"""A server under load: a short one, through real processes, and the figures on paper."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import Outcome

from elastic_bench.load import COLUMNS, LoadReport, LoadRow, LoadSettings, cells, decode
from elastic_bench.machine import machine
from elastic_bench.openloop import WAYS, Answer, load, row, sustained
from elastic_bench.plots import load_plots
from elastic_bench.records import encode
from elastic_runtime.errors import InferenceError, UsageError

Run = Callable[..., Outcome]
SIZES = {
    "input_size": 8, "patch_size": 2, "in_channels": 1, "hidden_size": 16, "depth": 3, "num_heads": 2, "num_classes": 3, "group_size": 2,
    "head_blocks": 1, "tail_blocks": 1,
}  # fmt: skip
ASKED = [Answer(200, 0.1, {"a": 2}), Answer(200, 0.4, {"b": 2}), Answer(429, 0.0, {}), Answer(500, 0.0, {})]


def report(rows: list[LoadRow]) -> LoadReport:
    return LoadReport(
        schema_version=1, created="now", command="elastic-export bench digits --serve", machine=machine(), bundle="digits", model="tiny",
        where="nowhere", settings=LoadSettings(), alone=0.1, sustained={"best budget": 9.5}, rows=tuple(rows),
    )  # fmt: skip


def test_a_server_is_loaded_shown_and_written(run: Run, tmp_path: Path) -> None:
    for name in ("onnxruntime", "uvicorn", "httpx2", "jinja2"):
        pytest.importorskip(name, reason="a load needs a server, what asks it, and the page")
    import elastic_export

    (tmp_path / "tiny.json").write_text(json.dumps(SIZES))
    tiny = tmp_path / "tiny"
    elastic_export.export("elit-sit", config=tmp_path / "tiny.json", random_weights=True, output=tiny, verify="ends")
    out = run(
        "bench", tiny, "--serve", "--runtimes", "onnxruntime", "--loads", "2", "--duration", "0.3", "--steps", 3, "-q",
        "--json", tmp_path / "load.json", "--html", tmp_path / "load.html",
    )  # fmt: skip
    assert out.code == 0, out.err
    assert "Who is on time" in (tmp_path / "load.html").read_text()
    report = decode((tmp_path / "load.json").read_bytes(), "load.json")
    assert report.ways == tuple(WAYS)
    assert all(each.asked == len(each.latencies) + each.refused + each.failed and each.failed == 0 for each in report.rows)
    assert set(report.sustained) == {"best budget", "best, one at a time", "cheapest"}
    assert f"{1e3 * report.alone:.0f} ms" in out.out
    assert run("bench", tiny, "--serve", "--json", tmp_path / "load.json").code == 2  # it is there


def test_what_is_refused_is_not_on_time() -> None:
    got = row("ours", 2.0, ASKED, 0.2, 1.0, {"a": 1.0, "b": 0.5})
    assert cells(got) == ("2", "ours", "25.0%", "25.0%", "50.0%", "250", "385", "397", "1.0", "75.0%")
    assert got.failed == 1


@pytest.mark.parametrize("classes", [1, 4, 1000])
def test_a_load_asks_for_classes_that_there_are(classes: int) -> None:
    asked: list[int] = []

    class Client:
        async def post(self, path: str, json: dict[str, int]) -> SimpleNamespace:
            asked.append(json["class_labels"])
            return SimpleNamespace(status_code=429)

    asyncio.run(load(Client(), {"steps": 3}, 2000.0, 0.02, classes, 0))
    assert len(asked) > classes or classes == 1000
    assert set(asked) <= set(range(classes))


def test_a_connection_that_breaks_is_an_answer_that_failed() -> None:
    httpx2 = pytest.importorskip("httpx2", reason="a load asks with it")

    class Client:
        async def post(self, path: str, json: dict[str, int]) -> SimpleNamespace:
            if json["seed"] % 2:
                raise httpx2.ReadError("the other side hung up")
            return SimpleNamespace(status_code=429)

    answers = asyncio.run(load(Client(), {"steps": 3}, 2000.0, 0.02, 10, 0))
    got = row("ours", 2.0, answers, 0.2, 1.0, None)
    assert (got.failed, got.refused) == (len(answers) // 2, len(answers) - len(answers) // 2)
    assert got.failed > 0


def test_a_server_that_breaks_before_the_load_ends_the_measurement() -> None:
    pytest.importorskip("httpx2", reason="a load asks with it")

    class Client:
        left = 3

        async def post(self, path: str, json: dict[str, int]) -> SimpleNamespace:
            self.left -= 1
            answer = {"data": [{"elastic": {"budgets": []}}]}
            return SimpleNamespace(status_code=200 if self.left >= 0 else 500, json=lambda: answer)

    with pytest.raises(InferenceError, match="the server answers 500 to one picture"):
        asyncio.run(sustained(Client(), {"steps": 3}, 24))


def test_what_failed_under_load_is_told() -> None:
    assert "count as not on time: 1 of 4 at load 2 (ours)" in report([row("ours", 2.0, ASKED, 0.2, 1.0, None)]).method
    assert "error" not in report([row("ours", 2.0, ASKED[:3], 0.2, 1.0, None)]).method


def test_nothing_drawn_and_no_card_have_no_figures() -> None:
    got = row("ours", 2.0, ASKED[2:], 0.2, 1.0, None)
    assert cells(got) == ("2", "ours", "0.0%", "50.0%", "-", "-", "-", "-", "0.0", "-")
    assert [plot.title for plot in load_plots(report([got]))] == ["Who is on time"]


def test_a_report_reads_back_and_is_plotted() -> None:
    rows = [row(way, load, ASKED, 0.2, 1.0, {"a": 1.0, "b": 0.5}) for way in WAYS for load in (1.0, 4.0)]
    there = report(rows)
    assert decode(encode(there), "load.json") == there
    on_time, quality = load_plots(there)
    assert [series.name for series in on_time.legend] == list(WAYS)
    assert "ours, load 4: 25.0%" in on_time.svg
    assert "cheapest, load 1: 75.0%" in quality.svg
    with pytest.raises(UsageError, match=r"load.json.*not a report of a server's load|load.json"):
        decode(b"{}", "load.json")


def test_the_page_of_the_docs_is_filled(tmp_path: Path) -> None:
    import serve_load

    page, written = tmp_path / "page.md", tmp_path / "load.json"
    page.write_text("before\n<!-- figures serve -->\nold\n<!-- end of figures -->\nafter\n", encoding="utf-8")
    written.write_bytes(encode(report([row(way, 2.0, ASKED, 0.2, 1.0, None) for way in WAYS])))
    namespace = type("Given", (), {"report": written, "page": page, "plot": tmp_path / "load.svg"})
    serve_load.main(namespace)  # type: ignore[arg-type]
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert f"| {' | '.join(COLUMNS)} |" in text
    assert all(f"| 2 | {way} | " in text for way in WAYS)
    assert (tmp_path / "load.svg").read_text().startswith("<svg")


@pytest.mark.parametrize(
    ("words", "message"),
    {
        "two bundles": (("a", "b", "--serve"), "one bundle, got 2"),
        "a budget": (("a", "--serve", "--budgets", "8"), "the server chooses budgets and batches"),
        "loads alone": (("a", "--loads", "2"), "give --serve, too"),
        "no load": (("a", "--serve", "--loads", "0"), "each more than 0, got 0"),
        "words": (("a", "--serve", "--loads", "much"), "numbers are written 0.5,1,2"),
        "a runtime": (("a", "--serve", "--runtimes", "torch"), "--serve runs in one of onnxruntime"),
        "no bundle": (("a", "--serve"), "a"),
    }.values(),
)  # fmt: skip
def test_what_no_server_can_be_loaded_with(run: Run, tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    done = run("bench", *words)
    assert done.code == 2
    assert message in " ".join(done.err.split())
