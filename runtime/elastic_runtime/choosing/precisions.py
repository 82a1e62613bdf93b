"""Which precisions of a bundle draw as well as the original, by what its card measured in pictures."""

from collections.abc import Sequence

from elastic_runtime.choosing.goals import FLOOR, NEAR, share
from elastic_runtime.contract.manifest import Manifest
from elastic_runtime.contract.precision import EXACT, PRECISIONS
from elastic_runtime.errors import UsageError

AUTO = "auto"


def allowed(manifest: Manifest, precisions: Sequence[str], floor: float = FLOOR) -> tuple[str, ...]:
    """`precisions` as they are named; for `AUTO` those that keep `floor`, the most exact first.

    Raises: UsageError for a name that there is not, for `AUTO` beside others, and for a floor that is no share.
    """
    share(floor, "the floor")
    if tuple(precisions) == (AUTO,):
        return keeping(manifest, floor)
    if unknown := [name for name in precisions if name not in PRECISIONS]:
        raise UsageError(f"there is no precision {unknown[0]!r}; there are {', '.join(PRECISIONS)}, or {AUTO} alone")
    return tuple(precisions)


def keeping(manifest: Manifest, floor: float = FLOOR) -> tuple[str, ...]:
    """Float32 and every precision that keeps `floor` of its accuracy, within `NEAR` of its Frechet distance, wherever both were graded."""
    exact = {row.where: row for row in manifest.precisions if row.precision == EXACT}
    graded: dict[str, list[bool]] = {}
    for row in manifest.precisions:
        if (own := exact.get(row.where)) is not None:
            near = row.frechet_distance <= NEAR * own.frechet_distance
            graded.setdefault(row.precision, []).append(near and row.accuracy >= floor * own.accuracy)
    return tuple(name for name in PRECISIONS if name == EXACT or all(graded.get(name, (False,))))
