"""The report of one run."""

import json
import math
from html import escape
from pathlib import Path
from typing import Any

from ssl_jax.config import flatten
from ssl_jax.evals.intervals import mean_interval
from ssl_jax.report.embeddings import map_section
from ssl_jax.report.evaluation import evaluation_section, results_section
from ssl_jax.report.images import failures_section, neighbours_section, views_section
from ssl_jax.report.page import write_page
from ssl_jax.report.reading import (
    BASELINE,
    Evaluation,
    Metrics,
    parse_evaluation,
    parse_images,
    parse_metrics,
    read,
)
from ssl_jax.report.training import collapse_section, training_section
from ssl_jax.report.words import (
    absent,
    labels_text,
    listing,
    method_name,
    network,
    number,
    percent,
    points,
    range_of_points,
    run_title,
)
from ssl_jax.run.folder import read_record


def write_report(workdir: Path) -> Path:
    """Writes `report.html` from the files of a run's folder.

    Args:
      workdir: holds `config.json`, and as far as the run has come `metrics.jsonl`,
        `evaluation.json` and `report_images.npz`. Accuracies in them are fractions of 1.

    Returns:
      The path of the page. What could not be read is said in a sentence on it.

    Raises:
      UserError: there is no such folder, or no readable `config.json` in it; or the page can't be
        written.
    """
    workdir = Path(workdir)
    run = read_record(workdir)
    config = run["config"]
    metrics, no_metrics = read(workdir / "metrics.jsonl", parse_metrics)
    evaluation, no_evaluation = read(workdir / "evaluation.json", parse_evaluation)
    images, no_images = read(workdir / "report_images.npz", parse_images)
    if metrics is None:
        collapse = training = absent(no_metrics)
    else:
        collapse = collapse_section(metrics, run)
        training = training_section(metrics, config)
    if images is None:
        views = neighbours = drawn = failures = absent(no_images)
    else:
        views, neighbours = views_section(images), neighbours_section(images)
        drawn, failures = map_section(images, method_name(config)), failures_section(images)
    evaluated = evaluation_section(evaluation) if evaluation else absent(no_evaluation)
    path = workdir / "report.html"
    write_page(
        path,
        title=run_title(config),
        kind="Run report",
        lead=_lead(metrics, evaluation),
        sections={
            "run": ("What was run", _run_section(run, metrics)),
            "evaluation": ("Evaluation", evaluated + results_section(workdir)),
            "collapse": ("Collapse", collapse),
            "training": ("Training", training),
            "views": ("Views", views),
            "neighbours": ("Nearest neighbours", neighbours),
            "embeddings": ("Embeddings", drawn),
            "failures": ("Retrieval failures", failures),
            "reproduce": ("How to reproduce", _reproduce_section(run)),
        },
    )
    return path


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
    return f"{reached} and has not been evaluated."


def _lead(metrics: Metrics | None, evaluation: Evaluation | None) -> str:
    """The run's result in one sentence, as HTML."""
    trained = evaluation.trained if evaluation else None
    if evaluation is None or trained is None or not trained.trials:
        return _unfinished(metrics)
    labels = 5 if 5 in trained.trials else min(trained.trials)
    mean, _ = mean_interval(trained.trials[labels])
    text = (
        f"{escape(trained.name)} reaches <strong>{percent(mean)} %</strong> "
        f"at {labels_text(labels)} per class"
    )
    baseline = evaluation.find(BASELINE)
    if baseline is None or labels not in baseline.trials:
        return text + "."
    gain, half = mean_interval(trained.trials[labels] - baseline.trials[labels])
    if math.isnan(half):
        side = "above" if gain >= 0 else "below"
        return f"{text}, {points(abs(gain), sign=False)} points {side} raw pixels, in one draw."
    interval = (
        f"95 % interval {range_of_points(gain, half)}, paired over {evaluation.trials} trials"
    )
    if gain - half <= 0 <= gain + half:
        return f"{text}, not clearly different from raw pixels ({interval})."
    side = "above" if gain > 0 else "below"
    return (
        f"{text}, <strong>{points(abs(gain), sign=False)} points</strong> {side} raw pixels "
        f"({interval})."
    )


def _run_section(run: dict[str, Any], metrics: Metrics | None) -> str:
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
        "Method": method_name(config),
        "Data": config.get("data", {}).get("name", "?"),
        "Network": network(config.get("model", {})),
        "Batch": batch,
        "Steps" if config.get("steps") else "Epochs": length,
        "Optimiser": config.get("optim", {}).get("name", "?"),
        "Computed in": config.get("dtype", "?"),
        "Devices": listing(run.get("devices", {})),
        "Seed": config.get("seed", "?"),
    }
    items = "".join(
        f"<div><dt>{name}</dt><dd>{escape(str(value))}</dd></div>" for name, value in facts.items()
    )
    versions = escape(listing(run.get("versions", {})))
    items += f'<div class="wide"><dt>Versions</dt><dd>{versions}</dd></div>'
    return f'<dl class="facts">{items}</dl>'


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
