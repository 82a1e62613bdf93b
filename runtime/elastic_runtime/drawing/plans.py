"""Drawing along a plan: FLUX, SD3 and Qwen-Image over tokens with positions, at one resolution, at two, or at mixed ones."""

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image

from elastic_runtime.choosing.estimates import Gauge
from elastic_runtime.choosing.option import Choice
from elastic_runtime.choosing.plans import PlanOutlook
from elastic_runtime.choosing.policy import Fixed, Policy, Replay
from elastic_runtime.contract.budget import Budget
from elastic_runtime.contract.bundle import Bundle
from elastic_runtime.contract.manifest import Model, Patches, plan_label
from elastic_runtime.denoising.conditions import guidance_of
from elastic_runtime.denoising.pictures import drawable, obstacle, pictures, sides, values
from elastic_runtime.denoising.sources import encode, pixels, resized
from elastic_runtime.denoising.sources import obstacle as unencoded
from elastic_runtime.denoising.tokens import TokenDenoiser, samples
from elastic_runtime.drawing.beside import Beside
from elastic_runtime.drawing.drawing import Drawing, Opener, Texts, checked, conditioning, repeats
from elastic_runtime.drawing.over import Over
from elastic_runtime.errors import BudgetError, UsageError
from elastic_runtime.ralu.caching import Caching
from elastic_runtime.ralu.offers import offers, stepped, unsuited
from elastic_runtime.ralu.patches import best, edge_scores, unpack
from elastic_runtime.ralu.plan import FULL, OWN, PRESETS, STEPPED, Plan, named, preset
from elastic_runtime.request import Request, StepRecord
from elastic_runtime.sampling.course import Course
from elastic_runtime.sampling.enlarging import spectral
from elastic_runtime.sampling.flow import Step
from elastic_runtime.sampling.noise import Generators, initial
from elastic_runtime.sampling.stages import Keep, PlanLoop, PlanStep, along, from_draws
from elastic_runtime.sessions.session import batches

STEPS = 20  # of plans in any number of steps
MOST_STEPS = 50  # of them that a policy weighs: what the paper compares with


