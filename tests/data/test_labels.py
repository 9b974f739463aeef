"""The check of labels and class names that come from outside."""

import types

import numpy as np
import pytest

from ssl_jax.data.arrays import ArraySource
from ssl_jax.data.labels import (
    checked_labels,
    checked_targets,
    common_targets,
    is_multi_label,
    listed,
    of_lists,
    require_same_classes,
)
from ssl_jax.data.sources import Subset, require_targets, why_not_scored
from ssl_jax.errors import UserError

NAMES = np.array(["a", "b", "c", "d"])


@pytest.mark.parametrize("dtype", [np.int8, np.int64, np.uint8, np.uint64])
def test_labels_become_int32_and_keep_their_names(dtype):
    labels, names = checked_labels(np.array([3, 0, 1], dtype), NAMES, 3, "file")
    assert labels.dtype == np.int32 and labels.tolist() == [3, 0, 1]
    assert names == ("a", "b", "c", "d")


def test_images_without_a_label_keep_minus_one_and_only_those_are_no_labels():
    labels, names = checked_labels([-1, 2, -1], NAMES, 3, "file")
    assert labels.tolist() == [-1, 2, -1] and len(names) == 4
    assert checked_labels([-1, -1], NAMES, 2, "file") == (None, ())


def test_unnamed_classes_are_named_by_number():
    assert checked_labels([2, 0], (), 2, "file")[1] == ("0", "1", "2")


def test_class_names_that_are_not_utf8_or_not_printable_are_escaped():
    _, names = checked_labels([0, 1], ["caf\udce9", "café"], 2, "file")
    assert names == ("caf\\udce9", "café") and all(name.encode() for name in names)
    assert checked_labels([0], np.array([b"caf\xe9"]), 1, "file")[1] == ("caf\\udce9",)
    assert checked_labels([0], ["a\n\x1b[31mb"], 1, "file")[1] == ("a\\n\\x1b[31mb",)
    # Bidirectional overrides and separators of lines are no text; joiners and spaces are.
    assert checked_labels([0], ["a\u202e\u2028"], 1, "file")[1] == ("a\\u202e\\u2028",)
    spelled = ("می\u200cخواهم", "क्\u200dष", "👩\u200d🚀", "a\u00a0b", "全\u3000角")
    assert checked_labels([0], spelled, 1, "file")[1] == spelled


@pytest.mark.parametrize(
    ("labels", "names", "words"),
    [
        ([1, 2, 3, 4], NAMES, r"file has the label 4 \(image 3\) but 4 class names. .* 0 to 3;"),
        ([0, -2, 0, 0], NAMES, r"file has the label -2 \(image 1\)"),
        ([0, 0, 2**40, 0], (), "file has the label 1099511627776 .*. Number the classes from 0"),
        (np.uint64([0, 0, 0, 2**64 - 1]), NAMES, "the label 18446744073709551615"),
        ([0.0, 1.0, 2.0, 3.0], NAMES, "file has labels of dtype float64. Give integers"),
        (["a", "b", "a", "b"], NAMES, "labels of dtype <U1"),
        (np.arange(4).astype("timedelta64[s]"), NAMES, "labels of dtype timedelta64.s.. Give"),
        ([0, 1], NAMES, r"file has 4 images but labels of shape \[2\]. Give one label per image"),
        ([[0], [1], [2], [3]], NAMES, r"labels of shape \[4, 1\]"),
        ([0, 1, 2, 3], NAMES.reshape(2, 2), r"class names of shape \[2, 2\]. Give a list"),
    ],
)
def test_wrong_labels_and_names_are_refused_with_the_file_and_the_value(labels, names, words):
    with pytest.raises(UserError, match=words):
        checked_labels(labels, names, 4, "file")


@pytest.mark.parametrize("images", [np.zeros((4, 8, 8)), np.zeros((0, 8, 8, 3), np.uint8)])
def test_images_of_another_shape_or_none_are_refused(images):
    with pytest.raises(
        UserError, match=r"mine.npz has images of .* uint8 or uint16 \[n, H, W, channels\]"
    ):
        ArraySource(images, where="mine.npz")


