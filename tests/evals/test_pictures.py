import numpy as np

from ssl_jax.evals.pictures import contact_sheet, thumbnails, view_grid


def numbered(n, height=8, width=8):
    """Image i is of the one brightness i + 1."""
    images = np.arange(1, n + 1, dtype=np.uint8)[:, None, None, None]
    return np.broadcast_to(images, (n, height, width, 3)).copy()


def test_small_squares_are_as_they_were():
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3)).astype(np.uint8)
    np.testing.assert_array_equal(thumbnails(images, 32), images)


def test_large_and_long_images_are_cut_in_the_middle_and_made_smaller():
    images = numbered(2, 40, 100)
    images[:, :, :30] = images[:, :, 70:] = 200  # what a square of the middle leaves out
    found = thumbnails(images, 32)
    assert found.shape == (2, 32, 32, 3)
    inside = found[:, :, 2:-2]  # the filter's width from what was cut
    assert np.unique(inside[0]).tolist() == [1] and np.unique(inside[1]).tolist() == [2]


def test_a_sheet_has_each_image_in_its_place():
    sheet = contact_sheet(numbered(5, 4, 4))
    assert sheet.shape == (12, 12, 3)
    assert sheet[::4, ::4, 0].tolist() == [[1, 2, 3], [4, 5, 0], [0, 0, 0]]
    assert contact_sheet(numbered(4)).shape == (16, 16, 3)
    assert contact_sheet(numbered(1)).shape == (8, 8, 3)


def test_a_grid_has_a_row_for_each_image_its_original_first():
    views = np.stack([10 + numbered(2), 20 + numbered(2)], axis=1)
    grid = view_grid(numbered(2, 16, 16), views)
    side, gap = 64, 2  # enlarged by 8
    assert grid.shape == (2 * side + gap, 3 * side + 2 * gap, 3)
    assert grid[:: side + gap, :: side + gap, 0].tolist() == [[1, 11, 21], [2, 12, 22]]
    assert (grid[side : side + gap] == 255).all()


def test_large_views_are_not_enlarged():
    assert view_grid(numbered(1, 224, 224), numbered(2, 100, 100)[None]).shape == (100, 304, 3)
