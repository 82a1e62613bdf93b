"""Plots as inline SVG: axes, lines, marks and words, nothing that loads. They scale with the page and print as they look."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 640, 340
LEFT, RIGHT, TOP, BOTTOM = 58, 16, 16, 46
# Okabe and Ito's colours, which colour-blind readers can tell apart, in an order of falling contrast on white
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#5a5a5a", "#8c6d1f")
INK, FAINT = "#3b4046", "#e4e7eb"


@dataclass(frozen=True)
class Point:
    """`x`, `y`, the words that a pointer over it shows, and the top of its whisker (None: it has none)."""

    x: float
    y: float
    words: str = ""
    high: float | None = None
    hollow: bool = False
    label: str = ""


@dataclass(frozen=True)
class Series:
    """Points of one name and colour, joined by a line or not."""

    name: str
    points: Sequence[Point]
    color: str
    line: bool = True
    dashed: bool = False
    marks: bool = True


def plot(
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    title: str,
    log_x: bool = False,
    ticks: Sequence[float] = (),
    form: Callable[[float], str] = "{:g}".format,
    from_zero: bool = True,
) -> str:
    """An SVG element of `series`; `title` is what a screen reader says. `ticks` are those of x, else round numbers."""
    points = [point for each in series for point in each.points]
    xs = [point.x for point in points]
    ys = [value for point in points for value in (point.y, point.high) if value is not None]
    low_x, high_x = min(xs), max(xs)
    x_ticks = list(ticks) or _ticks(low_x if not from_zero or log_x else 0.0, high_x)
    if not log_x:
        low_x, high_x = min([low_x, *x_ticks]), max([high_x, *x_ticks])
    y_ticks = _ticks(0.0 if from_zero else min(ys), max(ys))
    low_y, high_y = min([y_ticks[0], *ys]), max([y_ticks[-1], *ys])

    def to_x(value: float) -> float:
        a, b, c = (math.log(v) if log_x else v for v in (low_x, high_x, value))
        share = 0.5 if a == b else (c - a) / (b - a)
        return LEFT + 14 + share * (WIDTH - LEFT - RIGHT - 28)

    def to_y(value: float) -> float:
        share = 0.5 if low_y == high_y else (value - low_y) / (high_y - low_y)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    parts = [_grid(x_ticks, y_ticks, to_x, to_y, form), _labels(x_label, y_label)]
    parts += [_series(each, to_x, to_y) for each in series]
    head = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}" xmlns="http://www.w3.org/2000/svg"'
    return f'{head} font-family="system-ui, sans-serif" font-size="12" fill="{INK}">{"".join(parts)}</svg>'


def captioned(plots: Sequence[tuple[str, str, Sequence[Series]]]) -> str:
    """One SVG document of several plots, one under the other: (title, its SVG element, the series of its legend) each."""
    head, parts = 52, []
    for i, (title, svg, series) in enumerate(plots):
        y = i * (HEIGHT + head)
        parts.append(f'<text x="{LEFT}" y="{y + 20}" font-size="15" font-weight="600">{escape(title)}</text>')
        x = float(LEFT)
        for each in series:
            parts.append(f'<circle cx="{x + 4:.0f}" cy="{y + 38}" r="4.5" fill="{each.color}"/>')
            parts.append(f'<text x="{x + 14:.0f}" y="{y + 42}" font-size="12">{escape(each.name)}</text>')
            x += 30 + 7 * len(each.name)
        parts.append(svg.replace("<svg ", f'<svg y="{y + head}" width="{WIDTH}" height="{HEIGHT}" ', 1))
    size = f'viewBox="0 0 {WIDTH} {len(plots) * (HEIGHT + head)}" width="{WIDTH}"'
    frame = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="system-ui, sans-serif" fill="{INK}">'
    return f'{frame}<rect width="100%" height="100%" fill="#ffffff"/>{"".join(parts)}</svg>\n'


def legend(series: Sequence[Series]) -> list[Series]:
    """The series that have a name."""
    return [each for each in series if each.name]


def _series(each: Series, to_x: Callable[[float], float], to_y: Callable[[float], float]) -> str:
    parts = []
    if each.line and len(each.points) > 1:
        path = " ".join(f"{to_x(point.x):.1f},{to_y(point.y):.1f}" for point in each.points)
        dashes = ' stroke-dasharray="5 4"' if each.dashed else ""
        parts.append(f'<polyline points="{path}" fill="none" stroke="{each.color}" stroke-width="2"{dashes}/>')
    for point in each.points if each.marks else ():
        x, y = to_x(point.x), to_y(point.y)
        if point.high is not None:
            top = to_y(point.high)
            parts.append(f'<path d="M{x:.1f} {y:.1f}V{top:.1f}M{x - 4:.1f} {top:.1f}h8" stroke="{each.color}" stroke-opacity="0.55"/>')
        fill = "#ffffff" if point.hollow else each.color
        title = f"<title>{escape(point.words)}</title>" if point.words else ""
        radius = 3.2 if point.hollow else 4.5
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{fill}" stroke="{each.color}" stroke-width="1.4">{title}</circle>'
        )
        if point.label:
            parts.append(f'<text x="{x + 8:.1f}" y="{y - 7:.1f}" font-size="11">{escape(point.label)}</text>')
    return "".join(parts)


def _grid(
    x_ticks: Sequence[float],
    y_ticks: Sequence[float],
    to_x: Callable[[float], float],
    to_y: Callable[[float], float],
    form: Callable[[float], str],
) -> str:
    parts = []
    for tick in y_ticks:
        y = to_y(tick)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="{FAINT}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{escape(f"{tick:g}")}</text>')
    floor = HEIGHT - BOTTOM
    parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{floor}" y2="{floor}" stroke="#9aa1a9"/>')
    for tick in x_ticks:
        x = to_x(tick)
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{floor}" y2="{floor + 4}" stroke="#9aa1a9"/>')
        parts.append(f'<text x="{x:.1f}" y="{floor + 18}" text-anchor="middle">{escape(form(tick))}</text>')
    return "".join(parts)


def _labels(x_label: str, y_label: str) -> str:
    middle = (HEIGHT - BOTTOM + TOP) / 2
    return (
        f'<text x="{(WIDTH + LEFT - RIGHT) / 2:.0f}" y="{HEIGHT - 8}" text-anchor="middle" font-weight="600">{escape(x_label)}</text>'
        f'<text transform="translate(14 {middle:.0f}) rotate(-90)" text-anchor="middle" font-weight="600">{escape(y_label)}</text>'
    )


def _ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers around low to high, at most `most` steps."""
    width = high - low
    if width <= 0:
        return [low, high or 1.0] if low != high or not low else [low]
    unit: float = 10 ** math.floor(math.log10(width / most))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if width / (unit * factor) <= most)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [float(f"{step * n:.10g}") for n in range(first, last + 1)]
