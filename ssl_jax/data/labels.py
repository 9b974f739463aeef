"""Checks labels and class names where they enter; code that uses a source doesn't check again."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, Int8

from ssl_jax.data.listing import some, utf8
from ssl_jax.errors import UserError, printable
from ssl_jax.memory import require_host_memory

NO_LABEL = -1
NO_COMMON_CLASS = (
    "No class has an image in both the training and the held-out images, so there is no average "
    "precision. Check the labels of both splits."
)
UNKNOWN = "?"  # before the name of a class in a list: unknown or difficult there, as in VOC
_INTEGER = re.compile(r"-?[0-9]{1,18}")
_MOST_UNNAMED = 1_000_000  # classes without names, whose number follows from the labels only


@dataclasses.dataclass(frozen=True)
class Targets:
    """Labels of images that may be of several classes, or of none.

    Attributes:
      values: int8 [n, classes]: 1 if the image is of the class, 0 if not, and -1 if that is unknown
        or too difficult, which leaves the image out of the class's loss and average precision.
      names: of the classes, in the order of the columns.
      named: whether the names were given; else the classes are named by number.
    """

    values: Int8[np.ndarray, "n c"]
    names: tuple[str, ...]
    named: bool = True

    def of(self, ids: Int[np.ndarray, " k"]) -> Targets:
        """The targets of some images."""
        return dataclasses.replace(self, values=self.values[ids])

    def aligned(self, names: tuple[str, ...]) -> Targets:
        """The same with these classes; images are not of a class that the targets don't have."""
        values = np.zeros((len(self.values), len(names)), np.int8)
        for column, name in zip(self.values.T, self.names, strict=True):
            values[:, names.index(name)] = column
        return Targets(values, names, self.named)

    @property
    def counts(self) -> Int[np.ndarray, " c"]:
        """Number of images of each class."""
        counts: np.ndarray = (self.values == 1).sum(axis=0)
        return counts


def targets_of(source: Any) -> Targets | None:
    """The targets of a source whose images have several labels each, else None."""
    # Sources written by users need not have the attribute.
    targets: Targets | None = getattr(source, "targets", None)
    return targets


def is_multi_label(labels: Any) -> bool:
    """Whether labels have a column per class."""
    try:
        return np.ndim(labels) == 2
    except ValueError as error:
        raise UserError(
            "The labels are lists of different lengths. Give a row of 0s and 1s per image with a "
            "column for each class."
        ) from error


def checked_targets(targets: Any, class_names: Any, count: int, where: str) -> Targets:
    """Checks targets of several classes per image.

    Args:
      targets: bool or integers [n, classes] of 0, 1 and -1; see `Targets`.
      class_names: in the order of the columns; empty: the classes are named by number.
      count: number of images, n.
      where: the file or folder that contains the targets, for messages.

    Raises:
      UserError: targets of another shape, type or value, or another number of names.
    """
    given, names = np.asarray(targets), checked_names(class_names, where)
    if given.ndim != 2 or len(given) != count or not given.shape[1]:
        raise UserError(
            f"{where} has {count} images but labels of shape {list(given.shape)}. Give one label "
            "per image, or a row of 0s and 1s per image with a column for each class."
        )
    if given.dtype.kind not in "iub":
        raise UserError(f"{where} has labels of dtype {given.dtype}. Give integers or bool.")
    wrong = np.argwhere((given != 0) & (given != 1) & (given != NO_LABEL))
    if len(wrong):
        image, column = wrong[0].tolist()
        raise UserError(
            f"{where} has the label {given[image, column]} (image {image}, class {column}) among "
            "labels with a column per class. Write 1 for images of the class, 0 for others, and "
            f"{NO_LABEL} where it is unknown."
            + (" For one label per image, give labels[:, 0]." if given.shape[1] == 1 else "")
        )
    if names and not len(set(names)) == len(names) == given.shape[1]:
        raise UserError(
            f"{where} has labels with {given.shape[1]} columns but {len(set(names))} different "
            f"class names in a list of {len(names)}. Give one name per column."
        )
    return Targets(
        given.astype(np.int8), names or tuple(map(str, range(given.shape[1]))), bool(names)
    )


