"""From the options of `elastic-export generate` to a request, and from a result to what is said of it."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import typer

from elastic_export.cli import options
from elastic_runtime.choosing.cost import plan_flops
from elastic_runtime.contract.budget import Budget
from elastic_runtime.contract.bundle import Bundle
from elastic_runtime.drawing.plans import plans_of
from elastic_runtime.errors import UsageError
from elastic_runtime.pipeline import unfit
from elastic_runtime.ralu.caching import Caching
from elastic_runtime.ralu.plan import FULL, OWN, Plan
from elastic_runtime.request import Request, Result

Arrays = dict[str, np.ndarray]
CLASSES_GUIDANCE = 2.0  # where nothing else is asked for
PLAIN_STEPS = 50  # that the paper compares with
# option -> the request's field that it sets
FLAGS = {
    "--latents": "budget", "--loops": "budget", "--tokens": "budget", "--guidance-latents": "guidance_budget",
    "--guidance-loops": "guidance_budget", "--guidance-tokens": "guidance_budget", "--drop": "drop_fraction",
    "--guidance-drop": "guidance_drop_fraction", "--autoguidance": "autoguidance", "--sampler": "sampler", "--temperature": "temperature",
    "--plan": "plan", "--prompt": "prompt", "--negative-prompt": "negative_prompt", "--height": "height", "--width": "width",
    "--true-cfg": "true_cfg_scale", "--cache": "caching",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DrawingOptions:
    """The options that say what to draw and how, as they were typed; None (or empty) where nothing was."""

    classes: str | None = None
    prompt: list[str] | None = None
    negative_prompt: str | None = None
    budgets: Mapping[str, str | None]
    weak: Mapping[str, int | None]
    drop: float = 0.0
    guidance_drop: float | None = None
    budget: str | None = None
    target_ms: float | None = None
    max_memory: float | None = None
    quality: float | None = None
    steps: int | None = None
    guidance: float | None = None
    true_cfg: float | None = None
    interval: str = "0-1"
    autoguidance: bool = False
    sampler: str | None = None
    temperature: float | None = None
    seed: int = 0
    height: int | None = None
    width: int | None = None
    plan: str | None = None
    cache: int | None = None

    @property
    def typed(self) -> dict[str, Any]:
        """What was typed, by option."""
        typed: dict[str, Any] = {f"--{axis}": value for axis, value in self.budgets.items() if value is not None}
        typed |= {f"--guidance-{axis}": value for axis, value in self.weak.items() if value is not None}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in ("budgets", "weak") and value != field.default:
                typed[f"--{field.name.replace('_', '-')}"] = value
        return typed


def request(bundle: Bundle, given: DrawingOptions) -> Request:
    """The request that the options stand for on this bundle.

    Raises: typer.BadParameter for options that do not fit its kind of model, or contradict each other.
    """
    model, (taken_not, kind) = bundle.manifest.model, unfit(bundle)
    _subject(model.name, model.num_classes, given)
    if wrong := [flag for flag in given.typed if FLAGS.get(flag) in taken_not]:
        raise typer.BadParameter(f"{wrong[0]} does not fit {model.name}, which draws {kind}")
    if model.patches and given.steps is not None and given.plan != FULL:
        raise typer.BadParameter(f"--steps is for --plan full; plan {given.plan or '4x'} has steps of its own")
    labels = None if given.prompt else tuple(options.integers("0" if given.classes is None else given.classes))
    budgets = options.budgets(given.budgets)
    weak = Budget(**{axis: value for axis, value in given.weak.items() if value is not None}) or None
    policy = options.policy(budgets, weak, given.budget, given.target_ms, given.max_memory, given.quality)
    goal = any(value is not None for value in (given.budget, given.target_ms, given.max_memory, given.quality))
    if model.patches and not goal and (given.plan is not None or given.cache is not None):
        policy = None
    guidance = CLASSES_GUIDANCE if given.guidance is None and labels is not None else given.guidance
    asked = Request(
        class_labels=labels,
        prompt=tuple(given.prompt) if given.prompt else None,
        negative_prompt=given.negative_prompt,
        num_inference_steps=20 if given.steps is None and not model.patches else given.steps,
        guidance_scale=guidance,
        true_cfg_scale=given.true_cfg,
        guidance_interval=options.interval(given.interval),
        autoguidance=given.autoguidance,
        sampler=given.sampler,
        temperature=given.temperature,
        height=given.height,
        width=given.width,
        plan=options.plan(given.plan) if given.plan else None,
        policy=policy,
        drop_fraction=given.drop,
        guidance_drop_fraction=given.guidance_drop,
        seeds=given.seed,
    )
    if given.cache is None:
        return asked
    from msgspec.structs import replace

    return replace(asked, caching=Caching.every(next(iter(plans_of(bundle, asked)[1].values())), given.cache))


def _subject(name: str, classes: int, given: DrawingOptions) -> None:
    if given.prompt and classes:
        raise typer.BadParameter(f"--prompt does not fit {name}, which draws classes: give --classes")
    if given.classes is not None and not classes:
        raise typer.BadParameter(f"--classes does not fit {name}, which draws from prompts: give --prompt")
    if not classes and not given.prompt:
        raise typer.BadParameter(f"{name} draws from prompts: give --prompt")


def read(path: Path, given: DrawingOptions) -> Request:
    """The request in a file: one by itself, or the whole of what `generate --json` prints.

    Raises: UsageError for a file that is none; typer.BadParameter for another option beside it.
    """
    if given.typed:
        raise typer.BadParameter(f"--request says all that is to be drawn: leave {next(iter(given.typed))} out, or write it into {path}")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read --request {path}: {getattr(error, 'strerror', None) or error}") from None
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"--request {path} is not JSON: {error}") from None
    if isinstance(content, dict) and str(content.get("schema", "")).startswith("elastic-export/generate/"):
        text = json.dumps(content.get("request", {}))
    return Request.from_json(text, f"--request {path}")


def facts(bundle: Bundle, asked: Request, result: Result) -> dict[str, Any]:
    """What a picture's metadata and `--json` tell: how it was drawn, what each step used, and the request that draws it again."""
    seeds = result.facts["seeds"]
    drop = asked.drop_fraction
    told: dict[str, Any] = result.facts | {
        "classes": asked.class_labels,
        "prompts": asked.prompt,
        "negative_prompt": asked.negative_prompt,
        "seed": seeds[0] if seeds else None,
        "guidance_interval": asked.guidance_interval,
        "policy": repr(asked.policy),
        "seconds": sum(step.seconds for step in result.steps) if result.plan is None else result.seconds,
        "total_seconds": result.seconds,
        "steps": result.steps,
        "request": json.loads(result.request.to_json()),
    }
    if result.plan is None:
        told["drop_fractions"] = [drop, drop if asked.guidance_drop_fraction is None else asked.guidance_drop_fraction]
    else:
        told |= {"schedule": result.plan, "flops": flops(bundle, result), "skipped": sum(not step.computed for step in result.steps)}
    return {name: value for name, value in told.items() if value is not None or name in ("embedded_guidance", "flops")}


