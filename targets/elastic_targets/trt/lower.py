"""Lower a bundle's ONNX artifact to TensorRT engines."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from elastic_runtime.contract.artifacts import FileEntry, Graph, Network, OnnxArtifact, Profile, TrtArtifact
from elastic_runtime.contract.axis import Span
from elastic_runtime.contract.budget import Budget
from elastic_runtime.contract.bundle import entry
from elastic_runtime.contract.manifest import Manifest
from elastic_runtime.contract.precision import EXACT, held
from elastic_runtime.contract.precision import PRECISIONS as TABLE
from elastic_runtime.errors import BudgetError, UsageError
from elastic_runtime.sessions import apart
from elastic_runtime.sessions.trt import built
from elastic_targets.capture import DENOISER, BundleGraph
from elastic_targets.target import OnProgress, Target
from elastic_targets.trt import cache
from elastic_targets.trt.builder import Builder, choose
from elastic_targets.trt.engine import Settings, build
from elastic_targets.trt.network import Parsed, parse
from elastic_targets.trt.profiles import narrow, profiles, read_buckets, unknown_buckets

PRECISIONS = tuple(name for name, row in TABLE.items() if "trt" in row.targets)
# Those that ONNX Runtime's own operators hold, and the standard form of as many bits.
STANDARD = {"int8": "int8qdq", "int8w": "int8qdq", "int4w": "int4qdq"}
_STEPS = 1000  # of each engine
FORM = 1  # of what this version asks of a builder besides; one more with each change of that, so that no engine of before is taken


@dataclass(frozen=True)
class TrtOptions:
    """What to build. Left empty: every generation that takes the precision, the bundle's spans, the default buckets.

    `buckets` are budgets by axis, or sizes by open dimension, or the text of them (see `profiles.read_buckets`); what they do not name
    gets one range. `precision` chooses among the bundle's ONNX artifacts. `strip` leaves the weights out of the engine (they are read from
    the ONNX file when it is opened); `version_compatible` engines open in later versions of the same TensorRT major. `conditions_apart`: a
    denoiser's ONNX artifact in two files, which become two engines.
    """

    builder: str = "auto"
    sms: tuple[int, ...] = ()
    precision: str | None = None
    spans: Mapping[str, Span] = field(default_factory=dict)
    batch: Span | None = None
    buckets: Mapping[str, tuple[int, ...]] | str | None = None
    refit: bool = False
    strip: bool = False
    weight_streaming: bool = False
    version_compatible: bool = False
    conditions_apart: bool = False


@dataclass(frozen=True)
class Part:
    """What becomes one engine: an ONNX file of the bundle with its `files`, what it takes and gives, and its profiles. `suffix` tells it
    from the other part in the engine's name."""

    graph: Graph
    path: str
    files: tuple[FileEntry, ...]
    profiles: tuple[Profile, ...]
    suffix: str = ""


@dataclass(frozen=True)
class Plan:
    """What `lower` will do for one graph: sources in order of preference, profiles, and the engines by their generations."""

    builder: Builder
    graph: BundleGraph
    sources: tuple[OnnxArtifact, ...]
    profiles: tuple[Profile, ...]
    engines: tuple[tuple[int, ...], ...]
    settings: Settings

    def paths(self, sms: tuple[int, ...]) -> tuple[str, ...]:
        """Where the engines for these generations lie in the bundle: the one that is opened, and that of its conditions."""
        return tuple(self.path(sms, part) for part in self.parts(self.sources[0]))

    def path(self, sms: tuple[int, ...], part: Part) -> str:
        """Where the engine of one part lies."""
        precision = "" if self.settings.precision == "fp32" else f".{self.settings.precision}"
        return f"trt/{self.graph.name}{precision}{part.suffix}.{_name(sms)}.{self.builder.name}-{self.builder.version}.engine"

    def parts(self, source: OnnxArtifact) -> tuple[Part, ...]:
        """What engines are built from a source: one, or two where its conditions are apart."""
        graph, own = self.graph.described, source.conditions
        if own is None:
            return (Part(graph, source.path, source.files, self.profiles),)
        mine, other = apart.halves(graph, source, own)
        alone = apart.conditions(graph, own)
        return (
            Part(apart.rest(graph, own), mine.path, mine.files, self.profiles, ".rest"),
            Part(alone, other.path, other.files, (apart.profile(alone),), ".conditions"),
        )


