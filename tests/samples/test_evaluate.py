import dataclasses
from argparse import ArgumentTypeError
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

import evaluate as script
from card import table
from classifier import load_judge
from digits import Digits, halved
from elastic_runtime import Axis, Budget, BudgetError, Bundle, ElasticPipeline, FakeSession, Span, UsageError
from elastic_runtime.contract.artifacts import Graph, TensorSpec
from elastic_runtime.contract.manifest import SCHEMA_VERSION, Cost, Manifest, Model, Provenance
from elastic_runtime.contract.schedule import RectifiedFlow
from evaluate import Protocol, draw, evaluate, spread

# An axis that is not `latents`, to prove that nothing is tied to it.
LOOPS = Axis(name="loops", min=1, max=4, step=1, default=4, input="loops", carrier="value")
PROTOCOL = Protocol(samples=100, steps=2, guidance=(2.0, 1.0))


def bundle(side: int = 32) -> Bundle:
    """A description of a model of digits that no file backs."""
    sample = TensorSpec(name="sample", dtype="float32", shape=("B", 1, side, side))
    inputs = (
        sample,
        TensorSpec(name="timestep", dtype="float32", shape=("B",)),
        TensorSpec(name="class_labels", dtype="int64", shape=("B",)),
        TensorSpec(name="loops", dtype="int64", shape=()),
    )
    facts: dict[str, Any] = {"prediction": "velocity", "schedule": RectifiedFlow(), "weights": "checkpoint"}
    model = Model(name="tiny", family="elt", config={"depth": 2}, sample_shape=(1, side, side), num_classes=10, null_label=10, **facts)
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        model=model,
        axes=(LOOPS,),
        graphs={
            "denoiser": Graph(
                inputs=inputs, outputs=(msgspec.structs.replace(sample, name="prediction"),), dimensions={"B": Span(1, 8)}, artifacts=()
            )
        },
        cost=tuple(Cost(budget={"loops": n}, flops=n * 10**9, weight_bytes=1, activation_bytes=1) for n in (1, 4)),
        provenance=Provenance(command="", created="2026-01-01T00:00:00+00:00", versions={}, checkpoint_sha256="ab"),
    )
    return Bundle(Path("nowhere"), manifest)


def artist(held_out: Digits) -> FakeSession:
    """Draws a real digit of the class that is asked for; with one loop, buries it in a checkerboard."""
    blank = np.full((1, 32, 32), -1, np.float32)  # what it draws without a label
    examples = np.stack([*(held_out.images[held_out.labels == digit][0] for digit in range(10)), blank])
    board = np.indices((32, 32)).sum(0) % 2 * 1.5

    def velocity(feeds: Any) -> dict[str, np.ndarray]:
        goal = examples[feeds["class_labels"]] + (board if feeds["loops"] == 1 else 0)
        return {"prediction": ((feeds["sample"] - goal) / feeds["timestep"][:, None, None, None]).astype(np.float32)}

    return FakeSession(bundle().manifest.graphs["denoiser"], velocity)


def test_spread_of_an_axis() -> None:
    latents = Axis(name="latents", min=16, max=256, step=16, default=256, input="i", carrier="length", unit=16, dimension="J")
    assert spread(latents) == [16, 32, 64, 128, 256]
    assert spread(LOOPS) == [1, 2, 3, 4]
    tokens = Axis(name="tokens", min=13, max=64, step=1, default=64, input="i", carrier="length", dimension="K")
    assert spread(tokens) == [13, 26, 52, 64]


def test_figures_follow_what_is_drawn(digits: tuple[Digits, Digits], capsys: pytest.CaptureFixture[str]) -> None:
    figures = evaluate(ElasticPipeline(bundle(), {"denoiser": artist(digits[1])}), load_judge(), LOOPS, [1, 4], PROTOCOL, batch=30)
    bad, good = figures["quality"]
    rows = figures["evaluation"]["rows"]
    assert [(row["guidance"], row["budget"]["loops"]) for row in rows] == [(2, 1), (2, 4), (1, 1), (1, 4)]
    assert [row["accuracy"] for row in rows[:2]] == [bad["accuracy"], good["accuracy"]]
    assert (bad["budget"], good["budget"]) == ({"loops": 1}, {"loops": 4})
    assert good["accuracy"] == 1
    assert bad["accuracy"] < 0.7
    assert good["frechet_distance"] < bad["frechet_distance"]
    evaluation = figures["evaluation"]
    assert evaluation["axis"] == "loops"
    assert evaluation["protocol"] == dataclasses.asdict(PROTOCOL)
    assert [row["flops"] for row in rows] == [10**9, 4 * 10**9] * 2
    assert evaluation["real"]["pictures"] == 100
    assert evaluation["real"]["accuracy"] >= 0.98
    assert evaluation["weights_sha256"] == "ab"
    out, err = capsys.readouterr()
    assert out == ""
    assert "loops=4, guidance 2: 100 of 100 pictures" in err


