"""What runs next, at which budget, and whom to refuse: a pure object that is told the time.

Pictures go by earliest deadline first. Before each step all that is in flight is played through on paper, at one level of the budgets for
all: the highest is taken at which every deadline is kept with some time left, and at which arrivals like those of late would find a device
that is not busy all the time. So budgets fall as work comes in and rise as it is done. What cannot be kept even at the lowest level is
refused before it begins.

A picture takes no step before its prompt is read. Prompts are read beside the steps, one after the other, in the order of their pictures.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import NoReturn

from elastic_runtime.errors import ElasticError
from elastic_serve.demand import Demand
from elastic_serve.times import Kind, Times

MARGIN = 0.15  # of a picture's time, kept for what nothing predicts; of a queue that is never empty it takes nothing
RESERVE = 0.3  # of a picture's time, that budgets leave to who comes next: what is in flight could not be made cheaper afterwards
EQUAL = 0.1  # seconds between deadlines that count as equal, among which clients take turns
QUEUE = 64
BUSY = 0.8  # of the device's time that arrivals may take: beyond it whoever comes next waits ever longer
LOWEST = 0.0  # of the levels of the budgets; the highest is 1
AHEAD = 8  # pictures that wait with their prompts read: embeddings may take many megabytes each
HALVINGS = 10  # of what lies between a deadline that is refused and one that is kept


@dataclass(frozen=True)
class Way:
    """One way to draw a picture: its steps of each kind, in order, and the seconds from its last step to the picture."""

    legs: tuple[tuple[Kind, int], ...]
    finish: float = 0.0

    def after(self, taken: int) -> list[tuple[Kind, int]]:
        """What is left after so many steps, the last leg first."""
        left: list[tuple[Kind, int]] = []
        for kind, steps in self.legs:
            done = min(taken, steps)
            taken -= done
            if steps > done:
                left.append((kind, steps - done))
        return left[::-1]


@dataclass(frozen=True)
class Job:
    """A picture to be drawn, in one of its `ways`, cheapest first.

    due: when it should be done, on the scheduler's clock; `promised` tells a deadline that was asked for, and is kept or refused, from one
    that is a wish. rows: of the denoiser's batch in each step. client: whose turns it takes; user: who among that client's. turn and own
    count the turns of both. prompt: what is to be read before its first step, in `reading` seconds, once for all whose prompts are equal;
    None where nothing is.
    """

    id: int
    client: str
    arrived: float
    due: float
    promised: bool
    rows: int
    ways: tuple[Way, ...]
    taken: int = 0
    turn: int = 0
    user: str = ""
    own: int = 0
    prompt: Hashable | None = None
    reading: float = 0.0

    def way(self, level: float) -> Way:
        """The way at a level of the budgets, from 0, the cheapest, to 1."""
        return self.ways[math.floor(level * (len(self.ways) - 1) + 0.5)]

    @property
    def started(self) -> bool:
        return self.taken > 0


@dataclass(frozen=True)
class Turn:
    """What runs now: one step of these pictures, all of one kind, in the way of `level`; `predicted` is its seconds."""

    jobs: tuple[int, ...]
    level: float
    kind: Kind
    rows: int
    predicted: float


class RefusedError(ElasticError):
    """A picture that is not begun.

    wait: seconds after which to ask again; None where waiting does not help. nearest: the shortest deadline that would be kept now, in
    seconds.
    """

    exit_code = 1

    def __init__(self, message: str, wait: float | None, nearest: float | None = None):
        super().__init__(message)
        self.wait, self.nearest = wait, nearest


class Scheduler:
    """The pictures in flight and waiting, `queue` of them at most. Not for several threads at once."""

    def __init__(self, times: Times, queue: int = QUEUE, margin: float = MARGIN, busy: float = BUSY):
        self.times, self.queue, self.margin = times, queue, margin
        self._busy, self._demand = busy, Demand()
        self._jobs: dict[int, Job] = {}
        self._read: tuple[Hashable, float] | None = None  # which prompt is being read, and when that is to be over
        self._numbers = count()

    def __len__(self) -> int:
        return len(self._jobs)

    @property
    def jobs(self) -> tuple[Job, ...]:
        return tuple(self._jobs.values())

    @property
    def waiting(self) -> int:
        """Pictures that no step was taken of."""
        return sum(not job.started for job in self._jobs.values())

    def admit(self, jobs: Sequence[Job], now: float, again: bool = False) -> tuple[int, ...]:
        """Take pictures in, all or none; returns their numbers. Those that were taken in `again`, elsewhere before, are not refused.

        Raises: RefusedError where the queue is full, or a deadline that was promised, theirs or another's, would not be
        kept at the lowest level.
        """
        jobs = asked = self._turned(jobs)
        present = [*self._jobs.values()]
        if not again and len(present) + len(jobs) > self.queue:
            wait = self._room(present, len(present) + len(jobs) - self.queue, now)
            advice = "ask for fewer pictures" if wait is None else f"try again in {wait:.2g} s"
            raise RefusedError(f"the queue is full: {len(present)} pictures of at most {self.queue} wait or are drawn: {advice}", wait)
        if not again:
            self._leave_room([job for job in present if job.client == jobs[0].client], now)
        broken = self._broken([*present, *jobs], now)
        if broken and broken - self._broken(present, now):
            if any(job.promised for job in jobs):
                self._refuse(jobs, now)
            jobs = self._yielding(jobs, now)
        for job in asked:  # what is refused will not be drawn, and says nothing of how busy the device will be
            self._demand.arrived(now, job.due - job.arrived, [self._seconds(way, job.rows) for way in job.ways])
        self._jobs |= {job.id: job for job in jobs}
        return tuple(job.id for job in jobs)

    def turn(self, now: float) -> Turn | None:
        """What to run now; None where there is nothing, or nothing whose prompt is read."""
        order = self._order(job for job in self._jobs.values() if job.prompt is None)
        if not order:
            return None
        level = self.level(now)

        def kind_of(job: Job) -> Kind:
            return job.way(level).after(job.taken)[-1][0]

        group = self._group(order, kind_of)
        kind, rows = kind_of(group[0]), sum(job.rows for job in group)
        return Turn(tuple(job.id for job in group), level, kind, rows, self.times.seconds(kind, rows))

    def level(self, now: float) -> float:
        """The highest level of the budgets at which every deadline is kept, by what is predicted, and the device is not too busy; the
        lowest where there is none."""
        jobs = tuple(self._jobs.values())
        steps = max((len(job.ways) for job in jobs), default=1) - 1
        if not steps:
            return 1.0
        levels = [step / steps for step in range(steps + 1)]
        low, high = -1, bisect_right(levels, self._busy, key=lambda level: self._demand.busy(level, now))
        if high and self._kept(jobs, levels[high - 1], now):
            return levels[high - 1]
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._kept(jobs, levels[middle], now) else (low, middle)
        return levels[max(low, 0)]

    def unread(self, now: float) -> Hashable | None:
        """The prompt to read now; None where there is none, or enough pictures that come before wait with theirs read."""
        ahead = 0
        for job in self._order(self._jobs.values()):
            if job.prompt is not None:
                self._read = job.prompt, now + job.reading
                return job.prompt
            ahead += not job.started
            if ahead == AHEAD:
                break
        return None

    def read(self, prompt: Hashable) -> tuple[int, ...]:
        """Note that a prompt was read; returns the pictures that waited for it."""
        self._read = None
        numbers = tuple(job.id for job in self._jobs.values() if job.prompt == prompt)
        self._jobs |= {number: replace(self._jobs[number], prompt=None) for number in numbers}
        return numbers

    def stepped(self, number: int) -> Job:
        """Note that a picture took a step."""
        job = self._jobs[number] = replace(self._jobs[number], taken=self._jobs[number].taken + 1)
        return job

    def settle(self, number: int, level: float) -> None:
        """Keep a picture to the way that it was begun in."""
        job = self._jobs[number]
        self._jobs[number] = replace(job, ways=(job.way(level),))

    def remove(self, number: int) -> None:
        """A picture is done, or nobody wants it any more."""
        self._jobs.pop(number, None)

    def finishes(self, jobs: Iterable[Job], level: float, now: float) -> dict[int, float]:
        """When each picture would be done if all went as predicted and nothing else came."""
        return {job.id: time for job, time in self._played(jobs, level, now)}

    def behind(self, jobs: Sequence[Job], now: float, idle: bool = False) -> float:
        """The deadline in seconds that pictures would keep behind all others, or alone."""
        return self._behind(() if idle else tuple(self._jobs.values()), jobs, now, idle)

    def spare(self, now: float) -> float:
        """Seconds that may pass without a step before a promise could not be kept at the lowest level."""
        promised = [job for job in self._jobs.values() if job.promised]
        if not promised:
            return math.inf
        done = self.finishes(self._jobs.values(), LOWEST, now)
        return min(self._target(job) - done[job.id] for job in promised)

    def _played(self, jobs: Iterable[Job], level: float, now: float, idle: bool = False) -> Iterator[tuple[Job, float]]:
        """Pictures with the time when each would be done, the first one first."""
        waiting, clock = self._order(jobs), now
        left = {job.id: job.way(level).after(job.taken) for job in waiting}
        begins = self._begins(waiting, now, None if idle else self._read)
        last = max(begins.values(), default=now)
        while waiting:
            unread = [begins[job.id] for job in waiting if begins[job.id] > clock] if clock < last else []
            if len(unread) == len(waiting):
                clock = min(unread)
                continue
            able = [job for job in waiting if begins[job.id] <= clock] if unread else waiting
            group = self._group(able, lambda job: left[job.id][-1][0])
            kind, rows = left[group[0].id][-1][0], sum(job.rows for job in group)
            steps, seconds = min(left[job.id][-1][1] for job in group), self.times.seconds(kind, rows)
            if unread and steps * seconds > min(unread) - clock:
                steps = min(steps, math.ceil((min(unread) - clock) / seconds))
            clock += steps * seconds
            for job in group:
                ahead = left[job.id]
                same, more = ahead.pop()
                if more > steps:
                    ahead.append((same, more - steps))
                if not ahead:
                    clock += job.way(level).finish
                    waiting.remove(job)
                    yield job, clock

    def _begins(self, order: Sequence[Job], now: float, reading: tuple[Hashable, float] | None) -> dict[int, float]:
        """When each picture's prompt would be read, after the one that is being read."""
        read = {} if reading is None else {reading[0]: max(reading[1], now)}
        last = max(read.values(), default=now)
        for job in order:
            if job.prompt is not None and job.prompt not in read:
                last = read[job.prompt] = last + job.reading
        return {job.id: now if job.prompt is None else read[job.prompt] for job in order}

    def _seconds(self, way: Way, rows: int) -> float:
        """What a picture takes in runs as large as pay, of which it has its share."""
        sizes = {kind: max(self.times.together(kind), rows) for kind, _ in way.legs}
        return way.finish + math.fsum(steps * self.times.seconds(kind, sizes[kind]) * rows / sizes[kind] for kind, steps in way.legs)

    def _target(self, job: Job, share: float | None = None) -> float:
        """When it is to be done, with the margin or another share of its time left over."""
        share = self.margin if share is None else share
        return job.due - share * (job.due - job.arrived) if job.due < math.inf else job.due

    def _order(self, jobs: Iterable[Job]) -> list[Job]:
        """Earliest deadline first; among equal deadlines by turn."""
        groups, begin = list[list[Job]](), -math.inf
        for target, job in sorted(((self._target(job), job) for job in jobs), key=lambda each: (each[0], each[1].id)):
            if target - begin > EQUAL:
                begin = target
                groups.append([])
            groups[-1].append(job)
        return [job for group in groups for job in _in_turn(group)]

    def _turned(self, jobs: Iterable[Job]) -> list[Job]:
        """New pictures with their turns: each of a client's comes after its others, and none of anybody's before those that wait; so do
        those of a user among the client's."""
        turns, first = dict[str, int](), min((job.turn for job in self._jobs.values()), default=0)
        owns, firsts = dict[tuple[str, str], int](), dict[str, int]()
        for job in self._jobs.values():
            turns[job.client] = max(turns.get(job.client, 0), job.turn + 1)
            owns[job.client, job.user] = max(owns.get((job.client, job.user), 0), job.own + 1)
            firsts[job.client] = min(firsts.get(job.client, job.own), job.own)
        turned = []
        for job in jobs:
            turn = max(turns.get(job.client, 0), first)
            own = max(owns.get((job.client, job.user), 0), firsts.get(job.client, 0))
            turns[job.client], owns[job.client, job.user] = turn + 1, own + 1
            turned.append(replace(job, id=next(self._numbers), turn=turn, own=own))
        return turned

    def _group(self, order: Sequence[Job], kind_of: Callable[[Job], Kind]) -> list[Job]:
        """The first picture, and those after it that may share its run, as many as pay."""
        head, *others = order
        kind, group, rows = kind_of(head), [head], head.rows
        most = self.times.together(kind)
        for job in others:
            if rows + 1 > most:
                break
            if rows + job.rows <= most and kind_of(job) == kind:
                group.append(job)
                rows += job.rows
        return group

    def _kept(self, jobs: Sequence[Job], level: float, now: float) -> bool:
        """Whether all would be done in time, with something left for who comes next."""
        share = max(self.margin, RESERVE)
        return all(time <= self._target(job, share) for job, time in self._played(jobs, level, now))

    def _broken(self, jobs: Sequence[Job], now: float) -> set[int]:
        """Promises that would not be kept at the lowest level."""
        done = self.finishes(jobs, LOWEST, now)
        return {job.id for job in jobs if job.promised and done[job.id] > self._target(job)}

    def _refuse(self, jobs: Sequence[Job], now: float) -> NoReturn:
        present = tuple(self._jobs.values())
        asked = max(job.due - job.arrived for job in jobs)
        what = f"{1e3 * asked:.0f} ms cannot be kept, not even at the cheapest budget"
        alone = self.behind(jobs, now, idle=True)
        if alone > asked:
            raise RefusedError(f"{what} on an idle machine: the nearest deadline is {1e3 * alone:.0f} ms, allow at least that", None, alone)
        nearest = self._nearest(present, jobs, asked, now)
        wait = max(nearest - asked, 0.0)
        ahead = f"{len(present)} pictures are ahead"
        raise RefusedError(f"{what}: {ahead}. Allow {1e3 * nearest:.0f} ms, or try again in {wait:.2g} s", wait, nearest)

    def _yielding(self, jobs: Sequence[Job], now: float) -> list[Job]:
        """Pictures that were promised to nobody, as early as no promise is broken for them."""
        present = tuple(self._jobs.values())
        asked = max(job.due - job.arrived for job in jobs)
        later = [replace(job, due=now + self._nearest(present, jobs, asked, now)) for job in jobs]
        if self._broken([*present, *later], now) - self._broken(present, now):
            return [replace(job, due=math.inf) for job in jobs]
        return later

    def _behind(self, others: Sequence[Job], jobs: Sequence[Job], now: float, idle: bool = False) -> float:
        """The deadline that `jobs` would keep behind all `others`; `idle` where no prompt is being read, either."""
        last = [replace(job, due=math.inf) for job in jobs]
        done = {job.id: time for job, time in self._played([*others, *last], LOWEST, now, idle)}
        return (max(done[job.id] for job in last) - now) / (1 - self.margin)

    def _nearest(self, others: Sequence[Job], jobs: Sequence[Job], asked: float, now: float) -> float:
        """The shortest deadline longer than the one that was `asked` with which `jobs` would be taken in."""
        broken = self._broken(others, now)
        low, high = asked, max(self._behind(others, jobs, now), asked)
        for _ in range(HALVINGS):
            middle = math.sqrt(low * high)
            later = [replace(job, due=now + middle) for job in jobs]
            low, high = (middle, high) if self._broken([*others, *later], now) - broken else (low, middle)
        return high

    def _leave_room(self, theirs: Sequence[Job], now: float) -> None:
        """Raise RefusedError for a client whose pictures are more than half of what the queue holds."""
        if len(theirs) <= self.queue / 2:
            return
        wait = self._room(theirs, len(theirs) - self.queue // 2, now)
        words = f"{len(theirs)} pictures of this client wait or are drawn, of {self.queue} at most, and half of those are for others"
        raise RefusedError(f"{words}: try again in {wait:.2g} s", wait)

    def _room(self, jobs: Sequence[Job], places: int, now: float) -> float | None:
        """Seconds until so many of these pictures are done at the lowest level."""
        finishes = self.finishes(self._jobs.values(), LOWEST, now)
        done = sorted(finishes[job.id] for job in jobs)
        return done[places - 1] - now if 0 < places <= len(done) else None


def _in_turn(jobs: Sequence[Job]) -> list[Job]:
    """Pictures with deadlines that count as equal, in order of these: clients take turns, and the turns of a client its users."""
    clients: dict[str, list[tuple[int, Job]]] = {}
    for place, job in enumerate(jobs):
        clients.setdefault(job.client, []).append((place, job))
    keyed = []
    for theirs in clients.values():
        turns = sorted(job.turn for _, job in theirs)
        keyed += [(turn, place, job) for turn, (place, job) in zip(turns, sorted(theirs, key=lambda each: each[1].own), strict=True)]
    return [job for _, _, job in sorted(keyed, key=lambda each: each[:2])]
