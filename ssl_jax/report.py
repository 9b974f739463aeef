"""A run's report: one HTML file with everything inside, made from what the run left in its folder.

The page needs no network and no JavaScript. Its frame and style are in `report_template.html`; the
charts are SVG written by the small functions below.
"""

import base64
import io
import json
import math
import os
import re
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image
from scipy import special

from ssl_jax.config import flatten
from ssl_jax.workdir import read_record

_T = TypeVar("_T")

_METHODS = {
    "simclr": "SimCLR",
    "moco": "MoCo",
    "swav": "SwAV",
    "byol": "BYOL",
    "simsiam": "SimSiam",
    "supervised": "Supervised",
}
_BASELINE = "raw pixels"
_UNTRAINED = (_BASELINE, "random init")

_MAX_POINTS = 200  # in a chart; more records are averaged, the file stays small
_MAX_GROUPS = 24  # of views, and of queries
_THUMB = 64  # CSS pixels

# A chart in its own units, which are CSS pixels where it is 380 pixels wide.
_WIDTH, _HEIGHT = 380.0, 230.0
_TOP, _RIGHT, _BOTTOM = 26.0, _WIDTH - 8, _HEIGHT - 38


def write_report(workdir: Path) -> Path:
    """Writes `report.html` from the files of a run's folder.

    Args:
      workdir: holds `config.json`, and as far as the run has come `metrics.jsonl`,
        `evaluation.json` and `report_images.npz`. Accuracies in them are fractions of 1.

    Returns:
      The path of the page. What could not be read is said in a sentence on it.

    Raises:
      UserError: there is no such folder, or no readable `config.json` in it.
    """
    workdir = Path(workdir)
    run = read_record(workdir)
    metrics, no_metrics = _read(workdir / "metrics.jsonl", _parse_metrics)
    evaluation, no_evaluation = _read(workdir / "evaluation.json", _parse_evaluation)
    images, no_images = _read(workdir / "report_images.npz", _parse_images)
    page = Template(
        resources.files("ssl_jax").joinpath("report_template.html").read_text(encoding="utf-8")
    ).substitute(
        title=escape(_title(run["config"])),
        lead=_lead(metrics, evaluation),
        run=_run_section(run, metrics),
        evaluation=_evaluation_section(evaluation) if evaluation else _absent(no_evaluation),
        training=_training_section(metrics) if metrics else _absent(no_metrics),
        views=_views_section(images) if images else _absent(no_images),
        neighbours=_neighbours_section(images) if images else _absent(no_images),
        reproduce=_reproduce_section(run),
    )
    path = workdir / "report.html"
    # A lone surrogate, which JSON can carry, has no UTF-8 form.
    temporary = path.with_suffix(".tmp")
    temporary.write_text(page, encoding="utf-8", errors="replace")
    os.replace(temporary, path)
    return path


def mean_interval(values: Float[np.ndarray, " n"]) -> tuple[float, float]:
    """The mean of a sample and its 95 % confidence interval, by Student's t.

    For a paired comparison give it the differences.

    Args:
      values: at least one number.

    Returns:
      The mean and half the width of the interval, which is nan for a single value.
    """
    n = len(values)
    if n < 2:
        return float(np.mean(values)), math.nan
    quantile = float(special.stdtrit(n - 1, 0.975))
    return float(np.mean(values)), quantile * float(np.std(values, ddof=1)) / math.sqrt(n)