def test_a_model_without_budgets_is_graded_as_it_is(digits: tuple[Digits, Digits]) -> None:
    elastic = bundle()
    graph = elastic.manifest.graphs["denoiser"]
    plain = msgspec.structs.replace(graph, inputs=tuple(spec for spec in graph.inputs if spec.name != "loops"))
    whole = Bundle(elastic.folder, msgspec.structs.replace(elastic.manifest, axes=(), graphs={"denoiser": plain}, cost=()))
    drawn = artist(digits[1])
    session = FakeSession(plain, lambda feeds: drawn.run({**feeds, "loops": np.array(4)}))
    figures = evaluate(ElasticPipeline(whole, {"denoiser": session}), load_judge(), None, [], PROTOCOL, batch=50)
    assert figures["quality"][0] | {"frechet_distance": 0.0} == {"budget": {}, "accuracy": 1.0, "frechet_distance": 0.0}
    assert [row["guidance"] for row in figures["evaluation"]["rows"]] == [2, 1]
    assert "| all | - | 100.0% |" in table(figures)


def test_every_budget_starts_from_the_same_noise(digits: tuple[Digits, Digits]) -> None:
    from elastic_runtime import ElasticPipeline

    starts: list[np.ndarray] = []

    def velocity(feeds: Any) -> dict[str, np.ndarray]:
        starts.append(feeds["sample"])
        return {"prediction": np.zeros_like(feeds["sample"])}

    pipe = ElasticPipeline(bundle(), {"denoiser": FakeSession(bundle().manifest.graphs["denoiser"], velocity)})
    protocol = Protocol(samples=20, steps=1, seed=5)
    drawn = [draw(pipe, Budget(loops=n), 1.0, protocol, batch=8) for n in (1, 4)]
    assert len(starts) == 6
    assert all(np.array_equal(a, b) for a, b in zip(starts[:3], starts[3:], strict=True))
    assert drawn[0].digits.labels.tolist() == [*range(10)] * 2
    assert drawn[0].digits.images.shape == (20, 1, 32, 32)


def test_small_digits_are_judged_at_the_size_of_real_ones(digits: tuple[Digits, Digits]) -> None:
    real = digits[1].images[:5]
    model = bundle(16).manifest.model
    small = np.pad(halved(real, 256) / 255 * 2 - 1, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=-1)
    np.testing.assert_allclose(script.shown(small), script.as_drawn(real, model), atol=1e-6)
    assert script.shown(real) is real
    assert script.as_drawn(real, bundle().manifest.model) is real


def test_cost_of_a_router_is_that_of_the_tokens_it_keeps_below_the_cap() -> None:
    manifest = bundle().manifest
    assert script.cost(manifest, Budget(loops=4), None) == 4 * 10**9
    assert script.cost(manifest, Budget(loops=2), None) is None
    assert script.cost(manifest, Budget(loops=4), [1.0, 3.0, 4.0, 9.0]) == pytest.approx(3 * 10**9)  # 1, 3, 4 and, under the cap, 4
    assert script.cost(manifest, Budget(loops=1), [3.0, 3.0]) == 10**9


def test_what_the_judge_cannot_grade_is_refused(digits: tuple[Digits, Digits]) -> None:
    session, judge = artist(digits[1]), load_judge()
    with pytest.raises(UsageError, match=r"judge knows 32x32 and 16x16 digits .* draws \(1, 24, 24\)"):
        evaluate(ElasticPipeline(bundle(24), {"denoiser": session}), judge, LOOPS, [1], PROTOCOL)
    with pytest.raises(UsageError, match="multiple of the 10 classes, 20 or more, got 55"):
        evaluate(ElasticPipeline(bundle(), {"denoiser": session}), judge, LOOPS, [1], dataclasses.replace(PROTOCOL, samples=55))
    with pytest.raises(BudgetError, match="loops 9 is not available"):
        evaluate(ElasticPipeline(bundle(), {"denoiser": session}), judge, LOOPS, [9], PROTOCOL)


def test_guidance_budget_is_read() -> None:
    assert script._budget("latents=16") == {"latents": 16}
    with pytest.raises(UsageError, match="written latents=16, got 'latents'"):
        script._budget("latents")


def test_lists_on_the_command_line_are_read() -> None:
    assert script.integers("16,64") == [16, 64]
    assert script._numbers("4,1.5") == (4, 1.5)
    for read in (script.integers, script._numbers):
        with pytest.raises(ArgumentTypeError, match="such as"):
            read("a,b")
