"""Charts as SVG: axes, lines, marks. Colours and dashes are classes of `page.html`."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from ssl_jax.report.reading import Curve
from ssl_jax.report.words import number

_MAX_POINTS = 200  # in a line; more records are averaged, the file stays small
_FEW = 30
_STRIPS = 50  # of a chart of several lines, in which the pointer finds values

# A chart in its own units, which are CSS pixels where it is 380 pixels wide.
WIDTH, HEIGHT = 380.0, 230.0
TOP, RIGHT, BOTTOM = 26.0, WIDTH - 8, HEIGHT - 38


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers that enclose a range, 1, 2 or 5 times a power of ten apart.

    Args:
      low: the range's lower end.
      high: its upper end.
      count: how many steps the range is divided into, at most about so many.

    Returns:
      Rising numbers; the first is at most `low`, the last at least `high`.
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


@dataclass(frozen=True)
class Frame:
    """Where values lie in a chart."""

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


def axes(
    x_range: tuple[float, float],
    x_ticks: Iterable[tuple[float, str]],
    y_ticks: Sequence[float],
    x_label: str,
    y_label: str,
    right: float = RIGHT,
) -> tuple[Frame, str]:
    """The grid, the ticks and the names of both axes."""
    labels = _tick_labels(y_ticks)
    frame = Frame(12 + 7.2 * max(map(len, labels)), x_range, (y_ticks[0], y_ticks[-1]), right)
    parts = [f'<text x="0" y="12">{escape(y_label)}</text>']
    for tick, label in zip(y_ticks, labels, strict=True):
        y = frame.y(tick)
        kind = "axis" if tick == y_ticks[0] or abs(tick) < 1e-12 else "grid"
        parts.append(
            f'<line class="{kind}" x1="{frame.left:.1f}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{frame.left - 7:.1f}" y="{y + 4:.1f}" text-anchor="end">{label}</text>'
        )
    for tick, label in x_ticks:
        x = frame.x(tick)
        parts.append(
            f'<text x="{x:.1f}" y="{BOTTOM + 17}" text-anchor="middle">{escape(label)}</text>'
        )
    parts.append(f'<text x="{right}" y="{HEIGHT - 4}" text-anchor="end">{escape(x_label)}</text>')
    return frame, "".join(parts)


def svg(body: str, description: str) -> str:
    """A chart, with what it shows in words."""
    return (
        f'<svg class="figure" viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img" '
        f'aria-label="{escape(description)}">{body}</svg>'
    )


def path(frame: Frame, xs: Iterable[float], ys: Iterable[float]) -> str:
    """The points of a line."""
    return " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in zip(xs, ys, strict=True))


def shows_means(curve: Curve) -> bool:
    """Whether a curve has more points than a line is drawn through."""
    return len(curve[0]) > _MAX_POINTS


def _thinned(curve: Curve, count: int = _MAX_POINTS) -> list[np.ndarray]:
    """The indices of a curve's records, in so many groups at most."""
    return np.array_split(np.arange(len(curve[0])), min(len(curve[0]), count))


def _step_ticks(last: int) -> list[tuple[float, str]]:
    ticks = [tick for tick in nice_ticks(0, last, 4) if tick <= last and tick == int(tick)]
    return [(tick, f"{tick:,.0f}") for tick in ticks]


def _value_ticks(low: float, high: float, *, from_zero: bool, is_percent: bool) -> list[float]:
    ticks = nice_ticks(min(0.0, low) if from_zero else low, high, 4)
    return [tick for tick in ticks if tick <= 100] if is_percent else ticks


def line_chart(
    curve: Curve, y_label: str, last: int, *, from_zero: bool = False, is_percent: bool = False
) -> str:
    """A curve over the steps 0 to `last`."""
    steps, values = curve
    groups = _thinned(curve)
    x = np.array([steps[group].mean() for group in groups])
    mean, low, high = (
        np.array([f(values[group]) for group in groups]) for f in (np.mean, np.min, np.max)
    )
    y_ticks = _value_ticks(low.min(), high.max(), from_zero=from_zero, is_percent=is_percent)
    frame, body = axes((0.0, float(last)), _step_ticks(last), y_ticks, "step", y_label)
    if len(groups) < len(steps):
        band = f"{path(frame, x, high)} {path(frame, x[::-1], low[::-1])}"
        body += f'<polygon class="band" points="{band}"/>'
    body += f'<polyline class="line" points="{path(frame, x, mean)}"/>'
    body += _dots(frame, x, mean)
    unit = " %" if is_percent else ""
    titles = []
    for value, group in zip(mean, groups, strict=True):
        a, b = steps[group[0]], steps[group[-1]]
        where = f"step {a:,}" if a == b else f"steps {a:,} to {b:,}, mean"
        titles.append(f"{where}: {number(value)}{unit}")
    body += _strips(frame, x, titles, mean)
    return svg(
        body,
        f"Line chart, {y_label} over steps {steps[0]:,} to {steps[-1]:,}: first "
        f"{number(values[0])}{unit}, last {number(values[-1])}{unit}.",
    )


