"""What each MIL operation computes, in torch: one small function an operation, its parameters named as in the MIL reference.

A function gets its inputs by name: floats in float32 (values that the program keeps in float16 are exact there), integers in
int64, booleans, strings, and tuples of these. What it returns is rounded to the dtype that the program declares by the caller.
"""

from elastic_targets.coreml.mil import elementwise, layers, shapes, weights

OPERATIONS = elementwise.OPERATIONS | shapes.OPERATIONS | layers.OPERATIONS | weights.OPERATIONS

__all__ = ["OPERATIONS"]
