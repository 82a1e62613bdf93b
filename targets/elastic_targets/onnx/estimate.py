"""What an export to ONNX will take, before any weight is read: bytes on disk, and of memory while it is made."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from elastic_runtime.contract.precision import PRECISIONS
from elastic_targets.capture import GraphCapture
from elastic_targets.onnx import qdq
from elastic_targets.onnx.fitting import PART
from elastic_targets.onnx.matrices import LEAST
from elastic_targets.onnx.quantize import SCHEMES
from elastic_targets.onnx.stream import EXTERNAL_FROM
from elastic_targets.target import Estimate
from elastic_targets.weights import mapped, weights

FLOAT32 = 4
# Measured: the interpreter with torch and what reads the model, the graph of a thousand nodes, and the weight at hand as it is read, in
# float32, turned, and rounded. A small model is one protobuf message, made in memory.
BASE = 650e6
COPIES = 3
MESSAGE = 3
# Rounding by what matrices multiply: so many times the weights of a part (or of a smaller model) stand there as a session of it opens, with
# squares, their inverses and what the C library keeps of all that. Fitted to two measurements, 2.3 and 2.4 GB (docs/real-size.md).
FITTED = 23


def estimate(graph: GraphCapture, precision: str, apart: bool = False, fitted: bool = False, kept: int = 0) -> Estimate:
    """What exporting a graph takes, without its proof, which holds the activations of the largest budget and some 700 MB of weights.

    `apart`: its conditions in a file of their own. `fitted`: its matrices rounded by what they multiply, which wait on disk meanwhile.
    `kept`: so many matrices keep their floats; which is not known yet, and each is taken for one of middling size.
    """
    kinds = _kinds(graph)
    seen = {id(weight): (name, weight) for name, weight in weights(graph.module)}.values()
    held, count = Counter[str](), Counter[str]()
    for name, weight in seen:
        kind = kinds.get(name, "floats") if weight.dim() == 2 and min(weight.shape) >= LEAST else "floats"
        held[kind] += weight.numel()
        count[kind] += 1
    if kept and count["tokens"]:
        floats = held["tokens"] * min(1.0, kept / count["tokens"])
        held["tokens"], held["floats"] = round(held["tokens"] - floats), round(held["floats"] + floats)
    conditions = PRECISIONS[precision].weight_bytes
    if precision in SCHEMES:
        scheme = SCHEMES[precision]
        eight, own = PRECISIONS["int8w"].weight_bytes, PRECISIONS[precision].weight_bytes
        conditions = eight if scheme.conditions == 8 else own
        size = held["tokens"] * own + held["conditions"] * conditions + held["tables"] + held["floats"] * FLOAT32
    elif precision in qdq.FORMS:
        row = PRECISIONS[precision]
        floats = (held["tables"] + held["floats"]) * PRECISIONS[row.base].weight_bytes
        size = held["tokens"] * row.weight_bytes + held["conditions"] + floats
    else:
        size = sum(held.values()) * PRECISIONS[precision].weight_bytes
    waiting = held["tokens"] * PRECISIONS[precision].weight_bytes if fitted else 0.0
    largest = max((weight.numel() for _, weight in seen), default=0) * FLOAT32
    conditions_size = held["conditions"] * conditions if apart else 0.0
    within = MESSAGE * max((each for each in (size - conditions_size, conditions_size) if each < EXTERNAL_FROM), default=0.0)
    rounding = FITTED * min(max(PART, largest), held["tokens"] * FLOAT32) if fitted else 0.0
    return Estimate(round(size), round(BASE + max(COPIES * largest + within, rounding)), round(waiting))


def _kinds(graph: GraphCapture) -> Mapping[str, str]:
    """What each matrix multiplies: tokens, or conditions (one row a sample); or that it is a table. Found by a run of nothing."""
    fakes, kinds = FakeTensorMode(allow_non_fake_inputs=True), dict[str, str]()

    def hollow(weight: Tensor) -> Tensor:
        with fakes:
            return torch.empty(weight.shape, dtype=weight.dtype)

    module = mapped(graph.module, hollow)
    for name, part in module.named_modules():
        if isinstance(part, nn.Embedding):
            kinds[f"{name}.weight"] = "tables"
        elif isinstance(part, nn.Linear):

            def see(_: nn.Module, inputs: Any, name: str = name) -> None:
                kinds[f"{name}.weight"] = "conditions" if inputs[0].dim() == 2 else "tokens"

            part.register_forward_pre_hook(see)
    with fakes, torch.no_grad():  # a count of loops is a number, which nothing of a fake tensor tells
        module(**{name: torch.from_numpy(array) if array.ndim else array.item() for name, array in graph.example().items()})
    return kinds
