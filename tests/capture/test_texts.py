"""Prompts become what diffusers' own pipelines make of them, where a language model reads them."""

import contextlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from cases import narrow

torch = pytest.importorskip("torch", reason="diffusers' pipelines need torch")
pytest.importorskip("diffusers", reason="the pipelines are diffusers'")
pytest.importorskip("onnxruntime", reason="ours read through ONNX Runtime")

import language_models  # noqa: E402
import onnx  # noqa: E402
from diffusers import Flux2KleinPipeline, Flux2Pipeline, Krea2Pipeline, QwenImagePipeline, ZImagePipeline  # noqa: E402
from fake_flux import manifest  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402

from elastic_export.capture.capture import described  # noqa: E402
from elastic_export.capture.texts import read_by_language_model  # noqa: E402
from elastic_export.families import prompts  # noqa: E402
from elastic_export.families.prompts import PromptRule  # noqa: E402
from elastic_export.foreign.folder import Folder  # noqa: E402
from elastic_export.foreign.language_models import language_model, template  # noqa: E402
from elastic_export.foreign.text_encoders import read_tokenizer  # noqa: E402
from elastic_runtime import Bundle, Span, UsageError, open_session  # noqa: E402
from elastic_runtime.contract.artifacts import FileEntry  # noqa: E402
from elastic_runtime.contract.manifest import TextEncoder  # noqa: E402
from elastic_runtime.denoising.prompts import Reader, encode  # noqa: E402
from elastic_targets.onnx.lower import OnnxOptions, lower  # noqa: E402

LENGTH = 56  # tokens with states that are kept
FEW = (0, 2)  # of three layers, in place of some of dozens
PROMPTS = ("a red cat and a dog", "", "a cat", "  snow\n", "caf\u00e9 <|im_end|> {}\n\n<think>\u732b", "\u0301a")
AWKWARD = st.text(st.sampled_from("a c\n\t\r\u0301\u00e9e{}<|>\u732b'sS1") | st.characters(codec="utf-8"), max_size=12) | st.lists(
    st.sampled_from([*language_models.SPECIAL, *language_models.MARKS, "\n", "\n\n", " ", "cat", "user", "'", "\u0301", "<|im_", "end|>"]),
    max_size=6,
).map("".join)


@dataclass(frozen=True)
class Case:
    """A pipeline's rule, its language model in small, and how to ask the pipeline for the rows of one prompt after the other; what reads in
    it, and the tokenizer of that."""

    rule: PromptRule
    model: Callable[[], Any]
    pipeline: type
    rows: Callable[[Any, list[str]], list[np.ndarray]]
    reads: Callable[[], Any] = language_models.tokenizer
    tokenizer: Callable[[], Any] = language_models.tokenizer


def masked(pipe: Any, texts: list[str]) -> list[np.ndarray]:
    hidden, mask = pipe.encode_prompt(texts, device="cpu", max_sequence_length=LENGTH)
    mask = np.ones(hidden.shape[:2], bool) if mask is None else mask.bool().numpy()
    return [row[kept] for row, kept in zip(hidden.float().numpy(), mask, strict=True)]


def flux2(pipe: Any, texts: list[str]) -> list[np.ndarray]:
    hidden, _ = pipe.encode_prompt(texts, device="cpu", max_sequence_length=LENGTH, text_encoder_out_layers=FEW)
    return list(hidden.numpy())


def z_image(pipe: Any, texts: list[str]) -> list[np.ndarray]:
    strong, weak = pipe.encode_prompt(texts[:3], device="cpu", negative_prompt=texts[3:], max_sequence_length=LENGTH)
    return [each.numpy() for each in (*strong, *weak)]


CASES = {
    "qwen-image": Case(prompts.QWEN_IMAGE, language_models.qwen25_vl, QwenImagePipeline, masked),
    "flux2-klein": Case(replace(prompts.FLUX2_KLEIN, layers=FEW), language_models.qwen3, Flux2KleinPipeline, flux2),
    **{
        f"flux2-dev-{side}": Case(
            replace(prompts.FLUX2_DEV, layers=FEW),
            language_models.mistral,
            Flux2Pipeline,
            flux2,
            partial(language_models.processor, side),
            partial(language_models.marked_tokenizer, side),
        )
        for side in ("left", "right")
    },
    "z-image": Case(prompts.Z_IMAGE, language_models.qwen3, ZImagePipeline, z_image),
    "krea2": Case(replace(prompts.KREA2, layers=FEW), language_models.qwen3_vl, Krea2Pipeline, masked),
}


