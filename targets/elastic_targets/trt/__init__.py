"""TensorRT: engines with one profile a bucket, from a bundle's ONNX artifact, without torch.

Two builders share one path, since precision lies in the graph: `tensorrt-rtx` builds for desktop GPUs ahead of time on any
machine; `tensorrt` (Jetson, data centre) builds on the GPU that will run the engine.
"""

from elastic_targets.trt.builder import choose
from elastic_targets.trt.lower import TARGET, TrtOptions, available, estimate, lower, plan, requires
from elastic_targets.trt.profiles import read_buckets

__all__ = ["TARGET", "TrtOptions", "available", "choose", "estimate", "lower", "plan", "read_buckets", "requires"]
