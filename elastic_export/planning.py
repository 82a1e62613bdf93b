"""What a model would take on a device, before anything of it is exported: memory by precision, and seconds a picture by plan or budget.

Configs alone are read, no weights. FLOPs are the families' own formulas and, of text encoders and decoders, torch's counter on modules
without memory; time and memory are the cost model's (`choosing.cost`), as a policy has them before anything was measured.
"""

import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from elastic_export.capture.capture import all_budgets, origin
from elastic_export.capture.elit import is_elit
from elastic_export.capture.folders import Outline, notes, outline
from elastic_export.capture.fusion import NAME as FUSION
from elastic_export.capture.zoo import Request, locate, sized
from elastic_export.families.bricks import FLOAT32, decoder_values
from elastic_export.foreign import hub as hubs
from elastic_export.foreign import language_models, text_encoders
from elastic_export.foreign.component import Component, diffusers_class
from elastic_export.foreign.folder import Folder
from elastic_export.foreign.reading import read_json
from elastic_export.sides import Sides
from elastic_runtime import device as devices
from elastic_runtime import hub
from elastic_runtime.choosing.cost import RESERVED, Costs, Rates, Work, roofline
from elastic_runtime.contract import manifest
from elastic_runtime.contract.axis import Axis, Span
from elastic_runtime.contract.budget import Budget, key
from elastic_runtime.contract.precision import PRECISIONS, held
from elastic_runtime.denoising.conditions import CLASSES_GUIDANCE, guidance_of
from elastic_runtime.device import Peak
from elastic_runtime.drawing.budgets import STEPS
from elastic_runtime.errors import ModelError, UsageError
from elastic_runtime.ralu.offers import offers, unsuited
from elastic_runtime.ralu.plan import FULL, PRESETS, SPEED

HERE = "here"
DENOISER, DECODER = "denoiser", "decoder"
OFFERED = tuple(name for name, row in PRECISIONS.items() if row.targets)
GB = 1e9


@dataclass(frozen=True)
class Memory:
    """Bytes at a precision: of each part's weights (`weights`), of all of them as files (`disk`), and at once while drawing (`peak`): text
    encoders are let go one before the next, and all before the denoiser is opened. `fits` is None where the device's memory is unknown."""

    precision: str
    weights: dict[str, int]
    disk: int
    peak: int
    fits: bool | None


@dataclass(frozen=True)
class Way:
    """A way to draw one picture: a plan or a budget, its steps, its FLOPs (of the denoiser, all branches), and predicted seconds by
    precision, text and decoder included."""

    name: str
    steps: int
    flops: int
    seconds: dict[str, float]


