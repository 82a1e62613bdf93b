"""Measuring, keeping what was measured, and choosing between runtimes."""

import json
import logging
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from fakes import decoder_graph, write_bundle
from recordings import MACHINES
from simulated import Machine, described, pipeline, run_seconds, session

from elastic_runtime import Budget, Bundle, ElasticPipeline, FakeSession, probe
from elastic_runtime.choosing.artifacts import ArtifactOpener
from elastic_runtime.choosing.calibration import fastest, folder, identity, points, rates
from elastic_runtime.choosing.estimates import Gauge
from elastic_runtime.choosing.goals import FLOOR
from elastic_runtime.contract.artifacts import CoremlArtifact, FileEntry, OnnxArtifact
from elastic_runtime.device import peak
from elastic_runtime.errors import ElasticError, InferenceError, MissingError, UsageError
from elastic_runtime.sessions import opening
from elastic_runtime.sessions.backend import Backend, Way
from elastic_runtime.sessions.session import Origin


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_waiting_for_another_thread_that_measures_is_measuring() -> None:
    measuring, done, spent = threading.Event(), threading.Event(), []

    def finish() -> None:
        measuring.set()
        assert done.wait(30)

    gauge = Gauge(session(Machine()), described(), finish, time.perf_counter, device=lambda: probe(MACHINES["xeon"]))
    first = threading.Thread(target=lambda: gauge.costs)
    second = threading.Thread(target=lambda: spent.append((gauge.costs, gauge.spent)[1]))
    first.start()
    assert measuring.wait(30)
    second.start()
    time.sleep(0.1)
    done.set()
    first.join()
    second.join()
    assert spent[0] > 0.05


def test_a_decoder_that_changes_is_measured_anew() -> None:
    def of(digest: str) -> Any:
        file = FileEntry(path="onnx/decoder.onnx", sha256=digest, bytes=1)
        artifact = OnnxArtifact(precision="fp32", files=(file,), toolchain={}, opset=23)
        decoder = msgspec.structs.replace(decoder_graph(), artifacts=(artifact,))
        whole = msgspec.structs.replace(described(), graphs=described().graphs | {"decoder": decoder})
        return identity(session(Machine()), whole, probe(MACHINES["xeon"]))

    assert of("a" * 64) == of("a" * 64) != of("b" * 64)


BUDGETS = [Budget(latents=n) for n in range(4, 65, 4)]


def test_the_ends_and_the_middle_are_measured_in_both_batches_of_guidance() -> None:
    machine = Machine()
    measurements = points(session(machine), described(), BUDGETS, machine.clock)
    assert {(point.budget["latents"], point.batch) for point in measurements} == {(n, b) for n in (4, 32, 64) for b in (1, 2)}
    for point in measurements:
        assert point.seconds == pytest.approx(run_seconds(point.budget["latents"], point.batch))


def test_a_slow_machine_is_measured_at_two_budgets_at_least() -> None:
    machine, budgets = Machine(slowness=lambda now: 10_000.0), [Budget(latents=n) for n in (4, 48, 64)]
    measurements = points(session(machine), described(), budgets, machine.clock)
    assert len({point.budget["latents"] for point in measurements}) == 2


def test_what_is_busy_now_and_then_is_left_out() -> None:
    machine = Machine()
    machine.slowness = lambda now: 10.0 if int(now * 100) % 3 == 0 else 1.0
    for point in points(session(machine), described(), BUDGETS, machine.clock):
        assert point.seconds == pytest.approx(run_seconds(point.budget["latents"], point.batch))


def test_a_calibration_is_kept_and_used_by_the_next_process() -> None:
    machine = Machine()
    first = pipeline(machine).gauge.calibrated
    begun = machine.now
    assert pipeline(machine).gauge.calibrated == first
    assert machine.now == begun
    (kept,) = folder().iterdir()
    assert json.loads(kept.read_text())["identity"]["device"]["cpu"] == "Intel(R) Xeon(R) Platinum 8488C"


@pytest.mark.parametrize("other", ["container-v2", "orin-nano", "orin-nano-super"])
def test_another_device_or_power_mode_has_another(other: str) -> None:
    pipeline(Machine()).gauge.calibrated  # noqa: B018
    pipeline(Machine(), recording=other).gauge.calibrated  # noqa: B018
    assert len(list(folder().iterdir())) == 2


