"""Elastic diffusion transformers, compiled once with their compute axis open.

The command line is `elastic-export`; the torch-free half that leaves for the device is `elastic_runtime`.
"""

__version__ = "0.1.0"
