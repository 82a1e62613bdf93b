"""Every shapes mode, precision and compression against torch, through the evaluator on the saved package."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import narrow
from torch import nn

from elastic_export.families.elit.backbone import ElitParams
from elastic_export.families.elit.sit import FAMILY
from elastic_export.families.layers import randomize
from elastic_runtime import Axis, Budget, BudgetError, Span, UsageError
from elastic_runtime.contract.artifacts import TensorSpec
from elastic_runtime.contract.precision import COMPRESSIONS, PRECISIONS
from elastic_targets.capture import GraphCapture
from elastic_targets.coreml import CoremlOptions, Evaluator
from elastic_targets.coreml.options import budgets, paths, requires

Elit = Callable[..., GraphCapture]
Lowered = Callable[..., Any]
Error = Callable[..., float]
ENDS = (Budget(latents=16), Budget(latents=64))


def random_elit(width: int) -> GraphCapture:
    """An ELIT with weights enough to compress and to share."""
    params = ElitParams(
        input_size=16, patch_size=2, in_channels=4, hidden_size=width, depth=3, num_heads=4, num_classes=10, group_size=4,
        head_blocks=1, tail_blocks=1, latent_positions=64,
    )  # fmt: skip
    module = FAMILY.build(params)
    randomize(module, seed=0)
    return GraphCapture(
        name="denoiser", module=module.eval().requires_grad_(False), inputs=FAMILY.inputs(params), outputs=FAMILY.outputs(params),
        axes=FAMILY.axes(params), batch=Span(1, 4), feeds=lambda budget, size: FAMILY.feeds(params, budget, size),
    )  # fmt: skip


@pytest.mark.parametrize("name", narrow(["c", "b", "uvit-b", "hdit-b"]))
def test_functions_agree_with_torch(elit: Elit, lowered: Lowered, error: Error, name: str) -> None:
    graph = elit(name)
    ends = (Budget(latents=graph.axes[0].min), Budget(latents=graph.axes[0].max))
    artifact, session = lowered(graph, precision="fp32", budgets=ends)
    assert [call.function for call in artifact.calls] == [f"latents_{end['latents']}" for end in ends]
    assert session.budgets == ends
    assert max(error(graph, session, end) for end in ends) < PRECISIONS["fp32"].tolerance


@pytest.mark.parametrize(
    ("name", "shapes", "target"),
    narrow(
        [
            *(("c", shapes, "iOS18") for shapes in ("enumerated", "range")),
            ("uvit-b", "enumerated", "iOS18"),
            ("hdit-a", "range", "iOS18"),
            ("hdit-b", "enumerated", "iOS18"),
            ("uvit-tokens-a", "range", "iOS18"),
            ("hdit-levels-a", "range", "iOS18"),
            ("c", "range", "macOS12"),
        ],
        2,
    ),
)
def test_open_sizes_agree_with_torch(elit: Elit, lowered: Lowered, error: Error, name: str, shapes: str, target: str) -> None:
    graph = elit(name)
    artifact, session = lowered(graph, precision="fp32", shapes=shapes, target=target)
    assert {call.function for call in artifact.calls} == {"main"}
    probes = session.budgets or [Budget(latents=value) for value in graph.axes[0].probes()]
    assert max(error(graph, session, budget) for budget in probes) < PRECISIONS["fp32"].tolerance


@pytest.mark.parametrize("reductions", narrow(["fp32", "fp16"]))
def test_fp16_stays_within_its_bound(elit: Elit, lowered: Lowered, error: Error, reductions: str, tmp_path: Path) -> None:
    graph = elit()
    artifact, session = lowered(graph, reductions=reductions, budgets=ENDS)
    assert max(error(graph, session, end) for end in ENDS) < PRECISIONS["fp16"].tolerance
    casts = Evaluator(tmp_path / artifact.package).operations("latents_64")["cast"]
    assert (casts > 20) == (reductions == "fp32")


def test_fp16_keeps_the_sinusoids_of_a_timestep(lowered: Lowered, error: Error) -> None:
    """In fp16 throughout, the angle of a timestep of 999 is off by a quarter, and so is its sine."""

    class Sinusoids(nn.Module):
        def forward(self, timestep: torch.Tensor) -> torch.Tensor:
            return torch.cat([(timestep[:, None] * torch.linspace(0.5, 1, 8)).cos(), timestep[:, None].sin()], 1)

    def feeds(budget: Budget, size: int) -> dict[str, Any]:
        return {"timestep": torch.full((size,), 999.3).numpy()}

    spec = TensorSpec(name="timestep", dtype="float32", shape=("B",))
    output = TensorSpec(name="angles", dtype="float32", shape=("B", 9))
    graph = GraphCapture(name="sinusoids", module=Sinusoids(), inputs=(spec,), outputs=(output,), axes=(), batch=Span(1, 1), feeds=feeds)
    _, session = lowered(graph)
    assert error(graph, session, Budget()) < 1e-3


def test_functions_share_their_weights(lowered: Lowered, tmp_path: Path) -> None:
    graph = random_elit(192)

    def size(**options: Any) -> int:
        artifact, _ = lowered(graph, **options)
        return sum(entry.bytes for entry in artifact.files)

    assert size(budgets=(Budget(latents=16), Budget(latents=64))) < 1.1 * size(budgets=(Budget(latents=64),))


@pytest.mark.parametrize(
    ("compression", "points"),
    narrow([("palette4", ENDS), ("int8", ENDS[1:]), ("palette8", ENDS[1:]), ("palette6", ENDS[1:]), ("w8a8", ENDS[1:]), ("int4", ENDS)], 2),
)
def test_compression_is_smaller_and_within_its_bound(lowered: Lowered, error: Error, compression: str, points: tuple[Budget, ...]) -> None:
    graph = random_elit(64)
    artifact, session = lowered(graph, budgets=points, compression=compression)
    assert artifact.compression == compression
    stored = sum(entry.bytes for entry in artifact.files if entry.path.endswith("weight.bin"))
    halves = 2 * sum(tensor.numel() for tensor in (*graph.module.parameters(), *graph.module.buffers()))
    assert stored < (0.9 if compression in ("palette4", "int4") else 0.95) * halves  # however many functions: the tables are shared too
    assert 1e-4 < max(error(graph, session, point) for point in points) < COMPRESSIONS[compression]


def test_a_function_takes_one_batch_and_says_so(elit: Elit, lowered: Lowered) -> None:
    graph = elit(batch=Span(2, 4))
    artifact, session = lowered(graph, precision="fp32", budgets=(Budget(latents=16),))
    assert (artifact.batch, session.batch) == (Span(2, 2), Span(2, 2))
    assert session.run(graph.feeds(Budget(latents=16), 2))["prediction"].shape == (2, 4, 16, 16)
    with pytest.raises(BudgetError, match="not compiled for B 3, J 4; it takes latents=16 .B 2, J 4.*--budgets"):
        session.run(graph.feeds(Budget(latents=16), 3))
    with pytest.raises(BudgetError, match="not compiled for B 2, J 8"):
        session.run(graph.feeds(Budget(latents=32), 2))


@pytest.mark.parametrize("precision", narrow(["fp16", "fp32"]))
def test_a_vae_decoder(lowered: Lowered, error: Error, precision: str) -> None:
    diffusers = pytest.importorskip("diffusers", reason="the decoder is diffusers' AutoencoderKL")
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 16), latent_channels=4, norm_num_groups=4, layers_per_block=1, sample_size=32,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    from elastic_export.foreign.vae import Decoder

    def feeds(budget: Budget, size: int) -> dict[str, Any]:
        return {"latent": torch.randn(size, 4, 8, 8, generator=torch.Generator().manual_seed(0)).numpy()}

    graph = GraphCapture(
        name="decoder", module=Decoder(vae.eval().requires_grad_(False)), axes=(), batch=Span(1, 4), feeds=feeds,
        inputs=(TensorSpec(name="latent", dtype="float32", shape=("B", 4, 8, 8)),),
        outputs=(TensorSpec(name="image", dtype="float32", shape=("B", 3, 16, 16)),),
    )  # fmt: skip
    # The denoiser's budgets and shapes say nothing about a decoder: it is one static function.
    artifact, session = lowered(graph, precision=precision, shapes="range", budgets=(Budget(latents=16),))
    assert [(call.function, call.budget) for call in artifact.calls] == [("main", {})]
    assert error(graph, session, Budget()) < PRECISIONS[precision].tolerance


def test_the_default_budgets_are_the_ends_and_the_doublings(elit: Elit) -> None:
    graph = elit()
    assert [budget["latents"] for budget in budgets(graph, CoremlOptions())] == [4, 8, 16, 32, 64]
    assert [budget["latents"] for budget in budgets(elit(latents=Span(12, 60)), CoremlOptions())] == [12, 24, 48, 60]
    assert budgets(elit(latents=Span(16, 16)), CoremlOptions()) == [Budget(latents=16)]
    wide = replace(
        graph, axes=(Axis(name="latents", min=1, max=4096, step=1, default=64, input="latent_ids", carrier="length", dimension="J"),)
    )
    assert len(budgets(wide, CoremlOptions())) == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "iOS17"}, "--target iOS17 is too old for a package of 5 functions, which needs iOS18 or macOS15"),
        (
            {"target": "macOS12", "shapes": "range", "compression": "int8"},
            "macOS12 is too old for --compress int8, which needs iOS16 or macOS13",
        ),
        (
            {"target": "iOS16", "shapes": "range", "compression": "w8a8"},
            "iOS16 is too old for --compress w8a8, which needs iOS17 or macOS14",
        ),
        ({"compression": "w8a8", "precision": "fp32"}, "--compress w8a8 .* use --precision fp16, got fp32"),
        ({"target": "iOS9"}, "--target for coreml must be one of iOS15, .*got iOS9"),
        ({"shapes": "any"}, "--shapes for coreml must be one of functions, enumerated, range, got any"),
        ({"precision": "bf16"}, "--precision for coreml must be one of fp16, fp32, got bf16"),
        ({"reductions": "bf16"}, "--reductions for coreml must be one of fp32, fp16, got bf16"),
        ({"compression": "int3"}, "--compress for coreml must be one of palette8, palette6, palette4, int8, int4, w8a8, got int3"),
        ({"compression": "palette4", "precision": "fp32"}, "--compress palette4 .* use --precision fp16, got fp32"),
        ({"budgets": tuple(Budget(latents=4 * i) for i in range(1, 18))}, "latents 68 is not available"),
        ({"budgets": (Budget(latents=18),)}, "latents 18 is not available: this model offers 4-64 in steps of 4"),
        ({"budgets": (Budget(tokens=16),)}, "no axis 'tokens'; it has latents"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(elit: Elit, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        requires(elit(), CoremlOptions(**options))


def test_more_functions_than_make_sense_are_refused(elit: Elit) -> None:
    axis = Axis(name="latents", min=4, max=400, step=4, default=64, input="latent_ids", carrier="length", unit=4, dimension="J")
    graph = replace(elit(), axes=(axis,))
    many = tuple(Budget(latents=4 * i) for i in range(1, 18))
    with pytest.raises(
        UsageError, match=r"17 budgets are more than functions make sense for \(16\): give fewer --budgets, or --shapes range"
    ):
        requires(graph, CoremlOptions(budgets=many))
    requires(graph, CoremlOptions(budgets=many, shapes="enumerated"))


def test_the_name_says_what_is_not_the_default(elit: Elit) -> None:
    denoiser = elit()
    decoder = replace(denoiser, name="decoder")
    assert paths(denoiser, CoremlOptions()) == ("coreml/denoiser.mlpackage",)
    assert paths(decoder, CoremlOptions("range", precision="fp32")) == ("coreml/decoder.range.fp32.mlpackage",)
    assert paths(denoiser, CoremlOptions(reductions="fp16", compression="int8")) == ("coreml/denoiser.fp16-reductions.int8.mlpackage",)
