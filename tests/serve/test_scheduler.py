"""The scheduler on paper: what it promises it keeps, when times are as predicted."""

import math
from collections import Counter
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_runtime import Budget
from elastic_serve.jobs import Job, Way
from elastic_serve.scheduler import MARGIN, RESERVE, RefusedError, Scheduler
from elastic_serve.times import Kind

LATENTS = (16, 64, 128, 256)
OVERHEAD = 0.002


@dataclass(frozen=True)
class Exact:
    """Times that are known: a run takes a constant, and seconds by row and latents."""

    most: int = 4

    def seconds(self, kind: Kind, rows: int) -> float:
        return kind.evaluations * (OVERHEAD + rows * kind.budget["latents"] * 5e-5)

    def together(self, kind: Kind) -> int:
        return self.most


def kind(latents: int, model: str = "m") -> Kind:
    return Kind(model, Budget(latents=latents))


def job(now: float, deadline: float, promised: bool = True, steps: int = 10, client: str = "a", rows: int = 1, model: str = "m") -> Job:
    ways = tuple(Way(((kind(latents, model), steps),), finish=0.001) for latents in LATENTS)
    return Job(0, client, now, now + deadline, promised, rows, ways)


def alone(latents: int, steps: int = 10, rows: int = 1) -> float:
    return steps * Exact().seconds(kind(latents), rows) + 0.001


class Played:
    """A scheduler driven on a clock of its own, as the engine drives it."""

    def __init__(self, scheduler: Scheduler):
        self.scheduler, self.now = scheduler, 0.0
        self.done: dict[int, float] = {}
        self.order: list[int] = []
        self.levels: list[float] = []

    def turn(self) -> bool:
        turn = self.scheduler.turn(self.now)
        if turn is None:
            return False
        self.levels.append(turn.level)
        self.now += turn.predicted
        for number in turn.jobs:
            after = self.scheduler.stepped(number)
            if not after.way(turn.level).after(after.taken):
                self.now += after.way(turn.level).finish
                self.done[number] = self.now
                self.order.append(number)
                self.scheduler.remove(number)
        return True

    def until(self, time: float) -> None:
        while self.now < time and self.turn():
            pass
        self.now = max(self.now, time)

    def rest(self) -> None:
        while self.turn():
            pass


def test_alone_it_is_drawn_at_the_best_budget() -> None:
    played = Played(Scheduler(Exact()))
    played.scheduler.admit([job(0.0, 2 * alone(256))], 0.0)
    played.rest()
    assert set(played.levels) == {1.0}


def test_budgets_fall_as_work_comes_and_rise_as_it_is_done() -> None:
    played = Played(Scheduler(Exact(most=1)))
    for _ in range(4):
        played.scheduler.admit([job(0.0, 3 * alone(256))], 0.0)
    assert played.scheduler.level(0.0) < 1.0
    played.rest()
    played.scheduler.admit([job(played.now, 3 * alone(256))], played.now)
    assert played.scheduler.level(played.now) == 1.0
    assert all(done <= 3 * alone(256) for done in played.done.values())


def test_what_cannot_be_kept_is_refused_with_the_nearest_that_can() -> None:
    scheduler = Scheduler(Exact(most=1))
    for _ in range(3):
        scheduler.admit([job(0.0, 10.0)], 0.0)
    for _ in range(6):
        scheduler.admit([job(0.0, 0.22)], 0.0)
    with pytest.raises(RefusedError, match="cannot be kept, not even at the cheapest budget: 9 pictures are ahead") as refusal:
        scheduler.admit([job(0.0, 0.1)], 0.0)
    nearest = refusal.value.nearest
    assert nearest is not None
    assert refusal.value.wait == pytest.approx(nearest - 0.1)
    assert 7 * alone(16) / (1 - MARGIN) <= nearest < 7.1 * alone(16) / (1 - MARGIN), (
        "before those that have time, after those that have not"
    )
    assert len(scheduler) == 9
    scheduler.admit([job(0.0, nearest + 1e-6)], 0.0)


def test_what_an_idle_machine_cannot_keep_is_not_to_be_asked_again() -> None:
    with pytest.raises(RefusedError, match="on an idle machine: the nearest deadline is") as refusal:
        Scheduler(Exact()).admit([job(0.0, alone(16) / 2)], 0.0)
    assert refusal.value.wait is None
    assert refusal.value.nearest == pytest.approx(alone(16) / (1 - MARGIN))