def available(options: TrtOptions) -> None:
    """Raise UsageError or MissingError unless a builder is here that builds for these generations in this precision, whatever the graph."""
    _check(options.precision)
    builder = choose(options.builder, options.sms)
    if options.precision:
        builder.engines(options.sms, options.precision)


def _check(precision: str | None) -> None:
    if precision is not None and precision not in PRECISIONS:
        advice = f": for TensorRT choose {STANDARD[precision]}" if precision in STANDARD else ""
        why = f"; {precision} is held by operators of ONNX Runtime's own{advice}" if advice else ""
        raise UsageError(f"--precision for trt must be one of {', '.join(PRECISIONS)}, got {precision}{why}")


def requires(graph: BundleGraph, options: TrtOptions) -> None:
    """Raise UsageError or MissingError unless the engines can be built as asked; reads no weights."""
    plan(graph, options)


def paths(graph: BundleGraph, options: TrtOptions) -> tuple[str, ...]:
    """Where the engines lie in the bundle."""
    chosen = plan(graph, options)
    return tuple(chosen.paths(sms)[0] for sms in chosen.engines)


def proves(graph: BundleGraph, options: TrtOptions) -> list[Budget]:
    """Budgets to verify besides those that the bundle has recorded: none, since without torch no others can be."""
    return []


def plan(graph: BundleGraph, options: TrtOptions) -> Plan:
    """Decide what to build for one graph of an open bundle.

    Raises: UsageError and its kinds for what the bundle or the builder does not offer; MissingError for an absent builder.
    """
    _check(options.precision)
    manifest = graph.bundle.manifest
    sources = _sources(graph, options.precision, options.conditions_apart and graph.name == DENOISER)
    builder = choose(options.builder, options.sms)
    if options.version_compatible and builder.name == "tensorrt_rtx":
        raise UsageError(
            "--version-compatible needs --builder tensorrt: tensorrt-rtx has no lean runtime, its engines belong to one version"
        )
    settings = Settings(
        precision=sources[0].precision,
        refit=options.refit,
        strip=options.strip,
        weight_streaming=options.weight_streaming,
        version_compatible=options.version_compatible,
    )
    engines = builder.engines(options.sms, settings.precision)
    return Plan(builder, graph, sources, _profiles(manifest, graph.name, options), engines, settings)


def fits(manifest: Manifest, options: TrtOptions) -> None:
    """Raise BudgetError for spans, a batch or buckets that a bundle of this manifest does not offer."""
    for name in manifest.graphs:
        _profiles(manifest, name, options)


def _profiles(manifest: Manifest, name: str, options: TrtOptions) -> tuple[Profile, ...]:
    """The profiles of a graph; raises BudgetError for what it does not offer."""
    axes = narrow(manifest.axes, options.spans)
    buckets = read_buckets(options.buckets, axes) if isinstance(options.buckets, str) else options.buckets
    if unknown := unknown_buckets(buckets or (), manifest.graphs.values(), axes):
        raise BudgetError(f"buckets are for axes that change a shape and for open dimensions; this bundle has no {', '.join(unknown)}")
    batch, offered = options.batch, manifest.graphs[name].batch
    if batch and name != DENOISER:  # guidance is none of theirs: a picture is decoded, and a prompt read, by itself
        batch = Span(offered.min, max(offered.min, min(batch.max, offered.max)))
    return profiles(manifest.graphs[name], axes, batch, buckets)


def estimate(plan: Plan) -> tuple[Network, float]:
    """What the parser makes of the graph, and seconds that building all its engines is likely to take where none is cached."""
    _, parsed = _parse(plan)
    seconds = sum(_estimate(plan, part, each) for part, each in parsed)
    return _together(each.facts for _, each in parsed), len(plan.engines) * seconds