def proportion_interval(fraction: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion (Wilson 1927; holds at 0 and 1 too).

    Args:
      fraction: the share of successes, in [0, 1].
      count: trials, at least 1.

    Returns:
      The lower and the upper end, in [0, 1].
    """
    z = float(special.ndtri(0.975))
    shrink = 1 + z * z / count
    centre = (fraction + z * z / (2 * count)) / shrink
    half = z * math.sqrt(fraction * (1 - fraction) / count + (z / (2 * count)) ** 2) / shrink
    return max(0.0, centre - half), min(1.0, centre + half)


# Reading


_Curve = tuple[np.ndarray, np.ndarray]  # steps, which rise and are unique, and values


@dataclass(frozen=True)
class _Metrics:
    """The curves by name, each of finite values and at least one of them."""

    curves: dict[str, _Curve]
    not_finite: dict[str, list[int]]  # the steps where a value was nan or infinite
    last_step: int
    unreadable: int  # lines left out


@dataclass(frozen=True)
class _Row:
    """One encoder's accuracies, as fractions; `draws` by labels per class."""

    name: str
    draws: dict[int, np.ndarray]
    single: dict[str, float]  # "linear", "knn"

    @property
    def trained(self) -> bool:
        return self.name not in _UNTRAINED


@dataclass(frozen=True)
class _Evaluation:
    rows: list[_Row]
    test_examples: int
    split: str

    def find(self, name: str) -> _Row | None:
        return next((row for row in self.rows if row.name == name), None)

    @property
    def labels(self) -> list[int]:
        return sorted({k for row in self.rows for k in row.draws})

    @property
    def draws(self) -> int:
        return max((len(values) for row in self.rows for values in row.draws.values()), default=0)


def _read(path: Path, parse: Callable[[Path], _T]) -> tuple[_T | None, str]:
    """What `parse` makes of the file, or None and the sentence that says why not."""
    if not path.is_file():
        return None, f"Not there: the run has not written {path.name}."
    try:
        return parse(path), ""
    except (
        OSError,
        EOFError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        zipfile.BadZipFile,
    ):
        return None, (
            f"Not shown: {path.name} is damaged or has another form than this version of ssl_jax "
            "writes."
        )


def _parse_metrics(path: Path) -> _Metrics:
    points: dict[str, dict[int, float]] = {}
    unreadable = 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            step = int(record.pop("step"))
        except (ValueError, KeyError, TypeError, AttributeError):
            unreadable += 1  # a killed run stops within a line, and the next one appends to it
            continue
        for name, value in record.items():
            if isinstance(value, (int, float)):
                # A resumed run writes the steps since its checkpoint again: the last one counts.
                points.setdefault(name, {})[step] = float(value)
    curves, not_finite = {}, {}
    for name, by_step in points.items():
        steps = sorted(step for step in by_step if math.isfinite(by_step[step]))
        if steps:
            curves[name] = np.array(steps), np.array([by_step[step] for step in steps])
        if len(steps) < len(by_step):
            not_finite[name] = sorted(by_step.keys() - set(steps))
    last_step = max((step for by_step in points.values() for step in by_step), default=0)
    return _Metrics(curves, not_finite, last_step, unreadable)


def _parse_evaluation(path: Path) -> _Evaluation:
    data = json.loads(path.read_text(encoding="utf-8"))
    rows = []
    for entry in data["rows"]:
        draws = {
            int(match[1]): np.array(value["draws"], np.float64)
            for key, value in entry.items()
            if (match := re.fullmatch(r"labels_(\d+)", key)) and value["draws"]
        }
        single = {k: float(entry[k]) for k in ("linear", "knn") if entry.get(k) is not None}
        name = str(entry["name"])
        rows.append(_Row(_METHODS.get(name, name), draws, single))
    evaluation = _Evaluation(rows, int(data["test_examples"]), str(data.get("split", "")))
    for labels in evaluation.labels:
        if len({len(row.draws[labels]) for row in rows if labels in row.draws}) > 1:
            raise ValueError("rows with different numbers of draws cannot be paired")
    values = [
        v for row in rows for v in (*row.single.values(), *np.hstack([*row.draws.values(), []]))
    ]
    if not all(0 <= value <= 1 for value in values):
        raise ValueError("accuracies are fractions of 1")
    if not rows or evaluation.test_examples < 1:
        raise ValueError("an evaluation has rows and test examples")
    return evaluation


def _parse_images(path: Path) -> dict[str, np.ndarray]:
    # Opened here: on a damaged archive np.load leaves its own file open.
    with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
        images = {name: archive[name] for name in archive.files}
    axes = {"originals": 4, "views": 5, "neighbours_query": 4, "neighbours": 5}
    for name, ndim in axes.items():
        if name in images and (
            images[name].dtype != np.uint8
            or images[name].ndim != ndim
            or images[name].shape[-1] != 3
        ):
            raise ValueError(f"{name} is not an array of RGB images")
    return images


# Words and numbers


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}"


def _points(difference: float, sign: bool = True) -> str:
    """A difference of two fractions in percentage points."""
    text = f"{100 * difference:{'+' if sign else ''}.1f}"
    return text.replace("-", "−")


def _range_of_points(mean: float, half: float) -> str:
    return "" if math.isnan(half) else f"{_points(mean - half)} to {_points(mean + half)}"


def _number(value: float) -> str:
    """About four significant digits, thousands separated."""
    text = f"{value:,.0f}" if 1000 <= abs(value) < 1e15 else f"{value:#.4g}"
    return text.replace("-", "−")


def _labels(count: int) -> str:
    return f"{count} label{'' if count == 1 else 's'}"


