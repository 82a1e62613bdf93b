"""From an ONNX file to a TensorRT network: parse it, let attention decompose, and refuse what would not build."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elastic_runtime.contract.artifacts import Network
from elastic_runtime.errors import UsageError
from elastic_runtime.sessions.trt import make_logger
from elastic_targets.trt.builder import Builder


@dataclass
class Parsed:
    """A parsed network with everything that must live as long as it does."""

    network: Any
    facts: Network
    builder: Any
    logger: Any
    parser: Any


def parse(builder: Builder, path: Path, opset: int) -> Parsed:
    """Parse an ONNX file (its external data lies beside it).

    Raises: UsageError naming the node that the builder does not take, with what to do about it.
    """
    library = builder.library
    logger = make_logger(library)
    native = library.Builder(logger)
    network = native.create_network(1 << int(library.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = library.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):
        problems = [parser.get_error(i) for i in range(parser.num_errors)]
        reason = "; ".join(_sentence(problem) for problem in problems[:3]) or "; ".join(logger.errors[:1])
        raise UsageError(f"{builder} cannot read {path.name} (opset {opset}): {reason}.{_advice(opset)}")
    kinds: dict[str, list[Any]] = {}
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        kinds.setdefault(str(layer.type).rsplit(".", 1)[-1], []).append(layer)
    if kinds.get("LOOP_OUTPUT") and not kinds.get("TRIP_LIMIT"):
        raise UsageError(
            f"{path.name} has a Loop with neither a trip count nor a condition going in, which {builder} does not build. "
            "Wire the condition: compute it once before the loop and give it as the Loop's second input."
        )
    shaped = [network.get_input(i).name for i in range(network.num_inputs) if network.get_input(i).is_shape_tensor]
    if shaped:
        raise UsageError(f"in {path.name} the value of {', '.join(shaped)} decides a shape; let the length of an input carry it instead")
    attentions = kinds.get("ATTENTION_INPUT", [])
    for layer in attentions:
        # Without a fused kernel (float32, odd head sizes) the builder gives up unless it may take attention apart.
        layer.__class__ = library.IAttentionInputLayer
        layer.attention.decomposable = True
    loops = len(kinds.get("TRIP_LIMIT", []))
    if loops and attentions:  # seen with tensorrt_rtx 1.7.1: its code generator loses the inputs of an attention inside a loop
        raise UsageError(
            f"{path.name} has Attention operators and a Loop, which {builder} fails to build together. "
            "Export again with --opset 20, which spells attention out."
        )
    return Parsed(network, Network(layers=network.num_layers, attentions=len(attentions), loops=loops), native, logger, parser)


def _sentence(problem: Any) -> str:
    name = f" {problem.node_name()!r}" if problem.node_name() else ""
    reason = re.sub(r"\s+", " ", problem.desc()).strip().rstrip(".")
    return f"node {problem.node()}{name} is a {problem.node_operator() or 'node'}: {reason}"


def _advice(opset: int) -> str:
    if opset <= 20:
        return " Change the model so that it does without, or use the onnx target."
    # The ONNX Attention operator came to TensorRT's parser with 10.14.
    return " If that is Attention or a newer operator, export again with: elastic-export onnx --opset 20"
