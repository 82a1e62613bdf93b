"""Add TensorRT engines to a bundle that has an ONNX artifact. No torch: this is also what runs on a Jetson."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from elastic_export.verify import require, verify_artifact
from elastic_runtime.contract.bundle import MANIFEST, Bundle, write_manifest, writing
from elastic_runtime.errors import BundleError
from elastic_targets import load


def add_engines(
    bundle: Bundle,
    options: Any,
    output: Path | None = None,
    overwrite: bool = False,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> Bundle:
    """Build engines for every graph of `bundle` into it, or into a copy at `output`; verify those that this machine can run.

    On any error, Ctrl-C included, the old bundle is whole.

    Raises: UsageError and its kinds for what cannot be built as asked, MissingError for an absent builder; BundleError where
    an engine or the output exists and `overwrite` is not given; VerificationError naming the budget that failed.
    """
    room = load("trt")
    folder = output or bundle.folder
    _refuse_clobber(room, bundle, options, folder, overwrite)
    manifest = bundle.manifest
    with writing(folder, extend=bundle) as stage:
        for graph in bundle.manifest.graphs:
            made = room.lower(bundle, graph, options, stage, on_progress)
            room.ensures(bundle, graph, made, stage)
            manifest = manifest.joined(graph, made)
            for artifact in made:
                proven = verify_artifact(Bundle(stage, manifest), graph, artifact)
                require(graph, proven)
                manifest = manifest.joined(graph, [proven])
        write_manifest(stage, manifest)
    return Bundle.open(folder)


def _refuse_clobber(room: ModuleType, bundle: Bundle, options: Any, folder: Path, overwrite: bool) -> None:
    elsewhere = folder.absolute() != bundle.folder.absolute() and folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    if elsewhere and not (folder / MANIFEST).is_file():
        raise BundleError(f"{folder} exists and is not a bundle; it is left alone. Choose another -o/--output.")
    if elsewhere and not overwrite:
        raise BundleError(f"{folder} holds another bundle: choose another -o/--output, or replace it with --overwrite")
    for name, graph in bundle.manifest.graphs.items():
        planned = room.plan(bundle, name, options)
        paths = {artifact.path for artifact in graph.artifacts}
        for sms in planned.engines:
            if planned.path(sms) in paths and not overwrite:
                raise BundleError(f"{bundle.folder / planned.path(sms)} exists: replace it with --overwrite, or choose another --sm")
