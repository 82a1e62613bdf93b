"""The Core ML backend against a recording stand-in for coremltools: no Mac and no compiler."""

import os
import platform
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
from fakes import answers_stay_with_their_thread, write_manifest

from elastic_runtime import (
    Axis,
    Budget,
    BudgetError,
    Bundle,
    BundleError,
    InferenceError,
    MissingError,
    Span,
    UsageError,
    open_session,
)
from elastic_runtime.contract.artifacts import Apart, CoremlArtifact, CoremlCall, FileEntry, Graph, TensorSpec
from elastic_runtime.contract.bundle import entry
from elastic_runtime.contract.manifest import SCHEMA_VERSION, Manifest, Model, Provenance
from elastic_runtime.contract.schedule import RectifiedFlow
from elastic_runtime.files import cache
from elastic_runtime.sessions import coreml
from elastic_runtime.sessions.apart import ApartSession

PACKAGE = "coreml/denoiser.mlpackage"


@dataclass
class StandIn:
    """What coremltools was asked for, and a model that answers with the sum of its feeds."""

    compiled: list[str] = field(default_factory=list)
    loaded: list[tuple[str, str, str | None]] = field(default_factory=list)
    fed: list[dict[str, np.ndarray]] = field(default_factory=list)
    fails: str | None = None

    def module(self) -> Any:
        def compile_model(source: str, destination: str) -> str:
            if self.fails == "compile":
                raise RuntimeError("no")
            self.compiled.append(source)
            Path(destination).mkdir()
            return destination

        def load(path: str, units: str, name: str | None) -> Any:
            self.loaded.append((path, units, name))
            return SimpleNamespace(predict=predict)

        def predict(feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            if self.fails == "predict":
                raise RuntimeError("no")
            self.fed.append(feeds)
            if "sample" not in feeds:
                return {"modulation": np.repeat(feeds["class_labels"][:, None], 3, axis=1).astype(np.float16)}
            return {"prediction": feeds["sample"].astype(np.float16) * 2}

        models = SimpleNamespace(CompiledMLModel=load, utils=SimpleNamespace(compile_model=compile_model))
        units = SimpleNamespace(ALL="ALL", CPU_ONLY="CPU_ONLY", CPU_AND_GPU="CPU_AND_GPU", CPU_AND_NE="CPU_AND_NE")
        return SimpleNamespace(__version__="9.0", models=models, ComputeUnit=units)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> StandIn:
    made = StandIn()
    monkeypatch.setitem(sys.modules, "coremltools", made.module())
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(platform, "mac_ver", lambda: ("15.1", ("", "", ""), "arm64"))
    monkeypatch.setattr(coreml.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return made


APART = Apart(
    path=PACKAGE, inputs=("class_labels",), gone=("class_labels",),
    outputs=(TensorSpec(name="modulation", dtype="float32", shape=("B", 3)),),
    call=CoremlCall(function="conditions", budget={}, sizes={"B": 8}),
)  # fmt: skip


def bundle(folder: Path, shapes: str = "functions", target: str = "iOS18", loops: bool = False, conditions: Apart | None = None) -> Bundle:
    """A bundle whose package is a folder of two files; with `loops`, the graph takes a count too."""
    for name in ("Manifest.json", "Data/com.apple.CoreML/model.mlmodel"):
        path = folder / PACKAGE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    calls = {
        "functions": tuple(CoremlCall(function=f"latents_{16 * j}", budget={"latents": 16 * j}, sizes={"B": 1, "J": j}) for j in (2, 4)),
        "range": (CoremlCall(function="main", budget={}, sizes={}),),
    }[shapes]
    artifact = CoremlArtifact(
        precision="fp16", package=PACKAGE, deployment_target=target, shapes=shapes, batch=Span(1, 1), calls=calls, reductions="fp32",
        files=tuple(entry(folder, path) for path in sorted((folder / PACKAGE).rglob("*")) if path.is_file()),
        toolchain={"coremltools": "9.0"}, conditions=conditions,
    )  # type: ignore[arg-type]  # fmt: skip
    shape = ("B", 1, 2, 2)
    count = (TensorSpec(name="loops", dtype="int64", shape=()),) if loops else ()
    graph = Graph(
        inputs=(
            TensorSpec(name="sample", dtype="float32", shape=shape),
            TensorSpec(name="class_labels", dtype="int64", shape=("B",)),
            TensorSpec(name="latent_ids", dtype="int64", shape=("J",)),
            *count,
        ),
        outputs=(TensorSpec(name="prediction", dtype="float32", shape=shape),),
        dimensions={"B": Span(1, 4), "J": Span(1, 16)},
        artifacts=(artifact,),
    )
    axis = Axis(name="latents", min=16, max=256, step=16, default=64, input="latent_ids", carrier="length", unit=16, dimension="J")
    model = Model(
        name="tiny", family="elit-sit", config={}, prediction="velocity", schedule=RectifiedFlow(), sample_shape=(1, 2, 2), num_classes=3,
        null_label=3, weights="random",
    )  # fmt: skip
    provenance = Provenance(command="test", created="2026-11-20T00:00:00+00:00", versions={})
    write_manifest(
        folder,
        Manifest(schema_version=SCHEMA_VERSION, model=model, axes=(axis,), graphs={"denoiser": graph}, cost=(), provenance=provenance),
    )
    return Bundle.open(folder, hashes=True)


def feeds(j: int, batch: int = 1) -> dict[str, np.ndarray]:
    return {
        "sample": np.full((batch, 1, 2, 2), 1.5, np.float32),
        "class_labels": np.zeros(batch, np.int64),
        "latent_ids": np.arange(j, dtype=np.int64),
    }


def test_functions_are_loaded_when_first_used_and_integers_are_narrowed(stand_in: StandIn, tmp_path: Path) -> None:
    with open_session(bundle(tmp_path / "b"), compute_units="cpu+ane") as session:
        assert stand_in.loaded == []
        for j in (2, 4, 2):
            output = session.run(feeds(j))["prediction"]
            assert (output.dtype, output.max()) == (np.float32, 3.0)
        assert [(units, name) for _, units, name in stand_in.loaded] == [("CPU_AND_NE", "latents_32"), ("CPU_AND_NE", "latents_64")]
        assert {name: array.dtype.name for name, array in stand_in.fed[0].items()} == {
            "sample": "float32", "class_labels": "int32", "latent_ids": "int32",
        }  # fmt: skip
        assert (session.batch, session.budgets) == (Span(1, 1), (Budget(latents=32), Budget(latents=64)))
        assert session.where == "Core ML cpu+ane, macOS 15.1, coremltools 9.0"
    with pytest.raises(InferenceError, match="this session is closed"):
        session.run(feeds(2))


@pytest.mark.parametrize(("shapes", "name"), [("functions", "latents_32"), ("range", None)])
def test_conditions_are_a_function_that_eight_rows_are_run_of(stand_in: StandIn, tmp_path: Path, shapes: str, name: str | None) -> None:
    with open_session(bundle(tmp_path / "b", shapes, conditions=APART)) as session:
        assert isinstance(session, ApartSession)
        for label in (2, 1, 2):
            session.run(feeds(2) | {"class_labels": np.array([label])})
    assert [function for _, _, function in stand_in.loaded] == ["conditions", name]
    assert len(stand_in.compiled) == 1
    rows, *steps = ({each: array.tolist() for each, array in fed.items() if each != "sample"} for fed in stand_in.fed)
    assert rows == {"class_labels": [2] * 8}
    assert steps[0] == {"latent_ids": [0, 1], "modulation": [[2.0] * 3]}
    assert steps[1:] == [{"class_labels": [1] * 8}, steps[0] | {"modulation": [[1.0] * 3]}, steps[0]]
    assert stand_in.fed[0]["class_labels"].dtype == np.int32


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"path": "coreml/other.mlpackage"}, "which is no function of its own in it"),
        ({"call": None}, f"has its conditions in {PACKAGE}, which is no function of its own in it"),
        ({"call": CoremlCall(function="latents_64", budget={}, sizes={"B": 8})}, "has its conditions in latents_64, which is no function"),
        ({"call": CoremlCall(function="c", budget={}, sizes={"J": 8})}, "c of .* takes {'J': 8} at {}, and conditions are rows, B"),
        ({"call": CoremlCall(function="c", budget={}, sizes={"B": 0})}, "conditions are rows, B"),
        ({"call": CoremlCall(function="c", budget={"latents": 16}, sizes={"B": 8})}, "conditions are rows, B"),
        ({"gone": ("sample",)}, "of which sample are gone"),
    ],
)
def test_a_manifest_that_says_no_such_function_is_refused(tmp_path: Path, changes: dict[str, Any], why: str) -> None:
    with pytest.raises(BundleError, match=why):
        bundle(tmp_path / "b", conditions=msgspec.structs.replace(APART, **changes))


