"""Model folders on the hub: of a diffusers folder the configs, the tokenizers and one set of safetensors for each component, and nothing
else: no pickles, no second precision, no copy of the whole in one file."""

from collections.abc import Iterable
from pathlib import Path

from elastic_export.foreign.folder import COMPONENTS, INDEX
from elastic_export.foreign.reading import read_json
from elastic_export.foreign.weights import weights_name
from elastic_runtime import hub
from elastic_runtime.contract.bundle import MANIFEST
from elastic_runtime.errors import MissingError, ModelError

SUBFOLDERS = tuple(name for names in COMPONENTS.values() for name in names)
CONFIGS = (INDEX, MANIFEST, *(f"{name}/*.json" for name in (*SUBFOLDERS, "scheduler")))
# Beside each text encoder: what transformers reads of a tokenizer and of a processor.
TOKENIZERS = tuple(f"{kind}*/*.{end}" for kind in ("tokenizer", "processor") for end in ("json", "txt", "model", "jinja"))
ELIT = "transformer/elit.safetensors"


def configs(repository: hub.Repository) -> Path:
    """The snapshot with a diffusers folder's JSON files alone.

    Raises: ModelError for a repository that is no diffusers folder, and what `hub.snapshot` raises.
    """
    folder = hub.snapshot(repository, CONFIGS)
    if (folder / MANIFEST).is_file() and not (folder / INDEX).is_file():
        raise ModelError(f"{repository} is a bundle, and has been exported: draw with elastic-export generate {repository} -o picture.png")
    if not (folder / INDEX).is_file() and not (folder / "transformer" / "config.json").is_file():
        raise ModelError(
            f"{repository} is no diffusers folder: it has no {INDEX} and no transformer/config.json. Give the name of the repository in "
            "diffusers' layout, which often ends in -diffusers or -Diffusers"
        )
    return folder


def folder(repository: hub.Repository, components: Iterable[str] | None = None) -> Path:
    """The snapshot with everything that an export of these components (None: all) reads.

    Raises: as `configs`.
    """
    first = configs(repository)
    pinned = repository.at(first)
    words = COMPONENTS if components is None else [word for word in components if word in COMPONENTS]
    names = {name for word in words for name in COMPONENTS[word]}
    listed = _listed(pinned, first, sorted(names))
    wanted = [file for name in sorted(names) for file in _weights(first, name, listed)]
    wanted += [ELIT] if "transformer" in names and ELIT in listed else []
    return hub.snapshot(pinned, [*CONFIGS, *(TOKENIZERS if names & set(COMPONENTS["text"]) else ()), *wanted])


def component(repository: hub.Repository) -> Path:
    """The snapshot of a component that is a repository of its own, as VAEs are."""
    first = hub.snapshot(repository, ["config.json", "*.index*.json"])
    if not (first / "config.json").is_file():
        raise ModelError(f"{repository} has no config.json, and so is no component as diffusers saves them")
    pinned = repository.at(first)
    return hub.snapshot(pinned, ["config.json", "*.index*.json", *_weights(first, "", _listed(pinned, first, [""]))])


def _listed(repository: hub.Repository, snapshot: Path, components: Iterable[str]) -> list[str]:
    """Names of a repository's files; of those that its snapshot holds, where the hub is out of reach.

    Raises: MissingError where the snapshot lacks the weights of a component, too.
    """
    try:
        return hub.files(repository)
    except MissingError:
        cached = sorted(path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file())
        if any((snapshot / name / "config.json").is_file() and not _weights(snapshot, name, cached) for name in components):
            raise
        return cached


def _weights(folder: Path, name: str, listed: list[str]) -> list[str]:
    """Names of a component's weights among those of the repository: the one set that would be read of a whole copy."""
    prefix = f"{name}/" if name else ""
    held = {file.removeprefix(prefix) for file in listed if file.startswith(prefix)}
    weights = weights_name(held.__contains__)
    if weights is None:  # said in its place, by who reads it
        return []
    if not weights.endswith(".json"):
        return [prefix + weights]
    shards = read_json(folder / name / weights).get("weight_map")
    return [prefix + weights, *(prefix + each for each in sorted(set(map(str, shards.values()))))] if isinstance(shards, dict) else []
