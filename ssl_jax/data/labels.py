"""Checks labels and class names where they enter; code that uses a source doesn't check again."""

import os
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from ssl_jax.data.listing import some, utf8
from ssl_jax.errors import UserError, printable

NO_LABEL = -1
_INTEGER = re.compile(r"-?[0-9]{1,18}")
_MOST_UNNAMED = 1_000_000  # classes without names, whose number follows from the labels only


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