def test_options_versions_and_files_tell_calibrations_apart(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle")
    artifact, device = bundle.manifest.graphs["denoiser"].artifacts[0], probe(MACHINES["xeon"])
    seen = []
    for where, options in (("runtime 1", {}), ("runtime 2", {}), ("runtime 1", {"threads": 2})):
        fake = session(Machine())
        fake.where, fake.origin = where, Origin(artifact, "ort", options)
        seen.append(json.dumps(identity(fake, bundle.manifest, device), sort_keys=True))
    assert len(set(seen)) == 3
    assert artifact.files[0].sha256 in seen[0]


def test_a_session_is_rated_by_the_processor_that_it_runs_on() -> None:
    device, fake = probe(MACHINES["rtx-4090"]), session(Machine())
    assert rates(fake, device).flops == peak(device, "cpu").flops["fp32"]
    fake.processor = "gpu"  # whatever the backend: OpenVINO has GPUs too
    assert rates(fake, device).flops == peak(device, "gpu").flops["fp32"]
    fake.processor = "npu"  # of which nothing better is known
    assert rates(fake, device).flops == peak(device, "gpu").flops["fp32"]
    assert rates(fake, probe(MACHINES["xeon"])).flops == peak(probe(MACHINES["xeon"]), "cpu").flops["fp32"]


@pytest.mark.parametrize("damage", ["truncated", "other", "empty", "binary", "negative", "later"])
def test_a_damaged_calibration_is_made_again_and_the_log_says_so(damage: str, caplog: pytest.LogCaptureFixture) -> None:
    machine = Machine()
    first = pipeline(machine).gauge.calibrated
    (path,) = folder().iterdir()
    whole = path.read_text()
    content = {
        "truncated": whole[:100],
        "other": whole.replace("Xeon", "Neox"),
        "empty": "",
        "binary": "\0\xff",
        "negative": whole.replace('"seconds": 0.', '"seconds": -0.'),
        "later": whole.replace('"version": 1', '"version": 2'),
    }[damage]
    path.write_text(content)
    with caplog.at_level(logging.WARNING):
        again = pipeline(machine).gauge.calibrated
    assert "measured again" in caplog.text
    assert [point.budget for point in again.points] == [point.budget for point in first.points]
    assert all(point.seconds > 0 for point in again.points)
    caplog.clear()
    assert pipeline(machine).gauge.calibrated == again
    assert caplog.text == ""


def test_a_cache_that_cannot_be_written_is_said_and_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert pipeline(Machine()).gauge.calibrated.points
    assert "cannot be written" in caplog.text


class Room:
    """A backend whose sessions run on a machine `slowness` times as slow, and in bfloat16 three times as fast as that, twice in int8."""

    def __init__(self, name: str, machine: Machine, slowness: float, broken: bool = False):
        self.record = Backend(name, ("onnx",), lambda artifact: None, self.open, {})
        self.machine, self.factor, self.broken, self.opened = machine, slowness, broken, 0

    def open(self, bundle: Bundle, graph: Any, artifact: Any, **options: Any) -> FakeSession:
        if self.broken:
            raise InferenceError("the driver is too old")
        self.opened += 1
        fake = session(self.machine)
        run, factor = fake._function, self.factor / (3 if options.get("precision") == "bf16" else 2 if artifact.precision == "int8" else 1)

        def slowly(feeds: Any) -> Any:
            begun = self.machine.now
            outputs = run(feeds)
            self.machine.now = begun + (self.machine.now - begun) * factor
            return outputs

        fake._function = slowly
        return fake


def rooms(monkeypatch: pytest.MonkeyPatch, *given: Room) -> None:
    monkeypatch.setattr(opening, "backends", lambda: iter([room.record for room in given]))


def test_the_fastest_runtime_is_measured_once_and_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine, bundle = Machine(), write_bundle(tmp_path / "bundle", channels=1)
    slow, fast = Room("slow", machine, 2.0), Room("fast", machine, 1.0)
    rooms(monkeypatch, slow, fast)
    (exact,) = bundle.manifest.graphs["denoiser"].artifacts
    device = lambda: probe(MACHINES["xeon"])  # noqa: E731
    assert fastest(bundle, "denoiser", device, machine.clock) == Origin(exact, "fast", {})
    opened = slow.opened + fast.opened
    assert fastest(bundle, "denoiser", device, machine.clock) == Origin(exact, "fast", {})
    assert slow.opened + fast.opened == opened
    with ElasticPipeline.from_pretrained(bundle, "slow") as pipe:
        assert pipe.gauge.session.origin is not None
        assert pipe.gauge.session.origin.backend == "slow"


@pytest.mark.parametrize(("error", "again"), [(InferenceError("the GPU is full"), True), (MissingError("no such instructions"), False)])
def test_what_fails_to_open_for_once_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: ElasticError, again: bool
) -> None:
    machine, bundle = Machine(), write_bundle(tmp_path / "bundle", channels=1)
    slow, fast = Room("slow", machine, 2.0), Room("fast", machine, 1.0)
    opens = fast.open

    def fails(*words: Any, **options: Any) -> FakeSession:
        raise error

    fast.record = replace(fast.record, open=fails)
    rooms(monkeypatch, slow, fast)
    device = lambda: probe(MACHINES["xeon"])  # noqa: E731
    first = fastest(bundle, "denoiser", device, machine.clock)
    assert first is not None
    assert first.backend == "slow"
    fast.record = replace(fast.record, open=opens)
    second = fastest(bundle, "denoiser", device, machine.clock)
    assert second is not None
    assert second.backend == ("fast" if again else "slow")


