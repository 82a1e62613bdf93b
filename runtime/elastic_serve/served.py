"""A bundle that is served: opened, measured, and asked what a request may become here."""

import itertools
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np
from msgspec.structs import replace

from elastic_runtime.choosing.budgets import BudgetOutlook
from elastic_runtime.choosing.calibration import middle
from elastic_runtime.choosing.estimates import Outlook
from elastic_runtime.choosing.goals import Auto
from elastic_runtime.choosing.option import Choice, Option
from elastic_runtime.contract.budget import Budget
from elastic_runtime.contract.bundle import Bundle
from elastic_runtime.denoising.conditions import led_by
from elastic_runtime.denoising.evaluator import evaluator
from elastic_runtime.denoising.guidance import Guidance
from elastic_runtime.denoising.pictures import drawable, obstacle
from elastic_runtime.device import Clock
from elastic_runtime.drawing.drawing import Texts
from elastic_runtime.errors import UsageError
from elastic_runtime.pipeline import ElasticPipeline
from elastic_runtime.request import Request
from elastic_runtime.sessions.session import Session, batches
from elastic_serve.jobs import Way
from elastic_serve.times import Kind
from elastic_serve.together import Shared

QUALITIES: Mapping[str, str] = MappingProxyType({"standard": "auto", "hd": "high"})  # names that meant the same before

LEVELS = 8  # of the budgets: what is between two of them nobody would see, and each has a shape of its own to plan
WARMING = 5.0  # seconds
WORDS = "a cat"  # how many hardly matters beside the opening of an encoder, and any takes these
# Of a request, what its prompt is read by; guidance says whether the negative one is, too.
READ = ("prompt", "negative_prompt", "guidance_scale", "true_cfg_scale", "autoguidance")
T = TypeVar("T")


@dataclass(frozen=True)
class Prospect:
    """What a picture may become: its ways with their options, cheapest first, its rows in a run, and its steps at most."""

    options: tuple[Option, ...]
    ways: tuple[Way, ...]
    rows: int
    steps: int


@dataclass(frozen=True)
class Row:
    """What a budget takes, in seconds of one step of one row, and is worth by the card, as a share of the best; None without a card."""

    budget: Budget
    seconds: float
    quality: float | None


@dataclass(frozen=True)
class Prompt:
    """What is read for a picture before it is begun: equal ones once. `request` holds nothing but that."""

    model: str
    request: Request


class Steered:
    """The policy of a picture whose budgets are chosen from outside, before each of its steps."""

    def __init__(self, option: Option):
        self.option = option
        self.reason = "as the load allows"

    def init(self, outlook: Outlook) -> None:
        return None

    def next(self, state: None, index: int, seconds: float) -> tuple[Choice, None]:
        return self.option.choice(reason=self.reason), None

    def enters(self, taken: int) -> bool:
        """Whether the step after so many begins another stage of its plan: what leads there is no step's time, and predicted by itself."""
        return taken in list(itertools.accumulate(self.option.steps))[:-1]


