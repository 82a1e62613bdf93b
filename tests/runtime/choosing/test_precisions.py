"""`precisions="auto"`: what the card saw keep the original's quality, and nothing that it did not see."""

import pytest
from msgspec.structs import replace
from simulated import described

from elastic_runtime.choosing.precisions import allowed
from elastic_runtime.contract.manifest import Manifest, Rounded
from elastic_runtime.errors import UsageError

ROWS = {  # accuracy and Frechet distance at 16 and at 256 latents
    "fp32": ((0.94, 40.0), (0.98, 20.0)),
    "fp16": ((0.94, 40.0), (0.98, 20.0)),
    "int8": ((0.935, 41.0), (0.975, 21.0)),
    "int8w": ((0.94, 40.0), (0.96, 20.0)),  # loses accuracy at one budget
    "int4w": ((0.94, 40.0), (0.98, 30.0)),  # its pictures are far at one budget
}


def graded(rows: dict[str, tuple[tuple[float, float], ...]] = ROWS) -> Manifest:
    return replace(
        described(),
        precisions=tuple(
            Rounded(budget={"latents": latents}, precision=name, accuracy=accuracy, frechet_distance=distance)
            for name, figures in rows.items()
            for latents, (accuracy, distance) in zip((16, 256), figures, strict=False)
        ),
    )


def test_auto_is_what_keeps_accuracy_and_distance_wherever_it_was_graded() -> None:
    assert allowed(graded(), ("auto",)) == ("fp32", "fp16", "int8")


def test_the_floor_is_the_users() -> None:
    assert allowed(graded(), ("auto",), floor=0.97) == ("fp32", "fp16", "int8w", "int8")
    assert allowed(graded(), ("auto",), floor=1.0) == ("fp32", "fp16")


def test_what_the_card_did_not_see_is_not_taken() -> None:
    assert allowed(graded({}), ("auto",)) == ("fp32",)
    assert allowed(graded({"int8": ROWS["int8"]}), ("auto",)) == ("fp32",)  # float32 was not graded beside it


def test_named_precisions_are_taken_as_they_are() -> None:
    assert allowed(graded(), ("int4w", "fp32")) == ("int4w", "fp32")
    assert allowed(graded(), ()) == ()


@pytest.mark.parametrize("wrong", [("auto", "int8"), ("int3",)])
def test_other_names_are_refused(wrong: tuple[str, ...]) -> None:
    with pytest.raises(UsageError, match="fp32, fp16, bf16"):
        allowed(graded(), wrong)


def test_a_floor_is_a_share() -> None:
    with pytest.raises(UsageError, match="share of the best"):
        allowed(graded(), ("auto",), floor=99)
