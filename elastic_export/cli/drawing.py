"""Drawing along a plan, for `elastic-export generate` on a bundle of FLUX or SD3."""

import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import typer

from elastic_export.cli import options, show
from elastic_export.pictures import grid, save
from elastic_runtime.contract.bundle import Bundle
from elastic_runtime.denoising.conditions import guidance_of
from elastic_runtime.ralu import Caching, Plan, RaluPipeline
from elastic_runtime.ralu.cost import STEP, picture_flops

# Plain steps that the paper compares with.
USUAL = 50
# Guidance of pictures of classes where none is given, as at budgets.
CLASSES = 2.0


def refuse(bundle: Bundle, given: Mapping[str, object], how: str) -> None:
    """Raise BadParameter for an option that does not fit the bundle's kind of model."""
    if wrong := [name for name, value in given.items() if value is not None]:
        raise typer.BadParameter(f"--{wrong[0]} does not fit {bundle.manifest.model.name}, which draws {how}")


def along_a_plan(
    bundle: Bundle,
    output: Path,
    *,
    classes: str | None,
    prompts: list[str] | None,
    negative_prompt: str | None,
    height: int | None,
    width: int | None,
    plan: str | None,
    steps: int | None,
    guidance: float | None,
    true_cfg: float | None,
    interval: tuple[float, float],
    cache: int | None,
    seed: int,
    backend: str | None,
    json: bool,
    quiet: bool,
) -> None:
    """Draw, save and say what it took."""
    model = bundle.manifest.model
    labels = options.integers("0" if classes is None else classes) if model.num_classes else None
    if prompts and model.num_classes:
        raise typer.BadParameter(f"--prompt does not fit {model.name}, which draws classes: give --classes")
    if classes and not model.num_classes:
        raise typer.BadParameter(f"--classes does not fit {model.name}, which draws from prompts: give --prompt")
    if not model.num_classes and not prompts:
        raise typer.BadParameter(f"{model.name} draws from prompts: give --prompt")
    if guidance is None and labels is not None:
        guidance = CLASSES
    if steps is not None and plan != "full":
        raise typer.BadParameter(f"--steps is for --plan full; plan {plan or '4x'} has steps of its own")
    count = len(labels or prompts or ())
    with RaluPipeline.from_pretrained(bundle, backend) as pipe:
        drawing = pipe.drawing(options.plan("4x" if plan is None else plan), steps, height, width)
        caching = Caching.every(drawing.plan, cache) if cache is not None else None
        spent = cost(bundle, drawing.plan, drawing.size, caching.skip if caching else frozenset())
        with show.bar(quiet, f"drawing {count}", drawing.plan.total) as advance, warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always", UserWarning)
            result = pipe(
                prompts,
                negative_prompt=negative_prompt,
                class_labels=labels,
                height=height,
                width=width,
                plan=drawing.plan,
                guidance_scale=guidance,
                true_cfg_scale=true_cfg,
                guidance_interval=interval,
                caching=caching,
                generator=[np.random.default_rng([seed, index]) for index in range(count)],
                callback_on_step_end=lambda *_: advance() or {},
            )
        where = pipe.where
    for warning in told:
        show.note(str(warning.message))
    name = plan or "4x"
    pixels = model.patches.size * (model.vae.upscale if model.vae else 1) if model.patches else 1
    embedded, scale = guidance_of(model, guidance, true_cfg, interval)
    facts = {
        "model": model.name,
        **({"classes": labels} if labels else {"prompts": prompts, "negative_prompt": negative_prompt}),
        "seed": seed,
        "plan": name,
        "schedule": result.plan,
        "height": drawing.size[0] * pixels,
        "width": drawing.size[1] * pixels,
        "embedded_guidance": embedded,
        "guidance": scale.scale,
        "guidance_interval": interval,
        "cache": cache,
        "where": where,
        "flops": spent,
        "steps": result.steps,
    }
    save(grid([result.images], least=1), output, show.text(facts))  # of the size that was asked for
    if json:
        show.as_json("generate", {"output": str(output), "seconds": result.seconds} | facts)
        return
    tokens = "/".join(map(str, result.plan.tokens(*drawing.size)))
    steps_taken = f"plan {name}, {result.plan.total} steps at {tokens} tokens"
    show.line(f"{output}: {count} picture{'' if count == 1 else 's'} in {result.seconds:.2f} s, {steps_taken}, seed {seed}, {where}")
    if spent:
        show.line(
            f"{spent['plan'] / 1e12:.4g} TFLOPs a picture and branch: {spent['same_steps'] / spent['plan']:.2f}x less than "
            f"{result.plan.total} steps at full resolution, {spent['usual'] / spent['plan']:.2f}x less than {USUAL}"
        )


def cost(bundle: Bundle, plan: Plan, size: tuple[int, int], skipped: frozenset[int]) -> dict[str, int] | None:
    """FLOPs of the plan, of as many steps at full resolution, and of the usual number; None for a family without a count."""
    model = bundle.manifest.model
    if model.family not in STEP:
        return None
    others = {"same_steps": plan.total, "usual": USUAL}
    return {"plan": picture_flops(model, plan, size, skipped)} | {
        name: picture_flops(model, Plan.full(steps), size) for name, steps in others.items()
    }
