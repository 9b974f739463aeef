import io
import struct

import numpy as np
import pytest
from PIL import Image

from ssl_jax.data.decode import decode, image_size

PIXELS = np.random.default_rng(0).integers(0, 256, (22, 18, 4), np.uint8)
MODES = {"TIFF": "1 L LA P RGB RGBA CMYK YCbCr", "WEBP": "RGB RGBA", "BMP": "1 L P RGB RGBA"}
MODES["GIF"] = "1 L P RGB"
WHITE_IS_0, BLACK_IS_0, RGB = 0, 1, 2  # TIFF's photometric interpretations


def saved(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def by_pillow(content):
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(image.convert("RGB"))


def tiff(values, bits, photometric, order="<", sample_format=1):
    """An uncompressed TIFF file of values [h, w, channels], of 12 or 16 bits."""
    high_first = values[..., None] >> np.arange(bits)[::-1] & 1
    bytes_ = np.packbits(high_first.reshape(-1).astype(np.uint8)).tobytes()
    data = values.astype(f"{order}u2").tobytes() if bits == 16 else bytes_
    height, width, channels = values.shape
    tags = {256: width, 257: height, 259: 1, 262: photometric, 273: 8, 277: channels, 278: height}
    tags |= {279: len(data), 339: sample_format}
    entries = [struct.pack(order + "HHII", tag, 4, 1, value) for tag, value in tags.items()]
    # The bits of each channel, after the pixels if there are several.
    where = 8 + len(data) if channels > 1 else bits << 16 * (order == ">")
    entries.insert(2, struct.pack(order + "HHII", 258, 3, channels, where))
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(
        order + "I", 8 + len(data) + 2 * channels
    )
    directory = struct.pack(order + "H", len(entries)) + b"".join(entries) + bytes(4)
    return head + data + struct.pack(order + "H", bits) * channels + directory


def test_pixels_of_all_formats_and_modes_are_pillows():
    image = Image.fromarray(PIXELS)
    files = {
        f"{kind} {mode}": saved(image.convert("RGB").convert(mode), kind)
        for kind, modes in MODES.items()
        for mode in modes.split()
    }
    for compression in ("tiff_lzw", "tiff_deflate", "packbits", "jpeg", "group4"):
        mode = "1" if compression == "group4" else "RGB"
        files[compression] = saved(image.convert(mode), "TIFF", compression=compression)
    files["turned"] = saved(image.convert("RGB"), "TIFF", tiffinfo={274: 6})
    files["lossless"] = saved(image, "WEBP", lossless=True)
    files["see-through"] = saved(image.convert("P"), "GIF", transparency=0)
    more = [Image.fromarray(255 - PIXELS[..., :3])]
    for kind in ("GIF", "WEBP", "TIFF"):
        files[f"{kind} frames"] = saved(
            image.convert("RGB"), kind, save_all=True, append_images=more
        )
    differing = [
        name for name, file in files.items() if not np.array_equal(decode(file), by_pillow(file))
    ]
    assert not differing
    assert decode(files["turned"]).shape == (18, 22, 3)
    assert all(image_size(file) == decode(file).shape[:2] for file in files.values())


@pytest.mark.parametrize("order", "<>")
def test_tiff_of_more_than_8_bits_keeps_the_upper_8(order):
    values = np.random.default_rng(0).integers(0, 2**16, (6, 8, 3))
    rgb = tiff(values, 16, RGB, order)
    np.testing.assert_array_equal(decode(rgb), values >> 8)
    gray = values[..., :1]
    expected = np.repeat(gray >> 8, 3, axis=-1)
    np.testing.assert_array_equal(decode(tiff(gray, 16, BLACK_IS_0, order)), expected)
    if order == "<":  # Pillow reads no others
        np.testing.assert_array_equal(decode(tiff(gray, 16, WHITE_IS_0)), 255 - expected)
        np.testing.assert_array_equal(decode(tiff(gray >> 4, 12, BLACK_IS_0)), expected)


def test_what_is_no_whole_image_raises_a_value_error():
    image, gray = Image.fromarray(PIXELS[..., :3]), PIXELS[..., 0]
    wrong = {kind: saved(image, kind) for kind in MODES}
    wrong["LZW"] = saved(image, "TIFF", compression="tiff_lzw")
    wrong = {kind: file[: len(file) // 2] for kind, file in wrong.items()}
    wrong["float"] = saved(Image.fromarray(gray.astype(np.float32)), "TIFF")
    wrong["int32"] = saved(Image.fromarray(gray.astype(np.int32)), "TIFF")
    wrong["signed"] = tiff(gray[..., None], 16, BLACK_IS_0, sample_format=2)
    wrong |= {"text": b"not an image", "empty": b"", "other format": saved(image, "PPM")}
    for file in wrong.values():
        with pytest.raises(ValueError, match="not an image"):
            decode(file)
    assert image_size(b"not an image") is None
    header = struct.pack("<2sHIH", b"II", 42, 8, 2)
    sides = struct.pack("<HHIIHHIII", 256, 4, 1, 8, 257, 4, 1, 2**32 - 1, 0)
    assert image_size(header + sides) is None
