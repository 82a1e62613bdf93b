"""ONNX Runtime: a stand-in tells what it is asked for on machines that are not here; the library itself runs a graph written by hand."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import fake_ort
import msgspec
import numpy as np
import pytest
from fakes import answers_stay_with_their_thread, write_bundle, write_manifest
from recordings import MACHINES
from tiny import tiny_bundle, tiny_feeds

from elastic_runtime import Bundle, BundleError, ElasticPipeline, MissingError, UsageError, open_session
from elastic_runtime.choosing.artifacts import ArtifactOpener
from elastic_runtime.contract.bundle import entry
from elastic_runtime.device import packages, thread_limit, usable_cores
from elastic_runtime.sessions import opening, ort
from elastic_runtime.sessions.ort import CPU, CUDA, limit, newest_opset

CAPTURES = {"enable_cuda_graph": 1}


@pytest.fixture(autouse=True)
def _one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is timed when a session is opened: see test_lanes.py for that."""
    monkeypatch.setattr(ort, "busy_cores", lambda threads: threads or 1)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write_bundle(tmp_path / "b")


@pytest.fixture
def tiny(tmp_path: Path) -> Bundle:
    pytest.importorskip("onnxruntime", reason="running ONNX needs ONNX Runtime")
    return tiny_bundle(tmp_path / "tiny", 23, 20)


