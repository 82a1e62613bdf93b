"""A few seconds of measuring that correct the cost model, kept in the user's cache, and the choice between several
artifacts.

A calibration belongs to one artifact, backend, version, device, power mode and set of session options: change any of
them and another one is made. A damaged file is made again, and the log says so.
"""

import datetime
import hashlib
import itertools
import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec
import numpy as np

from elastic_runtime.choosing.cost import Costs, Point, Rates
from elastic_runtime.contract.axis import Axis
from elastic_runtime.contract.budget import Budget
from elastic_runtime.contract.bundle import Bundle
from elastic_runtime.contract.manifest import Manifest, Model
from elastic_runtime.contract.precision import EXACT
from elastic_runtime.contract.schedule import CosineMask
from elastic_runtime.denoising.evaluator import evaluator
from elastic_runtime.device import Clock, Device, peak, peak_bytes
from elastic_runtime.errors import ElasticError, InferenceError
from elastic_runtime.files import atomic, cache
from elastic_runtime.ralu.plan import PRESETS
from elastic_runtime.sessions.opening import candidates, open_origin
from elastic_runtime.sessions.session import Origin, Session

VERSION = 1
SECONDS = 2.0  # what measuring may take, unless the fewest rounds take longer
LEAST_ROUNDS, MOST_ROUNDS = 3, 25
PATIENCE = 5.0  # seconds that one run may take; larger ones are told from smaller
MOST = 64  # budgets that are weighed; a finer axis is thinned out evenly
QUARTILE = 0.25  # of the rounds: what a run takes by itself, where something else is busy now and then; the pace tells of that
UNTOUCHED = 1 << 20  # bytes; a process that has grown by more since the session was opened has run it, and hides what a run adds
_log = logging.getLogger(__name__)

Identity = dict[str, Any]


class Measured(NamedTuple):
    """Points of one run each, and seconds a picture: from its last step to the picture, and into the later stages of a
    plan."""

    points: tuple[Point, ...]
    finish: float
    preview: float


