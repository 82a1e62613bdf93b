"""Which names a bundle's files may have, and which others they take."""

import itertools
from pathlib import Path, PurePosixPath

import msgspec
import pytest
from fakes import manifest
from hypothesis import given
from hypothesis import strategies as st

from elastic_runtime.contract.artifacts import Apart, CoremlArtifact, CoremlCall, FileEntry, Network, OnnxArtifact, TrtArtifact
from elastic_runtime.contract.axis import Span
from elastic_runtime.contract.bundle import inside
from elastic_runtime.files.names import apart, free, moving, records, renamed, variants

parts = st.text("abc.-1", min_size=1, max_size=5).filter(lambda part: part.strip("."))
names = st.lists(parts, min_size=1, max_size=3).map("/".join)


@given(names)
def test_plain_names_lie_inside_and_no_name_that_climbs_does(name: str) -> None:
    assert inside(name)
    for outside in (f"/{name}", f"../{name}", f"{name}/../../x", f"C:{name}", f"{name}\\x", f"{name}\0", f"//server/{name}"):
        assert not inside(outside)


@pytest.mark.parametrize("name", ["", ".", "./", "..", "/"])
def test_the_folder_itself_is_no_file_in_it(name: str) -> None:
    assert not inside(name)


@given(st.text(max_size=12))
def test_what_is_said_to_lie_inside_does(name: str) -> None:
    if inside(name):
        place = Path("/a/b", name)
        assert place.is_relative_to("/a/b")
        assert ".." not in place.parts
        assert place != Path("/a/b")


@given(names)
def test_variants_differ_and_leave_all_but_the_first_part_as_it_was(name: str) -> None:
    few = list(itertools.islice(variants(name), 5))
    assert few[0] == name
    assert len(set(few)) == 5
    assert all(inside(each) for each in few)
    assert len({PurePosixPath(each).parts[1:] for each in few}) == 1


def test_variants_are_numbered_once() -> None:
    assert list(itertools.islice(variants("onnx/denoiser.onnx"), 3)) == [
        "onnx/denoiser.onnx",
        "onnx-2/denoiser.onnx",
        "onnx-3/denoiser.onnx",
    ]
    assert list(itertools.islice(variants("reference.npz"), 2)) == ["reference.npz", "reference-2.npz"]
    assert list(itertools.islice(variants("onnx-2/x"), 2)) == ["onnx-2/x", "onnx-3/x"]


def test_a_slot_is_the_path_without_its_number() -> None:
    for path in ("onnx/denoiser.onnx", "onnx-2/denoiser.onnx", "onnx-13/denoiser.onnx"):
        assert onnx(path).slot == "onnx/denoiser.onnx"
    assert onnx("a-2.onnx").slot == "a-2.onnx"


def test_a_name_is_free_where_nothing_stands_and_no_link_leads_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "there", target_is_directory=True)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    assert free(tmp_path, "there/other")
    assert free(tmp_path, "new/deep/file")
    for name in ("there/file", "there", "link/other", "dangling", "there/file/below"):
        assert not free(tmp_path, name), name


def file(path: str, digest: str = "") -> FileEntry:
    return FileEntry(path=path, bytes=1, sha256=digest)


def onnx(*paths: str, digest: str = "") -> OnnxArtifact:
    return OnnxArtifact(precision="fp32", files=tuple(file(path, digest) for path in paths), toolchain={}, opset=23)


def engine(source: str, digest: str) -> TrtArtifact:
    return TrtArtifact(
        precision="fp32", files=(file("trt/e.engine"),), toolchain={}, builder="tensorrt", builder_version="10", sms=(89,), source=source,
        source_sha256=digest, profiles=(), network=Network(layers=1, attentions=0, loops=0),
    )  # fmt: skip


def test_everything_that_names_a_file_follows_it() -> None:
    package = CoremlArtifact(
        precision="fp16", files=(file("coreml/d.mlpackage/Data/x"), file("coreml/d.mlpackage/Manifest.json")), toolchain={},
        package="coreml/d.mlpackage", deployment_target="iOS18", shapes="range", batch=Span(1, 1),
        calls=(CoremlCall(function="main", budget={}, sizes={}),), reductions="fp32",
        conditions=Apart(
            path="coreml/d.mlpackage", inputs=("timestep",), outputs=(), gone=(), call=CoremlCall(function="c", budget={}, sizes={"B": 8}),
        ),
    )  # fmt: skip
    whole = manifest(artifacts=(onnx("onnx/d.onnx", "onnx/d.onnx.data", digest="1"), package, engine("onnx/d.onnx", "1")))
    whole = msgspec.structs.replace(whole, reference=file("reference.npz"))
    moves = {entry.path: next(itertools.islice(variants(entry.path), 1, None)) for entry in whole.files()}
    moved = renamed(whole, moves, {"onnx/d.onnx": "1"})
    assert sorted(entry.path for entry in moved.files()) == sorted(moves.values())
    graph, built, trt = moved.graphs["denoiser"].artifacts
    assert (graph.path, built.path, trt.path) == ("onnx-2/d.onnx", "coreml-2/d.mlpackage", "trt-2/e.engine")
    assert built.conditions
    assert built.conditions.path == built.path
    assert isinstance(trt, TrtArtifact)
    assert trt.source == "onnx-2/d.onnx"
    assert moved.reference is not None
    assert moved.reference.path == "reference-2.npz"
    assert renamed(whole, {}, {}) == whole


def test_an_engine_of_another_source_does_not_follow_the_new_one() -> None:
    whole = manifest(artifacts=(onnx("onnx/d.onnx", digest="new"), engine("onnx/d.onnx", "old")))
    _, trt = renamed(whole, {"onnx/d.onnx": "onnx-2/d.onnx"}, {"onnx/d.onnx": "new"}).graphs["denoiser"].artifacts
    assert isinstance(trt, TrtArtifact)
    assert trt.source == "onnx/d.onnx"


def test_files_of_an_artifact_and_of_those_that_share_one_move_together() -> None:
    whole = manifest(artifacts=(onnx("a/1", "a/data"), onnx("a/2", "a/data"), onnx("b/1")))
    whole = msgspec.structs.replace(whole, reference=file("reference.npz"))
    assert sorted(map(sorted, moving(whole))) == [["a/1", "a/2", "a/data"], ["b/1"], ["reference.npz"]]


@given(
    st.recursive(
        st.none() | st.integers() | st.text(max_size=3), lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=3), inner)
    )
)
def test_records_of_a_manifest_of_any_version_are_found_wherever_they_stand(around: object) -> None:
    record = {"path": "a/b", "bytes": 1, "sha256": "x", "later": True}
    outside = record | {"path": "../a"}
    assert list(records({"x": [around, {"y": record}], "z": outside})) == [FileEntry(path="a/b", bytes=1, sha256="x")]


@given(names, names)
def test_two_files_lie_apart_or_one_is_in_the_others_way(one: str, other: str) -> None:
    a, b = PurePosixPath("/", one), PurePosixPath("/", other)
    assert apart(one, [other]) == (a != b and a not in b.parents and b not in a.parents)
    assert apart(one, [])
