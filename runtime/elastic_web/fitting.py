"""Which bundles a page can draw, from which of their artifacts, and what it must know of them."""

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from elastic_runtime.choosing.budgets import graded
from elastic_runtime.choosing.calibration import offered
from elastic_runtime.choosing.cost import Costs, Rates
from elastic_runtime.choosing.precisions import AUTO, allowed
from elastic_runtime.contract.artifacts import Graph, OnnxArtifact
from elastic_runtime.contract.axis import Axis
from elastic_runtime.contract.budget import Budget
from elastic_runtime.contract.bundle import Bundle
from elastic_runtime.contract.manifest import Manifest, Model
from elastic_runtime.contract.precision import EXACT, PRECISIONS
from elastic_runtime.contract.reference import cut, unpack
from elastic_runtime.contract.schedule import RectifiedFlow, ShiftedCosine
from elastic_runtime.denoising.pictures import obstacle
from elastic_runtime.errors import UsageError
from elastic_runtime.sampling.fitting import OFFERED

# Samplers that the page has too, of those that the schedule offers, whose first is the one where none is asked for.
SAMPLERS = {RectifiedFlow: ("euler", "heun", "ab2", "ab3"), ShiftedCosine: ("ddpm", "ddim")}
OUTPUTS = {"denoiser": "prediction", "decoder": "image"}
INPUTS = {"sample", "timestep", "class_labels"}
MOST_BYTES = 2_000_000_000  # of a file that a page can hold beside what it computes, in the four gigabytes of WebAssembly
INSTEAD = "elastic-export serve BUNDLE draws it for a browser"


def unfit(bundle: Bundle) -> str | None:
    """Why a page cannot draw this bundle, with what to do; None where it can."""
    manifest, model = bundle.manifest, bundle.manifest.model
    if "denoiser" not in manifest.graphs:
        return f"it has no graph 'denoiser', it has {', '.join(manifest.graphs)}: export the model again"
    graph = manifest.graphs["denoiser"]
    what = _beyond(model, {spec.name for spec in graph.inputs} - {axis.input for axis in manifest.axes}, manifest.axes)
    if what:
        return f"{what}, which a page does not do: {INSTEAD}"
    if graph.batch.min > 1:
        return f"its denoiser takes batches of {graph.batch}, and a page draws one picture: export it with --batch 1-2"
    return obstacle(manifest)


def _beyond(model: Model, inputs: set[str], axes: Sequence[Axis]) -> str | None:
    """What a model does that the page's samplers do not."""
    if model.text or model.patches or model.packed:
        return f"{model.name} is drawn of tokens, by prompts"
    if model.tokens:
        return f"{model.name} fills in masked tokens"
    if any(axis.input == "slots" for axis in axes):
        return f"{model.name} has a router that sizes each step"
    if strange := sorted(inputs - INPUTS):
        return f"{model.name} takes {', '.join(strange)}"
    if type(model.schedule) not in SAMPLERS:
        return f"{model.name} has the schedule {model.schedule.__struct_config__.tag}"
    if model.learned_variance or model.guidance_rescale:
        return f"{model.name} has a {'learned variance' if model.learned_variance else 'guidance that keeps lengths'}"
    return None


def fitting(bundle: Bundle, precisions: Sequence[str] = (AUTO,)) -> dict[str, OnnxArtifact]:
    """The artifact of each graph that a page runs: the smallest file of `precisions`, or by `auto` of those whose pictures the card found
    as good as the original's. A graph that has none of them is taken in float32.

    Raises: UsageError for a bundle that a page cannot draw, or that has no file for it.
    """
    if why := unfit(bundle):
        raise UsageError(f"{bundle.folder} cannot be drawn by a page: {why}")
    manifest = bundle.manifest
    names = allowed(manifest, precisions)
    graphs = {name: manifest.graphs[name] for name in ("denoiser", "decoder") if name in manifest.graphs}
    chosen = {"denoiser": _smallest(bundle, "denoiser", graphs["denoiser"], names)}
    if "decoder" in graphs and manifest.model.vae:
        beside = (*names, EXACT) if any(each.precision in names for each in graphs["decoder"].artifacts) else (EXACT,)
        chosen["decoder"] = _smallest(bundle, "decoder", graphs["decoder"], beside)
    return chosen


def _smallest(bundle: Bundle, name: str, graph: Graph, names: Sequence[str]) -> OnnxArtifact:
    onnx = [each for each in graph.artifacts if isinstance(each, OnnxArtifact)]
    if not onnx:
        raise UsageError(f"{bundle.folder} has no ONNX file of its {name}: elastic-export onnx MODEL -o {bundle.folder} adds it")
    reasons = {id(each): _hindrance(each, names) for each in onnx}
    able = [each for each in onnx if reasons[id(each)] is None]
    if not able:
        why = "; ".join(f"{each.path} ({each.precision}) {reasons[id(each)]}" for each in onnx)
        raise UsageError(f"{bundle.folder} has no file of its {name} that a page can run: {why}. Export it in another precision, too")
    return min(able, key=lambda each: (each.files[0].bytes, -each.opset))


