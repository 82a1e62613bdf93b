"""What a family tells the rest of the hall about itself, and how sources of its sizes are brought to agree."""

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

import numpy as np
from torch import Tensor, nn

from elastic_export.families.bricks import FLOAT32
from elastic_runtime.contract.artifacts import TensorSpec, measure
from elastic_runtime.contract.axis import Axis
from elastic_runtime.contract.budget import Budget
from elastic_runtime.contract.manifest import Cost
from elastic_runtime.errors import ModelError


@dataclass(frozen=True)
class Family:
    """One family of models. `P` below is its params dataclass.

    name: as in `--config` files and the manifest. params: P. build(P): the module. presets: P by name.
    rename_key(key): name in the module of a public checkpoint's key, None for weights that are not part of it.
    sources(weights, args): fields of P by source ("the checkpoint's shapes", ...) that must agree where they overlap.
    assumed(fields): fields of P to use where no source knows them.
    axes(P), inputs(P), outputs(P), feeds(P, budget, batch), cost(P, budget, parameter count): the denoiser graph.
    facts(P): fields of the manifest's `Model` that the family decides.
    yields: fields that a preset leaves to a checkpoint, which knows its own. options: fields that a user may overrule by an option.
    """

    name: str
    params: type
    build: Callable[[Any], nn.Module]
    presets: Mapping[str, Any]
    rename_key: Callable[[str], str | None]
    sources: Callable[[Mapping[str, Tensor], Mapping[str, Any]], dict[str, dict[str, Any]]]
    assumed: Callable[[Mapping[str, Any]], dict[str, Any]]
    axes: Callable[[Any], tuple[Axis, ...]]
    inputs: Callable[[Any], tuple[TensorSpec, ...]]
    outputs: Callable[[Any], tuple[TensorSpec, ...]]
    feeds: Callable[[Any, Budget, int], dict[str, np.ndarray]]
    cost: Callable[[Any, Budget, int], Cost]
    facts: Callable[[Any], dict[str, Any]]
    yields: tuple[str, ...] = ("num_heads", "num_classes")
    options: tuple[str, ...] = ()


def agree(family: Family, sources: Mapping[str, Mapping[str, Any]], overrides: Mapping[str, Any]) -> Any:
    """Params of `family` from all that is known about them.

    Raises: ModelError where two sources disagree (naming both values), where a field is unknown, or where none tells it.
    """
    known: dict[str, tuple[Any, str]] = {}
    names = [field.name for field in fields(family.params)]
    for source, values in sources.items():
        for name, given in values.items():
            if name not in names:
                raise ModelError(f"{source} has an unknown field {name!r}; {family.name} has {', '.join(names)}")
            if name in overrides:
                continue
            value = tuple(given) if isinstance(given, list) else given  # as JSON has it
            before, where = known.setdefault(name, (value, source))
            if before != value and not _as_wide(name, before, value, known):
                flag = f" Override with --{name.replace('_', '-')}." if name in family.options else ""
                raise ModelError(f"{name} is {before!r} by {where} but {value!r} by {source}.{flag}")
    merged = {name: value for name, (value, _) in known.items()} | dict(overrides)
    merged = family.assumed(merged) | merged
    if unknown := [name for name in _required(family.params) if name not in merged]:
        raise ModelError(f"{family.name}: nothing tells {', '.join(unknown)}; give --config FILE.json with these fields, or a preset")
    for field in fields(family.params):
        value = merged.get(field.name, field.default)
        if field.type in (int, float) and (isinstance(value, bool) or not isinstance(value, int if field.type is int else int | float)):
            raise ModelError(f"{family.name}: {field.name} must be a {'whole ' if field.type is int else ''}number, got {value!r}")
    try:
        return family.params(**merged)
    except (ValueError, TypeError) as error:
        raise ModelError(f"{family.name}: {error}") from None


