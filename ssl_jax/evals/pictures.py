"""Small pictures of a run's images: thumbnails, sheets of them, and a grid of views."""

import math

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

_SEEN = 64  # pixels to which the small images of a grid are enlarged, about
_GAP = 2


def thumbnails(images: UInt8[np.ndarray, "n h w 3"], side: int) -> UInt8[np.ndarray, "n s s 3"]:
    """Squares cut from the middle of images, made smaller where they are larger than `side`.

    Args:
      images: of one size.
      side: of a thumbnail, at most, in pixels.

    Returns:
      The thumbnails; squares that are small enough are as they were.
    """
    height, width = images.shape[1:3]
    side = min(side, height, width)
    if height == width == side:
        return images
    small = [ImageOps.fit(Image.fromarray(image), (side, side)) for image in images]
    return np.stack([np.asarray(picture) for picture in small])


def contact_sheet(
    images: UInt8[np.ndarray, "n s s 3"],
) -> UInt8[np.ndarray, "side side 3"]:
    """One square picture of many, row by row; what is left of it is black.

    Args:
      images: squares, at least one.

    Returns:
      As many columns as rows: the root of n, rounded up.
    """
    columns = math.isqrt(len(images) - 1) + 1
    size = images.shape[1]
    tiles = np.zeros((columns * columns, size, size, 3), np.uint8)
    tiles[: len(images)] = images
    rows = tiles.reshape(columns, columns, size, size, 3).transpose(0, 2, 1, 3, 4)
    return np.ascontiguousarray(rows.reshape(columns * size, columns * size, 3))


def view_grid(
    originals: UInt8[np.ndarray, "n H W 3"], views: UInt8[np.ndarray, "n v h w 3"]
) -> UInt8[np.ndarray, "rows columns 3"]:
    """One picture: a row for each image, the original first, then its views.

    Args:
      originals: the images.
      views: of each, at the size at which they are drawn.

    Returns:
      The picture; images smaller than 64 pixels are enlarged by a whole factor.
    """
    height, width = views.shape[2:4]
    factor = max(1, math.floor(_SEEN / max(height, width)))
    fitted = [ImageOps.pad(Image.fromarray(image), (width, height)) for image in originals]
    first = np.stack([np.asarray(picture) for picture in fitted])[:, None]
    tiles = np.concatenate([first, views], axis=1).repeat(factor, axis=2).repeat(factor, axis=3)
    # A white gap after each tile, and none after the last of a row or column.
    tiles = np.pad(
        tiles, ((0, 0), (0, 0), (0, _GAP), (0, _GAP), (0, 0)), constant_values=np.uint8(255)
    )
    n, columns, tall, wide, _ = tiles.shape
    grid = tiles.transpose(0, 2, 1, 3, 4).reshape(n * tall, columns * wide, 3)
    return np.ascontiguousarray(grid[:-_GAP, :-_GAP])
