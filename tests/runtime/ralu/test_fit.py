import sys

import pytest

from elastic_runtime import MissingError, UsageError, fit_plan
from elastic_runtime.ralu.offers import MOST_BASE
from elastic_runtime.ralu.plan import PRESETS

PAPER = [
    ((5, 6, 7), (0.3, 0.45, 1.0), (5.019, 2.589, 2.226), 6.317),
    ((2, 3, 5), (0.2, 0.3, 1.0), (8.141, 2.856, 2.193), 6.261),
    ((3, 4, 5), (0.25, 0.4, 1.0), (5.948, 2.654, 2.202), 5.231),
]


@pytest.mark.parametrize(("steps", "end_times", "shifts", "z"), PAPER)
def test_the_published_schedules_are_found_again(
    steps: tuple[int, int, int], end_times: tuple[float, float, float], shifts: tuple[float, ...], z: float
) -> None:
    pytest.importorskip("scipy", reason="fitting needs scipy")
    plan = fit_plan(steps, end_times, 0.3)
    assert plan.shifts == pytest.approx(shifts, rel=1e-3)  # the minimum is flat: further digits are the optimizer's and the machine's
    assert plan.z == pytest.approx(z, abs=1e-3)
    assert (plan.steps, plan.end_times, plan.up_ratio) == (steps, end_times, 0.3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((5, 6), (0.3, 1.0), 0.3), "plans of 3 stages, got steps for 2"),
        (((5, 6, 7), (0.5, 0.45, 1.0), 0.3), "end times rise"),
        (((5, 6, 7), (0.3, 0.45, 1.0), 1.0), "up_ratio lies between 0 and 1"),
        (((5, 6, 7), (0.3, 0.45, 1.0), 0.3, 0.0), "base_shift is above 0"),
    ],
)
def test_what_no_plan_can_have_is_refused_before_fitting(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        fit_plan(*arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("steps", "base_shift", "bound"), [((5, 6, 7), 7.6, "shift 10"), ((5, 6, 7), 25.0, "shift 10"), ((2, 2, 4), 4.0, "z 100")]
)
def test_a_search_that_runs_into_its_bounds_gives_no_plan(steps: tuple[int, int, int], base_shift: float, bound: str) -> None:
    pytest.importorskip("scipy", reason="fitting needs scipy")
    with pytest.raises(
        UsageError,
        match=f"base_shift {base_shift:g}: the search runs into its bound at {bound}.*Take plan 'speed'.*'full'",
    ):
        fit_plan(steps, (0.3, 0.45, 1.0), 0.3, base_shift)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_suit_the_shifts_that_a_schedule_of_their_stages_can_be_fitted_to(name: str) -> None:
    pytest.importorskip("scipy", reason="fitting needs scipy")
    plan, most = PRESETS[name], MOST_BASE[name]
    fit_plan(plan.steps, plan.end_times, plan.up_ratio, most)
    with pytest.raises(UsageError, match="runs into its bound"):
        fit_plan(plan.steps, plan.end_times, plan.up_ratio, most + 0.25)


def test_without_scipy_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(MissingError, match=r"pip install 'elastic-export\[ralu\]'"):
        fit_plan((5, 6, 7), (0.3, 0.45, 1.0), 0.3)
