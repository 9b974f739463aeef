"""Fingerprints of images."""

import pytest

from ssl_jax.data.fingerprint import (
    describe_change,
    images_fingerprint,
    same_images,
    sampled_ids,
)

CHECKSUMS = [1000 + 7 * i for i in range(16)]


def fingerprint_of(changes=None, identity=b"names", count=100):
    checksums = dict(enumerate(CHECKSUMS)) | (changes or {})
    return images_fingerprint(count, identity, list(checksums.values()))


def test_repaired_images_are_the_same_and_other_contents_are_not():
    old = fingerprint_of()
    assert old.startswith("100 images, checksum ") and same_images(old, fingerprint_of())
    assert same_images(old, fingerprint_of({0: 5, 3: 5, 15: 5}))
    assert not same_images(old, fingerprint_of({i: CHECKSUMS[i] + 1 for i in range(5)}))
    assert not same_images(old, fingerprint_of(count=99))
    assert not same_images(old, fingerprint_of(identity=b"other names"))
    assert describe_change(old, "99 images, checksum 1") == "100 images -> 99 images"
    assert describe_change(old, "") == "100 images -> none"
    other = fingerprint_of({i: CHECKSUMS[i] + 1 for i in range(5)})
    assert describe_change(old, other) == "100 images, with other contents"
    renamed = fingerprint_of(identity=b"other names")
    assert describe_change(old, renamed).startswith(
        "100 images, with other names, labels or pixels"
    )
    part = "; subset of 3, checksum 1"
    assert same_images(old + part, fingerprint_of({0: 3}) + part)
    assert not same_images(old + part, old)


def test_contents_that_cannot_be_read_now_are_not_compared():
    unreadable = fingerprint_of(dict.fromkeys(range(10)))
    assert same_images(fingerprint_of(), unreadable) and same_images(unreadable, fingerprint_of())
    assert not same_images(unreadable, fingerprint_of({i: 5 for i in range(10, 16)}))


@pytest.mark.parametrize("count", [0, 1, 3, 16, 17, 33])
def test_few_images_are_sampled_whole_and_others_evenly_spread(count):
    ids = sampled_ids(count)
    assert len(set(ids)) == min(16, count) and {0, count - 1} <= {*ids} | {0, -1}
    assert ids == sorted(ids)
