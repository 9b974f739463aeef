"""Decodes image files with Pillow; needs no TensorFlow.

`views.decode` reads 8-bit JPEG and PNG with TensorFlow, to the same pixels, and the other formats
here. What Pillow can't read is left to tifffile and imagecodecs, the extra `tiff`.
"""

import io
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Shaped, UInt8
from PIL import Image, TiffImagePlugin

from ssl_jax.errors import UserError, importing

_FORMATS = ("JPEG", "PNG", "TIFF", "WEBP", "BMP", "GIF")
# TIFF tags.
_WIDTH, _HEIGHT, _BITS, _PHOTOMETRIC, _SAMPLES, _EXTRA_SAMPLES = 256, 257, 258, 262, 277, 338
_WHITE_IS_ZERO, _PALETTE = 0, 3
_GRAYS = (_WHITE_IS_ZERO, 1)
_ALPHA = (1, 2)  # values of the tag of extra samples
_PNG, _PNG_GRAY = b"\x89PNG", 0
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


class ChannelsError(ValueError):
    """An image whose number of channels is not that of the config.

    Attributes:
      found: the image's number.
    """

    def __init__(self, found: int) -> None:
        super().__init__(f"{found} channels")
        self.found = found


def decode(
    contents: bytes,
    channels: int = 3,
    bits: int = 8,
    read_png: Callable[[bytes], np.ndarray] | None = None,
) -> Shaped[np.ndarray, "height width channels"]:
    """Decodes an image file: the first frame of a GIF or WebP, the first page of a TIFF.

    With three channels, grayscale becomes three equal channels. With one and three, alpha is
    dropped; with others it is a channel like any other, and the pages of a TIFF in grayscale are
    its channels. Palettes and CMYK become RGB, but not in a TIFF that isn't read with three
    channels of 8 bits. Pillow applies the orientation of a TIFF; that of JPEG and PNG is ignored,
    as in the official codebases.

    Args:
      contents: of the file.
      channels: C, the number of channels to return.
      bits: 8, which keeps the upper 8 bits of values of 16, or of 12 in a TIFF; or 16, which
        returns the values of every file as stored.
      read_png: reads PNGs of 16 bits in color, of which Pillow would keep 8; None: imagecodecs.

    Returns:
      uint8; with 16 bits, uint16 if the file has more than 8.

    Raises:
      ChannelsError: the image has another number of channels.
      ValueError: not a complete image of one of the formats, or a TIFF whose values have no known
        range: signed ones, and floats and integers of 32 bits.
      UserError: a package that the format takes is not installed.
    """
    try:
        if (channels, bits) == (3, 8) and not _is_stack(_tiff_tags(contents)):
            return _rgb_file(contents)
        stored, alpha = _stored(contents, channels, read_png or _png_by_imagecodecs)
    except UserError:
        raise
    except Exception as error:  # Pillow's decoders raise many types
        _require_channels_of_tiff(contents, channels)
        raise ValueError(f"not an image ({error})") from error
    values = stored[..., :-1] if alpha and channels in (1, 3) else stored
    if values.shape[-1] == 1 and channels == 3:
        values = np.repeat(values, 3, axis=-1)
    if values.shape[-1] != channels:
        raise ChannelsError(values.shape[-1])
    if bits == 8 and values.dtype != np.uint8:
        values = (values >> image_bits(contents) - 8).astype(np.uint8)
    return np.ascontiguousarray(values)


def image_size(contents: bytes) -> tuple[int, int] | None:
    """Height and width of an image file, from its header; None if it isn't one."""
    try:
        with Image.open(io.BytesIO(contents), formats=_FORMATS) as image:
            return image.height, image.width
    except Exception:  # as in `decode`
        tags = _tiff_tags(contents)
        height, width = tags.get(_HEIGHT), tags.get(_WIDTH)
        if not (isinstance(height, int) and isinstance(width, int)):
            return None
        return (height, width) if 0 < min(height, width) <= max(height, width) < 2**31 else None


def image_bits(contents: bytes) -> int:
    """Bits per value of an image file, from its header; 8 if that is unknown."""
    if contents.startswith(_PNG) and len(contents) > 25:
        return max(8, contents[24])
    bits = _tiff_tags(contents).get(_BITS, 8)
    return max(8, *bits) if isinstance(bits, tuple) else max(8, int(bits))


def _tiff_tags(contents: bytes) -> dict[int, Any]:
    """The tags of a TIFF's first page, also of one that Pillow can't decode; {} for other files."""
    if contents[:4] not in _TIFF:
        return {}
    file = io.BytesIO(contents)
    header = file.read(16 if 43 in contents[2:4] else 8)
    try:
        tags = TiffImagePlugin.ImageFileDirectory_v2(header)
        file.seek(tags.next)
        tags.load(file)
        return dict(tags)
    except Exception:  # damaged tags raise many types
        return {}


def _is_stack(tags: dict[int, Any]) -> bool:
    """Whether a TIFF has several samples that are no colors and alpha, as Pillow can't decode."""
    samples = tags.get(_SAMPLES, 1)
    return tags.get(_PHOTOMETRIC) in _GRAYS and isinstance(samples, int) and samples > 2


def _require_channels_of_tiff(contents: bytes, channels: int) -> None:
    """Raises a ChannelsError for a TIFF that can't be decoded because of its channels."""
    samples = _tiff_tags(contents).get(_SAMPLES, channels)
    # With three, Pillow converts those of up to four.
    if isinstance(samples, int) and samples != channels and (channels != 3 or samples > 4):
        raise ChannelsError(samples)


