"""Draw self-contained SVG charts: a bar of shares, a timeline of attempts, a curve.

An `<svg>` element refers to no external resource. Its colours come from the style sheet of the page
that holds it, by the class of each shape.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

from harness.errors import printable
from harness.text import duration

WIDTH, LEFT, RIGHT = 1000, 70, 20
ROW, GAP = 22, 8
MOST_POINTS = 1200  # of a curve; longer ones are thinned
# Candidate distances between time ticks, in seconds.
STEPS_S = (
    1,
    2,
    5,
    10,
    15,
    30,
    60,
    120,
    300,
    600,
    900,
    1800,
    3600,
    7200,
    10800,
    21600,
    43200,
    86400,
    2 * 86400,
    7 * 86400,
)


@dataclass(frozen=True)
class Scale:
    """A linear map from the values low..high to the pixels begin..end."""

    low: float
    high: float
    begin: float
    end: float

    def __call__(self, value: float) -> float:
        """Return the pixel coordinate of a value."""
        return self.begin + (value - self.low) / ((self.high - self.low) or 1.0) * (
            self.end - self.begin
        )


@dataclass(frozen=True)
class Bar:
    """An interval of a row, in seconds since the run began.

    `kind` is its CSS class, `tooltip` what it shows under the pointer.
    """

    begin: float
    end: float
    kind: str
    tooltip: str


@dataclass(frozen=True)
class Mark:
    """A point on a row, in seconds since the run began: a save, or the end of the attempt.

    `kind` is its CSS class, `tooltip` what it shows under the pointer. `sign` is the character that
    is drawn; if it is empty, a vertical tick is drawn.
    """

    at: float
    kind: str
    sign: str
    tooltip: str


@dataclass(frozen=True)
class Row:
    """One attempt as a row of the timeline: label, bars, marks, and a note beside the bars."""

    name: str
    bars: Sequence[Bar]
    marks: Sequence[Mark]
    note: str


def escaped(text: str) -> str:
    """Escape text for HTML, attribute values included.

    Control characters, and those that reorder or hide the text around them, are spelled out.
    """
    return html.escape(printable(text))


def shares(parts: Sequence[tuple[str, float, str]]) -> str:
    """Draw one horizontal bar that is divided into parts.

    A part is its CSS class, its size in any unit, and its tooltip. A part that is wide enough shows
    its share as a percentage.
    """
    total, at, drawn = sum(share for _, share, _ in parts) or 1.0, 0.0, []
    for kind, share, tooltip in parts:
        width = WIDTH * share / total
        drawn.append(_rect(at, 0, width, 34, kind, tooltip))
        if width > 60:
            drawn.append(
                f'<text class="inside in-{escaped(kind)}" x="{at + 8:.1f}" y="22">'
                f"{share / total:.0%}</text>"
            )
        at += width
    return _svg(34, drawn)


def timeline(rows: Sequence[Row], seconds: float) -> str:
    """Draw one row per attempt over an axis of `seconds` since the run began."""
    scale = Scale(0.0, seconds, LEFT, WIDTH - RIGHT)
    height = len(rows) * (ROW + GAP) + 34
    drawn = []
    for at in time_ticks(seconds):
        x = scale(at)
        drawn.append(f'<line class="grid" x1="{x:.1f}" y1="0" x2="{x:.1f}" y2="{height - 26}"/>')
        drawn.append(
            f'<text class="tick" x="{x:.1f}" y="{height - 8}" text-anchor="middle">'
            f"{duration(at) if at else '0'}</text>"
        )
    for number, row in enumerate(rows):
        top = number * (ROW + GAP)
        drawn.append(
            f'<text class="name" x="{LEFT - 10}" y="{top + 16}" text-anchor="end">'
            f"{escaped(row.name)}</text>"
        )
        drawn += [
            _rect(
                scale(bar.begin),
                top,
                max(1.0, scale(bar.end) - scale(bar.begin)),
                ROW,
                bar.kind,
                bar.tooltip,
            )
            for bar in row.bars
        ]
        drawn += [_mark(scale(mark.at), top, mark) for mark in row.marks]
        if row.note and row.bars:
            drawn.append(_beside(scale(row.bars[0].begin), scale(row.bars[-1].end), top, row.note))
    return _svg(height, drawn)


def curve(
    points: Sequence[tuple[float, float]], marks: Sequence[tuple[float, str]], name: str, over: str
) -> str:
    """Draw a curve, with vertical lines at marked positions.

    Args:
        points: (x, y) pairs in the order of x; points with a y that is not finite are left out.
        marks: (x, tooltip) of each vertical line; an x outside the curve moves to its nearer end.
        name: Tooltip of the curve.
        over: Label of the x axis.

    Returns:
        The SVG element; "" if no point is left.
    """
    height, bottom = 280, 30
    points = thinned([(x, y if abs(y) > 1e-300 else 0.0) for x, y in points if math.isfinite(y)])
    if not points:
        return ""
    xs, ys = [x for x, _ in points], [y for _, y in points]
    low, high = min(ys), max(ys)
    low, high = (low - 0.5, high + 0.5) if low == high else (low, high)
    x_scale = Scale(min(xs), max(xs), LEFT, WIDTH - RIGHT)
    y_scale = Scale(low, high, height - bottom - 10, 14)
    drawn = []
    for value in ticks(low, high, 5):
        y = y_scale(value)
        drawn.append(
            f'<line class="grid" x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}"/>'
        )
        drawn.append(
            f'<text class="tick" x="{LEFT - 10}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>'
        )
    for value in ticks(min(xs), max(xs), 8):
        drawn.append(
            f'<text class="tick" x="{x_scale(value):.1f}" y="{height - 10}" text-anchor="middle">'
            f"{value:g}</text>"
        )
    for at, tooltip in marks:
        x = x_scale(min(max(at, min(xs)), max(xs)))
        line = f'<line class="resume" x1="{x:.1f}" y1="8" x2="{x:.1f}" y2="{height - bottom}"/>'
        drawn.append(f"<g>{line}<title>{escaped(tooltip)}</title></g>")
    path = " ".join(f"{x_scale(x):.1f},{y_scale(y):.1f}" for x, y in points)
    drawn.append(
        f'<polyline class="curve" points="{path}"><title>{escaped(name)}</title></polyline>'
    )
    drawn.append(
        f'<text class="tick" x="{WIDTH - RIGHT}" y="{height - 10}" text-anchor="end">'
        f"{escaped(over)}</text>"
    )
    return _svg(height, drawn)


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Reduce a curve to at most MOST_POINTS points.

    Each group of neighbours is replaced by its mean, except that the last point stays as it is.
    """
    size = -(-len(points) // MOST_POINTS) if points else 1
    groups = [points[at : at + size] for at in range(0, len(points), size)]
    means = [
        (sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group))
        for group in groups
    ]
    return [*means[:-1], points[-1]] if means else []


