from typing import Any

import numpy as np
import pytest
from fakes import NULL, manifest, session
from hypothesis import given
from hypothesis import strategies as st

from elastic_runtime import Budget, BudgetError, Guidance, Span, UsageError
from elastic_runtime.denoising.denoiser import Denoiser
from elastic_runtime.denoising.guidance import Branches
from elastic_runtime.denoising.router import Routing
from elastic_runtime.denoising.tokens import Conditions

X = np.random.default_rng(0).standard_normal((2, 4, 8, 8))
LABELS = np.array([3, 5])
CONDITIONS = Conditions(labels=LABELS)
FULL, LOW = Budget(latents=64), Budget(latents=4)


def by_label_and_budget(x: np.ndarray, t: np.ndarray, labels: np.ndarray, kept: int) -> Any:
    """A velocity that tells which label, time and budget it was asked for."""
    return labels + 100.0 * kept + 0.5 * t


def guided(guidance: Guidance, branches: Branches, time: float = 0.5, batch: Span = Span(1, 4)) -> tuple[np.ndarray, list[Any]]:  # noqa: B008
    fake = session(by_label_and_budget, batch=batch)
    answer = Denoiser(fake, manifest(batch=batch)).guided(X, time, CONDITIONS, guidance, branches, Routing())
    return answer.prediction[:, 0, 0, 0], fake.calls


def test_without_guidance_there_is_one_run_at_the_budget() -> None:
    value, calls = guided(Guidance(1.0), Branches(FULL, LOW))
    np.testing.assert_allclose(value, LABELS + 1600.25)
    assert [(call["sample"][0], call["latent_ids"]) for call in calls] == [(2, (16,))]


def test_classifier_free_guidance_takes_both_branches_in_one_run() -> None:
    value, calls = guided(Guidance(3.0), Branches(FULL, FULL))
    np.testing.assert_allclose(value, NULL + 3.0 * (LABELS - NULL) + 1600.25)
    assert [(call["sample"][0], call["latent_ids"]) for call in calls] == [(4, (16,))]


def test_cheap_guidance_runs_the_unlabelled_branch_at_its_own_budget() -> None:
    value, calls = guided(Guidance(3.0), Branches(FULL, LOW))
    strong, weak = LABELS + 1600.25, NULL + 100.25
    np.testing.assert_allclose(value, weak + 3.0 * (strong - weak))
    assert [call["latent_ids"] for call in calls] == [(16,), (1,)]


def test_autoguidance_keeps_the_label_on_the_weak_branch() -> None:
    value, calls = guided(Guidance(2.0, auto=True), Branches(FULL, LOW))
    strong, weak = LABELS + 1600.25, LABELS + 100.25
    np.testing.assert_allclose(value, weak + 2.0 * (strong - weak))
    assert [call["latent_ids"] for call in calls] == [(16,), (1,)]


@pytest.mark.parametrize(("time", "active"), [(0.29, False), (0.3, True), (0.8, True), (0.81, False)])
def test_guidance_acts_inside_its_interval_ends_included(time: float, active: bool) -> None:
    value, calls = guided(Guidance(3.0, 0.3, 0.8), Branches(FULL, LOW), time)
    assert len(calls) == (2 if active else 1)
    if not active:
        np.testing.assert_allclose(value, LABELS + 1600 + 0.5 * time, rtol=1e-6)


@given(st.integers(1, 20), st.integers(1, 6))
def test_batches_are_split_by_the_graphs_span_and_come_back_in_order(size: int, most: int) -> None:
    batch = Span(1, most)
    fake = session(by_label_and_budget, batch=batch)
    x, labels = np.zeros((size, 4, 8, 8)), np.arange(size) % NULL
    conditions = Conditions(labels=labels)
    value = Denoiser(fake, manifest(batch=batch)).guided(x, 0.0, conditions, Guidance(), Branches(FULL, FULL), Routing()).prediction
    np.testing.assert_allclose(value[:, 0, 0, 0], labels + 1600)
    assert max(call["sample"][0] for call in fake.calls) <= most
    assert len(fake.calls) == -(-size // most)


def test_a_number_of_pictures_that_cannot_be_split_names_the_span() -> None:
    with pytest.raises(BudgetError, match="takes batches of 4-4; 2 samples"):
        guided(Guidance(1.0), Branches(FULL, FULL), batch=Span(4, 4))


@pytest.mark.parametrize("scale", [0.0, 0.99, -1.0, float("nan"), float("inf")])
def test_a_scale_below_one_or_not_finite_is_refused(scale: float) -> None:
    with pytest.raises(UsageError, match=r"guidance_scale must be 1 \(off\) or more"):
        Guidance(scale)


@pytest.mark.parametrize(("low", "high"), [(0.8, 0.3), (-0.1, 1.0), (0.0, 1.1), (float("nan"), 1.0)])
def test_an_interval_that_falls_or_leaves_zero_to_one_is_refused(low: float, high: float) -> None:
    with pytest.raises(UsageError, match="guidance interval must lie in 0 to 1 and rise"):
        Guidance(2.0, low, high)
