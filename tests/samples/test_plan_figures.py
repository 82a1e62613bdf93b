from pathlib import Path
from typing import Any

import pytest

import card
from plan_figures import plot, protocol, table


def record() -> dict[str, Any]:
    def row(plan: str, steps: list[int], tokens: list[int], flops: float, *figures: float) -> dict[str, Any]:
        accuracy, distance = figures
        return {
            "plan": plan, "steps": steps, "tokens": tokens, "flops": int(flops * 1e9), "accuracy": accuracy, "frechet_distance": distance,
            "milliseconds": 40 * flops, "seconds": 90.0,
        }  # fmt: skip

    return {
        "family": "flux",
        "training": {
            "step": 4000, "loss": 0.5, "hours": 1.25, "threads": 2, "machine": "2-core machine", "digits": 3500, "batch": 48, "lr": 1e-3,
            "ema": 0.999,
        },
        "evaluation": {
            "protocol": {"samples": 500, "full": [50], "guidance": 1.5, "seed": 0, "rounds": 15},
            "real": {"pictures": 500, "accuracy": 0.987, "frechet_distance": 4.0},
            "plans": [
                row("full, 50 steps", [50], [256], 50, 0.99, 10.0),
                row("full, 10 steps", [10], [256], 10, 0.96, 20.04),
                row("4x", [5, 6, 7], [64, 121, 256], 11.2, 0.97, 15.0),
                row("4x without renoising", [5, 6, 7], [64, 121, 256], 11.2, 0.5, 400.0),
            ],
            "where": "onnxruntime 1.31 CPU",
            "machine": "2-core machine",
        },
    }  # fmt: skip


def test_table_and_words_quote_the_record() -> None:
    assert table(record()).splitlines() == [
        "| plan | steps | tokens | GFLOPs a picture | ms a picture | as asked | Fréchet distance |",
        "|---|---:|---:|---:|---:|---:|---:|",
        "| full, 50 steps | 50 | 256 | 50.0 | 2000 | 99.0% | 10.0 |",
        "| full, 10 steps | 10 | 256 | 10.0 | 400 | 96.0% | 20.0 |",
        "| 4x | 5, 6, 7 | 64, 121, 256 | 11.2 | 448 | 97.0% | 15.0 |",
        "| 4x without renoising | 5, 6, 7 | 64, 121, 256 | 11.2 | 448 | 50.0% | 400.0 |",
        "| real glyphs | | | | | 98.7% | 4.0 |",
    ]
    words = protocol(record())
    assert "guidance 1.5 (two branches; GFLOPs are of one)" in words
    assert "in 6 minutes on a 2-core machine" in words


def test_a_card_has_the_plans_table_and_its_plot(tmp_path: Path) -> None:
    section = card.section(record())
    assert section.startswith(table(record()))
    assert "4,000 steps of 48" in section
    plot(record(), tmp_path / "some" / "plot.png")
    assert (tmp_path / "some" / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_record_without_figures_is_told() -> None:
    without = {"family": "flux", "training": record()["training"]}
    assert card.section(without).startswith("Not measured yet.")
    with pytest.raises(SystemExit, match="no figures yet"):
        table(without)
