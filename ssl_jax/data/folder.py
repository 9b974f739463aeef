"""A folder of image files as a source."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int
from ml_collections import ConfigDict

from ssl_jax.data.host import HostSource, contents_fingerprint
from ssl_jax.data.labels import NO_LABEL, checked_names
from ssl_jax.data.listing import list_images, read_image
from ssl_jax.data.tensorflow import tf
from ssl_jax.files import RESUME, local_path, reading


class FolderSource(HostSource):
    """The JPEG and PNG files of a folder: one subfolder per class, or flat without labels.

    Ids follow the sorted class names and, within a class, the sorted file paths.
    """

    def __init__(self, config: ConfigDict, key: str = "dir") -> None:
        """Lists the folder; of the files, reads only those that its fingerprint takes.

        Args:
          config: the run's config.
          key: the key of `config.data` that names the folder, "dir" or "test_dir".

        Raises:
          UserError: as `list_images`, or a view can't be made on the host.
        """
        folder = config.data[key]
        files, labels, class_names = list_images(folder, f"config.data.{key}")
        self._folder = local_path(folder)  # once: it looks the path up
        names = "\0".join(os.path.relpath(file, self._folder) for file in files)
        identity = os.fsencode(names)
        fingerprint = contents_fingerprint(len(files), identity, lambda id: read_image(files[id]))
        super().__init__(config, f"config.data.{key} ({folder})", len(files), fingerprint)
        self.class_names = checked_names(class_names, folder)
        self.num_classes, self.labels_from = len(class_names), f"subfolders of {folder}"
        self._files = np.array([os.fsencode(file) for file in files], object)
        self._labels = np.array(labels or [NO_LABEL] * len(files), np.int32)

    def handles(self, ids: Int[np.ndarray, " n"]) -> tuple[Sequence[bytes], Int[np.ndarray, " n"]]:
        """The paths and labels of the files."""
        return self._files[ids], self._labels[ids]

    def contents(self, handle: tf.Tensor, label: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Reads the file."""
        return tf.io.read_file(handle), label

    def name(self, id: int) -> str:
        """The file's path."""
        return os.fsdecode(self._files[id])

    def file_name(self, id: int) -> str:
        """The file's path in the folder."""
        return os.path.relpath(self.name(id), self._folder)

    def read(self, id: int) -> bytes:
        """Reads a file's bytes."""
        with reading(self.name(id), f"Restore the file, {RESUME}"):
            return read_image(self.name(id))
