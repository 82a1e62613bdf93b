import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
from bench_fakes import Clock, FakeRuntime, bundle, start

from elastic_bench.drawing import Album
from elastic_bench.entry import Entry
from elastic_bench.figures import figures, method
from elastic_bench.measure import _agree, measure, points, suited
from elastic_bench.process import Process
from elastic_bench.records import ROUNDS, BundleReport, Peaks, Settings
from elastic_bench.runtimes import runtimes, ways
from elastic_bench.subject import Subject
from elastic_export.bench import run as room
from elastic_runtime import Budget, BudgetError, Bundle, ElasticError, InferenceError, UsageError
from elastic_runtime.contract.manifest import Quality
from elastic_runtime.contract.schedule import CosineMask, LinearBeta

SETTINGS = Settings(steps=4, duration=1.0)


@pytest.fixture
def opened(tmp_path: Path) -> Bundle:
    return bundle(tmp_path / "tiny")


def run(opened: Bundle, *kinds: str, settings: Settings = SETTINGS, **changes: Any) -> tuple[BundleReport, Album]:
    clock = Clock()
    made = [FakeRuntime(f"{kind}-{i}", clock, kind, **(changes if i else {})) for i, kind in enumerate(kinds)]
    return measure(opened, made, points(opened), settings, start(clock))


def test_times_are_those_of_the_clock_in_rounds(opened: Bundle) -> None:
    report, album = run(opened, "right", "right", base=0.020, each=0.002)
    first, second = report.runtimes
    assert [row.budget["latents"] for row in first.rows] == [4, 8, 16, 32, 64]
    for row in first.rows:
        assert len(row.rounds) == ROUNDS
        assert row.step.p50 == pytest.approx(0.010 + 0.001 * row.budget["latents"])
        assert row.step.spread == pytest.approx(0, abs=1e-9)
        assert sum(map(sum, row.rounds)) >= SETTINGS.duration
        assert row.switch_seconds == pytest.approx(0.004)
        assert row.joules == {"meter": pytest.approx(5 * row.step.p50)}
        assert row.flops == 1000 + 10 * row.budget["latents"]
        assert len(row.pictures) >= 1
        assert row.pictures[0] == pytest.approx(4 * 2 * row.step.p50 + 0.004), "4 steps of two branches in one run"
    assert first.load_seconds == pytest.approx(0.5)
    assert all(row.passed for row in (*first.checked, *second.checked))
    assert [row.budget["latents"] for row in first.checked] == [4, 16, 64]
    assert first.rows[0].agrees is None
    assert all(row.agrees is not None and row.agrees.passed for row in second.rows)
    assert list(album) == [str(budget) for budget in points(opened)]
    assert album["latents=64"].shape[1:] == (8, 8, 1)
    assert report.trials == ()
    assert report.recommendation is None


def test_a_report_says_how_weights_came_to_few_bits(opened: Bundle) -> None:
    (artifact,) = opened.manifest.graphs["denoiser"].artifacts
    fitted = msgspec.structs.replace(artifact, precision="int4w", weight_rounding="gptq")
    opened.manifest = opened.manifest.joined("denoiser", [fitted])
    held = {}
    for precision in ("int4w", "fp32"):
        report, _ = run(opened, "right", "right", artifact=artifact.path, precision=precision)
        held[precision] = [runtime.held for runtime in report.runtimes]
    assert held == {"int4w": [None, "int4w, gptq"], "fp32": [None, None]}


def test_figures_follow_from_rows(opened: Bundle) -> None:
    peaks = Peaks(flops_per_second=1e6, bytes_per_second=1e7)
    entries = list(figures(run(opened, "right", "right", base=0.020, each=0.002, processor="cpu")[0], SETTINGS, peaks))
    by = {(each.runtime.runtime, each.row.budget["latents"]): each for each in entries}
    assert by["right-0", 64].time_share == 1
    assert by["right-0", 4].time_share == pytest.approx(0.014 / 0.074)
    assert by["right-0", 4].flop_share == pytest.approx(1040 / 1640)
    assert by["right-1", 16].speedup == pytest.approx(0.5)
    assert by["right-0", 4].flops_per_second == pytest.approx(1040 / 0.014)
    assert by["right-0", 4].compute_share is None, "the peaks bound the processor's runtimes only"
    assert by["right-1", 4].compute_share == pytest.approx(1040 / 0.028 / 1e6)
    assert by["right-0", 4].images_per_second == pytest.approx(1 / by["right-0", 4].picture)  # type: ignore[operator]
    assert "took turns in 10 rounds" in method(SETTINGS)


