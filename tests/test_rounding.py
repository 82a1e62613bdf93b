"""The judge is fair: where the original is itself uncertain a right lowering is not refused, and a wrong one never passes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the originals are torch modules")
pytest.importorskip("diffusers", reason="the folders are diffusers'")
pytest.importorskip("onnxruntime", reason="what is judged runs through ONNX Runtime")
onnx = pytest.importorskip("onnx", reason="what is judged is an ONNX file")

import folders  # noqa: E402
from onnx import numpy_helper  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

import elastic_export  # noqa: E402
import elastic_export.rounding  # noqa: E402
from elastic_export.capture.capture import capture  # noqa: E402
from elastic_export.capture.folders import capture_folder  # noqa: E402
from elastic_export.capture.zoo import Request, load  # noqa: E402
from elastic_export.rounding import Doubled, error, plain  # noqa: E402
from elastic_export.verifying import require, verify, verify_artifact  # noqa: E402
from elastic_runtime import Bundle, ModelError, Span, VerificationError  # noqa: E402
from elastic_runtime.contract.artifacts import MOST_ROUNDING, ROUNDINGS, FileEntry, Graph, OnnxArtifact  # noqa: E402
from elastic_runtime.contract.bundle import entry  # noqa: E402
from elastic_runtime.contract.manifest import Manifest  # noqa: E402

ONE = Span(1, 2)


def loud(folder: Path, gain: float) -> Path:
    """The folder with a transformer whose weights are larger than at birth, as trained ones are."""
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    generator = torch.Generator().manual_seed(0)
    weights = {name: value + gain * torch.randn(value.shape, generator=generator) for name, value in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    return folder


def rounding(graph: Any) -> float:
    """The error of a captured graph's original in float32."""
    loaded = graph
    feeds = loaded.example()
    with torch.inference_mode():
        result = loaded.module(**{name: torch.from_numpy(array) for name, array in feeds.items()})
    answers = tuple(value.numpy() for value in (result if isinstance(result, tuple) else (result,)))
    return error(answers, Doubled(loaded.module)(feeds))


@pytest.mark.parametrize("name", ["elit-mnist", "elt-mnist", "elt-mnist-masked", "dcdit-mnist"])
def test_the_rounding_of_every_family_is_that_of_float32(name: str) -> None:
    (graph,) = capture(load(Request(name)), {}, ONE).graphs
    assert 1e-9 < rounding(graph) < 1e-5


@pytest.mark.parametrize("make", [folders.flux, folders.sd3], ids=["flux", "sd3"])
def test_the_rounding_of_every_component_is_that_of_float32(make: Callable[[], Any], tmp_path: Path) -> None:
    folders.write(tmp_path / "f", make(), text=True)
    for graph in capture_folder(tmp_path / "f", None, Span(16, 32), ONE, digest=False).graphs:
        assert 1e-9 < rounding(graph) < 1e-5, graph.name


@pytest.mark.parametrize(("words", "shape"), [({}, (2, 4, 9, 7)), ({"affine": False}, (1, 4, 5)), ({"eps": 1e-2}, (1, 6, 512, 512))])
def test_group_norms_are_measured_as_runtimes_sum_them(words: dict[str, Any], shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    norm = torch.nn.GroupNorm(2, shape[1], **words)
    if norm.affine:
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)
    feeds = {"input": 3 + np.random.default_rng(0).standard_normal(shape).astype(np.float32)}
    with torch.inference_mode():
        paired = (norm(torch.from_numpy(feeds["input"])).numpy(),)
    summed, exact = plain(norm), Doubled(norm)(feeds)
    assert summed is not None
    assert error(summed(feeds), exact) < (1e-6 if np.prod(shape) < 1e6 else 1e-4)
    if np.prod(shape) > 1e6:
        assert error(summed(feeds), exact) > 3 * error(paired, exact)
    assert plain(torch.nn.Conv2d(1, 1, 1)) is None


