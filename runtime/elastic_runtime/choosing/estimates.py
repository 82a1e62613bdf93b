"""What a policy may know before it chooses: the ways to draw, their time, memory and quality here, and the pace of
late."""

import contextlib
import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np

from elastic_runtime.choosing import calibration
from elastic_runtime.choosing.cost import Costs, Point
from elastic_runtime.choosing.option import Choice, Option
from elastic_runtime.contract.axis import Axis
from elastic_runtime.contract.budget import Budget
from elastic_runtime.contract.manifest import Manifest
from elastic_runtime.contract.precision import EXACT
from elastic_runtime.denoising.guidance import Guidance
from elastic_runtime.device import Clock, Device, Memory, memory_now, probe, resident_bytes
from elastic_runtime.errors import MissingError
from elastic_runtime.sampling.course import Course
from elastic_runtime.sessions.session import Session

CLIP = 8.0  # a step this many times slower or faster than predicted tells of a clock or a hang, not of the pace
WEIGHT = 0.3  # of the latest step in the pace
KINDS = 64  # of drawings whose prospects are kept

Value = TypeVar("Value")
# guided and other evaluations of the model in each step of a stage
Evaluations = tuple[np.ndarray, np.ndarray]


class Gauge:
    """How fast a session is here: predictions, made when first asked for, and the pace of the latest steps against
    them.

    Looking at the device and measuring is done once for a session, and is no part of any picture's time: see `spent`. Threads may share a
    gauge.

    `finish()` makes a picture of a last state and `preview()` does what leads to a plan's second stage, both to be
    timed. `opened` are the bytes that the process held when the session was opened, at its peak unless an earlier one hides
    that, which then is `before`. `memory()` tells what the machine has free, and `held()` what the process holds, now.
    """

    def __init__(
        self,
        session: Session,
        manifest: Manifest,
        finish: Callable[[], object] | None,
        clock: Clock,
        opened: int | None = None,
        device: Callable[[], Device] = probe,
        preview: Callable[[], object] | None = None,
        before: int = 0,
        memory: Callable[[], Memory] = memory_now,
        held: Callable[[], int | None] = resident_bytes,
    ):
        self.session, self.manifest = session, manifest
        self.opened, self.before = opened, before
        self.pace = 1.0
        self._memory, self._held = memory, held
        self._kept, self._least = 0, math.inf
        self._spent, self._lock = threading.local(), threading.RLock()
        self._measured: dict[str, Any] = {}
        self._ran: set[tuple[Budget, int]] = set()
        self._finish, self._preview, self._clock, self._probe = finish, preview, clock, device
        self._prospects: Callable[[Hashable], dict[Any, Any]] = lru_cache(KINDS)(lambda kind: {})

    @property
    def spent(self) -> float:
        """Seconds that looking at the device and measuring took this thread, waiting for another that measures included."""
        return float(getattr(self._spent, "seconds", 0.0))

    @property
    def device(self) -> Device:
        """What was found here."""
        return self._once("device", self._probe)

    @property
    def available(self) -> int | None:
        """Bytes that a run may take now: what the machine has free, and what earlier runs left in this process for the next one. None
        where the system does not tell."""
        free, held = self._memory().available, self._held()
        return free if free is None or held is None else free + int(max(min(self._kept, held - self._least), 0))

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """A picture is drawn within; what the process then holds more is left for the next one."""
        begun = self._held()
        yield
        ended = self._held()
        if begun is not None and ended is not None:
            with self._lock:
                self._kept, self._least = self._kept + max(ended - begun, 0), min(self._least, begun)

    @property
    def budgets(self) -> tuple[Budget, ...]:
        """What the session offers, cheapest first, thinned out where it is very much."""

        def offered() -> tuple[Budget, ...]:
            work, axes = Costs(self.manifest, self.prior.rates).work, self.session.axes(self.manifest.axes)
            return tuple(sorted(calibration.offered(axes, self.session.budgets), key=lambda budget: work(budget).flops))

        return self._once("budgets", offered)

    @property
    def prior(self) -> Costs:
        """Costs by the device's peak rates or, where a calibration is kept, by that; nothing is measured."""

        def prior() -> Costs:
            kept = calibration.load(calibration.identity(self.session, self.manifest, self.device))
            return self._costs(kept.points if kept else ())

        return self._once("prior", prior)

    @property
    def peak(self) -> Costs:
        """Costs by the device's peak rates alone: the same before and after a calibration."""
        return self._once("peak", lambda: self._costs(()))

    @property
    def calibrated(self) -> calibration.Calibration:
        """The calibration of this session here, measured now if none is kept."""

        def calibrated() -> calibration.Calibration:
            return calibration.calibrate(calibration.identity(self.session, self.manifest, self.device), self._measure)

        return self._once("calibration", calibrated)

    @property
    def costs(self) -> Costs:
        """Costs by measured points."""
        return self._once("costs", lambda: self._costs(self.calibrated.points))

    def prospects(self, kind: Hashable) -> dict[Any, Any]:
        """What outlooks of one kind of drawing have worked out: the next picture of that kind need not do it again."""
        return self._prospects(kind)

    def first(self, runs: Iterable[tuple[Budget, int]]) -> bool:
        """Whether some of these budgets and batches have not been run since the session was opened; from now on they have.

        A first run at a shape plans its memory, takes it and wakes its threads: it tells nothing of the pace.
        """
        new = set(runs) - self._ran
        self._ran |= new
        return bool(new)

    def observe(self, predicted: float, seconds: float) -> None:
        """Take one step into the pace, measured over predicted; it outlives the picture, as a hot chip does."""
        ratio = clipped(predicted, seconds)
        self.pace += WEIGHT * (ratio - self.pace)

    def _once(self, name: str, work: Callable[[], Value]) -> Value:
        """What `work` gives, done by the first thread that asks; the others wait for it."""
        if name not in self._measured:
            within, begun = getattr(self._spent, "within", False), self._clock()
            self._spent.within = True  # what asks for more of it is one measuring
            try:
                with self._lock:
                    if name not in self._measured:
                        self._measured[name] = work()
            finally:
                self._spent.within = within
                if not within:
                    self._spent.seconds = self.spent + max(self._clock() - begun, 0.0)
        value: Value = self._measured[name]
        return value

    def _costs(self, points: Iterable[Point]) -> Costs:
        precision = self.session.origin.precision if self.session.origin else EXACT
        return Costs(self.manifest, calibration.rates(self.session, self.device), precision, points)

    def _measure(self) -> calibration.Measured:
        points = calibration.points(self.session, self.manifest, self.budgets, self._clock, opened=self.opened)
        self.first((Budget(**point.budget), point.batch) for point in points)
        return calibration.Measured(points, self._seconds(self._finish), self._seconds(self._preview))

    def _seconds(self, work: Callable[[], object] | None) -> float:
        """Of two runs the second."""
        if work is None:
            return 0.0
        work()
        begun = self._clock()
        work()
        return max(self._clock() - begun, 0.0)


