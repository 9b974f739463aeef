"""Values of images on the host: scaled to floats as the device does, or shown as 8-bit RGB."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Shaped, UInt8

DTYPES = (np.uint8, np.uint16)  # of images that are not files, in any byte order
MAX_CHANNELS = 16


def is_float(bits: int, limits: Sequence[float]) -> bool:
    """Whether images are cropped and resized as floats, not rounded to 8 bits.

    Args:
      bits: per value, `config.data.bits`.
      limits: `config.data.range`.
    """
    return bits > 8 or len(limits) > 0


def largest_value(bits: int) -> int:
    """The integer that becomes 1 without `config.data.range`, see `config.data.bits`."""
    return 65535 if bits > 8 else 255


def to_unit(
    images: Shaped[np.ndarray, "*n h w c"], limits: Sequence[float] = ()
) -> Float[np.ndarray, "*n h w c"]:
    """`augment.to_float` in NumPy: integers become float32 in [0, 1].

    Args:
      images: uint8 or uint16; or floats in [0, 1], which stay as they are.
      limits: `config.data.range`.
    """
    if images.dtype.kind == "f":
        return images.astype(np.float32, copy=False)
    x = images.astype(np.float32)
    if not limits:
        return x / np.float32(np.iinfo(images.dtype).max)
    low, high = (np.float32(limit) for limit in limits)
    return np.clip((x - low) / (high - low), 0, 1, dtype=np.float32)


def rgb(
    images: Shaped[np.ndarray, "*n h w c"], limits: Sequence[float] = ()
) -> UInt8[np.ndarray, "*n h w 3"]:
    """Images as people see them.

    Args:
      images: of any number of channels, in uint8, uint16, or floats in [0, 1].
      limits: `config.data.range`.

    Returns:
      8-bit RGB: of one channel in gray, of two with blue 0, of more the first three.
    """
    if images.dtype != np.uint8 or limits:
        images = np.clip(np.round(255 * to_unit(images, limits)), 0, 255).astype(np.uint8)
    channels = images.shape[-1]
    if channels == 1:
        return np.repeat(images, 3, axis=-1)
    if channels == 2:
        return np.concatenate([images, np.zeros_like(images[..., :1])], axis=-1)
    return images[..., :3]
