"""A diffusers folder with ELIT put in: `transformer/elit.json` says where, `transformer/elit.safetensors` holds Read and Write.

Pictures have one size, since windows need a fixed grid; the axis is `latents`.
"""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

from torch import nn

from elastic_export.capture.transformer import Drawn, Transformer
from elastic_export.families import qwen_image
from elastic_export.families.elit import interface
from elastic_export.families.elit import qwen_image as elit
from elastic_export.families.elit.interface import latents_axis
from elastic_export.families.elit.qwen_image import ElitQwenImage, ElitQwenParams
from elastic_export.families.family import priced
from elastic_export.families.tokens import Config, named
from elastic_export.foreign.reading import read_json
from elastic_export.foreign.weights import Naming, digest, fit, tensors
from elastic_export.sides import Sides
from elastic_runtime.contract import manifest
from elastic_runtime.contract.axis import Axis, Span
from elastic_runtime.contract.budget import Budget
from elastic_runtime.contract.schedule import RectifiedFlow
from elastic_runtime.errors import BudgetError, ModelError
from elastic_runtime.ralu.plan import full
from elastic_targets.capture import GraphCapture

CONFIG, WEIGHTS = "elit.json", "elit.safetensors"
OWN = [field.name for field in fields(ElitQwenParams) if field.name not in ("config", "rows", "columns")]  # fields of CONFIG
WRITE_KV = "all"  # what Write sees: all latents, as the public forward has it


def is_elit(folder: Path) -> bool:
    """Whether a diffusers folder's transformer has ELIT put in; raises ModelError where half of it is missing."""
    has = {name: (folder / "transformer" / name).is_file() for name in (CONFIG, WEIGHTS)}
    if any(has.values()) and not all(has.values()):
        there, lacking = sorted(has, key=lambda name: not has[name])
        undone = f", or delete {there} where elasticize was killed before it wrote {lacking}" if has[WEIGHTS] else ""
        raise ModelError(f"{folder / 'transformer'} has {there} and no {lacking}, which go together: copy the folder again{undone}")
    return all(has.values())


def at_usual(path: Path, config: Config, side: int) -> ElitQwenParams:
    """What the ELIT of a folder is at the model's usual size, `side` latent pixels; raises ModelError for a file that says it wrongly."""
    split = _read(path / "transformer" / CONFIG)
    patch: int = config["patch_size"]
    rows = _whole(side, patch * split["group_size"]) // patch
    return ElitQwenParams(config, rows, rows, **split)


def parameters(path: Path) -> int:
    """Weights of a folder's Read and Write."""
    return sum(stored.numel() for _, stored in tensors([path / "transformer" / WEIGHTS]))