def _absent(sentence: str) -> str:
    return f'<p class="note">{escape(sentence)}</p>'


def _method(config: dict[str, Any]) -> str:
    name = str(config.get("method", "unknown method"))
    return _METHODS.get(name, name)


def _title(config: dict[str, Any]) -> str:
    data = config.get("data", {}).get("name", "unknown data")
    return f"{_method(config)} on {data}"


def _unfinished(metrics: _Metrics | None) -> str:
    if not metrics or not metrics.last_step:
        return "The run has not logged a step yet."
    facts = []
    if "loss" in metrics.not_finite:
        facts.append(f"loss not finite at step {metrics.not_finite['loss'][0]:,}")
    elif "loss" in metrics.curves:
        facts.append(f"loss {_number(metrics.curves['loss'][1][-1])}")
    if "knn" in metrics.curves:
        steps, values = metrics.curves["knn"]
        facts.append(f"kNN accuracy {_percent(values[-1])} % at step {steps[-1]:,}")
    reached = f"The run has reached step {metrics.last_step:,}"
    if facts:
        reached += f" ({'; '.join(facts)})"
    return f"{reached} and has not been evaluated."


def _lead(metrics: _Metrics | None, evaluation: _Evaluation | None) -> str:
    """The run's result in one sentence, as HTML."""
    trained = next((row for row in evaluation.rows if row.trained), None) if evaluation else None
    if evaluation is None or trained is None or not trained.draws:
        return _unfinished(metrics)
    labels = 5 if 5 in trained.draws else min(trained.draws)
    mean, _ = mean_interval(trained.draws[labels])
    text = (
        f"{escape(trained.name)} reaches <strong>{_percent(mean)} %</strong> "
        f"at {_labels(labels)} per class"
    )
    baseline = evaluation.find(_BASELINE)
    if baseline is None or labels not in baseline.draws:
        return text + "."
    gain, half = mean_interval(trained.draws[labels] - baseline.draws[labels])
    if math.isnan(half):
        side = "above" if gain >= 0 else "below"
        return f"{text}, {_points(abs(gain), sign=False)} points {side} raw pixels, in one draw."
    interval = f"95 % interval {_range_of_points(gain, half)}, paired over {evaluation.draws} draws"
    if gain - half <= 0 <= gain + half:
        return f"{text}, not clearly different from raw pixels ({interval})."
    side = "above" if gain > 0 else "below"
    return (
        f"{text}, <strong>{_points(abs(gain), sign=False)} points</strong> {side} raw pixels "
        f"({interval})."
    )


# Charts


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
class _Frame:
    """Where values lie in a chart."""

    left: float
    x_range: tuple[float, float]
    y_range: tuple[float, float]

    def x(self, value: float) -> float:
        low, high = self.x_range
        return self.left + (value - low) / (high - low) * (_RIGHT - self.left)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return _BOTTOM - (value - low) / (high - low) * (_BOTTOM - _TOP)


def _axes(
    x_range: tuple[float, float],
    x_ticks: Iterable[tuple[float, str]],
    y_ticks: Sequence[float],
    x_label: str,
    y_label: str,
) -> tuple[_Frame, str]:
    """The grid, the ticks and the names of both axes."""
    labels = _tick_labels(y_ticks)
    frame = _Frame(12 + 7.2 * max(map(len, labels)), x_range, (y_ticks[0], y_ticks[-1]))
    parts = [f'<text x="0" y="12">{escape(y_label)}</text>']
    for tick, label in zip(y_ticks, labels, strict=True):
        y = frame.y(tick)
        kind = "axis" if tick == y_ticks[0] or abs(tick) < 1e-12 else "grid"
        parts.append(
            f'<line class="{kind}" x1="{frame.left:.1f}" x2="{_RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{frame.left - 7:.1f}" y="{y + 4:.1f}" text-anchor="end">{label}</text>'
        )
    for tick, label in x_ticks:
        x = frame.x(tick)
        parts.append(
            f'<text x="{x:.1f}" y="{_BOTTOM + 17}" text-anchor="middle">{escape(label)}</text>'
        )
    parts.append(f'<text x="{_RIGHT}" y="{_HEIGHT - 4}" text-anchor="end">{escape(x_label)}</text>')
    return frame, "".join(parts)


def _svg(body: str, description: str) -> str:
    return (
        f'<svg viewBox="0 0 {_WIDTH:g} {_HEIGHT:g}" role="img" '
        f'aria-label="{escape(description)}">{body}</svg>'
    )


def _path(frame: _Frame, xs: Iterable[float], ys: Iterable[float]) -> str:
    return " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in zip(xs, ys, strict=True))


