"""Tables and charts of a run's accuracies, for the report, the model card and the terminal."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ssl_jax.errors import counted
from ssl_jax.evals.intervals import mean_interval, proportion_interval
from ssl_jax.evals.results import (
    BASELINE,
    EVALUATION,
    ONLINE,
    SINGLE,
    Evaluation,
    Measure,
    Row,
    read_evaluation,
    read_results,
    result_line,
)
from ssl_jax.methods import title
from ssl_jax.report.charts import Chart, Mark, Series, axes, nice_ticks
from ssl_jax.report.reading import read
from ssl_jax.report.words import percent, points, range_of_points

METRICS = {
    "top1": "Top-1",
    "top5": "Top-5",
    "mean_per_class": "Mean per class",
    "calibration_error": "Calibration error",
    "mean_ap": "mAP",
    "mean_ap_11_point": "11-point mAP",
}


class Cell(NamedTuple):
    """A value in a table, with its interval."""

    value: str
    spread: str = ""


MISSING = Cell("–")


def measures(rows: Iterable[Row | None]) -> list[Measure]:
    """The measures that any row has an accuracy of, in the order of a table."""
    found = [row for row in rows if row]
    few = sorted({count for row in found for count in row.trials})
    return [*few, *(key for key in SINGLE if any(key in row.single for row in found))]


def measure_name(measure: Measure) -> str:
    """Names a measure, for tables."""
    if isinstance(measure, int):
        return f"{counted(measure, 'label')} per class"
    return {"linear": "Linear probe", "knn": "kNN", "mean_ap": "Linear probe, mAP"}[measure]


def accuracy(row: Row | None, measure: Measure, test_examples: int) -> Cell:
    """An accuracy in percent, with its 95 % interval."""
    if row is not None and isinstance(measure, int) and measure in row.trials:
        mean, half = mean_interval(row.trials[measure])
        return Cell(percent(mean), "" if math.isnan(half) else f"± {percent(half)}")
    if row is not None and measure in row.intervals:
        low, high = row.intervals[str(measure)]
        return Cell(percent(row.single[str(measure)]), f"{percent(low)}–{percent(high)}")
    if row is not None and measure in row.single:
        low, high = proportion_interval(row.single[str(measure)], test_examples)
        return Cell(percent(row.single[str(measure)]), f"{percent(low)}–{percent(high)}")
    return MISSING


def difference(row: Row | None, other: Row | None, measure: Measure) -> Cell:
    """The difference of two accuracies in points, paired by trial, with its 95 % interval."""
    if row is None or other is None:
        return MISSING
    if isinstance(measure, int) and measure in row.trials and measure in other.trials:
        mean, half = mean_interval(row.trials[measure] - other.trials[measure])
        return Cell(points(mean), range_of_points(mean, half))
    if measure in row.single and measure in other.single:
        return Cell(points(row.single[str(measure)] - other.single[str(measure)]))
    return MISSING


def row_name(row: Row) -> str:
    """A row's name: a baseline's, or the method's as its paper writes it."""
    return title(row.name)


def evaluation_table(workdir: Path) -> list[str]:
    """Formats the accuracies in a run's folder as lines of text: a table, and other results."""
    others = [result_line(record) for record in read_results(workdir)[0]]
    path = workdir / EVALUATION
    evaluation, unreadable = read(path, read_evaluation)
    if evaluation is None:
        return [unreadable, *others] if path.exists() else others
    columns = measures(evaluation.rows)
    cells = [["", *map(measure_name, columns)]] + [
        [row_name(row), *(accuracy(row, each, evaluation.test_examples).value for each in columns)]
        for row in evaluation.rows
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
        for line in cells
    ] + [*evaluation.notes, *others]


def results_section(workdir: Path) -> dict[str, Any]:
    """The results that commands have added, and the names of corrupt files."""
    results, corrupt = read_results(workdir)
    # Only a table of every result's metrics: most folders have none of several labels per image.
    shown = {k: v for k, v in METRICS.items() if any(k in each["metrics"] for each in results)}
    return {"metrics": shown, "results": results, "corrupt": corrupt}


def _style(row: Row) -> tuple[str, str]:
    """A series' class and marker: trained encoders have the accent color."""
    if row.trained:
        return "series", "disc"
    if row.name == ONLINE:
        return "base", "dot"
    return ("base", "square") if row.name == BASELINE else ("base dots", "triangle")


