"""Data sets that TensorFlow Datasets has prepared, as ArrayRecord or TFRecord, read by id."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from jaxtyping import Int
from ml_collections import ConfigDict

from ssl_jax.config import did_you_mean
from ssl_jax.data.host import HostSource
from ssl_jax.data.records import ArrayRecords
from ssl_jax.data.tensorflow import tf, tfds
from ssl_jax.errors import UserError

# A TFRecord: 8 bytes of payload length and 4 of its checksum, the payload, and 4 of its checksum.
_BEFORE, _AFTER = 12, 4
_READERS = 16  # parallel reads, which hide the latency of a disk or a bucket


def tfds_sources(config: ConfigDict) -> tuple[TfdsSource, TfdsSource | None]:
    """The splits `config.data.split` and `config.data.test_split` of `config.data.dataset`.

    Args:
      config: of the run.

    Returns:
      The training source and the held-out one, None where `config.data.test_split` is empty.

    Raises:
      UserError: a data set that is unknown or not prepared, a split or feature that it hasn't, or a
        view that can't be made on the host.
    """
    builder = _builder(config)
    train = TfdsSource(config, builder, "split")
    return train, TfdsSource(config, builder, "test_split") if config.data.test_split else None


class TfdsSource(HostSource):
    """A split, ids in the order of its files.

    Of ArrayRecord files the number of a record is enough to read it; of TFRecord files the records'
    places are read first, which touches their headers alone.
    """

    def __init__(self, config: ConfigDict, builder: tfds.core.DatasetBuilder, key: str) -> None:
        """Opens the files; no image is read.

        Args:
          config: of the run.
          builder: of the data set.
          key: which of `config.data` names the split: "split" or "test_split".

        Raises:
          UserError: no such split or feature, missing files, or a view that can't be made on the
            host.
        """
        name, split = config.data.dataset, config.data[key]
        self._features, label = _features(builder, config)
        instructions = _instructions(builder, split, f"config.data.{key}")
        self._examples = _open(builder, instructions)
        described = f"{builder.info.full_name} {split}".encode()
        where = f"config.data.dataset ({name}, split {split})"
        super().__init__(config, where, len(self._examples), described)
        self._image, self._label = config.data.image_key, config.data.label_key if label else ""
        self.num_classes = label.num_classes if label else 0
        self.class_names = tuple(label.names) if label else ()

    def handles(self, ids: Int[np.ndarray, " n"]) -> tuple[Sequence[bytes], Int[np.ndarray, " n"]]:
        """The serialised examples; their labels are in them."""
        return self._examples[ids], np.full(len(ids), -1, np.int32)

    def contents(self, handle: tf.Tensor, label: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """The image's file and its label out of a serialised example."""
        decoders = {self._image: tfds.decode.SkipDecoding()}
        example = self._features.deserialize_example(handle, decoders=decoders)
        if self._label:
            label = tf.cast(example[self._label], tf.int32)
        return example[self._image], label

    def name(self, id: int) -> str:
        """The number of the example in the split."""
        return f"Example {id} of {self._where}"


class _TFRecords:
    """The records of several TFRecord files, numbered across the files, for random access."""

    def __init__(self, instructions: Sequence[Any]) -> None:
        """Reads the header of each record, to find out where it starts.

        Args:
          instructions: of TFDS: the files and the range of their records to use.
        """
        self._paths = [os.fspath(instruction.filename) for instruction in instructions]
        self._pool = ThreadPoolExecutor(_READERS, thread_name_prefix="tfrecord")
        places = list(self._pool.map(_places, instructions))
        self._file = np.repeat(np.arange(len(places)), [len(place) for place in places])
        self._offset, self._length = np.concatenate(places).T

    def __len__(self) -> int:
        return len(self._file)

    def __getitem__(self, numbers: Int[np.ndarray, " n"]) -> list[bytes]:
        return list(self._pool.map(self._one, numbers))

    def _one(self, number: int) -> bytes:
        path = self._paths[self._file[number]]
        return _read_range(path, int(self._offset[number]), int(self._length[number]))


