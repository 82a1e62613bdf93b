import numpy as np
import pytest

from classifier import load_judge
from digits import Digits
from grading import Grader, frechet_distance


def test_frechet_distance_of_equal_sets_is_zero() -> None:
    a = np.random.default_rng(0).normal(size=(300, 5)) @ np.random.default_rng(1).normal(size=(5, 5))
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    flat = np.concatenate([a, a[:, :1]], axis=1)  # of rank 5 in 6 dimensions
    assert frechet_distance(flat, flat) == pytest.approx(0, abs=1e-6)


def test_frechet_distance_is_the_closed_form_of_two_gaussians() -> None:
    # Whitened samples have exactly the mean 0 and covariance 1; axis-aligned Gaussians give |m|^2 + sum (s_a - s_b)^2.
    raw = np.random.default_rng(0).normal(size=(500, 3))
    raw -= raw.mean(0)
    white = raw @ np.linalg.inv(np.linalg.cholesky(np.cov(raw, rowvar=False))).T
    a, b = white * [1.0, 2.0, 3.0], white * [2.0, 0.5, 3.0] + [1.0, 0.0, -2.0]
    assert frechet_distance(a, b) == pytest.approx(1 + 4 + 1 + 2.25)
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))[0]
    assert frechet_distance(a @ turn, b @ turn) == pytest.approx(8.25)
    assert frechet_distance(b, a) == pytest.approx(8.25)


@pytest.mark.parametrize("side", [32, 64])
def test_real_digits_are_near_real_digits_and_spoilt_ones_are_not(side: int, digits: tuple[Digits, Digits]) -> None:
    from digits import load_digits

    grader = Grader.of(load_judge(side), 200, side)
    assert (grader.real["pictures"], len(grader.features)) == (200, 3500)
    held_out = load_digits(side)[1]
    some = Digits(held_out.images[::7], held_out.labels[::7])
    spoilt = Digits(some.images * 0.5 + np.random.default_rng(0).uniform(-0.5, 0.5, some.images.shape), some.labels)
    good, bad = grader.grade(some), grader.grade(spoilt)
    assert good["accuracy"] >= 0.98
    assert np.mean(good["accuracy_by_class"]) == pytest.approx(good["accuracy"], abs=0.02)
    assert good["frechet_distance"] < bad["frechet_distance"]


def test_labels_are_counted_as_they_were_asked_for(digits: tuple[Digits, Digits]) -> None:
    grader = Grader.of(load_judge(), 20)
    train = digits[0]
    wrong = Digits(train.images[::5], (train.labels[::5] + 1) % 10)
    assert grader.grade(wrong)["accuracy"] < 0.02
