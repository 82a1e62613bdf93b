"""A bundle on the hub: one commit with its files, and a model card made from its manifest. No torch."""

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from elastic_runtime import hub
from elastic_runtime.contract.agreement import decode
from elastic_runtime.contract.artifacts import Artifact, OnnxArtifact, TrtArtifact
from elastic_runtime.contract.budget import key
from elastic_runtime.contract.bundle import MANIFEST, Bundle
from elastic_runtime.contract.manifest import Manifest
from elastic_runtime.contract.precision import PRECISIONS
from elastic_runtime.denoising.pictures import obstacle
from elastic_runtime.errors import BundleError, UsageError
from elastic_runtime.files.names import records

CARD = "README.md"
# What a repository may hold besides a bundle: the hub's own, and what people add to a card.
BESIDE = re.compile(r"README\.md|\.gitattributes|LICENSE[\w.-]*|.*\.(png|jpe?g|webp|gif|md|txt)", re.IGNORECASE)
_MARK = re.compile(r"<!-- made by elastic-export from elastic\.json; kept as it is once edited; sha256 ([0-9a-f]{64}) -->\n?")


@dataclass(frozen=True)
class Pushed:
    """What was pushed where. `kept_card` tells that the repository's own card was edited and stays."""

    repository: str
    url: str
    files: tuple[str, ...]
    removed: tuple[str, ...]
    bytes: int
    kept_card: bool


def push(
    bundle: str | Path,
    repository: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    overwrite: bool = False,
    on_stage: Callable[[str], None] = lambda what: None,
) -> Pushed:
    """Write a bundle to the hub's repository `org/name`, which is made where there is none, in one commit.

        elastic_export.push("digits", "me/digits", private=True)

    Every file is checked by its hash before. Artifacts of the bundle that stood there, and that this one does not have, are taken away. The
    card is written anew as long as it is as this wrote it; an edited one stays, and the result says so.

    Args:
        bundle: its folder. repository: `org/name`. private: of a repository that is made now. revision: a branch, made where there is none.
        message: of the commit. overwrite: whether to replace an edited card and a manifest that cannot be read, and to write beside what
            is no bundle.
        on_stage: told `(what)`.

    Raises: BundleError for a damaged bundle; UsageError for a repository that holds something else, or that the token may not write.
    """
    place = hub.parsed(repository)
    if place is None or (revision and place.revision != hub.MAIN):
        raise UsageError(f"a repository is named org/name, and its branch by --revision, got {repository!r}")
    place = hub.Repository(place.id, revision or place.revision)
    on_stage(f"hashing {bundle}")
    opened = Bundle.open(bundle, hashes=True)
    entries = {entry.path: entry for entry in opened.manifest.files()}
    on_stage(f"looking at {place}")
    parent = hub.created(place, private)
    there = hub.files(parent)
    old, card = _old(parent, there, overwrite), hub.read(parent, CARD) if CARD in there else None
    if old is None and not overwrite and (others := [name for name in there if not BESIDE.fullmatch(name)]):
        raise BundleError(
            f"{place} is no bundle and holds {', '.join(others[:4])}{' and more' if len(others) > 4 else ''}: choose another name, or "
            "write beside that with --overwrite"
        )
    kept = card is not None and not overwrite and not ours(card.decode(errors="replace"))
    content: dict[str, Path | bytes] = {name: opened.file(name) for name in entries}
    assert opened.text is not None
    content[MANIFEST] = opened.text  # what was hashed: an export may join the folder meanwhile
    if not kept:
        content[CARD] = model_card(opened.manifest, place.id).encode()
    stale = old & set(there) - set(content) if old else set()
    size = sum(entry.bytes for entry in entries.values())
    on_stage(f"sending {size / 1e9:.2f} GB to {place}")
    commit = hub.push(place, parent, content, sorted(stale), message or f"{opened.manifest.model.name}, by elastic-export")
    return Pushed(str(place), commit.url, commit.files, commit.removed, size, kept)


