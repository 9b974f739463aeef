"""A folder of image files as a source."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int
from ml_collections import ConfigDict

from ssl_jax.data.host import HostSource, contents_fingerprint
from ssl_jax.data.labels import NO_LABEL, checked_names
from ssl_jax.data.listing import list_images, read_image
from ssl_jax.data.tensorflow import tf
from ssl_jax.files import RESUME, local_path, reading


class FilesSource(HostSource):
    """Image files in a file system. A subclass lists them."""

    def __init__(
        self,
        config: ConfigDict,
        where: str,
        folder: Path,
        files: Sequence[str],
        labels: Sequence[int] | Int[np.ndarray, " n"] | None,
        class_names: tuple[str, ...],
        identity: bytes,
    ) -> None:
        """Reads only the files whose contents the fingerprint has.

        Args:
          config: the run's config.
          where: see `HostSource`.
          folder: to which the images' names are relative.
          files: paths, one per id.
          labels: class of each file, -1 for none; None if no file has one.
          class_names: checked, by label.
          identity: see `images_fingerprint`.

        Raises:
          UserError: a view can't be made on the host.
        """
        fingerprint = contents_fingerprint(
            config, len(files), identity, lambda id: read_image(files[id])
        )
        super().__init__(config, where, len(files), fingerprint)
        self._folder = folder
        self.class_names, self.num_classes = class_names, len(class_names)
        self._files = np.array([os.fsencode(file) for file in files], object)
        self._labels = np.array([NO_LABEL] * len(files) if labels is None else labels, np.int32)

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


class FolderSource(FilesSource):
    """The image files of a folder: one subfolder per class, or flat without labels.

    Ids follow the sorted class names and, within a class, the sorted file paths.
    """

    def __init__(self, config: ConfigDict, key: str = "dir") -> None:
        """Lists the folder; of the files, reads only those whose contents its fingerprint has.

        Args:
          config: the run's config.
          key: the key of `config.data` that names the folder, "dir" or "test_dir".

        Raises:
          UserError: as `list_images`, or a view can't be made on the host.
        """
        folder = config.data[key]
        files, labels, class_names = list_images(folder, f"config.data.{key}")
        root = local_path(folder)  # once: it looks the path up
        names = os.fsencode("\0".join(os.path.relpath(file, root) for file in files))
        where = f"config.data.{key} ({folder})"
        class_names = checked_names(class_names, folder)
        super().__init__(config, where, root, files, labels, class_names, names)
        self.labels_from = f"subfolders of {folder}"
