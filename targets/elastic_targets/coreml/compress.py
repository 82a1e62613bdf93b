"""Smaller weights, through coremltools' own optimisers: a table of 256, 64 or 16 values a tensor, int8 with a scale a channel,
or int4 with a scale a block."""

import hashlib
from typing import Any

import numpy as np
from coremltools.models.neural_network.quantization_utils import _get_kmeans_lookup_table_and_weight
from coremltools.optimize import coreml as optimize

W8A8 = "w8a8"  # int8 as far as weights go: `activations` says the rest
METHODS = ("palette8", "palette6", "palette4", "int8", "int4", W8A8)
BLOCK = 32  # weights that share a scale in int4
# Smaller tensors are a few percent of a model; and from here on coremltools' k-means needs no scikit-learn.
LEAST_WEIGHTS = 10_000


class Compressor:
    """Compresses converted models one after the other; `method` None leaves them as they are.

    The functions of a package hold the same weights: each weight's table is made once, so that it is also stored once.
    """

    def __init__(self, method: str | None):
        self._method = method
        self._tables: dict[bytes, tuple[np.ndarray, np.ndarray]] = {}

    def __call__(self, model: Any) -> Any:
        """The model with its weights of at least LEAST_WEIGHTS values compressed."""
        if self._method is None:
            return model
        if self._method in ("int8", W8A8):
            quantizer = optimize.OpLinearQuantizerConfig(mode="linear_symmetric", dtype="int8", weight_threshold=LEAST_WEIGHTS)
            return optimize.linear_quantize_weights(model, optimize.OptimizationConfig(global_config=quantizer))
        if self._method == "int4":
            quantizer = optimize.OpLinearQuantizerConfig(
                mode="linear_symmetric", dtype="int4", granularity="per_block", block_size=BLOCK, weight_threshold=LEAST_WEIGHTS
            )
            return optimize.linear_quantize_weights(model, optimize.OptimizationConfig(global_config=quantizer))
        palettizer = optimize.OpPalettizerConfig(mode="custom", lut_function=self._table, weight_threshold=LEAST_WEIGHTS)
        return optimize.palettize_weights(model, optimize.OptimizationConfig(global_config=palettizer))

    def _table(self, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A weight's table (2^bits,) and the index of each value (size,)."""
        assert self._method is not None
        key = digest(weight)
        if key not in self._tables:
            bits = int(self._method.removeprefix("palette"))
            table, indices = _get_kmeans_lookup_table_and_weight(bits, weight)  # what the optimiser's own kmeans mode calls
            self._tables[key] = table.astype(weight.dtype), indices.astype(np.uint8)
        return self._tables[key]


def digest(weight: np.ndarray) -> bytes:
    """What tells a weight from others, in whichever function it stands."""
    return hashlib.sha256(weight.tobytes()).digest()
