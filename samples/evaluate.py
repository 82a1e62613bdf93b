"""Grade a bundle that draws digits, at several budgets: how many are classified as asked, and their Frechet distance to real ones.

    python samples/evaluate.py BUNDLE --output figures.json --plot quality.png
    python samples/evaluate.py ROUTED --output figures.json --budgets 16,32,64,128 --drops 0,0.3,0.6
    python samples/evaluate.py PROMPTED --output figures.json --prompt "a handwritten {}"

Pictures are drawn through the bundle's own path (`elastic_runtime`), the same classes from the same noise at each budget.
Guidance hides part of what a budget costs: it makes digits plain enough to name whatever drew them, and less varied. So a
second series without it stands beside the first.
"""

import argparse
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from card import plot, table
from classifier import Judge, load_judge
from digits import NAMES, Digits, enlarged, halved
from elastic_runtime import Axis, Budget, Bundle, ElasticPipeline, UsageError
from elastic_runtime.contract.manifest import Manifest, Model
from elastic_runtime.contract.schedule import CosineMask
from elastic_runtime.sampling.fitting import sampler
from grading import Grader, integers, run, tell
from record import machine, read, versions, write

SIDE, CLASSES = 32, 10  # of what the judge knows


@dataclass(frozen=True)
class Protocol:
    """How pictures are drawn: a series for each guidance scale, of which the first is the bundle's `quality`.

    `guidance_budget` is the weak branch's; None is the same as the picture's. `drops` are shares of the tokens kept by a router that are
    dropped again, each a row at the first guidance scale with no cap on the tokens. `prompt` is what a model that reads is asked, with the
    digit's name in the place of `{}`; None of a model of classes.
    """

    samples: int = 1000
    steps: int = 20
    sampler: str | None = None
    guidance: tuple[float, ...] = (4.0, 1.0)
    guidance_budget: dict[str, int] | None = None
    drops: tuple[float, ...] = ()
    seed: int = 0
    prompt: str | None = None

    def asked(self, labels: np.ndarray) -> dict[str, Any]:
        """What a pipeline is asked for pictures of these digits."""
        if self.prompt is None:
            return {"class_labels": labels.tolist()}
        return {"prompt": [self.prompt.format(NAMES[label]) for label in labels], "negative_prompt": ""}


def spread(axis: Axis) -> list[int]:
    """Budgets to grade where none are asked for: all of a short axis, else doublings from its smallest to its largest."""
    return list(axis.values) if len(axis.values) <= 8 else axis.doublings()


def check(bundle: Bundle, protocol: Protocol) -> None:
    """Raise UsageError unless the bundle draws what the judge can grade, in equal numbers of each class."""
    model = bundle.manifest.model
    sides = (14,) if model.tokens == "grey" else (16, 32)
    known = [((1, side, side), 10, None) for side in sides]
    pixels = model.sample_shape[-1] * (model.vae.upscale if model.vae else 1)
    if protocol.prompt is not None:
        if "{}" not in protocol.prompt:
            raise UsageError(f"--prompt has {{}} where the digit's name goes, as in 'a handwritten {{}}', got {protocol.prompt!r}")
        if model.text is None or pixels != SIDE:
            what = "reads no prompts" if model.text is None else f"draws {pixels}x{pixels} pixels"
            raise UsageError(f"--prompt is for a bundle that draws {SIDE}x{SIDE} pixels of what it reads, and {bundle.folder} {what}")
    elif (model.sample_shape, model.num_classes, model.vae) not in known or model.tokens == "code":
        raise UsageError(
            f"the judge knows 32x32 and 16x16 digits of 10 classes in one channel, and 14x14 ones of grey tokens; {bundle.folder} draws "
            f"{model.sample_shape} in {model.num_classes} classes{' through a VAE' if model.vae else ''}: give a bundle of an MNIST sample"
            f"{', or --prompt' if model.text else ''}"
        )
    if len(set(protocol.guidance)) < len(protocol.guidance):
        raise UsageError(f"--guidance names a scale twice: {protocol.guidance}")
    if protocol.samples < 2 * CLASSES or protocol.samples % CLASSES:
        raise UsageError(f"--samples must be a multiple of the {CLASSES} classes, 20 or more, got {protocol.samples}")


@dataclass(frozen=True)
class Drawn:
    """Digits as the judge looks at them; and of a model with a router, the tokens kept at each step, a mean over the pictures."""

    digits: Digits
    kept: list[float] | None


