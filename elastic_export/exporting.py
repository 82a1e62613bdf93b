"""Capture -> lower -> verify -> manifest, in a draft that becomes the bundle only when all of it succeeded."""

import contextlib
import datetime
import gc
import os
import platform
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
import numpy as np

import elastic_targets
from elastic_export.verifying import record, require, verify_artifact, verify_unrounded
from elastic_runtime.contract.artifacts import Artifact, TrtArtifact
from elastic_runtime.contract.axis import Span
from elastic_runtime.contract.budget import Budget
from elastic_runtime.contract.bundle import Bundle, entry
from elastic_runtime.contract.manifest import Manifest
from elastic_runtime.contract.reference import unpack
from elastic_runtime.errors import BundleError, UsageError
from elastic_runtime.files.folder import Draft, writing
from elastic_targets.capture import BundleGraph
from elastic_targets.target import OnProgress, Target

if TYPE_CHECKING:
    from elastic_export.capture.capture import Capture
    from elastic_targets.capture import GraphCapture

REFERENCE = "reference.npz"
VERIFY = ("budgets", "ends", "none")  # which of the budgets that there are to prove an export proves
# on_stage(what): told before each part of the work
OnStage = Callable[[str], None]
G = TypeVar("G", bound="GraphCapture | BundleGraph")


def silent(*_: object) -> None:
    """The default for progress callbacks."""


@dataclass(frozen=True)
class Job:
    """What is asked of an export from torch.

    `options` are the target's own record, `verify` says which budgets are proven (see `elastic_export.export`), `command` stands in the
    manifest. `then` is a target that takes the ONNX artifacts, with its options: its own are made of them before any of it is there.
    """

    target: Target
    options: Any
    command: str
    overwrite: bool = False
    verify: str = VERIFY[0]
    then: tuple[Target, Any] | None = None


def export_capture(
    capture: "Capture",
    target: str,
    options: Any,
    output: Path,
    command: str,
    overwrite: bool = False,
    on_stage: OnStage = silent,
    on_progress: OnProgress = silent,
    verify: str = VERIFY[0],
) -> Bundle:
    """Lower every graph of `capture` for a target that takes torch, prove it, and write or extend the bundle at `output`.

    `options`, `command` and `verify` are those of a `Job`. The capture is consumed: its graphs are let go one by one. On any error the old
    bundle is whole.

    Raises: UsageError and its kinds for what cannot be done as asked; VerificationError naming the budget that failed.
    """
    with writing(output, overwrite) as draft:
        job = Job(elastic_targets.target(target), options, command, overwrite, verify)
        return export_into(draft, capture, job, on_stage, on_progress)


def export_into(draft: Draft, capture: "Capture", job: Job, on_stage: OnStage = silent, on_progress: OnProgress = silent) -> Bundle:
    """What `export_capture` does, for a caller who holds the folder already."""
    old, manifest, standing = prepare(capture, job, draft.old)
    arrays = old.reference() if old and old.manifest.reference else {}
    for path, content in ({} if old else capture.files).items():  # the old bundle has them
        (draft.stage / path).parent.mkdir(parents=True, exist_ok=True)
        (draft.stage / path).write_bytes(content)
    _room_on_disk(capture.graphs, job.target, job.options, draft.folder)
    # What fails should fail soon: a denoiser of billions of weights takes hours, and a decoder minutes.
    capture.graphs[:] = sorted([*capture.graphs, *standing], key=lambda graph: graph.parameters)
    proven_alone = {graph.name for graph in standing}
    del standing
    while capture.graphs:
        graph = capture.graphs.pop(0)
        known = unpack(graph.name, arrays)[1]
        proven, left = proving(graph, job)
        asked = [budget for budget in proven if budget not in known]
        left = [*(Budget(**each) for each in manifest.graphs[graph.name].unproven), *left]
        manifest = manifest.left(graph.name, [dict(each) for each in dict.fromkeys(left) if each not in known and each not in asked])
        if asked:
            on_stage(f"running the original {graph.name}")
            new, rounding = record(graph, asked)
            arrays |= new
            manifest = manifest.rounded(graph.name, rounding)
            reference = draft.stage / REFERENCE
            with reference.open("wb") as stream:
                np.savez(stream, **arrays)  # type: ignore[arg-type]
            manifest = msgspec.structs.replace(manifest, reference=entry(draft.stage, reference))
        name, artifacts = graph.name, tuple[Artifact, ...]()
        if name not in proven_alone:
            on_stage(f"lowering {name} to {job.target.name}")
            artifacts = _lowered(job.target, graph, job.options, draft.stage, on_progress)
        on_stage(f"verifying {name}")
        bundle = draft.bundle(manifest.joined(name, artifacts))
        unrounded = job.target.unrounded
        if artifacts and unrounded and (floats := unrounded(graph, bundle.manifest.graphs[name], job.options)):
            verify_unrounded(bundle, name, *floats)
        del graph  # weights that are held in memory are no longer needed,
        gc.collect()  # and the exporter leaves them in reference cycles
        manifest = _proven(bundle, name, artifacts, frugal=True, standing=bool(asked))
    if job.then:
        on_stage(f"building for {job.then[0].name}")
        manifest = _built(draft, _wanted(draft.bundle(manifest), *job.then, job.overwrite), *job.then, on_progress)
    on_stage("writing the bundle")
    return draft.commit(manifest)


