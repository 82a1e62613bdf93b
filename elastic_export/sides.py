"""Sides of pictures, as `--size` says them."""

import re
from typing import NamedTuple

from elastic_runtime.contract.axis import Span, whole
from elastic_runtime.errors import BudgetError


class Sides(NamedTuple):
    """Height and width of a picture in pixels, written `1024x768`."""

    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.height}x{self.width}"


def read_size(value: Span | Sides | str | int) -> Span | Sides:
    """`"512-1024"` and `1024` as a span of sides, `"1024x768"` as height and width; raises BudgetError for other text."""
    if isinstance(value, Span | Sides):
        return value
    match = re.fullmatch(r"\s*(\d+)\s*x\s*(\d+)\s*", str(value))
    try:
        return Sides(whole(match[1]), whole(match[2])) if match else Span.parse(str(value))
    except BudgetError as error:
        raise BudgetError(f"--size: {error}; a single size is written 1024x768, height first") from None
