"""An export that is killed or runs out of disk leaves the old bundle whole; one that succeeds keeps what was there."""

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="exporting needs torch")
pytest.importorskip("onnxruntime", reason="verifying needs ONNX Runtime")

from fakes import write_manifest  # noqa: E402

import elastic_export  # noqa: E402
import elastic_targets  # noqa: E402
from elastic_export.capture.capture import Capture, all_budgets, capture, probe_budgets  # noqa: E402
from elastic_export.capture.zoo import Request, load  # noqa: E402
from elastic_export.exporting import _room_on_disk, export_capture  # noqa: E402
from elastic_runtime import Axis, Budget, BudgetError, Bundle, BundleError, ModelError, Span, UsageError  # noqa: E402
from elastic_runtime.contract.artifacts import Network, TrtArtifact  # noqa: E402
from elastic_runtime.contract.bundle import entry  # noqa: E402
from elastic_runtime.files.folder import writing  # noqa: E402
from elastic_targets.target import Estimate  # noqa: E402


@pytest.fixture
def captured(golden: Path) -> Capture:
    return capture(load(Request("elit-sit", golden / "elit-c.pt", golden / "elit-c.json")), {}, Span(1, 4))


def options(**changes: Any) -> Any:
    return elastic_targets.target("onnx").options(**changes)


def files(folder: Path) -> dict[str, bytes]:
    """What lies in a bundle's folder, without what a killed run left there."""
    every = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: content for name, content in every.items() if not name.startswith(".")}