def improving(ways: Iterable[tuple[float, float, Value]]) -> Iterator[tuple[float, Value]]:
    """Of (seconds, worth, way) those that are worth their time, with the seconds: each takes longer than the one before, and is better."""
    best = -float("inf")
    for seconds, worth, way in sorted(ways, key=lambda each: (each[0], -each[1])):
        if worth > best:
            best = worth
            yield seconds, way


def clipped(predicted: float, seconds: float) -> float:
    """`seconds` over `predicted`, within what a pace can be; a clock that went backwards counts as no news."""
    if not (seconds >= 0 and predicted > 0):  # nan, too
        return 1.0
    return min(max(seconds / predicted, 1 / CLIP), CLIP)


class Outlook(ABC):
    """One drawing's prospects: `count` pictures at once, with a guidance.

    `steps` are those that were asked for, where that was said. `finishes` tells whether the last state becomes a
    picture, which takes time of its own. What is open to choice differs with the model: budgets on its axes
    (`BudgetOutlook`), or plans (`PlanOutlook`). `others` is what else tells two drawings apart.
    """

    named: str  # what a user names instead of leaving the choice to a policy
    table: str  # what a quality table for it holds
    smaller: str  # what needs less memory and time
    grading: str  # what else could be done where there is no table of quality, after a comma
    least = 1  # steps that a run takes
    step_seconds: float | None = None  # of the last step alone, without what a caller did behind it

    def __init__(self, gauge: Gauge, count: int, guidance: Guidance, steps: int | None, finishes: bool, *others: Hashable):
        self.gauge, self.count, self.guidance, self.steps, self.finishes = gauge, count, guidance, steps, finishes
        self._prospects = gauge.prospects((type(self), count, guidance, steps, finishes, *others))

    @property
    def axes(self) -> Sequence[Axis]:
        """The model's axes."""
        return self.gauge.manifest.axes

    @property
    def pace(self) -> float:
        """Seconds of late steps over what was predicted for them; 1 where none was predicted yet."""
        return self.gauge.pace

    @property
    def finish(self) -> float:
        """Predicted seconds from the last step to the pictures."""
        return self.gauge.calibrated.finish * self.area * self.count if self.finishes else 0.0

    @property
    def area(self) -> float:
        """The picture's, over that of the one whose last part was measured."""
        return 1.0

    @property
    def routed(self) -> bool:
        """Whether a router sizes the steps, so that a budget is only a cap."""
        return any(axis.input == "slots" for axis in self.axes)

    @property
    @abstractmethod
    def graded(self) -> bool:
        """Whether the bundle's card has a quality table for what is open to choice."""

    @abstractmethod
    def quality(self, option: Option) -> float:
        """Accuracy over the best of the card's table; without a table a number that only ranks."""

    @abstractmethod
    def distance(self, option: Option) -> float:
        """The Frechet distance of pictures to real ones over the least of the card's table; 1 without a table."""

    def worth(self, option: Option) -> float:
        """What ways to draw are ranked by: quality over distance, since what a judge recognises alike may look very different."""
        return self.quality(option) / self.distance(option)

    @abstractmethod
    def options(self, guidance_budget: Budget | None = None) -> list[Option]:
        """Ways to draw, cheapest first.

        Raises: BudgetError where no budget lies above the weak branch's.
        """

    @abstractmethod
    def usual(self, options: Sequence[Option]) -> Option:
        """The one of `options` that is nearest to what is drawn where nothing is asked for."""

    @abstractmethod
    def fixed(self, budget: Budget, guidance_budget: Budget | None) -> Option:
        """What was asked for, checked.

        Raises: BudgetError for what the axes do not offer.
        """

    @abstractmethod
    def check(self, choice: Choice, index: int = 0) -> None:
        """Raise UsageError for a choice for step `index` that this model does not take."""

    @abstractmethod
    def course(self, option: Option, steps: int | None = None) -> Course:
        """The whole run of an option, in its own number of steps or another."""

    @abstractmethod
    def evaluations(self, course: Course) -> list[Evaluations]:
        """For each stage still to come: how many evaluations of the model each step takes that are guided, and how many
        that are not."""

    @abstractmethod
    def runs(self, option: Option, stage: int, guided: bool) -> list[tuple[Budget, int]]:
        """Budget and batch of every run that one evaluation for all pictures takes."""

    @abstractmethod
    def peak_seconds(self, option: Option) -> float:
        """What a guided option takes by the device's peak rates alone, for comparing options; nothing is measured."""

    def entering(self, option: Option) -> float:
        """Predicted seconds that lead from one stage of an option to the next."""
        return 0.0

    def seconds(self, option: Option, stage: int, guided: bool, costs: Costs | None = None) -> float:
        """Predicted seconds of one evaluation for all pictures, by measured costs unless others are given."""
        costs = costs or self.gauge.costs
        key = (id(costs), option.budgets[stage], option.guidance_budgets[stage], stage, len(option.steps), guided)
        return self._kept(key, lambda: sum(costs.seconds(*run) for run in self.runs(option, stage, guided)))

    def over(self, option: Option, course: Course) -> float:
        """Predicted seconds of all steps of a course."""
        seconds = 0.0
        for index, (guided, plain) in enumerate(self.evaluations(course)):
            stage = course.first + index
            seconds += int(guided.sum()) * self.seconds(option, stage, True) if guided.any() else 0.0
            seconds += int(plain.sum()) * self.seconds(option, stage, False) if plain.any() else 0.0
            seconds += self.entering(option) if stage and (index or course.enters) else 0.0
        return seconds

    def first(self, option: Option, course: Course) -> bool:
        """Whether the next step is the first that the session runs in this way; from now on it is not."""
        guided, plain = self.evaluations(course)[0]
        kinds = [kind for kind, count in ((True, guided[0]), (False, plain[0])) if count]
        return self.gauge.first(run for kind in kinds for run in self.runs(option, course.first, kind))

    def step(self, option: Option, course: Course) -> float:
        """Predicted seconds of the next step of a course."""
        guided, plain = self.evaluations(course)[0]
        seconds = self.entering(option) if course.enters else 0.0
        for count, kind in ((int(guided[0]), True), (int(plain[0]), False)):
            seconds += count * self.seconds(option, course.first, kind) if count else 0.0
        return seconds

    def whole(self, option: Option) -> float:
        """Predicted seconds of all steps of a whole run in the option's own number of them."""
        return self.over(option, self.course(option))

    def picture(self, option: Option, steps: int | None = None) -> float:
        """Predicted seconds of whole pictures, in the option's own number of steps or another."""
        return (self.whole(option) if steps is None else self.over(option, self.course(option, steps))) + self.finish

    def memory(self, option: Option) -> float:
        """Predicted peak bytes of this process: what it held when the session was open, and the most that a run adds, or what it had
        held before where that was more.

        Nothing is measured for it: a run at the largest budget could take the very memory that is to be saved.

        Raises: MissingError where the system does not tell what a process holds.
        """
        if self.gauge.opened is None:
            raise MissingError("this system does not tell how much memory a process holds, so no limit of it can be kept: leave it out")
        return max(self.gauge.opened + self.growth(option), self.gauge.before)

    def growth(self, option: Option) -> float:
        """Predicted bytes that a run adds."""
        guided = self.guidance.scale > 1
        stages = range(len(option.steps))
        return max(self.gauge.prior.growth(*run) for stage in stages for run in self.runs(option, stage, guided))

    def frontier(self, guidance_budget: Budget | None = None, least: int = 1) -> dict[Option, float]:
        """Ways that are worth their time, each with the seconds of its whole run: each takes longer than the one before, and is better. Of
        plans these are weighed in every number of steps that may be worth it.

        Options of fewer than `least` steps are left out, or than the most that there are.
        """
        frontier: dict[Option, float] = self._kept(("frontier", guidance_budget, least), lambda: self._frontier(guidance_budget, least))
        return frontier

    @abstractmethod
    def _frontier(self, guidance_budget: Budget | None, least: int) -> dict[Option, float]:
        """See `frontier`."""

    def _kept(self, key: Hashable, work: Callable[[], Value]) -> Value:
        """What `work` gives, done once for all pictures of this kind."""
        if key not in self._prospects:
            self._prospects[key] = work()
        value: Value = self._prospects[key]
        return value
