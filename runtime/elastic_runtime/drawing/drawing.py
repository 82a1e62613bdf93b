"""What the pipeline asks of a drawing, whatever the kind of model."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
from msgspec.structs import replace

from elastic_runtime.choosing.estimates import Gauge, Outlook
from elastic_runtime.choosing.option import Choice, check_budget
from elastic_runtime.choosing.policy import Policy, Replay
from elastic_runtime.contract.bundle import Bundle
from elastic_runtime.contract.manifest import Model
from elastic_runtime.denoising.conditions import Conditioning, led_by
from elastic_runtime.denoising.guidance import Guidance
from elastic_runtime.denoising.tokens import Conditions
from elastic_runtime.errors import InferenceError, UsageError
from elastic_runtime.ralu.plan import Plan
from elastic_runtime.request import Progress, Request, StepRecord
from elastic_runtime.sampling.flow import Step
from elastic_runtime.sampling.noise import Generators, seeds, source
from elastic_runtime.sessions.session import Session

# opens a graph of the bundle, or gives the session that is open
Opener = Callable[[str], Session]
# what prompts are to a denoiser: the conditions of each and, where guidance leads away from some, those of the weak branch
Texts = tuple[Conditions, Conditions | None]


class Drawing(ABC):
    """One request on one bundle, checked as far as nothing need be opened for it; its state is its own, so that
    pipelines can be shared.

    The pipeline calls `prepare`, asks the policy, and then `begin`, and `step` and `follow` in turn until nothing is
    left.
    """

    guidance: Guidance
    session: Session  # the denoiser's, from when it is prepared
    plan: Plan | None = None
    kind: str  # how this kind of model draws, in words

    def __init__(self, bundle: Bundle, request: Request, generator: Generators | None):
        self.bundle, self.request, self.model = bundle, request, bundle.manifest.model
        default = Request()
        for name in self.unfit(self.model):
            if _given(getattr(request, name), getattr(default, name)):
                raise UsageError(f"{name} does not fit {self.model.name}, which draws {self.kind}")
        for name in ("budget", "guidance_budget"):
            if (budget := getattr(request, name)) is not None:
                check_budget(budget, name)
        policy = request.policy
        if policy is not None and (isinstance(policy, type) or not (hasattr(policy, "init") and hasattr(policy, "next"))):
            raise UsageError(f"policy is one of the policies, such as Auto() or Deadline(0.5), got {policy!r}")
        self._generator = generator
        self.seeds: tuple[int, ...] | None = None

    @classmethod
    @abstractmethod
    def unfit(cls, model: Model) -> Sequence[str]:
        """Fields of a request that are not for `model`."""

    @property
    @abstractmethod
    def count(self) -> int:
        """Pictures in all."""

    @property
    @abstractmethod
    def left(self) -> tuple[int, ...]:
        """Steps left of each stage still to come; nothing after the last."""

    @property
    def drawn(self) -> Plan | None:
        """The plan in the steps that it took, of a model that follows plans."""
        return self.plan

    @abstractmethod
    def policy(self) -> Policy:
        """What chooses: what the request says, or what suits it."""

    @abstractmethod
    def read(self, open_graph: Opener) -> Texts | None:
        """Read prompts, through text encoders one after the other, or take embeddings; None where the model takes neither."""

    @abstractmethod
    def prepare(self, open_graph: Opener, texts: Texts | None = None) -> None:
        """Read prompts, where there are any and `texts` are not what they were read as, and open the denoiser."""

    @abstractmethod
    def outlook(self, gauge: Gauge, finishes: bool) -> Outlook:
        """What a policy may know; `finishes` tells whether the last state is to become pictures."""

    @abstractmethod
    def begin(self, choice: Choice) -> None:
        """Start the loop as the policy chose."""

    @abstractmethod
    def step(self, replacement: np.ndarray | None) -> Step:
        """Take one step, from `replacement` in place of the last step's state where it is given."""

    @abstractmethod
    def record(self, step: Step, choice: Choice, seconds: float) -> StepRecord:
        """What the step used."""

    @abstractmethod
    def follow(self, choice: Choice, step: Step, replacement: np.ndarray | None) -> np.ndarray | None:
        """Go on after `step` as the policy chose; return what still has to replace its state."""

    @abstractmethod
    def latents(self, state: np.ndarray) -> np.ndarray:
        """The last state as latents (B, C, h, w)."""

    def progress(self, step: Step, record: StepRecord) -> Progress:
        """What the loop yields."""
        return Progress(step, record)

    def facts(self) -> dict[str, Any]:
        """What a picture's metadata tells beside the request."""
        return {}

    def again(self, choices: Sequence[Choice]) -> Request:
        """The request that draws the same pictures again: with its seeds, and with what the policy chose for each step."""
        request, changes = self.request, dict[str, Any](seeds=self.seeds)
        if request.class_labels is not None and not isinstance(request.class_labels, int):
            changes["class_labels"] = tuple(int(label) for label in np.atleast_1d(request.class_labels))
        if request.policy is not None:
            first, *rest = (replace(choice, predicted=None, reason="") for choice in choices)
            changes |= {"policy": Replay((first, *(replace(choice, plan=None) for choice in rest))), "guidance_budget": None}
        return replace(request, **changes)

    def check_guidance(self, *names: str) -> None:
        """Raise UsageError for fields of the request that act through guidance, where it is off."""
        default = Request()
        for name in names:
            if self.guidance.scale <= 1 and _given(getattr(self.request, name), getattr(default, name)):
                raise UsageError(f"{name} acts through guidance, which is off: give {led_by(self.model)}")

    def _source(self) -> Any:
        """Where noise comes from: the caller's generators, or a seed for each picture."""
        if self._generator is not None:
            if self.request.seeds is not None:
                raise UsageError("give seeds or a generator, not both")
            return source(self._generator, self.count)
        self.seeds = seeds(self.request.seeds, self.count)
        return source([np.random.default_rng(seed) for seed in self.seeds], self.count)


def checked(texts: Texts, count: int, led: bool) -> Texts:
    """Texts that were read before; raises UsageError unless they are of so many prompts, and of what guidance leads away from where it is
    `led`."""
    if not isinstance(texts, tuple) or len(texts) != 2:
        raise UsageError(f"texts are what `read` gives of a request, got {texts!r}")
    strong, weak = texts
    if len(strong) != count or (weak is not None) != led:
        kind = f"{len(strong)} prompts {'without' if weak is None else 'with'} negative ones"
        wanted = f"{count} {'with' if led else 'without'}"
        raise UsageError(f"texts are of {kind}, and the request is of {wanted}: give what `read` says of this request")
    return texts


def _given(value: Any, default: Any) -> bool:
    value = tuple(value) if isinstance(value, list) else value  # as a pair may come
    return value is not None and (isinstance(value, np.ndarray) or value != default)


def finite(values: np.ndarray, index: int) -> None:
    """Raise InferenceError unless what step `index` gave is finite."""
    if not np.isfinite(values).all():
        raise InferenceError(f"step {index} gave values that are not finite; try --precision fp32, and verify the bundle")


def conditioning(request: Request) -> Conditioning:
    """What a request says is to be drawn."""
    return Conditioning(**{field.name: getattr(request, field.name) for field in fields(Conditioning)})


def repeats(count: Any) -> int:
    """`num_images_per_prompt`, checked."""
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise UsageError(f"num_images_per_prompt is a whole number from 1, got {count!r}")
    return count
