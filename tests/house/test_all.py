"""`__all__` says what a package offers: sorted, complete, and true."""

import importlib
import importlib.util
import inspect
import pkgutil
from pathlib import Path
from types import ModuleType

import pytest

import elastic_runtime

LAZY = ["elastic_runtime", "elastic_export"]  # doors: what they offer is loaded when it is asked for
EAGER = ["elastic_runtime.device", "elastic_targets", "elastic_targets.onnx", "elastic_targets.coreml", "elastic_targets.trt"]


def module(name: str) -> ModuleType:
    if name in ("elastic_targets.onnx", "elastic_targets.coreml", "elastic_export"):
        pytest.importorskip("torch", reason="a room imports its compiler")
        pytest.importorskip("onnxscript", reason="a room imports its compiler")
    if name == "elastic_targets.coreml":
        pytest.importorskip("coremltools", reason="a room imports its compiler")
    return importlib.import_module(name)


def test_every_package_that_says_what_it_offers_is_among_these() -> None:
    import elastic_targets

    roots = [("elastic_runtime", elastic_runtime.__path__), ("elastic_targets", elastic_targets.__path__)]
    for root, path in roots:
        for info in pkgutil.iter_modules(path, f"{root}."):
            source = importlib.util.find_spec(info.name)
            if info.ispkg and source and source.origin and "\n__all__" in Path(source.origin).read_text():
                assert info.name in EAGER


@pytest.mark.parametrize("name", LAZY)
def test_a_door_lists_what_it_offers_and_loads_it_when_asked(name: str) -> None:
    door = module(name)
    assert dir(door) == list(door.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = door.nothing


@pytest.mark.parametrize("name", [*LAZY, *EAGER])
def test_names_are_sorted_unique_and_exist(name: str) -> None:
    names = module(name).__all__
    assert list(names) == sorted(set(names))
    assert [each for each in names if not hasattr(module(name), each)] == []


@pytest.mark.parametrize("name", EAGER)
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
