"""A source of in-memory images; it needs neither a host pipeline nor TensorFlow."""

import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from ssl_jax.errors import UserError


class ArraySource:
    """In-memory images, copied whole to the devices and cropped there."""

    def __init__(
        self,
        images: UInt8[np.ndarray, "n h w 3"],
        labels: Int[np.ndarray, " n"] | None = None,
        class_names: Sequence[str] = (),
    ) -> None:
        if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
            raise UserError(
                f"ArraySource got images of dtype {images.dtype} and shape {list(images.shape)}. "
                "Convert them to uint8 [n, H, W, 3]."
            )
        if labels is not None and len(labels) != len(images):
            raise UserError(
                f"ArraySource got {len(images)} images but {len(labels)} labels. "
                "Pass one label per image."
            )
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
