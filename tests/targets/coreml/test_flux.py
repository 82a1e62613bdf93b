"""FLUX, FLUX.2, SD3, Qwen-Image, Z-Image, Krea 2 and both halves of their VAEs as Core ML packages: one static function a stage, or open
sizes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cases import narrow

pytest.importorskip("diffusers", reason="the folders are diffusers'")
pytest.importorskip("transformers", reason="the folders' encoders are transformers'")

import folders

from elastic_export.capture.folders import capture_folder
from elastic_export.sides import Sides
from elastic_runtime import Budget, BudgetError, InferenceError, Span, UsageError
from elastic_runtime.contract.precision import PRECISIONS
from elastic_targets.capture import GraphCapture
from elastic_targets.coreml import CoremlOptions
from elastic_targets.coreml.options import budgets, requires

Lowered = Callable[..., Any]
Error = Callable[..., float]


@pytest.fixture
def graphs(tmp_path: Path) -> Callable[..., list[GraphCapture]]:
    def make(transformer: Any, components: tuple[str, ...] | None = None, text: int | None = None) -> list[GraphCapture]:
        folders.write(tmp_path / "f", transformer)
        return capture_folder(tmp_path / "f", components, Span(16, 32), Span(1, 2), max_sequence_length=text).graphs

    return make


def test_a_flux_denoiser_has_a_function_for_each_stage(graphs: Callable[..., Any], lowered: Lowered, error: Error) -> None:
    graph = graphs(folders.flux())[0]
    assert [point["tokens"] for point in budgets(graph, CoremlOptions())] == [16, 19, 28, 64]
    artifact, session = lowered(graph, precision="fp32", budgets=(Budget(tokens=16, T=5), Budget(tokens=28, T=5)))
    assert [call.function for call in artifact.calls] == ["T_5_tokens_16", "T_5_tokens_28"]
    assert session.budgets == (Budget(tokens=16, T=5), Budget(tokens=28, T=5))
    assert max(error(graph, session, point) for point in session.budgets) < PRECISIONS["fp32"].tolerance


def test_lists_of_sizes_of_several_inputs_are_of_one_length(graphs: Callable[..., Any], lowered: Lowered, error: Error) -> None:
    """Two budgets are of one picture and two lengths of text, so that each input has a size twice."""
    graph = graphs(folders.flux())[0]
    points = tuple(Budget(tokens=tokens, T=text) for tokens, text in ((16, 5), (28, 5), (28, 8)))
    with pytest.raises(UsageError, match=r"macOS14 is too old for lists of sizes of more than one input \(hidden_states, .*needs iOS18"):
        requires(graph, CoremlOptions(shapes="enumerated", budgets=points, target="macOS14"))
    _, session = lowered(graph, precision="fp32", shapes="enumerated", budgets=points)
    assert max(error(graph, session, point) for point in points) < PRECISIONS["fp32"].tolerance


def test_lists_of_sizes_have_the_longest_text_where_nothing_is_said_of_it(
    graphs: Callable[..., Any], lowered: Lowered, error: Error
) -> None:
    graph = graphs(folders.flux())[0]
    points = (Budget(tokens=16), Budget(tokens=28))
    _, session = lowered(graph, precision="fp32", shapes="enumerated", budgets=points)
    assert max(error(graph, session, graph.at(point)) for point in points) < PRECISIONS["fp32"].tolerance


def test_an_sd3_denoiser_keeps_its_sizes_open(graphs: Callable[..., Any], lowered: Lowered, error: Error) -> None:
    graph = graphs(folders.sd3(**folders.SD35))[0]
    _, session = lowered(graph, precision="fp32", shapes="range")
    points = [Budget(tokens=count, T=text) for count, text in ((4, 1), (29, 7), (64, 9))]
    assert max(error(graph, session, point) for point in points) < PRECISIONS["fp32"].tolerance


@pytest.mark.parametrize("shapes", narrow(["functions", "range"]))
def test_a_qwen_image_denoiser_turns_pairs_in_real_numbers(graphs: Callable[..., Any], lowered: Lowered, error: Error, shapes: str) -> None:
    graph = graphs(folders.qwen_image())[0]
    points = [Budget(tokens=count, T=text) for count, text in ((16, 5), (28, 5))]
    options = {"budgets": tuple(points)} if shapes == "functions" else {"shapes": "range"}
    _, session = lowered(graph, precision="fp32", **options)
    assert max(error(graph, session, point) for point in points) < PRECISIONS["fp32"].tolerance


@pytest.mark.parametrize(("precision", "shapes"), narrow([("fp32", "range"), ("fp16", "functions")]))
def test_a_z_image_denoiser_takes_pad_tokens(
    graphs: Callable[..., Any], lowered: Lowered, error: Error, precision: str, shapes: str
) -> None:
    graph = graphs(folders.z_image())[0]
    assert [point["tokens"] for point in budgets(graph, CoremlOptions())] == [32, 64]
    points = [Budget(tokens=count, T=text) for count, text in ((32, 64), (64, 32))]
    options = {"budgets": tuple(points)} if shapes == "functions" else {"shapes": "range"}
    _, session = lowered(graph, precision=precision, **options)
    assert max(error(graph, session, point) for point in points) < PRECISIONS[precision].tolerance


@pytest.mark.parametrize("shapes", narrow(["functions", "range"]))
def test_a_flux_2_denoiser_places_its_text_too(graphs: Callable[..., Any], lowered: Lowered, error: Error, shapes: str) -> None:
    graph = graphs(folders.flux2(guidance_embeds=True))[0]
    points = [Budget(tokens=count, T=text) for count, text in ((16, 5), (28, 5))]
    options = {"budgets": tuple(points)} if shapes == "functions" else {"shapes": "range"}
    _, session = lowered(graph, precision="fp32", **options)
    assert max(error(graph, session, point) for point in points) < PRECISIONS["fp32"].tolerance


@pytest.mark.parametrize(("precision", "shapes"), narrow([("fp32", "range"), ("fp16", "functions")]))
def test_krea_2_turns_groups_of_heads_and_fuses_its_text_apart(
    graphs: Callable[..., Any], lowered: Lowered, error: Error, precision: str, shapes: str
) -> None:
    denoiser, fusion = graphs(folders.krea2(), ("transformer",), 16)
    assert (denoiser.name, fusion.name) == ("denoiser", "text_fusion")
    for graph, points in ((denoiser, [Budget(tokens=28, T=5)]), (fusion, [Budget(T=16)])):
        options = {"budgets": tuple(points)} if shapes == "functions" else {"shapes": "range"}
        _, session = lowered(graph, precision=precision, **options)
        assert max(error(graph, session, point) for point in points) < PRECISIONS[precision].tolerance


def test_an_encoder_has_one_function_for_the_picture(graphs: Callable[..., Any], lowered: Lowered, error: Error) -> None:
    *_, graph = graphs(folders.flux(), ("transformer", "vae", "encoder"))
    artifact, session = lowered(graph, precision="fp16")
    whole = {"h": 16, "w": 16}
    assert [(call.budget, call.sizes) for call in artifact.calls] == [(whole, whole | {"B": 1})]
    assert error(graph, session, Budget(**whole)) < PRECISIONS["fp16"].tolerance


@pytest.mark.parametrize("make", narrow([folders.krea2, folders.flux2]))  # one of a frame, and one that packs what it gives
def test_an_encoder_with_open_sides_takes_whole_latents(
    make: Callable[..., Any], graphs: Callable[..., Any], lowered: Lowered, error: Error
) -> None:
    *_, graph = graphs(make(), ("transformer", "vae", "encoder"), 16)
    _, session = lowered(graph, precision="fp32", shapes="range")
    assert error(graph, session, Budget(h=4, w=7)) < PRECISIONS["fp32"].tolerance
    with pytest.raises(InferenceError, match=r"image must have shape \(B, 3, \d\*h, \d\*w\)"):
        session.run({"image": graph.feeds(Budget(h=4, w=4), 1)["image"][..., 1:]})


@pytest.mark.wide
def test_the_decoder_of_packed_latents_keeps_its_sides_open(graphs: Callable[..., Any], lowered: Lowered, error: Error) -> None:
    graph = graphs(folders.flux2())[1]
    _, session = lowered(graph, precision="fp32", shapes="range")
    assert max(error(graph, session, Budget(h=height, w=width)) for height, width in ((2, 2), (8, 5))) < PRECISIONS["fp32"].tolerance


@pytest.mark.parametrize("shapes", narrow(["range", "functions"]))
def test_elit_on_qwen_image_keeps_its_text_whole(golden: Path, lowered: Lowered, error: Error, shapes: str) -> None:
    graph = capture_folder(golden / "elit-qwen-image-a", None, Sides(16, 24), Span(1, 2), max_sequence_length=7).graphs[0]
    assert [point["latents"] for point in budgets(graph, CoremlOptions())] == [6, 12, 24, 48, 96]
    points = [Budget(latents=count, T=text) for count, text in ((18, 5), (96, 5))]
    options = {"budgets": tuple(points)} if shapes == "functions" else {"shapes": "range"}
    _, session = lowered(graph, precision="fp32", **options)
    assert max(error(graph, session, point) for point in points) < PRECISIONS["fp32"].tolerance


def test_a_decoder_has_a_function_for_the_preview_and_one_for_the_picture(
    graphs: Callable[..., Any], lowered: Lowered, error: Error
) -> None:
    graph = graphs(folders.flux())[1]
    artifact, session = lowered(graph, precision="fp32", budgets=(Budget(tokens=16), 28))  # which says nothing about a decoder
    assert [call.budget for call in artifact.calls] == [{"h": 8, "w": 8}, {"h": 16, "w": 16}]
    assert max(error(graph, session, point) for point in session.budgets) < PRECISIONS["fp32"].tolerance


def test_a_size_beyond_the_span_is_refused(graphs: Callable[..., Any]) -> None:
    with pytest.raises(BudgetError, match="tokens 65 is not available: this model offers 4-64"):
        requires(graphs(folders.flux())[0], CoremlOptions(budgets=(65,)))


def test_the_decoder_of_one_frame_keeps_its_sides_open(graphs: Callable[..., Any], lowered: Lowered, error: Error) -> None:
    graph = graphs(folders.qwen_image())[1]
    _, session = lowered(graph, precision="fp32", budgets=(Budget(h=8, w=8),))
    assert max(error(graph, session, point) for point in session.budgets) < PRECISIONS["fp32"].tolerance
