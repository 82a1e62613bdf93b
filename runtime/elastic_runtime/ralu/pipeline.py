"""`RaluPipeline`: pictures from a bundle of FLUX or SD3 along a plan of mixed resolution, in words that a diffusers user knows."""

import os
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np

from elastic_runtime.contract.axis import Span
from elastic_runtime.contract.bundle import Bundle
from elastic_runtime.denoising.conditions import Subject, guidance_of
from elastic_runtime.denoising.denoiser import Guidance
from elastic_runtime.denoising.pictures import OutputType, decode, pictures
from elastic_runtime.denoising.tokens import TokenDenoiser
from elastic_runtime.errors import BudgetError, BundleError, InferenceError, MissingError, UsageError
from elastic_runtime.ralu.caching import Caching
from elastic_runtime.ralu.patches import best, edge_scores, unpack
from elastic_runtime.ralu.plan import Plan, full, preset
from elastic_runtime.sampling.flow import after
from elastic_runtime.sampling.stages import RaluStep, from_draws, ralu
from elastic_runtime.sessions.session import Session, batches, obstacles, open_session

# callback(pipe, step_index, sigma, {"latents": tokens (B, S, C)}) -> a dict that may hold other "latents"
Callback = Callable[["RaluPipeline", int, float, dict[str, np.ndarray]], dict[str, np.ndarray]]
Generators = np.random.Generator | Sequence[np.random.Generator]


@dataclass(frozen=True)
class RaluRecord:
    """What one step used: its stage (from 0), image tokens, sigmas, whether the network ran, and seconds.

    The seconds of a stage's first step include what led to it: the preview, its edges, growing and noise.
    """

    index: int
    stage: int
    tokens: int
    sigma: float
    next_sigma: float
    computed: bool
    seconds: float


@dataclass(frozen=True)
class RaluOutput:
    """`images`: PIL pictures, or float32 (B, H, W, 3) in [0, 1], or the final latents (B, C, h, w); `steps` tells what was spent.

    `seconds` are of the whole call: opening graphs, text encoders and the decoder are in it.
    """

    images: Any
    steps: tuple[RaluRecord, ...]
    plan: Plan
    seconds: float


@dataclass(frozen=True)
class RaluProgress:
    """A step with its record, as `RaluPipeline.iterate` yields it."""

    step: RaluStep
    record: RaluRecord


@dataclass(frozen=True)
class Drawing:
    """How something is drawn, checked against the bundle; `size` is (rows, columns) of full-resolution tokens."""

    plan: Plan
    size: tuple[int, int]
    caching: Caching | None


