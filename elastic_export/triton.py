"""A Triton Inference Server model repository from a bundle: a model for each graph and artifact that Triton's backends open.

Written after the documentation of Triton's model configuration; names, types and shapes are the manifest's. The dimensions of a batch are
part of each shape (`max_batch_size: 0`), since the budget's input has none: Triton itself could not put requests with different budgets
together.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from elastic_runtime.contract.artifacts import Artifact, Graph, OnnxArtifact, TensorSpec, TrtArtifact
from elastic_runtime.contract.axis import Axis
from elastic_runtime.contract.budget import Budget, key
from elastic_runtime.contract.bundle import Bundle
from elastic_runtime.contract.precision import PRECISIONS
from elastic_runtime.errors import MissingError, UsageError
from elastic_runtime.files import placing

CONFIG = "config.pbtxt"
VERSION = "1"
MARK = "written by elastic-export triton"
TYPES = {"float32": "TYPE_FP32", "int64": "TYPE_INT64"}
BACKENDS = {"onnx": "onnxruntime_onnx", "trt": "tensorrt_plan"}
ROWS = 12  # budgets that the README lists
STRANGE = re.compile(r"[^A-Za-z0-9_.-]+")  # letters that no model's name should have


@dataclass(frozen=True)
class TritonModel:
    """One model of the repository: a graph of the bundle in one of its artifacts."""

    name: str
    graph: str
    spec: Graph
    artifact: OnnxArtifact | TrtArtifact

    @property
    def files(self) -> dict[str, str]:
        """Files of the version's folder, by their path in the bundle; weights keep the name by which the graph knows them."""
        base = PurePosixPath(self.artifact.path).parent
        return {each.path: PurePosixPath(each.path).relative_to(base).as_posix() for each in self.artifact.files}

    def config(self, instances: int = 1) -> str:
        """The text of its `config.pbtxt`."""
        kind = "KIND_GPU" if isinstance(self.artifact, TrtArtifact) else "KIND_AUTO"
        profiles = [f'"{number}"' for number in range(len(self.artifact.profiles))] if isinstance(self.artifact, TrtArtifact) else []
        group = f"  count: {instances}\n  kind: {kind}\n" + (f"  profile: [ {', '.join(profiles)} ]\n" if profiles else "")
        listed = "".join(f"# file {VERSION}/{name}\n" for name in sorted(self.files.values()))
        parts = [
            f"# {MARK}\n{listed}name: {_quoted(self.name)}",
            f'platform: "{BACKENDS[self.artifact.target]}"',
            f"default_model_filename: {_quoted(self.files[self.artifact.path])}",
            "max_batch_size: 0",
            *(_tensor("input", each) for each in self.spec.inputs),
            *(_tensor("output", each) for each in self.spec.outputs),
            f"instance_group {{\n{group}}}",
        ]
        return "\n".join(parts) + "\n"


@dataclass(frozen=True)
class Repository:
    """What was written: models, the file that tells how to use them, and why some artifacts are not among them."""

    folder: Path
    models: tuple[TritonModel, ...]
    readme: Path
    left_out: tuple[str, ...]


def models(bundle: Bundle) -> tuple[tuple[TritonModel, ...], tuple[str, ...]]:
    """The models that a bundle makes, and why other artifacts make none."""
    stem = _stem(bundle)
    made, left, names = list[TritonModel](), list[str](), Counter[str]()
    for graph, spec in bundle.manifest.graphs.items():
        for artifact in spec.artifacts:
            why = _obstacle(artifact)
            if why or not isinstance(artifact, OnnxArtifact | TrtArtifact):
                left.append(f"{artifact.path}: {why}")
                continue
            name = f"{stem}-{graph}-{artifact.target}-{artifact.precision}"
            names[name] += 1
            made.append(TritonModel(name if names[name] == 1 else f"{name}-{names[name]}", graph, spec, artifact))
    return tuple(made), tuple(left)


