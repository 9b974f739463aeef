"""Data sets that TensorFlow Datasets has prepared, as ArrayRecord or TFRecord, read by id."""

import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from jaxtyping import Int
from ml_collections import ConfigDict

from ssl_jax.config import did_you_mean
from ssl_jax.data.host import HostSource
from ssl_jax.data.records import AFTER, BEFORE, Ranges, read_range
from ssl_jax.data.views import tf
from ssl_jax.errors import UserError

try:
    import tensorflow_datasets as tfds
except ImportError as error:
    raise UserError(
        "Reading a data set of TFDS needs tensorflow-datasets, which is not installed: "
        "install the extra 'data', pip install -c constraints.txt -e '.[data]' in a clone."
    ) from error

# Of a split, its serialised examples by number.
_Examples = Callable[[Int[np.ndarray, " n"]], Sequence[bytes]]
_READERS = 16  # files whose records are looked for at a time


def tfds_sources(config: ConfigDict) -> tuple["TfdsSource", "TfdsSource | None"]:
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
        self._examples, count = _open(builder, instructions)
        described = f"{builder.info.full_name} {split}".encode()
        where = f"config.data.dataset ({name}, split {split})"
        super().__init__(config, where, count, described)
        self._image, self._label = config.data.image_key, config.data.label_key if label else ""
        self.num_classes = label.num_classes if label else 0
        self.class_names = tuple(label.names) if label else ()

    def handles(self, ids: Int[np.ndarray, " n"]) -> tuple[Sequence[bytes], Int[np.ndarray, " n"]]:
        """The serialised examples; their labels are in them."""
        return self._examples(ids), np.full(len(ids), -1, np.int32)

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


def _tfrecords(instructions: Sequence[Any]) -> Ranges:
    """The records of TFRecord files, once it is known where they are.

    Args:
      instructions: TFDS's: files, and which of their records.
    """
    with ThreadPoolExecutor(_READERS) as pool:
        places = list(pool.map(_places, instructions))
    file = np.repeat(np.arange(len(places)), [len(place) for place in places])
    return Ranges(
        [os.fspath(part.filename) for part in instructions], file, *np.concatenate(places).T
    )


def _places(instruction: Any) -> Int[np.ndarray, "records 2"]:
    """Where the payloads of a TFRecord file's records start, and their lengths, in bytes."""
    path, places, position = os.fspath(instruction.filename), [], 0
    for _ in range(instruction.skip + instruction.take):
        length = int.from_bytes(read_range(path, position, 8), "little")
        places.append((position + BEFORE, length))
        position += BEFORE + length + AFTER
    return np.array(places[instruction.skip :], np.int64).reshape(-1, 2)


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


def _open(builder: tfds.core.DatasetBuilder, instructions: Sequence[Any]) -> tuple[_Examples, int]:
    """The examples of a split, and how many there are."""
    if builder.info.file_format == tfds.core.FileFormat.ARRAY_RECORD:
        # Only here: it is not built for every platform.
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        arrays = ArrayRecordDataSource(instructions)
        return lambda numbers: arrays.__getitems__(numbers.tolist()), len(arrays)
    if builder.info.file_format == tfds.core.FileFormat.TFRECORD:
        records = _tfrecords(instructions)
        return records.__getitem__, len(records)
    raise UserError(
        f"{builder.info.full_name} is prepared as {builder.info.file_format.value}: build it anew "
        "with --file_format=array_record."
    )
