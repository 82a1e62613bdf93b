"""The plain public backbones, which have no axis: one program, with the batch fixed or open."""

from collections.abc import Callable
from typing import Any

import pytest
from backbones import Backbone
from cases import narrow

from elastic_export.capture.capture import capture
from elastic_export.capture.zoo import Request, load
from elastic_runtime import Budget, Span
from elastic_runtime.contract.precision import PRECISIONS
from elastic_targets.capture import GraphCapture

NAMES = ("uvit-a", "hdit-a", "uvit-b", "hdit-b")


def graph(recorded: Backbone, batch: Span = Span(2, 2)) -> GraphCapture:  # noqa: B008  frozen
    return capture(load(Request(recorded.family, recorded.checkpoint, recorded.config)), {}, batch).graphs[0]


@pytest.mark.parametrize("name", narrow(NAMES, 2))
def test_they_answer_as_recorded(backbone: Callable[[str], Backbone], lowered: Callable[..., Any], name: str) -> None:
    recorded = backbone(name)
    artifact, session = lowered(graph(recorded), precision="fp32")
    assert len(artifact.calls) == 1
    assert recorded.error(session.run(recorded.feeds)["prediction"]) < PRECISIONS["fp32"].tolerance


@pytest.mark.parametrize("name", narrow(["uvit-a", "hdit-b"]))
def test_they_agree_with_torch_where_the_batch_is_open(
    backbone: Callable[[str], Backbone], lowered: Callable[..., Any], error: Callable[..., float], name: str
) -> None:
    whole = graph(backbone(name), Span(1, 4))
    _, session = lowered(whole, precision="fp32", shapes="range")
    assert error(whole, session, Budget()) < PRECISIONS["fp32"].tolerance


@pytest.mark.parametrize("name", narrow(["uvit-b", "hdit-a"]))
def test_half_precision_stays_within_its_bound(
    backbone: Callable[[str], Backbone], lowered: Callable[..., Any], error: Callable[..., float], name: str
) -> None:
    whole = graph(backbone(name))
    _, session = lowered(whole, precision="fp16")
    assert error(whole, session, Budget()) < PRECISIONS["fp16"].tolerance
