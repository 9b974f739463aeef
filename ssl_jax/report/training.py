"""A run's logged curves, and whether it has collapsed."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from ssl_jax.diagnostics import CollapseSign, collapse_signs
from ssl_jax.errors import counted
from ssl_jax.methods import METHODS
from ssl_jax.report.charts import line_chart, shows_means
from ssl_jax.report.reading import Curve, Metrics
from ssl_jax.report.words import number, percent


def _ends(curve: Curve, unit: str = "") -> str:
    steps, values = curve
    first, last = (f"{number(values[i])}{unit} at step {steps[i]:,}" for i in (0, -1))
    return f"{first}." if len(steps) == 1 else f"From {first} to {last}."


def _best(curve: Curve) -> str:
    steps, values = curve
    best = int(np.argmax(values))
    return f"Last {values[-1]:.1f} %, best {values[best]:.1f} % at step {steps[best]:,}."


def _median(curve: Curve) -> str:
    return f"Median {number(float(np.median(curve[1])))} images per second."


def _peak(curve: Curve) -> str:
    return f"Peak {curve[1].max():g}."


# Title, name of the y axis, caption of a curve, and whether it has fractions (drawn in percent) or
# begins at 0; in the order of the page.
CHARTS: dict[str, tuple[str, str, Callable[[Curve], str], str]] = {
    "loss": ("Loss", "loss", _ends, ""),
    "learning_rate": ("Learning rate", "learning rate", _peak, "zero"),
    "ema_decay": ("EMA decay", "decay of the target", _ends, ""),
    "knn": ("kNN accuracy", "accuracy, %", _best, "percent"),
    "knn_online": ("kNN accuracy, online network", "accuracy, %", _best, "percent"),
    "probe_accuracy": ("Online probe, held out", "accuracy, %", _best, "percent"),
    "test_accuracy": ("Classifier accuracy, held out", "accuracy, %", _best, "percent"),
    "test_mean_ap": ("Classifier mAP, held out", "mAP, %", _best, "percent"),
    "embedding_std": ("Spread of embeddings", "std, 1 = evenly spread", _ends, "zero"),
    "rankme": ("RankMe", "effective rank of features", _ends, "zero"),
    "images_per_s": ("Throughput", "images per second", _median, "zero"),
}


_JUDGED = {"embedding_std", "rankme"}  # curves without which collapse can't be judged


def chart_options(kind: str) -> dict[str, bool]:
    """Returns the options of a chart of that kind."""
    return {"from_zero": kind == "zero", "is_percent": kind == "percent"}


def as_drawn(curve: Curve, kind: str) -> Curve:
    """Converts a curve to the units of its chart."""
    return (curve[0], 100 * curve[1]) if kind == "percent" else curve


def training_section(metrics: Metrics, run: dict[str, Any]) -> dict[str, Any] | str:
    """The curves, or why there are none; those outside `CHARTS` are collapsed.

    Args:
      metrics: of the run.
      run: its record, `config.json`.
    """
    if not metrics.last_step:
        return "Missing: metrics.jsonl contains no record."
    figures, extended = [], _extended(run, metrics.last_step)
    for name, (title, y_label, caption, kind) in CHARTS.items():
        if name not in metrics.curves:
            continue
        curve = as_drawn(metrics.curves[name], kind)
        text = caption(curve)
        if name == "images_per_s" and "data_wait" in metrics.curves:
            wait = float(np.median(metrics.curves["data_wait"][1]))
            text += f" Waiting for data: {percent(wait)} % of the time."
        options: dict[str, Any] = chart_options(kind) | {"rules": extended}
        chart = line_chart(curve, y_label, metrics.last_step, **options)
        figures.append((title, text, chart))
    others = [
        (name, _ends(curve), line_chart(curve, "value", metrics.last_step, rules=extended))
        for name, curve in sorted(metrics.curves.items())
        if name not in CHARTS
    ]
    return {
        "warnings": _warnings(metrics),
        "figures": figures,
        "others": others,
        "remarks": _remarks(metrics, run["config"], [title for _, title in extended]),
    }


def _extended(run: dict[str, Any], last: int) -> list[tuple[int, str]]:
    """The steps from which a run was extended, with a text."""
    found = []
    for record in run.get("resumed", ()):
        step, planned = record.get("step"), record.get("extended_from")
        if all(type(each) is int and each > 0 for each in (step, planned)) and step <= last:
            found.append((step, f"extended at step {step:,}, planned for {planned:,} steps"))
    return found


def _warnings(metrics: Metrics) -> list[str]:
    return [
        f"{name} is not a finite number in {len(steps):,} of "
        f"{len(steps) + len(metrics.curves.get(name, ([],))[0]):,} records, first at step "
        f"{steps[0]:,}."
        for name, steps in metrics.not_finite.items()
    ]


def _remarks(metrics: Metrics, config: dict[str, Any], extended: list[str]) -> str:
    remarks = [f"Dashed line: {title}." for title in extended]
    if "knn" not in metrics.curves:
        remarks.append("kNN accuracy was not measured during training.")
    if "probe_accuracy" not in metrics.curves:
        remarks.append("No online probe was trained.")
    # An option of that name has an unknown meaning in a method from outside the package.
    if "ema_decay" not in metrics.curves and config.get("method") in METHODS:
        remarks.append(_ema_decay(config))
    if any(shows_means(curve) for curve in metrics.curves.values()):
        remarks.append("Lines are means of adjacent records; the band spans their extremes.")
    if metrics.unreadable:
        remarks.append(f"{counted(metrics.unreadable, 'line')} of metrics.jsonl could not be read.")
    return " ".join(remarks)


def _ema_decay(config: dict[str, Any]) -> str:
    """Explains why there is no curve of the EMA decay."""
    options = config.get(config.get("method", ""), {})
    # SimCLR averages its network only for the memory bank.
    if "ema_decay" not in options or options.get("memory_bank") == 0:
        return "The method has no EMA."
    decay = options["ema_decay"]
    end = options.get("ema_decay_end", decay)
    if end == decay:
        return f"The EMA decay is constant at {decay:g}."
    return f"The EMA decay follows a cosine from {decay:g} to {end:g}."


def collapse_verdict(metrics: Metrics, run: dict[str, Any]) -> str:
    """Says in a sentence whether a run has collapsed.

    Args:
      metrics: of the run.
      run: its record, `config.json`.
    """
    return _verdict(metrics, _indicators(metrics, run)) if _judged(metrics) else "Not judged."


def collapse_section(metrics: Metrics, run: dict[str, Any]) -> dict[str, Any] | str:
    """The verdict on collapse and its evidence, or why there is no verdict."""
    if not _judged(metrics):
        return "Not judged: metrics.jsonl has neither embedding_std nor rankme."
    evidence = {
        "embedding_std": "Standard deviation of embeddings, 1 if evenly spread",
        "rankme": "RankMe, the effective rank of features",
        "loss": "Loss",
    }
    indicators = _indicators(metrics, run)
    standing = [sign for sign in indicators if sign.until is None]
    reasons = [f"Since step {sign.since:,} {sign.what}." for sign in standing]
    gone = [
        f"from step {s.since:,} to {s.until:,} {s.what}" for s in indicators if s.until is not None
    ]
    if gone:
        reasons.append(f"Temporarily: {'; '.join(gone)}.")
    return {
        "collapsed": bool(standing),
        "verdict": _verdict(metrics, indicators),
        "reasons": " ".join(reasons),
        "facts": {
            what: _course(metrics.curves[name])
            for name, what in evidence.items()
            if name in metrics.curves
        },
    }


def _judged(metrics: Metrics) -> bool:
    logged = metrics.curves.keys() | metrics.not_finite.keys()
    return bool(logged & _JUDGED)


def _verdict(metrics: Metrics, indicators: list[CollapseSign]) -> str:
    standing = [sign for sign in indicators if sign.until is None]
    # Learning, too, may halve the spread.
    sure = [sign for sign in standing if sign.kind != "halved"]
    if sure:
        return f"Collapsed since step {sure[0].since:,}."
    if standing:
        return f"A sign of collapse since step {standing[0].since:,}."
    if indicators:
        return "No sign of collapse at the end."
    # A fall takes two measurements.
    counts = [len(metrics.curves[name][0]) for name in _JUDGED & metrics.curves.keys()]
    single = max(counts, default=0) == 1
    return "No sign of collapse in a single measurement." if single else "No sign of collapse."


def _course(curve: Curve) -> str:
    _, values = curve
    return (
        f"{number(values[-1])} at the end (from {number(values.min())} to {number(values.max())})"
    )


def _indicators(metrics: Metrics, run: dict[str, Any]) -> list[CollapseSign]:
    by_step: dict[int, dict[str, float]] = {}
    for name, (steps, values) in metrics.curves.items():
        for step, value in zip(steps, values, strict=True):
            by_step.setdefault(int(step), {})[name] = float(value)
    for name, lost in metrics.not_finite.items():
        for step in lost:
            by_step.setdefault(step, {})[name] = math.nan
    trivial_loss, patience = _watched(run)
    return collapse_signs(sorted(by_step.items()), trivial_loss, patience)


def _watched(run: dict[str, Any]) -> tuple[float | None, int]:
    """The loss of constant outputs, and for how many steps the loss may start there."""
    derived: dict[str, Any] = {}
    for record in (run, *run.get("resumed", ())):
        derived |= record.get("derived") or {}
    if "trivial_loss" in derived:
        return derived["trivial_loss"], derived.get("patience", 0)
    # A run from before they were recorded.
    config = run["config"]
    prototypes = config.get("swav", {}).get("prototypes", 0)
    return (math.log(prototypes) if config.get("method") == "swav" and prototypes > 1 else None), 0