def write(bundle: Bundle, folder: Path, overwrite: bool = False, instances: int = 1) -> Repository:
    """Write a bundle's models into a Triton model repository, beside others that it may hold.

    A bundle's files get a second name there where the disk allows it, so that they take no room.

    Raises: MissingError for a bundle without an artifact that Triton opens; as `placing.placing`.
    """
    if instances < 1:
        raise UsageError(f"instances of a model are 1 or more, got {instances}")
    made, left = models(bundle)
    if not made:
        raise MissingError(f"{bundle.folder} has nothing that Triton opens: {'; '.join(left)}. Export it with elastic-export onnx")
    stem = _stem(bundle)
    readme = f"README-{stem}.md"
    places = {model.name: _ours for model in made} | {readme: _our_text}
    with placing.placing(folder, places, overwrite) as placed:
        for model in made:
            for entry in model.artifact.files:
                target = placed.stage / model.name / VERSION / model.files[entry.path]
                target.parent.mkdir(parents=True, exist_ok=True)
                placing.link(bundle, entry, target)
            (placed.stage / model.name / CONFIG).write_text(model.config(instances), encoding="utf-8")
        (placed.stage / readme).write_text(_readme(bundle, made, left), encoding="utf-8")
        placed.commit()
    return Repository(folder, made, folder / readme, left)


def _stem(bundle: Bundle) -> str:
    return STRANGE.sub("-", bundle.name).strip("-.") or "bundle"


def _obstacle(artifact: Artifact) -> str | None:
    """Why Triton does not open an artifact."""
    if artifact.conditions:
        return "in two files, and a model of Triton's is one: export it without --conditions-apart"
    if isinstance(artifact, OnnxArtifact):
        runs = "ort" in PRECISIONS[artifact.precision].backends
        return (
            None
            if runs
            else f"of a precision that ONNX Runtime has no kernels for, {artifact.precision}: elastic-export trt builds an engine of it"
        )
    if not isinstance(artifact, TrtArtifact):
        return f"Triton has no backend for {artifact.target}"
    if artifact.builder != "tensorrt":
        return "an engine of TensorRT-RTX, which Triton's backend does not open: build it with --builder tensorrt"
    if artifact.stripped:
        return "an engine without its weights, which Triton's backend does not put in: build it without --strip"
    return None


def _tensor(kind: str, spec: TensorSpec) -> str:
    # A tensor without dimensions has one in the protocol, and loses it before the backend.
    dims = ", ".join(str(size if isinstance(size, int) else -1) for size in spec.shape) or "1"
    reshape = "" if spec.shape else "  reshape { shape: [ ] }\n"
    return f"{kind} {{\n  name: {_quoted(spec.name)}\n  data_type: {TYPES[spec.dtype]}\n  dims: [ {dims} ]\n{reshape}}}"


def _quoted(text: str) -> str:
    """A string of protobuf's text form."""
    return '"' + "".join(f"\\{byte:03o}" if byte < 32 or byte > 126 or byte in b'"\\' else chr(byte) for byte in text.encode()) + '"'


def _ours(path: Path) -> bool:
    """Whether a model's folder holds what its configuration, written here, lists, and nothing beside it."""
    try:
        lines = (path / CONFIG).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return False
    listed = {line.removeprefix("# file ") for line in lines if line.startswith("# file ")} | {CONFIG}
    present = {each.relative_to(path).as_posix() for each in path.rglob("*") if not each.is_dir() or each.is_symlink()}
    return bool(lines) and lines[0] == f"# {MARK}" and present <= listed


def _our_text(path: Path) -> bool:
    try:
        with path.open(encoding="utf-8") as text:
            return text.readline() == f"<!-- {MARK} -->\n"
    except (OSError, UnicodeDecodeError):
        return False


