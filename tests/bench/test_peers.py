"""The original in torch as a runtime of the benchmark."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

pytest.importorskip("torch", reason="the peers are torch")
pytest.importorskip("onnxruntime", reason="exporting verifies with ONNX Runtime")

from elastic_export.bench.original import request
from elastic_export.bench.peers import TorchRuntime
from elastic_export.capture.capture import capture
from elastic_export.capture.zoo import Request, load
from elastic_export.exporting import export_capture
from elastic_runtime import Bundle, InferenceError, MissingError, ModelError, Span
from elastic_runtime.contract import precision as precisions
from elastic_runtime.sessions.checking import check
from elastic_targets import target as room

SIZES = {
    "hidden_size": 32, "num_heads": 4, "num_classes": 10, "unique_blocks": 1, "loops": 2, "max_loops": 3,
    "grid": 4, "vocabulary": 6, "token_kind": "grey",
}  # fmt: skip


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A masked model of random weights, whose axis is loops. Tests must not change it."""
    folder = tmp_path_factory.mktemp("baseline")
    (folder / "config.json").write_text(json.dumps(SIZES))
    model = load(Request("elt-masked", config=folder / "config.json", random_weights=True))
    return export_capture(capture(model, {}, Span(1, 4)), "onnx", room("onnx").options(), folder / "masked", "elastic-export onnx")


def test_eager_torch_gives_what_the_bundle_recorded(masked: Bundle) -> None:
    runtime = TorchRuntime("torch")
    assert runtime.obstacle(masked) is None
    opened = runtime.open(masked, threads=1)
    with opened.denoiser as session:
        rows = list(check(masked, "denoiser", session, opened.tolerance))
        assert session.where.endswith("CPU eager")
    assert len(rows) == 3
    assert all(row.passed for row in rows)
    with pytest.raises(InferenceError, match="closed"):
        list(check(masked, "denoiser", session, opened.tolerance))


def test_weights_are_found_or_asked_for(masked: Bundle, golden_bundle: Callable[[str], Bundle], golden: Path, tmp_path: Path) -> None:
    assert request(masked.manifest).random_weights
    trained = golden_bundle("c")
    assert TorchRuntime("torch").obstacle(trained) == (
        "the bundle does not hold the original's weights (elit-c.pt): give them with --checkpoint FILE"
    )
    runtime = TorchRuntime("torch", golden / "elit-c.pt")
    assert runtime.obstacle(trained) is None
    opened = runtime.open(trained, threads=1)
    assert all(row.passed for row in check(trained, "denoiser", opened.denoiser, opened.tolerance))
    with pytest.raises(ModelError, match="is not what the bundle was made from"):
        request(trained.manifest, golden / "elit-a.pt")
    with pytest.raises(ModelError, match="there is no file"):
        request(trained.manifest, tmp_path / "none.pt")


def test_a_packaged_sample_brings_its_weights(masked: Bundle) -> None:
    from elastic_export.capture.zoo import samples
    from elastic_runtime.contract.bundle import sha256

    model = msgspec.structs.replace(masked.manifest.model, name="elit-mnist", family="elit-sit", weights="checkpoint")
    digest = sha256(samples()["elit-mnist"].with_suffix(".safetensors"))
    provenance = msgspec.structs.replace(masked.manifest.provenance, checkpoint_sha256=digest)
    assert request(msgspec.structs.replace(masked.manifest, model=model, provenance=provenance)).name == "elit-mnist"
    unknown = msgspec.structs.replace(model, family="abacus", name="abacus")
    with pytest.raises(ModelError, match="no family 'abacus'"):
        request(msgspec.structs.replace(masked.manifest, model=unknown))


