"""How much is asked for: each arrival fades, the oldest are forgotten, and what was abandoned counts by what was drawn of it."""

import pytest

from elastic_serve.demand import Demand


def test_one_arrival_is_a_busy_device_at_most() -> None:
    demand = Demand()
    demand.arrived(1, 0.0, 1e-9, [10.0, 100.0])
    assert demand.busy(1.0, 0.0) == 1.0
    assert demand.busy(1.0, -1e6) == 1.0, "a clock that goes back"


def test_of_what_is_abandoned_the_steps_that_were_taken_count() -> None:
    demand = Demand()
    for number in range(2):
        demand.arrived(number, 0.0, 10.0, [2.0, 4.0])
    whole = demand.busy(1.0, 0.0)
    demand.abandoned(1, 0.25)
    assert demand.busy(1.0, 0.0) == pytest.approx(whole * 1.25 / 2)
    demand.abandoned(0, 0.0)
    assert demand.busy(1.0, 0.0) == pytest.approx(whole * 0.25 / 2)


def test_the_oldest_arrivals_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elastic_serve.demand.MOST", 2)
    demand = Demand()
    for number, seconds in enumerate((8.0, 1.0, 1.0)):
        demand.arrived(number, 0.0, 10.0, [seconds])
    assert demand.busy(0.0, 0.0) == pytest.approx(0.1)
    demand.arrived(3, 1e4, 10.0, [1.0])
    assert demand.busy(0.0, 1e4) == pytest.approx(0.05)
