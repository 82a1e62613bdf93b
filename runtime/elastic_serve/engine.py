"""The thread that draws: it asks the scheduler what is next, and takes the step. Prompts are read on another."""

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from elastic_runtime.device import Clock
from elastic_runtime.drawing.drawing import Texts
from elastic_runtime.errors import ElasticError
from elastic_runtime.pipeline import ElasticPipeline
from elastic_runtime.request import Request, Result
from elastic_serve.body import BodyError
from elastic_serve.jobs import Job
from elastic_serve.metrics import Metrics
from elastic_serve.reading import Reader
from elastic_serve.scheduler import RefusedError, Scheduler, Turn, Unkept
from elastic_serve.served import Prompt, Prospect, Served, Steered
from elastic_serve.times import Learned
from elastic_serve.together import Drawing, pause, step

_log = logging.getLogger(__name__)
WISH = 3.0  # times a picture at its best budget: when one is wished for whose request says nothing
SOON = 0.25  # seconds that nobody minds


class ClosingError(ElasticError):
    """A picture that is not drawn since the server ends."""

    exit_code = 1


@dataclass(frozen=True)
class Stepped:
    """A picture took step `index` of `steps`; `preview` is what it looks like by now, where that was asked for."""

    index: int
    steps: int
    preview: Any = None


@dataclass(frozen=True)
class Drawn:
    """A picture is done: after `seconds`, `late` by so many where a deadline was promised and missed."""

    result: Result
    seconds: float
    late: float


@dataclass(frozen=True)
class Failed:
    """A picture could not be drawn."""

    error: Exception


Event = Stepped | Drawn | Failed


@dataclass(frozen=True)
class Order:
    """One picture as it is asked for; `tell` is called from the engine's threads.

    deadline: seconds, from when it was `received` on the engine's clock, or None. most: steps that it may have, whoever chose them. again:
    whether a server that is gone had taken it in: it is not refused, however late it will be.
    """

    served: Served
    request: Request
    tell: Callable[[Event], None]
    received: float
    client: str = ""
    deadline: float | None = None
    quality: str = "auto"
    previews: int = 0
    most: int | None = None
    user: str = ""
    again: bool = False


@dataclass
class _Flight:
    """A picture that was taken in."""

    order: Order
    prospect: Prospect
    job: Job
    texts: Texts | None = None  # what its prompt was read as
    drawing: Drawing | None = None
    policy: Steered | None = None
    previews: frozenset[int] = frozenset()
    seen: np.ndarray | None = None
    steps: int = 0
    taken: int = 0


