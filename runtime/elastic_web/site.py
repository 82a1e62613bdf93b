"""Write the site: the page's own files, onnxruntime-web's, the bundle's ONNX files, and `index.html` that knows them all."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

from elastic_runtime.choosing.precisions import AUTO
from elastic_runtime.contract.artifacts import FileEntry, OnnxArtifact
from elastic_runtime.contract.bundle import Bundle, readable, sha256
from elastic_runtime.errors import BundleError
from elastic_runtime.files import site
from elastic_web.fitting import facts, fitting, proof
from elastic_web.library import LICENSE, NAME, Library, library

SOURCES = Path(__file__).with_name("page")
PROOF = "reference.bin"


@dataclass(frozen=True)
class Site:
    """A site that was written: where, from which artifacts by graph, with which version of onnxruntime-web, and its files."""

    folder: Path
    artifacts: dict[str, OnnxArtifact]
    version: str
    files: tuple[FileEntry, ...]

    @property
    def bytes(self) -> int:
        """Of all files but the page."""
        return sum(entry.bytes for entry in self.files)


def write(
    bundle: Bundle,
    folder: Path,
    precisions: Sequence[str] = (AUTO,),
    package: Path | None = None,
    overwrite: bool = False,
    on_stage: Callable[[str], None] = lambda _: None,
) -> Site:
    """Write a site that draws `bundle` into `folder`, whole or not at all.

    `precisions` and `package` as in `fitting` and `library`; `overwrite` replaces a site of ours.

    Raises: UsageError for a bundle that a page cannot draw, BundleError for one that is damaged, MissingError where onnxruntime-web is not
    to be had; for the folder as `files.site.writing`.
    """
    chosen = fitting(bundle, precisions)
    site.standing(folder, overwrite)  # before anything is fetched
    on_stage(f"{NAME}")
    runtime = library(package)
    on_stage("site")
    with site.writing(folder, overwrite) as draft:
        shutil.copytree(SOURCES, draft.stage, dirs_exist_ok=True, ignore=shutil.ignore_patterns(site.PAGE, "__pycache__"))
        shutil.copyfile(site.STYLE, draft.stage / site.STYLE.name)
        _place(runtime, draft.stage / NAME)
        models = {graph: _model(bundle, graph, artifact, draft.stage) for graph, artifact in chosen.items()}
        about = facts(bundle, chosen) | {"library": f"{NAME} {runtime.version}"}
        if bundle.manifest.reference:
            record, numbers = proof(bundle, chosen)
            if record:
                about["proof"] = record
                (draft.stage / PROOF).write_bytes(numbers)
        files = draft.commit(lambda name, entries: _page(name, entries, about | {"models": models}))
    return Site(folder, chosen, runtime.version, files)


def _place(runtime: Library, folder: Path) -> None:
    folder.mkdir()
    for name, content in runtime.files.items():
        (folder / name).write_bytes(content)
    (folder / "LICENSE.txt").write_text(LICENSE, encoding="utf-8")


def _model(bundle: Bundle, graph: str, artifact: OnnxArtifact, stage: Path) -> dict[str, Any]:
    """Copy an artifact's file; what the page must know of it."""
    (entry,) = artifact.files
    source, target = bundle.file(entry.path), stage / f"{graph}.onnx"
    with readable(source):
        shutil.copyfile(source, target)
    if sha256(target) != entry.sha256:
        raise BundleError(f"{source} is damaged: its SHA-256 is not the manifest's. Copy or export it again.")
    return {"file": target.name, "bytes": entry.bytes, "sha256": entry.sha256, "precision": artifact.precision}


def _page(name: str, entries: Sequence[FileEntry], about: dict[str, Any]) -> bytes:
    """`index.html` for files in the folder `name`."""
    listed = [{"path": entry.path, "bytes": entry.bytes, "sha256": entry.sha256} for entry in entries]
    content = {"generator": site.GENERATOR} | about | {"files": listed}
    text = (SOURCES / site.PAGE).read_text(encoding="utf-8")
    return Template(text).substitute(files=name, site=site.embedded(content)).encode()
