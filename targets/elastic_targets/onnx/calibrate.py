"""How large values of a graph become: what a static scale is made of.

A graph is run in floats, with a reduction beside each value that is asked about; within a loop it is taken of every pass. What it is fed
says `elastic_targets.feeds`.
"""

from collections.abc import Sequence

import msgspec
import numpy as np
import onnx_ir as ir

from elastic_runtime.contract.artifacts import Graph, TensorSpec
from elastic_runtime.errors import ModelError
from elastic_targets.capture import GraphCapture
from elastic_targets.feeds import budgets, feeds, starts
from elastic_targets.onnx.evaluate import PartSession, bodies
from elastic_targets.target import OnProgress


def largest(graph: GraphCapture, model: ir.Model, names: Sequence[str], on_progress: OnProgress | None = None) -> dict[str, float]:
    """The largest magnitude of each of these values of `model`, at the ends and in the middle of the graph's budgets; `on_progress` is
    told of the runs that this takes.

    Raises: ModelError where one is not finite.
    """
    if not names:
        return {}
    observed, outputs_of = _observed(model, names)
    ports = tuple(TensorSpec(name=name, dtype="float32", shape=()) for name in outputs_of.values())
    described = Graph(inputs=graph.inputs, outputs=graph.outputs, dimensions=graph.dimensions, artifacts=())
    ranges, points = dict.fromkeys(names, 0.0), budgets(graph)
    done, total = 0, len(points) * len(starts(graph))
    with PartSession(msgspec.structs.replace(described, outputs=(*described.outputs, *ports)), observed) as session:
        for budget in points:
            for outputs in session.several(list(feeds(graph, budget))):
                ranges = {name: float(np.maximum(most, outputs[outputs_of[name]])) for name, most in ranges.items()}
                done += 1
                if on_progress:
                    on_progress("calibrating", done, total)
    if odd := [name for name, most in ranges.items() if not np.isfinite(most)]:
        raise ModelError(
            f"{odd[0]} of the {graph.name} is not finite in the floats that it is held in, so that no scale fits it: export it in fp32 or "
            "int8w, and see what the model gives in float16"
        )
    return ranges


def _observed(model: ir.Model, names: Sequence[str]) -> tuple[ir.Model, dict[str, str]]:
    """A copy of `model` that also gives the largest magnitude of these values, and the names of the outputs that do."""
    made, wanted = model.clone(), set(names)
    loops = {id(body): node for node in made.graph.all_nodes() for body in bodies(node)}
    values = [value for value in made.graph.inputs if value.name in wanted]
    values += [value for node in made.graph.all_nodes() for value in node.outputs if value.name in wanted]
    names_of = {}
    for value in values:
        producer = value.producer()
        graph = producer.graph if producer else made.graph
        assert isinstance(graph, ir.Graph)
        most = _most(graph, value)
        while id(graph) in loops:
            graph, most = _out(loops[id(graph)], graph, most)
        made.graph.outputs.append(most)
        names_of[str(value.name)] = str(most.name)
    return made, names_of


def _most(graph: ir.Graph, value: ir.Value) -> ir.Value:
    """The largest magnitude of `value`, a float32."""
    taken, made = value, []
    for kind, words in (("Abs", {}), ("ReduceMax", {"keepdims": 0}), ("Cast", {"to": ir.DataType.FLOAT})):
        node = ir.node(kind, [taken], words, name=f"{value.name}.{kind}")
        (taken,) = node.outputs
        taken.name = node.name  # a loop's body shares its names with the graph
        made.append(node)
    graph.extend(made)
    taken.type, taken.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(())
    return taken


def _out(loop: ir.Node, body: ir.Graph, value: ir.Value) -> tuple[ir.Graph, ir.Value]:
    """The largest that `value` is in any pass of a loop's body, in the graph around the loop."""
    assert isinstance(loop.graph, ir.Graph)
    body.outputs.append(value)  # one more that is gathered over the passes
    loop.resize_outputs(len(loop.outputs) + 1)
    gathered = loop.outputs[-1]
    gathered.name, gathered.type = f"{value.name}.passes", ir.TensorType(ir.DataType.FLOAT)
    return loop.graph, _most(loop.graph, gathered)
