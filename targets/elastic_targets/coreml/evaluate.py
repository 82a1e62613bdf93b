"""Run a saved Core ML package without a Mac: read its MIL programs back and compute them in torch.

What it proves is the program that was written: names, shapes, weights, compression, and rounding to the dtype that each operation
declares (each result is computed in float32 and rounded once). What it cannot prove is how a Mac computes: the Neural Engine may
accumulate in float16 where this accumulates in float32. It refuses what Core ML refuses: empty tensors, and indices outside.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import coremltools
import numpy as np
import torch
from coremltools.converters.mil.frontend.milproto.load import load as load_program
from coremltools.converters.mil.mil import types

from elastic_runtime.errors import BundleError, InferenceError
from elastic_targets.coreml.mil import OPERATIONS

_DTYPES = {
    types.fp32: torch.float32,
    types.fp16: torch.float16,
    types.int32: torch.int32,
    types.int16: torch.int16,
    types.uint16: torch.int32,
    types.int8: torch.int8,
    types.uint8: torch.uint8,
    types.bool: torch.bool,
}
_BLOCKS = ("while_loop", "cond")
# watch(operation, inputs): told of what each operation is about to compute, its inputs by name in the dtype that it computes in
Watch = Callable[[Any, Mapping[str, Any]], None]
# A loop that counts to its end has at most this many rounds; more means that its condition never turns false.
_ROUNDS = 100_000


class Evaluator:
    """The functions of a package, read one at a time, since each holds its own copy of the weights."""

    def __init__(self, package: Path, watch: Watch | None = None):
        self._watch = watch
        try:
            self._spec = coremltools.utils.load_spec(str(package))
        except Exception as error:  # protobuf's and coremltools' own types
            raise BundleError(f"{package} is not a Core ML package: {error}. Export it again.") from error
        if self._spec.WhichOneof("Type") != "mlProgram":
            raise BundleError(f"{package} holds a {self._spec.WhichOneof('Type')}, not an ML program; only programs can be evaluated")
        self._weights = str(package / "Data" / "com.apple.CoreML" / "weights")
        self._open: tuple[str, Any] | None = None
        self._constants: dict[Any, Any] = {}

    @property
    def functions(self) -> tuple[str, ...]:
        """Names of the functions, sorted."""
        return tuple(sorted(self._spec.mlProgram.functions))

    def operations(self, function: str) -> Counter[str]:
        """How often each operation stands in a function; constants are not counted."""
        counts: Counter[str] = Counter()
        todo = [self.program(function)]
        while todo:
            for operation in todo.pop().operations:
                counts[operation.op_type] += operation.op_type != "const"
                todo += operation.blocks
        return +counts

    def run(self, function: str, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs of a function by name; feeds are cast to the dtypes that it declares.

        Raises: InferenceError naming the function and the operation that is unknown, that Core ML would refuse, or that failed.
        """
        program = self.program(function)
        if set(feeds) != set(program.inputs):
            raise InferenceError(f"function {function!r} takes {sorted(program.inputs)}, got {sorted(feeds)}")
        values = {}
        for name, variable in program.inputs.items():
            fed = torch.from_numpy(np.asarray(feeds[name]))
            values[variable] = _declared(fed, variable, f"function {function!r}, input {name!r}")
        with torch.inference_mode():
            outputs = self._block(program, values, function)
        return {variable.name: value.numpy() for variable, value in zip(program.outputs, outputs, strict=True)}

    def program(self, name: str) -> Any:
        """A function as coremltools reads it: a block of MIL operations, the same until another function is asked for."""
        if name not in self.functions:
            raise InferenceError(f"the package has no function {name!r}; it has {', '.join(self.functions)}")
        if self._open is None or self._open[0] != name:
            self.close()
            alone = type(self._spec)()
            alone.specificationVersion = self._spec.specificationVersion
            alone.mlProgram.version = self._spec.mlProgram.version
            alone.mlProgram.functions[name].CopyFrom(self._spec.mlProgram.functions[name])
            program = load_program(alone, self._spec.specificationVersion, self._weights)
            self._open = (name, program.functions[name])
        return self._open[1]

    def close(self) -> None:
        """Let the weights go."""
        self._open, self._constants = None, {}

    def _block(self, block: Any, values: dict[Any, Any], function: str) -> list[Any]:
        """Values of a block's outputs; `values` holds what it sees and takes what it computes."""
        for operation in block.operations:
            where = f"function {function!r}, operation {operation.op_type} {operation.name!r}"
            if operation.op_type == "const":
                values[operation.outputs[0]] = self._constant(operation.outputs[0])
                continue
            try:
                results = self._compute(operation, values, function)
            except InferenceError:
                raise
            except Exception as error:  # a wrong shape, an index outside, a variant that a function declines
                raise InferenceError(f"the evaluator failed at {where}: {error}") from error
            for variable, result in zip(operation.outputs, results, strict=True):
                values[variable] = _declared(result, variable, where)
        return [values[variable] for variable in block.outputs]

    def _compute(self, operation: Any, values: dict[Any, Any], function: str) -> tuple[Any, ...]:
        kind = operation.op_type
        if kind in _BLOCKS:
            return self._branch(operation, values, function)
        if kind not in OPERATIONS:
            raise InferenceError(
                f"the evaluator has no operation {kind!r}, which function {function!r} uses; "
                f"add it to elastic_targets/coreml/mil. Nothing was verified."
            )
        if kind.startswith("constexpr_"):
            output = operation.outputs[0]
            if output not in self._constants:
                held = {name: _array(variable) for name, variable in operation.inputs.items() if variable is not None}
                self._constants[output] = torch.from_numpy(np.ascontiguousarray(OPERATIONS[kind](**held)))
            return (self._constants[output],)
        inputs = {name: _wide(_valued(given, values)) for name, given in operation.inputs.items() if given is not None}
        if self._watch:
            self._watch(operation, inputs)
        result = OPERATIONS[kind](**inputs)
        return result if isinstance(result, tuple) else (result,)

    def _branch(self, operation: Any, values: dict[Any, Any], function: str) -> tuple[Any, ...]:
        """`while_loop` and `cond`: their blocks see all that is outside."""
        if operation.op_type == "cond":
            chosen = operation.blocks[0 if bool(values[operation.inputs["pred"]]) else 1]
            return tuple(self._block(chosen, values, function))
        condition, body = operation.blocks
        carried = [values[variable] for variable in operation.inputs["loop_vars"]]
        for _ in range(_ROUNDS):
            if not bool(self._block(condition, values | dict(zip(condition.inputs, carried, strict=True)), function)[0]):
                return tuple(carried)
            carried = self._block(body, values | dict(zip(body.inputs, carried, strict=True)), function)
        raise InferenceError(f"the loop {operation.name!r} of function {function!r} did not end in {_ROUNDS} rounds")

    def _constant(self, variable: Any) -> Any:
        if variable not in self._constants:
            value = variable.val
            self._constants[variable] = value if isinstance(value, str) else torch.from_numpy(np.array(value))
        return self._constants[variable]


