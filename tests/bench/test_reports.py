"""The report as a file, and two of them side by side."""

import json
from pathlib import Path

import msgspec
import pytest
from bench_fakes import Clock, FakeRuntime, bundle, start
from hypothesis import given
from hypothesis import strategies as st

from elastic_bench.compare import changes, other_machine, other_models
from elastic_bench.files import read
from elastic_bench.machine import machine
from elastic_bench.measure import measure, points
from elastic_bench.records import Peaks, Report, Row, RuntimeReport, Settings, decode, encode
from elastic_bench.statistics import summarize
from elastic_runtime import UsageError
from elastic_runtime.files.atomic import refuse_clobber, save

SETTINGS = Settings(steps=2, duration=0.1, quality=True)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    clock, opened = Clock(), bundle(tmp_path_factory.mktemp("bench") / "tiny")
    runtimes = [FakeRuntime("one", clock), FakeRuntime("two", clock, base=0.03), FakeRuntime("three", clock, "absent")]
    bundle_report, _ = measure(opened, runtimes, points(opened), SETTINGS, start(clock))
    peaks = Peaks(flops_per_second=1e9, bytes_per_second=1e9)
    return Report(
        schema_version=1, created="2026-01-01", command="elastic-export bench tiny", machine=machine(), peaks=peaks,
        energy={"RAPL": "absent: no"}, settings=SETTINGS, bundles=(bundle_report,),
    )  # fmt: skip


def timed(report: Report, factor: float, wobble: float = 0.0) -> Report:
    """The report with the second runtime's times multiplied, and its rounds apart by `wobble`."""

    def row(old: Row) -> Row:
        rounds = tuple(tuple(factor * s * (1 + wobble * (-1) ** i * (i + 1) / 10) for s in one) for i, one in enumerate(old.rounds))
        return msgspec.structs.replace(old, rounds=rounds, step=summarize(rounds))

    one, two, three = report.bundles[0].runtimes
    other = msgspec.structs.replace(two, rows=tuple(map(row, two.rows)))
    return msgspec.structs.replace(report, bundles=(msgspec.structs.replace(report.bundles[0], runtimes=(one, other, three)),))