def listed(values: Sequence[str], separator: str) -> tuple[Int8[np.ndarray, "n c"], Sequence[str]]:
    """Targets of images whose classes are listed as text.

    Args:
      values: names of each image's classes; "" for an image of no class. A name that begins with
        "?" is unknown or difficult in that image, unless the image has it without "?", too.
      separator: between names; spaces around them are ignored.

    Returns:
      Targets and class names for `checked_targets`, in the names' sorted order.
    """
    each = [[name.strip() for name in value.split(separator)] for value in values]
    each = [[name for name in row if name not in ("", UNKNOWN)] for row in each]
    names = sorted({name.removeprefix(UNKNOWN) for row in each for name in row})
    columns = {name: column for column, name in enumerate(names)}
    targets = _no_targets(len(values), len(names))
    for target, row in zip(targets, each, strict=True):
        for name in sorted(row, key=lambda name: not name.startswith(UNKNOWN)):  # the known last
            target[columns[name.removeprefix(UNKNOWN)]] = -1 if name.startswith(UNKNOWN) else 1
    return targets, names


def of_lists(lists: Sequence[Sequence[int] | None], classes: int) -> Int8[np.ndarray, "n c"]:
    """Targets of images whose classes are listed by number; -1 in the row of a missing list."""
    targets = _no_targets(len(lists), classes)
    for target, row in zip(targets, lists, strict=True):
        if row is None:
            target[:] = NO_LABEL
        else:
            target[[c for c in row if c is not None and c >= 0]] = 1
    return targets


def _no_targets(images: int, classes: int) -> Int8[np.ndarray, "n c"]:
    """Targets of no class, if they and the masks that are computed from them fit in memory."""
    require_host_memory(
        4 * images * classes,
        f"The targets of {images} images and {classes} classes",
        "If the labels are not classes, choose another column.",
    )
    return np.zeros((images, classes), np.int8)


def common_targets(train: Targets, test: Targets) -> tuple[Targets, Targets]:
    """The targets of two splits with the same classes in the same order.

    Classes are matched by name. One that only one split has gets a column of 0s in the other.

    Raises:
      UserError: less than half of the classes of the split that has fewer are in the other one, or
        the splits have different numbers of unnamed classes.
    """
    if train.names == test.names:
        return train, test
    # A small split may lack rare classes, but those that it has are the dataset's.
    common, fewer = set(train.names) & set(test.names), min(len(train.names), len(test.names))
    if not (train.named and test.named) or 2 * len(common) < fewer:
        first, second = (
            some([name for name in split.names if name not in common] or split.names)
            for split in (train, test)
        )
        raise UserError(
            f"Most classes of the splits differ: the {len(train.names)} of the training images "
            f"include {first}, the {len(test.names)} of the held-out images {second}. Use two "
            "splits of one dataset, with the same class names."
        )
    names = (*train.names, *(name for name in test.names if name not in train.names))
    return train.aligned(names), test.aligned(names)


def checked_labels(
    labels: Any, class_names: Any, count: int, where: str
) -> tuple[Int[np.ndarray, " n"] | None, tuple[str, ...]]:
    """Checks the labels of a split.

    Args:
      labels: class of each image, integers [n]; -1 for an image without a label.
      class_names: by label; empty: the classes are named by number.
      count: number of images, n.
      where: the file or folder that contains the labels, for messages.

    Returns:
      Labels, int32 [n], each -1 or an index of the names, and the names; None and () if no image
      has a label.

    Raises:
      UserError: labels of another shape or type, or beyond the names.
    """
    given, names = np.asarray(labels), checked_names(class_names, where)
    if given.shape != (count,):
        raise UserError(
            f"{where} has {count} images but labels of shape {list(given.shape)}. "
            "Give one label per image."
        )
    if given.dtype.kind not in "iu":  # for NumPy, time spans are integers, too
        raise UserError(
            f"{where} has labels of dtype {given.dtype}. Give integers: the index of the class, "
            f"or {NO_LABEL} for an image without a label."
        )
    if (given == NO_LABEL).all():
        return None, ()
    classes = len(names) or min(int(given.max()) + 1, _MOST_UNNAMED)
    require_in_range(given, np.arange(count), classes, bool(names), where)
    return given.astype(np.int32), names or tuple(map(str, range(classes)))


