"""The server of `--port`: one folder, this machine alone, and the headers that WebAssembly's threads need."""

import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from elastic_runtime import UsageError
from elastic_web.server import listening, serve


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    (tmp_path / "outside.txt").write_text("not the site's")
    site = tmp_path / "site"
    (site / "files").mkdir(parents=True)
    (site / "index.html").write_text("the page")
    for name in ("a.js", "a.mjs", "a.wasm"):
        (site / "files" / name).write_bytes(b"")
    with listening(site, 0) as server:
        thread = threading.Thread(target=server.serve_forever, name="site")
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join(30)


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/", "text/html"),
        ("/files/a.js", "text/javascript"),
        ("/files/a.mjs", "text/javascript"),
        ("/files/a.wasm", "application/wasm"),
    ],
)
def test_files_have_the_types_and_headers_that_browsers_ask_for(address: str, path: str, kind: str) -> None:
    with urllib.request.urlopen(address + path) as answer:
        assert answer.headers.get_content_type() == kind
        assert answer.headers["Cross-Origin-Opener-Policy"] == "same-origin"
        assert answer.headers["Cross-Origin-Embedder-Policy"] == "require-corp"


@pytest.mark.parametrize("path", ["/files/", "/../outside.txt", "/%2e%2e/outside.txt", "/nothing"])
def test_nothing_else_is_shown(address: str, path: str) -> None:
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(address + path)


def test_it_says_where_it_listens_and_what_to_do_where_it_cannot(tmp_path: Path) -> None:
    def interrupt(address: str) -> None:
        port = int(address.rstrip("/").rpartition(":")[2])
        with pytest.raises(UsageError, match=f"cannot listen on port {port}: .* or 0 for any that is free"):
            listening(tmp_path, port)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        serve(tmp_path, 0, interrupt)
