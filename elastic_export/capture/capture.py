"""A model made portable: its graphs, its axes narrowed to what was asked for, its cost at each budget."""

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

import msgspec

from elastic_export.capture.zoo import Model
from elastic_export.foreign.component import Component
from elastic_export.foreign.vae import decoder, read_vae
from elastic_runtime.contract import artifacts, manifest
from elastic_runtime.contract.axis import Axis, Span, probes
from elastic_runtime.contract.budget import Budget
from elastic_runtime.errors import BudgetError
from elastic_targets.capture import GraphCapture

R = TypeVar("R", bound=manifest.Quality)


@dataclass
class Capture:
    """A manifest in the making, its graphs and its files. `graphs` is emptied as they are lowered, so that weights that are held in memory
    can be let go; in the manifest they have no artifacts yet, and its provenance knows the weights but not the command.

    `files` go into the bundle as they are (tokenizers): path to content. `peaks` estimate bytes of memory by graph. `notes` say what
    was taken for granted.
    """

    manifest: manifest.Manifest
    graphs: list[GraphCapture]
    files: Mapping[str, bytes] = field(default_factory=dict)
    peaks: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def taken_from(self, name: str) -> None:
        """Let the manifest say where the weights came from, in place of a folder's name."""
        provenance = msgspec.structs.replace(self.manifest.provenance, checkpoint=name)
        self.manifest = msgspec.structs.replace(self.manifest, provenance=provenance)


def capture(model: Model, spans: Mapping[str, Span], batch: Span, vae: Path | None = None) -> Capture:
    """Capture `model` with its axes narrowed to `spans` and batches of `batch`; `vae` is a diffusers folder for the decoder.

    Raises: BudgetError for an axis or span that the model does not offer; ModelError for the VAE.
    """
    family, params = model.family, model.params
    if batch.min < 1:
        raise BudgetError(f"--batch must start at 1 or more, got {batch}")
    axes = family.axes(params)
    for name in spans:
        if name not in [axis.name for axis in axes]:
            raise BudgetError(f"{model.name} has no axis {name!r}; it has {', '.join(axis.name for axis in axes) or 'none'}")
    axes = tuple(axis.narrow(spans[axis.name]) if axis.name in spans else axis for axis in axes)
    facts = manifest.Model(
        name=model.name,
        family=family.name,
        config=msgspec.json.decode(msgspec.json.encode(asdict(params))),  # lists, as it is read again
        weights=model.weights,  # type: ignore[arg-type]
        **family.facts(params),
    )
    graphs = [
        GraphCapture(
            name="denoiser",
            module=model.module,
            inputs=family.inputs(params),
            outputs=family.outputs(params),
            axes=axes,
            batch=batch,
            feeds=lambda budget, size: family.feeds(params, budget, size),
        )
    ]
    if vae:
        channels, height, width = facts.sample_shape
        facts = msgspec.structs.replace(facts, vae=read_vae(vae, channels))
        assert facts.vae is not None
        # It decodes one picture at a time, however many the denoiser is asked for at least.
        graphs.append(decoder(vae, facts.vae, channels, Span(height, height), Span(width, width), Span(1, batch.max)))
    weights = {"transformer": model.checkpoint_sha256} if model.checkpoint_sha256 else {}
    weights |= {"vae": Component(vae).sha256()} if vae else {}
    parameters = sum(parameter.numel() for parameter in model.module.parameters())
    making = manifest.Manifest(
        schema_version=manifest.SCHEMA_VERSION,
        model=facts,
        axes=axes,
        graphs=described(graphs),
        cost=tuple(family.cost(params, budget, parameters) for budget in all_budgets(axes)),
        quality=_offered(model.quality, axes),
        precisions=_offered(model.precisions, axes),
        provenance=origin(model.checkpoint, model.ignored, weights),
    )
    return Capture(making, graphs)


def _offered(rows: Iterable[R], axes: Iterable[Axis]) -> tuple[R, ...]:
    """Rows of the card at budgets that the axes still offer."""
    return tuple(row for row in rows if all(row.budget[axis.name] in axis.values for axis in axes))


def described(graphs: Iterable[GraphCapture]) -> dict[str, artifacts.Graph]:
    """The manifest's word of graphs that have no artifacts yet."""
    return {
        graph.name: artifacts.Graph(inputs=graph.inputs, outputs=graph.outputs, dimensions=graph.dimensions, artifacts=())
        for graph in graphs
    }


def origin(
    checkpoint: Path | None,
    ignored: tuple[str, ...] = (),
    weights: Mapping[str, str] = MappingProxyType({}),
    adapters: Iterable[manifest.Adapter] = (),
) -> manifest.Provenance:
    """Where weights came from, with the SHA-256 of each component's; what is made of them, when and by what, the export fills in."""
    return manifest.Provenance(
        command="",
        created="",
        versions={},
        checkpoint=checkpoint.name if checkpoint else None,
        checkpoint_sha256=weights.get("transformer"),
        weights_sha256=dict(weights),
        ignored_weights=ignored,
        adapters=tuple(adapters),
    )


def all_budgets(axes: tuple[Axis, ...]) -> list[Budget]:
    """Every point on the axes."""
    names = [axis.name for axis in axes]
    return [Budget(**dict(zip(names, point, strict=True))) for point in itertools.product(*(axis.values for axis in axes))]


def probe_budgets(axes: tuple[Axis, ...], open_dimensions: Mapping[str, Span] | None = None) -> list[Budget]:
    """The budgets to prove: along each axis its probes, the other axes at their defaults, and open dimensions at theirs beside them.

    Where all of it decides shapes alone (open dimensions, and axes that the data's shape carries), it goes together: all at the same end,
    all off the beaten track, and each in turn at its middle while the others are off the track.
    """
    defaults = {axis.name: axis.default for axis in axes}
    beside = {name: probes(range(span.min, span.max + 1)) for name, span in (open_dimensions or {}).items()}
    points = []
    for axis in axes:
        values = axis.probes()
        for i in range(max(map(len, [values, *beside.values()]))):
            at = {name: sizes[min(i, len(sizes) - 1)] for name, sizes in {axis.name: values, **beside}.items()}
            points.append(Budget(**defaults | at))
    if all(axis.carrier == "shape" for axis in axes) and (axes or open_dimensions):
        sizes = {axis.name: axis.values for axis in axes}
        sizes |= {name: range(span.min, span.max + 1) for name, span in (open_dimensions or {}).items()}
        odd = {name: (middles := probes(values))[min(1, len(middles) - 1)] for name, values in sizes.items()}
        turns = [odd | {name: values[len(values) // 2]} for name, values in sizes.items()]
        ends = [{name: values[end] for name, values in sizes.items()} for end in (0, -1)]
        points = [Budget(**point) for point in (ends[0], odd, *turns, ends[1])]
    return list(dict.fromkeys(points)) or [Budget()]
