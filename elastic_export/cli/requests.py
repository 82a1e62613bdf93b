"""From the options of `elastic-export generate` to a request; and from a result to what is said of it."""

import base64
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import typer
from msgspec.structs import replace
from PIL import Image, ImageOps

from elastic_export.cli import options
from elastic_export.cli.drawing import Goal, Guided, Sampling, Subject, typed
from elastic_runtime.choosing.cost import plan_flops
from elastic_runtime.choosing.deadline import Deadline
from elastic_runtime.choosing.goals import Auto, FitMemory, Quality
from elastic_runtime.choosing.policy import Fixed, PerStep
from elastic_runtime.contract.budget import Budget
from elastic_runtime.contract.bundle import Bundle
from elastic_runtime.contract.manifest import Model
from elastic_runtime.contract.precision import EXACT
from elastic_runtime.denoising.conditions import CLASSES_GUIDANCE
from elastic_runtime.denoising.sources import converted, pixels
from elastic_runtime.drawing.beside import edits
from elastic_runtime.drawing.budgets import STEPS
from elastic_runtime.drawing.kinds import kind_of
from elastic_runtime.drawing.plans import plans_of
from elastic_runtime.errors import UsageError
from elastic_runtime.ralu.caching import Caching
from elastic_runtime.ralu.fit import fit
from elastic_runtime.ralu.offers import base_shift
from elastic_runtime.ralu.plan import FULL, OWN, STEPPED, Plan
from elastic_runtime.request import Request, Result

PLAIN_STEPS = 50  # that the paper compares with
# option -> the request's field that it sets
FIELDS = {
    "--prompt": "prompt", "--negative-prompt": "negative_prompt", "--height": "height", "--width": "width", "--sampler": "sampler",
    "--temperature": "temperature", "--plan": "plan", "--cache": "caching", "--true-cfg": "true_cfg_scale", "--drop": "drop_fraction",
    "--autoguidance": "autoguidance", "--guidance-drop": "guidance_drop_fraction", "--image": "image", "--strength": "strength",
    "--mask": "mask_image",
}  # fmt: skip


def policy(goal: Goal, budgets: list[Budget], weak: Budget | None) -> Any:
    """What chooses: the budgets that were named, or the one goal that was given; with neither, what suits this machine."""
    named, given = len(budgets) > 1 or bool(budgets[0]), list(typed(goal))
    if len(given) > 1 or (given and named):
        what = f"{' and '.join(given)}{' and a budget of an axis' * named}"
        raise typer.BadParameter(f"{what} choose budgets twice: give one of them")
    if goal.budget not in (None, "auto"):
        raise typer.BadParameter(f"--budget takes auto, got {goal.budget!r}; a budget itself is given by its axis, such as --latents 64")
    if goal.target_ms is not None:
        return Deadline(goal.target_ms / 1000, weak)
    if goal.max_memory is not None:
        return FitMemory(goal.max_memory, weak)
    if goal.quality is not None:
        return Quality(goal.quality, weak)
    if not named:
        return Auto(guidance_budget=weak)
    return Fixed(budgets[0], weak) if len(budgets) == 1 else PerStep(tuple(budgets), weak)


