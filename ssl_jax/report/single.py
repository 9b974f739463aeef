"""The report of one run."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from ssl_jax.config import flatten
from ssl_jax.errors import counted
from ssl_jax.evals.intervals import mean_interval
from ssl_jax.evals.results import (
    BASELINE,
    EVALUATION,
    LAST_FILE,
    Evaluation,
    read_evaluation,
)
from ssl_jax.files import local_path
from ssl_jax.methods import title
from ssl_jax.report.evaluation import evaluation_section, measure_name, results_section, row_name
from ssl_jax.report.images import failures_section, neighbors_section, views_section
from ssl_jax.report.map import map_section
from ssl_jax.report.page import write_page
from ssl_jax.report.reading import Metrics, parse_images, parse_metrics, read, read_run
from ssl_jax.report.training import collapse_section, training_section
from ssl_jax.report.words import (
    devices,
    listing,
    network,
    number,
    percent,
    points,
    range_of_points,
    run_title,
)


def write_report(workdir: Path) -> Path:
    """Writes `report.html` from the files in a run's folder.

    Args:
      workdir: has `config.json` and, as far as the run has progressed, `metrics.jsonl`,
        `evaluation.json` and `report_images.npz`. Accuracies in them are fractions of 1.

    Returns:
      The path of the page, which names the files that could not be read.

    Raises:
      UserError: there is no such folder, it contains no readable `config.json`, or the page cannot
        be written.
    """
    workdir = local_path(workdir)
    run = read_run(workdir)
    config = run["config"]
    metrics, no_metrics = read(workdir / "metrics.jsonl", parse_metrics)
    evaluation, no_evaluation = read(workdir / EVALUATION, read_evaluation)
    images, no_images = read(workdir / LAST_FILE, parse_images)
    path = workdir / "report.html"
    write_page(
        path,
        "run.html",
        title=run_title(config),
        lead=_lead(metrics, evaluation),
        facts={"Folder": str(workdir.resolve()), **_facts(run, metrics)},
        evaluation=evaluation_section(evaluation) if evaluation else _reason(images, no_evaluation),
        results=results_section(workdir),
        collapse=collapse_section(metrics, run) if metrics else no_metrics,
        training=training_section(metrics, run) if metrics else no_metrics,
        **_images_sections(images, no_images, _method(config)),
        git=run.get("git"),
        command=str(run.get("command") or ""),
        xla_flags=run.get("xla_flags"),
        config={key: json.dumps(value) for key, value in flatten(config).items()},
    )
    return path


def _method(config: dict[str, Any]) -> str:
    return title(config.get("method", "unknown method"))


def _images_sections(
    images: dict[str, np.ndarray] | None, reason: str, encoder: str
) -> dict[str, dict[str, Any] | str]:
    if images is None:
        return dict.fromkeys(("views", "neighbors", "map", "failures"), reason)
    held_out = {
        "neighbors": neighbors_section(images),
        "map": map_section(images, encoder),
        "failures": failures_section(images),
    }
    for name, section in held_out.items():
        if isinstance(section, str) and section.startswith("Missing"):
            held_out[name] = _reason(images, section)
    return {"views": views_section(images), **held_out}


def _reason(images: dict[str, np.ndarray] | None, missing: str) -> str:
    """Why a section has no content: the run's own reason if it has noted one, else `missing`."""
    noted = str((images or {}).get("not_scored", ""))
    return f"Missing: {noted[0].lower()}{noted[1:]}" if noted else missing


def _unfinished(metrics: Metrics | None) -> str:
    if not metrics or not metrics.last_step:
        return "The run has not logged a step yet."
    facts = []
    if "loss" in metrics.not_finite:
        facts.append(f"loss not finite at step {metrics.not_finite['loss'][0]:,}")
    elif "loss" in metrics.curves:
        facts.append(f"loss {number(metrics.curves['loss'][1][-1])}")
    if "knn" in metrics.curves:
        steps, values = metrics.curves["knn"]
        facts.append(f"kNN accuracy {percent(values[-1])} % at step {steps[-1]:,}")
    reached = f"The run has reached step {metrics.last_step:,}"
    if facts:
        reached += f" ({'; '.join(facts)})"
    return f"{reached} and has not been evaluated. If it was stopped, its command resumes it."


def _lead(metrics: Metrics | None, evaluation: Evaluation | None) -> dict[str, Any] | str:
    """The run's result, for one sentence; or a sentence on a run without one."""
    trained = evaluation.trained if evaluation else None
    linear = [key for key in ("linear", "mean_ap") if trained and key in trained.single]
    if evaluation is None or trained is None or not (trained.trials or linear):
        return _unfinished(metrics)
    if not trained.trials:
        found = percent(trained.single[linear[0]])
        return {
            "name": row_name(trained),
            "accuracy": found,
            "labels": "a linear probe" + ", mAP" * (linear[0] == "mean_ap"),
            "gain": "",
        }
    labels = 5 if 5 in trained.trials else min(trained.trials)
    mean, _ = mean_interval(trained.trials[labels])
    lead = {"name": row_name(trained), "accuracy": percent(mean), "labels": measure_name(labels)}
    baseline = evaluation.find(BASELINE)
    if baseline is None or labels not in baseline.trials:
        return lead | {"gain": ""}
    gain, half = mean_interval(trained.trials[labels] - baseline.trials[labels])
    interval = range_of_points(gain, half)
    if interval:
        interval = f"95 % interval {interval}, paired over {evaluation.trials} trials"
    return lead | {
        "gain": points(abs(gain), sign=False),
        "side": "above" if gain >= 0 else "below",
        "interval": interval,
        "significant": math.isnan(half) or abs(gain) > half,
    }


def _facts(run: dict[str, Any], metrics: Metrics | None) -> dict[str, Any]:
    config = run["config"]
    count = sum(view.get("count", 1) for view in config.get("views", {}).values())
    batch = counted(config.get("batch_size", 0), "image")
    if count:
        batch += f", {counted(count, 'view')} of each"
    length = f"{config['steps']:,}" if config.get("steps") else f"{config.get('epochs', 0):g}"
    if metrics and metrics.last_step:
        length += f", reached step {metrics.last_step:,}"
    return {
        "Method": _method(config),
        "Data": config.get("data", {}).get("name", "?"),
        "Network": network(run),
        "Batch": batch,
        "Steps" if config.get("steps") else "Epochs": length,
        "Optimizer": config.get("optim", {}).get("name", "?"),
        "Computed in": config.get("dtype", "?"),
        "Devices": devices(run.get("devices") or {}),
        "Seed": config.get("seed", "?"),
        "Versions": listing(run.get("versions", {})),
    }
