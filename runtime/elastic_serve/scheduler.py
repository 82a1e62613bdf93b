"""What runs next, at which budget, and whom to refuse: a pure object that is told the time.

Pictures go by earliest deadline first. Before each step all that is in flight is played through on paper, at one level of the budgets for
all: the highest is taken at which every deadline is kept with some time left, and at which arrivals like those of late would find a device
that is not busy all the time. So budgets fall as work comes in and rise as it is done. What cannot be kept even at the lowest level is
refused before it begins.

A picture takes no step before its prompt is read. Prompts are read beside the steps, one after the other, in the order of their pictures.
"""

import math
from bisect import bisect_right
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import count

from elastic_runtime.errors import ElasticError
from elastic_serve.demand import Demand
from elastic_serve.jobs import Job, Way
from elastic_serve.paper import LOWEST, Paper
from elastic_serve.times import Kind, Times

MARGIN = 0.15  # of a picture's time, kept for what nothing predicts; of a queue that is never empty it takes nothing
RESERVE = 0.3  # of a picture's time, that budgets leave to who comes next: what is in flight could not be made cheaper afterwards
QUEUE = 64
BUSY = 0.8  # of the device's time that arrivals may take: beyond it whoever comes next waits ever longer
AHEAD = 8  # pictures that wait with their prompts read: embeddings may take many megabytes each


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


