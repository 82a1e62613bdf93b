"""What the table of precisions is made for: which are asked for, and how each is exported."""

from argparse import ArgumentTypeError, Namespace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="the samples need torch")
pytest.importorskip("onnxruntime", reason="the samples draw with ONNX Runtime")

import elastic_export
import precisions
from elastic_runtime import UsageError


def test_float32_is_the_first_of_those_that_are_asked_for() -> None:
    assert precisions.chosen("int4w,int4w:gptq,int8qdq,int4w") == ("fp32", "int4w", "int4w:gptq", "int8qdq")
    for odd in ("nvfp4", "int8:gptq", ""):
        with pytest.raises(ArgumentTypeError, match="is none of fp32, fp16"):
            precisions.chosen(odd)


def test_two_roundings_of_a_precision_are_two_bundles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(elastic_export, "export", lambda name, **words: asked.append(words))
    for each in ("int4w", "int4w:gptq"):
        precisions.exported("elt-mnist", each, tmp_path)
    assert [(words["precision"], words.get("rounding")) for words in asked] == [("int4w", None), ("int4w", "gptq")]
    assert len({words["output"] for words in asked}) == 2


def test_a_card_is_not_written_of_other_precisions_than_its_own() -> None:
    with pytest.raises(UsageError, match="the cards' own precisions, fp32, fp16, bf16, int8, int8w, int4w: give --precisions of these"):
        precisions.main(Namespace(record=True, precisions=("fp32", "int4w:gptq")))


def test_a_cards_other_precisions_stay_when_one_is_measured() -> None:
    def measured(*names: str) -> list[dict[str, Any]]:
        return [
            {"budget": {"latents": k}, "precision": each, "accuracy": 0.9, "frechet_distance": 1.0, "psnr_db": None, "milliseconds": 3.0}
            for k in (16, 256)
            for each in names
        ]

    def options(*names: str, samples: int = 200) -> Namespace:
        return Namespace(samples=samples, steps=20, seed=0, precisions=names)

    before = precisions.recorded(None, measured("fp32", "int8"), options("fp32", "int8"))
    before["measured"]["int8"]["machine"] = "another"
    after = precisions.recorded(before, measured("fp32", "bf16"), options("fp32", "bf16"))
    assert [(row["budget"]["latents"], row["precision"]) for row in after["rows"]] == [
        (k, name) for k in (16, 256) for name in ("fp32", "bf16", "int8")
    ]
    assert after["measured"]["int8"]["machine"] == "another" != after["measured"]["bf16"]["machine"]
    assert "milliseconds" not in after["rows"][0]
    with pytest.raises(UsageError, match="measured by .*'samples': 200"):
        precisions.recorded(after, measured("bf16"), options("fp32", "bf16", samples=100))