def _places(instruction: Any) -> Int[np.ndarray, "records 2"]:
    """Offsets and lengths, in bytes, of the payloads in a TFRecord file."""
    path, places, position = os.fspath(instruction.filename), [], 0
    for _ in range(instruction.skip + instruction.take):
        length = int.from_bytes(_read_range(path, position, 8), "little")
        places.append((position + _BEFORE, length))
        position += _BEFORE + length + _AFTER
    return np.array(places[instruction.skip :], np.int64).reshape(-1, 2)


def _read_range(path: str, offset: int, length: int) -> bytes:
    """Some bytes of a local file or of one in a bucket; thread-safe.

    Raises:
      UserError: the file can't be read or is too short.
    """
    reason = "it is too short"
    data = b""
    try:
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
    except OSError as error:
        reason = str(error.strerror)
    except tf.errors.OpError as error:
        reason = error.message
    if len(data) < length:
        raise UserError(
            f"Cannot read {path} ({reason}). Check that the file exists and is complete."
        )
    return data


def _builder(config: ConfigDict) -> tfds.core.DatasetBuilder:
    name, folder = config.data.dataset, config.data.dir or None
    if not name:
        raise UserError("config.data.dataset is empty: name one of TFDS, such as imagenet2012.")
    if re.match(r"[^:]*:[^\d*]", name):  # what follows a colon otherwise is a version
        raise UserError(
            f"config.data.dataset is '{name}', one of a community's, which TFDS would fetch by "
            "itself: give the name of one that is prepared here, and set config.data.dir to the "
            "folder that holds it."
        )
    try:
        builder = tfds.builder(name, data_dir=folder, try_gcs=False)
    except (tfds.core.DatasetNotFoundError, ValueError) as error:
        raise UserError(
            f"config.data.dataset is '{name}', which TFDS doesn't know"
            + (f" and {folder} doesn't hold" if folder else "")
            + f".{did_you_mean(name, tfds.list_builders(with_community_datasets=False))}"
        ) from error
    if not builder.is_prepared():
        raise UserError(
            f"{builder.info.full_name} is not prepared in {builder.data_dir}: run `tfds build "
            f"{name}` once, or set config.data.dir to the folder that holds it."
        )
    return builder


def _features(
    builder: tfds.core.DatasetBuilder, config: ConfigDict
) -> tuple[tfds.features.FeaturesDict, tfds.features.ClassLabel | None]:
    """The features that are read, and that of the label, None where there is none."""
    have, image, label = builder.info.features, config.data.image_key, config.data.label_key
    if image not in have or not isinstance(have[image], tfds.features.Image):
        images = [key for key, value in have.items() if isinstance(value, tfds.features.Image)]
        raise UserError(
            f"config.data.image_key is '{image}', which is no image feature of {builder.name}."
            + (did_you_mean(image, images) if images else " It has none.")
        )
    if not label:
        return tfds.features.FeaturesDict({image: have[image]}), None
    if label not in have or not isinstance(have[label], tfds.features.ClassLabel):
        labels = [k for k, value in have.items() if isinstance(value, tfds.features.ClassLabel)]
        raise UserError(
            f"config.data.label_key is '{label}', which is no class label of {builder.name}."
            + (did_you_mean(label, labels) if labels else " Set it to '', for there is none.")
        )
    return tfds.features.FeaturesDict({key: have[key] for key in (image, label)}), have[label]


def _instructions(builder: tfds.core.DatasetBuilder, split: str, key: str) -> Sequence[Any]:
    """Which records of which files a split is; slices such as train[:10%] included."""
    try:
        return builder.info.splits[split].file_instructions
    except (KeyError, ValueError) as error:
        raise UserError(
            f"{key} is '{split}', which {builder.name} doesn't have."
            f"{did_you_mean(split, builder.info.splits)}"
        ) from error


def _open(
    builder: tfds.core.DatasetBuilder, instructions: Sequence[Any]
) -> ArrayRecords | _TFRecords:
    """The serialized examples of a split."""
    if builder.info.file_format == tfds.core.FileFormat.ARRAY_RECORD:
        return ArrayRecords(
            [(os.fspath(i.filename), i.skip, i.skip + i.take) for i in instructions]
        )
    if builder.info.file_format == tfds.core.FileFormat.TFRECORD:
        return _TFRecords(instructions)
    raise UserError(
        f"{builder.info.full_name} is prepared as {builder.info.file_format.value}. "
        "Rebuild it with --file_format=array_record."
    )
