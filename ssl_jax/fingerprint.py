"""Fingerprints of image files: strings by which a resumed run recognizes its data."""

import re
import zlib
from collections.abc import Callable, Sequence

_SAMPLED = 16
_SIZES = re.compile(r", file sizes ([0-9a-f]*)")


def files_fingerprint(
    count: int, identity: bytes, files: Sequence[str], size: Callable[[str], int]
) -> str:
    """Identifies images wherever their files lie, without reading them.

    Sizes are looked up of a few files only, evenly spread, as each look-up on a network file system
    takes a while and ImageNet has more than a million files.

    Args:
      count: number of images.
      identity: what must be the same: names, and labels that don't follow from them.
      files: paths of the files that hold the images.
      size: returns the size of a file in bytes; an `OSError` counts as 0.

    Returns:
      The number of images, the checksum of `identity`, and two digits for each size.
    """
    last, number = len(files) - 1, min(_SAMPLED, len(files))
    sampled = [files[i * last // max(1, number - 1)] for i in range(number)]
    sizes = "".join(f"{_checksum_of_size(file, size):02x}" for file in sampled)
    return f"{count} images, checksum {zlib.crc32(identity):08x}, file sizes {sizes}"


def _checksum_of_size(file: str, size: Callable[[str], int]) -> int:
    try:
        return zlib.crc32(str(size(file)).encode()) & 255
    except OSError:  # reported when the file is read
        return 0


def same_images(old: str, new: str) -> bool:
    """Whether two fingerprints are of the same images.

    Up to a quarter of the sizes may differ, or a run could not resume after a broken file has been
    repaired.

    Args:
      old: fingerprint of any source of images.
      new: another one.
    """
    if _SIZES.sub("", old) != _SIZES.sub("", new):
        return False
    for before, after in zip(_SIZES.findall(old), _SIZES.findall(new), strict=False):
        pairs = [(before[i : i + 2], after[i : i + 2]) for i in range(0, len(before), 2)]
        if len(before) != len(after) or sum(a != b for a, b in pairs) > len(pairs) // 4:
            return False
    return True


def describe_change(old: str, new: str) -> str:
    """Describes how two different fingerprints differ, for a message."""
    before, now = (text.partition(",")[0] or "none" for text in (old, new))
    if before != now:
        return f"{before} -> {now}"
    if _SIZES.sub("", old) == _SIZES.sub("", new):
        return f"{now}, files of other sizes"
    return f"{now}, with other names, labels or contents, or in another order"
