"""What each precision costs where it matters, in pictures: one bundle of a packaged sample in every precision, the same noise for all.

    python samples/precisions.py elit-mnist elt-mnist ralu-digits --threads 2

A precision is fp32 to int4w, drawn with ONNX Runtime, and bf16 with OpenVINO on a processor that has it; `gptq` behind a colon rounds it by
what its matrices multiply, and those of TensorRT are computed here as they are written (all but nvfp4, which ONNX Runtime has no kernels
for), a fair deal slower than there:

    python samples/precisions.py elit-mnist --precisions fp32,int8w,int8w:gptq,int4w,int4w:gptq,int8qdq,fp8,int4qdq

A row a precision and budget (or plan): megabytes of the artifact; the step's error as `verify` measures it; PSNR of whole pictures
against those of fp32; share that a judge names as asked, and Frechet distance to real digits; milliseconds of a step, medians in turns.
"""

import statistics
import tempfile
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import elastic_export
from classifier import load_judge
from digits import Digits
from elastic_export.capture.zoo import samples
from elastic_runtime import Budget, Bundle, ElasticPipeline, UsageError
from elastic_runtime.contract.precision import EXACT
from elastic_runtime.contract.precision import PRECISIONS as TABLE
from evaluate import Protocol, as_drawn, draw
from evaluate_plans import SIDE
from evaluate_plans import Protocol as Plans
from evaluate_plans import draw as draw_along
from grading import Grader, run
from record import evaluation, machine, read, versions, write

PRECISIONS = ("fp32", "fp16", "bf16", "int8", "int8w", "int4w")  # those of the cards
COLUMNS = ("sample", "at", "precision", "MB", "step dB", "pictures dB", "named as asked", "Fréchet", "ms a step")
PLANS = ("4x", "full")
GUIDANCE = 1.5


def backend(precision: str) -> str:
    """What draws in a precision here: ONNX Runtime, or OpenVINO where it has no kernels."""
    return next(name for name in ("ort", "openvino") if name in TABLE[precision].backends)


def opened(bundle: Bundle, precision: str, threads: int) -> ElasticPipeline:
    """A pipeline that computes in `precision`.

    Raises: MissingError where this processor would compute bfloat16 in float32.
    """
    words = {"precision": precision} if precision == "bf16" else {}
    return ElasticPipeline.from_pretrained(bundle, backend(precision), (precision,), threads=threads, **words)


def pictures(pipe: ElasticPipeline, way: Any, options: Namespace) -> np.ndarray:
    """`options.samples` pictures (N, 1, h, w) in [-1, 1], classes in turn, always from the same noise."""
    if isinstance(way, Budget):
        sampler = evaluation(read(samples()[pipe.bundle.manifest.model.name]))["protocol"]["sampler"]  # the card's own
        protocol = Protocol(samples=options.samples, steps=options.steps, sampler=sampler, seed=options.seed)
        return draw(pipe, way, GUIDANCE, protocol, options.batch).digits.images
    labels, parts = np.arange(options.samples) % 10, []
    for first in range(0, options.samples, options.batch):
        parts.append(draw_along(pipe, way, labels[first : first + options.batch], first, Plans(samples=options.samples, seed=options.seed)))
    return np.concatenate(parts)


def milliseconds(pipe: ElasticPipeline, way: Any) -> float:
    """Of the median step of one picture without guidance."""
    words: dict[str, Any] = {"budget": way} if isinstance(way, Budget) else {"plan": way}
    result = pipe(1, num_inference_steps=None if "plan" in words else 10, guidance_scale=1.0, seeds=0, output_type="latent", **words)
    return 1e3 * statistics.median(step.seconds for step in result.steps)


def rows(bundles: dict[str, Bundle], options: Namespace) -> Iterator[dict[str, Any]]:
    """What was measured of one sample, whose `bundles` have an artifact each: a row a way to draw and precision, in their order."""
    bundle = next(iter(bundles.values()))
    manifest = bundle.manifest
    ways: list[Any] = list(PLANS) if manifest.model.patches else [Budget(**{manifest.axes[0].name: value}) for value in _spread(bundle)]
    artifacts = {each: own.manifest.graphs["denoiser"].artifacts[0] for each, own in bundles.items()}
    pipes = {each: opened(own, artifacts[each].precision, options.threads) for each, own in bundles.items()}
    labels = np.arange(options.samples) % 10
    if manifest.model.patches:
        grader = Grader.of(load_judge(SIDE), options.samples, SIDE)
    else:
        grader = Grader.of(load_judge(), options.samples, as_drawn=lambda images: as_drawn(images, manifest.model))
    for way in ways:
        times: dict[str, list[float]] = {each: [] for each in pipes}
        for _ in range(options.rounds):
            for each, pipe in pipes.items():
                milliseconds(pipe, way)
                times[each].append(milliseconds(pipe, way))
        exact = None
        for each, pipe in pipes.items():
            images = pictures(pipe, way, options)
            exact = images if exact is None else exact
            grades = grader.grade(Digits(images, labels))
            off = float(np.mean((images - exact) ** 2))
            place = {"budget": dict(way)} if isinstance(way, Budget) else {"budget": {}, "plan": way}
            yield place | {
                "precision": each,
                "accuracy": grades["accuracy"],
                "frechet_distance": grades["frechet_distance"],
                "psnr_db": float(10 * np.log10(4 / off)) if off else None,
                "megabytes": sum(file.bytes for file in artifacts[each].files) / 1e6,
                "step_db": min(row.psnr_db for row in artifacts[each].verified),
                "milliseconds": statistics.median(times[each]),
            }
    for pipe in pipes.values():
        pipe.close()