class Engine:
    """Draws what it is given, on one thread, and reads its prompts on another, until it is closed. Any thread may `submit` and `cancel`."""

    def __init__(
        self,
        models: Sequence[Served],
        metrics: Metrics,
        scheduler: Callable[[Learned], Scheduler] = Scheduler,
        clock: Clock = time.monotonic,
        wish: float | None = None,
    ):
        self.models: Mapping[str, Served] = {served.name: served for served in models}
        self.metrics = metrics
        self.times = Learned(lambda kind, rows: self.models[kind.model].prior(kind, rows), lambda model: self.models[model].most, clock)
        self.scheduler = scheduler(self.times)
        self._clock, self._wish = clock, wish
        self._flights: dict[int, _Flight] = {}
        self._left: list[_Flight] = []  # cancelled, with a coroutine that only its own thread may end
        self._changed = threading.Condition()
        self._closing = False
        self._reader = Reader(self._changed, self._unread, lambda prompt: self.models[prompt.model].read(prompt), self._was_read, clock)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, orders: Sequence[Order]) -> tuple[int, ...]:
        """Take pictures in, all or none; returns their numbers.

        Raises: RefusedError, ClosingError, and what the bundle says of a request that it does not take.
        """
        prospects = [order.served.prospect(order.request, order.quality) for order in orders]
        for order, prospect in zip(orders, prospects, strict=True):
            if order.most is not None and prospect.steps > order.most:
                words = (
                    f"steps are at most {order.most} here, and without other words they are {prospect.steps}: give steps, or a shorter plan"
                )
                raise BodyError(words, "steps")
        try:
            taken = self._take(orders, prospects)
            if isinstance(taken, Unkept):
                raise taken.refusal()  # while drawing goes on
        except RefusedError as refusal:
            reason = "full" if refusal.nearest is None else "deadline" if refusal.wait is not None else "never"
            self.metrics.refused.labels(orders[0].served.name, reason).inc(len(orders))
            raise
        return taken

    def cancel(self, numbers: Sequence[int]) -> None:
        """Nobody waits for these pictures any more; those that are done stay done."""
        with self._changed:
            for number in numbers:
                self.scheduler.abandon(number)
                if flight := self._flights.pop(number, None):
                    self._left.append(flight)
                    self.metrics.pictures.labels(flight.order.served.name, "cancelled").inc()
            self._gauges()
            self._changed.notify_all()

    def close(self, drain: float = 0.0, patience: float | None = None) -> bool:
        """Take nothing more, draw what is in flight for at most `drain` seconds, and end.

        Returns whether it has ended: what is in progress then, a step or a prompt, may go on beyond a `patience` in seconds, and its bundle
        must stay open.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._flights, timeout=drain)
            rest = tuple(self._flights.values())
        for flight in rest:
            flight.order.tell(Failed(ClosingError("the server closed before this picture was done: ask another, or later")))
        self.cancel(tuple(self._flights))
        begun = time.monotonic()
        self._thread.join(patience)
        return self._reader.close(patience and max(begun + patience - time.monotonic(), 0.0)) and not self._thread.is_alive()

    def forecast(self) -> dict[str, dict[str, float]]:
        """For each model the deadline in seconds that a usual picture would keep behind all that is in flight (`wait`), and on an idle
        engine (`alone`)."""
        waits = {}
        with self._changed:
            now = self._clock()
            for name, served in self.models.items():
                usual = served.usual
                reading = self.times.reading(name, served.reading)
                # a number and a prompt that none has
                job = Job(-1, "", now, now, False, usual.rows, usual.ways, prompt=object() if reading else None, reading=reading)
                waits[name] = {"wait": self.scheduler.behind([job], now), "alone": self.scheduler.behind([job], now, idle=True)}
        return waits

    def now(self) -> float:
        """The time on the engine's clock."""
        return self._clock()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and self._reader.alive

    def _take(self, orders: Sequence[Order], prospects: Sequence[Prospect]) -> tuple[int, ...] | Unkept:
        with self._changed:
            if self._closing or not self.alive:
                self.metrics.refused.labels(orders[0].served.name, "closing").inc(len(orders))
                raise ClosingError("the server is closing: ask another, or later")
            jobs = [self._job(order, prospect) for order, prospect in zip(orders, prospects, strict=True)]
            taken = self.scheduler.take(jobs, self._clock())
            if not isinstance(taken, Unkept):
                for number, order, prospect, job in zip(taken, orders, prospects, jobs, strict=True):
                    self._flights[number] = _Flight(order, prospect, job)
                self._gauges()
                self._changed.notify_all()
            return taken

    def _job(self, order: Order, prospect: Prospect) -> Job:
        best, prompt = prospect.ways[-1], order.served.prompt(order.request)
        reading = self.times.reading(order.served.name, order.served.reading) if prompt else 0.0
        whole = reading + sum(self.times.seconds(kind, prospect.rows) * steps for kind, steps in best.legs) + best.finish
        wish = max(WISH * whole, SOON) if self._wish is None else self._wish
        due = order.received + (wish if order.deadline is None else order.deadline)
        promised = order.deadline is not None and not order.again
        facts: dict[str, Any] = {"user": order.user, "prompt": prompt, "reading": reading, "again": order.again}
        return Job(0, order.client, order.received, due, promised, prospect.rows, prospect.ways, **facts)

    def _run(self) -> None:
        while True:
            begun, flights = self._clock(), dict[int, _Flight]()
            try:
                with self._changed:
                    self._leave()
                    if not self._flights:
                        self._changed.notify_all()
                        if self._closing:
                            return
                        self._changed.wait()
                        continue
                    flights = dict(self._flights)  # which a fault of the scheduler ends, all of them
                    turn = self.scheduler.turn(begun)
                    if turn is None:  # no prompt is read yet
                        self._changed.wait()
                        continue
                    flights = {number: self._flights[number] for number in turn.jobs}
                self._step(turn, flights, begun)
            except Exception as error:  # a fault of ours: those pictures end with it, and the others go on
                _log.exception("a step failed")
                for number in flights:
                    self._end(number, Failed(error))

    def _unread(self) -> Prompt | None:
        prompt = self.scheduler.unread(self._clock())
        assert prompt is None or isinstance(prompt, Prompt)  # which `_job` gave it
        return prompt

    def _was_read(self, prompt: Prompt, answer: Texts | Exception, seconds: float) -> None:
        """Let the pictures begin that waited for a prompt, or end them where it could not be read."""
        with self._changed:
            numbers = self.scheduler.read(prompt)
            if isinstance(answer, Exception):
                for number in numbers:
                    self._end(number, Failed(answer))
                return
            for number in numbers:
                self._flights[number].texts = answer
            self.times.read(prompt.model, self.models[prompt.model].reading, seconds)
            self._changed.notify_all()
        self.metrics.reading.labels(prompt.model).observe(seconds)

    def _leave(self) -> None:
        """End what was cancelled."""
        while self._left:
            drawing = self._left.pop().drawing
            try:
                if drawing:
                    drawing.cancel()
            except Exception:
                _log.exception("a picture that was cancelled did not end well")

    def _step(self, turn: Turn, flights: Mapping[int, _Flight], begun: float) -> None:
        served, session = self.models[turn.kind.model], self.models[turn.kind.model].session
        flights = {each: flight for each, flight in flights.items() if self._tried(each, partial(self._steer, each, flight, turn.level))}
        if not flights:
            return
        drawings = [flight.drawing for flight in flights.values() if flight.drawing]
        ran = step(drawings, session)
        seconds = self._clock() - begun
        budgets = [flight.policy.option.budget for flight in flights.values() if flight.policy]
        with self._changed:
            if len(flights) == len(turn.jobs) and not any(each.policy and each.policy.enters(each.taken) for each in flights.values()):
                self.times.observe(turn.kind, turn.rows, seconds)
            for number, flight in flights.items():
                flight.taken += 1
                if number in self._flights and flight.taken < flight.steps:
                    self.scheduler.stepped(number)
            if any(flight.taken == 1 for flight in flights.values()):  # no longer waiting, so that another prompt may be read
                self._changed.notify_all()
            self._gauges()
        self.metrics.stepped(served.name, budgets, ran.runs, ran.rows, self.times.pace(served.name))
        self.metrics.level.set(turn.level)
        for number, flight in flights.items():
            self._tried(number, partial(self._after, number, flight, session))

    def _tried(self, number: int, do: Callable[[], None]) -> bool:
        """Whether it went well; where not, the picture that it is about ends, and those that share its step go on."""
        try:
            do()
        except Exception as error:
            _log.exception("a picture failed")
            self._end(number, Failed(error))
            return False
        return True

    def _steer(self, number: int, flight: _Flight, level: float) -> None:
        """Choose a picture's budgets for its next step; begin it where it is new."""
        prospect, served = flight.prospect, flight.order.served
        option = prospect.options[prospect.ways.index(flight.job.way(level))]
        if flight.policy is not None:
            if served.elastic:
                flight.policy.option = option
            return
        request, flight.policy = served.steered(flight.order.request, option)
        flight.steps = sum(option.steps)
        flight.previews = _spread(flight.order.previews, flight.steps)
        texts, flight.texts = flight.texts, None
        flight.drawing = Drawing(lambda: served.pipe.draw(request, callback_on_step_end=self._between(flight), texts=texts))
        if not served.elastic:
            with self._changed:
                if number in self._flights:
                    self.scheduler.settle(number, level)

    def _between(self, flight: _Flight) -> Callable[[ElasticPipeline, int, float, dict[str, np.ndarray]], dict[str, np.ndarray]]:
        def between(pipe: ElasticPipeline, index: int, moment: float, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            flight.seen = arrays.get("denoised", arrays["latents"])  # of masked models the state is what is known by now
            pause()
            return {}

        return between

    def _after(self, number: int, flight: _Flight, session: Any) -> None:
        """Tell of a step, and finish a picture after its last."""
        drawing = flight.drawing
        assert drawing is not None
        if number not in self._flights:
            return
        if not drawing.done:
            index = flight.taken - 1
            preview = self._preview(flight) if index in flight.previews else None
            flight.order.tell(Stepped(index, flight.steps, preview))
            if flight.taken < flight.steps:
                return
            step([drawing], session)  # to the picture
        if drawing.error is not None:
            self._end(number, Failed(drawing.error))
        elif drawing.done:
            seconds = self._clock() - flight.job.arrived
            deadline = flight.order.deadline
            late = 0.0 if deadline is None else max(seconds - deadline, 0.0)
            self._end(number, Drawn(drawing.result, seconds, late))

    def _preview(self, flight: _Flight) -> Any:
        """What it looks like by now. No promise has time for previews: one that would break a promise is left out."""
        with self._changed:
            if self.scheduler.spare(self._clock()) < flight.job.way(0.0).finish:  # which decodes a picture, too
                return None
        assert flight.seen is not None  # a step was taken
        try:
            return flight.order.served.pipe.preview(flight.seen, *flight.order.served.sides(flight.order.request))[0]
        except Exception as error:  # without which the picture is as good
            _log.warning("no preview: %s", error, exc_info=not isinstance(error, ElasticError))
            return None

    def _end(self, number: int, event: Event) -> None:
        with self._changed:
            self.scheduler.remove(number)
            flight = self._flights.pop(number, None)
            if flight and isinstance(event, Failed):
                self._left.append(flight)
            self._gauges()
            self._changed.notify_all()
        if flight is None:
            return
        if isinstance(event, Failed):
            self.metrics.pictures.labels(flight.order.served.name, "failed").inc()
        elif isinstance(event, Drawn):
            self.metrics.drawn(flight.order.served.name, event.seconds, None if flight.order.deadline is None else event.late == 0.0)
        try:
            flight.order.tell(event)
        except Exception:
            _log.exception("a client could not be told how its picture ended")

    def _gauges(self) -> None:
        waiting = self.scheduler.waiting
        self.metrics.waiting.set(waiting)
        self.metrics.drawing.set(len(self.scheduler) - waiting)


def _spread(count: int, steps: int) -> frozenset[int]:
    """The steps after which there is a preview: evenly, each of its own, never the last; so there are fewer where steps are few."""
    count = min(count, steps - 1)
    return frozenset((place + 1) * steps // (count + 1) - 1 for place in range(count))
