from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from fake_flux import SCHNELL, Opener, denoiser_graph, manifest

import evaluate_plans as script
from classifier import load_judge
from digits import Digits, glyphs
from elastic_runtime import Bundle, ElasticPipeline, Plan, Span, UsageError
from elastic_runtime.contract.manifest import Cost, Manifest, Quality
from elastic_runtime.ralu.patches import pack
from evaluate_plans import Protocol, evaluate

CONFIG = {"scheduler": {"shift": 2.0}}
COST = tuple(Cost(budget={"tokens": n}, flops=n**2 + 2000 * n, weight_bytes=1, activation_bytes=1) for n in (1, 512, 1024))
PROTOCOL = Protocol(samples=20, full=(3,), rounds=2)
ALL = (64 // 2) ** 2
OF_7X = ALL // 4 + 3 * int(ALL // 4 * 0.1)


def described(side: int = 64, classes: int = 10) -> Manifest:
    """A model of coloured pixels in patches of two, with class labels."""
    whole = manifest(SCHNELL, classes=classes, decoder=False)
    graph = msgspec.structs.replace(denoiser_graph(SCHNELL, channels=3, pooled=10), dimensions={n: Span(1, 2048) for n in "BST"})
    model = msgspec.structs.replace(whole.model, config=CONFIG, sample_shape=(3, side, side), vae=None)
    return msgspec.structs.replace(whole, model=model, graphs={"denoiser": graph}, cost=COST)


def artist(held_out: Digits) -> ElasticPipeline:
    """Draws a real glyph of the class that is asked for; buries it in a checkerboard where the mixed stage before had 7x's tokens."""
    examples = torch.from_numpy(np.stack([held_out.images[held_out.labels == digit][0] for digit in range(10)]))
    pictures = np.concatenate([glyphs(examples).numpy().repeat(3, 1), np.full((1, 3, 64, 64), -1.0)])  # the last one without a label
    board = np.indices((64, 64)).sum(0) % 2 * 1.5
    mixed = 0

    def velocity(feeds: Mapping[str, np.ndarray]) -> np.ndarray:
        nonlocal mixed
        x, sigma, classes = feeds["hidden_states"], feeds["timestep"][:, None, None], feeds["pooled_projections"]
        if x.shape[1] < ALL:
            mixed = x.shape[1]
            return x / sigma
        drawn = pictures[np.where(classes.any(1), classes.argmax(1), 10)] + (board if mixed == OF_7X else 0)
        return (x - pack(drawn, 2)) / sigma

    opener = Opener(described(), velocity)
    return ElasticPipeline(opener.bundle, opener)


def test_figures_follow_what_is_drawn(digits: tuple[Digits, Digits], capsys: pytest.CaptureFixture[str]) -> None:
    pipe = artist(digits[1])
    figures = evaluate(pipe.bundle, pipe, load_judge(64), PROTOCOL, batch=15)
    evaluation = figures["evaluation"]
    rows = {row["plan"]: row for row in evaluation["plans"]}
    assert [name for name in rows if "," not in name] == ["4x", "4x without renoising", "7x", "7x without renoising"]
    assert {"4x, 10+12+14 steps", "7x, 1+2+3 steps"} < set(rows)
    assert {"full, 18 steps", "full, 10 steps", "full, 3 steps"} < set(rows)
    assert all(rows[name]["accuracy"] == 1 for name in rows if "7x" not in name)
    assert rows["7x"]["accuracy"] < 0.7
    assert rows["7x"]["frechet_distance"] > rows["4x"]["frechet_distance"]
    graded = [msgspec.convert(row, Quality) for row in figures["quality"]]
    assert {row.where for row in graded} == {name for name in rows if "without" not in name}
    assert all(list(row.steps or ()) == rows[row.where]["steps"] for row in graded)
    assert rows["4x"]["tokens"] == [256, 256 + 3 * 76, 1024]
    assert (rows["4x"]["steps"], rows["full, 3 steps"]["steps"]) == ([5, 6, 7], [3])
    assert all(row["milliseconds"] > 0 for row in rows.values())
    assert evaluation["protocol"] == asdict(PROTOCOL)
    assert (evaluation["real"]["pictures"], evaluation["where"]) == (20, "fake")
    assert evaluation["real"]["accuracy"] >= 0.98
    assert "4x without renoising: 20 of 20 pictures" in capsys.readouterr().err


def test_rows_have_as_many_steps_as_the_plans_and_as_many_as_these_cost() -> None:
    manifest = described()
    plans = script.rows(manifest, (50, 20))
    step = script.flops(manifest, Plan.full(1))
    for name, total in (("4x", 18), ("7x", 10)):
        cheap = f"full, {round(script.flops(manifest, plans[name]) / step)} steps"
        assert f"full, {total} steps" in plans
        assert abs(script.flops(manifest, plans[cheap]) - script.flops(manifest, plans[name])) <= step / 2
        assert plans[f"{name} without renoising"] == replace(plans[name], renoise=False)
        assert any(
            abs(script.flops(manifest, plan) - script.flops(manifest, plans[name])) <= step / 2
            for key, plan in plans.items()
            if key.startswith("speed, ")
        )
    assert not any(key.startswith("mrflow") for key in plans), "it needs an encoder"
    assert plans["full, 50 steps"] == Plan.full(50, 2.0), "the shift is the model's"


def test_every_plan_starts_from_the_same_noise_whatever_the_batch() -> None:
    starts: list[np.ndarray] = []

    def velocity(feeds: Mapping[str, np.ndarray]) -> np.ndarray:
        starts.append(feeds["hidden_states"])
        return feeds["hidden_states"] * 0

    opener = Opener(described(), velocity)
    pipe = ElasticPipeline(opener.bundle, opener)
    protocol = replace(PROTOCOL, guidance=1.0, seed=5)
    script.draw(pipe, Plan.full(1), np.arange(3), 0, protocol)
    script.draw(pipe, Plan.full(1), np.arange(2, 3), 2, protocol)
    np.testing.assert_array_equal(starts[0][2:], starts[1])


def test_the_sheet_has_a_row_for_each_plan(digits: tuple[Digits, Digits]) -> None:
    pipe = artist(digits[1])
    picture = script.sheet(pipe, PROTOCOL)
    plans = script.rows(pipe.bundle.manifest, PROTOCOL.full)
    assert picture.height == len(plans) * 68 - 4
    assert picture.width > 10 * 68


@pytest.mark.parametrize(
    ("whole", "changes", "message"),
    [
        (described(32), {}, r"digits of 64x64 pixels drawn along a plan; .* draws 32x32 in 10 classes"),
        (described(classes=5), {}, "draws 64x64 in 5 classes"),
        (described(), {"samples": 25}, "multiple of the 10 classes, 20 or more, got 25"),
    ],
)
def test_what_the_judge_cannot_grade_is_refused(whole: Manifest, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        script.check(Bundle(Path("nowhere"), whole), replace(PROTOCOL, **changes))


def test_what_was_graded_by_the_same_protocol_with_the_same_weights_is_kept(
    digits: tuple[Digits, Digits], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe, kept = artist(digits[1]), []
    figures = evaluate(pipe.bundle, pipe, load_judge(64), PROTOCOL, batch=20, keep=lambda rows: kept.append(len(rows)))
    assert kept == list(range(1, len(figures["evaluation"]["plans"]) + 1))
    record = tmp_path / "record.json"
    script.write(record, figures)
    weights = pipe.bundle.manifest.provenance.checkpoint_sha256
    known = script.graded(replace(PROTOCOL, rounds=9), weights, tmp_path / "nothing.json", record)
    assert known == figures["evaluation"]["plans"]
    assert script.graded(replace(PROTOCOL, seed=1), weights, record) == []
    assert script.graded(PROTOCOL, "another", record) == []
    capsys.readouterr()
    again = evaluate(pipe.bundle, pipe, load_judge(64), PROTOCOL, batch=20, known=known[:-1])
    log = capsys.readouterr().err
    assert {line.partition(":")[0] for line in log.replace("\r", "\n").splitlines() if "pictures" in line} == {known[-1]["plan"]}
    assert [row["accuracy"] for row in again["evaluation"]["plans"]] == [row["accuracy"] for row in known]
