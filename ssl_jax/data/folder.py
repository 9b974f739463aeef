"""A folder of image files as a source."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int
from ml_collections import ConfigDict

from ssl_jax.data.host import HostSource
from ssl_jax.data.listing import list_images, some
from ssl_jax.data.tensorflow import tf
from ssl_jax.errors import UserError


def folder_sources(config: ConfigDict) -> tuple[FolderSource, FolderSource | None]:
    """The images under `config.data.dir` and `config.data.test_dir`.

    Args:
      config: of the run.

    Returns:
      The training source and the held-out one, None where `config.data.test_dir` is empty.

    Raises:
      UserError: a missing folder, one without images, class folders that differ between the two, or
        a view that can't be made on the host.
    """
    train = FolderSource(config, "dir")
    if not config.data.test_dir:
        return train, None
    test = FolderSource(config, "test_dir")
    differing = sorted(set(train.class_names) ^ set(test.class_names))
    # Images without labels may be measured on others that have them.
    if differing and train.num_classes:
        raise UserError(
            f"config.data.dir ({config.data.dir}) and config.data.test_dir "
            f"({config.data.test_dir}) must have the same class folders, but only one of them has "
            f"{some(differing)}: add or remove it."
        )
    return train, test


class FolderSource(HostSource):
    """The JPEG and PNG files of a folder: by class in its sub-folders, or without labels in itself.

    Ids follow the sorted names of the classes and, in each, the sorted paths of the files.
    """

    def __init__(self, config: ConfigDict, key: str = "dir") -> None:
        """Lists the folder; no file is opened.

        Args:
          config: of the run.
          key: which of `config.data` names the folder: "dir" or "test_dir".

        Raises:
          UserError: no such folder, no images in it or in one of its sub-folders, images beside
            class folders, or a view that can't be made on the host.
        """
        folder = config.data[key]
        files, labels, self.class_names = list_images(folder, f"config.data.{key}")
        names = "\0".join(os.path.relpath(file, folder) for file in files)
        super().__init__(config, f"config.data.{key} ({folder})", len(files), os.fsencode(names))
        self.num_classes = len(self.class_names)
        self._files = np.array([os.fsencode(file) for file in files], object)
        self._labels = np.full(len(files), -1, np.int32)
        if labels is not None:
            self._labels[:] = labels

    def handles(self, ids: Int[np.ndarray, " n"]) -> tuple[Sequence[bytes], Int[np.ndarray, " n"]]:
        """The files' paths."""
        return self._files[ids], self._labels[ids]

    def contents(self, handle: tf.Tensor, label: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Reads the file."""
        return tf.io.read_file(handle), label

    def name(self, id: int) -> str:
        """The file's path."""
        return os.fsdecode(self._files[id])

    def read(self, id: int) -> bytes:
        """A file's bytes."""
        try:
            return Path(self.name(id)).read_bytes()
        except OSError as error:
            raise UserError(
                f"{self.name(id)} can't be read ({error.strerror}): see that it stays there."
            ) from error