def draw(pipe: ElasticPipeline, budget: Budget, guidance: float, protocol: Protocol, batch: int, drop: float = 0.0) -> Drawn:
    """`protocol.samples` pictures, classes in turn; the generator starts anew, so that each budget begins from the same noise."""
    labels = np.arange(protocol.samples) % CLASSES
    generator = np.random.default_rng(protocol.seed)
    weak = None if protocol.guidance_budget is None else Budget(**protocol.guidance_budget)
    begun, pictures, kept = time.perf_counter(), [], []
    for first in range(0, protocol.samples, batch):
        result = pipe(
            **protocol.asked(labels[first : first + batch]),
            num_inference_steps=protocol.steps,
            guidance_scale=guidance,
            budget=budget,
            guidance_budget=weak,
            drop_fraction=drop,
            sampler=protocol.sampler,
            generator=generator,
            output_type="np",
        )
        pictures.append(result.images.mean(axis=-1, keepdims=True))  # (B, H, W, 1) in [0, 1]
        kept.append([step.kept or () for step in result.steps])  # (steps, B)
        where = f"{budget}, drop {drop:g}" if drop else f"{budget}"
        tell(f"{where}, guidance {guidance:g}", min(first + batch, protocol.samples), protocol.samples, begun)
    images = np.concatenate(pictures).transpose(0, 3, 1, 2) * 2 - 1
    each_step = np.concatenate(kept, axis=1)
    return Drawn(Digits(shown(images), labels), each_step.mean(1).tolist() if each_step.size else None)


def shown(images: np.ndarray) -> np.ndarray:
    """Pictures (N, 1, H, W) at the size that the judge knows: those of 14 x 14, bare or in their border of one, twice enlarged."""
    side = images.shape[-1]
    return images if side == SIDE else enlarged(images if side == 14 else images[:, :, 1:-1, 1:-1])


def as_drawn(images: np.ndarray, model: Model) -> np.ndarray:
    """Real digits (N, 1, 32, 32) as a perfect model could draw them at best: at its size, through its tokens where it has any."""
    if model.sample_shape[-1] == SIDE or model.vae:
        return images
    levels = model.schedule.vocabulary if isinstance(model.schedule, CosineMask) else 256
    return enlarged(halved(images, levels) / (levels - 1) * 2 - 1)


def evaluate(
    pipe: ElasticPipeline, judge: Judge, axis: Axis | None, values: list[int], protocol: Protocol, batch: int = 50
) -> dict[str, Any]:
    """Figures of a bundle's denoiser along one axis: `quality` as the manifest holds it, and `evaluation` with all that made them.

    A model without an axis (None) is graded as it is.

    Raises: UsageError and its kinds for a bundle, budget or protocol that does not fit.
    """
    check(pipe.bundle, protocol)
    manifest = pipe.bundle.manifest
    everything = Budget().on(manifest.axes)
    budgets = [Budget(**{axis.name: value}).on(manifest.axes) for value in values] if axis else [everything]
    grader = Grader.of(judge, protocol.samples, as_drawn=lambda images: as_drawn(images, manifest.model))
    rows: list[dict[str, Any]] = []
    plans = [(guidance, budget, None) for guidance in protocol.guidance for budget in budgets]
    for guidance, budget, drop in [*plans, *((protocol.guidance[0], everything, drop) for drop in protocol.drops)]:
        begun = time.perf_counter()
        drawn = draw(pipe, budget, guidance, protocol, batch, drop or 0.0)
        seconds = round(time.perf_counter() - begun, 1)
        row = {
            "guidance": guidance,
            "budget": dict(budget),
            "flops": cost(manifest, budget, drawn.kept),
            **grader.grade(drawn.digits),
            "seconds": seconds,
        }
        rows.append(row | ({} if drawn.kept is None else {"kept": drawn.kept}) | ({} if drop is None else {"drop_fraction": drop}))
    quality = [{name: row[name] for name in ("budget", "accuracy", "frechet_distance")} for row in rows[: len(budgets)]]
    evaluation = {
        "axis": axis.name if axis else None,
        "protocol": asdict(protocol),
        "real": grader.real,
        "rows": rows[: len(plans)],
        "drops": rows[len(plans) :],
        "where": pipe.where,
        "weights_sha256": manifest.provenance.checkpoint_sha256,
        "versions": versions("elastic-export", "onnxruntime", "numpy", "torch"),
        "machine": machine(),
    }
    return {"family": manifest.model.family, "config": manifest.model.config, "quality": quality, "evaluation": evaluation}


