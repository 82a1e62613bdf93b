"""Conversion faults of coremltools 9.0, each mended in one place, with its reason.

`mended()` lends coremltools the translations below while a graph is converted; `rewrite` changes the exported graph before that.
A test in `tests/targets/coreml/test_mends.py` fails without each of them; when one passes without its mend, the mend can go.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from coremltools.converters.mil import Builder as mb  # noqa: N813  its name everywhere
from coremltools.converters.mil.frontend.torch import ops
from coremltools.converters.mil.frontend.torch.internal_graph import InternalTorchIRNode
from coremltools.converters.mil.frontend.torch.torch_op_registry import _TORCH_OPS_REGISTRY
from coremltools.converters.mil.mil import Var
from torch.export import ExportedProgram


def gelu(context: Any, node: Any) -> None:
    """Fault: `approximate` is a keyword argument in an exported graph; the stock translation reads positional ones only.

    So a tanh GELU becomes the exact one, silently: 2e-4 in the output of a small transformer.
    """
    x = ops._get_inputs(context, node)[0]
    approximate = (node.kwinputs or {}).get("approximate", ["none"])[0]
    context.add(mb.gelu(x=x, mode="TANH_APPROXIMATION" if approximate == "tanh" else "EXACT", name=node.name))


def split_with_sizes(context: Any, node: Any) -> None:
    """Fault: MIL's `split` takes constant sizes only, and a sequence that is split at an open length has others (FLUX).

    A slice takes any.
    """
    x, sizes, dim = (*ops._get_inputs(context, node), 0)[:3]
    axis = int(dim.val if isinstance(dim, Var) else dim) % x.rank
    if isinstance(sizes, Var) and sizes.val is not None:
        context.add(mb.split(x=x, split_sizes=sizes.val, axis=axis), torch_name=node.name)
        return
    lengths = sizes if isinstance(sizes, list | tuple) else [ops._list_select(sizes, i) for i in range(sizes.shape[0])]
    parts, begin = [], 0
    for length in lengths:
        end = mb.add(x=begin, y=length)
        bounds = {
            edge: mb.concat(values=[at if i == axis else 0 for i in range(x.rank)], axis=0) for edge, at in (("begin", begin), ("end", end))
        }
        others = [i != axis for i in range(x.rank)]
        parts.append(mb.slice_by_index(x=x, **bounds, begin_mask=others, end_mask=others))
        begin = end
    context.add(tuple(parts), torch_name=node.name)


def alias(context: Any, node: Any) -> None:
    """Fault: there is no translation of `alias`, which a slice over the full range becomes (all latents kept)."""
    context.add(mb.identity(x=ops._get_inputs(context, node, expected=1)[0], name=node.name))


def rms_norm(context: Any, node: Any) -> None:
    """Fault: epsilon is added to the squares of values that were divided by the largest of them, so it counts as many times as that one's
    square: small values become large ones, and rows of zeros NaN. 3e-5 in what makes one text of Krea 2's layers.

    Values are still divided, since squares are beyond fp16 or lost in it; epsilon's root is divided with them, and is the least divisor.
    """
    x, shape, weight, eps = ops._get_inputs(context, node, expected=4)
    axes = list(range(-len(shape.val), 0))
    root = np.sqrt(np.finfo(np.float32).eps if eps is None else eps.val).astype(np.float32)  # torch's own, of a float32
    largest = mb.maximum(x=mb.reduce_max(x=mb.abs(x=x), axes=axes, keep_dims=True), y=root)
    small = mb.real_div(x=x, y=largest)
    mean = mb.reduce_mean(x=mb.square(x=small), axes=axes, keep_dims=True)
    normal = mb.real_div(x=small, y=mb.sqrt(x=mb.add(x=mean, y=mb.square(x=mb.real_div(x=root, y=largest)))))
    context.add(normal if weight is None else mb.mul(x=normal, y=weight), torch_name=node.name)


def floordiv(context: Any, node: Any) -> None:
    """Fault: half of an open length becomes a float, and no shape takes it beside whole numbers (the VAE encoder of one frame)."""
    x, y = ops._get_inputs(context, node, expected=2)
    context.add(mb.floor_div(x=x, y=y, name=node.name))  # Python's, which is of sizes alone: tensors are divided by floor_divide


def while_loop(context: Any, node: Any) -> None:
    """Fault: an exported loop is refused, although MIL has one: its graphs are no tensors. `rewrite` puts them into the node's `meta`.

    Weights stand outside the loop and are seen from inside, so that they are constants there too.
    """
    carried, seen = ops._get_inputs(context, node, expected=2)
    condition, body = node.meta[_LOOP_GRAPHS]
    results = mb.while_loop(
        _cond=lambda *values: _inlined(context, condition, [*values, *seen])[0],
        _body=lambda *values: tuple(_inlined(context, body, [*values, *seen])),
        loop_vars=tuple(carried),
    )
    context.add(results, torch_name=node.name)


def _inlined(context: Any, graph: torch.fx.Graph, values: Sequence[Var]) -> list[Var]:
    """Translate the graph of a loop where it is called, in a frame of names of its own; values of its outputs."""
    context.push(([node.name for node in graph.nodes if node.op == "placeholder"], values))
    for node in graph.nodes:
        if node.op not in ("placeholder", "output"):
            ops.convert_single_node(context, InternalTorchIRNode.from_exir_node(node))
    results: Any = graph.output_node().args[0]
    results = results if isinstance(results, list | tuple) else [results]  # a condition returns its one value as it is
    translated = [context[result.name] for result in results]
    context.pop()
    return translated


_LOOP_GRAPHS = "graphs of the loop"
TRANSLATIONS: dict[str, Callable[[Any, Any], None]] = {
    "gelu": gelu, "split_with_sizes": split_with_sizes, "alias": alias, "rms_norm": rms_norm, "floordiv": floordiv,
    "while_loop": while_loop,
}  # fmt: skip


@contextlib.contextmanager
def mended(without: str | None = None) -> Iterator[None]:
    """Lend coremltools our translations; `without` leaves one out, to show what it is for."""
    registry = _TORCH_OPS_REGISTRY.name_to_func_mapping
    before = dict(registry)
    registry.update({name: translation for name, translation in TRANSLATIONS.items() if name != without})
    try:
        yield
    finally:
        registry.clear()
        registry.update(before)


def rewrite(program: ExportedProgram) -> ExportedProgram:
    """Change what no translation can reach: empty tails, and the graphs of loops. In place, since a program's signature names its nodes."""
    for node in list(program.graph.nodes):
        if node.target is torch.ops.aten.cat.default and len(node.args[0]) == 2:
            _keep_tail(node)
        elif node.target is torch.ops.higher_order.while_loop:
            _hand_over_graphs(node)
    program.graph.lint()
    program.graph_module.recompile()
    return program


