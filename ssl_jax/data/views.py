"""Geometry on the host: decodes, crops and resizes single images, as TensorFlow ops.

A crop depends only on the file and on (seed, step, sample id, view number): threads, processes,
batch splits and resuming change no pixel. Color and flip are applied on the device, see
`ssl_jax.data.augment`.

An image is decoded whole, once for all its views: together they cover most of it, and a truncated
file must be detected whatever the crops are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
import PIL.Image
from jaxtyping import Float, Int, Shaped
from ml_collections import ConfigDict

from ssl_jax.config import view_size
from ssl_jax.data.decode import decode as decode_file
from ssl_jax.data.device_crop import (
    TF_ATTEMPTS,
    TF_MIN_COVERED,
    TORCHVISION_ATTEMPTS,
    antialiased,
    center_box,
    check_sampler,
    eval_box,
)
from ssl_jax.data.tensorflow import tf
from ssl_jax.data.values import is_float, to_unit

# Top, left, height and width, in whole pixels. Strings, so that importing this needs no TensorFlow.
Boxes: TypeAlias = 'Int[tf.Tensor, "views 4"]'
Seed: TypeAlias = 'Int[tf.Tensor, "2"]'
# uint8, or float32 in [0, 1].
Image: TypeAlias = 'Shaped[tf.Tensor, "height width c"]'
View: TypeAlias = 'Shaped[tf.Tensor, "tall wide c"]'
Scalar: TypeAlias = 'Int[tf.Tensor, ""]'
ResizeSpec: TypeAlias = tuple[tuple[int, int], str]  # (height, width), interpolation


def decode(contents: tf.Tensor) -> Image:
    """Decodes an image file to RGB: JPEG and PNG by TensorFlow, other formats by Pillow.

    Grayscale becomes three equal channels; palettes and CMYK are converted; alpha is dropped, as by
    PIL's `convert("RGB")`; 16-bit values keep their upper 8 bits. The EXIF orientation is ignored,
    as in the official codebases. See `ssl_jax.data.decode` for the other formats.

    Args:
      contents: bytes of a file, a scalar string.

    Returns:
      uint8 [height, width, 3].

    Raises:
      tf.errors.InvalidArgumentError: not a complete image; in JPEG and PNG, even if only the last
        byte is missing. For other formats, outside of a graph, a ValueError instead.
    """
    contents = tf.convert_to_tensor(contents)
    first = tf.strings.substr(contents, 0, 2)
    image = tf.cond(
        tf.reduce_any(tf.equal(first, [b"\xff\xd8", b"\x89P"])),
        # The op reads PNG too. This is PIL's DCT; the default depends on the machine.
        lambda: tf.io.decode_jpeg(contents, channels=3, dct_method="INTEGER_ACCURATE"),
        lambda: _decode_by_pillow(contents),
    )
    return tf.ensure_shape(image, [None, None, 3])


def decode_channels(
    contents: tf.Tensor, channels: int, bits: int, limits: Sequence[float] = ()
) -> Image:
    """Decodes an image file of any number of channels or depth; see `ssl_jax.data.decode`.

    Args:
      contents: bytes of a file, a scalar string.
      channels: C, number of channels.
      bits: 8 or 16 per value.
      limits: `config.data.range`.

    Returns:
      [height, width, C]: uint8; with 16 bits or limits float32 in [0, 1], see `values.to_unit`.

    Raises:
      ValueError, UserError: as `decode.decode`, outside of a graph.
    """
    floats = is_float(bits, limits)

    def read(contents: bytes) -> np.ndarray:
        image = decode_file(contents, channels, bits, _read_png)
        return to_unit(image, limits) if floats else image

    contents = tf.convert_to_tensor(contents)
    if tf.executing_eagerly():
        image = tf.constant(read(contents.numpy()))
    else:
        dtype = tf.float32 if floats else tf.uint8
        image = tf.numpy_function(read, [contents], dtype, stateful=False)
    return tf.ensure_shape(image, [None, None, channels])


def _read_png(contents: bytes) -> Shaped[np.ndarray, "height width c"]:
    """A PNG's values, uint16."""
    return tf.io.decode_png(contents, dtype=tf.uint16).numpy()


