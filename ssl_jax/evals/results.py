"""Results of evaluations in a run's folder: `evaluation.json`, and `evals/NAME.json` by command."""

import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from ssl_jax.config import to_json
from ssl_jax.evals.metrics import metrics_line
from ssl_jax.files import read_regular, replacing, require_writable, subfolder, writing

EVALUATION = "evaluation.json"
LAST_FILE = "report_images.npz"  # the last file that the end of a run writes
_FOLDER = "evals"
_EARLIER = "earlier"  # results of a run that has been extended since
_MAX_IMAGES = 2**31  # from here on, intervals would overflow
# The fix of results of commands, where the evaluated run may only be read.
ELSEWHERE = "or keep the results in another folder with --results=DIR"
BASELINE, UNTRAINED = "raw pixels", "random init"
ONLINE = "online network"  # of a run whose own row is the target's
FINE_TUNED = "fine-tuned"  # a run's own row, if its encoder was pretrained before

# Keys of config.eval that the results of a run's end don't depend on.
_IN_TRAINING = ("knn_every_epochs", "probe", "batch_size")

# What a row holds an accuracy of: a number of labels per class, or a classifier fitted once.
Measure = int | str
SINGLE = ("linear", "mean_ap", "knn")


@dataclass(frozen=True)
class Row:
    """One encoder's accuracies, as fractions of 1.

    Attributes:
      name: the config's name of the method, `FINE_TUNED`, `ONLINE`, or that of a baseline.
      trials: by labels per class, the accuracy of each few-label trial.
      single: "linear" and "knn", which are fitted once; of images of several classes each
        "mean_ap", the mean average precision of the linear classifier.
      intervals: of values of `single` that are not shares of images, by bootstrap; 95 %.
    """

    name: str
    trials: dict[int, np.ndarray]
    single: dict[str, float]
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def trained(self) -> bool:
        """Whether this is the run's own row, not a baseline or another network."""
        return self.name not in (BASELINE, UNTRAINED, ONLINE)


def has_results(workdir: Path) -> bool:
    """Whether accuracies of a run's end have been written, all of them or some."""
    # The images of the end alone don't count: without labels there are no accuracies.
    files = (EVALUATION, f"{_FOLDER}/classifier.json")
    return any((workdir / name).exists() for name in files)


def set_aside_results(workdir: Path, step: int) -> bool:
    """Moves the results of a run's end to the folder `earlier/STEP`, as the run is extended.

    Args:
      workdir: of the run.
      step: at which it had ended.

    Returns:
      Whether there were any.

    Raises:
      UserError: they can't be moved.
    """
    if not has_results(workdir) and not (workdir / LAST_FILE).exists():
        return False
    with writing(workdir):
        folder = subfolder(subfolder(workdir, _EARLIER), str(step))
        # The last file first: without it, the end of the run is evaluated again.
        for name in (LAST_FILE, EVALUATION, "report.html", _FOLDER):
            if (workdir / name).exists():
                os.replace(workdir / name, folder / name)
    return True


def end_settings(config: ConfigDict, held_out: str, **changes: Any) -> str:
    """What the results of a run's end depend on, besides weights and training data, as JSON.

    Args:
      config: of the run.
      held_out: fingerprint of the held-out images; "" without any.
      **changes: other values of keys of `config.eval`.
    """
    settings = to_json(config)["eval"] | changes
    kept = {key: value for key, value in settings.items() if key not in _IN_TRAINING}
    return json.dumps({"eval": kept, "held_out": held_out}, sort_keys=True)


def measured_with(settings: str | None, config: ConfigDict, held_out: str) -> bool:
    """Whether results of a run's end are those that the config asks for.

    Args:
      settings: from `end_settings` when they were measured.
      config: of the run now; without `eval.at_end` it asks for less.
      held_out: fingerprint of the held-out images now.
    """
    now = (end_settings(config, held_out), end_settings(config, held_out, at_end=True))
    return settings in now


@dataclass(frozen=True)
class Evaluation:
    """The rows of an `evaluation.json`, and the images and the step they were measured at.

    Attributes:
      rows: one per encoder.
      test_examples: number of held-out images.
      split: describes the split, in words.
      step: of the run's checkpoint; None in an older file.
      notes: limits of the accuracies, as sentences.
    """

    rows: list[Row]
    test_examples: int
    split: str
    step: int | None = None
    notes: tuple[str, ...] = ()

    def find(self, name: str) -> Row | None:
        """Returns the row of that name."""
        return next((row for row in self.rows if row.name == name), None)

    @property
    def trained(self) -> Row | None:
        """The run's own row."""
        return next((row for row in self.rows if row.trained), None)

    @property
    def labels(self) -> list[int]:
        """Numbers of labels per class that any row has, in ascending order."""
        return sorted({count for row in self.rows for count in row.trials})

    @property
    def trials(self) -> int:
        """The number of few-label trials."""
        return max((len(values) for row in self.rows for values in row.trials.values()), default=0)