def _old(repository: hub.Repository, there: list[str], overwrite: bool) -> set[str] | None:
    """Files of the bundle that stands in a repository; None where there is none.

    Raises: BundleError for a manifest that cannot be read, unless it is to be replaced.
    """
    if (text := hub.read(repository, MANIFEST) if MANIFEST in there else None) is None:
        return None
    try:
        return {entry.path for entry in decode(text, f"{repository.id}'s {MANIFEST}").files()}
    except BundleError as error:
        if not overwrite:
            why = str(error).rstrip(".")
            raise BundleError(f"{repository.id} holds a bundle that cannot be read: {why}. Or replace it with --overwrite.") from error
    try:
        return {entry.path for entry in records(msgspec.json.decode(text))}
    except (ValueError, RecursionError):  # no JSON, which lists nothing
        return set()


def ours(card: str) -> bool:
    """Whether a card is as `model_card` wrote it, by the hash that it carries."""
    text = card.replace("\r\n", "\n")
    match = _MARK.search(text)
    return bool(match) and _hash(_MARK.sub("", text)) == match[1]  # type: ignore[index]


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def model_card(manifest: Manifest, repository: str) -> str:
    """The card of a bundle that is to be found under that name: Markdown with a head in YAML, and a comment with its hash."""
    head, body = "\n".join(_head(manifest)) + "\n", "\n".join(_body(manifest, repository)) + "\n"
    mark = f"<!-- made by elastic-export from elastic.json; kept as it is once edited; sha256 {_hash(head + body)} -->\n"
    return head + mark + body


def _head(manifest: Manifest) -> Iterator[str]:
    """The YAML between two lines of dashes; values are JSON, which YAML holds."""
    targets = {artifact.target for graph in manifest.graphs.values() for artifact in graph.artifacts}
    tags = ["elastic-export", "diffusion", manifest.model.family, *sorted(targets)]
    yield "---"
    yield "library_name: elastic-export"
    yield f"pipeline_tag: {'text-to-image' if manifest.model.text else 'unconditional-image-generation'}"
    if (base := hub.parsed(manifest.provenance.checkpoint or "")) is not None:
        yield f"base_model: {json.dumps(base.id)}"
    yield f"tags: {json.dumps(tags)}"
    yield "---"


def _body(manifest: Manifest, repository: str) -> Iterator[str]:
    model = manifest.model
    axes = ", ".join(f"{axis.name} {axis.span}" for axis in manifest.axes)
    yield f"# {model.name}"
    yield ""
    yield (
        f"A {model.family} model as a bundle of [elastic-export](https://pypi.org/project/elastic-export): one set of weights "
        + (f"with its compute budget open ({axes}), chosen where it draws." if axes else "without a budget to choose.")
    )
    yield ""
    yield "## Draw"
    yield ""
    yield from _drawing(manifest, repository)
    yield ""
    yield from _budgets(manifest)
    yield "## Files"
    yield ""
    yield "| graph | target | precision | MB | largest error that was proven | its bound |"
    yield "|---|---|---|---:|---:|---:|"
    for name, graph in manifest.graphs.items():
        for artifact in graph.artifacts:
            size = sum(entry.bytes for entry in artifact.files) / 1e6
            proven, bound = "not run", "-"
            if artifact.verified:
                worst = max(artifact.verified, key=lambda row: row.share)
                proven, bound = f"{worst.max_abs:.1e} at {len(artifact.verified)} budgets", worst.bounded
            yield f"| {name} | {artifact.target} | {artifact.held} | {size:.1f} | {proven} | {bound} |"
    yield ""
    yield from _origin(manifest)


