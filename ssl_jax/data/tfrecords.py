"""TFRecord files read by record number, from a local disk or a bucket.

A TFRecord file has no index, so all of it is walked once, in one pass with one open: over the
records' headers, and over the names of each record's features up to the label. On a local disk
what lies between, above all the images, is skipped; TensorFlow reads a bucket in blocks of 1 MiB.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from ssl_jax.data.reader import in_parallel
from ssl_jax.data.tensorflow import tf
from ssl_jax.errors import UserError
from ssl_jax.files import reading

# A TFRecord: 8 bytes of payload length and 4 of its checksum, the payload, and 4 of its checksum.
_BEFORE, _AFTER = 12, 4
_BLOCK = 4096  # bytes of one read of a walk: a page, so that a local disk's images are skipped
_READERS = 64  # parallel reads, which hide the latency of a disk or a bucket
_COMPLETE = "Check that the file exists and is complete"
# Field numbers of tf.train.Example, from the outside in.
_FEATURES, _ENTRY, _KEY, _VALUE, _INT64_LIST, _PACKED = 1, 1, 1, 2, 3, 1


class TFRecords:
    """The records of several TFRecord files, numbered across the files, for random access.

    Attributes:
      labels: the label in each record, int64 [n]; None without a label's key.
    """

    def __init__(self, instructions: Sequence[Any], label_key: str = "") -> None:
        """Walks each file once, to find where its records start and which labels they have.

        Args:
          instructions: TFDS's file instructions: files, and ranges of their records.
          label_key: the name of the feature that is the label; "": labels are not read.

        Raises:
          UserError: a file can't be read or is incomplete, or a record has no such label.
        """
        self._paths = [os.fspath(instruction.filename) for instruction in instructions]

        def places(instruction: Any) -> Int[np.ndarray, "records 3"]:
            with _Walk(os.fspath(instruction.filename)) as walk:
                return walk.places(instruction.skip, instruction.take, label_key.encode())

        found = in_parallel(places, instructions, _READERS)
        self._file = np.repeat(np.arange(len(found)), [len(place) for place in found])
        self._offset, self._length, labels = np.concatenate(found).T
        self.labels = labels if label_key else None

    def __len__(self) -> int:
        return len(self._file)

    def __getitem__(self, numbers: Int[np.ndarray, " n"]) -> list[bytes]:
        return in_parallel(self._one, numbers.tolist(), _READERS)

    def _one(self, number: int) -> bytes:
        path = self._paths[self._file[number]]
        return _read_range(path, int(self._offset[number]), int(self._length[number]))


class _Walk:
    """An open file that is read forward, in blocks."""

    def __init__(self, path: str) -> None:
        self._path, self._start, self._block = path, 0, b""
        with reading(path, _COMPLETE, tf.errors.OpError):
            if "://" in path:
                self._file = tf.io.gfile.GFile(path, "rb")
                self._size = tf.io.gfile.stat(path).length
            else:
                self._file = open(path, "rb", buffering=0)  # noqa: SIM115  # closed by __exit__
                self._size = os.fstat(self._file.fileno()).st_size

    def __enter__(self) -> _Walk:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def places(self, skip: int, take: int, label_key: bytes) -> Int[np.ndarray, "records 3"]:
        """Offsets and lengths in bytes of records' payloads, and their labels or 0."""
        places, position = [], 0
        for number in range(skip + take):
            length = int.from_bytes(self._read(position, position + 8), "little")
            start = position + _BEFORE
            if start + length + _AFTER > self._size:  # or a read would allocate it
                raise UserError(
                    f"{self._path} has a record of {length:,} bytes at {position:,}, beyond its "
                    "end. Check that the file is complete."
                )
            if number >= skip:
                label = self._label(start, start + length, label_key) if label_key else 0
                places.append((start, length, label))
            position = start + length + _AFTER
        return np.array(places, np.int64).reshape(-1, 3)

    def _label(self, start: int, stop: int, key: bytes) -> int:
        """The label in a serialized tf.train.Example."""
        for features in self._fields(start, stop, _FEATURES):
            for entry in self._fields(*features, _ENTRY):
                name = next(self._fields(*entry, _KEY), (0, 0))
                if name[1] - name[0] == len(key) and self._read(*name) == key:
                    for value in self._fields(name[1], entry[1], _VALUE):
                        for integers in self._fields(*value, _INT64_LIST):
                            for first, end in self._fields(*integers, _PACKED):
                                label, used = _varint(self._read(first, min(end, first + 10)))
                                if used == end - first:
                                    return label - 2**64 * (label >> 63)
        raise UserError(
            f"{self._path} has no label '{key.decode()}' in the record at {start - _BEFORE:,}, as "
            f"TFDS writes it. {_COMPLETE}, or rebuild it with `tfds build`."
        )

    def _fields(self, start: int, stop: int, number: int) -> Iterator[tuple[int, int]]:
        """Starts and ends of the fields with a number in a message that has only such fields.

        Stops at anything else, so that no label is found there.
        """
        while start < stop:
            head = self._read(start, min(start + 11, stop))  # a tag, and at most 10 bytes of length
            length, used = _varint(head[1:])
            start += 1 + used
            if head[0] != number << 3 | 2 or not used or start + length > stop:  # 2: with a length
                return
            yield start, start + length
            start += length

    def _read(self, start: int, stop: int) -> bytes:
        """The bytes from `start` to `stop`, of a file that has them."""
        first = start - self._start
        if first < 0 or stop - self._start > len(self._block):
            with reading(self._path, _COMPLETE, tf.errors.OpError):
                self._file.seek(start)
                self._block = self._file.read(max(stop - start, _BLOCK))
            if len(self._block) < stop - start:
                raise UserError(f"Cannot read {self._path} (it is too short). {_COMPLETE}.")
            self._start, first = start, 0
        return self._block[first : stop - self._start]


def _varint(data: bytes) -> tuple[int, int]:
    """A number in protobuf's encoding and how many bytes it takes; 0 bytes if it doesn't end."""
    value = 0
    for i, byte in enumerate(data):
        value |= (byte & 127) << 7 * i
        if byte < 128:
            return value & 2**64 - 1, i + 1  # as protobuf, which drops the bits beyond
    return 0, 0


def _read_range(path: str, offset: int, length: int) -> bytes:
    """Reads a range of bytes from a local file or a bucket; thread-safe.

    Raises:
      UserError: the file can't be read or is too short.
    """
    with reading(path, _COMPLETE, tf.errors.OpError):
        if "://" in path:
            with tf.io.gfile.GFile(path, "rb") as handle:
                handle.seek(offset)
                data = handle.read(length)
        else:  # ten times faster than TensorFlow's
            descriptor = os.open(path, os.O_RDONLY)
            try:
                data = os.pread(descriptor, length, offset)
            finally:
                os.close(descriptor)
    if len(data) < length:
        raise UserError(f"Cannot read {path} (it is too short). {_COMPLETE}.")
    return data
