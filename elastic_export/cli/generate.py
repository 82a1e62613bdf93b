"""`elastic-export generate`: pictures from a bundle."""

from pathlib import Path
from typing import Annotated, Any

import typer

from elastic_export.cli import options, show
from elastic_export.cli.drawing import Goal, Guided, Sampling, Subject, typed
from elastic_export.cli.records import Budgets, GuidanceBudgets, Saying, opened

NOTICEABLE = 0.5  # seconds


@opened
def generate(
    bundle: options.BundleFolder,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="The picture, .png; several pictures stand in a row.", show_default=False)
    ],
    subject: Subject,
    goal: Goal,
    budgets: Budgets,
    guidance_budgets: GuidanceBudgets,
    sampling: Sampling,
    guided: Guided,
    saying: Saying,
    request: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Draw what a JSON file says, as [bold]--json[/bold] prints it, and nothing else.", show_default=False
        ),
    ] = None,
    show_tokens: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A picture, .png, of what the router kept at some of the steps.", show_default=False)
    ] = None,
    backend: options.Backend = None,
    precision: options.Precisions = None,
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
      elastic-export generate flux -o fox.png --prompt "a red fox" --image cat.png --strength 0.5
      elastic-export generate klein -o hat.png --prompt "the cat with this hat" --image cat.png --image hat.png
      elastic-export generate digits -o again.png --request seven.json
    """
    import warnings

    import numpy as np

    from elastic_export.cli import requests
    from elastic_export.pictures import KeptTokens, grid, refuse_clobber, save
    from elastic_export.values import read_words
    from elastic_runtime.contract.bundle import Bundle
    from elastic_runtime.drawing.budgets import STEPS
    from elastic_runtime.errors import UsageError
    from elastic_runtime.pipeline import ElasticPipeline

    refuse_clobber(output, saying.overwrite)
    allowed = read_words(precision) or ()
    if show_tokens:
        refuse_clobber(show_tokens, saying.overwrite, "--show-tokens")
        if show_tokens.resolve() == output.resolve():
            raise UsageError(f"-o/--output and --show-tokens are both {output}: give two names")
    folder = Bundle.open(bundle)
    denoiser = folder.manifest.graphs.get("denoiser")  # without one drawing says what is lacking
    if show_tokens and denoiser and all(spec.name != "probability" for spec in denoiser.outputs):
        raise UsageError(f"{bundle} keeps every token, or does not tell which: --show-tokens is for models with a router")
    if request:
        asked = requests.read(request, typed(subject, goal, sampling, guided, budgets=budgets, weak=guidance_budgets))
    else:
        asked = requests.request(folder, subject, goal, sampling, guided, budgets, guidance_budgets)
    kept = KeptTokens(asked.num_inference_steps or STEPS) if show_tokens else None
    with ElasticPipeline.from_pretrained(folder, backend, allowed) as pipe, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", UserWarning)
        with show.bar(saying.quiet, "drawing", asked.num_inference_steps) as advance:

            def after_step(_: ElasticPipeline, index: int, time: float, arrays: dict[str, Any]) -> dict[str, Any]:
                advance()
                if kept:
                    kept.see(index, arrays)
                return {}

            result = pipe.draw(asked, callback_on_step_end=after_step)
        labels = np.repeat(() if asked.class_labels is None else np.atleast_1d(asked.class_labels), asked.num_images_per_prompt)
        sheet = kept.sheet(pipe, [str(label) for label in labels]) if kept else None
        measuring = pipe.gauge.spent
    for warning in warned:
        show.note(str(warning.message))
    facts = requests.facts(folder, asked, result)
    text = show.text(requests.metadata(facts))
    save(grid([result.images], least=1 if result.plan else 64), output, text)  # along a plan of the size that was asked for
    if sheet and show_tokens:
        save(sheet, show_tokens, text)
    if saying.json:
        show.as_json("generate", {"output": str(output)} | facts)
    else:
        for line in requests.lines(output, result, facts):
            show.line(line)
    if measuring > NOTICEABLE and not saying.quiet:
        show.note(f"measuring this machine took {measuring:.1f} s; that is kept for the next time")
    if goal.target_ms is not None and result.seconds > goal.target_ms / 1000:
        show.note(
            f"late by {1e3 * result.seconds - goal.target_ms:.0f} ms: the machine slowed down more than fewer steps could make up for"
        )
