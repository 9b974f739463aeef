"""The images of a user's own object as a source, cropped on the host like image files."""

from __future__ import annotations

import functools
import threading
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int
from ml_collections import ConfigDict

from ssl_jax.data import views
from ssl_jax.data.fingerprint import sampled_ids
from ssl_jax.data.host import HostSource
from ssl_jax.data.labels import NO_LABEL, checked_labels, checked_targets, is_multi_label
from ssl_jax.data.registry import Images
from ssl_jax.data.tensorflow import tf
from ssl_jax.data.values import DTYPES
from ssl_jax.errors import UserError
from ssl_jax.files import RESUME, reading

_HEADER = 8  # bytes in front of an array's pixels: height and width


class CustomSource(HostSource):
    """An object with a length and `read(ids)`; see `ssl_jax.data.registry.Images`."""

    def __init__(self, config: ConfigDict, images: Images, where: str) -> None:
        """Reads a few images, evenly spread, to check them and for the fingerprint.

        Args:
          config: the run's config.
          images: the object.
          where: the argument, or config key and value, that gave the object, for messages.

        Raises:
          UserError: no images, wrong labels, `read` returns something else than images, or a view
            can't be made on the host.
        """
        count = len(images)
        super().__init__(config, where, count, "")
        if not count:
            raise UserError(f"{where} has no images: its length is 0. Give at least one.")
        self._images, self._reading = images, threading.Lock()
        labels = getattr(images, "labels", None)
        if labels is not None:
            names = getattr(images, "class_names", ())
            if is_multi_label(labels):
                self._targets = checked_targets(labels, names, count, where)
                labels = None
            else:
                labels, self.class_names = checked_labels(labels, names, count, where)
                self.num_classes = len(self.class_names)
            self.labels_from = f"{type(images).__name__}.labels"
        self._labels = np.full(count, NO_LABEL, np.int32) if labels is None else labels
        self._encoded: bool | None = None  # not known yet
        self._dtype = np.dtype(np.uint8)  # of decoded images
        known = self._targets.values if self._targets else self._labels
        checksum = zlib.crc32(known.tobytes())
        for contents in self.handles(np.array(sampled_ids(count)))[0]:
            checksum = zlib.crc32(contents, checksum)
        self.fingerprint = f"{count} images, checksum {checksum:08x}"

    def handles(self, ids: Int[np.ndarray, " n"]) -> tuple[Sequence[bytes], Int[np.ndarray, " n"]]:
        """The images, as bytes, and their labels."""
        unique, places = np.unique(ids, return_inverse=True)
        with self._reading, reading(self._where, f"Restore the data, {RESUME}"):
            contents = self._contents(self._images.read(unique.astype(np.int64)), unique)
        return [contents[place] for place in places], self._labels[ids]

    def _contents(self, images: Any, ids: Int[np.ndarray, " n"]) -> list[bytes]:
        """Checks what `read` returned, and converts it to bytes.

        Raises:
          UserError: the number of images is wrong, or something is no image.
        """
        if not hasattr(images, "__len__") or isinstance(images, str | bytes | dict):
            raise UserError(
                f"{self._where}: read(ids) returned a {type(images).__name__}. Return a list or "
                "array with one image per id."
            )
        if len(images) != len(ids):
            raise UserError(
                f"{self._where}: read(ids) returned {len(images)} images for {len(ids)} ids. "
                "Return one image per id, in the same order."
            )
        return [self._image(image, id) for image, id in zip(images, ids.tolist(), strict=True)]

    def _image(self, image: Any, id: int) -> bytes:
        """An encoded image as it is; a decoded one as height, width and pixels."""
        encoded = isinstance(image, bytes | bytearray | memoryview)
        array = None if encoded else np.asarray(image)
        if array is not None and array.dtype == np.uint8 and array.ndim == 1:  # as HDF5 keeps files
            encoded, image = True, array
        if self._encoded is None:
            self._encoded = encoded
            self._dtype = np.dtype(np.uint8) if encoded else _native(np.asarray(image).dtype)
        if self._encoded != encoded:
            raise UserError(
                f"{self._where}: read(ids) returned both arrays and files; image {id} is "
                f"{'a file' if encoded else 'an array'}. Return the same kind for all ids."
            )
        if encoded:
            return bytes(image)
        assert array is not None
        if array.ndim == 2 and self.channels == 1:
            array = array[..., None]
        if _native(array.dtype) not in DTYPES or array.ndim != 3 or not array.size:
            raise UserError(
                f"{self._where}: read(ids) returned dtype {array.dtype} and shape "
                f"{list(array.shape)} for image {id}. Return uint8 or uint16 arrays [height, "
                f"width, {self.channels}], or the bytes of image files."
            )
        if array.shape[2] != self.channels:
            raise UserError(
                f"{self._where}: read(ids) returned dtype {array.dtype} and shape "
                f"{list(array.shape)} for image {id}, of "
                f"{array.shape[2]} channels, but config.data.channels is {self.channels}. Set "
                f"config.data.channels={array.shape[2]}, or return {self.channels}."
            )
        if _native(array.dtype) != self._dtype:
            raise UserError(
                f"{self._where}: read(ids) returned dtype {array.dtype} for image {id}, and "
                f"{self._dtype} for an earlier one. Return the same dtype for all ids."
            )
        pixels = array.astype(array.dtype.newbyteorder("<"), copy=False)
        return np.array(array.shape[:2], "<i4").tobytes() + pixels.tobytes()

    def contents(self, handle: tf.Tensor, label: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """The handle and the label, unchanged."""
        return handle, label

    def decode(self, contents: tf.Tensor) -> views.Image:
        """Decodes a file, or restores an array."""
        if self._encoded:
            return views.decode(contents)
        sides = tf.io.decode_raw(tf.strings.substr(contents, 0, _HEADER), tf.int32)
        pixels = tf.io.decode_raw(contents, tf.as_dtype(self._dtype))
        pixels = pixels[_HEADER // self._dtype.itemsize :]
        image = tf.reshape(pixels, [sides[0], sides[1], self.channels])
        return views.to_float(image, self.bits, tuple(self._config.data.range))

    @property
    def array_bits(self) -> int:
        """Bits per value of arrays; 0 of files."""
        return 0 if self._encoded else 8 * self._dtype.itemsize

    @functools.cached_property
    def bits(self) -> int:
        """Bits per value that are kept, see `HostSource`; of arrays, those of their dtype."""
        return self.array_bits or super().bits

    def image_sizes(self, ids: Sequence[int] | np.ndarray) -> Int[np.ndarray, "n 2"]:
        """Height and width of images, without undecodable files."""
        if self._encoded:
            return super().image_sizes(ids)
        sizes = [np.frombuffer(self.read(id)[:_HEADER], "<i4") for id in ids]
        return np.array(sizes, np.int32).reshape(-1, 2)

    def name(self, id: int) -> str:
        """The image's id and the source."""
        return f"image {id} of {self._where}"


def _native(dtype: np.dtype) -> np.dtype:
    """A dtype in the byte order of this machine."""
    return dtype.newbyteorder("=")