def cost(manifest: Manifest, budget: Budget, kept: list[float] | None) -> float | None:
    """FLOPs of a forward pass at `budget`; of a model with a router, at the tokens that it kept on the mean, which the budget caps.

    Between two rows of the manifest's table it is the straight line. None where the table has no row to tell from.
    """
    flops = {Budget(**row.budget): row.flops for row in manifest.cost}
    if kept is None or not flops:
        return flops.get(budget)
    (axis,) = budget
    table = sorted((row[axis], value) for row, value in flops.items())
    return float(np.interp(np.minimum(kept, budget[axis]), *zip(*table, strict=True)).mean())


def main(given: argparse.Namespace) -> None:
    torch.set_num_threads(given.threads or torch.get_num_threads())
    weak = None if given.guidance_budget is None else _budget(given.guidance_budget)
    bundle = Bundle.open(given.bundle)
    manifest = bundle.manifest
    name, _ = sampler(manifest.model, given.sampler)
    protocol = Protocol(given.samples, given.steps, name, given.guidance, weak, given.drops, given.seed, given.prompt)
    with ElasticPipeline.from_pretrained(bundle, "ort", **({"threads": given.threads} if given.threads else {})) as pipe:
        along = given.axis or next((axis.name for axis in manifest.axes), None)
        axis = manifest.axis(along) if along else None
        if axis is None and (given.budgets or given.plot):
            raise UsageError(f"{given.bundle} has no budgets: leave --budgets and --plot out")
        old = read(given.output) if given.output.exists() else {}
        if given.beside and not old.get("evaluation"):
            raise UsageError(f"{given.output} has no figures yet for {given.beside!r} to stand beside: grade its own model first")
        config = manifest.model.config  # which a folder has in files of its own
        if old and not given.beside and (old.get("family"), old.get("config", config)) != (manifest.model.family, config):
            raise UsageError(f"{given.output} is the record of another model ({old.get('family')}): give another --output")
        values = [axis.check(value) for value in given.budgets or spread(axis)] if axis else []
        figures = evaluate(pipe, load_judge(), axis, values, protocol, given.batch)
    beside = {"beside": old.get("beside", {}) | {given.beside: figures["evaluation"]}}
    record = old | (beside if given.beside else figures)
    write(given.output, record)
    record = read(given.output)  # as a card will see it
    print(table(record))
    if given.plot:
        plot(record, given.plot)


def _budget(text: str) -> dict[str, int]:
    name, _, value = text.partition("=")
    if not value.isdigit():
        raise UsageError(f"--guidance-budget is written latents=16, got {text!r}")
    return {name: int(value)}


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"these are numbers such as 4 or 4,1, got {text!r}") from None


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("bundle", type=Path, help="a bundle of an MNIST sample; export it with --batch 1-100, or it runs in small batches")
    options.add_argument("--output", type=Path, required=True, help="JSON record; what it already holds of this model is kept")
    options.add_argument("--beside", metavar="WORDS", help="this is another model: its figures go beside the record's own under WORDS")
    options.add_argument("--plot", type=Path, help="PNG of the figures against the budget")
    options.add_argument("--axis", help="the axis to grade along (default: the bundle's first)")
    options.add_argument("--budgets", type=integers, help="budgets on it, such as 16,64,256 (default: doublings over its span)")
    options.add_argument("--samples", type=int, default=1000, help="pictures at each budget (default: %(default)s)")
    options.add_argument("--steps", type=int, default=20, help="denoising steps (default: %(default)s)")
    options.add_argument("--sampler", help="such as heun or ddim (default: the one that fits the model)")
    options.add_argument("--guidance", type=_numbers, default=(4.0, 1.0), help="guidance scales; 1 is none (default: 4,1)")
    options.add_argument("--prompt", help="what a model that reads is asked, {} being the digit's name")
    options.add_argument("--drops", type=_numbers, default=(), help="shares of a router's tokens to drop, such as 0,0.3,0.6")
    options.add_argument("--guidance-budget", help="budget of the weak branch, such as latents=16 (default: the picture's)")
    run(main, options)