def lower(graph: BundleGraph, options: TrtOptions, folder: Path, on_progress: OnProgress | None = None) -> tuple[TrtArtifact, ...]:
    """Build the engines of one graph into `folder` (the bundle to be) and return their manifest entries.

    Engines that were built before come from the user's cache. Whatever `on_progress` raises, or Ctrl-C, cancels the build.

    Raises: UsageError for a graph that the builder cannot read; MissingError and InferenceError as `engine.build`.
    """
    chosen = plan(graph, options)
    report = on_progress or (lambda stage, done, total: None)
    parsed: list[tuple[Part, Parsed]] = []
    source: OnnxArtifact | None = None
    made = []
    for i, sms in enumerate(chosen.engines):
        (folder / chosen.paths(sms)[0]).parent.mkdir(parents=True, exist_ok=True)
        if hit := _cached(chosen, sms, folder):
            made.append(_artifact(chosen, folder, *hit, sms))
            report(f"{graph.name} {_name(sms)} from the cache", (i + 1) * _STEPS, _STEPS * len(chosen.engines))
            continue
        if source is None:
            source, parsed = _parse(chosen)
        for j, (part, each) in enumerate(parsed):
            seconds = _estimate(chosen, part, each)
            stage = f"{graph.name}{part.suffix} {_name(sms)}, about {max(seconds, 1):.0f} s"

            def advance(done: float, stage: str = stage, before: float = i + j / len(parsed), share: float = 1 / len(parsed)) -> None:
                report(stage, int((before + done * share) * _STEPS), _STEPS * len(chosen.engines))

            _build(chosen, part, each, sms, folder, advance)
        made.append(_artifact(chosen, folder, source, _together(each.facts for _, each in parsed), sms))
    return tuple(made)


def ensures(graph: BundleGraph, artifact: TrtArtifact, folder: Path) -> None:
    """Check what was written: a file as recorded, profiles that serve every size the graph's narrowed dimensions have.

    What an engine computes needs its GPU: see `elastic-export verify`.

    Raises: RuntimeError, since a failure here is a fault of this library and not of the user.
    """
    dimensions, path = graph.described.dimensions, folder / artifact.path
    for file in artifact.files:
        if (written := (folder / file.path).stat().st_size) != file.bytes or not written:
            raise RuntimeError(f"{file.path} has {written} bytes, {file.bytes} were recorded")
    for profile in artifact.profiles:
        if set(profile.dimensions) != set(dimensions):
            raise RuntimeError(f"{path.name}: a profile has {sorted(profile.dimensions)}, the graph {sorted(dimensions)}")
        for name, size in profile.dimensions.items():
            if not dimensions[name].min <= size.min <= size.opt <= size.max <= dimensions[name].max:
                raise RuntimeError(f"{path.name}: profile {name} {size} lies outside {dimensions[name]}")


def _sources(graph: BundleGraph, precision: str | None, two: bool) -> tuple[OnnxArtifact, ...]:
    """ONNX artifacts to try, in `two` files or in one: of one precision, the newest opset first, since it says most about attention."""
    onnx = [artifact for artifact in graph.described.artifacts if isinstance(artifact, OnnxArtifact)]
    artifacts = [artifact for artifact in onnx if (artifact.conditions is not None) == two]
    folder, apart_too = graph.bundle.folder, " --conditions-apart" * two
    if not artifacts:
        other = f", or build {'without' if two else 'with'} --conditions-apart, as the one that is there is" * bool(onnx)
        raise UsageError(
            f"{folder} has no ONNX artifact of {graph.name!r} in {'two files' if two else 'one file'} to build from. "
            f"Add one with: elastic-export onnx MODEL{apart_too} -o {folder}{other}"
        )
    readable = sorted((artifact for artifact in artifacts if artifact.precision in PRECISIONS), key=lambda artifact: artifact.rank)
    precision = held(precision or (readable[0].precision if readable else EXACT), graph.name)
    if not (fitting := [artifact for artifact in artifacts if artifact.precision == precision]):
        have = ", ".join(sorted({artifact.precision for artifact in artifacts}))
        raise UsageError(
            f"{folder} has no {precision} ONNX artifact of {graph.name!r}{' in two files' * two}; it has {have}. "
            f"Add one with: elastic-export onnx MODEL --precision {precision}{apart_too} -o {folder}"
        )
    return tuple(sorted(fitting, key=lambda artifact: -artifact.opset))


