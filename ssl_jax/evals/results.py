"""What evaluations found, kept in a run's folder for its report: `evals/NAME.json`."""

import json
from pathlib import Path
from typing import Any

from ssl_jax.evals.metrics import metrics_line
from ssl_jax.files import replacing


def write_result(workdir: Path, name: str, what: str, metrics: dict[str, Any], **more: Any) -> Path:
    """Keeps the result of an evaluation; an earlier one of that name is replaced.

    Args:
      workdir: of the run that was evaluated.
      name: of the evaluation, a file's.
      what: was evaluated, in a few words.
      metrics: of `classification_metrics`.
      **more: settings worth keeping, JSON types.

    Returns:
      The file.
    """
    file = workdir / "evals" / f"{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as temporary:
        temporary.write_text(json.dumps({"what": what, **more, "metrics": metrics}) + "\n")
    return file


def read_result(workdir: Path, name: str) -> dict[str, Any] | None:
    """The result of that name; None where there is none that can be read."""
    try:
        record: dict[str, Any] = json.loads((workdir / "evals" / f"{name}.json").read_text())
        result_line(record)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return record


def read_results(workdir: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """All results of a run, by name, and the names of files that are none."""
    found, corrupt = [], []
    # A name with a dot before it is one that a killed process was writing.
    for file in sorted((workdir / "evals").glob("[!.]*.json")):
        record = read_result(workdir, file.stem)
        if record is None:
            corrupt.append(file.name)
        else:
            found.append(record)
    return found, corrupt


def result_line(record: dict[str, Any]) -> str:
    """A result in a line for people."""
    return f"{record['what']}: {metrics_line(record['metrics'])}"
