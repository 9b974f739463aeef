"""Where images and labels come from.

Every source answers by sample id, so the order of a run is the index's business alone. An array
source is held on the devices whole and needs neither a host pipeline nor TensorFlow; a host source
decodes and crops, and hands over uint8 views.
"""

import zlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from jaxtyping import Int, UInt8
from ml_collections import ConfigDict

from ssl_jax.config import did_you_mean
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

    def resident(self) -> dict[str, np.ndarray]:
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

    def clean(self, ids: Sequence[int] | np.ndarray) -> UInt8[np.ndarray, "n h w 3"]:
        """The images of some ids without augmentation, prepared as for evaluation."""
        ...


class ArraySource:
    """Images in memory, held on the devices whole; crops happen there too."""

    def __init__(
        self,
        images: UInt8[np.ndarray, "n h w 3"],
        labels: Int[np.ndarray, " n"] | None = None,
        class_names: Sequence[str] = (),
    ) -> None:
        if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
            raise UserError(
                f"An array source takes uint8 images [n, H, W, 3], not {images.dtype} "
                f"{list(images.shape)}: convert them first."
            )
        if labels is not None and len(labels) != len(images):
            raise UserError(f"There are {len(images)} images but {len(labels)} labels.")
        self.images = images
        self.num_examples = len(images)
        self.labels = None if labels is None else np.asarray(labels, np.int32)
        self.num_classes = 0 if self.labels is None else int(self.labels.max()) + 1
        self.class_names = tuple(class_names)
        self.bad: list[str] = []
        label_bytes = b"" if self.labels is None else self.labels.tobytes()
        checksum = zlib.crc32(label_bytes, zlib.crc32(images.tobytes()))
        self.fingerprint = f"{self.num_examples} images, checksum {checksum:08x}"

    def resident(self) -> dict[str, np.ndarray]:
        """All images: a step only needs ids."""
        return {"image": self.images}

    def batches(self, steps: Iterator[tuple[int, np.ndarray]]) -> Iterator[dict[str, Any]]:
        """Ids and labels; the images are on the devices already."""
        for _, ids in steps:
            batch = {"id": ids}
            if self.labels is not None:
                batch["label"] = self.labels[ids]
            yield batch

    def clean(self, ids: Sequence[int] | np.ndarray) -> UInt8[np.ndarray, "n h w 3"]:
        """The images as they are; they are resized on the device."""
        return self.images[np.asarray(ids)]


def digits(config: ConfigDict) -> tuple[Source, Source]:
    """scikit-learn's 1,797 scans of handwritten digits, 8×8, split by class with a fixed seed.

    The split does not depend on `config.seed`, so that runs with different seeds are compared on
    the same held-out images.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

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
      The training source, and the one to evaluate on, None where there is none.

    Raises:
      UserError: an unknown name, a missing or empty folder or file.
    """
    name = config.data.name
    if name == "digits":
        return digits(config)
    if name == "folder":
        # Imports TensorFlow, which array sources must not need.
        from ssl_jax.data.folder import folder_sources

        return folder_sources(config)
    if name == "packed":
        from ssl_jax.data.packed import packed_sources

        return packed_sources(config)
    if name == "records":
        from ssl_jax.data.records import records_sources

        return records_sources(config)
    if name == "tfds":
        from ssl_jax.data.tfds import tfds_sources

        return tfds_sources(config)
    known = ["digits", "folder", "packed", "records", "tfds"]
    raise UserError(f"config.data.name is '{name}'.{did_you_mean(name, known)}")
