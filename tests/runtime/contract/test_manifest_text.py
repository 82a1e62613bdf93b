"""The records of models that take prompts and positions: `Patches`, `Text`, `TextEncoder`."""

from pathlib import Path
from typing import Any

import fake_flux
import msgspec
import pytest
from fakes import manifest, write_bundle, write_manifest

from elastic_runtime import Bundle, BundleError, Span
from elastic_runtime.contract.agreement import decode
from elastic_runtime.contract.artifacts import Graph, Profile, Range, TensorSpec, dimension, measure
from elastic_runtime.contract.bundle import MANIFEST, entry
from elastic_runtime.contract.manifest import Manifest, Patches, Template, Text, TextEncoder


def encoder_graph(*outputs: TensorSpec) -> Graph:
    ids = TensorSpec(name="input_ids", dtype="int64", shape=("B", 77))
    return Graph(inputs=(ids,), outputs=outputs, dimensions={"B": Span(1, 1)}, artifacts=())


def prompted(folder: Path, gives: tuple[Any, ...] = ("pooled",)) -> Manifest:
    """A manifest with a text encoder whose tokenizer lies in `folder`."""
    file = folder / "tokenizer" / "tokenizer.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("{}")
    encoder = TextEncoder(graph="text_encoder", tokenizer=entry(folder, file), max_length=77, pad_token_id=49407, gives=gives)
    whole = manifest()
    patches = Patches(size=2, positions="img_ids", guidance_embeds=True)
    model = msgspec.structs.replace(
        whole.model, num_classes=0, null_label=0, patches=patches, text=Text(encoders=(encoder,), length=512, width=4096, pooled=768)
    )
    graph = encoder_graph(TensorSpec(name="pooled", dtype="float32", shape=("B", 768)))
    return msgspec.structs.replace(whole, model=model, graphs=whole.graphs | {"text_encoder": graph})


def test_text_and_patches_read_back_and_the_tokenizer_is_a_file_of_the_bundle(tmp_path: Path) -> None:
    written = prompted(tmp_path)
    write_manifest(tmp_path, written)
    opened = Bundle.open(tmp_path, hashes=True)
    assert opened.manifest == written
    assert [file.path for file in opened.manifest.files()] == ["tokenizer/tokenizer.json"]


def test_a_damaged_tokenizer_is_found_when_the_bundle_is_opened(tmp_path: Path) -> None:
    write_manifest(tmp_path, prompted(tmp_path))
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{")
    with pytest.raises(BundleError, match="damaged"):
        Bundle.open(tmp_path)


def test_manifests_from_before_these_records_still_open(tmp_path: Path) -> None:
    content = msgspec.json.decode((write_bundle(tmp_path / "b").folder / MANIFEST).read_bytes())
    for name in ("patches", "text"):
        content["model"].pop(name, None)
    model = decode(msgspec.json.encode(content), "elastic.json").model
    assert (model.patches, model.text) == (None, None)


def test_an_encoder_must_give_what_its_graph_gives(tmp_path: Path) -> None:
    whole = msgspec.to_builtins(prompted(tmp_path))
    whole["model"]["text"]["encoders"][0]["gives"] = ["pooled", "last_hidden_state"]
    with pytest.raises(BundleError, match="text encoder 'text_encoder' gives pooled, last_hidden_state"):
        decode(msgspec.json.encode(whole), "elastic.json")


def read_by_language_model(tokens: int | str = "N", padded: bool = False, values: tuple[int, ...] = (768,), **changes: Any) -> bytes:
    """A manifest of a model whose prompts a language model reads, up to 100 tokens of them after 34 of a template."""
    text = msgspec.structs.replace(manifest().model, num_classes=0, null_label=0)
    encoder = {"graph": "text_encoder", "tokenizer": {"path": "t.json", "bytes": 1, "sha256": ""}, "max_length": 100, "pad_token_id": 0}
    encoder |= {"gives": ["hidden_states"], "template": {"before": "a", "after": "b", "drop": 34}, "padded": padded} | changes
    whole = msgspec.structs.replace(manifest(), model=text)
    names = ("input_ids", "attention_mask")[: 1 + padded]
    graph = Graph(
        inputs=tuple(TensorSpec(name=name, dtype="int64", shape=("B", tokens)) for name in names),
        outputs=(TensorSpec(name="hidden_states", dtype="float32", shape=("B", tokens, *values)),),
        dimensions={"B": Span(1, 1)} | ({"N": Span(1, 134)} if tokens == "N" else {}),
        artifacts=(),
    )
    content = msgspec.to_builtins(msgspec.structs.replace(whole, graphs=whole.graphs | {"text_encoder": graph}))
    content["model"]["patches"] = {"size": 2, "positions": "img_ids"}
    content["model"]["text"] = {"encoders": [encoder], "length": 100, "width": 768, "pooled": 0}
    return msgspec.json.encode(content)


@pytest.mark.parametrize("values", [(768,), (12, 768)])
@pytest.mark.parametrize(("tokens", "padded"), [("N", False), (134, False), (134, True)])
def test_a_language_model_s_record_reads_back(tokens: int | str, padded: bool, values: tuple[int, ...]) -> None:
    text = decode(read_by_language_model(tokens, padded, values), "elastic.json").model.text
    assert text is not None
    assert text.encoders[0].template == Template(before="a", after="b", drop=34)
    assert (text.encoders[0].longest, text.encoders[0].padded) == (134, padded)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": 100}, r"takes input_ids \(B, 134\), and its graph does not"),
        ({"max_length": 99}, r"takes input_ids \(B, 133\), and its graph does not"),
        ({"tokens": "N", "padded": True}, r"takes input_ids \(B, 134\), and its graph does not"),
        ({"values": (2, 12, 768)}, r"gives hidden_states of shape \(B, N, 2, 12, 768\)"),
        ({"values": (12,)}, r"give 0 pooled values and \[12\] a token, not 0 and 768"),
        ({"template": {"before": "a"}}, "missing required field `after`"),
    ],
)
def test_a_language_model_s_record_agrees_with_its_graph(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BundleError, match=message):
        decode(read_by_language_model(**changes), "elastic.json")


