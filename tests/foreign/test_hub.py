"""Diffusers folders by their names on the hub: what is needed is downloaded, and nothing else."""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the models need torch")
pytest.importorskip("diffusers", reason="the folders are diffusers'")
pytest.importorskip("transformers", reason="the encoders are transformers'")
pytest.importorskip("huggingface_hub", reason="names on the hub need its client")

import fake_hub  # noqa: E402
import folders  # noqa: E402

import elastic_export  # noqa: E402
from elastic_export.foreign import hub as hubs  # noqa: E402
from elastic_runtime import MissingError, ModelError, UsageError, hub  # noqa: E402

REPOSITORY = hub.Repository("org/flux")
STRAY = {
    "flux1-dev.safetensors": b"the whole again", "README.md": b"# card", "picture.png": b"png",
    "vae/diffusion_pytorch_model.bin": b"pickle",
    "transformer/diffusion_pytorch_model.fp16.safetensors": b"half", "text_encoder/pytorch_model.bin": b"pickle",
    "text_encoder/model.fp16.safetensors": b"half", "text_encoder/flax_model.msgpack": b"flax", "transformer/model.onnx": b"onnx",
}  # fmt: skip


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[fake_hub.Hub]:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with fake_hub.serving() as server:
        fake_hub.direct(monkeypatch, server, str(tmp_path / "cache"))
        yield server


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folders.write(tmp_path_factory.mktemp("m") / "flux", folders.flux(), text=True)


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_one_set_of_weights_comes_with_the_configs_and_tokenizers(server: fake_hub.Hub, made: Path) -> None:
    server.add("org/flux", content(made) | STRAY)
    folder = hubs.folder(REPOSITORY)
    assert content(folder) == content(made)
    assert {name for name, _ in server.asked} == set(content(made))


def test_chosen_components_are_all_that_comes(server: fake_hub.Hub, made: Path) -> None:
    server.add("org/flux", content(made) | STRAY)
    had = content(hubs.folder(REPOSITORY, ("vae",)))
    assert "vae/diffusion_pytorch_model.safetensors" in had
    assert not [name for name in had if name.startswith("tokenizer")]
    assert [name for name in had if name.endswith("safetensors")] == ["vae/diffusion_pytorch_model.safetensors"]
    assert "text_encoder_2/config.json" in had  # which tells how its components fit together


def test_shards_and_half_precision_alone_are_found(server: fake_hub.Hub, tmp_path: Path) -> None:
    folders.write(tmp_path / "sharded", folders.flux(), max_shard_size="20KB")
    folders.write(tmp_path / "half", folders.flux().half(), variant="fp16")
    for name in ("sharded", "half"):
        server.add(f"org/{name}", content(tmp_path / name) | {"transformer/diffusion_pytorch_model-9-of-9.safetensors": b"of others"})
        assert content(hubs.folder(hub.Repository(f"org/{name}"))) == content(tmp_path / name)
    assert len([name for name in content(tmp_path / "sharded") if "-of-" in name]) > 2


def test_configs_alone_are_json(server: fake_hub.Hub, made: Path) -> None:
    server.add("org/flux", content(made) | STRAY)
    folder = hubs.configs(REPOSITORY)
    assert {Path(name).suffix for name, _ in server.asked} == {".json"}
    assert (folder / "transformer" / "config.json").is_file()


def test_what_is_no_such_folder_is_said(server: fake_hub.Hub) -> None:
    server.add("org/flux", {"flux1-dev.safetensors": b"one file", "README.md": b"x"})
    with pytest.raises(ModelError, match="org/flux is no diffusers folder: it has no model_index.json"):
        hubs.folder(REPOSITORY)
    server.add("org/bundle", {"elastic.json": b"{}"})
    with pytest.raises(ModelError, match="org/bundle is a bundle, and has been exported: draw with elastic-export generate org/bundle"):
        hubs.folder(hub.Repository("org/bundle"))


def test_an_export_by_name_says_where_its_weights_came_from_and_is_the_folders_own(
    server: fake_hub.Hub, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = server.add("org/flux", content(made) | STRAY)
    stages: list[str] = []
    given: dict[str, Any] = {"size": "32", "batch": 1, "components": "vae", "verify": "none"}
    bundle = elastic_export.export("org/flux", output=tmp_path / "b", on_stage=stages.append, **given)
    sha = repo.branches["main"][-1][0]
    assert bundle.manifest.model.name == "flux"
    assert bundle.manifest.provenance.checkpoint == f"org/flux@{sha}"
    assert "fetching org/flux" in stages
    local = elastic_export.export(made, output=tmp_path / "c", **given)
    assert local.manifest.provenance.weights_sha256 == bundle.manifest.provenance.weights_sha256
    shutil.copytree(made, "org/flux")  # and now a folder of that name is here
    (Path("org/flux") / "vae" / "config.json").unlink()
    with pytest.raises(ModelError, match="org/flux lacks its component vae"):
        elastic_export.export("org/flux", output=tmp_path / "d", **given)


def test_a_vae_may_be_a_repository_of_its_own(server: fake_hub.Hub, made: Path) -> None:
    server.add("org/vae", content(made / "vae") | {"diffusion_pytorch_model.bin": b"pickle", "vae-ft.safetensors": b"the same again"})
    assert content(hubs.component(hub.Repository("org/vae"))) == content(made / "vae")


def test_offline_a_whole_cache_is_enough_and_half_a_one_is_not(server: fake_hub.Hub, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    server.add("org/flux", content(made) | STRAY)
    hubs.folder(REPOSITORY, ("vae",))
    server.add("org/whole", content(made))
    whole = hubs.folder(hub.Repository("org/whole"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(server.asked)
    assert hubs.folder(hub.Repository("org/whole")) == whole
    assert content(hubs.folder(REPOSITORY, ("vae",)))
    with pytest.raises((MissingError, ModelError), match="HF_HUB_OFFLINE is set"):
        hubs.folder(REPOSITORY)
    assert len(server.asked) == asked


def test_offline_configs_alone_are_no_pickled_weights(server: fake_hub.Hub, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    server.add("org/flux", content(made) | STRAY)
    hubs.configs(REPOSITORY)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(MissingError, match="HF_HUB_OFFLINE is set"):
        hubs.folder(REPOSITORY, ("transformer", "vae"))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_full_disk_is_not_blamed_on_the_connection_nor_on_the_output(
    server: fake_hub.Hub, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    import huggingface_hub

    def fails(*_: object, **__: object) -> str:
        raise OSError(code, os.strerror(code))

    server.add("org/flux", content(made))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fails)
    with pytest.raises(UsageError, match=f"cannot download org/flux into .*cache.*{os.strerror(code)}.*set HF_HUB_CACHE"):
        elastic_export.export("org/flux", output=tmp_path / "b", size="32")


def test_an_index_that_is_none_is_said(server: fake_hub.Hub, made: Path, tmp_path: Path) -> None:
    files = content(made) | {"transformer/diffusion_pytorch_model.safetensors.index.json": json.dumps({"weight_map": 3}).encode()}
    server.add("org/flux", files)
    with pytest.raises(ModelError, match=r"lists no shards \(weight_map\)"):
        elastic_export.export("org/flux", output=tmp_path / "b", size="32")
