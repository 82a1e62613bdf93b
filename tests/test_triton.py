"""A bundle as a Triton repository: it parses as NVIDIA's own schema, equals the ONNX files, and draws through the docs' client."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import decoder_graph, manifest, write_bundle, write_manifest
from kserve import model_config, triton
from msgspec.structs import replace

from elastic_export.triton import models, write
from elastic_runtime import Bundle, ElasticPipeline, MissingError, PerStep, UsageError
from elastic_runtime.contract.artifacts import FileEntry, Network, OnnxArtifact, TrtArtifact
from elastic_runtime.contract.budget import Budget
from elastic_runtime.contract.bundle import entry

DOCS = Path(__file__).parents[1] / "docs" / "triton.md"


def config_of(folder: Path) -> Any:
    return model_config((folder / "config.pbtxt").read_text())


def tensors(specs: Any) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Type and shape by name, as the backend gets them."""
    return {each.name: (each.data_type, tuple(each.reshape.shape if each.HasField("reshape") else each.dims)) for each in specs}


@pytest.fixture(scope="module")
def looped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with `loops`, whose budget is a value, and a batch."""
    pytest.importorskip("torch", reason="exporting needs torch")
    import elastic_export

    folder = tmp_path_factory.mktemp("looped")
    sizes = {"hidden_size": 32, "num_heads": 4, "num_classes": 10, "unique_blocks": 1, "loops": 2, "max_loops": 4}
    (folder / "c.json").write_text(json.dumps(sizes | {"input_size": 8, "patch_size": 2, "in_channels": 1}))
    return elastic_export.export("elt", output=folder / "elt", config=folder / "c.json", random_weights=True, verify="ends").folder


def engine(folder: Path, name: str = "e", **changes: Any) -> TrtArtifact:
    path = folder / "trt" / f"{name}.engine"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"no engine")
    whole: dict[str, Any] = {
        "precision": "fp16", "files": (entry(folder, path),), "toolchain": {}, "builder": "tensorrt", "builder_version": "10.14.1",
        "sms": (89,),
        "source": "onnx/denoiser.onnx", "source_sha256": "0" * 64, "profiles": (), "network": Network(layers=1, attentions=1, loops=0),
    }  # fmt: skip
    return TrtArtifact(**whole | changes)


def placed(folder: Path, name: str) -> FileEntry:
    (folder / "onnx" / name).write_bytes(b"no graph")
    return entry(folder, folder / "onnx" / name)


def whole_bundle(folder: Path, *more: Any) -> Bundle:
    """A bundle of a denoiser with weights beside it and a decoder, as files that nothing can run, and what `more(folder)` gives."""
    plain = write_bundle(folder)
    first = plain.manifest.graphs["denoiser"].artifacts[0]
    for name in ("denoiser.onnx.data", "decoder.onnx"):
        (folder / "onnx" / name).write_bytes(b"weights")
    first = replace(first, files=(*first.files, entry(folder, folder / "onnx" / "denoiser.onnx.data")))
    whole = manifest(artifacts=(first, *(make(folder) for make in more)))
    decoded = OnnxArtifact(precision="fp32", files=(entry(folder, folder / "onnx" / "decoder.onnx"),), toolchain={}, opset=23)
    write_manifest(folder, replace(whole, graphs=whole.graphs | {"decoder": replace(decoder_graph(), artifacts=(decoded,))}))
    return Bundle.open(folder)


@pytest.mark.parametrize("name", ["digits", "looped"])
def test_names_types_and_shapes_are_the_onnx_files(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    onnx = pytest.importorskip("onnx", reason="reading the graph needs onnx")
    (model,) = write(Bundle.open(request.getfixturevalue(name)), tmp_path / "repository").models
    config = config_of(tmp_path / "repository" / model.name)
    graph = onnx.load(tmp_path / "repository" / model.name / "1" / config.default_model_filename).graph

    def read(values: Any) -> dict[str, tuple[int, tuple[int, ...]]]:
        types = {onnx.TensorProto.FLOAT: 11, onnx.TensorProto.INT64: 9}  # TYPE_FP32 and TYPE_INT64 of model_config.proto
        shapes = {each.name: each.type.tensor_type for each in values}
        return {
            name: (types[kind.elem_type], tuple(-1 if size.dim_param else size.dim_value for size in kind.shape.dim))
            for name, kind in shapes.items()
        }

    assert tensors(config.input) == read(graph.input)
    assert tensors(config.output) == read(graph.output)
    assert all(each.dims for each in config.input), "the protocol has no tensors without dimensions"
    assert (config.platform, config.max_batch_size, config.instance_group[0].count) == ("onnxruntime_onnx", 0, 1)


def test_graphs_and_engines_become_models_and_the_rest_is_named(tmp_path: Path) -> None:
    bundle = whole_bundle(
        tmp_path / "b ü",
        engine,
        lambda folder: engine(folder, "second", sms=(90,)),
        lambda folder: engine(folder, "rtx", builder="tensorrt_rtx"),
        lambda folder: engine(folder, "stripped", stripped=True),
        lambda folder: OnnxArtifact(precision="bf16", files=(placed(folder, "b.onnx"),), toolchain={}, opset=23),
        lambda folder: OnnxArtifact(precision="nvfp4", files=(placed(folder, "n.onnx"),), toolchain={}, opset=23),
    )
    written = write(bundle, tmp_path / "r", instances=2)
    names = [each.name for each in written.models]
    assert names == ["b-denoiser-onnx-fp32", "b-denoiser-trt-fp16", "b-denoiser-trt-fp16-2", "b-decoder-onnx-fp32"]
    assert [why.split(":")[0] for why in written.left_out] == ["trt/rtx.engine", "trt/stripped.engine", "onnx/b.onnx", "onnx/n.onnx"]
    assert "onnx/n.onnx: of a precision that ONNX Runtime has no kernels for, nvfp4: elastic-export trt builds" in written.left_out[-1]
    config = config_of(tmp_path / "r" / names[1])
    assert (config.platform, config.default_model_filename, config.instance_group[0].count) == ("tensorrt_plan", "e.engine", 2)
    assert config.instance_group[0].kind == 1, "KIND_GPU"
    assert sorted(path.name for path in (tmp_path / "r" / names[0] / "1").iterdir()) == ["denoiser.onnx", "denoiser.onnx.data"]
    assert tensors(config_of(tmp_path / "r" / names[3]).input) == {"latent": (11, (-1, 4, 8, 8))}
    text = written.readme.read_text()
    assert "| 64 | `latent_ids = arange(16)` | 1e+03 |" in text
    assert "TensorRT 10.14.1, GPUs of compute capability 8.9" in text
    assert "Left out: trt/rtx.engine" in text


def test_the_budget_that_is_a_value_is_told(looped: Path, tmp_path: Path) -> None:
    text = write(Bundle.open(looped), tmp_path / "r").readme.read_text()
    assert "the value of `loops`, sent with shape [1]" in text
    assert "| 2 | `loops = [2]` |" in text


def client_of_the_docs() -> dict[str, Any]:
    """The names of the docs' program, whose last lines are left to the test."""
    if not DOCS.exists():
        pytest.skip("the docs are not part of an installed wheel")
    pytest.importorskip("tritonclient.http", reason="NVIDIA's client")
    (program,) = re.findall(r"^```python\n(.*?)^```", DOCS.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(program.partition("\nwith ")[0], str(DOCS), "exec"), names)
    return names | {"last": "with " + program.partition("\nwith ")[2]}


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_the_docs_client_draws_what_our_pipeline_draws(digits: Path, tmp_path: Path, guidance: float) -> None:
    names = client_of_the_docs()
    (model,) = write(Bundle.open(digits), tmp_path / "r").models
    noise, budgets = np.random.default_rng(0).standard_normal((2, 1, 16, 16)).astype(np.float32), [16, 16, 48, 64, 64]
    with triton(tmp_path / "r") as (address, served), names["triton"].InferenceServerClient(address) as client:
        drawn = names["draw"](client, model.name, noise, np.array([3, 7]), budgets, unit=16, guidance=guidance)
    assert [each["latent_ids"] for each in served[model.name].runs] == [(1,), (1,), (3,), (4,), (4,)]
    with ElasticPipeline.from_pretrained(digits, "ort") as pipe:
        own = pipe(
            class_labels=[3, 7], noise=noise, num_inference_steps=5, guidance_scale=guidance, sampler="euler", output_type="latent",
            policy=PerStep(tuple(Budget(latents=each) for each in budgets)),
        ).images  # fmt: skip
    assert np.abs(own - drawn).max() < 1e-4


