"""Reads the files of a run's folder for its report."""

import math
import re
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np

from ssl_jax.config import default_config, to_json, view
from ssl_jax.errors import UserError
from ssl_jax.evals.results import LAST_FILE
from ssl_jax.files import open_regular, read_regular, reason
from ssl_jax.run.folder import read_record
from ssl_jax.run.log import parse_record

_T = TypeVar("_T")

_HUGE = 1e300  # of a curve's values
_FAR = 1e30  # of positions and similarities
_MAX_BYTES = 2**30  # of a file, and of all images of a report
_MAX_DRAWN = {"m": 10_000, "v": 1000, "k": 1000, "j": 1000, "i": 1000}  # by axis

# Arrays of `report_images.npz`: kinds of their dtype, and their axes. A letter is the same number
# wherever it occurs, "_" any that isn't 0.
_ARRAYS = {
    "settings": ("U", ""),
    "not_scored": ("U", ""),
    "originals": ("u", "n__3"),
    "original_name": ("U", "n"),
    "views": ("u", "nv__3"),
    "neighbors_query": ("u", "q__3"),
    "neighbors": ("u", "qk__3"),
    "neighbor_similarity": ("f", "qk"),
    "query_label": ("iu", "q"),
    "query_name": ("U", "q"),
    "neighbor_name": ("U", "qk"),
    "neighbor_label": ("iu", "qk"),
    "failures_count": ("iu", ""),
    "failures_queries": ("iu", ""),
    "failures_query": ("u", "f__3"),
    "failures_neighbors": ("u", "fj__3"),
    "failures_similarity": ("f", "fj"),
    "failures_query_name": ("U", "f"),
    "failures_neighbor_name": ("U", "fj"),
    "failures_query_label": ("iu", "f"),
    "failures_neighbor_label": ("iu", "fj"),
    "map_images": ("u", "mss3"),
    "map_positions": ("f", "m2"),
    "map_neighbor": ("iu", "mi"),
    "map_similarity": ("f", "mi"),
    "map_label": ("iu", "m"),
    "map_name": ("U", "m"),
    "class_names": ("U", "c"),
}
_LABELS = tuple(name for name in _ARRAYS if name.endswith("label"))

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


def read_run(workdir: Path) -> dict[str, Any]:
    """Reads a run's record, `config.json`, for a report.

    A run of another version, or of a method that is not registered here, may have other keys.

    Raises:
      UserError: there is no run, or a known key has a value of another type.
    """
    try:
        record = read_record(workdir)
        config = record["config"]
        _require_types(config, to_json(default_config()), "config")
        for name, each in config.get("views", {}).items():
            _require_types({"view": each}, {"view": to_json(view())}, f"config.views.{name}")
        for each in (record, *record.get("resumed", [])):
            # Most methods have no trivial loss.
            known = {k: v for k, v in (each.get("derived") or {}).items() if v is not None}
            _require_types(known, {"trivial_loss": 0.0, "patience": 0}, "derived")
    except (ValueError, RecursionError, AttributeError) as error:
        why = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise UserError(
            f"Cannot read {workdir / 'config.json'} ({why}): restore it from a backup."
        ) from error
    return record


def _require_types(values: Any, defaults: dict[str, Any], where: str) -> None:
    """Checks values of a config that are there against the types of its defaults."""
    if not isinstance(values, dict):
        raise ValueError(f"{where} is not a group of keys")
    for key, default in defaults.items():
        value = values.get(key, default)
        if isinstance(default, dict):
            _require_types(value, default, f"{where}.{key}")
        elif type(default) in (int, float):
            # A view's size may be a pair.
            pair = key == "size" and isinstance(value, list) and len(value) == 2
            numbers = value if pair else [value]
            if not all(type(n) in (int, float) and abs(n) < _HUGE for n in numbers):
                raise ValueError(f"{where}.{key} is not a number that can be shown")
        elif not isinstance(value, type(default)):
            raise ValueError(f"{where}.{key} is not of type {type(default).__name__}")


def read(path: Path, parse: Callable[[Path], _T]) -> tuple[_T | None, str]:
    """Parses a file.

    Returns:
      The content and ""; or None and a sentence with the reason.
    """
    try:
        open_regular(path, _MAX_BYTES).close()
    except FileNotFoundError:
        return None, f"Missing: the run has not written {path.name}."
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
        MemoryError,
        RuntimeError,
        zipfile.BadZipFile,
        zlib.error,
    ):
        return None, (
            f"Not shown: {path.name} is corrupt or was written by another version of ssl_jax."
        )


