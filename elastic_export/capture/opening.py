"""From what a user names to a capture: a model of the zoo, or a diffusers folder; what does not go with it is refused."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from elastic_export.capture import elit
from elastic_export.capture.capture import Capture, capture
from elastic_export.capture.folders import capture_folder
from elastic_export.capture.zoo import Request, load, samples
from elastic_export.families import tokens
from elastic_export.foreign.adapters import read_adapter
from elastic_export.sides import Sides
from elastic_runtime.contract.axis import Span
from elastic_runtime.errors import UsageError


def open_model(
    model: str,
    folder: Path | None,
    spans: Mapping[str, Span],
    batch: Span,
    *,
    checkpoint: Path | None = None,
    config: Path | None = None,
    vae: Path | None = None,
    components: tuple[str, ...] | None = None,
    size: Span | Sides | None = None,
    max_sequence_length: int | None = None,
    head_blocks: int | None = None,
    random_weights: bool = False,
    adapters: Sequence[tuple[Path, float]] = (),
    digest: bool = True,
) -> Capture:
    """Capture the model of that name, its axes narrowed to `spans`; see `elastic_export.export` for the rest.

    `folder`: what `locate` says of the name. `digest`: whether to read a folder's weights through once, for their SHA-256.

    Raises: UsageError for arguments that are for another kind of model; ModelError and BudgetError as `load` and the captures.
    """
    if folder:
        others = {f"--{name}": span for name, span in spans.items() if name != tokens.AXIS and not elit.is_elit(folder)}
        others |= {"--checkpoint": checkpoint, "--config": config, "--vae": vae}  # type: ignore[dict-item]
        others |= {"--head-blocks": head_blocks is not None, "--random-weights": random_weights}  # type: ignore[dict-item]
        if wrong := [name for name, value in others.items() if value]:
            verb = "does" if len(wrong) == 1 else "do"
            raise UsageError(f"{model} is a diffusers folder and has its own sizes and weights: {', '.join(wrong)} {verb} not go with it")
        packaged, files = model in samples(), tuple(read_adapter(*each) for each in adapters)
        return capture_folder(folder, components, size, batch, Path(model).name, digest, packaged, spans, max_sequence_length, files)
    if components or size or max_sequence_length is not None or adapters:
        raise UsageError(f"--components, --size, --max-sequence-length and --adapter are for a diffusers folder, and {model} is none")
    overrides = {} if head_blocks is None else {"head_blocks": head_blocks}
    return capture(load(Request(model, checkpoint, config, random_weights, overrides)), spans, batch, vae)