def to_float(image: Image, bits: int, limits: Sequence[float]) -> Image:
    """`values.to_unit` of integers as TensorFlow ops; unchanged unless `is_float`."""
    if not is_float(bits, limits):
        return image
    low, high = limits or (0, image.dtype.max)
    return tf.clip_by_value((tf.cast(image, tf.float32) - low) / (high - low), 0.0, 1.0)


def _decode_by_pillow(contents: tf.Tensor) -> tf.Tensor:
    if tf.executing_eagerly():
        # TensorFlow 2.21 would pass an array of the bytes, which has no zeros at its end.
        return tf.constant(decode_file(contents.numpy()))
    return tf.numpy_function(decode_file, [contents], tf.uint8, stateful=False)


def image_seed(seed: int, step: Scalar, id: Scalar) -> Seed:
    """The seed of an image's geometry, unique per (seed, step, id).

    Philox scrambles its key, so the packed numbers suffice: folding them in one by one takes
    TensorFlow longer than cropping and resizing a view.

    Args:
      seed: the run's seed, below 2**33.
      step: counted from 0 over the whole run, below 2**31.
      id: sample id, below 2**31.

    Returns:
      int64 [2]: seed and step; id, shifted left by 16 bits that `draw_boxes` uses.
    """
    high = (seed << 31) % 2**64
    run = tf.constant(high - 2**64 if high >= 2**63 else high, tf.int64)
    step, id = tf.cast(step, tf.int64), tf.cast(id, tf.int64)
    return tf.stack([tf.bitwise.bitwise_or(run, step), tf.bitwise.left_shift(id, 16)])


def make_views(image: Image, seed: Seed, views: Sequence[ConfigDict]) -> tuple[View, ...]:
    """Makes all views of one image: random crops, resized to the views' sizes.

    Boxes are cropped before resizing, so pixels outside never contribute. Values of uint8 are
    rounded; bicubic overshoot is clipped.

    Args:
      image: uint8, or float32 in [0, 1], [height, width, C].
      seed: from `image_seed`.
      views: the views' configs, from `config.flat_views`.

    Returns:
      One [view height, view width, C] per view, in the image's dtype.

    Raises:
      UserError: unknown sampler.
    """
    smooth = {i: view for i, view in enumerate(views) if antialiased(view)}
    made: dict[int, View] = {}
    if smooth:
        sample, resize_specs = _NumpyBoxes(views), [_resize_spec(v) for v in smooth.values()]

        # Draws the boxes too: each call of a NumPy function takes a good part of a view's time.
        def crop(image: np.ndarray, seed: np.ndarray) -> list[np.ndarray]:
            boxes = sample(np.array(image.shape[:2]), seed)
            return _by_pillow(image, boxes[list(smooth)], resize_specs)

        cropped = _call(crop, image, [seed], resize_specs)
        made.update(zip(smooth, cropped, strict=True))
    if len(smooth) < len(views):
        boxes = draw_boxes(tf.shape(image)[:2], seed, views)
        for i, view in enumerate(views):
            if i not in smooth:
                made[i] = _by_tensorflow(image, boxes[i], *_resize_spec(view))
    return tuple(made[i] for i in range(len(views)))


def draw_boxes(size: Int[tf.Tensor, "2"], seed: Seed, views: Sequence[ConfigDict]) -> Boxes:
    """Samples the crop boxes of one image's views.

    Args:
      size: image height and width in pixels.
      seed: from `image_seed`.
      views: the views' configs. The sampler of a crop is "torchvision" (RandomResizedCrop: ten
        tries of a uniform area and log-uniform aspect ratio, else a center crop), "tf"
        (`tf.image.sample_distorted_bounding_box` with SimCLR's arguments, else the whole image),
        "byol" (one sample of a uniform area and log-uniform aspect ratio, clipped to the image's
        sides), or "none" (the whole image).

    Returns:
      int32 [V, 4]: top, left, height, width.

    Raises:
      UserError: unknown sampler.
    """
    for view in views:
        check_sampler(view)
    by_tensorflow = [i for i, view in enumerate(views) if view.crop.sampler == "tf"]
    boxes: dict[int, tf.Tensor] = {}
    if len(by_tensorflow) < len(views):
        # NumPy samples all of them in the time of a few TensorFlow ops.
        drawn = tf.numpy_function(_NumpyBoxes(views), [size, seed], tf.int32, stateful=False)
        drawn = tf.ensure_shape(drawn, [len(views), 4])
        if not by_tensorflow:
            return drawn
        boxes.update(enumerate(tf.unstack(drawn)))
    for i in by_tensorflow:
        boxes[i] = _tf_box(seed + tf.constant([0, i], tf.int64), size, views[i].crop)
    return tf.stack([boxes[i] for i in range(len(views))])


