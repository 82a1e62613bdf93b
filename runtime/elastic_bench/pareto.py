"""What is worth choosing: the front of time against quality, and a recommendation in one sentence."""

from collections.abc import Sequence

from elastic_bench.records import BundleReport, Settings, Trial
from elastic_runtime.contract.budget import Budget
from elastic_runtime.contract.manifest import Quality
from elastic_runtime.contract.precision import EXACT

SAME = 60.0  # dB; above it a difference is rounding, and no reason to prefer one way to another
NEAR = 30.0  # dB; above it pictures are taken for the same in image coding
ALLOWANCE = 1.1  # a Frechet distance this many times the best one is taken for as good


def front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """For each (cost, quality) whether no other has at most its cost and at least its quality, and is better in one of them."""
    return [not any(c <= cost and q >= quality and (c < cost or q > quality) for c, q in points) for cost, quality in points]


def recommend(bundle: BundleReport, settings: Settings) -> str | None:
    """The fastest way to draw that is as good as the best, in a sentence; None where no pictures were drawn.

    Good is, where the card has figures for the budgets, a Frechet distance of at most 1.1 times the best; else a PSNR of 30 dB
    or more against the full budget from the same noise. The card knows float32 and its own steps; nothing else is considered then.
    """
    if not bundle.trials:
        return None
    first = bundle.trials[0]  # the full budget of the first runtime: what the others were compared with
    if grades := graded(bundle):
        best = min(row.frechet_distance for _, row in grades)
        chosen, figure = min(
            ((trial, row.frechet_distance) for trial, row in grades if row.frechet_distance <= ALLOWANCE * best),
            key=lambda pair: pair[0].seconds,
        )
        why = f"its Frechet distance by the card's own protocol is {figure:.1f}, where the best is {best:.1f}"
    else:
        near = [trial for trial in bundle.trials if trial.psnr_db >= NEAR]
        chosen = min(near, key=lambda trial: trial.seconds)  # the full budget itself is near
        if chosen == first:
            why = f"nothing faster comes within {NEAR:g} dB of it"
        elif chosen.psnr_db >= SAME:
            why = "its pictures are the full budget's but for rounding"
        else:
            why = f"its pictures come within {chosen.psnr_db:.0f} dB of the full budget's"
    how = f"{chosen.runtime} {_way(chosen)}" if chosen.plan else f"{chosen.runtime} {_way(chosen)} with {chosen.steps} steps"
    weak = f" and {Budget(**chosen.guidance_budget)} for the weak branch" if chosen.guidance_budget else ""
    share = f"{chosen.seconds / first.seconds:.0%} of {first.runtime} {_way(first)}"
    many = "a picture" if settings.batch == 1 else f"a batch of {settings.batch}"
    return f"Use {how}{weak}: {_time(chosen.seconds)} {many}, {share}; {why}."


def graded(bundle: BundleReport) -> list[tuple[Trial, Quality]]:
    """The trials that the card has figures for: plans, or budgets with the first trial's steps, in runtimes that compute in float32."""
    card = {row.where: row for row in bundle.card}
    exact = {runtime.runtime for runtime in bundle.runtimes if runtime.precision == EXACT}
    return [
        (trial, card[trial.where])
        for trial in bundle.trials
        if trial.runtime in exact
        and trial.where in card
        and (trial.plan or (trial.guidance_budget is None and trial.steps == bundle.trials[0].steps))
    ]


def _way(trial: Trial) -> str:
    return f"along plan {trial.plan}" if trial.plan else f"at {Budget(**trial.budget)}"


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.0f} ms"