def drawn(transformer: Transformer, size: Span | Sides | None, spans: Mapping[str, Span]) -> Drawn:
    """What is drawn with a transformer that has ELIT put in, at one size: `size`, or the model's usual one.

    Raises: ModelError for another transformer than Qwen-Image's, and for files of ELIT that do not fit it; BudgetError for sides that
        windows do not divide, with the nearest that they do, and for an axis or span that there is not.
    """
    path = transformer.folder.path / "transformer"
    if transformer.family is not qwen_image.FAMILY:
        raise ModelError(
            f"{path / CONFIG} puts ELIT into a {transformer.family.class_name}: it is read in a {qwen_image.FAMILY.class_name}"
        )
    split = _read(path / CONFIG)
    sides = _sides(transformer, split["group_size"], size)
    unit = transformer.upscale * transformer.config["patch_size"]
    try:
        params = ElitQwenParams(transformer.config, sides.height // unit, sides.width // unit, **split)
    except ValueError as error:
        raise ModelError(f"{path / CONFIG}: {error}") from None
    axis, length = _axis(params, spans, transformer.name), transformer.length
    height, width = (side // transformer.upscale for side in sides)

    def costs(weights: int) -> tuple[manifest.Cost, ...]:
        rows = ((count, elit.flops(params, count, length), elit.activation_values(params, count, length)) for count in axis.values)
        return tuple(priced(Budget(latents=count), flops, weights, values) for count, flops, values in rows)

    plan = full(1, params.windows.tokens, transformer.scheduler)
    return Drawn(
        axis=axis,
        graph=lambda: _denoiser(transformer, params, axis),
        costs=costs,
        heights=Span(height, height),
        widths=Span(width, width),
        facts={
            "family": elit.NAME,
            "config": {"elit": split | {"write_kv": WRITE_KV}, "rows": params.rows, "columns": params.columns},
            "schedule": RectifiedFlow(shift=plan.shifts[0], terminal=plan.terminal),
            "sample_shape": (transformer.family.channels(transformer.config), height, width),
            "packed": transformer.config["patch_size"],
        },
        parameters=parameters(transformer.folder.path),
        digests=lambda: {"elit": digest([path / WEIGHTS])},
    )


def _read(path: Path) -> dict[str, int]:
    """The whole numbers of an `elit.json`; raises ModelError naming the field that is wrong."""
    content = read_json(path)
    if unknown := sorted(set(content) - {*OWN, "write_kv"}):
        raise ModelError(f"{path} has an unknown field {unknown[0]!r}; it has {', '.join(OWN)} and write_kv")
    for name in OWN:
        if name not in content:
            raise ModelError(f"{path} lacks {name}, which tells where Read and Write stand")
        value, least = content[name], int(name == "group_size")
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ModelError(f"{path}: {name} is a whole number from {least}, got {value!r}")
    if (seen := content.get("write_kv", WRITE_KV)) != WRITE_KV:
        raise ModelError(f"{path}: write_kv is {WRITE_KV!r}, by which Write sees every latent, got {seen!r}, which is not supported")
    return {name: content[name] for name in OWN}


def _sides(transformer: Transformer, group_size: int, size: Span | Sides | None) -> Sides:
    """The one size of the pictures; raises BudgetError for several, or one that windows do not divide."""
    patch = transformer.upscale * transformer.config["patch_size"]
    unit, usual = patch * group_size, transformer.usual * transformer.upscale
    if isinstance(size, Span) and size.min != size.max:
        raise BudgetError(f"--size {size}: {transformer.name} draws pictures of one size, as its windows need: give --size {size.max}")
    sides = size if isinstance(size, Sides) else Sides(*(2 * [size.max if size else _whole(usual, unit)]))
    for side in sides:
        if side < unit or side % unit:
            low = side // unit * unit
            nearest = max(low if side - low < low + unit - side else low + unit, unit)
            raise BudgetError(
                f"--size {sides}: sides of pictures must be multiples of {unit} pixels for this model, whose windows are {group_size} x "
                f"{group_size} tokens of {patch} pixels, got {side}: the nearest is {nearest}"
            )
    return sides


def _whole(side: int, unit: int) -> int:
    """The largest side that windows of `unit` divide, of at least one window."""
    return max(side // unit, 1) * unit


def _axis(params: ElitQwenParams, spans: Mapping[str, Span], name: str) -> Axis:
    axis = latents_axis(params.windows)
    if others := [other for other in spans if other != axis.name]:
        raise BudgetError(f"{name} has no axis {others[0]!r}; it has {axis.name}")
    return axis.narrow(spans[axis.name]) if axis.name in spans else axis


def _denoiser(transformer: Transformer, params: ElitQwenParams, axis: Axis) -> GraphCapture:
    """The graph; weights stay on disk until they are used.

    Raises: ModelError naming weights that are missing, unexpected or misshapen.
    """
    component, length = transformer.folder.component("transformer"), transformer.length

    def build() -> ElitQwenImage:
        module = ElitQwenImage(component.fill(transformer.built), params, length)
        editors = nn.ModuleDict({"read": module.read, "write": module.write})
        file = component.path / WEIGHTS
        fit(editors, tensors([file]), str(file), "the interface (Read and Write) of this transformer", Naming(interface.renamed))
        return module.eval().requires_grad_(False)

    specs = elit.inputs(params)
    text = {"T": Span(1, length)} if length > 1 else {}
    return GraphCapture(
        name="denoiser",
        module=component.described(build, type(transformer.built).__name__),
        inputs=specs if text else named(specs, {"T": length}),
        outputs=elit.outputs(params),
        axes=(axis,),
        batch=transformer.batch,
        feeds=lambda budget, size: elit.feeds(params, length, budget, size),
        open_dimensions=text,
        stages=tuple(Budget(latents=count, **{name: span.max for name, span in text.items()}) for count in axis.doublings()),
    )