def _stored(
    contents: bytes, channels: int, read_png: Callable[[bytes], np.ndarray]
) -> tuple[Shaped[np.ndarray, "h w c"], bool]:
    """The values as stored, uint8 or uint16, and whether the last channel is alpha."""
    if contents[:4] in _TIFF:
        return _stored_tiff(contents, channels)
    if contents.startswith(_PNG) and contents[24] == 16 and contents[25] != _PNG_GRAY:
        values = read_png(contents)
        return values, values.shape[-1] in (2, 4)
    with Image.open(io.BytesIO(contents), formats=_FORMATS) as image:
        if image.mode.startswith("I"):
            return np.asarray(image).astype(np.uint16)[..., None], False
        if image.mode in ("1", "L"):
            return np.asarray(image.convert("L"))[..., None], False
        if image.mode in ("LA", "RGBA"):
            return np.asarray(image), True
        return _rgb(image), False


def _stored_tiff(contents: bytes, channels: int) -> tuple[Shaped[np.ndarray, "h w c"], bool]:
    """`_stored` of a TIFF: by Pillow if it keeps all values, else by tifffile."""
    tags = _tiff_tags(contents)
    samples = tags.get(_SAMPLES, 1)
    extra = tags.get(_EXTRA_SAMPLES, ())
    alpha = isinstance(extra, tuple) and extra[-1:] in [(kind,) for kind in _ALPHA]
    is_rgb = samples == 3 and not _is_stack(tags) and image_bits(contents) == 8
    if is_rgb or samples == 1 and channels in (1, 3):
        with Image.open(io.BytesIO(contents), formats=("TIFF",)) as image:
            assert isinstance(image, TiffImagePlugin.TiffImageFile)
            if not image.mode.startswith("I"):
                gray = image.mode in ("1", "L")
                values = np.asarray(image.convert("L" if gray else "RGB"))
                return (values[..., None] if gray else values), False
            return _gray_tiff(image)[..., None], False
    return _by_tifffile(contents), alpha


def _png_by_imagecodecs(contents: bytes) -> Shaped[np.ndarray, "h w c"]:
    with importing("imagecodecs", "tiff", "reads PNGs of 16 bits in color"):
        import imagecodecs
    return np.asarray(imagecodecs.png_decode(contents))


def _by_tifffile(contents: bytes) -> Shaped[np.ndarray, "h w c"]:
    """The samples of a TIFF's first page, or its pages if they have one each."""
    with importing("tifffile", "tiff", "reads TIFFs of other channels and depths than Pillow"):
        import tifffile
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # errors are raised, too
    with tifffile.TiffFile(io.BytesIO(contents)) as file:
        page = file.pages.first
        if page.photometric == _PALETTE:
            raise ValueError("a palette of colors")
        part = page if page.samplesperpixel > 1 else file.series[0]
        values, axes = part.asarray(), part.axes
    if values.dtype.kind != "u" or values.dtype.itemsize > 2:
        raise ValueError("signed or 32-bit values")
    if values.ndim == 2:
        values, axes = values[..., None], f"{axes}S"
    if values.ndim != 3 or not {"Y", "X"} <= set(axes):
        raise ValueError(f"axes {axes}")
    channel = next(i for i, axis in enumerate(axes) if axis not in "YX")
    return np.moveaxis(values, channel, -1).astype(values.dtype.newbyteorder("="))


def _rgb_file(contents: bytes) -> UInt8[np.ndarray, "height width 3"]:
    with Image.open(io.BytesIO(contents), formats=_FORMATS) as image:
        if not isinstance(image, TiffImagePlugin.TiffImageFile):
            return _rgb(image)
        if not image.mode.startswith("I") and image.mode != "F":
            return np.asarray(image.convert("RGB"))
        gray = _gray_tiff(image) >> image.tag_v2[_BITS][0] - 8
        return np.repeat(gray.astype(np.uint8)[..., None], 3, axis=-1)


def _gray_tiff(image: TiffImagePlugin.TiffImageFile) -> Shaped[np.ndarray, "height width"]:
    """The values of a TIFF of more than 8 bits, uint16, 0 for black."""
    if image.mode in ("I", "F"):
        raise ValueError("signed or 32-bit values")
    # Pillow's own conversion clips them at 255, and doesn't invert those where white is 0.
    gray = np.asarray(image).astype(np.uint16)
    if image.tag_v2[_PHOTOMETRIC] == _WHITE_IS_ZERO:
        gray = (1 << image.tag_v2[_BITS][0]) - 1 - gray
    return gray.astype(np.uint16)


def _rgb(image: Image.Image) -> UInt8[np.ndarray, "height width 3"]:
    """Converts to uint8 [height, width, 3]; of JPEG and PNG, to the pixels of TensorFlow's ops.

    Pillow's own conversion clips 16-bit grayscale at 255, and rounds where TensorFlow truncates.
    """
    if image.mode.startswith("I"):  # 16-bit grayscale: its upper 8 bits
        gray = (np.asarray(image).astype(np.int32) >> 8).astype(np.uint8)
        return np.repeat(gray[..., None], 3, axis=-1)
    if image.mode == "CMYK":
        # Pillow inverts all values, which only files with Adobe's marker store inverted.
        ink = np.asarray(image).astype(np.int32)
        light = 255 - ink if "adobe" in image.info else ink
        return (light[..., :3] * light[..., 3:] // 255).astype(np.uint8)
    image.load()
    image.info.pop("transparency", None)  # dropped, like an alpha channel; Pillow would warn
    return np.asarray(image.convert("RGB"))
