"""`elastic-export web`: what it writes, what it takes, and what it leaves alone. What the page then does is in tests/web/."""

import hashlib
import json
import random
import re
import socketserver
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import msgspec
import pytest
from conftest import Outcome
from fakes import manifest, write_bundle, write_manifest
from npm import contents, installed, packed

from elastic_runtime import Bundle
from elastic_runtime.contract.schedule import LinearBeta
from elastic_web import library

Run = Callable[..., Outcome]


@pytest.fixture
def package(tmp_path: Path) -> Path:
    return installed(tmp_path / "node_modules" / "onnxruntime-web")


@pytest.fixture
def grey(tmp_path: Path) -> Path:
    """A bundle of one channel, whose artifact nothing here runs."""
    return write_bundle(tmp_path / "grey", channels=1).folder


def facts(site: Path) -> dict[str, Any]:
    """What the page says about itself."""
    match = re.search(r'<script type="application/json" id="site">(.*?)</script>', (site / "index.html").read_text(), re.DOTALL)
    assert match
    return dict(json.loads(match[1]))


def listing(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_a_site_lists_its_files_and_holds_the_bundles_own(run: Run, grey: Path, package: Path, tmp_path: Path) -> None:
    done = run("web", grey, "-o", tmp_path / "site", "--runtime", package, "--json")
    assert done.code == 0, done.err
    document = json.loads(done.out)
    assert (document["schema"], document["precision"], document["library"]) == ("elastic-export/web/1", "fp32", library.VERSION)
    about = facts(tmp_path / "site")
    listed = {entry["path"]: entry["sha256"] for entry in about["files"]}
    assert listing(tmp_path / "site") == sorted([*listed, "index.html"])
    for name, digest in listed.items():
        assert hashlib.sha256((tmp_path / "site" / name).read_bytes()).hexdigest() == digest
    (model,) = [name for name in listed if name.endswith(".onnx")]
    assert (tmp_path / "site" / model).read_bytes() == (grey / "onnx" / "denoiser.onnx").read_bytes()
    assert about["models"]["denoiser"]["sha256"] == listed[model] == document["model"]["sha256"]
    assert {Path(name).name for name in listed} >= {"page.js", "page.css", "site.css", "worker.js", "LICENSE.txt", *library.FILES}
    folder = model.partition("/")[0]
    assert set(re.findall(r'(?:href|src)="(?!data:)([^"]+)"', (tmp_path / "site" / "index.html").read_text())) == {
        f"{folder}/site.css",
        f"{folder}/page.css",
        f"{folder}/page.js",
    }


def test_the_page_asks_nothing_of_another_server() -> None:
    sources = [path for path in (Path(library.__file__).parent / "page").iterdir() if path.is_file()]
    assert len(sources) > 10
    for source in sources:
        text = source.read_text()
        assert set(re.findall(r"https?://[^\"'\s<)]+", text)) <= {"http://www.w3.org/2000/svg"}, source.name
        assert max(map(len, text.splitlines())) <= (300 if source.suffix == ".html" else 140), source.name
    page = (Path(library.__file__).parent / "page" / "index.html").read_text()
    assert "default-src 'none'" in page
    assert not re.search(r" style=| on\w+=|unsafe-inline|'unsafe-eval'", page)
    fields = re.findall(r'<(?:input|select)[^>]* id="([\w-]+)"', page)
    assert len(fields) > 8
    assert set(fields) <= set(re.findall(r'<label for="([\w-]+)"', page)), "everything that is filled in has a label"


def test_text_of_a_bundle_cannot_leave_its_place_in_the_page(run: Run, grey: Path, package: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(grey)
    evil = "</script><script>alert(1)</script>$files"
    write_manifest(grey, msgspec.structs.replace(bundle.manifest, model=msgspec.structs.replace(bundle.manifest.model, name=evil)))
    assert run("web", grey, "-o", tmp_path / "site", "--runtime", package).code == 0
    assert facts(tmp_path / "site")["model"]["name"] == evil
    assert "alert(1)</script>" not in (tmp_path / "site" / "index.html").read_text()


def test_a_site_is_replaced_only_when_told_and_the_users_files_stay(run: Run, grey: Path, package: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    assert run("web", grey, "-o", site, "--runtime", package).code == 0
    (site / "robots.txt").write_text("mine")
    before = listing(site)
    refused = run("web", grey, "-o", site, "--runtime", package)
    assert refused.code == 2
    assert f"{site} holds a site: choose another -o/--output, or replace it with --overwrite" in refused.err
    assert listing(site) == before
    other = write_bundle(tmp_path / "other", b"another graph", channels=1).folder
    assert run("web", other, "-o", site, "--runtime", package, "--overwrite").code == 0
    assert (site / "robots.txt").read_text() == "mine"
    assert len(listing(site)) == len(before)
    assert {name for name in before if "/" in name}.isdisjoint(listing(site)), "the old site's files are gone"
    damaged = next(site.glob("*/page.js"))
    damaged.write_text("broken")
    assert run("web", other, "-o", site, "--runtime", package, "--overwrite").code == 0
    assert "broken" not in next(site.glob("*/page.js")).read_text()
    assert len(listing(site)) == len(before)


@pytest.mark.parametrize("content", ["hello", '<script type="application/json" id="site">{"generator": "another"}</script>'])
def test_what_is_not_ours_is_left_alone(run: Run, grey: Path, package: Path, tmp_path: Path, content: str) -> None:
    site = tmp_path / "site"
    site.mkdir()
    (site / "index.html").write_text(content)
    for more in ([], ["--overwrite"]):
        refused = run("web", grey, "-o", site, "--runtime", package, *more)
        assert refused.code == 2
        assert f"{site} exists and is not a site of ours; it is left alone" in refused.err
    refused = run("web", grey, "-o", grey, "--runtime", package, "--overwrite")
    assert refused.code == 2
    assert "is not a site of ours" in refused.err
    assert listing(site) == ["index.html"]
    assert (site / "index.html").read_text() == content


def test_a_bundle_that_is_none_or_damaged(run: Run, grey: Path, package: Path, tmp_path: Path) -> None:
    missing = run("web", tmp_path / "nowhere", "-o", tmp_path / "site", "--runtime", package)
    assert missing.code == 2
    assert "is not a bundle" in missing.err
    path = grey / "onnx" / "denoiser.onnx"
    path.write_bytes(b"x" * path.stat().st_size)
    damaged = run("web", grey, "-o", tmp_path / "site", "--runtime", package)
    assert damaged.code == 2
    assert "is damaged: its SHA-256 is not the manifest's" in damaged.err
    assert not (tmp_path / "site").exists()


def test_what_a_page_cannot_draw_is_refused_by_name(run: Run, grey: Path, package: Path, tmp_path: Path) -> None:
    manifest = Bundle.open(grey).manifest
    write_manifest(grey, msgspec.structs.replace(manifest, model=msgspec.structs.replace(manifest.model, schedule=LinearBeta())))
    latent = write_bundle(tmp_path / "latent").folder
    for bundle, message in (
        (grey, "tiny has the schedule linear_beta, which a page does not do: elastic-export serve BUNDLE draws it for a browser"),
        (latent, "draws 4-channel latents and it holds no decoder: export it again with --vae DIR"),
    ):
        refused = run("web", bundle, "-o", tmp_path / "site", "--runtime", package)
        assert refused.code == 2
        assert f"{bundle} cannot be drawn by a page: " in refused.err
        assert message in refused.err
        assert not (tmp_path / "site").exists()


def test_a_bundle_without_an_onnx_file_says_how_to_add_it(run: Run, package: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write_manifest(tmp_path / "empty", manifest(channels=1))
    refused = run("web", tmp_path / "empty", "-o", tmp_path / "site", "--runtime", package)
    assert refused.code == 2
    assert f"has no ONNX file of its denoiser: elastic-export onnx MODEL -o {tmp_path / 'empty'} adds it" in refused.err


@pytest.mark.parametrize(("precision", "message"), [("int8", "is none of int8"), ("int7", "there is no precision 'int7'")])
def test_a_precision_that_is_not_there(run: Run, grey: Path, package: Path, tmp_path: Path, precision: str, message: str) -> None:
    refused = run("web", grey, "-o", tmp_path / "site", "--runtime", package, "--precision", precision)
    assert refused.code == 2
    assert message in refused.err


def test_offline_says_what_to_do(run: Run, grey: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("npm_config_registry", "http://127.0.0.1:9")
    refused = run("web", grey, "-o", tmp_path / "site")
    assert refused.code == 3
    assert "http://127.0.0.1:9/onnxruntime-web/-/onnxruntime-web-1.30.0.tgz is not reached" in refused.err
    assert "npm pack onnxruntime-web@1.30.0 writes the archive to give as --runtime" in refused.err
    assert not (tmp_path / "site").exists()


@contextmanager
def answering(answer: bytes) -> Iterator[str]:
    """The address of a server that answers so to whatever it is asked, and then hangs up."""

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            self.rfile.readline()
            self.wfile.write(answer)

    with socketserver.TCPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join(30)


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"SSH-2.0-OpenSSH\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1000\r\nbroken off",
        b"HTTP/1.1 404 Not Found\r\n\r\n",
        None,
    ],
)
def test_a_registry_that_is_none_says_what_to_do(
    run: Run, grey: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: bytes | None
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with nullcontext("http://a b") if answer is None else answering(answer) as address:
        monkeypatch.setenv("npm_config_registry", address)
        refused = run("web", grey, "-o", tmp_path / "site")
    assert refused.code == 3
    assert f"{address}/onnxruntime-web/-/onnxruntime-web-1.30.0.tgz is not reached: " in refused.err
    assert "npm pack onnxruntime-web@1.30.0 writes the archive to give as --runtime" in refused.err


def test_an_archive_is_checked_before_it_is_kept(run: Run, grey: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = packed(tmp_path / "registry" / "onnxruntime-web" / "-" / f"onnxruntime-web-{library.VERSION}.tgz")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("npm_config_registry", (tmp_path / "registry").as_uri())
    refused = run("web", grey, "-o", tmp_path / "site")
    assert refused.code == 3
    assert "is not the onnxruntime-web that this was tested with: its integrity is sha512-" in refused.err
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr(library, "INTEGRITY", library._integrity(archive.read_bytes()))
    assert run("web", grey, "-o", tmp_path / "site").code == 0
    archive.unlink()
    assert run("web", grey, "-o", tmp_path / "again").code == 0, "the second is from the cache"
    (kept,) = (tmp_path / "cache").rglob("*.tgz")
    kept.write_bytes(kept.read_bytes()[:-1])
    assert run("web", grey, "-o", tmp_path / "third").code == 3, "a damaged cache is not used"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "is no npm package: --runtime takes the folder node_modules/onnxruntime-web"),
        (contents(name="onnxruntime-node"), "is the package onnxruntime-node"),
        (contents(version="1.2.3", without=("ort.webgpu.min.mjs",)), "onnxruntime-web 1.2.3, lacks dist/ort.webgpu.min.mjs"),
    ],
)
def test_a_package_that_does_not_do(run: Run, grey: Path, tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    folder = installed(tmp_path / "package", files)
    folder.mkdir(exist_ok=True)
    for package in (folder, packed(tmp_path / "package.tgz", files)):
        refused = run("web", grey, "-o", tmp_path / "site", "--runtime", package)
        assert refused.code == 2
        assert message in refused.err
    whole = packed(tmp_path / "whole.tgz", contents() | {"dist/ort.wasm.min.mjs": random.Random(0).randbytes(100_000)}).read_bytes()
    for at in (15, 50_000):
        (tmp_path / "damaged.tgz").write_bytes(whole[:at] + b"\xff" * 100 + whole[at + 100 :])
        assert "is no archive" in run("web", grey, "-o", tmp_path / "site", "--runtime", tmp_path / "damaged.tgz").err
    (tmp_path / "text.tgz").write_text("no archive")
    assert "is no archive" in run("web", grey, "-o", tmp_path / "site", "--runtime", tmp_path / "text.tgz").err
    assert "cannot read" in run("web", grey, "-o", tmp_path / "site", "--runtime", tmp_path / "nothing.tgz").err


def test_a_packed_archive_is_taken(run: Run, grey: Path, tmp_path: Path) -> None:
    done = run("web", grey, "-o", tmp_path / "site", "--runtime", packed(tmp_path / "ort.tgz"))
    assert done.code == 0, done.err
    assert "onnxruntime-web 1.30.0" in done.out
    assert "--port 8000" in done.out


def test_a_port_that_is_taken(run: Run, grey: Path, package: Path, tmp_path: Path) -> None:
    from elastic_web.server import listening

    with listening(tmp_path, 0) as server:
        refused = run("web", grey, "-o", tmp_path / "site", "--runtime", package, "--port", server.server_port)
    assert refused.code == 2
    assert "Choose another --port, or 0 for any that is free" in refused.err
