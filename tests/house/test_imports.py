"""No module imports itself by way of others: not even for its types, and in the runtime not room by room."""

from collections.abc import Iterable, Mapping

import pytest

PACKAGES = ("elastic_runtime", "elastic_bench", "elastic_serve", "elastic_web", "elastic_targets", "elastic_export")

Imports = Mapping[str, Iterable[str]]


def circle(imports: Imports) -> list[str]:
    """Some circle in a graph of who imports whom, or nothing."""
    done: set[str] = set()

    def follow(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for other in sorted(imports.get(name, ())):
            if loop := follow(other, [*path, name]):
                return loop
        done.add(name)
        return []

    return next(filter(None, (follow(name, []) for name in sorted(imports))), [])


def modules(package: str) -> dict[str, set[str]]:
    grimp = pytest.importorskip("grimp", reason="the graph of imports is read by grimp, which import-linter brings")
    graph = grimp.build_graph(package, exclude_type_checking_imports=False, cache_dir=None)
    return {name: set(graph.find_modules_directly_imported_by(name)) for name in graph.modules}


def rooms(package: str) -> dict[str, set[str]]:
    """Who imports whom, a folder or a module of the top taken as one; the door itself, which knows every room, left out."""
    graph: dict[str, set[str]] = {}
    for name, others in modules(package).items():
        if name != package:
            room = name.split(".")[1]
            graph.setdefault(room, set()).update({other.split(".")[1] for other in others if other != package} - {room})
    return graph


@pytest.mark.parametrize("package", PACKAGES)
def test_no_module_imports_itself_by_way_of_others(package: str) -> None:
    assert circle(modules(package)) == []


def test_rooms_of_the_runtime_know_each_other_one_way() -> None:
    assert circle(rooms("elastic_runtime")) == []


def test_a_circle_is_found() -> None:
    assert circle({"a": ["b"], "b": ["c"], "c": ["b"]}) == ["b", "c", "b"]
    assert circle({"a": ["b", "c"], "b": ["c"], "c": []}) == []
