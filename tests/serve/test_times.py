"""Predicted times: by the prior until something is seen, then by that."""

import pytest

from elastic_runtime import Budget
from elastic_serve import times as serve_times
from elastic_serve.jobs import Job, Way
from elastic_serve.scheduler import RefusedError, Scheduler
from elastic_serve.times import FADES, SIZED, Kind, Learned

SMALL, LARGE, OTHER = (Kind("m", Budget(latents=16)), Kind("m", Budget(latents=64)), Kind("n", Budget(latents=16)))


class Hands:
    """A clock that is set."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def learned(overhead: float, most: int = 16, clock: Hands | None = None) -> Learned:
    return Learned(lambda kind, rows: overhead + rows * kind.budget["latents"] * 1e-3, lambda model: most, clock or Hands())


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


def test_one_step_alone_is_not_believed_outright() -> None:
    times = learned(0.0)
    for seconds in (99.0, 99.0):  # the first counts for nothing
        times.observe(SMALL, 1, seconds)
    assert times.seconds(SMALL, 1) == pytest.approx(0.016 * (1 + 0.3 * 7))


def test_what_was_seen_fades_towards_the_pace_and_the_pace_towards_the_prior() -> None:
    clock = Hands()
    times = learned(0.0, clock=clock)
    for kind, slow in ((SMALL, 4.0), (LARGE, 1.0)):
        for _ in range(100):
            times.observe(kind, 1, slow * kind.budget["latents"] * 1e-3)
    assert times.seconds(SMALL, 1) == pytest.approx(4 * 0.016)
    clock.now += FADES
    for _ in range(100):
        times.observe(LARGE, 1, 2 * 0.064)
    assert times.seconds(SMALL, 1) == pytest.approx((2 + 2 / 2.71828) * 0.016, rel=1e-3)
    clock.now += 20 * FADES
    assert times.pace("m") == pytest.approx(1.0)
    assert times.seconds(SMALL, 1) == pytest.approx(0.016)
    clock.now -= 1e6
    assert times.pace("m") == pytest.approx(2.0), "a clock that goes back"


def test_what_slow_steps_tell_fades_more_slowly() -> None:
    clock = Hands()
    times = Learned(lambda kind, rows: 10.0, lambda model: 1, clock)
    for _ in range(100):
        clock.now += 20.0
        times.observe(SMALL, 1, 20.0)
    clock.now += 20.0
    assert times.seconds(SMALL, 1) == pytest.approx(20.0, rel=0.02)


def test_one_slow_run_of_several_rows_is_forgotten() -> None:
    clock = Hands()
    times = learned(1.0, most=8, clock=clock)
    for rows in (1, 2, 4, 8):
        for _ in range(3):
            times.observe(SMALL, rows, 1.0 + rows * 0.016)
    assert times.together(SMALL) == 8
    for _ in range(3):
        times.observe(SMALL, 2, 3 * 1.032)
    assert times.together(SMALL) == 1
    for _ in range(300):  # which run meanwhile
        clock.now += 2 * SIZED
        times.observe(SMALL, 1, 1.016)
    assert times.together(SMALL) == 8


def test_sizes_of_runs_are_weighed_again_though_nothing_runs() -> None:
    clock = Hands()
    times = learned(1.0, most=8, clock=clock)
    for _ in range(20):
        times.observe(SMALL, 1, 1.016)
        times.observe(SMALL, 2, 3 * 1.032)
    assert times.together(SMALL) == 1
    clock.now += 20 * FADES
    assert times.together(SMALL) == 8


def test_a_prompt_that_stalls_is_no_prediction() -> None:
    clock = Hands()
    times = learned(0.0, clock=clock)
    assert times.reading("m", 0.5) == 0.5
    times.read("m", 0.5, 0.4)
    assert times.reading("m", 0.5) == pytest.approx(0.4), "the first goes before what was foreseen"
    times.read("m", 0.5, 300.0)
    assert times.reading("m", 0.5) == pytest.approx(0.4 + 0.3 * (8 * 0.5 - 0.4))
    clock.now += 20 * FADES
    assert times.reading("m", 0.5) == pytest.approx(0.5)


class Drawn:
    """Pictures of ten steps in three budgets, one by one, on a machine that may be slow; the cheapest takes 0.2 s, the best 0.6."""

    kinds = tuple(Kind("m", Budget(latents=latents)) for latents in (16, 32, 64))

    def __init__(self) -> None:
        self.clock, self.pause = Hands(), 1.0
        self.times = Learned(lambda kind, rows: 0.02 * rows * (1 + self.kinds.index(kind)), lambda model: 1, self.clock)
        self.scheduler = Scheduler(self.times)

    def picture(self, deadline: float, slow: float = 1.0) -> float | None:
        """The level of its last step; None for one that is refused."""
        self.clock.now += self.pause
        ways = tuple(Way(((kind, 10),)) for kind in self.kinds)
        try:
            (number,) = self.scheduler.admit([Job(0, "a", self.clock.now, self.clock.now + deadline, True, 1, ways)], self.clock.now)
        except RefusedError:
            return None
        while True:
            turn = self.scheduler.turn(self.clock.now)
            assert turn is not None
            self.clock.now += (seconds := slow * 0.02 * (1 + self.kinds.index(turn.kind)))
            self.times.observe(turn.kind, 1, seconds)
            if self.scheduler.stepped(number).taken == 10:
                self.scheduler.remove(number)
                return turn.level


@pytest.mark.parametrize("deadline", [0.3, 0.65, 1.8])
def test_after_a_slow_moment_promises_are_taken_in_again(deadline: float) -> None:
    drawn, fresh = Drawn(), Drawn()
    drawn.pause = 10.0
    for _ in range(3):
        assert drawn.picture(deadline) is not None
    for _ in range(3):
        drawn.picture(deadline, slow=8.0)
    drawn.clock.now += 5 * FADES
    levels = [drawn.picture(deadline) for _ in range(20)]
    assert None not in levels
    assert levels[-1] == [fresh.picture(deadline) for _ in range(3)][-1], "and at the budgets of a server that is new"


def test_what_is_slow_for_good_is_refused_as_long_as_it_is_asked_for() -> None:
    drawn = Drawn()
    for _ in range(20):
        drawn.picture(60.0, slow=4.0)
        drawn.picture(1.2, slow=4.0)
    assert drawn.picture(0.5, slow=4.0) is None


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
