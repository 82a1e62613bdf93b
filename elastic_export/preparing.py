"""An export as it is asked for: options read, the folder held, the model captured; nothing is lowered yet."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elastic_export import exporting
from elastic_export.exporting import Job, OnStage, silent
from elastic_export.sides import read_size
from elastic_export.values import BATCH, Folder, Spanned, read_adapters, read_span, read_spans, read_words
from elastic_runtime import hub
from elastic_runtime.contract.bundle import MANIFEST, Bundle
from elastic_runtime.errors import MissingError, UsageError
from elastic_runtime.files.folder import Draft, standing, writing
from elastic_targets.target import OnProgress, Target

if TYPE_CHECKING:
    from elastic_export.capture.capture import Capture

TRANSFORMER = "transformer"  # what `components` calls a denoiser


@dataclass(frozen=True)
class Prepared:
    """An export whose model is captured and whose options are checked.

    `old` is the bundle that stands at `output`; `draft` is None for a dry run.
    """

    capture: "Capture"
    job: Job
    output: Path
    old: Bundle | None
    draft: Draft | None

    def check(self) -> None:
        """Raise what `run` would before it lowers anything."""
        exporting.prepare(self.capture, self.job, self.old)

    def run(self, on_stage: OnStage = silent, on_progress: OnProgress = silent) -> Bundle:
        """Lower, prove and write; the capture is consumed. Not for a dry run."""
        assert self.draft is not None
        return exporting.export_into(self.draft, self.capture, self.job, on_stage, on_progress)

    def notes(self) -> Iterator[str]:
        """What a user should know that is not the result."""
        yield from self.capture.notes
        if ignored := self.capture.manifest.provenance.ignored_weights:
            yield f"ignored {len(ignored)} training-only weights, {ignored[0]} among them"
        if self.capture.manifest.model.weights == "random":
            yield "the weights are random: fit to measure speed, not to draw"


@contextlib.contextmanager
def preparing(
    model: Folder,
    job: Job,
    output: Folder,
    spans: Mapping[str, Spanned | None],
    batch: Spanned | None = None,
    source: Mapping[str, Any] | None = None,
    on_stage: OnStage = silent,
    dry_run: bool = False,
) -> Iterator[Prepared]:
    """What `export` does before it lowers anything, for a target that takes torch; nobody else writes at `output` meanwhile.

    `source` is where the model comes from (`checkpoint` to `random_weights`, see `export`). A dry run writes nothing, and does not read a
    folder's weights through for their hash.

    Raises: as `export`.
    """
    if job.verify not in exporting.VERIFY:
        raise UsageError(f"--verify is one of {', '.join(exporting.VERIFY)}, got {job.verify!r}")
    require_torch("exporting")
    from elastic_export.capture.opening import open_model
    from elastic_export.capture.zoo import locate
    from elastic_export.foreign import hub as hubs

    name = os.fspath(model)
    repository = hub.named(name)
    place = None if repository else locate(name)  # before the output, which may have the model's name, is made
    origin = dict(source or {})
    for each in ("checkpoint", "config", "vae"):
        origin[each] = None if origin.get(each) is None else Path(origin[each])
    origin["size"] = None if origin.get("size") is None else read_size(origin["size"])
    origin["components"] = read_words(origin.get("components"))
    origin["adapters"] = read_adapters(origin.get("adapters"))
    chosen = origin["components"]
    if chosen is not None and TRANSFORMER not in chosen and job.target.denoising and (idle := job.target.denoising(job.options)):
        raise UsageError(f"{idle[0]} is for a denoiser, and --components {','.join(chosen)} has none: leave it out, or add {TRANSFORMER}")
    folder = Path(output)
    with contextlib.ExitStack() as stack:
        # A refusal should not wait for the weights to load.
        draft = None if dry_run else stack.enter_context(writing(folder, job.overwrite))
        old = draft.old if draft else standing(folder, job.overwrite).bundle
        if repository:
            on_stage(f"fetching {name}")
            place, name = hubs.folder(repository, origin["components"]), repository.name
        if origin["vae"] and (named := hub.named(origin["vae"])):
            on_stage(f"fetching {named}")
            origin["vae"] = hubs.component(named)
        on_stage(f"loading {name}")
        batches = BATCH if batch is None else read_span(batch)
        capture = open_model(name, place, read_spans(spans), batches, digest=not dry_run, **origin)
        if repository and place:
            capture.taken_from(f"{repository.id}@{place.name}")
        if job.then and job.then[0].fits:
            job.then[0].fits(capture.manifest, job.then[1])
        yield Prepared(capture, job, folder, old, draft)


def bundle_at(model: Folder, source: Mapping[str, Any]) -> Bundle | None:
    """The bundle that stands at `model`; None for a model that is still to be exported.

    Raises: UsageError for a bundle with a `source` of its own.
    """
    if repository := hub.named(model):
        if hub.read(repository, MANIFEST) is None:
            return None
    elif not (Path(model) / MANIFEST).is_file():
        return None
    if any(value is not None and value is not False and value != [] for value in source.values()):
        raise UsageError(f"{model} is a bundle and has its weights: --checkpoint, --config, --vae, --adapter and the like are for a MODEL")
    return Bundle.open(model)


def target_options(room: Target, given: Mapping[str, Any], precision: str | None = None) -> Any:
    """The record of a target's own options.

    Raises: UsageError listing the options that it has.
    """
    known = [field.name for field in fields(room.options)]
    if unknown := sorted(set(given) - set(known)):
        raise UsageError(f"the {room.name} target has no option {', '.join(unknown)}; it has {', '.join(known)}")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    return room.options(**values | ({} if precision is None else {"precision": precision}))


def require_torch(what: str) -> None:
    """Raise MissingError with the line to paste unless the hall can be entered."""
    try:
        import safetensors  # noqa: F401
        import torch  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingError(f"{what} needs {error.name}, which is not installed: pip install 'elastic-export[torch]'") from error
