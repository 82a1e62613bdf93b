"""What an fp16 program keeps in fp32.

Sines and cosines with all that leads to them: a timestep times a frequency in fp16 is wrong by up to 0.46. Choices (which tokens are kept,
which is the nearest) with all that leads to them, for a rounding error there takes another token. And, unless told otherwise, the
reductions: a sum of squares overflows past 65504. The Neural Engine computes in fp16 only, so each island in fp32 leaves it.
"""

from collections.abc import Callable
from typing import Any

import coremltools as ct

SINUSOIDS = {"sin", "cos"}
CHOICES = {"topk", "reduce_argmin"}
REDUCTIONS = {
    "layer_norm", "batch_norm", "instance_norm", "l2_norm", "reduce_l1_norm", "reduce_l2_norm", "reduce_log_sum_exp", "reduce_mean",
    "reduce_sum", "reduce_sum_square", "square", "rsqrt",
}  # fmt: skip


def precision(name: str, reductions: str) -> Any:
    """coremltools' compute precision for `fp32` or `fp16`, the latter with its islands."""
    if name == "fp32":
        return ct.precision.FLOAT32
    return ct.transform.FP16ComputePrecision(op_selector=_selector(SINUSOIDS | CHOICES | (REDUCTIONS if reductions == "fp32" else set())))


def _selector(islands: set[str]) -> Callable[[Any], bool]:
    """Tells of an operation whether it becomes fp16. The pass asks in program order and replaces what it accepts as it goes."""
    exact: dict[int, set[str]] = {}

    def accept(operation: Any) -> bool:
        block = operation.enclosing_block
        if id(block) not in exact:
            exact[id(block)] = _leading_to(block, SINUSOIDS | CHOICES)
        return operation.op_type not in islands and operation.name not in exact[id(block)]

    return accept


def _leading_to(block: Any, kinds: set[str]) -> set[str]:
    """Names of the operations of a block that an operation of these kinds is computed from."""
    names: set[str] = set()
    todo = [operation for operation in block.operations if operation.op_type in kinds]
    while todo:
        for given in todo.pop().inputs.values():
            for variable in given if isinstance(given, list | tuple) else [given]:
                source = variable.op if variable is not None else None
                if source is not None and source.name not in names:
                    names.add(source.name)
                    todo.append(source)
    return names
