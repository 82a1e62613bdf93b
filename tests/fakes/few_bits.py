"""What packed weights stand for."""

import numpy as np


def unpacked(codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray, bits: int, columns: int) -> np.ndarray:
    """The matrix (N, K) that blocks stand for, read as ONNX Runtime documents them."""
    count, low = codes.shape[1], 2**bits - 1
    values = np.stack([(codes >> shift) & low for shift in range(0, 8, bits)], axis=-1).reshape(codes.shape[0], count, -1)
    points = np.stack([(zeros.reshape(len(codes), -1) >> shift) & low for shift in range(0, 8, bits)], axis=-1)
    points = points.reshape(len(codes), -1)[:, :count, None]
    wide = (values.astype(np.float32) - points) * scales.reshape(len(codes), count, 1)
    return wide.reshape(len(codes), -1)[:, :columns].astype(np.float32)
