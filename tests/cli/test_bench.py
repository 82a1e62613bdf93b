"""`elastic-export bench` from the command line."""

import json
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from bench_fakes import Clock, FakeRuntime, bundle, start
from conftest import Outcome
from fakes import manifest, write_manifest

from elastic_bench.machine import machine
from elastic_bench.measure import measure, points
from elastic_bench.records import Peaks, Report, Settings, encode
from elastic_runtime import Bundle, UsageError
from elastic_runtime.contract.manifest import Vae

Run = Callable[..., Outcome]


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return bundle(tmp_path / "tiny").folder


@pytest.fixture
def known_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring them takes a while."""
    monkeypatch.setattr("elastic_export.bench.run.peaks", lambda threads: Peaks(flops_per_second=1e9, bytes_per_second=1e9))


def report(folder: Path, path: Path, factor: float) -> Path:
    """A file as `--json` writes it, of a runtime whose times are multiplied by `factor`."""
    clock, settings, opened = Clock(), Settings(steps=1, duration=0.1), Bundle.open(folder)
    runtime = FakeRuntime("one", clock, base=0.01 * factor, each=0.001 * factor)
    bundle_report, _ = measure(opened, [runtime], points(opened), settings, start(clock))
    peaks = Peaks(flops_per_second=1e9, bytes_per_second=1e9)
    whole = Report(
        schema_version=1, created="now", command="elastic-export bench", machine=machine(), peaks=peaks, energy={}, settings=settings,
        bundles=(bundle_report,),
    )  # fmt: skip
    path.write_bytes(encode(whole))
    return path


def test_a_bundle_is_measured_shown_and_written(run: Run, golden_bundle: Callable[[str], Bundle], tmp_path: Path) -> None:
    pytest.importorskip("jinja2", reason="the page needs jinja2")
    out = tmp_path / "out"
    done = run(
        "bench", golden_bundle("c").folder, "--runtimes", "onnxruntime,trt", "--budgets", "64,8", "--duration", "0.02", "--steps", 2,
        "--threads", 1, "--json", out / "r.json", "--html", out / "r.html", "-q",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "onnxruntime" in done.out
    assert "missing: the bundle has no trt artifact: elastic-export trt makes one" in done.out
    assert "took turns in 10 rounds" in done.out
    document = json.loads((out / "r.json").read_text())
    assert document["schema_version"] == 1
    (first, second) = document["bundles"][0]["runtimes"]
    assert [row["budget"] for row in first["rows"]] == [{"latents": 8}, {"latents": 64}]
    assert all(row["passed"] for row in first["checked"])
    assert first["peak_bytes"] >= first["started_bytes"] > 0
    assert second["rows"] == []
    assert "<svg" in (out / "r.html").read_text()
    assert run("bench", "--compare", out / "r.json", out / "r.json").code == 0
    again = run("bench", golden_bundle("c").folder, "--json", out / "r.json")
    assert (again.code, "r.json exists" in again.err) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["BUNDLE", "--runtimes", "abacus"], 2, "there is no runtime 'abacus'; there are onnxruntime, "),
        (["BUNDLE", "--budgets", "65"], 2, "latents 65 is not available: this model offers 4-64 in steps of 4"),
        (["BUNDLE", "--budgets", "few"], 2, "numbers are written"),
        (["none"], 2, "none is not a bundle: it does not exist"),
        (["BUNDLE", "BUNDLE"], 2, "two bundles have the same name, tiny"),
        (["BUNDLE", "--json", "x", "--html", "x"], 2, "--json and --html are both x: give two names"),
        (["BUNDLE", "--serve", "--json", "x", "--html", "x"], 2, "--json and --html are both x: give two names"),
        (["BUNDLE", "--duration", "0"], 2, "more than 0, got 0"),
        (["BUNDLE", "--batch", "0"], 2, "Invalid value for '--batch'"),
        ([], 2, "give a bundle's folder"),
        (
            ["BUNDLE", "--runtimes", "trt,coreml", "--duration", "0.1"],
            3,
            "nothing here can run what was asked for. trt: the bundle has no trt",
        ),
        (["BUNDLE", "--compare", "a.json", "b.json"], 2, "leave the bundles out"),
        (["--compare", "a.json", "b.json"], 2, "cannot read a.json"),
        (["--compare", "a.json", "b.json", "--html", "x.html"], 2, "leave --html out"),
        (["--compare", "a.json", "b.json", "--serve"], 2, "leave --serve out"),
    ],
)
def test_a_wrong_wish_is_answered_in_a_sentence(arguments: list[str], code: int, message: str, run: Run, tiny: Path) -> None:
    done = run("bench", *(str(tiny) if word == "BUNDLE" else word for word in arguments), "-q")
    assert done.code == code, done.err
    assert message in " ".join(done.err.replace("│", " ").split())
    assert "Traceback" not in done.err


@pytest.mark.usefixtures("known_peaks")
def test_a_runtime_that_is_wrong_ends_with_1_and_no_figures(run: Run, tiny: Path) -> None:
    pytest.importorskip("onnxruntime", reason="the runtime that cannot open it")
    done = run("bench", tiny, "--runtimes", "onnxruntime", "--duration", "0.1", "-q")
    assert done.code == 1
    assert "FAILED: ONNX Runtime cannot open" in done.out
    assert "onnxruntime has no figures" in done.err
    assert "GFLOP/s" not in done.out.split("peaks")[0]


def test_a_regression_ends_with_1_and_names_the_first_row(run: Run, tiny: Path, tmp_path: Path) -> None:
    old, new = report(tiny, tmp_path / "old.json", 1.0), report(tiny, tmp_path / "new.json", 1.2)
    worse = run("bench", "--compare", old, new)
    assert worse.code == 1
    assert "slower" in worse.out
    assert "+20.0%" in worse.out
    assert "5 of 5 rows are worse, tiny one latents=4 the first" in worse.err
    assert run("bench", "--compare", old, new, "--tolerance", 0.25).code == 0
    better = run("bench", "--compare", new, old)
    assert (better.code, "faster" in better.out) == (0, True)


@pytest.mark.usefixtures("known_peaks")
def test_what_cannot_be_written_was_shown(run: Run, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise UsageError("cannot write new.json (No space left on device)")

    pytest.importorskip("onnxruntime", reason="a runtime that is here")
    monkeypatch.setattr("elastic_runtime.files.atomic.save", full)
    done = run("bench", tiny, "--runtimes", "onnxruntime", "--duration", "0.1", "--json", tmp_path / "new.json", "-q")
    assert (done.code, "No space left" in done.err) == (2, True)
    assert "FAILED: ONNX Runtime cannot open" in done.out


def test_other_models_under_one_name_are_noted(run: Run, tiny: Path, tmp_path: Path) -> None:
    old = report(tiny, tmp_path / "old.json", 1.0)
    plain = json.loads(old.read_text())
    plain["bundles"][0]["weights"] = "other"
    (tmp_path / "new.json").write_text(json.dumps(plain))
    done = run("bench", "--compare", old, tmp_path / "new.json")
    assert (done.code, "these are two models: tiny held tiny" in " ".join(done.err.split())) == (0, True), done.err
    assert "two models" not in run("bench", "--compare", old, old).err


def test_tokens_of_a_bundle_that_draws_nothing_are_a_sentence(run: Run, tmp_path: Path) -> None:
    """`generate --show-tokens` looks for a router in the denoiser."""
    whole = manifest(4, vae=Vae(scaling_factor=1.0, shift_factor=0.0, upscale=8))
    graphs = {"decoder": whole.graphs["decoder"]}
    write_manifest(tmp_path, msgspec.structs.replace(whole, graphs=graphs, axes=(), cost=()))
    done = run("generate", tmp_path, "-o", tmp_path / "x.png", "--classes", 1, "--steps", 2, "--show-tokens", tmp_path / "y.png")
    assert (done.code, "has no graph 'denoiser', it has decoder" in " ".join(done.err.split())) == (2, True), done.err
