"""Z-Image as a graph over tokens with places and pad tokens: diffusers' own class and pipeline, FLOPs, and what is refused."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="the models need torch")
pytest.importorskip("diffusers", reason="the models are diffusers'")
pytest.importorskip("transformers", reason="the folders' encoders are transformers'")
pytest.importorskip("onnxruntime", reason="running ONNX needs ONNX Runtime")

import folders
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import elastic_export
from elastic_export.capture.folders import capture_folder
from elastic_export.families import z_image
from elastic_export.families.z_image import ZImage
from elastic_runtime import Bundle, ElasticPipeline, ModelError, Span, open_session
from elastic_runtime.contract.manifest import Patches
from elastic_runtime.denoising.tokens import Conditions, TokenDenoiser
from elastic_runtime.denoising.guidance import Guidance
from elastic_runtime.ralu.patches import pack, raster, unpack

ONE = Span(1, 1)
PATCHES = Patches(size=2, positions="img_ids", layout="after_text", multiple=32)
WIDTH = folders.WIDTH
