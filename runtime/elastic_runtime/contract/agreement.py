"""Reading a manifest: what its parts must say alike, and how large its numbers may be. It is checked once, whole, so that no code after
that meets a size that cannot be, a name that is not there, or a graph that does not fit its model.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import msgspec

from elastic_runtime.contract.artifacts import Apart, Artifact, CoremlArtifact, Graph, TensorSpec
from elastic_runtime.contract.axis import Axis, Span
from elastic_runtime.contract.manifest import OWN_STEPS, SCHEMA_VERSION, Manifest, Model, Patches, TextEncoder
from elastic_runtime.contract.records import read_record
from elastic_runtime.errors import BundleError

# No model is near these; beyond them lists would not end and arrays not fit.
MOST_SIZE = 2**31 - 1  # of a dimension
MOST_BUDGETS = 2**20  # of all axes together
MOST_VALUES = 2**28  # of a sample, or of the smallest feed of an input
_OPEN = re.compile(r"([1-9]\d{0,5}\*)?[A-Za-z_]\w*")
STAGES = {"full": 1, "speed": 2, "mrflow": 2} | {name: len(steps) for name, steps in OWN_STEPS.items()}  # of plans by name


def decode(text: bytes, where: str) -> Manifest:
    """Read a manifest; raise BundleError naming the field, the schema or the place that is wrong.

    One of version 1 is one of this version without a word changed, unless its model draws from patches: it lacks their
    axis. Version 2 says of `img_ids` only whether they are centred, and leaves it to the family whether a model is
    distilled.
    """
    again = "export the bundle again"
    older = {1: _as_it_is, 2: _laid_out}
    manifest = read_record(text, where, Manifest, SCHEMA_VERSION, "manifest", again, BundleError, older)
    if manifest.schema_version == 1 and manifest.model.patches:
        raise BundleError(
            f"{where} has schema_version {manifest.schema_version}, in which {manifest.model.name} has no axis `tokens` yet: {again}"
        )
    for complaint in _complaints(manifest):
        raise BundleError(f"{where} is not a valid manifest: {complaint}. {again[0].upper()}{again[1:]}.")
    return msgspec.structs.replace(manifest, schema_version=SCHEMA_VERSION)


def _as_it_is(content: dict[str, Any]) -> dict[str, Any]:
    return content


def _laid_out(content: dict[str, Any]) -> dict[str, Any]:
    model = content.get("model")
    patches = model.get("patches") if isinstance(model, dict) else None
    if not isinstance(model, dict) or not isinstance(patches, dict):
        return content
    if isinstance(patches.get("centred"), bool):
        patches["layout"] = "centred" if patches.pop("centred") else "origin"
    schnell = model.get("family") == "flux" and patches.get("guidance_embeds") is False and model.get("num_classes") == 0
    return content | {"model": model | ({"distilled": True} if schnell else {})}


def _complaints(manifest: Manifest) -> Iterator[str]:
    model, axes = manifest.model, {axis.name: axis for axis in manifest.axes}
    yield from _sizes(model)
    if len(axes) != len(manifest.axes):
        yield "two `axes` have one name"
    if any(axis.max > MOST_SIZE for axis in axes.values()) or math.prod(len(axis.values) for axis in axes.values()) > MOST_BUDGETS:
        yield f"`axes` offer more than {MOST_BUDGETS} budgets, or one above {MOST_SIZE}"
    for name, graph in manifest.graphs.items():
        yield from (f"graph {name!r}: {why}" for why in _graph(graph))
        if name != "denoiser" and any(each.conditions for each in graph.artifacts):
            yield f"graph {name!r}: it has conditions apart, and is no denoiser"
    if denoiser := manifest.graphs.get("denoiser"):
        yield from (f"graph 'denoiser': {why}" for why in _denoiser(denoiser, model, manifest.axes))
    if decoder := manifest.graphs.get("decoder"):
        yield from (f"graph 'decoder': {why}" for why in _decoder(decoder, model))
    if encoder := manifest.graphs.get("encoder"):
        yield from (f"graph 'encoder': {why}" for why in _vae_encoder(encoder, model))
    for row in manifest.cost:
        yield from (f"`cost` {why}" for why in _budget(row.budget, axes))
    for place in (*manifest.quality, *manifest.precisions):
        if place.plan is None:
            yield from (f"`quality` {why}" for why in _budget(place.budget, axes))
        elif model.patches is None:
            yield f"`quality` has a plan, {place.plan!r}, and {model.name} is drawn at budgets"
        elif place.steps is not None and len(place.steps) != STAGES.get(place.plan, len(place.steps)):
            yield f"`quality` has {len(place.steps)} stages of plan {place.plan!r}, which has {STAGES[place.plan]}"
    yield from _text(manifest)
    yield from _fusion(manifest)
    paths = [entry.path for entry in manifest.files()]
    if len(paths) != len(set(paths)):
        yield "a file is listed twice"


def _sizes(model: Model) -> Iterator[str]:
    if not all(size >= 1 for size in model.sample_shape) or math.prod(model.sample_shape) > MOST_VALUES:
        yield f"`sample_shape` has sizes of 1 or more and at most {MOST_VALUES} values, got {list(model.sample_shape)}"
    if not 0 <= model.num_classes <= MOST_SIZE or not 0 <= model.null_label <= model.num_classes:
        yield f"`num_classes` is 0 or more and `null_label` one of them or the next, got {model.num_classes} and {model.null_label}"
    if model.patches and any(side % model.patches.size for side in model.sample_shape[1:]):
        yield f"a sample of {list(model.sample_shape)} does not divide into patches of {model.patches.size}"
    if model.packed and any(side % model.packed for side in model.sample_shape[1:]):
        yield f"a sample of {list(model.sample_shape)} does not divide into patches of {model.packed}"
    if model.packed and model.patches:
        yield "a model is `packed` at one size or has `patches` at any, and this one says both"


def _graph(graph: Graph) -> Iterator[str]:
    for specs in (graph.inputs, graph.outputs):
        names = [spec.name for spec in specs]
        if not names or len(names) != len(set(names)):
            yield f"its inputs and outputs have names of their own, got {', '.join(names) or 'none'}"
    for spec in (*graph.inputs, *graph.outputs):
        for size in spec.shape:
            if isinstance(size, str) and not _OPEN.fullmatch(size):
                yield f"a dimension of {spec.name} is a number or a letter, perhaps times a number, got {size!r}"
            if isinstance(size, int) and not 1 <= size <= MOST_SIZE:
                yield f"a dimension of {spec.name} is 1 to {MOST_SIZE}, got {size}"
        if math.prod(size for size in spec.shape if isinstance(size, int)) > MOST_VALUES:
            yield f"{spec.name} has more than {MOST_VALUES} values"
    for name, span in graph.dimensions.items():
        if not 1 <= span.min <= span.max <= MOST_SIZE:
            yield f"dimension {name} spans 1 to {MOST_SIZE} at most, got {span}"
    for artifact in graph.artifacts:
        yield from _conditions(graph, artifact)
        for profile in getattr(artifact, "profiles", ()):
            if profile.dimensions.keys() != graph.dimensions.keys():
                yield f"a profile of {artifact.path} has the dimensions {', '.join(profile.dimensions)}, not {', '.join(graph.dimensions)}"
            for name, size in profile.dimensions.items():
                if not 1 <= size.min <= size.opt <= size.max <= MOST_SIZE:
                    yield f"a profile of {artifact.path} needs 1 <= min <= opt <= max for {name}, got {size.min}, {size.opt} and {size.max}"


def _conditions(graph: Graph, artifact: Artifact) -> Iterator[str]:
    """What there is to say of a file of its own for conditions."""
    apart = artifact.conditions
    if apart is None:
        return
    names = set(graph.batched)
    if isinstance(artifact, CoremlArtifact):
        yield from _function(artifact, apart)
    elif artifact.path.startswith(apart.path) or apart.path not in {file.path for file in artifact.files} or apart.call:
        yield f"{artifact.path} has its conditions in {apart.path}, which is no other one of its files"
    if not apart.inputs or not set(apart.gone) <= set(apart.inputs) <= names:
        yield f"{apart.path} takes {', '.join(apart.inputs) or 'nothing'}, of which {', '.join(apart.gone)} are gone, not of the graph's"
    shapes = {spec.name: spec.shape for spec in apart.outputs}
    sizes = [shape[1] for shape in shapes.values() if len(shape) == 2 and shape[0] == "B" and isinstance(shape[1], int)]
    known = {spec.name for spec in (*graph.inputs, *graph.outputs)}
    if not sizes or len(sizes) < len(apart.outputs) or known & shapes.keys() or not all(1 <= size <= MOST_VALUES for size in sizes):
        yield f"{apart.path} gives {', '.join(map(_shown, apart.outputs)) or 'nothing'}, not rows (B, n) under names of their own"


def _function(artifact: CoremlArtifact, apart: Apart) -> Iterator[str]:
    """What there is to say of conditions that are a function of a package."""
    call = apart.call
    if apart.path != artifact.path or call is None or call.function in {each.function for each in artifact.calls}:
        yield f"{artifact.path} has its conditions in {call.function if call else apart.path}, which is no function of its own in it"
    elif call.budget or call.sizes.keys() != {"B"} or not 1 <= call.sizes["B"] <= MOST_SIZE:
        yield f"{call.function} of {artifact.path} takes {call.sizes} at {call.budget}, and conditions are rows, B"


def _denoiser(graph: Graph, model: Model, axes: Iterable[Axis]) -> Iterator[str]:
    inputs, outputs = ({spec.name: spec for spec in specs} for specs in (graph.inputs, graph.outputs))
    if (wanted := "logits" if model.tokens else "prediction") not in outputs:
        yield f"it lacks the output {wanted}"
    if (
        not model.patches
        and not model.tokens
        and (spec := inputs.get("sample"))
        and len(spec.shape) == 4
        and spec.shape != ("B", *model.sample_shape)
    ):
        yield f"its sample has shape {_shown(spec)}, the model's is {list(model.sample_shape)}"
    if model.packed:
        channels, area = model.sample_shape[0], model.packed**2
        wanted_shape = ("B", math.prod(model.sample_shape[1:]) // area, channels * area)
        for name, specs in (("hidden_states", inputs), ("prediction", outputs)):
            if name not in specs or specs[name].shape != wanted_shape:
                has = _shown(specs[name]) if name in specs else "none"
                yield f"its {name} have shape {has}, and a packed sample has (B, {wanted_shape[1]}, {wanted_shape[2]})"
    if model.patches and "S" in graph.dimensions and {axis.dimension for axis in axes} != {"S"}:
        yield "it draws from patches, and no axis is their number, S"
    if model.patches:
        columns = model.patches.columns
        for name in {model.patches.positions, "txt_ids"} & inputs.keys():
            if inputs[name].shape[-1:] != (columns,):
                yield f"its {name} have shape {_shown(inputs[name])}, and the model's have {columns} columns"
        yield from _filled(graph, model.patches, axes)
    for axis in axes:
        if axis.dimension is None:
            continue
        span = Span(axis.length(axis.min), axis.length(axis.max))
        if graph.dimensions.get(axis.dimension, span) != span:
            yield f"axis {axis.name} makes {axis.dimension} {span}, and it says {graph.dimensions[axis.dimension]}"


def _vae_encoder(graph: Graph, model: Model) -> Iterator[str]:
    shapes = {spec.name: spec.shape for spec in (*graph.inputs, *graph.outputs)}
    if shapes.keys() != {"latent", "image"} or any(len(shape) != 4 for shape in shapes.values()):
        yield "it takes an image (B, 3, H, W) and gives a latent"
    elif model.vae is None or shapes["latent"][1] != model.sample_shape[0]:
        yield f"it gives latents of {shapes['latent'][1]} channels, and the model draws {model.sample_shape[0]}, with a vae"


def _filled(graph: Graph, patches: Patches, axes: Iterable[Axis]) -> Iterator[str]:
    """What there is to say of tokens that come in multiples."""
    pads = {"img_pad", "txt_pad"} & {spec.name for spec in graph.inputs}
    if len(pads) != (0 if patches.multiple is None else 2):
        yield f"it takes {' and '.join(sorted(pads)) or 'no img_pad and txt_pad'}, and the model's `multiple` is {patches.multiple}"
    if patches.multiple is None:
        return
    sizes: dict[str, tuple[int, ...]] = {axis.name: (axis.min, axis.max, axis.step) for axis in axes}
    sizes |= {name: (span.min, span.max) for name, span in graph.dimensions.items() if name == "T"}
    for name, counts in sizes.items():
        if any(count % patches.multiple for count in counts):
            yield f"{name} spans {counts[0]}-{counts[1]}, and the model's tokens come in multiples of {patches.multiple}"


def _decoder(graph: Graph, model: Model) -> Iterator[str]:
    shapes = {spec.name: spec.shape for spec in (*graph.inputs, *graph.outputs)}
    if shapes.keys() != {"latent", "image"} or any(len(shape) != 4 for shape in shapes.values()):
        yield "it takes a latent (B, C, h, w) and gives an image"
    elif shapes["latent"][1] != model.sample_shape[0]:
        yield f"it takes {shapes['latent'][1]} channels, and a sample has {model.sample_shape[0]}"


def _budget(budget: Mapping[str, int], axes: Mapping[str, Axis]) -> Iterator[str]:
    if budget.keys() != axes.keys():
        yield f"has a budget of {', '.join(budget) or 'no axis'} where the axes are {', '.join(axes) or 'none'}"
        return
    for name, value in budget.items():
        if value not in axes[name].values:
            yield f"has {name} {value}, which its axis does not offer"


def _text(manifest: Manifest) -> Iterator[str]:
    text = manifest.model.text
    if text is None or not text.encoders:
        return
    given: dict[str, list[int]] = {name: [] for name in ("pooled", "penultimate_hidden_state", "last_hidden_state", "hidden_states")}
    for encoder in text.encoders:
        graph = manifest.graphs[encoder.graph]  # the manifest's own record has seen to that
        yield from _encoder(encoder, graph)
        for spec in graph.outputs:
            given[spec.name] += [size for size in spec.shape[-1:] if isinstance(size, int)]
    lengths = {encoder.max_length for encoder in text.encoders if "penultimate_hidden_state" in encoder.gives}
    after = [encoder.max_length for encoder in text.encoders if {"last_hidden_state", "hidden_states"} & set(encoder.gives)]
    pooled, widths, tokens = sum(given["pooled"]), given["last_hidden_state"] + given["hidden_states"], sum(after) + max(lengths, default=0)
    if pooled != text.pooled or any(width != text.width for width in widths):
        yield f"the text encoders give {pooled} pooled values and {widths} a token, not {text.pooled} and {text.width}"
    if len(lengths) > 1 or tokens > text.length:
        yield f"the text encoders give {tokens} tokens, and the model takes {text.length}"


def _fusion(manifest: Manifest) -> Iterator[str]:
    text, graph = manifest.model.text, manifest.graphs.get("text_fusion")
    layers = text.layers if text else None
    if (layers is None) != (graph is None) and (graph or "denoiser" in manifest.graphs):
        yield f"the graph 'text_fusion' goes with `layers` of a text, got {'one' if graph else 'none'} and {layers}"
    if text and layers and graph:
        has = {spec.name: spec.shape[:1] + spec.shape[2:] for spec in (*graph.inputs, *graph.outputs)}
        wanted = {"tapped": ("B", layers, text.width), "fused": ("B", text.width)}
        if has != wanted:
            shapes = ", ".join(f"{spec.name} {_shown(spec)}" for spec in (*graph.inputs, *graph.outputs))
            yield f"graph 'text_fusion': it has {shapes}, and makes {layers} x {text.width} values of a token into {text.width}"


def _encoder(encoder: TextEncoder, graph: Graph) -> Iterator[str]:
    inputs = {spec.name: spec.shape for spec in graph.inputs}
    shape = inputs.get("input_ids", ())
    longest = shape[1:] == (encoder.longest,)
    whole = not encoder.padded and shape == ("B", "N") and graph.dimensions["N"] == Span(1, encoder.longest)
    masked = encoder.padded and list(inputs) == ["input_ids", "attention_mask"]
    if not (longest or whole) or set(inputs.values()) != {("B", *shape[1:])} or not (masked or len(inputs) == 1):
        yield f"the text encoder {encoder.graph!r} takes input_ids (B, {encoder.longest}), and its graph does not"
    if encoder.padding_side == "left" and not (encoder.padded and encoder.longest == encoder.max_length):
        yield f"the text encoder {encoder.graph!r} pads on the left, where padding gives embeddings and no token of a template is left out"
    for spec in graph.outputs:
        rows, values = (1, (1,)) if spec.name == "pooled" else (2, (1, 2) if spec.name == "hidden_states" else (1,))
        own = spec.shape[rows:]
        if spec.shape[:rows] != ("B", *shape[1:])[:rows] or len(own) not in values or not all(isinstance(size, int) for size in own):
            yield f"the text encoder {encoder.graph!r} gives {spec.name} of shape {_shown(spec)}"


def _shown(spec: TensorSpec) -> str:
    return f"({', '.join(map(str, spec.shape))})"
