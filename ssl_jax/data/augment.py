"""Colour augmentation on the device: pure functions from float images to float images.

Images are float32 in [0, 1], [n, height, width, 3]; factors, deltas and sigmas are one number for
all images or one per image, [n]. The `adjust_*` functions do not clip: `apply_colour` clips after
each of them, as the official codes do. `colour` is all that happens to a view after its geometry:
it draws every image's parameters from that image's own key, so that an image looks the same
wherever it stands in a batch, and applies them to the whole batch at once.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, Shaped, UInt8
from ml_collections import ConfigDict

from ssl_jax.errors import UserError

Images = Float[Array, "n height width 3"]
PerImage = float | Float[Array, ""] | Float[Array, " n"]
Parameters = dict[str, Shaped[Array, "..."]]
# Red, green and blue, each [n, height, width]: arithmetic on them runs twice as fast on a CPU as on
# interleaved channels.
_Planes = tuple[Array, Array, Array]

_GRAY_WEIGHTS = (0.2989, 0.587, 0.114)
_STYLES = ("tf", "torchvision")
_BRIGHTNESS_MODES = ("multiply", "add")
# Keeps the colours' draws apart from device_crop's, which may be given the same key.
_COLOUR = 1
# One uniform number per name; the order is part of what a seed means.
_UNIFORMS = (
    *("flip", "jitter", "brightness", "contrast", "saturation", "hue"),
    *("gray", "blur", "sigma", "solarize"),
)


def to_float(images: UInt8[Array, "n height width 3"] | Images) -> Images:
    """Images as float32: uint8 is divided by 255, floats are taken to be in [0, 1] already."""
    if images.dtype == jnp.uint8:
        return images.astype(jnp.float32) / 255.0
    return images.astype(jnp.float32)


def adjust_brightness(x: Images, factor: PerImage, mode: str = "multiply") -> Images:
    """Scales every pixel, or shifts it.

    Args:
      x: images.
      factor: what to multiply by, or to add.
      mode: "multiply" (SimCLR's released code, torchvision) or "add" (`tf.image.adjust_brightness`,
        BYOL, the variant of SimCLR v1's paper).

    Returns:
      Images, not clipped.

    Raises:
      UserError: unknown mode.
    """
    return _join(_brightness(_split(x), factor, mode))


def adjust_contrast(x: Images, factor: PerImage, style: str = "tf") -> Images:
    """Moves every pixel away from the image's mean (factor above 1) or towards it.

    Args:
      x: images.
      factor: 1 changes nothing, 0 leaves the mean.
      style: "tf" takes each channel's own mean (`tf.image.adjust_contrast`), "torchvision" the mean
        of the gray image for all three channels.

    Returns:
      Images, not clipped.

    Raises:
      UserError: unknown style.
    """
    return _join(_contrast(_split(x), factor, style))


def adjust_saturation(x: Images, factor: PerImage, style: str = "tf") -> Images:
    """Makes colours more vivid (factor above 1) or less.

    Args:
      x: images.
      factor: 0 or more; 1 changes nothing, 0 leaves no colour.
      style: "tf" scales the S of HSV, at most to 1, and keeps H and V
        (`tf.image.adjust_saturation`); "torchvision" moves every pixel away from its own gray or
        towards it.

    Returns:
      Images, not clipped.

    Raises:
      UserError: unknown style.
    """
    return _join(_saturation(_split(x), factor, style))


def adjust_hue(x: Images, delta: PerImage) -> Images:
    """Turns the H of HSV, as `tf.image.adjust_hue` and torchvision both do.

    Args:
      x: images.
      delta: of the turn, as a fraction of the full circle.

    Returns:
      Images; gray pixels stay as they are.
    """
    return _join(_hue(_split(x), delta))


def to_grayscale(x: Images) -> Images:
    """The luma .2989 R + .587 G + .114 B (TensorFlow's and torchvision's) in all 3 channels."""
    gray = _gray(_split(x))
    return _join((gray, gray, gray))


def gaussian_blur(x: Images, sigma: PerImage, kernel_size: int, style: str = "tf") -> Images:
    """Convolves with a Gaussian of `kernel_size` taps, normalised over them.

    PIL's GaussianBlur, which MoCo, SwAV and SimSiam use, approximates a Gaussian without a cut-off
    by three box filters; for those methods this is the Gaussian they mean.

    Args:
      x: images.
      sigma: standard deviation in pixels, above 0.
      kernel_size: taps along each axis; an even number gives one more, as in SimCLR's code.
      style: what lies beyond the border. "tf" has zeros there, so borders darken (the SAME padding
        of SimCLR and BYOL); "torchvision" has the image mirrored about its outermost pixels.

    Returns:
      Images.

    Raises:
      UserError: unknown style, or a kernel without taps.
    """
    _check("style", style, _STYLES)
    if kernel_size < 1:
        raise UserError(f"kernel_size is {kernel_size}: a blur needs 1 tap or more.")
    radius = kernel_size // 2
    sigmas = jnp.reshape(jnp.asarray(sigma, jnp.float32), (-1, 1))
    deviations = jnp.arange(radius + 1)[None, :] / sigmas
    half = jnp.exp(-0.5 * deviations**2)  # [n, radius + 1], from the centre outwards
    taps = half / (2.0 * half.sum(axis=1, keepdims=True) - 1.0)
    for axis in (1, 2):
        x = _convolve(x, taps, axis, "constant" if style == "tf" else "reflect")
    return x


def solarize(x: Images, threshold: PerImage = 0.5) -> Images:
    """Inverts the pixels at or above the threshold to 1 - x, as BYOL does."""
    return jnp.where(x >= _per_image(threshold, 4), 1.0 - x, x)


def draw_parameters(key: Key[Array, ""], view: ConfigDict) -> Parameters:
    """Draws what is to happen to one image's colours; `jax.vmap` it for a batch.

    Args:
      key: of this image in this view.
      view: config of the view.

    Returns:
      By name: whether to "flip", "jitter", "gray", "blur", "solarize"; "order" [4], the sequence
      of the jitter (0 brightness, 1 contrast, 2 saturation, 3 hue); the factors and deltas
      "brightness", "contrast", "saturation", "hue"; "sigma" in pixels; and, where the view has
      noise, "noise_key".
    """
    uniform_key, order_key, noise_key = jax.random.split(jax.random.fold_in(key, _COLOUR), 3)
    uniforms = jax.random.uniform(uniform_key, (len(_UNIFORMS),))
    u = dict(zip(_UNIFORMS, uniforms, strict=True))
    jitter = view.jitter
    brightness = _symmetric if jitter.brightness_mode == "add" else _around_one
    order = jax.random.permutation(order_key, 4) if jitter.random_order else jnp.arange(4)
    parameters = {
        "flip": u["flip"] < view.flip,
        "jitter": u["jitter"] < jitter.prob,
        "order": order,
        "brightness": brightness(u["brightness"], jitter.brightness),
        "contrast": _around_one(u["contrast"], jitter.contrast),
        "saturation": _around_one(u["saturation"], jitter.saturation),
        "hue": _symmetric(u["hue"], jitter.hue),
        "gray": u["gray"] < view.gray,
        "blur": u["blur"] < view.blur.prob,
        "sigma": _between(u["sigma"], *view.blur.sigma),
        "solarize": u["solarize"] < view.solarize.prob,
    }
    return {**parameters, "noise_key": noise_key} if view.noise > 0 else parameters


def apply_colour(
    images: UInt8[Array, "n size size 3"] | Float[Array, "n size size 3"],
    parameters: Parameters,
    view: ConfigDict,
) -> Float[Array, "n size size 3"]:
    """Applies drawn parameters: flip, jitter, gray, blur, solarize, noise, clip, normalise.

    What the view gives probability 0 is not in the compiled program. `view.jitter.style` is also
    the style of the blur.

    Args:
      images: crops, uint8 or floats in [0, 1].
      parameters: of `draw_parameters`, the images on axis 0.
      view: config of the view, static.

    Returns:
      float32 images; in [0, 1] unless the view has a mean and std.

    Raises:
      UserError: unknown style or brightness mode in the view.
    """
    x = to_float(images)
    if view.flip > 0:
        x = _where(parameters["flip"], x[:, :, ::-1], x)
    if view.gray > 0 and view.gray_first:
        x = _where(parameters["gray"], to_grayscale(x), x)
    if view.jitter.prob > 0:
        x = _where(parameters["jitter"], _jitter(x, parameters, view.jitter), x)
    if view.gray > 0 and not view.gray_first:
        x = _where(parameters["gray"], to_grayscale(x), x)
    if view.blur.prob > 0:
        taps = view.blur.kernel_size or max(x.shape[1] // 10, 1)
        blurred = gaussian_blur(x, parameters["sigma"], taps, view.jitter.style)
        x = _where(parameters["blur"], blurred, x)
    if view.solarize.prob > 0:
        x = _where(parameters["solarize"], solarize(x, view.solarize.threshold), x)
    if view.noise > 0:
        draw = jax.vmap(lambda key: jax.random.normal(key, x.shape[1:]))
        x = x + view.noise * draw(parameters["noise_key"])
    x = jnp.clip(x, 0.0, 1.0)
    if view.mean:
        mean, std = (jnp.array(each)[None, None, None, :] for each in (view.mean, view.std))
        x = (x - mean) / std
    return x


def colour(
    images: UInt8[Array, "n size size 3"] | Float[Array, "n size size 3"],
    keys: Key[Array, " n"],
    view: ConfigDict,
) -> Float[Array, "n size size 3"]:
    """The device's half of a view after its geometry; an image's pixels depend on its key alone.

    Args:
      images: crops, uint8 or floats in [0, 1].
      keys: one per image; they may be those that drew the crops.
      view: config of the view, static: close over it under `jax.jit`.

    Returns:
      float32 images; in [0, 1] unless the view has a mean and std.

    Raises:
      UserError: unknown style or brightness mode in the view.
    """
    parameters = jax.vmap(lambda key: draw_parameters(key, view))(keys)
    return apply_colour(images, parameters, view)


def _jitter(x: Images, parameters: Parameters, jitter: ConfigDict) -> Images:
    """The four adjustments in each image's own order, clipped to [0, 1] after each."""
    order = jnp.asarray(parameters["order"])

    def adjust(which: int, planes: _Planes) -> _Planes:
        if which == 0 and jitter.brightness > 0:
            return _brightness(planes, parameters["brightness"], jitter.brightness_mode)
        if which == 1 and jitter.contrast > 0:
            return _contrast(planes, parameters["contrast"], jitter.style)
        if which == 2 and jitter.saturation > 0:
            return _saturation(planes, parameters["saturation"], jitter.style)
        if which == 3 and jitter.hue > 0:
            return _hue(planes, parameters["hue"])
        return planes

    def adjust_as_ordered(position: Array, planes: _Planes) -> _Planes:
        # Every image gets all four and keeps one: three quarters of the arithmetic is thrown away,
        # but a switch per image would run the images of a batch one after the other.
        chosen = _per_image(order[:, position], 3)
        result = planes
        for which in range(4):
            result = _select(chosen == which, adjust(which, planes), result)
        return _clip(result)

    planes = _split(x)
    if jitter.random_order:
        # Unrolled, the compiler would compute each position again inside the next one's means.
        return _join(jax.lax.fori_loop(0, 4, adjust_as_ordered, planes))
    for which in range(4):
        planes = _clip(adjust(which, planes))
    return _join(planes)


def _brightness(planes: _Planes, factor: PerImage, mode: str) -> _Planes:
    _check("brightness mode", mode, _BRIGHTNESS_MODES)
    factor = _per_image(factor, 3)
    r, g, b = planes
    if mode == "add":
        return r + factor, g + factor, b + factor
    return r * factor, g * factor, b * factor


def _contrast(planes: _Planes, factor: PerImage, style: str) -> _Planes:
    _check("style", style, _STYLES)
    r, g, b = (plane.mean(axis=(1, 2), keepdims=True) for plane in planes)
    if style == "torchvision":
        r = g = b = _gray((r, g, b))  # the mean of the gray image: graying is linear
    return _blend((r, g, b), planes, _per_image(factor, 3))


def _saturation(planes: _Planes, factor: PerImage, style: str) -> _Planes:
    _check("style", style, _STYLES)
    factor = _per_image(factor, 3)
    if style == "torchvision":
        gray = _gray(planes)
        return _blend((gray, gray, gray), planes, factor)
    # At constant H and V, a channel's distance from V is proportional to S, which may grow to 1.
    value, spread = _value_and_spread(planes)
    limit = value / jnp.where(spread > 0, spread, 1.0)
    factor = jnp.clip(factor, 0.0, jnp.maximum(limit, 0.0))
    return _blend((value, value, value), planes, factor)


def _hue(planes: _Planes, delta: PerImage) -> _Planes:
    r, g, b = planes
    value, spread = _value_and_spread(planes)
    per_sixth = 1.0 / jnp.where(spread > 0, spread, 1.0)  # a gray pixel's hue does not matter
    green_or_blue = jnp.where(g == value, 2.0 + (b - r) * per_sixth, 4.0 + (r - g) * per_sixth)
    sixths = jnp.where(r == value, (g - b) * per_sixth, green_or_blue) + 6.0 * _per_image(delta, 3)
    sixths = sixths - 6.0 * jnp.floor(sixths / 6.0)
    # Around the circle every channel is full for two sixths, absent for two, linear in between.
    return (
        value - spread * jnp.clip(2.0 - jnp.abs(sixths - 3.0), 0.0, 1.0),
        value - spread * jnp.clip(jnp.abs(sixths - 2.0) - 1.0, 0.0, 1.0),
        value - spread * jnp.clip(jnp.abs(sixths - 4.0) - 1.0, 0.0, 1.0),
    )


def _value_and_spread(planes: _Planes) -> tuple[Array, Array]:
    """The V of HSV, and how far below it the least channel is: S is their quotient."""
    r, g, b = planes
    value = jnp.maximum(jnp.maximum(r, g), b)
    return value, value - jnp.minimum(jnp.minimum(r, g), b)


def _gray(planes: _Planes) -> Array:
    r, g, b = planes
    return _GRAY_WEIGHTS[0] * r + _GRAY_WEIGHTS[1] * g + _GRAY_WEIGHTS[2] * b


def _blend(base: _Planes, planes: _Planes, factor: Array) -> _Planes:
    r, g, b = (low + factor * (plane - low) for low, plane in zip(base, planes, strict=True))
    return r, g, b


def _convolve(x: Images, taps: Float[Array, "_n half"], axis: int, border: str) -> Images:
    """A symmetric filter along one axis; `taps` go from the centre outwards."""
    # A convolution with a filter per image has a group per image, 30 times as slow on a CPU. There
    # shifts and sums are fastest; where matrices are multiplied by the way, a matrix per image is.
    cpu, others = (
        functools.partial(how, axis=axis, border=border) for how in (_by_shifts, _by_matrices)
    )
    result: Images = jax.lax.platform_dependent(x, taps, cpu=cpu, default=others)
    return result


def _by_shifts(x: Images, taps: Float[Array, "_n half"], axis: int, border: str) -> Images:
    radius = taps.shape[1] - 1
    width = [(radius, radius) if i == axis else (0, 0) for i in range(4)]
    # Without the barrier the compiler fuses what made x into every shift, and makes it per tap.
    padded = jax.lax.optimization_barrier(jnp.pad(x, width, mode=border))

    def shifted(by: int) -> Images:
        start = radius + by
        return jax.lax.slice_in_dim(padded, start, start + x.shape[axis], axis=axis)

    total = _per_image(taps[:, 0], 4) * shifted(0)
    for by in range(1, radius + 1):
        total = total + _per_image(taps[:, by], 4) * (shifted(-by) + shifted(by))
    return total


def _by_matrices(x: Images, taps: Float[Array, "_n half"], axis: int, border: str) -> Images:
    """Each image's rows or columns times a banded matrix, in TF32 or better: to 1/1000 of white."""
    radius, size = taps.shape[1] - 1, x.shape[axis]
    by = jnp.arange(-radius, radius + 1)
    source = jnp.arange(size)[:, None] + by[None, :]  # which pixel a tap takes
    if border == "reflect":
        source = jnp.abs(source)
        source = jnp.where(source < size, source, 2 * (size - 1) - source)
    takes = (source[:, :, None] == jnp.arange(size)[None, None, :]).astype(jnp.float32)
    matrices = jnp.einsum("nt,itj->nij", taps[:, jnp.abs(by)], takes, precision="highest")
    subscripts = "nij,njwc->niwc" if axis == 1 else "nij,nhjc->nhic"
    return jnp.einsum(subscripts, matrices, x, precision="high")


def _per_image(value: PerImage | Array, dimensions: int) -> Array:
    """A number, or one per image, shaped to multiply arrays with the images on axis 0."""
    return jnp.reshape(jnp.asarray(value), (-1,) + (1,) * (dimensions - 1))


def _where(condition: Array, yes: Images, no: Images) -> Images:
    return jnp.where(_per_image(condition, 4), yes, no)


def _split(x: Images) -> _Planes:
    return x[..., 0], x[..., 1], x[..., 2]


def _join(planes: _Planes) -> Images:
    return jnp.stack(planes, axis=-1)


def _select(condition: Array, yes: _Planes, no: _Planes) -> _Planes:
    r, g, b = (jnp.where(condition, new, old) for new, old in zip(yes, no, strict=True))
    return r, g, b


def _clip(planes: _Planes) -> _Planes:
    r, g, b = (jnp.clip(plane, 0.0, 1.0) for plane in planes)
    return r, g, b


def _between(u: Array, low: float, high: float) -> Array:
    return low + u * (high - low)


def _around_one(u: Array, strength: float) -> Array:
    return _between(u, max(0.0, 1.0 - strength), 1.0 + strength)


def _symmetric(u: Array, strength: float) -> Array:
    return _between(u, -strength, strength)


def _check(what: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UserError(f"The {what} is '{value}': it may be {' or '.join(known)}.")