@pytest.mark.parametrize(
    ("kind", "field", "why"),
    [
        ("wrong", "failure", "wrong at latents=4: max abs error 5.00e-01 of at most 6.34e-05 (1e-05 of the largest value)"),
        ("sly", "failure", "differs from right-0 at latents=32: max abs error 5.00e-01 of at most 1.45e-04"),
        ("broken", "failure", "it does not open"),
        ("absent", "missing", "it is not installed: pip install it"),
        ("gone", "missing", "there is no such device"),
    ],
)
def test_a_runtime_that_is_not_right_has_no_figures(opened: Bundle, kind: str, field: str, why: str) -> None:
    report, _ = run(opened, "right", kind)
    right, other = report.runtimes
    assert len(right.rows) == 5
    assert getattr(other, field) == why
    assert other.rows == ()
    assert other.load_seconds is None


def test_a_bundle_without_a_recording_has_no_figures(opened: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Bundle, "reference", lambda self: {})
    with pytest.raises(UsageError, match="nothing can be proven"):
        run(opened, "right")


def test_quality_compares_every_way_with_the_full_budget(opened: Bundle) -> None:
    settings = Settings(steps=4, duration=0.1, quality=True)
    report, _ = run(opened, "right", "right", settings=settings, base=0.002)
    ways = {(t.runtime, t.budget["latents"], (t.guidance_budget or {}).get("latents"), t.steps): t for t in report.trials}
    assert len(ways) == len(report.trials) == 2 * 3 * (5 + 4)
    assert ways["right-0", 64, None, 4].psnr_db == 999.0
    assert ways["right-0", 4, None, 4].psnr_db < ways["right-0", 32, None, 4].psnr_db < 60
    assert ways["right-1", 64, None, 1].front, "the flow is straight: one step goes as far as four"
    assert not ways["right-1", 64, None, 4].front
    assert not ways["right-0", 64, None, 1].front, "the other is as near, and faster"
    assert {t.steps for t in report.trials} == {4, 2, 1}
    assert report.recommendation is not None
    assert report.recommendation.startswith("Use right-1 at latents=")
    assert report.recommendation.endswith(("of the full budget's.", "the full budget's but for rounding."))


def test_the_cards_figures_decide_where_there_are_some(opened: Bundle) -> None:
    card = tuple(Quality(budget={"latents": n}, accuracy=0.9, frechet_distance=f) for n, f in ((4, 30.0), (16, 10.5), (64, 10.0)))
    opened.manifest = msgspec.structs.replace(opened.manifest, quality=card)
    report, _ = run(opened, "right", settings=Settings(steps=4, duration=0.1, quality=True))
    assert report.card == card
    assert report.recommendation is not None
    assert "at latents=16 with 4 steps" in report.recommendation
    assert "10.5, where the best is 10.0" in report.recommendation


def test_a_single_stream_ends_with_its_time(opened: Bundle) -> None:
    report, _ = run(opened, "right", settings=Settings(steps=2, duration=0.1, single_stream=True))
    for row in report.runtimes[0].rows:
        stream = row.single_stream
        assert stream is not None
        assert not stream.complete
        assert 2.0 <= stream.seconds < 2.0 + 2 * stream.p90
        assert stream.p90 == pytest.approx(2 * 2 * row.step.p50, rel=0.05)