def _line_chart(
    curve: _Curve, y_label: str, last: int, *, from_zero: bool = False, percent: bool = False
) -> str:
    """A curve over the steps 0 to `last`."""
    steps, values = curve
    groups = np.array_split(np.arange(len(steps)), min(len(steps), _MAX_POINTS))
    x = np.array([steps[group].mean() for group in groups])
    mean, low, high = (
        np.array([f(values[group]) for group in groups]) for f in (np.mean, np.min, np.max)
    )
    unit = " %" if percent else ""
    x_ticks = [tick for tick in nice_ticks(0, last, 4) if tick <= last and tick == int(tick)]
    y_ticks = nice_ticks(min(0.0, low.min()) if from_zero else low.min(), high.max(), 4)
    frame, body = _axes(
        (0.0, float(last)),
        [(tick, f"{tick:,.0f}") for tick in x_ticks],
        [tick for tick in y_ticks if tick <= 100] if percent else y_ticks,
        "step",
        y_label,
    )
    if len(groups) < len(steps):
        band = f"{_path(frame, x, high)} {_path(frame, x[::-1], low[::-1])}"
        body += f'<polygon class="band" points="{band}"/>'
    body += f'<polyline class="line" points="{_path(frame, x, mean)}"/>'
    if len(x) <= 30:
        body += "".join(
            f'<circle class="mark" cx="{frame.x(a):.1f}" cy="{frame.y(b):.1f}" r="2.5"/>'
            for a, b in zip(x, mean, strict=True)
        )
    # Each point answers to the pointer in a strip as high as the chart.
    edges = [frame.left, *(frame.x(m) for m in (x[1:] + x[:-1]) / 2), _RIGHT]
    for i, group in enumerate(groups):
        a, b = steps[group[0]], steps[group[-1]]
        where = f"step {a:,}" if a == b else f"steps {a:,} to {b:,}, mean"
        body += (
            f'<g class="hit"><title>{where}: {_number(mean[i])}{unit}</title>'
            f'<rect x="{edges[i]:.1f}" y="{_TOP}" width="{edges[i + 1] - edges[i]:.1f}" '
            f'height="{_BOTTOM - _TOP}"/>'
            f'<circle class="ring" cx="{frame.x(x[i]):.1f}" cy="{frame.y(mean[i]):.1f}" r="4"/></g>'
        )
    return _svg(
        body,
        f"Line chart, {y_label} over steps {steps[0]:,} to {steps[-1]:,}: first "
        f"{_number(values[0])}{unit}, last {_number(values[-1])}{unit}.",
    )


def _marker(shape: int, x: float, y: float) -> str:
    """A disc, a square or a triangle around a point: series differ by more than colour."""
    if shape == 0:
        return f'<circle class="mark" cx="{x:.1f}" cy="{y:.1f}" r="4"/>'
    if shape == 1:
        return f'<rect class="mark" x="{x - 3.5:.1f}" y="{y - 3.5:.1f}" width="7" height="7"/>'
    corners = f"{x:.1f},{y - 4.5:.1f} {x + 4.5:.1f},{y + 3.5:.1f} {x - 4.5:.1f},{y + 3.5:.1f}"
    return f'<polygon class="mark" points="{corners}"/>'


def _look(row: _Row) -> tuple[str, int]:
    """A series' class and marker: the trained encoders take the accent."""
    if row.trained:
        return "series", 0
    return ("base", 1) if row.name == _BASELINE else ("base dots", 2)


def _accuracy_chart(evaluation: _Evaluation) -> str:
    """Mean accuracy with its interval over labels per class, one line for each row."""
    labels = evaluation.labels
    rows = [row for row in evaluation.rows if row.draws]
    stats = [{k: mean_interval(values) for k, values in row.draws.items()} for row in rows]
    ends = [
        100 * (mean + side * np.nan_to_num(half))
        for stat in stats
        for mean, half in stat.values()
        for side in (-1, 1)
    ]
    frame, body = _axes(
        (-0.4, len(labels) - 0.6),
        [(i, str(k)) for i, k in enumerate(labels)],
        [tick for tick in nice_ticks(min(ends), max(ends)) if 0 <= tick <= 100],
        "labels per class",
        "test accuracy, %",
    )
    # The baselines first, so that the trained encoder lies on top.
    for i, (row, stat) in sorted(enumerate(zip(rows, stats, strict=True)), key=_trained_last):
        kind, shape = _look(row)
        at = [(labels.index(k) + 0.06 * (i - (len(rows) - 1) / 2), k) for k in sorted(stat)]
        xs, ys = [x for x, _ in at], [100 * stat[k][0] for _, k in at]
        body += f'<g class="{kind}"><polyline class="line" points="{_path(frame, xs, ys)}"/>'
        for x, k in at:
            mean, half = stat[k]
            body += "<g>" + _title_of(row.name, mean, half, k)
            body += _whisker(frame, x, 100 * mean, 100 * half)
            body += _marker(shape, frame.x(x), frame.y(100 * mean)) + "</g>"
        body += "</g>"
    words = "; ".join(
        f"{row.name} " + ", ".join(f"{_percent(stat[k][0])} at {k}" for k in sorted(stat))
        for row, stat in zip(rows, stats, strict=True)
    )
    return _svg(body, f"Line chart, test accuracy in percent by labels per class: {words}.")


