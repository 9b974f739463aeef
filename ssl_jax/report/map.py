"""A map of held-out images by their features, placed by t-SNE.

Two axes can't hold many dimensions: which images are close to each other in a map is roughly true,
and distances between groups mean little. The nearest neighbors that the map shows are those of the
features themselves.
"""

import math
from pathlib import Path
from typing import Any

import lazy_loader
import numpy as np
import threadpoolctl
from jaxtyping import Float, UInt8

from ssl_jax.diagnostics import unit_rows
from ssl_jax.evals.results import LAST_FILE
from ssl_jax.files import RERUN, replacing, writing
from ssl_jax.report.images import contact_sheet, image_names, jpeg, png
from ssl_jax.report.projector import write_projector

sklearn = lazy_loader.load("sklearn")
_DIRECTIONS = 50  # principal components of the features that t-SNE sees
_STEPS = 500

COLORS = 8
_SIZE, _MARGIN = 400.0, 14.0
_SMALL = 16  # pixels of an image that a JPEG would blur
# Ten marks around (0, 0): classes differ by these too.
_MARKS = (
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z",
    "M-3.6-3.6h7.2v7.2h-7.2z",
    "M0-4.8L4.5 3.4h-9z",
    "M-4.5-3.4h9L0 4.8z",
    "M0-5.2L4.4 0 0 5.2-4.4 0z",
    "M-1.4-4.5h2.8v3.1h3.1v2.8h-3.1v3.1h-2.8v-3.1h-3.1v-2.8h3.1z",
    "M-4.2-2.2l2-2L0-2l2.2-2.2 2 2L2 0l2.2 2.2-2 2L0 2l-2.2 2.2-2-2L-2 0z",
    "M0-5.6L1.5-1.5 5.6 0 1.5 1.5 0 5.6-1.5 1.5-5.6 0-1.5-1.5z",
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0zM-2 0a2 2 0 1 0 4 0a2 2 0 1 0-4 0z",
    "M-4-4h8v8h-8zM-2-2v4h4v-4z",
)
_REQUIRED = ("map_images", "map_positions", "map_neighbor", "map_similarity")


def write_images(workdir: Path, arrays: dict[str, np.ndarray], step: int) -> None:
    """Draws the map and writes the images of a run's end: for the report and for TensorBoard.

    Args:
      workdir: the run's folder; gets `report_images.npz` and the files of the embedding projector.
      arrays: from `Evaluator.finish`.
      step: of the run.

    Raises:
      UserError: the folder cannot be written.
    """
    arrays = dict(arrays)
    features = arrays.pop("map_features", None)
    with writing(workdir, RERUN):
        if features is not None:
            arrays["map_positions"] = tsne(features)
            names = arrays["class_names"][arrays["map_label"]] if "map_label" in arrays else []
            images = arrays["map_images"]
            write_projector(workdir, features, list(map(str, names)), images, step)
        # Last: the file marks the run's end as complete.
        with replacing(workdir / LAST_FILE) as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]


def tsne(features: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n 2"]:
    """Places features in a plane: t-SNE (van der Maaten & Hinton, 2008) of their directions.

    Args:
      features: [n, d]; their length does not matter.

    Returns:
      float32 positions, deterministic; their scale has no meaning. All NaN if any feature is not
      finite.
    """
    if not np.isfinite(features).all():
        return np.full((len(features), 2), np.nan, np.float32)
    x = unit_rows(features)
    x = x - x.mean(axis=0)
    # Imported before the limit, which applies to libraries that are loaded already.
    tsne, svd = sklearn.manifold.TSNE, sklearn.utils.extmath.randomized_svd
    # Steps are short: several threads would wait for each other longer than they work.
    with threadpoolctl.threadpool_limits(1):
        u, s, _ = svd(x, min(_DIRECTIONS, *x.shape), random_state=0)
        plane = np.zeros((len(x), 2))
        plane[:, : len(s)] = (u * s)[:, :2]
        # Identical features have no two directions, and few images no neighborhoods.
        if len(x) < 8 or not s[0] > 1e-6:
            return plane.astype(np.float32)
        start = plane / plane[:, 0].std() * 1e-4
        placed: np.ndarray = tsne(
            perplexity=min(30.0, (len(x) - 1) / 3),
            init=start.astype(np.float32),
            max_iter=_STEPS,
            random_state=0,
        ).fit_transform(u * s)
    return placed.astype(np.float32)


def map_section(images: dict[str, np.ndarray], encoder: str) -> dict[str, Any] | str:
    """The map of a run's encoder, or why there is none.

    Args:
      images: of `report_images.npz`.
      encoder: its name.
    """
    if any(name not in images for name in _REQUIRED):
        return "Missing: report_images.npz contains no map."
    positions = images["map_positions"]
    if not np.isfinite(positions).all():
        return "Not drawn: not all features are finite."
    names = [str(name) for name in images.get("class_names", ())]
    labels = images.get("map_label") if names else None
    shown = [] if labels is None else sorted({int(label) for label in labels})
    text = (
        f"{len(positions):,} held-out images, placed by t-SNE so that images with similar features "
        "are close to each other; distances between groups, and the axes, have no meaning."
    )
    description = f"Map of {len(positions)} images by the features of {encoder}"
    if labels is None:
        text += " There are no labels to color them by."
    else:
        description += f", colored by {len(shown)} classes"
        if len(shown) < len(names):
            text += f" It shows {len(shown)} of the {len(names):,} classes."
    styles = {label: (i % COLORS, _MARKS[i % len(_MARKS)]) for i, label in enumerate(shown)}
    low, high = positions.min(axis=0), positions.max(axis=0)
    scale = (_SIZE - 2 * _MARGIN) / max(float((high - low).max()), 1e-12)
    placed = _SIZE / 2 + (positions - (low + high) / 2) * scale
    files = image_names(images, "map_name", (len(positions),))
    marks = [
        (x, y, *(0, _MARKS[0], f"image {i + 1}"), files[i])
        if labels is None
        else (x, y, *styles[int(labels[i])], names[int(labels[i])], files[i])
        for i, (x, y) in enumerate(placed)
    ]
    centers = [] if labels is None else [np.median(placed[labels == i], axis=0) for i in shown]
    return {
        "text": text,
        "encoder": encoder,
        "description": description,
        "size": _SIZE,
        "marks": marks,
        "classes": [(*styles[label], names[label]) for label in shown],
        "centers": centers,
        "data": _data(images, labels, names),
    }


def _data(
    images: dict[str, np.ndarray], labels: np.ndarray | None, names: list[str]
) -> dict[str, Any]:
    """For the page's script: one picture of all images, and the nearest neighbors of each."""
    thumbs: UInt8[np.ndarray, "n s s 3"] = images["map_images"]
    small = thumbs.shape[1] <= _SMALL
    return {
        "files": image_names(images, "map_name", (len(thumbs),)).tolist(),
        "sheet": (png if small else jpeg)(contact_sheet(thumbs)),
        "columns": math.isqrt(len(thumbs) - 1) + 1,
        "pixelated": small,
        "names": names,
        "labels": [] if labels is None else labels.tolist(),
        "near": images["map_neighbor"].tolist(),
        "similarity": [[round(float(s), 3) for s in row] for row in images["map_similarity"]],
    }
