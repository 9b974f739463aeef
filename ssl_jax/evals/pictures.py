"""Images that a report shows: views, nearest neighbors, retrieval failures, a map."""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image, ImageOps

from ssl_jax.data.sources import Source
from ssl_jax.data.values import rgb
from ssl_jax.evals.knn import nearest_neighbors

PICTURES = 12  # originals with views, and queries with neighbors
_NEIGHBORS = 6
_SIDE = 128  # largest side of failures' images, in pixels
_MAP_SIDE = 32  # likewise of the map's
_RETRIEVED = 5000  # held-out images at most whose nearest neighbors are searched for failures
_FAILURES = 24  # shown at most
# Images in a map: more would overlap. t-SNE of 1,000 takes 1.7 s of CPU time on a Xeon (5 s on a
# busy one), of 2,500 6 s (20 s).
_MAP_IMAGES = 1000
_MAP_CLASSES = 20  # that a map can show
_GRID_SIDE = 64  # pixels to which the small images of a grid are enlarged, about
_GAP = 2


def thumbnails(images: UInt8[np.ndarray, "n h w 3"], side: int) -> UInt8[np.ndarray, "n s s 3"]:
    """Crops images to their central square and shrinks those larger than `side`.

    Args:
      images: of one size.
      side: of a thumbnail, at most, in pixels.

    Returns:
      The thumbnails; squares that are small enough are unchanged.
    """
    height, width = images.shape[1:3]
    side = min(side, height, width)
    if height == width == side:
        return images
    small = [ImageOps.fit(Image.fromarray(image), (side, side)) for image in images]
    return np.stack([np.asarray(picture) for picture in small])


def view_grid(
    originals: UInt8[np.ndarray, "n H W 3"], views: UInt8[np.ndarray, "n v h w 3"]
) -> UInt8[np.ndarray, "rows columns 3"]:
    """Draws a grid with one row per image: the original first, then its views.

    Args:
      originals: the images.
      views: of each image, at the size at which they are drawn.

    Returns:
      The grid; images smaller than 64 pixels are enlarged by a whole factor.
    """
    height, width = views.shape[2:4]
    factor = max(1, math.floor(_GRID_SIDE / max(height, width)))
    fitted = [ImageOps.pad(Image.fromarray(image), (width, height)) for image in originals]
    first = np.stack([np.asarray(picture) for picture in fitted])[:, None]
    tiles = np.concatenate([first, views], axis=1).repeat(factor, axis=2).repeat(factor, axis=3)
    # A white gap after each tile, except the last of a row or column.
    tiles = np.pad(
        tiles, ((0, 0), (0, 0), (0, _GAP), (0, _GAP), (0, 0)), constant_values=np.uint8(255)
    )
    n, columns, tall, wide, _ = tiles.shape
    grid = tiles.transpose(0, 2, 1, 3, 4).reshape(n * tall, columns * wide, 3)
    return np.ascontiguousarray(grid[:-_GAP, :-_GAP])


def retrieval_pictures(
    train: Source,
    test: Source,
    train_features: Float[np.ndarray, "n d"],
    test_features: Float[np.ndarray, "m d"],
    *,
    labeled: bool,
    limits: Sequence[float] = (),
) -> dict[str, np.ndarray]:
    """Collects held-out images with their nearest neighbors, retrieval failures, and a map.

    Args:
      train: the split with the neighbors.
      test: the held-out split.
      train_features: of `train`.
      test_features: of `test`.
      labeled: whether all images of both splits have labels; without them there are no failures.
      limits: `config.data.range`, for images as people see them.

    Returns:
      Arrays for `report.write_images`, by name.
    """
    features = train_features, test_features
    shown = _Shown(train, limits), _Shown(test, limits)
    pictures = _neighbors(*shown, features, labeled) | _map(shown[1], test_features, labeled)
    return pictures | _failures(*shown, features) if labeled else pictures


class _Shown:
    """A source whose images are 8-bit RGB, see `values.rgb`."""

    def __init__(self, source: Source, limits: Sequence[float]) -> None:
        self._source, self._limits = source, limits
        self.num_examples = source.num_examples
        self.class_names, self.names = source.class_names, source.names

    @property
    def labels(self) -> Int[np.ndarray, " n"] | None:
        return self._source.labels  # read on first use

    def eval_transform(self, ids: Int[np.ndarray, " n"]) -> UInt8[np.ndarray, "n h w 3"]:
        return rgb(self._source.eval_transform(ids), self._limits)