def _trained_last(item: tuple[int, tuple[_Row, Any]]) -> tuple[bool, int]:
    index, (row, _) = item
    return row.trained, index


def _title_of(name: str, mean: float, half: float, labels: int) -> str:
    spread = "" if math.isnan(half) else f" ± {_percent(half)}"
    text = f"{name}, {_labels(labels)} per class: {_percent(mean)}{spread} %"
    return f"<title>{escape(text)}</title>"


def _whisker(frame: _Frame, x: float, mean: float, half: float) -> str:
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


def _difference_chart(baseline: _Row, trained: _Row) -> str:
    """Every draw's difference to the baseline, and their mean with its interval."""
    labels = sorted(trained.draws.keys() & baseline.draws.keys())
    differences = [100 * (trained.draws[k] - baseline.draws[k]) for k in labels]
    every = np.concatenate(differences)
    frame, body = _axes(
        (-0.5, len(labels) - 0.5),
        [(i, str(k)) for i, k in enumerate(labels)],
        nice_ticks(min(0.0, every.min()), max(0.0, every.max())),
        "labels per class",
        f"{trained.name} − {baseline.name}, points",
    )
    for i, values in enumerate(differences):
        spread = np.linspace(-0.22, 0.22, len(values)) - 0.06 if len(values) > 1 else [-0.06]
        for draw, (dx, value) in enumerate(zip(spread, values, strict=True)):
            body += (
                f'<circle class="draw" cx="{frame.x(i + dx):.1f}" cy="{frame.y(value):.1f}" r="3">'
                f"<title>draw {draw + 1}: {_points(value / 100)} points</title></circle>"
            )
        mean, half = mean_interval(values)
        interval = _range_of_points(mean / 100, half / 100)
        words = f"mean {_points(mean / 100)} points" + (f" ({interval})" if interval else "")
        body += f"<g><title>{words}</title>"
        body += _whisker(frame, i + 0.28, mean, half)
        body += _marker(0, frame.x(i + 0.28), frame.y(mean)) + "</g>"
    words = ", ".join(
        f"{_points(values.mean() / 100)} at {k}"
        for k, values in zip(labels, differences, strict=True)
    )
    return _svg(
        body,
        f"Dot chart, difference of {trained.name} to {baseline.name} in points for each draw, by "
        f"labels per class; means {words}.",
    )


def _figure(title: str, text: str, chart: str, legend: str = "") -> str:
    return (
        f'<figure class="chart"><figcaption><h3>{escape(title)}</h3>{text}{legend}</figcaption>'
        f"{chart}</figure>"
    )


# Sections


def _run_section(run: dict[str, Any], metrics: _Metrics | None) -> str:
    config = run["config"]
    views = config.get("views", {})
    count = sum(view.get("count", 1) for view in views.values())
    batch = f"{config.get('batch_size', '?')} images"
    if count:
        batch += f", {count} view{'' if count == 1 else 's'} of each"
    length = f"{config['steps']:,}" if config.get("steps") else f"{config.get('epochs', 0):g}"
    if metrics and metrics.last_step:
        length += f", reached step {metrics.last_step:,}"
    facts = {
        "Method": _method(config),
        "Data": config.get("data", {}).get("name", "?"),
        "Network": _network(config.get("model", {})),
        "Batch": batch,
        "Steps" if config.get("steps") else "Epochs": length,
        "Optimiser": config.get("optim", {}).get("name", "?"),
        "Computed in": config.get("dtype", "?"),
        "Devices": _listing(run.get("devices", {})),
        "Seed": config.get("seed", "?"),
    }
    items = "".join(
        f"<div><dt>{name}</dt><dd>{escape(str(value))}</dd></div>" for name, value in facts.items()
    )
    versions = escape(_listing(run.get("versions", {})))
    items += f'<div class="wide"><dt>Versions</dt><dd>{versions}</dd></div>'
    return f'<dl class="facts">{items}</dl>'


