"""A model with a router in the pipeline: drop fractions, guided channels, the log of kept tokens, and what a callback is shown."""

from typing import Any

import numpy as np
import pytest
from fake_router import LENGTH, answer, described, graph, kept_by_hand, pipeline, probabilities, runs
from fakes import manifest, session

from elastic_runtime import Budget, ElasticPipeline, FakeSession, Guidance, UsageError
from elastic_runtime.denoising.denoiser import Denoiser
from elastic_runtime.denoising.guidance import Branches
from elastic_runtime.denoising.router import Routing
from elastic_runtime.denoising.tokens import Conditions

ALL = Budget(tokens=LENGTH)


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_each_branch_drops_its_own_share() -> None:
    pipe, _ = pipeline(lambda t, label: 40)
    cfg = {"guidance_scale": 2.0, "num_inference_steps": 2, "generator": rng()}
    lite = pipe([1], drop_fraction=0.3, guidance_drop_fraction=0.9, **cfg).steps
    assert [(step.kept, step.guidance_kept) for step in lite] == [((28,), (4,))] * 2
    same = pipe([1], drop_fraction=0.3, **cfg).steps
    assert [(step.kept, step.guidance_kept) for step in same] == [((28,), (28,))] * 2
    off = pipe([1], guidance_drop_fraction=np.float32(0.5), **cfg).steps
    assert [(step.kept, step.guidance_kept) for step in off] == [((40,), (20,))] * 2


@pytest.mark.parametrize("name", ["drop_fraction", "guidance_drop_fraction"])
@pytest.mark.parametrize("value", [1.0, -0.1, float("nan"), "half", True, 64])
def test_fractions_that_are_none(name: str, value: Any) -> None:
    pipe, fake = pipeline(lambda t, label: 40)
    with pytest.raises(UsageError, match=f"^{name} is the share of the kept tokens to drop, 0 to below 1, got"):
        pipe([1], guidance_scale=2.0, **{name: value})
    assert fake.calls == []


def test_a_model_without_a_router_drops_nothing() -> None:
    denoiser = Denoiser(session(lambda x, t, labels, kept: x), manifest())
    assert denoiser.routing(0.0, 0.0) == Routing()
    for fractions in ((0.3, None), (0.0, 0.9)):
        with pytest.raises(UsageError, match="tiny has no router and drops no tokens: leave drop fractions out; its axes: latents"):
            denoiser.routing(*fractions)


def test_other_families_say_nothing_about_routers() -> None:
    fake = session(lambda x, t, labels, kept: 0 * x)
    x, both = np.zeros((1, 4, 8, 8)), Branches(Budget(latents=64), Budget(latents=64))
    answer = Denoiser(fake, manifest()).guided(x, 0.5, Conditions(labels=np.array([1])), Guidance(), both, Routing())
    assert (answer.routed, answer.guidance_routed) == (None, None)


@pytest.mark.parametrize(("channels", "guided"), [(4, 3), (1, 1), (4, None)])
def test_guidance_acts_on_the_first_channels_and_leaves_the_variance(channels: int, guided: int | None) -> None:
    """The conditional branch predicts 1 + label everywhere, the other 0."""

    def run(feeds: Any) -> dict[str, np.ndarray]:
        size = len(feeds["sample"])
        value = np.where(feeds["class_labels"] == 10, 0, 1 + feeds["class_labels"]).astype(np.float32)
        return {
            "prediction": np.broadcast_to(value.reshape(-1, 1, 1, 1), (size, 2 * channels, 8, 8)).copy(),
            "kept": np.full(size, 9, np.float32),
            "probability": np.tile(probabilities(9, 0), (size, 1)),
        }

    denoiser = Denoiser(FakeSession(graph(channels), run), described(channels, guided_channels=guided))
    x, conditions = np.zeros((1, channels, 8, 8)), Conditions(labels=np.array([2]))
    got = denoiser.guided(x, 500.0, conditions, Guidance(1.25), Branches(ALL, ALL), denoiser.routing()).prediction[0, :, 0, 0]
    first = channels if guided is None else guided
    np.testing.assert_allclose(got, [3.75] * first + [3.0] * (2 * channels - first))


