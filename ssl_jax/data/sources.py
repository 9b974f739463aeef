"""Sources of images and labels.

Every source is read by sample id; only `data.index` determines a run's order. An array source is
held whole on the devices and needs neither a host pipeline nor TensorFlow; a host source decodes
and crops image files and yields uint8 views.
"""

import queue
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from jaxtyping import Int, UInt8
from ml_collections import ConfigDict
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from ssl_jax.data.arrays import ArraySource
from ssl_jax.data.folder import FolderSource
from ssl_jax.data.listing import some
from ssl_jax.data.packed import packed_source
from ssl_jax.data.records import RecordsSource
from ssl_jax.data.tfds import tfds_sources
from ssl_jax.errors import UserError, require_choice


class Source(Protocol):
    """A split of a data set with ids 0 … N-1.

    Attributes:
      num_examples: number of images, N.
      num_classes: number of classes; 0 without labels.
      labels: class of each id, int32 [N]; None without labels. TFDS labels are read on first use.
      class_names: names of the classes, in the order of the labels.
      bad: names of the undecodable images found so far and replaced.
      fingerprint: changes with the order, number or labels of the images; a run resumes only with
        the same fingerprint.
    """

    num_examples: int
    num_classes: int
    class_names: tuple[str, ...]
    bad: list[str]
    fingerprint: str

    @property
    def labels(self) -> np.ndarray | None:
        """See the class."""
        ...

    def device_data(self) -> dict[str, np.ndarray]:
        """Arrays to copy whole to every device: {"image": uint8 [N, H, W, 3]}, or {}."""
        ...

    def batches(self, steps: Iterator[tuple[int, np.ndarray]]) -> Iterator[dict[str, Any]]:
        """This process's batches, in order.

        Args:
          steps: pairs of a step and the ids, int32 [n], that this process needs for it.

        Yields:
          "id" int32 [n]; "label" int32 [n] if there are labels; from a host source also "views", a
          tuple of uint8 [n, H, W, 3] in the order of `config.flat_views`.
        """
        ...

    def eval_transform(self, ids: Sequence[int] | np.ndarray) -> UInt8[np.ndarray, "n h w 3"]:
        """Unaugmented images for evaluation."""
        ...


class Subset:
    """A subset of a source's images, renumbered 0 … n-1."""

    def __init__(self, source: Source, ids: Int[np.ndarray, " n"]) -> None:
        self._source, self._ids = source, np.asarray(ids, np.int32)
        self.num_examples = len(ids)
        self.num_classes, self.class_names = source.num_classes, source.class_names
        self.bad = source.bad
        checksum = zlib.crc32(self._ids.tobytes())
        self.fingerprint = f"{source.fingerprint}; subset of {len(ids)}, checksum {checksum:08x}"

    @property
    def labels(self) -> np.ndarray | None:
        """Class of each image of the subset; None without labels."""
        labels = self._source.labels
        return None if labels is None else labels[self._ids]

    def device_data(self) -> dict[str, np.ndarray]:
        """The subset's images, if the source keeps its images on the devices."""
        return {name: array[self._ids] for name, array in self._source.device_data().items()}

    def batches(self, steps: Iterator[tuple[int, np.ndarray]]) -> Iterator[dict[str, Any]]:
        """The source's batches of these images, with the subset's ids."""
        pending: queue.SimpleQueue[np.ndarray] = queue.SimpleQueue()

        def in_source() -> Iterator[tuple[int, np.ndarray]]:
            for step, ids in steps:
                pending.put(ids)
                yield step, self._ids[ids]

        for batch in self._source.batches(in_source()):
            yield {**batch, "id": pending.get()}

    def eval_transform(self, ids: Sequence[int] | np.ndarray) -> UInt8[np.ndarray, "n h w 3"]:
        """Unaugmented images for evaluation, as the source's."""
        return self._source.eval_transform(self._ids[np.asarray(ids)])