def flops(bundle: Bundle, result: Result) -> dict[str, int] | None:
    """FLOPs of a picture along its plan, of as many steps at full resolution, and of the paper's number; None without a cost table."""
    if not bundle.manifest.cost or result.plan is None:
        return None
    size, skipped = result.facts["size"], {step.index for step in result.steps if not step.computed}
    plans = {"same_steps": Plan.full(len(result.steps)), "usual": Plan.full(PLAIN_STEPS)}
    whole = {name: plan_flops(bundle.manifest, plan, size) for name, plan in plans.items()}
    return {"plan": plan_flops(bundle.manifest, result.plan, size, skipped)} | whole


def lines(output: Path, result: Result, told: Mapping[str, Any]) -> Iterator[str]:
    """What is said of a picture on stdout."""
    count, steps, seed = len(result.images), len(result.steps), told.get("seed")
    pictures = f"{count} picture{'' if count == 1 else 's'} in {told['seconds']:.2f} s"
    if result.plan is None:
        budgets = ", ".join(dict.fromkeys(str(step.budget) for step in result.steps))
        counts = [number for step in result.steps for number in step.kept or ()]
        kept = f", kept {min(counts)} to {max(counts)} tokens" if counts else ""
        yield f"{output}: {pictures}, {steps} steps at {budgets}{kept}, seed {seed}, {told['where']}"
    else:
        tokens = "/".join(map(str, told["tokens"]))
        name = "of one's own" if str(told["plan"]).startswith(OWN) else told["plan"].partition(",")[0]
        yield f"{output}: {pictures}, plan {name}, {steps} steps at {tokens} tokens, seed {seed}, {told['where']}"
        if spent := told.get("flops"):
            yield (
                f"{spent['plan'] / 1e12:.4g} TFLOPs a picture and branch: {spent['same_steps'] / spent['plan']:.2f}x less than "
                f"{steps} steps at full resolution, {spent['usual'] / spent['plan']:.2f}x less than {PLAIN_STEPS}"
            )
    yield f"chosen: {result.steps[0].reason}"