def test_a_report_reads_back_as_it_was_and_holds_every_sample(report: Report, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "report.json"
    save(path, encode(report))
    assert read(path) == report
    plain = json.loads(path.read_text())
    rows = plain["bundles"][0]["runtimes"][0]["rows"]
    assert sum(len(one) for one in rows[0]["rounds"]) == rows[0]["step"]["count"]
    assert plain["bundles"][0]["runtimes"][2]["missing"] == "it is not installed: pip install it"
    assert [each.name for each in path.parent.iterdir()] == ["report.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda plain: plain.update(schema_version=2), r"schema_version 2; this version reads 1: upgrade with: pip install"),
        (lambda plain: plain.pop("schema_version"), r"schema_version None.*measure again"),
        (lambda plain: plain.update(colour="red"), r"not a valid benchmark report.*unknown field `colour`"),
        (lambda plain: plain.pop("peaks"), r"missing required field `peaks`.*Measure again"),
        (lambda plain: plain["settings"].update(batch="one"), r"Expected `int`, got `str`.*settings.batch"),
    ],
)
def test_a_report_is_read_strictly(report: Report, change: object, message: str) -> None:
    plain = json.loads(encode(report))
    change(plain)  # type: ignore[operator]
    with pytest.raises(UsageError, match=message):
        decode(json.dumps(plain).encode(), "report.json")


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff"])
def test_what_is_no_report_is_said_to_be_none(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(UsageError, match=r"x\.json is not a benchmark report"):
        read(tmp_path / "x.json")


def test_files_are_not_clobbered_and_absent_ones_are_named(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("old")
    refuse_clobber(tmp_path / "x.json", overwrite=True)
    with pytest.raises(UsageError, match=r"x\.json exists: .*--overwrite"):
        refuse_clobber(tmp_path / "x.json", overwrite=False)
    with pytest.raises(UsageError, match="is a folder"):
        refuse_clobber(tmp_path, overwrite=True)
    with pytest.raises(UsageError, match=r"cannot read .*none\.json \(No such file or directory\): make it with"):
        read(tmp_path / "none.json")
    with pytest.raises(UsageError, match="cannot write"):
        save(tmp_path / "x.json" / "y.json", b"")


def verdicts(old: Report, new: Report, tolerance: float) -> set[str]:
    return {change.verdict for change in changes(old, new, tolerance) if change.place[1] == "two"}


@given(st.floats(0.2, 5.0), st.floats(0.0, 0.5))
def test_a_quiet_machine_sees_every_change_beyond_the_tolerance(report: Report, factor: float, tolerance: float) -> None:
    wanted = "slower" if factor > 1 + tolerance else "faster" if factor < 1 / (1 + tolerance) else "same"
    if min(abs(factor - 1 - tolerance), abs(factor - 1 / (1 + tolerance))) < 1e-6:
        return
    assert verdicts(report, timed(report, factor), tolerance) == {wanted}
    assert {change.verdict for change in changes(report, timed(report, factor), tolerance) if change.place[1] == "one"} == {"same"}


def test_noise_hides_a_small_change_and_not_a_large_one(report: Report) -> None:
    old = timed(report, 1.0, wobble=0.5)
    assert verdicts(old, timed(report, 1.12, wobble=0.5), 0.05) == {"same"}
    assert verdicts(timed(report, 1.0), timed(report, 1.12), 0.05) == {"slower"}
    assert verdicts(old, timed(report, 4.0, wobble=0.5), 0.05) == {"slower"}


def test_a_row_that_was_lost_says_why_and_a_new_one_is_none_of_the_worse(report: Report) -> None:
    one, two, three = report.bundles[0].runtimes
    failed = msgspec.structs.replace(two, rows=(), failure="wrong at latents=4")
    new = msgspec.structs.replace(report, bundles=(msgspec.structs.replace(report.bundles[0], runtimes=(one, failed, three)),))
    lost = [change for change in changes(report, new, 0.05) if change.verdict == "lost"]
    assert [change.place for change in lost] == [("tiny", "two", f"latents={n}") for n in (4, 8, 16, 32, 64)]
    assert {change.why for change in lost} == {"wrong at latents=4"}
    assert {change.verdict for change in changes(new, report, 0.05)} == {"same", "new"}
    nothing = tuple(msgspec.structs.replace(each, rows=(), failure="wrong at latents=4") for each in (one, two, three))
    gone = msgspec.structs.replace(report, bundles=(msgspec.structs.replace(report.bundles[0], runtimes=nothing),))
    assert {(change.verdict, change.why) for change in changes(report, gone, 0.05)} == {("lost", "wrong at latents=4")}


def test_reports_of_something_else_do_not_compare(report: Report) -> None:
    other = msgspec.structs.replace(report, settings=msgspec.structs.replace(report.settings, batch=2))
    with pytest.raises(UsageError, match="batch was 1 and is 2"):
        changes(report, other, 0.05)
    with pytest.raises(UsageError, match="no bundle, runtime and budget is in both"):
        changes(report, msgspec.structs.replace(report, bundles=()), 0.05)
    with pytest.raises(UsageError, match="the tolerance is a share"):
        changes(report, report, -1)
    assert other_machine(report, report) is None
    moved = msgspec.structs.replace(report, machine=msgspec.structs.replace(report.machine, cores=99))
    assert "99-core" in str(other_machine(report, moved))


def test_a_runtime_is_the_same_beside_an_artifact_that_was_added(report: Report) -> None:
    (only,) = report.bundles
    one = only.runtimes[0]

    def of(*runtimes: RuntimeReport, **changes: str) -> Report:
        return msgspec.structs.replace(report, bundles=(msgspec.structs.replace(only, runtimes=runtimes, **changes),))

    before = of(msgspec.structs.replace(one, runtime="onnxruntime", artifact="onnx/denoiser.onnx"))
    same = msgspec.structs.replace(one, runtime="onnxruntime denoiser.onnx", artifact="onnx/denoiser.onnx")
    added = msgspec.structs.replace(one, runtime="onnxruntime half.onnx", artifact="onnx/half.onnx")
    differences = changes(before, of(same, added), 0.05)
    assert [change.verdict for change in differences] == ["same"] * 5 + ["new"] * 5
    assert {change.place[:2] for change in differences if change.verdict == "new"} == {("tiny", "onnxruntime half.onnx")}
    gone = msgspec.structs.replace(one, runtime="onnxruntime", artifact=None, rows=(), missing="the bundle has no onnx artifact")
    assert {(change.verdict, change.why) for change in changes(before, of(gone), 0.05)} == {("lost", "the bundle has no onnx artifact")}


def test_bundles_of_one_name_that_hold_other_models_are_told_of(report: Report) -> None:
    def of(**facts: str) -> Report:
        return msgspec.structs.replace(report, bundles=(msgspec.structs.replace(report.bundles[0], **facts),))

    assert other_models(report, report) == []
    assert other_models(report, of(model="huge")) == [f"tiny held {report.bundles[0].model}, and now huge"]
    assert other_models(report, of(weights="0" * 64)) == [
        f"tiny held {report.bundles[0].model}, and now {report.bundles[0].model} of other weights"
    ]