def _dots(frame: Frame, x: np.ndarray, y: np.ndarray) -> str:
    """The points of a line that has few."""
    if len(x) > _FEW:
        return ""
    return "".join(
        f'<circle class="mark" cx="{frame.x(a):.1f}" cy="{frame.y(b):.1f}" r="2.5"/>'
        for a, b in zip(x, y, strict=True)
    )


def _strips(frame: Frame, x: np.ndarray, titles: list[str], y: np.ndarray | None = None) -> str:
    """Places that answer to the pointer, as high as the chart, each with a ring on the line."""
    edges = [frame.left, *(frame.x(m) for m in (x[1:] + x[:-1]) / 2), frame.right]
    parts = []
    for i, title in enumerate(titles):
        at = frame.x(x[i])
        ring = f"M{at:.1f} {TOP}V{BOTTOM}"
        mark = (
            f'<path class="rule" d="{ring}"/>'
            if y is None
            else f'<circle class="ring" cx="{at:.1f}" cy="{frame.y(y[i]):.1f}" r="4"/>'
        )
        parts.append(
            f'<g class="hit"><title>{escape(title)}</title>'
            f'<rect x="{edges[i]:.1f}" y="{TOP}" width="{edges[i + 1] - edges[i]:.1f}" '
            f'height="{BOTTOM - TOP}"/>{mark}</g>'
        )
    return "".join(parts)


def overlay_chart(
    curves: dict[str, Curve],
    looks: dict[str, int],
    y_label: str,
    last: int,
    *,
    from_zero: bool = False,
    is_percent: bool = False,
) -> str:
    """Several curves over the steps 0 to `last`, each named where it ends.

    Args:
      curves: by the letter of their run.
      looks: of each letter, the number of its colour and dashes.
      y_label: of the values.
      last: step.
      from_zero: whether the axis begins at 0.
      is_percent: whether the values are percentages.
    """
    lines: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for letter, curve in curves.items():
        groups = _thinned(curve)
        lines[letter] = tuple(np.array([a[g].mean() for g in groups]) for a in curve)  # type: ignore[assignment]
    every = np.concatenate([y for _, y in lines.values()])
    y_ticks = _value_ticks(every.min(), every.max(), from_zero=from_zero, is_percent=is_percent)
    right = RIGHT - 14
    frame, body = axes((0.0, float(last)), _step_ticks(last), y_ticks, "step", y_label, right)
    ends = _apart({n: (frame.x(x[-1]) + 5, frame.y(y[-1])) for n, (x, y) in lines.items()})
    for letter, (x, y) in lines.items():
        body += (
            f'<g class="run k{looks[letter]}"><polyline class="line d{looks[letter]}" '
            f'points="{path(frame, x, y)}"/>{_dots(frame, x, y)}'
            f'<text class="letter" x="{ends[letter][0]:.1f}" y="{ends[letter][1] + 4:.1f}">'
            f"{letter}</text></g>"
        )
    unit = " %" if is_percent else ""
    # At steps that were logged; of lines that were not, between their neighbours.
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
    body += _strips(frame, places, titles)
    words = ", ".join(f"{letter} {number(y[-1])}{unit}" for letter, (_, y) in lines.items())
    return svg(body, f"Line chart of {len(lines)} runs, {y_label} over steps; last: {words}.")


def _apart(ends: dict[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
    """Places of letters, moved as little as it takes that they don't lie on each other."""
    placed: dict[str, tuple[float, float]] = {}
    # From the bottom up, for a letter may stand above a chart but not in its ticks.
    for name in sorted(ends, key=lambda n: -ends[n][1]):
        x, y = ends[name]
        y = min(y, BOTTOM - 4)
        beside = [other_y for other_x, other_y in placed.values() if abs(other_x - x) < 12]
        placed[name] = x, min([y, *(other_y - 12 for other_y in beside)])
    return placed


def marker(shape: int, x: float, y: float) -> str:
    """A disc, a square or a triangle around a point: series differ by more than colour."""
    if shape == 0:
        return f'<circle class="mark" cx="{x:.1f}" cy="{y:.1f}" r="4"/>'
    if shape == 1:
        return f'<rect class="mark" x="{x - 3.5:.1f}" y="{y - 3.5:.1f}" width="7" height="7"/>'
    corners = f"{x:.1f},{y - 4.5:.1f} {x + 4.5:.1f},{y + 3.5:.1f} {x - 4.5:.1f},{y + 3.5:.1f}"
    return f'<polygon class="mark" points="{corners}"/>'


def whisker(frame: Frame, x: float, mean: float, half: float) -> str:
    """An interval around a mean, as far as the chart goes."""
    if math.isnan(half):
        return ""
    # An interval from a few draws may be wider than the chart.
    bottom, top = frame.y_range
    low, high = (frame.y(min(max(y, bottom), top)) for y in (mean - half, mean + half))
    at = frame.x(x)
    return (
        f'<path class="whisker" d="M{at:.1f} {low:.1f}V{high:.1f}'
        f'M{at - 4:.1f} {low:.1f}h8M{at - 4:.1f} {high:.1f}h8"/>'
    )


def figure(title: str, text: str, chart: str, legend: str = "") -> str:
    """A chart with its caption, of which `legend` is HTML."""
    return (
        f'<figure class="chart"><figcaption><h3>{escape(title)}</h3>{text}{legend}</figcaption>'
        f"{chart}</figure>"
    )
