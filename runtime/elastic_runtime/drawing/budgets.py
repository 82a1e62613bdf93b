"""Drawing at budgets on a model's axes, if it has any: of classes, of prompts or of nothing, by ELIT, ELT, DC-DiT, U-ViT and HDiT."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from elastic_runtime.choosing.budgets import BudgetOutlook
from elastic_runtime.choosing.estimates import Gauge
from elastic_runtime.choosing.option import Choice
from elastic_runtime.choosing.policy import Fixed, Policy
from elastic_runtime.contract.budget import Budget
from elastic_runtime.contract.bundle import Bundle
from elastic_runtime.contract.manifest import Model
from elastic_runtime.contract.schedule import whole_steps
from elastic_runtime.denoising.conditions import guidance_of, whole_labels
from elastic_runtime.denoising.denoiser import Answer, Denoiser
from elastic_runtime.denoising.guidance import Branches
from elastic_runtime.denoising.pictures import obstacle
from elastic_runtime.denoising.tokens import Conditions
from elastic_runtime.drawing.drawing import Drawing, Opener, Texts, checked, conditioning, finite, repeats
from elastic_runtime.errors import UsageError
from elastic_runtime.request import Progress, Request, StepRecord
from elastic_runtime.sampling.fitting import resumable, sampler, start, times
from elastic_runtime.sampling.flow import Loop, Step, after
from elastic_runtime.sampling.multistep import History
from elastic_runtime.sampling.noise import Generators

STEPS = 20
OVER = ("image", "strength", "mask_image")  # of a request, what is drawn over


class BudgetDrawing(Drawing):
    """A loop over the times of a sampler, whose steps have budgets."""

    kind = "at budgets"
    texts = (
        "prompt", "negative_prompt", "prompt_embeds", "pooled_prompt_embeds", "negative_prompt_embeds", "negative_pooled_prompt_embeds",
        "prompt_embeds_mask", "negative_prompt_embeds_mask",
    )  # fmt: skip

    @classmethod
    def unfit(cls, model: Model) -> Sequence[str]:
        texts = () if model.text else cls.texts
        return (
            *texts,
            "true_cfg_scale",
            "cfg_normalization",
            "image_latents",
            "image_reference",
            "height",
            "width",
            "plan",
            "caching",
            *OVER,
        )

    def __init__(self, bundle: Bundle, request: Request, generator: Generators | None):
        super().__init__(bundle, request, generator)
        if request.output_type != "latent" and (why := obstacle(bundle.manifest)):
            raise UsageError(why)  # not after minutes of denoising
        interval = request.guidance_interval
        if not isinstance(interval, Sequence) or len(interval) != 2:
            raise UsageError(f"guidance_interval is a pair of times, (0.3, 0.8), got {interval!r}")
        led = guidance_of(self.model, request.guidance_scale, None, interval)[1]
        self.guidance = replace(led, auto=request.autoguidance)
        if self.model.unconditional and self.guidance.scale > 1 and not self.guidance.auto:
            raise UsageError(f"{self.model.name} has no classes to lead away from: leave guidance_scale out, or give autoguidance")
        self.check_guidance("guidance_budget", "autoguidance", "guidance_drop_fraction", "guidance_interval")
        self.sampler, self._run = sampler(self.model, request.sampler, request.temperature)
        self.steps = STEPS if request.num_inference_steps is None else request.num_inference_steps
        whole_steps(self.steps)
        self._repeats = repeats(request.num_images_per_prompt)
        if self.model.text:
            self._conditioning = conditioning(request)
            self._count = self._conditioning.check(bundle, self._led) * self._repeats
        else:
            self._strong = Conditions(labels=np.repeat(whole_labels(self.model, request.class_labels), self._repeats))
            self._count = len(self._strong)
        self._weak: Conditions | None = None
        self._noise = self._source()
        self._start = start(self.model, self._count, self._noise, request.noise)
        self._budgets = self.policy()

    @property
    def count(self) -> int:
        return self._count

    @property
    def left(self) -> tuple[int, ...]:
        return (self._left,) if self._left else ()

    @property
    def _led(self) -> bool:
        """Whether guidance leads away from a text of its own."""
        return self.guidance.scale > 1 and not self.guidance.auto

    def policy(self) -> Policy:
        """Budgets that are given are fixed; a policy may get its weak branch from the request."""
        request = self.request
        if request.policy is None:
            return Fixed(request.budget or Budget(), request.guidance_budget)
        if request.budget is not None:
            raise UsageError("give budget or policy, not both")
        if request.guidance_budget is None:
            return request.policy
        if isinstance(request.policy, Fixed):
            return Fixed(request.policy.budget, request.guidance_budget)
        raise UsageError("give the policy its guidance_budget, not the pipeline")

    def read(self, open_graph: Opener) -> Texts | None:
        return self._conditioning.conditions(self.bundle, open_graph, self._led) if self.model.text else None

    def prepare(self, open_graph: Opener, texts: Texts | None = None) -> None:
        """Text encoders, where there are any, are read one after the other and before the denoiser is opened."""
        if texts := self.read(open_graph) if texts is None else texts:
            strong, weak = checked(texts, self._count // self._repeats, self._led)
            self._strong, self._weak = strong.repeated(self._repeats), weak.repeated(self._repeats) if weak else None
        self.session = open_graph("denoiser")
        self._denoiser = Denoiser(self.session, self.bundle.manifest)
        self._routing = self._denoiser.routing(self.request.drop_fraction, self.request.guidance_drop_fraction)

    def outlook(self, gauge: Gauge, finishes: bool) -> BudgetOutlook:
        self._gauge = gauge
        apart = self._weak is not None and not self._strong.beside(self._weak)
        alike = self.guidance.auto and self.request.guidance_drop_fraction in (None, self.request.drop_fraction)
        return BudgetOutlook(gauge, self.count, self.guidance, self.steps, self.sampler, finishes, apart, alike)

    def begin(self, choice: Choice) -> None:
        self._check(choice)
        self._choice, self._index, self._history = choice, 0, History()
        (self._left,) = choice.left((self.steps,))
        self.session.foresee(times(self.model, self.sampler, self._left))
        self._loop: Loop = self._run(self._predict, self._start, self._left, self._noise, history=self._history)

    def step(self, replacement: np.ndarray | None) -> Step:
        self._guided = False
        self._answers: list[Answer] = []  # of this step
        step = self._loop.send(replacement)
        self._left -= 1
        step = replace(step, index=self._index, steps=self._index + 1 + self._left)
        self._index += 1
        return step

    def _predict(self, x: np.ndarray, time: float, index: int) -> np.ndarray:
        self._guided = self._guided or self.guidance.active(self.model.schedule.share(time))
        branches = Branches(self._choice.budget, self._choice.guidance_budget)
        answer = self._denoiser.guided(x, time, self._strong, self.guidance, branches, self._routing, self._weak)
        self._routing = self._routing.after(answer.routed, answer.guidance_routed)
        self._answers.append(answer)
        if self.model.tokens:  # whose state is whole numbers, whatever was predicted
            finite(answer.prediction, index)
        return answer.prediction

    def record(self, step: Step, choice: Choice, seconds: float) -> StepRecord:
        weak = choice.guidance_budget if self._guided else None
        details = {"predicted": choice.predicted, "reason": choice.reason} | _routed(self._answers)
        return StepRecord(step.index, step.time, step.next_time, choice.budget, weak, seconds, **details)

    def progress(self, step: Step, record: StepRecord) -> Progress:
        routed = self._answers[-1].routed
        return Progress(step, record, routed.mask if routed else None)

    def follow(self, choice: Choice, step: Step, replacement: np.ndarray | None) -> np.ndarray | None:
        self._check(choice)
        self._choice = choice
        left = choice.left((self._left,))
        if left == (self._left,):
            return replacement
        if not resumable(self.sampler):
            raise UsageError(f"sampler {self.sampler} cannot go on with other steps than it began with: leave steps out of later choices")
        (self._left,) = left
        self._loop.close()
        state = after(step, replacement)
        if state is not step.sample:
            self._history.clear()
        self.session.foresee(times(self.model, self.sampler, self._left, step.next_time))
        self._loop = self._run(self._predict, state, self._left, self._noise, step.next_time, self._history)
        return None

    def _check(self, choice: Choice) -> None:
        """Raise UsageError where autoguidance would lead away from a branch that is no weaker."""
        if not self.guidance.auto:
            return
        routing, strong, weak = self._routing, choice.budget, choice.guidance_budget
        sizes = [(self._gauge.peak.work(budget).flops, sum(budget.values())) for budget in (weak, strong)]
        less = sizes[0] <= sizes[1] and routing.guidance_drop >= routing.drop
        if not less or (weak == strong and routing.guidance_drop == routing.drop):
            raise UsageError(f"autoguidance needs a guidance budget smaller than the budget, {strong}, got {weak}: give guidance_budget")

    def latents(self, state: np.ndarray) -> np.ndarray:
        return state

    def facts(self) -> dict[str, Any]:
        return {"sampler": self.sampler, "guidance": self.guidance.scale}


def _routed(answers: Sequence[Answer]) -> dict[str, Any]:
    """A record's fields on what routers kept: of the last prediction of a step, and the runs repeated for any."""
    strong = [answer.routed for answer in answers if answer.routed]
    weak = [answer.guidance_routed for answer in answers if answer.guidance_routed]
    fields: dict[str, Any] = {"reruns": sum(routed.reruns for routed in strong + weak)}
    for prefix, seen in (("", strong), ("guidance_", weak)):
        if seen:
            fields |= {f"{prefix}kept": seen[-1].kept, f"{prefix}slots": seen[-1].slots}
    return fields