def test_a_batch_is_run_in_as_few_runs_as_the_session_takes(opened: Bundle) -> None:
    report, album = run(opened, "right", settings=Settings(batch=6, steps=2, duration=0.1))
    assert report.runtimes[0].rows[0].step.p50 == pytest.approx(6 * 0.014)
    assert len(album["latents=4"]) % 6 == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"duration": 0.0}, "more than 0, got 0"),
        ({"duration": float("nan")}, "got nan"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"guidance": 0.5}, "guidance must be 1 \\(off\\) or more"),
    ],
)
def test_settings_that_measure_nothing_are_refused(opened: Bundle, changes: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        run(opened, "right", settings=Settings(**changes))  # type: ignore[arg-type]


def test_budgets_lie_on_the_axis(opened: Bundle) -> None:
    assert points(opened) == [Budget(latents=n) for n in (4, 8, 16, 32, 64)]
    assert points(opened, [64, 4, 4]) == [Budget(latents=4), Budget(latents=64)]
    with pytest.raises(BudgetError, match="latents 65 is not available: this model offers 4-64 in steps of 4; the nearest is 64"):
        points(opened, [65])


def test_a_runtime_without_an_artifact_says_how_to_make_one(opened: Bundle) -> None:
    (only,) = runtimes("trt", opened)
    assert only.obstacle(opened) == "the bundle has no trt artifact: elastic-export trt makes one"
    assert [each.name for name in ways() for each in runtimes(name, opened)] == list(ways())


def test_another_process_tells_what_went_wrong_there_and_ends(opened: Bundle) -> None:
    pytest.importorskip("onnxruntime", reason="the process opens ONNX Runtime")
    (runtime,) = runtimes("onnxruntime", opened)
    report, album = measure(opened, [runtime], points(opened, [4]), SETTINGS)
    assert report.runtimes[0].failure is not None
    assert "ONNX Runtime cannot open" in report.runtimes[0].failure
    assert album == {}


def test_a_process_that_dies_is_a_failure_of_its_runtime(opened: Bundle) -> None:
    (runtime,) = runtimes("onnxruntime", opened)
    process = Process(runtime, opened, SETTINGS)
    process._process.kill()
    with pytest.raises(InferenceError, match="the process of onnxruntime died with exit code -9"):
        process.load()
    process.close()
    assert not process._process.is_alive()


def test_the_output_that_is_wrong_speaks_for_all(opened: Bundle) -> None:
    """Two outputs have two bounds: one passes with a larger difference than the other fails with."""
    answers = {"large": np.array([1000.0]), "small": np.array([1.0])}
    off = {"large": np.array([1000.01]), "small": np.array([1.001])}
    clock, budget = Clock(), Budget(latents=8)
    right, sly = (Entry(FakeRuntime(name, clock), start(clock)(FakeRuntime(name, clock), opened, SETTINGS)) for name in ("right", "sly"))
    for entry, outputs in ((right, answers), (sly, off)):
        entry.loaded = entry.ask("load")
        entry.first[budget] = 0.1, outputs
    _agree([right, sly])
    assert sly.failure is not None
    assert sly.failure.startswith("differs from right at latents=8: max abs error 1.00e-03 of at most 2")
    assert not sly.agrees[budget].passed


def test_the_most_exact_runtime_is_the_judge_wherever_it_stands(opened: Bundle) -> None:
    clock, budget = Clock(), Budget(latents=8)
    entries = []
    for name, precision, value in (("rough", "bf16", 1.05), ("exact", "fp32", 1.0), ("wrong", "fp32", 1.04)):
        runtime = FakeRuntime(name, clock, precision=precision)
        entry = Entry(runtime, start(clock)(runtime, opened, SETTINGS))
        loaded = entry.ask("load")
        entry.loaded = loaded._replace(tolerance=1e-1 if precision == "bf16" else 1e-5)
        entry.first[budget] = 0.1, {"prediction": np.array([value])}
        entries.append(entry)
    _agree(entries)
    assert [entry.failure is None for entry in entries] == [True, True, False]
    assert str(entries[2].failure).startswith("differs from exact at latents=8")


@pytest.mark.parametrize("kind", ["distilled", "unconditional"])
def test_what_is_drawn_without_guidance_is_told_so(opened: Bundle, kind: str) -> None:
    report, _ = run(opened, "right")
    assert (report.guidance, "with guidance 2 (two branches)." in method(SETTINGS, [report])) == (2.0, True)
    changes: dict[str, Any] = {"distilled": True} if kind == "distilled" else {"num_classes": 0, "null_label": 0}
    model = msgspec.structs.replace(opened.manifest.model, **changes)
    alone = suited(SETTINGS, Bundle(opened.folder, msgspec.structs.replace(opened.manifest, model=model)))
    assert alone.guidance == 1.0
    led_nowhere = msgspec.structs.replace(report, name="few", guidance=alone.guidance)
    assert "with no guidance." in method(SETTINGS, [led_nowhere])
    assert "with guidance 2 (two branches; none for few)." in method(SETTINGS, [report, led_nowhere])
    older = msgspec.structs.replace(report, guidance=None)
    assert "with guidance 2 (two branches)." in method(SETTINGS, [older])


def test_memory_is_asked_for_when_all_is_drawn(opened: Bundle) -> None:
    asked: list[str] = []

    class Watched(Subject):
        def draw(self, *arguments: Any) -> Any:
            asked.append("draw")
            return super().draw(*arguments)

        def memory(self) -> int:
            asked.append("memory")
            return 7

    clock, settings = Clock(), Settings(steps=1, duration=0.01, single_stream=True)

    def begin(runtime: Any, bundle: Bundle, settings: Settings) -> Subject:
        return Watched(runtime, bundle, settings, {}, clock)

    report, _ = measure(opened, [FakeRuntime("right", clock)], points(opened, [4]), settings, begin)
    assert (asked[-1], asked.count("memory"), report.runtimes[0].peak_bytes) == ("memory", 1, 7)


def test_less_than_float32_is_computed_of_what_is_float32(opened: Bundle) -> None:
    (artifact,) = opened.manifest.graphs["denoiser"].artifacts
    few, half = (
        msgspec.structs.replace(artifact, precision=name, files=(msgspec.structs.replace(artifact.files[0], path=f"onnx/{name}.onnx"),))
        for name in ("int8", "fp16")
    )
    opened.manifest = opened.manifest.joined("denoiser", [few, half])
    assert [(each.name, each.precision) for each in runtimes("openvino", opened)] == [
        ("openvino denoiser.onnx", "fp32"), ("openvino int8.onnx", "int8"), ("openvino fp16.onnx", "fp16"),
    ]  # fmt: skip
    assert [(each.name, each.precision) for each in runtimes("openvino-bf16", opened)] == [
        ("openvino-bf16 denoiser.onnx", "bf16"), ("openvino-bf16 int8.onnx", "int8"),
    ]  # fmt: skip
    graph = msgspec.structs.replace(opened.manifest.graphs["denoiser"], artifacts=(half,))
    opened.manifest = msgspec.structs.replace(opened.manifest, graphs={"denoiser": graph})
    (none,) = runtimes("openvino-bf16", opened)
    assert none.obstacle(opened) == "the bundle has no onnx artifact in fp32, of which bf16 is computed: elastic-export onnx makes one"


def test_more_steps_than_a_model_takes_are_refused_before_anything_is_measured(opened: Bundle) -> None:
    for schedule, steps in ((CosineMask(vocabulary=16), 65), (LinearBeta(beta_start=1e-4, beta_end=2e-2), 1001)):
        model = msgspec.structs.replace(opened.manifest.model, schedule=schedule)
        limited = Bundle(opened.folder, msgspec.structs.replace(opened.manifest, model=model))
        assert suited(Settings(steps=steps - 1), limited).steps == steps - 1
        with pytest.raises(UsageError, match=f"{steps - 1}.*got {steps}"):
            run(limited, "right", settings=Settings(steps=steps))


def test_runtimes_and_bundles_of_one_name_are_not_mixed_up(opened: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "peaks", lambda threads: Peaks(flops_per_second=1e9, bytes_per_second=1e9))
    other = bundle(tmp_path / "other" / "tiny").folder
    with pytest.raises(UsageError, match="two bundles have the same name, tiny, by which the report knows them"):
        room.bench([opened.folder, other], ["onnxruntime"], None, SETTINGS, "elastic-export bench")
    clock = Clock()
    monkeypatch.setattr(room, "runtimes", lambda name, bundle: [FakeRuntime(name, clock)])
    words: dict[str, Any] = {"start": start(clock), "settings": Settings(steps=2, duration=0.1, quality=True)}
    report, _ = room.bench([opened.folder], ["onnxruntime", "onnxruntime"], None, command="elastic-export bench", **words)
    assert [runtime.runtime for runtime in report.bundles[0].runtimes] == ["onnxruntime"]


@pytest.mark.skipif(not hasattr(os, "kill"), reason="this system has no signals")
def test_an_interrupt_is_for_the_process_that_measures(
    opened: Bundle, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxruntime", reason="the process opens ONNX Runtime")
    (runtime,) = runtimes("onnxruntime", opened)
    process = Process(runtime, opened, SETTINGS)
    os.kill(process._process.pid or 0, signal.SIGINT)
    with pytest.raises(ElasticError, match="ONNX Runtime cannot open"):
        process.load()
    os.kill(process._process.pid or 0, signal.SIGINT)

    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(process, "_pipe", SimpleNamespace(send=process._pipe.send, recv=interrupted))
    with pytest.raises(KeyboardInterrupt):
        process.load()
    process.close()
    assert process._process.exitcode == -9, "nobody waits for its answer"
    assert capfd.readouterr().err == ""
