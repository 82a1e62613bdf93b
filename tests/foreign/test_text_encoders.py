import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="the models need torch")
pytest.importorskip("diffusers", reason="the folders are diffusers'")
pytest.importorskip("transformers", reason="the encoders are transformers'")

import folders
import language_models
import torch
from tokenizers import Tokenizer
from transformers import CLIPTextModelWithProjection

from elastic_export.foreign.component import diffusers_class
from elastic_export.foreign.folder import Folder
from elastic_export.foreign.text_encoders import load_encoder, read_tokenizer, text_encoder, transformers_class
from elastic_runtime import Budget, MissingError, ModelError, Span
from elastic_targets.weights import Streamed


@pytest.fixture(scope="module")
def sd3(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    return Folder.open(folders.write(tmp_path_factory.mktemp("f"), folders.sd3(), text=True, decoder=False))


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    return Folder.open(folders.write(tmp_path_factory.mktemp("f"), folders.flux(), text=True, decoder=False))


def test_flux_takes_clips_pooled_state(flux: Folder) -> None:
    ids = torch.tensor([[0, 3, 4, 1, 1, 1], [0, 5, 1, 1, 1, 1]])
    (pooled,) = load_encoder(flux, "text_encoder")(ids)
    assert torch.equal(pooled, folders.clip()(ids).pooler_output)


def test_sd3_takes_the_projection_and_the_last_but_one_state(sd3: Folder) -> None:
    ids = torch.tensor([[0, 3, 4, 1, 1, 1]])
    pooled, hidden = load_encoder(sd3, "text_encoder_2")(ids)
    whole = folders.clip(CLIPTextModelWithProjection)(ids, output_hidden_states=True)
    assert torch.equal(pooled, whole.text_embeds)
    assert torch.equal(hidden, whole.hidden_states[-2])


def test_t5_gives_its_last_state(sd3: Folder) -> None:
    ids = torch.tensor([[3, 4, 1, 0, 0, 0]])
    (hidden,) = load_encoder(sd3, "text_encoder_3")(ids)
    assert torch.allclose(hidden, folders.t5()(ids).last_hidden_state, atol=1e-6)


def test_the_capture_says_what_is_given_and_reads_when_asked(sd3: Folder) -> None:
    graph = text_encoder(sd3, "text_encoder", 12, Span(1, 4))
    assert all(isinstance(weight, Streamed) for weight in graph.module.parameters())
    assert {spec.name: spec.shape for spec in graph.outputs} == {"pooled": ("B", 8), "penultimate_hidden_state": ("B", 12, 8)}
    outputs = graph.module(torch.from_numpy(graph.feeds(Budget(), 2)["input_ids"]))
    assert [tuple(output.shape) for output in outputs] == [(2, 8), (2, 12, 8)]


def test_tokenizers_are_kept_or_converted(flux: Folder) -> None:
    kept, made = read_tokenizer(flux, "text_encoder_2"), read_tokenizer(flux, "text_encoder")
    assert kept.content == (flux.path / "tokenizer_2" / "tokenizer.json").read_bytes()
    assert (kept.pad_token_id, kept.max_length, made.pad_token_id, made.max_length) == (0, 6, 1, 12)
    assert not (flux.path / "tokenizer" / "tokenizer.json").exists()
    assert Tokenizer.from_str(made.content.decode()).encode("cat").ids == [0, 8, 7, 1]


def test_a_tokenizer_or_an_encoder_that_is_not_there_is_named(flux: Folder, tmp_path: Path) -> None:
    folder = folders.write(tmp_path / "f", folders.flux(), decoder=False, text=True)
    (folder / "tokenizer_2").rename(folder / "elsewhere")
    with pytest.raises(ModelError, match="lacks tokenizer_2, the tokenizer of its text_encoder_2"):
        read_tokenizer(Folder.open(folder), "text_encoder_2")
    (folder / "text_encoder" / "config.json").write_text('{"architectures": ["GemmaModel"]}')
    with pytest.raises(ModelError, match="is a GemmaModel; there are CLIPTextModel, "):
        text_encoder(Folder.open(folder), "text_encoder", 12, Span(1, 1))


def test_libraries_that_are_older_than_the_model_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    import diffusers
    import transformers

    for library, kind in ((diffusers, diffusers_class), (transformers, transformers_class)):
        with pytest.raises(MissingError, match=f"needs {library.__name__}'s NewModel, which .*has not: pip install --upgrade"):
            kind("NewModel")


T5 = {"tokenizer_class": "T5Tokenizer", "model_max_length": 6, "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"


def qwen(folder: Path) -> Path:
    language_models.tokenizer().save_pretrained(folder)
    return folder


def t5(folder: Path) -> Path:
    folder.mkdir()
    (folder / "tokenizer_config.json").write_text(json.dumps(T5))
    return folder


def clip(folder: Path) -> Path:
    folders.write_clip_tokenizer(folder)
    return folder


@pytest.mark.parametrize(
    ("write", "gone", "has"),
    [
        (clip, ("vocab.json", "merges.txt"), "tokenizer_config.json"),
        (clip, ("merges.txt",), "tokenizer_config.json, vocab.json"),
        (qwen, ("tokenizer.json",), "chat_template.jinja, tokenizer_config.json"),
        (t5, (), "tokenizer_config.json"),
    ],
)
def test_a_tokenizer_without_its_vocabulary_is_refused(write: Any, gone: tuple[str, ...], has: str, flux: Folder, tmp_path: Path) -> None:
    """Of which transformers makes one that reads every prompt alike."""
    tokenizer = write(tmp_path / "tokenizer")
    for name in gone:
        (tokenizer / name).unlink()
    with pytest.raises(ModelError, match=rf"lacks its vocabulary \(tokenizer.json, or vocab.json with merges.txt, .*; it has {has}: "):
        read_tokenizer(dataclasses.replace(flux, path=tmp_path), "text_encoder")


@pytest.mark.parametrize(("write", "name"), [(clip, "vocab.json"), (qwen, "tokenizer.json"), (t5, "spiece.model")])
def test_a_pointer_in_place_of_a_vocabulary_is_named(write: Any, name: str, flux: Folder, tmp_path: Path) -> None:
    (write(tmp_path / "tokenizer") / name).write_text(POINTER)
    with pytest.raises(ModelError, match=rf"{name} is a git-lfs pointer and not the vocabulary: run git lfs pull"):
        read_tokenizer(dataclasses.replace(flux, path=tmp_path), "text_encoder")


def test_a_vocabulary_without_words_is_refused(flux: Folder, tmp_path: Path) -> None:
    tokenizer = clip(tmp_path / "tokenizer")
    (tokenizer / "vocab.json").write_text('{"<|startoftext|>": 0, "<|endoftext|>": 1}')
    (tokenizer / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(ModelError, match="has a vocabulary without words"):
        read_tokenizer(dataclasses.replace(flux, path=tmp_path), "text_encoder")


@pytest.mark.skipif(importlib.util.find_spec("sentencepiece") is not None, reason="sentencepiece is here")
def test_what_reads_a_vocabulary_is_named(flux: Folder, tmp_path: Path) -> None:
    (t5(tmp_path / "tokenizer") / "spiece.model").write_bytes(b"\x0a\x0b\x0a\x05<unk>\x15\0\0\0\0\x18\x02")
    with pytest.raises(MissingError, match="not read without sentencepiece: pip install sentencepiece protobuf, or save a tokenizer.json"):
        read_tokenizer(dataclasses.replace(flux, path=tmp_path), "text_encoder")
