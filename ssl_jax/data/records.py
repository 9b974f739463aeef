"""Image files in a few large ones, for file systems and buckets that dislike many small ones.

`convert` writes TFRecord shards of `tf.train.Example`s ("image", "label", "name"), which any reader
of TFRecord takes, and beside them an index of where each image's bytes lie, so that images are read
one by one in any order. The index is written last: a folder without one is not complete.
"""

import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from jaxtyping import Int
from ml_collections import ConfigDict

from ssl_jax.data.host import HostSource
from ssl_jax.data.listing import list_images
from ssl_jax.data.views import tf
from ssl_jax.errors import UserError

_INDEX = "index.npz"
_KEYS = {"shards", "shard", "offset", "length", "label", "names", "class_names"}
# A TFRecord is the payload's length, 8 bytes, and its checksum, 4; the payload; its checksum, 4.
BEFORE, AFTER = 12, 4
_READERS = 16  # images asked for at a time: what hides the latency of a disk or a bucket


def convert(folder: str, out: str, num_shards: int = 0) -> int:
    """Copies the image files of a folder, as they are, into sharded records.

    Args:
      folder: with one sub-folder per class, or flat, as `config.data.name = "folder"` takes it.
      out: folder to write, on a disk or a bucket (gs://…); it must not hold records yet.
      num_shards: files to write, 0: of about 128 MiB each.

    Returns:
      The number of images.

    Raises:
      UserError: what `list_images` refuses, records that are there already, a file that can't be
        read or written.
    """
    files, labels, class_names = list_images(folder, "the folder to convert")
    labels = [-1] * len(files) if labels is None else labels
    if tf.io.gfile.exists(_join(out, _INDEX)):
        raise UserError(f"{out} holds records already: give another folder, or remove it.")
    if not num_shards:
        sampled = files[:: max(1, len(files) // 1000)]
        size = sum(os.path.getsize(file) for file in sampled) / len(sampled)
        num_shards = max(1, round(size * len(files) / 2**27))
    num_shards = min(num_shards, len(files))
    shards = [f"{i:05d}-of-{num_shards:05d}.tfrecord" for i in range(num_shards)]
    rows: list[tuple[int, int, int]] = []
    names = [os.path.relpath(file, folder) for file in files]
    try:
        tf.io.gfile.makedirs(out)
        for number, chunk in enumerate(np.array_split(np.arange(len(files)), num_shards)):
            with tf.io.TFRecordWriter(_join(out, shards[number])) as writer:
                position = 0
                for i in chunk:
                    image = _read_file(files[i])
                    record = _example(image, labels[i], names[i])
                    start = position + BEFORE + record.index(image)
                    rows.append((number, start, len(image)))
                    writer.write(record)
                    position += BEFORE + len(record) + AFTER
        shard, offset, length = np.array(rows, np.int64).T
        _write_arrays(
            _join(out, _INDEX),
            shards=np.array(shards),
            shard=shard.astype(np.int32),
            offset=offset,
            length=length.astype(np.int32),
            label=np.array(labels, np.int32),
            names=np.frombuffer(os.fsencode("\0".join(names)), np.uint8),
            class_names=np.array(class_names, str),
        )
    except (OSError, tf.errors.OpError) as error:
        raise UserError(f"{out} can't be written ({error}): choose another folder.") from error
    return len(files)


def records_sources(config: ConfigDict) -> tuple["RecordsSource", "RecordsSource | None"]:
    """The records in `config.data.dir` and `config.data.test_dir`.

    Args:
      config: of the run.

    Returns:
      The training source and the held-out one, None where `config.data.test_dir` is empty.

    Raises:
      UserError: a folder without records, classes that differ between the two, or a view that can't
        be made on the host.
    """
    train = RecordsSource(config, "dir")
    if not config.data.test_dir:
        return train, None
    test = RecordsSource(config, "test_dir")
    if train.class_names != test.class_names:
        raise UserError(
            f"config.data.dir ({config.data.dir}) and config.data.test_dir "
            f"({config.data.test_dir}) have other classes: convert two splits of one data set."
        )
    return train, test


class RecordsSource(HostSource):
    """What `convert` has written; ids in the order of the folder that it was made of."""

    def __init__(self, config: ConfigDict, key: str = "dir") -> None:
        """Reads the index.

        Args:
          config: of the run.
          key: which of `config.data` names the records: "dir" or "test_dir".

        Raises:
          UserError: no records there, or a view that can't be made on the host.
        """
        folder = config.data[key]
        index = _read_index(folder, f"config.data.{key}")
        names = index["names"].tobytes()
        super().__init__(config, f"config.data.{key} ({folder})", len(index["shard"]), names)
        self.class_names = tuple(str(name) for name in index["class_names"])
        self.num_classes = len(self.class_names)
        self._paths = [_join(folder, str(shard)) for shard in index["shards"]]
        self._shard, self._labels, self._names = index["shard"], index["label"], names
        self._ranges = Ranges(self._paths, self._shard, index["offset"], index["length"])

    def handles(self, ids: Int[np.ndarray, " n"]) -> tuple[Sequence[bytes], Int[np.ndarray, " n"]]:
        """The files themselves."""
        return self._ranges[ids], self._labels[ids]

    def contents(self, handle: tf.Tensor, label: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """They are there already."""
        return handle, label

    def name(self, id: int) -> str:
        """The file's path in the folder that was converted, and the shard."""
        name = os.fsdecode(self._names.split(b"\0")[id])
        return f"{name} in {self._paths[self._shard[id]]}"


class Ranges:
    """Ranges of bytes in files, read by their numbers, many at a time."""

    def __init__(
        self,
        paths: Sequence[str],
        file: Int[np.ndarray, " N"],
        offset: Int[np.ndarray, " N"],
        length: Int[np.ndarray, " N"],
    ) -> None:
        """Opens nothing.

        Args:
          paths: of the files.
          file: in which of them each range lies.
          offset: of its first byte.
          length: bytes.
        """
        self._paths, self._file, self._offset, self._length = paths, file, offset, length
        self._pool = ThreadPoolExecutor(_READERS, thread_name_prefix="ranges")

    def __len__(self) -> int:
        return len(self._file)

    def __getitem__(self, numbers: Int[np.ndarray, " n"]) -> list[bytes]:
        return list(self._pool.map(self._one, numbers))

    def _one(self, number: int) -> bytes:
        path = self._paths[self._file[number]]
        return read_range(path, int(self._offset[number]), int(self._length[number]))


def read_range(path: str, offset: int, length: int) -> bytes:
    """Some bytes of a file, on a disk or a bucket; safe to call from many threads.

    Raises:
      UserError: the file can't be read, or ends before.
    """
    reason = "it is too short"
    data = b""
    try:
        if "://" in path:
            with tf.io.gfile.GFile(path, "rb") as handle:
                handle.seek(offset)
                data = handle.read(length)
        else:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                data = os.pread(descriptor, length, offset)
            finally:
                os.close(descriptor)
    except OSError as error:
        reason = str(error.strerror)
    except tf.errors.OpError as error:
        reason = error.message
    if len(data) < length:
        raise UserError(f"{path} can't be read ({reason}): see that it is whole and stays there.")
    return data


def _read_index(folder: str, key: str) -> dict[str, Any]:
    if not folder:
        raise UserError(f"{key} is empty: give the folder that `ssl-jax data convert` has written.")
    path = _join(folder, _INDEX)
    if not tf.io.gfile.exists(path):
        raise UserError(
            f"{key} is {folder}, where there are no complete records: `ssl-jax data convert IMAGES "
            f"{folder}` writes them."
        )
    try:
        with tf.io.gfile.GFile(path, "rb") as handle:
            with np.load(io.BytesIO(handle.read()), allow_pickle=False) as arrays:
                if set(arrays.files) != _KEYS:
                    raise ValueError("other arrays")
                return dict(arrays)
    except Exception as error:  # a corrupt file fails in many ways
        raise UserError(f"{path} is corrupt: convert the images anew.") from error


def _read_file(path: str) -> bytes:
    try:
        with open(path, "rb") as handle:
            return handle.read()
    except OSError as error:
        raise UserError(
            f"{path} can't be read ({error.strerror}): remove or replace it."
        ) from error


def _example(image: bytes, label: int, name: str) -> bytes:
    def feature(value: bytes) -> tf.train.Feature:
        return tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))

    features = {
        "image": feature(image),
        "label": tf.train.Feature(int64_list=tf.train.Int64List(value=[label])),
        "name": feature(os.fsencode(name)),
    }
    example = tf.train.Example(features=tf.train.Features(feature=features))
    return example.SerializeToString(deterministic=True)


def _write_arrays(path: str, **arrays: np.ndarray) -> None:
    """Writes an uncompressed `.npz`, whole or not at all."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    temporary = path + ".tmp"
    with tf.io.gfile.GFile(temporary, "wb") as handle:
        handle.write(buffer.getvalue())
    tf.io.gfile.rename(temporary, path, overwrite=True)


def _join(folder: str, name: str) -> str:
    return folder.rstrip("/") + "/" + name
