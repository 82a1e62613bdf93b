"""Peaks of a processor against a clock of the test's own."""

from collections.abc import Callable

import pytest

from elastic_export.bench.peaks import LONGEST, SIDES, highest


@pytest.mark.parametrize(("rate", "sides"), [(1e12, SIDES), (1e10, (256, 1024, 2048)), (5e8, (256,))])
def test_a_rate_that_has_no_instructions_is_not_measured_for_minutes(rate: float, sides: tuple[int, ...]) -> None:
    now, tried = 0.0, []

    def product(side: int) -> Callable[[], object]:
        tried.append(side)

        def run() -> None:
            nonlocal now
            now += 2 * side**3 / rate

        return run

    assert highest(product, lambda: now) == pytest.approx(rate)
    assert tuple(tried) == sides
    assert 2 * sides[-1] ** 3 / rate <= LONGEST