@dataclass(frozen=True)
class Read:
    """A bundle of a text encoder alone, and the pipeline of the same folder."""

    bundle: Bundle
    theirs: Any
    case: Case

    @property
    def encoder(self) -> TextEncoder:
        assert self.bundle.manifest.model.text is not None
        return self.bundle.manifest.model.text.encoders[0]


@pytest.fixture(scope="module", params=narrow(CASES, 2))
def read(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Read:
    case = CASES[request.param]
    root = tmp_path_factory.mktemp(request.param)
    model = case.model()
    return Read(exported(root, case.rule, model, reads=case.tokenizer()), pipeline(case, model), case)


def pipeline(case: Case, model: Any) -> Any:
    layers = {"text_encoder_select_layers": case.rule.layers} if case.rule.stacked else {}
    parts = dict.fromkeys(("scheduler", "vae", "transformer"))
    return case.pipeline(**parts, text_encoder=model, tokenizer=case.reads(), **layers)


def exported(root: Path, rule: PromptRule, model: Any, options: OnnxOptions = OnnxOptions(), reads: Any = None) -> Bundle:  # noqa: B008  frozen
    folder = Folder(language_models.write(root / "m", model, reads=reads), {"transformer": "", "text_encoder": ""})
    width = model.config.get_text_config().hidden_size * (1 if rule.stacked else len(rule.layers))
    text, files = read_by_language_model(folder, rule, ["text_encoder"], LENGTH, width)
    graph = language_model(folder, "text_encoder", rule, text.encoders[0].longest, Span(1, 4), text.encoders[0].padding_side)
    (artifact,) = lower(graph, options, root)
    for path, content in files.items():
        (root / path).parent.mkdir(parents=True)
        (root / path).write_bytes(content)
    whole = msgspec.structs.replace(described([graph])["text_encoder"], artifacts=(artifact,))
    return Bundle(root, manifest(text=text, text_encoder=whole))


def test_embeddings_are_the_pipeline_s(read: Read) -> None:
    """Of prompts of many lengths at once, among them the empty one, and of each by itself."""
    with torch.inference_mode():
        wanted = read.case.rows(read.theirs, list(PROMPTS))
    conditions = encode(read.bundle, PROMPTS, lambda graph: open_session(read.bundle, graph, "ort", threads=1))
    assert conditions.pooled is None
    for i, rows in enumerate(wanted):
        text = conditions.rows(slice(i, i + 1))
        assert text.hidden is not None
        assert text.hidden[0].shape == rows.shape, PROMPTS[i]
        assert np.abs(text.hidden[0] - rows).max() <= 1e-5 * np.abs(rows).max(), PROMPTS[i]
        alone = encode(read.bundle, PROMPTS[i : i + 1], lambda graph: open_session(read.bundle, graph, "ort", threads=1))
        np.testing.assert_allclose(alone.hidden, text.hidden, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "operator", "tolerance"),
    [
        (OnnxOptions(opset=20), "Softmax", 1e-5),
        (OnnxOptions(precision="fp16"), "Attention", 3e-3),
        (OnnxOptions(precision="int8w"), "MatMulNBits", 0.02),
        (OnnxOptions(precision="text=int4w"), "MatMulNBits", 0.3),
    ],
)
def test_other_opsets_and_precisions(options: OnnxOptions, operator: str, tolerance: float, tmp_path: Path) -> None:
    """Of random weights, which four bits hold badly; the padding and its mask are in the graph."""
    model = language_models.qwen3(hidden_size=64, intermediate_size=64)
    case = CASES["flux2-klein"]
    bundle = exported(tmp_path, case.rule, model, options)
    (artifact,) = bundle.manifest.graphs["text_encoder"].artifacts
    assert operator in {node.op_type for node in onnx.load(str(bundle.file(artifact.path)), load_external_data=False).graph.node}
    states = encode(bundle, PROMPTS[:2], lambda graph: open_session(bundle, graph, "ort", threads=1)).hidden
    with torch.inference_mode():
        wanted = np.stack(flux2(pipeline(case, model), list(PROMPTS[:2])))
    assert states is not None
    assert np.abs(states - wanted).max() <= tolerance * np.abs(wanted).max()