def test_the_docs_last_lines_run(digits: Path, tmp_path: Path) -> None:
    names = client_of_the_docs()
    bundle = Bundle.open(digits)
    (model,) = models(bundle)[0]
    write(bundle, tmp_path / "r")
    with triton(tmp_path / "r") as (address, served):
        exec(names["last"].replace("localhost:8000", address).replace("digits-denoiser-onnx-fp32", model.name), names)
    assert names["pictures"].shape == (1, 1, 16, 16)
    assert len(served[model.name].runs) == 4


def test_what_does_not_fit_the_configuration_is_refused(digits: Path, looped: Path, tmp_path: Path) -> None:
    names = client_of_the_docs()
    for folder in (digits, looped):
        write(Bundle.open(folder), tmp_path / "r")
    with triton(tmp_path / "r") as (address, served), names["triton"].InferenceServerClient(address) as client:
        (loops,) = [name for name in served if "elt" in name]
        with pytest.raises(Exception, match="expected an input"):
            client.infer(loops, [_input(names, "sample", np.zeros((1, 1, 8, 8), np.float32))])
        feeds = {"sample": np.zeros((1, 1, 8, 8), np.float32), "timestep": np.ones(1, np.float32), "class_labels": np.ones(1, np.int64)}
        answers = [
            client.infer(loops, [_input(names, *each) for each in [*feeds.items(), ("loops", np.array([count]))]]).as_numpy("prediction")
            for count in (1, 4)
        ]
    assert np.abs(answers[0] - answers[1]).max() > 0