def stratified_subset(
    labels: Int[np.ndarray, " n"], share: float, seed: int = 0
) -> Int[np.ndarray, " kept"]:
    """Samples a share of the images, with the same number of each class and at least one.

    Args:
      labels: class of each image.
      share: share of all images, above 0 and at most 1; classes with too few images are used whole.
      seed: sampling seed. With the same seed, a larger share contains the smaller one.

    Returns:
      Ids, ascending.
    """
    classes = np.unique(labels)
    each = max(1, round(share * len(labels) / len(classes)))
    generators = (np.random.default_rng([seed, int(c)]) for c in classes)
    ids = [
        generator.permutation(np.flatnonzero(labels == c))[:each]
        for c, generator in zip(classes, generators, strict=True)
    ]
    return np.sort(np.concatenate(ids)).astype(np.int32)


def held_out_ids(
    labels: Int[np.ndarray, " n"] | None, count: int, share: float
) -> Int[np.ndarray, " held"]:
    """Samples a fixed share of each class, but never a whole class.

    Args:
      labels: class of each image; None counts as a single class.
      count: number of images.
      share: share of each class to hold out.

    Returns:
      Ids, ascending.
    """
    classes = np.zeros(count, np.int32) if labels is None else labels
    ids = []
    for label in np.unique(classes):
        members = np.flatnonzero(classes == label)
        held = min(round(share * len(members)), len(members) - 1)
        ids.append(np.random.default_rng([0, abs(int(label))]).permutation(members)[:held])
    return np.sort(np.concatenate(ids)).astype(np.int32)


def digits(config: ConfigDict) -> tuple[Source, Source]:
    """scikit-learn's 1,797 scans of handwritten digits, 8×8, in a fixed stratified split.

    The split doesn't depend on `config.seed`: runs with different seeds are compared on the same
    held-out images.
    """
    data = load_digits()
    gray = np.round(data.images * (255 / 16)).astype(np.uint8)
    images = np.repeat(gray[..., None], 3, axis=-1)
    train, test = train_test_split(
        np.arange(len(images)),
        test_size=config.data.test_fraction,
        random_state=0,
        stratify=data.target,
    )
    names = [str(name) for name in data.target_names]
    return (
        ArraySource(images[train], data.target[train], names),
        ArraySource(images[test], data.target[test], names),
    )


def make_sources(config: ConfigDict) -> tuple[Source, Source | None]:
    """Opens the training and held-out splits of a config.

    Args:
      config: the run's config.

    Returns:
      The training source, reduced to the share `config.data.subset`, and the source to evaluate on
      or None.

    Raises:
      UserError: an unknown name, or a missing or empty folder or file.
    """
    train, test = _named_sources(config)
    share = config.data.validation
    if share:
        held = held_out_ids(train.labels, train.num_examples, share)
        rest = np.setdiff1d(np.arange(train.num_examples), held)
        if not len(held):
            raise UserError(
                f"config.data.validation={share:g} holds out none of {train.num_examples} training "
                "images. Increase it."
            )
        train, test = Subset(train, rest), Subset(train, held)
    share, seed = config.data.subset, config.data.subset_seed
    if share == 1:
        return train, test
    if train.labels is None:
        order = np.random.default_rng(seed).permutation(train.num_examples)
        kept = np.sort(order[: max(1, round(share * train.num_examples))])
        return Subset(train, kept), test
    return Subset(train, stratified_subset(train.labels, share, seed)), test


def _named_sources(config: ConfigDict) -> tuple[Source, Source | None]:
    openers: dict[str, Callable[[ConfigDict, str], Source]] = {
        "folder": FolderSource,
        "packed": packed_source,
        "records": RecordsSource,
    }
    makers = {"digits": digits, "tfds": tfds_sources}
    name = config.data.name
    require_choice("config.data.name", name, [*openers, *makers])
    return _dir_sources(config, openers[name]) if name in openers else makers[name](config)


def _dir_sources(
    config: ConfigDict, open_source: Callable[[ConfigDict, str], Source]
) -> tuple[Source, Source | None]:
    """The sources in `config.data.dir` and `config.data.test_dir`; None if the latter is empty."""
    train = open_source(config, "dir")
    if not config.data.test_dir:
        return train, None
    test = open_source(config, "test_dir")
    differing = sorted(set(train.class_names) ^ set(test.class_names))
    # An encoder trained without labels may be evaluated on labeled images.
    if differing and train.num_classes:
        raise UserError(
            f"Only one of config.data.dir ({config.data.dir}) and config.data.test_dir "
            f"({config.data.test_dir}) has the class {some(differing)}. Use two splits of one data "
            "set."
        )
    return train, test