def export_bundle(
    bundle: Bundle, target: str, options: Any, output: Path | None = None, overwrite: bool = False, on_progress: OnProgress = silent
) -> Bundle:
    """Lower every graph of `bundle` for a target that takes its ONNX artifacts, into it, or into a copy at `output`; prove what this
    machine can run. No torch: this is also what runs on a Jetson.

    On any error, Ctrl-C included, the old bundle is whole.

    Raises: UsageError and its kinds for what cannot be made as asked, MissingError for an absent compiler; BundleError where
    an artifact or the output exists and `overwrite` is not given, or another run writes there; VerificationError naming the
    budget that failed.
    """
    room = elastic_targets.target(target)
    folder = output or bundle.folder
    here = folder.exists() and os.path.samefile(folder, bundle.folder)
    with writing(folder, overwrite=overwrite and not here) as draft:
        if here:
            bundle = draft.old or Bundle.open(folder)  # as it is now that nobody else can write it
        elif draft.old and not overwrite:
            raise BundleError(f"{folder} holds another bundle: choose another -o/--output, or replace it with --overwrite")
        graphs = _wanted(bundle, room, options, overwrite)
        if not here:
            draft.copy(bundle)
        return draft.commit(_built(draft, graphs, room, options, on_progress))


def _wanted(bundle: Bundle, room: Target, options: Any, overwrite: bool) -> list[BundleGraph]:
    """The graphs of a bundle that are still to be lowered for a target that takes ONNX; raises what `export_bundle` does before it."""
    graphs = [BundleGraph(bundle, name) for name in bundle.manifest.graphs]
    for graph in graphs:
        room.requires(graph, options)
    return _missing(bundle, room, graphs, options, overwrite)


def _built(draft: Draft, graphs: Sequence[BundleGraph], room: Target, options: Any, on_progress: OnProgress) -> Manifest:
    """The manifest of their bundle with the artifacts of these graphs, written into the draft and proven where this machine can."""
    manifest = graphs[0].bundle.manifest
    for graph in graphs:
        artifacts = _lowered(room, graph, options, draft.stage, on_progress)
        manifest = _proven(draft.bundle(manifest.joined(graph.name, artifacts)), graph.name, artifacts)
    return manifest


def require_model(bundle: Bundle | None, opset: int | None, verify: str) -> None:
    """Raise UsageError for what belongs to an export from torch beside a bundle, whose ONNX files and recorded budgets are there."""
    if bundle and opset is not None:
        raise UsageError(
            f"--opset is for a MODEL that is exported to ONNX first, and {bundle.folder} has its ONNX files: add one with "
            f"elastic-export onnx MODEL --opset {opset} -o {bundle.folder}"
        )
    if bundle and verify != VERIFY[0]:
        raise UsageError(
            f"--verify is for a MODEL that is exported to ONNX first, and {bundle.folder} has its recorded budgets: what is made of it is "
            f"held against each of them wherever it runs here; leave out --verify {verify}"
        )


