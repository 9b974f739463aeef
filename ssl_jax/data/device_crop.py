"""Geometry on the device, for datasets held there: random crops, resizing, rotation.

Boxes are sampled as in the official codes and resampled by two small matrix products per image, one
along its rows and one along its columns. There is no gather, which suits TPUs; the cost grows with
the sides of the source images, which are small in a dataset that fits on a device.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, Shaped, UInt8
from ml_collections import ConfigDict

from ssl_jax.config import view_size
from ssl_jax.data.augment import to_float
from ssl_jax.errors import UserError, require_choice

Geometry = dict[str, Shaped[Array, "..."]]
Sources = UInt8[Array, "n height width c"] | Float[Array, "n height width c"]
Size = tuple[int, int]  # height and width, pixels

# What the host's crops, `ssl_jax.data.views`, use too.
TORCHVISION_ATTEMPTS = 10
TF_ATTEMPTS = 100
TF_MIN_COVERED = 0.1  # of the image
SAMPLERS = ("torchvision", "tf", "byol", "none")

# Separates the geometry's random numbers from the colors', which may be given the same key.
_GEOMETRY = 0
# By default TPUs multiply in bfloat16 and GPUs in TF32, which is coarser than the pixels' 8 bits.
_EXACT = jax.lax.Precision.HIGHEST


def crop_views(
    images: Sources, keys: Key[Array, " n"], view: ConfigDict
) -> Float[Array, "n tall wide c"]:
    """Crops every image at random and resizes the crop to the view's size.

    Args:
      images: uint8, or floats in [0, 1].
      keys: one per image; its crop depends on nothing else. `augment.color` may take the same keys.
      view: config of the view, static: close over it under `jax.jit`.

    Returns:
      float32 in [0, 1].

    Raises:
      UserError: unknown sampler or interpolation, or bicubic interpolation of an affine view.
    """
    height, width = images.shape[1:3]
    geometry = jax.vmap(lambda key: sample_geometry(key, height, width, view))(keys)
    return apply_geometry(images, geometry, view)


def sample_geometry(key: Key[Array, ""], height: int, width: int, view: ConfigDict) -> Geometry:
    """Samples one image's crop box and affine transform; `jax.vmap` it for a batch.

    Args:
      key: of this image in this view.
      height: of the image, pixels.
      width: of the image, pixels.
      view: config of the view. Its `crop.sampler` is "torchvision" (RandomResizedCrop: ten attempts
        with uniform area and log-uniform aspect, else the center), "tf"
        (`tf.image.sample_distorted_bounding_box` with SimCLR's arguments, else the whole image),
        "byol" (one sample of uniform area and log-uniform aspect, sides clipped to the image's), or
        "none" (the whole image).

    Returns:
      The box as "top", "left", "height", "width", int32 pixels; for an affine view also "degrees",
      "shear" (in degrees), "shift_y" and "shift_x" (pixels).

    Raises:
      UserError: unknown sampler.
    """
    check_sampler(view)
    samplers = {
        "torchvision": _torchvision_box,
        "tf": _tf_box,
        "byol": _byol_box,
        "none": _whole_box,
    }
    box_key, affine_key = jax.random.split(jax.random.fold_in(key, _GEOMETRY))
    geometry = samplers[view.crop.sampler](box_key, height, width, view.crop)
    if _is_affine(view):
        degrees, shear, y, x = jax.random.uniform(affine_key, (4,), minval=-1.0)
        geometry |= {
            "degrees": degrees * view.affine.degrees,
            "shear": shear * view.affine.shear,
            "shift_y": y * view.affine.translate * height,
            "shift_x": x * view.affine.translate * width,
        }
    return geometry


def apply_geometry(
    images: Sources, geometry: Geometry, view: ConfigDict
) -> Float[Array, "n tall wide c"]:
    """Crops and resizes by sampled boxes.

    The box is cut out before it is resized, so pixels outside it have no influence. A box larger
    than the view is averaged or sampled, see `antialiased`.

    An affine view is rotated, sheared (x by y) and shifted about its center before it is cropped,
    all in one bilinear resampling whose taps may reach outside the box; outside the image is black.
    It needs tall · wide · width numbers per image at once, which suits images up to about 32 × 32.

    Args:
      images: uint8, or floats in [0, 1].
      geometry: of `sample_geometry`, with the images on axis 0.
      view: config of the view, static.

    Returns:
      float32 in [0, 1].

    Raises:
      UserError: unknown interpolation, or bicubic interpolation of an affine view.
    """
    if _is_affine(view):
        if view.crop.interpolation != "bilinear":
            raise UserError(
                f"crop.interpolation is '{view.crop.interpolation}', but affine views are always "
                "bilinear: set crop.interpolation to 'bilinear'."
            )
        return _sample(images, *_source_coordinates(images, geometry, view_size(view)))
    size = view_size(view)
    return _resize(images, geometry, size, view.crop.interpolation, antialiased(view))


def check_sampler(view: ConfigDict) -> None:
    """Checks the name of a view's crop sampler.

    Args:
      view: config of the view.

    Raises:
      UserError: unknown sampler.
    """
    require_choice("crop.sampler", view.crop.sampler, SAMPLERS)


def center_box(height: int, width: int, aspect: Sequence[float]) -> tuple[int, int, int, int]:
    """Returns the largest central box whose aspect, width / height, is in a range.

    Args:
      height: of the image, pixels.
      width: of the image, pixels.
      aspect: the range.

    Returns:
      Top, left, height, width.
    """
    tall, wide = min(height, round(width / aspect[0])), min(width, round(height * aspect[1]))
    return (height - tall) // 2, (width - wide) // 2, tall, wide


def eval_box(
    height: int, width: int, size: Size, crop_fraction: float
) -> tuple[int, int, int, int]:
    """Returns the part of an image that every evaluation, `ssl_jax.load` and every export uses.

    This is the central square, as in SimCLR's and BYOL's evaluation, or of a view that is not
    square the central rectangle of its aspect; torchvision's "resize 256, crop 224" is also a
    fraction of 0.875 and differs only at the border pixels. An image that
    already has the view's size is used whole: small images such as CIFAR's are not cropped, and the
    host's crops aren't cropped again. That depends on the image only, not on the rest of its
    dataset.

    Args:
      height: of the image, pixels.
      width: of the image, pixels.
      size: height and width of the view, pixels.
      crop_fraction: sides of the crop as a fraction of the largest one of its aspect: of a square,
        of the image's shorter side.

    Returns:
      Top, left, height, width.
    """
    if (height, width) == size:
        return 0, 0, height, width
    tall = max(1, round(crop_fraction * min(height, width * size[0] / size[1])))
    wide = max(1, round(crop_fraction * min(width, height * size[1] / size[0])))
    return (height - tall + 1) // 2, (width - wide + 1) // 2, tall, wide


def antialiased(view: ConfigDict) -> bool:
    """Returns whether downsizing averages over the area of an output pixel or only samples it.

    PIL averages, as do the methods that crop with torchvision; `tf.image.resize` samples, as do
    SimCLR and BYOL. Evaluated images are downsized in the same way.
    """
    return view.crop.sampler in ("torchvision", "none")


def view_corners(geometry: Geometry, height: int, width: int) -> Float[Array, "n 4 2"]:
    """Returns the source coordinates of the views' corners.

    Args:
      geometry: of `sample_geometry`, with the images on axis 0.
      height: of the images, pixels.
      width: of the images, pixels.

    Returns:
      (y, x) of a view's top left, top right, bottom right and bottom left corner, in pixels from
      the image's top left corner; corners of affine views may lie outside the image.
    """
    still = jnp.zeros(geometry["top"].shape)
    unmoved = dict.fromkeys(("degrees", "shear", "shift_y", "shift_x"), still)
    ends = jnp.array([0.0, 1.0])
    y, x = _trace({**unmoved, **geometry}, ends, ends, height, width)
    corners = jnp.stack([y, x], axis=-1) + 0.5  # from pixel centers to pixel edges
    return jnp.stack([corners[:, i, j] for i, j in ((0, 0), (0, 1), (1, 1), (1, 0))], axis=1)


def resize_images(
    images: Sources, size: Size, interpolation: str = "bicubic", antialias: bool = True
) -> Float[Array, "n tall wide c"]:
    """Resizes whole images, as for evaluation.

    Args:
      images: uint8, or floats in [0, 1].
      size: height and width of the result, pixels.
      interpolation: "bicubic" (Keys, a = -0.5) or "bilinear", with half-pixel centers.
      antialias: average over the area of an output pixel (PIL), or not (`tf.image.resize`).

    Returns:
      float32 in [0, 1].

    Raises:
      UserError: unknown interpolation.
    """
    n, height, width, _ = images.shape
    box = {name: jnp.full(n, side) for name, side in _whole(height, width).items()}
    return _resize(images, box, size, interpolation, antialias)


def _resize(
    images: Sources, box: Geometry, size: Size, interpolation: str, antialias: bool
) -> Float[Array, "n tall wide c"]:
    height, width = images.shape[1:3]
    how = (interpolation, antialias)
    rows = _resize_weights(box["top"], box["height"], height, size[0], *how)
    columns = _resize_weights(box["left"], box["width"], width, size[1], *how)
    x = jnp.einsum("nph,nhwc->npwc", rows, to_float(images), precision=_EXACT)
    x = jnp.einsum("nqw,npwc->npqc", columns, x, precision=_EXACT)
    return jnp.clip(x, 0.0, 1.0)


def _resize_weights(
    start: Int[Array, " n"],
    length: Int[Array, " n"],
    source: int,
    size: int,
    interpolation: str,
    antialias: bool,
) -> Float[Array, "n size source"]:
    """Returns the weight of each of `source` pixels in a row in each of `size` output pixels."""
    scale = (length / size)[:, None, None]
    center = start[:, None, None] + (jnp.arange(size)[None, :, None] + 0.5) * scale - 0.5
    pixel = jnp.arange(source)[None, None, :]
    distance = jnp.abs(pixel - center) / (jnp.maximum(scale, 1.0) if antialias else 1.0)
    inside = (pixel >= start[:, None, None]) & (pixel < (start + length)[:, None, None])
    weights = jnp.where(inside, _kernel(distance, interpolation), 0.0)
    return weights / weights.sum(axis=-1, keepdims=True)


def _kernel(distance: Float[Array, "..."], interpolation: str) -> Float[Array, "..."]:
    if interpolation == "bilinear":
        return jnp.maximum(1.0 - distance, 0.0)
    if interpolation == "bicubic":  # Keys' with a = -0.5, both PIL's and tf.image.resize's
        near = (1.5 * distance - 2.5) * distance**2 + 1.0
        far = ((2.5 - 0.5 * distance) * distance - 4.0) * distance + 2.0
        return jnp.where(distance < 1.0, near, jnp.where(distance < 2.0, far, 0.0))
    raise UserError(f"crop.interpolation is '{interpolation}': set it to bicubic or bilinear.")


def _source_coordinates(
    images: Sources, geometry: Geometry, size: Size
) -> tuple[Float[Array, "n tall wide"], Float[Array, "n tall wide"]]:
    """Returns the source row and column of every pixel of an affine view."""
    down, across = ((jnp.arange(side) + 0.5) / side for side in size)
    return _trace(geometry, down, across, *images.shape[1:3])


def _trace(
    geometry: Geometry,
    down: Float[Array, " tall"],
    across: Float[Array, " wide"],
    height: int,
    width: int,
) -> tuple[Float[Array, "n tall wide"], Float[Array, "n tall wide"]]:
    """Returns the source coordinates of a grid of points, `down` and `across` affine views."""
    g = {name: value[:, None, None] for name, value in geometry.items()}
    middle_y, middle_x = ((side - 1) / 2 for side in (height, width))
    y = g["top"] + down[None, :, None] * g["height"] - 0.5 - middle_y - g["shift_y"]
    x = g["left"] + across[None, None, :] * g["width"] - 0.5 - middle_x - g["shift_x"]
    sine, cosine = jnp.sin(jnp.radians(g["degrees"])), jnp.cos(jnp.radians(g["degrees"]))
    y, x = cosine * y - sine * x, sine * y + cosine * x
    x = x - jnp.tan(jnp.radians(g["shear"])) * y
    return y + middle_y, x + middle_x


def _sample(
    images: Sources, y: Float[Array, "n tall wide"], x: Float[Array, "n tall wide"]
) -> Float[Array, "n tall wide c"]:
    """Samples bilinearly at any coordinates, zero outside the image, without a gather."""
    n, height, width, _ = images.shape
    rows = _kernel(jnp.abs(y.reshape(n, -1, 1) - jnp.arange(height)[None, None, :]), "bilinear")
    columns = _kernel(jnp.abs(x.reshape(n, -1, 1) - jnp.arange(width)[None, None, :]), "bilinear")
    planes = []
    for channel in jnp.moveaxis(to_float(images), -1, 0):
        lines = jnp.einsum("npi,nij->npj", rows, channel, precision=_EXACT)
        planes.append(jnp.sum(columns * lines, axis=-1))
    pixels = jnp.stack(planes, axis=-1).reshape(*y.shape, -1)
    return jnp.clip(pixels, 0.0, 1.0)


def _torchvision_box(key: Array, height: int, width: int, crop: ConfigDict) -> Geometry:
    size_key, place_key = jax.random.split(key)
    tall, wide = _sample_sides(size_key, TORCHVISION_ATTEMPTS, height, width, crop)
    fits = (0 < tall) & (tall <= height) & (0 < wide) & (wide <= width)
    center_top, center_left, center_tall, center_wide = center_box(height, width, crop.aspect)
    tall = _first(fits, tall, center_tall)
    wide = _first(fits, wide, center_wide)
    place = _place(place_key, height - tall, width - wide)
    return {
        "top": jnp.where(fits.any(), place["top"], center_top),
        "left": jnp.where(fits.any(), place["left"], center_left),
        "height": tall,
        "width": wide,
    }


def _byol_box(key: Array, height: int, width: int, crop: ConfigDict) -> Geometry:
    size_key, place_key = jax.random.split(key)
    tall, wide = _sample_sides(size_key, 1, height, width, crop)
    tall, wide = jnp.clip(tall[0], 1, height), jnp.clip(wide[0], 1, width)
    return {**_place(place_key, height - tall, width - wide), "height": tall, "width": wide}


def _whole_box(key: Array, height: int, width: int, crop: ConfigDict) -> Geometry:
    return {name: jnp.asarray(side) for name, side in _whole(height, width).items()}


def _whole(height: int, width: int) -> dict[str, int]:
    return {"top": 0, "left": 0, "height": height, "width": width}


def _tf_box(key: Array, height: int, width: int, crop: ConfigDict) -> Geometry:
    """Runs the algorithm of TensorFlow's kernel, all attempts at once instead of in a loop.

    An attempt samples the aspect uniformly, then the height uniformly among the integers whose
    boxes fit and have an area in the range; so sides, not areas, are uniform.
    """
    aspect_key, height_key, place_key = jax.random.split(key, 3)
    smallest, largest = (height * width * area for area in crop.area)
    aspect = jax.random.uniform(
        aspect_key, (TF_ATTEMPTS,), minval=crop.aspect[0], maxval=crop.aspect[1]
    )
    highest = jnp.round(jnp.sqrt(largest / aspect))
    widest = jnp.floor((width + 0.5) / aspect)  # the height at which a box is as wide as the image
    highest = jnp.where(jnp.round(highest * aspect) > width, widest, highest)
    highest = jnp.minimum(highest, height)
    lowest = jnp.minimum(jnp.round(jnp.sqrt(smallest / aspect)), highest)
    tall = lowest + jnp.floor(
        jax.random.uniform(height_key, (TF_ATTEMPTS,)) * (highest - lowest + 1.0)
    )
    # Rounding may leave the range of areas: the kernel then tries one pixel more or less.
    tall = tall + (tall * jnp.round(tall * aspect) < smallest)
    tall = tall - (tall * jnp.round(tall * aspect) > largest)
    wide = jnp.round(tall * aspect)
    area = tall * wide
    fits = (tall > 0) & (tall <= height) & (wide > 0) & (wide <= width)
    fits &= (smallest <= area) & (area <= largest) & (area >= TF_MIN_COVERED * height * width)
    tall = _first(fits, tall.astype(jnp.int32), height)
    wide = _first(fits, wide.astype(jnp.int32), width)
    # The kernel never takes the last position, where a box would touch the far border.
    place = _place(place_key, height - tall - 1, width - wide - 1)
    return {**place, "height": tall, "width": wide}


def _sample_sides(
    key: Array, attempts: int, height: int, width: int, crop: ConfigDict
) -> tuple[Int[Array, " attempts"], Int[Array, " attempts"]]:
    """Samples heights and widths with a uniform area and a log-uniform aspect, width / height."""
    area_key, aspect_key = jax.random.split(key)
    low, high = (height * width * area for area in crop.area)
    area = jax.random.uniform(area_key, (attempts,), minval=low, maxval=high)
    low, high = (math.log(aspect) for aspect in crop.aspect)
    aspect = jnp.exp(jax.random.uniform(aspect_key, (attempts,), minval=low, maxval=high))
    tall, wide = jnp.round(jnp.sqrt(area / aspect)), jnp.round(jnp.sqrt(area * aspect))
    return tall.astype(jnp.int32), wide.astype(jnp.int32)


def _place(key: Array, bottom: Array, right: Array) -> Geometry:
    """Samples a uniform top in 0 … bottom and left in 0 … right; 0 where there is no room."""
    top_key, left_key = jax.random.split(key)
    return {
        "top": jax.random.randint(top_key, (), 0, jnp.maximum(bottom, 0) + 1),
        "left": jax.random.randint(left_key, (), 0, jnp.maximum(right, 0) + 1),
    }


def _first(fits: Bool[Array, " attempts"], values: Array, otherwise: int) -> Array:
    """Returns the value of the first attempt that fits, else `otherwise`."""
    first = fits & (jnp.cumsum(fits) == 1)
    return jnp.where(fits.any(), jnp.sum(jnp.where(first, values, 0)), otherwise)


def _is_affine(view: ConfigDict) -> bool:
    return any(view.affine[name] != 0 for name in ("degrees", "shear", "translate"))
