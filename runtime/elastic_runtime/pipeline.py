"""`ElasticPipeline`: a bundle that draws pictures, in words that a diffusers user knows."""

import os
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self

import numpy as np

from elastic_runtime.choosing.calibration import Clock, fastest, peak_bytes
from elastic_runtime.choosing.estimates import Gauge, Outlook
from elastic_runtime.choosing.policy import Fixed, Policy
from elastic_runtime.contract.budget import Budget
from elastic_runtime.contract.bundle import Bundle
from elastic_runtime.contract.manifest import Model
from elastic_runtime.contract.schedule import CosineMask, whole_steps
from elastic_runtime.denoising.denoiser import Answer, Denoiser, Guidance
from elastic_runtime.denoising.pictures import OutputType, decode, pictures
from elastic_runtime.device import probe
from elastic_runtime.errors import InferenceError, UsageError
from elastic_runtime.sampling.fitting import sampler as fitting
from elastic_runtime.sampling.fitting import start as beginning
from elastic_runtime.sampling.flow import Loop, Step, after
from elastic_runtime.sessions.opening import open_artifact, open_session
from elastic_runtime.sessions.session import Session

# callback(pipe, step_index, timestep, {"latents": state, ...}) -> a dict that may hold other "latents"
Callback = Callable[["ElasticPipeline", int, float, dict[str, np.ndarray]], dict[str, np.ndarray]]


@dataclass(frozen=True)
class StepRecord:
    """What one step used: its times, the budgets of its branches (None where a branch did not run) and its seconds.

    Where a router keeps as many tokens as the picture needs (DC-DiT), `kept` are those of each picture and `slots` how many there was
    room for, which a budget caps: where `kept` is more, the cap bit. Runs that had to be done again are counted in `reruns`.

    `predicted` is what the cost model gave it, where the policy asked; `reason` is why the policy chose these budgets.
    """

    index: int
    time: float
    next_time: float
    budget: Budget
    guidance_budget: Budget | None
    seconds: float
    predicted: float | None = None
    reason: str = ""
    kept: tuple[int, ...] | None = None
    slots: int | None = None
    guidance_kept: tuple[int, ...] | None = None
    guidance_slots: int | None = None
    reruns: int = 0


@dataclass(frozen=True)
class PipelineOutput:
    """`images`: PIL pictures, or float32 (B, H, W, C) in [0, 1], or the final latents (B, C, H, W); `steps` tells what was spent.

    `seconds` is the time from the call to the pictures, without what a first call takes to calibrate.
    """

    images: Any
    steps: tuple[StepRecord, ...]
    seconds: float = 0.0


@dataclass(frozen=True)
class Progress:
    """A step with its record, as `ElasticPipeline.iterate` yields it; `mask` tells which tokens a router kept, bool (B, L)."""

    step: Step
    record: StepRecord
    mask: np.ndarray | None = None