def center_crop(image: Image, view: ConfigDict, crop_fraction: float, interpolation: str) -> View:
    """Crops an image to `device_crop.eval_box` and resizes it, as `pipeline.prepare_eval` does.

    Args:
      image: uint8, or float32 in [0, 1], [height, width, C].
      view: config of the view that sets the size and whether to antialias.
      crop_fraction: see `device_crop.eval_box`.
      interpolation: "bilinear" or "bicubic".

    Returns:
      [view height, view width, C], in the image's dtype.
    """
    size, smooth = view_size(view), antialiased(view)

    def box(height: int, width: int) -> Int[np.ndarray, "4"]:
        return np.array(eval_box(int(height), int(width), size, crop_fraction), np.int32)

    if not smooth:
        found = tf.numpy_function(
            lambda sides: box(*sides), [tf.shape(image)[:2]], tf.int32, stateful=False
        )
        return _by_tensorflow(image, tf.ensure_shape(found, [4]), size, interpolation)
    spec = (size, interpolation)

    def crop(image: np.ndarray) -> list[np.ndarray]:
        return _by_pillow(image, box(*image.shape[:2])[None], [spec])

    return _call(crop, image, [], [spec])[0]


def _tf_box(seed: Seed, size: Int[tf.Tensor, "2"], crop: ConfigDict) -> Int[tf.Tensor, "4"]:
    begin, sides, _ = tf.image.stateless_sample_distorted_bounding_box(
        tf.concat([size, [3]], axis=0),
        bounding_boxes=tf.constant([[[0.0, 0.0, 1.0, 1.0]]]),
        seed=seed,
        min_object_covered=TF_MIN_COVERED,
        aspect_ratio_range=crop.aspect,
        area_range=crop.area,
        max_attempts=TF_ATTEMPTS,
    )
    return tf.concat([begin[:2], sides[:2]], axis=0)


class _NumpyBoxes:
    """Samples boxes for all samplers but "tf"; rows of "tf" views are arbitrary.

    A view's random numbers depend only on its position among the views.
    """

    def __init__(self, views: Sequence[ConfigDict]) -> None:
        # Copied, because ConfigDicts are slow to read.
        crops = [view.crop for view in views]
        self._samplers = [crop.sampler for crop in crops]
        self._areas = np.array([crop.area for crop in crops]).T[..., None]
        self._aspects = [tuple(crop.aspect) for crop in crops]
        self._log_aspects = np.log(self._aspects).T[..., None]

    def __call__(
        self, size: Int[np.ndarray, "2"], seed: Int[np.ndarray, "2"]
    ) -> Int[np.ndarray, "views 4"]:
        height, width = int(size[0]), int(size[1])
        rng = np.random.Generator(np.random.Philox(key=seed.astype(np.uint64)))
        uniforms = rng.random((len(self._samplers), 2 + 2 * TORCHVISION_ATTEMPTS))
        talls, wides = self._sides(uniforms[:, 2:], height * width)
        fit = (0 < talls) & (talls <= height) & (0 < wides) & (wides <= width)
        # The first try that fits, else the first try.
        chosen = np.where(np.array(self._samplers) == "byol", 0, fit.argmax(axis=1))
        rows = np.arange(len(chosen))
        tall, wide = talls[rows, chosen].clip(1, height), wides[rows, chosen].clip(1, width)
        boxes = np.stack(
            [
                (uniforms[:, 0] * (height - tall + 1)).astype(np.int32),
                (uniforms[:, 1] * (width - wide + 1)).astype(np.int32),
                tall.astype(np.int32),
                wide.astype(np.int32),
            ],
            axis=1,
        )
        for row, sampler in enumerate(self._samplers):
            if sampler == "none":
                boxes[row] = 0, 0, height, width
            elif sampler == "torchvision" and not fit[row].any():
                boxes[row] = center_box(height, width, self._aspects[row])
        return boxes

    def _sides(
        self, uniforms: Float[np.ndarray, "views 2*tries"], pixels: int
    ) -> tuple[Float[np.ndarray, "views tries"], Float[np.ndarray, "views tries"]]:
        """Heights and widths of boxes with uniform area and log-uniform aspect ratio, w / h."""
        for_area, for_aspect = np.split(uniforms, 2, axis=1)
        (low, high), (log_low, log_high) = self._areas, self._log_aspects
        area = pixels * (low + (high - low) * for_area)
        aspect = np.exp(log_low + (log_high - log_low) * for_aspect)
        return np.round(np.sqrt(area / aspect)), np.round(np.sqrt(area * aspect))


