"""The TensorRT session against recording stand-ins: what it asks of the library and of CUDA, in which order, and what it refuses.

No GPU took part: `make gpu-check` is for that.
"""

import hashlib
import sys
from pathlib import Path
from typing import Any

import fake_gpu
import msgspec
import numpy as np
import pytest
from engines import BUCKETS, COMPATIBLE, VERSION, feeds, profile, trt_bundle
from fakes import answers_stay_with_their_thread

from elastic_runtime import Budget, InferenceError, MissingError, Span, open_session
from elastic_runtime.choosing.calibration import offered
from elastic_runtime.contract.artifacts import Apart, FileEntry, Profile, Range, TensorSpec
from elastic_runtime.contract.bundle import entry
from elastic_runtime.contract.reference import pack
from elastic_runtime.errors import BundleError
from elastic_runtime.sessions.apart import ROWS
from elastic_runtime.sessions.checking import check
from elastic_runtime.sessions.trt import built


def test_one_context_a_profile_shares_scratch_and_buffers_and_is_made_when_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = fake_gpu.install(monkeypatch)
    with open_session(trt_bundle(tmp_path)) as session:
        assert not gpu.named("create_context")
        for latents in (3, 8, 4, 16, 7):
            np.testing.assert_array_equal(session.run(feeds(latents, value=latents))["prediction"], latents + 1)
    assert [call[1] for call in gpu.named("set_profile")] == [0, 1, 2]
    assert {call[1] for call in gpu.named("create_context")} == {"eager"}  # RTX: no stand-in kernels under a graph
    scratch = gpu.named("set_device_memory")
    assert len(scratch) == 3
    assert len(set(scratch)) == 1  # the same memory for all three
    assert len(gpu.named("malloc")) == 1 + 5  # scratch, then one buffer a tensor at the largest profile
    assert ("malloc", gpu.named("malloc")[1][1], 4 * 4 * 8 * 8 * 4) in gpu.calls  # sample: 4 pictures of 4x8x8 float32


