import pytest
from hypothesis import given
from hypothesis import strategies as st
from simulated import OVERHEAD, PER_LATENT, described, run_seconds

from elastic_runtime import Budget
from elastic_runtime.choosing.cost import Costs, Point, Rates, Work, forecast, roofline
from elastic_runtime.device import catalogue, listed_peak

RATES = Rates(flops=1e12, bandwidth=1e10, efficiency=0.5, overhead=1e-3)


def point(latents: int, batch: int, **more: int) -> Point:
    return Point(budget={"latents": latents}, batch=batch, seconds=run_seconds(latents, batch), **more)


POINTS = [point(latents, batch) for latents in (4, 36, 64) for batch in (1, 2)]


def test_a_run_is_bound_by_arithmetic_or_by_memory() -> None:
    assert roofline(Work(1e9, 1e6, 0), 1, RATES) == pytest.approx(1e-3 + 1e9 / 5e11)
    assert roofline(Work(1e9, 1e8, 0), 1, RATES) == pytest.approx(1e-3 + 1e8 / 1e10)
    assert roofline(Work(1e9, 1e8, 0).at("fp16"), 1, RATES) == pytest.approx(1e-3 + 0.5e8 / 1e10)
    assert roofline(Work(1e9, 1e6, 1e6), 4, RATES) == pytest.approx(1e-3 + 4e9 / 5e11)
    assert RATES.ridge == 50


def test_below_the_knee_a_smaller_budget_saves_no_time() -> None:
    budgets = [Budget(latents=n) for n in range(4, 65, 4)]
    bound_by_memory = Costs(described(), Rates(flops=1e15, bandwidth=1e9))
    assert bound_by_memory.knee(budgets, 1) == Budget(latents=64)
    bound_by_arithmetic = Costs(described(), Rates(flops=1e9, bandwidth=1e15, overhead=0.0))
    assert bound_by_arithmetic.knee(budgets, 1) == Budget(latents=4)


@given(st.sampled_from(range(4, 65, 4)), st.integers(1, 4))
def test_measured_points_predict_budgets_and_batches_that_were_not_measured(latents: int, batch: int) -> None:
    costs = Costs(described(), RATES, points=POINTS)
    assert costs.seconds(Budget(latents=latents), batch) == pytest.approx(run_seconds(latents, batch), rel=1e-6)


def test_a_single_measured_batch_is_scaled() -> None:
    costs = Costs(described(), RATES, points=[point(4, 2), point(64, 2)])
    assert costs.seconds(Budget(latents=64), 4) == pytest.approx(2 * run_seconds(64, 2))
    assert costs.seconds(Budget(latents=64), 1) == pytest.approx(run_seconds(64, 2))


def test_a_larger_budget_is_never_predicted_to_be_faster() -> None:
    noisy = [point(4, 1), Point(budget={"latents": 36}, batch=1, seconds=1.0), point(64, 1)]
    costs = Costs(described(), RATES, points=noisy)
    assert costs.seconds(Budget(latents=64), 1) == 1.0


def test_memory_by_measured_growth_or_by_activations() -> None:
    budget = Budget(latents=36)
    assert Costs(described(), RATES).growth(budget, 2) == 8 * 2 * 136_000
    grown = [point(4, 1, growth=1_000_000), point(64, 1, growth=4_000_000)]
    assert Costs(described(), RATES, points=grown).growth(Budget(latents=34), 1) == pytest.approx(2_500_000)


def test_rows_that_the_table_lacks_lie_between_their_neighbours() -> None:
    work = Costs(described(), RATES).work(Budget(latents=6))
    assert work.flops == pytest.approx(46e6)
    assert Costs(described(), RATES).work(Budget(latents=600)).flops == pytest.approx(104e6)


def test_a_forecast_names_the_knee_and_the_tokens_that_weights_cost() -> None:
    peaks = {entry.id: listed_peak(entry) for entry in catalogue()}
    # the figures of FLOPs a byte that were worked out by hand for these devices
    for name, tokens in {
        "apple-m4": 47,
        "rtx-3060-12": 106,
        "rtx-4090": 245,
        "h100-sxm": 443,
        "l4": 605,
        "jetson-thor-t5000": 1423,
    }.items():
        assert forecast(described(), peaks[name])["tokens"] == pytest.approx(tokens, rel=0.02)
    figures = forecast(described(), peaks["jetson-thor-t5000"])
    assert figures["knee"] == "latents=64"
    assert figures["seconds"]["latents=4"] == pytest.approx(0.5 * (4e6 + 104e3) / 273e9)


def test_the_simulated_machine_is_what_these_tests_take_it_for() -> None:
    assert run_seconds(10, 2) == OVERHEAD + 20 * PER_LATENT