@pytest.mark.parametrize(
    ("options", "providers"),
    [
        ({}, [(CUDA, {"use_tf32": 0, **CAPTURES}), (CPU, {})]),
        ({"device": "cpu"}, [(CPU, {})]),
        ({"device": "cuda"}, [(CUDA, {"device_id": 0, "use_tf32": 0, **CAPTURES}), (CPU, {})]),
        ({"device": "cuda:1"}, [(CUDA, {"device_id": 1, "use_tf32": 0, **CAPTURES}), (CPU, {})]),
        ({"providers": [(CUDA, {"device_id": 1})]}, [(CUDA, {"device_id": 1, "use_tf32": 0, **CAPTURES})]),
        ({"providers": [(CUDA, {"use_tf32": 1}), CPU]}, [(CUDA, {"use_tf32": 1, **CAPTURES}), (CPU, {})]),
        ({"device": "cuda", "cuda_graphs": False}, [(CUDA, {"device_id": 0, "use_tf32": 0}), (CPU, {})]),
    ],
)
def test_providers_devices_and_their_options(
    options: dict[str, Any], providers: list[Any], bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    library = fake_ort.install(monkeypatch)
    with open_session(bundle, name="ort", **options) as session:
        assert session.processor == ("cpu" if providers[0][0] == CPU else "gpu")
        assert session.where == f"onnxruntime 1.31.1 {'CPU' if providers[0][0] == CPU else 'CUDA'}"
    assert library.providers == providers
    assert library.calls == (["open"] if providers[0][0] == CPU else ["preload", "open"])
    assert capsys.readouterr().out == "", "stdout is for results"


def test_a_half_precision_artifact_is_left_the_libraries_own_arithmetic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = fake_ort.install(monkeypatch)
    opened = write_bundle(tmp_path / "b")
    graph = opened.manifest.graphs["denoiser"]
    half = type(graph.artifacts[0])(precision="fp16", files=graph.artifacts[0].files, toolchain={}, opset=23)
    opening.open_artifact(opened, "denoiser", half, "ort", device="cuda").close()
    assert library.providers[0] == (CUDA, {"device_id": 0, **CAPTURES})


def test_the_most_exact_artifact_is_opened_whichever_was_made_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_ort.install(monkeypatch)
    folder = write_bundle(tmp_path / "b").folder
    graph = (manifest := Bundle.open(folder).manifest).graphs["denoiser"]
    (exact,) = graph.artifacts
    (folder / "onnx" / "less.onnx").write_bytes((folder / exact.path).read_bytes())
    less = msgspec.structs.replace(exact, precision="int8", files=(entry(folder, folder / "onnx" / "less.onnx"),))
    both = msgspec.structs.replace(graph, artifacts=(less, exact))
    write_manifest(folder, msgspec.structs.replace(manifest, graphs=manifest.graphs | {"denoiser": both}))
    with open_session(Bundle.open(folder), name="ort", device="cpu") as session:
        assert session.origin
        assert session.origin.artifact.precision == "fp32"
    for options, precisions, opened in (({"device": "cpu"}, (), "fp32"), ({}, (), "fp32"), ({}, "int8", "int8")):
        with ElasticPipeline.from_pretrained(folder, "ort", precisions, **options) as pipe:
            origin = pipe.session("denoiser").origin
            assert origin
            assert origin.artifact.precision == opened


def test_the_fastest_is_found_once_for_all_graphs_also_where_it_cannot_be_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_ort.install(monkeypatch)
    opened, measured = write_bundle(tmp_path / "b"), list[str]()
    monkeypatch.setattr("elastic_runtime.choosing.artifacts.fastest", lambda bundle, graph, *_: measured.append(graph))
    opener = ArtifactOpener(opened, None, (), 0.99, {})
    for _ in range(3):
        opener("denoiser").close()
    assert measured == ["denoiser"]


def test_rows_that_are_rounded_by_their_run_have_one_of_their_own_on_a_gpu_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = fake_ort.install(monkeypatch)
    opened = write_bundle(tmp_path / "b")
    less = msgspec.structs.replace(opened.manifest.graphs["denoiser"].artifacts[0], precision="int8")
    feeds = {
        "sample": np.zeros((2, 4, 8, 8), np.float32), "timestep": np.array([0.1, 0.9], np.float32), "class_labels": np.zeros(2, np.int64),
        "latent_ids": np.arange(1),
    }  # fmt: skip
    with opening.open_artifact(opened, "denoiser", less, "ort", device="cuda") as session:
        rows = session.run(feeds)["prediction"][:, 0, 0, 0]
    assert rows.tolist() == pytest.approx([0.1, 0.9])  # and not the sum of both
    assert library.runs == ["plain", "plain"]


@pytest.mark.parametrize("error", [None, RuntimeError("CUDA failure 100: no CUDA-capable device is detected")])
@pytest.mark.parametrize("asked", [{"device": "cuda"}, {"providers": [CUDA]}])
def test_cuda_that_does_not_come_up_is_no_cpu_in_disguise(
    asked: dict[str, Any], error: Exception | None, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_ort.install(monkeypatch, up=(CPU,), error=error)
    with pytest.raises(MissingError, match=r"CUDAExecutionProvider.*CUDA libraries did not load.*pip install 'elastic-export\[ort-gpu\]'"):
        open_session(bundle, name="ort", **asked)


@pytest.mark.parametrize("error", [None, RuntimeError("CUDA failure 100: no CUDA-capable device is detected")])
def test_cuda_that_nobody_asked_for_is_done_without_and_the_log_says_so(
    error: Exception | None, bundle: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake_ort.install(monkeypatch, up=(CPU,), error=error)
    with open_session(bundle, name="ort") as session:
        assert session.processor == "cpu"
        assert session.where.endswith("CPU")
    assert "pip install 'elastic-export[ort-gpu]'" in caplog.text


def test_a_wish_that_cannot_be_is_answered_with_what_can(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_ort.install(monkeypatch)
    with pytest.raises(UsageError, match="device is cpu, cuda or cuda:N, got 'gpu'"):
        open_session(bundle, name="ort", device="gpu")
    with pytest.raises(UsageError, match="give device or providers, not both"):
        open_session(bundle, name="ort", device="cpu", providers=[CPU])
    with pytest.raises(UsageError, match="providers is empty"):
        open_session(bundle, name="ort", providers=[])
    for providers in (CUDA, [(CUDA, "device_id=1")], (CUDA, {"device_id": 1}), [7]):
        with pytest.raises(UsageError, match="providers is a list, of names or pairs of name and options"):
            open_session(bundle, name="ort", providers=providers)
    with pytest.raises(MissingError, match="no AbacusExecutionProvider; it has CUDAExecutionProvider, CPUExecutionProvider"):
        open_session(bundle, name="ort", providers=[("AbacusExecutionProvider", {})])


@pytest.mark.parametrize(("machine", "threads"), [("container-v2", 1), ("slice-v2", 0), ("container-v1", 2), ("xeon", 0), ("windows", 0)])
def test_threads_are_those_that_the_container_leaves(machine: str, threads: int, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    library = fake_ort.install(monkeypatch)
    monkeypatch.setattr(ort, "thread_limit", lambda: thread_limit(MACHINES[machine]))
    open_session(bundle, name="ort").close()
    assert library.threads == threads
    open_session(bundle, name="ort", threads=3).close()
    assert library.threads == 3


def test_usable_cores_are_whole_and_at_least_one() -> None:
    assert [usable_cores(MACHINES[name]) for name in ("xeon", "container-v2", "container-v1", "m1")] == [8, 1, 2, 4]
    assert usable_cores() >= 1


@pytest.mark.parametrize(
    ("version", "newest"),
    [("1.17.3", 0), ("1.18.0", 21), ("1.20.1", 21), ("1.22.0", 22), ("1.23.0", None), ("1.31.1", None)],
)
def test_what_a_version_opens(version: str, newest: int | None) -> None:
    assert newest_opset(version) == newest
    assert (limit(version) is None) == (newest is None)


def test_an_old_version_opens_the_artifact_that_it_can(tiny: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def at(version: str) -> None:
        monkeypatch.setattr(packages.Package, "version", lambda self, sources=None: version)

    at("1.22.0")
    with open_session(tiny, name="ort") as session:
        assert session.origin is not None
        assert session.origin.artifact.path == "onnx/denoiser.opset20.onnx"
    first = tiny.manifest.graphs["denoiser"].artifacts[0]
    with pytest.raises(MissingError, match=r"opset 23 needs onnxruntime >= 1.23, and here is 1.22.0: pip install -U onnxruntime"):
        opening.open_artifact(tiny, "denoiser", first, "ort")
    assert list(opening.limits({"onnxruntime": "1.20.1", "openvino": "2026.4"})) == [
        "onnxruntime 1.20.1 opens opsets up to 21, and exports have 23 unless made with --opset 20: pip install -U onnxruntime"
    ]
    at("1.31.1")
    with open_session(tiny, name="ort") as session:
        assert session.origin is not None
        assert session.origin.artifact.path == "onnx/denoiser.opset23.onnx"


def test_each_thread_gets_its_own_answer(tiny: Bundle) -> None:
    with open_session(tiny, name="ort", threads=2) as session:
        given = [tiny_feeds(1 + k % 4, 1 + k) for k in range(8)]
        answers_stay_with_their_thread(lambda k: session.run(given[k])["prediction"], lambda k: given[k]["sample"] + 1 + k)


def test_a_file_that_is_no_graph_is_damaged_whatever_the_provider(bundle: Bundle) -> None:
    pytest.importorskip("onnxruntime", reason="running ONNX needs ONNX Runtime")
    with pytest.raises(BundleError, match=r"ONNX Runtime cannot open .*denoiser\.onnx"):
        open_session(bundle, name="ort", device="cpu")


@pytest.mark.parametrize(("given", "left"), [(None, "1"), ("0", "0")])
def test_no_telemetry_unless_the_user_wants_it(given: str | None, left: str, tiny: Bundle, tmp_path: Path) -> None:
    """The library decides when it is imported, and keeps an identifier of the device in the user's folders where it may report."""
    program = """
import builtins, os, sys, time
from elastic_runtime import Bundle, open_session
seen, real = [], builtins.__import__
def watched(name, *more):
    if name == "onnxruntime" and not seen:
        seen.append(os.environ.get("ORT_DISABLE_TELEMETRY"))
    return real(name, *more)
builtins.__import__ = watched
with open_session(Bundle.open(sys.argv[1]), name="ort"):
    time.sleep(0.5)
print(*seen)
"""
    home = tmp_path / "home"
    home.mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    environment |= {"HOME": str(home), "XDG_CACHE_HOME": str(home)} | ({"ORT_DISABLE_TELEMETRY": given} if given else {})
    done = subprocess.run([sys.executable, "-c", program, str(tiny.folder)], capture_output=True, text=True, check=False, env=environment)
    assert done.stdout.split() == [left], done.stderr
    if left == "1":
        assert list(home.rglob("*")) == []


def test_an_option_that_a_backend_has_not_is_answered_with_those_it_has(tiny: Bundle) -> None:
    with pytest.raises(UsageError, match="sessions of ort have no option spining; they have providers, device, threads, spinning, lanes, "):
        open_session(tiny, name="ort", spining=False)


def test_a_decoder_of_some_size_has_no_arena(tiny: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = tiny.manifest.graphs
    both = {**graphs, "decoder": msgspec.structs.replace(graphs["denoiser"])}
    bundle = Bundle(tiny.folder, msgspec.structs.replace(tiny.manifest, graphs=both))
    for bound in (1, 1 << 30):
        monkeypatch.setattr(ort, "MIDDLING", bound)
        for graph, arena in (("denoiser", True), ("decoder", bound > 1)):
            with open_session(bundle, graph, "ort") as session:
                assert session._session.get_session_options().enable_cpu_mem_arena == arena  # type: ignore[attr-defined]