def test_a_narrow_engine_offers_what_its_profiles_take_and_is_proven_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph takes latents 4-64 in batches of 1-4; two samples were recorded."""
    fake_gpu.install(monkeypatch)
    narrow = tuple(Profile(dimensions={"B": Range(3, 3, 4), "J": Range(low, high, high)}) for low, high in BUCKETS[1:])
    bundle = trt_bundle(tmp_path, profiles=narrow)
    asked = [Budget(latents=latents) for latents in (16, 32, 64)]
    sample = {name: array for name, array in feeds(16).items() if name != "latent_ids"}
    arrays = pack("denoiser", sample, {budget: {"prediction": sample["sample"] + budget["latents"] // 4} for budget in asked})
    with open_session(bundle) as session:
        assert session.batch == Span(3, 4)
        assert session.spans == {"J": Span(5, 16)}
        assert [(axis.min, axis.max) for axis in session.axes(bundle.manifest.axes)] == [(20, 64)]
        assert [session.offers(budget, bundle.manifest.axes) for budget in asked] == [False, True, True]
        assert {budget["latents"] for budget in offered(session.axes(bundle.manifest.axes), session.budgets)} >= {20, 64}
        rows = list(check(bundle, "denoiser", session, 1e9, arrays))
    assert [row.budget for row in rows] == [{"latents": 32}, {"latents": 64}]


def test_a_budget_between_buckets_runs_at_its_own_size_in_the_next_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = fake_gpu.install(monkeypatch)
    with open_session(trt_bundle(tmp_path)) as session:
        session.run(feeds(6, batch=3))
    assert ("set_input_shape", 1, "latent_ids", (6,)) in gpu.calls
    assert ("set_input_shape", 1, "sample", (3, 4, 8, 8)) in gpu.calls
    assert ("upload", 6 * 8) in gpu.calls  # never padded


def test_graphs_are_captured_at_the_second_run_and_again_after_a_change_of_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = fake_gpu.install(monkeypatch)
    events = ("execute", "begin_capture", "end_capture", "launch", "destroy_executable")

    def calls(latents: int, value: float) -> list[str]:
        start = len(gpu.calls)
        np.testing.assert_array_equal(session.run(feeds(latents, value=value))["prediction"], value + 1)
        return [" ".join(map(str, call[::2])) if call[0] == "execute" else call[0] for call in gpu.calls[start:] if call[0] in events]

    capture = ["begin_capture", "execute captured", "end_capture", "launch"]
    with open_session(trt_bundle(tmp_path)) as session:
        assert calls(6, 1) == ["execute plain"]
        assert calls(6, 2) == capture
        assert calls(6, 3) == ["launch"]
        assert calls(8, 4) == ["destroy_executable", "execute plain"]  # the same profile at another shape
        assert calls(6, 5) == ["execute plain"]  # A -> B -> A: never the old graph
        assert calls(6, 6) == capture
        assert calls(16, 7) == ["execute plain"]  # another profile, another context:
        assert calls(6, 8) == ["launch"]  # the graph of this one still holds
    assert len(gpu.named("destroy_executable")) == 2


def test_without_graphs_every_run_is_plain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = fake_gpu.install(monkeypatch)
    with open_session(trt_bundle(tmp_path), cuda_graphs=False) as session:
        for _ in range(3):
            session.run(feeds(8))
    assert [call[2] for call in gpu.named("execute")] == ["plain"] * 3


def test_an_engine_that_cannot_be_captured_still_runs_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gpu = fake_gpu.install(monkeypatch)
    gpu.capturable = False
    with open_session(trt_bundle(tmp_path)) as session:
        for value in range(4):
            np.testing.assert_array_equal(session.run(feeds(8, value=value))["prediction"], value + 1)
        assert session.where.endswith("without CUDA graphs")
    assert len(gpu.named("begin_capture")) == 1
    assert "cudaStreamEndCapture failed" in caplog.text


def test_close_lets_go_of_graphs_then_engine_then_memory_and_the_session_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = fake_gpu.install(monkeypatch)
    session = open_session(trt_bundle(tmp_path))
    for _ in range(2):
        session.run(feeds(8))
    session.close()
    order = [call[0] for call in gpu.calls]
    assert order.index("destroy_executable") < order.index("engine_gone") < order.index("free") < order.index("destroy_stream")
    assert not gpu.memory  # every allocation was freed
    session.close()
    assert order == [call[0] for call in gpu.calls]  # a second close does nothing
    with pytest.raises(InferenceError, match="closed"):
        session.run(feeds(8))


def test_a_failure_to_synchronize_releases_everything_and_is_the_one_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = fake_gpu.install(monkeypatch)
    session = open_session(trt_bundle(tmp_path))
    session.run(feeds(8))
    gpu.failing = {"cudaStreamSynchronize", "cudaFree"}
    with pytest.raises(InferenceError, match="cudaStreamSynchronize failed"):
        session.close()
    assert ("destroy_stream", 7) in gpu.calls
    assert gpu.named("engine_gone")
    gpu.failing = set()
    session.close()  # it is over
    with pytest.raises(InferenceError, match="closed"):
        session.run(feeds(8))


def test_memory_is_released_where_only_synchronizing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = fake_gpu.install(monkeypatch)
    session = open_session(trt_bundle(tmp_path))
    gpu.failing = {"cudaStreamSynchronize"}
    with pytest.raises(InferenceError, match="cudaStreamSynchronize failed"):
        session.close()
    assert not gpu.memory


def test_a_failed_enqueue_waits_for_the_copies_that_read_its_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = fake_gpu.install(monkeypatch)
    with open_session(trt_bundle(tmp_path)) as session:
        gpu.enqueues = False
        with pytest.raises(InferenceError, match="the engine failed to run"):
            session.run(feeds(8))
        after = [call[0] for call in gpu.calls]
        assert "synchronize" in after[after.index("execute") :]
        gpu.enqueues = True
        np.testing.assert_array_equal(session.run(feeds(8, value=1))["prediction"], 2)


@pytest.mark.parametrize(("failing", "note"), [((), r" \(1 MB free\)"), (("cudaMemGetInfo",), "")])
def test_no_room_is_told_of_even_where_the_device_answers_nothing_more(
    failing: tuple[str, ...], note: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = fake_gpu.install(monkeypatch)
    gpu.failing = {"cudaMalloc", *failing}
    with pytest.raises(InferenceError, match=rf"the GPU has no room for 0 MB{note}: cudaMalloc failed: no reason"):
        open_session(trt_bundle(tmp_path))
    assert ("destroy_stream", 7) in gpu.calls


def test_threads_run_one_after_the_other_on_the_device_of_the_opening_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = fake_gpu.install(monkeypatch)
    with open_session(trt_bundle(tmp_path)) as session:
        answers_stay_with_their_thread(lambda k: session.run(feeds(4 * (k % 4 + 1), value=k))["prediction"], lambda k: k + 1)
    assert set(gpu.named("set_device")) == {("set_device", 0)}


def test_full_tensorrt_takes_the_allocation_strategy_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = fake_gpu.install(monkeypatch, sm=87, name="tensorrt", version="10.3.0")
    made = trt_bundle(tmp_path, builder="tensorrt", builder_version="10.3.0", sms=(87,))
    with open_session(made) as session:
        session.run(feeds(8))
        assert session.where == "tensorrt 10.3.0 on Fake GPU (sm87)"
    assert ("create_context", "user managed") in gpu.calls


def test_a_stripped_engine_takes_its_weights_from_the_onnx_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = fake_gpu.install(monkeypatch)
    open_session(trt_bundle(tmp_path, refit=True, stripped=True)).close()
    assert gpu.named("refit_from_file", "refit_engine") == [("refit_from_file", "denoiser.onnx"), ("refit_engine",)]
    other = trt_bundle(tmp_path / "other", refit=True, stripped=True, source_sha256="0" * 64)
    with pytest.raises(
        BundleError, match=r"0.engine takes its weights from onnx/denoiser.onnx, which is not the file that it was built from"
    ):
        open_session(other)


def test_an_engine_in_two_runs_that_of_its_conditions_once_for_all_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = fake_gpu.install(monkeypatch)
    (tmp_path / "trt").mkdir()
    (tmp_path / "trt" / "conditions.engine").write_bytes(b"another")
    modulation = TensorSpec(name="modulation", dtype="float32", shape=("B", 2))
    taken = ("timestep", "class_labels")
    apart = Apart(path="trt/conditions.engine", inputs=taken, outputs=(modulation,), gone=taken)
    engine = FileEntry(path="trt/0.engine", bytes=len(b"an engine"), sha256=hashlib.sha256(b"an engine").hexdigest())
    own = entry(tmp_path, tmp_path / "trt" / "conditions.engine")
    times = np.array([1.0, 0.5, 0.25], np.float32)
    with open_session(trt_bundle(tmp_path, files=(engine, own), conditions=apart)) as session:
        session.foresee(times)
        for time in times:
            asked = feeds(8, value=2.0) | {"timestep": np.full(2, time, np.float32)}
            np.testing.assert_array_equal(session.run(asked)["prediction"], np.full((2, 4, 8, 8), 3 + time, np.float32))
    assert gpu.named("deserialize") == [("deserialize", len(b"another")), ("deserialize", len(b"an engine"))]
    assert gpu.named("set_input_shape") == [
        ("set_input_shape", 0, "timestep", (ROWS,)),
        ("set_input_shape", 0, "class_labels", (ROWS,)),
        ("set_input_shape", 1, "sample", (2, 4, 8, 8)),
        ("set_input_shape", 1, "latent_ids", (8,)),
        ("set_input_shape", 1, "modulation", (2, 2)),
    ]
    assert len(gpu.named("engine_gone")) == 2
    assert not gpu.memory


def test_weight_streaming_needs_an_engine_that_was_built_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = fake_gpu.install(monkeypatch)
    streaming = trt_bundle(tmp_path / "a", weight_streaming=True)
    open_session(streaming, weight_streaming_bytes=5).close()
    open_session(streaming).close()
    assert gpu.named("weight_budget") == [("weight_budget", 5), ("weight_budget", 123)]  # 123: the library's own advice
    with pytest.raises(MissingError, match="does not stream weights; build it with: elastic-export trt BUNDLE --weight-streaming"):
        open_session(trt_bundle(tmp_path / "b"), weight_streaming_bytes=5)


@pytest.mark.parametrize(
    ("machine", "changes", "message"),
    [
        ({"sm": 75}, {}, "this GPU is an sm 75 .* elastic-export trt BUNDLE --sm 75"),
        ({"sm": 90}, {}, r"this GPU is an sm 90 .* elastic-export trt BUNDLE --builder tensorrt .*pip install 'elastic-export\[trt\]'"),
        ({"version": "1.8.0.1"}, {}, r"here is 1.8.0.1. Install that version \(pip install tensorrt-rtx==1.7.1.116\)"),
        (
            {"name": "tensorrt", "sm": 87, "version": "10.7.0"},
            {"builder": "tensorrt", "builder_version": "10.3.0", "sms": (87,)},
            "here is 10.7.0",
        ),
        (
            {"name": "tensorrt", "sm": 87, "version": "11.0.0"},
            COMPATIBLE,
            "here is 11.0.0",
        ),
    ],
)
def test_stale_and_foreign_engines_are_refused_before_loading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machine: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    gpu = fake_gpu.install(monkeypatch, **machine)
    with pytest.raises(MissingError, match=message):
        open_session(trt_bundle(tmp_path, **changes), name="trt")
    assert not gpu.named("deserialize")


def test_a_version_compatible_engine_opens_in_a_later_version_where_its_code_is_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = fake_gpu.install(monkeypatch, sm=87, name="tensorrt", version="10.7.0")
    monkeypatch.delenv("ELASTIC_TRT_HOST_CODE", raising=False)
    monkeypatch.setattr("elastic_runtime.sessions.trt._own", set())
    opened = trt_bundle(tmp_path, **COMPATIBLE)
    with pytest.raises(MissingError, match="native code that would run with your rights: set ELASTIC_TRT_HOST_CODE=1"):
        open_session(opened, name="trt")
    assert not gpu.named("deserialize")
    built(opened.manifest.graphs["denoiser"].artifacts[1].files[0].sha256)  # this process built it
    open_session(opened, name="trt").close()
    monkeypatch.setattr("elastic_runtime.sessions.trt._own", set())
    monkeypatch.setenv("ELASTIC_TRT_HOST_CODE", "1")
    open_session(opened, name="trt").close()


def test_the_engine_for_this_gpu_is_chosen_among_several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = fake_gpu.install(monkeypatch, sm=120)
    made = trt_bundle(tmp_path, others=({"sms": (120,)},))
    with open_session(made) as session:
        assert session.where.endswith("(sm120)")
    assert len(gpu.named("deserialize")) == 1


def test_a_size_that_no_profile_takes_is_an_error_that_lists_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpu.install(monkeypatch)
    with (
        open_session(trt_bundle(tmp_path, profiles=(profile(5, 8),))) as session,
        pytest.raises(InferenceError, match="no profile of this engine takes B=2, J=16; there are B 1-4, J 5-8"),
    ):
        session.run(feeds(16))


def test_a_loop_count_is_part_of_what_a_graph_was_captured_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A captured loop may hold its trip count, so the graph is not used at another one."""
    gpu = fake_gpu.install(monkeypatch)
    opened = trt_bundle(tmp_path)
    graph = opened.manifest.graphs["denoiser"]
    loops = msgspec.structs.replace(graph.inputs[0], name="loops", dtype="int64", shape=())
    opened.manifest.graphs["denoiser"] = msgspec.structs.replace(graph, inputs=(*graph.inputs, loops))
    with open_session(opened) as session:
        for count in (2, 2, 3, 3):
            session.run(feeds(8) | {"loops": np.array(count)})
    assert [call[2] for call in gpu.named("execute")] == ["plain", "captured", "plain", "captured"]


