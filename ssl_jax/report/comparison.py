"""The report that compares several runs."""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any
from urllib.parse import quote

import numpy as np

from ssl_jax.config import flatten
from ssl_jax.errors import UserError
from ssl_jax.evals.results import (
    BASELINE,
    EVALUATION,
    Evaluation,
    Measure,
    Row,
    read_evaluation,
    read_results,
)
from ssl_jax.files import local_path
from ssl_jax.methods import METHODS
from ssl_jax.report.charts import overlay_chart
from ssl_jax.report.evaluation import MISSING, Cell, accuracy, difference, measure_name, measures
from ssl_jax.report.page import write_page
from ssl_jax.report.reading import Curve, Metrics, parse_metrics, read, read_run
from ssl_jax.report.single import write_report
from ssl_jax.report.training import CHARTS, as_drawn, chart_options, collapse_verdict
from ssl_jax.report.words import listed, network, number, percent, run_title

# Of 64 runs, each of which has its own pair of a color and a dash pattern.
_LETTERS = [first + last for first in ("", "A", "B") for last in ascii_uppercase][:64]
_COLORS = 8  # and as many dash patterns

Lines = list[tuple[str, list[Cell]]]


@dataclass(frozen=True)
class _Run:
    """A run of the comparison, and what could be read from its folder."""

    letter: str
    style: tuple[int, int]  # color and dash pattern
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
    """Writes a page that compares runs, and each run's own report, linked from it.

    An existing report that cannot be rewritten, in a read-only folder, is linked unchanged.

    Args:
      workdirs: folders of two to 64 runs; the others are compared with the first.
      out: the file, by default `comparison.html` in the first folder.

    Returns:
      The path of the page.

    Raises:
      UserError: a folder contains no run or is given twice, there are too many, or the page is not
        a .html file or cannot be written.
    """
    workdirs = [local_path(workdir) for workdir in workdirs]
    if not 2 <= len(workdirs) <= len(_LETTERS):
        raise UserError(
            f"A comparison takes two to {len(_LETTERS)} runs, not {len(workdirs)}. Pass that "
            "number of folders."
        )
    resolved = [workdir.resolve() for workdir in workdirs]
    for i, workdir in enumerate(resolved):
        if workdir in resolved[:i]:
            raise UserError(f"{workdirs[i]} is given twice. Pass each run once.")
    out = local_path(out) if out else workdirs[0] / "comparison.html"
    if out.suffix.lower() != ".html":
        raise UserError(f"--out is {out}, not a .html file: give it a name that ends in .html.")
    # Read all records before writing anything.
    records = [read_run(workdir) for workdir in workdirs]
    names = [workdir.name for workdir in resolved]
    runs = [
        _Run(
            _LETTERS[i],
            (i % _COLORS, (i + i // _COLORS) % _COLORS),
            workdir,
            names[i] if names.count(names[i]) == 1 else str(workdir),
            records[i],
            read(workdir / "metrics.jsonl", parse_metrics)[0],
            read(workdir / EVALUATION, read_evaluation)[0],
        )
        for i, workdir in enumerate(workdirs)
    ]
    reports = [_report(workdir) for workdir in workdirs]
    write_page(
        out,
        "comparison.html",
        "or choose another file with --out",
        title=_title(runs),
        lead=_lead(runs),
        runs=runs,
        facts=_facts(runs),
        addresses=[_address(report, out) for report in reports],
        results=[*_accuracies(runs), *_further(runs), *_last_values(runs)],
        differences=_differences(runs),
        curves=_curves(runs),
        configs=_configs(runs),
    )
    return out


def _title(runs: Sequence[_Run]) -> str:
    if len(runs) > 4:
        return f"{runs[0].name} against {len(runs) - 1} runs"
    return " against ".join(run.name for run in runs)


def _report(workdir: Path) -> Path | None:
    """Writes a run's own report; returns the existing one, or None, if that fails."""
    try:
        return write_report(workdir)
    except UserError:  # the record was readable, so the folder cannot be written
        old = workdir / "report.html"
        return old if old.is_file() else None


def _address(report: Path | None, out: Path) -> str:
    """The link from the comparison to a report; empty without one."""
    return quote(os.path.relpath(report.resolve(), out.resolve().parent)) if report else ""


def _lead(runs: Sequence[_Run]) -> dict[str, Any] | str:
    """The accuracies of all runs, by the first measure that they have in common."""
    for measure in (5, *measures(run.row for run in runs)):
        means = {run.letter: _mean(run.row, measure) for run in runs}
        if None not in means.values():
            name = measure_name(measure)
            return {"by": f"At {name}" if isinstance(measure, int) else name, "means": means}
    curves = {run.letter: run.metrics.curves if run.metrics else {} for run in runs}
    if all("knn" in found for found in curves.values()):
        means = {letter: found["knn"][1][-1] for letter, found in curves.items()}
        return {"by": "kNN, last during training", "means": means}
    missing = [run.letter for run in runs if not run.row and "knn" not in curves[run.letter]]
    if missing:
        have = "has" if len(missing) == 1 else "have"
        return f"{listed(missing)} {have} no evaluation yet."
    return "The runs have no accuracy in common."


def _mean(row: Row | None, measure: Measure) -> float | None:
    if row is None:
        return None
    if isinstance(measure, int):
        return float(row.trials[measure].mean()) if measure in row.trials else None
    return row.single.get(measure)


def _facts(runs: Sequence[_Run]) -> list[tuple[str, list[Any]]]:
    facts: dict[str, Callable[[_Run], Any]] = {
        "What": lambda run: run_title(run.config),
        "Network": lambda run: network(run.record),
        "Batch": lambda run: run.config.get("batch_size", "?"),
        "Folder": lambda run: str(run.workdir.resolve()),
        "Steps reached": lambda run: f"{run.metrics.last_step:,}" if run.metrics else "none",
        "Seed": lambda run: run.config.get("seed", "?"),
        "Git revision": lambda run: run.record.get("git") or "not recorded",
    }
    lines = [(name, [Cell(of(run)) for run in runs]) for name, of in facts.items()]
    return sorted(lines, key=lambda line: len(set(line[1])) == 1)  # what differs comes first


def _accuracies(runs: Sequence[_Run]) -> Lines:
    return [
        (
            measure_name(each),
            [
                accuracy(run.row, each, run.evaluation.test_examples) if run.evaluation else MISSING
                for run in runs
            ],
        )
        for each in measures(run.row for run in runs)
    ]


def _further(runs: Sequence[_Run]) -> Lines:
    """Top-1 accuracies, or mean average precision, that commands have added to the folders."""
    found = [_top1(run) for run in runs]
    return [
        (what, [results.get(what, MISSING) for results in found])
        for what in dict.fromkeys(name for results in found for name in results)
    ]


def _top1(run: _Run) -> dict[str, Cell]:
    """By evaluation; a number distinguishes several results of the same name."""
    found: dict[str, Cell] = {}
    count: Counter[str] = Counter()
    for record in read_results(run.workdir)[0]:
        # The same rule chooses the penalty in each run.
        what = str(record["what"]).partition(", penalty ")[0]
        several = "mean_ap" in record["metrics"]
        what += ", mAP" * several
        if several or "top1" in record["metrics"]:
            count[what] += 1
            number = f" ({count[what]})" if count[what] > 1 else ""
            top1 = record["metrics"]["mean_ap" if several else "top1"]
            spread = f"{percent(top1['low'])}–{percent(top1['high'])}"
            found[what + number] = Cell(percent(top1["value"]), spread)
    return found


def _last_values(runs: Sequence[_Run]) -> Iterable[tuple[str, list[Cell]]]:
    """The last logged values; of the throughput, the median."""
    curves = [run.metrics.curves if run.metrics else {} for run in runs]
    for name, (title, _, _, kind) in CHARTS.items():
        if name == "learning_rate" or not any(name in each for each in curves):
            continue
        whole = name == "images_per_s"
        scale = 100 if kind == "percent" else 1
        values = [
            Cell(number(float(np.median(each[name][1]) if whole else scale * each[name][1][-1])))
            if name in each
            else MISSING
            for each in curves
        ]
        unit = ", %" if kind == "percent" else ""
        yield f"{title}, {'median' if whole else 'last'}{unit}", values
    verdicts = [
        collapse_verdict(run.metrics, run.record) if run.metrics else "not judged" for run in runs
    ]
    yield "Collapse", [Cell(verdict) for verdict in verdicts]


def _paired(first: _Run, other: _Run) -> bool:
    """Whether both were measured with the same labeled sets, trial by trial."""
    a, b = first.evaluation, other.evaluation
    if a is None or b is None or a.test_examples != b.test_examples:
        return False
    raw = [evaluation.find(BASELINE) for evaluation in (a, b)]
    if raw[0] and raw[1]:
        # The same pixels have the same accuracies from the same sets, and from different sets only
        # if they are perfect in every trial.
        common = raw[0].trials.keys() & raw[1].trials.keys()
        return bool(common) and all(
            np.array_equal(raw[0].trials[count], raw[1].trials[count]) for count in common
        )
    data = first.record.get("data")
    return bool(data) and data == other.record.get("data") and a.trials == b.trials


def _differences(runs: Sequence[_Run]) -> dict[str, Any]:
    first, others = runs[0], runs[1:]
    paired = [run for run in others if first.row and _paired(first, run)]
    lines = [
        (measure_name(each), [difference(run.row, first.row, each) for run in paired])
        for each in measures([first.row])
        if isinstance(each, str) or any(run.row and each in run.row.trials for run in paired)
    ]
    unpaired = [run.letter for run in others if run not in paired]
    return {"runs": paired, "lines": lines, "unpaired": unpaired}


def _curves(runs: Sequence[_Run]) -> dict[str, Any] | str:
    logged = {run.letter: run.metrics for run in runs if run.metrics}
    last = max((metrics.last_step for metrics in logged.values()), default=0)
    if not last:
        return "Missing: no run has logged a step."
    styles = {run.letter: run.style for run in runs}
    figures = []
    for name, (title, y_label, _, kind) in CHARTS.items():
        curves: dict[str, Curve] = {
            letter: as_drawn(metrics.curves[name], kind)
            for letter, metrics in logged.items()
            if name in metrics.curves
        }
        if curves:
            chart = overlay_chart(curves, styles, y_label, last, **chart_options(kind))
            ends = ", ".join(f"{letter} {number(y[-1])}" for letter, (_, y) in curves.items())
            figures.append((title, f"Last: {ends}.", chart))
    remarks = []
    if len({run.config.get("method") for run in runs}) > 1:
        remarks.append("The losses of different methods are not comparable.")
    if len({run.config.get("batch_size") for run in runs}) > 1:
        remarks.append("Steps of different batch sizes process different numbers of images.")
    silent = [run.letter for run in runs if not run.metrics]
    if silent:
        remarks.append(f"Without metrics: {', '.join(silent)}.")
    return {"figures": figures, "remarks": " ".join(remarks)}


def _configs(runs: Sequence[_Run]) -> Lines:
    """The keys whose values differ, without those of methods that no run uses."""
    used = {str(run.config.get("method")) for run in runs}
    flat = [flatten(run.config) for run in runs]

    def value(run: _Run, keys: dict[str, Any], key: str) -> Cell:
        group = key.partition(".")[0]
        foreign = group in METHODS and group != run.config.get("method")
        return MISSING if foreign or key not in keys else Cell(str(keys[key]))

    lines = []
    for key in dict.fromkeys(key for keys in flat for key in keys):
        group = key.partition(".")[0]
        if group in METHODS and group not in used:
            continue
        values = [value(run, keys, key) for run, keys in zip(runs, flat, strict=True)]
        if len(set(values)) > 1:
            lines.append((key, values))
    return lines