@dataclass(frozen=True)
class Forecast:
    """What a model would take on a device. `size` is height and width in pixels, `branches` are the evaluations of a guided step, and
    `flops` those of one run of each part beside the denoiser. `memory_bytes` is the device's."""

    model: str
    family: str
    device: str
    peak: Peak
    memory_bytes: float | None
    size: tuple[int, int]
    text_tokens: int
    branches: int
    parameters: dict[str, int]
    flops: dict[str, int]
    memory: tuple[Memory, ...]
    ways: tuple[Way, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Part:
    """A graph beside the denoiser: parameters, the work of one run, and how often a picture runs it."""

    parameters: int
    work: Work
    runs: int


@dataclass(frozen=True)
class Asked:
    """The picture: its sides, the steps of plan full and of budgets, the guidance scale, and the most text tokens."""

    size: Sides | int | None
    steps: int
    guidance: float | None
    length: int | None


@dataclass(frozen=True)
class Subject:
    """A model as `forecast` takes it: the works of each way's steps, by name."""

    name: str
    family: str
    size: tuple[int, int]
    text_tokens: int
    branches: int
    parameters: int
    ways: dict[str, list[Work]]
    parts: dict[str, Part] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def plan(
    model: str | Path,
    *,
    device: str = HERE,
    precisions: Sequence[str] | str | None = None,
    size: Sides | int | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    max_sequence_length: int | None = None,
    config: str | Path | None = None,
) -> Forecast:
    """Forecast a model on a device.

        elastic_export.plan("path/to/FLUX.2-klein-4B", device="jetson-agx-orin-64", steps=4)

    Args:
        model: a packaged sample, a family or a preset; a diffusers folder, of which the config files are enough; a transformer's or the
            zoo's config in JSON; or a name on the hub, of which only JSON is downloaded.
        device: its id in the catalogue (see `elastic-export devices`), or "here" for this machine.
        precisions: names of `contract.precision`; None for all that something makes.
        size: a side, or sides, in pixels; None for the model's usual one. steps: of plan full, and of budgets; None for 20.
        guidance: its scale; 1 is off, None what `generate` draws with. config: sizes of a family of the zoo, in JSON.
        max_sequence_length: of a diffusers folder: tokens of a prompt; None for what its pipeline takes.

    Raises: UsageError for a device or precision that there is not; ModelError and BudgetError as an export does.
    """
    wanted = _precisions(precisions)
    id, peak, memory = _device(device)
    asked = Asked(size, STEPS if steps is None else steps, guidance, max_sequence_length)
    subject = _subject(model, asked, None if config is None else Path(config))
    every = {DENOISER: subject.parameters} | {name: part.parameters for name, part in subject.parts.items()}
    return Forecast(
        model=subject.name,
        family=subject.family,
        device=id,
        peak=peak,
        memory_bytes=memory,
        size=subject.size,
        text_tokens=subject.text_tokens,
        branches=subject.branches,
        parameters=every,
        flops={name: round(part.work.flops) for name, part in subject.parts.items()},
        memory=tuple(_memory(subject, precision, memory) for precision in wanted),
        ways=tuple(_way(name, works, subject, peak, wanted) for name, works in subject.ways.items()),
        notes=subject.notes,
    )


def _precisions(given: Sequence[str] | str | None) -> tuple[str, ...]:
    names = OFFERED if given is None else tuple(name.strip() for name in (given.split(",") if isinstance(given, str) else given))
    if unknown := [name for name in names if name not in OFFERED]:
        raise UsageError(f"--precision is of {', '.join(OFFERED)}, got {unknown[0]!r}")
    return names


def _device(name: str) -> tuple[str, Peak, float | None]:
    """Id, peak rates and bytes of memory of a device of the catalogue, or of this machine's fastest processor."""
    if name == HERE:
        here = devices.probe()
        gpu = here.gpus[0] if here.gpus else None
        peak = devices.peak(here, "gpu" if gpu else "cpu")
        return peak.listed or HERE, peak, (gpu.memory_total if gpu and not gpu.integrated else None) or here.memory.total
    entries = {entry.id: entry for entry in devices.catalogue()}
    if name not in entries:
        near = [id for id in entries if name.lower() in id or id in name.lower()] or list(entries)
        raise UsageError(f"there is no device {name!r} in the catalogue; there are {', '.join(near)}, and {HERE} for this machine")
    return name, devices.listed_peak(entries[name]), entries[name].memory.value * GB


def _memory(subject: Subject, precision: str, room: float | None) -> Memory:
    parts = {DENOISER: subject.parameters} | {name: part.parameters for name, part in subject.parts.items()}
    weights = {name: round(count * PRECISIONS[held(precision, name)].weight_bytes) for name, count in parts.items()}
    most = max((work.at(precision).activation_bytes for works in subject.ways.values() for work in works), default=0.0)
    drawing = weights[DENOISER] + RESERVED * subject.branches * most
    if decoder := subject.parts.get(DECODER):
        decoding = RESERVED * decoder.work.at(held(precision, DECODER)).activation_bytes
        drawing = weights[DECODER] + max(drawing, weights[DENOISER] + decoding)
    reading = max((value for name, value in weights.items() if name not in (DENOISER, DECODER)), default=0)
    peak = round(max(drawing, reading))
    return Memory(precision, weights, sum(weights.values()), peak, None if room is None else peak <= room)


def _way(name: str, works: list[Work], subject: Subject, peak: Peak, precisions: Sequence[str]) -> Way:
    def seconds(precision: str) -> float:
        rates = Rates.of(peak, precision)
        drawn = sum(roofline(work.at(precision), subject.branches, rates) for work in works)
        for name, part in subject.parts.items():
            own = held(precision, name)
            drawn += part.runs * roofline(part.work.at(own), 1, Rates.of(peak, own))
        return drawn

    flops = subject.branches * sum(work.flops for work in works)
    return Way(name, len(works), round(flops), {precision: seconds(precision) for precision in precisions})


def _subject(model: str | Path, asked: Asked, config: Path | None) -> Subject:
    if asked.steps < 1:
        raise UsageError(f"--steps is 1 or more, got {asked.steps}")
    text = model if isinstance(model, str) else model.as_posix()
    repository, file = hub.named(text), Path(text).is_file()
    place = None if repository or file else locate(text)
    if config is not None and (repository or file or place):
        what = "is a config itself" if file else "is a diffusers folder and has its own sizes"
        raise UsageError(f"{text} {what}: --config does not go with it")
    if repository:
        return _folder(hubs.configs(repository), repository.name, asked)
    if file:
        return _config(Path(text), asked)
    if place is None:
        return _zoo(Request(text, config=config), asked, text)
    return _folder(place, Path(text).name, asked)


def _config(file: Path, asked: Asked) -> Subject:
    """A config alone: of the zoo, or of a transformer of diffusers, whose folder it may lie in."""
    content = read_json(file, "config")
    if "_class_name" not in content:
        if not isinstance(family := content.get("family"), str):
            raise ModelError(f"{file} tells no model: a transformer's config of diffusers has _class_name, and the zoo's has family")
        return _zoo(Request(family, config=file), asked, str(file))
    if file.name == "config.json" and file.parent.name == "transformer":
        return _folder(file.parent.parent, file.resolve().parent.parent.name, asked)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made) / file.stem
        (folder / "transformer").mkdir(parents=True)
        (folder / "transformer" / "config.json").write_bytes(file.read_bytes())
        return _folder(folder, file.stem, asked)


