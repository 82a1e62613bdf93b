"""A point on the axes of a model."""

from collections.abc import Iterable, Iterator, Mapping

from elastic_runtime.contract.axis import Axis
from elastic_runtime.errors import BudgetError


class Budget(Mapping[str, int]):
    """An immutable, hashable point on the axes: `Budget(latents=64)`."""

    __slots__ = ("_values",)

    def __init__(self, /, **values: int):
        self._values = dict(sorted(values.items()))

    def __getitem__(self, axis: str) -> int:
        return self._values[axis]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __hash__(self) -> int:
        return hash(tuple(self._values.items()))

    def __eq__(self, other: object) -> bool:
        return self._values == other._values if isinstance(other, Budget) else Mapping.__eq__(self, other)

    def __repr__(self) -> str:
        return f"Budget({', '.join(f'{name}={value}' for name, value in self._values.items())})"

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self._values.items()) or "fixed"

    def on(self, axes: Iterable[Axis]) -> "Budget":
        """Return this budget with every axis filled in (defaults where it is silent) and checked.

        Raises: BudgetError for an axis that the model lacks or a value that the axis does not offer.
        """
        known = {axis.name: axis for axis in axes}
        for name in self:
            if name not in known:
                raise BudgetError(f"this model has no axis {name!r}; it has {', '.join(known) or 'none'}")
        return Budget(**{name: axis.check(self.get(name, axis.default)) for name, axis in known.items()})


def key(budget: Mapping[str, int]) -> str:
    """Text form of a budget for file and array names: `latents=64`."""
    return ",".join(f"{name}={value}" for name, value in sorted(budget.items())) or "fixed"


def parse_key(text: str) -> Budget:
    """Inverse of `key`."""
    return Budget(**{name: int(value) for name, value in (pair.split("=") for pair in text.split(",") if pair != "fixed")})