class Calibration(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What was measured and for whom.

    `finish` is seconds a picture from its last step to the picture: decoder and conversion. `preview` is those that a
    plan takes between its stages: the decoder at half the sides, edges, and noise.
    """

    version: int
    identity: Identity
    made: str
    points: tuple[Point, ...]
    finish: float
    preview: float = 0.0


class Chosen(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which backend, precision and artifact were fastest, and milliseconds of each candidate's step."""

    version: int
    identity: Identity
    backend: str
    precision: str
    artifact: str
    milliseconds: dict[str, float]


Kept = TypeVar("Kept", Calibration, Chosen)


def folder() -> Path:
    """Where calibrations are kept; deleting it makes them be measured again."""
    return cache.folder("calibration")


def identity(session: Session, manifest: Manifest, device: Device) -> Identity:
    """Everything that a measured time depends on."""
    origin, decoder = session.origin, manifest.graphs.get("decoder")
    return {
        "model": manifest.model.name,
        "files": [file.sha256 for file in origin.artifact.files] if origin else [],
        "decoder": [file.sha256 for artifact in decoder.artifacts for file in artifact.files] if decoder else [],
        "precision": origin.precision if origin else None,
        "options": {name: repr(value) for name, value in sorted(origin.options.items())} if origin else {},
        "inputs": [spec.name for spec in session.graph.inputs],
        "spans": {axis.name: str(axis.span) for axis in manifest.axes},
        "where": session.where,
        "device": device.fingerprint,
    }


def rates(session: Session, device: Device) -> Rates:
    """Peak rates of what the session runs on, before anything was measured."""
    origin = session.origin
    return Rates.of(peak(device, session.processor), origin.precision if origin else EXACT)


def load(who: Identity) -> Calibration | None:
    """The calibration kept for `who`, or None; a damaged one is None too, and the log says so."""
    return _load(who, "", Calibration)


def calibrate(who: Identity, measure: Callable[[], Measured]) -> Calibration:
    """The calibration of `who`: the one kept, else what `measure()` gives, which is then kept."""
    if kept := load(who):
        return kept
    measured = measure()
    made = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    calibration = Calibration(
        version=VERSION, identity=who, made=made, points=measured.points, finish=measured.finish, preview=measured.preview
    )
    _store(calibration, "")
    return calibration


def offered(axes: Sequence[Axis], compiled: Sequence[Mapping[str, int]] | None = None) -> list[Budget]:
    """Budgets of a session that has `compiled` ones, or takes all of its axes: at most about `MOST`, every one, or evenly
    chosen ones with the ends and the default of each axis.

    Where an axis is carried by a picture's own tokens, they are those of the stages of RALU's plans at the largest
    picture.
    """
    if compiled is not None:
        return [Budget(**{axis.name: budget[axis.name] for axis in axes}) for budget in compiled]
    count = max(2, round(MOST ** (1 / max(len(axes), 1))))
    values = [_stages(axis) if axis.carrier == "shape" else _evenly(axis, count) for axis in axes]
    names = [axis.name for axis in axes]
    return [Budget(**dict(zip(names, point, strict=True))) for point in itertools.product(*values)]


def _evenly(axis: Axis, count: int) -> list[int]:
    return sorted({axis.default, *(axis.values[int(i)] for i in np.linspace(0, len(axis.values) - 1, count).round())})


def _stages(axis: Axis) -> list[int]:
    low, ratio = axis.max // 4, PRESETS["4x"].up_ratio or 0.0
    return sorted({value for value in (low, low + 3 * int(low * ratio), axis.max) if value in axis.values})


def points(
    session: Session, manifest: Manifest, budgets: Sequence[Budget], clock: Clock, time: float | None = None, opened: int | None = None,
    seconds: float = SECONDS,
) -> tuple[Point, ...]:  # fmt: skip
    """Measure one run at the ends and the middle of `budgets`, in batches of the session's smallest and its double
    (guidance).

    Rounds visit every point in turn, so that a drifting machine slows all alike; of two runs in a row the second
    counts, as in a picture a step follows a step. A model so large that a run takes longer than `PATIENCE` is run no
    larger than that. `time` is what the model is told, by default the middle of the schedule; `opened` is the process's
    peak memory when the session was opened.
    """
    denoiser, source = evaluator(session, manifest), np.random.default_rng(0)
    moment = middle(manifest.model) if time is None else time
    least = session.batch.min
    batches = sorted({least, min(2 * least, session.batch.max)})
    costs = Costs(manifest, Rates(1.0, 1.0))
    places = [(budget, batch) for budget in _spread(budgets, costs) for batch in batches]
    places.sort(key=lambda place: costs.work(place[0]).flops * place[1])  # rising, so that peak memory tells what each one adds

    before = peak_bytes()
    fresh = opened is not None and before is not None and before - opened < UNTOUCHED
    growth: dict[tuple[Budget, int], int | None] = {}
    for place in places:  # warms up, too
        begun = clock()
        denoiser.evaluate(*place, moment, source)
        took = clock() - begun
        if took < PATIENCE:
            denoiser.evaluate(*place, moment, source)  # ONNX Runtime plans its memory by the first run, and takes it in the second
        now = peak_bytes()
        growth[place] = now - opened if fresh and now is not None and opened is not None else None
        if took > PATIENCE and len({budget for budget, _ in growth}) > 1:  # one alone does not tell what another costs
            break
    times: dict[tuple[Budget, int], list[float]] = {place: [] for place in growth}
    begun = clock()
    for round_ in range(1, MOST_ROUNDS + 1):
        for place in times:
            denoiser.evaluate(*place, moment, source)
            start = clock()
            denoiser.evaluate(*place, moment, source)
            times[place].append(max(clock() - start, 0.0))
        spent = clock() - begun
        if (round_ >= LEAST_ROUNDS and spent >= seconds) or spent > LEAST_ROUNDS * PATIENCE:
            break
    return tuple(
        Point(budget=dict(budget), batch=batch, seconds=float(np.quantile(values, QUARTILE)), growth=growth[budget, batch])
        for (budget, batch), values in times.items()
    )


def middle(model: Model) -> float:
    """A time halfway through a run."""
    schedule = model.schedule
    return 0.5 if isinstance(schedule, CosineMask) else float(schedule.times(2)[1])


def fastest(
    bundle: Bundle,
    graph: str,
    device: Callable[[], Device],
    clock: Clock,
    precisions: Collection[str] | None = None,
    able: Sequence[Origin] | None = None,
) -> Origin | None:
    """What runs `graph` fastest here, of `able` (by default all of its candidates); None where there is no choice. Measured once, then
    kept.

    Only what computes in `precisions` competes; where none are named, the most exact of those that can run here: time is no reason to draw
    with fewer bits unasked. Each candidate is opened, timed at the largest budget and closed. One that fails is left out, and the log says
    why; where it may not the next time, as on a GPU whose memory was full, the choice is not kept.
    """
    able = candidates(bundle, graph)[0] if able is None else able
    if len(able) < 2:
        return None
    competing = chosen(able, precisions)
    if len(competing) == 1:
        return competing[0]
    here = device()
    who = {
        "candidates": [_identity(each) for each in competing],
        "versions": here.backends,
        "device": here.fingerprint,
    }
    kept = _load(who, "fastest-", Chosen)
    for candidate in competing:
        if kept and (candidate.backend, _given_up(candidate), candidate.artifact.path) == (kept.backend, kept.precision, kept.artifact):
            return candidate
    times: list[tuple[float, Origin]] = []
    failures: list[ElasticError] = []
    lasting = True
    for candidate in competing:
        try:
            with open_origin(bundle, graph, candidate) as session:
                lasting = lasting and not session.fell_back
                largest = _largest(bundle.manifest, session)
                rows = points(session, bundle.manifest, [largest], clock, seconds=SECONDS / 2)
                times.append((min(row.seconds / row.batch for row in rows), candidate))
        except ElasticError as error:
            _log.warning("%s is left out by %s: %s", candidate.artifact.path, candidate.backend, error)
            failures.append(error)
            lasting = lasting and not isinstance(error, InferenceError)
    if not times:
        raise failures[0]
    best = min(times, key=lambda pair: pair[0])[1]
    milliseconds = {f"{each.backend} {_given_up(each)}: {each.artifact.path}": 1e3 * seconds for seconds, each in times}
    kept = Chosen(
        version=VERSION,
        identity=who,
        backend=best.backend,
        precision=_given_up(best),
        artifact=best.artifact.path,
        milliseconds=milliseconds,
    )
    if lasting:
        _store(kept, "fastest-")
    _log.info("fastest of %s: %s %s", milliseconds, best.backend, _given_up(best))
    return best


def chosen(able: Sequence[Origin], precisions: Collection[str] | None) -> list[Origin]:
    """Those that give up no more than `precisions`; the most exact where none are named, or of the graph there are none."""
    named = [candidate for candidate in able if precisions and candidate.within(precisions)]
    most_exact = min(candidate.rank for candidate in able)
    return named or [candidate for candidate in able if candidate.rank == most_exact]


def _given_up(candidate: Origin) -> str:
    """Its precisions in one word: `int8+bf16`."""
    return "+".join(candidate.precisions)


def _identity(candidate: Origin) -> list[str]:
    """What a candidate's time belongs to: its backend, precisions, files, and the session's other options."""
    hashes = [file.sha256 for file in candidate.artifact.files]
    options = [f"{name}={value!r}" for name, value in sorted(candidate.options.items()) if name != "precision"]
    return [candidate.backend, _given_up(candidate), candidate.artifact.path, *hashes, *options]


def _largest(manifest: Manifest, session: Session) -> Budget:
    whole = Budget(**{axis.name: axis.max for axis in session.axes(manifest.axes)})
    if session.budgets is None or whole in session.budgets:
        return whole
    return max(session.budgets, key=lambda budget: sum(budget.values()))


def _spread(budgets: Iterable[Budget], costs: Costs) -> list[Budget]:
    """Both ends of `budgets`, and the one whose FLOPs are nearest to the middle."""
    rising = sorted(budgets, key=lambda budget: costs.work(budget).flops)
    ends = costs.work(rising[0]).flops, costs.work(rising[-1]).flops
    middle = min(rising, key=lambda budget: abs(costs.work(budget).flops - sum(ends) / 2))
    return list(dict.fromkeys((rising[0], middle, rising[-1])))


def _path(who: Identity, prefix: str) -> Path:
    digest = hashlib.sha256(msgspec.json.encode([VERSION, who], order="sorted")).hexdigest()[:32]
    return folder() / f"{prefix}{digest}.json"


def _load(who: Identity, prefix: str, kind: type[Kept]) -> Kept | None:
    path = _path(who, prefix)
    try:
        cache.guard(path)
        kept = msgspec.json.decode(path.read_bytes(), type=kind)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        _log.warning("%s is damaged (%s): it is measured again", path, error)
        return None
    plain = msgspec.json.decode(msgspec.json.encode(who))
    sound = not isinstance(kept, Calibration) or _sound(kept)
    if kept.version != VERSION or kept.identity != plain or not sound:
        _log.warning("%s does not hold what its name says: it is measured again", path)
        return None
    return kept


def _sound(kept: Calibration) -> bool:
    return (
        bool(kept.points) and kept.finish >= 0 and kept.preview >= 0 and all(point.seconds > 0 and point.batch > 0 for point in kept.points)
    )


def _store(record: Calibration | Chosen, prefix: str) -> None:
    path = _path(record.identity, prefix)
    try:
        atomic.write(path, msgspec.json.format(msgspec.json.encode(record), indent=1))
    except OSError as error:
        _log.warning("%s cannot be written (%s): it is measured again next time", path, error.strerror or error)
