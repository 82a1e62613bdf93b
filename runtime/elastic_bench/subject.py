"""One runtime on one bundle, in the process that runs it: opened, checked against the recording, timed."""

import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from elastic_bench.energy import Counter
from elastic_bench.records import Settings
from elastic_bench.runtimes import GRAPH, Opened, Runtime
from elastic_runtime.contract.artifacts import Verification
from elastic_runtime.contract.axis import Axis
from elastic_runtime.contract.budget import Budget
from elastic_runtime.contract.bundle import Bundle
from elastic_runtime.contract.reference import axis_feeds, cut, unpack
from elastic_runtime.denoising.pictures import drawable
from elastic_runtime.denoising.tokens import Conditions
from elastic_runtime.device import Clock, Processor, peak_bytes
from elastic_runtime.drawing.drawing import Texts
from elastic_runtime.errors import BundleError, InferenceError
from elastic_runtime.pipeline import ElasticPipeline
from elastic_runtime.ralu.plan import FULL
from elastic_runtime.request import Request
from elastic_runtime.sessions.checking import check
from elastic_runtime.sessions.session import batches, joined


class Loaded(NamedTuple):
    """What opening told: on what it runs, which budgets it was compiled for (None: all of its `axes`), whether it can make
    pictures."""

    where: str
    processor: Processor
    seconds: float
    started_bytes: int | None
    budgets: tuple[Budget, ...] | None
    draws: bool
    tolerance: float
    axes: tuple[Axis, ...] = ()


class Turn(NamedTuple):
    """One turn: seconds of the first run after another budget, of each steady run, and the energy of all steady runs by
    source."""

    entering: float
    steady: tuple[float, ...]
    joules: dict[str, float]


class Drawing(NamedTuple):
    """How a picture is drawn; `weak` is the budget of the weak branch (None: the same).

    Of a model that is drawn along plans, `plan` names one of mixed resolution (None: full resolution), which has
    `steps` of its own.
    """

    budget: Budget
    weak: Budget | None
    steps: int
    plan: str | None = None


