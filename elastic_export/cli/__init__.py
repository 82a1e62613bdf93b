"""The command line. `app` below is its table of contents; each command is one thin file, loaded when it is called."""

import contextlib
import os
import signal
import sys
from typing import NoReturn

import typer

from elastic_export.cli import (
    bench,
    coreml,
    demo,
    devices,
    doctor,
    generate,
    inspect,
    models,
    onnx,
    plan,
    push,
    serve,
    triton,
    trt,
    verify,
    web,
)
from elastic_export.cli.show import fail
from elastic_runtime.errors import ElasticError

FAILED = 5  # no fault of what was asked: memory, a disk or a terminal that does not do its part
# 128 + the signal, as shells have it
ENDED = {128 + signal.SIGINT: "interrupted", 128 + signal.SIGTERM: "terminated"}

app = typer.Typer(
    name="elastic-export",
    help="Compile elastic diffusion transformers once, with their compute budget still open, and prove every budget.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
)


def main(arguments: list[str] | None = None) -> None:
    """Entry point; `arguments` default to the process's own.

    Errors that a user can act on end in one line and their exit code, never in a traceback.
    """
    with contextlib.suppress(ValueError):  # outside the main thread there are no handlers
        signal.signal(signal.SIGTERM, _terminated)
    try:
        app(arguments, prog_name="elastic-export")
    except ElasticError as error:
        fail(str(error))
        sys.exit(error.exit_code)
    except MemoryError:
        fail("there is not enough memory for this: take a smaller picture, batch or model, or a machine with more")
        sys.exit(FAILED)
    except OSError as error:
        _give_up(error)
    except SystemExit as end:
        if isinstance(end.code, int) and end.code in ENDED:  # typer has turned Ctrl-C into this, without a word
            fail(f"{ENDED[end.code]}; what was there before is as it was")
        try:
            sys.stdout.flush()
        except OSError as error:
            _give_up(error)
        raise


def _give_up(error: OSError) -> NoReturn:
    """End with one line about a file, a disk or a terminal that does not do its part."""
    where = f"{error.filename}: " if error.filename else ""
    fail(f"{where}{error.strerror or error}")
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the interpreter tries again at its end, and says so
    sys.exit(FAILED)


def _terminated(number: int, frame: object) -> None:
    """End as Ctrl-C does, so that what is half written is cleared away."""
    raise SystemExit(128 + number)


app.command(rich_help_panel="Make")(onnx.onnx)
app.command(rich_help_panel="Make")(coreml.coreml)
app.command(rich_help_panel="Make")(trt.trt)
app.command(rich_help_panel="Make")(triton.triton)
app.command(rich_help_panel="Use")(generate.generate)
app.command(rich_help_panel="Use")(serve.serve)
app.command(rich_help_panel="Use")(web.web)
app.command(rich_help_panel="Use")(demo.demo)
app.command(rich_help_panel="Use")(bench.bench)
app.command(rich_help_panel="Use")(push.push)
app.command(rich_help_panel="Look")(plan.plan)
app.command(rich_help_panel="Look")(verify.verify)
app.command(rich_help_panel="Look")(inspect.inspect)
app.command(rich_help_panel="Look")(models.models)
app.command(rich_help_panel="Look")(devices.devices)
app.command(rich_help_panel="Look")(doctor.doctor)
