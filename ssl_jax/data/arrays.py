"""A source of in-memory images; it needs neither a host pipeline nor TensorFlow."""

import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, Shaped, UInt8

from ssl_jax.data.labels import Targets, checked_labels, checked_targets, is_multi_label
from ssl_jax.errors import UserError


class ArraySource:
    """In-memory images, copied whole to the devices and cropped there."""

    def __init__(
        self,
        images: UInt8[np.ndarray, "n h w 3"],
        labels: Int[np.ndarray, " n"] | Shaped[np.ndarray, "n c"] | None = None,
        class_names: Sequence[str] = (),
        *,
        where: str = "ArraySource",
        labels_from: str = "an array",
    ) -> None:
        """Checks the arrays.

        Args:
          images: at least one.
          labels: class of each image, -1 for an image without a label; None without labels. For
            images of several classes, bool or integers [n, classes]; see `Targets`.
          class_names: by label; empty: the classes are named by number.
          where: the file that contains the arrays, for messages.
          labels_from: see `Source`.

        Raises:
          UserError: images that are not uint8 RGB, or labels that don't match images or names.
        """
        if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8 or not images.size:
            raise UserError(
                f"{where} has images of dtype {images.dtype} and shape {list(images.shape)}. "
                "Convert them to uint8 [n, H, W, 3], with n at least 1."
            )
        self.images = images
        self.num_examples = len(images)
        self.labels: Int[np.ndarray, " n"] | None = None
        self.class_names: tuple[str, ...] = ()
        self.targets: Targets | None = None
        if is_multi_label(labels):
            self.targets = checked_targets(labels, class_names, len(images), where)
        elif labels is not None:
            self.labels, self.class_names = checked_labels(labels, class_names, len(images), where)
        self.num_classes = len(self.class_names)
        self.labels_from = labels_from
        self.bad: list[str] = []
        given = self.targets.values if self.targets else self.labels
        label_bytes = b"" if given is None else given.tobytes()
        checksum = zlib.crc32(label_bytes, zlib.crc32(images.tobytes()))
        self.fingerprint = f"{self.num_examples} images, checksum {checksum:08x}"

    def names(self, ids: Sequence[int] | np.ndarray) -> list[str]:
        """The ids as strings."""
        return [str(id) for id in np.asarray(ids).tolist()]

    def device_data(self) -> dict[str, np.ndarray]:
        """All images; a step then needs only ids."""
        return {"image": self.images}

    def batches(self, steps: Iterator[tuple[int, np.ndarray]]) -> Iterator[dict[str, Any]]:
        """Ids and labels; the images are already on the devices."""
        for _, ids in steps:
            batch = {"id": ids}
            if self.labels is not None:
                batch["label"] = self.labels[ids]
            yield batch

    def eval_transform(self, ids: Sequence[int] | np.ndarray) -> UInt8[np.ndarray, "n h w 3"]:
        """The unchanged images; the device resizes them."""
        return self.images[np.asarray(ids)]

    def image_sizes(self, ids: Sequence[int] | np.ndarray) -> Int[np.ndarray, "n 2"]:
        """Height and width of images, all the same."""
        return np.tile(self.images.shape[1:3], (len(ids), 1))

    def eval_batches(
        self, batches: Iterator[Int[np.ndarray, " n"]]
    ) -> Iterator[UInt8[np.ndarray, "n h w 3"]]:
        """`eval_transform` of batches of ids, in order."""
        yield from map(self.eval_transform, batches)