def _room_on_disk(graphs: Sequence["GraphCapture"], room: Target, options: Any, folder: Path) -> None:
    """Raise BundleError where the artifacts will not fit beside what is there, before the first of them is made."""
    from elastic_targets.weights import weights

    free = shutil.disk_usage(folder).free
    most = sum(4 * weight.numel() for graph in graphs for _, weight in weights(graph.module))
    if room.estimate is None or most < free:
        return
    written = needed = 0
    for graph in graphs:
        estimate = room.estimate(graph, options)
        written += estimate.file_bytes
        needed = max(needed, written + estimate.waiting_bytes)
    if needed > free:
        raise BundleError(
            f"the artifacts need {needed / 1e9:.2f} GB, and {folder} has {free / 1e9:.2f} GB free: make room, choose another "
            "-o/--output, or a --precision of fewer bits"
        )


def _lowered(room: Target, graph: Any, options: Any, stage: Path, on_progress: OnProgress) -> tuple[Artifact, ...]:
    """The artifacts of a graph, written into `stage` and checked."""
    artifacts = room.lower(graph, options, stage, on_progress)
    for artifact in artifacts:
        room.ensures(graph, artifact, stage)
    return artifacts


def _proven(bundle: Bundle, graph: str, artifacts: tuple[Artifact, ...], frugal: bool = False, standing: bool = False) -> Manifest:
    """The manifest of `bundle` with these artifacts of a graph proven, or told why they could not be run; with those that are `standing`
    beside them, too, at what was recorded since, of which one that cannot run here keeps the rows that it has.

    Raises: VerificationError naming the budget that failed.
    """
    new, every = {artifact.slot for artifact in artifacts}, bundle.manifest.graphs[graph].artifacts if standing else artifacts
    proven = [verify_artifact(bundle, graph, artifact, frugal=frugal) for artifact in every]
    for artifact in proven:
        require(graph, artifact)
    return bundle.manifest.joined(graph, [artifact for artifact in proven if artifact.slot in new or artifact.verified])


def versions() -> dict[str, str]:
    """Versions of what took part in an export."""
    packages = {"python": platform.python_version(), "elastic-export": version("elastic-export")}
    for name in ("torch", "onnx", "onnxruntime", "numpy"):
        with contextlib.suppress(PackageNotFoundError):
            packages[name] = version(name)
    return packages


def _manifest(capture: "Capture", command: str) -> Manifest:
    """The capture's manifest, with what is known when it is exported."""
    created = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    provenance = msgspec.structs.replace(capture.manifest.provenance, command=command, created=created, versions=versions())
    return msgspec.structs.replace(capture.manifest, provenance=provenance)


def prepare(capture: "Capture", job: Job, old: Bundle | None) -> tuple[Bundle | None, Manifest, list["GraphCapture"]]:
    """The bundle that the export will extend (`old`, or None: it makes a new one), the manifest to go on with, and the graphs that stay
    as they are and of which budgets are to be proven that an earlier export left out.
    Of the capture's graphs those are left that the old bundle does not have in this precision.

    Raises: what `export_capture` raises before it lowers anything.
    """
    room, options = job.target, job.options
    for graph in capture.graphs:
        room.requires(graph, options)
    names = [graph.name for graph in capture.graphs]
    for name, words in (room.addressed(options) if room.addressed else {}).items():
        if not any(each == name or each.startswith(f"{name}_encoder") for each in names):  # `text` is every text encoder
            raise UsageError(f"{words} is for a graph that this export has not; it has {', '.join(names)}: leave it out")
    manifest = _manifest(capture, job.command)
    if old and not (conflict := _conflict(old.manifest, manifest)):
        unproven = [graph for graph in capture.graphs if _unproven(graph, old, job)]
        missing = _missing(old, room, capture.graphs, options, job.overwrite, bool(unproven))
        capture.graphs[:], standing = missing, [graph for graph in unproven if graph not in missing]
        return old, msgspec.structs.replace(old.manifest, quality=manifest.quality, precisions=manifest.precisions), standing
    if old and not job.overwrite:
        raise BundleError(f"{old.folder} holds another export ({conflict}): choose another -o/--output, or replace it with --overwrite")
    return None, manifest, []


