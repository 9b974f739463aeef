"""Reads the files of a run's folder for its report."""

import json
import math
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from ssl_jax.files import reason

_T = TypeVar("_T")


Curve = tuple[np.ndarray, np.ndarray]  # steps, unique and ascending, and values


@dataclass(frozen=True)
class Metrics:
    """The logged curves of a run.

    Attributes:
      curves: by name, each of at least one value, all finite.
      not_finite: by name, the steps with a NaN or infinite value.
      last_step: the highest step.
      unreadable: number of lines left out.
    """

    curves: dict[str, Curve]
    not_finite: dict[str, list[int]]
    last_step: int
    unreadable: int


def read(path: Path, parse: Callable[[Path], _T]) -> tuple[_T | None, str]:
    """Parses a file.

    Returns:
      The content and ""; or None and a sentence with the reason.
    """
    try:
        if not path.is_file():
            return None, f"Missing: the run has not written {path.name}."
        path.open("rb").close()
    except OSError as error:
        return None, f"Not shown: {path.name} can't be read ({reason(error)})."
    try:
        return parse(path), ""
    except (
        OSError,
        EOFError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        OverflowError,
        RecursionError,
        zipfile.BadZipFile,
    ):
        return None, (
            f"Not shown: {path.name} is corrupt or was written by another version of ssl_jax."
        )


def parse_metrics(path: Path) -> Metrics:
    """Parses the curves of a `metrics.jsonl`."""
    points: dict[str, dict[int, float]] = {}
    unreadable = 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            step = int(record.pop("step"))
        except (ValueError, KeyError, TypeError, AttributeError):
            unreadable += 1  # a killed run leaves a partial line, and the resumed one appends to it
            continue
        for name, value in record.items():
            if isinstance(value, (int, float)):
                # A resumed run repeats the steps since its checkpoint: the last record counts.
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


def parse_images(path: Path) -> dict[str, np.ndarray]:
    """Loads the arrays of a `report_images.npz`, by name."""
    # Opened here: given a path, np.load (NumPy 2.4) leaves a corrupt archive's file open.
    with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
        images = {name: archive[name] for name in archive.files}
    axes = {"originals": 4, "views": 5, "neighbors_query": 4, "neighbors": 5}
    axes |= {"failures_query": 4, "failures_neighbors": 5, "map_images": 4}
    for name, ndim in axes.items():
        if name in images and (
            images[name].dtype != np.uint8
            or images[name].ndim != ndim
            or images[name].shape[-1] != 3
        ):
            raise ValueError(f"{name} is not an array of RGB images")
    names = images.get("class_names", np.empty(0))
    of_pictures = ("query_label", "neighbor_label", "map_label")
    for name in (*of_pictures, "failures_query_label", "failures_neighbor_label"):
        labels = images.get(name, np.empty(0))
        if labels.size and "class_names" in images:
            if labels.dtype.kind not in "iu" or not 0 <= labels.min() <= labels.max() < len(names):
                raise ValueError(f"{name} has labels without a name")
    return images
