"""Image files copied into a few ArrayRecord files, which file systems and buckets read faster.

Each record is the unchanged bytes of one image file. `index.npz` holds the labels, int32 [n] or of
several classes per image int8 [n, classes], the file names and the number of records per shard, so
that a run starts without opening all shards. It is written last: a folder without it is incomplete.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
import resource
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from ml_collections import ConfigDict

from ssl_jax.data.host import HostSource, contents_fingerprint
from ssl_jax.data.image_list import FLAGS, Columns, list_or_folder
from ssl_jax.data.labels import NO_LABEL, checked_labels, checked_targets, is_multi_label
from ssl_jax.data.listing import read_image
from ssl_jax.data.reader import in_parallel
from ssl_jax.data.tensorflow import array_record_data_source, array_record_module, tf
from ssl_jax.errors import UserError, first_line
from ssl_jax.files import CHECK_PATH, local_path, reading, replacing, writing

_INDEX = "index.npz"
_READERS = 64  # parallel reads, which hide the latency of a disk or a bucket
_KEYS = {"shards", "counts", "label", "names", "class_names"}


def convert(images: str, out: str, num_shards: int = 0, columns: Columns = FLAGS) -> int:
    """Copies image files, unchanged, into ArrayRecord shards.

    Args:
      images: a folder, one subfolder per class or flat, as for `config.data.name = "folder"`; or a
        list, see `read_list`.
      out: the folder to write, local or in a bucket (gs://...); it must not hold records yet.
      num_shards: number of files to write; 0 for files of about 128 MiB.
      columns: how a list is read.

    Returns:
      The number of images.

    Raises:
      UserError: as `list_or_folder`; a negative number of shards; `out` already holds records; a
        file can't be read or written.
    """
    if num_shards < 0:
        raise UserError(f"The number of shards is {num_shards}: use 1 or more, or 0 to choose it.")
    out = _expanded(out)
    found = list_or_folder(images, "the folder or list to convert", columns)
    files = found.files
    with reading(out, CHECK_PATH, tf.errors.OpError):
        exists = tf.io.gfile.exists(_join(out, _INDEX))
    if exists:
        raise UserError(f"{out} already holds records. Choose another folder, or remove it.")
    with reading(images):
        num_shards = min(num_shards or _default_shards(files), len(files))
    shards = [f"{i:05d}-of-{num_shards:05d}.array_record" for i in range(num_shards)]
    chunks = np.array_split(np.arange(len(files)), num_shards)
    # ArrayRecord's errors are RuntimeErrors.
    with writing(out, "or choose another folder", RuntimeError, tf.errors.OpError):
        tf.io.gfile.makedirs(out)
        for shard, chunk in zip(shards, chunks, strict=True):
            with _local_file(_join(out, shard)) as file:
                _write_shard(str(file), [files[i] for i in chunk])
        _write_arrays(
            _join(out, _INDEX),
            shards=np.array(shards),
            counts=np.array([len(chunk) for chunk in chunks]),
            label=found.label_array,
            names=np.frombuffer(os.fsencode("\0".join(found.names)), np.uint8),
            class_names=np.array(found.label_names, str),
        )
    return len(files)


class RecordsSource(HostSource):
    """Records written by `convert`; ids follow the order of the converted folder."""

    def __init__(self, config: ConfigDict, key: str = "dir") -> None:
        """Reads the index, and the records that its fingerprint takes.

        Args:
          config: the run's config.
          key: the key of `config.data` that names the folder, "dir" or "test_dir".

        Raises:
          UserError: no records in the folder, an index that `convert` doesn't write, or a view that
            can't be made on the host.
        """
        folder = _expanded(config.data[key])
        index = _read_index(folder, f"config.data.{key}")
        names = index["names"].tobytes()
        num_examples = int(index["counts"].sum())
        paths = [_join(folder, str(shard)) for shard in index["shards"]]
        parts = [(path, 0, count) for path, count in zip(paths, index["counts"], strict=True)]
        identity = b"\0".join([names, index["label"].tobytes()])
        sampled = ArrayRecords(parts)  # closed afterwards
        fingerprint = contents_fingerprint(
            config, num_examples, identity, lambda id: sampled[np.array([id])][0]
        )
        super().__init__(config, f"config.data.{key} ({folder})", num_examples, fingerprint)
        self.labels_from, labels = _join(folder, _INDEX), None
        given = (index["label"], index["class_names"], num_examples, self.labels_from)
        if is_multi_label(index["label"]):
            self._targets = checked_targets(*given)
        else:
            labels, self.class_names = checked_labels(*given)
        self.num_classes = len(self.class_names)
        self._labels = np.full(num_examples, NO_LABEL, np.int32) if labels is None else labels
        self._names = names
        self._records = ArrayRecords(parts)

    def handles(self, ids: Int[np.ndarray, " n"]) -> tuple[Sequence[bytes], Int[np.ndarray, " n"]]:
        """The contents of the files."""
        return self._records[ids], self._labels[ids]

    def contents(self, handle: tf.Tensor, label: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """The handle and the label, unchanged."""
        return handle, label

    def name(self, id: int) -> str:
        """The file's path in the converted folder, and its shard."""
        return f"{self.file_name(id)} in {self._records.path(id)}"

    @functools.cached_property
    def _file_names(self) -> list[bytes]:
        return self._names.split(b"\0")

    def file_name(self, id: int) -> str:
        """The file's path in the converted folder."""
        return os.fsdecode(self._file_names[id])


class ArrayRecords:
    """The records of several ArrayRecord files, numbered across the files, for random access."""

    def __init__(self, parts: Sequence[tuple[str, int, int]]) -> None:
        """Opens no file.

        Args:
          parts: for each file its path, local or gs://, and the range of its records to use.
        """
        self._paths = [path for path, _, _ in parts]
        self._ends = np.cumsum([stop - start for _, start, stop in parts])
        # Without ranges it would open each file to count its records.
        self._source = array_record_data_source.ArrayRecordDataSource(
            [f"{path}[{start}:{stop}]" for path, start, stop in parts]
        )
        # It keeps open every file that it has read, and ImageNet has more than the usual 1,024.
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, numbers: Int[np.ndarray, " n"]) -> Sequence[bytes]:
        # Not by __getitems__, whose threads Python joins at exit, stalled or not.
        found = in_parallel(self._one, numbers.tolist(), _READERS)
        for number, record in zip(numbers.tolist(), found, strict=True):
            if not record:
                self._require_whole(number)
        return found

    def _one(self, number: int) -> bytes:
        try:
            return self._source[number]
        except RuntimeError as error:
            raise self._unreadable(number, first_line(error)) from error

    def _require_whole(self, number: int) -> None:
        """Checks the file of an empty record.

        ArrayRecord 0.8 reads a file that ends at a multiple of 64 KiB before its index as one whose
        records are all empty, without an error.
        """
        if not array_record_module.ArrayRecordReader(self.path(number)).ok():
            raise self._unreadable(number, "its end is missing")

    def _unreadable(self, number: int, reason: str) -> UserError:
        return UserError(
            f"Cannot read {self.path(number)} ({reason}). "
            "Check that the file exists and is complete."
        )

    def path(self, number: int) -> str:
        """The file that holds a record."""
        return self._paths[np.searchsorted(self._ends, number, side="right")]


