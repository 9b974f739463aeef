"""The tables and charts of what a run's encoder is worth."""

import math
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from ssl_jax.evals.intervals import mean_interval, proportion_interval
from ssl_jax.evals.results import read_results
from ssl_jax.report.charts import axes, figure, marker, nice_ticks, path, svg, whisker
from ssl_jax.report.reading import BASELINE, Evaluation, Row
from ssl_jax.report.words import absent, labels_text, percent, points, range_of_points

_RESULTS = {
    "top1": "Top-1",
    "top5": "Top-5",
    "mean_per_class": "Mean per class",
    "calibration_error": "Calibration error",
}


def results_section(workdir: Path) -> str:
    """The evaluations that commands have added, one a column; nothing where there are none."""
    results, corrupt = read_results(workdir)
    sorry = f"<p>Could not be read: {escape(', '.join(corrupt))}.</p>" if corrupt else ""
    if not results:
        return sorry

    def cell(record: dict[str, Any], key: str) -> str:
        if key not in record["metrics"]:
            return "<td></td>"
        found = record["metrics"][key]
        low, high = 100 * found["low"], 100 * found["high"]
        return f"<td>{100 * found['value']:.1f} <small>{low:.1f} to {high:.1f}</small></td>"

    head = "".join(f'<th scope="col">{name}</th>' for name in _RESULTS.values())
    body = "".join(
        f'<tr><th scope="row">{escape(record["what"])}</th>'
        f"{''.join(cell(record, key) for key in _RESULTS)}"
        f"<td>{record['metrics']['examples']:,}</td></tr>"
        for record in results
    )
    return (
        "<table><caption><h3>Further evaluations</h3>Percent, with 95 % intervals by bootstrap "
        "over the held-out images.</caption>"
        f'<thead><tr><th scope="col">Classifier</th>{head}<th scope="col">Images</th></tr></thead>'
        f"<tbody>{body}</tbody></table>{sorry}"
    )


def _look(row: Row) -> tuple[str, int]:
    """A series' class and marker: the trained encoders take the accent."""
    if row.trained:
        return "series", 0
    return ("base", 1) if row.name == BASELINE else ("base dots", 2)


