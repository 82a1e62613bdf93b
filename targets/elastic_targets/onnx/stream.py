"""A graph without its weights, and the weights written one by one: an export needs memory for the largest of them, not for the model.

The exporter sees tensors of the right shapes and types that hold nothing. Small weights (norms, biases, tables) then get their values,
so that what can be computed of them is computed once; large ones stand as inputs while the graph is optimised, and become initializers
that are read, turned and cast when the file is written.
"""

import logging
import warnings
from pathlib import Path

import onnx
import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor
from onnxscript.optimizer import FOLDED_FROM_KEY
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from elastic_targets.capture import GraphCapture
from elastic_targets.onnx.attention import WITH_HEADS, unsplit
from elastic_targets.onnx.optimize import optimize
from elastic_targets.target import OnProgress
from elastic_targets.weights import mapped, values, weights

ORIGIN = FOLDED_FROM_KEY  # metadata of a constant: the names of what it was made of, as Python writes a list
SMALL = 1 << 18  # values of a weight that the optimiser may see
# Weights within the graph are one protobuf message, which is made in memory and ends at 2 GB; more than this go to files beside it, of at
# most 4 GB, where many file systems and archives end.
EXTERNAL_FROM = 256_000_000
MOST_BYTES = 4_000_000_000
Turned = tuple[Tensor, tuple[int, ...] | None]  # a weight, and the order of dimensions that the graph has it in


def stream(graph: GraphCapture, module: nn.Module, opset: int) -> ir.Model:
    """The optimised graph of `module`, whose large initializers are read when they are written."""
    held, fakes = dict(weights(module)), FakeTensorMode(allow_non_fake_inputs=True)

    def hollow(weight: Tensor) -> Tensor:
        with fakes:
            return torch.empty(weight.shape, dtype=weight.dtype)

    emptied = mapped(module, hollow)
    with fakes:
        model = _exported(graph, emptied, opset)
    outside: dict[str, Turned] = {}
    for name, value in list(model.graph.initializers.items()):
        if name not in held:
            continue
        if held[name].numel() <= SMALL:
            value.const_value = TorchTensor(values(held[name]).contiguous(), name=name)
        else:
            outside |= _taken_out(model, value, held[name])
    optimize(model)
    # What halves a side gives it a name that says so, or one of the exporter's own; sizes that are fixed stay to be found.
    for spec, value in zip(graph.outputs, model.graph.outputs, strict=True):
        shape = value.shape or ir.Shape(())
        named = [own if isinstance(own, str) and not isinstance(seen, int) else seen for own, seen in zip(spec.shape, shape, strict=True)]
        value.shape = ir.Shape(named)
    if opset >= WITH_HEADS:
        unsplit(model)
    inputs = {value.name: value for value in model.graph.inputs}
    for name, (weight, order) in outside.items():
        value = inputs[name]
        model.graph.inputs.remove(value)
        if value.uses():
            value.const_value = _lazy(name, weight, order)
            model.graph.register_initializer(value)
    return model


def write(model: ir.Model, file: Path, on_progress: OnProgress | None = None) -> list[Path]:
    """Write the graph, its weights within it or beside it; returns the files, the graph's first."""
    large = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value) >= EXTERNAL_FROM
    data = file.with_name(file.name + ".data")

    def tell(tensor: object, where: ir.external_data.CallbackInfo) -> None:
        if on_progress:
            on_progress(f"writing {file.name}", where.index, where.total)

    if not large:
        ir.save(model, file)
        return [file]
    ir.save(model, file, external_data=data.name, max_shard_size_bytes=MOST_BYTES, callback=tell)
    return [file, *(file.parent / name for name in external(onnx.load(str(file), load_external_data=False)))]


def external(model: onnx.ModelProto) -> list[str]:
    """The files beside a graph that hold its weights."""
    places = (entry.value for tensor in model.graph.initializer for entry in tensor.external_data if entry.key == "location")
    return sorted(set(places))


def _exported(graph: GraphCapture, module: nn.Module, opset: int) -> ir.Model:
    example = {name: torch.from_numpy(array) for name, array in graph.example().items()}
    with warnings.catch_warnings(), torch.no_grad():
        # The exporter speaks of its own deprecations and of our named dimensions; `ensures` checks the names.
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(
            module,
            kwargs=example,
            dynamo=True,
            opset_version=opset,
            input_names=[spec.name for spec in graph.inputs],
            output_names=[spec.name for spec in graph.outputs],
            dynamic_shapes={spec.name: graph.dynamic(spec) for spec in graph.inputs},
            verbose=False,
            optimize=False,
        )
    assert program is not None
    return program.model


def _taken_out(model: ir.Model, value: ir.Value, weight: Tensor) -> dict[str, Turned]:
    """Make inputs of a weight: of itself, and of each order that the graph turns it to, which is then done when it is written."""
    name = str(value.name)
    del model.graph.initializers[name]
    value.const_value = None
    outside: dict[str, Turned] = {}
    turned: dict[tuple[int, ...], ir.Value] = {}
    for use in list(value.uses()):
        node = use.node
        if node.op_type != "Transpose":
            continue
        order = tuple(node.attributes["perm"].as_ints())
        if order not in turned:
            shape = ir.Shape([weight.shape[axis] for axis in order])
            turned[order] = ir.Value(name=f"{name}.{''.join(map(str, order))}", shape=shape, type=value.type)
            turned[order].metadata_props[ORIGIN] = repr([name])  # as the optimiser says it of those that it turns
            outside[str(turned[order].name)] = (weight, order)
        node.outputs[0].replace_all_uses_with(turned[order])
        assert isinstance(node.graph, ir.Graph)  # a loop's body has nodes of its own
        node.graph.remove(node, safe=True)
    if value.uses():
        outside[name] = (weight, None)
        model.graph.inputs.append(value)
    model.graph.inputs.extend(turned.values())
    return outside


def _lazy(name: str, weight: Tensor, order: tuple[int, ...] | None) -> ir.LazyTensor:
    def read() -> TorchTensor:
        tensor = values(weight)
        return TorchTensor((tensor if order is None else tensor.permute(order)).contiguous(), name=name)

    shape = weight.shape if order is None else [weight.shape[axis] for axis in order]
    return ir.LazyTensor(read, dtype=TorchTensor(torch.empty(0, dtype=weight.dtype)).dtype, shape=ir.Shape(shape), name=name)