def test_an_encoder_from_before_templates_is_padded_and_has_none(tmp_path: Path) -> None:
    content = msgspec.to_builtins(prompted(tmp_path))
    for name in ("template", "padded"):
        del content["model"]["text"]["encoders"][0][name]
    text = decode(msgspec.json.encode(content), "elastic.json").model.text
    assert text is not None
    assert (text.encoders[0].template, text.encoders[0].padded, text.encoders[0].longest) == (None, True, 77)


@pytest.mark.parametrize(("positions", "table"), [("img_ids", 192), ("pos_ids", None)])
def test_only_pos_ids_have_a_table(positions: Any, table: int | None) -> None:
    with pytest.raises(ValueError, match="table"):
        Patches(size=2, positions=positions, table=table)


@pytest.mark.parametrize("layout", ["centred", "sequence", "after_text"])
def test_only_img_ids_have_a_layout(layout: Any) -> None:
    with pytest.raises(ValueError, match=f"a `layout` is of `img_ids`, got {layout} of pos_ids"):
        Patches(size=2, positions="pos_ids", table=192, layout=layout)


@pytest.mark.parametrize(
    ("patches", "layout", "distilled"),
    [
        ({"guidance_embeds": True, "centred": False}, "origin", False),
        ({"guidance_embeds": False, "centred": False}, "origin", True),
        ({"guidance_embeds": False, "centred": True}, "centred", True),
        ({"guidance_embeds": False}, "origin", True),
    ],
)
def test_version_2_said_whether_places_are_centred_and_left_schnell_to_its_family(patches: Any, layout: str, distilled: bool) -> None:
    content = msgspec.to_builtins(fake_flux.manifest())
    content["schema_version"] = 2
    content["model"]["patches"] = {"size": 2, "positions": "img_ids", "table": None} | patches
    for name in ("guidance_off", "distilled"):
        del content["model"][name]
    model = decode(msgspec.json.encode(content), "elastic.json").model
    assert model.patches is not None
    assert (model.patches.layout, model.distilled, model.guidance_off) == (layout, distilled, 1)
    content["model"]["patches"]["centred"] = "yes"
    with pytest.raises(BundleError, match="unknown field `centred`"):
        decode(msgspec.json.encode(content), "elastic.json")


def test_the_layout_s_columns_are_those_of_the_graph() -> None:
    content = msgspec.to_builtins(fake_flux.manifest())
    content["model"]["patches"]["layout"] = "sequence"
    with pytest.raises(BundleError, match=r"its (img|txt)_ids have shape \([ST], 3\), and the model's have 4 columns"):
        decode(msgspec.json.encode(content), "elastic.json")
    content = msgspec.to_builtins(fake_flux.manifest())
    next(spec for spec in content["graphs"]["denoiser"]["inputs"] if spec["name"] == "img_ids")["shape"] = []
    with pytest.raises(BundleError, match=r"its img_ids have shape \(\), and the model's have 3 columns"):
        decode(msgspec.json.encode(content), "elastic.json")


def test_only_img_ids_come_in_multiples() -> None:
    with pytest.raises(ValueError, match="a `multiple` is of `img_ids`, got 32 of pos_ids"):
        Patches(size=2, positions="pos_ids", table=192, multiple=32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda content: content["model"]["patches"].update(multiple=None),
            "takes img_pad and txt_pad, and the model's `multiple` is None",
        ),
        (
            lambda content: content["graphs"]["denoiser"].update(inputs=content["graphs"]["denoiser"]["inputs"][:-1]),
            "it takes img_pad, and the model's `multiple` is 8",
        ),
        (lambda content: content["axes"][0].update(step=4), "tokens spans 8-1024, and the model's tokens come in multiples of 8"),
        (lambda content: content["graphs"]["denoiser"]["dimensions"]["T"].update(max=60), "T spans 8-60, .* in multiples of 8"),
    ],
)
def test_the_graph_s_pads_and_sizes_are_those_of_the_multiple(change: Any, message: str) -> None:
    content = msgspec.to_builtins(fake_flux.manifest(fake_flux.PADDED))
    decode(msgspec.json.encode(content), "elastic.json")
    change(content)
    with pytest.raises(BundleError, match=message):
        decode(msgspec.json.encode(content), "elastic.json")


def test_a_shape_may_be_a_multiple_of_an_open_dimension() -> None:
    image = TensorSpec(name="image", dtype="float32", shape=("B", 3, "8*h", "8*w"))
    latent = TensorSpec(name="latent", dtype="float32", shape=("B", 4, "h", "w"))
    sizes = {"B": Range(1, 1, 2), "h": Range(4, 8, 16), "w": Range(4, 8, 32)}
    assert Profile(dimensions=sizes).shape(image, "max") == (2, 3, 128, 256)
    assert [dimension(size) for size in ("h", "8*h")] == ["h", "h"]
    assert [measure(size, {"h": 5}) for size in (7, "h", "8*h")] == [7, 5, 40]
    spans = {"B": Span(1, 1), "h": Span(4, 16), "w": Span(4, 32)}
    assert Graph(inputs=(latent,), outputs=(image,), dimensions=spans, artifacts=()).dimensions == spans
    with pytest.raises(ValueError, match="`dimensions` lacks w"):
        Graph(inputs=(latent,), outputs=(image,), dimensions={"B": Span(1, 1), "h": Span(4, 16)}, artifacts=())