class Served:
    """One bundle under a name, with a session that its pictures share, at most `batch` of their rows a run (None: what it takes)."""

    def __init__(self, name: str, pipe: ElasticPipeline, batch: int | None = None):
        self.name, self.bundle, self._batch = name, pipe.bundle, batch
        self.session: Session = pipe.session("denoiser")
        self._opened = pipe
        self._shared = Shared(self.session)
        self.pipe = ElasticPipeline(pipe.bundle, lambda graph: self._shared if graph == "denoiser" else pipe.session(graph))
        self._warm()
        self.reading = self._timed()

    @classmethod
    def open(
        cls, folder: str | os.PathLike[str], backend: str | None = None, precisions: Sequence[str] = (), batch: int | None = None
    ) -> "Served":
        """Open a bundle's folder under the folder's name.

        Raises: as `ElasticPipeline.from_pretrained`, and UsageError for a bundle that makes no pictures.
        """
        pipe = ElasticPipeline.from_pretrained(servable(folder), backend, precisions)
        try:
            return cls(Path(folder).resolve().name, pipe, batch)
        except BaseException:
            pipe.close()
            raise

    def close(self) -> None:
        self.pipe.close()
        self._opened.close()

    @property
    def by_classes(self) -> bool:
        """Whether it draws classes, not prompts."""
        return bool(self.bundle.manifest.model.num_classes)

    @property
    def elastic(self) -> bool:
        """Whether budgets may change from step to step; along plans they are settled when a picture is begun."""
        return self.bundle.manifest.model.patches is None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels of the model's own picture."""
        model = self.bundle.manifest.model
        upscale = model.vae.upscale if model.vae else 1
        return model.sample_shape[1] * upscale, model.sample_shape[2] * upscale

    def sides(self, request: Request) -> tuple[int, int]:
        """Height and width in pixels of the picture that is asked for."""
        height, width = self.size
        return request.height or height, request.width or width

    @property
    def most(self) -> int:
        """Rows of the largest run that pictures share."""
        return min(self.session.batch.max, self._batch or self.session.batch.max)

    @cached_property
    def rows(self) -> list[Row]:
        """The budgets, cheapest first."""
        gauge = self.pipe.gauge
        graded = BudgetOutlook(gauge, 1, Guidance(), 1, "") if self.elastic else None
        worth = graded.quality if graded and graded.graded else None
        return [
            Row(budget, gauge.costs.seconds(budget, 1), worth(Option("", (budget,), (budget,), (1,))) if worth else None)
            for budget in gauge.budgets
        ]

    @cached_property
    def usual(self) -> Prospect:
        """The prospect of a picture of which nothing is said but what to draw."""
        noise = self.bundle.manifest.model.unconditional
        kind: dict[str, Any] = {"class_labels": (0,)} if self.by_classes else {} if noise else {"prompt": ""}
        return self.prospect(Request(seeds=(0,), **kind))

    def batching(self) -> str | None:
        """Why pictures take turns here, where they do; None where they may share runs."""
        if self._batch == 1:
            return "the server was told so, by --batch 1"
        if self.session.batch.max < 2:
            return f"its artifact takes batches of {self.session.batch}: export it with --batch 1-8"
        if any(axis.input == "slots" for axis in self.bundle.manifest.axes):
            return "its router sizes the steps of each picture: those share a run whose sizes happen to be equal"
        return None

    def prospect(self, request: Request, quality: str = "auto") -> Prospect:
        """The ways to draw one picture; `quality` names one of them: low, medium or high, or leaves all open.

        Raises: UsageError and its kinds where the bundle does not take the request.
        """
        asked = request.budget is not None or request.plan is not None
        fitted = replace(
            request, budget=None, guidance_budget=None, policy=None if asked else Auto(guidance_budget=request.guidance_budget)
        )
        outlook = self.pipe.outlook(fitted, reading=False)
        if request.guidance_budget is not None and outlook.guidance.scale <= 1:  # as a pipeline refuses it
            raise UsageError(f"guidance_budget acts through guidance, which is off: give {led_by(self.bundle.manifest.model)}")
        if asked:
            budget = request.budget or (outlook.gauge.budgets[-1] if self.elastic else Budget())
            options = [outlook.fixed(budget, request.guidance_budget)]
        else:
            options = list(outlook.frontier(request.guidance_budget))
            if not self.elastic and quality in ("auto", "standard"):  # plans go on getting longer, for very little
                usual = outlook.usual(outlook.options())
                options = [option for option in options if outlook.whole(option) < outlook.whole(usual)] + [usual]
        options = _of_quality(outlook, options, QUALITIES.get(quality, quality))
        options = _thinned(options)
        rows = {self._rows(outlook, option) for option in options}
        steps = max(sum(outlook.course(option).steps) for option in options)
        return Prospect(tuple(options), tuple(self._way(outlook, option) for option in options), max(rows), steps)

    def prompt(self, request: Request) -> Prompt | None:
        """What is to be read for a request; None where the model takes no prompts."""
        if request.prompt is None:
            return None
        return Prompt(self.name, Request(**{name: getattr(request, name) for name in READ}))

    def read(self, prompt: Prompt) -> Texts:
        """Read a prompt, on whichever thread; raises as `ElasticPipeline.read`."""
        texts = self.pipe.read(prompt.request)
        assert texts is not None  # it takes prompts
        return texts

    def steered(self, request: Request, option: Option) -> tuple[Request, Steered]:
        """The request as it is drawn, and what steers it."""
        policy = Steered(option)
        changes: dict[str, Any] = {"budget": None, "guidance_budget": None, "policy": policy}
        return replace(request, **changes), policy

    def _warm(self, clock: Clock = time.perf_counter) -> None:
        """Measure before anyone waits, and run each budget once: the first run of a shape plans its memory."""
        budgets, denoiser, manifest = self.pipe.gauge.budgets, evaluator(self.session, self.bundle.manifest), self.bundle.manifest
        _ = self.pipe.gauge.costs  # which measures
        begun, batch = clock(), self.session.batch
        for rows in sorted({max(batch.min, 1), min(max(batch.min, 2), batch.max)}):
            for budget in _thinned(budgets):
                if clock() - begun > WARMING:
                    return
                denoiser.evaluate(budget, rows, middle(manifest.model), np.random.default_rng(0))

    def _timed(self, clock: Clock = time.perf_counter) -> float:
        """Seconds that a prompt takes to be read, by the second of two unless the first took long: that reads files, too; 0 where the model
        takes none."""
        if self.bundle.manifest.model.text is None or self.by_classes:
            return 0.0
        seconds = math.inf
        for _ in range(2):
            begun = clock()
            self.pipe.read(Request(prompt=WORDS))
            seconds = min(seconds, clock() - begun)
            if seconds > WARMING:
                break
        return seconds

    def prior(self, kind: Kind, rows: int) -> float:
        """Predicted seconds of one step, by what was measured when the bundle was opened."""
        costs = self.pipe.gauge.costs
        try:
            parts = [part.stop - part.start for part in batches(self.session, rows)]
        except UsageError:
            parts = [rows]
        budgets = [kind.budget, *([kind.weak] if kind.weak is not None else [])]
        return kind.evaluations * math.fsum(costs.seconds(budget, size) for budget in budgets for size in parts)

    def _rows(self, outlook: Outlook, option: Option) -> int:
        guided = outlook.guidance.scale > 1
        runs = outlook.runs(option, 0, guided)
        return sum(size for budget, size in runs if budget == runs[0][0])

    def _way(self, outlook: Outlook, option: Option) -> Way:
        course, guided = outlook.course(option), outlook.guidance.scale > 1
        legs = []
        for stage, (led, plain) in enumerate(outlook.evaluations(course)):
            runs = outlook.runs(option, stage, guided)
            weak = next((budget for budget, _ in runs if budget != runs[0][0]), None)
            legs.append((Kind(self.name, runs[0][0], weak, int((led + plain).max())), len(led)))
        return Way(tuple(legs), outlook.finish + outlook.entering(option) * (len(legs) - 1))