def _readme(bundle: Bundle, made: Sequence[TritonModel], left: Sequence[str]) -> str:
    name = bundle.name
    denoiser = next((each.name for each in made if each.graph == "denoiser"), made[0].name)
    lean = any(isinstance(each.artifact, TrtArtifact) and each.artifact.version_compatible for each in made)
    option = " --backend-config=tensorrt,version-compatible=true" if lean else ""  # else it does not load such engines
    parts = [
        f"<!-- {MARK} -->",
        f"# {name} in Triton Inference Server\n",
        '```sh\ndocker run --rm --gpus all -p 8000:8000 -p 8001:8001 -v "$PWD:/models" nvcr.io/nvidia/tritonserver:YY.MM-py3 \\\n'
        f"    tritonserver --model-repository=/models --strict-readiness=true{option}\n"
        f"curl localhost:8000/v2/models/{denoiser}/config\n```\n",
        "Run it in this folder. `YY.MM` is a release whose ONNX Runtime reads the opset below, and whose TensorRT is the one that built "
        "the engines, if there are any. Without a GPU leave `--gpus all` out."
        f"{' Version-compatible engines bring native code, which the server runs: trust who built them.' if lean else ''}\n",
        "| model | graph | opens with |\n|---|---|---|",
        *(f"| `{each.name}` | {each.graph} | {_needs(each)} |" for each in made),
        *(f"\nLeft out: {why}." for why in left),
        "\n## The budget\n",
        *_budgets(bundle),
        "\n## Inputs and outputs\n",
        *_tables(made),
        "\nA run is one step of the denoiser; the loop over the steps is the client's, and `docs/triton.md` of elastic-export has one. "
        "A batch is the dimension `B`. Triton does not put requests together (`max_batch_size: 0`): the budget's input has no batch.",
    ]
    return "\n".join(parts) + "\n"


def _needs(model: TritonModel) -> str:
    artifact = model.artifact
    if isinstance(artifact, OnnxArtifact):
        return f"ONNX Runtime, opset {artifact.opset}"
    sms = ", ".join(f"{sm // 10}.{sm % 10}" for sm in artifact.sms)
    return f"TensorRT {artifact.builder_version}, GPUs of compute capability {sms or 'as the builder had'}"


def _budgets(bundle: Bundle) -> Iterator[str]:
    """How each axis travels, and what it is at each budget."""
    manifest = bundle.manifest
    if not manifest.axes:
        yield "This model has no axis: every run costs the same."
    for axis in manifest.axes:
        how = {
            "length": f"the length of `{axis.input}`, an array of whole numbers that count up from 0: {axis.unit} of `{axis.name}` each",
            "value": f"the value of `{axis.input}`, sent with shape [1]",
            "shape": f"the dimension `{axis.dimension}` of `{axis.input}` and of what goes with it",
        }[axis.carrier]
        yield f"`{axis.name}`, {axis.span} in steps of {axis.step}: {how}.\n"
        yield f"| {axis.name} | send | FLOPs |\n|---:|---|---:|"
        flops = {key(row.budget): row.flops for row in manifest.cost}
        for value in _thinned(axis):
            cost = flops.get(key(Budget(**{axis.name: value})))
            yield f"| {value} | {_sent(axis, value)} | {'' if cost is None else f'{cost:.3g}'} |"
        yield ""


def _thinned(axis: Axis) -> list[int]:
    return list(axis.values) if len(axis.values) <= ROWS else axis.doublings()


def _sent(axis: Axis, value: int) -> str:
    if axis.carrier == "value":
        return f"`{axis.input} = [{value}]`"
    if axis.carrier == "shape":
        return f"`{axis.dimension} = {value}`"
    return f"`{axis.input} = arange({value // axis.unit})`"


def _tables(made: Sequence[TritonModel]) -> Iterator[str]:
    seen = set[str]()
    for model in made:
        if model.graph in seen:
            continue
        seen.add(model.graph)
        spans = ", ".join(f"`{name}` {span}" for name, span in model.spec.dimensions.items())
        yield f"{model.graph}, where {spans}:\n\n| | name | type | shape |\n|---|---|---|---|"
        for kind, specs in (("in", model.spec.inputs), ("out", model.spec.outputs)):
            for each in specs:
                shape = ", ".join(map(str, each.shape)) or "1"
                yield f"| {kind} | `{each.name}` | {TYPES[each.dtype].removeprefix('TYPE_')} | [{shape}] |"
        yield ""