def parse_metrics(path: Path) -> Metrics:
    """Parses the curves of a `metrics.jsonl`."""
    points: dict[str, dict[int, float]] = {}
    unreadable = 0
    for line in read_regular(path, _MAX_BYTES).splitlines():
        record = parse_record(line) if line.strip() else {}
        if record is None:
            unreadable += 1  # a killed run leaves a partial line, and the resumed one appends to it
            continue
        for name, value in record.items():
            if name != "step" and type(value) in (int, float):
                # A resumed run repeats the steps since its checkpoint: the last record counts.
                points.setdefault(name, {})[record["step"]] = _drawable(value)
    curves, not_finite = {}, {}
    for name, by_step in points.items():
        steps = sorted(step for step in by_step if math.isfinite(by_step[step]))
        if steps:
            curves[name] = np.array(steps), np.array([by_step[step] for step in steps])
        if len(steps) < len(by_step):
            not_finite[name] = sorted(by_step.keys() - set(steps))
    last_step = max((step for by_step in points.values() for step in by_step), default=0)
    return Metrics(curves, not_finite, last_step, unreadable)


def _drawable(value: float) -> float:
    """The value, or infinity or 0 where the scale of a chart would overflow or underflow."""
    if -_HUGE < value < _HUGE:
        return float(value) if abs(value) > 1 / _HUGE else 0.0
    return math.nan if value != value else math.inf


def images_settings(workdir: Path) -> str | None:
    """The evaluation settings in `report_images.npz`; None if it is missing or can't be shown."""
    images, _ = read(workdir / LAST_FILE, parse_images)
    return None if images is None else str(images.get("settings", ""))


def parse_images(path: Path) -> dict[str, np.ndarray]:
    """Loads the arrays of a `report_images.npz`, by name.

    Raises:
      ValueError: they are not those that a report draws, or too large.
    """
    images: dict[str, np.ndarray] = {}
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        # Checked before anything is read: compressed zeros may have any size.
        if sum(member.file_size for member in members) > _MAX_BYTES:
            raise ValueError("the images are too large")
        for member in members:
            with archive.open(member) as opened:
                images[member.filename.removesuffix(".npy")] = _read_array(opened, member.file_size)
    _check_images(images)
    return images


def _read_array(opened: IO[bytes], size: int) -> np.ndarray:
    """Reads an array from a `.npy` file of that size in bytes.

    `np.load` would allocate the size in the header, which may be any.
    """
    version = np.lib.format.read_magic(opened)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }[version]
    shape, fortran, dtype = read(opened)
    if dtype.hasobject or min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize > size:
        raise ValueError("an array of objects, or of a wrong size")
    data = opened.read()
    return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")


def _check_images(images: dict[str, np.ndarray]) -> None:
    """Checks dtypes and shapes, against each other too, and the ranges of indices and numbers."""
    sizes: dict[str, int] = {}
    for name, (kind, axes) in _ARRAYS.items():
        array = images.get(name)
        if array is None:
            continue
        if array.dtype.kind not in kind or kind == "u" and array.dtype != np.uint8:
            raise ValueError(f"{name} has another dtype")
        if array.ndim != len(axes):
            raise ValueError(f"{name} has another number of axes")
        for axis, length in zip(axes, array.shape, strict=True):
            if axis == "_":
                fits = length > 0
            else:
                fits = length == (int(axis) if axis.isdigit() else sizes.setdefault(axis, length))
                fits = fits and length <= _MAX_DRAWN.get(axis, length)
            if not fits:
                raise ValueError(f"{name} has another shape")
        if kind == "f" and (np.abs(array[np.isfinite(array)]) > _FAR).any():
            raise ValueError(f"{name} has numbers that can't be drawn")
    names = images.get("class_names", np.empty(0))
    for name in (*_LABELS, "map_neighbor"):
        indices = images.get(name, np.empty(0))
        beyond = sizes.get("m", 0) if name == "map_neighbor" else len(names)
        if name in _LABELS and "class_names" not in images:
            continue
        if indices.size and not 0 <= indices.min() <= indices.max() < beyond:
            raise ValueError(f"{name} has indices out of range")
    if "map_images" in images and not images["map_images"].size:
        raise ValueError("the map is empty")
    count, queries = images.get("failures_count", 0), images.get("failures_queries", 1)
    needed = [name for name in _ARRAYS if re.fullmatch("failures_[^c].*(?<!_name)", name)]
    shown = all(name in images for name in needed)
    if not 0 <= count <= queries or queries < 1 or count and not shown:
        raise ValueError("the failures don't match their number")