def _neighbors(
    train: _Shown, test: _Shown, features: tuple[np.ndarray, np.ndarray], labeled: bool
) -> dict[str, np.ndarray]:
    """Held-out images, spread over the split, with the most similar training images."""
    queries = _spread(test, PICTURES)
    similarity, index = nearest_neighbors(features[0], features[1][queries], k=_NEIGHBORS)
    images = train.eval_transform(index.reshape(-1))
    pictures = {
        "neighbors_query": test.eval_transform(queries),
        "neighbors": images.reshape(*index.shape, *images.shape[1:]),
        "neighbor_similarity": similarity,
        "query_name": image_names(test, queries),
        "neighbor_name": image_names(train, index),
    }
    if labeled:
        assert train.labels is not None and test.labels is not None
        pictures["query_label"] = test.labels[queries]
        pictures["neighbor_label"] = train.labels[index]
        pictures["class_names"] = np.array(train.class_names)
    return pictures


def _failures(
    train: _Shown, test: _Shown, features: tuple[np.ndarray, np.ndarray]
) -> dict[str, np.ndarray]:
    """Held-out images whose nearest training image is of a different class, most similar first."""
    assert train.labels is not None and test.labels is not None
    queries = _spread(test, _RETRIEVED)
    similarity, index = nearest_neighbors(features[0], features[1][queries], k=_NEIGHBORS)
    wrong = np.flatnonzero(train.labels[index[:, 0]] != test.labels[queries])
    shown = wrong[np.argsort(-similarity[wrong, 0], kind="stable")][:_FAILURES]
    counts = {"failures_count": np.array(len(wrong)), "failures_queries": np.array(len(queries))}
    if not len(shown):
        return counts
    images = thumbnails(train.eval_transform(index[shown].reshape(-1)), _SIDE)
    return counts | {
        "failures_query": thumbnails(test.eval_transform(queries[shown]), _SIDE),
        "failures_neighbors": images.reshape(*index[shown].shape, *images.shape[1:]),
        "failures_similarity": similarity[shown],
        "failures_query_name": image_names(test, queries[shown]),
        "failures_neighbor_name": image_names(train, index[shown]),
        "failures_query_label": test.labels[queries[shown]],
        "failures_neighbor_label": train.labels[index[shown]],
    }


def _map(test: _Shown, features: np.ndarray, labeled: bool) -> dict[str, np.ndarray]:
    """Held-out images for a map, each with its nearest neighbors among them."""
    labels = test.labels if labeled else None
    index = choose_images(labels, len(features))
    # The nearest of all is the image itself.
    similarity, near = nearest_neighbors(features[index], features[index], k=_NEIGHBORS + 1)
    others = near != np.arange(len(index))[:, None]
    others[others.all(axis=1), -1] = False  # duplicates of the image came before it
    found = {
        "map_features": features[index],
        "map_images": thumbnails(test.eval_transform(index), _MAP_SIDE),
        "map_name": image_names(test, index),
        "map_neighbor": near[others].reshape(len(index), -1),
        "map_similarity": similarity[others].reshape(len(index), -1),
    }
    return found if labels is None else found | {"map_label": labels[index]}


def image_names(source: Source | _Shown, ids: Int[np.ndarray, "*shape"]) -> np.ndarray:
    """The images' names, an array of strings in the shape of the ids."""
    return np.array(source.names(ids.reshape(-1)), str).reshape(ids.shape)


def _spread(source: _Shown, most: int) -> Int[np.ndarray, " n"]:
    """Ids of at most that number of images, evenly spaced."""
    count = source.num_examples
    return np.linspace(0, count - 1, min(most, count)).astype(np.int32)


def choose_images(
    labels: Int[np.ndarray, " n"] | None,
    count: int,
    images: int = _MAP_IMAGES,
    classes: int = _MAP_CLASSES,
) -> Int[np.ndarray, " m"]:
    """Samples the images of a split that a map shows.

    Args:
      labels: of the split, or None.
      count: images in the split.
      images: maximum number of images.
      classes: maximum number of classes, spread evenly over all: with many classes a map would have
        an image or two of each.

    Returns:
      Indices in ascending order, sampled with a fixed seed.
    """
    kept = np.arange(count)
    if labels is not None:
        found = np.unique(labels)
        if len(found) > classes:
            shown = found[np.linspace(0, len(found) - 1, classes).astype(int)]
            kept = kept[np.isin(labels, shown)]
    sampled = np.random.default_rng(0).permutation(len(kept))[:images]
    return np.sort(kept[sampled])
