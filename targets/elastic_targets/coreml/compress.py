"""Smaller weights, through coremltools' own optimisers: tables of 256, 64 or 16 values a tensor (k-means), or int8 with a scale a channel."""

from typing import Any

from coremltools.optimize import coreml as optimize

METHODS = ("palette8", "palette6", "palette4", "int8")
# Smaller tensors are a few percent of a model; and from here on k-means needs no scikit-learn.
LEAST_WEIGHTS = 10_000


def compress(model: Any, method: str | None) -> Any:
    """Return the converted model with its weights of at least LEAST_WEIGHTS values compressed (None: as it is)."""
    if method is None:
        return model
    if method == "int8":
        quantizer = optimize.OpLinearQuantizerConfig(mode="linear_symmetric", dtype="int8", weight_threshold=LEAST_WEIGHTS)
        return optimize.linear_quantize_weights(model, optimize.OptimizationConfig(global_config=quantizer))
    bits = int(method.removeprefix("palette"))
    palettizer = optimize.OpPalettizerConfig(mode="kmeans", nbits=bits, weight_threshold=LEAST_WEIGHTS)
    return optimize.palettize_weights(model, optimize.OptimizationConfig(global_config=palettizer))
