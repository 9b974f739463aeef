"""Fingerprints of image files."""

import pytest

from ssl_jax.fingerprint import describe_change, files_fingerprint, same_images

SIZES = {str(i): 1000 + 7 * i for i in range(100)}


def fingerprint_of(sizes=SIZES, identity=b"names"):
    def size(file):
        if sizes[file] is None:
            raise FileNotFoundError
        return sizes[file]

    return files_fingerprint(len(sizes), identity, list(sizes), size)


def test_repaired_files_are_the_same_images_and_files_of_other_sizes_are_not():
    old = fingerprint_of()
    assert old.startswith("100 images, checksum ") and same_images(old, fingerprint_of())
    assert same_images(old, fingerprint_of(SIZES | {"0": None, "99": 5}))
    assert not same_images(old, fingerprint_of({file: 2 * SIZES[file] for file in SIZES}))
    assert not same_images(old, fingerprint_of({file: SIZES[file] for file in list(SIZES)[:99]}))
    assert not same_images(old, fingerprint_of(identity=b"other names"))
    assert describe_change(old, "99 images, checksum 1") == "100 images -> 99 images"
    assert describe_change(old, "") == "100 images -> none"
    larger = fingerprint_of({file: 2 * SIZES[file] for file in SIZES})
    assert describe_change(old, larger) == "100 images, files of other sizes"
    renamed = fingerprint_of(identity=b"other names")
    assert describe_change(old, renamed).startswith("100 images, with other names, labels or")
    part = "; subset of 3, checksum 1"
    assert same_images(old + part, fingerprint_of(SIZES | {"0": 3}) + part)
    assert not same_images(old + part, old)


@pytest.mark.parametrize("count", [1, 3, 16, 17, 33])
def test_few_files_have_all_or_evenly_spread_sizes(count):
    seen = []
    files_fingerprint(count, b"", [str(i) for i in range(count)], lambda f: seen.append(f) or 1)
    assert len(set(seen)) == min(16, count) and {"0", str(count - 1)} <= set(seen)