def _network(model: dict[str, Any]) -> str:
    text = f"ResNet-{model.get('depth', '?')}"
    if model.get("width", 1) != 1:
        text += f" {model['width']:g}×"
    if model.get("sk"):
        text += " with SK"
    return f"{text}, {model['stem']} stem" if "stem" in model else text


def _listing(value: Any) -> str:
    """A value of JSON in a line of text."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_listing(item)}" for key, item in value.items()) or "not recorded"
    if isinstance(value, list):
        return ", ".join(_listing(item) for item in value) or "none"
    return str(value)


def _training_section(metrics: _Metrics) -> str:
    if not metrics.last_step:
        return _absent("Not there: metrics.jsonl holds no record.")
    curves = metrics.curves
    figures = []

    def add(title: str, text: str, curve: _Curve, y_label: str, **options: bool) -> None:
        chart = _line_chart(curve, y_label, metrics.last_step, **options)
        figures.append(_figure(title, text, chart))

    if "loss" in curves:
        steps, values = curves["loss"]
        first, last = (f"{_number(values[i])} at step {steps[i]:,}" for i in (0, -1))
        add("Loss", f"From {first} to {last}.", (steps, values), "loss")
    if "knn" in curves:
        steps, values = curves["knn"][0], 100 * curves["knn"][1]
        best = int(np.argmax(values))
        text = f"Last {values[-1]:.1f} %, best {values[best]:.1f} % at step {steps[best]:,}."
        add("kNN accuracy", text, (steps, values), "accuracy, %", percent=True)
    if "learning_rate" in curves:
        text = f"Peak {curves['learning_rate'][1].max():g}."
        add("Learning rate", text, curves["learning_rate"], "learning rate", from_zero=True)
    if "images_per_s" in curves:
        text = f"Median {_number(float(np.median(curves['images_per_s'][1])))} images per second."
        if "data_wait" in curves:
            text += (
                f" Waiting for data: {_percent(np.median(curves['data_wait'][1]))} % of the time."
            )
        add("Speed", text, curves["images_per_s"], "images per second", from_zero=True)
    return f'{_warnings(metrics)}<div class="pairs">{"".join(figures)}</div>{_remarks(metrics)}'


def _warnings(metrics: _Metrics) -> str:
    return "".join(
        f'<p class="warning">{escape(name)} is not a finite number in {len(steps):,} of '
        f"{len(steps) + len(metrics.curves.get(name, ([],))[0]):,} records, first at step "
        f"{steps[0]:,}.</p>"
        for name, steps in metrics.not_finite.items()
    )


def _remarks(metrics: _Metrics) -> str:
    remarks = []
    if "knn" not in metrics.curves:
        remarks.append("No kNN accuracy has been measured during training.")
    if any(len(steps) > _MAX_POINTS for steps, _ in metrics.curves.values()):
        remarks.append("Lines are means of neighbouring records; the band spans them.")
    if metrics.unreadable:
        lines = "1 line" if metrics.unreadable == 1 else f"{metrics.unreadable} lines"
        remarks.append(f"{lines} of metrics.jsonl could not be read.")
    return _absent(" ".join(remarks)) if remarks else ""


def _evaluation_section(evaluation: _Evaluation) -> str:
    baseline = evaluation.find(_BASELINE)
    trained = next((row for row in evaluation.rows if row.trained), None)
    split = f" ({evaluation.split})" if evaluation.split else ""
    intro = f"Measured on {evaluation.test_examples:,} test images{split}."
    if evaluation.draws:
        intro += (
            f" Each draw picks the labelled images anew, the same ones for every row;"
            f" there are {evaluation.draws} draws."
        )
    html = f"<p>{escape(intro)}</p>"
    charts = []
    if evaluation.draws:
        legend = "".join(
            f'<li><svg viewBox="0 0 30 12" aria-hidden="true"><g class="{kind}">'
            f'<line class="line" x1="0" x2="30" y1="6" y2="6"/>{_marker(shape, 15, 6)}</g></svg>'
            f"{escape(row.name)}</li>"
            for row in evaluation.rows
            for kind, shape in [_look(row)]
        )
        charts.append(
            _figure(
                "Accuracy with few labels",
                "Means over the draws, bars their 95 % intervals.",
                _accuracy_chart(evaluation),
                f'<ul class="legend">{legend}</ul>',
            )
        )
    if baseline and trained and baseline.draws.keys() & trained.draws.keys():
        charts.append(
            _figure(
                f"{trained.name} against {baseline.name}",
                "Pale dots are single draws, the dark one their mean with its 95 % interval.",
                _difference_chart(baseline, trained),
            )
        )
    tables = [_accuracy_table(evaluation)]
    if baseline and len(evaluation.rows) > 1:
        tables.append(_difference_table(evaluation, baseline))
    html += f'<div class="pairs">{"".join(charts + tables)}</div>'
    if not baseline:
        html += _absent("No differences are shown: the evaluation has no row for raw pixels.")
    return html + _absent(
        "± and ranges are 95 % intervals. Those over draws (Student's t) tell how well the mean "
        "over labelled sets is known; those of the linear probe and of kNN, each fitted once "
        "to all labels (Wilson), how well the accuracy is known from so many test images. "
        "Neither covers another seed of the training."
    )


def _accuracy_table(evaluation: _Evaluation) -> str:
    def over_draws(row: _Row, labels: int) -> str:
        if labels not in row.draws:
            return _cell(row)
        mean, half = mean_interval(row.draws[labels])
        return _cell(row, _percent(mean), "" if math.isnan(half) else f"± {_percent(half)}")

    def once(row: _Row, key: str) -> str:
        if key not in row.single:
            return _cell(row)
        low, high = proportion_interval(row.single[key], evaluation.test_examples)
        return _cell(row, _percent(row.single[key]), f"{_percent(low)}–{_percent(high)}")

    text = "In percent; labels are per class."
    return _table("Test accuracy", text, evaluation.rows, evaluation.labels, over_draws, once)


def _difference_table(evaluation: _Evaluation, baseline: _Row) -> str:
    def over_draws(row: _Row, labels: int) -> str:
        if labels not in row.draws or labels not in baseline.draws:
            return _cell(row)
        mean, half = mean_interval(row.draws[labels] - baseline.draws[labels])
        return _cell(row, _points(mean), _range_of_points(mean, half))

    def once(row: _Row, key: str) -> str:
        if key not in row.single or key not in baseline.single:
            return _cell(row)
        return _cell(row, _points(row.single[key] - baseline.single[key]))

    rows = [row for row in evaluation.rows if row is not baseline]
    text = "In points, paired draw by draw; labels are per class."
    return _table("Difference to raw pixels", text, rows, evaluation.labels, over_draws, once)


def _cell(row: _Row, value: str = "–", spread: str = "") -> str:
    own = ' class="own"' if row.trained else ""
    small = f'<span class="spread">{spread}</span>' if spread else ""
    return f"<td{own}>{value}{small}</td>"


def _table(
    title: str,
    text: str,
    rows: list[_Row],
    labels: list[int],
    over_draws: Callable[[_Row, int], str],
    once: Callable[[_Row, str], str],
) -> str:
    """Evaluations down, encoders across; the two functions make the cells."""
    head = "".join(
        f'<th scope="col"{" class=own" if row.trained else ""}>{escape(row.name)}</th>'
        for row in rows
    )
    lines = [(_labels(count), [over_draws(row, count) for row in rows]) for count in labels]
    for key, name in (("linear", "Linear probe"), ("knn", "kNN")):
        lines.append((name, [once(row, key) for row in rows]))
    body = "".join(f'<tr><th scope="row">{name}</th>{"".join(cells)}</tr>' for name, cells in lines)
    return (
        f"<table><caption><h3>{title}</h3>{text}</caption>"
        f'<thead><tr><th scope="col">Evaluation</th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table>"
    )


def _thumb(image: UInt8[np.ndarray, "h w 3"], alt: str, caption: str = "", kind: str = "") -> str:
    """An image as a figure, small ones enlarged by whole factors, `caption` is HTML."""
    height, width = image.shape[:2]
    picture = Image.fromarray(image)
    if max(height, width) > 2 * _THUMB:  # twice, for dense screens
        picture.thumbnail((2 * _THUMB, 2 * _THUMB))
    scale = _THUMB / max(height, width)
    scale = math.floor(scale) if scale >= 1 else scale
    data = io.BytesIO()
    picture.save(data, "PNG", optimize=True)
    source = base64.b64encode(data.getvalue()).decode("ascii")
    shown = round(scale * width), round(scale * height)
    return (
        f'<figure class="thumb {kind}">'
        f'<img{" class=small" if scale > 1 else ""} src="data:image/png;base64,{source}" '
        f'alt="{escape(alt)}" width="{shown[0]}" height="{shown[1]}">'
        f"{f'<figcaption>{caption}</figcaption>' if caption else ''}</figure>"
    )


def _views_section(images: dict[str, np.ndarray]) -> str:
    if "originals" not in images or "views" not in images or not len(images["originals"]):
        return _absent("Not there: report_images.npz holds no views.")
    originals, views = images["originals"][:_MAX_GROUPS], images["views"][:_MAX_GROUPS]
    items = "".join(
        "<li>"
        + _thumb(original, f"Image {i}, original", kind="first")
        + "".join(_thumb(view, f"Image {i}, view {j}") for j, view in enumerate(group, start=1))
        + "</li>"
        for i, (original, group) in enumerate(zip(originals, views, strict=False), start=1)
    )
    return (
        f"<p>Each group is an original image and {views.shape[1]} views of it as training draws "
        f'them.</p><ul class="gallery">{items}</ul>'
    )


def _name(text: str) -> str:
    """A class's name, which the page cuts short where it is long."""
    return f'<span class="name" title="{escape(text)}">{escape(text)}</span>' if text else ""