def test_a_full_queue_says_when_there_is_room() -> None:
    scheduler = Scheduler(Exact(most=1), queue=2)
    scheduler.admit([job(0.0, 10.0), job(0.0, 10.0)], 0.0)
    with pytest.raises(RefusedError, match="the queue is full: 2 pictures of at most 2") as refusal:
        scheduler.admit([job(0.0, 10.0)], 0.0)
    assert refusal.value.wait == pytest.approx(alone(16))
    with pytest.raises(RefusedError, match="ask for fewer pictures") as refusal:
        scheduler.admit([job(0.0, 10.0)] * 5, 0.0)
    assert refusal.value.wait is None


def test_a_wish_is_never_refused_and_gives_way_to_promises() -> None:
    played = Played(Scheduler(Exact(most=1)))
    (first,) = played.scheduler.admit([job(0.0, 1.2 * alone(16))], 0.0)
    (wish,) = played.scheduler.admit([job(0.0, 0.01, promised=False)], 0.0)
    played.rest()
    assert played.order == [first, wish]
    assert played.done[first] <= 1.2 * alone(16)


def test_a_wish_that_gave_way_goes_before_promises_that_come_later() -> None:
    played = Played(Scheduler(Exact(most=1)))
    (first,) = played.scheduler.admit([job(0.0, 1.2 * alone(16))], 0.0)
    (wish,) = played.scheduler.admit([job(0.0, 0.01, promised=False)], 0.0)
    later = [played.scheduler.admit([job(0.0, 10.0)], 0.0)[0] for _ in range(3)]
    played.rest()
    assert played.order == [first, wish, *later]


def test_a_promise_is_not_refused_for_wishes_that_came_before() -> None:
    played = Played(Scheduler(Exact(most=1)))
    wishes = [played.scheduler.admit([job(0.0, 4.5 * alone(16), promised=False, client=f"{number}")], 0.0)[0] for number in range(20)]
    played.turn()
    (promise,) = played.scheduler.admit([job(played.now, 5 * alone(16))], played.now)
    assert played.scheduler.jobs[0].due < math.inf, "they go on as soon as it can be kept"
    (other,) = played.scheduler.admit([job(played.now, 8 * alone(16))], played.now)
    begun = played.now
    played.rest()
    assert played.done[promise] <= begun + 5 * alone(16)
    assert played.done[other] <= begun + 8 * alone(16)
    assert [number for number in played.order if number in wishes] == wishes


def test_a_promise_is_refused_where_promises_leave_no_time_and_wishes_do_not_count() -> None:
    scheduler = Scheduler(Exact(most=1))
    for _ in range(5):
        scheduler.admit([job(0.0, 6 * alone(16), promised=False)], 0.0)
        scheduler.admit([job(0.0, 7 * alone(16))], 0.0)
    before = scheduler.jobs
    with pytest.raises(RefusedError, match="5 pictures are ahead") as refusal:
        scheduler.admit([job(0.0, 3 * alone(16))], 0.0)
    assert scheduler.jobs == before, "nobody gives way to what is refused"
    assert refusal.value.nearest is not None
    assert refusal.value.nearest < 7.2 * alone(16)
    scheduler.admit([job(0.0, refusal.value.nearest + 1e-6)], 0.0)


def test_what_was_promised_elsewhere_gives_way_to_nothing_and_is_not_refused() -> None:
    scheduler = Scheduler(Exact(most=1), queue=2)
    again = replace(job(0.0, alone(16), promised=False), again=True)
    numbers = [scheduler.admit([again], 0.0)[0] for _ in range(3)]
    scheduler.queue = 10
    with pytest.raises(RefusedError, match="3 pictures are ahead"):
        scheduler.admit([job(0.0, 1.5 * alone(16))], 0.0)
    assert [each.id for each in scheduler.jobs if each.due == alone(16)] == numbers


def test_clients_take_turns_among_equal_deadlines() -> None:
    played = Played(Scheduler(Exact(most=1)))
    many = played.scheduler.admit([job(0.0, 5.0, client="a")] * 4, 0.0)
    (one,) = played.scheduler.admit([job(0.001, 5.0, client="b")], 0.001)
    played.rest()
    assert played.order.index(one) == 1
    assert [number for number in played.order if number != one] == list(many)


def test_a_new_name_for_each_picture_gains_nothing() -> None:
    played = Played(Scheduler(Exact(most=1)))
    for number in range(6):
        played.scheduler.admit([replace(job(0.0, 5.0, client="a"), user=str(number))], 0.0)
    others = [played.scheduler.admit([job(0.0, 5.0, client="b")], 0.0)[0] for _ in range(3)]
    played.rest()
    assert [played.order.index(number) for number in others] == [1, 3, 5]


