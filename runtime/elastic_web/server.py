"""Show a site on this machine, with the two headers by which a browser lets WebAssembly have threads."""

import contextlib
import logging
from collections.abc import Callable
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from elastic_runtime.errors import UsageError

# https://developer.mozilla.org/en-US/docs/Web/API/Window/crossOriginIsolated
HEADERS = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}
TYPES = {".js": "text/javascript", ".mjs": "text/javascript", ".wasm": "application/wasm"}
_log = logging.getLogger(__name__)


class Handler(SimpleHTTPRequestHandler):
    """Files of one folder."""

    # Whatever the machine's own tables say: a browser starts no script under another type.
    extensions_map = SimpleHTTPRequestHandler.extensions_map | TYPES

    def end_headers(self) -> None:
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def list_directory(self, path: Any) -> None:
        """No folder is listed."""
        self.send_error(404)

    def log_message(self, format: str, *arguments: Any) -> None:
        _log.debug(format, *arguments)


def listening(folder: Path, port: int) -> ThreadingHTTPServer:
    """A server of `folder` on this machine alone, to be run by `serve_forever`; port 0 is any that is free.

    Raises: UsageError where the port is taken.
    """
    try:
        return ThreadingHTTPServer(("127.0.0.1", port), partial(Handler, directory=str(folder)))
    except OSError as error:
        raise UsageError(f"cannot listen on port {port}: {error.strerror}. Choose another --port, or 0 for any that is free") from None


def serve(folder: Path, port: int, ready: Callable[[str], None]) -> None:
    """Serve until interrupted; `ready(address)` is called when it listens."""
    with listening(folder, port) as server:
        ready(f"http://localhost:{server.server_port}/")
        with contextlib.suppress(KeyboardInterrupt):  # which is how it ends
            server.serve_forever()