def _neighbours_section(images: dict[str, np.ndarray]) -> str:
    names = ("neighbours_query", "neighbours", "neighbour_similarity")
    if any(name not in images for name in names) or not images["neighbours"].size:
        return _absent("Not there: report_images.npz holds no neighbours.")
    query, neighbours, similarity = (images[name][:_MAX_GROUPS] for name in names)
    text = (
        "Left of each line a test image, right of it the training images with the most similar "
        "features and their cosine similarity."
    )
    # Without labels no neighbour is wrong, and none has a name.
    right = np.ones(neighbours.shape[:2], bool)
    own, other = np.full(len(query), ""), np.full(right.shape, "")
    if {"query_label", "neighbour_label", "class_names"} <= images.keys():
        label, found = (images[name][: len(query)] for name in ("query_label", "neighbour_label"))
        right = found == label[:, None]
        own, other = images["class_names"][label], images["class_names"][found]
        text += (
            f" {right.sum()} of {right.size} are of the test image's class; the others have a "
            "dashed frame, a ✕ and their class."
        )
    items = []
    for i, name in enumerate(own):
        alt = f"Test image {i + 1}" + (f": {name}" if name else "")
        hits = "".join(
            f"<li>{_hit(neighbours[i, j], j + 1, similarity[i, j], other[i, j], right[i, j])}</li>"
            for j in range(neighbours.shape[1])
        )
        first = _thumb(query[i], alt, _name(name), "query")
        items.append(f'<li>{first}<ul class="hits">{hits}</ul></li>')
    line = (_THUMB + 8) * neighbours.shape[1] + 96  # so wide is a query with all its neighbours
    return f'<p>{text}</p><ul class="queries" style="--line:{line}px">{"".join(items)}</ul>'


