"""From what a user types after `elastic-export onnx` to a loaded model: packaged samples, presets and families by name."""

import difflib
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import nn

from elastic_export.families import elt, elt_masked, uvit
from elastic_export.families.dc_dit import model as dc_dit
from elastic_export.families.elit import hdit as elit_hdit
from elastic_export.families.elit import hdit_levels, sit, uvit_tokens
from elastic_export.families.elit import uvit as elit_uvit
from elastic_export.families.family import Family, agree
from elastic_export.families.hdit import model as hdit
from elastic_export.families.layers import randomize
from elastic_export.foreign.checkpoint import load_weights, read_checkpoint
from elastic_export.foreign.reading import read_json
from elastic_export.foreign.weights import checkpoint_files, digest, few
from elastic_runtime.contract.manifest import Quality, Rounded
from elastic_runtime.errors import ModelError

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        sit.FAMILY,
        elit_uvit.FAMILY,
        elit_hdit.FAMILY,
        uvit_tokens.FAMILY,
        hdit_levels.FAMILY,
        elt.FAMILY,
        elt_masked.FAMILY,
        dc_dit.FAMILY,
        uvit.FAMILY,
        hdit.FAMILY,
    )
}
DEFAULT = "elit-mnist"
_PRETRAINED = Path(__file__).parents[1] / "pretrained"


@dataclass(frozen=True)
class Model:
    """A model ready to capture: its module in float32 and where its weights came from."""

    name: str
    family: Family
    params: Any
    module: nn.Module
    weights: str
    checkpoint: Path | None = None
    checkpoint_sha256: str | None = None
    ignored: tuple[str, ...] = ()
    quality: tuple[Quality, ...] = ()
    precisions: tuple[Rounded, ...] = ()


@dataclass(frozen=True)
class Request:
    """What the user asked for: a name, and where its weights and sizes come from."""

    name: str = DEFAULT
    checkpoint: Path | None = None
    config: Path | None = None
    random_weights: bool = False
    overrides: dict[str, Any] = field(default_factory=dict)


def samples() -> dict[str, Path]:
    """The packaged trained samples: name -> card in JSON."""
    return {path.stem: path for path in sorted(_PRETRAINED.glob("*.json"))}


def locate(name: str) -> Path | None:
    """The diffusers folder that a name stands for: a packaged sample's, or a path; None for a model of the zoo's own.

    The zoo's names come first: a bundle that was made of one often stands in a folder of the same name.

    Raises: ModelError where there is neither.
    """
    if name in samples():
        packaged = samples()[name].with_suffix("")
        return packaged if packaged.is_dir() else None
    if name not in names() and Path(name).is_dir():
        return Path(name)
    _find(name)
    return None


def names() -> list[str]:
    """Everything that may stand as MODEL."""
    presets = [name for family in FAMILIES.values() for name in family.presets]
    return [*samples(), *FAMILIES, *presets]


def load(request: Request) -> Model:
    """Build the model and load its weights.

    Raises: ModelError for an unknown name, no weights, or a checkpoint, config and preset that disagree.
    """
    if request.checkpoint and request.random_weights:
        raise ModelError("give --checkpoint or --random-weights, not both")
    if folder := locate(request.name):
        raise ModelError(f"{folder} is a diffusers folder of several components: see elastic_export.capture.folders.capture_folder")
    if request.name in samples():
        return _sample(request)
    family, preset = _find(request.name)
    config = _config(request.config, family) if request.config else {}
    if request.random_weights:
        params = agree(family, _named(family, preset, config, request), request.overrides)
        torch.manual_seed(0)
        module = family.build(params)
        randomize(module, seed=0)
        return Model(request.name, family, params, module.eval(), "random")
    if not request.checkpoint:
        raise ModelError(f"{request.name} needs its weights: give --checkpoint FILE (.pt or .safetensors), or say --random-weights aloud")
    model = _with_weights(request, family, request.checkpoint, _named(family, preset, config, request))
    return replace(model, checkpoint=request.checkpoint)


def sized(request: Request) -> tuple[Family, Any]:
    """Family and sizes of a name, without its weights.

    Raises: ModelError for an unknown name, and for sizes that nothing tells.
    """
    if request.name in samples():
        card = read_json(samples()[request.name])
        return FAMILIES[card["family"]], FAMILIES[card["family"]].params(**card["config"])
    family, preset = _find(request.name)
    config = _config(request.config, family) if request.config else {}
    return family, agree(family, _named(family, preset, config, request), request.overrides)


def _named(family: Family, preset: Any, config: dict[str, Any], request: Request) -> dict[str, dict[str, Any]]:
    """Sources of fields besides the checkpoint, which knows some of a preset's better."""
    fields = asdict(preset) if preset else {}
    if request.checkpoint:
        fields = {name: value for name, value in fields.items() if name not in family.yields}
    return {f"preset {request.name}": fields, f"config {request.config}": config}


def _with_weights(request: Request, family: Family, file: Path, named: dict[str, dict[str, Any]]) -> Model:
    checkpoint = read_checkpoint(file)
    try:
        sources = family.sources(checkpoint.weights, checkpoint.args)
    except ModelError as error:
        raise ModelError(f"{error} ({file} has {few(checkpoint.weights)})") from None
    params = agree(family, sources | named, request.overrides)
    with torch.device("meta"):  # the weights come from the file; building real ones first would double the memory
        module = family.build(params)
    ignored = load_weights(module, family, checkpoint)
    module = module.eval().requires_grad_(False)
    sha256 = digest(checkpoint_files(file))
    return Model(request.name, family, params, module, "checkpoint", checkpoint_sha256=sha256, ignored=ignored)


def _sample(request: Request) -> Model:
    for flag, given in (
        ("--checkpoint", request.checkpoint),
        ("--config", request.config),
        ("--random-weights", request.random_weights),
        *((f"--{name.replace('_', '-')}", True) for name in request.overrides),
    ):
        if given:
            raise ModelError(f"{request.name} is a packaged sample with its own weights: {flag} does not go with it; name a family instead")
    card = read_json(samples()[request.name])
    family = FAMILIES[card["family"]]
    model = _with_weights(request, family, samples()[request.name].with_suffix(".safetensors"), {"the card": card["config"]})
    return replace(model, quality=quality(request.name), precisions=precisions(request.name))


def quality(name: str) -> tuple[Quality, ...]:
    """What the card of a packaged sample measured; nothing for other names."""
    rows = read_json(samples()[name])["quality"] if name in samples() else ()
    return msgspec.convert(rows, tuple[Quality, ...])


def precisions(name: str) -> tuple[Rounded, ...]:
    """What it measured of other precisions; nothing for other names."""
    record = read_json(samples()[name]).get("precisions", {}) if name in samples() else {}
    return msgspec.convert(record.get("rows", ()), tuple[Rounded, ...])


def _find(name: str) -> tuple[Family, Any]:
    for family in FAMILIES.values():
        if name == family.name:
            return family, None
        if name in family.presets:
            return family, family.presets[name]
    close = difflib.get_close_matches(name, names(), n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else "see: elastic-export models"
    raise ModelError(f"there is no model {name!r}; {hint}")


def _config(path: Path, family: Family) -> dict[str, Any]:
    config = read_json(path, "--config")
    if (other := config.pop("family", family.name)) != family.name:
        raise ModelError(f"--config {path} is of family {other!r}, but {family.name!r} was asked for")
    return config