def numbered(values: Sequence[str]) -> tuple[Int[np.ndarray, " n"], tuple[str, ...]]:
    """Numbers classes that are given as text.

    Args:
      values: class of each image; "" for an image without a label.

    Returns:
      Labels and class names for `checked_labels`: integers as they are, without names; other
      values by their sorted order.
    """
    given = {value for value in values if value}
    if all(_INTEGER.fullmatch(value) for value in given):
        return np.array([int(value or NO_LABEL) for value in values], np.int64), ()
    names = tuple(sorted(given))
    numbers = {name: number for number, name in enumerate(names)}
    return np.array([numbers.get(value, NO_LABEL) for value in values], np.int64), names


def require_in_range(
    labels: Int[np.ndarray, " n"], ids: Int[np.ndarray, " n"], classes: int, named: bool, where: str
) -> None:
    """Checks that each label is -1 or a class.

    Args:
      labels: to check.
      ids: of their images, for the message.
      classes: number of classes.
      named: whether that is the number of class names.
      where: the file, folder or split that contains the labels, for messages.

    Raises:
      UserError: naming the first wrong label and its image.
    """
    wrong = np.flatnonzero((labels < NO_LABEL) | (labels >= classes))
    if len(wrong):
        names = f" but {classes} class names" if named else ""
        raise UserError(
            f"{where} has the label {labels[wrong[0]]} (image {ids[wrong[0]]}){names}. Number the "
            f"classes from 0 to {classes - 1}; {NO_LABEL} stands for an image without a label."
        )


def checked_names(names: Any, where: str) -> tuple[str, ...]:
    """Returns class names as strings that can be printed and written as UTF-8.

    Args:
      names: a list or array of strings or bytes; what is not UTF-8 or not printable is escaped.
      where: the file or folder that contains them, for messages.

    Raises:
      UserError: not a list of names.
    """
    if not isinstance(names, Sequence | np.ndarray) or np.ndim(names) != 1:
        raise UserError(f"{where} has class names of shape {list(np.shape(names))}. Give a list.")
    return tuple(printable(utf8(os.fsdecode(x) if isinstance(x, bytes) else str(x))) for x in names)


def require_same_classes(train: Any, test: Any, where: str) -> None:
    """Checks that two splits name the same classes, in the same order.

    Args:
      train: source of the training images.
      test: source of the held-out images.
      where: both, for messages.

    Raises:
      UserError: they don't.
    """
    several = {bool(targets_of(split)) for split in (train, test)}
    if several == {True, False} and (train.num_classes or test.num_classes):
        raise UserError(
            f"Only one of {where} has several labels per image. Use two splits of one dataset."
        )
    # Either split may have no labels, and its labels may not reach the last of unnamed classes.
    numbered = test.class_names == tuple(map(str, range(test.num_classes)))
    known = train.class_names[: test.num_classes if numbered else None]
    if not train.num_classes or not test.num_classes or known == test.class_names:
        return
    differing = sorted(set(train.class_names) ^ set(test.class_names))
    if differing:
        raise UserError(
            f"Only one of {where} has the class {some(differing)}. Use two splits of one dataset."
        )
    raise UserError(
        f"{where} name the same classes in a different order, so their labels don't match. Number "
        "the classes of both in the same order."
    )