def test_autoguidance_may_differ_by_what_it_drops() -> None:
    pipe, fake = pipeline(lambda t, label: 40)
    with pytest.raises(UsageError, match="autoguidance needs a guidance budget smaller"):
        pipe([1], guidance_scale=2.0, autoguidance=True)
    result = pipe([1], num_inference_steps=1, guidance_scale=2.0, autoguidance=True, guidance_drop_fraction=0.9, generator=rng())
    assert [(step.kept, step.guidance_kept) for step in result.steps] == [((40,), (4,))]
    assert len(fake.calls) == 3  # the first guess did not hold 40
    denoiser = Denoiser(fake, described())
    both = Branches(ALL, ALL)
    x, conditions = np.zeros((1, 1, 8, 8)), Conditions(labels=np.array([1]))
    answer = denoiser.guided(x, 9.0, conditions, Guidance(2.0, auto=True), both, denoiser.routing(0.3, 0.3))
    assert answer.guidance_routed is None


def test_a_callback_is_shown_the_picture_and_what_was_kept() -> None:
    pipe, _ = pipeline(lambda t, label: 20 + label)
    seen: list[dict[str, np.ndarray]] = []
    result = pipe(
        [1, 4], num_inference_steps=3, drop_fraction=0.5, budget=Budget(tokens=11), generator=rng(), guidance_scale=2.0,
        callback_on_step_end=lambda pipe, index, time, tensors: seen.append(tensors) or {},
    )  # fmt: skip
    assert [step.kept for step in result.steps] == [(11, 12)] * 3
    for step, tensors in zip(result.steps, seen, strict=True):
        assert tensors["denoised"].shape == tensors["latents"].shape
        assert (np.abs(tensors["denoised"]) <= 1).all()
        for row, label in enumerate((1, 4)):
            wanted, count = kept_by_hand(probabilities(20 + label, int(step.time) * 100 + label), 0.5, 11)
            assert count == step.kept[row]
            assert set(np.flatnonzero(tensors["mask"][row]).tolist()) == set(wanted)


def test_a_graph_that_tells_no_probabilities_is_sized_all_the_same() -> None:
    pipe, fake = pipeline(lambda t, label: 20)
    graph = answer(lambda t, label: 20, 1)
    pipe = ElasticPipeline(
        pipe.bundle, {"denoiser": FakeSession(fake.graph, lambda feeds: {k: v for k, v in graph(feeds).items() if k != "probability"})}
    )
    seen: list[dict[str, np.ndarray]] = []
    result = pipe([1], num_inference_steps=2, generator=rng(), callback_on_step_end=lambda p, i, t, tensors: seen.append(tensors) or {})
    assert [(step.kept, step.slots) for step in result.steps] == [((20,), 32), ((20,), 24)]
    assert [sorted(tensors) for tensors in seen] == [["denoised", "latents"]] * 2


def test_the_record_is_plain_data() -> None:
    pipe, _ = pipeline(lambda t, label: 20)
    (step,) = pipe([1], num_inference_steps=1, generator=rng()).steps
    assert all(type(count) is int for count in (*step.kept, step.slots, step.reruns))
    assert (step.time, step.next_time) == (999.0, -1.0)


def test_the_whole_public_run_of_250_steps() -> None:
    pipe, fake = pipeline(lambda t, label: round(LENGTH * (0.45 - 0.23 * t / 999)))
    result = pipe([1], num_inference_steps=250, generator=rng(), output_type="latent")
    assert np.isfinite(result.images).all()
    assert [step.time for step in result.steps[:3]] == [999, 995, 991]
    assert len(runs(fake)) <= 255
