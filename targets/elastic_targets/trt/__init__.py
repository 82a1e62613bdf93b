"""TensorRT: engines with one profile a bucket, from a bundle's ONNX artifact, without torch.

Two builders share one path, since precision lies in the graph: `tensorrt-rtx` builds for desktop GPUs ahead of time on any
machine; `tensorrt` (Jetson, data centre) builds on the GPU that will run the engine.
"""

from elastic_targets.trt.lower import TrtOptions, ensures, estimate, lower, plan, requires

__all__ = ["TrtOptions", "ensures", "estimate", "lower", "plan", "requires"]