class RaluPipeline:
    """Pictures from a bundle whose denoiser takes tokens with positions. Close it, or use it in a `with` block.

    Graphs are opened when they are first needed; text encoders one after the other, each closed before the next.
    """

    def __init__(self, bundle: Bundle, open_graph: Callable[[str], Session]):
        if bundle.manifest.model.patches is None:
            raise UsageError(
                f"{bundle.manifest.model.name} draws at budgets, not along a plan: open it with ElasticPipeline.from_pretrained"
            )
        self.bundle = bundle
        self._patches = bundle.manifest.model.patches
        self._open_graph = open_graph
        self._sessions: dict[str, Session] = {}

    @classmethod
    def from_pretrained(cls, bundle: str | os.PathLike[str] | Bundle, backend: str | None = None, **options: Any) -> Self:
        """Open a bundle folder; `backend` and its `options` (ONNX Runtime: providers, threads, spinning) are optional.

        Raises: BundleError, and MissingError where nothing here can run its denoiser.
        """
        opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        if "denoiser" not in opened.manifest.graphs:
            has = ", ".join(opened.manifest.graphs)
            raise BundleError(
                f"{opened.folder} has no graph 'denoiser', it has {has}: export the model again with --components transformer,vae"
            )
        found = [obstacles(artifact, backend) for artifact in opened.manifest.graphs["denoiser"].artifacts]
        if not any(room for room, _ in found):
            why = " ".join(dict.fromkeys(reason for _, reasons in found for reason in reasons))
            raise MissingError(f"nothing here can run 'denoiser' of {opened.folder}. {why}")
        return cls(opened, lambda graph: open_session(opened, graph, backend, **options))

    def __repr__(self) -> str:
        return f"RaluPipeline.from_pretrained({str(self.bundle.folder)!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Release the sessions; the next drawing opens them again."""
        while self._sessions:
            self._sessions.popitem()[1].close()

    @property
    def where(self) -> str:
        """What the denoiser runs on."""
        return self._session("denoiser").where

    def drawing(
        self,
        plan: Plan | str = "4x",
        num_inference_steps: int | None = None,
        height: int | None = None,
        width: int | None = None,
        caching: Caching | None = None,
        output_type: OutputType = "pil",
    ) -> Drawing:
        """The plan and the sizes of a drawing, checked against the bundle; nothing is opened.

        Raises: UsageError naming what does not fit.
        """
        model, patches = self.bundle.manifest.model, self._patches
        upscale = model.vae.upscale if model.vae else 1
        if output_type not in ("pil", "np", "latent"):
            raise UsageError(f"output_type must be pil, np or latent, got {output_type!r}")
        height = model.sample_shape[1] * upscale if height is None else height
        width = model.sample_shape[2] * upscale if width is None else width
        if num_inference_steps is not None and plan != "full":
            raise UsageError(f"num_inference_steps is for plan 'full'; plan {plan!r} has steps of its own")
        plain = plan == "full" or (isinstance(plan, Plan) and plan.plain)
        unit = patches.size * upscale * (1 if plain else 2)
        for name, side in (("height", height), ("width", width)):
            if isinstance(side, bool) or not isinstance(side, int | np.integer) or side <= 0 or side % unit:
                raise UsageError(f"{name} is a multiple of {unit} px{'' if plain else ' for this plan'}, got {side!r}")
        size = height // upscale // patches.size, width // upscale // patches.size
        if plan == "full":
            plan = full(20 if num_inference_steps is None else num_inference_steps, size[0] * size[1], model.config.get("scheduler", {}))
        plan = plan if isinstance(plan, Plan) else preset(plan)
        self._check_tokens(plan, height, width, size)
        if patches.table is not None and max(size) > patches.table:
            most = patches.table * patches.size * upscale
            raise UsageError(f"this model draws pictures of at most {most} px a side, got {height} x {width}")
        if (not plain or output_type != "latent") and not self._draws_pixels():
            raise UsageError(
                "this bundle holds no decoder, without which there is no picture and no preview whose edges a plan could follow: "
                "export it again with its VAE (--components transformer,vae), or take latents in Python: plan='full', output_type='latent'"
            )
        if output_type != "latent":
            self._check_decoder(height // upscale, width // upscale, "the picture")
        if not plain:
            self._check_decoder(height // upscale // 2, width // upscale // 2, "its preview")
        if caching is not None:
            if not isinstance(caching, Caching):
                raise UsageError(f"caching is a Caching, such as Caching.every(plan, 2), got {caching!r}")
            caching.check(plan)
        return Drawing(plan, size, caching)

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        negative_prompt: str | Sequence[str] | None = None,
        class_labels: Sequence[int] | int | None = None,
        prompt_embeds: np.ndarray | None = None,
        pooled_prompt_embeds: np.ndarray | None = None,
        negative_prompt_embeds: np.ndarray | None = None,
        negative_pooled_prompt_embeds: np.ndarray | None = None,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        plan: Plan | str = "4x",
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        true_cfg_scale: float | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        caching: Caching | None = None,
        generator: Generators | None = None,
        noise: np.ndarray | None = None,
        output_type: OutputType = "pil",
        callback_on_step_end: Callback | None = None,
    ) -> RaluOutput:
        """Draw `num_images_per_prompt` pictures for each prompt, pair of embeddings, or class label.

        Args:
            prompt: texts; the bundle's text encoders read them. Or embeddings: prompt_embeds (B, T, D) with
                pooled_prompt_embeds (B, P). Or class_labels, for models of classes.
            negative_prompt: what guidance leads away from; by default the empty prompt.
            height, width: in pixels, multiples of 32 for FLUX and SD3 (16 with a plan of one stage); by default the bundle's.
            plan: 4x, 7x, full, or a `Plan`.
            num_inference_steps: steps of plan full (20).
            guidance_scale: where the model was distilled with guidance (FLUX.1-dev) the scale it takes in, by default 3.5; else
                classifier-free guidance, by default 7 for SD3 and 1 (off) for the others, as in diffusers.
            true_cfg_scale: classifier-free guidance on top of a distilled one; 1 is off.
            guidance_interval: sigmas between which classifier-free guidance acts; not together with caching.
            caching: steps whose prediction is reused or extrapolated; by default none.
            generator: source of all noise, or one for each picture; with its own, a picture is the same in any batch.
            noise: initial noise (B, C, h, w) at full resolution in place of the generator's.
            output_type: pil, np or latent.
            callback_on_step_end: called as `callback(pipe, step_index, sigma, {"latents": tokens})` after each step.

        Raises: UsageError and its kinds for wrong arguments; InferenceError if the backend fails or the result is not finite.
        """
        begun = time.perf_counter()
        drawing = self.drawing(plan, num_inference_steps, height, width, caching, output_type)
        subject = Subject(
            prompt,
            negative_prompt,
            prompt_embeds,
            pooled_prompt_embeds,
            negative_prompt_embeds,
            negative_pooled_prompt_embeds,
            class_labels,
        )
        steps = self.iterate(
            subject,
            drawing,
            num_images_per_prompt=num_images_per_prompt,
            guidance_scale=guidance_scale,
            true_cfg_scale=true_cfg_scale,
            guidance_interval=guidance_interval,
            generator=generator,
            noise=noise,
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
                answer = callback_on_step_end(self, progress.step.index, progress.step.time, {"latents": state})
                if answer is not None and not isinstance(answer, Mapping):
                    raise UsageError(f"callback_on_step_end returns a dict that may hold other latents, got {type(answer).__name__}")
                state = replacement = after(progress.step, (answer or {}).get("latents"))
        latents = unpack(state, *drawing.size, self._patches.size)
        images = latents if output_type == "latent" else pictures(self.decode(latents), output_type)
        return RaluOutput(images, tuple(records), drawing.plan, time.perf_counter() - begun)

    def iterate(
        self,
        subject: Subject,
        drawing: Drawing,
        *,
        num_images_per_prompt: int = 1,
        guidance_scale: float | None = None,
        true_cfg_scale: float | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        generator: Generators | None = None,
        noise: np.ndarray | None = None,
    ) -> Generator[RaluProgress, np.ndarray | None, None]:
        """The denoising loop itself: yields a `RaluProgress` after each step; send tokens to replace the state."""
        model, patches, plan, caching = self.bundle.manifest.model, self._patches, drawing.plan, drawing.caching
        embedded, guidance = guidance_of(model, guidance_scale, true_cfg_scale, guidance_interval)
        if caching and guidance.scale > 1 and tuple(guidance_interval) != (0.0, 1.0):
            raise UsageError(
                "caching and a guidance_interval do not go together: a prediction with guidance does not continue one without it"
            )
        if isinstance(num_images_per_prompt, bool) or not isinstance(num_images_per_prompt, int) or num_images_per_prompt < 1:
            raise UsageError(f"num_images_per_prompt is a whole number from 1, got {num_images_per_prompt!r}")
        count = subject.check(self.bundle, guidance.scale > 1) * num_images_per_prompt
        draw = _draw(generator, count)
        shape = (count, model.sample_shape[0], *(side * patches.size for side in drawing.size))
        start = draw(shape) if noise is None else np.asarray(noise)
        if start.shape != shape:
            raise UsageError(f"noise must have shape {shape}, one sample a picture, got {start.shape}")
        strong, weak = subject.conditions(self.bundle, self._open_graph, guidance.scale > 1)
        strong, weak = strong.repeated(num_images_per_prompt), weak.repeated(num_images_per_prompt) if weak else None
        _check_session(self._session("denoiser"), drawing, count, guidance)
        denoiser = TokenDenoiser(self._session("denoiser"), patches, embedded)
        last_stage = len(plan.steps) - 1

        def velocity(x: np.ndarray, positions: np.ndarray, sigma: float, index: int, stage: int) -> np.ndarray:
            size = drawing.size if stage == last_stage else (drawing.size[0] // 2, drawing.size[1] // 2)
            return denoiser.guided(x, positions, size, sigma, strong, weak, guidance)

        def choose(latents: np.ndarray, grown: int) -> np.ndarray:
            upscale = model.vae.upscale if model.vae else 1
            return best(edge_scores(self.decode(latents), patches.size * upscale), grown)

        predict = caching.apply(velocity, plan) if caching else velocity
        loop = ralu(predict, start, plan, patches.size, choose, from_draws(draw))
        last, replacement = time.perf_counter(), None
        while True:
            try:
                step = loop.send(replacement)
            except StopIteration:
                return
            if not np.isfinite(step.sample).all():
                raise InferenceError(f"step {step.index} gave values that are not finite; try --dtype fp32, and verify the bundle")
            computed, seconds = not caching or step.index not in caching.skip, time.perf_counter() - last
            record = RaluRecord(step.index, step.stage, step.sample.shape[1], step.time, step.next_time, computed, seconds)
            replacement = yield RaluProgress(step, record)
            last = time.perf_counter()

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Pictures (B, 3, H, W) with values in about [-1, 1] of latents (B, C, h, w) of any size: the last ones, or a preview."""
        vae = self.bundle.manifest.model.vae
        return decode(self._session("decoder"), vae, latents) if vae else latents

    def _session(self, graph: str) -> Session:
        if graph not in self._sessions:
            self._sessions[graph] = self._open_graph(graph)
        return self._sessions[graph]

    def _draws_pixels(self) -> bool:
        manifest = self.bundle.manifest
        return "decoder" in manifest.graphs if manifest.model.vae else manifest.model.sample_shape[0] == 3

    def _check_decoder(self, height: int, width: int, what: str) -> None:
        """Raise UsageError unless the decoder takes latents of these sides."""
        if "decoder" not in self.bundle.manifest.graphs:
            return
        graph = self.bundle.manifest.graphs["decoder"]
        for name, side, takes in zip(("height", "width"), (height, width), graph.inputs[0].shape[2:], strict=True):
            span = graph.dimensions[takes] if isinstance(takes, str) else Span(int(takes), int(takes))
            if side not in span:
                upscale = self.bundle.manifest.model.vae.upscale if self.bundle.manifest.model.vae else 1
                raise UsageError(
                    f"this bundle decodes {name}s of {span.min * upscale} to {span.max * upscale} px, and {what} has {side * upscale}: "
                    "take another size, or export it for that size with --size"
                )

    def _check_tokens(self, plan: Plan, height: int, width: int, size: tuple[int, int]) -> None:
        """Raise UsageError unless the denoiser takes the tokens of every stage."""
        dimensions, counts = self.bundle.manifest.graphs["denoiser"].dimensions, plan.tokens(*size)
        if wrong := [count for count in counts if "S" in dimensions and count not in dimensions["S"]]:
            raise UsageError(
                f"this bundle takes {dimensions['S']} image tokens, and a picture of {height} x {width} px needs {wrong[0]} in a stage: "
                "take another size, or export it for that size"
            )


def _check_session(session: Session, drawing: Drawing, count: int, guidance: Guidance) -> None:
    """Raise BudgetError, before anything is drawn, unless the session takes each stage's tokens and the batches that will run."""
    if session.budgets is not None:
        compiled = sorted({budget["tokens"] for budget in session.budgets if "tokens" in budget})
        if missing := [tokens for tokens in drawing.plan.tokens(*drawing.size) if compiled and tokens not in compiled]:
            wider = ",".join(map(str, sorted({*compiled, *missing})))
            raise BudgetError(
                f"{session.where} was compiled for {', '.join(map(str, compiled))} image tokens, and a stage of the plan needs "
                f"{missing[0]}: take another plan or size, or export the bundle again with --budgets {wider}"
            )
    branches = {2 if guidance.active(sigma) else 1 for stage in drawing.plan.stages() for sigma in stage.sigmas[:-1]}
    for rows in {count} if drawing.plan.plain else {count, 1}:  # in the mixed stage each picture runs alone
        for branch in branches:
            batches(session, rows * branch)


def _draw(generator: Generators | None, count: int) -> Callable[[tuple[int, ...]], np.ndarray]:
    """White noise for `count` pictures, from one generator, or from one each."""
    source = np.random.default_rng() if generator is None else generator
    if isinstance(source, np.random.Generator):
        return source.standard_normal
    each = list(source) if isinstance(source, Sequence) else []
    if len(each) != count or not all(isinstance(one, np.random.Generator) for one in each):
        raise UsageError(f"generator is a numpy.random.Generator, np.random.default_rng(seed), or {count} of them, got {generator!r}")
    return lambda shape: np.stack([one.standard_normal(shape[1:]) for one in each])