@dataclass(frozen=True)
class Unkept:
    """Pictures that were not taken in beside the `others`, since a deadline would not be kept."""

    jobs: Sequence[Job]
    others: Sequence[Job]
    paper: Paper

    def refusal(self) -> RefusedError:
        """What is kept instead. It takes much longer to find than that they are refused, and asks nothing of the scheduler."""
        asked = max(job.due - job.arrived for job in self.jobs)
        what = f"{1e3 * asked:.0f} ms cannot be kept, not even at the cheapest budget"
        alone = replace(self.paper, reading=None).behind((), self.jobs)
        if alone > asked:
            words = f"{what} on an idle machine: the nearest deadline is {1e3 * alone:.0f} ms, allow at least that"
            return RefusedError(words, None, alone)
        nearest = self.paper.nearest(self.jobs, asked, self.others, self.paper.broken(self.others))
        wait = max(nearest - asked, 0.0)
        ahead = f"{sum(not job.yields for job in self.others)} pictures are ahead"
        return RefusedError(f"{what}: {ahead}. Allow {1e3 * nearest:.0f} ms, or try again in {wait:.2g} s", wait, nearest)


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

    def admit(self, jobs: Sequence[Job], now: float) -> tuple[int, ...]:
        """As `take`, with an Unkept's refusal raised, too."""
        taken = self.take(jobs, now)
        if isinstance(taken, Unkept):
            raise taken.refusal()
        return taken

    def take(self, jobs: Sequence[Job], now: float) -> tuple[int, ...] | Unkept:
        """Take pictures in, all or none; returns their numbers, or Unkept where a deadline that was promised, theirs or another's, would
        not be kept at the lowest level. Where a promise could not be taken in otherwise, wishes go behind it.

        Raises: RefusedError where the queue is full.
        """
        jobs = asked = self._turned(jobs)
        present, again = [*self._jobs.values()], any(job.again for job in jobs)
        if not again and len(present) + len(jobs) > self.queue:
            wait = self._room(present, len(present) + len(jobs) - self.queue, now)
            advice = "ask for fewer pictures" if wait is None else f"try again in {wait:.2g} s"
            raise RefusedError(f"the queue is full: {len(present)} pictures of at most {self.queue} wait or are drawn: {advice}", wait)
        if not again:
            self._leave_room([job for job in present if job.client == jobs[0].client], now)
        paper = self._paper(now)
        broken = paper.broken([*present, *jobs])
        before = paper.broken(present) if broken else broken
        if broken - before:
            if not any(job.promised for job in jobs):
                jobs = paper.yielding(jobs, present, before)
            else:
                last = [replace(job, due=math.inf) if job.yields else job for job in present]
                if last == present or paper.broken([*last, *jobs]) - before:
                    return Unkept(jobs, last, paper)
                firm, wishes = [job for job in present if not job.yields], [job for job in present if job.yields]
                self._jobs |= {job.id: job for job in paper.yielding(wishes, [*firm, *jobs], before)}
        for job in asked:  # what is refused will not be drawn, and says nothing of how busy the device will be
            self._demand.arrived(job.id, now, job.due - job.arrived, [self._seconds(way, job.rows) for way in job.ways])
        self._jobs |= {job.id: job for job in jobs}
        return tuple(job.id for job in jobs)

    def turn(self, now: float) -> Turn | None:
        """What to run now; None where there is nothing, or nothing whose prompt is read."""
        paper = self._paper(now)
        order = paper.order(job for job in self._jobs.values() if job.prompt is None)
        if not order:
            return None
        level = self.level(now)

        def kind_of(job: Job) -> Kind:
            return job.way(level).after(job.taken)[-1][0]

        group = paper.group(order, kind_of)
        kind, rows = kind_of(group[0]), sum(job.rows for job in group)
        return Turn(tuple(job.id for job in group), level, kind, rows, self.times.seconds(kind, rows))

    def level(self, now: float) -> float:
        """The highest level of the budgets at which every deadline is kept, by what is predicted, and the device is not too busy; the
        lowest where there is none."""
        jobs = tuple(self._jobs.values())
        steps = max((len(job.ways) for job in jobs), default=1) - 1
        if not steps:
            return 1.0
        levels, paper, share = [step / steps for step in range(steps + 1)], self._paper(now), max(self.margin, RESERVE)
        low, high = -1, bisect_right(levels, self._busy, key=lambda level: self._demand.busy(level, now))
        if high and paper.kept(jobs, levels[high - 1], share):
            return levels[high - 1]
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if paper.kept(jobs, levels[middle], share) else (low, middle)
        return levels[max(low, 0)]

    def unread(self, now: float) -> Hashable | None:
        """The prompt to read now; None where there is none, or enough pictures that come before wait with theirs read."""
        ahead = 0
        for job in self._paper(now).order(self._jobs.values()):
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
        """A picture is done."""
        self._jobs.pop(number, None)

    def abandon(self, number: int) -> None:
        """Nobody wants a picture any more: what was not drawn of it says nothing of how busy the device will be."""
        if job := self._jobs.pop(number, None):
            self._demand.abandoned(number, job.done)

    def finishes(self, jobs: Iterable[Job], level: float, now: float) -> dict[int, float]:
        """When each picture would be done if all went as predicted and nothing else came."""
        return self._paper(now).finishes(jobs, level)

    def behind(self, jobs: Sequence[Job], now: float, idle: bool = False) -> float:
        """The deadline in seconds that pictures would keep behind all others, or alone."""
        paper = self._paper(now)
        return replace(paper, reading=None).behind((), jobs) if idle else paper.behind(tuple(self._jobs.values()), jobs)

    def spare(self, now: float) -> float:
        """Seconds that may pass without a step before a promise could not be kept at the lowest level."""
        promised = [job for job in self._jobs.values() if job.promised]
        if not promised:
            return math.inf
        paper = self._paper(now)
        done = paper.finishes(self._jobs.values(), LOWEST)
        return min(paper.target(job) - done[job.id] for job in promised)

    def _paper(self, now: float) -> Paper:
        return Paper(self.times, self.margin, now, self._read)

    def _seconds(self, way: Way, rows: int) -> float:
        """What a picture takes in runs as large as pay, of which it has its share."""
        sizes = {kind: max(self.times.together(kind), rows) for kind, _ in way.legs}
        return way.finish + math.fsum(steps * self.times.seconds(kind, sizes[kind]) * rows / sizes[kind] for kind, steps in way.legs)

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