def _unproven(graph: "GraphCapture", old: Bundle, job: Job) -> bool:
    """Whether a graph of the old bundle has budgets to be proven that it was not proven at."""
    left = [Budget(**each) for each in old.manifest.graphs[graph.name].unproven] if graph.name in old.manifest.graphs else []
    return any(budget in left for budget in proving(graph, job)[0])


def _conflict(old: Manifest, new: Manifest) -> str | None:
    """Why `new` cannot join the bundle of `old`, or None."""
    facts = [(name, getattr(old.model, name), getattr(new.model, name)) for name in ("name", "family", "weights", "vae")]
    facts += [(name, old.model.config.get(name), value) for name, value in new.model.config.items()]
    there, here = old.provenance.weights_sha256, new.provenance.weights_sha256
    facts += [(f"{name}'s weights' SHA-256", there[name], sha256) for name, sha256 in here.items() if name in there]
    if not there and new.provenance.checkpoint_sha256:  # a bundle of an earlier version; a dry run does not read the weights
        facts += [("checkpoint's SHA-256", old.provenance.checkpoint_sha256, new.provenance.checkpoint_sha256)]
    facts += [("adapters", _adapters(old), _adapters(new))]
    facts += [("axes", [axis.name for axis in old.axes], [axis.name for axis in new.axes])]
    facts += [(axis.name, str(before.span), str(axis.span)) for before in old.axes for axis in new.axes if axis.name == before.name]
    for name, graph in new.graphs.items():
        before = old.graphs[name].dimensions if name in old.graphs else None
        facts += [(f"{name}'s dimensions", _spans(before), _spans(graph.dimensions))]
    return next((f"its {what}: {before} there, {now} here" for what, before, now in facts if before != now), None)


def _adapters(manifest: Manifest) -> str:
    return ", ".join(f"{each.name}:{each.scale:g} ({each.sha256[:8]})" for each in manifest.provenance.adapters) or "none"


def _spans(dimensions: dict[str, Span] | None) -> str | None:
    return None if dimensions is None else ", ".join(f"{name} {span}" for name, span in dimensions.items())


def _missing(old: Bundle, room: Target, graphs: Sequence[G], options: Any, overwrite: bool, unproven: bool = False) -> list[G]:
    """The graphs that are still to be lowered: those whose every artifact the bundle has already stay, as a decoder does beside another
    precision of its denoiser.

    Raises: BundleError where nothing is left to do (`unproven`: some budgets are), or some artifacts of a graph are there and others are
        not; and for a file to replace that an engine takes its weights from.
    """
    standing = {graph.name: {artifact.slot: artifact.path for artifact in old.manifest.graphs[graph.name].artifacts} for graph in graphs}
    if overwrite:
        replaced = {standing[graph.name].get(path) for graph in graphs for path in room.paths(graph, options)}
        for engine in (each for graph in old.manifest.graphs.values() for each in graph.artifacts if isinstance(each, TrtArtifact)):
            if engine.stripped and engine.source in replaced:
                raise BundleError(
                    f"{old.folder / engine.path} was built with --strip and takes its weights from {engine.source}, which this would "
                    "replace: choose another -o/--output"
                )
        return list(graphs)
    missing = [graph for graph in graphs if set(room.paths(graph, options)) - set(standing[graph.name])]
    for graph in missing or (() if unproven else graphs):
        if path := next((standing[graph.name][path] for path in room.paths(graph, options) if path in standing[graph.name]), None):
            raise BundleError(f"{old.folder / path} exists: choose another -o/--output, or replace it with --overwrite")
    return missing


def proving(graph: "GraphCapture", job: Job) -> tuple[list[Budget], list[Budget]]:
    """The budgets to prove of a graph, and those that the job leaves out: its ends are those that the target makes something for, where
    it does not serve every budget."""
    from elastic_export.capture.capture import probe_budgets

    probes, own = probe_budgets(graph.axes, graph.open_dimensions), job.target.proves(graph, job.options)
    every, served = list(dict.fromkeys([*probes, *own])), own or probes
    proven = {"budgets": every, "ends": [*served[:1], *served[-1:]], "none": []}[job.verify]
    return list(dict.fromkeys(proven)), [budget for budget in every if budget not in proven]
