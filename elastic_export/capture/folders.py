"""A diffusers folder made portable: its transformer, VAE decoder and text encoders, each a graph whose weights stay on disk."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from elastic_export.capture import elit, texts
from elastic_export.capture.capture import Capture, described, origin
from elastic_export.capture.fusion import NAME as FUSION
from elastic_export.capture.fusion import text_fusion
from elastic_export.capture.transformer import Drawn, Transformer
from elastic_export.capture.zoo import precisions, quality
from elastic_export.families import flux, flux2, krea2, qwen_image, sd3, tokens, z_image
from elastic_export.families.bricks import FLOAT32, decoder_values, dit_activation_values, peak_bytes
from elastic_export.families.family import priced
from elastic_export.families.tokens import TokenFamily
from elastic_export.foreign.adapters import Adapter
from elastic_export.foreign.component import diffusers_class
from elastic_export.foreign.folder import ENCODER, INDEX, Folder
from elastic_export.foreign.reading import read_json
from elastic_export.foreign.vae import decoder, encoder, read_vae
from elastic_export.sides import Sides
from elastic_runtime.contract import manifest
from elastic_runtime.contract.axis import Axis, Span
from elastic_runtime.contract.budget import Budget
from elastic_runtime.contract.manifest import Patches
from elastic_runtime.contract.schedule import RectifiedFlow
from elastic_runtime.errors import BudgetError, ModelError, UsageError
from elastic_runtime.ralu.schedulers import check_scheduler
from elastic_targets.capture import GraphCapture

MODULES = (flux, flux2, krea2, qwen_image, sd3, z_image)
FAMILIES = {module.FAMILY.class_name: module.FAMILY for module in MODULES}
PIPELINES = (
    "FluxPipeline", "Flux2Pipeline", "Flux2KleinPipeline", "Krea2Pipeline", "QwenImagePipeline", "StableDiffusion3Pipeline",
    "ZImagePipeline",
)  # fmt: skip
SCHEDULER = "FlowMatchEulerDiscreteScheduler"
MOST_SIDE = 1 << 16  # pixels
TIMES = 1000  # of a flow-match scheduler, which the models' embedding of sigma counts in too
MOST_REFERENCES = 10  # of the largest picture's size
SIDE = 128  # of a latent, where nothing tells
# Shares of the low-resolution patches that grow in the presets `7x` and `4x`: sizes worth a static function each.
GROWN = (0.1, 0.3)


@dataclass(frozen=True)
class Sizes:
    """Sides of pictures in pixels, and what they are in latent pixels and in tokens."""

    pixels: Span
    upscale: int
    patch: int

    @property
    def latent(self) -> Span:
        """From a preview of the smallest picture, which has half its side, to the largest picture."""
        return Span(self.pixels.min // self.upscale // 2, self.pixels.max // self.upscale)

    @property
    def tokens(self) -> Span:
        return Span((self.latent.min // self.patch) ** 2, (self.latent.max // self.patch) ** 2)


def stages(axis: Axis, patches: Patches, most: int) -> list[int]:
    """Token counts of RALU's stages for the largest picture, of `most` tokens, those that `axis` offers: a quarter, that with some patches
    grown, all."""
    low = most // 4
    counts = patches.filled_all([low, *(low + 3 * int(low * share) for share in GROWN), most])
    return [count for count in dict.fromkeys(counts) if count in axis.values]


@dataclass(frozen=True)
class Outline:
    """A folder's model before any weight is read: its transformer, what is drawn with it, its text, and the tokenizers' files."""

    transformer: Transformer
    drawn: Drawn
    text: manifest.Text | None
    files: Mapping[str, bytes]

    def model(self, name: str) -> manifest.Model:
        """What a manifest says of it under that name."""
        known, folder, family = self.transformer, self.transformer.folder, self.transformer.family
        facts: dict[str, Any] = {"family": family.name, "schedule": RectifiedFlow()} | dict(self.drawn.facts)
        facts["config"] = _plain(dict(known.config)) | {"scheduler": known.scheduler} | facts.get("config", {})
        distilled = not folder.labels and family.distilled(known.config, folder.distilled)
        return manifest.Model(
            name=name,
            prediction="velocity",
            num_classes=len(folder.labels),
            null_label=len(folder.labels),
            weights="checkpoint",
            vae=known.vae,
            text=self.text,
            guidance_rescale=family.rescale,
            guidance_off=family.off,
            distilled=distilled,
            few_steps=family.few_steps if distilled or (folder.distilled and not folder.labels) else None,
            **facts,
        )


def outline(
    folder: Folder,
    encoders: list[str],
    size: Span | Sides | None,
    batch: Span,
    title: str,
    spans: Mapping[str, Span] = MappingProxyType({}),
    max_sequence_length: int | None = None,
) -> Outline:
    """What configs, tokenizers of `encoders` and the scheduler tell; see `capture_folder`, which raises the same. `title` is the model's
    name in messages."""
    path, listed = folder.path, _config(folder)
    class_name = str(listed.get("_class_name"))
    if class_name not in FAMILIES:
        raise ModelError(f"{path / 'transformer'} is a {class_name}; diffusers folders of {', '.join(FAMILIES)} can be exported")
    family = FAMILIES[class_name]
    built: Any = folder.component("transformer").build(diffusers_class(class_name))
    config = {key: value for key, value in built.config.items() if not key.startswith("_")}
    if why := family.refusal(config):
        raise ModelError(f"{path / 'transformer'} {why}")
    vae = listed_vae(folder, family.channels(config))
    text, files = (None, {}) if folder.labels else texts.described(folder, family, config, encoders, max_sequence_length)
    usual, scheduler = _usual(folder, family, config, vae), _scheduler(folder, family)
    known = Transformer(folder, family, built, config, vae, scheduler, usual, text.length if text else 1, batch, title)
    drawn = elit.drawn(known, size, spans) if elit.is_elit(path) else _drawn(known, size, spans)
    return Outline(known, drawn, text, files)


def capture_folder(
    path: Path,
    components: tuple[str, ...] | None,
    size: Span | Sides | None,
    batch: Span,
    name: str | None = None,
    digest: bool = True,
    packaged: bool = False,
    spans: Mapping[str, Span] | None = None,
    max_sequence_length: int | None = None,
    adapters: tuple[Adapter, ...] = (),
) -> Capture:
    """Capture a diffusers folder of FLUX, FLUX.2, SD3, Qwen-Image, Z-Image or Krea 2; weights are read when something computes with them.

    Args:
        components: of transformer, vae, text and encoder; None for the first three, as far as the folder lists them.
        size: sides of pictures in pixels; None for the model's usual one and down to half of it. With ELIT put in (see `elit`) it is one
            size, a side or height and width.
        name: in place of the folder's own. digest: whether to read the transformer's weights through once, for their SHA-256.
        packaged: whether it is the packaged sample of that name, whose card has figures and whose place is nobody's business.
        spans: what to narrow the axis `tokens` to, which `size` sets: from the preview of the smallest picture to the largest; with ELIT
            put in the axis `latents`.
        max_sequence_length: text tokens of the encoder that gives a sequence; None for what the family's pipeline takes by itself.
        adapters: LoRA files, fused as weights are read.

    Raises: MissingError without diffusers or transformers; ModelError for a folder that is not one, or lacks a component;
        BudgetError for sides that do not divide into patches, for an axis or a span that there is not at this size, and for more text
        than any of these models takes.
    """
    if batch.min < 1:
        raise BudgetError(f"--batch must start at 1 or more, got {batch}")
    folder = Folder.open(path, adapters)
    chosen = folder.choose(components)
    encoders = [component for component in chosen if component.startswith("text_encoder")]
    outlined = outline(folder, encoders, size, batch, name or path.name, spans or {}, max_sequence_length)
    known, drawn, text, family, config, vae = (
        outlined.transformer, outlined.drawn, outlined.text, outlined.transformer.family, outlined.transformer.config,
        outlined.transformer.vae,
    )  # fmt: skip
    graphs, peaks = [], {}
    if len(folder.labels) > tokens.pooled(config):
        raise ModelError(
            f"{path / 'model_index.json'} names {len(folder.labels)} classes, and the transformer takes one of "
            f"{tokens.pooled(config)}: are they another model's?"
        )
    if folder.labels and encoders:
        raise ModelError(
            f"{path} has classes (id2label) and text encoders ({', '.join(encoders)}), and a model draws from one or the other: "
            "leave the encoders out with --components transformer,vae"
        )
    if "transformer" in chosen:
        graphs.append(drawn.graph())
    if "transformer" in chosen and family.fusion and text:
        graphs.append(text_fusion(known, text.length))
    if "vae" in chosen and vae:
        one = Span(1, batch.max)  # it decodes one picture at a time, however many the denoiser is asked for at least
        halves = [decoder, *([encoder] if ENCODER in chosen else [])]
        graphs += [half(path / "vae", vae, family.channels(config), drawn.heights, drawn.widths, one) for half in halves]
    for each in text.encoders if text else ():
        graphs.append(texts.graph(folder, family, each, Span(1, batch.max)))
    components = tuple(component for component in chosen if component != ENCODER)
    parameters = {component: folder.component(component).parameters() for component in components}
    costs = drawn.costs(parameters["transformer"] - known.fusion_parameters + drawn.parameters) if "transformer" in chosen else ()
    values = {"denoiser": costs[-1].activation_bytes // FLOAT32 if costs else 0}
    picture = decoder_values(folder.component("vae").config, max(drawn.heights.max, drawn.widths.max) * vae.upscale) if vae else 0
    values |= {"decoder": picture, "encoder": picture}  # whose convolutions at full resolution are no wider
    for graph in graphs:
        component = {"denoiser": "transformer", FUSION: "transformer", "decoder": "vae", "encoder": "vae"}.get(graph.name, graph.name)
        rows = min(max(2, graph.batch.min), graph.batch.max)  # of the runs that prove it
        peaks[graph.name] = peak_bytes(parameters[component], values.get(graph.name, 0) * rows)
    making = manifest.Manifest(
        schema_version=manifest.SCHEMA_VERSION,
        model=outlined.model(name or path.resolve().name),
        axes=(drawn.axis,) if "transformer" in chosen else (),
        graphs=described(graphs),
        cost=costs,
        quality=quality(name) if packaged and name else (),
        precisions=precisions(name) if packaged and name else (),
        provenance=origin(
            None if packaged else path.resolve(),
            weights=_digests(folder, list(components), drawn) if digest else {},
            adapters=[each.record for each in adapters],
        ),
    )
    return Capture(making, graphs, outlined.files, peaks, tuple(notes(folder, vae, chosen)))


def _digests(folder: Folder, components: list[str], drawn: Drawn) -> dict[str, str]:
    """SHA-256 of each component's weights."""
    more = drawn.digests() if "transformer" in components else {}
    return {component: folder.component(component).sha256() for component in components} | dict(more)