def test_a_compiler_that_is_not_here_is_named(masked: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert TorchRuntime("torch-compile").obstacle(masked) == "torch.compile needs a C++ compiler, and there is none"
    assert TorchRuntime("torch").obstacle(masked) is None


@pytest.fixture
def settings() -> Iterator[None]:
    """The compiler's settings, put back."""
    import torch._inductor.config as inductor

    with inductor.patch({"freezing": False, "cpp.simdlen": None}):
        yield


@pytest.mark.usefixtures("settings")
@pytest.mark.parametrize("name", ["torch-openvino", "torch-openvino-bf16", "torch-bf16", "torch-int8"])
def test_the_originals_faster_modes_answer_within_their_precision(
    name: str, golden_bundle: Callable[[str], Bundle], golden: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    pytest.importorskip("torchao" if name == "torch-int8" else "openvino")
    if name == "torch-openvino-bf16" and "avx512_bf16" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this processor has no bfloat16")
    monkeypatch.setattr(torch, "compile", lambda module, dynamic: module)  # which takes a minute, and rounds no otherwise
    bundle, runtime = golden_bundle("c"), TorchRuntime(name, golden / "elit-c.pt")
    assert runtime.obstacle(bundle) is None
    opened = runtime.open(bundle, threads=1)
    with opened.denoiser as session:
        rows = list(check(bundle, "denoiser", session, opened.tolerance))
    assert all(row.passed for row in rows)
    assert (max(row.max_abs for row in rows) > 1e-5) == (runtime.precision != "fp32"), "it does not compute in what it says"
    with pytest.raises(InferenceError, match="closed"):
        list(check(bundle, "denoiser", session, opened.tolerance))


def test_a_number_of_loops_that_tracing_fixes_is_no_axis(masked: Bundle) -> None:
    pytest.importorskip("openvino")
    assert TorchRuntime("torch-openvino").obstacle(masked) == "OpenVINO traces the module, which fixes the number of loops"


@pytest.mark.usefixtures("settings")
def test_bf16_code_that_answers_nan_is_compiled_for_narrower_vectors(masked: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    import torch._inductor.config as inductor

    def compiler(module: torch.nn.Module, dynamic: bool) -> Callable[..., torch.Tensor]:
        return (lambda **feeds: torch.nan * module(**feeds)) if inductor.cpp.simdlen is None else module

    monkeypatch.setattr(torch, "compile", compiler)
    opened = TorchRuntime("torch-bf16").open(masked, threads=1)
    with opened.denoiser as session:
        assert all(row.passed for row in check(masked, "denoiser", session, opened.tolerance))
        assert session.where.endswith("bf16 for 256-bit vectors")


@pytest.mark.parametrize("name", ["torch-cuda", "torch-compile-cuda"])
def test_a_baseline_on_a_gpu_that_is_not_there_says_so(name: str, masked: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert TorchRuntime(name).obstacle(masked) == "this torch sees no cuda device"


def test_the_original_is_held_to_the_bound_of_an_artifact_in_its_precision(masked: Bundle) -> None:
    import torch

    graph = msgspec.structs.replace(masked.manifest.graphs["denoiser"], rounding=1e-5)
    manifest = msgspec.structs.replace(masked.manifest, graphs=masked.manifest.graphs | {"denoiser": graph})
    opened = TorchRuntime("torch").open(Bundle(masked.folder, manifest), threads=1)
    opened.denoiser.close()
    assert opened.tolerance == graph.tolerance() == 8e-5
    assert opened.tolerance > precisions.tolerance(precisions.EXACT), "the original's own rounding is what decides"
    assert not torch.backends.cudnn.allow_tf32, "float32 is float32 on a GPU, too"
    assert not torch.backends.cuda.matmul.allow_tf32


def test_a_converted_model_in_another_precision_than_asked_for_is_missing(monkeypatch: pytest.MonkeyPatch, masked: Bundle) -> None:
    openvino = pytest.importorskip("openvino")
    from elastic_export.bench.peers import ConvertedSession

    kind = SimpleNamespace(get_type_name=lambda: "f32")
    model = SimpleNamespace(get_property=lambda name: kind)
    monkeypatch.setattr(openvino, "convert_model", lambda module, example_input: None)
    monkeypatch.setattr(openvino, "Core", lambda: SimpleNamespace(compile_model=lambda *arguments: model))
    with pytest.raises(MissingError, match="this CPU computes no bf16, and OpenVINO would run it in fp32: use precision fp32"):
        ConvertedSession(masked.manifest.graphs["denoiser"], torch_module(), {}, "bf16", 1)


def torch_module() -> object:
    import torch

    return torch.nn.Identity()
