"""Take the weights out of a bundle's ONNX files and put them back, byte for byte: a bundle of gigabytes travels as a few hundred kB.

    python hollow.py strip BUNDLE OUT       OUT: the bundle with .hollow files in place of the .onnx and .onnx.data files
    python hollow.py fill OUT               write the ONNX files again, from weights that are made anew; check their SHA-256

Weights come from a packaged sample, or from the seed of --random-weights (`ATEN_CPU_CAPABILITY=avx2` on both machines, or another
processor's vectors give other last bits). A hollow file is a line of JSON, its holes, and the bytes between them.
"""

import os

os.environ.setdefault("ATEN_CPU_CAPABILITY", "avx2")

import json
import mmap
import shutil
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from elastic_export.bench.original import request
from elastic_export.capture import zoo
from elastic_runtime.contract.agreement import decode
from elastic_runtime.contract.artifacts import OnnxArtifact
from elastic_runtime.contract.bundle import MANIFEST, Bundle, sha256
from elastic_runtime.contract.manifest import Manifest

LEAST = 4096  # bytes of a tensor that is worth a hole
ENDS = 64  # bytes at each end by which a tensor is looked up, before it is compared as a whole
PARTS = (1, 2, 3, 6)  # equal rows that a product may be split into, such as query, key and value
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


class Form(NamedTuple):
    """How a tensor of the model lies in a file: one of `parts` equal rows, transposed or not, in a precision."""

    name: str
    turned: bool
    precision: str
    part: int
    parts: int

    def octets(self, tensors: dict[str, Tensor]) -> memoryview:
        part = _part(tensors[self.name], self.part, self.parts)
        return _octets(part.t() if self.turned else part, self.precision)


Known = dict[tuple[int, bytes, bytes], Form]  # by size, first and last bytes


def weights(manifest: Manifest) -> dict[str, Tensor]:
    """Every tensor of the bundle's model, by name.

    Raises: ModelError where they are neither packaged nor random.
    """
    if manifest.model.patches is None:
        return dict(zoo.load(request(manifest)).module.state_dict())
    folder = zoo.locate(manifest.model.name)
    assert folder is not None, f"{manifest.model.name} is no packaged sample"
    return {
        f"{path.parent.name}/{name}": value for path in sorted(folder.glob("*/*.safetensors")) for name, value in load_file(path).items()
    }


def strip(source: Path, out: Path) -> None:
    bundle = Bundle.open(source)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    shutil.copy2(source / MANIFEST, out / MANIFEST)
    tensors = weights(bundle.manifest)
    artifacts = [one for graph in bundle.manifest.graphs.values() for one in graph.artifacts if isinstance(one, OnnxArtifact)]
    graphs = {file.path: artifact for artifact in artifacts for file in artifact.files}
    known = _known(tensors, [artifact.precision for artifact in artifacts])
    for file in bundle.manifest.files():
        target = out / file.path
        target.parent.mkdir(parents=True, exist_ok=True)
        if file.path not in graphs:
            shutil.copy2(bundle.file(file.path), target)
            continue
        holes, rest = _holes(bundle.file(file.path), bundle.file(graphs[file.path].path), tensors, known)
        target.with_name(target.name + ".hollow").write_bytes(json.dumps({"bytes": file.bytes, "holes": holes}).encode() + b"\n" + rest)
        print(f"{file.path}: {file.bytes / 1e6:.1f} MB, {len(holes)} holes, {len(rest) / 1e6:.2f} MB left", flush=True)


