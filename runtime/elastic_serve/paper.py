"""Pictures played through on paper, before any of it happens: by predicted times, as if nothing else came.

Earliest deadline first; among deadlines that count as equal clients take turns. Prompts are read beside the steps, one after the other, in
the order of their pictures.
"""

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from elastic_serve.jobs import Job
from elastic_serve.times import Kind, Times

EQUAL = 0.1  # of a second: deadlines within the same tenth count as equal, and clients take turns among them
SOONEST = 1e-3  # seconds to a deadline that is wished for
LOWEST = 0.0  # of the levels of the budgets; the highest is 1
HALVINGS = 10  # of what lies between a deadline that is refused and one that is kept


@dataclass(frozen=True)
class Paper:
    """What would happen from `now` on.

    margin: the share of a picture's time that is kept for what nothing predicts. reading: which prompt is being read, and when that is to
    be over.
    """

    times: Times
    margin: float
    now: float
    reading: tuple[Hashable, float] | None = None

    def finishes(self, jobs: Iterable[Job], level: float) -> dict[int, float]:
        """When each picture would be done."""
        return {job.id: time for job, time in self.played(jobs, level)}

    def played(self, jobs: Iterable[Job], level: float) -> Iterator[tuple[Job, float]]:
        """Pictures with the time when each would be done, the first one first."""
        waiting, clock = self.order(jobs), self.now
        left = {job.id: job.way(level).after(job.taken) for job in waiting}
        begins = self._begins(waiting)
        last = max(begins.values(), default=self.now)
        while waiting:
            unread = [begins[job.id] for job in waiting if begins[job.id] > clock] if clock < last else []
            if len(unread) == len(waiting):
                clock = min(unread)
                continue
            able = [job for job in waiting if begins[job.id] <= clock] if unread else waiting
            group = self.group(able, lambda job: left[job.id][-1][0])
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

    def _begins(self, order: Sequence[Job]) -> dict[int, float]:
        """When each picture's prompt would be read, after the one that is being read."""
        read = {} if self.reading is None else {self.reading[0]: max(self.reading[1], self.now)}
        last = max(read.values(), default=self.now)
        for job in order:
            if job.prompt is not None and job.prompt not in read:
                last = read[job.prompt] = last + job.reading
        return {job.id: self.now if job.prompt is None else read[job.prompt] for job in order}

    def target(self, job: Job, share: float | None = None) -> float:
        """When it is to be done, with the margin or another share of its time left over."""
        share = self.margin if share is None else share
        return job.due - share * (job.due - job.arrived) if job.due < math.inf else job.due

    def order(self, jobs: Iterable[Job]) -> list[Job]:
        """Earliest deadline first; by turn among those that count as equal, which they do for good, so that it comes as it was foreseen."""
        earliest = sorted(((self.target(job), job) for job in jobs), key=lambda each: (each[0], each[1].id))
        equal = groupby(earliest, lambda each: math.floor(each[0] / EQUAL) if each[0] < math.inf else math.inf)
        return [job for _, group in equal for job in _in_turn([job for _, job in group])]

    def group(self, order: Sequence[Job], kind_of: Callable[[Job], Kind]) -> list[Job]:
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

    def kept(self, jobs: Iterable[Job], level: float, share: float) -> bool:
        """Whether all would be done with a share of their time left."""
        return all(time <= self.target(job, share) for job, time in self.played(jobs, level))

    def broken(self, jobs: Sequence[Job]) -> set[int]:
        """Promises that would not be kept at the lowest level."""
        done = self.finishes(jobs, LOWEST)
        return {job.id for job in jobs if job.promised and done[job.id] > self.target(job)}

    def yielding(self, jobs: Sequence[Job], others: Sequence[Job], broken: set[int]) -> list[Job]:
        """Pictures that were promised to nobody, as early as no promise of the `others` is broken for them that is not `broken` anyway."""
        last = [replace(job, due=math.inf) for job in jobs]
        near = [job for job in jobs if job.due < math.inf]
        if not near:
            return last
        asked = max(min(job.due for job in near) - self.now, SOONEST)
        nearest = self.nearest(near, asked, [*others, *(job for job in jobs if job.due == math.inf)], broken)
        later = [replace(job, due=max(job.due, self.now + nearest)) for job in jobs]
        return last if self.broken([*others, *later]) - broken else later

    def behind(self, others: Sequence[Job], jobs: Sequence[Job]) -> float:
        """The deadline in seconds that `jobs` would keep behind all `others`."""
        last = [replace(job, due=math.inf) for job in jobs]
        done = self.finishes([*others, *last], LOWEST)
        return (max(done[job.id] for job in last) - self.now) / (1 - self.margin)

    def nearest(self, jobs: Sequence[Job], asked: float, others: Sequence[Job], broken: set[int]) -> float:
        """The shortest deadline longer than the one that was `asked` with which `jobs` would be taken in beside `others`, of whose promises
        some are `broken` anyway."""
        low, high = asked, max(self.behind(others, jobs), asked)
        for _ in range(HALVINGS):
            middle = math.sqrt(low * high)
            later = [replace(job, due=max(job.due, self.now + middle)) for job in jobs]
            low, high = (middle, high) if self.broken([*others, *later]) - broken else (low, middle)
        return high


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