def _parse(plan: Plan) -> tuple[OnnxArtifact, list[tuple[Part, Parsed]]]:
    """The first source that the builder can read, and its parts; raise what it said about the last where there is none."""
    for source in plan.sources:
        try:
            return source, [(part, parse(plan.builder, plan.graph.bundle.file(part.path), source.opset)) for part in plan.parts(source)]
        except UsageError:
            if source is plan.sources[-1]:
                raise
    raise AssertionError("a plan has a source")


def _together(networks: Iterable[Network]) -> Network:
    """What the parser made of all parts."""
    layers, attentions, loops = map(sum, zip(*((each.layers, each.attentions, each.loops) for each in networks), strict=True))
    return Network(layers=layers, attentions=attentions, loops=loops)


def _estimate(plan: Plan, part: Part, parsed: Parsed) -> float:
    return cache.estimate(str(plan.builder), parsed.facts.layers, len(part.profiles))


def _name(sms: tuple[int, ...]) -> str:
    return f"sm{'-'.join(map(str, sms))}"


def _key(plan: Plan, part: Part, sms: tuple[int, ...]) -> str:
    return cache.key(
        {
            "builder": plan.builder.name,
            "version": plan.builder.version,
            "graph": [file.sha256 for file in part.files],
            "profiles": msgspec.to_builtins(part.profiles),
            "sms": sms,
            "settings": plan.settings.__dict__,
            "form": FORM,
        }
    )


def _cached(plan: Plan, sms: tuple[int, ...], folder: Path) -> tuple[OnnxArtifact, Network] | None:
    for source in plan.sources:
        networks = [cache.fetch(_key(plan, part, sms), folder / plan.path(sms, part)) for part in plan.parts(source)]
        if None not in networks:
            return source, _together(each for each in networks if each)
    return None


def _build(plan: Plan, part: Part, parsed: Parsed, sms: tuple[int, ...], folder: Path, advance: Callable[[float], None]) -> None:
    """Build one engine, write it into `folder` and keep it in the cache."""
    timings = f"{plan.builder.name}-{plan.builder.version}-{_name(sms)}"
    advance(0.0)
    start = time.perf_counter()
    known = cache.load_timings(timings)
    engine, learned = build(plan.builder, parsed, part.graph, part.profiles, sms, plan.settings, known, advance)
    cache.learn(str(plan.builder), parsed.facts.layers, len(part.profiles), time.perf_counter() - start)
    cache.store_timings(timings, learned)
    target = folder / plan.path(sms, part)
    with target.open("wb") as stream:
        stream.write(memoryview(engine))
    cache.store(_key(plan, part, sms), target, parsed.facts)
    advance(1.0)


def _artifact(plan: Plan, folder: Path, source: OnnxArtifact, network: Network, sms: tuple[int, ...]) -> TrtArtifact:
    settings, engines = plan.settings, plan.paths(sms)
    files = tuple(entry(folder, folder / path) for path in engines)
    for file in files:
        built(file.sha256)
    return TrtArtifact(
        precision=source.precision,
        files=files,
        toolchain={plan.builder.name: plan.builder.version},
        conditions=msgspec.structs.replace(source.conditions, path=engines[1]) if source.conditions else None,
        builder=plan.builder.name,
        builder_version=plan.builder.version,
        sms=sms,
        source=source.path,
        source_sha256=source.files[0].sha256,
        profiles=plan.profiles,
        network=network,
        refit=settings.refit,
        stripped=settings.strip,
        weight_streaming=settings.weight_streaming,
        version_compatible=settings.version_compatible,
    )


TARGET = Target(
    name="trt",
    takes="onnx",
    options=TrtOptions,
    precisions=PRECISIONS,
    requires=requires,
    paths=paths,
    lower=lower,
    ensures=ensures,
    proves=proves,
    available=available,
    fits=fits,
)
