"""Geometry on the host: decoding, random crops and resizing of single images, as TensorFlow ops.

A crop is a function of (seed, step, sample id, number of the view) and of the file alone, so that
threads, processes, the split of a batch and a resumed run change no pixel. Colours are the device's
business, and so is the flip, see `ssl_jax.data.augment`.

An image is decoded whole, once for all its views: the views of an image cover most of it between
them, and a file cut short has to show whatever the crops are.
"""

import contextlib
import math
import os
import zlib
from collections.abc import Sequence

from jaxtyping import Float, Int, UInt8
from ml_collections import ConfigDict

from ssl_jax.errors import UserError

# Only exceptions are to reach the terminal, neither banners nor the decoders' own lines. JAX, where
# it came first, has set the level to 1; any other is the user's wish.
if os.environ.get("TF_CPP_MIN_LOG_LEVEL", "1") == "1":
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # not needed here, and it announces itself
try:
    import tensorflow as tf
except ImportError as error:
    raise UserError(
        "Reading image files needs TensorFlow, which is not installed: "
        "run pip install 'ssl-jax[data]'."
    ) from error
with contextlib.suppress(RuntimeError):  # the caller's own TensorFlow is at work already
    tf.config.set_visible_devices([], "GPU")  # all their memory is for JAX

# A box in whole pixels: top, left, height, width.
Box = Int[tf.Tensor, "4"]
Seed = Int[tf.Tensor, "2"]
Image = UInt8[tf.Tensor, "height width 3"]
View = UInt8[tf.Tensor, "size size 3"]
Scalar = Int[tf.Tensor, ""]

_TORCHVISION_TRIES = 10
_TF_TRIES = 100
_TF_MIN_COVERED = 0.1


# Traced, so that the check of the shape fails in the same way inside of tf.data and outside.
@tf.function(input_signature=[tf.TensorSpec([], tf.string)])
def decode(contents: tf.Tensor) -> Image:
    """An image file's pixels as RGB.

    Gray becomes three equal channels; palettes and CMYK are converted; alpha is dropped, as PIL's
    `convert("RGB")` drops it; of 16 bits the upper 8 are kept. The orientation that cameras write
    into EXIF is ignored, as it is by the official codes.

    Args:
      contents: of a JPEG or PNG file, a scalar string; its first bytes tell which.

    Returns:
      uint8 [height, width, 3].

    Raises:
      tf.errors.InvalidArgumentError: not a whole image, such as a file cut short by one byte.
    """
    # The op reads PNG too. This is the DCT of PIL; the default is another one on some machines.
    image = tf.io.decode_jpeg(contents, channels=3, dct_method="INTEGER_ACCURATE")
    # And it gives some other formats, in a file of a wrong name, one dimension more.
    return tf.ensure_shape(image, [None, None, 3])


def image_seed(seed: int, step: Scalar, id: Scalar) -> Seed:
    """The seed of an image's geometry at a step; that of a view is folded from it.

    Args:
      seed: of the run.
      step: counted from 0 over the whole run.
      id: of the sample.

    Returns:
      int64 [2].
    """
    stream = tf.constant([seed, zlib.crc32(b"geometry")], tf.int64)
    for data in (step, id):
        stream = tf.random.fold_in(stream, tf.cast(data, tf.int64), alg="philox")
    return stream


def make_views(image: Image, seed: Seed, views: Sequence[ConfigDict]) -> tuple[View, ...]:
    """The geometry of all views of one image.

    Args:
      image: uint8.
      seed: of `image_seed`.
      views: configs of the views, as `config.flat_views` gives them.

    Returns:
      One uint8 [size, size, 3] per view.

    Raises:
      UserError: unknown sampler.
    """
    return tuple(
        crop_view(image, tf.random.fold_in(seed, tf.constant(number, tf.int64), alg="philox"), view)
        for number, view in enumerate(views)
    )


def crop_view(image: Image, seed: Seed, view: ConfigDict) -> View:
    """A random crop of an image, resized to the view's size.

    The box is cut out before it is resized, so pixels outside it never count. Values are rounded to
    the nearest of 0 … 255, where a bicubic overshoot is clipped.

    Args:
      image: uint8.
      seed: of this view.
      view: config of the view; only "size" and "crop" count here.

    Returns:
      uint8 [size, size, 3].

    Raises:
      UserError: unknown sampler.
    """
    box = draw_box(seed, tf.shape(image)[0], tf.shape(image)[1], view.crop)
    return _resize(_cut(image, box), view.size, view.crop.interpolation, antialiased(view))