def test_a_session_that_fell_back_on_another_processor_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine, bundle = Machine(), write_bundle(tmp_path / "bundle", channels=1)
    sturdy, full = Room("sturdy", machine, 2.0), Room("full", machine, 1.0)
    opens = full.open

    def falls_back(*words: Any, **options: Any) -> FakeSession:
        made = opens(*words, **options)
        made.fell_back = True
        return made

    full.record = replace(full.record, open=falls_back)
    rooms(monkeypatch, sturdy, full)
    for times in (1, 2):
        fastest(bundle, "denoiser", lambda: probe(MACHINES["xeon"]), machine.clock)
        assert sturdy.opened == times


def test_threads_that_open_graphs_at_once_measure_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine, bundle = Machine(), write_bundle(tmp_path / "bundle", channels=1)
    one, other = Room("one", machine, 2.0), Room("other", machine, 1.0)
    measuring, done, at_once = threading.Event(), threading.Event(), one.open

    def slowly(*words: Any, **options: Any) -> FakeSession:
        measuring.set()
        assert done.wait(30)
        return at_once(*words, **options)

    one.record = replace(one.record, open=slowly)
    rooms(monkeypatch, one, other)
    opener = ArtifactOpener(bundle, None, (), FLOOR, {})
    threads = [threading.Thread(target=opener, args=("denoiser",)) for _ in range(2)]
    threads[0].start()
    assert measuring.wait(30)
    threads[1].start()
    time.sleep(0.1)
    done.set()
    for thread in threads:
        thread.join()
    assert one.opened + other.opened == 2 + 2, "each measured once, and what each thread opened"


def test_a_single_runtime_is_no_choice_and_one_that_fails_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    machine, bundle = Machine(), write_bundle(tmp_path / "bundle", channels=1)
    (exact,) = bundle.manifest.graphs["denoiser"].artifacts
    device = lambda: probe(MACHINES["xeon"])  # noqa: E731
    rooms(monkeypatch, Room("only", machine, 1.0))
    assert fastest(bundle, "denoiser", device, machine.clock) is None
    rooms(monkeypatch, Room("broken", machine, 1.0, broken=True), Room("whole", machine, 3.0))
    assert fastest(bundle, "denoiser", device, machine.clock) == Origin(exact, "whole", {})
    assert "the driver is too old" in caplog.text
    rooms(monkeypatch, Room("one", machine, 1.0, broken=True), Room("two", machine, 1.0, broken=True))
    with pytest.raises(InferenceError, match="the driver is too old"):
        fastest(bundle, "denoiser", device, machine.clock)


def test_fewer_bits_never_win_by_their_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine, bundle = Machine(), write_bundle(tmp_path / "bundle", channels=1)
    graph = bundle.manifest.graphs["denoiser"]
    (exact,) = graph.artifacts
    half = msgspec.structs.replace(
        exact, precision="fp16", files=(msgspec.structs.replace(exact.files[0], path="onnx/denoiser.fp16.onnx"),)
    )
    palette = CoremlArtifact(
        precision="fp16", package="coreml/denoiser.mlpackage", files=exact.files, toolchain={}, deployment_target="iOS18", shapes="range",
        batch=graph.batch, calls=(), reductions="fp32",
    )  # fmt: skip
    device = lambda: probe(MACHINES["xeon"])  # noqa: E731
    slow, fast = Room("slow", machine, 2.0), Room("fast", machine, 1.0)
    fast.record = replace(fast.record, opens=("coreml",))
    rooms(monkeypatch, slow, fast)

    def chosen(*artifacts: Any) -> tuple[str, str] | None:
        bundle.manifest.graphs["denoiser"] = msgspec.structs.replace(graph, artifacts=artifacts)
        best = fastest(bundle, "denoiser", device, machine.clock)
        return (best.backend, best.artifact.path) if best else None

    assert chosen(half, palette) == ("fast", palette.package)
    opened = fast.opened
    assert chosen(half, msgspec.structs.replace(palette, compression="palette4")) == ("slow", half.path)
    assert chosen(exact, half) == ("slow", exact.path)
    assert fast.opened == opened, "what cannot be chosen is not measured"


