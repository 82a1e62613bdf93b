"""What packed weights stand for, and small denoisers whose matrices are packed."""

from typing import Any

import numpy as np


def unpacked(codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray, bits: int, columns: int) -> np.ndarray:
    """The matrix (N, K) that blocks stand for, read as ONNX Runtime documents them."""
    count, low = codes.shape[1], 2**bits - 1
    values = np.stack([(codes >> shift) & low for shift in range(0, 8, bits)], axis=-1).reshape(codes.shape[0], count, -1)
    points = np.stack([(zeros.reshape(len(codes), -1) >> shift) & low for shift in range(0, 8, bits)], axis=-1)
    points = points.reshape(len(codes), -1)[:, :count, None]
    wide = (values.astype(np.float32) - points) * scales.reshape(len(codes), count, 1)
    return wide.reshape(len(codes), -1)[:, :columns].astype(np.float32)


def over_tokens(module: Any) -> Any:
    """The capture of a denoiser `(sample (B, S, 64), timestep (B,)) -> prediction` of 4 to 32 tokens."""
    from elastic_runtime import Budget, Span
    from elastic_runtime.contract.artifacts import TensorSpec
    from elastic_targets.capture import GraphCapture  # which needs torch

    def feeds(budget: Budget, batch: int) -> dict[str, np.ndarray]:
        draw = np.random.default_rng(0)
        sample = draw.standard_normal((batch, 32, 64)).astype(np.float32)[:, : budget["S"]]
        return {"sample": np.ascontiguousarray(sample), "timestep": draw.uniform(0.5, 2, batch).astype(np.float32)}

    taken, given = (TensorSpec(name=name, dtype="float32", shape=("B", "S", 64)) for name in ("sample", "prediction"))
    times = TensorSpec(name="timestep", dtype="float32", shape=("B",))
    return GraphCapture("denoiser", module.eval(), (taken, times), (given,), (), Span(1, 2), feeds, {"S": Span(4, 32)})
