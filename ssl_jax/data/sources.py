"""Where images and labels come from.

Every source answers by sample id, so the order of a run is the index's business alone. An array
source is held on the devices whole and needs neither a host pipeline nor TensorFlow; a host source
decodes and crops, and hands over uint8 views.
"""

import queue
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from jaxtyping import Int, UInt8
from ml_collections import ConfigDict
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from ssl_jax.config import did_you_mean
from ssl_jax.data.arrays import ArraySource
from ssl_jax.data.folder import folder_sources
from ssl_jax.data.packed import packed_sources
from ssl_jax.data.records import records_sources
from ssl_jax.data.tfds import tfds_sources
from ssl_jax.errors import UserError


class Source(Protocol):
    """A split of a data set, ids 0 … N-1.

    Attributes:
      num_examples: N.
      num_classes: how many classes the labels tell apart; 0 without labels.
      labels: class of each id, int32 [N]; None where there are none. Those of records on disk are
        read when they are first asked for.
      class_names: of the labels.
      bad: names of the images that could not be read so far and were replaced.
      fingerprint: changes when the images' order, number or labels do; a run continues on the
        same data only.
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
        """Arrays to place whole on every device: {"image": uint8 [N, H, W, 3]}, or {}."""
        ...

    def batches(self, steps: Iterator[tuple[int, np.ndarray]]) -> Iterator[dict[str, Any]]:
        """This process's batches, in order.

        Args:
          steps: pairs of a step and the ids, int32 [n], that this process needs for it.

        Yields:
          {"id": int32 [n]}, with "label" int32 [n] where there are labels and, from a host source,
          "views": a tuple of uint8 [n, H, W, 3] in the order of `config.flat_views`.
        """
        ...

    def eval_transform(self, ids: Sequence[int] | np.ndarray) -> UInt8[np.ndarray, "n h w 3"]:
        """The images of some ids without augmentation, prepared as for evaluation."""
        ...


class Subset:
    """Some of a source's images, under ids of their own, 0 … n-1."""

    def __init__(self, source: Source, ids: Int[np.ndarray, " n"]) -> None:
        self._source, self._ids = source, np.asarray(ids, np.int32)
        self.num_examples = len(ids)
        self.num_classes, self.class_names = source.num_classes, source.class_names
        self.bad = source.bad
        checksum = zlib.crc32(self._ids.tobytes())
        self.fingerprint = f"{source.fingerprint}; {len(ids)} of them, checksum {checksum:08x}"

    @property
    def labels(self) -> np.ndarray | None:
        """Of these images."""
        labels = self._source.labels
        return None if labels is None else labels[self._ids]

    def device_data(self) -> dict[str, np.ndarray]:
        """The images alone, where the source holds its images on the devices."""
        return {name: array[self._ids] for name, array in self._source.device_data().items()}

    def batches(self, steps: Iterator[tuple[int, np.ndarray]]) -> Iterator[dict[str, Any]]:
        """The source's batches of these images, renumbered."""
        asked: queue.SimpleQueue[np.ndarray] = queue.SimpleQueue()

        def in_source() -> Iterator[tuple[int, np.ndarray]]:
            for step, ids in steps:
                asked.put(ids)
                yield step, self._ids[ids]

        for batch in self._source.batches(in_source()):
            yield {**batch, "id": asked.get()}

    def eval_transform(self, ids: Sequence[int] | np.ndarray) -> UInt8[np.ndarray, "n h w 3"]:
        """As the source's."""
        return self._source.eval_transform(self._ids[np.asarray(ids)])


def stratified_subset(
    labels: Int[np.ndarray, " n"], share: float, seed: int = 0
) -> Int[np.ndarray, " kept"]:
    """A share of the images with as many of each class, at least one.

    Args:
      labels: of all images.
      share: of them, above 0 and at most 1; of a class that has too few, all.
      seed: of the draw. A larger share of the same seed holds the smaller.

    Returns:
      Ids, ascending.
    """
    classes = np.unique(labels)
    each = max(1, round(share * len(labels) / len(classes)))
    generators = (np.random.default_rng([seed, int(c)]) for c in classes)
    drawn = [
        generator.permutation(np.flatnonzero(labels == c))[:each]
        for c, generator in zip(classes, generators, strict=True)
    ]
    return np.sort(np.concatenate(drawn)).astype(np.int32)


def held_out_ids(
    labels: Int[np.ndarray, " n"] | None, count: int, share: float
) -> Int[np.ndarray, " held"]:
    """A share of each class's images, always the same ones; no class is held out whole.

    Args:
      labels: of all images, None where there are none: all count as one class.
      count: of the images.
      share: of them.

    Returns:
      Ids, ascending.
    """
    classes = np.zeros(count, np.int32) if labels is None else labels
    drawn = []
    for label in np.unique(classes):
        members = np.flatnonzero(classes == label)
        held = min(round(share * len(members)), len(members) - 1)
        drawn.append(np.random.default_rng([0, abs(int(label))]).permutation(members)[:held])
    return np.sort(np.concatenate(drawn)).astype(np.int32)


def digits(config: ConfigDict) -> tuple[Source, Source]:
    """scikit-learn's 1,797 scans of handwritten digits, 8×8, split by class with a fixed seed.

    The split does not depend on `config.seed`, so that runs with different seeds are compared on
    the same held-out images.
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
    """The training and the held-out split that a config names.

    Args:
      config: of the run.

    Returns:
      The training source (of `config.data.subset`, that share of it), and the one to evaluate on,
      None where there is none.

    Raises:
      UserError: an unknown name, a missing or empty folder or file.
    """
    train, test = _named_sources(config)
    share = config.data.validation
    if share:
        held = held_out_ids(train.labels, train.num_examples, share)
        rest = np.setdiff1d(np.arange(train.num_examples), held)
        if not len(held):
            raise UserError(
                f"config.data.validation={share:g} of {train.num_examples} training images holds "
                "none out: take a larger share."
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
    makers = {
        "digits": digits,
        "folder": folder_sources,
        "packed": packed_sources,
        "records": records_sources,
        "tfds": tfds_sources,
    }
    name = config.data.name
    if name not in makers:
        raise UserError(f"config.data.name is '{name}'.{did_you_mean(name, makers)}")
    return makers[name](config)
