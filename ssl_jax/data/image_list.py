"""Lists of image files and their labels: a text file or table, or the files of a folder."""

from __future__ import annotations

import csv
import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int

from ssl_jax.data.labels import (
    NO_LABEL,
    Targets,
    checked_labels,
    checked_targets,
    listed,
    numbered,
)
from ssl_jax.data.listing import list_images, require_list
from ssl_jax.errors import UserError, did_you_mean
from ssl_jax.files import local_path, reading

_DELIMITERS = {".csv": ",", ".tsv": "\t"}


@dataclasses.dataclass(frozen=True)
class Columns:
    """How a table of images is read; the first three are keys of `config.data`.

    Attributes:
      image_key: column of the paths.
      label_key: column of the labels; "" for no labels.
      label_separator: between the classes of an image; "": an image has one class.
      flags: whether they are flags of a command, such as --image-key, for messages.
    """

    image_key: str = "image"
    label_key: str = "label"
    label_separator: str = ""
    flags: bool = False

    def name(self, key: str) -> str:
        """A key as the user sets it."""
        return f"--{key.replace('_', '-')}" if self.flags else f"config.data.{key}"


FLAGS = Columns(flags=True)


@dataclasses.dataclass(frozen=True)
class ImageList:
    """Image files and their labels.

    Attributes:
      folder: to which the names are relative.
      files: paths.
      names: paths in the folder, or as listed.
      labels: class of each file, -1 for none; None if no file has one.
      class_names: by label.
      targets: instead of these two, the labels of images of several classes each; else None.
    """

    folder: Path
    files: list[str]
    names: list[str]
    labels: Int[np.ndarray, " n"] | None
    class_names: tuple[str, ...]
    targets: Targets | None = None

    @property
    def label_array(self) -> np.ndarray:
        """Labels as they are written: int32 [n], -1 for none; or `Targets.values`, int8 [n, c]."""
        if self.targets:
            return self.targets.values
        if self.labels is None:
            return np.full(len(self.files), NO_LABEL, np.int32)
        return self.labels.astype(np.int32)

    @property
    def label_names(self) -> tuple[str, ...]:
        """Names of the classes by label, or by column of the targets."""
        return self.targets.names if self.targets else self.class_names


def read_list(path: str, key: str, columns: Columns) -> ImageList:
    """Reads a list of image files.

    A .csv or .tsv file has a header; `columns` names the columns that are read. With a separator, a
    label is a list of classes. Any other file has a path per line and no labels. Paths are relative
    to the list's folder, or absolute.

    Args:
      path: the list.
      key: name of the setting that gave the path, for messages.
      columns: see `Columns`.

    Raises:
      UserError: the list is missing, empty or lacks a column, labels are wrong, or the first image
        doesn't exist.
    """
    file, where = require_list(path, key), f"{key} ({path})"
    with reading(file):
        with file.open("rb") as binary:
            if b"\0" in binary.read(4096):
                raise UserError(f"{where} is not text. Set {key} to a list or a folder of images.")
        # Names of files need not be UTF-8.
        with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
            names, given = _read_rows(lines, file.suffix.lower(), columns, path)
    if not names:
        raise UserError(f"{key} is {path}, which names no images. Write a path per line.")
    separator = columns.label_separator
    if separator and given is None:
        raise UserError(
            f"{columns.name('label_separator')} is '{separator}', but {path} has no labels. Set "
            f"{columns.name('label_key')} and a .csv or .tsv file, or leave the separator empty."
        )
    labels: Int[np.ndarray, " n"] | None = None
    classes: tuple[str, ...] = ()
    targets = None
    if given is not None and separator:
        targets = checked_targets(*listed(given, separator), len(names), where)
    elif given is not None:
        labels, classes = checked_labels(*numbered(given), len(names), where)
    folder = file.parent
    files = [os.path.join(folder, name) for name in names]
    if not os.path.isfile(files[0]):
        raise UserError(
            f"{key} is {path}, whose first image, {names[0]}, is not in {folder}. Write paths "
            "relative to the list's folder, or absolute ones."
        )
    return ImageList(folder, files, names, labels, classes, targets)


def list_or_folder(path: str, key: str, columns: Columns) -> ImageList:
    """Lists the images of a folder, or of a list; see `list_images` and `read_list`.

    Args:
      path: of the folder or list.
      key: name of the setting that gave the path, for messages.
      columns: of a list.

    Raises:
      UserError: as these functions, or columns are given for a folder.
    """
    root = local_path(path)  # once: it looks the path up
    if root.is_file():
        return read_list(path, key, columns)
    plain = Columns(flags=columns.flags)
    for name, value in vars(columns).items():
        if value != getattr(plain, name):
            raise UserError(
                f"{columns.name(name)} is '{value}', but {path} is not a list of images, and the "
                "classes of a folder are its subfolders. Leave it out, or give a .csv or .tsv file."
            )
    files, numbers, classes = list_images(path, key)
    labels = None if numbers is None else np.array(numbers, np.int32)
    names = [os.path.relpath(file, root) for file in files]
    return ImageList(root, files, names, labels, classes)


def _read_rows(
    lines: Iterator[str], suffix: str, columns: Columns, path: str
) -> tuple[list[str], list[str] | None]:
    """The paths, and the labels as text or None."""
    if suffix not in _DELIMITERS:
        return [line.rstrip("\r\n") for line in lines if line.strip()], None
    try:
        rows = [row for row in csv.reader(lines, delimiter=_DELIMITERS[suffix], strict=True) if row]
    except csv.Error as error:
        raise UserError(f"{path} is not a valid table ({error}). Quote cells as in CSV.") from error
    if not rows:
        return [], None
    header = rows[0]
    image = _column(header, "image_key", columns, path)
    label = _column(header, "label_key", columns, path) if columns.label_key else -1
    for number, row in enumerate(rows[1:], start=2):
        if len(row) != len(header) or not row[image]:
            raise UserError(
                f"{path} has {len(row)} cells in row {number} of {len(header)} columns, or no path "
                "there. Give every row a path, and a cell per column."
            )
    names = [row[image] for row in rows[1:]]
    return names, [row[label] for row in rows[1:]] if columns.label_key else None


def _column(header: Sequence[str], key: str, columns: Columns, path: str) -> int:
    """The position of the column that a key names."""
    name = getattr(columns, key)
    if name not in header:
        none = " For no labels, set it to ''." if key == "label_key" else ""
        raise UserError(
            f"{columns.name(key)} is '{name}', which is not a column of {path}."
            f"{did_you_mean(name, header)}{none}"
        )
    return list(header).index(name)
