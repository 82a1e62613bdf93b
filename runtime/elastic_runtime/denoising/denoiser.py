"""From a session to a guided prediction at a budget: what is fed, batches, and the branches of guidance."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import islice

import numpy as np

from elastic_runtime.contract.axis import Axis
from elastic_runtime.contract.budget import Budget
from elastic_runtime.contract.manifest import Manifest
from elastic_runtime.contract.reference import axis_feeds
from elastic_runtime.denoising.guidance import Branches, Guidance
from elastic_runtime.denoising.router import Routed, Routing, Slots, compiled, fraction
from elastic_runtime.denoising.tokens import Conditions
from elastic_runtime.errors import BudgetError, UsageError
from elastic_runtime.ralu.patches import pack, unpack
from elastic_runtime.sessions.session import Arrays, Session, batches, joined

DROP = "drop_fraction"  # the input that says which share of the tokens a router drops, one a row


@dataclass(frozen=True)
class Branch:
    """What one branch of guidance is asked: its conditions, its budget, what it drops, and how its slots are sized
    (None: not at all)."""

    conditions: Conditions
    budget: Budget
    drop: float
    slots: Slots | None

    @property
    def first(self) -> Budget:
        """The budget to run first."""
        return self.slots.first(self.budget) if self.slots else self.budget

    def beside(self, other: "Branch") -> bool:
        """Whether both may share a run."""
        return self.first == other.first and self.conditions.beside(other.conditions)


@dataclass(frozen=True)
class Answer:
    """A prediction, float64, and what the router kept in each branch that ran, where the model has a router."""

    prediction: np.ndarray
    routed: Routed | None = None
    guidance_routed: Routed | None = None


@dataclass(frozen=True)
class Asked:
    """The runs that samples take: which `rows` of them each has, what it is fed whatever the samples are, and the `order` of their rows
    among the answers (None: as they are)."""

    rows: list[slice | np.ndarray]
    feeds: list[Arrays]
    order: np.ndarray | None

    def whole(self, answers: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """The outputs of all samples."""
        outputs = joined(answers)
        return outputs if self.order is None else {name: array[self.order] for name, array in outputs.items()}


class Denoiser:
    """A session with the manifest's meaning of its inputs."""

    def __init__(self, session: Session, manifest: Manifest):
        self._session = session
        self._manifest = manifest
        self._output = "logits" if manifest.model.tokens else "prediction"
        self._drops = any(spec.name == DROP for spec in session.graph.inputs)
        counts = any(spec.name == "kept" for spec in session.graph.outputs)
        self._slots = next((axis for axis in manifest.axes if axis.input == "slots"), None) if counts else None
        # From one step to the next these stay the same, and a small step has no time to make them anew; a branch may have a run of its own.
        self._asked = lru_cache(maxsize=2)(partial(asked, session, manifest.axes))
        self._unlabelled = lru_cache(maxsize=1)(partial(_unlabelled, manifest.model.null_label))

    def routing(self, drop: float = 0.0, guidance_drop: float | None = None) -> Routing:
        """The state before a picture's first step; the weak branch drops what the other does where nothing else is
        said.

        Raises: UsageError for fractions outside [0, 1), or for a model that drops nothing.
        """
        drop = fraction(drop, "drop_fraction")
        weak = drop if guidance_drop is None else fraction(guidance_drop, "guidance_drop_fraction")
        if (drop or weak) and not self._drops:
            axes = ", ".join(axis.name for axis in self._manifest.axes) or "none"
            raise UsageError(f"{self._manifest.model.name} has no router and drops no tokens: leave drop fractions out; its axes: {axes}")
        if self._slots is None:
            return Routing(drop, weak)
        return Routing(drop, weak, *(Slots.of(self._slots, self._session.budgets, each) for each in (drop, weak)))

    def guided(
        self,
        x: np.ndarray,
        time: float,
        conditions: Conditions,
        guidance: Guidance,
        branches: Branches,
        routing: Routing,
        weak_conditions: Conditions | None = None,
    ) -> Answer:
        """Prediction for `x` (B, C, H, W) at `time`, led away from what `weak_conditions` give, or no label where there are none.

        One run serves both branches where they run at the same size.
        """
        answer = self._guided(x, time, conditions, guidance, branches, routing, weak_conditions)
        if (size := self._manifest.model.packed) is None:
            return answer
        return replace(answer, prediction=unpack(answer.prediction, x.shape[2] // size, x.shape[3] // size, size))

    def _guided(
        self,
        x: np.ndarray,
        time: float,
        conditions: Conditions,
        guidance: Guidance,
        branches: Branches,
        routing: Routing,
        weak_conditions: Conditions | None,
    ) -> Answer:
        """The prediction in the graph's own form."""
        model = self._manifest.model
        strong = self._branch(conditions, branches.strong, routing.drop, routing.slots)
        same = guidance.auto and branches.weak == branches.strong and routing.guidance_drop == routing.drop
        if same or not guidance.active(model.schedule.share(time)):
            ((prediction, routed),) = self._predict(x, time, [strong])
            return Answer(prediction, routed)
        if guidance.auto:
            weak_conditions = conditions
        elif weak_conditions is None:
            weak_conditions = self._unlabelled(len(conditions))
        weak = self._branch(weak_conditions, branches.weak, routing.guidance_drop, routing.guidance_slots)
        (prediction, routed), (low, low_routed) = self._predict(x, time, [strong, weak])
        # A variance is no direction to guide in: it is the conditional branch's, as are the channels that the model leaves out.
        guided = model.guided_channels or (model.sample_shape[0] if model.learned_variance else None)
        prediction[:, :guided] = guidance.lead(prediction[:, :guided], low[:, :guided])
        return Answer(prediction, routed, low_routed)

    def evaluate(self, budget: Budget, batch: int, time: float, source: np.random.Generator) -> None:
        """Run once on `batch` samples of noise, as an unguided step does."""
        model = self._manifest.model
        shape = (batch, *model.sample_shape)
        x = np.zeros(shape, dtype=np.int64) if model.tokens else source.standard_normal(shape)
        conditions = Conditions.blank(self._session.graph, batch)
        self.guided(x, time, conditions, Guidance(), Branches(budget, budget), self.routing())

    def _branch(self, conditions: Conditions, budget: Budget, drop: float, slots: Slots | None) -> Branch:
        if slots:
            compiled(budget, self._session.budgets, self._session.where)
        return Branch(conditions, budget, drop, slots)

    def _predict(self, x: np.ndarray, time: float, branches: list[Branch]) -> list[tuple[np.ndarray, Routed | None]]:
        """Prediction of each branch for `x`, in one run where all begin at the same budget and with texts of one length: what differs
        would be padded."""
        budgets = [branch.first for branch in branches]
        if not all(branch.beside(branches[0]) for branch in branches):
            apart = [self._asked(budget, branch) for branch, budget in zip(branches, budgets, strict=True)]
            answers = iter(self._session.several([feeds for each in apart for feeds in self._runs(x, time, each)]))
            outputs = [each.whole(list(islice(answers, len(each.rows)))) for each in apart]
        else:
            together = self._asked(budgets[0], *branches)
            whole = together.whole(self._session.several(self._runs(np.concatenate([x] * len(branches)), time, together)))
            rows = [slice(i * len(x), (i + 1) * len(x)) for i in range(len(branches))]
            outputs = [{name: array[part] for name, array in whole.items()} for part in rows]
        return [self._whole(x, time, *each) for each in zip(branches, budgets, outputs, strict=True)]

    def _whole(self, x: np.ndarray, time: float, branch: Branch, budget: Budget, outputs: Arrays) -> tuple[np.ndarray, Routed | None]:
        """The prediction, with rows run again whose router kept more than the slots held though the cap allows more."""
        prediction = outputs[self._output].astype(np.float64)
        if branch.slots is None:
            return prediction, None
        kept, axis = outputs["kept"].round().astype(int), branch.slots.axis
        short = np.flatnonzero(kept > budget[axis])
        again = bool(short.size) and budget != branch.budget
        if again:
            rows, budget = self._runnable(short, len(x)), branch.slots.holding(int(kept.max()), branch.budget)
            prediction[rows] = self._run(x[rows], time, replace(branch, conditions=branch.conditions.rows(rows)), budget)[self._output]
        return prediction, Routed(tuple(kept.tolist()), budget[axis], int(again), branch.drop, outputs.get("probability"))

    def _runnable(self, rows: np.ndarray, size: int) -> np.ndarray:
        """`rows`, or all of `size` where so few are no batch of the session."""
        try:
            batches(self._session, len(rows))
        except BudgetError:
            return np.arange(size)
        return rows

    def _run(self, x: np.ndarray, time: float, branch: Branch, budget: Budget) -> dict[str, np.ndarray]:
        again = self._asked(budget, branch)
        return again.whole(self._session.several(self._runs(x, time, again)))

    def _runs(self, x: np.ndarray, time: float, asked: Asked) -> list[Arrays]:
        """What is fed for `x` (B, C, H, W) at a time."""
        return [{**self._feeds(x[rows], time), **fixed} for rows, fixed in zip(asked.rows, asked.feeds, strict=True)]

    def _feeds(self, x: np.ndarray, time: float) -> dict[str, np.ndarray]:
        if self._manifest.model.tokens:
            return {"tokens": x.reshape(len(x), -1)}
        packed = self._manifest.model.packed
        sample = {"hidden_states": pack(x, packed)} if packed else {"sample": x}
        return {name: array.astype(np.float32) for name, array in sample.items()} | {"timestep": np.full(len(x), time, dtype=np.float32)}


def asked(session: Session, axes: tuple[Axis, ...], budget: Budget, *branches: Branch) -> Asked:
    """The runs of the rows of `branches`, one branch after the other, at one budget: as few as the texts' lengths and the session's
    batch span allow."""
    inputs = {spec.name for spec in session.graph.inputs}
    first, *others = (branch.conditions for branch in branches)
    conditions = first.joined(*others) if others else first
    drops = np.repeat([branch.drop for branch in branches], [len(branch.conditions) for branch in branches]).astype(np.float32)
    groups = conditions.alike()
    whole = len(groups) == 1  # then rows are slices, and nothing is copied
    rows = [part if whole else alike[part] for alike in groups for part in batches(session, len(alike))]
    fixed: list[Arrays] = []
    for part in rows:
        feeds = {**axis_feeds(axes, budget), **conditions.rows(part).feeds, DROP: drops[part]}
        fixed.append({name: array for name, array in feeds.items() if name in inputs})
    return Asked(rows, fixed, None if whole else np.argsort(np.concatenate(groups)))


def _unlabelled(label: int, count: int) -> Conditions:
    """What a weak branch without a label is drawn after."""
    return Conditions(labels=np.full(count, label))