def _hit(
    image: UInt8[np.ndarray, "h w 3"], rank: int, similarity: float, name: str, right: bool
) -> str:
    alt = f"Neighbour {rank}, similarity {similarity:.2f}"
    if name:
        alt += f": {name}, {'same' if right else 'another'} class"
    if right:
        return _thumb(image, alt, f"{similarity:.2f}")
    caption = f'{similarity:.2f} <span class="cross">✕</span>{_name(name)}'
    return _thumb(image, alt, caption, "wrong")


def _reproduce_section(run: dict[str, Any]) -> str:
    git, command = run.get("git"), run.get("command")
    revision = (
        f"The git revision was <code>{escape(str(git))}</code>."
        if git
        else "No git revision was recorded."
    )
    if command:
        # A line may break between words only, not after the hyphens of an option.
        words = " ".join(f"<span>{escape(word)}</span>" for word in str(command).split(" "))
        html = f"<p>{revision} The command was:</p><pre>{words}</pre>"
    else:
        html = f"<p>{revision} The command was not recorded.</p>"
    if run.get("xla_flags"):
        html += f"<p>XLA_FLAGS was <code>{escape(str(run['xla_flags']))}</code>.</p>"
    lines = "".join(
        f'<tr><th scope="row">{escape(key)}</th><td>{escape(json.dumps(value))}</td></tr>'
        for key, value in flatten(run["config"]).items()
    )
    return (
        f"{html}<details><summary>The whole config</summary>"
        '<table class="config"><thead><tr><th scope="col">Key</th><th scope="col">Value</th></tr>'
        f"</thead><tbody>{lines}</tbody></table></details>"
    )
