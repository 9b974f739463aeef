import time

import jax.numpy as jnp
import numpy as np
from tiny import random_source

from ssl_jax.data.arrays import ArraySource
from ssl_jax.evals.features import extract_features, padded_batches


def test_every_image_is_encoded_once_in_batches_of_one_shape():
    source = random_source(n=10)
    shapes = set()

    def encode(variables, images):
        shapes.add(images.shape)
        return images.reshape(len(images), -1) * variables

    features = extract_features(
        encode, 2.0, source, batch_size=4, rows=np.arange(4), place=lambda x: x / 1.0
    )
    assert shapes == {(4, 8, 8, 3)}
    np.testing.assert_array_equal(features, source.images.reshape(10, -1) * 2.0)


def test_padded_batches_repeat_the_last_id():
    batches = [(ids.tolist(), kept) for ids, kept in padded_batches(5, 3)]
    assert batches == [([0, 1, 2], 3), ([3, 4, 4], 2)]


def test_keep_false_encodes_all_batches_and_returns_no_features():
    source = ArraySource(np.zeros((10, 8, 8, 3), np.uint8))
    sizes = []

    def encode(variables, images):
        sizes.append(len(images))
        return images.reshape(len(images), -1)

    options = {"batch_size": 4, "rows": np.arange(2), "place": jnp.asarray, "keep": False}
    assert extract_features(encode, None, source, **options).shape == (0, 192)
    assert sizes == [2, 2, 2]


def test_features_are_fetched_one_batch_late():
    """So that the host reads, and the next batch is dispatched, while the devices compute."""
    source, order = random_source(n=6), []

    class Computing:
        shape = (2, 192)

        def __init__(self, number):
            self.number = number

        def __array__(self, dtype=None, copy=None):
            order.append(f"fetch {self.number}")
            return np.zeros(self.shape, dtype)

    def encode(variables, images):
        number = sum(event.startswith("encode") for event in order)
        order.append(f"encode {number}")
        return Computing(number)

    extract_features(encode, None, source, batch_size=2, rows=np.arange(2), place=jnp.asarray)
    assert order == ["encode 0", "encode 1", "fetch 0", "encode 2", "fetch 1", "fetch 2"]


def test_time_spent_waiting_for_images_is_reported():
    source, found = random_source(n=6), []
    slow, quick = 0.05, source.eval_batches

    def eval_batches(ids):
        for images in quick(ids):
            time.sleep(slow)
            yield images

    source.eval_batches = eval_batches
    extract_features(
        lambda variables, images: images.reshape(len(images), -1),
        None,
        source,
        batch_size=2,
        rows=np.arange(2),
        place=jnp.asarray,
        timed=lambda *times: found.append(times),
    )
    [(seconds, waited)] = found
    assert 2 * slow < waited < seconds
