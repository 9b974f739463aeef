import numpy as np
import pytest
from ssl_jax.evals.embedding_map import choose_images, tsne


def test_all_images_are_shown_where_they_are_few():
    labels = np.arange(60) % 3
    np.testing.assert_array_equal(choose_images(labels, 60), np.arange(60))
    np.testing.assert_array_equal(choose_images(None, 60), np.arange(60))


def test_of_many_images_the_same_ones_are_drawn_from_everywhere():
    chosen = choose_images(None, 5000)
    assert len(set(chosen.tolist())) == 1000 and (np.diff(chosen) > 0).all()
    assert chosen[-1] < 5000 and abs(chosen.mean() - 2500) < 150
    np.testing.assert_array_equal(chosen, choose_images(None, 5000))


def test_of_many_classes_some_are_shown_with_all_their_images():
    labels = np.random.default_rng(0).integers(0, 200, 2000)
    chosen = choose_images(labels, 2000)
    shown = set(labels[chosen].tolist())
    assert len(shown) == 20 and {0, 199} <= shown
    assert len(chosen) == np.isin(labels, list(shown)).sum()


def groups(n=90, d=12, seed=0):
    """Directions around one of three, of random lengths."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 3
    x = 5 * np.eye(d)[labels] + 0.3 * rng.normal(size=(n, d))
    return np.float32(x * rng.uniform(0.5, 5, (n, 1))), labels


def test_groups_stay_together_whatever_the_length_of_their_features():
    x, labels = groups()
    placed = tsne(x)
    assert placed.shape == (90, 2) and placed.dtype == np.float32
    distance = np.linalg.norm(placed[:, None] - placed, axis=-1) + 1e9 * np.eye(90)
    assert (labels[distance.argmin(axis=1)] == labels).all()
    np.testing.assert_array_equal(placed, tsne(x))


def test_features_that_are_not_finite_are_not_placed():
    x, _ = groups()
    x[5, 3] = np.inf
    placed = tsne(x)
    assert placed.shape == (90, 2) and np.isnan(placed).all()


@pytest.mark.parametrize(
    "features",
    [
        np.ones((50, 8)),  # collapsed
        np.zeros((50, 8)),
        np.repeat(np.eye(2), 25, axis=0),  # one direction is left
        np.random.default_rng(0).normal(size=(5, 8)),  # too few for neighbourhoods
        np.random.default_rng(0).normal(size=(1, 8)),
        np.random.default_rng(0).normal(size=(30, 1)),
    ],
    ids=["same", "zero", "two points", "few", "one", "one wide"],
)
def test_features_without_two_directions_are_placed_all_the_same(features):
    placed = tsne(features.astype(np.float32))
    assert placed.shape == (len(features), 2) and np.isfinite(placed).all()
