"""Predicted times: by the prior until something is seen, then by that."""

import pytest

from elastic_runtime import Budget
from elastic_serve import times as serve_times
from elastic_serve.times import Kind, Learned

SMALL, LARGE, OTHER = (Kind("m", Budget(latents=16)), Kind("m", Budget(latents=64)), Kind("n", Budget(latents=16)))


def learned(overhead: float, most: int = 16) -> Learned:
    return Learned(lambda kind, rows: overhead + rows * kind.budget["latents"] * 1e-3, lambda model: most)


def test_nothing_seen_is_the_prior() -> None:
    assert learned(0.01).seconds(SMALL, 2) == pytest.approx(0.042)


def test_what_was_seen_goes_before_the_prior_and_tells_of_the_rest_of_the_model() -> None:
    times = learned(0.0)
    times.observe(SMALL, 1, 99.0)  # the first of its kind plans its memory
    assert times.seconds(SMALL, 1) == pytest.approx(0.016)
    for _ in range(40):
        times.observe(SMALL, 1, 0.032)
    assert times.seconds(SMALL, 1) == pytest.approx(0.032)
    assert times.seconds(LARGE, 1) == pytest.approx(0.128, rel=0.01)
    assert times.seconds(OTHER, 1) == pytest.approx(0.016)


def test_it_goes_on_learning() -> None:
    times = learned(0.0)
    for seconds in (0.016,) * 20 + (0.024,) * 20:
        times.observe(SMALL, 1, seconds)
    assert times.seconds(SMALL, 1) == pytest.approx(0.024, rel=0.01)


def test_a_slower_machine_is_believed_sooner_than_a_faster_one() -> None:
    slower, faster = learned(0.0), learned(0.0)
    for times, seconds in ((slower, 0.032), (faster, 0.008)):
        for each in (0.016, 0.016, 0.016, seconds):
            times.observe(SMALL, 1, each)
    assert slower.seconds(SMALL, 1) == pytest.approx(0.016 * (1 + 0.3))
    assert faster.seconds(SMALL, 1) == pytest.approx(0.016 * (1 - 0.1 / 2))


def test_runs_grow_as_long_as_that_pays() -> None:
    assert learned(0.0).together(SMALL) == 1
    assert learned(1.0).together(SMALL) == 16
    assert learned(1.0, most=5).together(SMALL) == 4
    assert learned(0.0128).together(SMALL) == 8, "16 rows would save less than a twentieth on each"


def test_what_refused_requests_asked_for_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Kind] = []

    def prior(kind: Kind, rows: int) -> float:
        asked.append(kind)
        return 1.0

    monkeypatch.setattr(serve_times, "MOST", 4)
    learned = Learned(prior, lambda model: 1)
    kinds = [Kind("m", Budget(latents=latents)) for latents in range(1, 11)]
    for kind in kinds:
        assert learned.seconds(kind, 1) == 1.0
        assert learned.together(kind) == 1
    assert len(asked) == len(kinds)
    learned.seconds(kinds[-1], 1)
    assert len(asked) == len(kinds), "the last are known"
    learned.seconds(kinds[0], 1)
    assert len(asked) == len(kinds) + 1, "and the first no more"
