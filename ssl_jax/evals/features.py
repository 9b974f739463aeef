"""Feature extraction: a frozen encoder applied to all images of a source."""

import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from ssl_jax.data.reader import Reader
from ssl_jax.data.sources import Source

Pytree = Any


def extract_features(
    encode: Callable[[Pytree, Any], Any],
    variables: Pytree,
    source: Source,
    *,
    batch_size: int,
    rows: Int[np.ndarray, " local"],
    place: Callable[[np.ndarray], Any],
    keep: bool = True,
    timeout_s: float = 0.0,
    update: Callable[[str], None] = lambda text: None,
    timed: Callable[[float, float], None] = lambda seconds, waited: None,
) -> Float[np.ndarray, "n d"]:
    """Extracts the features of every image of a source, in the order of the ids.

    Args:
      encode: compiled function of (variables, uint8 images [batch_size, H, W, 3]) that returns the
        encoder's features [batch_size, d] in evaluation mode, replicated on all processes.
      variables: of the encoder.
      source: of the images.
      batch_size: images at a time; the last batch is padded and the padding cut off, so that no
        image is dropped and only one shape is compiled.
      rows: indices within a batch of the images that this process reads.
      place: puts this process's images on its devices.
      keep: whether this process collects the features, or only computes its share.
      timeout_s: maximum time to wait for a batch of images, in seconds; 0 for no limit.
      update: receives the progress as text, after each batch.
      timed: receives the seconds that it took, and those of them spent waiting for images.

    Returns:
      float32 [N, d]; [0, d] unless `keep`.

    Raises:
      UserError: images can't be read, or not within `timeout_s`.
    """
    count = source.num_examples
    kept_features = np.empty((0, 0), np.float32)
    ids = (batch[rows] for batch, _ in padded_batches(count, batch_size))
    starts = range(0, count, batch_size)
    begin = time.perf_counter()
    with Reader[Any](source.eval_batches(ids), timeout_s, place) as images:
        computed = (encode(variables, images.next()) for _ in starts)
        # One batch late: images are read and the next batch dispatched while the devices compute.
        for start, features in zip(starts, _one_late(computed), strict=True):
            if start == 0:
                kept_features = np.empty((count if keep else 0, features.shape[1]), np.float32)
            end = min(start + batch_size, count)
            if keep:
                kept_features[start:end] = np.asarray(features, np.float32)[: end - start]
            else:
                jax.block_until_ready(features)
            update(f"Extracting features: {end:,} of {count:,} images")
        timed(time.perf_counter() - begin, images.wait_seconds)
    return kept_features


def _one_late(items: Iterator[Any]) -> Iterator[Any]:
    """Yields each item once the next one is there."""
    for previous, _ in itertools.pairwise(itertools.chain(items, [None])):
        yield previous


def padded_batches(num_examples: int, batch_size: int) -> Iterator[tuple[np.ndarray, int]]:
    """Yields ids in batches of one size, the last padded with the last id.

    Args:
      num_examples: N.
      batch_size: of every batch.

    Yields:
      int32 ids [batch_size], and the number of them that is not padding.
    """
    for start in range(0, num_examples, batch_size):
        ids = np.arange(start, start + batch_size, dtype=np.int32)
        yield np.minimum(ids, num_examples - 1), min(batch_size, num_examples - start)