def _spread(bundle: Bundle) -> list[int]:
    """The ends of the axis and the middle of its doublings."""
    values = bundle.manifest.axes[0].doublings()
    return sorted({values[0], values[len(values) // 2], values[-1]})


def line(name: str, row: dict[str, Any]) -> str:
    """A row of the table."""
    way = row.get("plan") or Budget(**row["budget"])
    pictured = "same" if row["psnr_db"] is None else f"{row['psnr_db']:.1f}"
    return (
        f"| {name} | {way} | {row['precision']} | {row['megabytes']:.2f} | {row['step_db']:.1f} | {pictured} | "
        f"{row['accuracy']:.1%} | {row['frechet_distance']:.2f} | {row['milliseconds']:.2f} |"
    )


def exported(name: str, precision: str, folder: Path) -> Bundle:
    """The sample in one precision, or in `int4w:gptq`, in a bundle of its own: two roundings have one name."""
    held, _, rounding = precision.partition(":")
    words = {"rounding": rounding} if rounding else {}
    return elastic_export.export(name, output=folder / precision.replace(":", "-"), precision=held, batch="1-100", **words)


def chosen(text: str) -> tuple[str, ...]:
    """Precisions in their order, float32 the first, which the others are held against."""
    names = text.split(",")
    known = (*(name for name, row in TABLE.items() if {"ort", "openvino"} & set(row.backends)), "int8w:gptq", "int4w:gptq")
    if unknown := [name for name in names if name not in known]:
        raise ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(known)}")
    return tuple(dict.fromkeys([EXACT, *names]))


def protocol_of(before: dict[str, Any] | None, options: Namespace) -> dict[str, Any]:
    """How the options measure; raises UsageError where the card's other precisions were measured in another way."""
    protocol = {"samples": options.samples, "steps": options.steps, "guidance": GUIDANCE, "seed": options.seed}
    if before and _others(before, options) and before["protocol"] != protocol:
        raise UsageError(f"the card's other precisions were measured by {before['protocol']}: measure all again, or by that protocol")
    return protocol


def _others(before: dict[str, Any] | None, options: Namespace) -> list[dict[str, Any]]:
    """A card's rows of precisions that are not measured now."""
    return [row for row in (before or {}).get("rows", ()) if row["precision"] not in options.precisions]


def recorded(before: dict[str, Any] | None, measured: list[dict[str, Any]], options: Namespace) -> dict[str, Any]:
    """What a card holds of precisions, once those that were `measured` are in it; by the same protocol, what it held of others stays.

    Raises: UsageError where others were measured by another protocol.
    """
    protocol = protocol_of(before, options)
    kept = ("budget", "plan", "precision", "accuracy", "frechet_distance", "psnr_db")
    fresh = [{each: row[each] for each in kept if each in row} for row in measured]
    others = _others(before, options)
    ways = list(dict.fromkeys(str((row.get("plan"), row["budget"])) for row in fresh))
    own = versions("elastic-export", "onnxruntime", "openvino", "numpy", "torch")
    where = {each: {"versions": own, "machine": machine()} for each in options.precisions}
    standing = {row["precision"]: before["measured"][row["precision"]] for row in others} if before else {}
    return {
        "protocol": protocol,
        "rows": sorted(
            [*others, *fresh], key=lambda row: (ways.index(str((row.get("plan"), row["budget"]))), PRECISIONS.index(row["precision"]))
        ),
        "measured": standing | where,
    }


def main(options: Namespace) -> None:
    if options.record and not {*options.precisions} <= {*PRECISIONS}:
        raise UsageError(f"--record writes the cards' own precisions, {', '.join(PRECISIONS)}: give --precisions of these, or leave it out")
    if unknown := [name for name in options.models if name not in samples()]:
        raise UsageError(f"there is no sample {unknown[0]!r}; there are {', '.join(samples())}")
    for name in options.models if options.record else ():  # a refusal should not wait for the pictures
        protocol_of(read(samples()[name]).get("precisions"), options)
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * 3}{'---:|' * (len(COLUMNS) - 3)}")
    with tempfile.TemporaryDirectory() as folder:
        for name in options.models:
            bundles = {each: exported(name, each, Path(folder) / name) for each in options.precisions}
            measured = []
            for row in rows(bundles, options):
                measured.append(row)
                print(line(name, row), flush=True)
            if options.record:
                path = samples()[name]
                write(path, read(path) | {"precisions": recorded(read(path).get("precisions"), measured, options)})
    print(f"\n{machine()}; {versions('elastic-export', 'onnxruntime', 'openvino', 'torch')}")


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", help="packaged samples")
    parser.add_argument("--precisions", type=chosen, default=PRECISIONS, help="with commas, int4w:gptq among them (default: the cards')")
    parser.add_argument("--record", action="store_true", help="write accuracy and distances into the samples' cards, for --precision auto")
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=7)
    run(main, parser)