def test_a_way_to_compute_in_less_competes_where_its_precision_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine, bundle = Machine(), write_bundle(tmp_path / "bundle", channels=1)
    slow, fast = Room("slow", machine, 3.0), Room("fast", machine, 2.0)
    slow.record = replace(slow.record, ways={"slow": Way("cpu"), "quick": Way("cpu", {"precision": "bf16"}, precision="bf16")})
    rooms(monkeypatch, slow, fast)
    device = lambda: probe(MACHINES["xeon"])  # noqa: E731
    best = [fastest(bundle, "denoiser", device, machine.clock, precisions) for precisions in (None, ("fp32",), ("fp32", "bf16"))]
    assert [(each.backend, each.precision) for each in best if each] == [("fast", "fp32"), ("fast", "fp32"), ("slow", "bf16")]
    with ElasticPipeline.from_pretrained(bundle, precisions="bf16") as pipe:
        origin = pipe.session("denoiser").origin
    assert origin is not None
    assert (origin.backend, origin.precision, origin.artifact.precision) == ("slow", "bf16", "fp32")


@pytest.mark.parametrize("words", [{"backend": "room"}, {"threads": 2}, {"backend": "room", "threads": 2}])
@pytest.mark.parametrize("turned", [False, True])
def test_the_fastest_of_named_precisions_is_measured_whatever_else_is_named(
    words: dict[str, Any], turned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine, bundle = Machine(), write_bundle(tmp_path / "bundle", channels=1)
    graph = bundle.manifest.graphs["denoiser"]
    exact = graph.artifacts[0]
    file = msgspec.structs.replace(exact.files[0], path="onnx/denoiser.int8.onnx")
    few = msgspec.structs.replace(exact, precision="int8", files=(file,))
    artifacts = (few, exact) if turned else (exact, few)
    bundle.manifest.graphs["denoiser"] = msgspec.structs.replace(graph, artifacts=artifacts)
    rooms(monkeypatch, Room("room", machine, 2.0))
    monkeypatch.setattr("elastic_runtime.choosing.artifacts.time", SimpleNamespace(perf_counter=machine.clock))
    with ElasticPipeline.from_pretrained(bundle, precisions=("fp32", "int8"), **words) as pipe:
        origin = pipe.session("denoiser").origin
    assert origin is not None
    assert origin.artifact.precision == "int8"
    assert origin.options == {name: value for name, value in words.items() if name == "threads"}


def test_few_bits_are_computed_beside_bfloat16_where_both_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine, bundle = Machine(), write_bundle(tmp_path / "bundle", channels=1)
    graph = bundle.manifest.graphs["denoiser"]
    few = msgspec.structs.replace(graph.artifacts[0], precision="int8")
    bundle.manifest.graphs["denoiser"] = msgspec.structs.replace(graph, artifacts=(few,))
    room = Room("room", machine, 1.0)
    room.record = replace(room.record, ways={"room": Way("cpu"), "quick": Way("cpu", {"precision": "bf16"}, precision="bf16")})
    rooms(monkeypatch, room)
    device = lambda: probe(MACHINES["xeon"])  # noqa: E731
    for _ in range(2):  # measured, then remembered
        alone = fastest(bundle, "denoiser", device, machine.clock, ("fp32", "int8"))
        both = fastest(bundle, "denoiser", device, machine.clock, ("bf16", "int8"))
        assert alone is not None
        assert both is not None
        assert (alone.precisions, alone.options) == (("int8",), {})
        assert (both.precisions, both.precision, both.rank) == (("int8", "bf16"), "int8", few.rank)
        assert both.options == {"precision": "bf16"}
    with pytest.raises(UsageError, match="has its denoiser in int8, and none in bf16"):
        ElasticPipeline.from_pretrained(bundle, precisions="bf16")


def test_a_precision_that_is_there_and_cannot_run_here_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine, bundle = Machine(), write_bundle(tmp_path / "bundle", channels=1)
    graph = bundle.manifest.graphs["denoiser"]
    half = msgspec.structs.replace(graph.artifacts[0], precision="bf16")
    bundle.manifest.graphs["denoiser"] = msgspec.structs.replace(graph, artifacts=(*graph.artifacts, half))
    room = Room("room", machine, 1.0)
    room.record = replace(room.record, obstacle=lambda artifact: "it has no kernels for it" if artifact.precision == "bf16" else None)
    rooms(monkeypatch, room)
    with pytest.raises(MissingError, match="nothing here can run 'denoiser' of .* in bf16. room: it has no kernels for it"):
        ElasticPipeline.from_pretrained(bundle, precisions="bf16")
    with pytest.raises(UsageError, match="has its denoiser in fp32, bf16, and none in fp16: export it so, too"):
        ElasticPipeline.from_pretrained(bundle, precisions="fp16")


def test_measuring_runs_the_denoiser_as_pictures_do() -> None:
    fake = session(Machine())
    seen: list[tuple[int, ...]] = []
    run = fake._function
    fake._function = lambda feeds: seen.append(feeds["sample"].shape) or run(feeds)
    points(fake, described(), BUDGETS, Machine().clock)
    assert {shape[0] for shape in seen} == {1, 2}
