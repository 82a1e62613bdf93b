"""How large values of a graph become: what a static scale is made of.

A graph is run in floats, with a reduction beside each value that is asked about; within a loop it is taken of every pass. Its feeds are
those of the capture, with times all along the schedule and samples from plain noise to plain levels, the same each time:
docs/tensorrt.md compares what they reach with what pictures do.
"""

from collections.abc import Iterator, Sequence

import msgspec
import numpy as np
import onnx_ir as ir

from elastic_runtime.contract.artifacts import Graph, TensorSpec
from elastic_runtime.contract.budget import Budget
from elastic_targets.capture import GraphCapture
from elastic_targets.onnx.evaluate import PartSession, bodies

FEEDS = 8  # samples at each budget
EDGE = 0.02  # how near the ends of the schedule the first and the last time are
NOISE = (1.0, 0.8, 0.4, 0.0)  # shares of noise, in turn
SAMPLES = ("sample", "hidden_states")
THOUSANDS = 1000.0  # where times are counted in those of training


def largest(graph: GraphCapture, model: ir.Model, names: Sequence[str]) -> dict[str, float]:
    """The largest magnitude of each of these values of `model`, at the ends and in the middle of the graph's budgets."""
    if not names:
        return {}
    observed, told = _observed(model, names)
    ports = tuple(TensorSpec(name=name, dtype="float32", shape=()) for name in told.values())
    described = Graph(inputs=graph.inputs, outputs=graph.outputs, dimensions=graph.dimensions, artifacts=())
    found = dict.fromkeys(names, 0.0)
    with PartSession(msgspec.structs.replace(described, outputs=(*described.outputs, *ports)), observed) as session:
        for budget in budgets(graph):
            for feeds in _feeds(graph, budget):
                outputs = session.run(feeds)
                found = {name: max(most, float(outputs[told[name]])) for name, most in found.items()}
    return found


def budgets(graph: GraphCapture) -> list[Budget]:
    """All axes and open dimensions at their least, near their middle, and at their most."""
    spans = {axis.name: axis.span for axis in graph.axes} | graph.open_dimensions
    least, most = (Budget(**{name: getattr(span, end) for name, span in spans.items()}) for end in ("min", "max"))
    return list(dict.fromkeys([least, graph.traced, most]))


def _feeds(graph: GraphCapture, budget: Budget) -> Iterator[dict[str, np.ndarray]]:
    generator = np.random.default_rng(0)
    size = max(graph.batch.min, min(FEEDS, graph.batch.max))
    times, shares = np.linspace(EDGE, 1 - EDGE, FEEDS), np.resize(NOISE, FEEDS)
    for first in range(0, FEEDS, size):
        feeds, rows = dict(graph.feeds(budget, size)), np.arange(first, first + size) % FEEDS
        if "timestep" in feeds:
            counted = THOUSANDS if feeds["timestep"].max() > 1 else 1.0
            feeds["timestep"] = (np.floor(times[rows] * counted) if counted > 1 else times[rows]).astype(np.float32)
        for name in SAMPLES:
            if name in feeds:
                feeds[name] = _noised(feeds[name].shape, shares[rows], generator)
        yield feeds
        if not {"timestep", *SAMPLES} & feeds.keys():
            return  # the others would be the same


def _noised(shape: tuple[int, ...], shares: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """So large a share of noise in each sample, the rest being -1 or 1 all over each row of it."""
    noise = generator.standard_normal(shape)
    levels = np.sign(generator.standard_normal((*shape[:2], *(1 for _ in shape[2:]))))
    share = shares.reshape(-1, *(1 for _ in shape[1:]))
    return (share * noise + np.sqrt(1 - share**2) * levels).astype(np.float32)


def _observed(model: ir.Model, names: Sequence[str]) -> tuple[ir.Model, dict[str, str]]:
    """A copy of `model` that also gives the largest magnitude of these values, and the names of the outputs that do."""
    made, wanted = model.clone(), set(names)
    loops = {id(body): node for node in made.graph.all_nodes() for body in bodies(node)}
    values = [value for value in made.graph.inputs if value.name in wanted]
    values += [value for node in made.graph.all_nodes() for value in node.outputs if value.name in wanted]
    told = {}
    for value in values:
        producer = value.producer()
        graph = producer.graph if producer else made.graph
        assert isinstance(graph, ir.Graph)
        most = _most(graph, value)
        while id(graph) in loops:
            graph, most = _out(loops[id(graph)], graph, most)
        made.graph.outputs.append(most)
        told[str(value.name)] = str(most.name)
    return made, told


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
