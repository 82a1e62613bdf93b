"""DC-DiT in Core ML: choosing, gathering and the nearest search convert, and count right in both precisions."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cases import narrow

from elastic_export.families.dc_dit import model as dc_dit
from elastic_export.families.layers import randomize
from elastic_runtime import Budget, Span
from elastic_runtime.contract.precision import PRECISIONS
from elastic_targets.capture import GraphCapture

PARAMS = dc_dit.DcDitParams(
    input_size=8, in_channels=4, hidden_size=32, depth=1, num_heads=4, num_classes=10, dechunk_kernel_sigma=2.0, enc_dec_dim_factor=1,
    encoder="c1", decoder="c1",
)  # fmt: skip
CAPS = tuple(Budget(tokens=tokens) for tokens in (16, 64))


def captured() -> GraphCapture:
    torch.manual_seed(0)  # convolutions draw their own biases
    module = dc_dit.DcDit(PARAMS)
    randomize(module, seed=0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(8 if parameter.ndim > 1 else 1)
        module.router.residual_scorer[-1].bias.fill_(0.5)  # most tokens are kept
    family = dc_dit.FAMILY
    return GraphCapture(
        name="denoiser", module=module.eval().requires_grad_(False), inputs=family.inputs(PARAMS), outputs=family.outputs(PARAMS),
        axes=family.axes(PARAMS), batch=Span(2, 4), feeds=lambda budget, size: family.feeds(PARAMS, budget, size),
    )  # fmt: skip


@pytest.mark.parametrize("precision", narrow(["fp32", "fp16"]))
def test_a_function_a_cap_agrees_with_torch_and_counts_alike(precision: str, lowered: Callable[..., Any]) -> None:
    graph = captured()
    artifact, session = lowered(graph, precision=precision, budgets=CAPS)
    assert [call.function for call in artifact.calls] == ["tokens_16", "tokens_64"]
    predictions = []
    for cap in CAPS:
        feeds = graph.feeds(cap, 2)
        with torch.inference_mode():
            outputs = graph.module(**{name: torch.from_numpy(array) for name, array in feeds.items()})
        prediction, kept, probability = (each.numpy() for each in outputs)
        got = session.run(feeds)
        assert got["kept"].tolist() == kept.tolist()
        assert np.abs(got["probability"] - probability).max() <= 1e-5  # in fp16 too: what decides is float32
        assert kept.min() > 16, "a cap that never bites proves nothing"
        assert np.abs(got["prediction"] - prediction).max() <= PRECISIONS[precision].tolerance * max(1, np.abs(prediction).max())
        predictions.append(prediction)
    assert np.abs(predictions[0] - predictions[1]).max() > 1e-2
