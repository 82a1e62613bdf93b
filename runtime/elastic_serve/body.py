"""What `POST /v1/images/generations` takes: the OpenAI Images API's fields, and ours beside them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec

from elastic_runtime.contract.budget import Budget
from elastic_runtime.errors import BudgetError, UsageError
from elastic_runtime.request import Request
from elastic_runtime.sampling.noise import seeds
from elastic_serve.served import Served

PREVIEWS = 16
ECHOED = 80  # letters of a name that an error repeats
LONGEST = 32_000  # letters of a prompt, as the API has it
AT = re.compile(r" - at `\$\.?(.*)`$")
NUMBER = re.compile(r"\s*0*([0-9]{1,9})\s*")
UNKNOWN = re.compile(r"unknown field `(.*)`")

Whole = Annotated[int, msgspec.Meta(ge=0)]
Scale = Annotated[float, msgspec.Meta(ge=0, le=1000)]  # beyond it a float32 overflows, and nothing is drawn
Text = Annotated[str, msgspec.Meta(max_length=LONGEST)]


class BodyError(UsageError):
    """A field of a request that is unknown or wrong; `param` names it, and `code` says what is wrong with it."""

    def __init__(self, message: str, param: str | None = None, code: str = "invalid_value"):
        super().__init__(message)
        self.param, self.code = param, code


class NoModelError(BodyError):
    """A model that is not served here."""


class Body(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A request for pictures."""

    model: str | None = None
    prompt: Text | None = None
    n: Annotated[int, msgspec.Meta(ge=1)] = 1
    size: str | None = None
    quality: Literal["auto", "low", "medium", "high", "standard", "hd"] = "auto"
    response_format: Literal["b64_json"] = "b64_json"
    output_format: Literal["png", "jpeg", "webp"] = "png"
    output_compression: Annotated[int, msgspec.Meta(ge=0, le=100)] | None = None
    background: Literal["auto", "opaque"] = "auto"
    moderation: Literal["auto", "low"] = "auto"
    stream: bool = False
    partial_images: Annotated[int, msgspec.Meta(ge=0, le=PREVIEWS)] = 0
    user: Annotated[str, msgspec.Meta(max_length=256)] | None = None
    # ours
    class_labels: Whole | Annotated[tuple[Whole, ...], msgspec.Meta(min_length=1, max_length=256)] | None = None
    negative_prompt: Text | None = None
    seed: Whole | None = None
    steps: Annotated[int, msgspec.Meta(ge=1)] | None = None
    guidance_scale: Scale | None = None
    true_cfg_scale: Scale | None = None
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    autoguidance: bool = False
    sampler: str | None = None
    temperature: Scale | None = None
    plan: Literal["4x", "7x", "speed", "mrflow", "full"] | None = None
    budget: dict[str, int] | None = None
    guidance_budget: dict[str, int] | None = None
    drop_fraction: float = 0.0
    guidance_drop_fraction: float | None = None
    deadline_ms: Annotated[float, msgspec.Meta(ge=1, le=86_400_000)] | None = None


@dataclass(frozen=True)
class Limits:
    """What one request may ask for."""

    body: int = 1 << 20  # bytes
    pictures: int = 10  # as the API has it
    steps: int = 250
    reading: float = 30.0  # seconds in which a body must have come