def fill(folder: Path) -> None:
    manifest = decode((folder / MANIFEST).read_bytes(), str(folder))
    digests = {file.path: file.sha256 for file in manifest.files()}
    tensors = weights(manifest)
    for hollow in sorted(folder.rglob("*.hollow")):
        target = hollow.with_suffix("")
        with hollow.open("rb") as stream, target.open("wb") as out:
            facts = json.loads(stream.readline())
            for at, *form in facts["holes"]:
                out.write(stream.read(at - out.tell()))
                out.write(Form(*form).octets(tensors))
            out.write(stream.read())
        path = target.relative_to(folder).as_posix()
        if sha256(target) != digests[path]:
            sys.exit(f"{target} came out with other bytes than the manifest's: the reference does not hold for them")
        print(f"{path}: {facts['bytes'] / 1e6:.1f} MB", flush=True)


def _known(tensors: dict[str, Tensor], precisions: list[str]) -> Known:
    known: Known = {}
    for precision in dict.fromkeys([*precisions, "fp32"]):
        for name, tensor in tensors.items():
            for parts in (parts for parts in PARTS if parts == 1 or (tensor.ndim and len(tensor) % parts == 0)):
                for part in range(parts):
                    for turned in (False, True) if tensor.ndim == 2 else (False,):
                        key = _ends(_part(tensor, part, parts), precision, turned)
                        if key[0] >= LEAST:
                            known.setdefault(key, Form(name, turned, precision, part, parts))
    return known


def _holes(path: Path, graph: Path, tensors: dict[str, Tensor], known: Known) -> tuple[list[list[Any]], bytes]:
    """Where known tensors lie in a file of the ONNX model `graph`, in order, and the bytes between them; each is compared as a whole."""
    holes: list[list[Any]] = []
    rest: list[bytes] = []
    end = 0
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for at, size in _places(path, graph, data):
            form = known.get((size, data[at : at + ENDS], data[at + size - ENDS : at + size])) if size >= LEAST else None
            if form and at >= end and data[at : at + size] == form.octets(tensors):
                rest.append(data[end:at])
                holes.append([at, *form])
                end = at + size
        rest.append(data[end:])
    return holes, b"".join(rest)


def _places(path: Path, graph: Path, data: mmap.mmap) -> list[tuple[int, int]]:
    """Position and size of each initializer of the graph in one of its files."""
    import onnx

    places: list[tuple[int, int]] = []
    for value in onnx.load(str(graph), load_external_data=False).graph.initializer:
        if value.data_location == onnx.TensorProto.EXTERNAL:
            facts = {entry.key: entry.value for entry in value.external_data}
            if path != graph and facts["location"] == path.name:
                places.append((int(facts["offset"]), int(facts["length"])))
        elif path == graph and len(value.raw_data) >= LEAST:
            places.append((data.find(value.raw_data, sum(places[-1]) if places else 0), len(value.raw_data)))
    return sorted(places)


def _part(tensor: Tensor, part: int, parts: int) -> Tensor:
    return tensor.chunk(parts)[part] if parts > 1 else tensor


def _cast(tensor: Tensor, precision: str) -> Tensor:
    return tensor.float().to(DTYPES.get(precision, torch.float32)) if tensor.is_floating_point() else tensor


def _octets(tensor: Tensor, precision: str) -> memoryview:
    return memoryview(_cast(tensor, precision).contiguous().reshape(-1).view(torch.uint8).numpy()).cast("B")


def _ends(tensor: Tensor, precision: str, turned: bool) -> tuple[int, bytes, bytes]:
    """Size of a tensor's bytes, the first of them and the last, without making a large one's."""
    width = _cast(tensor.reshape(-1)[:0], precision).element_size()
    count = ENDS // width
    if turned and len(tensor) >= count:
        first, last = tensor[:count, 0], tensor[-count:, -1]
    else:
        flat = (tensor.t() if turned else tensor).reshape(-1)
        first, last = flat[:count], flat[-count:]
    return tensor.numel() * width, bytes(_octets(first, precision)), bytes(_octets(last, precision))


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    match sys.argv[1:]:
        case ["strip", bundle, out]:
            strip(Path(bundle), Path(out))
        case ["fill", out]:
            fill(Path(out))
        case _:
            sys.exit(__doc__)
