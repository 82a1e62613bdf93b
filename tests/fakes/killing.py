"""Run a write again and again, each time killed by SIGKILL at another moment, and say what was left: see test_kills.py.

usage: killing.py OLD WORK: OLD is a bundle, WORK an empty folder
"""

import contextlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fakes import manifest

from elastic_runtime.contract.artifacts import OnnxArtifact
from elastic_runtime.contract.bundle import Bundle, entry
from elastic_runtime.errors import BundleError
from elastic_runtime.files.folder import writing

# What a write asks of the system: between any two of these, nothing on the disk changes.
CALLS = ("open", "mkdir", "rename", "replace", "unlink", "rmdir", "fsync")


def replace(folder: Path) -> None:
    """Write a bundle of two files that replaces whatever bundle stands in `folder`."""
    with writing(folder, overwrite=True) as draft:
        artifacts = []
        for name in ("onnx/denoiser.onnx", "trt/new.onnx"):
            path = draft.stage / name
            path.parent.mkdir()
            path.write_bytes(b"new " + name.encode())
            artifacts.append(OnnxArtifact(precision="fp32", files=(entry(draft.stage, path),), toolchain={}, opset=23))
        draft.commit(manifest(artifacts=tuple(artifacts)))


def keep(folder: Path) -> None:
    """Any next write: one that changes nothing, and clears up."""
    with contextlib.suppress(BundleError), writing(folder) as draft:
        if draft.old:
            draft.commit(draft.old.manifest)


def killed(at: int, after: bool, folder: Path) -> bool:
    """Replace the bundle in a child that is killed before or after its call number `at`; False where it had fewer."""
    child = os.fork()
    if child == 0:
        count = 0

        def dying(call: Callable[..., Any]) -> Callable[..., Any]:
            def instead(*arguments: Any, **named: Any) -> Any:
                nonlocal count
                count += 1
                if count == at and not after:
                    os.kill(os.getpid(), signal.SIGKILL)
                result = call(*arguments, **named)
                if count == at and after:
                    os.kill(os.getpid(), signal.SIGKILL)
                return result

            return instead

        for name in CALLS:
            setattr(os, name, dying(getattr(os, name)))
        replace(folder)
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def state(folder: Path) -> list[str] | str:
    """The files of the bundle in `folder`, whole by their hashes, or what is wrong with it."""
    try:
        return sorted(file.path for file in Bundle.open(folder, hashes=True).manifest.files())
    except BundleError as error:
        return str(error)


def main(old: Path, work: Path) -> None:
    rows = []
    for there in (True, False):
        for after in (False, True):
            at, dies = 0, True
            while dies:
                at += 1
                folder = work / f"{there}-{after}-{at}"
                if there:
                    shutil.copytree(old, folder)
                dies = killed(at, after, folder)
                remains = state(folder)
                keep(folder)
                every = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*")) if folder.exists() else []
                rows.append({"there": there, "where": folder.name, "found": remains, "then": state(folder), "every": every})
    print(json.dumps(rows))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
