"""The graph that makes a model's text tokens of tapped layers of a text encoder, once a picture."""

from typing import Any

import numpy as np

from elastic_export.capture.transformer import Transformer
from elastic_export.families.family import random_rows
from elastic_export.foreign.component import diffusers_class
from elastic_runtime.contract.artifacts import TensorSpec
from elastic_runtime.contract.axis import Span
from elastic_runtime.contract.budget import Budget
from elastic_targets.capture import GraphCapture

NAME = "text_fusion"


def text_fusion(transformer: Transformer, most: int) -> GraphCapture:
    """`tapped (B, T, L, D) -> fused (B, T, D)` of the transformer's own weights, for texts of up to `most` tokens."""
    family, config, component = transformer.family, transformer.config, transformer.folder.component("transformer")
    layers, width, class_name = family.layers(config), family.text_width(config), family.class_name
    assert family.fusion is not None
    assert layers is not None
    tapped = TensorSpec(name="tapped", dtype="float32", shape=("B", "T", layers, width))
    fuse = family.fusion

    def module() -> Any:
        return fuse(component.fill(component.build(diffusers_class(class_name))))

    def feeds(budget: Budget, size: int) -> dict[str, np.ndarray]:
        largest = {"B": size, "T": most}
        return {"tapped": random_rows(np.random.default_rng(0), tapped, largest, largest | {"T": budget.get("T", most)})}

    return GraphCapture(
        name=NAME,
        module=component.described(module, class_name),
        inputs=(tapped,),
        outputs=(TensorSpec(name="fused", dtype="float32", shape=("B", "T", width)),),
        axes=(),
        batch=Span(1, transformer.batch.max),  # the texts of one branch, however many rows the denoiser is asked for at least
        feeds=feeds,
        open_dimensions={"T": Span(1, most)},
        stages=(Budget(T=most),),
    )