def clean_view(image: Image, view: ConfigDict, crop_fraction: float, interpolation: str) -> View:
    """An image as it is evaluated: its central square, resized.

    This is SimCLR's and BYOL's evaluation; torchvision's "resize 256, crop 224" is a fraction of
    .875 too, apart from the pixels at the border.

    Args:
      image: uint8.
      view: config of the view whose size, and way to make images smaller, are taken.
      crop_fraction: side of the square as a fraction of the image's shorter side.
      interpolation: "bilinear" or "bicubic".

    Returns:
      uint8 [size, size, 3].
    """
    height, width = tf.shape(image)[0], tf.shape(image)[1]
    shorter = tf.cast(tf.minimum(height, width), tf.float32)
    side = tf.maximum(tf.cast(tf.round(crop_fraction * shorter), tf.int32), 1)
    box = tf.stack([(height - side + 1) // 2, (width - side + 1) // 2, side, side])
    return _resize(_cut(image, box), view.size, interpolation, antialiased(view))


def antialiased(view: ConfigDict) -> bool:
    """Whether a larger image is averaged over what an output pixel covers, or only sampled.

    PIL averages, and so the methods that crop by torchvision do; `tf.image.resize` samples, and so
    SimCLR and BYOL do.
    """
    return view.crop.sampler in ("torchvision", "none")


def draw_box(seed: Seed, height: Scalar, width: Scalar, crop: ConfigDict) -> Box:
    """Draws where an image is cropped.

    Args:
      seed: of this view of the image.
      height: of the image, pixels.
      width: of the image, pixels.
      crop: config of the crop. Its sampler is "torchvision" (RandomResizedCrop: ten tries of a
        uniform area and log-uniform aspect, else the centre), "tf"
        (`tf.image.sample_distorted_bounding_box` with SimCLR's arguments, else the whole image),
        "byol" (one draw of a uniform area and log-uniform aspect, its sides cut to the image's), or
        "none" (the whole image).

    Returns:
      int32 [4]: top, left, height, width.

    Raises:
      UserError: unknown sampler.
    """
    samplers = {
        "torchvision": _torchvision_box,
        "tf": _tf_box,
        "byol": _byol_box,
        "none": _whole_box,
    }
    if crop.sampler not in samplers:
        raise UserError(
            f"crop.sampler is '{crop.sampler}': it may be one of {', '.join(samplers)}."
        )
    return samplers[crop.sampler](seed, height, width, crop)


def _torchvision_box(seed: Seed, height: Scalar, width: Scalar, crop: ConfigDict) -> Box:
    uniforms = _uniforms(seed, 2 * _TORCHVISION_TRIES + 2)
    tall, wide = _sides(uniforms[2:], height, width, crop)
    fits = (0 < tall) & (tall <= height) & (0 < wide) & (wide <= width)
    first = tf.argmax(fits)
    drawn = _place(uniforms[:2], height, width, tall[first], wide[first])
    return tf.where(tf.reduce_any(fits), drawn, _central_box(height, width, crop))


def _central_box(height: Scalar, width: Scalar, crop: ConfigDict) -> Box:
    """The largest central box whose aspect is in the range."""
    low, high = crop.aspect
    tall = tf.minimum(height, _rounded(tf.cast(width, tf.float32) / low))
    wide = tf.minimum(width, _rounded(tf.cast(height, tf.float32) * high))
    return tf.stack([(height - tall) // 2, (width - wide) // 2, tall, wide])


def _byol_box(seed: Seed, height: Scalar, width: Scalar, crop: ConfigDict) -> Box:
    uniforms = _uniforms(seed, 4)
    tall, wide = _sides(uniforms[2:], height, width, crop)
    tall, wide = tf.clip_by_value(tall[0], 1, height), tf.clip_by_value(wide[0], 1, width)
    return _place(uniforms[:2], height, width, tall, wide)


def _tf_box(seed: Seed, height: Scalar, width: Scalar, crop: ConfigDict) -> Box:
    begin, size, _ = tf.image.stateless_sample_distorted_bounding_box(
        tf.stack([height, width, 3]),
        bounding_boxes=tf.constant([[[0.0, 0.0, 1.0, 1.0]]]),
        seed=seed,
        min_object_covered=_TF_MIN_COVERED,
        aspect_ratio_range=crop.aspect,
        area_range=crop.area,
        max_attempts=_TF_TRIES,
    )
    return tf.concat([begin[:2], size[:2]], axis=0)


def _whole_box(seed: Seed, height: Scalar, width: Scalar, crop: ConfigDict) -> Box:
    return tf.stack([0, 0, height, width])


def _sides(
    uniforms: Float[tf.Tensor, "2*tries"], height: Scalar, width: Scalar, crop: ConfigDict
) -> tuple[Int[tf.Tensor, " tries"], Int[tf.Tensor, " tries"]]:
    """Heights and widths of boxes with a uniform area and a log-uniform aspect, width / height."""
    for_area, for_aspect = tf.split(uniforms, 2)
    whole = tf.cast(height, tf.float32) * tf.cast(width, tf.float32)
    area = whole * _between(for_area, *crop.area)
    aspect = tf.exp(_between(for_aspect, *(math.log(aspect) for aspect in crop.aspect)))
    return _rounded(tf.sqrt(area / aspect)), _rounded(tf.sqrt(area * aspect))


def _place(
    uniforms: Float[tf.Tensor, "2"], height: Scalar, width: Scalar, tall: Scalar, wide: Scalar
) -> Box:
    """A box of given sides anywhere in the image, every position as likely."""
    room = tf.maximum(tf.stack([height - tall, width - wide]), 0) + 1
    corner = tf.cast(uniforms * tf.cast(room, tf.float32), tf.int32)
    return tf.concat([corner, tf.stack([tall, wide])], axis=0)


def _uniforms(seed: Seed, count: int) -> Float[tf.Tensor, " count"]:
    return tf.random.stateless_uniform([count], seed, alg="philox")


def _between(uniforms: Float[tf.Tensor, " n"], low: float, high: float) -> Float[tf.Tensor, " n"]:
    return low + (high - low) * uniforms


def _rounded(x: Float[tf.Tensor, "..."]) -> Int[tf.Tensor, "..."]:
    return tf.cast(tf.round(x), tf.int32)


def _cut(image: Image, box: Box) -> Image:
    return tf.slice(image, tf.concat([box[:2], [0]], axis=0), tf.concat([box[2:], [3]], axis=0))


def _resize(image: Image, size: int, interpolation: str, antialias: bool) -> View:
    resized = tf.image.resize(image, (size, size), interpolation, antialias=antialias)
    return tf.saturate_cast(tf.round(resized), tf.uint8)
