"""`elastic-export generate`: pictures from a bundle."""

from pathlib import Path
from typing import Annotated

import typer

from elastic_export.cli import options, show

ROWS = 10  # of --show-tokens
NOTICEABLE = 0.5  # seconds


def generate(
    bundle: options.BundleFolder,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="The picture, .png; several pictures stand in a row.", show_default=False)
    ],
    classes: Annotated[
        str | None,
        typer.Option(
            help="Class labels: [bold]7[/bold], [bold]0,3,7[/bold] or [bold]0-9[/bold] [dim](default: 0)[/dim].", show_default=False
        ),
    ] = None,
    latents: options.LatentsEach = None,
    guidance_latents: options.WeakLatents = None,
    loops: options.LoopsEach = None,
    guidance_loops: options.WeakLoops = None,
    tokens: options.TokensEach = None,
    guidance_tokens: options.WeakTokens = None,
    drop: options.Drop = 0.0,
    guidance_drop: options.WeakDrop = None,
    show_tokens: options.ShowTokens = None,
    budget: options.AutoBudget = None,
    target_ms: options.TargetMs = None,
    max_memory: options.MaxMemory = None,
    quality: options.QualityFloor = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps [dim](default: 20)[/dim].", show_default=False)] = None,
    guidance: Annotated[
        float | None,
        typer.Option(help="Guidance scale; 1 is off [dim](default: 2; with prompts FLUX.1-dev 3.5, SD3 7)[/dim].", show_default=False),
    ] = None,
    interval: Annotated[str, typer.Option(metavar="LOW-HIGH", help="Times between which guidance acts; 1 is pure noise.")] = "0-1",
    autoguidance: Annotated[
        bool, typer.Option("--autoguidance", help="The weak branch keeps the label; needs a budget or drop of its own.")
    ] = False,
    sampler: Annotated[
        str | None,
        typer.Option(help="euler, heun, sde; ddpm, ddim; maskgit [dim](default: the first that fits the model)[/dim].", show_default=False),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="How freely a masked model keeps tokens [dim](default: 4.5)[/dim].", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same picture.")] = 0,
    backend: Annotated[
        str | None, typer.Option(help="Runtime to use [dim](default: the fastest of those here)[/dim].", show_default=False)
    ] = None,
    prompt: options.Prompt = None,
    negative_prompt: options.NegativePrompt = None,
    height: options.Height = None,
    width: options.Width = None,
    plan: options.PlanName = None,
    true_cfg: options.TrueCfg = None,
    cache: options.Cache = None,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Draw pictures with a bundle; no torch is needed. Where no budget is given, it is chosen to suit this machine.

    [bold]Examples[/bold]

      elastic-export generate digits -o seven.png --classes 7 --latents 64
      elastic-export generate digits -o row.png --classes 0-9 --latents 128 --guidance-latents 16
      elastic-export generate digits -o fast.png --steps 4 --latents 16,16,64,256
      elastic-export generate digits -o soon.png --target-ms 300
      elastic-export generate looped -o eight.png --classes 8 --loops 4 --guidance-loops 1 --sampler ddim
      elastic-export generate routed -o three.png --classes 3 --guidance-drop 0.9 --show-tokens kept.png
      elastic-export generate flux -o cat.png --prompt "a red cat" --plan 4x --height 1024 --width 768
    """
    import numpy as np

    from elastic_export.cli.drawing import along_a_plan, refuse
    from elastic_export.pictures import grid, highlighted, refuse_clobber, save
    from elastic_runtime.contract.budget import Budget
    from elastic_runtime.contract.bundle import Bundle
    from elastic_runtime.errors import UsageError
    from elastic_runtime.pipeline import ElasticPipeline
    from elastic_runtime.sampling.fitting import sampler as fitting

    refuse_clobber(output, overwrite)
    if show_tokens:
        refuse_clobber(show_tokens, overwrite, "--show-tokens")
        if show_tokens.resolve() == output.resolve():
            raise UsageError(f"-o/--output and --show-tokens are both {output}: give two names")
    low, high = options.interval(interval)
    opened = Bundle.open(bundle)
    planned: dict[str, object] = {"plan": plan, "prompt": prompt, "negative-prompt": negative_prompt, "height": height, "width": width}
    planned |= {"true-cfg": true_cfg, "cache": cache}
    if opened.manifest.model.patches:
        budgeted: dict[str, object] = {
            "latents": latents,
            "guidance-latents": guidance_latents,
            "loops": loops,
            "guidance-loops": guidance_loops,
            "tokens": tokens,
            "guidance-tokens": guidance_tokens,
            "drop": drop or None,
            "guidance-drop": guidance_drop,
            "show-tokens": show_tokens,
            "budget": budget,
            "target-ms": target_ms,
            "max-memory": max_memory,
            "quality": quality,
            "autoguidance": autoguidance or None,
            "sampler": sampler,
            "temperature": temperature,
        }
        refuse(opened, budgeted, "along a plan")
        along_a_plan(
            opened, output, classes=classes, prompts=prompt, negative_prompt=negative_prompt, height=height, width=width, plan=plan,
            steps=steps, guidance=guidance, true_cfg=true_cfg, interval=(low, high), cache=cache, seed=seed, backend=backend,
            json=json, quiet=quiet,
        )  # fmt: skip
        return
    refuse(opened, planned, "at budgets")
    steps, guidance = 20 if steps is None else steps, 2.0 if guidance is None else guidance
    labels = options.integers(classes or "0")
    chosen = options.budgets({"latents": latents, "loops": loops, "tokens": tokens})
    weak_values = {"latents": guidance_latents, "loops": guidance_loops, "tokens": guidance_tokens}
    weak = Budget(**{axis: value for axis, value in weak_values.items() if value is not None}) or None
    policy = options.policy(chosen, weak, budget, target_ms, max_memory, quality)
    with ElasticPipeline.from_pretrained(opened, backend) as pipe, show.bar(quiet, f"drawing {len(labels)}", steps) as advance:
        if show_tokens and all(spec.name != "probability" for spec in pipe.bundle.manifest.graphs["denoiser"].outputs):
            raise UsageError(f"{bundle} keeps every token, or does not tell which: --show-tokens is for models with a router")
        shown = np.linspace(0, steps - 1, min(steps, ROWS)).round().tolist() if show_tokens else []
        seen: dict[int, dict[str, np.ndarray]] = {}

        def after_step(_: ElasticPipeline, index: int, time: float, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            advance()
            if index in shown:
                seen[index] = tensors
            return {}

        result = pipe(
            labels,
            num_inference_steps=steps,
            guidance_scale=guidance,
            guidance_interval=(low, high),
            autoguidance=autoguidance,
            policy=policy,
            sampler=sampler,
            temperature=temperature,
            generator=np.random.default_rng(seed),
            drop_fraction=drop,
            guidance_drop_fraction=guidance_drop,
            callback_on_step_end=after_step,
        )
        rows = [
            [highlighted(*pair) for pair in zip(pipe.images(tensors.get("denoised", tensors["latents"])), tensors["mask"], strict=True)]
            for tensors in seen.values()
        ]
        drawn, where, measuring = pipe.bundle.manifest.model, pipe.where, pipe.gauge.spent
    seconds = sum(step.seconds for step in result.steps)
    facts = {
        "model": drawn.name,
        "classes": labels,
        "seed": seed,
        "sampler": fitting(drawn, sampler)[0],
        "guidance": guidance,
        "drop_fractions": [drop, drop if guidance_drop is None else guidance_drop],
        "where": where,
        "policy": repr(policy),
        "total_seconds": result.seconds,
        "steps": result.steps,
    }
    save(grid([result.images]), output, show.text(facts))
    if show_tokens:
        names = [f"step {index + 1}: {tensors['mask'].mean():.0%}" for index, tensors in seen.items()]
        save(grid(rows, names, [str(label) for label in labels], least=128), show_tokens, show.text(facts))
    if json:
        show.as_json("generate", {"output": str(output), "seconds": seconds} | facts)
    else:
        budgets = ", ".join(dict.fromkeys(str(step.budget) for step in result.steps))
        counts = [count for step in result.steps for count in step.kept or ()]
        kept = f", kept {min(counts)} to {max(counts)} tokens" if counts else ""
        taken = len(result.steps)
        show.line(f"{output}: {len(labels)} pictures in {seconds:.2f} s, {taken} steps at {budgets}{kept}, seed {seed}, {where}")
        show.line(f"chosen: {result.steps[0].reason}")
    if measuring > NOTICEABLE and not quiet:
        show.note(f"measuring this machine took {measuring:.1f} s; that is kept for the next time")
    if target_ms is not None and result.seconds > target_ms / 1000:
        show.note(f"late by {1e3 * result.seconds - target_ms:.0f} ms: the machine slowed down more than fewer steps could make up for")