def _input(names: dict[str, Any], name: str, array: np.ndarray) -> Any:
    given = names["triton"].InferInput(name, list(array.shape), "FP32" if array.dtype == np.float32 else "INT64")
    given.set_data_from_numpy(array)
    return given


def test_models_of_others_stay_and_ours_are_replaced_when_told(tmp_path: Path) -> None:
    bundle, repository = whole_bundle(tmp_path / "b"), tmp_path / "r"
    (repository / "theirs").mkdir(parents=True)
    (repository / "theirs" / "config.pbtxt").write_text("name: 'theirs'")
    first = write(bundle, repository)
    assert (repository / first.models[0].name / "1" / "denoiser.onnx").samefile(tmp_path / "b" / "onnx" / "denoiser.onnx")
    with pytest.raises(UsageError, match="--overwrite"):
        write(bundle, repository)
    assert "count: 3" in (repository / write(bundle, repository, overwrite=True, instances=3).models[0].name / "config.pbtxt").read_text()
    assert (repository / "theirs" / "config.pbtxt").read_text() == "name: 'theirs'"
    (repository / first.models[0].name / "labels.txt").write_text("mine")
    with pytest.raises(UsageError, match="did not write; it is left alone"):
        write(bundle, repository, overwrite=True)
    assert (repository / first.models[0].name / "labels.txt").read_text() == "mine"
    assert sorted(path.name for path in repository.iterdir()) == sorted(["theirs", "README-b.md", *(each.name for each in first.models)])
    Bundle.open(tmp_path / "b", hashes=True)


def test_a_bundle_that_triton_does_not_open_is_refused(tmp_path: Path) -> None:
    write_bundle(tmp_path / "b")
    write_manifest(tmp_path / "b", manifest(artifacts=(engine(tmp_path / "b", builder="tensorrt_rtx"),)))
    with pytest.raises(MissingError, match="TensorRT-RTX, which Triton's backend does not open"):
        write(Bundle.open(tmp_path / "b"), tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_the_command_names_what_it_wrote(run: Callable[..., Any], tmp_path: Path) -> None:
    whole_bundle(tmp_path / "b", lambda folder: engine(folder, builder="tensorrt_rtx"))
    outcome = run("triton", tmp_path / "b", "-o", tmp_path / "r")
    assert outcome.code == 0
    assert "b-denoiser-onnx-fp32" in outcome.out
    assert "left out: trt/e.engine: an engine of TensorRT-RTX" in outcome.err
    again = run("triton", tmp_path / "b", "-o", tmp_path / "r", "--overwrite", "--json")
    assert [each["platform"] for each in json.loads(again.out)["models"]] == ["onnxruntime_onnx"] * 2
    inside = run("triton", tmp_path / "b", "-o", tmp_path / "b")
    assert inside.code == 2
    assert "is a bundle" in inside.err
