"""The image files that a list names, as a source."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Int
from ml_collections import ConfigDict

from ssl_jax.data.folder import FilesSource
from ssl_jax.data.labels import checked_labels, checked_targets, listed, numbered
from ssl_jax.data.listing import require_list
from ssl_jax.errors import UserError, did_you_mean
from ssl_jax.files import reading

_DELIMITERS = {".csv": ",", ".tsv": "\t"}


class PathsSource(FilesSource):
    """The image files of a list; ids follow its lines.

    A .csv or .tsv file has a header; `config.data.image_key` and `config.data.label_key` name its
    columns. With `config.data.label_separator`, a label is a list of classes. Any other file has a
    path per line and no labels. Paths are relative to the list's
    folder, or absolute.
    """

    def __init__(self, config: ConfigDict, key: str = "dir") -> None:
        """Reads the list; of the images, only those whose contents the fingerprint has.

        Args:
          config: the run's config.
          key: the key of `config.data` that names the list, "dir" or "test_dir".

        Raises:
          UserError: the list is missing, empty, lacks a column, or its first image doesn't exist;
            or a view can't be made on the host.
        """
        path, key = config.data[key], f"config.data.{key}"
        where = f"{key} ({path})"
        file = require_list(path, key)
        with reading(file):
            # Names of files need not be UTF-8.
            with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
                names, given = _read_list(lines, file.suffix.lower(), config.data, path)
        if not names:
            raise UserError(f"{key} is {path}, which names no images. Write a path per line.")
        labels: Int[np.ndarray, " n"] | None = None
        classes: tuple[str, ...] = ()
        separator, targets = config.data.label_separator, None
        if separator and given is None:
            raise UserError(
                f"config.data.label_separator is '{separator}', but {path} has no labels. Set "
                "config.data.label_key and a .csv or .tsv file, or leave the separator empty."
            )
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
        kept = targets.values if targets else labels
        label_bytes = b"" if kept is None else kept.tobytes()
        identity = os.fsencode("\0".join(names)) + label_bytes
        super().__init__(config, where, folder, files, labels, classes, identity)
        self._names, self._targets = names, targets
        known = bool(classes or targets)
        self.labels_from = f"column '{config.data.label_key}' of {path}" if known else ""

    def file_name(self, id: int) -> str:
        """The file's path as in the list."""
        return self._names[id]


def _read_list(
    lines: Iterator[str], suffix: str, data: ConfigDict, path: str
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
    image = _column(header, "image_key", data.image_key, path)
    label = _column(header, "label_key", data.label_key, path) if data.label_key else -1
    for number, row in enumerate(rows[1:], start=2):
        if len(row) != len(header) or not row[image]:
            raise UserError(
                f"{path} has {len(row)} cells in row {number} of {len(header)} columns, or no path "
                "there. Give every row a path, and a cell per column."
            )
    names = [row[image] for row in rows[1:]]
    return names, [row[label] for row in rows[1:]] if data.label_key else None


def _column(header: Sequence[str], key: str, name: str, path: str) -> int:
    """The position of the column that a key names."""
    if name not in header:
        none = " For no labels, set it to ''." if key == "label_key" else ""
        raise UserError(
            f"config.data.{key} is '{name}', which is not a column of {path}."
            f"{did_you_mean(name, header)}{none}"
        )
    return list(header).index(name)