def _valued(given: Any, values: dict[Any, Any]) -> Any:
    return tuple(values[each] for each in given) if isinstance(given, list | tuple) else values[given]


def _wide(value: Any) -> Any:
    """The same numbers in the dtype that operations compute in."""
    if isinstance(value, tuple):
        return tuple(_wide(each) for each in value)
    if not isinstance(value, torch.Tensor) or value.dtype == torch.bool:
        return value
    return value.float() if value.is_floating_point() else value.long()


def _declared(value: Any, variable: Any, where: str) -> Any:
    """`value` rounded to the dtype that the program declares, after checking its shape."""
    if not isinstance(value, torch.Tensor):
        return value
    shape = variable.shape
    fits = len(shape) == value.dim() and all(
        not isinstance(want, int | np.integer) or want == got for want, got in zip(shape, value.shape, strict=True)
    )
    # A shape vector's element may be declared as a scalar where the operation gives one element.
    if not fits and not (value.numel() == 1 and len(shape) == 0):
        raise InferenceError(f"{where}: the program declares shape {tuple(shape)}, the value has {tuple(value.shape)}")
    if value.numel() == 0:
        raise InferenceError(f"{where} gives an empty tensor {tuple(value.shape)}, which Core ML refuses")
    return value.reshape(()).to(_DTYPES[variable.dtype]) if not fits else value.to(_DTYPES[variable.dtype])


def _array(variable: Any) -> Any:
    return variable.val if isinstance(variable.val, str) else np.asarray(variable.val)