def arrays(labels, names=(), n=3):
    return ArraySource(np.zeros((n, 4, 4, 3), np.uint8), np.asarray(labels), names)


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int64])
def test_labels_with_a_column_per_class_are_targets(dtype):
    source = arrays(np.array([[0, 1], [1, 1], [0, 0]], dtype), ["cat", "dog"])
    assert source.labels is None and source.num_classes == 0 and source.class_names == ()
    assert source.targets.values.dtype == np.int8 and source.targets.names == ("cat", "dog")
    assert source.targets.counts.tolist() == [1, 2]
    assert arrays([[0, 1]] * 3).fingerprint != arrays([[1, 1]] * 3).fingerprint
    part = Subset(source, np.array([2, 1]))
    assert part.targets.values.tolist() == [[0, 0], [1, 1]]


@pytest.mark.parametrize(
    ("labels", "names", "message"),
    [
        (np.zeros((3, 0), int), (), r"shape \[3, 0\]"),
        (np.zeros((2, 2), int), (), r"shape \[2, 2\]"),
        ([[0, 1], [2, 0], [0, 0]], (), "label 2 .image 1, class 0"),
        ([[0.5, 1]] * 3, (), "dtype float64"),
        ([[0, 1]] * 3, ("a", "a"), "2 columns but 1 different"),
        ([[0, 1]] * 3, ("a", "b", "b"), "2 columns but 2 different class names in a list of 3"),
        ([[5]] * 3, (), r"For one label per image, give labels\[:, 0\]"),
    ],
)
def test_wrong_targets_raise_user_error(labels, names, message):
    with pytest.raises(UserError, match=message):
        arrays(labels, names)


def test_ragged_labels_are_refused():
    ragged = [[0, 1], [1], [0, 0]]
    images = np.zeros((3, 4, 4, 3), np.uint8)
    with pytest.raises(UserError, match="The labels are lists of different lengths. Give a row of"):
        ArraySource(images, ragged)
    own = types.SimpleNamespace(labels=ragged)
    with pytest.raises(UserError, match="The labels are lists of different lengths"):
        is_multi_label(own.labels)


def test_lists_of_classes_become_targets():
    targets, names = listed(["dog; cat", "", "?dog;emu"], ";")
    assert names == ["cat", "dog", "emu"]
    assert targets.tolist() == [[1, 1, 0], [0, 0, 0], [0, -1, 1]]
    for cell in ("dog;?dog", "?dog;dog"):  # a plain and a difficult one in the same image
        assert listed([cell], ";")[0].tolist() == [[1]]
    assert of_lists([[1], None, []], 2).tolist() == [[0, 1], [-1, -1], [0, 0]]
    with pytest.raises(UserError, match="targets of 1 images and 1000000000000 classes take 3.6"):
        of_lists([[1]], 10**12)


def test_classes_of_two_splits_are_matched_by_name():
    train = checked_targets([[1, 0]], ["cat", "dog"], 1, "train")
    test = checked_targets([[1, -1]], ["emu", "dog"], 1, "test")
    first, second = common_targets(train, test)
    assert first.names == second.names == ("cat", "dog", "emu")
    assert first.values.tolist() == [[1, 0, 0]] and second.values.tolist() == [[0, -1, 1]]
    few = checked_targets([[1]], ["dog"], 1, "test")  # lacks the rare classes
    assert common_targets(train, few)[1].values.tolist() == [[0, 1]]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ((), "the 3 of the training images include cat and 2 more, the 2 of the held-out images 0"),
        (["cat", "Dog", "Emu"], "include dog and 1 more, the 3 of the held-out images Dog and"),
    ],
)
def test_splits_of_which_most_classes_differ_are_refused(names, words):
    given = ["cat", "dog", "emu"]
    train = checked_targets([[1, 0, 0]], given, 1, "train")
    test = checked_targets([[1] * (len(names) or 2)], names, 1, "test")
    for pair in ((train, test), (test, train)):
        with pytest.raises(UserError, match="Use two splits of one dataset"):
            common_targets(*pair)
    with pytest.raises(UserError, match=words):
        common_targets(train, test)


def test_data_that_only_a_linear_classifier_can_use_is_refused_elsewhere():
    several, single = arrays([[1, 0], [0, 1], [1, 1]]), arrays([0, 1, 1])
    assert "several labels each" in why_not_scored(several, several)
    assert "several labels each" in why_not_scored(single, several, learned=False)
    require_targets(several, several)
    for pair, message in [
        ((several, None), "no held-out images"),
        ((several, single), "Only one of"),
        ((several, arrays(np.zeros((3, 2), int))), "No class has an image in both"),
    ]:
        with pytest.raises(UserError, match=message):
            require_targets(*pair)
    with pytest.raises(UserError, match="Only one of both has several labels"):
        require_same_classes(several, single, "both")