def _accuracy_chart(evaluation: Evaluation) -> Chart:
    """Mean accuracy with its interval by labels per class, one line per row."""
    labels = evaluation.labels
    rows = [row for row in evaluation.rows if row.trials]
    stats = [{k: mean_interval(values) for k, values in row.trials.items()} for row in rows]
    # The interval of a few trials may exceed the range of accuracies.
    ends = [
        float(np.clip(100 * (mean + side * np.nan_to_num(half)), 0, 100))
        for stat in stats
        for mean, half in stat.values()
        for side in (-1, 1)
    ]
    frame, y_ticks = axes(
        (-0.4, len(labels) - 0.6),
        [tick for tick in nice_ticks(min(ends), max(ends)) if 0 <= tick <= 100],
    )
    series = []
    # The baselines first, so that the trained encoder is on top.
    order = sorted(range(len(rows)), key=lambda i: (rows[i].trained, i))
    for i in order:
        style, shape = _style(rows[i])
        xs = [labels.index(k) + 0.06 * (i - (len(rows) - 1) / 2) for k in sorted(stats[i])]
        ys = [100 * stats[i][k][0] for k in sorted(stats[i])]
        marks = []
        for x, y, k in zip(xs, ys, sorted(stats[i]), strict=True):
            mean, half = stats[i][k]
            spread = "" if math.isnan(half) else f" ± {percent(half)}"
            title = f"{row_name(rows[i])}, {measure_name(k)}: {percent(mean)}{spread} %"
            marks.append(Mark(frame.x(x), frame.y(y), shape, title, frame.whisker(y, 100 * half)))
        series.append(Series(style, line=frame.path(xs, ys), marks=marks))
    words = "; ".join(
        f"{row_name(row)} " + ", ".join(f"{percent(stat[k][0])} at {k}" for k in sorted(stat))
        for row, stat in zip(rows, stats, strict=True)
    )
    return Chart(
        frame,
        [(i, str(k)) for i, k in enumerate(labels)],
        y_ticks,
        "labels per class",
        "test accuracy, %",
        f"Line chart, test accuracy in percent by labels per class: {words}.",
        series,
    )


def _difference_chart(baseline: Row, trained: Row) -> Chart:
    """The difference to the baseline in each trial, and the mean with its interval."""
    labels = sorted(trained.trials.keys() & baseline.trials.keys())
    differences = [100 * (trained.trials[k] - baseline.trials[k]) for k in labels]
    every = np.concatenate(differences)
    frame, y_ticks = axes(
        (-0.5, len(labels) - 0.5), nice_ticks(min(0.0, every.min()), max(0.0, every.max()))
    )
    marks = []
    for i, values in enumerate(differences):
        spread = np.linspace(-0.22, 0.22, len(values)) - 0.06 if len(values) > 1 else [-0.06]
        for trial, (dx, value) in enumerate(zip(spread, values, strict=True), start=1):
            title = f"trial {trial}: {points(value / 100)} points"
            marks.append(Mark(frame.x(i + dx), frame.y(value), "trial", title))
        mean, half = mean_interval(values)
        interval = range_of_points(mean / 100, half / 100)
        title = f"mean {points(mean / 100)} points" + (f" ({interval})" if interval else "")
        whisker = frame.whisker(mean, half)
        marks.append(Mark(frame.x(i + 0.28), frame.y(mean), "disc", title, whisker))
    words = ", ".join(
        f"{points(values.mean() / 100)} at {k}"
        for k, values in zip(labels, differences, strict=True)
    )
    name = row_name(trained)
    return Chart(
        frame,
        [(i, str(k)) for i, k in enumerate(labels)],
        y_ticks,
        "labels per class",
        f"{name} − {baseline.name}, points",
        f"Dot chart, difference of {name} to {baseline.name} in points for each trial, by labels "
        f"per class; means {words}.",
        [Series(marks=marks)],
    )


def evaluation_section(evaluation: Evaluation) -> dict[str, Any]:
    """The accuracies with intervals, and paired differences to raw pixels."""
    baseline, trained = evaluation.find(BASELINE), evaluation.trained
    split = f" ({evaluation.split})" if evaluation.split else ""
    text = f"Measured on {evaluation.test_examples:,} test images{split}."
    if evaluation.trials:
        text += (
            " Each trial samples the labeled images, the same for every row "
            f"({counted(evaluation.trials, 'trial')})."
        )
    text = " ".join([text, *evaluation.notes])
    charts: dict[str, Any] = {}
    if evaluation.trials:
        charts["accuracy"] = _accuracy_chart(evaluation)
    if baseline and trained and baseline.trials.keys() & trained.trials.keys():
        title = f"{row_name(trained)} against {baseline.name}"
        charts["difference"] = title, _difference_chart(baseline, trained)
    lines = measures(evaluation.rows)
    others = [row for row in evaluation.rows if row is not baseline]
    return {
        "text": text,
        "charts": charts,
        "legend": [(*_style(row), row_name(row)) for row in evaluation.rows],
        "heads": _heads(evaluation.rows),
        "accuracies": [
            (
                measure_name(each),
                [accuracy(row, each, evaluation.test_examples) for row in evaluation.rows],
            )
            for each in lines
        ],
        "baseline": baseline is not None,
        "difference_heads": _heads(others),
        "differences": [
            (measure_name(each), [difference(row, baseline, each) for row in others])
            for each in lines
        ]
        if baseline
        else [],
    }


def _heads(rows: list[Row]) -> list[tuple[str, bool]]:
    return [(row_name(row), row.trained) for row in rows]
