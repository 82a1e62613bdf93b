"""`ElasticPipeline`: a bundle that draws pictures, in words that a diffusers user knows."""

import os
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from elastic_runtime.choosing.artifacts import ArtifactOpener
from elastic_runtime.choosing.estimates import Gauge, Outlook
from elastic_runtime.choosing.goals import FLOOR
from elastic_runtime.choosing.option import Choice
from elastic_runtime.choosing.policy import Policy, chosen
from elastic_runtime.contract.budget import Budget
from elastic_runtime.contract.bundle import Bundle
from elastic_runtime.denoising.pictures import OutputType, drawable, nearest, obstacle, pictures, preview, previewed, values
from elastic_runtime.denoising.sources import Picture, pixels, several
from elastic_runtime.device import Clock, peak_bytes, resident_bytes
from elastic_runtime.drawing.beside import edits
from elastic_runtime.drawing.drawing import Drawing, Texts, finite
from elastic_runtime.drawing.kinds import kind_of
from elastic_runtime.errors import UsageError
from elastic_runtime.ralu.caching import Caching
from elastic_runtime.ralu.patches import edge_scores
from elastic_runtime.ralu.plan import Plan
from elastic_runtime.request import Progress, Request, Result
from elastic_runtime.sampling.flow import after, replaced
from elastic_runtime.sampling.noise import Generators
from elastic_runtime.sessions.session import Session

if TYPE_CHECKING:
    from typing import Self  # since Python 3.11

# callback(pipe, step_index, timestep, {"latents": state, ...}) -> a dict that may hold other "latents"
Callback = Callable[["ElasticPipeline", int, float, dict[str, np.ndarray]], dict[str, np.ndarray]]
Subject = str | int | Sequence[str] | Sequence[int]