def _drawn(transformer: Transformer, size: Span | Sides | None, spans: Mapping[str, Span]) -> Drawn:
    """What is drawn with a transformer over any number of tokens."""
    if isinstance(size, Sides):
        raise BudgetError(f"--size {size} is one size, and {transformer.name} draws any: give a side, or a span of them as 512-1024")
    folder, family, config, length = transformer.folder, transformer.family, transformer.config, transformer.length
    sizes = picture_sizes(folder, family, config, transformer.vae, size)
    patches = family.patches(config)
    axis = _axis(sizes, spans, transformer.name, patches)
    most, width, heads = min(sizes.tokens.max, axis.max), family.width(config), family.heads(config)
    length = patches.filled(length)

    def costs(parameters: int) -> tuple[manifest.Cost, ...]:
        # FLOPs are exactly quadratic in the tokens: three rows give every other.
        counts = sorted({axis.min, axis.values[len(axis.values) // 2], axis.max})
        rows = ((count, family.flops(config, count, length), dit_activation_values(count + length, width, heads)) for count in counts)
        return tuple(priced(Budget(**{axis.name: count}), flops, parameters, values) for count, flops, values in rows)

    side = math.isqrt(most) * sizes.patch  # of the largest square picture
    facts = {"sample_shape": (family.channels(config), side, side), "patches": patches}
    return Drawn(axis, lambda: _denoiser(transformer, axis, most), costs, sizes.latent, sizes.latent, facts)


def notes(folder: Folder, vae: manifest.Vae | None, chosen: list[str]) -> Iterator[str]:
    """What was taken for granted where the folder does not tell."""
    if vae is None:
        yield f"{folder.path} has no VAE to tell how many pixels a latent has: --size counts those of the latent"
    if not folder.indexed:
        components = ", ".join(folder.listed)
        yield f"{folder.path} has no {INDEX}: it is taken for a model of prompts whose components are {components}"
    if not (folder.path / "scheduler" / "scheduler_config.json").is_file():
        yield f"{folder.path} has no scheduler: plain sampling (plan full) will space its steps evenly"
    if folder.pipeline and folder.pipeline not in PIPELINES:
        yield f"{folder.path} is of a {folder.pipeline}: what that draws besides prompts (a picture, a mask) is not taken into the bundle"
    for adapter in folder.adapters:
        if left := [name for name in adapter.parts if name not in chosen]:
            yield f"{adapter.path} changes {', '.join(left)} too, and that is not exported now"


def _config(folder: Folder) -> dict[str, Any]:
    """The transformer's config, which the other components' sizes are read from, though its weights may be absent."""
    if not (folder.path / "transformer" / "config.json").is_file():
        raise ModelError(f"{folder.path} lacks transformer/config.json, which tells how its components fit together")
    return folder.component("transformer").config


def listed_vae(folder: Folder, channels: int) -> manifest.Vae | None:
    """Facts of the folder's VAE, whether or not it is exported; None where the folder has none."""
    return read_vae(folder.path / "vae", channels) if "vae" in folder.listed and (folder.path / "vae" / "config.json").is_file() else None


def picture_sizes(folder: Folder, family: TokenFamily, config: tokens.Config, vae: manifest.Vae | None, size: Span | None) -> Sizes:
    """Sides of pictures: `size` in pixels, or the model's usual one and down to half of it.

    Raises: BudgetError for sides that do not divide into patches, or that the model has no places for.
    """
    patches = family.patches(config)
    upscale = vae.upscale if vae else 1  # without a VAE, pixels are those of the latent
    usual = _usual(folder, family, config, vae)
    size = size or Span(max(usual * upscale // 2, upscale * patches.size * 2), usual * upscale)
    if size.max > MOST_SIDE:
        raise BudgetError(f"--size {size}: sides of pictures are at most {MOST_SIDE} pixels")
    unit = upscale * patches.size * 2  # at half the resolution, too, a side must be a whole number of patches
    for side in (size.min, size.max):
        if side % unit or side < unit:
            raise BudgetError(f"--size {size}: sides of pictures must be multiples of {unit} pixels for this model, got {side}")
    if patches.table and size.max > patches.table * patches.size * upscale:
        raise BudgetError(f"--size {size}: this model has places for pictures of up to {patches.table * patches.size * upscale} pixels")
    return Sizes(size, upscale, patches.size)


def _usual(folder: Folder, family: TokenFamily, config: tokens.Config, vae: manifest.Vae | None) -> int:
    """The side of a latent that the model usually draws."""
    if (usual := family.side(config)) is not None or not vae:
        return usual or SIDE
    return _side(folder.component("vae").config.get("sample_size"), SIDE * vae.upscale) // vae.upscale


def _side(size: Any, usual: int) -> int:
    """A `sample_size` of a config: a number, both sides, or nothing."""
    sides = size if isinstance(size, list | tuple) else [size]
    return max((side for side in sides if isinstance(side, int) and side > 0), default=usual)


def _axis(sizes: Sizes, spans: Mapping[str, Span], name: str, patches: Patches) -> Axis:
    """The axis `tokens` of these sizes, narrowed to what was asked for; or widened, where pictures to edit after may stand beside.

    Raises: BudgetError for another axis, or tokens that no picture of these sizes has.
    """
    axis = tokens.axis(sizes.tokens, patches)
    if others := [other for other in spans if other != axis.name]:
        raise BudgetError(f"{name} has no axis {others[0]!r}; it has {axis.name}")
    if (span := spans.get(axis.name)) is None:
        return axis
    if patches.references and axis.max < span.max <= (1 + MOST_REFERENCES) * axis.max:
        axis = tokens.axis(Span(axis.min, span.max), patches)
    least = patches.filled((sizes.pixels.min // sizes.upscale // sizes.patch) ** 2)
    if not axis.min <= span.min <= span.max <= axis.max or span.max < least:
        raise BudgetError(
            f"--{axis.name} {span} does not go with sides of {sizes.pixels} pixels: their pictures have {least} to {axis.max} tokens, and "
            f"their previews {axis.min} or more; give a span within {axis.span} that reaches {least}, or another --size"
        )
    return axis.narrow(span)


def _denoiser(transformer: Transformer, axis: Axis, most: int) -> GraphCapture:
    folder, family, config, built = transformer.folder, transformer.family, transformer.config, transformer.built
    component, patches = folder.component("transformer"), family.patches(config)
    inputs, length = tokens.inputs(family, config), patches.filled(transformer.length)
    spans = {"S": axis.span, "T": Span(patches.filled(1), length)}
    text = {"T": spans["T"]} if length > 1 else {}
    return GraphCapture(
        name="denoiser",
        module=component.described(lambda: family.wrap(component.fill(built)), type(built).__name__),
        inputs=inputs if text else tokens.named(inputs, {"T": length}),
        outputs=tokens.outputs(family, config),
        axes=(axis,),
        batch=transformer.batch,
        feeds=lambda budget, size: tokens.feeds(inputs, patches, spans, budget, size),
        open_dimensions=text,
        stages=tuple(
            Budget(**{axis.name: count}, **{name: span.max for name, span in text.items()}) for count in stages(axis, patches, most)
        ),
    )


def _scheduler(folder: Folder, family: TokenFamily) -> dict[str, Any]:
    """What the folder's scheduler says of its sigmas; empty where there is none.

    Raises: ModelError for one that does not draw along a flow in Euler's steps, or whose config is not drawn as it says.
    """
    path = folder.path / "scheduler" / "scheduler_config.json"
    if not path.is_file():
        if folder.scheduled:
            raise ModelError(
                f"{folder.path} lacks scheduler/scheduler_config.json, which {INDEX} lists and which tells how steps are spaced: "
                "download the folder again"
            )
        return {}
    config = read_json(path)
    if (name := config.get("_class_name", SCHEDULER)) != SCHEDULER:
        raise ModelError(f"{path} is of a {name}; these models are drawn along a flow in Euler's steps, by {SCHEDULER}")
    scheduler = {key: value for key, value in config.items() if not key.startswith("_")}
    if "mu" in scheduler:  # which diffusers' pipelines tell their scheduler, and no file does
        raise ModelError(f"{path}: the scheduler has an unknown key 'mu'")
    if (mu := family.mu(folder.distilled)) is not None and scheduler.get("use_dynamic_shifting"):
        scheduler["mu"] = mu
    try:
        check_scheduler(scheduler)
    except UsageError as error:
        raise ModelError(f"{path}: {error}") from None
    if (times := scheduler.get("num_train_timesteps", TIMES)) != TIMES or isinstance(times, bool):
        raise ModelError(f"{path}: num_train_timesteps is {TIMES}, which the models' times are counted in, got {times!r}")
    return scheduler if family.spaced else scheduler | {"sigma_min": _least(scheduler)}


def _least(scheduler: Mapping[str, Any]) -> float:
    """The least sigma of a diffusers scheduler: that of the first of its training times, shifted unless the picture shifts it."""
    shift = 1.0 if scheduler.get("use_dynamic_shifting") else scheduler.get("shift", 1.0)
    return float(shift / TIMES / (1 + (shift - 1) / TIMES))


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """The config as it reads back from JSON."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in config.items()}