@pytest.mark.skipif(os.name != "posix", reason="sends SIGKILL, which only POSIX has")
def test_a_kill_in_mid_export_leaves_the_old_bundle_whole_and_the_next_write_sweeps_up(golden: Path, bundle_copy: Path) -> None:
    before = files(bundle_copy)
    program = """
import os, signal, sys
from elastic_export.cli import main
import dataclasses, elastic_targets.onnx as room
def lower(graph, options, folder, on_progress):
    (folder / 'onnx').mkdir()
    (folder / 'onnx' / 'denoiser.opset20.onnx').write_bytes(b'half')
    os.kill(os.getpid(), signal.SIGKILL)
room.TARGET = dataclasses.replace(room.TARGET, lower=lower)
main(sys.argv[1:])
"""
    arguments = [
        "onnx",
        "elit-sit",
        "--checkpoint",
        golden / "elit-c.pt",
        "--config",
        golden / "elit-c.json",
        "-o",
        bundle_copy,
        "--opset",
        "20",
    ]
    killed = subprocess.run([sys.executable, "-c", program, *map(str, arguments)], capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert files(bundle_copy) == before
    assert Bundle.open(bundle_copy, hashes=True)
    assert list(bundle_copy.glob(".partial-*")), "the killed run left its unfinished folder"
    with writing(bundle_copy) as draft:
        assert draft.old is not None
        draft.commit(draft.old.manifest)
    assert files(bundle_copy) == before
    assert not list(bundle_copy.glob(".*"))
    assert list(bundle_copy.parent.iterdir()) == [bundle_copy]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_full_disk_or_an_interruption_leaves_the_old_bundle_whole(
    error: BaseException, captured: Capture, bundle_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files(bundle_copy)

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("elastic_targets.onnx.TARGET", replace(elastic_targets.target("onnx"), lower=fail))
    wanted = BundleError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(wanted, match="no space left" if wanted is BundleError else None):
        export_capture(captured, "onnx", options(opset=20), bundle_copy, "again")
    assert files(bundle_copy) == before
    assert list(bundle_copy.parent.iterdir()) == [bundle_copy]


def test_extending_and_replacing_keep_what_is_the_users_and_one_artifact_a_slot(golden: Path, bundle_copy: Path) -> None:
    mine = {"digits.png": b"picture", ".git/config": b"git", "onnx/notes.txt": b"notes"}
    for name, content in mine.items():
        (bundle_copy / name).parent.mkdir(exist_ok=True)
        (bundle_copy / name).write_bytes(content)

    def again(**changes: Any) -> Bundle:
        made = capture(load(Request("elit-sit", golden / "elit-c.pt", golden / "elit-c.json")), {}, Span(1, 4))
        return export_capture(made, "onnx", options(**changes), bundle_copy, "again", overwrite=True)

    again(opset=20)
    bundle = again()
    paths = [artifact.path for artifact in bundle.manifest.graphs["denoiser"].artifacts]
    assert sorted(paths) == ["onnx-2/denoiser.onnx", "onnx/denoiser.opset20.onnx"]
    with pytest.raises(BundleError, match=r"onnx-2/denoiser\.onnx exists: choose another"):
        made = capture(load(Request("elit-sit", golden / "elit-c.pt", golden / "elit-c.json")), {}, Span(1, 4))
        export_capture(made, "onnx", options(), bundle_copy, "again")
    every = {path.relative_to(bundle_copy).as_posix() for path in bundle_copy.rglob("*") if path.is_file()}
    assert every == {"elastic.json", "reference.npz", *paths, *mine}
    assert {name: (bundle_copy / name).read_bytes() for name in mine} == mine
    Bundle.open(bundle_copy, hashes=True)


def test_a_file_that_an_engine_takes_its_weights_from_is_not_replaced(golden: Path, bundle_copy: Path) -> None:
    bundle, engine = Bundle.open(bundle_copy), bundle_copy / "trt" / "one.engine"
    (onnx,) = bundle.manifest.graphs["denoiser"].artifacts
    engine.parent.mkdir()
    engine.write_bytes(b"an engine")
    stripped = TrtArtifact(
        precision="fp32", files=(entry(bundle_copy, engine),), toolchain={}, builder="tensorrt_rtx", builder_version="1", sms=(89,),
        source=onnx.path, source_sha256=onnx.files[0].sha256, profiles=(), network=Network(layers=1, attentions=0, loops=0), stripped=True,
    )  # fmt: skip
    write_manifest(bundle_copy, bundle.manifest.joined("denoiser", (stripped,)))
    before = (bundle_copy / "elastic.json").read_bytes()
    made = capture(load(Request("elit-sit", golden / "elit-c.pt", golden / "elit-c.json")), {}, Span(1, 4))
    with pytest.raises(BundleError, match=r"one\.engine was built with --strip and takes its weights from onnx/denoiser\.onnx, which this"):
        export_capture(made, "onnx", options(), bundle_copy, "again", overwrite=True)
    assert (bundle_copy / "elastic.json").read_bytes() == before


def test_an_artifact_that_gives_no_numbers_is_never_delivered(captured: Capture, tmp_path: Path) -> None:
    last = captured.graphs[0].module.final_layer.linear
    last.bias = torch.nn.Parameter(torch.full(last.bias.shape, float("nan")), requires_grad=False)
    with pytest.raises(ModelError, match="the original's prediction of denoiser at latents=4 has values that are not finite"):
        export_capture(captured, "onnx", options(), tmp_path / "out", "elastic-export onnx")
    assert list(tmp_path.iterdir()) == []


def test_the_manifest_tells_cost_shapes_and_origin(golden_bundle: Callable[[str], Bundle]) -> None:
    manifest = golden_bundle("c").manifest
    flops = [row.flops for row in manifest.cost]
    assert [row.budget["latents"] for row in manifest.cost] == list(manifest.axis("latents").values)
    assert flops == sorted(flops)
    assert manifest.graphs["denoiser"].dimensions == {"B": Span(1, 4), "J": Span(1, 16)}
    assert manifest.provenance.checkpoint == "elit-c.pt"
    assert len(manifest.provenance.checkpoint_sha256 or "") == 64
    assert manifest.provenance.versions.keys() >= {"python", "elastic-export", "torch", "onnx", "onnxruntime", "numpy"}
    assert "/" not in manifest.provenance.command


def test_an_axis_that_does_not_exist_is_answered_with_those_that_do(golden: Path) -> None:
    model = load(Request("elit-sit", golden / "elit-c.pt", golden / "elit-c.json"))
    with pytest.raises(BudgetError, match="elit-sit has no axis 'loops'; it has latents"):
        capture(model, {"loops": Span(1, 2)}, Span(1, 1))
    with pytest.raises(BudgetError, match="--batch must start at 1 or more, got 0-4"):
        capture(model, {}, Span(0, 4))


def test_an_unknown_target_is_answered_with_those_there_are() -> None:
    with pytest.raises(UsageError, match="no target 'abacus'; there are onnx"):
        elastic_targets.target("abacus")


def test_probes_walk_each_axis_with_the_others_at_their_defaults() -> None:
    axes = tuple(
        Axis(name=name, min=1, max=3, step=1, default=2, input=name, carrier="value")
        for name in ("loops", "tokens")
    )  # fmt: skip
    assert len(all_budgets(axes)) == 9
    probes = probe_budgets(axes)
    assert len(probes) == len(set(probes)) == 5
    assert all(2 in budget.values() for budget in probes)
    assert probe_budgets(()) == [Budget()]


@given(st.dictionaries(st.sampled_from("STh"), st.tuples(st.integers(1, 50), st.integers(0, 50)), min_size=1))
def test_probes_of_open_sizes_are_both_ends_and_each_middle_off_the_track_of_the_others(ends: dict[str, tuple[int, int]]) -> None:
    spans = {name: Span(low, low + more) for name, (low, more) in ends.items()}
    probes = probe_budgets((), spans)
    assert probes[0] == Budget(**{name: span.min for name, span in spans.items()})
    assert Budget(**{name: span.max for name, span in spans.items()}) in probes
    assert len(probes) == len(set(probes)) <= 3 + len(spans)
    assert all(probe[name] in span for probe in probes for name, span in spans.items())
    for name, span in spans.items():
        assert (span.min + span.max + 1) // 2 in [probe[name] for probe in probes]
        assert len({probe[name] for probe in probes}) >= min(3, span.max - span.min + 1)


@pytest.mark.parametrize(("verify", "count"), [("ends", 2), ("none", 0)])
def test_what_was_not_to_be_proven_stands_in_the_manifest(verify: str, count: int, captured: Capture, tmp_path: Path) -> None:
    every = [dict(budget) for budget in probe_budgets(captured.graphs[0].axes)]
    bundle = export_capture(captured, "onnx", options(), tmp_path / "out", "elastic-export onnx", verify=verify)
    graph = Bundle.open(bundle.folder, hashes=True).manifest.graphs["denoiser"]
    (artifact,) = graph.artifacts
    assert [row.budget for row in artifact.verified] == [every[0], every[-1]][:count]
    assert list(graph.unproven) == [budget for budget in every if budget not in [row.budget for row in artifact.verified]]
    ((_, again),) = elastic_export.verify(bundle)
    assert len(again.verified) == count
    assert (again.unverified is None) == (count > 0)
    if not count:
        assert "were not recorded (--verify none)" in str(again.unverified)


def test_what_was_left_out_is_proven_by_a_later_export(golden: Path, tmp_path: Path) -> None:
    source = {"checkpoint": golden / "elit-c.pt", "config": golden / "elit-c.json"}
    elastic_export.export("elit-sit", output=tmp_path / "out", verify="none", **source)
    bundle = elastic_export.export("elit-sit", output=tmp_path / "out", opset=20, **source)
    graph = bundle.manifest.graphs["denoiser"]
    assert not graph.unproven
    first, second = (sorted(row.budget["latents"] for row in artifact.verified) for artifact in graph.artifacts)
    assert first == second == [4, 24, 36, 64]
    assert all(row.passed for _, artifact in elastic_export.verify(bundle) for row in artifact.verified)
    elastic_export.export("elit-sit", output=tmp_path / "again", verify="none", **source)
    proven = elastic_export.export("elit-sit", output=tmp_path / "again", **source)  # which lowers nothing
    (artifact,) = proven.manifest.graphs["denoiser"].artifacts
    assert sorted(row.budget["latents"] for row in artifact.verified) == first
    assert not proven.manifest.graphs["denoiser"].unproven
    with pytest.raises(BundleError, match="exists: choose another"):
        elastic_export.export("elit-sit", output=tmp_path / "again", **source)
    with pytest.raises(UsageError, match="--verify is one of budgets, ends, none, got 'some'"):
        elastic_export.export("elit-sit", output=tmp_path / "other", verify="some", **source)


def test_what_waits_on_disk_needs_room_beside_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: Any = [SimpleNamespace(name=name, module=torch.nn.Linear(64, 64)) for name in ("denoiser", "decoder")]
    made = {"denoiser": Estimate(1000, 1, waiting_bytes=800), "decoder": Estimate(500, 1)}
    room = replace(elastic_targets.target("onnx"), estimate=lambda graph, _: made[graph.name])
    for first, needed in ((graphs[:1], 1800), (graphs, 1800), (graphs[::-1], 2300)):
        monkeypatch.setattr("shutil.disk_usage", lambda _, needed=needed: SimpleNamespace(free=needed))
        _room_on_disk(first, room, None, tmp_path)
        monkeypatch.setattr("shutil.disk_usage", lambda _, needed=needed: SimpleNamespace(free=needed - 1))
        with pytest.raises(BundleError, match="make room, choose another"):
            _room_on_disk(first, room, None, tmp_path)
