"""An ONNX artifact computed a part at a time: what proves a model that is larger than this machine's memory.

The nodes are run in their order, as many together as have so many bytes of weights; between the parts only activations are kept.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from elastic_runtime.contract.artifacts import Graph, OnnxArtifact
from elastic_runtime.contract.bundle import Bundle
from elastic_runtime.contract.precision import PRECISIONS
from elastic_runtime.device.memory import give_back
from elastic_runtime.errors import InferenceError
from elastic_runtime.sessions import apart
from elastic_runtime.sessions.ort import absence, library, session_options
from elastic_runtime.sessions.session import Arrays, Session
from elastic_targets.onnx import bfloat16, float4
from elastic_targets.onnx.qdq import FORMS

PART = 256_000_000  # bytes of weights
BESIDE = 1_000_000  # bytes of a weight that is handed over beside its part's message, which would hold copies of it, and no more than 2 GiB

_HANDED = (np.float32, np.float16, np.int8, np.uint8)  # numpy's own; those of fewer bits are packed in the message
Given = dict[str, tuple[np.dtype[Any], tuple[int | None, ...]]]


@dataclass(frozen=True)
class Part:
    """Some of a graph's nodes: the values that they take from others before them, and those that others take from them.

    `widened` of these are in bfloat16, which numpy has no type for, and are float32 outside their parts: the same numbers.
    """

    nodes: tuple[ir.Node, ...]
    takes: tuple[str, ...]
    gives: tuple[str, ...]
    weights: tuple[ir.Value, ...]
    widened: frozenset[str]

    def outside(self, name: str) -> str:
        """What a value of its nodes is called where the part takes or gives it."""
        return f"{name}.float32" if name in self.widened else name


class PartSession(Session):
    """A model in parts, on ONNX Runtime's CPU provider: runs that are handed over together read every weight once."""

    gathers = True

    def __init__(self, graph: Graph, model: ir.Model, part: int = PART):
        super().__init__(graph)
        self._model: ir.Model | None = model
        self._parts = list(parts(model, part))
        self._last: tuple[Any, Any] = (None, None)
        self.where = f"onnxruntime {library().__version__} CPU, in {len(self._parts)} parts"

    def _run(self, feeds: Arrays) -> dict[str, np.ndarray]:
        return self._several([feeds])[0]

    def _several(self, runs: Sequence[Arrays]) -> list[dict[str, np.ndarray]]:
        if self._model is None:
            raise InferenceError("this session is closed")
        held: list[dict[str, np.ndarray]] = [dict(feeds) for feeds in runs]
        last = {name: position for position, part in enumerate(self._parts) for name in part.takes}
        wanted = {spec.name for spec in self.graph.outputs}
        for position, part in enumerate(self._parts):
            kept = wanted | {name for name, place in last.items() if place > position}
            try:
                opened = self._session(self._model, part, held)
                for values in held:
                    values |= _computed(opened, part, values)
                    for name in values.keys() - kept:
                        del values[name]
            except Exception as error:  # its exception types are private
                raise InferenceError(f"ONNX Runtime failed in part {position + 1} of {len(self._parts)}: {error}") from error
            del opened
            if len(self._parts) > 1:
                give_back()  # what opening a part left in the C library's heap
        return [{spec.name: values[spec.name] for spec in self.graph.outputs} for values in held]

    def _session(self, model: ir.Model, part: Part, runs: Sequence[Mapping[str, np.ndarray]]) -> Any:
        given = _given(part, runs)
        if len(self._parts) > 1:
            return _opened(model, part, given)
        if self._last[0] != given:  # that of the only part serves until the shapes change
            self._last = (None, None)
            self._last = (given, _opened(model, part, given))
        return self._last[1]

    def close(self) -> None:
        self._model, self._last = None, (None, None)


def compute(
    model: ir.Model, part: Part, runs: Sequence[Mapping[str, np.ndarray]], watched: Collection[str] = ()
) -> Iterator[dict[str, np.ndarray]]:
    """What a part gives in each of `runs` for the values that it takes, and `watched` values of its nodes or of their loops' bodies, those
    of every time that a loop went round one after the other.
    """
    opened = _opened(model, part, _given(part, runs), watched)
    for values in runs:
        yield _computed(opened, part, values)


