"""A map of held-out images by their features, for a person to look at.

Two axes can't hold what many do: which images are near each other in a map is roughly true, and
distances between groups mean little. The nearest neighbours that go with a map are those of the
features themselves.
"""

import numpy as np
import threadpoolctl
from jaxtyping import Float, Int
from sklearn.manifold import TSNE

from ssl_jax.diagnostics import unit_rows

_IMAGES = 1000  # in a map; more would lie on each other
_CLASSES = 20  # told apart in a map
_DIRECTIONS = 50  # of the features, the widest, that t-SNE sees
_STEPS = 500


def choose_images(
    labels: Int[np.ndarray, " n"] | None, count: int, images: int = _IMAGES, classes: int = _CLASSES
) -> Int[np.ndarray, " m"]:
    """Which images of a split a map shows, the same ones for every encoder.

    Args:
      labels: of the split, or None.
      count: images in the split.
      images: that are shown at most.
      classes: that are shown at most: of many classes a map would have an image or two each. Those
        shown are spread evenly over the classes there are.

    Returns:
      Indices, rising, drawn with a fixed seed.
    """
    kept = np.arange(count)
    if labels is not None:
        found = np.unique(labels)
        if len(found) > classes:
            shown = found[np.linspace(0, len(found) - 1, classes).astype(int)]
            kept = kept[np.isin(labels, shown)]
    drawn = np.random.default_rng(0).permutation(len(kept))[:images]
    return np.sort(kept[drawn])


def tsne(features: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n 2"]:
    """Places features in a plane: t-SNE (van der Maaten & Hinton, 2008) of their directions.

    Args:
      features: [n, d]; their length does not matter.

    Returns:
      float32 positions, the same for the same features; their scale has no meaning. NaN,
      all of them, where the features are not all finite.
    """
    if not np.isfinite(features).all():
        return np.full((len(features), 2), np.nan, np.float32)
    x = unit_rows(features)
    x = x - x.mean(axis=0)
    u, s, _ = np.linalg.svd(x, full_matrices=False)
    wide = (u * s)[:, :_DIRECTIONS]
    plane = np.zeros((len(x), 2))
    plane[:, : wide.shape[1]] = wide[:, :2]
    # Features that are all the same have no two directions, and few images no neighbourhoods.
    if len(x) < 8 or not s[0] > 1e-6:
        return plane.astype(np.float32)
    start = plane / plane[:, 0].std() * 1e-4
    # Its steps are short: threads would wait for each other longer than they work.
    with threadpoolctl.threadpool_limits(1):
        placed: np.ndarray = TSNE(
            perplexity=min(30.0, (len(x) - 1) / 3),
            init=start.astype(np.float32),
            max_iter=_STEPS,
            random_state=0,
        ).fit_transform(wide)
    return placed.astype(np.float32)
