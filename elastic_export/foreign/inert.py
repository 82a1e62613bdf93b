"""PyTorch files read as inert data: objects of unknown classes become their fields, and nothing of theirs is imported or run."""

import argparse
import pathlib
import pickle
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from elastic_runtime.errors import ModelError

MOST = 200  # classes in one file


class Inert:
    """An object of a class that is not here; its fields are its attributes, its class's full name is `kind`."""

    kind = ""

    def __new__(cls, *args: object) -> "Inert":
        if args:  # it is called, as a function would be
            raise pickle.UnpicklingError(f"GLOBAL {cls.kind} is called")
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        if isinstance(state, dict):
            self.__dict__.update({str(name): value for name, value in state.items()})


def load(path: Path) -> Any:
    """The content of a file that `torch.save` wrote, zipped or not.

    Plain objects (a trainer's dataclasses) come as `Inert`, numpy's numbers and arrays as such, paths as text.

    Raises: ModelError for a file that is unreadable, or whose pickle calls functions, naming the first.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says of foreign pickles, before refusing them, that they may not be supported
        try:
            return _load(path, dict(_KNOWN))
        except pickle.UnpicklingError as error:
            blocked = _blocked(error)
            if not blocked and not _starts(path, b"PK", b"\x80"):  # no pickle at all: a web page, a pointer to a file, half a header
                raise ModelError(f"{path} is not a readable PyTorch checkpoint: download or copy it again") from None
            what = f"{blocked}, which could run code" if blocked else "objects other than weights"
            raise ModelError(f"{path} was refused: it holds {what}. Ask its author for .safetensors, or save only tensors.") from None
        except Exception as error:  # whatever a reader raises of bytes that are no pickle
            why = (str(error) or "it ends too early").splitlines()[0]
            raise ModelError(f"{path} is not a readable PyTorch checkpoint ({why}): download or copy it again") from None


def _load(path: Path, known: dict[str, Any]) -> Any:
    """Read on, with an empty class in place of each that the reader stops at."""
    while True:
        try:
            with torch.serialization.safe_globals([argparse.Namespace, *((value, name) for name, value in known.items())]):
                return torch.load(path, map_location="cpu", weights_only=True, mmap=_starts(path, b"PK"))
        except pickle.UnpicklingError as error:
            name = _blocked(error)
            if name is None or name in known or len(known) == MOST or name.partition(".")[0] in ("builtins", "__builtin__"):
                raise
            known[name] = type(name.rpartition(".")[2], (Inert,), {"kind": name})


def _blocked(error: Exception) -> str | None:
    """The full name that a reader stopped at."""
    at = re.search(r"GLOBAL ([\w.]+)", str(error))
    return at[1] if at else None


def fields(value: Any) -> Any:
    """`value` with plain dicts in place of inert objects and namespaces, however deep; what is no data is left out."""
    if isinstance(value, Inert | argparse.Namespace):
        value = vars(value)
    if isinstance(value, Mapping):
        return {str(name): fields(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [fields(each) for each in value]
    return value if isinstance(value, bool | int | float | str | Tensor | np.ndarray | None) else str(value)


def _starts(path: Path, *marks: bytes) -> bool:
    with path.open("rb") as stream:
        return stream.read(2).startswith(marks)


def _path(*parts: object) -> str:
    return str(pathlib.PurePosixPath(*(part for part in parts if isinstance(part, str))))


class _Type:
    """A numpy type of numbers; others hold nothing that is needed here."""

    def __init__(self, name: object = "", *_: object):
        try:
            self.type = np.dtype(name if isinstance(name, str) else "V1")
        except TypeError:
            self.type = np.dtype("V1")

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">"):
            self.type = self.type.newbyteorder(state[1])


def _scalar(kind: object, content: object = b"") -> Any:
    """A numpy number of its bytes; None for what is no number."""
    if not isinstance(kind, _Type) or not isinstance(content, bytes) or kind.type.kind not in "biuf" or len(content) != kind.type.itemsize:
        return None
    return np.frombuffer(content, kind.type)[0].item()


class _Array:
    """An array or a generator of numpy's, whose values are not needed."""

    def __init__(self, *_: object):
        pass

    def __setstate__(self, state: object) -> None:
        pass


_PATHS = ("Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
_KNOWN: dict[str, Callable[..., Any]] = {
    **{f"{module}.{name}": _path for module in ("pathlib", "pathlib._local") for name in _PATHS},
    **{f"numpy.{core}.multiarray.scalar": _scalar for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray._reconstruct": _Array for core in ("core", "_core")},
    **{f"numpy.random._pickle.__{kind}_ctor": _Array for kind in ("bit_generator", "randomstate", "generator")},
    "numpy.ndarray": _Array,
    "numpy.dtype": _Type,
}
