"""Options that several commands share, with their parsers."""

import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from elastic_runtime.contract.axis import Span
from elastic_runtime.contract.budget import Budget
from elastic_runtime.errors import BudgetError
from elastic_runtime.ralu import Plan, fit_plan


def span(text: str | Span) -> Span:
    if isinstance(text, Span):
        return text
    try:
        return Span.parse(text)
    except BudgetError as error:
        raise typer.BadParameter(str(error)) from None


MOST = 10_000  # numbers that one range may stand for: a slip of the finger should not fill the memory


def integers(text: str) -> list[int]:
    """Read `7`, `0,3,7` or `0-9`, and mixtures."""
    if not re.fullmatch(r"\s*\d+(-\d+)?(\s*,\s*\d+(-\d+)?)*\s*", text):
        raise typer.BadParameter(f"numbers are written 7 or 0,3,7 or 0-9, got {text!r}")
    values: list[int] = []
    for part in text.split(","):
        low, _, high = part.partition("-")
        if high and int(high) < int(low):
            raise typer.BadParameter(f"{part.strip()} is reversed: write {high.strip()}-{low.strip()}")
        if int(high or low) - int(low) >= MOST:
            raise typer.BadParameter(f"{part.strip()} is more than {MOST} numbers: give fewer")
        values += range(int(low), int(high or low) + 1)
    return values


def budgets(texts: Mapping[str, str | None]) -> list[Budget]:
    """One budget, or one for each step, from what was typed for each axis: `64`, or `16,16,64,256` for four steps."""
    lists = {axis: integers(text) for axis, text in texts.items() if text}
    steps = max(map(len, lists.values()), default=1)
    for axis, values in lists.items():
        if len(values) not in (1, steps):
            raise typer.BadParameter(f"--{axis} has {len(values)} values where another axis has {steps}: give one, or one for each step")
    columns = {axis: values * steps if len(values) == 1 else values for axis, values in lists.items()}
    return [Budget(**{axis: values[step] for axis, values in columns.items()}) for step in range(steps)]


def memory(text: str | float) -> float:
    """Read `2GB`, `1.5 GiB`, `800MB` or bytes."""
    if isinstance(text, float):
        return text
    units = {"": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]?I?B?)\s*", text.upper())
    if not match or match[2] not in units:
        raise typer.BadParameter(f"memory is written 2GB, 1.5GiB or 800MB, got {text!r}")
    return float(match[1]) * units[match[2]]


def policy(
    chosen: list[Budget],
    weak: Budget | None,
    budget: str | None = None,
    target_ms: float | None = None,
    max_memory: float | None = None,
    quality: float | None = None,
) -> Any:
    """What chooses budgets: the ones that were named, or the one goal that was given; with neither, what suits this machine."""
    from elastic_runtime.choosing.deadline import Deadline
    from elastic_runtime.choosing.goals import Auto, FitMemory, Quality
    from elastic_runtime.choosing.policy import Fixed, PerStep

    goals = {"--budget": budget, "--target-ms": target_ms, "--max-memory": max_memory, "--quality": quality}
    given = [name for name, value in goals.items() if value is not None]
    named = len(chosen) > 1 or bool(chosen[0])
    ways = [*given, *(["a budget of an axis"] if named else [])]
    if given and len(ways) > 1:
        raise typer.BadParameter(f"{' and '.join(ways)} choose budgets twice: give one of them")
    if budget not in (None, "auto"):
        raise typer.BadParameter(f"--budget takes auto, got {budget!r}; a budget itself is given by its axis, such as --latents 64")
    if target_ms is not None:
        return Deadline(target_ms / 1000, weak)
    if max_memory is not None:
        return FitMemory(max_memory, weak)
    if quality is not None:
        return Quality(quality, weak)
    if not named:
        return Auto(guidance_budget=weak)
    return Fixed(chosen[0], weak) if len(chosen) == 1 else PerStep(tuple(chosen), weak)


def interval(text: str) -> tuple[float, float]:
    """Read `0.3-0.8`."""
    match = re.fullmatch(r"\s*(\d*\.?\d+)\s*-\s*(\d*\.?\d+)\s*", text)
    if not match:
        raise typer.BadParameter(f"an interval is written 0.3-0.8, got {text!r}")
    return float(match[1]), float(match[2])


def plan(text: str) -> Plan | str:
    """Read `4x`, `7x` or `full`, or `3,4,5/0.25,0.4,1/0.3`: steps, end times and the share that grows, with a fitted schedule."""
    if "/" not in text:
        return text
    match = re.fullmatch(r"(\d+),(\d+),(\d+)/([\d.]+),([\d.]+),([\d.]+)/([\d.]+)", text.replace(" ", ""))
    try:
        first, second, third, low, mixed, end, ratio = match.groups() if match else ()
        steps, end_times = (int(first), int(second), int(third)), (float(low), float(mixed), float(end))
        share = float(ratio)
    except ValueError:
        raise typer.BadParameter(
            f"a plan is 4x, 7x, full, or steps/end times/share, for three stages, as in 3,4,5/0.25,0.4,1/0.3; got {text!r}"
        ) from None
    return fit_plan(steps, end_times, share)