def _keep_tail(node: torch.fx.Node) -> None:
    """Fault: Core ML has no empty tensors, and `cat([head, x[n:]])` has an empty tail when n reaches the length of x.

    With an open n the same is `x` with its first n rows overwritten by `head`, which is never empty.
    """
    inputs: Any = node.args[0]
    head, tail = inputs
    axis: Any = node.args[1] if len(node.args) > 1 else 0
    if _is_open_tail(tail, axis, node):
        node.target = torch.ops.aten.slice_scatter.default
        node.args = (tail.args[0], head, axis, 0, tail.args[2])
        if not tail.users:
            node.graph.erase_node(tail)


def _hand_over_graphs(loop: torch.fx.Node) -> None:
    """For the translation `while_loop`: the graphs of condition and body move from the arguments into the node's `meta`."""
    *named, carried, seen = loop.args
    module: Any = loop.graph.owning_module
    sources: Any = named
    loop.args = (list(carried), list(seen))  # type: ignore[arg-type]
    loop.meta[_LOOP_GRAPHS] = [getattr(module, source.target).graph for source in sources]
    for source in sources:
        loop.graph.erase_node(source)


def save(model: Any, package: Path) -> None:
    """Fault: saving lists the operations of each ExecuTorch debug handle, which fails on a loop; our graphs have no handles to list."""
    model._mil_program = None
    model.save(str(package))


def _is_open_tail(tail: Any, axis: int, joined: Any) -> bool:
    """Whether `tail` is `x[n:]` along `axis` with an open n, and `joined` puts n other rows before it."""
    if tail.target is not torch.ops.aten.slice.Tensor or len(tail.args) != 3 or not isinstance(tail.args[2], torch.fx.Node):
        return False
    source, dim, begin = tail.args
    rank = source.meta["val"].dim()
    rows = joined.args[0][0].meta["val"].shape[axis]
    return dim % rank == axis % rank and str(rows) == str(begin.meta["val"])