def test_users_of_one_client_take_its_turns_in_turn() -> None:
    played = Played(Scheduler(Exact(most=1)))
    many = played.scheduler.admit([replace(job(0.0, 5.0, client="a"), user="u")] * 4, 0.0)
    (other,) = played.scheduler.admit([job(0.0, 5.0, client="b")], 0.0)
    (one,) = played.scheduler.admit([replace(job(0.0, 5.0, client="a"), user="v")], 0.0)
    played.rest()
    assert played.order == [many[0], other, one, *many[1:]]


def test_one_client_leaves_room_for_others() -> None:
    scheduler = Scheduler(Exact(most=1), queue=8)
    scheduler.admit([job(0.0, 10.0, client="a")] * 4, 0.0)
    scheduler.admit([job(0.0, 10.0, client="a")], 0.0)
    with pytest.raises(RefusedError, match="5 pictures of this client wait or are drawn, of 8 at most") as refusal:
        scheduler.admit([job(0.0, 10.0, client="a")], 0.0)
    assert refusal.value.wait == pytest.approx(alone(16))
    assert refusal.value.nearest is None
    scheduler.admit([job(0.0, 10.0, client="b")] * 3, 0.0)


def test_pictures_of_one_kind_share_a_run_as_long_as_that_pays() -> None:
    scheduler = Scheduler(Exact(most=4))
    scheduler.admit([job(0.0, 10.0, rows=2)] * 3, 0.0)
    scheduler.admit([job(0.0, 9.0, rows=1, model="other")], 0.0)
    first = scheduler.turn(0.0)
    assert first is not None
    assert (first.kind.model, len(first.jobs)) == ("other", 1)
    scheduler.remove(first.jobs[0])
    turn = scheduler.turn(0.0)
    assert turn is not None
    assert (len(turn.jobs), turn.rows) == (2, 4)


def test_a_new_picture_joins_at_the_next_step() -> None:
    scheduler = Scheduler(Exact(most=4))
    (first,) = scheduler.admit([job(0.0, 10.0)], 0.0)
    scheduler.stepped(first)
    (second,) = scheduler.admit([job(0.01, 10.0)], 0.01)
    turn = scheduler.turn(0.02)
    assert turn is not None
    assert turn.jobs == (first, second)


def test_what_comes_often_lowers_the_budgets_before_a_deadline_is_near() -> None:
    scheduler = Scheduler(Exact(most=1))
    now = 0.0
    for _ in range(200):  # half of what the best budget sustains, each drawn at once
        now += alone(256) / 0.5
        scheduler.remove(*scheduler.admit([job(now, 3 * alone(256))], now))
    scheduler.admit([job(now, 100.0)], now)
    assert scheduler.level(now) == 1.0
    for _ in range(200):  # and three times as much
        now += alone(256) / 1.5
        scheduler.remove(*scheduler.admit([job(now, 3 * alone(256))], now))
    assert 0.0 < scheduler.level(now) < 1.0
    assert scheduler.level(now + 100 * alone(256)) == 1.0


def test_what_is_abandoned_lowers_nobodys_budgets() -> None:
    scheduler = Scheduler(Exact(most=1))
    for number in range(60):
        now = number * alone(256) / 10
        (abandoned,) = scheduler.admit([job(now, 3 * alone(256), promised=False)], now)
        scheduler.abandon(abandoned)
    scheduler.admit([job(now, 100.0)], now)
    assert scheduler.level(now) == 1.0
    scheduler.abandon(99)  # which is not there


def test_what_is_refused_lowers_nobodys_budgets() -> None:
    scheduler = Scheduler(Exact(most=1), queue=2)
    scheduler.admit([job(0.0, 10.0), job(0.0, 10.0)], 0.0)
    before = scheduler.level(0.0)
    for deadline, promised in ((1e-3, True), (10.0, True), (0.3, False)):
        for _ in range(100):
            with pytest.raises(RefusedError):
                scheduler.admit([job(0.0, deadline, promised)] * 3, 0.0)
    assert scheduler.level(0.0) == before == 1.0


def test_what_promises_can_spare() -> None:
    scheduler = Scheduler(Exact(most=1))
    scheduler.admit([job(0.0, 0.01, promised=False)], 0.0)
    assert scheduler.spare(0.0) == math.inf
    scheduler.admit([job(0.0, 1.0)], 0.0)
    assert scheduler.spare(0.0) == pytest.approx((1 - MARGIN) - 2 * alone(16))
    assert scheduler.spare(0.5) == pytest.approx((1 - MARGIN) - 2 * alone(16) - 0.5)