def _drawing(manifest: Manifest, repository: str) -> Iterator[str]:
    """Commands that prove the bundle and draw a picture, and the same in Python; or what a picture needs beside the bundle."""
    model, lacking = manifest.model, " ".join(_lacking(manifest))
    prompted = bool(model.text and model.text.encoders)
    subject = ' --prompt "a red cat"' if prompted else " --classes 0" if model.num_classes else ""
    budget = f" --{axis.name} {axis.default}" if (axis := next(iter(manifest.axes), None)) and not model.patches else ""
    yield "```sh"
    yield f"pip install 'elastic-export[{_runtime(manifest)},hub{',ralu' if model.patches or prompted else ''}]'"  # scipy, tokenizers
    if not lacking:
        yield f"elastic-export generate {repository} -o picture.png{subject}{budget}"
    yield f"elastic-export verify {repository}"
    yield "```"
    yield ""
    if lacking:
        yield lacking
        return
    yield "```python"
    yield "from elastic_runtime import ElasticPipeline"
    yield ""
    what = 'prompt="a red cat"' if prompted else "class_labels=[0]" if model.num_classes else ""
    yield f'with ElasticPipeline.from_pretrained("{repository}") as pipe:'
    yield f'    pipe({what}).images[0].save("picture.png")'
    yield "```"


def _runtime(manifest: Manifest) -> str:
    """The extra of what opens the bundle: ONNX Runtime's wherever it opens something."""
    extras = [_opens(artifact) for graph in manifest.graphs.values() for artifact in graph.artifacts]
    return "ort" if "ort" in extras or not extras else extras[0]


def _opens(artifact: Artifact) -> str:
    if isinstance(artifact, TrtArtifact):
        return "rtx" if artifact.builder == "tensorrt_rtx" else "trt"
    if isinstance(artifact, OnnxArtifact):
        return next(name for name in ("ort", "openvino", "trt") if name in PRECISIONS[artifact.precision].backends)
    return artifact.target


def _lacking(manifest: Manifest) -> Iterator[str]:
    """What keeps `generate` from drawing: sentences, none where nothing does."""
    text = manifest.model.text
    if "denoiser" not in manifest.graphs:
        yield f"It holds {', '.join(manifest.graphs)} and no denoiser, so nothing is drawn from it alone."
        return
    if text and not text.encoders:
        beside = " and `pooled_prompt_embeds`" if text.pooled else ""
        yield f"It holds no text encoders: embeddings of prompts are the caller's, `prompt_embeds`{beside} of `ElasticPipeline`."
    if why := obstacle(manifest):
        yield f"{why[0].upper()}{why[1:]}."


def _budgets(manifest: Manifest) -> Iterator[str]:
    if manifest.cost and manifest.axes:
        yield "## Budgets"
        yield ""
        yield "| budget | GFLOPs a step |"
        yield "|---|---:|"
        rows = sorted(manifest.cost, key=lambda row: row.flops)
        step = max(1, -(-(len(rows) - 1) // 8))
        for row in dict.fromkeys([*range(0, len(rows), step), len(rows) - 1]):
            yield f"| {key(rows[row].budget)} | {rows[row].flops / 1e9:.4g} |"
        yield ""
    if manifest.quality:
        yield "| measured at | accuracy | Fréchet distance |"
        yield "|---|---:|---:|"
        for quality in manifest.quality:
            yield f"| {quality.where} | {quality.accuracy:.3f} | {quality.frechet_distance:.4g} |"
        yield ""


def _origin(manifest: Manifest) -> Iterator[str]:
    origin = manifest.provenance
    yield "## Made from"
    yield ""
    if manifest.model.weights == "random":
        yield "- weights: random, to measure speed"
    elif origin.checkpoint:
        yield f"- weights: {origin.checkpoint}"
    for component, sha256 in origin.weights_sha256.items():
        yield f"- {component}: sha256 `{sha256}`"
    for adapter in origin.adapters:
        yield f"- LoRA {adapter.name}, {adapter.scale:g} times, sha256 `{adapter.sha256}`"
    yield f"- with {', '.join(f'{name} {version}' for name, version in origin.versions.items())}, {origin.created}"