def _thinned(options: Sequence[T]) -> list[T]:
    """At most `LEVELS` of them, evenly, with both ends."""
    places = np.linspace(0, len(options) - 1, min(len(options), LEVELS)).round()
    return [options[int(place)] for place in places]


def _of_quality(outlook: Outlook, options: list[Option], quality: str) -> list[Option]:
    if quality == "low":
        return options[:1]
    if quality == "high":
        return options[-1:]
    if quality == "medium":
        middle = options[len(options) // 2 :]
        keeping = [option for option in options if outlook.graded and outlook.quality(option) >= Auto().floor]
        return (keeping or middle)[:1]
    return options


def servable(folder: str | os.PathLike[str]) -> Bundle:
    """A bundle that makes pictures; told before what takes long, since every answer would be an error.

    Raises: UsageError for one that does not; as `Bundle.open`.
    """
    bundle = Bundle.open(folder)
    name, model = Path(folder).resolve().name, bundle.manifest.model
    if not drawable(bundle.manifest):
        raise UsageError(f"{name} cannot be served, since pictures alone are: {obstacle(bundle.manifest)}")
    if not (model.num_classes or model.unconditional or (model.text and model.text.encoders)):
        raise UsageError(
            f"{name} cannot be served, since requests are prompts and it holds no text encoders to read them with: export it again with "
            "--components transformer,vae,text"
        )
    return bundle


def named(folders: Sequence[Path]) -> None:
    """Raise UsageError where two of the bundles would have one name."""
    names = [folder.resolve().name for folder in folders]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(f"two bundles are called {twice[0]!r}, and a request names its model by the folder: rename one")
