"""`__all__` says what a package offers: sorted, complete, and true."""

import importlib
import inspect
import pkgutil
from types import ModuleType

import pytest

import elastic_runtime

PUBLIC = ["elastic_runtime", "elastic_targets.onnx"]


def module(name: str) -> ModuleType:
    if name.startswith("elastic_targets."):
        pytest.importorskip("torch", reason="a room imports its compiler")
        pytest.importorskip("onnxscript", reason="a room imports its compiler")
    return importlib.import_module(name)


@pytest.mark.parametrize("name", PUBLIC)
def test_names_are_sorted_unique_and_exist(name: str) -> None:
    names = module(name).__all__
    assert list(names) == sorted(set(names))
    assert [each for each in names if not hasattr(module(name), each)] == []


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_listed(name: str) -> None:
    room = module(name)
    public = {each for each, value in vars(room).items() if not each.startswith("_") and not inspect.ismodule(value)}
    assert public == set(room.__all__)


def test_every_error_is_public_and_has_an_exit_code() -> None:
    from elastic_runtime import errors

    kinds = {name: kind for name, kind in vars(errors).items() if inspect.isclass(kind)}
    assert kinds.keys() <= set(elastic_runtime.__all__)
    assert all(issubclass(kind, errors.ElasticError) and kind.exit_code in (1, 2, 3, 4) for kind in kinds.values())
    assert all(name in (errors.__doc__ or "") for name in kinds), "the tree is drawn in the docstring"


def test_public_things_are_explained() -> None:
    for name in elastic_runtime.__all__:
        assert (getattr(elastic_runtime, name).__doc__ or "").strip(), name


def test_every_module_of_the_runtime_is_explained() -> None:
    for info in pkgutil.walk_packages(elastic_runtime.__path__, "elastic_runtime."):
        assert (importlib.import_module(info.name).__doc__ or "").strip(), info.name
