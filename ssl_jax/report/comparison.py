"""The report that lays several runs beside each other."""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from ssl_jax.config import flatten
from ssl_jax.errors import UserError
from ssl_jax.evals.intervals import mean_interval, proportion_interval
from ssl_jax.evals.results import read_results
from ssl_jax.methods import METHODS
from ssl_jax.report.charts import figure, overlay_chart
from ssl_jax.report.page import write_page
from ssl_jax.report.reading import (
    BASELINE,
    Evaluation,
    Metrics,
    Row,
    parse_evaluation,
    parse_metrics,
    read,
)
from ssl_jax.report.single import write_report
from ssl_jax.report.training import CHARTS, as_drawn, chart_options, collapse_verdict
from ssl_jax.report.words import (
    absent,
    labels_text,
    network,
    number,
    percent,
    points,
    range_of_points,
    run_title,
)
from ssl_jax.run.folder import read_record

_LETTERS = "ABCDEFGH"  # as many runs as there are colours and dashes


@dataclass(frozen=True)
class _Run:
    """A run of the comparison, and what could be read of it."""

    letter: str
    look: int
    workdir: Path
    name: str
    record: dict[str, Any]
    metrics: Metrics | None
    evaluation: Evaluation | None

    @property
    def config(self) -> dict[str, Any]:
        config: dict[str, Any] = self.record["config"]
        return config

    @property
    def row(self) -> Row | None:
        return self.evaluation.trained if self.evaluation else None


def write_comparison(workdirs: Sequence[Path], out: Path | None = None) -> Path:
    """Writes a page that compares runs, and each one's own report, to which it links.

    A report that can't be written, in a folder of somebody else's, is linked as it is.

    Args:
      workdirs: of two to eight runs; the first is what the others are compared with.
      out: the file, default `comparison.html` in the first folder.

    Returns:
      The path of the page.

    Raises:
      UserError: one of the folders is no run or comes twice, there are too many; or the page can't
        be written.
    """
    workdirs = [Path(workdir) for workdir in workdirs]
    if not 2 <= len(workdirs) <= len(_LETTERS):
        raise UserError(
            f"A comparison takes two to {len(_LETTERS)} runs, not {len(workdirs)}: name so many "
            "folders."
        )
    resolved = [workdir.resolve() for workdir in workdirs]
    for i, workdir in enumerate(resolved):
        if workdir in resolved[:i]:
            raise UserError(f"{workdirs[i]} is named twice: name each run once.")
    # All are read before anything is written.
    records = [read_record(workdir) for workdir in workdirs]
    names = [workdir.name for workdir in resolved]
    runs = [
        _Run(
            _LETTERS[i],
            i,
            workdir,
            names[i] if names.count(names[i]) == 1 else str(workdir),
            records[i],
            read(workdir / "metrics.jsonl", parse_metrics)[0],
            read(workdir / "evaluation.json", parse_evaluation)[0],
        )
        for i, workdir in enumerate(workdirs)
    ]
    out = Path(out) if out else workdirs[0] / "comparison.html"
    reports = [_report(workdir) for workdir in workdirs]
    write_page(
        out,
        title=" against ".join(run.name for run in runs),
        kind="Comparison of runs",
        lead=_lead(runs),
        sections={
            "runs": ("Runs", _runs_section(runs, reports, out)),
            "results": ("Results", _results_section(runs)),
            "differences": ("Differences", _differences_section(runs)),
            "curves": ("Curves", _curves_section(runs)),
            "configs": ("Configs", _configs_section(runs)),
        },
    )
    return out


def _report(workdir: Path) -> Path | None:
    """A run's own report: a new one, or else what there is."""
    try:
        return write_report(workdir)
    except UserError:  # its record has been read: it can't be written
        old = workdir / "report.html"
        return old if old.is_file() else None


def _lead(runs: Sequence[_Run]) -> str:
    rows = {run.letter: run.row for run in runs}
    common = set.intersection(*(set(row.trials) if row else set() for row in rows.values()))
    if not common:
        missing = [run.letter for run in runs if not run.row]
        if missing:
            have = "has" if len(missing) == 1 else "have"
            return f"{' and '.join(missing)} {have} no evaluation yet."
        return "The runs have no number of labels in common."
    labels = 5 if 5 in common else min(common)
    told = ", ".join(
        f'<span class="nowrap">{letter} <strong>{percent(float(row.trials[labels].mean()))} %'
        "</strong></span>"
        for letter, row in rows.items()
        if row
    )
    return f"At {labels_text(labels)} per class: {told}."


def _key(run: _Run) -> str:
    """The letter of a run in its colour, with its dashes."""
    return (
        f'<span class="key"><svg viewBox="0 0 30 12" aria-hidden="true"><g class="run '
        f'k{run.look}"><line class="line d{run.look}" x1="0" x2="30" y1="6" y2="6"/></g></svg>'
        f"{run.letter}</span>"
    )