class ElasticPipeline:
    """Pictures from a bundle of any kind. Close it, or use it in a `with` block.

    `open_graph(name)` opens a graph of the bundle when it is first needed; text encoders one after the other, each
    closed before the next, and before the denoiser. Several threads may draw with one pipeline at once: each drawing
    has its own state, and what they share (the sessions, and what was measured of them) is safe. Which session runs on
    several threads at a time, its backend says.
    """

    def __init__(self, bundle: Bundle, open_graph: Callable[[str], Session] | Mapping[str, Session], clock: Clock = time.perf_counter):
        self.bundle = bundle
        self._open_graph = open_graph.__getitem__ if isinstance(open_graph, Mapping) else open_graph
        self._clock = clock
        self._sessions: dict[str, Session] = dict(open_graph) if isinstance(open_graph, Mapping) else {}
        self._lock = threading.RLock()
        self._gauge: Gauge | None = None
        self._before: int | None = None  # peak bytes before the denoiser was opened

    @classmethod
    def from_pretrained(
        cls,
        bundle: str | os.PathLike[str] | Bundle,
        backend: str | None = None,
        precisions: Sequence[str] | str = (),
        floor: float = FLOOR,
        **options: Any,
    ) -> "Self":
        """Open a bundle folder; `backend` and its `options` (ONNX Runtime: providers, threads, spinning) are optional.

        Where neither is given and several artifacts or backends can run here, they are timed once, and the fastest is
        taken: of the most exact artifacts, or of those of `precisions`, which says how much exactness may be given up.
        "auto" are those that the bundle's card saw keep `floor` of float32's accuracy, and float32.

        Raises: BundleError, and MissingError where nothing here can run its denoiser; UsageError for precisions of
        which it has none.
        """
        opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        pipe = cls(opened, ArtifactOpener(opened, backend, precisions, floor, options))
        if not (opened.manifest.model.text and opened.manifest.model.text.encoders):  # which are read before the denoiser takes its memory
            try:
                for name in ("denoiser", "decoder"):
                    if name in opened.manifest.graphs:
                        pipe.session(name)
            except BaseException:
                pipe.close()
                raise
        return pipe

    def __repr__(self) -> str:
        return f"ElasticPipeline.from_pretrained({str(self.bundle.folder)!r})"

    def __enter__(self) -> "Self":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Release the sessions; the next drawing opens them again."""
        with self._lock:
            while self._sessions:
                self._sessions.popitem()[1].close()
            self._gauge = None

    def session(self, graph: str) -> Session:
        """The open session of a graph of the bundle, opened now if it is the first time; a text encoder is the caller's
        to close."""
        with self._lock:
            if graph in self._sessions:
                return self._sessions[graph]
            if graph in ("denoiser", "decoder"):
                self._before = peak_bytes() if graph == "denoiser" else self._before
                self._sessions[graph] = self._open_graph(graph)
                return self._sessions[graph]
        return self._open_graph(graph)  # which takes long, and whoever draws meanwhile need not wait for it

    @property
    def where(self) -> str:
        """What the denoiser runs on."""
        return self.session("denoiser").where

    @property
    def gauge(self) -> Gauge:
        """How fast the denoiser is here; made when it is first asked for, and kept as long as the session is open."""
        with self._lock:
            session, manifest = self.session("denoiser"), self.bundle.manifest
            if self._gauge is None or self._gauge.session is not session:
                finish = self._finish if drawable(manifest) else None
                preview = self._preview if finish and previewed(manifest) else None
                opened, before = peak_bytes(), 0
                if opened is not None and opened == self._before:  # that of something else, such as text encoders
                    before, opened = opened, resident_bytes() or opened
                self._gauge = Gauge(session, manifest, finish, self._clock, opened, preview=preview, before=before)
            return self._gauge

    def __call__(
        self,
        subject: Subject | None = None,
        *,
        class_labels: Sequence[int] | int | None = None,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        prompt_embeds: np.ndarray | None = None,
        pooled_prompt_embeds: np.ndarray | None = None,
        negative_prompt_embeds: np.ndarray | None = None,
        negative_pooled_prompt_embeds: np.ndarray | None = None,
        prompt_embeds_mask: np.ndarray | None = None,
        negative_prompt_embeds_mask: np.ndarray | None = None,
        image_latents: np.ndarray | Sequence[np.ndarray] | None = None,
        image_reference: Picture | Sequence[Picture] | None = None,
        num_images_per_prompt: int = 1,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        true_cfg_scale: float | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        cfg_normalization: bool | float = False,
        autoguidance: bool = False,
        sampler: str | None = None,
        temperature: float | None = None,
        height: int | None = None,
        width: int | None = None,
        plan: Plan | str | None = None,
        caching: Caching | None = None,
        image: Picture | Sequence[Picture] | None = None,
        strength: float | None = None,
        mask_image: Picture | Sequence[Picture] | None = None,
        budget: Budget | None = None,
        guidance_budget: Budget | None = None,
        policy: Policy | None = None,
        drop_fraction: float = 0.0,
        guidance_drop_fraction: float | None = None,
        seeds: int | Sequence[int] | None = None,
        generator: Generators | None = None,
        noise: np.ndarray | None = None,
        output_type: OutputType = "pil",
        callback_on_step_end: Callback | None = None,
    ) -> Result:
        """Draw a picture for each class label or prompt.

        `subject` stands for class_labels where the model draws classes, else for prompt. The other words are those of
        `Request`, and `image`, `image_reference` and `mask_image` may be PIL pictures, or arrays of floats in [0, 1]. Of a
        model that edits after references `image` alone is `image_reference`, as in its pipelines. Besides, `generator` is a
        source of all noise, or one for each picture, in place of seeds, and `callback_on_step_end` is called as
        `callback(pipe, step_index, timestep, {"latents": state})` after each step, and may return a dict with other
        "latents". All but masked models add "denoised", the picture that the model saw in the state before as latents (see
        `preview`), and a router adds "mask", the tokens it kept, bool (B, L).

        Raises: UsageError and its kinds for wrong arguments; InferenceError if the backend fails or the result is not
        finite.
        """
        names = ("class_labels", "prompt")
        if subject is not None:
            takes = names[0] if self.bundle.manifest.model.num_classes else names[1]
            if (class_labels, prompt)[names.index(takes)] is not None:
                raise UsageError(f"{takes} is given twice: by its name and as the first argument")
            class_labels, prompt = (subject, prompt) if takes == names[0] else (class_labels, subject)  # type: ignore[assignment]
        if image is not None and edits(self.bundle.manifest.model, image_reference, strength, mask_image):
            image, image_reference = None, image
        request = Request(
            class_labels=class_labels,  # type: ignore[arg-type]  # what they hold is checked where it is read
            prompt=prompt,  # type: ignore[arg-type]
            negative_prompt=negative_prompt,  # type: ignore[arg-type]
            prompt_embeds=prompt_embeds,
            pooled_prompt_embeds=pooled_prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            negative_pooled_prompt_embeds=negative_pooled_prompt_embeds,
            prompt_embeds_mask=prompt_embeds_mask,
            negative_prompt_embeds_mask=negative_prompt_embeds_mask,
            image_latents=(image_latents,) if isinstance(image_latents, np.ndarray) else image_latents,  # type: ignore[arg-type]
            image_reference=None if image_reference is None else tuple(several("a reference picture", image_reference, "RGB")),
            num_images_per_prompt=num_images_per_prompt,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            true_cfg_scale=true_cfg_scale,
            guidance_interval=guidance_interval,
            cfg_normalization=cfg_normalization,
            autoguidance=autoguidance,
            sampler=sampler,
            temperature=temperature,
            height=height,
            width=width,
            plan=plan,
            caching=caching,
            image=None if image is None else pixels("image", image, "RGB"),
            strength=strength,
            mask_image=None if mask_image is None else pixels("mask_image", mask_image, "L"),
            budget=budget,
            guidance_budget=guidance_budget,
            policy=policy,  # type: ignore[arg-type]  # a policy of one's own is no record, and need not be
            drop_fraction=drop_fraction,
            guidance_drop_fraction=guidance_drop_fraction,
            seeds=seeds,  # type: ignore[arg-type]
            noise=noise,
            output_type=output_type,
        )
        return self.draw(request, generator=generator, callback_on_step_end=callback_on_step_end)

    def read(self, request: Request) -> Texts | None:
        """Read a request's prompts, through text encoders one after the other; None where it has none. The denoiser is not opened.

        Raises: UsageError and its kinds for wrong arguments; MissingError without tokenizers.
        """
        drawing = self._drawing(request, None)
        return drawing.read(self.session) if _worded(request) else None

    def draw(
        self,
        request: Request,
        *,
        generator: Generators | None = None,
        callback_on_step_end: Callback | None = None,
        texts: Texts | None = None,
    ) -> Result:
        """Draw what a request says; see `__call__` for `generator`, the callback and errors. With `texts`, what `read` gave of its
        prompts, maybe on another thread, no text encoder is opened."""
        begun, measuring = self._clock(), self._measuring
        drawing = self._drawing(request, generator)
        steps = self._iterate(drawing, begun, measuring, texts)
        records, choices, replacement, state = [], [], None, None
        while True:
            try:
                choice, progress = steps.send(replacement)
            except StopIteration:
                break
            records.append(progress.record)
            choices.append(choice)
            step, replacement = progress.step, None
            if callback_on_step_end:
                arrays = {"latents": step.sample, "denoised": step.denoised, "mask": progress.mask}
                named, before = {name: array for name, array in arrays.items() if array is not None}, step.sample.copy()
                answer = callback_on_step_end(self, step.index, step.time, named)
                if answer is not None and not isinstance(answer, Mapping):
                    raise UsageError(f"callback_on_step_end returns a dict that may hold other latents, got {type(answer).__name__}")
                replacement = replaced(step, before, (answer or {}).get("latents"))
            state = after(step, replacement)
        assert state is not None  # there is no drawing of no steps
        images = self.images(drawing.latents(state), request.output_type)
        seconds = self._clock() - begun - (self._measuring - measuring)
        origin = drawing.session.origin
        facts = {"model": self.bundle.manifest.model.name, "seeds": drawing.seeds, "where": drawing.session.where}
        facts |= ({"artifact": origin.artifact.path, "precision": origin.precision} if origin else {}) | drawing.facts()
        return Result(images, tuple(records), seconds, drawing.again(choices), drawing.drawn, facts)

    def iterate(self, request: Request, *, generator: Generators | None = None) -> Generator[Progress, np.ndarray | None, None]:
        """The denoising loop itself: yields a `Progress` after each step; send an array to replace the state.

        Whether `output_type` asks for pictures tells a policy that keeps to a time if the last state is to become some,
        which takes time.
        """
        steps, replacement = self._iterate(self._drawing(request, generator), self._clock(), self._measuring), None
        while True:
            try:
                _, progress = steps.send(replacement)
            except StopIteration:
                return
            before = progress.step.sample.copy()
            replacement = replaced(progress.step, before, (yield progress))

    def outlook(self, request: Request, *, reading: bool = True) -> Outlook:
        """What a policy would know of a request: the ways to draw it, their predicted time and memory, and their quality by the card.

        A request with a policy leaves the plan open, one with a plan leaves its steps open. Without `reading`, prompts are not read, which
        opens text encoders: they are taken to be of one length.
        """
        drawing = self._drawing(request, None)
        if reading or request.prompt is None:
            drawing.prepare(self.session)
        return drawing.outlook(self.gauge, finishes=request.output_type != "latent")

    def images(self, latents: np.ndarray, output_type: OutputType = "pil") -> Any:
        """Final latents (B, C, H, W) as pictures: through the decoder where the bundle has one, else they are the
        pixels."""
        return latents if output_type == "latent" else pictures(self.decode(latents), output_type)

    def preview(self, denoised: np.ndarray, height: int, width: int) -> list[Any]:
        """What a model saw in a step, `denoised` latents (B, C, h, w), as PIL pictures of the size of the last ones: those of the first
        stage of a plan, which have half the sides, are enlarged."""
        return preview(self.bundle.manifest, self._decoder(), denoised, height, width)

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Pictures (B, C, H, W) with values in about [-1, 1] of latents (B, C, h, w)."""
        return values(self.bundle.manifest, self._decoder(), latents)

    def _decoder(self) -> Session | None:
        """The bundle's decoder, where pictures are made through one."""
        manifest = self.bundle.manifest
        if why := obstacle(manifest):
            raise UsageError(why)
        return self.session("decoder") if manifest.model.vae else None

    def _drawing(self, request: Request, generator: Generators | None) -> Drawing:
        """The request on this bundle, checked; nothing is opened for it."""
        if request.output_type not in ("pil", "np", "latent"):
            raise UsageError(f"output_type must be pil, np or latent, got {request.output_type!r}")
        return kind_of(self.bundle.manifest.model)(self.bundle, request, generator)

    def _iterate(
        self, drawing: Drawing, begun: float, measuring: float, texts: Texts | None = None
    ) -> Generator[tuple[Choice, Progress], np.ndarray | None, None]:
        """The one loop: every step is chosen for, taken, recorded and checked here. `begun` is when the pictures were
        asked for."""
        if texts is not None and not _worded(drawing.request):
            raise UsageError("texts are what `read` gave of a request's prompt, and this request has none: leave texts out")
        drawing.prepare(self.session, texts)
        gauge, policy = self.gauge, drawing.policy()
        outlook = drawing.outlook(gauge, finishes=drawing.request.output_type != "latent")
        state = policy.init(outlook)
        begun += self._measuring - measuring  # measuring is no part of this picture
        choice, state = chosen(policy, outlook, state, 0, self._clock() - begun)
        with gauge.running():
            drawing.begin(choice)
            last, replacement = self._clock(), None
            while True:
                step = drawing.step(replacement)
                finite(step.sample, step.index)
                outlook.step_seconds = seconds = self._clock() - last
                replacement = yield choice, drawing.progress(step, drawing.record(step, choice, seconds))
                last = self._clock()
                if not drawing.left:
                    after(step, replacement)  # refuses a last state of another shape, too
                    return
                choice, state = chosen(policy, outlook, state, step.index + 1, last - begun)
                replacement = drawing.follow(choice, step, replacement)

    @property
    def _measuring(self) -> float:
        """Seconds that choosing an artifact, looking at the device and measuring took so far."""
        opening = self._open_graph.spent if isinstance(self._open_graph, ArtifactOpener) else 0.0
        return (self._gauge.spent if self._gauge else 0.0) + opening

    def _finish(self) -> None:
        """Make one picture of nothing: what a picture takes after its last step."""
        manifest = self.bundle.manifest
        self.images(np.zeros((1, manifest.model.sample_shape[0], *nearest(manifest))))

    def _preview(self) -> None:
        """Look for edges in a preview of nothing: what a picture takes before a plan's second stage."""
        model, size = self.bundle.manifest.model, previewed(self.bundle.manifest)
        assert model.patches is not None
        assert size is not None
        picture = self.decode(np.zeros((1, model.sample_shape[0], *size)))
        edge_scores(picture, model.patches.size * (model.vae.upscale if model.vae else 1))


def _worded(request: Request) -> bool:
    """Whether a request says in words, or in embeddings of them, what is to be drawn."""
    return request.prompt is not None or request.prompt_embeds is not None