class ElasticPipeline:
    """Pictures from a bundle. Close it, or use it in a `with` block."""

    def __init__(self, bundle: Bundle, denoiser: Session, decoder: Session | None = None, clock: Clock = time.perf_counter):
        self.bundle = bundle
        self._clock = clock
        self._sessions = [denoiser] + ([decoder] if decoder else [])
        self._denoiser = Denoiser(denoiser, bundle.manifest)
        self._decoder = decoder
        self.where = denoiser.where
        finish = self._finish if self._obstacle() is None else None
        self.gauge = Gauge(denoiser, bundle.manifest, finish, clock, opened=peak_bytes())

    @classmethod
    def from_pretrained(cls, bundle: str | os.PathLike[str] | Bundle, backend: str | None = None, **options: Any) -> Self:
        """Open a bundle folder; `backend` and its `options` (ONNX Runtime: providers, threads, spinning) are optional.

        Where neither is given and several artifacts or backends can run here, they are timed once, and the fastest is taken.

        Raises: BundleError, MissingError.
        """
        opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        if opened.manifest.model.patches:
            raise UsageError(f"{opened.manifest.model.name} draws along a plan: open it with RaluPipeline.from_pretrained")
        picked = None if backend or options else fastest(opened, "denoiser", probe, time.perf_counter)
        if picked:
            (artifact,) = (each for each in opened.manifest.graphs["denoiser"].artifacts if each.path == picked[1])
            denoiser = open_artifact(opened, "denoiser", artifact, picked[0])
        else:
            denoiser = open_session(opened, "denoiser", backend, **options)
        has_decoder = "decoder" in opened.manifest.graphs
        return cls(opened, denoiser, open_session(opened, "decoder", backend, **options) if has_decoder else None)

    def __repr__(self) -> str:
        return f"ElasticPipeline.from_pretrained({str(self.bundle.folder)!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Release the sessions."""
        for session in self._sessions:
            session.close()

    def __call__(
        self,
        class_labels: Sequence[int] | int,
        *,
        num_inference_steps: int = 20,
        guidance_scale: float = 1.0,
        budget: Budget | None = None,
        guidance_budget: Budget | None = None,
        policy: Policy | None = None,
        drop_fraction: float = 0.0,
        guidance_drop_fraction: float | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        autoguidance: bool = False,
        sampler: str | None = None,
        temperature: float | None = None,
        generator: np.random.Generator | None = None,
        noise: np.ndarray | None = None,
        output_type: OutputType = "pil",
        callback_on_step_end: Callback | None = None,
    ) -> PipelineOutput:
        """Draw one picture for each class label.

        Args:
            class_labels: classes, 0 to num_classes - 1.
            num_inference_steps: denoising steps.
            guidance_scale: 1 is off; the weak branch runs at `guidance_budget` (default: the same as `budget`).
            budget: a point on the bundle's axes (default: the axes' defaults); or `policy` to choose for each step.
                Tokens are a cap on what a router keeps; without it a step takes all the room that the picture needs, and no more.
            drop_fraction: share of the tokens kept by a router to drop, those it is least sure of, 0 to below 1 (DC-DiT).
            guidance_drop_fraction: the same for the weak branch, Lite-CFG (default: as drop_fraction).
            guidance_interval: times between which guidance acts (1 is pure noise).
            autoguidance: the weak branch keeps the label and differs by its smaller budget.
            sampler: euler, heun or sde for rectified flow; ddpm or ddim for v and epsilon; maskgit for masked models; by default the first.
            temperature: how freely a masked model chooses which tokens to keep; 0 keeps the surest.
            generator: source of the noise; the same seed gives the same picture.
            noise: initial noise (B, C, H, W) in place of the generator's.
            output_type: pil, np or latent.
            callback_on_step_end: called as `callback(pipe, step_index, timestep, {"latents": state})` after each step; ddpm and ddim add
                "denoised", the picture that the model saw in the state before, and a router adds "mask", the tokens it kept, bool (B, L).

        Raises: UsageError and its kinds for wrong arguments; InferenceError if the backend fails or the result is not finite.
        """
        if output_type not in ("pil", "np", "latent"):
            raise UsageError(f"output_type must be pil, np or latent, got {output_type!r}")
        if not isinstance(guidance_interval, Sequence) or len(guidance_interval) != 2:
            raise UsageError(f"guidance_interval is a pair of times, (0.3, 0.8), got {guidance_interval!r}")
        if output_type != "latent":
            self._need_pixels()  # not after minutes of denoising
        begun, spent = self._clock(), self.gauge.spent
        steps = self.iterate(
            class_labels,
            num_inference_steps=num_inference_steps,
            guidance=Guidance(guidance_scale, *guidance_interval, auto=autoguidance),
            policy=_policy(policy, budget, guidance_budget),
            drop_fraction=drop_fraction,
            guidance_drop_fraction=guidance_drop_fraction,
            sampler=sampler,
            temperature=temperature,
            generator=generator,
            noise=noise,
            decode=output_type != "latent",
        )
        records, replacement = [], None
        while True:
            try:
                progress = steps.send(replacement)
            except StopIteration:
                break
            records.append(progress.record)
            state = replacement = progress.step.sample
            if callback_on_step_end:
                tensors = {"latents": state, "denoised": progress.step.denoised, "mask": progress.mask}
                known = {name: array for name, array in tensors.items() if array is not None}
                answer = callback_on_step_end(self, progress.step.index, progress.step.time, known)
                state = replacement = (answer or {}).get("latents", state)
        images = self.images(state, output_type)
        return PipelineOutput(images, tuple(records), self._clock() - begun - (self.gauge.spent - spent))

    def iterate(
        self,
        class_labels: Sequence[int] | int,
        *,
        num_inference_steps: int = 20,
        guidance: Guidance | None = None,
        policy: Policy | None = None,
        drop_fraction: float = 0.0,
        guidance_drop_fraction: float | None = None,
        sampler: str | None = None,
        temperature: float | None = None,
        generator: np.random.Generator | None = None,
        noise: np.ndarray | None = None,
        decode: bool = True,
    ) -> Generator[Progress, np.ndarray | None, None]:
        """The denoising loop itself: yields a `Progress` after each step; send an array to replace the state.

        `decode` tells a policy that keeps to a time whether the last state is to become pictures, which takes some of it.
        """
        begun, spent = self._clock(), self.gauge.spent
        model, axes = self.bundle.manifest.model, self.bundle.manifest.axes
        guidance, policy = guidance or Guidance(), policy or Fixed()
        name, run = fitting(model, sampler, temperature)
        whole_steps(num_inference_steps)
        labels = whole_labels(model, class_labels)
        if generator is not None and not isinstance(generator, np.random.Generator):
            raise UsageError(f"generator is a numpy.random.Generator, np.random.default_rng(seed), got {generator!r}")
        source = generator or np.random.default_rng()
        start = beginning(model, len(labels), source, noise)
        routing = self._denoiser.routing(drop_fraction, guidance_drop_fraction)
        outlook = Outlook(self.gauge, len(labels), guidance, name, finishes=decode)
        state = policy.init(axes, num_inference_steps, outlook)
        begun += self.gauge.spent - spent  # measuring is no part of this picture
        choice, state = policy.next(state, 0, self._clock() - begun)
        same = choice.guidance_budget == choice.budget and routing.guidance_drop == routing.drop
        if guidance.auto and guidance.scale > 1 and same:
            raise UsageError("autoguidance needs a guidance budget smaller than the budget: give guidance_budget")
        guided = False
        answers: list[Answer] = []  # of one step

        def predict(x: np.ndarray, t: float, index: int) -> np.ndarray:
            nonlocal guided, routing
            guided = guided or guidance.active(model.schedule.share(t))
            answers.append(self._denoiser.guided(x, t, labels, guidance, choice, routing))
            routing = routing.after(answers[-1].routed, answers[-1].guidance_routed)
            return answers[-1].prediction

        left = choice.steps or num_inference_steps
        loop: Loop = run(predict, start, left, source)
        last, index, replacement = self._clock(), 0, None
        while True:
            guided = False
            step = loop.send(replacement)
            if not np.isfinite(step.sample).all():
                raise InferenceError(f"step {index} gave values that are not finite; try --dtype fp32, and verify the bundle")
            seconds, left = self._clock() - last, left - 1
            step = replace(step, index=index, steps=index + 1 + left)
            weak = choice.guidance_budget if guided else None
            if choice.predicted is not None:
                self.gauge.observe(choice.predicted, seconds)
            told = {"predicted": choice.predicted, "reason": choice.reason} | _routed(answers)
            record = StepRecord(index, step.time, step.next_time, choice.budget, weak, seconds, **told)
            routed = answers[-1].routed
            answers.clear()
            replacement = yield Progress(step, record, routed.mask if routed else None)
            last, index = self._clock(), index + 1
            if not left:
                after(step, replacement)  # refuses a last state of another shape, too
                return
            choice, state = policy.next(state, index, last - begun)
            if choice.steps not in (None, left):
                left, begin = choice.steps, step.next_time
                loop.close()
                loop, replacement = run(predict, after(step, replacement), left, source, begin), None

    def images(self, latents: np.ndarray, output_type: OutputType = "pil") -> Any:
        """Final latents (B, C, H, W) as pictures: through the decoder where the bundle has one, else they are the pixels."""
        if output_type == "latent":
            return latents
        self._need_pixels()
        model = self.bundle.manifest.model
        vae, schedule = model.vae, model.schedule
        if self._decoder and vae:
            decoded = decode(self._decoder, vae, latents)
        elif isinstance(schedule, CosineMask):
            white = schedule.vocabulary - 1
            decoded = np.where(latents > white, 0.0, latents / white * 2 - 1)  # what is still masked is grey
        else:
            decoded = latents
        return pictures(decoded, output_type)

    def _finish(self) -> None:
        """Make one picture of nothing: what a picture takes after its last step."""
        self.images(np.zeros((1, *self.bundle.manifest.model.sample_shape)))

    def _need_pixels(self) -> None:
        """Raise UsageError where latents cannot become a picture."""
        if obstacle := self._obstacle():
            raise UsageError(obstacle)

    def _obstacle(self) -> str | None:
        model = self.bundle.manifest.model
        if model.pixels or model.tokens == "grey" or (self._decoder and model.vae):
            return None
        if model.tokens:
            return "this bundle's model draws token codes, and their decoder is not part of it: ask for output_type='latent'"
        return (
            f"this bundle's model draws {model.sample_shape[0]}-channel latents and it holds no decoder: "
            "export it again with --vae DIR, or ask for output_type='latent'"
        )


