"""onnxruntime-web, whose files a site holds: from npm's registry, kept in the cache, or from a package that is here already."""

import base64
import contextlib
import gzip
import hashlib
import http.client
import io
import json
import os
import tarfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from elastic_runtime.errors import MissingError, UsageError
from elastic_runtime.files import atomic, cache

NAME, VERSION = "onnxruntime-web", "1.30.0"
INTEGRITY = "sha512-q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="  # as npm has it
REGISTRY = "https://registry.npmjs.org"
TIMEOUT = 60.0  # seconds without a byte
MOST = 100_000_000  # bytes of a package: it has a third of that
# The page opens the first where it computes on the CPU, the second on a GPU; the others are what these two load.
FILES = (
    "ort.wasm.min.mjs",
    "ort-wasm-simd-threaded.mjs",
    "ort-wasm-simd-threaded.wasm",
    "ort.webgpu.min.mjs",
    "ort-wasm-simd-threaded.asyncify.mjs",
    "ort-wasm-simd-threaded.asyncify.wasm",
)
# The package names its licence and does not hold it.
LICENSE = """MIT License

Copyright (c) Microsoft Corporation

Permission is hereby granted, free of charge, to any person obtaining a copy
of this software and associated documentation files (the "Software"), to deal
in the Software without restriction, including without limitation the rights
to use, copy, modify, merge, publish, distribute, sublicense, and/or sell
copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all
copies or substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER
LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE
SOFTWARE.
"""


@dataclass(frozen=True)
class Library:
    """The files of one version of onnxruntime-web, by name."""

    version: str
    files: dict[str, bytes]


def library(package: Path | None = None) -> Library:
    """onnxruntime-web from `package`, npm's folder or archive of it, or else of the version that this was tested with.

    That one is asked of npm's registry (or of `npm_config_registry`) once, and its SHA-512 is checked each time it is read.

    Raises: MissingError where the registry is not reached; UsageError for a `package` that is none.
    """
    if package is None:
        return _archived(_fetched(), f"{NAME} {VERSION}")
    if package.is_dir():
        return _installed(package)
    try:
        content = package.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {package}: {error.strerror}. --runtime takes {_kinds()}") from None
    return _archived(content, str(package))


def _fetched() -> bytes:
    """The archive of the package, checked."""
    path = cache.folder(NAME) / f"{NAME}-{VERSION}.tgz"
    with contextlib.suppress(OSError):
        content = path.read_bytes()
        if _integrity(content) == INTEGRITY:
            return content
    address = f"{_registry()}/{NAME}/-/{NAME}-{VERSION}.tgz"
    try:
        with urllib.request.urlopen(address, timeout=TIMEOUT) as answer:
            content = answer.read(MOST)
    except (OSError, ValueError, http.client.HTTPException) as error:  # of the net, of TLS, of what answered, or an address that is none
        why = getattr(error, "reason", None) or str(error) or type(error).__name__
        raise MissingError(
            f"{NAME} {VERSION} is not here, and {address} is not reached: {why}. On a machine with a network, npm pack {NAME}@{VERSION} "
            f"writes the archive to give as --runtime"
        ) from None
    if (got := _integrity(content)) != INTEGRITY:
        raise MissingError(f"{address} is not the {NAME} that this was tested with: its integrity is {got}, not {INTEGRITY}")
    with contextlib.suppress(OSError):  # a cache that cannot be written costs a second download
        atomic.write(path, content)
    return content


def _registry() -> str:
    """npm's registry, or the one that npm itself would ask by its environment, in whichever case that is written."""
    named = (value for name, value in os.environ.items() if name.lower() == "npm_config_registry" and value)
    return next(named, REGISTRY).rstrip("/")


def _integrity(content: bytes) -> str:
    return f"sha512-{base64.b64encode(hashlib.sha512(content).digest()).decode()}"


def _archived(content: bytes, where: str) -> Library:
    wanted = {f"package/{name}" for name in ("package.json", *(f"dist/{name}" for name in FILES))}
    files: dict[str, bytes] = {}
    try:
        with gzip.open(io.BytesIO(content)) as unpacked, tarfile.open(fileobj=unpacked, mode="r:") as archive:
            for member in _members(archive):
                if member.name in wanted and (stream := archive.extractfile(member)):
                    files[member.name.removeprefix("package/")] = stream.read()
            while unpacked.read(1 << 20):  # to the end, where its checksum is
                pass
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise UsageError(f"{where} is no archive: {error}. --runtime takes {_kinds()}") from None
    return _checked(files, where)


def _members(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    for member in archive:
        if member.isfile() and member.size <= MOST:
            yield member


def _installed(package: Path) -> Library:
    files = {}
    for name in ("package.json", *(f"dist/{name}" for name in FILES)):
        try:
            files[name] = (package / name).read_bytes()
        except OSError:
            continue
    return _checked(files, str(package))


def _checked(files: dict[str, bytes], where: str) -> Library:
    """The library of files under their names in the package; UsageError where it is another or lacks some."""
    try:
        facts = json.loads(files.pop("package.json"))
        name, version = facts["name"], str(facts["version"])
    except (KeyError, TypeError, ValueError):
        name, version = None, ""
    if name != NAME:
        raise UsageError(f"{where} is {f'the package {name}' if name else 'no npm package'}: --runtime takes {_kinds()}")
    if lacking := [each for each in FILES if f"dist/{each}" not in files]:
        raise UsageError(f"{where}, {NAME} {version}, lacks dist/{', dist/'.join(lacking)}: take {NAME}@{VERSION}")
    return Library(version, {each: files[f"dist/{each}"] for each in FILES})


def _kinds() -> str:
    return f"the folder node_modules/{NAME}, or the archive that npm pack {NAME}@{VERSION} writes"
