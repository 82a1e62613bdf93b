"""Add TensorRT engines to a bundle that has an ONNX artifact. No torch: this is also what runs on a Jetson."""

import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from elastic_export.verify import require, verify_artifact
from elastic_runtime.contract.bundle import Bundle
from elastic_runtime.errors import BundleError
from elastic_runtime.files.folder import Draft, writing
from elastic_targets import load


def add_engines(
    bundle: Bundle,
    options: Any,
    output: Path | None = None,
    overwrite: bool = False,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> Bundle:
    """Build engines for every graph of `bundle` into it, or into a copy at `output`.

    Those that this machine can run are verified. On any error, Ctrl-C included, the old bundle is whole.

    Raises: UsageError and its kinds for what cannot be built as asked, MissingError for an absent builder; BundleError
    where an engine or the output exists and `overwrite` is not given, or another run writes there; VerificationError
    naming the budget that failed.
    """
    room = load("trt")
    folder = output or bundle.folder
    here = folder.exists() and os.path.samefile(folder, bundle.folder)
    with writing(folder, overwrite=overwrite and not here) as draft:
        if here:
            bundle = draft.old or Bundle.open(folder)  # as it is now that nobody else can write it
        elif draft.old and not overwrite:
            raise BundleError(f"{folder} holds another bundle: choose another -o/--output, or replace it with --overwrite")
        _refuse_clobber(room, bundle, options, overwrite)
        if not here:
            draft.copy(bundle)
        return _built(draft, room, bundle, options, on_progress)


def _built(draft: Draft, room: ModuleType, bundle: Bundle, options: Any, on_progress: Callable[[str, int, int], None] | None) -> Bundle:
    manifest = bundle.manifest
    for graph in bundle.manifest.graphs:
        made = room.lower(bundle, graph, options, draft.stage, on_progress)
        room.ensures(bundle, graph, made, draft.stage)
        manifest = manifest.joined(graph, made)
        for artifact in made:
            proven = verify_artifact(draft.bundle(manifest), graph, artifact)
            require(graph, proven)
            manifest = manifest.joined(graph, [proven])
    return draft.commit(manifest)


def _refuse_clobber(room: ModuleType, bundle: Bundle, options: Any, overwrite: bool) -> None:
    for name, graph in bundle.manifest.graphs.items():
        planned = room.plan(bundle, name, options)
        standing = {artifact.slot: artifact.path for artifact in graph.artifacts}
        for sms in planned.engines:
            if (path := standing.get(planned.path(sms))) and not overwrite:
                raise BundleError(f"{bundle.folder / path} exists: replace it with --overwrite, or choose another --sm")
