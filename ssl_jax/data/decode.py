"""Decodes image files with Pillow; needs no TensorFlow.

`views.decode` reads JPEG and PNG with TensorFlow, to the same pixels, and the other formats here.
"""

import io

import numpy as np
from jaxtyping import UInt8
from PIL import Image, TiffImagePlugin

_FORMATS = ("JPEG", "PNG", "TIFF", "WEBP", "BMP", "GIF")
# TIFF tags.
_BITS, _PHOTOMETRIC = 258, 262
_WHITE_IS_ZERO = 0


def decode(contents: bytes) -> UInt8[np.ndarray, "height width 3"]:
    """Decodes an image file to RGB: the first frame of a GIF or WebP, the first page of a TIFF.

    Grayscale becomes three equal channels; palettes and CMYK are converted; alpha is dropped;
    values of 16 bits, or of 12 in a TIFF, keep the upper 8. Pillow applies the orientation of a
    TIFF; that of JPEG and PNG is ignored, as in the official codebases.

    Raises:
      ValueError: not a complete image of one of the formats, or a TIFF whose values have no known
        range: signed ones, and floats and integers of 32 bits.
    """
    try:
        with Image.open(io.BytesIO(contents), formats=_FORMATS) as image:
            if isinstance(image, TiffImagePlugin.TiffImageFile):
                return _from_tiff(image)
            return _rgb(image)
    except Exception as error:  # Pillow's decoders raise many types
        raise ValueError(f"not an image ({error})") from error


def image_size(contents: bytes) -> tuple[int, int] | None:
    """Height and width of an image file, from its header; None if it isn't one."""
    try:
        with Image.open(io.BytesIO(contents), formats=_FORMATS) as image:
            return image.height, image.width
    except Exception:  # as in `decode`
        return None


def _from_tiff(image: TiffImagePlugin.TiffImageFile) -> np.ndarray:
    if image.mode in ("I", "F"):
        raise ValueError("signed or 32-bit values")
    if not image.mode.startswith("I"):
        return np.asarray(image.convert("RGB"))
    # Pillow's own conversion clips them at 255, and doesn't invert those where white is 0.
    gray = np.asarray(image).astype(np.int32) >> image.tag_v2[_BITS][0] - 8
    if image.tag_v2[_PHOTOMETRIC] == _WHITE_IS_ZERO:
        gray = 255 - gray
    return np.repeat(gray.astype(np.uint8)[..., None], 3, axis=-1)


def _rgb(image: Image.Image) -> np.ndarray:
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