def write_evaluation(workdir: Path, evaluation: Evaluation) -> None:
    """Writes `evaluation.json`.

    Args:
      workdir: the run's folder.
      evaluation: has at least one row.
    """
    rows: list[dict[str, Any]] = []
    for row in evaluation.rows:
        few = {
            f"labels_{count}": {
                "mean": float(values.mean()),
                "std": float(values.std(ddof=1)) if len(values) > 1 else 0.0,
                "trials": values.tolist(),
            }
            for count, values in row.trials.items()
        }
        ends = {f"{key}_interval": list(interval) for key, interval in row.intervals.items()}
        rows.append({"name": row.name, **few, **row.single, **ends})
    record = {
        "rows": rows,
        "step": evaluation.step,
        "trials": evaluation.trials,
        "test_examples": evaluation.test_examples,
        "split": evaluation.split,
        "notes": list(evaluation.notes),
    }
    with replacing(workdir / EVALUATION) as file:
        file.write_text(json.dumps(record, indent=1) + "\n")


def read_evaluation(path: Path) -> Evaluation:
    """Reads an `evaluation.json`.

    Raises:
      OSError: it cannot be read.
      ValueError: it is corrupt.
    """
    try:
        data = json.loads(read_regular(path))
        rows = [_parse_row(entry) for entry in data["rows"]]
        evaluation = Evaluation(
            rows,
            int(data["test_examples"]),
            str(data.get("split", "")),
            data.get("step"),
            tuple(str(note) for note in data.get("notes", ())),
        )
    except (LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{path} is not an evaluation") from error
    for labels in evaluation.labels:
        if len({len(row.trials[labels]) for row in rows if labels in row.trials}) > 1:
            raise ValueError("rows with different numbers of trials cannot be paired")
    values = [
        v
        for row in rows
        for v in (
            *row.single.values(),
            *np.hstack([*row.trials.values(), *row.intervals.values(), []]),
        )
    ]
    if not all(0 <= value <= 1 for value in values):
        raise ValueError("accuracies are fractions of 1")
    if not rows or not 1 <= evaluation.test_examples < _MAX_IMAGES:
        raise ValueError("an evaluation has rows and test examples")
    return evaluation


def _parse_row(entry: dict[str, Any]) -> Row:
    trials = {
        int(match[1]): np.array(value["trials"], np.float64)
        for key, value in entry.items()
        if (match := re.fullmatch(r"labels_(\d+)", key)) and value["trials"]
    }
    single = {key: float(entry[key]) for key in SINGLE if entry.get(key) is not None}
    intervals = {}
    for key in single:
        if ends := entry.get(f"{key}_interval"):
            low, high = map(float, ends)
            intervals[key] = (low, high)
    return Row(str(entry["name"]), trials, single, intervals)


def write_result(workdir: Path, name: str, what: str, metrics: dict[str, Any], **more: Any) -> Path:
    """Writes the result of an evaluation, replacing an earlier one of the same name.

    Args:
      workdir: folder of the evaluated run.
      name: of the evaluation and its file.
      what: describes the evaluation in a few words.
      metrics: from `classification_metrics` or `multi_label_metrics`.
      **more: settings to record, JSON types.

    Returns:
      The file.

    Raises:
      OSError: it cannot be written.
    """
    file = subfolder(workdir, _FOLDER) / f"{name}.json"
    with replacing(file) as temporary:
        temporary.write_text(json.dumps({"what": what, **more, "metrics": metrics}) + "\n")
    return file


def require_writable_results(workdir: Path) -> None:
    """Checks that results can be written into a folder, before anything is computed.

    Raises:
      UserError: it cannot.
    """
    with writing(workdir, ELSEWHERE):
        require_writable(subfolder(workdir, _FOLDER))
        require_writable(workdir)  # for the report


def read_result(workdir: Path, name: str) -> dict[str, Any] | None:
    """Reads the result of that name; None if it is missing or corrupt."""
    try:
        record: dict[str, Any] = json.loads(read_regular(workdir / _FOLDER / f"{name}.json"))
        result_line(record)
        for each in record["metrics"].get("classes", ()):
            f"{each['name']} {each['positives']:,} {each['mean_ap']:f} {each['mean_ap_11_point']:f}"
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
    except (OverflowError, RecursionError):  # numbers and nesting that this program never writes
        return None
    return record


def read_results(workdir: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Reads all results of a run, sorted by name.

    Returns:
      The results, and the names of corrupt files.
    """
    found, corrupt = [], []
    # A name with a leading dot belongs to a process that was killed while writing.
    for file in sorted((workdir / _FOLDER).glob("[!.]*.json")):
        record = read_result(workdir, file.stem)
        if record is None:
            corrupt.append(file.name)
        else:
            found.append(record)
    return found, corrupt


def result_line(record: dict[str, Any]) -> str:
    """Formats a result as a line of text."""
    return f"{record['what']}: {metrics_line(record['metrics'])}"