def _given(part: Part, runs: Sequence[Mapping[str, np.ndarray]]) -> Given:
    """The types of the values that a part takes in `runs`, and their shapes, open where these differ."""
    given = {}
    for name in part.takes:
        shapes = zip(*(values[name].shape for values in runs), strict=True)
        given[name] = runs[0][name].dtype, tuple(sizes[0] if len(set(sizes)) == 1 else None for sizes in shapes)
    return given


def _opened(model: ir.Model, part: Part, given: Given, watched: Collection[str] = ()) -> tuple[Any, dict[str, str]]:
    """A session of a part, for values of these types and shapes, and its outputs by the names of the values that they are."""
    runtime, options = library(), session_options(library())
    options.enable_cpu_mem_arena = False  # it grows to the next power of two, and a part is run once: twice the memory for no time
    made, seen, beside = _described(model, part, given, watched)
    content = made.SerializeToString()
    del made
    options.add_external_initializers(list(beside), [runtime.OrtValue.ortvalue_from_numpy(array) for array in beside.values()])
    session = runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return session, {name: part.outside(name) for name in part.gives} | seen


def _computed(opened: tuple[Any, dict[str, str]], part: Part, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    session, asked = opened
    return dict(zip(asked, session.run(list(asked.values()), {part.outside(name): values[name] for name in part.takes}), strict=True))


def parts(model: ir.Model, most: int) -> Iterator[Part]:
    """Cut a graph into runs of nodes with at most so many bytes of weights each (or one node)."""
    groups: list[list[ir.Node]] = [[]]
    held: set[str] = set()
    size = 0
    for node in model.graph:
        new = {str(value.name): value for value in taken(node) if value.const_value is not None and value.name not in held}
        more = sum(value.const_value.nbytes for value in new.values() if value.const_value)
        if groups[-1] and size + more > most:
            groups.append([])
            held, size = set(), 0
        groups[-1].append(node)
        held |= new.keys()
        size += more
    place = {id(each): number for number, group in enumerate(groups) for node in group for each in (node, *inner(node))}
    outputs = {id(value) for value in model.graph.outputs}
    for number, group in enumerate(groups):
        takes: dict[str, ir.Value] = {}
        weights: dict[str, ir.Value] = {}
        for node in group:
            for value in taken(node):
                producer = value.producer()
                if value.const_value is not None and producer is None:
                    weights[str(value.name)] = value
                elif producer is None or place[id(producer)] != number:
                    takes[str(value.name)] = value
        gives = {
            str(value.name): value
            for node in group
            for value in node.outputs
            if id(value) in outputs or any(place[id(use.node)] != number for use in value.uses())
        }
        widened = frozenset(name for name, value in (takes | gives).items() if value.dtype == ir.DataType.BFLOAT16)
        yield Part(tuple(group), tuple(takes), tuple(gives), tuple(weights.values()), widened)


def bodies(node: ir.Node) -> list[ir.Graph]:
    """A node's own graphs: the body of a loop."""
    return [attribute.as_graph() for attribute in node.attributes.values() if attribute.type == ir.AttributeType.GRAPH]


def inner(node: ir.Node) -> list[ir.Node]:
    """The nodes of a node's own graphs: of a loop's body."""
    return [each for graph in bodies(node) for each in graph.all_nodes()]


def taken(node: ir.Node) -> Iterator[ir.Value]:
    """The values of the graph that a node takes, and those that its own graphs do."""
    body = inner(node)
    own = {id(value) for each in body for value in each.outputs}
    own |= {id(value) for each in body if each.graph is not None for value in each.graph.inputs}
    yield from (value for each in (node, *body) for value in each.inputs if value is not None and id(value) not in own)


def _described(model: ir.Model, part: Part, given: Given, watched: Collection[str]) -> tuple[Any, dict[str, str], dict[str, np.ndarray]]:
    """The part as a model of its own, with its weights within, the outputs that `watched` values are to be had by, and the weights that
    are handed over beside it."""
    import onnx

    made = onnx.ModelProto(ir_version=model.ir_version, graph=onnx.GraphProto(name="part"))
    made.opset_import.extend(onnx.helper.make_opsetid(domain, version) for domain, version in model.opset_imports.items() if version)
    narrowed = [name for name in part.takes if name in part.widened]
    made.graph.node.extend(onnx.helper.make_node("Cast", [part.outside(name)], [name], to=onnx.TensorProto.BFLOAT16) for name in narrowed)
    made.graph.node.extend(ir.to_proto(node) for node in part.nodes)
    for name in part.takes:
        dtype, shape = given[name]
        kind = onnx.helper.np_dtype_to_tensor_dtype(dtype)
        made.graph.input.append(onnx.helper.make_tensor_value_info(part.outside(name), kind, shape))
    made.graph.output.extend(onnx.ValueInfoProto(name=part.outside(name)) for name in part.gives)
    seen: dict[str, str] = {}
    for node, proto in zip(part.nodes, made.graph.node[len(narrowed) :], strict=True):
        seen |= {str(value.name): str(value.name) for value in node.outputs if value.name in watched}
        within = [str(value.name) for each in inner(node) for value in each.outputs if value.name in watched]
        for name in within:  # what a loop's body gives beyond what it carries is kept of every round
            (body,) = (attribute.g for attribute in proto.attribute if attribute.name == "body")
            body.output.append(onnx.ValueInfoProto(name=name))
            proto.output.append(f"{name}.seen")
            seen[name] = f"{name}.seen"
    widened = [name for name in part.gives if name in part.widened]
    made.graph.node.extend(onnx.helper.make_node("Cast", [name], [part.outside(name)], to=onnx.TensorProto.FLOAT) for name in widened)
    made.graph.output.extend(onnx.ValueInfoProto(name=name) for name in sorted(set(seen.values()) - set(part.gives)))
    beside: dict[str, np.ndarray] = {}
    for weight in part.weights:
        assert weight.const_value is not None
        tensor: Any = weight.const_value
        array, name = tensor.numpy(), str(weight.name)
        if array.nbytes > BESIDE and array.dtype in _HANDED:
            kind = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
            outside = made.graph.initializer.add(name=name, dims=array.shape, data_type=kind, data_location=onnx.TensorProto.EXTERNAL)
            outside.external_data.add(key="location", value=name)
            beside[name] = np.array(array, order="C")  # a copy: the file that it lies in is let go below
        else:
            made.graph.initializer.append(ir.to_proto(ir.Tensor(array, name=name, dtype=tensor.dtype)))
        del array  # which holds the file
        if isinstance(tensor, ir.ExternalTensor):
            tensor.release()  # else every weight's file stays mapped, and the process grows to its size
    return made, seen, beside


def evaluator(bundle: Bundle, graph: Graph, artifact: OnnxArtifact) -> Session | None:
    """A session that computes an artifact of any size in little memory; None for a precision that ONNX Runtime has no kernels for and that
    is not spelled out for it, and where no ONNX Runtime here opens the artifact's opset."""
    if absence(artifact.opset):
        return None
    if _spelling(artifact) is None and "ort" not in PRECISIONS[artifact.precision].backends:
        return None
    return apart.opened(bundle, graph, artifact, _in_parts, {}) if artifact.conditions else _in_parts(bundle, graph, artifact)


def _spelling(artifact: OnnxArtifact) -> Callable[[ir.Model], ir.Model] | None:
    """What says a precision in operators that ONNX Runtime has kernels for; None where it has its own."""
    if artifact.precision == "bf16":
        return bfloat16.spelled_out
    form = FORMS.get(artifact.precision)
    return float4.spelled_out if form is not None and form.codes == float4.FLOAT4 else None


def _in_parts(bundle: Bundle, graph: Graph, artifact: OnnxArtifact) -> PartSession:
    model, spelling = ir.load(bundle.file(artifact.path)), _spelling(artifact)
    for value in model.graph.initializers.values():
        if isinstance(tensor := value.const_value, ir.ExternalTensor):
            value.const_value = _behind_links(tensor)
    return PartSession(graph, spelling(model) if spelling else model)


def _behind_links(tensor: ir.ExternalTensor) -> ir.ExternalTensor:
    """The tensor in the file itself: hubs keep a bundle's files as links into a store of their own, which the library does not follow."""
    file = (Path(tensor.base_dir) / tensor.location).resolve()
    where = (file.name, tensor.offset, tensor.length, tensor.dtype)
    return ir.ExternalTensor(*where, shape=tensor.shape, name=tensor.name, base_dir=file.parent)
