"""The Python API, which the commands are doors to: `export`, `verify`, `elasticize`, `plan`, `models`, `push`. Nothing here prints."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import elastic_targets
from elastic_export import exporting, verifying
from elastic_export.exporting import Job, OnStage, silent
from elastic_export.preparing import bundle_at, preparing, require_torch, target_options
from elastic_export.publishing import push as push
from elastic_export.sides import Sides, read_size
from elastic_export.values import Adapting, Folder, Spanned, placeless, read_span, read_spans
from elastic_runtime.contract.artifacts import Artifact
from elastic_runtime.contract.axis import Span
from elastic_runtime.contract.bundle import Bundle
from elastic_runtime.errors import UsageError
from elastic_targets.target import OnProgress

if TYPE_CHECKING:
    from elastic_export.planning import Forecast

DEFAULT = "elit-mnist"


def export(
    model: Folder = DEFAULT,
    *,
    output: Folder,
    target: str = "onnx",
    latents: Spanned | None = None,
    tokens: Spanned | None = None,
    loops: Spanned | None = None,
    batch: Spanned | None = None,
    precision: str | None = None,
    checkpoint: Folder | None = None,
    config: Folder | None = None,
    vae: Folder | None = None,
    components: Sequence[str] | str | None = None,
    size: Spanned | Sides | None = None,
    max_sequence_length: int | None = None,
    head_blocks: int | None = None,
    random_weights: bool = False,
    adapters: Sequence[Adapting] | None = None,
    overwrite: bool = False,
    verify: str = "budgets",
    command: str | None = None,
    on_stage: OnStage = silent,
    on_progress: OnProgress = silent,
    **options: Any,
) -> Bundle:
    """Compile a model with its compute axis open, prove every budget that is recorded, and write a bundle or extend one.

        bundle = elastic_export.export("elit-mnist", output="digits", latents="32-256")
        elastic_export.export("elit-mnist", output="digits", latents="32-256", target="coreml", budgets=[64, 128])
        elastic_export.export("digits", output="digits", target="trt", sms=(89,), buckets="64,128,256")

    Args:
        model: a packaged sample, a family or a preset (see `models`), or a diffusers folder of FLUX, FLUX.2, SD3, Qwen-Image, Z-Image or
            Krea 2, here or on the hub (`org/name`, `org/name@revision`). For a target that takes ONNX (trt) also a bundle's folder, whose
            ONNX artifacts it takes; another model is exported to ONNX first.
        output: the bundle's folder. Another target or precision of the same export joins the bundle that is there.
        target: onnx, coreml or trt.
        latents, tokens, loops: what to narrow an axis of the model to, `"32-256"` or a `Span`; None for all of it.
        batch: samples of one run, of which guidance takes two a picture; by default 1 to 4, or what the bundle has.
        precision: how weights and activations are held; by default fp32, fp16 for coreml, and that of the bundle for trt. For onnx also
            one a graph, `"denoiser=int4w,text=int8w,decoder=fp16"`.
        checkpoint: weights, .pt or .safetensors. config: sizes that they do not tell, in JSON. vae: a diffusers AutoencoderKL folder.
        components: of a diffusers folder: transformer, vae, text, encoder. size: sides of its pictures in pixels; with ELIT put in, one
            size, `"1024x768"` (height first) or a side.
        max_sequence_length: of a diffusers folder: tokens of a prompt, by default what its pipeline takes; prompts are padded to them.
        head_blocks: blocks before the core of an ELIT. random_weights: none, to measure speed.
        adapters: LoRA files to fuse into a diffusers folder, each a file, `"FILE.safetensors:0.8"` or `(file, scale)`.
        verify: which budgets are proven against the original, which takes as long as running it there: both ends, the middle and one
            untraced (`budgets`), the ends, or none; the manifest lists those that were left out.
        overwrite: whether to replace what the output holds. command: what made the bundle, for its manifest.
        on_stage: told `(what)` before each part of the work. on_progress: told `(what, done, total)` by slow compilers.
        options: the target's own: `opset` (onnx, and trt for a model), `rounding` (onnx, "gptq" for int4w and int8w) and `keep` (onnx,
            matrices of few bits that stay floats), `conditions_apart` (each); `shapes`, `target`, `reductions`, `compression` and
            `budgets` (coreml); `builder`, `sms`, `buckets`, `refit`, `strip`, `weight_streaming`, `version_compatible` (trt).

    Raises: UsageError and its kinds for what cannot be done as asked; MissingError with the line that installs what is not there;
        VerificationError naming the budget that failed and the figure. The old bundle is whole on any error.
    """
    source: dict[str, Any] = {
        "checkpoint": checkpoint, "config": config, "vae": vae, "components": components, "size": size, "head_blocks": head_blocks,
        "random_weights": random_weights, "max_sequence_length": max_sequence_length, "adapters": adapters,
    }  # fmt: skip
    spans = {"latents": latents, "tokens": tokens, "loops": loops}
    command = command or f"elastic_export.export({placeless(os.fspath(model))!r}, target={target!r})"
    room = elastic_targets.target(target)
    if room.takes == "torch":
        chosen = target_options(room, options, precision)
        job = Job(room, chosen, command, overwrite, verify)
        with preparing(model, job, output, spans, batch, source, on_stage) as prepared:
            return prepared.run(on_stage, on_progress)
    given = {name: value for name, value in options.items() if name != "opset"}
    given |= {"spans": read_spans(spans), "batch": None if batch is None else read_span(batch)}
    chosen = target_options(room, given, precision)
    if room.available:
        room.available(chosen)  # its absence should not wait for the model
    bundle = bundle_at(model, source)
    exporting.require_model(bundle, options.get("opset"), verify)
    if bundle is None:
        onnx = elastic_targets.target("onnx")
        first = target_options(onnx, {name: value for name, value in options.items() if name in ("opset", "conditions_apart")}, precision)
        job = Job(onnx, first, command, overwrite, verify, then=(room, chosen))
        with preparing(model, job, output, spans, batch, source, on_stage) as prepared:
            return prepared.run(on_stage, on_progress)
    return exporting.export_bundle(bundle, target, chosen, Path(output), overwrite, on_progress)


def verify(bundle: Folder | Bundle, tolerance: float | None = None, on_stage: OnStage = silent) -> list[tuple[str, Artifact]]:
    """Check every file's hash, then run every artifact that this machine can against the original's recorded outputs; needs no torch.

        proven = {artifact.path: all(row.passed for row in artifact.verified) for graph, artifact in elastic_export.verify("digits")}

    Args:
        bundle: its folder. tolerance: the error allowed, times the largest output (at least 1); by default that of each precision.

    Returns: each graph's artifacts with `verified`, a row a recorded budget, or why nothing here can run it in `unverified`.

    Raises: BundleError for a bundle that is damaged. A missed tolerance is a row that did not pass, and raises nothing.
    """
    folder = bundle.folder if isinstance(bundle, Bundle) else Path(bundle)
    on_stage(f"hashing {folder}")
    hashed = Bundle.open(folder, hashes=True)
    on_stage("running at each recorded budget")
    return verifying.verify(hashed, tolerance)


def elasticize(
    model: Folder,
    *,
    output: Folder,
    group_size: int,
    head_blocks: int,
    tail_blocks: int,
    family: str | None = None,
    config: Folder | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> Path:
    """Put ELIT's Read and Write (arXiv 2603.12245) into a plain checkpoint, from which training gives a model with budgets.

        elastic_export.elasticize("SiT-XL-2-256.pt", output="elit.safetensors", group_size=4, head_blocks=4, tail_blocks=4)
        elastic_export.elasticize("path/to/Qwen-Image", output="elit-qwen", group_size=8, head_blocks=8, tail_blocks=8)

    The backbone's weights stay as they are; of SiT's public code time and velocity are turned into ELIT's, and the variance of a last layer
    trained with `learn_sigma` is left out. Write starts with nothing to add, so at every budget it gives the very tokens that Read took,
    and a first step of training reaches it. **The outputs are not the plain model's, at no budget**: core blocks act on latents alone, of
    which the picture knows nothing yet. Nor can a Read be made that hands the tokens over: it normalises them, so that their means and
    lengths are lost. Of a SiT and an HDiT the outputs are those of the plain model without its core blocks; of a U-ViT and of Qwen-Image
    nearly so, as tokens of time, label and text go through the core beside the latents. `samples/finetune_elit.py` trains on from there.

    Args:
        model: weights of a SiT, of the public U-ViT (baofff) or HDiT (k-diffusion), `.pt` or `.safetensors`; or a diffusers folder of
            Qwen-Image.
        output: a .safetensors file, beside which `.json` gets what `--config` takes; of a folder a new one, a copy with two files more,
            or the same, which gets them.
        group_size: side of a window in tokens. head_blocks, tail_blocks: blocks before Read and after Write; of an HDiT layers of its
            innermost level.
        family: what a SiT becomes, `elit-sit` or `elit-uvit`, which has long skips that pass nothing on yet; the others become
            `elit-uvit-tokens`, `elit-hdit-levels` and `elit-qwen-image`.
        config: what weights do not tell (`num_heads`, a SiT's `prediction`), in JSON. seed: of new weights. overwrite: whether to
            replace a file; a folder never is.

    Returns: the output.

    Raises: UsageError for an output that stands there, or a family that it cannot become; ModelError for weights that are no such
        checkpoint, or have an interface already, and for windows or blocks that do not divide.
    """
    require_torch("elasticize")
    from elastic_export import elasticizing

    split = {"group_size": group_size, "head_blocks": head_blocks, "tail_blocks": tail_blocks}
    if odd := [name for name, value in split.items() if isinstance(value, bool) or not isinstance(value, int)]:
        raise UsageError(f"{odd[0]} is a whole number, got {split[odd[0]]!r}")
    where = None if config is None else Path(config)
    return elasticizing.elasticize(Path(model), Path(output), split, family, where, seed, overwrite)


def plan(
    model: Folder,
    *,
    device: str = "here",
    precisions: Sequence[str] | str | None = None,
    size: Spanned | Sides | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    max_sequence_length: int | None = None,
    config: Folder | None = None,
) -> "Forecast":
    """Forecast memory by precision and seconds a picture on a device, before anything is exported and without weights.

        elastic_export.plan("path/to/FLUX.2-klein-4B", device="jetson-agx-orin-64", steps=4).memory

    See `elastic_export.planning.plan`, which this is; `size` is a side or `"1024x768"` (height first).

    Raises: MissingError without torch; UsageError for a device or precision that there is not, and a span of sizes; ModelError and
        BudgetError as `export`.
    """
    require_torch("forecasting")
    from elastic_export import planning

    sides = None if size is None else read_size(size)
    if isinstance(sides, Span):
        if sides.min != sides.max:
            raise UsageError(f"--size {sides}: a picture has one size, a side or 1024x768")
        sides = Sides(sides.max, sides.max)
    return planning.plan(
        os.fspath(model), device=device, precisions=precisions, size=sides, steps=steps, guidance=guidance,
        max_sequence_length=max_sequence_length, config=None if config is None else Path(config),
    )  # fmt: skip


def models() -> list[dict[str, Any]]:
    """What may stand as a model by name, a row each: `name`, `family`, `weights`, `axes` ("latents 16-256"), `gflops` at the smallest
    and the largest budget, and `parameters`.

    Raises: MissingError without torch.
    """
    require_torch("the model zoo")
    from elastic_export.capture.catalogue import catalogue

    return catalogue()