def _as_wide(name: str, one: Any, other: Any, known: Mapping[str, tuple[Any, str]]) -> bool:
    """Whether two `mlp_ratio`s make a layer of the same size: a config's 2.67 is what weights tell as 2.6647."""
    width = next((known[each][0] for each in ("hidden_size", "embed_dim") if each in known), None)
    try:
        wide = () if width is None else (width, 2 * width)  # some have blocks of twice the width
        return name == "mlp_ratio" and bool(wide) and all(int(each * one) == int(each * other) for each in wide)
    except (TypeError, ValueError, OverflowError):  # no numbers, or none that are finite
        return False


def _required(params: type) -> list[str]:
    return [field.name for field in fields(params) if field.default is MISSING]


def demand(kind: str, shapes: Mapping[Any, tuple[int, ...]], ranks: Mapping[str, int]) -> None:
    """Raise ModelError unless the `shapes` of a checkpoint of this `kind` ("an ELT") have these names, of so many dimensions."""
    if lacking := [name for name in ranks if name not in shapes]:
        raise ModelError(f"this is not {kind} checkpoint: it lacks {', '.join(lacking)}")
    for name, rank in ranks.items():
        if len(shapes[name]) != rank or 0 in shapes[name]:
            what = f"not {rank} dimensions" if len(shapes[name]) != rank else "which holds nothing"
            raise ModelError(f"this is not {kind} checkpoint: its {name} has shape {shapes[name]}, {what}")


def priced(budget: Budget, flops: int, parameters: int, activation_values: int) -> Cost:
    """The manifest's row of a budget: FLOPs, and float32 bytes of so many parameters and activation values."""
    return Cost(
        budget=dict(budget),
        flops=flops,
        weight_bytes=parameters * FLOAT32,
        activation_bytes=activation_values * FLOAT32,
    )


def sample_inputs(shape: tuple[int, int, int], classes: bool = True) -> tuple[TensorSpec, ...]:
    """The inputs of a denoiser of samples (C, H, W), conditioned on classes or on nothing."""
    specs = (TensorSpec(name="sample", dtype="float32", shape=("B", *shape)), TensorSpec(name="timestep", dtype="float32", shape=("B",)))
    return (*specs, TensorSpec(name="class_labels", dtype="int64", shape=("B",))) if classes else specs


def sample_outputs(shape: tuple[int, int, int]) -> tuple[TensorSpec, ...]:
    """The output of a denoiser that predicts something of the sample's shape."""
    return (TensorSpec(name="prediction", dtype="float32", shape=("B", *shape)),)


def sample_feeds(shape: tuple[int, int, int], num_classes: int, batch: int) -> dict[str, np.ndarray]:
    """Feeds of `sample_inputs`: noise, times in (0, 1) and labels, where there are classes; always the same."""
    generator = np.random.default_rng(0)
    labels = {"class_labels": example_labels(generator, num_classes, batch)} if num_classes else {}
    return {
        "sample": generator.standard_normal((batch, *shape)).astype(np.float32),
        "timestep": generator.uniform(0.05, 0.95, batch).astype(np.float32),
    } | labels


def example_labels(generator: np.random.Generator, num_classes: int, batch: int) -> np.ndarray:
    """Labels (B,) int64, the last of several being the null label."""
    labels = generator.integers(0, num_classes, batch)
    labels[-1:] = num_classes if batch > 1 else labels[-1]
    return labels.astype(np.int64)


def random_rows(generator: np.random.Generator, spec: TensorSpec, largest: Mapping[str, int], sizes: Mapping[str, int]) -> np.ndarray:
    """Normal values for an input of open dimensions: drawn for the `largest` sizes and cut to `sizes`, so that rows stay the same."""
    shape = [measure(size, largest) for size in spec.shape]
    cut = tuple(slice(measure(size, sizes)) for size in spec.shape)
    return np.ascontiguousarray(generator.standard_normal(shape).astype(np.float32)[cut])