def read(text: bytes, limits: Limits) -> Body:
    """A request's body, checked field by field.

    Raises: BodyError naming the field that is unknown, wrong, or beyond the limits.
    """
    try:
        given = msgspec.json.decode(text)
        if isinstance(given, dict):  # the official client sends null for what its caller left out
            given = {name: value for name, value in given.items() if value is not None or name not in Body.__struct_fields__}
        body = msgspec.convert(given, Body)
    except msgspec.ValidationError as error:
        raise _named(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise BodyError(f"the body is not JSON: {error}") from None
    if body.n > limits.pictures:
        raise BodyError(f"n is at most {limits.pictures} here, got {body.n}: ask several times", "n")
    if body.steps is not None and body.steps > limits.steps:
        raise BodyError(f"steps are at most {limits.steps} here, got {body.steps}", "steps")
    if body.partial_images and not body.stream:
        raise BodyError("partial_images are for streams: give stream, too, or leave them out", "partial_images")
    return body


def requests(body: Body, served: Served, limits: Limits) -> list[Request]:
    """A request for each picture, with a seed of its own.

    Raises: BodyError for what the bundle does not take.
    """
    labels, prompt = _subject(body, served)
    height, width = _size(body, served)
    kinds: Sequence[int | None] = (None,) if labels is None else labels
    many = len(kinds) * body.n
    if many > limits.pictures:
        raise BodyError(f"{len(kinds)} class_labels, {body.n} each, are {many} pictures; at most {limits.pictures} a request here", "n")
    if body.stream and many != 1:
        raise BodyError(f"a stream is of one picture, got {many}: ask several times", "n")
    given = [body.plan is not None, body.budget is not None, body.quality not in ("auto", "standard")]
    if sum(given) > 1:
        raise BodyError("quality, budget and plan say the same in three ways: give one", "quality")
    try:
        numbers = seeds(body.seed, many)
    except UsageError as error:
        raise BodyError(str(error), "seed") from None
    budget, weak = _budget(body.budget, served, "budget"), _budget(body.guidance_budget, served, "guidance_budget")
    common: dict[str, Any] = {
        "prompt": prompt,
        "negative_prompt": body.negative_prompt,
        "num_inference_steps": body.steps,
        "guidance_scale": body.guidance_scale,
        "true_cfg_scale": body.true_cfg_scale,
        "guidance_interval": body.guidance_interval,
        "autoguidance": body.autoguidance,
        "sampler": body.sampler,
        "temperature": body.temperature,
        "plan": body.plan,
        "budget": budget,
        "guidance_budget": weak,
        "drop_fraction": body.drop_fraction,
        "guidance_drop_fraction": body.guidance_drop_fraction,
        "height": height,
        "width": width,
    }
    each = [kind for kind in kinds for _ in range(body.n)]
    return [Request(class_labels=label, seeds=(seed,), **common) for label, seed in zip(each, numbers, strict=True)]


def _subject(body: Body, served: Served) -> tuple[tuple[int, ...] | None, str | None]:
    """Class labels or a prompt; where a model draws classes, the label may stand as a number in the prompt that every client sends."""
    if not served.by_classes:
        if body.class_labels is not None:
            raise BodyError(f"{served.name} draws prompts, not classes: leave class_labels out", "class_labels")
        if served.bundle.manifest.model.unconditional:
            if body.prompt:
                raise BodyError(f"{served.name} draws from noise alone: give an empty prompt", "prompt")
            return None, None
        if body.prompt is None:
            raise BodyError(f"{served.name} draws prompts: give prompt", "prompt")
        return None, body.prompt
    most = served.bundle.manifest.model.num_classes - 1
    if body.class_labels is None:
        if body.prompt is None or not (number := NUMBER.fullmatch(body.prompt)):
            got = "no prompt" if body.prompt is None else "another prompt"  # which is nobody's to repeat
            raise BodyError(
                f"{served.name} draws classes: give class_labels, 0 to {most}, or such a number as the prompt; got {got}", "prompt"
            )
        labels: tuple[int, ...] = (int(number[1]),)
    else:
        if body.prompt:
            raise BodyError("class_labels and a prompt are given: leave the prompt empty", "prompt")
        labels = (body.class_labels,) if isinstance(body.class_labels, int) else body.class_labels
    if wrong := [label for label in labels if label > most]:
        raise BodyError(f"class_labels are 0 to {most}, got {wrong[0]}", "class_labels")
    return labels, None


def _budget(given: dict[str, int] | None, served: Served, field: str) -> Budget | None:
    """A point on the bundle's axes, as it was given."""
    if given is None:
        return None
    budget = Budget(**{name[:ECHOED]: value for name, value in given.items()})
    try:
        budget.on(served.bundle.manifest.axes)
    except BudgetError as error:
        raise BodyError(f"{field}: {error}", field, "budget_not_offered") from None
    return budget


def _size(body: Body, served: Served) -> tuple[int | None, int | None]:
    """Height and width, where another than the model's own is asked for."""
    if body.size in (None, "auto"):
        return None, None
    match = re.fullmatch(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})", body.size or "")
    if not match:
        raise BodyError(f"size is auto or WIDTHxHEIGHT in pixels, 512x512, got {body.size!r}", "size")
    width, height = int(match[1]), int(match[2])
    if (height, width) == served.size:
        return None, None
    if served.elastic:
        raise BodyError(f"{served.name} draws pictures of {served.size[1]}x{served.size[0]}, got {body.size}", "size")
    return height, width


def _named(message: str) -> BodyError:
    """The error with the field that it is about, and with those that there are where it is unknown."""
    if unknown := UNKNOWN.search(message):
        name = unknown[1][:ECHOED]
        return BodyError(f"there is no field {name!r}; there are {', '.join(Body.__struct_fields__)}", name)
    place = AT.search(message)
    param = re.sub(r"[.\[].*", "", place[1]) if place else None  # a field, not a place in it
    what = AT.sub("", message)
    return BodyError(f"{param}: {what[:1].lower()}{what[1:]}" if param else f"the body is not a request: {what}", param)