def request(
    bundle: Bundle,
    subject: Subject,
    goal: Goal,
    sampling: Sampling,
    guided: Guided,
    budgets: Mapping[str, str],
    weak: Mapping[str, int],
) -> Request:
    """The request that the options stand for on this bundle.

    Raises: typer.BadParameter for options that do not fit its kind of model, or contradict each other.
    """
    model = bundle.manifest.model
    drawing = kind_of(model)
    _subject(model, subject)
    fields_of = FIELDS | {f"--{axis}": "budget" for axis in budgets} | {f"--guidance-{axis}": "guidance_budget" for axis in weak}
    given = typed(subject, sampling, guided, budgets=budgets, weak=weak)
    if wrong := [flag for flag in given if fields_of.get(flag) in drawing.unfit(model)]:
        raise typer.BadParameter(f"{wrong[0]} does not fit {model.name}, which draws {drawing.kind}")
    labels = None if subject.prompt or model.unconditional else tuple(options.integers("0" if subject.classes is None else subject.classes))
    chooser = policy(goal, options.budgets(budgets), Budget(**weak) or None)
    pictures = [picture(path, "--image", "RGB") for path in subject.image or ()]
    edited = bool(pictures) and edits(model, subject.strength, subject.mask)
    if model.patches and not typed(goal) and (sampling.plan is not None or sampling.cache is not None or (pictures and not edited)):
        chooser = None  # the plan is said, or the one of what is drawn over
    outline = options.outline(sampling.plan) if sampling.plan else None
    asked = Request(
        class_labels=labels,
        prompt=tuple(subject.prompt) if subject.prompt else None,
        negative_prompt=subject.negative_prompt,
        num_inference_steps=STEPS if sampling.steps is None and not model.patches else sampling.steps,
        guidance_scale=CLASSES_GUIDANCE if guided.guidance is None and labels is not None else guided.guidance,
        true_cfg_scale=guided.true_cfg,
        guidance_interval=options.interval(guided.interval),
        autoguidance=guided.autoguidance,
        sampler=sampling.sampler,
        temperature=sampling.temperature,
        height=subject.height,
        width=subject.width,
        plan=FULL if outline else sampling.plan,
        policy=chooser,
        drop_fraction=guided.drop,
        guidance_drop_fraction=guided.guidance_drop,
        seeds=subject.seed,
        image_reference=tuple(pictures) if edited else None,
        image=None if edited or not pictures else pictures[0] if len(pictures) == 1 else pixels("image", pictures, "RGB"),
        strength=subject.strength,
        mask_image=None if subject.mask is None else picture(subject.mask, "--mask", "L"),
    )
    if model.patches and sampling.steps is not None:
        name = sampling.plan or next(iter(plans_of(bundle, replace(asked, num_inference_steps=None))[1]))
        if name not in STEPPED:
            raise typer.BadParameter(f"--steps is for --plan {', '.join(STEPPED)}; plan {name} has steps of its own")
    if outline:
        (steps, *_), (rows, columns) = outline, plans_of(bundle, asked)[0]
        shift = base_shift(sum(steps), rows * columns, model.config.get("scheduler", {}))
        asked = replace(asked, plan=fit(*outline, shift))
    if sampling.cache is None:
        return asked
    (plan, *_) = plans_of(bundle, asked)[1].values()
    return replace(asked, caching=Caching.every(plan, sampling.cache))


def picture(path: Path, option: str, mode: str) -> np.ndarray:
    """The pixels of a picture's file, uint8; raises UsageError for a file that is none."""
    try:
        with Image.open(path) as opened:
            return converted(f"{option} {path}", ImageOps.exif_transpose(opened), mode)
    except UsageError:
        raise
    except Exception as error:  # whatever Pillow's readers raise: OSError and ValueError, but SyntaxError and EOFError as well
        why = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UsageError(f"cannot read {option} {path}: {why}") from None


def _subject(model: Model, subject: Subject) -> None:
    name, classes = model.name, model.num_classes
    if model.unconditional:
        if subject.classes is not None or subject.prompt:
            raise typer.BadParameter(f"{name} draws from noise alone: leave --{'prompt' if subject.prompt else 'classes'} out")
        return
    if subject.prompt and classes:
        raise typer.BadParameter(f"--prompt does not fit {name}, which draws classes: give --classes")
    if subject.classes is not None and not classes:
        raise typer.BadParameter(f"--classes does not fit {name}, which draws from prompts: give --prompt")
    if not classes and not subject.prompt:
        raise typer.BadParameter(f"{name} draws from prompts: give --prompt")


