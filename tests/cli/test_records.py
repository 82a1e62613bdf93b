"""Records and tables become options, and come back as they are."""

from dataclasses import dataclass
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner

from elastic_export.cli.records import AXES, Budgets, GuidanceBudgets, How, Spans, opened
from elastic_runtime import Span


@dataclass(frozen=True)
class Size:
    """A record with a field that must be given."""

    width: Annotated[int, typer.Option(min=1)]
    name: Annotated[str, typer.Option("--title", "-t")] = "untitled"


def program(command: Any) -> typer.Typer:
    app = typer.Typer()
    app.command()(opened(command))
    return app


def test_fields_are_options_and_the_command_gets_the_record() -> None:
    got: list[Any] = []

    def draw(word: str, size: Size, how: How, extra: int = 3) -> None:
        """Draw."""
        got.append((word, size, how, extra))

    app = program(draw)
    assert CliRunner().invoke(app, ["cat", "--width", "4", "-t", "tom", "-q"]).exit_code == 0
    assert got == [("cat", Size(4, "tom"), How(quiet=True), 3)]
    assert CliRunner().invoke(app, ["cat"]).exit_code == 2, "a field without a default must be given"
    assert CliRunner().invoke(app, ["cat", "--width", "0"]).exit_code == 2
    assert "Draw." in CliRunner().invoke(app, ["--help"]).output


def test_a_table_has_an_option_for_each_axis_and_gives_those_that_were_given() -> None:
    got: list[Any] = []

    def export(spans: Spans) -> None:
        got.append(spans)

    def draw(budgets: Budgets, guidance: GuidanceBudgets) -> None:
        got.append((budgets, guidance))

    assert CliRunner().invoke(program(export), ["--latents", "32-256", "--loops", "4"]).exit_code == 0
    assert CliRunner().invoke(program(draw), ["--latents", "64,64,128", "--guidance-latents", "16"]).exit_code == 0
    assert CliRunner().invoke(program(draw), []).exit_code == 0
    assert got == [{"latents": Span(32, 256), "loops": Span(4, 4)}, ({"latents": "64,64,128"}, {"latents": 16}), ({}, {})]
    assert CliRunner().invoke(program(export), ["--latents", "a"]).exit_code == 2


@pytest.mark.parametrize("axis", AXES)
def test_every_axis_of_a_family_is_in_the_table(axis: str) -> None:
    pytest.importorskip("torch", reason="the families need torch")
    from elastic_export.capture.zoo import FAMILIES

    axes = {each.name for family in FAMILIES.values() for params in family.presets.values() for each in family.axes(params)}
    assert axis in axes
    assert axes <= set(AXES)
