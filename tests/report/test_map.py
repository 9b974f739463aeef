import numpy as np
import pytest

from ssl_jax.report.images import contact_sheet
from ssl_jax.report.map import tsne


def groups(n=90, d=12, seed=0):
    """Directions around one of three, with random lengths."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 3
    x = 5 * np.eye(d)[labels] + 0.3 * rng.normal(size=(n, d))
    return np.float32(x * rng.uniform(0.5, 5, (n, 1))), labels


def test_tsne_keeps_groups_together_and_ignores_the_features_length():
    x, labels = groups()
    placed = tsne(x)
    assert placed.shape == (90, 2) and placed.dtype == np.float32
    distance = np.linalg.norm(placed[:, None] - placed, axis=-1) + 1e9 * np.eye(90)
    assert (labels[distance.argmin(axis=1)] == labels).all()
    np.testing.assert_array_equal(placed, tsne(x))


def test_tsne_of_features_that_are_not_finite_is_nan():
    x, _ = groups()
    x[5, 3] = np.inf
    placed = tsne(x)
    assert placed.shape == (90, 2) and np.isnan(placed).all()


@pytest.mark.parametrize(
    "features",
    [
        np.ones((50, 8)),  # collapsed
        np.zeros((50, 8)),
        np.repeat(np.eye(2), 25, axis=0),  # a single direction
        np.random.default_rng(0).normal(size=(5, 8)),  # too few for neighborhoods
        np.random.default_rng(0).normal(size=(1, 8)),
        np.random.default_rng(0).normal(size=(30, 1)),
    ],
    ids=["same", "zero", "two points", "few", "one", "one dimension"],
)
def test_tsne_of_degenerate_features_is_finite(features):
    placed = tsne(features.astype(np.float32))
    assert placed.shape == (len(features), 2) and np.isfinite(placed).all()


def numbered(n, side):
    """Image i has the uniform brightness i + 1."""
    images = np.arange(1, n + 1, dtype=np.uint8)[:, None, None, None]
    return np.broadcast_to(images, (n, side, side, 3)).copy()


def test_contact_sheet_has_images_row_by_row():
    sheet = contact_sheet(numbered(5, 4))
    assert sheet.shape == (12, 12, 3)
    assert sheet[::4, ::4, 0].tolist() == [[1, 2, 3], [4, 5, 0], [0, 0, 0]]
    assert contact_sheet(numbered(4, 8)).shape == (16, 16, 3)
    assert contact_sheet(numbered(1, 8)).shape == (8, 8, 3)