def _zoo(request: Request, asked: Asked, name: str) -> Subject:
    """A model of classes, at its smallest, usual and largest budget and the doublings between; `name` is what it was asked for by."""
    if asked.size is not None or asked.length is not None:
        raise UsageError(f"--size and --max-sequence-length are for a diffusers folder, and {name} is none: its config tells its size")
    family, params = sized(request)
    with torch.device("meta"):
        parameters = _count(family.build(params))
    axes, facts = family.axes(params), family.facts(params)
    ways = {}
    for budget in _budgets(axes):
        row = family.cost(params, budget, parameters)
        ways[key(budget) or FULL] = [Work(row.flops, row.weight_bytes, row.activation_bytes)] * asked.steps
    channels, height, width = facts["sample_shape"]
    remarks = () if channels in (1, 3) else ("the size is the latent's, and its decoder (--vae at export) is not counted",)
    usual = CLASSES_GUIDANCE if facts["num_classes"] else 1.0
    branches = 2 if (usual if asked.guidance is None else asked.guidance) > 1 else 1
    return Subject(request.name, family.name, (height, width), 0, branches, parameters, ways, notes=remarks)


def _budgets(axes: Sequence[Axis]) -> list[Budget]:
    """Ends, default and doublings of the first axis, the others at their defaults."""
    if not axes:
        return all_budgets(())
    first, defaults = axes[0], {axis.name: axis.default for axis in axes}
    return [Budget(**defaults | {first.name: value}) for value in sorted({first.min, *first.doublings(), first.default, first.max})]


