"""A denoiser's exported program in two, by the rule of `elastic_targets.apart`, before coremltools sees it."""

import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import fx
from torch.export import ExportedProgram
from torch.fx.passes.dialect.common.cse_pass import CSEPass

from elastic_runtime.contract.artifacts import Apart, CoremlCall, TensorSpec
from elastic_targets.apart import CONDITIONS, Step, described, own, require

FUNCTION = "conditions"  # the package's function of that name
_ATEN = torch.ops.aten
_MATRICES: dict[Any, int] = {
    _ATEN.linear.default: 1,
    _ATEN.matmul.default: 1,
    _ATEN.mm.default: 1,
    _ATEN.bmm.default: 1,
    _ATEN.addmm.default: 2,
}


class Halves(NamedTuple):
    """Modules to export again: the rest, and what it takes of a sample's conditions, each with its inputs by name."""

    rest: fx.GraphModule
    conditions: fx.GraphModule
    apart: Apart
    rows: int

    def left(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What the rest takes, of what the whole does, of as many samples as were exported."""
        (rows,) = self.conditions(**{name: torch.from_numpy(feeds[name]) for name in self.apart.inputs})
        others = {name: array for name, array in feeds.items() if name not in self.apart.gone}
        return others | {self.apart.outputs[0].name: rows.numpy()}


def split(program: ExportedProgram, inputs: Sequence[TensorSpec], package: str) -> Halves:
    """Both halves of a program of so many samples as it was exported with, for a `package` of the bundle; `inputs` are its own, in order.

    Raises: UsageError for a model that multiplies nothing by its conditions alone.
    """
    whole = _plain(program)
    graph = whole.graph
    given = {str(node.target): node for node in graph.nodes if node.op == "placeholder"}
    mine = _own(graph, [given[name] for name in CONDITIONS if name in given])
    cut = [node for node in mine if not _several(node) and any(user not in mine for user in node.users)]
    results = [node.name for node in mine if any(user.op == "output" for user in node.users)]
    require(cut, results)
    names = [spec.name for spec in inputs]
    taking = [name for name in names if any(user in mine for user in given[name].users)]
    gone = [name for name in taking if all(user in mine for user in given[name].users)]
    rows = int(given[taking[0]].meta["val"].shape[0])
    sizes = [_size(node, rows) for node in cut]
    call = CoremlCall(function=FUNCTION, budget={}, sizes={"B": rows})
    apart = described(package, taking, gone, sum(sizes), {*names, *(node.name for node in graph.nodes)}, call)
    conditions = fx.GraphModule(whole, _joined([given[name] for name in taking], mine, cut, sizes))
    left = [given[name] for name in names if name not in gone]
    rest = fx.GraphModule(whole, _parted(graph, left, mine, cut, sizes, apart.outputs[0].name))
    return Halves(rest, conditions, apart, rows)


def _plain(program: ExportedProgram) -> fx.GraphModule:
    """The program with its weights as attributes, without assertions, and each value computed once: a block that runs several times
    makes the same of its conditions each time."""
    module = program.run_decompositions({}).module(check_guards=False)
    module.graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
    once = CSEPass()(module)
    assert once
    return once.graph_module


def _own(graph: fx.Graph, conditions: Sequence[fx.Node]) -> dict[fx.Node, None]:
    """The nodes up to the last multiplications of what depends on `conditions` and weights alone, in the graph's order."""
    nodes = [node for node in graph.nodes if node.op not in ("placeholder", "get_attr", "output")]
    steps = [Step(tuple(node.all_input_nodes), (node,), _matrix(node)) for node in nodes]
    last = {nodes[place] for place in own(steps, conditions, (node for node in graph.nodes if node.op == "get_attr"))}
    # Of what gives several values each is one of them, needed or not.
    return {node: None for node in nodes if node in last or any(each in last and _several(each) for each in node.all_input_nodes)}


def _matrix(node: fx.Node) -> Any:
    place = _MATRICES.get(node.target)
    return None if place is None else node.args[place]


def _several(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), tuple | list)


def _size(node: fx.Node, rows: int) -> int:
    """How many values of what is cut a sample has: N of (B, N), 1 of (B,)."""
    shape = node.meta["val"].shape
    if not shape or shape[0] != rows or not all(isinstance(size, int) for size in shape):
        raise RuntimeError(f"{node.name} depends on conditions alone and has shape {tuple(shape)}, where {rows} rows belong")
    return math.prod(shape[1:])


def _joined(taking: Sequence[fx.Node], mine: dict[fx.Node, None], cut: Sequence[fx.Node], sizes: Sequence[int]) -> fx.Graph:
    """From conditions to all that is cut, as one value (B, M) in float32."""
    made = fx.Graph()
    copies = {node: made.placeholder(str(node.target)) for node in taking}

    def copied(node: fx.Node) -> fx.Node:
        if node not in copies:
            copies[node] = made.node_copy(node, copied)
        return copies[node]

    flat = []
    for node in mine:
        copied(node)
    for node, size in zip(cut, sizes, strict=True):
        value, held = copies[node], node.meta["val"]
        if held.dtype != torch.float32:
            value = made.call_function(_ATEN.to.dtype, (value, torch.float32))
        flat.append(value if held.dim() == 2 else made.call_function(_ATEN.reshape.default, (value, [held.shape[0], size])))
    made.output((made.call_function(_ATEN.cat.default, (flat, 1)),))
    return made


def _parted(
    graph: fx.Graph, left: Sequence[fx.Node], mine: dict[fx.Node, None], cut: Sequence[fx.Node], sizes: Sequence[int], name: str
) -> fx.Graph:
    """The graph from an input (B, M) whose parts take the places of what was cut."""
    made = fx.Graph()
    copies = {node: made.placeholder(str(node.target)) for node in left}
    parts = made.call_function(_ATEN.split_with_sizes.default, (made.placeholder(name), list(sizes), 1))
    for place, node in enumerate(cut):
        value, held = made.call_function(operator.getitem, (parts, place)), node.meta["val"]
        if held.dim() != 2:
            value = made.call_function(_ATEN.reshape.default, (value, list(held.shape)))
        copies[node] = made.call_function(_ATEN.to.dtype, (value, held.dtype)) if held.dtype != torch.float32 else value
    for node in graph.nodes:
        if node.op != "placeholder" and node not in mine:
            copies[node] = made.node_copy(node, copies.__getitem__)
    made.eliminate_dead_code()  # weights that only what is gone took
    return made
