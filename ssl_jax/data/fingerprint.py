"""Fingerprints of images: strings by which a resumed run recognizes its data."""

import re
import zlib
from collections.abc import Sequence

_SAMPLED = 16
_UNREADABLE = ".."
_CONTENTS = re.compile(r", contents ([0-9a-f.]*)")


def sampled_ids(count: int) -> list[int]:
    """The ids of the images whose contents a fingerprint has: up to 16, evenly spread."""
    last, number = count - 1, min(_SAMPLED, count)
    return [i * last // max(1, number - 1) for i in range(number)]


def images_fingerprint(count: int, identity: bytes, checksums: Sequence[int | None]) -> str:
    """Identifies images wherever and in however many files they lie.

    Contents are of a few images only, as ImageNet has more than a million files.

    Args:
      count: number of images.
      identity: what must be the same: names, and labels that don't follow from them.
      checksums: of the contents of the images `sampled_ids`; None for one that can't be read now.

    Returns:
      The number of images, the checksum of `identity`, and two digits for each sampled image.
    """
    contents = [_UNREADABLE if each is None else f"{each & 255:02x}" for each in checksums]
    return f"{count} images, checksum {zlib.crc32(identity):08x}, contents {''.join(contents)}"


def same_images(old: str, new: str) -> bool:
    """Whether two fingerprints are of the same images.

    Number, names and labels must be the same. Up to a quarter of the sampled contents may differ,
    or a run could not resume after a few broken images have been repaired; those that can't be read
    now are not compared, as reading them for a batch gives a better error.

    Args:
      old: fingerprint of any source of images.
      new: another one.
    """
    if _CONTENTS.sub("", old) != _CONTENTS.sub("", new):
        return False
    for before, after in zip(_CONTENTS.findall(old), _CONTENTS.findall(new), strict=False):
        pairs = [(before[i : i + 2], after[i : i + 2]) for i in range(0, len(before), 2)]
        differing = [pair for pair in pairs if pair[0] != pair[1] and _UNREADABLE not in pair]
        if len(before) != len(after) or len(differing) > len(pairs) // 4:
            return False
    return True


def describe_change(old: str, new: str) -> str:
    """Describes how two different fingerprints differ, for a message."""
    before, now = (text.partition(",")[0] or "none" for text in (old, new))
    if before != now:
        return f"{before} -> {now}"
    if _CONTENTS.sub("", old) == _CONTENTS.sub("", new):
        return f"{now}, with other contents"
    return f"{now}, with other names, labels or pixels, or in another order"
