"""Bundles by their names on the hub, through the real client and a stand-in for the hub on the loopback."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("huggingface_hub", reason="names on the hub need its client")

import fake_hub
import fakes
from huggingface_hub import constants

from elastic_runtime import Bundle, BundleError, MissingError, UsageError, hub
from elastic_runtime.hub import Repository

BIG = bytes(range(256)) * 64  # more than one piece of a download
FILE = "onnx/denoiser.onnx"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[fake_hub.Hub]:
    """The stand-in, where the client of this process goes; the working folder is empty."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with fake_hub.serving() as server:
        fake_hub.direct(monkeypatch, server, str(tmp_path / "cache"))
        yield server


@pytest.fixture
def content(tmp_path: Path) -> dict[str, bytes]:
    """The files of a bundle, and of what does not belong to it."""
    folder = fakes.write_bundle(tmp_path / "made", BIG).folder
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return files | {"README.md": b"# card", "pytorch_model.bin": b"pickle"}


@pytest.mark.parametrize(
    ("name", "repository"),
    [
        ("org/name", Repository("org/name")),
        ("Org-1/na.me_2@v1.0", Repository("Org-1/na.me_2", "v1.0")),
        ("org/name@refs/pr/1", Repository("org/name", "refs/pr/1")),
        ("name", None), ("./org/name", None), ("../org/name", None), ("/org/name", None), ("a/b/c", None), ("org/", None),
        ("org/na me", None), ("~/name", None), ("C:\\org\\name", None),
    ],
)  # fmt: skip
def test_what_is_a_name_on_the_hub(name: str, repository: Repository | None) -> None:
    assert hub.named(name) == repository


def test_a_bundle_by_its_name_has_its_listed_files_and_no_others(server: fake_hub.Hub, content: dict[str, bytes]) -> None:
    repo = server.add("org/digits", content)
    bundle = Bundle.open("org/digits", hashes=True)
    assert bundle.file(FILE).read_bytes() == BIG
    assert {name for name, _ in server.asked} == {"elastic.json", FILE}
    assert (bundle.folder.name, bundle.name) == (repo.branches["main"][-1][0], "digits")
    assert Bundle.open(Path("org/digits@main")).folder == bundle.folder  # a path, as the commands have it
    assert len(server.asked) == 2  # the cache has it


def test_offline_the_cache_is_enough_and_what_it_lacks_is_said(
    server: fake_hub.Hub, content: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    server.add("org/digits", content)
    folder = Bundle.open("org/digits").folder
    asked = len(server.asked)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert Bundle.open("org/digits").folder == folder
    with pytest.raises(
        MissingError, match=r"there is no folder org/other here, HF_HUB_OFFLINE is set, and the cache .* does not have all of"
    ):
        Bundle.open("org/other")
    with pytest.raises(MissingError, match="does not have all of org/digits@v2 that is needed: download it once without HF_HUB_OFFLINE"):
        Bundle.open("org/digits@v2")
    assert len(server.asked) == asked
    (folder / FILE).unlink()  # as after a download that broke off
    with pytest.raises((MissingError, BundleError), match="does not have all of org/digits|denoiser.onnx"):
        Bundle.open("org/digits")


def test_a_hub_out_of_reach_is_the_cache_alone(server: fake_hub.Hub, content: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    server.add("org/digits", content)
    folder = Bundle.open("org/digits").folder
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert Bundle.open("org/digits").folder == folder
    with pytest.raises(MissingError, match=r"org/other is not whole in the cache, and the hub is out of reach \(.*[Cc]onnect"):
        Bundle.open("org/other")


def test_a_folder_of_that_name_wins(server: fake_hub.Hub, content: dict[str, bytes]) -> None:
    server.add("org/digits", content)
    fakes.write_bundle(Path("org/digits"), b"local")
    assert Bundle.open("org/digits").file(FILE).read_bytes() == b"local"
    assert not server.asked


def test_revisions_are_branches_tags_and_commits(server: fake_hub.Hub, content: dict[str, bytes]) -> None:
    first = server.add("org/digits", content).branches["main"][-1][0]
    server.repos["org/digits"].commit({"README.md": b"gone"})
    assert Bundle.open(f"org/digits@{first}").file(FILE).read_bytes() == BIG
    with pytest.raises(BundleError, match="org/digits is no bundle: it has no elastic.json"):
        Bundle.open("org/digits")
    with pytest.raises(UsageError, match="org/digits has no revision 'v9': see http://127.0.0.1"):
        Bundle.open("org/digits@v9")


@pytest.mark.parametrize(
    ("facts", "token", "message"),
    [
        (
            {"private": True},
            None,
            "there is no folder org/digits here, and no repository of that name on the hub, or it is private: log in",
        ),
        ({"private": True}, "hf_wrong", "the hub does not take the token that was sent for org/digits: log in with: hf auth login"),
        ({"gated": True}, None, r"org/digits is gated: accept its terms at http://127.0.0.1:\d+/org/digits, and log in"),
        (None, None, "there is no folder org/digits here, and no repository of that name on the hub"),
        (None, fake_hub.TOKEN, "no repository of that name on the hub, or it is private and your token may not read it"),
    ],
)
def test_what_the_hub_refuses_is_said(
    facts: dict[str, Any] | None, token: str | None, message: str, server: fake_hub.Hub, content: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if facts is not None:
        server.add("org/digits", content, **facts)
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(UsageError, match=message):
        Bundle.open("org/digits")
    if facts is not None:  # and with the right token it is there
        monkeypatch.setenv("HF_TOKEN", fake_hub.TOKEN)
        assert Bundle.open("org/digits").file(FILE).read_bytes() == BIG


def test_a_download_that_breaks_off_goes_on_where_it_stopped(server: fake_hub.Hub, content: dict[str, bytes]) -> None:
    server.add("org/digits", content)
    server.cut.add(FILE)
    assert Bundle.open("org/digits", hashes=True).file(FILE).read_bytes() == BIG
    assert [since for name, since in server.asked if name == FILE] == [None, f"bytes={len(BIG) // 2}-"]


def test_a_hub_that_fails_half_way_leaves_what_came_whole_for_the_next_time(server: fake_hub.Hub, content: dict[str, bytes]) -> None:
    server.add("org/digits", content)
    server.cut.add(FILE)
    server.failing_after = {FILE}
    with pytest.raises(MissingError, match="the hub answers 500 for org/digits"):
        Bundle.open("org/digits")
    server.failing_after = set()
    assert Bundle.open("org/digits", hashes=True).file(FILE).read_bytes() == BIG
    assert [name for name, _ in server.asked] == ["elastic.json", FILE, FILE, FILE]


def test_without_the_client_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(
        MissingError, match=r"there is no folder org/digits here, and names on the hub need .*pip install 'elastic-export\[hub\]'"
    ):
        Bundle.open("org/digits")