def test_settled_ways_are_kept() -> None:
    scheduler = Scheduler(Exact())
    (number,) = scheduler.admit([job(0.0, 5.0)], 0.0)
    scheduler.settle(number, 0.0)
    assert scheduler.jobs[0].ways == (job(0.0, 5.0).ways[0],)
    turn = scheduler.turn(0.0)
    assert turn is not None
    assert turn.kind == kind(16)


def taken(played: Played, new: Job) -> int | None:
    """The number of a picture that is taken in; None for one that is refused, with good reason."""
    theirs = sum(job.client == new.client for job in played.scheduler.jobs)
    full = len(played.scheduler) == played.scheduler.queue or theirs > played.scheduler.queue / 2
    try:
        return played.scheduler.admit([new], played.now)[0]
    except RefusedError as error:
        refusal = error
    assert refusal.wait is None or refusal.wait >= 0
    assert new.promised or full
    assert refusal.nearest is None or refusal.nearest > new.due - new.arrived - 1e-9
    return None


arrivals = st.lists(
    st.tuples(
        st.floats(0.0, 0.4), st.floats(0.05, 2.0), st.booleans(), st.integers(1, 12), st.sampled_from("abc"), st.sampled_from((1, 2))
    ),
    min_size=1,
    max_size=14,
)


@given(arrivals, st.sampled_from((1, 2, 4)))
def test_promises_are_kept_when_steps_take_what_is_predicted(asked: list[tuple[float, float, bool, int, str, int]], most: int) -> None:
    """Whatever comes: a picture that was taken in with a deadline is done by it, but for the one step that was under way when it came."""
    played = Played(Scheduler(Exact(most), queue=10))
    due: dict[int, tuple[float, float]] = {}
    clock = 0.0
    for wait, deadline, promised, steps, client, rows in asked:
        clock += wait
        played.until(clock)
        new = job(played.now, deadline, promised, steps, client, rows)
        if (number := taken(played, new)) is None:
            continue
        if promised:
            due[number] = played.now, deadline
    played.rest()
    assert len(played.scheduler) == 0
    slack = Exact().seconds(kind(256), most) + 1e-9
    assert {number for number, (begun, deadline) in due.items() if played.done[number] > begun + deadline + slack} == set()


@given(arrivals)
def test_a_level_is_the_highest_that_keeps_everything(asked: list[tuple[float, float, bool, int, str, int]]) -> None:
    scheduler = Scheduler(Exact(2), queue=100, busy=math.inf)
    for _, deadline, _, steps, client, rows in asked:
        scheduler.admit([job(0.0, deadline, False, steps, client, rows)], 0.0)
    level = scheduler.level(0.0)

    def kept(at: float) -> bool:
        done = scheduler.finishes(scheduler.jobs, at, 0.0)
        return all(done[each.id] <= each.due * (1 - RESERVE) + 1e-12 for each in scheduler.jobs)

    levels = [step / (len(LATENTS) - 1) for step in range(len(LATENTS))]
    assert level in levels
    assert level == 0.0 or kept(level)
    assert level == 1.0 or not kept(1.0)


@given(arrivals)
def test_plans_on_paper_finish_everything_once(asked: list[tuple[float, float, bool, int, str, int]]) -> None:
    scheduler = Scheduler(Exact(4), queue=100)
    jobs = [
        replace(job(0.0, deadline, False, steps, client, rows), id=index)
        for index, (_, deadline, _, steps, client, rows) in enumerate(asked)
    ]
    done = scheduler.finishes(jobs, 1.0, 3.0)
    assert sorted(done) == list(range(len(jobs)))
    work = sum(each.way(1.0).legs[0][1] * Exact().seconds(kind(256), each.rows) + 0.001 for each in jobs)
    assert 3.0 < max(done.values()) <= 3.0 + work + 1e-9


@given(st.lists(st.sampled_from("aab"), min_size=2, max_size=12))
def test_no_client_has_its_second_before_another_has_its_first(clients: list[str]) -> None:
    played = Played(Scheduler(Exact(1), queue=100))
    owner = {played.scheduler.admit([job(0.0, 50.0, client=client)], 0.0)[0]: client for client in clients}
    played.rest()
    seen: Counter[str] = Counter()
    fewest = Counter(clients)
    for number in played.order:
        seen[owner[number]] += 1
        ahead = seen[owner[number]] - 1
        assert all(seen[other] >= min(ahead, fewest[other]) for other in fewest)


def test_a_deadline_far_away_is_no_number_to_count_with() -> None:
    scheduler = Scheduler(Exact())
    scheduler.admit([replace(job(0.0, 1.0, False), due=math.inf)], 0.0)
    assert scheduler.level(0.0) == 1.0
    assert all(a <= b for a, b in pairwise([0.0, scheduler.level(1.0)]))
