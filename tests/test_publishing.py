"""Bundles go to the hub in one commit with a card of their own, and come back by name."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("huggingface_hub", reason="names on the hub need its client")

import fake_hub
import fakes
import msgspec
import yaml

import elastic_export
from elastic_export.publishing import model_card, ours
from elastic_runtime import Bundle, BundleError, MissingError, Span, UsageError, hub
from elastic_runtime.contract.artifacts import CoremlArtifact, OnnxArtifact, Verification
from elastic_runtime.contract.bundle import entry
from elastic_runtime.contract.manifest import Adapter, Manifest, Provenance, Text

FILE = "onnx/denoiser.onnx"
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the client's own way to send a file


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[fake_hub.Hub]:
    with fake_hub.serving() as server:
        fake_hub.direct(monkeypatch, server, str(tmp_path / "cache"), fake_hub.TOKEN)
        yield server


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return fakes.write_bundle(tmp_path / "digits").folder


def files(server: fake_hub.Hub, id: str = "me/digits", branch: str = "main") -> dict[str, bytes]:
    return server.repos[id].branches[branch][-1][1]


def test_a_bundle_comes_back_by_the_name_that_it_went_to(server: fake_hub.Hub, bundle: Path) -> None:
    stages: list[str] = []
    pushed = elastic_export.push(bundle, "me/digits", private=True, message="first", on_stage=stages.append)
    repo = server.repos["me/digits"]
    assert (repo.private, repo.messages[1:]) == (True, ["first"])  # one commit on the one that made it
    assert set(files(server)) == {"elastic.json", FILE, "README.md", ".gitattributes"}
    assert pushed.url.endswith(repo.branches["main"][-1][0])
    assert (set(pushed.files), pushed.removed, pushed.kept_card) == ({"elastic.json", FILE, "README.md"}, (), False)
    assert stages[-1] == "sending 0.00 GB to me/digits"
    again = Bundle.open("me/digits", hashes=True)
    assert again.manifest == Bundle.open(bundle).manifest


def other(folder: Path) -> Path:
    """The bundle with its artifact under another name."""
    (folder / "onnx" / "other.onnx").write_bytes(b"another graph")
    (folder / FILE).unlink()
    artifact = OnnxArtifact(precision="fp32", files=(entry(folder, folder / "onnx" / "other.onnx"),), toolchain={"onnx": "1.21"}, opset=23)
    fakes.write_manifest(folder, fakes.manifest(artifacts=(artifact,)))
    return folder


def test_what_the_new_bundle_does_not_have_is_taken_away(server: fake_hub.Hub, bundle: Path) -> None:
    elastic_export.push(bundle, "me/digits")
    server.repos["me/digits"].commit(files(server) | {"picture.png": b"mine"})
    pushed = elastic_export.push(other(bundle), "me/digits")
    assert pushed.removed == (FILE,)
    assert set(files(server)) == {"elastic.json", "onnx/other.onnx", "README.md", ".gitattributes", "picture.png"}


def test_a_card_that_was_edited_stays(server: fake_hub.Hub, bundle: Path) -> None:
    elastic_export.push(bundle, "me/digits")
    written = files(server)["README.md"]
    edited = written.replace(b"---\n", b"---\nlicense: apache-2.0\n", 1)
    server.repos["me/digits"].commit(files(server) | {"README.md": edited})
    assert elastic_export.push(other(bundle), "me/digits").kept_card
    assert files(server)["README.md"] == edited
    assert "onnx/other.onnx" in files(server)
    assert not elastic_export.push(bundle, "me/digits", overwrite=True).kept_card
    assert ours(files(server)["README.md"].decode())
    assert ours(written.decode().replace("\n", "\r\n"))
    assert not ours(edited.decode())
    assert not ours("# a card of mine")


def test_a_branch_is_made_and_main_stays(server: fake_hub.Hub, bundle: Path) -> None:
    elastic_export.push(bundle, "me/digits")
    before = files(server)
    elastic_export.push(other(bundle), "me/digits", revision="half")
    assert files(server) == before
    assert "onnx/other.onnx" in files(server, branch="half")
    assert Bundle.open("me/digits@half").file("onnx/other.onnx").is_file()


def test_what_is_no_bundle_is_not_written_over(server: fake_hub.Hub, bundle: Path) -> None:
    server.add("me/digits", {"model.safetensors": b"weights", "README.md": b"# mine"})
    with pytest.raises(BundleError, match="me/digits is no bundle and holds model.safetensors: choose another name"):
        elastic_export.push(bundle, "me/digits")
    assert set(files(server)) == {"model.safetensors", "README.md"}
    elastic_export.push(bundle, "me/digits", overwrite=True)
    assert {"model.safetensors", "elastic.json"} < set(files(server))


def test_a_hub_that_does_not_list_its_files_is_not_written_to(
    server: fake_hub.Hub, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elastic_export.push(bundle, "me/digits")
    server.repos["me/digits"].commit(files(server) | {"README.md": b"# mine"})
    server.failing_after.add("tree")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")  # an empty folder is no empty repository
    with pytest.raises(MissingError, match="the hub answers 418 for me/digits"):
        elastic_export.push(bundle, "me/digits")
    assert files(server)["README.md"] == b"# mine"


def test_what_is_sent_is_what_was_hashed(server: fake_hub.Hub, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, made = (bundle / "elastic.json").read_bytes(), hub.created
    standing = Bundle.open(bundle).manifest

    def meanwhile(repository: hub.Repository, private: bool) -> hub.Repository:
        (artifact,) = standing.graphs["denoiser"].artifacts
        (bundle / "onnx" / "denoiser.fp16.onnx").write_bytes(b"joins the folder")
        files = (entry(bundle, bundle / "onnx" / "denoiser.fp16.onnx"),)
        joining = msgspec.structs.replace(artifact, precision="fp16", files=files)
        fakes.write_manifest(bundle, standing.joined("denoiser", [joining]))
        return made(repository, private)

    monkeypatch.setattr(hub, "created", meanwhile)
    elastic_export.push(bundle, "me/digits")
    assert files(server)["elastic.json"] == before != (bundle / "elastic.json").read_bytes()


@pytest.mark.parametrize("text", [b"{}", b"no JSON"])
def test_a_manifest_that_cannot_be_read_is_replaced_when_told(server: fake_hub.Hub, bundle: Path, text: bytes) -> None:
    server.add("me/digits", {"elastic.json": text})
    with pytest.raises(BundleError, match="me/digits holds a bundle that cannot be read: .* Or replace it with --overwrite"):
        elastic_export.push(bundle, "me/digits")
    elastic_export.push(bundle, "me/digits", overwrite=True)
    assert Bundle.open("me/digits", hashes=True).manifest == Bundle.open(bundle).manifest


@pytest.mark.parametrize(
    ("token", "name", "message"),
    [
        ("hf_wrong", "me/digits", "the hub does not take the token that was sent for me/digits: log in with: hf auth login"),
        (None, "me/digits", "the hub does not take the token|no repository of that name on the hub, or it is private: log in"),
        (fake_hub.TOKEN, "other/digits", r"your token may not do that with other/digits \(.*rights to create a model"),
        (fake_hub.TOKEN, "digits", "a repository is named org/name, and its branch by --revision, got 'digits'"),
        (fake_hub.TOKEN, "me/digits@half/../x y", "a repository is named org/name"),
    ],
)
def test_what_the_hub_refuses_is_said(
    token: str | None, name: str, message: str, server: fake_hub.Hub, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if token is None:
        monkeypatch.delenv("HF_TOKEN")
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(UsageError, match=message):
        elastic_export.push(bundle, name)
    assert not server.repos


def test_a_push_beside_another_is_refused_whole(server: fake_hub.Hub, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elastic_export.push(bundle, "me/digits")
    made = hub.created

    def late(repository: hub.Repository, private: bool) -> hub.Repository:
        parent = made(repository, private)
        server.repos["me/digits"].commit(files(server) | {"picture.png": b"theirs"})
        return parent

    monkeypatch.setattr(hub, "created", late)
    with pytest.raises(UsageError, match="somebody else has pushed to me/digits meanwhile"):
        elastic_export.push(other(bundle), "me/digits")
    assert FILE in files(server)


def test_a_damaged_bundle_is_not_sent_and_no_hub_is_said(server: fake_hub.Hub, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    (bundle / FILE).write_bytes(b"not really a grape")
    with pytest.raises(BundleError, match="denoiser.onnx"):
        elastic_export.push(bundle, "me/digits")
    assert not server.repos
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(MissingError, match="HF_HUB_OFFLINE is set, and me/digits cannot be reached without the hub: unset it"):
        elastic_export.push(other(bundle), "me/digits")


def described(**changes: Any) -> Manifest:
    manifest = fakes.manifest(channels=1)
    row = Verification(
        budget={"latents": 64}, max_abs=2.5e-6, cosine=1.0, psnr_db=90.0, finite=True, tolerance=1e-5, passed=True, where="ort"
    )
    file = {"path": "onnx/d.onnx", "bytes": 3_500_000, "sha256": "0" * 64}
    artifact = msgspec.convert({"target": "onnx", "precision": "fp32", "files": [file], "toolchain": {}, "opset": 23}, OnnxArtifact)
    proven = msgspec.structs.replace(artifact, verified=(row,))
    provenance = Provenance(
        command="elastic-export onnx somewhere/secret", created="2026-11-27", versions={"torch": "2.13"}, checkpoint="org/base@abc",
        weights_sha256={"transformer": "1" * 64}, adapters=(Adapter(name="ink.safetensors", sha256="2" * 64, scale=0.8),),
    )  # fmt: skip
    return msgspec.structs.replace(manifest.joined("denoiser", [proven]), provenance=provenance, **changes)


def test_the_card_says_what_the_manifest_does() -> None:
    manifest = described()
    card = model_card(manifest, "me/digits")
    _, head, body = card.split("---\n", 2)
    facts = yaml.safe_load(head)
    assert facts["library_name"] == "elastic-export"
    assert facts["base_model"] == "org/base"
    assert {"elastic-export", "onnx", manifest.model.family} <= set(facts["tags"])
    assert ours(card)
    assert "somewhere/secret" not in card
    for line in (
        "| denoiser | onnx | fp32 | 3.5 | 2.5e-06 at 1 budgets | 1e-05 of the largest |",
        f"elastic-export generate me/digits -o picture.png --classes 0 --latents {manifest.axes[0].default}",
        "- LoRA ink.safetensors, 0.8 times, sha256 `" + "2" * 64 + "`",
        f"- transformer: sha256 `{'1' * 64}`",
        'ElasticPipeline.from_pretrained("me/digits")',
    ):
        assert line in body
    axis = manifest.axes[0]
    assert f"({axis.name} {Span(axis.min, axis.max)})" in body


def test_the_card_says_how_weights_came_to_few_bits() -> None:
    manifest = described()
    (artifact,) = manifest.graphs["denoiser"].artifacts
    fitted = msgspec.structs.replace(artifact, precision="int4w", weight_rounding="gptq")
    card = model_card(manifest.joined("denoiser", [fitted]), "me/digits")
    assert "| denoiser | onnx | int4w, gptq | 3.5 | 2.5e-06 at 1 budgets | 1e-05 of the largest |" in card


def test_the_card_of_a_thing_without_axes_or_origin_is_whole() -> None:
    bare = msgspec.structs.replace(described(axes=(), cost=()), provenance=Provenance(command="", created="", versions={}))
    card = model_card(bare, "me/digits")
    assert ours(card)
    assert "base_model" not in card
    assert "## Budgets" not in card


def prompted(encoders: bool, **changes: Any) -> Manifest:
    """A manifest of a model of prompts without patches, as an ELIT on Qwen-Image has it."""
    encoder: Any = [{"graph": "text", "max_length": 8, "pad_token_id": 0, "gives": ["last_hidden_state"],
                     "tokenizer": {"path": "tokenizers/text.json", "bytes": 1, "sha256": "3" * 64}}]  # fmt: skip
    text = msgspec.convert({"encoders": encoder if encoders else [], "length": 8, "width": 6, "pooled": 0}, Text)
    plain = described()
    graph = msgspec.structs.replace(
        plain.graphs["denoiser"], outputs=(msgspec.structs.replace(plain.graphs["denoiser"].outputs[0], name="last_hidden_state"),)
    )
    model = msgspec.structs.replace(plain.model, text=text, num_classes=0, null_label=0, **changes)
    return msgspec.structs.replace(plain, model=model, graphs=plain.graphs | ({"text": graph} if encoders else {}))


def test_the_card_of_prompts_brings_their_tokenizers() -> None:
    card = model_card(prompted(encoders=True), "me/cats")
    assert "pip install 'elastic-export[ort,hub,ralu]'" in card
    assert 'elastic-export generate me/cats -o picture.png --prompt "a red cat" --latents 64' in card
    assert 'pipe(prompt="a red cat").images[0]' in card


def test_the_card_tells_no_command_that_fails() -> None:
    without = prompted(encoders=False)
    decoder = msgspec.structs.replace(described(), graphs={"decoder": fakes.decoder_graph()})
    for manifest, why in (
        (without, "It holds no text encoders: embeddings of prompts are the caller's, `prompt_embeds` of `ElasticPipeline`."),
        (decoder, "It holds decoder and no denoiser, so nothing is drawn from it alone."),
        (fakes.manifest(channels=4), "This bundle's model draws 4-channel latents and it holds no decoder: export it again with --vae DIR"),
    ):
        card = model_card(manifest, "me/cats")
        assert why in card
        assert "elastic-export verify me/cats" in card
        assert "pip install 'elastic-export[ort,hub]'" in card
        for failing in ("generate", "--prompt", "```python"):
            assert failing not in card


def test_the_card_installs_what_opens_the_bundle() -> None:
    plain = described()
    (artifact,) = plain.graphs["denoiser"].artifacts
    package = CoremlArtifact(
        precision="fp16", files=artifact.files, toolchain={}, package="coreml/d.mlpackage", deployment_target="iOS18", shapes="functions",
        batch=Span(1, 1), calls=(), reductions="fp32",
    )  # fmt: skip
    half = msgspec.structs.replace(artifact, precision="bf16")
    choices: Any = (((artifact, half), "ort"), ((half, artifact), "ort"), ((half,), "openvino"), ((package,), "coreml"))
    for artifacts, extra in choices:
        graph = msgspec.structs.replace(plain.graphs["denoiser"], artifacts=artifacts)
        card = model_card(msgspec.structs.replace(plain, graphs={"denoiser": graph}), "me/digits")
        assert f"pip install 'elastic-export[{extra},hub]'" in card
