"""Which bundles a page draws, and from which of their files."""

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from fakes import LATENTS, manifest

from elastic_runtime import Bundle, Span, UsageError
from elastic_runtime.contract.artifacts import FileEntry, OnnxArtifact, Verification
from elastic_runtime.contract.manifest import Cost, Manifest, Quality, Rounded
from elastic_runtime.contract.schedule import CosineMask, ShiftedCosine
from elastic_web.fitting import facts, fitting, unfit

BYTES = {"fp32": 9_000, "fp16": 5_000, "int8": 3_000, "int4w": 2_000, "bf16": 1_000}


def artifact(precision: str, opset: int = 23, passed: bool = True, **changes: Any) -> OnnxArtifact:
    row = Verification(
        budget={"latents": 64}, max_abs=0.0, cosine=1.0, psnr_db=99.0, finite=True, tolerance=1e-5, passed=passed, where="onnxruntime"
    )
    file = FileEntry(path=f"onnx/denoiser.{precision}.{opset}.onnx", bytes=BYTES[precision], sha256="0" * 64)
    whole = OnnxArtifact(precision=precision, files=(file,), toolchain={}, verified=(row,), opset=opset)  # type: ignore[arg-type]
    return msgspec.structs.replace(whole, **changes)


def bundle(*artifacts: OnnxArtifact, **changes: Any) -> Bundle:
    contract = manifest(channels=1, artifacts=artifacts)
    return Bundle(Path("bundle"), msgspec.structs.replace(contract, **changes))


def card(**accuracies: float) -> dict[str, Any]:
    """A card that graded pictures in these precisions."""
    rows = [
        Rounded(budget={"latents": 64}, accuracy=accuracy, frechet_distance=10.0, precision=name)  # type: ignore[arg-type]
        for name, accuracy in accuracies.items()
    ]
    return {"precisions": tuple(rows)}


def model(contract: Manifest, **changes: Any) -> dict[str, Any]:
    return {"model": msgspec.structs.replace(contract.model, **changes)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": "grey", "schedule": CosineMask(vocabulary=4)}, "tiny fills in masked tokens, which a page does not do"),
        ({"packed": 2}, "tiny is drawn of tokens, by prompts"),
        ({"learned_variance": True, "schedule": ShiftedCosine(shift=1.0)}, "tiny has a learned variance"),
        ({"guidance_rescale": "norm"}, "tiny has a guidance that keeps lengths"),
        ({"schedule": ShiftedCosine(shift=1.0)}, None),
    ],
)
def test_models_that_do_more_are_refused_by_name(changes: dict[str, Any], message: str | None) -> None:
    why = unfit(bundle(artifact("fp32"), **model(manifest(channels=1), **changes)))
    assert why is None if message is None else message in str(why)


def test_graphs_that_take_more_are_refused() -> None:
    graph = manifest(channels=1).graphs["denoiser"]
    slots = msgspec.structs.replace(LATENTS, input="slots")
    assert "tiny has a router that sizes each step" in str(unfit(bundle(artifact("fp32"), axes=(slots,))))
    strange = msgspec.structs.replace(graph, inputs=(*graph.inputs, msgspec.structs.replace(graph.inputs[1], name="drop_fraction")))
    assert "tiny takes drop_fraction" in str(unfit(bundle(graphs={"denoiser": strange})))
    pairs = msgspec.structs.replace(graph, dimensions=graph.dimensions | {"B": Span(2, 4)})
    assert "takes batches of 2-4, and a page draws one picture: export it with --batch 1-2" in str(
        unfit(bundle(graphs={"denoiser": pairs}))
    )
    assert "it has no graph 'denoiser', it has vae" in str(unfit(bundle(graphs={"vae": graph})))


def test_the_smallest_file_that_the_card_passes_is_taken() -> None:
    all_of_them = [artifact(name) for name in BYTES]
    assert fitting(bundle(*all_of_them))["denoiser"].precision == "fp32", "nothing was graded"
    graded = bundle(*all_of_them, **card(fp32=0.98, fp16=0.98, int8=0.979, int4w=0.9, bf16=0.98))
    assert fitting(graded)["denoiser"].precision == "int8", "int4w draws worse, and ONNX Runtime has no kernels for bf16"
    assert fitting(graded, ("int4w",))["denoiser"].precision == "int4w"
    assert fitting(graded, ("fp16", "fp32"))["denoiser"].precision == "fp16"
    failed = bundle(artifact("fp32"), artifact("int8", passed=False), **card(fp32=0.98, int8=0.98))
    assert fitting(failed)["denoiser"].precision == "fp32"
    assert fitting(bundle(artifact("fp32", 20), artifact("fp32", 23)))["denoiser"].opset == 23


def test_why_no_file_does() -> None:
    with pytest.raises(UsageError, match=r"onnx/denoiser.bf16.23.onnx \(bf16\) is of a precision that ONNX Runtime has no kernels for"):
        fitting(bundle(artifact("bf16")), ("bf16",))
    with pytest.raises(UsageError, match="was not proven at every budget"):
        fitting(bundle(artifact("fp32", passed=False)))
    large = artifact("fp32")
    weights = FileEntry(path="onnx/weights", bytes=3_000_000_000, sha256="0" * 64)
    with pytest.raises(UsageError, match="has 3.0 GB of weights, and a page holds 2"):
        fitting(bundle(msgspec.structs.replace(large, files=(*large.files, weights))))
    weights = FileEntry(path="onnx/weights", bytes=800_000_000, sha256="0" * 64)
    with pytest.raises(UsageError, match="has its 0.8 GB of weights in a file of their own, .* and a page takes one file"):
        fitting(bundle(msgspec.structs.replace(large, files=(*large.files, weights))))


def test_budgets_stand_with_what_they_cost_and_are_worth() -> None:
    costs = tuple(Cost(budget={"latents": k}, flops=100 * k, weight_bytes=1, activation_bytes=1) for k in (4, 64))
    quality = tuple(
        Quality(budget={"latents": k}, accuracy=accuracy, frechet_distance=distance)
        for k, accuracy, distance in ((4, 0.9, 20), (64, 1.0, 10))
    )
    whole = bundle(artifact("fp32"), cost=costs, quality=quality)
    rows = facts(whole, fitting(whole))["budgets"]
    assert [row["budget"]["latents"] for row in rows] == list(range(4, 65, 4))
    assert [row["flops"] for row in rows] == [100.0 * row["budget"]["latents"] for row in rows]
    np.testing.assert_allclose([rows[0]["quality"], rows[-1]["quality"]], [0.9, 1.0])
    np.testing.assert_allclose([rows[0]["worth"], rows[-1]["worth"]], [0.45, 1.0])
    ungraded = facts(bundle(artifact("fp32"), cost=costs), fitting(bundle(artifact("fp32"))))["budgets"]
    assert [row["quality"] for row in ungraded] == [None] * 16
    assert [row["worth"] for row in ungraded] == sorted(row["worth"] for row in ungraded)


def test_rows_of_eight_bits_never_share_a_run() -> None:
    for precision, rows in (("fp32", 4), ("int8", 1)):
        whole = bundle(artifact(precision))
        assert facts(whole, fitting(whole, (precision,)))["batch"] == rows