def test_a_damaged_engine_is_reported_with_the_librarys_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = fake_gpu.install(monkeypatch)
    with pytest.raises(BundleError, match="the magic tag does not match. Build it again with: elastic-export trt"):
        open_session(trt_bundle(tmp_path, content=b"damaged"))
    assert ("destroy_stream", 7) in gpu.calls


def test_without_bindings_or_device_the_refusal_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    with pytest.raises(MissingError, match=r"and the CUDA bindings are not installed \(pip install cuda-bindings\)"):
        open_session(trt_bundle(tmp_path), name="trt")


def test_on_this_machine_the_real_bindings_say_whether_there_is_a_gpu(tmp_path: Path) -> None:
    pytest.importorskip("cuda.bindings.runtime", reason="needs cuda-bindings")
    from elastic_runtime.sessions.trt import gpu

    sm, name = gpu()
    if sm is not None:
        pytest.skip(f"there is a GPU here: {name}")
    with pytest.raises(MissingError, match=f"the engine is for sm 86, 89 and tensorrt_rtx {VERSION}, and there is no CUDA device here"):
        open_session(trt_bundle(tmp_path), name="trt")


def test_compiled_kernels_are_kept_for_the_next_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    bundle = trt_bundle(tmp_path / "b")

    def used(sm: int) -> list[tuple[Any, ...]]:
        gpu = fake_gpu.install(monkeypatch, sm=sm)
        with open_session(bundle) as session:
            session.run(feeds(3))
            session.run(feeds(16))
        assert len({call[1] for call in gpu.named("set_runtime_cache")}) == 1, "its contexts share one"
        return gpu.named("deserialize_kernels")

    assert used(89) == [], "nothing is there yet"
    assert used(89) == [("deserialize_kernels", b"kernels of sm 89")]
    with caplog.at_level("INFO"):
        assert len(used(86)) == 1
    assert "compiled anew" in caplog.text
    (kept,) = (tmp_path / "cache" / "elastic-export" / "trt").iterdir()
    assert kept.read_bytes() == b"kernels of sm 86"


def test_a_cache_that_cannot_be_written_costs_no_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    fake_gpu.install(monkeypatch)
    with caplog.at_level("INFO"), open_session(trt_bundle(tmp_path / "b")) as session:
        session.run(feeds(3))
    assert "compiled kernels are not kept" in caplog.text
