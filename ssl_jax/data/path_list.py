"""The image files that a list names, as a source."""

from __future__ import annotations

import os

from ml_collections import ConfigDict

from ssl_jax.data.folder import FilesSource
from ssl_jax.data.image_list import Columns, read_list


class PathsSource(FilesSource):
    """The image files of a list, see `read_list`; ids follow its lines.

    `config.data.image_key`, `config.data.label_key` and `config.data.label_separator` say how a
    .csv or .tsv file is read.
    """

    def __init__(self, config: ConfigDict, key: str = "dir") -> None:
        """Reads the list; of the images, only those whose contents the fingerprint has.

        Args:
          config: the run's config.
          key: the key of `config.data` that names the list, "dir" or "test_dir".

        Raises:
          UserError: as `read_list`, or a view can't be made on the host.
        """
        data, path, key = config.data, config.data[key], f"config.data.{key}"
        columns = Columns(data.image_key, data.label_key, data.label_separator)
        found = read_list(path, key, columns)
        kept = found.targets.values if found.targets else found.labels
        label_bytes = b"" if kept is None else kept.tobytes()
        identity = os.fsencode("\0".join(found.names)) + label_bytes
        labels, classes = found.labels, found.class_names
        where = f"{key} ({path})"
        super().__init__(config, where, found.folder, found.files, labels, classes, identity)
        self._names, self._targets = found.names, found.targets
        known = bool(classes or found.targets)
        self.labels_from = f"column '{data.label_key}' of {path}" if known else ""

    def file_name(self, id: int) -> str:
        """The file's path as in the list."""
        return self._names[id]
