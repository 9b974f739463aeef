"""Images in memory as a source, which needs neither a host pipeline nor TensorFlow."""

import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from ssl_jax.errors import UserError


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

    def device_data(self) -> dict[str, np.ndarray]:
        """All images: a step only needs ids."""
        return {"image": self.images}

    def batches(self, steps: Iterator[tuple[int, np.ndarray]]) -> Iterator[dict[str, Any]]:
        """Ids and labels; the images are on the devices already."""
        for _, ids in steps:
            batch = {"id": ids}
            if self.labels is not None:
                batch["label"] = self.labels[ids]
            yield batch

    def eval_transform(self, ids: Sequence[int] | np.ndarray) -> UInt8[np.ndarray, "n h w 3"]:
        """The images as they are; they are resized on the device."""
        return self.images[np.asarray(ids)]
