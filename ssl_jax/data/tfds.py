"""Datasets prepared by TensorFlow Datasets as ArrayRecord or TFRecord files, read by id."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int
from ml_collections import ConfigDict

from ssl_jax.data.host import HostSource, PerImage, Step, contents_fingerprint
from ssl_jax.data.labels import (
    NO_LABEL,
    Targets,
    checked_names,
    checked_targets,
    of_lists,
    require_in_range,
)
from ssl_jax.data.reader import read_all
from ssl_jax.data.records import ArrayRecords
from ssl_jax.data.tensorflow import tf, tfds
from ssl_jax.data.tfrecords import TFRecords
from ssl_jax.errors import UserError, did_you_mean
from ssl_jax.files import CHECK_PATH, reading

_FIRST = 16  # examples read before all are, to find out whether a split has labels
_READ = 1024  # examples at a time, of which only the labels are kept
_UNREAD = -2  # stands for a label that is inside a record and not yet known


def tfds_sources(config: ConfigDict) -> tuple[TfdsSource, TfdsSource | None]:
    """Opens the splits `config.data.split` and `config.data.test_split` of `config.data.dataset`.

    Args:
      config: the run's config.

    Returns:
      The training source, and the held-out one or None if `config.data.test_split` is empty.

    Raises:
      UserError: an unknown or unprepared dataset, an unknown split or feature, or a view that
        can't be made on the host.
    """
    builder = _builder(config)
    train = TfdsSource(config, builder, "split")
    return train, TfdsSource(config, builder, "test_split") if config.data.test_split else None


class TfdsSource(HostSource):
    """A split of a dataset; ids follow the order of its files.

    ArrayRecord files are read by record number. TFRecord files have no index, so they are walked
    first (`TFRecords`), which also gives the labels. Labels in ArrayRecord files are remembered
    whenever images are read; only the missing ones are read again.
    """

    _lists: tuple[str, tfds.features.Sequence] | None = None  # name and feature of several classes

    def __init__(self, config: ConfigDict, builder: tfds.core.DatasetBuilder, key: str) -> None:
        """Locates the records; reads only those that its fingerprint takes.

        Args:
          config: the run's config.
          builder: the dataset's builder.
          key: the key of `config.data` that names the split, "split" or "test_split".

        Raises:
          UserError: an unknown split or feature, missing files, or a view that can't be made on the
            host.
        """
        name, split = config.data.dataset, config.data[key]
        self._features, label = _features(builder, config)
        instructions = _instructions(builder, split, f"config.data.{key}")
        several = isinstance(label, tfds.features.Sequence)  # images of several classes
        self._label = config.data.label_key if label and not several else ""
        self._examples = _open(builder, instructions, self._label)
        full_name = f"{builder.info.full_name} {split}".encode()
        where = f"config.data.dataset ({name}, split {split})"
        fingerprint = contents_fingerprint(
            config, len(self._examples), full_name, lambda id: self._examples[np.array([id])][0]
        )
        super().__init__(config, where, len(self._examples), fingerprint)
        if not self.num_examples:
            raise UserError(f"{where} has no images. Set config.data.{key} to a split with images.")
        self._image = config.data.image_key
        if several:
            self.labels_from = f"feature '{config.data.label_key}'"
            self._lists, label = (config.data.label_key, label), None
        self._classes = label.num_classes if label else 0
        self._known = np.full(self.num_examples, _UNREAD if label else NO_LABEL, np.int32)
        if isinstance(self._examples, TFRecords) and self._examples.labels is not None:
            ids, labels = np.arange(self.num_examples), self._examples.labels
            require_in_range(labels, ids, self._classes, True, where)
            self._known[:] = labels
        if label is not None and self._is_labeled():
            self.num_classes, self.class_names = self._classes, checked_names(label.names, where)
            self.labels_from = f"feature '{self._label}'"

    def _is_labeled(self) -> bool:
        """Whether any image has a label; TFDS stores -1 in splits such as ImageNet's test."""
        for id in np.flatnonzero(self._known == _UNREAD)[:_FIRST]:
            (handle,), (label,) = self.handles(np.array([id]))
            if self.contents(tf.constant(handle), tf.constant(label))[1] != NO_LABEL:
                return True
        return bool((self._labels != NO_LABEL).any())

    @functools.cached_property
    def _targets(self) -> Targets | None:  # type: ignore[override]  # read on first use
        """Targets of a feature of lists of classes; reads all records, without decoding images."""
        if self._lists is None:
            return None
        key, feature = self._lists
        decoders = {self._image: tfds.decode.SkipDecoding()}
        lists = []
        count = len(self._examples)
        for part in np.array_split(np.arange(count), -(-count // _READ)):
            for record in self._examples[part]:
                example = self._features.deserialize_example_np(record, decoders=decoders)
                lists.append(list(example[key]))  # a list, or an array
        classes, where = feature.feature, self._where
        ids = np.repeat(np.arange(count), [len(row) for row in lists])
        flat = np.array([label for row in lists for label in row], np.int64)
        require_in_range(flat, ids, classes.num_classes, True, where)
        targets = of_lists(lists, classes.num_classes)
        return checked_targets(targets, classes.names, len(lists), where)

    @functools.cached_property
    def _labels(self) -> Int[np.ndarray, " N"]:
        """Class of each image; reads the records whose label isn't known, without decoding them."""
        unread = np.flatnonzero(self._known == _UNREAD).astype(np.int32)
        parts = np.array_split(unread, -(-len(unread) // _READ) or 1)
        steps = ((0, part) for part in parts if len(part))
        for ids, labels, _ in read_all(self._read(steps, self._nothing), self._timeout_s):
            self._known[ids] = labels
        return self._known

    def handles(self, ids: Int[np.ndarray, " n"]) -> tuple[Sequence[bytes], Int[np.ndarray, " n"]]:
        """Serialized examples; the labels are inside them and not yet known."""
        return self._examples[ids], np.full(len(ids), NO_LABEL, np.int32)

    def contents(self, handle: tf.Tensor, label: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Parses a serialized example into the image's file and its label."""
        decoders = {self._image: tfds.decode.SkipDecoding()}
        example = self._features.deserialize_example(handle, decoders=decoders)
        if self._label:
            label = tf.cast(example[self._label], tf.int32)
        return example[self._image], label

    def _read(
        self, steps: Iterator[Step], make: PerImage
    ) -> Iterator[tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"], tuple[np.ndarray, ...]]]:
        """Also checks the labels, which are not known before the examples are read."""
        for ids, labels, made in super()._read(steps, make):
            if self._label:
                require_in_range(labels, ids, self._classes, True, self._where)
                own = self._source_id[ids] == ids  # or it is the label of a replacement
                self._known[ids[own]] = labels[own]
            yield ids, labels, made

    def name(self, id: int) -> str:
        """The example's number and split."""
        return f"Example {id} of {self._where}"


def _builder(config: ConfigDict) -> tfds.core.DatasetBuilder:
    name, folder = config.data.dataset, os.path.expanduser(config.data.dir) or None
    if not name:
        raise UserError(
            "config.data.dataset is empty. Set it to a TFDS dataset, such as imagenet2012."
        )
    if re.match(r"[^:]*:[^\d*]", name):  # a colon before a digit or * starts a version
        raise UserError(
            f"config.data.dataset is '{name}', a community dataset, which TFDS would download. "
            "Set it to a dataset that is already prepared, and config.data.dir to the folder that "
            "contains it."
        )
    try:
        with reading(folder or "TFDS's folder", CHECK_PATH, tf.errors.OpError):
            builder = tfds.builder(name, data_dir=folder, try_gcs=False)
            prepared = builder.is_prepared()
    except (tfds.core.DatasetNotFoundError, ValueError) as error:
        raise UserError(
            f"config.data.dataset is '{name}', which is not in TFDS"
            + (f" or {folder}" if folder else "")
            + f".{did_you_mean(name, tfds.list_builders(with_community_datasets=False))}"
        ) from error
    if not prepared:
        raise UserError(
            f"{builder.info.full_name} is not prepared in {builder.data_dir}. Run `tfds build "
            f"{name}` once, or set config.data.dir to the folder that contains it."
        )
    return builder


def _features(
    builder: tfds.core.DatasetBuilder, config: ConfigDict
) -> tuple[tfds.features.FeaturesDict, tfds.features.ClassLabel | tfds.features.Sequence | None]:
    """The features to read, and the label's feature or None."""
    have, image, label = builder.info.features, config.data.image_key, config.data.label_key
    if image not in have or not isinstance(have[image], tfds.features.Image):
        images = [key for key, value in have.items() if isinstance(value, tfds.features.Image)]
        raise UserError(
            f"config.data.image_key is '{image}', which is not an image feature of {builder.name}."
            + (did_you_mean(image, images) if images else " It has no image features.")
        )
    if not label:
        return tfds.features.FeaturesDict({image: have[image]}), None
    labels = [key for key, value in have.items() if _is_label(value)]
    if label not in labels:
        raise UserError(
            f"config.data.label_key is '{label}', which is not a class label of {builder.name}."
            + (did_you_mean(label, labels) if labels else " It has no class labels; set it to ''.")
        )
    return tfds.features.FeaturesDict({key: have[key] for key in (image, label)}), have[label]


def _is_label(feature: Any) -> bool:
    """Whether a feature is a class, or a list of classes."""
    if isinstance(feature, tfds.features.Sequence):
        feature = feature.feature
    return isinstance(feature, tfds.features.ClassLabel)


def _instructions(builder: tfds.core.DatasetBuilder, split: str, key: str) -> Sequence[Any]:
    """The files and record ranges of a split, or of a slice such as train[:10%]."""
    try:
        return builder.info.splits[split].file_instructions
    except (KeyError, ValueError) as error:
        raise UserError(
            f"{key} is '{split}', which is not a split of {builder.name}."
            f"{did_you_mean(split, builder.info.splits)}"
        ) from error


def _open(
    builder: tfds.core.DatasetBuilder, instructions: Sequence[Any], label_key: str
) -> ArrayRecords | TFRecords:
    """The serialized examples of a split."""
    if builder.info.file_format == tfds.core.FileFormat.ARRAY_RECORD:
        return ArrayRecords(
            [(os.fspath(i.filename), i.skip, i.skip + i.take) for i in instructions]
        )
    if builder.info.file_format == tfds.core.FileFormat.TFRECORD:
        return TFRecords(instructions, label_key)
    raise UserError(
        f"{builder.info.full_name} is prepared as {builder.info.file_format.value}. "
        "Rebuild it with --file_format=array_record."
    )
