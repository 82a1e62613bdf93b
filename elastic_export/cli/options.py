"""Options that several commands share, with their parsers."""

import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from elastic_export.sides import read_size
from elastic_export.values import placeless
from elastic_runtime.contract.axis import Span, whole
from elastic_runtime.contract.budget import Budget
from elastic_runtime.errors import BudgetError


def span(text: str | Span) -> Span:
    if isinstance(text, Span):
        return text
    try:
        return Span.parse(text)
    except BudgetError as error:
        raise typer.BadParameter(str(error)) from None


def size(text: str) -> str:
    """The text of a size that can be read."""
    try:
        read_size(text)
    except BudgetError as error:
        raise typer.BadParameter(str(error)) from None
    return text


MOST = 10_000  # numbers that one range may stand for: a slip of the finger should not fill the memory


def integers(text: str) -> list[int]:
    """Read `7`, `0,3,7` or `0-9`, and mixtures."""
    if not re.fullmatch(r"\s*\d+(-\d+)?(\s*,\s*\d+(-\d+)?)*\s*", text):
        raise typer.BadParameter(f"numbers are written 7 or 0,3,7 or 0-9, got {text!r}")
    values: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        try:
            low, high = whole(first), whole(last or first)
        except BudgetError as error:
            raise typer.BadParameter(str(error)) from None
        if high < low:
            raise typer.BadParameter(f"{part.strip()} is reversed: write {high}-{low}")
        if high - low >= MOST:
            raise typer.BadParameter(f"{part.strip()} is more than {MOST} numbers: give fewer")
        values += range(low, high + 1)
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


def numbers(text: str) -> list[float]:
    """Read `0.5,1,2`."""
    if not re.fullmatch(r"\s*\d*\.?\d+(\s*,\s*\d*\.?\d+)*\s*", text):
        raise typer.BadParameter(f"numbers are written 0.5,1,2, got {text!r}")
    return [float(part) for part in text.split(",")]


def memory(text: str | float) -> float:
    """Read `2GB`, `1.5 GiB`, `800MB` or bytes."""
    if isinstance(text, float):
        return text
    units = {"": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]?I?B?)\s*", text.upper())
    if not match or match[2] not in units:
        raise typer.BadParameter(f"memory is written 2GB, 1.5GiB or 800MB, got {text!r}")
    return float(match[1]) * units[match[2]]


def interval(text: str) -> tuple[float, float]:
    """Read `0.3-0.8`."""
    match = re.fullmatch(r"\s*(\d*\.?\d+)\s*-\s*(\d*\.?\d+)\s*", text)
    if not match:
        raise typer.BadParameter(f"an interval is written 0.3-0.8, got {text!r}")
    return float(match[1]), float(match[2])


def outline(text: str) -> tuple[tuple[int, int, int], tuple[float, float, float], float] | None:
    """Read a plan of one's own, `3,4,5/0.25,0.4,1/0.3`: steps, end times and the share that grows; None for a plan's name."""
    if "/" not in text:
        return None
    match = re.fullmatch(r"(\d+),(\d+),(\d+)/([\d.]+),([\d.]+),([\d.]+)/([\d.]+)", text.replace(" ", ""))
    try:
        first, second, third, low, mixed, end, share = match.groups() if match else ()
        return (int(first), int(second), int(third)), (float(low), float(mixed), float(end)), float(share)
    except ValueError:
        raise typer.BadParameter(
            f"a plan is 4x, 7x, full, speed, mrflow, or steps/end times/share, for three stages, as in 3,4,5/0.25,0.4,1/0.3; got {text!r}"
        ) from None


def command_line() -> str:
    """The command as typed, for manifests and reports: the program's name without its folder, and absolute paths likewise."""
    return shlex.join([Path(sys.argv[0]).name, *map(placeless, sys.argv[1:])])


def precision(words: str, show_default: bool = True) -> Any:
    """The option `--precision`; `--dtype` is its old name."""
    return typer.Option("--precision", "--dtype", help=words, show_default=show_default)


BundleFolder = Annotated[
    Path, typer.Argument(metavar="BUNDLE", help="A bundle's folder, or its name on the hub ([bold]org/name[/bold]).", show_default=False)
]
Output = Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Where the bundle goes.", show_default=False)]
Batch = Annotated[Span, typer.Option(parser=span, metavar="SPAN", help="Batch sizes of one run; guidance counts twice.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what the output holds.")]
Backend = Annotated[str | None, typer.Option(help="Runtime to use [dim](default: the fastest of those here)[/dim].", show_default=False)]
Precisions = Annotated[
    str | None,
    typer.Option(
        metavar="LIST",
        help="Artifacts that may draw, [bold]fp32,int8[/bold]: the fastest of them; [bold]auto[/bold]: of those whose pictures the "
        "card found as good [dim](default: the most exact)[/dim].",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]