def _read_index(folder: str, key: str) -> dict[str, Any]:
    if not folder:
        raise UserError(f"{key} is empty. Set it to a folder written by `ssl-jax data convert`.")
    path = _join(folder, _INDEX)
    with reading(path, CHECK_PATH, tf.errors.OpError):
        try:
            with tf.io.gfile.GFile(path, "rb") as handle:
                contents = handle.read()
        except tf.errors.NotFoundError as error:
            raise UserError(
                f"{key} is {folder}, which contains no complete records. Write them with `ssl-jax "
                f"data convert IMAGES {folder}`."
            ) from error
    try:
        with np.load(io.BytesIO(contents), allow_pickle=False) as arrays:
            if set(arrays.files) != _KEYS:
                raise ValueError("unexpected arrays")
            index = dict(arrays)
    except Exception as error:  # a corrupt file fails in many ways
        raise UserError(f"{path} is corrupt. Convert the images again.") from error
    if fault := _fault(index):
        raise UserError(f"{path} has {fault}. Convert the images again.")
    return index


def _fault(index: dict[str, np.ndarray]) -> str:
    """How shards, counts and names differ from what `convert` writes; "" if they don't."""
    shards, counts, names = (index[key] for key in ("shards", "counts", "names"))
    for key, array, kinds in (("shards", shards, "U"), ("counts", counts, "iu")):
        if array.ndim != 1 or array.dtype.kind not in kinds or not array.size:
            return f"{key} of dtype {array.dtype} and shape {list(array.shape)}"
    if len(shards) != len(counts):
        return f"{len(shards)} shards but {len(counts)} counts"
    # A name with a slash would lead out of the folder.
    if wrong := [shard for shard in shards.tolist() if not re.fullmatch(r"\w[\w.-]*", shard)]:
        return f"the shard '{wrong[0]}', which is not a plain file name"
    if counts.min() < 1:
        return f"a shard of {counts.min()} records"
    text, total = names.tobytes(), sum(counts.tolist())
    ends = text[:1] + text[-1:]
    if names.dtype != np.uint8 or b"\0" in ends or b"\0\0" in text or not text:
        return "names that are empty or not bytes"
    if text.count(b"\0") + 1 != total:
        return f"{text.count(bytes(1)) + 1} names for {total} records"
    return ""


def _default_shards(files: Sequence[str]) -> int:
    """The number of shards of about 128 MiB, estimated from the sizes of about 1,000 files."""
    sampled = files[:: max(1, len(files) // 1000)]
    mean_size = sum(os.path.getsize(file) for file in sampled) / len(sampled)
    return max(1, round(mean_size * len(files) / 2**27))


def _write_shard(path: str, files: Sequence[str]) -> None:
    # One record per group, to read single images; image files hardly compress further.
    writer = array_record_module.ArrayRecordWriter(path, "group_size:1,uncompressed")
    for file in files:
        with reading(file, "Remove or replace it"):
            contents = read_image(file)
        writer.write(contents)
    writer.close()


def _write_arrays(path: str, **arrays: np.ndarray) -> None:
    """Writes an uncompressed `.npz` atomically."""
    with _local_file(path) as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


@contextlib.contextmanager
def _local_file(path: str) -> Iterator[Path]:
    """Yields a new local file to write, which becomes the file or object at `path`."""
    if "://" not in path:
        with replacing(Path(path)) as file:
            yield file
        return
    # array_record 0.8 reads gs:// paths but writes local ones only.
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / path.rpartition("/")[2]
        yield file
        tf.io.gfile.copy(str(file), path, overwrite=True)


def _expanded(folder: str) -> str:
    """A local folder as an absolute or relative path without `~`; a bucket's as it is."""
    return str(local_path(folder)) if folder and "://" not in folder else folder


def _join(folder: str, name: str) -> str:
    return folder.rstrip("/") + "/" + name
