"""A source of in-memory images; it needs neither a host pipeline nor TensorFlow."""

import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, Shaped

from ssl_jax.data.labels import Targets, checked_labels, checked_targets, is_multi_label
from ssl_jax.data.values import DTYPES, MAX_CHANNELS
from ssl_jax.errors import UserError


class ArraySource:
    """In-memory images, copied whole to the devices and cropped there."""

    def __init__(
        self,
        images: Shaped[np.ndarray, "n h w c"],
        labels: Int[np.ndarray, " n"] | Shaped[np.ndarray, "n c"] | None = None,
        class_names: Sequence[str] = (),
        *,
        where: str = "ArraySource",
        labels_from: str = "an array",
    ) -> None:
        """Checks the arrays.

        Args:
          images: uint8 or uint16, in any byte order; at least one.
          labels: class of each image, -1 for an image without a label; None without labels. For
            images of several classes, bool or integers [n, classes]; see `Targets`.
          class_names: by label; empty: the classes are named by number.
          where: the file that contains the arrays, for messages.
          labels_from: see `Source`.

        Raises:
          UserError: images of another dtype or shape, or labels that don't match images or names.
        """
        native = images.dtype.newbyteorder("=")
        if native not in DTYPES or images.ndim != 4 or not images.size:
            raise UserError(
                f"{where} has images of dtype {images.dtype} and shape {list(images.shape)}. "
                "Convert them to uint8 or uint16 [n, H, W, channels], with n at least 1."
            )
        if images.shape[-1] > MAX_CHANNELS:
            raise UserError(
                f"{where} has images of shape {list(images.shape)}, whose last axis, the channels, "
                f"is longer than {MAX_CHANNELS}. Convert them to [n, H, W, channels]."
            )
        self.images = images = images.astype(native, copy=False)
        self.channels, self.where = images.shape[-1], where
        self.bits = self.array_bits = 8 * native.itemsize
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
        checksum = zlib.crc32(label_bytes, zlib.crc32(np.ascontiguousarray(images).data))
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

    def eval_transform(self, ids: Sequence[int] | np.ndarray) -> Shaped[np.ndarray, "n h w c"]:
        """The unchanged images; the device resizes them."""
        return self.images[np.asarray(ids)]

    def image_sizes(self, ids: Sequence[int] | np.ndarray) -> Int[np.ndarray, "n 2"]:
        """Height and width of images, all the same."""
        return np.tile(self.images.shape[1:3], (len(ids), 1))

    def eval_batches(
        self, batches: Iterator[Int[np.ndarray, " n"]]
    ) -> Iterator[Shaped[np.ndarray, "n h w c"]]:
        """`eval_transform` of batches of ids, in order."""
        yield from map(self.eval_transform, batches)