def whole_labels(model: Model, class_labels: Any) -> np.ndarray:
    """Class labels of a model as int64 (B,); raises UsageError where they are none of its classes."""
    try:
        labels = np.atleast_1d(np.asarray(class_labels))
    except ValueError:  # a ragged list
        labels = np.empty(0)
    if labels.ndim != 1 or not labels.size or labels.dtype.kind not in "iu":
        raise UsageError(f"class_labels must be one or more whole numbers, got {class_labels!r}")
    if wrong := [int(label) for label in labels if not 0 <= label < model.num_classes]:
        raise UsageError(f"this model has classes 0 to {model.num_classes - 1}, got {', '.join(map(str, wrong))}")
    return labels.astype(np.int64)


def _routed(answers: Sequence[Answer]) -> dict[str, Any]:
    """A record's fields on what routers kept: of the last prediction of a step, and the runs repeated for any."""
    strong = [answer.routed for answer in answers if answer.routed]
    weak = [answer.guidance_routed for answer in answers if answer.guidance_routed]
    fields: dict[str, Any] = {"reruns": sum(routed.reruns for routed in strong + weak)}
    for prefix, seen in (("", strong), ("guidance_", weak)):
        if seen:
            fields |= {f"{prefix}kept": seen[-1].kept, f"{prefix}slots": seen[-1].slots}
    return fields


def _policy(policy: Policy | None, budget: Budget | None, guidance_budget: Budget | None) -> Policy:
    if policy is None:
        return Fixed(budget or Budget(), guidance_budget)
    if budget is not None:
        raise UsageError("give budget or policy, not both")
    if guidance_budget is None:
        return policy
    if isinstance(policy, Fixed):
        return replace(policy, guidance_budget=guidance_budget)
    raise UsageError("give the policy its guidance_budget, not the pipeline")
