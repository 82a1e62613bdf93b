"""Names of a bundle's files: which others a file takes where its own stands already, and a manifest after its files moved."""

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath

import msgspec

from elastic_runtime.contract.artifacts import Artifact, CoremlArtifact, FileEntry, TrtArtifact
from elastic_runtime.contract.bundle import inside
from elastic_runtime.contract.manifest import Manifest

_NUMBER = re.compile(r"-\d+$")


def variants(name: str) -> Iterator[str]:
    """The name, and then those that it takes where it stands already: `onnx-2/denoiser.onnx`, `reference-2.npz`.

    The number goes to the first folder, so that files of one artifact keep their places beside each other.
    """
    first, slash, rest = name.partition("/")
    stem, dot, suffix = (first, "", "") if slash else first.partition(".")
    yield name
    for number in itertools.count(2):
        if (other := f"{_NUMBER.sub('', stem)}-{number}{dot}{suffix}{slash}{rest}") != name:
            yield other


def free(folder: Path, name: str) -> bool:
    """Whether a new file can take this name: nothing stands there, and no link or file in its folders' place."""
    parts = PurePosixPath(name).parts
    path = folder
    for part in parts[:-1]:
        path /= part
        if path.is_symlink() or (path.exists() and not path.is_dir()):
            return False
    path /= parts[-1]
    return not path.exists() and not path.is_symlink()


def apart(name: str, others: Iterable[str]) -> bool:
    """Whether a file of this name can lie beside the others: it is none of them, and none is a folder of the other."""
    return not any(f"{name}/".startswith(f"{other}/") or f"{other}/".startswith(f"{name}/") for other in others)


def artifacts(manifest: Manifest) -> Iterator[Artifact]:
    """The artifacts of every graph."""
    for graph in manifest.graphs.values():
        yield from graph.artifacts


def renamed(manifest: Manifest, new: Mapping[str, str], staged: Mapping[str, str]) -> Manifest:
    """The manifest after its files moved: `new` has the name of each that moves, `staged` the SHA-256 by its old name.

    An engine's `source` follows only the very file that it was built from.
    """

    def file(entry: FileEntry) -> FileEntry:
        return msgspec.structs.replace(entry, path=new.get(entry.path, entry.path))

    def artifact(each: Artifact) -> Artifact:
        files = tuple(map(file, each.files))
        changes: dict[str, object] = {"files": files}
        if isinstance(each, CoremlArtifact):  # its package is a folder, whose files moved together
            rest = each.files[0].path.removeprefix(each.package)
            changes["package"] = files[0].path.removesuffix(rest)
        if each.conditions:
            path = each.conditions.path
            changes["conditions"] = msgspec.structs.replace(each.conditions, path=changes.get("package", new.get(path, path)))
        if isinstance(each, TrtArtifact) and staged.get(each.source) == each.source_sha256:
            changes["source"] = new[each.source]
        return msgspec.structs.replace(each, **changes)

    graphs = dict(manifest.graphs)
    for name, graph in graphs.items():
        graphs[name] = msgspec.structs.replace(graph, artifacts=tuple(map(artifact, graph.artifacts)))
    text = manifest.model.text
    if text:
        encoders = tuple(msgspec.structs.replace(each, tokenizer=file(each.tokenizer)) for each in text.encoders)
        text = msgspec.structs.replace(text, encoders=encoders)
    return msgspec.structs.replace(
        manifest,
        graphs=graphs,
        model=msgspec.structs.replace(manifest.model, text=text),
        reference=file(manifest.reference) if manifest.reference else None,
    )


def moving(manifest: Manifest) -> list[set[str]]:
    """Names that move together: those of an artifact, and of all that share a file; every other file by itself."""
    made = [{file.path for file in each.files} for each in artifacts(manifest)]
    made += [{file.path} for file in manifest.files()]
    groups: list[set[str]] = []
    for names in made:
        joined = names.union(*(other for other in groups if names & other))
        groups = [other for other in groups if not names & other] + [joined]
    return groups


def records(content: object) -> Iterator[FileEntry]:
    """Every file that a manifest of any version lists: each {path, bytes, sha256} in its JSON with a name `inside`."""
    rest = [content]
    while rest:
        each = rest.pop()
        if isinstance(each, list):
            rest += each
        elif isinstance(each, dict):
            rest += each.values()
            name, size, digest = (each.get(field) for field in ("path", "bytes", "sha256"))
            if isinstance(name, str) and isinstance(size, int) and isinstance(digest, str) and inside(name):
                yield FileEntry(path=name, bytes=size, sha256=digest)