def _accuracy_chart(evaluation: Evaluation) -> str:
    """Mean accuracy with its interval over labels per class, one line for each row."""
    labels = evaluation.labels
    rows = [row for row in evaluation.rows if row.trials]
    stats = [{k: mean_interval(values) for k, values in row.trials.items()} for row in rows]
    # An interval from a few trials may go beyond what an accuracy can be.
    ends = [
        float(np.clip(100 * (mean + side * np.nan_to_num(half)), 0, 100))
        for stat in stats
        for mean, half in stat.values()
        for side in (-1, 1)
    ]
    frame, body = axes(
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
        body += f'<g class="{kind}"><polyline class="line" points="{path(frame, xs, ys)}"/>'
        for x, k in at:
            mean, half = stat[k]
            body += "<g>" + _title_of(row.name, mean, half, k)
            body += whisker(frame, x, 100 * mean, 100 * half)
            body += marker(shape, frame.x(x), frame.y(100 * mean)) + "</g>"
        body += "</g>"
    words = "; ".join(
        f"{row.name} " + ", ".join(f"{percent(stat[k][0])} at {k}" for k in sorted(stat))
        for row, stat in zip(rows, stats, strict=True)
    )
    return svg(body, f"Line chart, test accuracy in percent by labels per class: {words}.")


def _trained_last(item: tuple[int, tuple[Row, Any]]) -> tuple[bool, int]:
    index, (row, _) = item
    return row.trained, index


def _title_of(name: str, mean: float, half: float, labels: int) -> str:
    spread = "" if math.isnan(half) else f" ± {percent(half)}"
    text = f"{name}, {labels_text(labels)} per class: {percent(mean)}{spread} %"
    return f"<title>{escape(text)}</title>"


def _difference_chart(baseline: Row, trained: Row) -> str:
    """Every draw's difference to the baseline, and their mean with its interval."""
    labels = sorted(trained.trials.keys() & baseline.trials.keys())
    differences = [100 * (trained.trials[k] - baseline.trials[k]) for k in labels]
    every = np.concatenate(differences)
    frame, body = axes(
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
                f"<title>draw {draw + 1}: {points(value / 100)} points</title></circle>"
            )
        mean, half = mean_interval(values)
        interval = range_of_points(mean / 100, half / 100)
        words = f"mean {points(mean / 100)} points" + (f" ({interval})" if interval else "")
        body += f"<g><title>{words}</title>"
        body += whisker(frame, i + 0.28, mean, half)
        body += marker(0, frame.x(i + 0.28), frame.y(mean)) + "</g>"
    words = ", ".join(
        f"{points(values.mean() / 100)} at {k}"
        for k, values in zip(labels, differences, strict=True)
    )
    return svg(
        body,
        f"Dot chart, difference of {trained.name} to {baseline.name} in points for each draw, by "
        f"labels per class; means {words}.",
    )


def evaluation_section(evaluation: Evaluation) -> str:
    """What `evaluation.json` holds, with intervals and paired differences, as HTML."""
    baseline = evaluation.find(BASELINE)
    trained = evaluation.trained
    split = f" ({evaluation.split})" if evaluation.split else ""
    intro = f"Measured on {evaluation.test_examples:,} test images{split}."
    if evaluation.trials:
        intro += (
            f" Each draw picks the labelled images anew, the same ones for every row;"
            f" there are {evaluation.trials} trials."
        )
    html = f"<p>{escape(intro)}</p>"
    charts = []
    if evaluation.trials:
        legend = "".join(
            f'<li><svg viewBox="0 0 30 12" aria-hidden="true"><g class="{kind}">'
            f'<line class="line" x1="0" x2="30" y1="6" y2="6"/>{marker(shape, 15, 6)}</g></svg>'
            f"{escape(row.name)}</li>"
            for row in evaluation.rows
            for kind, shape in [_look(row)]
        )
        charts.append(
            figure(
                "Accuracy with few labels",
                "Means over the trials, bars their 95 % intervals.",
                _accuracy_chart(evaluation),
                f'<ul class="legend">{legend}</ul>',
            )
        )
    if baseline and trained and baseline.trials.keys() & trained.trials.keys():
        charts.append(
            figure(
                f"{trained.name} against {baseline.name}",
                "Pale dots are single trials, the dark one their mean with its 95 % interval.",
                _difference_chart(baseline, trained),
            )
        )
    tables = [_accuracy_table(evaluation)]
    if baseline and len(evaluation.rows) > 1:
        tables.append(_difference_table(evaluation, baseline))
    html += f'<div class="pairs">{"".join(charts + tables)}</div>'
    if not baseline:
        html += absent("No differences are shown: the evaluation has no row for raw pixels.")
    return html + absent(
        "± and ranges are 95 % intervals. Those over trials (Student's t) tell how well the mean "
        "over labelled sets is known; those of the linear probe and of kNN, each fitted once "
        "to all labels (Wilson), how well the accuracy is known from so many test images. "
        "Neither covers another seed of the training."
    )


def _accuracy_table(evaluation: Evaluation) -> str:
    def over_trials(row: Row, labels: int) -> str:
        if labels not in row.trials:
            return _cell(row)
        mean, half = mean_interval(row.trials[labels])
        return _cell(row, percent(mean), "" if math.isnan(half) else f"± {percent(half)}")

    def once(row: Row, key: str) -> str:
        if key not in row.single:
            return _cell(row)
        low, high = proportion_interval(row.single[key], evaluation.test_examples)
        return _cell(row, percent(row.single[key]), f"{percent(low)}–{percent(high)}")

    text = "In percent; labels are per class."
    return _table("Test accuracy", text, evaluation.rows, evaluation.labels, over_trials, once)


def _difference_table(evaluation: Evaluation, baseline: Row) -> str:
    def over_trials(row: Row, labels: int) -> str:
        if labels not in row.trials or labels not in baseline.trials:
            return _cell(row)
        mean, half = mean_interval(row.trials[labels] - baseline.trials[labels])
        return _cell(row, points(mean), range_of_points(mean, half))

    def once(row: Row, key: str) -> str:
        if key not in row.single or key not in baseline.single:
            return _cell(row)
        return _cell(row, points(row.single[key] - baseline.single[key]))

    rows = [row for row in evaluation.rows if row is not baseline]
    text = "In points, paired draw by draw; labels are per class."
    return _table("Difference to raw pixels", text, rows, evaluation.labels, over_trials, once)


def _cell(row: Row, value: str = "–", spread: str = "") -> str:
    own = ' class="own"' if row.trained else ""
    small = f'<span class="spread">{spread}</span>' if spread else ""
    return f"<td{own}>{value}{small}</td>"


def _table(
    title: str,
    text: str,
    rows: list[Row],
    labels: list[int],
    over_trials: Callable[[Row, int], str],
    once: Callable[[Row, str], str],
) -> str:
    """Evaluations down, encoders across; the two functions make the cells."""
    head = "".join(
        f'<th scope="col"{" class=own" if row.trained else ""}>{escape(row.name)}</th>'
        for row in rows
    )
    lines = [(labels_text(count), [over_trials(row, count) for row in rows]) for count in labels]
    for key, name in (("linear", "Linear probe"), ("knn", "kNN")):
        lines.append((name, [once(row, key) for row in rows]))
    body = "".join(f'<tr><th scope="row">{name}</th>{"".join(cells)}</tr>' for name, cells in lines)
    return (
        f"<table><caption><h3>{title}</h3>{text}</caption>"
        f'<thead><tr><th scope="col">Evaluation</th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table>"
    )
