"""What is to be drawn and how, as a record; and what was drawn.

A request is JSON for the command line, a server and a picture's metadata: `to_json` writes it, `from_json` reads it
strictly.
"""

import base64
import io
import json
import math
import tokenize
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

from elastic_runtime.choosing.deadline import Deadline
from elastic_runtime.choosing.goals import Auto, FitLatency, FitMemory, Quality
from elastic_runtime.choosing.policy import Fixed, PerStep, Replay
from elastic_runtime.contract.budget import Budget
from elastic_runtime.denoising.pictures import OutputType
from elastic_runtime.errors import UsageError
from elastic_runtime.ralu.caching import Caching
from elastic_runtime.ralu.plan import Plan
from elastic_runtime.sampling.flow import Step

_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}

Goal = Fixed | PerStep | Replay | Deadline | FitLatency | FitMemory | Quality | Auto


class Request(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A drawing in diffusers' words. What a field does not say is left to the bundle.

    What to draw, in one of three ways, or in none where the model draws from noise alone:
        class_labels: classes, 0 to num_classes - 1. prompt: texts, which the bundle's text encoders read; with
        negative_prompt, what guidance leads away from. Or embeddings: prompt_embeds (B, T, D) with pooled_prompt_embeds
        (B, P), and their negative ones; where texts differ in length prompt_embeds_mask (B, T) is 1 for a text's own
        tokens and 0 for what follows them. num_images_per_prompt: pictures of each. image_latents: pictures to edit after
        (FLUX.2), as latents (C, h, w) of the model's own kind, each of a size of its own; all pictures see them all. Or
        image_reference: the pictures themselves, uint8 (H, W, 3) (a bundle with an encoder), made to fit as diffusers does it;
        height and width are then the first one's unless they are given.
    How:
        num_inference_steps: denoising steps (20); of a model that is drawn along plans those of `full`, `speed` and `mrflow`.
        guidance_scale: 1 is off; where the model was distilled with guidance (FLUX.1-dev) the scale it takes in.
        true_cfg_scale: classifier-free guidance on top of a distilled one. guidance_interval: times between which
        guidance acts (1 is pure noise). cfg_normalization: how many times longer than the prediction without guidance the
        one with it may be, True for once. autoguidance: the weak branch keeps the label and differs by its smaller
        budget. sampler, temperature: see `sampling.fitting`. height, width: in pixels, for models that take any size.
        plan: `4x`, `7x`, `full`, `speed`, `mrflow`, or a `Plan`. caching: steps whose prediction is extrapolated.
    What is drawn over, along plan `full` (a bundle with an encoder):
        image: a picture, uint8 (H, W, 3), or several (B, H, W, 3), one for each; what is not of height and width is
        made so, and without them the picture's are meant. strength: how much of it is drawn anew, above 0 to 1 (0.6);
        that share of the steps is taken. mask_image: what of it is drawn anew, uint8 (H, W) of the picture's size or
        (B, H, W): from half white on.
    What chooses:
        budget, guidance_budget: points on the bundle's axes; or policy, asked before each step. drop_fraction,
        guidance_drop_fraction: shares of a router's kept tokens to drop.
    seeds: one a picture, or one to count up from; the same seed gives the same picture, alone and in any batch. noise:
    initial noise (B, C, h, w) in their place. output_type: pil, np or latent.
    """

    class_labels: int | tuple[int, ...] | None = None
    prompt: str | tuple[str, ...] | None = None
    negative_prompt: str | tuple[str, ...] | None = None
    prompt_embeds: np.ndarray | None = None
    pooled_prompt_embeds: np.ndarray | None = None
    negative_prompt_embeds: np.ndarray | None = None
    negative_pooled_prompt_embeds: np.ndarray | None = None
    prompt_embeds_mask: np.ndarray | None = None
    negative_prompt_embeds_mask: np.ndarray | None = None
    image_latents: tuple[np.ndarray, ...] | None = None
    image_reference: tuple[np.ndarray, ...] | None = None
    num_images_per_prompt: int = 1
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    true_cfg_scale: float | None = None
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    cfg_normalization: bool | float = False
    autoguidance: bool = False
    sampler: str | None = None
    temperature: float | None = None
    height: int | None = None
    width: int | None = None
    plan: str | Plan | None = None
    caching: Caching | None = None
    image: np.ndarray | None = None
    strength: float | None = None
    mask_image: np.ndarray | None = None
    budget: Budget | None = None
    guidance_budget: Budget | None = None
    policy: Goal | None = None
    drop_fraction: float = 0.0
    guidance_drop_fraction: float | None = None
    seeds: int | tuple[int, ...] | None = None
    noise: np.ndarray | None = None
    output_type: OutputType = "pil"

    def to_json(self) -> bytes:
        """This request as JSON; raises UsageError for what has no JSON form (a policy of one's own)."""
        try:
            plain = msgspec.to_builtins(self, enc_hook=to_plain, str_keys=True)
            return json.dumps(plain, allow_nan=False, ensure_ascii=False, separators=(",", ":")).encode()
        except (TypeError, ValueError, NotImplementedError, OverflowError) as error:
            raise UsageError(f"this request has no JSON form: {error}") from None

    @classmethod
    def from_json(cls, text: bytes | str, where: str = "the request") -> "Request":
        """Read a request strictly; raises UsageError naming the field that is unknown, missing or wrong."""
        try:
            return msgspec.json.decode(text, type=cls, dec_hook=_from_plain)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError) as error:
            raise UsageError(f"{where} is not a request: {error}. Its fields are {', '.join(cls.__struct_fields__)}") from None


@dataclass(frozen=True)
class StepRecord:
    """What one step used: its times, the budgets of its branches (None where a branch did not run) and its seconds.

    `stage` counts a plan's stages from 0; its first step's seconds include what led to it: the preview, its edges,
    growing and noise. `computed` is false where caching stood in for the network.

    Where a router keeps as many tokens as the picture needs (DC-DiT), `kept` are those of each picture and `slots` how
    many there was room for, which a budget caps: where `kept` is more, the cap bit. Runs that had to be done again are
    counted in `reruns`.

    `predicted` is what the cost model gave it, where the policy asked; `reason` is why the policy chose these budgets.
    """

    index: int
    time: float
    next_time: float
    budget: Budget
    guidance_budget: Budget | None
    seconds: float
    predicted: float | None = None
    reason: str = ""
    kept: tuple[int, ...] | None = None
    slots: int | None = None
    guidance_kept: tuple[int, ...] | None = None
    guidance_slots: int | None = None
    reruns: int = 0
    stage: int = 0
    computed: bool = True


@dataclass(frozen=True)
class Progress:
    """A step with its record, as `ElasticPipeline.iterate` yields it; `mask` tells which tokens a router kept, bool (B,
    L)."""

    step: Step
    record: StepRecord
    mask: np.ndarray | None = None


@dataclass(frozen=True)
class Result:
    """What was drawn.

    `images`: PIL pictures, or float32 (B, H, W, C) in [0, 1], or the final latents (B, C, H, W). `steps` tells what was
    spent. `seconds` is the time from the call to the pictures, without what a first call takes to calibrate. `plan` is
    the one that was drawn along, in the steps that it took. `request` draws the same pictures again: its seeds and what
    the policy chose are in it. Noise from a generator, and states that a callback replaced, are not.
    """

    images: Any
    steps: tuple[StepRecord, ...]
    seconds: float
    request: Request
    plan: Plan | None = None
    facts: dict[str, Any] = field(default_factory=dict)


def to_plain(value: Any) -> Any:
    """JSON's form of a budget or an array (base64 of a .npy file); TypeError for anything else."""
    if isinstance(value, Budget):
        return dict(value)
    if isinstance(value, np.integer | np.floating):
        return value.item()
    if isinstance(value, np.ndarray):
        stream = io.BytesIO()
        np.save(stream, value, allow_pickle=False)
        return {"npy": base64.b64encode(stream.getvalue()).decode("ascii")}
    raise TypeError(f"{type(value).__name__} is not a record")


def _array(npy: bytes) -> np.ndarray:
    """The array of a .npy file, none larger than the file has bytes for, whatever its header says."""
    stream = io.BytesIO(npy)
    version = np.lib.format.read_magic(stream)
    if version not in _HEADERS:
        raise ValueError(f"version {version} of the format")
    shape, fortran, dtype = _HEADERS[version](stream)
    if dtype.hasobject:
        raise ValueError("it holds objects")
    flat = np.frombuffer(npy, dtype, math.prod(shape), stream.tell())
    return flat.reshape(shape, order="F" if fortran else "C").copy()


def _from_plain(kind: type, value: Any) -> Any:
    if kind is Budget:
        if not isinstance(value, dict) or not all(isinstance(each, int) and not isinstance(each, bool) for each in value.values()):
            raise ValueError(f'a budget is an object of whole numbers, {{"latents": 64}}, got {value!r}')
        return Budget(**value)
    if kind is np.ndarray:
        if not isinstance(value, dict) or list(value) != ["npy"] or not isinstance(value["npy"], str):
            raise ValueError('an array is an object {"npy": "base64 of a .npy file"}')
        try:
            return _array(base64.b64decode(value["npy"], validate=True))
        except (ValueError, EOFError, OSError, SyntaxError, tokenize.TokenError) as error:
            raise ValueError(f"an array that numpy does not read: {error}") from None
    raise NotImplementedError(kind)
