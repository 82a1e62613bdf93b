"""`elastic-export generate`: pictures from a bundle."""

from pathlib import Path
from typing import Annotated

import typer

from elastic_export.cli import options, show

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
    request: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Draw what a JSON file says, as [bold]--json[/bold] prints it; then no other wish is taken.",
            show_default=False,
        ),
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
    """Draw pictures with a bundle; no torch is needed. Where no budget or plan is given, it is chosen to suit this machine.

    [bold]Examples[/bold]

      elastic-export generate digits -o seven.png --classes 7 --latents 64
      elastic-export generate digits -o row.png --classes 0-9 --latents 128 --guidance-latents 16
      elastic-export generate digits -o fast.png --steps 4 --latents 16,16,64,256
      elastic-export generate digits -o soon.png --target-ms 300
      elastic-export generate looped -o eight.png --classes 8 --loops 4 --guidance-loops 1 --sampler ddim
      elastic-export generate routed -o three.png --classes 3 --guidance-drop 0.9 --show-tokens kept.png
      elastic-export generate flux -o cat.png --prompt "a red cat" --plan 4x --height 1024 --width 768
      elastic-export generate digits -o again.png --request seven.json
    """
    import warnings

    from elastic_export.cli import drawing
    from elastic_export.pictures import KeptTokens, grid, refuse_clobber, save
    from elastic_runtime.contract.bundle import Bundle
    from elastic_runtime.errors import UsageError
    from elastic_runtime.pipeline import ElasticPipeline

    refuse_clobber(output, overwrite)
    if show_tokens:
        refuse_clobber(show_tokens, overwrite, "--show-tokens")
        if show_tokens.resolve() == output.resolve():
            raise UsageError(f"-o/--output and --show-tokens are both {output}: give two names")
    opened = Bundle.open(bundle)
    if show_tokens and all(spec.name != "probability" for spec in opened.manifest.graphs["denoiser"].outputs):
        raise UsageError(f"{bundle} keeps every token, or does not tell which: --show-tokens is for models with a router")
    given = drawing.DrawingOptions(
        classes=classes, prompt=prompt, negative_prompt=negative_prompt,
        budgets={"latents": latents, "loops": loops, "tokens": tokens},
        weak={"latents": guidance_latents, "loops": guidance_loops, "tokens": guidance_tokens},
        drop=drop, guidance_drop=guidance_drop, budget=budget, target_ms=target_ms, max_memory=max_memory, quality=quality, steps=steps,
        guidance=guidance, true_cfg=true_cfg, interval=interval, autoguidance=autoguidance, sampler=sampler, temperature=temperature,
        seed=seed, height=height, width=width, plan=plan, cache=cache,
    )  # fmt: skip
    asked = drawing.read(request, given) if request else drawing.request(opened, given)
    kept = KeptTokens(asked.num_inference_steps) if show_tokens else None
    with ElasticPipeline.from_pretrained(opened, backend) as pipe, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", UserWarning)
        with show.bar(quiet, "drawing", asked.num_inference_steps) as advance:

            def after_step(_: ElasticPipeline, index: int, time: float, arrays: drawing.Arrays) -> drawing.Arrays:
                advance()
                if kept:
                    kept.see(index, arrays)
                return {}

            result = pipe.draw(asked, callback_on_step_end=after_step)
        sheet = kept.sheet(pipe, [str(label) for label in asked.class_labels or ()]) if kept else None  # type: ignore[union-attr]
        measuring = pipe.gauge.spent
    for warning in warned:
        show.note(str(warning.message))
    facts = drawing.facts(opened, asked, result)
    save(grid([result.images], least=1 if result.plan else 64), output, show.text(facts))  # along a plan of the size that was asked for
    if sheet and show_tokens:
        save(sheet, show_tokens, show.text(facts))
    if json:
        show.as_json("generate", {"output": str(output)} | facts)
    else:
        for line in drawing.lines(output, result, facts):
            show.line(line)
    if measuring > NOTICEABLE and not quiet:
        show.note(f"measuring this machine took {measuring:.1f} s; that is kept for the next time")
    if target_ms is not None and result.seconds > target_ms / 1000:
        show.note(f"late by {1e3 * result.seconds - target_ms:.0f} ms: the machine slowed down more than fewer steps could make up for")
