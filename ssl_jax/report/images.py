"""Images in the report: views, nearest neighbors, and retrieval failures."""

import base64
import io
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

_MAX_GROUPS = 24  # of views, and of queries
_THUMB = 64  # CSS pixels


@dataclass(frozen=True)
class Thumb:
    """An image as the page shows it.

    Attributes:
      source: a data URL.
      alt: describes the image.
      width: in CSS pixels.
      height: in CSS pixels.
      enlarged: whether its pixels are shown as squares.
    """

    source: str
    alt: str
    width: int
    height: int
    enlarged: bool


def png(image: UInt8[np.ndarray, "h w 3"]) -> str:
    """Encodes an image as the data URL of a PNG."""
    return _data_url(Image.fromarray(image), "PNG")


def jpeg(image: UInt8[np.ndarray, "h w 3"]) -> str:
    """Encodes an image as the data URL of a JPEG, smaller for photographs."""
    return _data_url(Image.fromarray(image), "JPEG")


def _data_url(picture: Image.Image, form: str) -> str:
    data = io.BytesIO()
    picture.save(data, form, optimize=True)
    content = base64.b64encode(data.getvalue()).decode("ascii")
    return f"data:image/{form.lower()};base64,{content}"


def contact_sheet(
    images: UInt8[np.ndarray, "n s s 3"],
) -> UInt8[np.ndarray, "side side 3"]:
    """Arranges images in a square, row by row; the rest is black.

    Args:
      images: squares, at least one.

    Returns:
      The same number of columns and rows: the square root of n, rounded up.
    """
    columns = math.isqrt(len(images) - 1) + 1
    size = images.shape[1]
    tiles = np.zeros((columns * columns, size, size, 3), np.uint8)
    tiles[: len(images)] = images
    rows = tiles.reshape(columns, columns, size, size, 3).transpose(0, 2, 1, 3, 4)
    return np.ascontiguousarray(rows.reshape(columns * size, columns * size, 3))


def _thumb(image: UInt8[np.ndarray, "h w 3"], alt: str) -> Thumb:
    """Shrinks an image, or enlarges a small one by a whole factor."""
    height, width = image.shape[:2]
    picture = Image.fromarray(image)
    if max(height, width) > 2 * _THUMB:  # twice, for high-density screens
        picture.thumbnail((2 * _THUMB, 2 * _THUMB))
    scale = _THUMB / max(height, width)
    scale = math.floor(scale) if scale >= 1 else scale
    source = _data_url(picture, "PNG" if scale > 1 else "JPEG")
    return Thumb(source, alt, round(scale * width), round(scale * height), scale > 1)


def views_section(images: dict[str, np.ndarray]) -> dict[str, Any] | str:
    """Images with their training views, or why there are none."""
    if "originals" not in images or "views" not in images or not len(images["originals"]):
        return "Missing: report_images.npz contains no views."
    originals, views = images["originals"][:_MAX_GROUPS], images["views"][:_MAX_GROUPS]
    names = image_names(images, "original_name", originals.shape[:1])
    groups = [
        [_thumb(original, f"Image {name or i}, original")]
        + [_thumb(view, f"Image {name or i}, view {j}") for j, view in enumerate(group, start=1)]
        for i, (name, original, group) in enumerate(
            zip(names, originals, views, strict=False), start=1
        )
    ]
    return {"count": views.shape[1], "groups": groups}


def image_names(images: dict[str, np.ndarray], key: str, shape: tuple[int, ...]) -> np.ndarray:
    """The first names of images, strings in an array of that shape; "" if there are no names."""
    names = np.atleast_1d(images.get(key, np.empty(0)))[: shape[0]]
    return names if names.shape == shape and names.dtype.kind == "U" else np.full(shape, "")


