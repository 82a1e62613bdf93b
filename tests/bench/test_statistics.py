import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_bench.pareto import front
from elastic_bench.statistics import medians, noise, ratio, summarize

seconds = st.floats(1e-6, 1e3)
rounds = st.lists(st.lists(seconds, min_size=1, max_size=6), min_size=1, max_size=8)


@given(rounds)
def test_a_summary_is_of_every_sample_and_its_percentiles_rise(samples: list[list[float]]) -> None:
    summary, every = summarize(samples), np.concatenate(samples)
    assert summary.count == every.size
    rising = [summary.min, summary.p50, summary.p90, summary.p95, summary.p99, summary.max]
    assert all(a <= b * (1 + 1e-12) for a, b in itertools.pairwise(rising))
    assert summary.min <= summary.mean * (1 + 1e-12)
    assert summary.p50 == pytest.approx(np.median(every))
    assert summary.spread >= 0


@given(rounds, st.floats(0.01, 100))
def test_figures_scale_with_the_unit_and_shares_do_not(samples: list[list[float]], unit: float) -> None:
    scaled = [[unit * value for value in each] for each in samples]
    a, b = summarize(samples), summarize(scaled)
    assert b.p90 == pytest.approx(unit * a.p90)
    assert b.spread == pytest.approx(a.spread, rel=1e-9, abs=1e-9)
    assert ratio(scaled, samples) == pytest.approx(unit)
    if len(samples) > 1:
        assert noise(scaled) == pytest.approx(noise(samples), rel=1e-9, abs=1e-9)


@given(st.lists(st.tuples(seconds, st.floats(1.0, 50.0)), min_size=1, max_size=12), st.floats(0.1, 10.0))
def test_a_ratio_holds_however_the_machines_speed_drifts(turns: list[tuple[float, float]], times: float) -> None:
    base = [[value * drift] for value, drift in turns]
    slower = [[times * value * drift] for value, drift in turns]
    assert ratio(slower, base) == pytest.approx(times)


def test_noise_falls_with_rounds_and_is_not_widened_by_one_disturbed_round() -> None:
    few, many = [[1.0], [1.1], [0.9], [1.0]], [[1.0], [1.1], [0.9], [1.0]] * 4
    assert noise(many) < noise(few) < 0.2
    assert noise([[1.0], [1.01], [0.99], [1.0], [1.02], [0.98], [9.0]]) < 0.05
    assert noise([[1.0]]) == math.inf
    assert medians([[1.0, 3.0, 2.0], [5.0]]).tolist() == [2.0, 5.0]


points = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=20)


@given(points)
def test_the_front_holds_what_nothing_beats(candidates: list[tuple[int, int]]) -> None:
    marks = front(candidates)
    kept = [point for point, mark in zip(candidates, marks, strict=True) if mark]
    assert kept, "something is always best"
    for cost, quality in kept:
        assert not any(c <= cost and q >= quality and (c, q) != (cost, quality) for c, q in candidates)
    for (cost, quality), mark in zip(candidates, marks, strict=True):
        if not mark:
            assert any(c <= cost and q >= quality and (c, q) != (cost, quality) for c, q in kept), "what is dropped is beaten by the front"