def _hindrance(artifact: OnnxArtifact, names: Sequence[str]) -> str | None:
    if artifact.precision not in names:
        return f"is none of {', '.join(names)}"
    if "ort" not in PRECISIONS[artifact.precision].backends:
        return "is of a precision that ONNX Runtime has no kernels for"
    if artifact.conditions:
        return "is in two files, of which a page takes one: export it without --conditions-apart, too"
    if PRECISIONS[artifact.precision].base != EXACT:
        return "has the form that TensorRT reads, which no page was tried with"
    size = sum(file.bytes for file in artifact.files)
    if size > MOST_BYTES:
        return f"has {size / 1e9:.1f} GB of weights, and a page holds {MOST_BYTES / 1e9:.0f}"
    if len(artifact.files) > 1:
        own = f"has its {size / 1e9:.1f} GB of weights in a file of their own"
        return f"{own}, as those from a quarter of a GB up do, and a page takes one file"
    return None if all(row.passed for row in artifact.verified) else "was not proven at every budget"


def facts(bundle: Bundle, chosen: dict[str, OnnxArtifact]) -> dict[str, Any]:
    """What the page must know of the bundle, in JSON's kinds."""
    manifest, model = bundle.manifest, bundle.manifest.model
    graph, artifact = manifest.graphs["denoiser"], chosen["denoiser"]
    samplers = [name for name in OFFERED[type(model.schedule)] if name in SAMPLERS[type(model.schedule)]]
    described = msgspec.to_builtins(model)
    keep = ("name", "family", "prediction", "schedule", "sample_shape", "num_classes", "null_label", "guided_channels", "vae", "weights")
    return {
        "model": {name: described[name] for name in keep} | {"pixels": model.pixels},
        "axes": msgspec.to_builtins(manifest.axes),
        "budgets": _rows(manifest),
        "inputs": [spec.name for spec in graph.inputs],
        "samplers": samplers,
        "batch": graph.batch.max if not PRECISIONS[artifact.precision].by_batch else 1,
        "precision": artifact.precision,
    }


def _rows(manifest: Manifest) -> list[dict[str, Any]]:
    """The budgets to choose from, cheapest first, with FLOPs, the share of the best accuracy where the card has it, and a `worth` that
    ranks them."""
    work = Costs(manifest, Rates(1.0, 1.0)).work
    card = graded(manifest.quality, lambda budget: work(budget).flops)

    def row(budget: Budget) -> dict[str, Any]:
        flops = work(budget).flops
        if card is None:
            return {"budget": dict(budget), "flops": flops, "quality": None, "worth": flops}
        quality, distance = (float(np.interp(flops, card[0], column)) for column in card[1:])
        return {"budget": dict(budget), "flops": flops, "quality": quality, "worth": quality / distance}

    return sorted((row(budget) for budget in offered(manifest.axes)), key=lambda each: float(each["flops"]))


def proof(bundle: Bundle, chosen: dict[str, OnnxArtifact]) -> tuple[dict[str, Any], bytes]:
    """What the original answered, for a page to check its own answers by: a description by graph and the numbers that it points into.

    Of the denoiser at each recorded budget, of the decoder the first of its answers: the first sample. `bound` is what an answer may be off
    by.
    """
    reference = bundle.reference()
    parts: list[bytes] = []

    def put(array: np.ndarray) -> dict[str, Any]:
        offset = sum(map(len, parts))
        parts.append(np.ascontiguousarray(array).tobytes())
        return {"offset": offset, "length": int(array.size), "dtype": array.dtype.name, "dims": list(array.shape)}

    described: dict[str, Any] = {}
    for name, artifact in chosen.items():
        graph, (feeds, outputs) = bundle.manifest.graphs[name], unpack(name, reference)
        records = list(outputs.items()) if name == "denoiser" else list(outputs.items())[:1]
        if not records:
            continue
        feeds, tolerance = cut(graph.inputs, feeds, records[0][0]), graph.tolerance(artifact)
        answers = [
            {
                "budget": dict(budget),
                "bound": tolerance * max(1.0, float(np.abs(named[OUTPUTS[name]]).max())),
                "output": put(named[OUTPUTS[name]][:1]),
            }
            for budget, named in records
        ]
        described[name] = {"feeds": {each: put(array[:1]) for each, array in feeds.items()}, "answers": answers}
    return described, b"".join(parts)