def command_line() -> str:
    """The command as typed, for the manifest: the program's name without its folder."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def precision(words: str, show_default: bool = True) -> Any:
    """The option `--precision`; `--dtype` is its old name."""
    return typer.Option("--precision", "--dtype", help=words, show_default=show_default)


BundleFolder = Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle's folder.", show_default=False)]
Output = Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Where the bundle goes.", show_default=False)]
LatentsEach = Annotated[
    str | None,
    typer.Option(
        "--latents",
        metavar="N[,N...]",
        help="Kept latents; one for each step makes a schedule [dim](default: what suits this machine)[/dim].",
        show_default=False,
    ),
]
LoopsEach = Annotated[
    str | None,
    typer.Option(
        "--loops",
        metavar="N[,N...]",
        help="Loops, one for all or for each step [dim](default: what suits this machine)[/dim].",
        show_default=False,
    ),
]
TokensEach = Annotated[
    str | None,
    typer.Option(
        "--tokens",
        metavar="N[,N...]",
        help="Most tokens that a router may keep, one cap for all or for each step [dim](default: what the picture needs)[/dim].",
        show_default=False,
    ),
]
WeakLatents = Annotated[
    int | None,
    typer.Option(
        "--guidance-latents",
        metavar="N",
        help="Kept latents of the weak branch: CCFG [dim](default: as --latents)[/dim].",
        show_default=False,
    ),
]
WeakLoops = Annotated[
    int | None,
    typer.Option("--guidance-loops", metavar="N", help="Loops of the weak branch [dim](default: as --loops)[/dim].", show_default=False),
]
WeakTokens = Annotated[
    int | None,
    typer.Option("--guidance-tokens", metavar="N", help="Cap of the weak branch [dim](default: as --tokens)[/dim].", show_default=False),
]
Drop = Annotated[float, typer.Option("--drop", metavar="SHARE", help="Share of a router's kept tokens to drop, 0 to below 1.")]
WeakDrop = Annotated[
    float | None,
    typer.Option(
        "--guidance-drop", metavar="SHARE", help="The same for the weak branch [dim](default: as --drop)[/dim].", show_default=False
    ),
]
ShowTokens = Annotated[
    Path | None, typer.Option(metavar="FILE", help="A picture, .png, of what the router kept at some of the steps.", show_default=False)
]
PLAN_PANEL = "Drawing along a plan (FLUX, SD3)"
PlanName = Annotated[
    str | None,
    typer.Option(
        "--plan",
        metavar="PLAN",
        help="[bold]4x[/bold], [bold]7x[/bold], [bold]full[/bold], or steps/end times/share [dim](default: 4x)[/dim].",
        rich_help_panel=PLAN_PANEL,
        show_default=False,
    ),
]
Prompt = Annotated[
    list[str] | None,
    typer.Option(
        "--prompt", metavar="TEXT", help="What to draw; again for another picture.", rich_help_panel=PLAN_PANEL, show_default=False
    ),
]
NegativePrompt = Annotated[
    str | None,
    typer.Option(metavar="TEXT", help="What guidance leads away from.", rich_help_panel=PLAN_PANEL, show_default=False),
]
Height = Annotated[int | None, typer.Option(help="Height in pixels.", rich_help_panel=PLAN_PANEL, show_default=False)]
Width = Annotated[int | None, typer.Option(help="Width in pixels.", rich_help_panel=PLAN_PANEL, show_default=False)]
TrueCfg = Annotated[
    float | None,
    typer.Option(
        "--true-cfg", help="Classifier-free guidance where --guidance is distilled.", rich_help_panel=PLAN_PANEL, show_default=False
    ),
]
Cache = Annotated[
    int | None,
    typer.Option(
        "--cache",
        metavar="N",
        help="Run the network on every N-th step only, and extrapolate between [dim](default: on all)[/dim].",
        rich_help_panel=PLAN_PANEL,
        show_default=False,
    ),
]
AutoBudget = Annotated[
    str | None,
    typer.Option(
        "--budget", metavar="auto", help="What suits this machine [dim](the default where nothing else is given)[/dim].", show_default=False
    ),
]
TargetMs = Annotated[
    float | None, typer.Option("--target-ms", metavar="MS", help="Be done in this time, at the best budgets that are.", show_default=False)
]
MaxMemory = Annotated[
    float | None,
    typer.Option(
        "--max-memory", parser=memory, metavar="SIZE", help="The best budget within this memory, [bold]2GB[/bold].", show_default=False
    ),
]
QualityFloor = Annotated[
    float | None,
    typer.Option("--quality", metavar="SHARE", help="The cheapest budget that keeps this share of the best accuracy.", show_default=False),
]
Batch = Annotated[Span, typer.Option(parser=span, metavar="SPAN", help="Batch sizes of one run; guidance counts twice.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what the output holds.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and stop.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show the libraries' own messages.")]
