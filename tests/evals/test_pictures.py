import numpy as np

from ssl_jax.evals.pictures import choose_images, thumbnails, view_grid


def numbered(n, height=8, width=8):
    """Image i has the uniform brightness i + 1."""
    images = np.arange(1, n + 1, dtype=np.uint8)[:, None, None, None]
    return np.broadcast_to(images, (n, height, width, 3)).copy()


def test_thumbnails_of_small_squares_are_unchanged():
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3)).astype(np.uint8)
    np.testing.assert_array_equal(thumbnails(images, 32), images)


def test_thumbnails_of_large_images_are_cropped_to_the_center_and_shrunk():
    images = numbered(2, 40, 100)
    images[:, :, :30] = images[:, :, 70:] = 200  # outside the central square
    found = thumbnails(images, 32)
    assert found.shape == (2, 32, 32, 3)
    inside = found[:, :, 2:-2]  # away from the crop by the filter's width
    assert np.unique(inside[0]).tolist() == [1] and np.unique(inside[1]).tolist() == [2]


def test_view_grid_has_a_row_per_image_with_the_original_first():
    views = np.stack([10 + numbered(2), 20 + numbered(2)], axis=1)
    grid = view_grid(numbered(2, 16, 16), views)
    side, gap = 64, 2  # enlarged by 8
    assert grid.shape == (2 * side + gap, 3 * side + 2 * gap, 3)
    assert grid[:: side + gap, :: side + gap, 0].tolist() == [[1, 11, 21], [2, 12, 22]]
    assert (grid[side : side + gap] == 255).all()


def test_view_grid_does_not_enlarge_large_views():
    assert view_grid(numbered(1, 224, 224), numbered(2, 100, 100)[None]).shape == (100, 304, 3)


def test_choose_images_keeps_all_of_few_images():
    labels = np.arange(60) % 3
    np.testing.assert_array_equal(choose_images(labels, 60), np.arange(60))
    np.testing.assert_array_equal(choose_images(None, 60), np.arange(60))


def test_choose_images_samples_many_images_uniformly_and_deterministically():
    chosen = choose_images(None, 5000)
    assert len(set(chosen.tolist())) == 1000 and (np.diff(chosen) > 0).all()
    assert chosen[-1] < 5000 and abs(chosen.mean() - 2500) < 150
    np.testing.assert_array_equal(chosen, choose_images(None, 5000))


def test_choose_images_keeps_all_images_of_some_of_many_classes():
    labels = np.random.default_rng(0).integers(0, 200, 2000)
    chosen = choose_images(labels, 2000)
    shown = set(labels[chosen].tolist())
    assert len(shown) == 20 and {0, 199} <= shown
    assert len(chosen) == np.isin(labels, list(shown)).sum()