def _resize_spec(view: ConfigDict) -> ResizeSpec:
    return view_size(view), view.crop.interpolation


def _by_tensorflow(
    image: Image, box: Int[tf.Tensor, "4"], size: tuple[int, int], interpolation: str
) -> View:
    """Crops a box and resizes it without antialiasing."""
    sides = tf.concat([box[2:], [image.shape[2]]], axis=0)
    cut = tf.slice(image, tf.concat([box[:2], [0]], axis=0), sides)
    resized = tf.image.resize(cut, size, interpolation)
    if image.dtype == tf.float32:
        return tf.clip_by_value(resized, 0.0, 1.0)
    return tf.saturate_cast(tf.round(resized), tf.uint8)


def _by_pillow(
    image: Shaped[np.ndarray, "height width c"],
    boxes: Int[np.ndarray, "n 4"],
    resize_specs: Sequence[ResizeSpec],
) -> list[Shaped[np.ndarray, "tall wide c"]]:
    """Crops boxes and resizes them with antialiasing.

    This is the code torchvision runs; it takes a third of the time of TensorFlow's op.
    """
    if image.dtype != np.uint8 or image.shape[2] != 3:
        return _by_pillow_in_planes(image, boxes, resize_specs)
    whole = PIL.Image.fromarray(image)
    views = []
    for (top, left, tall, wide), (size, interpolation) in zip(boxes, resize_specs, strict=True):
        cut = whole.crop((left, top, left + wide, top + tall))
        method = PIL.Image.Resampling[interpolation.upper()]
        views.append(np.asarray(cut.resize((size[1], size[0]), method)))
    return views


def _by_pillow_in_planes(
    image: Shaped[np.ndarray, "height width c"],
    boxes: Int[np.ndarray, "n 4"],
    resize_specs: Sequence[ResizeSpec],
) -> list[Shaped[np.ndarray, "tall wide c"]]:
    """`_by_pillow` channel by channel: Pillow's images of two and four would be weighted by alpha.

    Floats are neither rounded nor, by Pillow, clipped.
    """
    planes = np.ascontiguousarray(np.moveaxis(image, -1, 0))
    views = []
    for (top, left, tall, wide), (size, interpolation) in zip(boxes, resize_specs, strict=True):
        method = PIL.Image.Resampling[interpolation.upper()]
        resized = [
            PIL.Image.fromarray(np.ascontiguousarray(cut)).resize((size[1], size[0]), method)
            for cut in planes[:, top : top + tall, left : left + wide]
        ]
        view = np.stack([np.asarray(plane) for plane in resized], axis=-1)
        views.append(view if view.dtype == np.uint8 else view.clip(0, 1))
    return views


def _call(
    function: Callable[..., list[np.ndarray]],
    image: Image,
    arguments: Sequence[tf.Tensor],
    resize_specs: Sequence[ResizeSpec],
) -> list[View]:
    """Wraps a NumPy function that makes views of an image as a TensorFlow op."""
    dtypes = [image.dtype] * len(resize_specs)
    made = tf.numpy_function(function, [image, *arguments], dtypes, stateful=False)
    views = tf.nest.flatten(made)  # a single output isn't in a list
    return [
        tf.ensure_shape(view, [*size, image.shape[2]])
        for view, (size, _) in zip(views, resize_specs, strict=True)
    ]
