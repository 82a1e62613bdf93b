"""Language models as graphs: which weights are read, which templates are, and what is refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the models need torch")
pytest.importorskip("transformers", reason="the models are transformers'")
pytest.importorskip("onnx", reason="graphs are looked into")

import language_models  # noqa: E402
import onnx  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from elastic_export.capture.texts import read_by_language_model  # noqa: E402
from elastic_export.families.prompts import DESCRIBING, FLUX2_DEV, FLUX2_KLEIN, KREA2, QWEN_IMAGE, REASONING, Z_IMAGE, PromptRule  # noqa: E402
from elastic_export.foreign.folder import Folder  # noqa: E402
from elastic_export.foreign.language_models import language_model, template  # noqa: E402
from elastic_export.foreign.text_encoders import read_tokenizer  # noqa: E402
from elastic_runtime import Budget, BudgetError, ModelError, Span  # noqa: E402
from elastic_runtime.contract.manifest import Template  # noqa: E402
from elastic_targets.onnx.lower import OnnxOptions, lower  # noqa: E402
from elastic_targets.weights import Streamed  # noqa: E402

FEW = replace(FLUX2_KLEIN, layers=(0, 2))


def folder_of(path: Path, listed: str = "") -> Folder:
    return Folder(path, {"transformer": "", "text_encoder": listed})


def described(folder: Folder, rule: PromptRule, width: int = 16, length: int = 40) -> Any:
    return read_by_language_model(folder, rule, ["text_encoder"], length, width)


def edited(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return language_models.write(tmp_path_factory.mktemp("qwen3"), language_models.qwen3())


@pytest.fixture
def own(qwen3: Path, tmp_path: Path) -> Path:
    """A folder that a test may change."""
    import shutil

    return Path(shutil.copytree(qwen3, tmp_path / "own"))


def test_what_stands_after_the_last_state_is_neither_read_nor_written(own: Path) -> None:
    file = own / "text_encoder" / "model.safetensors"
    weights = load_file(file)
    for name, value in weights.items():
        if name.startswith(("lm_head.", "model.layers.2.", "model.norm.")):
            weights[name] = torch.full_like(value, torch.nan)
    save_file(weights, file)
    graph = language_model(folder_of(own), "text_encoder", FEW, 8, Span(1, 2))
    assert all(isinstance(weight, Streamed) for weight in graph.module.parameters())
    held = {name for name, _ in graph.module.named_parameters()}
    assert {name.split(".")[2] for name in held if ".layers." in name} == {"0", "1"}
    assert not [name for name in held if "lm_head" in name or "norm." in name.split("layers")[0]]
    (artifact,) = lower(graph, OnnxOptions(opset=20), own)
    written = onnx.load(str(own / artifact.path)).graph.initializer
    assert all(np.isfinite(onnx.numpy_helper.to_array(each)).all() for each in written)
    used = sum(value.numel() for name, value in weights.items() if name.startswith(("model.embed", "model.layers.0.", "model.layers.1.")))
    assert used <= sum(int(np.prod(each.dims)) for each in written if each.data_type == onnx.TensorProto.FLOAT) < used + 100


@pytest.mark.parametrize("prefix", ["", "language_model.", "model.language_model.", "language_model.model."])
def test_weights_have_the_names_of_every_version(prefix: str, own: Path) -> None:
    file = own / "text_encoder" / "model.safetensors"
    weights = {name.replace("model.", prefix, 1): value for name, value in load_file(file).items()}
    save_file(weights | {"visual.patch_embed.weight": torch.zeros(2), "model.visual.norm.weight": torch.zeros(2)}, file)
    graph = language_model(folder_of(own), "text_encoder", Z_IMAGE, 8, Span(1, 2))
    ids = torch.from_numpy(graph.feeds(Budget(N=5), 1)["input_ids"])
    with torch.inference_mode():
        wanted = language_models.qwen3()(ids, output_hidden_states=True).hidden_states[-2]
        assert torch.allclose(graph.module(ids), wanted, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"), "lacks layers.1.mlp.up_proj.weight"),
        (lambda weights: weights.update({"model.layers.3.mlp.up_proj.weight": torch.zeros(2)}), "has unknown layers.3.mlp.up_proj.weight"),
        (lambda weights: weights.update({"model.adapter": torch.zeros(2)}), "has unknown adapter"),
    ],
)
def test_weights_that_do_not_fit_are_named(change: Callable[[dict[str, Any]], object], message: str, own: Path) -> None:
    file = own / "text_encoder" / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file)
    with pytest.raises(ModelError, match=message):
        language_model(folder_of(own), "text_encoder", FEW, 8, Span(1, 2))


def test_a_chat_template_is_written_down_with_and_without_thinking(qwen3: Path) -> None:
    tokenizer = read_tokenizer(folder_of(qwen3), "text_encoder")
    turn = "<|im_end|>\n<|im_start|>assistant\n"
    made = {rule: template(folder_of(qwen3), "text_encoder", tokenizer, rule) for rule in (Z_IMAGE, FLUX2_KLEIN, KREA2)}
    assert made[Z_IMAGE] == Template(before="<|im_start|>user\n", after=turn)
    assert made[FLUX2_KLEIN] == Template(before="<|im_start|>user\n", after=turn + "<think>\n\n</think>\n\n")
    assert made[KREA2] == Template(before=DESCRIBING[0], after=DESCRIBING[1], drop=34, apart=True)


@pytest.mark.parametrize(
    ("chat", "message"),
    [
        ("{{ messages[0].content | trim }}!", r"does not only stand around a prompt: of ' a ' it makes 'a!'"),
        ("{{ messages[0].content }}{{ messages[0].content }}", "does not only stand around a prompt: of ''"),
        ("{% if '<think>' in messages[0].content %}no{% endif %}{{ messages[0].content }}", "of '<think>a</think>b' it makes 'no<think>"),
        ("always this", "of '' it makes 'always this'"),
        ("{{ raise_exception('only with tools') }}", "has no chat template that can be used: only with tools"),
        ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "has no chat template that can be used: access to attribute '__class__'"),
        (None, "has no chat template that can be used"),
    ],
)
def test_a_template_that_does_more_is_refused(chat: Any, message: str, tmp_path: Path) -> None:
    language_models.write(tmp_path, language_models.qwen3(), chat)
    with pytest.raises(ModelError, match=message):
        described(folder_of(tmp_path), Z_IMAGE)


@pytest.mark.parametrize(
    ("file", "change", "rule", "message"),
    [
        ("tokenizer/tokenizer_config.json", {"padding_side": "left"}, FEW, "pads on the left"),
        ("tokenizer/tokenizer_config.json", {"split_special_tokens": True}, Z_IMAGE, "splits special tokens"),
        ("text_encoder/config.json", {"num_hidden_layers": 10**9}, FEW, "num_hidden_layers is 1000000000"),
        (
            "text_encoder/config.json",
            {"architectures": ["Mistral3ForConditionalGeneration"]},
            FEW,
            "is a Mistral3For.*; there are Qwen3ForCausalLM",
        ),
    ],
)
def test_what_would_be_read_otherwise_is_refused(file: str, change: dict[str, Any], rule: PromptRule, message: str, own: Path) -> None:
    edited(own / file, lambda content: content.update(change))
    with pytest.raises(ModelError, match=message):
        described(folder_of(own), rule, width=32 if rule is FEW else 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1, "layer_types": None},
            "layer 1 has sliding_attention over 8 tokens",
        ),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_type 'dynamic' turns by a prompt's length"),
    ],
)
def test_layers_that_see_or_turn_otherwise_are_refused(change: dict[str, Any], message: str, own: Path) -> None:
    edited(own / "text_encoder" / "config.json", lambda content: content.update(change))
    with pytest.raises(ModelError, match=message):
        language_model(folder_of(own), "text_encoder", Z_IMAGE, 16, Span(1, 1))


@pytest.fixture
def mistral(tmp_path: Path) -> Path:
    return language_models.write(tmp_path / "mistral", language_models.mistral(), reads=language_models.marked_tokenizer())


DEV = replace(FLUX2_DEV, layers=(0, 2))


def test_a_processors_template_may_be_a_file_of_its_own(mistral: Path) -> None:
    (mistral / "tokenizer" / "chat_template.json").write_text(json.dumps({"chat_template": language_models.PARTS.replace("INST", "USER")}))
    text, files = described(folder_of(mistral), DEV, width=32, length=64)
    (encoder,) = text.encoders
    assert encoder.template == Template(before=f"<s>[SYSTEM_PROMPT]{REASONING}[/SYSTEM_PROMPT][USER]", after="[/USER]", without=("[IMG]",))
    assert (encoder.padded, encoder.padding_side) == (True, "left")
    assert json.loads(files[encoder.tokenizer.path])["post_processor"] is None, "the template begins with the mark itself"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sliding_window": 8}, "layer 0 has sliding_attention over 8 tokens, fewer than the 16 that a prompt may have"),
        (
            {"model_type": "ministral3"},
            "its text half is a ministral3, and Mistral3ForConditionalGeneration is read with a mistral: leave it",
        ),
    ],
)
def test_a_mistral_of_another_kind_is_refused(change: dict[str, Any], message: str, mistral: Path) -> None:
    edited(mistral / "text_encoder" / "config.json", lambda content: content["text_config"].update(change))
    with pytest.raises(ModelError, match=message):
        language_model(folder_of(mistral), "text_encoder", DEV, 16, Span(1, 1), "left")


def test_an_encoder_of_another_model_is_named(qwen3: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has 3 layers, and its pipeline takes the state after layer 9"):
        described(folder_of(qwen3), FLUX2_KLEIN, width=48)
    with pytest.raises(ModelError, match="gives 32 values a token where the transformer takes 48"):
        described(folder_of(qwen3), FEW, width=48)
    with pytest.raises(ModelError, match="has text_encoder, text_encoder_2, and its pipeline has one text encoder, a Qwen3Model"):
        read_by_language_model(folder_of(qwen3), Z_IMAGE, ["text_encoder", "text_encoder_2"], 40, 16)
    with pytest.raises(BudgetError, match="--max-sequence-length 7 leaves no room for a prompt"):
        described(folder_of(qwen3), Z_IMAGE, length=7)
    language_models.write(tmp_path, language_models.qwen25_vl())
    edited(tmp_path / "tokenizer" / "tokenizer.json", lambda content: content["model"].update(merges=content["model"]["merges"][:40]))
    with pytest.raises(ModelError, match=r"makes \d+ tokens of what stands before a prompt, and the pipeline leaves out 34"):
        described(folder_of(tmp_path), QWEN_IMAGE)


def test_a_folder_may_say_which_layers_are_taken(qwen3: Path, tmp_path: Path) -> None:
    (tmp_path / "transformer").mkdir()
    (tmp_path / "model_index.json").write_text(json.dumps({"transformer": ["diffusers", "X"], "text_encoder_select_layers": [1, 2]}))
    folder = replace(Folder.open(tmp_path), path=qwen3, listed={"text_encoder": ""})
    rule = replace(KREA2, models=("Qwen3ForCausalLM",))
    graph = language_model(folder, "text_encoder", rule, 8, Span(1, 2))
    assert [spec.shape for spec in graph.outputs] == [("B", "N", 2, 16)]
    with pytest.raises(ModelError, match="takes the state after layer 'two'"):
        described(replace(folder, layers=("two",)), rule)
