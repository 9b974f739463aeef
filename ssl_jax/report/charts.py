"""Charts as data: axes, lines and marks in the units of an SVG, drawn by `charts.html`."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from ssl_jax.report.reading import Curve
from ssl_jax.report.words import number

_MAX_POINTS = 200  # per line; longer curves are averaged to keep the file small
_FEW = 30
_LETTERS = 14  # lines that may have letters at their ends; more would not fit above each other
_STRIPS = 50  # of a chart with several lines, in which the pointer finds values

# A chart in its own units, which are CSS pixels where it is 380 pixels wide.
WIDTH, HEIGHT = 380, 230
TOP, RIGHT, BOTTOM = 26, WIDTH - 8, HEIGHT - 38


@dataclass(frozen=True)
class Mark:
    """A point of a series: a "dot", "disc", "square" or "triangle", or a pale dot ("trial").

    Attributes:
      x: from the left.
      y: from the top.
      shape: of the mark; series differ by more than color.
      title: shown by the pointer or the keyboard.
      whisker: from the top, the ends of an interval.
    """

    x: float
    y: float
    shape: str = "dot"
    title: str = ""
    whisker: tuple[float, float] | None = None


@dataclass(frozen=True)
class Series:
    """A line with its marks.

    Attributes:
      style: class of the group, which sets the color.
      dashes: class of the line.
      line: points of the line.
      marks: on the line.
      letter: names the line, with its place.
    """

    style: str = ""
    dashes: str = ""
    line: str = ""
    marks: Sequence[Mark] = ()
    letter: tuple[str, float, float] | None = None


@dataclass(frozen=True)
class Strip:
    """A strip as high as the chart that responds to the pointer, with a ring on the line."""

    title: str
    left: float
    right: float
    x: float
    ring: float | None


@dataclass(frozen=True)
class Frame:
    """Maps values to places in a chart."""

    left: float
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    right: float = RIGHT

    def x(self, value: float) -> float:
        """From the left, of a value on the x axis."""
        low, high = self.x_range
        return self.left + (value - low) / (high - low) * (self.right - self.left)

    def y(self, value: float) -> float:
        """From the top, of a value on the y axis."""
        low, high = self.y_range
        return BOTTOM - (value - low) / (high - low) * (BOTTOM - TOP)

    def path(self, xs: Iterable[float], ys: Iterable[float]) -> str:
        """The points of a line."""
        return " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in zip(xs, ys, strict=True))

    def whisker(self, mean: float, half: float) -> tuple[float, float] | None:
        """The ends of an interval, clipped to the chart; None if it is unknown."""
        if math.isnan(half):
            return None
        # Student's interval of a few trials may be wider than the chart.
        bottom, top = self.y_range
        low, high = (self.y(min(max(y, bottom), top)) for y in (mean - half, mean + half))
        return low, high


@dataclass(frozen=True)
class Chart:
    """Axes, and what is drawn inside them.

    Attributes:
      frame: maps values to places.
      x_ticks: values and labels.
      y_ticks: values and labels, from the bottom.
      x_label: name of the x axis.
      y_label: name of the y axis.
      description: the chart in words.
      series: lines and marks.
      band: points of the area between a curve's extremes.
      strips: that respond to the pointer.
      rules: vertical lines, from the left, with their titles.
    """

    frame: Frame
    x_ticks: Sequence[tuple[float, str]]
    y_ticks: Sequence[tuple[float, str]]
    x_label: str
    y_label: str
    description: str
    series: Sequence[Series]
    band: str = ""
    strips: Sequence[Strip] = field(default=())
    rules: Sequence[tuple[float, str]] = field(default=())


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Chooses round numbers that enclose a range, 1, 2 or 5 times a power of ten apart.

    Args:
      low: the range's lower end.
      high: its upper end.
      count: about the maximum number of steps.

    Returns:
      Numbers in ascending order; the first is at most `low`, the last at least `high`.
    """
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        pad = 0.1 * abs(low) or 1.0
        low, high = low - pad, high + pad
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if raw <= m * power * (1 + 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def _tick_labels(ticks: Sequence[float]) -> list[str]:
    step = ticks[1] - ticks[0]
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    style = f",.{decimals}f" if decimals < 5 else ".3g"
    return [f"{tick + 0.0:{style}}".replace("-", "−") for tick in ticks]


def axes(
    x_range: tuple[float, float], y_ticks: Sequence[float], right: float = RIGHT
) -> tuple[Frame, list[tuple[float, str]]]:
    """Lays out a chart.

    Returns:
      The frame, as wide as the labels of the y axis leave it, and the y ticks with their labels.
    """
    labels = _tick_labels(y_ticks)
    frame = Frame(12 + 7.2 * max(map(len, labels)), x_range, (y_ticks[0], y_ticks[-1]), right)
    return frame, list(zip(y_ticks, labels, strict=True))


def shows_means(curve: Curve) -> bool:
    """Whether a curve has more points than its line."""
    return len(curve[0]) > _MAX_POINTS


def _thinned(curve: Curve) -> list[np.ndarray]:
    """The indices of a curve's records, in groups, one per point of the line."""
    return np.array_split(np.arange(len(curve[0])), min(len(curve[0]), _MAX_POINTS))


def _step_ticks(last: int) -> list[tuple[float, str]]:
    ticks = [tick for tick in nice_ticks(0, last, 4) if tick <= last and tick == int(tick)]
    return [(tick, f"{tick:,.0f}") for tick in ticks]


def _value_ticks(low: float, high: float, *, from_zero: bool, is_percent: bool) -> list[float]:
    ticks = nice_ticks(min(0.0, low) if from_zero else low, high, 4)
    # The log of another program may have values above 1.
    return [tick for tick in ticks if tick <= 100] if is_percent and high <= 100 else ticks


def line_chart(
    curve: Curve,
    y_label: str,
    last: int,
    *,
    from_zero: bool = False,
    is_percent: bool = False,
    rules: Sequence[tuple[int, str]] = (),
) -> Chart:
    """Draws a curve over the steps 0 to `last`, with vertical lines at some steps."""
    steps, values = curve
    groups = _thinned(curve)
    x = np.array([steps[group].mean() for group in groups])
    mean, low, high = (
        np.array([f(values[group]) for group in groups]) for f in (np.mean, np.min, np.max)
    )
    frame, y_ticks = axes(
        (0.0, float(last)),
        _value_ticks(low.min(), high.max(), from_zero=from_zero, is_percent=is_percent),
    )
    band = f"{frame.path(x, high)} {frame.path(x[::-1], low[::-1])}"
    unit = " %" if is_percent else ""
    titles = []
    for value, group in zip(mean, groups, strict=True):
        a, b = steps[group[0]], steps[group[-1]]
        where = f"step {a:,}" if a == b else f"steps {a:,} to {b:,}, mean"
        titles.append(f"{where}: {number(value)}{unit}")
    return Chart(
        frame,
        _step_ticks(last),
        y_ticks,
        "step",
        y_label,
        f"Line chart, {y_label} over steps {steps[0]:,} to {steps[-1]:,}: first "
        f"{number(values[0])}{unit}, last {number(values[-1])}{unit}.",
        [Series(line=frame.path(x, mean), marks=_dots(frame, x, mean))],
        band if len(groups) < len(steps) else "",
        _strips(frame, x, titles, mean),
        [(frame.x(step), title) for step, title in rules],
    )


def _dots(frame: Frame, x: np.ndarray, y: np.ndarray) -> list[Mark]:
    """The points of a line that has few."""
    if len(x) > _FEW:
        return []
    return [Mark(frame.x(a), frame.y(b)) for a, b in zip(x, y, strict=True)]


def _strips(
    frame: Frame, x: np.ndarray, titles: list[str], y: np.ndarray | None = None
) -> list[Strip]:
    edges = [frame.left, *(frame.x(m) for m in (x[1:] + x[:-1]) / 2), frame.right]
    return [
        Strip(
            title,
            edges[i],
            edges[i + 1],
            frame.x(x[i]),
            None if y is None else frame.y(float(y[i])),
        )
        for i, title in enumerate(titles)
    ]


def overlay_chart(
    curves: dict[str, Curve],
    styles: dict[str, tuple[int, int]],
    y_label: str,
    last: int,
    *,
    from_zero: bool = False,
    is_percent: bool = False,
) -> Chart:
    """Draws several curves over the steps 0 to `last`, each labeled at its end.

    Args:
      curves: by the letter of their run.
      styles: by letter, the numbers of its color and dashes.
      y_label: name of the y axis.
      last: step.
      from_zero: whether the y axis begins at 0.
      is_percent: whether the values are percentages.
    """
    lines: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for letter, curve in curves.items():
        groups = _thinned(curve)
        lines[letter] = tuple(np.array([a[g].mean() for g in groups]) for a in curve)  # type: ignore[assignment]
    every = np.concatenate([y for _, y in lines.values()])
    frame, y_ticks = axes(
        (0.0, float(last)),
        _value_ticks(every.min(), every.max(), from_zero=from_zero, is_percent=is_percent),
        RIGHT - 14,
    )
    ends = _apart({n: (frame.x(x[-1]) + 5, frame.y(y[-1])) for n, (x, y) in lines.items()})
    series = [
        Series(
            f"run k{styles[letter][0]}",
            f"d{styles[letter][1]}",
            frame.path(x, y),
            _dots(frame, x, y),
            (letter, *ends[letter]) if len(lines) <= _LETTERS else None,
        )
        for letter, (x, y) in lines.items()
    ]
    unit = " %" if is_percent else ""
    words = ", ".join(f"{letter} {number(y[-1])}{unit}" for letter, (_, y) in lines.items())
    return Chart(
        frame,
        _step_ticks(last),
        y_ticks,
        "step",
        y_label,
        f"Line chart of {len(lines)} runs, {y_label} over steps; last: {words}.",
        series,
        strips=_overlay_strips(frame, lines, unit),
    )


def _overlay_strips(
    frame: Frame, lines: dict[str, tuple[np.ndarray, np.ndarray]], unit: str
) -> list[Strip]:
    """Strips at logged steps; a line that lacks one is interpolated."""
    logged = np.unique(np.concatenate([x for x, _ in lines.values()]))
    places = logged[np.linspace(0, len(logged) - 1, min(_STRIPS, len(logged))).astype(int)]
    titles = [
        f"step {place:,.0f}: "
        + ", ".join(
            f"{letter} {number(float(np.interp(place, x, y)))}{unit}"
            for letter, (x, y) in lines.items()
            if x[0] <= place <= x[-1]
        )
        for place in places
    ]
    return _strips(frame, places, titles)


def _apart(ends: dict[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
    """Moves letters as little as keeps them from overlapping."""
    placed: dict[str, tuple[float, float]] = {}
    # From the bottom up: a letter may stand above a chart but not in its ticks.
    for name in sorted(ends, key=lambda n: -ends[n][1]):
        x, y = ends[name]
        y = min(y, BOTTOM - 4)
        close = [other_y for other_x, other_y in placed.values() if abs(other_x - x) < 12]
        placed[name] = x, min([y, *(other_y - 12 for other_y in close)])
    return placed
