"""Profiles from spans: pure functions, no compiler."""

import pytest
from fakes import LATENTS, decoder_graph, denoiser_graph

from elastic_runtime import Axis, BudgetError, Span
from elastic_runtime.contract.artifacts import Graph, Range, TensorSpec
from elastic_targets.trt.profiles import default_buckets, narrow, profiles, read_buckets, unknown_buckets

LOOPS = Axis(name="loops", min=1, max=8, step=1, default=4, input="loops", carrier="value")


def sizes(graph: Graph, *arguments: object, letter: str = "J", **named: object) -> list[tuple[int, int, int]]:
    dimensions = [profile.dimensions[letter] for profile in profiles(graph, *arguments, **named)]  # type: ignore[arg-type]
    return [(size.min, size.opt, size.max) for size in dimensions]


def test_default_buckets_are_the_span_and_its_halvings() -> None:
    wide = Axis(name="latents", min=16, max=256, step=16, default=256, input="i", carrier="length", unit=16, dimension="J")
    assert default_buckets(wide) == (32, 64, 128, 256)
    assert default_buckets(wide.narrow(Span(64, 256))) == (64, 128, 256)
    assert default_buckets(wide.narrow(Span(64, 64))) == (64,)
    assert default_buckets(wide.narrow(Span(16, 112))) == (16, 48, 112)  # halves rounded down to the axis's steps
    assert default_buckets(LATENTS) == (8, 16, 32, 64)


def test_buckets_meet_without_gap_or_overlap_and_start_at_the_span() -> None:
    assert sizes(denoiser_graph(), (LATENTS,)) == [(1, 2, 2), (3, 4, 4), (5, 8, 8), (9, 16, 16)]
    assert sizes(denoiser_graph(), (LATENTS,), buckets={"latents": (64, 24)}) == [(1, 6, 6), (7, 16, 16)]


def test_no_buckets_are_one_range() -> None:
    assert sizes(denoiser_graph(), (LATENTS,), buckets={}) == [(1, 16, 16)]


def test_a_batch_prefers_two_for_guidance() -> None:
    assert sizes(denoiser_graph(), (LATENTS,), buckets={}, letter="B") == [(1, 2, 4)]
    assert sizes(denoiser_graph(), (LATENTS,), Span(1, 1), {}, letter="B") == [(1, 1, 1)]
    assert sizes(denoiser_graph(), (LATENTS,), Span(3, 4), {}, letter="B") == [(3, 3, 4)]


def test_an_axis_that_travels_as_a_value_needs_no_profile() -> None:
    graph = Graph(
        inputs=(TensorSpec(name="sample", dtype="float32", shape=("B", 4)), TensorSpec(name="loops", dtype="int64", shape=())),
        outputs=(),
        dimensions={"B": Span(1, 2)},
        artifacts=(),
    )
    assert [profile.dimensions for profile in profiles(graph, (LOOPS,))] == [{"B": Range(1, 2, 2)}]


def test_open_dimensions_get_their_span_or_buckets_of_their_own() -> None:
    """As FLUX's T, or a decoder's h and w."""
    graph = Graph(
        inputs=(
            TensorSpec(name="hidden_states", dtype="float32", shape=("B", "S", 64)),
            TensorSpec(name="t", dtype="float32", shape=("T",)),
        ),
        outputs=(),
        dimensions={"B": Span(1, 1), "S": Span(256, 4096), "T": Span(77, 512)},
        artifacts=(),
    )
    assert sizes(graph, (), letter="S") == [(256, 4096, 4096)]
    assert sizes(graph, (), buckets={"S": (1024, 4096)}, letter="S") == [(256, 1024, 1024), (1025, 4096, 4096)]
    assert sizes(graph, (), buckets={"S": (1024, 4096)}, letter="T") == [(77, 512, 512)] * 2
    tokens = Axis(
        name="tokens", min=256, max=4096, step=1, default=4096, input="hidden_states", carrier="shape", dimension="S",
    )  # fmt: skip
    assert sizes(graph, (tokens,), buckets={"tokens": (1024, 4096)}, letter="S") == [(256, 1024, 1024), (1025, 4096, 4096)]
    assert read_buckets("1024,4096", (tokens,)) == {"tokens": (1024, 4096)}
    assert unknown_buckets(["tokens", "T", "S"], [graph], (tokens,)) == ["S"], "which is said as the axis"


def test_a_graph_without_the_axis_ignores_its_buckets() -> None:
    assert sizes(decoder_graph(), (LATENTS,), buckets={"latents": (32, 64)}, letter="B") == [(1, 2, 4)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"buckets": {"latents": (32,)}}, "the last bucket is 32, so latents up to 64 would have none: add 64"),
        ({"buckets": {"latents": (30, 64)}}, "latents 30 is not available"),
        ({"batch": Span(1, 9)}, "--batch 1-9 is not available: the graph takes 1-4"),
    ],
)
def test_what_the_graph_does_not_offer_is_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        profiles(denoiser_graph(), (LATENTS,), **arguments)  # type: ignore[arg-type]


def test_spans_narrow_the_axes_they_name() -> None:
    assert narrow((LATENTS, LOOPS), {"latents": Span(16, 32)})[0].span == Span(16, 32)
    with pytest.raises(BudgetError, match="this bundle has no axis 'tokens'; it has latents, loops"):
        narrow((LATENTS, LOOPS), {"tokens": Span(1, 2)})
    with pytest.raises(BudgetError, match="latents 128 is not available"):
        narrow((LATENTS,), {"latents": Span(16, 128)})


def test_buckets_are_read_as_they_are_written() -> None:
    assert read_buckets("auto", (LATENTS,)) is None
    assert read_buckets("none", (LATENTS,)) == {}
    assert read_buckets(" 32, 64", (LATENTS, LOOPS)) == {"latents": (32, 64)}
    assert read_buckets("latents=32,64;S=1024,4096", ()) == {"latents": (32, 64), "S": (1024, 4096)}
    with pytest.raises(BudgetError, match="written 32,64,128"):
        read_buckets("32-64", (LATENTS,))
    with pytest.raises(BudgetError, match="must name what it divides"):
        read_buckets("32", (LOOPS,))
