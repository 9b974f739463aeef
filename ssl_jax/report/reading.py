"""What a run left in its folder, as the report needs it."""

import json
import math
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from ssl_jax.methods import title

_T = TypeVar("_T")


BASELINE = "raw pixels"


UNTRAINED = (BASELINE, "random init")


Curve = tuple[np.ndarray, np.ndarray]  # steps, which rise and are unique, and values


@dataclass(frozen=True)
class Metrics:
    """The curves by name, each of finite values and at least one of them."""

    curves: dict[str, Curve]
    not_finite: dict[str, list[int]]  # the steps where a value was nan or infinite
    last_step: int
    unreadable: int  # lines left out


@dataclass(frozen=True)
class Row:
    """One encoder's accuracies, as fractions; `trials` by labels per class."""

    name: str
    trials: dict[int, np.ndarray]
    single: dict[str, float]  # "linear", "knn"

    @property
    def trained(self) -> bool:
        """Whether the row is the run's own, no baseline."""
        return self.name not in UNTRAINED


@dataclass(frozen=True)
class Evaluation:
    """An `evaluation.json`: its rows, and what they were measured on."""

    rows: list[Row]
    test_examples: int
    split: str

    def find(self, name: str) -> Row | None:
        """The row of that name."""
        return next((row for row in self.rows if row.name == name), None)

    @property
    def trained(self) -> Row | None:
        """The run's own row."""
        return next((row for row in self.rows if row.trained), None)

    @property
    def labels(self) -> list[int]:
        """The numbers of labels per class that any row has, rising."""
        return sorted({k for row in self.rows for k in row.trials})

    @property
    def trials(self) -> int:
        """How many labelled sets there are of each number."""
        return max((len(values) for row in self.rows for values in row.trials.values()), default=0)


def read(path: Path, parse: Callable[[Path], _T]) -> tuple[_T | None, str]:
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
            f"Not shown: {path.name} is corrupt or has another form than this version of ssl_jax "
            "writes."
        )


def parse_metrics(path: Path) -> Metrics:
    """The curves of a `metrics.jsonl`."""
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
    return Metrics(curves, not_finite, last_step, unreadable)


def parse_evaluation(path: Path) -> Evaluation:
    """The rows of an `evaluation.json`."""
    data = json.loads(path.read_text(encoding="utf-8"))
    rows = []
    for entry in data["rows"]:
        trials = {
            int(match[1]): np.array(value["trials"], np.float64)
            for key, value in entry.items()
            if (match := re.fullmatch(r"labels_(\d+)", key)) and value["trials"]
        }
        single = {k: float(entry[k]) for k in ("linear", "knn") if entry.get(k) is not None}
        name = str(entry["name"])
        rows.append(Row(title(name), trials, single))
    evaluation = Evaluation(rows, int(data["test_examples"]), str(data.get("split", "")))
    for labels in evaluation.labels:
        if len({len(row.trials[labels]) for row in rows if labels in row.trials}) > 1:
            raise ValueError("rows with different numbers of trials cannot be paired")
    values = [
        v for row in rows for v in (*row.single.values(), *np.hstack([*row.trials.values(), []]))
    ]
    if not all(0 <= value <= 1 for value in values):
        raise ValueError("accuracies are fractions of 1")
    if not rows or evaluation.test_examples < 1:
        raise ValueError("an evaluation has rows and test examples")
    return evaluation


def parse_images(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a `report_images.npz`, by name."""
    # Opened here: on a corrupt archive np.load leaves its own file open.
    with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
        images = {name: archive[name] for name in archive.files}
    axes = {"originals": 4, "views": 5, "neighbours_query": 4, "neighbours": 5}
    axes |= {"failures_query": 4, "failures_neighbours": 5, "map_images": 4}
    for name, ndim in axes.items():
        if name in images and (
            images[name].dtype != np.uint8
            or images[name].ndim != ndim
            or images[name].shape[-1] != 3
        ):
            raise ValueError(f"{name} is not an array of RGB images")
    names = images.get("class_names", np.empty(0))
    of_pictures = ("query_label", "neighbour_label", "map_label")
    for name in (*of_pictures, "failures_query_label", "failures_neighbour_label"):
        labels = images.get(name, np.empty(0))
        if labels.size and "class_names" in images and labels.max() >= len(names):
            raise ValueError(f"{name} has more classes than names")
    return images
