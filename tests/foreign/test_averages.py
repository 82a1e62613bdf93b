"""Averages of weights in a form that is not read are named, and not passed over for the last weights beside them."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="checkpoints are read with torch")

from elastic_export.foreign.checkpoint import read_checkpoint  # noqa: E402
from elastic_runtime import ModelError  # noqa: E402


class Average:
    """As trainers keep one, with tensors by name."""

    def __init__(self) -> None:
        self.decay, self.shadow = 0.999, {"a": torch.ones(1)}


@dataclasses.dataclass
class Settings:
    decay: float = 0.999


@pytest.mark.parametrize(
    ("average", "kind"),
    [
        (Average(), r"an average of the weights, ema, as a \S*Average"),
        (torch.nn.Linear(1, 1), r"an average of the weights, ema, as a torch\.nn\.modules\.linear\.Linear"),
        ([torch.ones(1), torch.ones(2)], "an average of the weights, ema, as a list of tensors without names"),
    ],
)
def test_an_average_that_is_not_read_is_not_passed_over(average: Any, kind: str, tmp_path: Path) -> None:
    torch.save({"model": {"a": torch.zeros(1)}, "ema": average}, tmp_path / "weights.pt")
    with pytest.raises(ModelError, match=rf"holds {kind}: save its state_dict\(\)"):
        read_checkpoint(tmp_path / "weights.pt")


def test_an_average_that_holds_itself_is_read_to_its_end(tmp_path: Path) -> None:
    for weights, kind in (({"a": torch.ones(1)}, True), ({}, False)):
        average = Average()
        average.owner, average.shadow = average, weights  # type: ignore[attr-defined]
        torch.save({"model": {"a": torch.zeros(1)}, "ema": average}, tmp_path / "weights.pt")
        if kind:
            with pytest.raises(ModelError, match="holds an average of the weights, ema"):
                read_checkpoint(tmp_path / "weights.pt")
        else:
            assert read_checkpoint(tmp_path / "weights.pt").weights == {"a": torch.zeros(1)}


@pytest.mark.parametrize(
    "about", [{"ema": None}, {"ema": {}}, {"ema_decay": 0.999}, {"ema_rates": [0.99, 0.999]}, {"ema_args": Settings()}]
)
def test_what_is_said_of_an_average_is_none(about: dict[str, Any], tmp_path: Path) -> None:
    torch.save({"model": {"a": torch.zeros(1)}} | about, tmp_path / "weights.pt")
    assert read_checkpoint(tmp_path / "weights.pt").weights == {"a": torch.zeros(1)}
    torch.save({"model": {"a": torch.zeros(1)}, "ema": Average(), "ema_state_dict": {"a": torch.ones(1)}} | about, tmp_path / "both.pt")
    if "ema" not in about:
        assert read_checkpoint(tmp_path / "both.pt").weights == {"a": torch.ones(1)}
