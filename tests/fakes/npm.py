"""A package as npm lays it out, in place of onnxruntime-web's forty megabytes where nothing runs it."""

import io
import json
import tarfile
from pathlib import Path

from elastic_web.library import FILES, NAME, VERSION


def contents(name: str = NAME, version: str = VERSION, without: tuple[str, ...] = ()) -> dict[str, bytes]:
    """Its files by their place in the package."""
    files = {f"dist/{each}": f"// {each}\n".encode() for each in FILES if each not in without}
    return {"package.json": json.dumps({"name": name, "version": version}).encode()} | files


def installed(folder: Path, files: dict[str, bytes] | None = None) -> Path:
    """The package as `npm install` leaves it."""
    for name, content in (contents() if files is None else files).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def packed(path: Path, files: dict[str, bytes] | None = None) -> Path:
    """The package as `npm pack` writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        for name, content in (contents() if files is None else files).items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path