class PlanDrawing(Drawing):
    """A loop over the stages of a plan; `size` is (rows, columns) of full-resolution tokens."""

    kind = "along a plan"

    @classmethod
    def unfit(cls, model: Model) -> Sequence[str]:
        return "budget", "guidance_budget", "drop_fraction", "guidance_drop_fraction", "autoguidance", "sampler", "temperature"

    def __init__(self, bundle: Bundle, request: Request, generator: Generators | None):
        super().__init__(bundle, request, generator)
        assert self.model.patches is not None
        self._patches: Patches = self.model.patches
        self._upscale = self.model.vae.upscale if self.model.vae else 1
        self._references = Beside.of(bundle.manifest, request)
        self._beside = len(self._references or ())
        self._over = Over.of(bundle.manifest, request)
        self.size, self.plans, self._usual = self._planned()
        self.name = next(iter(self.plans))
        if request.caching is not None:
            self._check_caching(request.caching)
        normalization = float(flag) if isinstance(flag := request.cfg_normalization, bool) else flag
        scales = request.guidance_scale, request.true_cfg_scale
        self._embedded, self.guidance = guidance_of(self.model, *scales, request.guidance_interval, normalization)
        self.check_guidance("guidance_interval", "cfg_normalization")
        if (
            request.true_cfg_scale is not None
            and request.true_cfg_scale > 1
            and request.prompt is not None
            and request.negative_prompt is None
        ):
            raise UsageError('true_cfg_scale leads away from a negative_prompt: give one, "" for the empty prompt')
        if request.caching and self.guidance.scale > 1 and tuple(request.guidance_interval) != (0.0, 1.0):
            raise UsageError(
                "caching and a guidance_interval do not go together: a prediction with guidance does not continue one without it"
            )
        self._repeats = repeats(request.num_images_per_prompt)
        self._conditioning = conditioning(request)
        self._count = self._conditioning.check(bundle, self.guidance.scale > 1) * self._repeats
        self._lengths: tuple[tuple[int, ...], ...] = ((1,) * self._count,) * 2  # until prompts are read
        self._noise = self._source()
        shape = (self._count, self.model.sample_shape[0], *(side * self._patches.size for side in self.size))
        self._start = self._noise.standard_normal(shape) if request.noise is None else initial(request.noise, shape)
        self._keep: Keep | None = None
        if self._over:
            self._over.check(self._count)

    @property
    def count(self) -> int:
        return self._count

    @property
    def left(self) -> tuple[int, ...]:
        return tuple(count for count in self._left if count)

    def policy(self) -> Policy:
        return Fixed() if self.request.policy is None else self.request.policy

    def read(self, open_graph: Opener) -> Texts:
        return self._conditioning.conditions(self.bundle, open_graph, self.guidance.scale > 1)

    def prepare(self, open_graph: Opener, texts: Texts | None = None) -> None:
        """Text encoders are read one after the other, each closed before the next, and all before the denoiser is
        opened."""
        texts = self.read(open_graph) if texts is None else texts
        strong, weak = checked(texts, self._count // self._repeats, self.guidance.scale > 1)
        self._strong, self._weak = strong.repeated(self._repeats), weak.repeated(self._repeats) if weak else None
        branches = [self._strong, self._weak or self._strong]
        self._lengths = tuple(self._patches.filled_all(texts.counts) for texts in branches)
        self._open_graph = open_graph
        if self._over:
            unit = self._patches.size * self._upscale
            self._picture = self._over.latents(open_graph, (self.size[0] * unit, self.size[1] * unit), self._count)
            self._keep = self._over.keep(self._picture, self._start, self._patches.size)
        references = self._references.references(open_graph) if self._references else None
        self.session = open_graph("denoiser")
        offered = {name: plan for name, plan in self.plans.items() if self._refusal(plan) is None}
        if not offered:
            raise self._refusal(self.plans[self.name]) or UsageError("there is no plan")
        self.plans = offered if self.request.policy else self.plans
        self._denoiser = TokenDenoiser(self.session, self._patches, self._embedded, references)

    def outlook(self, gauge: Gauge, finishes: bool) -> PlanOutlook:
        usual = self.name if self.name in self.plans else next(iter(self.plans))
        known = self.plans, self.size, usual, self._usual.get(usual, self.plans[usual]), self._lengths, self._beside
        asked = self.request.num_inference_steps is not None
        return PlanOutlook(gauge, self.count, self.guidance, *known, finishes, asked, self._over is not None)

    def begin(self, choice: Choice) -> None:
        assert choice.plan is not None
        self.plan = choice.plan
        self._check(choice.plan)
        self._check_begin(choice.plan)
        if refusal := self._refusal(choice.plan):
            raise refusal
        self._left = list(choice.left(choice.plan.steps))
        self._taken = [0] * len(self._left)
        velocity = self.request.caching.apply(self._velocity, choice.plan) if self.request.caching else self._velocity
        draw = self._noise.standard_normal
        start, begin = self._start, choice.plan.begin
        if self._over:
            start = begin * start + (1 - begin) * self._picture
        steps = self._choose, from_draws(draw), self._enlarge
        self.session.foresee(np.concatenate(Course.along(choice.plan).respaced(tuple(self._left)).times))
        self._loop: PlanLoop = along(velocity, start, choice.plan, self._patches.size, *steps, self._left, self._keep)

    def step(self, replacement: np.ndarray | None) -> Step:
        step = self._loop.send(replacement)
        self._taken[step.stage] += 1
        return step

    def record(self, step: Step, choice: Choice, seconds: float) -> StepRecord:
        assert isinstance(step, PlanStep)
        budget = Budget(tokens=self._patches.filled(step.sample.shape[1] + self._beside))
        weak = budget if self._weak and self.guidance.active(step.time) else None
        computed = not self.request.caching or step.index not in self.request.caching.skip
        details = {"predicted": choice.predicted, "reason": choice.reason, "stage": step.stage, "computed": computed}
        return StepRecord(step.index, step.time, step.next_time, budget, weak, seconds, **details)  # type: ignore[arg-type]

    def follow(self, choice: Choice, step: Step, replacement: np.ndarray | None) -> np.ndarray | None:
        left = choice.left(self.left)
        self._left[len(self._left) - len(left) :] = left
        return replacement

    def latents(self, state: np.ndarray) -> np.ndarray:
        return unpack(state, *self.size, self._patches.size)

    def facts(self) -> dict[str, Any]:
        assert self.plan is not None
        unit = self._patches.size * self._upscale
        return {
            "plan": plan_label(self.name_of(self.plan), self.drawn.steps),
            "height": self.size[0] * unit,
            "width": self.size[1] * unit,
            "size": self.size,
            "tokens": self._tokens(self.plan),
            "references": self._beside,
            "embedded_guidance": self._embedded,
            "guidance": self.model.guidance_scale(self.guidance.scale),
        }

    def name_of(self, plan: Plan) -> str:
        """The name of a plan in whichever number of steps."""
        return named(plan, self.plans, self._usual)

    @property
    def drawn(self) -> Plan:
        assert self.plan is not None
        return replace(self.plan, steps=tuple(self._taken)) if all(self._taken) else self.plan

    def _velocity(self, x: np.ndarray, positions: np.ndarray, sigma: float, index: int, stage: int) -> np.ndarray:
        last = stage == len(self._left) - 1
        size = self.size if last else (self.size[0] // 2, self.size[1] // 2)
        return self._denoiser.guided(x, positions, size, sigma, self._strong, self._weak, self.guidance)

    def _choose(self, latents: np.ndarray, grown: int) -> np.ndarray:
        decoder = self._open_graph("decoder") if self.model.vae else None
        return best(edge_scores(values(self.bundle.manifest, decoder, latents), self._patches.size * self._upscale), grown)

    def _enlarge(self, latents: np.ndarray, sigma: float) -> np.ndarray:
        assert self.plan is not None
        draw = self._noise.standard_normal
        if self.plan.again is None:
            return spectral(latents, sigma, draw)
        assert self.model.vae is not None  # it is checked that there is an encoder
        small = pixels("the picture", pictures(values(self.bundle.manifest, self._open_graph("decoder"), latents), "pil"), "RGB")
        height, width = (2 * side for side in small.shape[1:3])
        with self._open_graph("encoder") as encoder:
            large = encode(encoder, self.model.vae, resized(small, height, width, Image.Resampling.BICUBIC))
        return self.plan.again * draw(large.shape) + (1 - self.plan.again) * large

    def _planned(self) -> tuple[tuple[int, int], dict[str, Plan], dict[str, Plan]]:
        """The size in tokens; the plans that may be drawn, by name, the one asked for or usual first; and plans in the usual steps."""
        request, model = self.request, self.model
        asked, recorded = request.plan, _recorded(request.policy)
        if not isinstance(asked, str | Plan | None):
            raise UsageError(f"plan is {', '.join((*PRESETS, *STEPPED))}, or a Plan, got {asked!r}")
        if self._over and asked is None:
            asked = FULL
        chooses = request.policy is not None and not isinstance(request.policy, Fixed)
        self.size = self._sized(recorded.plain if recorded else asked in (None, FULL) or (isinstance(asked, Plan) and asked.plain))
        steps = request.num_inference_steps
        usual = steps if steps is not None else model.few_steps or STEPS
        most = MOST_STEPS if chooses and steps is None and not model.few_steps else usual
        known = self.size[0] * self.size[1], model.config.get("scheduler", {}), model.few_steps
        offered, ways = offers(most, *known), offers(usual, *known)
        plan = self._first(offered) if asked is None else asked
        if steps is not None and plan not in STEPPED:
            raise UsageError(f"num_inference_steps is for plans {', '.join(STEPPED)}; plan {plan!r} has steps of its own")
        if isinstance(plan, str) and (why := unsuited(plan, *known)):
            raise UsageError(why)

        def chosen(count: int) -> Plan:
            each = plan if isinstance(plan, Plan) else stepped(plan, count, *known) if plan in STEPPED else preset(plan)
            return each.over(self._over.strength) if self._over else each

        name, weighed, drawn = plan if isinstance(plan, str) else OWN, chosen(most), chosen(usual)
        if recorded:
            self._check_recorded(recorded, plan, (weighed, drawn))
            name, weighed, drawn = FULL if recorded.plain else named(recorded, offered, ways), recorded, recorded
        self._check_begin(weighed)
        if chooses and asked is None and not recorded:
            return self.size, self._taking(offered), ways
        return self.size, self._taking({name: weighed}), {name: drawn}

    def _sized(self, plain: bool) -> tuple[int, int]:
        """Rows and columns of full-resolution tokens of what is drawn, along a `plain` plan maybe."""
        request, unit = self.request, self._patches.size * self._upscale
        given = self._over.size if self._over else self._references.size if self._references else None
        usual = given or tuple(side * self._upscale for side in self.model.sample_shape[1:])
        height, width = (
            side if asked_for is None else asked_for for side, asked_for in zip(usual, (request.height, request.width), strict=True)
        )
        self._check_sides(height, width, unit if plain else 2 * unit, plain)
        size = height // unit, width // unit
        if self._patches.table is not None and max(size) > self._patches.table:
            most = self._patches.table * unit
            raise UsageError(f"this model draws pictures of at most {most} px a side, got {height} x {width}")
        return size

    def _check_recorded(self, recorded: Plan, plan: str | Plan, asked: Sequence[Plan]) -> None:
        """Raise UsageError where a replay was drawn along another plan than `plan`, in any of the steps that are `asked`."""
        if self._over and not (recorded.plain and recorded.begin in {each.begin for each in asked}):
            begins = f"at sigma {recorded.begin:.3g}" if recorded.plain else f"in {len(recorded.steps)} stages"
            raise UsageError(
                f"the replay was drawn {begins}, and over this picture, with this strength, it begins at {asked[-1].begin:.3g}: leave "
                "policy out, or image and strength as they were"
            )
        if self.request.plan is not None and not any(each.alike(recorded) for each in asked):
            raise UsageError(f"the replay was drawn along another plan than {plan!r}: leave plan out")

    def _check_begin(self, plan: Plan) -> None:
        """Raise UsageError unless a plan begins where a picture that is drawn over does, or in noise where there is none."""
        if not self._over and plan.begin < 1:
            raise UsageError("a plan that begins below sigma 1 draws over a picture: give image")
        if self._over and not plan.plain:
            raise UsageError("a picture is drawn over along a plan of one stage, such as 'full'")

    def _first(self, offered: dict[str, Plan]) -> str:
        """The first of the plans that the bundle takes at this size, or where there is none the first of all, whose fault is told."""
        for name, plan in offered.items():
            with contextlib.suppress(UsageError):
                self._check(plan)
                return name
        return next(iter(offered))

    def _beyond(self, plan: Plan) -> list[int]:
        """Tokens of stages that the bundle does not take."""
        dimensions = self.bundle.manifest.graphs["denoiser"].dimensions
        return [count for count in self._tokens(plan) if "S" in dimensions and count not in dimensions["S"]]

    def _taking(self, plans: dict[str, Plan]) -> dict[str, Plan]:
        """Those of `plans` that the bundle takes at this size; where it takes none, the first one's fault is the
        error."""
        taking, faults = {}, []
        for name, plan in plans.items():
            try:
                self._check(plan)
            except UsageError as fault:
                faults.append(fault)
            else:
                taking[name] = plan
        if not taking:
            raise faults[0]
        return taking

    def _tokens(self, plan: Plan) -> tuple[int, ...]:
        """Image tokens of each stage as the graph takes them, those of references among them."""
        return self._patches.filled_all(count + self._beside for count in plan.tokens(*self.size))

    def _check(self, plan: Plan) -> None:
        """Raise UsageError unless the bundle takes a plan at this size."""
        unit, latent = self._patches.size * self._upscale, self._patches.size
        height, width = (side * unit for side in self.size)
        if not plan.plain:
            self._check_sides(height, width, 2 * unit, False)
        if wrong := self._beyond(plan):
            takes = self.bundle.manifest.graphs["denoiser"].dimensions["S"]
            whose, instead = (f", {self._beside} of them of references,", " and these --tokens") if self._beside else ("", "")
            raise UsageError(
                f"this bundle takes {takes} image tokens, and a picture of {height} x {width} px needs {wrong[0]}{whose} in a "
                f"stage: take another size, or export it for that size{instead}"
            )
        if (plan.mixed or plan.growth == "pixels" or self.request.output_type != "latent") and not drawable(self.bundle.manifest):
            raise UsageError(str(obstacle(self.bundle.manifest)))
        if self.request.output_type != "latent":
            self._check_decoder(self.size[0] * latent, self.size[1] * latent, "the picture")
        if plan.growth == "pixels" and (why := unencoded(self.bundle.manifest)):
            raise UsageError(why)
        if plan.mixed or plan.growth == "pixels":
            self._check_decoder(self.size[0] * latent // 2, self.size[1] * latent // 2, "its preview")

    def _check_sides(self, height: Any, width: Any, unit: int, plain: bool) -> None:
        for name, side in (("height", height), ("width", width)):
            if isinstance(side, bool) or not isinstance(side, int | np.integer) or side <= 0 or side % unit:
                raise UsageError(f"{name} is a multiple of {unit} px{'' if plain else ' for this plan'}, got {side!r}")

    def _check_decoder(self, height: int, width: int, what: str) -> None:
        """Raise UsageError unless the decoder takes latents of these sides."""
        takes = sides(self.bundle.manifest)
        for name, side, span in zip(("height", "width"), (height, width), takes, strict=True) if takes else ():
            if side not in span:
                raise UsageError(
                    f"this bundle decodes {name}s of {span.min * self._upscale} to {span.max * self._upscale} px, and {what} has "
                    f"{side * self._upscale}: take another size, or export it for that size with --size"
                )

    def _check_caching(self, caching: Any) -> None:
        if not isinstance(caching, Caching):
            raise UsageError(f"caching is a Caching, such as Caching.every(plan, 2), got {caching!r}")
        if self.request.policy is not None:
            raise UsageError("caching skips steps of a plan that is known: give plan, and leave policy out")
        caching.check(self.plans[self.name])

    def _refusal(self, plan: Plan) -> UsageError | None:
        """Why the open session does not take a plan: its tokens, or the batches that will run."""
        session = self.session
        span, compiled = session.spans.get("S"), sorted({budget["tokens"] for budget in session.budgets or () if "tokens" in budget})
        if missing := [each for each in self._tokens(plan) if (compiled and each not in compiled) or (span and each not in span)]:
            wider = f"export the bundle again with --budgets {','.join(map(str, sorted({*compiled, *missing})))}"
            return BudgetError(
                f"{session.where} was compiled for {', '.join(map(str, compiled)) or span} image tokens, and a stage of the plan needs "
                f"{missing[0]}: take another plan or size, or {wider if compiled else 'build a wider engine'}"
            )
        guided = {self.guidance.active(sigma) for stage in plan.stages() for sigma in stage.sigmas[:-1]}
        try:
            for alone in {False, True} if plan.mixed else {False}:  # in the mixed stage each picture runs alone
                for rows in {rows for each in guided for rows in samples(self._lengths, each, alone)}:
                    batches(session, rows)
        except BudgetError as error:
            return error
        return None


def _recorded(policy: Policy | None) -> Plan | None:
    """The plan along which a replay was drawn."""
    return policy.choices[0].plan if isinstance(policy, Replay) and policy.choices else None


def plans_of(bundle: Bundle, request: Request) -> tuple[tuple[int, int], dict[str, Plan]]:
    """The size in tokens of a request's picture, and the plans that may be drawn for it, by name; nothing is opened.

    Raises: UsageError where the bundle takes none.
    """
    drawing = PlanDrawing(bundle, request, None)
    return drawing.size, drawing.plans


def takes(bundle: Bundle, name: str) -> tuple[tuple[int, int], Plan]:
    """The size in tokens of the bundle's own picture, and the plan of that name for it.

    Raises: UsageError where the bundle does not take it.
    """
    subject = {"class_labels": (0,)} if bundle.manifest.model.num_classes else {"prompt": ("",)}
    size, plans = plans_of(bundle, Request(**subject, plan=name, guidance_scale=0.0))
    return size, plans[name]