def _table(
    caption: str,
    runs: Sequence[_Run],
    lines: Iterable[tuple[str, Sequence[str]]],
    corner: str = "Figure",
) -> str:
    """Figures down, runs across; the cells are HTML."""
    head = "".join(f'<th scope="col">{_key(run)}</th>' for run in runs)
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>'
        f"{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
        for name, cells in lines
    )
    label = escape(caption or corner, quote=True)
    return (
        f'<div class="wide-table" tabindex="0" role="region" aria-label="{label}"><table>'
        f"<caption>{escape(caption)}</caption>"
        f'<thead><tr><th scope="col">{escape(corner)}</th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _runs_section(runs: Sequence[_Run], reports: Sequence[Path | None], out: Path) -> str:
    def link(run: _Run, report: Path | None) -> str:
        if report is None:
            return f"{escape(run.name)} (no report: the folder can't be written)"
        # As a page in a browser finds it from where the comparison lies.
        address = quote(os.path.relpath(report.resolve(), out.resolve().parent))
        return f'<a href="{address}">{escape(run.name)}</a>'

    def facts(of: Callable[[_Run], Any]) -> list[str]:
        return [escape(str(of(run))) for run in runs]

    def length(run: _Run) -> str:
        return f"{run.metrics.last_step:,}" if run.metrics else "none"

    lines = [
        ("Report", [link(run, report) for run, report in zip(runs, reports, strict=True)]),
        ("What", facts(lambda run: run_title(run.config))),
        ("Network", facts(lambda run: network(run.config.get("model", {})))),
        ("Batch", facts(lambda run: run.config.get("batch_size", "?"))),
        ("Steps reached", facts(length)),
        ("Seed", facts(lambda run: run.config.get("seed", "?"))),
        ("Git revision", facts(lambda run: run.record.get("git") or "not recorded")),
    ]
    return _table("", runs, lines, corner="Run")


def _results_section(runs: Sequence[_Run]) -> str:
    lines = [*_accuracies(runs), *_further(runs), *_last_values(runs)]
    note = (
        "± and ranges are 95 % intervals: of accuracies with few labels Student's t over the "
        "trials, of the linear probe and kNN Wilson's, of further evaluations by bootstrap over "
        "the images. None covers another seed of the training."
    )
    return _table("Accuracies in percent, on held-out images.", runs, lines) + absent(note)


def _cell(value: str, spread: str = "") -> str:
    return f'{value}<span class="spread">{spread}</span>' if spread else value


def _accuracies(runs: Sequence[_Run]) -> Iterable[tuple[str, list[str]]]:
    counts = sorted({count for run in runs if run.row for count in run.row.trials})

    def drawn(run: _Run, count: int) -> str:
        if run.row is None or count not in run.row.trials:
            return "–"
        mean, half = mean_interval(run.row.trials[count])
        return _cell(percent(mean), "" if np.isnan(half) else f"± {percent(half)}")

    def once(run: _Run, key: str) -> str:
        if run.row is None or run.evaluation is None or key not in run.row.single:
            return "–"
        value = run.row.single[key]
        low, high = proportion_interval(value, run.evaluation.test_examples)
        return _cell(percent(value), f"{percent(low)}–{percent(high)}")

    for count in counts:
        yield f"{labels_text(count)} per class", [drawn(run, count) for run in runs]
    for key, name in (("linear", "Linear probe, all labels"), ("knn", "kNN")):
        yield name, [once(run, key) for run in runs]


def _further(runs: Sequence[_Run]) -> Iterable[tuple[str, list[str]]]:
    """Top-1 accuracies that commands have added to the folders."""
    found = [_top1(run) for run in runs]
    for what in dict.fromkeys(name for results in found for name in results):
        yield (
            what,
            [
                _cell(
                    percent(results[what]["value"]),
                    f"{percent(results[what]['low'])}–{percent(results[what]['high'])}",
                )
                if what in results
                else "–"
                for results in found
            ],
        )


def _top1(run: _Run) -> dict[str, dict[str, float]]:
    """By what was evaluated; of several results of one name, the others have a number."""
    found: dict[str, dict[str, float]] = {}
    count: Counter[str] = Counter()
    for record in read_results(run.workdir)[0]:
        # The penalty is chosen for each run, by the same rule.
        what = str(record["what"]).partition(", penalty ")[0]
        if "top1" in record["metrics"]:
            count[what] += 1
            number = f" ({count[what]})" if count[what] > 1 else ""
            found[what + number] = record["metrics"]["top1"]
    return found


def _last_values(runs: Sequence[_Run]) -> Iterable[tuple[str, list[str]]]:
    """What was logged last; of the throughput the median."""
    curves = [run.metrics.curves if run.metrics else {} for run in runs]
    for name, (title, _, _, kind) in CHARTS.items():
        if name == "learning_rate" or not any(name in each for each in curves):
            continue
        whole = name == "images_per_s"
        scale = 100 if kind == "percent" else 1
        values = [
            number(float(np.median(each[name][1]) if whole else scale * each[name][1][-1]))
            if name in each
            else "–"
            for each in curves
        ]
        unit = ", %" if kind == "percent" else ""
        yield f"{title}, {'median' if whole else 'last'}{unit}", values
    yield (
        "Collapse",
        [
            escape(collapse_verdict(run.metrics, run.record)) if run.metrics else "not judged"
            for run in runs
        ],
    )


def _paired(first: _Run, other: _Run) -> bool:
    """Whether both were measured with the same labelled sets, draw by draw."""
    a, b = first.evaluation, other.evaluation
    if a is None or b is None or a.test_examples != b.test_examples:
        return False
    raw = [evaluation.find(BASELINE) for evaluation in (a, b)]
    if raw[0] and raw[1]:
        # The same pixels give the same accuracies from the same sets, and from others only where
        # they are as good as can be, in every draw.
        common = raw[0].trials.keys() & raw[1].trials.keys()
        return bool(common) and all(
            np.array_equal(raw[0].trials[count], raw[1].trials[count]) for count in common
        )
    data = first.record.get("data")
    return bool(data) and data == other.record.get("data") and a.trials == b.trials


def _differences_section(runs: Sequence[_Run]) -> str:
    first, others = runs[0], runs[1:]
    paired = [run for run in others if _paired(first, run)]
    unpaired = [run.letter for run in others if run not in paired]
    html = ""
    if paired and first.row:
        counts = sorted(
            {c for run in paired if run.row for c in run.row.trials} & set(first.row.trials)
        )
        lines = [
            (f"{labels_text(count)} per class", [_drawn_apart(first, run, count) for run in paired])
            for count in counts
        ]
        lines += [
            (name, [_once_apart(first, run, key) for run in paired])
            for key, name in (("linear", "Linear probe, all labels"), ("knn", "kNN"))
        ]
        html = _table(
            f"Difference to {first.letter} in points, paired draw by draw, with 95 % intervals by "
            "Student's t. The linear probe and kNN are fitted once, and have none.",
            paired,
            lines,
        )
    if unpaired:
        html += absent(
            f"Without differences: {', '.join(unpaired)}, not measured with the labelled sets of "
            f"{first.letter}, or not at all."
        )
    return html


def _drawn_apart(first: _Run, run: _Run, count: int) -> str:
    if first.row is None or run.row is None or count not in run.row.trials:
        return "–"
    mean, half = mean_interval(run.row.trials[count] - first.row.trials[count])
    return _cell(points(mean), range_of_points(mean, half))


def _once_apart(first: _Run, run: _Run, key: str) -> str:
    if (
        first.row is None
        or run.row is None
        or not {key} <= first.row.single.keys() & run.row.single
    ):
        return "–"
    return points(run.row.single[key] - first.row.single[key])


def _curves_section(runs: Sequence[_Run]) -> str:
    logged = {run.letter: run.metrics for run in runs if run.metrics}
    last = max((metrics.last_step for metrics in logged.values()), default=0)
    if not last:
        return absent("Not there: no run has logged a step.")
    looks = {run.letter: run.look for run in runs}
    figures = []
    for name, (title, y_label, _, kind) in CHARTS.items():
        curves = {
            letter: as_drawn(metrics.curves[name], kind)
            for letter, metrics in logged.items()
            if name in metrics.curves
        }
        if curves:
            chart = overlay_chart(curves, looks, y_label, last, **chart_options(kind))
            figures.append(figure(title, _told(curves), chart))
    legend = "".join(f"<li>{_key(run)} {escape(run.name)}</li>" for run in runs)
    html = f'<ul class="legend runs">{legend}</ul><div class="pairs">{"".join(figures)}</div>'
    remarks = []
    if len({run.config.get("method") for run in runs}) > 1:
        remarks.append("Losses of different methods are different measures.")
    if len({run.config.get("batch_size") for run in runs}) > 1:
        remarks.append("Steps of different batches are of different numbers of images.")
    silent = [run.letter for run in runs if not run.metrics]
    if silent:
        remarks.append(f"Without metrics: {', '.join(silent)}.")
    return html + (absent(" ".join(remarks)) if remarks else "")


def _told(curves: dict[str, tuple[np.ndarray, np.ndarray]]) -> str:
    return (
        "Last: " + ", ".join(f"{letter} {number(y[-1])}" for letter, (_, y) in curves.items()) + "."
    )


def _configs_section(runs: Sequence[_Run]) -> str:
    """The keys in which the runs differ; those of a method are another's business."""
    used = {str(run.config.get("method")) for run in runs}
    flat = [flatten(run.config) for run in runs]

    def value(run: _Run, keys: dict[str, Any], key: str) -> str:
        group = key.partition(".")[0]
        foreign = group in METHODS and group != run.config.get("method")
        return "–" if foreign or key not in keys else escape(str(keys[key]))

    lines = []
    for key in dict.fromkeys(key for keys in flat for key in keys):
        group = key.partition(".")[0]
        if group in METHODS and group not in used:
            continue
        values = [value(run, keys, key) for run, keys in zip(runs, flat, strict=True)]
        if len(set(values)) > 1:
            lines.append((key, values))
    if not lines:
        return absent("The runs have the same config.")
    return _table("Keys with different values.", runs, lines, corner="Key")