class Subject:
    """A runtime, from opening to closing. `counters` are sources of energy, `clock` gives seconds."""

    def __init__(
        self,
        runtime: Runtime,
        bundle: Bundle,
        settings: Settings,
        counters: Mapping[str, Counter] | None = None,
        clock: Clock = time.perf_counter,
    ):
        self._runtime, self._bundle, self._settings = runtime, bundle, settings
        self._counters, self._clock = dict(counters or {}), clock
        self._feeds, self._outputs = unpack(GRAPH, bundle.reference())
        if not self._outputs:
            raise BundleError(f"the reference of {bundle.folder} has no outputs of {GRAPH!r}, so nothing can be proven: export it again")
        self._opened: Opened | None = None

    def load(self) -> Loaded:
        """Open the runtime, timed."""
        before, begun = peak_bytes(), self._clock()
        self._opened = self._runtime.open(self._bundle, self._settings.threads)
        seconds = self._clock() - begun
        session = self._opened.denoiser
        draws = "decoder" not in self._bundle.manifest.graphs or self._opened.decoder is not None
        axes = session.axes(self._bundle.manifest.axes)
        return Loaded(session.where, session.processor, seconds, before, session.budgets, draws, self._opened.tolerance, axes)

    def step(self, budget: Budget) -> tuple[float, dict[str, np.ndarray]]:
        """One step: seconds of a forward pass of the batch, in as few runs as the session takes, and its outputs."""
        session, feeds = self._open.denoiser, self._step_feeds(budget)
        batched = session.graph.batched
        parts = [feeds | {name: feeds[name][rows] for name in batched} for rows in batches(session, self._settings.batch)]
        begun = self._clock()
        outputs = [session.run(part) for part in parts]
        seconds = self._clock() - begun
        return seconds, joined(outputs)

    def check(self) -> list[Verification]:
        """How it compares with the recording at every recorded budget."""
        return list(check(self._bundle, GRAPH, self._open.denoiser, self._open.tolerance))

    def turn(self, previous: Budget, budget: Budget, seconds: float) -> Turn:
        """Run once at `previous`, then at `budget`: the first time, and again until `seconds` have passed, at least
        once."""
        self.step(previous)
        entering = self.step(budget)[0]
        before = {name: read() for name, read in self._counters.items()}
        steady = [self.step(budget)[0]]
        while sum(steady) < seconds:
            steady.append(self.step(budget)[0])
        steady = [round(value, 9) for value in steady]  # no clock knows more, and a report holds thousands
        return Turn(entering, tuple(steady), {name: read() - before[name] for name, read in self._counters.items()})

    def draw(self, way: Drawing, seed: int) -> tuple[float, np.ndarray]:
        """A guided batch of pictures (or of latents, for token codes) from noise of `seed`: its seconds, and float32
        (B, H, W, C).

        Raises: InferenceError if they are not finite.
        """
        sessions = {"denoiser": self._open.denoiser} | ({"decoder": self._open.decoder} if self._open.decoder else {})
        pipe, request, texts = ElasticPipeline(self._bundle, sessions), self._request(way, seed), self._texts()
        begun = self._clock()
        pictures = np.asarray(pipe.draw(request, generator=np.random.default_rng(seed), texts=texts).images)
        seconds = self._clock() - begun
        if not np.isfinite(pictures).all():
            raise InferenceError(f"{self._open.denoiser.where} drew values that are not finite at {way.plan or way.budget}")
        return seconds, np.asarray(pictures, dtype=np.float32)

    def _request(self, way: Drawing, seed: int) -> Request:
        """A batch after class labels, or after the recorded embeddings: text encoders are no part of a step, and a
        budget does not change them."""
        model, rows = self._bundle.manifest.model, np.arange(self._settings.batch)
        subject: dict[str, Any] = {"class_labels": tuple(((seed + rows) % max(1, model.num_classes)).tolist())}
        if model.unconditional:
            subject = {"num_images_per_prompt": self._settings.batch}
        elif not model.num_classes:
            names = {"prompt_embeds": "encoder_hidden_states", "pooled_prompt_embeds": "pooled_projections"}
            taken = {name: self._feeds[feed] for name, feed in names.items() if feed in self._feeds}
            if model.text and model.text.layers:  # recorded as one of many layers, as the denoiser takes them: see `_texts`
                taken = {"prompt_embeds": np.zeros((1, 1, model.text.layers, model.text.width), np.float32)}
            subject = {name: array[rows % len(array)] for name, array in taken.items()}
            if self._settings.guidance > 1 and not (model.patches and model.patches.guidance_embeds):
                subject |= {f"negative_{name}": np.zeros_like(array) for name, array in subject.items()}
        if model.patches:
            how: dict[str, Any] = {"plan": way.plan} if way.plan else {"plan": FULL, "num_inference_steps": way.steps}
        else:
            how = {"budget": way.budget, "guidance_budget": way.weak, "num_inference_steps": way.steps}
        return Request(
            **subject,
            **how,
            guidance_scale=model.guidance_scale(self._settings.guidance),
            output_type="np" if drawable(self._bundle.manifest) else "latent",
        )

    def _texts(self) -> Texts | None:
        """What the recorded embeddings stand for where a graph makes them of a text encoder's layers, once a picture; else None."""
        model, rows = self._bundle.manifest.model, np.arange(self._settings.batch)
        if not (model.text and model.text.layers):
            return None
        hidden = self._feeds["encoder_hidden_states"]
        strong = Conditions(hidden[rows % len(hidden)])
        return strong, Conditions(np.zeros_like(strong.hidden)) if self._settings.guidance > 1 else None

    def stream(self, way: Drawing, queries: int, limit: float) -> tuple[float, ...]:
        """Seconds of one batch of pictures after another, until there are `queries` or `limit` seconds have passed."""
        taken: list[float] = []
        while len(taken) < queries and sum(taken) < limit:
            taken.append(self.draw(way, len(taken))[0])
        return tuple(taken)

    def memory(self) -> int | None:
        """Most memory that this process has had."""
        return peak_bytes()

    def close(self) -> None:
        """Release the sessions."""
        if self._opened:
            self._opened.denoiser.close()
            if self._opened.decoder:
                self._opened.decoder.close()

    @property
    def _open(self) -> Opened:
        if self._opened is None:
            raise InferenceError(f"{self._runtime.name} is not open: call load first")
        return self._opened

    def _step_feeds(self, budget: Budget) -> dict[str, np.ndarray]:
        """The recorded feeds, their samples repeated to the batch, at `budget`."""
        rows = np.arange(self._settings.batch)
        graph = self._bundle.manifest.graphs[GRAPH]
        batched = graph.batched
        feeds = {name: array[rows % len(array)] if name in batched else array for name, array in self._feeds.items()}
        axes = self._bundle.manifest.axes
        return cut(graph.inputs, feeds, budget, axes) | axis_feeds(axes, budget)