def test_threads_run_one_after_the_other(stand_in: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Core ML model is for one thread at a time: the stand-in would answer with the feeds of whoever came last."""
    latest: dict[str, np.ndarray] = {}

    def load(path: str, units: str, name: str | None) -> Any:
        return SimpleNamespace(predict=predict)

    def predict(given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        latest.update(given)
        time.sleep(1e-4)
        return {"prediction": latest["sample"] * 2}

    monkeypatch.setattr(sys.modules["coremltools"].models, "CompiledMLModel", load)
    with open_session(bundle(tmp_path / "b")) as session:
        sample = np.ones((1, 1, 2, 2), np.float32)
        answers_stay_with_their_thread(lambda k: session.run(feeds(2) | {"sample": sample * k})["prediction"], lambda k: sample * 2 * k)


def test_a_budget_without_a_function_names_those_that_exist(stand_in: StandIn, tmp_path: Path) -> None:
    with open_session(bundle(tmp_path / "b")) as session:
        with pytest.raises(
            BudgetError, match=r"not compiled for B 1, J 3; it takes latents=32 \(B 1, J 2\); latents=64 \(B 1, J 4\).*--budgets"
        ):
            session.run(feeds(3))
        with pytest.raises(BudgetError, match="not compiled for B 2, J 4"):
            session.run(feeds(4, batch=2))
    assert stand_in.fed == []


def test_an_open_range_is_one_function_opened_by_no_name(stand_in: StandIn, tmp_path: Path) -> None:
    with open_session(bundle(tmp_path / "b", "range")) as session:
        session.run(feeds(7))
        assert [name for _, _, name in stand_in.loaded] == [None]
        assert session.budgets is None
        with pytest.raises(BudgetError, match="it takes every budget in batches of 1-1"):
            session.run(feeds(7, batch=2))


def test_an_open_count_is_fed_as_a_vector_since_there_are_no_scalars(stand_in: StandIn, tmp_path: Path) -> None:
    with open_session(bundle(tmp_path / "b", "range", loops=True)) as session:
        session.run(feeds(2) | {"loops": np.array(3, np.int64)})
    fed = stand_in.fed[0]["loops"]
    assert (fed.dtype.name, fed.tolist()) == ("int32", [3])


def test_a_package_is_compiled_once(stand_in: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = bundle(tmp_path / "b")
    for _ in range(3):
        open_session(made).close()
    assert stand_in.compiled == [str(tmp_path / "b" / PACKAGE)]
    kept = list((tmp_path / "cache" / "elastic-export" / "coreml").iterdir())
    assert [path.suffix for path in kept] == [".mlmodelc"]
    monkeypatch.setattr(platform, "mac_ver", lambda: ("15.2", ("", "", ""), "arm64"))
    open_session(made).close()
    assert len(stand_in.compiled) == 2


def test_the_cache_is_where_a_mac_keeps_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cache.folder("coreml") == Path.home() / "Library" / "Caches" / "elastic-export" / "coreml"


def test_failures_are_named_and_leave_no_half_compiled_package(stand_in: StandIn, tmp_path: Path) -> None:
    made = bundle(tmp_path / "b")
    stand_in.fails = "compile"
    with pytest.raises(BundleError, match="Core ML cannot compile .*denoiser.mlpackage: no"):
        open_session(made)
    assert list((tmp_path / "cache" / "elastic-export" / "coreml").iterdir()) == []
    stand_in.fails = "predict"
    with open_session(made) as session, pytest.raises(InferenceError, match="Core ML failed in function 'latents_32': no"):
        session.run(feeds(2))
    with pytest.raises(UsageError, match="no compute units 'tpu'; there are all, cpu, cpu.gpu, cpu.ane"):
        open_session(made, compute_units="tpu")


@pytest.mark.parametrize(("target", "needed"), [("iOS26", 26), ("macOS26", 26)])
def test_a_system_that_is_too_old_is_named_with_the_one_that_is_needed(stand_in: StandIn, tmp_path: Path, target: str, needed: int) -> None:
    with pytest.raises(MissingError, match=f"the package is for {target}, which is macOS {needed} or newer, and this is macOS 15"):
        open_session(bundle(tmp_path / "b", target=target))


def test_what_is_missing_is_named(stand_in: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = bundle(tmp_path / "b", target="iOS15")
    monkeypatch.setattr(coreml.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingError, match=r"coremltools is not installed: pip install 'elastic-export\[coreml\]'"):
        open_session(made)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    with pytest.raises(MissingError, match="Core ML needs macOS, and this is Linux"):
        open_session(made)


def test_an_edited_package_is_named(tmp_path: Path) -> None:
    made = bundle(tmp_path / "b")
    path = made.folder / PACKAGE / "Data/com.apple.CoreML/model.mlmodel"
    path.write_text(path.read_text()[::-1])
    with pytest.raises(BundleError, match="model.mlmodel is damaged: its SHA-256"):
        Bundle.open(made.folder, hashes=True)
    path.unlink()
    with pytest.raises(BundleError, match="model.mlmodel is missing"):
        Bundle.open(made.folder)
    assert isinstance(made.manifest.graphs["denoiser"].artifacts[0].files[0], FileEntry)


@pytest.mark.parametrize("kind", ["not ours", "no folder"])
def test_a_cache_that_cannot_be_used_is_done_without(
    kind: str, stand_in: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made, kept = bundle(tmp_path / "b"), tmp_path / "cache" / "elastic-export" / "coreml"
    if kind == "no folder":
        kept.parent.mkdir(parents=True)
        kept.write_text("a file where the cache should be")
    else:
        open_session(made).close()
        next(kept.iterdir()).chmod(0o777)
        stand_in.compiled.clear()
    with open_session(made) as session:
        assert isinstance(session, coreml.CoremlSession)
        session.run(feeds(2))
        own = session.compiled
        assert own.is_dir()
        assert kept not in own.parents
    assert not own.parent.exists()
    assert stand_in.compiled == [str(tmp_path / "b" / PACKAGE)], "another's is not read"
    assert "Set XDG_CACHE_HOME to a folder of your own to keep it" in caplog.text
    stand_in.fails = "compile"
    with pytest.raises(BundleError, match="Core ML cannot compile .*denoiser.mlpackage: no"):
        open_session(made)


def test_what_killed_compilations_left_is_taken_away(stand_in: StandIn, tmp_path: Path) -> None:
    kept = tmp_path / "cache" / "elastic-export" / "coreml"
    for name, age in (("old", coreml.ABANDONED + 60), ("new", 60)):
        left = kept / f".partial-{name}"
        left.mkdir(parents=True)
        (left / "weights").write_bytes(b"x")
        os.utime(left, (time.time() - age,) * 2)
    open_session(bundle(tmp_path / "b")).close()
    assert sorted(path.name for path in kept.glob(".*")) == [".partial-new"]