@pytest.mark.parametrize(
    ("kind", "words", "shape"),
    [
        ("Conv2d", {"kernel_size": 3, "padding": 1}, (2, 4, 13, 9)),
        ("Conv2d", {"kernel_size": (3, 5), "stride": 2, "padding": (0, 2), "dilation": (2, 1), "groups": 2, "bias": False}, (1, 4, 16, 11)),
        ("Conv2d", {"kernel_size": 3, "padding": "same"}, (1, 4, 8, 8)),
        ("Conv2d", {"kernel_size": 4, "stride": 3, "padding": 3}, (1, 4, 12, 7)),
        ("Conv2d", {"kernel_size": 1, "padding": 2}, (1, 4, 8, 8)),
        ("Conv3d", {"kernel_size": 3, "stride": (1, 2, 2), "padding": (0, 1, 1)}, (1, 4, 3, 9, 8)),
    ],
)
def test_convolutions_are_measured_in_strips_of_few_rows(
    kind: str, words: dict[str, Any], shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    module, sample = getattr(torch.nn, kind)(4, 6, **words), np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    wanted = module.double()(torch.from_numpy(sample).double()).detach().numpy()
    for most in (1, 3000, 10**9):
        monkeypatch.setattr(elastic_export.rounding, "COLUMNS", most)
        (output,) = Doubled(module)({"input": sample})
        np.testing.assert_allclose(output, wanted, atol=1e-14)


@pytest.fixture(scope="module")
def uncertain(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle of a transformer that float32 computes to 3e-5 or so."""
    folder = loud(folders.write(tmp_path_factory.mktemp("f") / "f", folders.flux(), decoder=False), 0.7)
    return elastic_export.export(folder, output=tmp_path_factory.mktemp("b") / "b", size="16-32", batch="1-2")


def test_a_right_lowering_of_an_uncertain_original_is_not_refused(uncertain: Bundle) -> None:
    graph = uncertain.manifest.graphs["denoiser"]
    assert graph.rounding is not None
    assert 2e-6 < graph.rounding < MOST_ROUNDING
    (artifact,) = graph.artifacts
    assert all(row.passed and row.tolerance == pytest.approx(max(1e-5, ROUNDINGS * graph.rounding)) for row in artifact.verified)


def edited(bundle: Bundle, folder: Path, how: Callable[[Any], None]) -> Bundle:
    """A copy of the bundle whose ONNX file was changed."""
    (artifact,) = bundle.manifest.graphs["denoiser"].artifacts
    model = onnx.load(str(bundle.file(artifact.path)))
    how(model.graph)
    place = folder / artifact.path
    place.parent.mkdir(parents=True)
    onnx.save(model, str(place))
    changed = msgspec.structs.replace(artifact, files=(entry(folder, place),))
    return Bundle(bundle.folder, bundle.manifest.joined("denoiser", (changed,)), stage=folder)


def weight(graph: Any, end: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    tensor = next(each for each in graph.initializer if each.name.endswith(end))
    tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor).copy()).astype(np.float32), tensor.name))


def swapped(values: np.ndarray) -> np.ndarray:
    """Rows of the first two heads exchanged."""
    return np.concatenate([values[16:32], values[:16], values[32:]])


def one_less(values: np.ndarray) -> np.ndarray:
    values.flat[np.abs(values).argmax()] = 0
    return values


def gelu(graph: Any) -> None:
    """GELU's other form."""
    for node in graph.node:
        if node.op_type == "Gelu":
            kept = [each for each in node.attribute if each.name != "approximate"]
            was = next((each.s for each in node.attribute if each.name == "approximate"), b"none")
            del node.attribute[:]
            node.attribute.extend([*kept, onnx.helper.make_attribute("approximate", "none" if was == b"tanh" else "tanh")])


MUTATIONS: dict[str, Callable[[Any], None]] = {
    "a dropped bias": lambda graph: weight(graph, "transformer_blocks.0.attn.to_q.bias", np.zeros_like),
    "a swapped head": lambda graph: weight(graph, "transformer_blocks.0.attn.to_v.bias", swapped),
    "one missing weight": lambda graph: weight(graph, "text_embedder.linear_1.weight", one_less),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_wrong_lowering_of_an_uncertain_original_never_passes(mutation: str, uncertain: Bundle, tmp_path: Path) -> None:
    wrong = edited(uncertain, tmp_path, MUTATIONS[mutation])
    (artifact,) = wrong.manifest.graphs["denoiser"].artifacts
    assert artifact.files != uncertain.manifest.graphs["denoiser"].artifacts[0].files
    with pytest.raises(VerificationError, match="fails at"):
        require("denoiser", verify_artifact(wrong, "denoiser", artifact))


def test_gelus_other_form_never_passes(tmp_path: Path) -> None:
    """In a model of weights as at birth, whose values lie where the two forms differ."""
    folder = folders.write(tmp_path / "f", folders.flux(), decoder=False)
    certain = elastic_export.export(folder, output=tmp_path / "b", size="16-32", batch="1-2")
    wrong = edited(certain, tmp_path / "wrong", gelu)
    (artifact,) = wrong.manifest.graphs["denoiser"].artifacts
    with pytest.raises(VerificationError, match="fails at"):
        require("denoiser", verify_artifact(wrong, "denoiser", artifact))


def test_an_unchanged_file_passes_the_same_way(uncertain: Bundle, tmp_path: Path) -> None:
    same = edited(uncertain, tmp_path, lambda graph: None)
    assert all(row.passed for _, artifact in verify(same) for row in artifact.verified)


def test_a_model_that_decides_by_thresholds_is_held_to_the_fixed_bound() -> None:
    graph = Graph(inputs=(), outputs=(), dimensions={"B": ONE}, artifacts=())
    file = FileEntry(path="a.onnx", bytes=0, sha256="")
    artifact = OnnxArtifact(precision="fp32", files=(file,), toolchain={}, opset=23)
    for own, bound in ((None, 1e-5), (1e-6, 1e-5), (1e-5, 8e-5), (MOST_ROUNDING, 2e-3), (0.02, 1e-5)):
        assert msgspec.structs.replace(graph, rounding=own).tolerance(artifact) == pytest.approx(bound)


def test_the_largest_rounding_is_kept_when_a_bundle_is_extended(uncertain: Bundle) -> None:
    manifest: Manifest = uncertain.manifest
    own = manifest.graphs["denoiser"].rounding
    assert manifest.rounded("denoiser", None).graphs["denoiser"].rounding == own
    assert manifest.rounded("denoiser", 1e-4).graphs["denoiser"].rounding == 1e-4
    assert manifest.rounded("denoiser", 1e-12).graphs["denoiser"].rounding == own
    assert manifest.rounded("denoiser", 7.0).graphs["denoiser"].rounding == 1.0


def test_an_original_that_gives_no_numbers_is_refused(tmp_path: Path) -> None:
    folder = folders.write(tmp_path / "f", folders.flux(), decoder=False)
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["proj_out.bias"][0] = float("inf")
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="the original's prediction of denoiser at .* has values that are not finite"):
        elastic_export.export(folder, output=tmp_path / "b", size="16-32", batch="1-2")
    assert not (tmp_path / "b" / "elastic.json").exists()
