"""What pictures are conditioned on: prompts, embeddings or classes, checked and turned into the denoiser's inputs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from elastic_runtime.contract.bundle import Bundle
from elastic_runtime.contract.manifest import Model
from elastic_runtime.contract.schedule import is_number
from elastic_runtime.denoising.guidance import Guidance
from elastic_runtime.denoising.prompts import encode
from elastic_runtime.denoising.tokens import Conditions
from elastic_runtime.errors import BundleError, UsageError
from elastic_runtime.sessions.session import Session, batches

POOLED = "pooled_projections"  # an input of the denoiser, where it has one
# `guidance_scale` where nothing else is asked for, as diffusers' pipelines have it: distilled into FLUX-dev, classifier-free in others.
# Families that are not here have none.
USUAL = {"flux": 3.5, "flux2": 4.0, "krea2": 4.5, "qwen-image": 4.0, "elit-qwen-image": 4.0, "sd3": 7.0, "z-image": 5.0}
CLASSES_GUIDANCE = 2.0  # of models of classes, whose papers draw guided; what the command takes, and not the pipeline in Python


@dataclass(frozen=True)
class Conditioning:
    """What a caller wants drawn, in one of three ways: prompts, embeddings of them, or class labels.

    The negative ones are what guidance leads away from; without them that is the empty prompt, or no class. A mask (B, T)
    has 1 where embeddings are the text's own, from the first on, where the texts of several differ in length.
    """

    prompt: str | Sequence[str] | None = None
    negative_prompt: str | Sequence[str] | None = None
    prompt_embeds: np.ndarray | None = None
    pooled_prompt_embeds: np.ndarray | None = None
    negative_prompt_embeds: np.ndarray | None = None
    negative_pooled_prompt_embeds: np.ndarray | None = None
    prompt_embeds_mask: np.ndarray | None = None
    negative_prompt_embeds_mask: np.ndarray | None = None
    class_labels: Sequence[int] | int | None = None

    def check(self, bundle: Bundle, guided: bool) -> int:
        """How many there are.

        Raises: UsageError for none or several of the three ways, one that the model does not take, or a negative one
        without effect.
        """
        ways = {"prompt": self.prompt, "prompt_embeds": self.prompt_embeds, "class_labels": self.class_labels}
        given = [name for name, value in ways.items() if value is not None]
        takes = ["class_labels"] if bundle.manifest.model.num_classes else ["prompt", "prompt_embeds"]
        if len(given) != 1 or given[0] not in takes:
            raise UsageError(f"{bundle.manifest.model.name} draws from {' or '.join(takes)}, got {' and '.join(given) or 'neither'}")
        positive = ("pooled_prompt_embeds", "prompt_embeds_mask")
        negative = ("negative_prompt", "negative_prompt_embeds", "negative_pooled_prompt_embeds", "negative_prompt_embeds_mask")
        meant, more = ([name for name in names if getattr(self, name) is not None] for names in (negative, positive))
        beside = {"prompt": negative[:1], "prompt_embeds": (*positive, *negative[1:]), "class_labels": ()}[given[0]]
        if (pooled := [name for name in (*more, *meant) if "pooled" in name]) and not takes_pooled(bundle):
            raise UsageError(f"{bundle.manifest.model.name} takes no pooled embeddings: leave {pooled[0]} out")
        if strange := [name for name in (*meant, *more) if name not in beside]:
            alike = [name for name in beside if name.startswith("negative") == strange[0].startswith("negative")]
            instead = f"give {alike[0]}" if alike else "leave it out"
            raise UsageError(f"{strange[0]} does not go with {given[0]}: {instead}")
        if meant and not guided:
            raise UsageError(f"{meant[0]} acts through classifier-free guidance, which is off: give {led_by(bundle.manifest.model)}")
        if self.class_labels is not None:
            return len(whole_labels(bundle.manifest.model, self.class_labels))
        if self.negative_prompt is not None:
            _texts("negative_prompt", self.negative_prompt)
        if self.prompt is not None:
            return len(_texts("prompt", self.prompt))
        return len(_numbers("prompt_embeds", self.prompt_embeds, _dimensions(bundle)))

    def conditions(self, bundle: Bundle, open_graph: Callable[[str], Session], guided: bool) -> tuple[Conditions, Conditions | None]:
        """The conditions of each picture and, where `guided`, those of the weak branch.

        Raises: UsageError as `check`, and for a prompt that is too long or embeddings of a wrong shape.
        """
        self.check(bundle, guided)
        if self.class_labels is not None:
            return self._classes(bundle, guided)
        strong, weak = self._prompted(bundle, open_graph, guided) if self.prompt_embeds is None else self._embedded(bundle, guided)
        if _layers(bundle) is None:
            return strong, weak
        return fused(open_graph, strong), None if weak is None else fused(open_graph, weak)

    def _prompted(self, bundle: Bundle, open_graph: Callable[[str], Session], guided: bool) -> tuple[Conditions, Conditions | None]:
        prompts = _texts("prompt", self.prompt)
        if not guided:
            return encode(bundle, prompts, open_graph), None
        negative = _texts("negative_prompt", self.negative_prompt or "")
        if len(negative) not in (1, len(prompts)):
            raise UsageError(f"there are {len(prompts)} prompts and {len(negative)} negative ones: give one, or one each")
        negative = negative * len(prompts) if len(negative) == 1 else negative
        both = encode(bundle, [*prompts, *negative], open_graph)
        return both.rows(slice(0, len(prompts))), both.rows(slice(len(prompts), None))

    def _embedded(self, bundle: Bundle, guided: bool) -> tuple[Conditions, Conditions | None]:
        strong = _embeddings(bundle, "", self.prompt_embeds, self.pooled_prompt_embeds, self.prompt_embeds_mask)
        if not guided:
            return strong, None
        given = (self.negative_prompt_embeds, self.negative_pooled_prompt_embeds, self.negative_prompt_embeds_mask)
        weak = _embeddings(bundle, "negative_", *given)
        if len(weak) != len(strong):
            raise UsageError(f"there are {len(strong)} prompt_embeds and {len(weak)} negative_prompt_embeds: give as many, of any length")
        return strong, weak

    def _classes(self, bundle: Bundle, guided: bool) -> tuple[Conditions, Conditions | None]:
        """A class is a one-hot pooled embedding and one text token of zeros; no class is zeros."""
        labels = whole_labels(bundle.manifest.model, self.class_labels)
        hidden = np.zeros((len(labels), 1, width(bundle, "encoder_hidden_states")), dtype=np.float32)
        most = width(bundle, POOLED)
        if bundle.manifest.model.num_classes > most:
            raise BundleError(f"{bundle.folder} tells of {bundle.manifest.model.num_classes} classes, and its denoiser takes {most}")
        pooled = np.eye(most, dtype=np.float32)[labels]
        return Conditions(hidden, pooled), Conditions(hidden, np.zeros_like(pooled)) if guided else None


def fused(open_graph: Callable[[str], Session], tapped: Conditions) -> Conditions:
    """Texts (B, T, D) of those (B, T, layers, D) that a text encoder gives, through the bundle's graph `text_fusion`. Texts of one length
    share runs."""
    assert tapped.hidden is not None
    texts: list[np.ndarray] = [np.empty(0)] * len(tapped)
    with open_graph("text_fusion") as session:
        for alike in tapped.alike():
            own = tapped.rows(alike).hidden
            assert own is not None
            for part in batches(session, len(alike)):
                for row, text in zip(alike[part], session.run({"tapped": own[part]})["fused"], strict=True):
                    texts[row] = text
    return Conditions.of(texts, tapped.pooled)


def _layers(bundle: Bundle) -> int | None:
    """Tapped layers of a text token, where a model has several."""
    text = bundle.manifest.model.text
    return text.layers if text else None


def _dimensions(bundle: Bundle) -> int:
    """How many dimensions embeddings of prompts have."""
    return 3 if _layers(bundle) is None else 4


def guidance_of(
    model: Model,
    guidance_scale: float | None,
    true_cfg_scale: float | None,
    interval: tuple[float, float] = (0.0, 1.0),
    normalization: float = 0.0,
) -> tuple[float | None, Guidance]:
    """The distilled scale that goes into the model, if it takes one, and classifier-free guidance, in diffusers' words: of FLUX
    `true_cfg_scale`, of other models `guidance_scale`. Scales from 0 to what `Model.guidance_off` says are off, and 1 is of the first.

    Raises: UsageError for a scale that the model does not take.
    """
    if not isinstance(interval, Sequence) or len(interval) != 2:
        raise UsageError(f"guidance_interval is a pair of sigmas, (0.3, 0.8), got {interval!r}")
    for name, value in (("guidance_scale", guidance_scale), ("true_cfg_scale", true_cfg_scale), ("cfg_normalization", normalization)):
        if value is not None and (not is_number(value) or not 0 <= value < float("inf")):
            raise UsageError(f"{name} must be a number, 0 or more, got {value!r}")

    def guidance(scale: float) -> Guidance:
        return Guidance(scale, *interval, rescale=model.guidance_rescale, cap=normalization)

    true = guidance(_on(true_cfg_scale))
    if model.patches and model.patches.guidance_embeds:
        return USUAL.get(model.family, 1.0) if guidance_scale is None else guidance_scale, true
    if model.distilled:
        if _on(guidance_scale) > 1:
            raise UsageError(
                f"{model.name} was distilled to draw without guidance, and diffusers leaves guidance_scale aside: leave it out, or lead "
                "away from a negative_prompt with true_cfg_scale"
            )
        return None, true
    if true_cfg_scale is not None:
        raise UsageError("true_cfg_scale is for models with distilled guidance; in this one guidance_scale is classifier-free guidance")
    if model.patches is None and model.text is None:  # where 0 has a meaning of its own, which is not offered
        return None, guidance(1.0 if guidance_scale is None else guidance_scale)
    usual = None if model.num_classes else USUAL.get(model.family)
    return None, guidance(_on(usual if guidance_scale is None else guidance_scale, model.guidance_off))


def _on(scale: float | None, off: int = 1) -> float:
    """The scale of `weak + s (strong - weak)` that a scale which is none up to `off` stands for; 1 where it is off."""
    return 1.0 if scale is None else max(scale + (1 - off), 1.0)


def led_by(model: Model) -> str:
    """What turns classifier-free guidance on, in the words of an error."""
    embedded = model.distilled or (model.patches is not None and model.patches.guidance_embeds)
    return "true_cfg_scale above 1" if embedded else f"guidance_scale above {model.guidance_off}"


def whole_labels(model: Model, class_labels: Any) -> np.ndarray:
    """Class labels of a model as int64 (B,), a single 0 where it has no classes; raises UsageError where they are none of its classes."""
    if model.unconditional:
        if class_labels is not None:
            raise UsageError(f"{model.name} has no classes and draws from noise alone: leave class_labels out")
        return np.zeros(1, dtype=np.int64)
    try:
        labels = np.atleast_1d(np.asarray(class_labels))
    except ValueError:  # a ragged list
        labels = np.empty(0)
    if labels.ndim != 1 or not labels.size or labels.dtype.kind not in "iu":
        raise UsageError(f"class_labels must be one or more whole numbers, got {class_labels!r}")
    if wrong := [int(label) for label in labels if not 0 <= label < model.num_classes]:
        raise UsageError(f"this model has classes 0 to {model.num_classes - 1}, got {', '.join(map(str, wrong))}")
    return labels.astype(np.int64)


def width(bundle: Bundle, name: str) -> int:
    """Last size of an input of the denoiser."""
    return next(int(spec.shape[-1]) for spec in bundle.manifest.graphs["denoiser"].inputs if spec.name == name)


def takes_pooled(bundle: Bundle) -> bool:
    """Whether the denoiser takes a pooled embedding beside a sequence."""
    return any(spec.name == POOLED for spec in bundle.manifest.graphs["denoiser"].inputs)


def _texts(name: str, value: str | Sequence[str] | None) -> list[str]:
    texts = [value] if isinstance(value, str) else list(value) if isinstance(value, Sequence) else []
    if not texts or not all(isinstance(text, str) for text in texts):
        raise UsageError(f"{name} is a text or several, got {value!r}")
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UsageError(f"{name} is no valid Unicode text, at place {error.start + 1}: {text!r}") from None
    return texts


def _numbers(name: str, value: Any, dimensions: int) -> np.ndarray:
    """Embeddings as float32; raises UsageError unless they are numbers of so many dimensions, of one prompt or more."""
    try:
        array = np.asarray(value, dtype=np.float32)
    except (TypeError, ValueError):  # ragged, or no numbers
        ragged = ": texts of several lengths are padded to one, with a mask beside them" if isinstance(value, list | tuple) else ""
        raise UsageError(f"{name} must be an array of numbers, got {type(value).__name__}{ragged}") from None
    if array.ndim != dimensions or not len(array):
        raise UsageError(f"{name} must have {dimensions} dimensions, a prompt each in the first, got shape {array.shape}")
    return array


def _embeddings(bundle: Bundle, prefix: str, hidden: np.ndarray | None, pooled: np.ndarray | None, mask: np.ndarray | None) -> Conditions:
    has_pooled = takes_pooled(bundle)
    names = [f"{prefix}prompt_embeds", f"{prefix}pooled_prompt_embeds"][: 1 + has_pooled]
    given, both = [hidden, pooled][: 1 + has_pooled], " and ".join(names)
    if prefix and all(value is None for value in given):
        every, off = "both" if has_pooled else "them", bundle.manifest.model.guidance_off
        raise UsageError(f"classifier-free guidance leads away from {both}: give {every}, or turn it off with a scale of {off}")
    if any(value is None for value in given):
        raise UsageError(f"{both} go together: give both")
    arrays = [_numbers(name, value, dimensions) for name, value, dimensions in zip(names, given, (_dimensions(bundle), 2), strict=False)]
    layers, widths = _layers(bundle), [width(bundle, name) for name in ("encoder_hidden_states", POOLED)[: len(arrays)]]
    shapes = [("B", "T", *([layers] if layers else []), widths[0]), *(("B", size) for size in widths[1:])]
    fits = [array.shape[dims:] == shape[dims:] for array, shape, dims in zip(arrays, shapes, (2, 1), strict=False)]
    if not all(fits) or len({len(array) for array in arrays}) > 1:
        wanted = " and ".join(f"({', '.join(map(str, shape))})" for shape in shapes)
        raise UsageError(f"{both} must be {wanted}, got {' and '.join(str(array.shape) for array in arrays)}")
    conditions = Conditions(*arrays)
    if mask is not None:
        lengths = _lengths(f"{prefix}prompt_embeds_mask", mask, arrays[0].shape[:2])
        texts = [text[:length] for text, length in zip(arrays[0], lengths, strict=True)]
        conditions = Conditions.of(texts, conditions.pooled)
    spans = bundle.manifest.graphs["denoiser"].dimensions
    patches, length = bundle.manifest.model.patches, conditions.length
    if "T" in spans and (patches.filled(length) if patches else length) not in spans["T"]:
        raise UsageError(f"this bundle takes {spans['T']} text tokens, and {prefix}prompt_embeds has {length}: cut or pad it")
    return conditions


def _lengths(name: str, mask: Any, shape: tuple[int, ...]) -> list[int]:
    """How many tokens of each text a mask (B, T) leaves; raises UsageError unless they are the first ones, of one or more."""
    array = _numbers(name, mask, 2)
    lengths = [int(length) for length in array.sum(axis=1)] if np.isfinite(array).all() else []
    if array.shape != shape or not lengths or min(lengths) < 1 or (array != (np.arange(shape[1]) < np.array(lengths)[:, None])).any():
        raise UsageError(f"{name} is {shape[0]} x {shape[1]}, 1 for a text's own tokens, which come first and are some, and 0 after them")
    return lengths