def ticks(low: float, high: float, about: int) -> list[float]:
    """Return about `about` round numbers between low and high."""
    raw = (high - low) / about or 1.0
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next(nice for nice in (1, 2, 5, 10) if nice * power >= raw)
    return [
        round(count * step, 12)
        for count in range(math.ceil(low / step), math.floor(high / step) + 1)
    ]


def time_ticks(seconds: float) -> list[float]:
    """Return round times from 0 to `seconds`, at most ten."""
    step = next(
        (step for step in STEPS_S if seconds / step <= 9),
        STEPS_S[-1] * (1 + int(seconds / 9 / STEPS_S[-1])),
    )
    return [float(at) for at in range(0, int(seconds) + 1, step)]


def _beside(begin: float, end: float, top: float, note: str) -> str:
    """Draw words after a row's bars, else before them; return "" if there is no room at all."""
    needed = 6.5 * len(note)  # pixels
    if end + 14 + needed < WIDTH:
        return f'<text class="note" x="{end + 14:.1f}" y="{top + 16}">{escaped(note)}</text>'
    if begin - LEFT > needed + 10:
        return (
            f'<text class="note" x="{begin - 8:.1f}" y="{top + 16}" text-anchor="end">'
            f"{escaped(note)}</text>"
        )
    return ""


def _rect(x: float, y: float, width: float, height: float, kind: str, tooltip: str) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" width="{max(0.0, width):.1f}" height="{height}"'
    return f'<rect class="{escaped(kind)}" {place}><title>{escaped(tooltip)}</title></rect>'


def _mark(x: float, top: float, mark: Mark) -> str:
    title = f"<title>{escaped(mark.tooltip)}</title>"
    if not mark.sign:
        return (
            f'<g><line class="{escaped(mark.kind)}" x1="{x:.1f}" y1="{top + 3}" '
            f'x2="{x:.1f}" y2="{top + ROW - 3}"/>{title}</g>'
        )
    return (
        f'<text class="sign {escaped(mark.kind)}" x="{x:.1f}" y="{top + 17}" '
        f'text-anchor="middle">{escaped(mark.sign)}{title}</text>'
    )


def _svg(height: float, drawn: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" xmlns="http://www.w3.org/2000/svg">'
        f"{''.join(drawn)}</svg>"
    )
