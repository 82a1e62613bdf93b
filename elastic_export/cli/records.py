"""Options as records: frozen dataclasses of annotated fields, and tables of an option a row, which `opened` makes options of."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer

from elastic_export.cli import options
from elastic_export.cli.options import span
from elastic_runtime.contract.axis import Span


@dataclass(frozen=True)
class Table:
    """An option a row, axis -> annotated type; a command gets a dict of those that were given, by axis.

    `prefix` stands before the parameters' names, so that a command can have two tables over the same axes.
    """

    rows: Mapping[str, Any]
    prefix: str = ""

    def parameters(self) -> list[inspect.Parameter]:
        return [_parameter(f"{self.prefix}{axis}", annotation, None) for axis, annotation in self.rows.items()]

    def closed(self, **values: Any) -> dict[str, Any]:
        return {axis: value for axis in self.rows if (value := values[f"{self.prefix}{axis}"]) is not None}


def opened(command: Callable[..., None]) -> Callable[..., None]:
    """`command` with each parameter that is a record or a table replaced by options of its own, one a field or row.

    It is still called with the records themselves: they are put together from what was typed.
    """
    parameters: list[inspect.Parameter] = []
    groups: dict[str, tuple[Callable[..., Any], list[str]]] = {}
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        kind = parameter.annotation
        table = next((each for each in get_args(kind) if isinstance(each, Table)), None)
        if not table and not dataclasses.is_dataclass(kind):
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        fields = table.parameters() if table else _fields(kind)
        groups[parameter.name] = table.closed if table else kind, [field.name for field in fields]
        parameters += fields

    @functools.wraps(command)
    def call(**values: Any) -> None:
        records = {name: close(**{field: values.pop(field) for field in fields}) for name, (close, fields) in groups.items()}
        command(**values, **records)

    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return call


def _fields(record: Any) -> list[inspect.Parameter]:
    hints = get_type_hints(record, include_extras=True)
    empty = inspect.Parameter.empty
    return [
        _parameter(field.name, hints[field.name], empty if field.default is dataclasses.MISSING else field.default)
        for field in dataclasses.fields(record)
    ]


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


@dataclass(frozen=True)
class AxisWords:
    """What is said of an axis: to what an export narrows it, what drawing takes, and the weak branch of guidance."""

    export: str
    draw: str
    weak: str


# Every axis by name; its options are --NAME and, for the weak branch of guidance, --guidance-NAME.
AXES = {
    "latents": AxisWords(
        "Kept latents, [bold]32-256[/bold] [dim](default: all)[/dim].",
        "Kept latents; one for each step makes a schedule [dim](default: what suits this machine)[/dim].",
        "Kept latents of the weak branch: CCFG [dim](default: as --latents)[/dim].",
    ),
    "tokens": AxisWords(
        "Caps on kept tokens, or a picture's tokens, [bold]16-256[/bold] [dim](default: all)[/dim].",
        "Most tokens that a router may keep, one cap for all or for each step [dim](default: what the picture needs)[/dim].",
        "Cap of the weak branch [dim](default: as --tokens)[/dim].",
    ),
    "loops": AxisWords(
        "Loops of the shared blocks, [bold]1-8[/bold] [dim](default: all)[/dim].",
        "Loops, one for all or for each step [dim](default: what suits this machine)[/dim].",
        "Loops of the weak branch [dim](default: as --loops)[/dim].",
    ),
}


def _row(kind: Any, name: str, metavar: str, words: str, parser: Callable[[str], Any] | None = None) -> Any:
    return Annotated[kind | None, typer.Option(name, parser=parser, metavar=metavar, help=words, show_default=False)]


# axis -> what an export narrows it to
Spans = Annotated[dict[str, Span], Table({axis: _row(Span, f"--{axis}", "SPAN", words.export, span) for axis, words in AXES.items()})]
# axis -> the text of a budget, or of one for each step
Budgets = Annotated[dict[str, str], Table({axis: _row(str, f"--{axis}", "N[,N...]", words.draw) for axis, words in AXES.items()})]
# axis -> the budget of guidance's weak branch
GuidanceBudgets = Annotated[
    dict[str, int],
    Table({axis: _row(int, f"--guidance-{axis}", "N", words.weak) for axis, words in AXES.items()}, prefix="guidance_"),
]

MODEL_HELP = (
    "A packaged sample, a family, a preset (see [bold]elastic-export models[/bold]), or a diffusers folder of FLUX, FLUX.2, SD3 or "
    "Qwen-Image, Z-Image or Krea 2, here or on the hub ([bold]org/name[/bold])."
)
BUNDLE_HELP = "A bundle's folder, which needs no torch; or a model to export first, as for [bold]elastic-export onnx[/bold]."


@dataclass(frozen=True)
class Source:
    """Which model, and where its weights and sizes come from."""

    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP, show_default=True)] = "elit-mnist"
    checkpoint: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Weights, .pt or .safetensors (pickles are never run).", show_default=False)
    ] = None
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Sizes that the checkpoint does not tell, as JSON.", show_default=False)
    ] = None
    vae: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A diffusers AutoencoderKL folder: adds the decoder.", show_default=False)
    ] = None
    components: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="Of a diffusers folder: transformer, vae, text, and encoder, to draw from pictures [dim](default: all but that)[/dim].",
            show_default=False,
        ),
    ] = None
    size: Annotated[
        str | None,
        typer.Option(
            parser=options.size,
            metavar="SPAN|HxW",
            help="Of a diffusers folder: sides of pictures in pixels, [bold]512-1024[/bold] [dim](default: half to all of its own)[/dim]; "
            "with ELIT put in one size, [bold]1024x768[/bold].",
            show_default=False,
        ),
    ] = None
    max_sequence_length: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Of a diffusers folder: tokens of a prompt [dim](default: what its pipeline takes, 256 or 512)[/dim].",
            show_default=False,
        ),
    ] = None
    head_blocks: Annotated[
        int | None,
        typer.Option(metavar="N", min=0, help="Blocks before the core, where the checkpoint's word is wrong.", show_default=False),
    ] = None
    adapters: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter",
            metavar="FILE[:SCALE]",
            help="Of a diffusers folder: a LoRA to fuse into its weights, [bold]style.safetensors:0.8[/bold]; may be repeated.",
            show_default=False,
        ),
    ] = None
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="Export without weights, to measure speed; the manifest says so.")
    ] = False

    def weights(self) -> dict[str, Any]:
        """Everything but the name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "model"}


@dataclass(frozen=True)
class BundleOrSource(Source):
    """A bundle, or a model that is exported first."""

    model: Annotated[str, typer.Argument(metavar="[BUNDLE|MODEL]", help=BUNDLE_HELP)] = "elit-mnist"


@dataclass(frozen=True)
class Saying:
    """What a command may replace, and what it says."""

    overwrite: options.Overwrite = False
    json: options.Json = False
    quiet: options.Quiet = False


@dataclass(frozen=True)
class How(Saying):
    """How an export goes about it, besides."""

    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and stop.")] = False
    verify: Annotated[
        str, typer.Option(help="What is proven against the original: budgets (the ends and between), ends, or none; the manifest says it.")
    ] = "budgets"
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show the libraries' own messages.")] = False