def _folder(path: Path, name: str, asked: Asked) -> Subject:
    """A diffusers folder of which the configs are enough."""
    folder = Folder.open(path)
    sides = Sides(asked.size, asked.size) if isinstance(asked.size, int) else asked.size
    span = None if sides is None else Span(min(sides), max(sides))
    known = outline(folder, [], sides if sides and is_elit(path) else span, Span(1, 2), name, max_sequence_length=asked.length)
    model, transformer = known.model(name), known.transformer
    parameters = _count(transformer.built) - transformer.fusion_parameters + known.drawn.parameters
    costs = Costs(_manifest(known, model, parameters), Rates(1.0, 1.0))
    unit, upscale = transformer.family.patches(transformer.config).size, transformer.upscale
    height, width = sides or (known.drawn.heights.max * upscale, known.drawn.widths.max * upscale)
    if model.patches:
        tokens = height // upscale // unit, width // upscale // unit
        offered = offers(asked.steps, math.prod(tokens), transformer.scheduler, model.few_steps)
        # MrFlow's needs an encoder, as a usual export has none.
        plans = {name: offered[name] for name in (FULL, *PRESETS, SPEED) if name in offered}
        ways = {
            each: [costs.work(Budget(tokens=count)) for count in model.patches.filled_all(plan.step_tokens(*tokens))]
            for each, plan in plans.items()
        }
    else:
        ways = {key(budget): [costs.work(budget)] * asked.steps for budget in _budgets((known.drawn.axis,))}
    usual = CLASSES_GUIDANCE if model.num_classes else None
    embedded, cfg = guidance_of(model, usual if asked.guidance is None else asked.guidance, None)
    branches = 2 if cfg.scale > 1 else 1
    length = known.text.length if known.text else 0
    parts = dict(_texts(folder, known, branches, asked.length))
    if fused := transformer.fusion_parameters:
        work = Work(transformer.family.fusion_flops(transformer.config, length), fused * FLOAT32, 0)
        parts[FUSION] = Part(fused, work, branches)
    if decoder := _decoder(folder, known, height, width):
        parts[DECODER] = decoder
    lacking = [part for part in folder.listed if not (path / part / "config.json").is_file()]
    remarks = list(notes(folder, transformer.vae, list(folder.listed)))
    if model.patches:
        known_to = math.prod(tokens), transformer.scheduler, model.few_steps
        remarks += [why for name in PRESETS if (why := unsuited(name, *known_to))]
    remarks += [f"{', '.join(lacking)} {'has' if len(lacking) == 1 else 'have'} no config.json here and are not counted"] if lacking else []
    remarks += [f"guidance {embedded:g} is an input of the model, and takes no second branch"] if embedded else []
    return Subject(name, model.family, (height, width), length, branches, parameters, ways, parts, tuple(remarks))


def _manifest(known: Outline, model: manifest.Model, parameters: int) -> manifest.Manifest:
    """What the cost model reads of a bundle that there is not yet."""
    return manifest.Manifest(
        schema_version=manifest.SCHEMA_VERSION,
        model=model,
        axes=(known.drawn.axis,),
        graphs={},
        cost=known.drawn.costs(parameters),
        provenance=origin(None),
    )


def _texts(folder: Folder, known: Outline, branches: int, asked: int | None) -> Iterator[tuple[str, Part]]:
    """Text encoders, each run once a branch for as many tokens as it may take, those of a template that is left out among them."""
    family = known.transformer.family
    length = asked or family.text_length(known.transformer.config)
    for name in folder.listed:
        if not name.startswith("text_encoder") or not (folder.path / name / "config.json").is_file():
            continue
        rule = language_models.rule_of(folder, name, family.prompts) if family.prompts else None
        module = language_models.built(folder, name, rule) if rule else text_encoders.built(folder, name)[0]
        most = None if rule else getattr(module.config, "max_position_embeddings", None)  # CLIP's
        tokens = min(length, most) if isinstance(most, int) else length + (rule.drop if rule else 0)
        ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
        yield name, _part(module.to("meta"), lambda module, ids=ids: module(ids), branches)


def _decoder(folder: Folder, known: Outline, height: int, width: int) -> Part | None:
    path = folder.path / "vae"
    if known.transformer.vae is None:
        return None
    config = Component(path).config
    vae: Any = Component(path).build(diffusers_class(str(config.get("_class_name", "AutoencoderKL"))))
    framed, channels = "z_dim" in config, config.get("z_dim") or config.get("latent_channels", 4)
    halvings = len(config.get("temperal_downsample", ()) if framed else config.get("block_out_channels", (64,))[1:])
    rows, columns = height >> halvings, width >> halvings
    latent = torch.empty(1, channels, *((1,) if framed else ()), rows, columns, device="meta")
    values = decoder_values(config, max(height, width))
    vae.encoder, vae.quant_conv = nn.Identity(), None
    return _part(vae, lambda module: module.decode(latent, return_dict=False), 1, values)


def _part(module: Any, run: Any, runs: int, activations: int = 0) -> Part:
    """A module on `meta`: its parameters, and the FLOPs of a run by torch's counter."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run(module)
    parameters = _count(module)
    return Part(parameters, Work(counter.get_total_flops(), parameters * FLOAT32, activations * FLOAT32), runs)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