def neighbors_section(images: dict[str, np.ndarray]) -> dict[str, Any] | str:
    """Held-out images with the most similar training images, or why there are none."""
    names = ("neighbors_query", "neighbors", "neighbor_similarity")
    if any(name not in images for name in names) or not images["neighbors"].size:
        return "Missing: report_images.npz contains no neighbors."
    arrays = (images[name][:_MAX_GROUPS] for name in names)
    text = (
        "Each row starts with a test image, followed by the training images with the most similar "
        "features and their cosine similarity."
    )
    labels = None
    if {"query_label", "neighbor_label", "class_names"} <= images.keys():
        labels = images["query_label"][:_MAX_GROUPS], images["neighbor_label"][:_MAX_GROUPS]
        correct = labels[1] == labels[0][:, None]
        text += f" {correct.sum()} of {correct.size} are of the test image's class"
        text += "." if correct.all() else "; the others have a dashed frame, a ✕ and their class."
    return {"text": text, **_queries(images, "", arrays, labels)}


def failures_section(images: dict[str, np.ndarray]) -> dict[str, Any] | str:
    """Held-out images whose nearest training image is of a different class, or why there are none.

    Args:
      images: of `report_images.npz`.
    """
    if not {"failures_count", "failures_queries"} <= images.keys():
        if "neighbors" in images and "query_label" not in images:
            return "Missing: without labels no neighbor is wrong."
        return "Missing: report_images.npz contains no retrieval failures."
    count, queries = int(images["failures_count"]), int(images["failures_queries"])
    result = (
        f"For {count:,} of {queries:,} held-out images, the nearest training image is of a "
        f"different class ({100 * count / queries:.1f} %)."
    )
    if not count:
        return {"result": result, "text": "", "queries": []}
    arrays = (
        images[f"failures_{name}"][:_MAX_GROUPS] for name in ("query", "neighbors", "similarity")
    )
    labels = images["failures_query_label"], images["failures_neighbor_label"]
    found = _queries(images, "failures_", arrays, labels)
    shown = len(found["queries"])
    text = "They are" if shown == count else f"{shown} of them are"
    text += " shown with their nearest neighbors, in descending order of similarity."
    return {"result": result, "text": text, **found}


def _queries(
    images: dict[str, np.ndarray],
    prefix: str,
    arrays: Iterable[np.ndarray],
    labels: tuple[np.ndarray, np.ndarray] | None,
) -> dict[str, Any]:
    """Queries with their neighbors.

    Args:
      images: of `report_images.npz`.
      prefix: of the keys of their names in it.
      arrays: images [n, h, w, 3], their neighbors [n, k, H, W, 3], similarities [n, k].
      labels: of the images and of the neighbors.
    """
    query, neighbors, similarity = arrays
    class_names = images.get("class_names")
    names = image_names(images, f"{prefix}query_name", query.shape[:1])
    neighbor_names = image_names(images, f"{prefix}neighbor_name", neighbors.shape[:2])
    # Without labels no neighbor is wrong, and none has a name.
    correct = np.ones(neighbors.shape[:2], bool)
    own, other = np.full(len(query), ""), np.full(correct.shape, "")
    if labels is not None and class_names is not None:
        label, found = labels
        correct = found == label[:, None]
        own, other = class_names[label], class_names[found]
    queries = []
    for i in range(len(query)):
        alt = f"Test image {names[i] or i + 1}" + (f": {own[i]}" if own[i] else "")
        hits = []
        columns = zip(
            neighbors[i], similarity[i], other[i], correct[i], neighbor_names[i], strict=True
        )
        for rank, (image, cosine, name, same, file) in enumerate(columns, 1):
            text = f"Neighbor {rank}{f' ({file})' if file else ''}, similarity {cosine:.2f}"
            text += f": {name}, {'same' if same else 'different'} class" if name else ""
            hits.append((_thumb(image, text), f"{cosine:.2f}", "" if same else name, same))
        queries.append((_thumb(query[i], alt), own[i], hits))
    # The width of a query with all its neighbors.
    return {"queries": queries, "width": (_THUMB + 8) * neighbors.shape[1] + 96}
