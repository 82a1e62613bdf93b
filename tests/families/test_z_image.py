"""Z-Image as a graph over tokens with places and pad tokens: diffusers' own class and pipeline, FLOPs, and what is refused."""

import pytest

pytest.importorskip("torch", reason="the models need torch")
pytest.importorskip("diffusers", reason="the models are diffusers'")
pytest.importorskip("transformers", reason="the folders' encoders are transformers'")
pytest.importorskip("onnxruntime", reason="running ONNX needs ONNX Runtime")

import folders

from elastic_runtime import Span
from elastic_runtime.contract.manifest import Patches

ONE = Span(1, 1)
PATCHES = Patches(size=2, positions="img_ids", layout="after_text", multiple=32)
WIDTH = folders.WIDTH
