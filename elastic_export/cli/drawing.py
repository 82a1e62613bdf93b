"""The options of `elastic-export generate`, as records: what to draw, what chooses, the steps, and guidance."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from elastic_export.cli import options

PLANS = "Drawing along a plan (FLUX, SD3)"


def _option(name: str, words: str, **more: Any) -> Any:
    """An option that need not be given."""
    return typer.Option(name, help=words, show_default=False, **more)


def _planned(name: str, words: str, **more: Any) -> Any:
    """The same for models that are drawn along plans."""
    return _option(name, words, rich_help_panel=PLANS, **more)


@dataclass(frozen=True)
class Subject:
    """What to draw."""

    classes: Annotated[
        str | None, _option("--classes", "Labels: [bold]7[/bold], [bold]0,3,7[/bold] or [bold]0-9[/bold] [dim](default: 0)[/dim].")
    ] = None
    prompt: Annotated[list[str] | None, _planned("--prompt", "What to draw; again for another picture.", metavar="TEXT")] = None
    negative_prompt: Annotated[str | None, _planned("--negative-prompt", "What guidance leads away from.", metavar="TEXT")] = None
    height: Annotated[int | None, _planned("--height", "Height in pixels.")] = None
    width: Annotated[int | None, _planned("--width", "Width in pixels.")] = None
    image: Annotated[
        list[Path] | None,
        _planned(
            "--image",
            "A picture that is drawn over, or of FLUX.2 edited after unless there is a strength or a mask; again for another "
            "[dim](needs the encoder)[/dim].",
            metavar="FILE",
        ),
    ] = None
    strength: Annotated[
        float | None, _planned("--strength", "How much of it is drawn anew, above 0 to 1 [dim](default: 0.6)[/dim].", metavar="SHARE")
    ] = None
    mask: Annotated[
        Path | None, _planned("--mask", "A picture of its size, white where it is drawn anew [dim](default: all)[/dim].", metavar="FILE")
    ] = None
    seed: Annotated[int, typer.Option(min=0, help="Of the first picture; the next ones have the seeds after it.")] = 0


@dataclass(frozen=True)
class Goal:
    """What chooses budgets or a plan."""

    budget: Annotated[
        str | None,
        _option("--budget", "What suits this machine [dim](the default where nothing else is given)[/dim].", metavar="auto"),
    ] = None
    target_ms: Annotated[float | None, _option("--target-ms", "Be done in this time, with the best that is.", metavar="MS")] = None
    max_memory: Annotated[
        float | None, _option("--max-memory", "The best within this memory, [bold]2GB[/bold].", parser=options.memory, metavar="SIZE")
    ] = None
    quality: Annotated[float | None, _option("--quality", "The cheapest that keeps this share of the best accuracy.", metavar="SHARE")] = (
        None
    )


@dataclass(frozen=True)
class Sampling:
    """Steps, and how they go."""

    steps: Annotated[int | None, _option("--steps", "Denoising steps [dim](default: 20)[/dim].", min=1)] = None
    sampler: Annotated[
        str | None,
        _option("--sampler", "euler, heun, sde; ddpm, ddim, dpm++2m; ab2, ab3; maskgit [dim](default: the first that fits)[/dim]."),
    ] = None
    temperature: Annotated[float | None, _option("--temperature", "How freely a masked model keeps tokens [dim](default: 4.5)[/dim].")] = (
        None
    )
    plan: Annotated[
        str | None,
        _planned(
            "--plan",
            "[bold]4x[/bold], [bold]7x[/bold], [bold]full[/bold], [bold]speed[/bold], [bold]mrflow[/bold], or "
            "steps/end times/share [dim](default: what suits)[/dim].",
            metavar="PLAN",
        ),
    ] = None
    cache: Annotated[
        int | None,
        _planned("--cache", "Run the network on every N-th step, and extrapolate between [dim](default: on all)[/dim].", metavar="N"),
    ] = None


@dataclass(frozen=True)
class Guided:
    """Guidance, and what routers drop in each branch."""

    guidance: Annotated[
        float | None,
        _option("--guidance", "Guidance scale; 1 is off [dim](default: 2; with prompts FLUX.1-dev 3.5, SD3 7)[/dim]."),
    ] = None
    true_cfg: Annotated[float | None, _planned("--true-cfg", "Classifier-free guidance where --guidance is distilled.")] = None
    interval: Annotated[str, typer.Option(metavar="LOW-HIGH", help="Times between which guidance acts; 1 is pure noise.")] = "0-1"
    autoguidance: Annotated[
        bool, typer.Option("--autoguidance", help="The weak branch keeps the label; needs a budget or drop of its own.")
    ] = False
    drop: Annotated[float, typer.Option(metavar="SHARE", help="Share of a router's kept tokens to drop, 0 to below 1.")] = 0.0
    guidance_drop: Annotated[
        float | None, _option("--guidance-drop", "The same for the weak branch [dim](default: as --drop)[/dim].", metavar="SHARE")
    ] = None


def typed(*records: Any, budgets: Mapping[str, Any] | None = None, weak: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What was typed, by option: the fields that are not as they are by default."""
    named = {f"--{axis}": value for axis, value in (budgets or {}).items()}
    named |= {f"--guidance-{axis}": value for axis, value in (weak or {}).items()}
    for record in records:
        for field in fields(record):
            if (value := getattr(record, field.name)) != field.default:
                named[f"--{field.name.replace('_', '-')}"] = value
    return named