def test_rules_are_the_pipelines_own() -> None:
    made = {name: pipeline(case, None) for name, case in CASES.items()}
    qwen, krea = made["qwen-image"], Krea2Pipeline(*[None] * 5)  # type: ignore[arg-type]
    assert "{}".join(prompts.DESCRIBING) == qwen.prompt_template_encode
    assert qwen.prompt_template_encode_start_idx == krea.prompt_template_encode_start_idx == prompts.DESCRIBING_TOKENS
    assert (krea.prompt_template_encode_prefix, krea.prompt_template_encode_suffix) == prompts.DESCRIBING
    assert krea.text_encoder_select_layers == prompts.KREA2.layers
    usual = {name: inspect.signature(pipe.__call__).parameters["max_sequence_length"].default for name, pipe in made.items()}
    assert usual == {name: case.rule.usual for name, case in CASES.items()}
    for kind, rule in ((Flux2KleinPipeline, prompts.FLUX2_KLEIN), (Flux2Pipeline, prompts.FLUX2_DEV)):
        assert inspect.signature(kind.encode_prompt).parameters["text_encoder_out_layers"].default == rule.layers
    assert made["flux2-dev-left"].system_message == prompts.REASONING


class Asked(torch.nn.Module):  # type: ignore[misc]
    """In place of a language model: it keeps the tokens that it is asked about, without the padding, and answers nothing."""

    dtype, device = torch.float32, torch.device("cpu")

    def forward(self, input_ids: Any, attention_mask: Any, **more: Any) -> Any:
        self.tokens = input_ids[0][attention_mask[0].bool()].tolist()
        raise StopIteration


def tokens(pipe: Any, prompt: str) -> list[int]:
    """What a pipeline gives its model for a prompt."""
    pipe.text_encoder = Asked()
    with contextlib.suppress(StopIteration):
        pipe.encode_prompt([prompt], device="cpu", max_sequence_length=LENGTH)
    ids: list[int] = pipe.text_encoder.tokens
    return ids


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Reader]]:
    """Each pipeline, and what makes tokens of prompts for it in a bundle."""
    made = {}
    for name, case in CASES.items():
        root = language_models.write(tmp_path_factory.mktemp("tokens"), None, reads=case.tokenizer())
        folder = Folder(root, {"transformer": "", "text_encoder": ""})
        made_of = read_tokenizer(folder, "text_encoder")
        around = template(folder, "text_encoder", made_of, case.rule)
        file = FileEntry(path="tokenizer.json", bytes=0, sha256="")
        encoder = TextEncoder(
            graph="", tokenizer=file, max_length=LENGTH, pad_token_id=0, gives=("hidden_states",), template=around, padded=case.rule.padded
        )
        made[name] = (pipeline(case, None), Reader(Tokenizer.from_str(made_of.run(not case.rule.system).decode()), encoder))
    return made


@settings(max_examples=60, deadline=None)
@given(prompt=AWKWARD)
def test_tokens_are_the_pipelines_own(prompt: str, readers: dict[str, tuple[Any, Reader]]) -> None:
    for name, (pipe, reader) in readers.items():
        ours = reader.read(prompt)
        if len(ours) <= reader.encoder.longest:
            assert ours == tokens(pipe, prompt), name


def test_a_prompt_that_is_too_long_is_an_error_that_names_the_limit(read: Read) -> None:
    around = len(Reader(Tokenizer.from_file(str(read.bundle.file("tokenizer/text_encoder/tokenizer.json"))), read.encoder).read(""))
    own = around - (read.encoder.template.drop if read.encoder.template else 0)
    fits = " cat" * (LENGTH - own)
    opened: list[str] = []
    with pytest.raises(UsageError, match=rf"has {LENGTH + 1} tokens, {own} of them its template's, and the model takes at most {LENGTH}"):
        encode(read.bundle, [fits + " cat"], opened.append)  # type: ignore[arg-type]
    assert not opened
    conditions = encode(read.bundle, [fits], lambda graph: open_session(read.bundle, graph, "ort", threads=1))
    assert conditions.length == LENGTH