def read(path: Path, typed: Mapping[str, Any]) -> Request:
    """The request in a file: one by itself, or the whole of what `generate --json` prints.

    Raises: UsageError for a file that is none; typer.BadParameter for another option beside it.
    """
    if typed:
        raise typer.BadParameter(f"--request says all that is to be drawn: leave {next(iter(typed))} out, or write it into {path}")
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
    asked = Request.from_json(text, f"--request {path}")
    if asked.output_type != "pil":
        raise UsageError(f"--request {path} asks for output_type {asked.output_type}, and the command writes a picture: leave it out")
    return asked


def facts(bundle: Bundle, asked: Request, result: Result) -> dict[str, Any]:
    """What a picture's metadata and `--json` tell: how it was drawn, what each step used, and the request that draws it again."""
    seeds = result.facts["seeds"]
    drop = asked.drop_fraction
    record: dict[str, Any] = result.facts | {
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
        record["drop_fractions"] = [drop, drop if asked.guidance_drop_fraction is None else asked.guidance_drop_fraction]
    else:
        record |= {"schedule": result.plan, "flops": flops(bundle, result), "skipped": sum(not step.computed for step in result.steps)}
    return {name: value for name, value in record.items() if value is not None or name in ("embedded_guidance", "flops")}


def metadata(record: Mapping[str, Any]) -> dict[str, Any]:
    """What a picture's metadata tells: as `facts`, but of pictures that were drawn over or edited after only their SHA-256."""

    def digest(array: Mapping[str, str]) -> dict[str, str]:
        return {"sha256": hashlib.sha256(base64.b64decode(array["npy"])).hexdigest()}

    request = dict(record["request"])
    for name in ("image", "mask_image"):
        if name in request:
            request[name] = digest(request[name])
    if references := request.get("image_reference"):
        request["image_reference"] = [digest(each) for each in references]
    return {**record, "request": request}


def flops(bundle: Bundle, result: Result) -> dict[str, int] | None:
    """FLOPs of a picture along its plan, of as many steps at full resolution, and of the paper's number; None without a cost table."""
    if not bundle.manifest.cost or result.plan is None:
        return None
    size, skipped = result.facts["size"], {step.index for step in result.steps if not step.computed}
    plans = {"same_steps": Plan.full(len(result.steps)), "usual": Plan.full(PLAIN_STEPS)}
    beside = result.facts.get("references", 0)
    whole = {name: plan_flops(bundle.manifest, plan, size, references=beside) for name, plan in plans.items()}
    return {"plan": plan_flops(bundle.manifest, result.plan, size, skipped, beside)} | whole


def lines(output: Path, result: Result, record: Mapping[str, Any]) -> Iterator[str]:
    """What is said of a picture on stdout."""
    count, steps, seed = len(result.images), len(result.steps), record.get("seed")
    where = record["where"] + (f" ({record['precision']})" if record.get("precision", EXACT) != EXACT else "")
    pictures = f"{count} picture{'' if count == 1 else 's'} in {record['seconds']:.2f} s"
    if result.plan is None:
        budgets = ", ".join(dict.fromkeys(str(step.budget) for step in result.steps))
        counts = [number for step in result.steps for number in step.kept or ()]
        kept = f", kept {min(counts)} to {max(counts)} tokens" if counts else ""
        yield f"{output}: {pictures}, {steps} steps at {budgets}{kept}, seed {seed}, {where}"
    else:
        tokens = "/".join(map(str, record["tokens"]))
        name = "of one's own" if str(record["plan"]).startswith(OWN) else record["plan"].partition(",")[0]
        yield f"{output}: {pictures}, plan {name}, {steps} steps at {tokens} tokens, seed {seed}, {where}"
        if spent := record.get("flops"):
            yield (
                f"{spent['plan'] / 1e12:.4g} TFLOPs a picture and branch: {spent['same_steps'] / spent['plan']:.2f}x less than "
                f"{steps} steps at full resolution, {spent['usual'] / spent['plan']:.2f}x less than {PLAIN_STEPS}"
            )
    yield f"chosen: {result.steps[0].reason}"
