"""A benchmark of a model that is drawn along plans: steps at their stages' tokens, pictures along them, held against full resolution."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from bench_fakes import Clock, start
from fake_flux import DECODER, FLUX, POOLED, QWEN, SCHNELL, WIDTH, decode, denoiser_graph, manifest, spec
from fakes import write_manifest

from elastic_bench.drawing import Album, drawings
from elastic_bench.figures import method
from elastic_bench.measure import measure, points
from elastic_bench.records import BundleReport, Settings
from elastic_bench.runtimes import Opened
from elastic_bench.subject import Drawing
from elastic_runtime import Budget, BudgetError, FakeSession, Span
from elastic_runtime.contract.artifacts import Graph, OnnxArtifact
from elastic_runtime.contract.bundle import Bundle, entry
from elastic_runtime.contract.manifest import Cost, Patches, Quality, Text
from elastic_runtime.contract.reference import cut, pack

# 64 tokens a picture: a quarter of them, 7x's and 4x's mixed stages, all.
TOKENS = (16, 19, 28, 64)
SETTINGS = Settings(steps=8, duration=0.05)
LAYERS = 3
FUSION = Graph(
    inputs=(spec("tapped", "B", "T", LAYERS, WIDTH),),
    outputs=(spec("fused", "B", "T", WIDTH),),
    dimensions={"B": Span(1, 4), "T": Span(1, 64)},
    artifacts=(),
)


def velocity(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    goal = np.sin(feeds["img_ids"].sum(axis=1))[None, :, None]
    return {"prediction": ((feeds["hidden_states"] - goal) / feeds["timestep"][:, None, None]).astype(np.float32)}


@dataclass
class Runtime:
    """A runtime that takes a millisecond a token; `takes` are the token counts that it was compiled for (None: all)."""

    name: str
    clock: Clock
    takes: tuple[int, ...] | None = None
    artifact: str | None = None
    precision: str = "fp32"

    def obstacle(self, opened: Bundle) -> str | None:
        return None

    def open(self, opened: Bundle, threads: int) -> Opened:
        def run(feeds: Any) -> dict[str, np.ndarray]:
            self.clock.now += 1e-3 * np.prod(feeds["hidden_states"].shape[:2])
            return velocity(feeds)

        session = FakeSession(opened.manifest.graphs["denoiser"], run)
        session.budgets = None if self.takes is None else tuple(Budget(tokens=count, T=1) for count in self.takes)
        return Opened(session, FakeSession(DECODER, decode), 1e-5)


def bundle(folder: Path, patches: Patches = SCHNELL, classes: int = 5, text: Text | None = None, **changes: Any) -> Bundle:
    (folder / "onnx").mkdir(parents=True)
    (folder / "onnx" / "denoiser.onnx").write_bytes(b"not a graph")
    graph, generator = denoiser_graph(patches, pooled=0 if text else POOLED), np.random.default_rng(0)
    sizes = {"B": 2, "S": 64, "T": 1}
    feeds = {
        spec.name: generator.standard_normal([sizes.get(str(size), size) for size in spec.shape]).astype(np.float32)  # type: ignore[misc]
        for spec in graph.inputs
    } | {"timestep": np.array([0.3, 0.8], np.float32)}
    budgets = [Budget(tokens=count, T=1) for count in TOKENS]
    fusion = {"text_fusion": FUSION} if text else {}
    whole = manifest(patches, classes, text, **fusion)
    outputs = {budget: velocity(cut(graph.inputs, feeds, budget, whole.axes)) for budget in budgets}
    np.savez(folder / "reference.npz", **pack("denoiser", feeds, outputs))  # type: ignore[arg-type]
    artifact = OnnxArtifact(precision="fp32", files=(entry(folder, folder / "onnx" / "denoiser.onnx"),), toolchain={}, opset=23)
    whole = msgspec.structs.replace(
        whole,
        graphs=whole.graphs | {"denoiser": msgspec.structs.replace(graph, artifacts=(artifact,))},
        cost=tuple(Cost(budget={"tokens": count}, flops=1000 * count, weight_bytes=4000, activation_bytes=1) for count in TOKENS),
        reference=entry(folder, folder / "reference.npz"),
        **changes,
    )
    write_manifest(folder, whole)
    return Bundle.open(folder)


def run(opened: Bundle, *takes: tuple[int, ...] | None, settings: Settings = SETTINGS) -> tuple[BundleReport, Album]:
    clock = Clock()
    runtimes = [Runtime(f"runtime-{index}", clock, counts) for index, counts in enumerate(takes)]
    return measure(opened, runtimes, points(opened), settings, start(clock))


def test_steps_are_timed_at_the_stages_tokens_and_pictures_along_plans(tmp_path: Path) -> None:
    opened = bundle(tmp_path / "b")
    report, album = run(opened, None)
    (runtime,) = report.runtimes
    assert runtime.failure is None
    assert [row.budget["tokens"] for row in runtime.rows] == list(TOKENS)
    assert [row.step.p50 for row in runtime.rows] == pytest.approx([1e-3 * count for count in TOKENS])
    assert (report.axis, len(runtime.checked)) == ("tokens", 4)
    assert [(trial.plan, trial.steps) for trial in report.trials] == [
        ("full, 8 steps", 8), ("full, 4 steps", 4), ("full, 2 steps", 2), ("4x", 18), ("7x", 10),
    ]  # fmt: skip
    seconds = {trial.plan: trial.seconds for trial in report.trials}
    assert seconds["full, 8 steps"] == pytest.approx(8 * 2 * 0.064)  # two branches of guidance
    assert seconds["7x"] == pytest.approx(2 * 1e-3 * (2 * 16 + 3 * 19 + 5 * 64))
    assert runtime.rows[-1].pictures[0] == pytest.approx(seconds["full, 8 steps"])
    assert runtime.rows[0].pictures == ()
    assert set(album) == set(seconds)
    assert album["4x"].shape[1:] == (64, 64, 3)
    assert "8 steps (a plan has its own) with guidance 2" in method(SETTINGS, [report])


def test_a_plan_is_drawn_only_where_every_stage_was_compiled(tmp_path: Path) -> None:
    report, _ = run(bundle(tmp_path / "b"), (16, 19, 64), None)
    narrow, wide = report.runtimes
    assert (narrow.failure, wide.failure) == (None, None)
    assert "tokens=28" in narrow.skipped
    drawn = {name: [trial.plan for trial in report.trials if trial.runtime == name] for name in ("runtime-0", "runtime-1")}
    assert drawn["runtime-0"] == ["full, 8 steps", "full, 4 steps", "full, 2 steps", "7x"]
    assert drawn["runtime-1"][-2:] == ["4x", "7x"]


def test_what_to_use_is_told_by_the_card_where_it_knows_the_plans(tmp_path: Path) -> None:
    def quality(**distances: float) -> tuple[Quality, ...]:
        return tuple(Quality(budget={}, plan=plan, accuracy=0.9, frechet_distance=value) for plan, value in distances.items())

    card = quality(**{"full, 8 steps": 10.0, "4x": 10.5, "7x": 30.0})
    report, _ = run(bundle(tmp_path / "b", quality=card), None)
    assert report.recommendation is not None
    assert "Use runtime-0 along plan full, 8 steps:" in report.recommendation, "with so few tokens 4x takes longer"
    report, _ = run(bundle(tmp_path / "c", quality=quality(**{"full, 8 steps": 10.0, "7x": 10.5})), None)
    assert report.recommendation is not None
    assert "Use runtime-0 along plan 7x:" in report.recommendation
    assert "its Frechet distance by the card's own protocol is 10.5, where the best is 10.0" in report.recommendation


def test_a_model_of_prompts_is_drawn_after_the_recorded_embeddings(tmp_path: Path) -> None:
    report, album = run(bundle(tmp_path / "b", FLUX, classes=0), None)
    assert report.runtimes[0].failure is None
    assert len(report.trials) == 5
    assert next(trial.seconds for trial in report.trials) == pytest.approx(8 * 0.064), "its guidance is an input: one branch"
    assert "(two branches; one where the model takes guidance as an input)" in method(SETTINGS, [report])
    assert np.isfinite(album["7x"]).all()


@pytest.mark.parametrize("batch", [1, 3])
def test_a_model_whose_text_is_made_of_layers_is_drawn_after_what_its_denoiser_was_fed(tmp_path: Path, batch: int) -> None:
    text = Text(encoders=(), length=64, width=WIDTH, pooled=0, layers=LAYERS)
    opened = bundle(tmp_path / "b", QWEN, classes=0, text=text)
    report, album = run(opened, None, settings=msgspec.structs.replace(SETTINGS, batch=batch))
    assert (report.runtimes[0].failure, report.runtimes[0].skipped) == (None, {})
    assert next(trial.seconds for trial in report.trials) == pytest.approx(8 * 2 * 0.064 * batch), "two branches"
    assert all(np.isfinite(pictures).all() for pictures in album.values())


def test_plans_that_the_picture_is_too_small_for_are_left_out(tmp_path: Path) -> None:
    opened = bundle(tmp_path / "b")
    model = msgspec.structs.replace(opened.manifest.model, sample_shape=(4, 4, 4))
    small = Bundle(opened.folder, msgspec.structs.replace(opened.manifest, model=model))
    ways = drawings(small, points(small), SETTINGS)
    assert ways == [Drawing(Budget(tokens=4), None, steps) for steps in (8, 4, 2)]
    with pytest.raises(BudgetError, match="draws along plans, which choose theirs, so it takes no budgets"):
        points(opened, [16])
