"""Augmentation on the device: pure functions from float images to float images.

Images are float32 in [0, 1], [n, height, width, channels]; factors, deltas and sigmas are one
number for all images or one per image, [n]. The `adjust_*` functions do not clip; the jitter clips
after each of them, as the official codes do.

`AUGMENTATIONS` is the table of everything that happens to a view after its geometry, and `color`
applies it: each image's parameters are sampled from that image's own key, so its pixels don't
depend on its position in the batch, and are applied to the whole batch at once.
"""

import dataclasses
import functools
import math
import operator
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, Shaped, UInt8
from ml_collections import ConfigDict

from ssl_jax.errors import UserError, require_choice

Images = Float[Array, "n height width c"]
PerImage = float | Float[Array, ""] | Float[Array, " n"]
Parameters = dict[str, Shaped[Array, "..."]]
# The channels, each [n, height, width]: arithmetic on them runs twice as fast on a CPU as on
# interleaved channels.
_Planes = tuple[Array, ...]

_GRAY_WEIGHTS = (0.2989, 0.587, 0.114)
_STYLES = ("tf", "torchvision")
_BRIGHTNESS_MODES = ("multiply", "add")
_JITTERS = ("brightness", "contrast", "saturation", "hue")  # as "order" numbers them
# Separates the colors' random numbers from device_crop's, which may be given the same key.
_COLOR = 1
# One uniform number per name; the order is part of what a seed means. Other names have a key each.
_UNIFORMS = ("flip", "jitter", *_JITTERS, "gray", "blur", "sigma", "solarize")


def to_float(images: Shaped[Array, "n height width c"], limits: Sequence[float] = ()) -> Images:
    """Converts images to float32 in [0, 1].

    Args:
      images: uint8 or uint16; or floats, which must be in [0, 1] already.
      limits: `config.data.range`, the integers that become 0 and 1; empty: the range of their type.
    """
    x = images.astype(jnp.float32)
    if jnp.issubdtype(images.dtype, jnp.floating):
        return x
    if limits:
        low, high = limits
        return jnp.clip((x - low) / (high - low), 0.0, 1.0)
    return x / float(jnp.iinfo(images.dtype).max)


def adjust_brightness(x: Images, factor: PerImage, mode: str = "multiply") -> Images:
    """Scales or shifts every pixel.

    Args:
      x: images.
      factor: multiplied by, or added to, every pixel.
      mode: "multiply" (SimCLR's released code, torchvision) or "add" (`tf.image.adjust_brightness`,
        BYOL, the variant of SimCLR v1's paper).

    Returns:
      Images, not clipped.

    Raises:
      UserError: unknown mode.
    """
    return _join(_brightness(_split(x), factor, mode))


def adjust_contrast(x: Images, factor: PerImage, style: str = "tf") -> Images:
    """Moves every pixel away from the image's mean (factor above 1) or toward it.

    Args:
      x: images.
      factor: 1 changes nothing, 0 leaves the mean.
      style: "tf" uses each channel's own mean (`tf.image.adjust_contrast`), "torchvision" the mean
        of the grayscale image for all three channels; both are the same unless there are three.

    Returns:
      Images, not clipped.

    Raises:
      UserError: unknown style.
    """
    return _join(_contrast(_split(x), factor, style))


def adjust_saturation(x: Images, factor: PerImage, style: str = "tf") -> Images:
    """Makes colors more vivid (factor above 1) or less.

    Args:
      x: RGB images.
      factor: 0 or more; 1 changes nothing, 0 leaves no color.
      style: "tf" scales the S of HSV, up to 1, and keeps H and V
        (`tf.image.adjust_saturation`); "torchvision" moves every pixel away from or toward its own
        gray.

    Returns:
      Images, not clipped.

    Raises:
      UserError: unknown style.
    """
    return _join(_saturation(_split(x), factor, style))


def adjust_hue(x: Images, delta: PerImage) -> Images:
    """Rotates the H of HSV, as `tf.image.adjust_hue` and torchvision do.

    Args:
      x: RGB images.
      delta: rotation, as a fraction of the full circle.

    Returns:
      Images; gray pixels are unchanged.
    """
    return _join(_hue(_split(x), delta))


def to_grayscale(x: Images) -> Images:
    """Sets all channels to the luma .2989 R + .587 G + .114 B (TensorFlow's and torchvision's)."""
    gray = _gray(_split(x))
    return _join((gray, gray, gray))


def gaussian_blur(x: Images, sigma: PerImage, kernel_size: int, style: str = "tf") -> Images:
    """Convolves with a Gaussian of `kernel_size` taps that sum to 1.

    PIL's GaussianBlur, which MoCo, SwAV and SimSiam use, approximates an untruncated Gaussian by
    three box filters; this is the Gaussian that it approximates, truncated.

    Args:
      x: images.
      sigma: standard deviation in pixels, above 0.
      kernel_size: taps along each axis; an even number gives one more, as in SimCLR's code.
      style: padding. "tf" pads with zeros, so borders darken (the SAME padding of SimCLR and
        BYOL); "torchvision" mirrors the image about its outermost pixels.

    Returns:
      Images.

    Raises:
      UserError: unknown style, or kernel_size below 1.
    """
    require_choice("The style", style, _STYLES)
    if kernel_size < 1:
        raise UserError(f"kernel_size is {kernel_size}: set it to 1 or more.")
    radius = kernel_size // 2
    sigmas = jnp.reshape(jnp.asarray(sigma, jnp.float32), (-1, 1))
    deviations = jnp.arange(radius + 1)[None, :] / sigmas
    half = jnp.exp(-0.5 * deviations**2)  # [n, radius + 1], from the center outward
    taps = half / (2.0 * half.sum(axis=1, keepdims=True) - 1.0)
    for axis in (1, 2):
        x = _convolve(x, taps, axis, "constant" if style == "tf" else "reflect")
    return x


def solarize(x: Images, threshold: PerImage = 0.5) -> Images:
    """Replaces each x at or above the threshold by 1 - x, as BYOL does."""
    return jnp.where(x >= _per_image(threshold, 4), 1.0 - x, x)


class RandomNumbers:
    """The random numbers of one image in one view; each name has a stream of its own."""

    def __init__(self, key: Key[Array, ""]) -> None:
        self._key = key
        uniform_key, order_key, noise_key = jax.random.split(jax.random.fold_in(key, _COLOR), 3)
        self._keys = {"order": order_key, "noise": noise_key}
        uniforms = jax.random.uniform(uniform_key, (len(_UNIFORMS),))
        self._uniforms = dict(zip(_UNIFORMS, uniforms, strict=True))

    def key(self, name: str) -> Key[Array, ""]:
        """Returns the name's key."""
        if name in self._keys:
            return self._keys[name]
        return jax.random.fold_in(self._key, zlib.crc32(name.encode()))

    def uniform(self, name: str, low: float = 0.0, high: float = 1.0) -> Float[Array, ""]:
        """Returns the name's uniform number in [low, high), the same one at each call."""
        u = self._uniforms[name] if name in self._uniforms else jax.random.uniform(self.key(name))
        return low + u * (high - low)


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """One entry of `AUGMENTATIONS`.

    Attributes:
      name: also the parameter that holds which images are changed.
      key: of the view's config, its probability; at 0 the augmentation is not compiled.
      apply: (images, parameters, view) -> all images changed, [n, height, width, c].
      sample: (random numbers, view) -> one image's further parameters.
      describe: (one image's parameters, view) -> the text below the view in `ssl-jax views`; None
        for the name.
      legend: explains the text's numbers.
      settings: view -> the text in parentheses in a model card.
      by_chance: False if all images are changed and `key` is a strength.
    """

    name: str
    key: str
    apply: Callable[[Images, Parameters, ConfigDict], Images]
    sample: Callable[[RandomNumbers, ConfigDict], Parameters] = lambda random, view: {}
    describe: Callable[[Mapping[str, Any], ConfigDict], str] | None = None
    legend: str = ""
    settings: Callable[[ConfigDict], str] = lambda view: ""
    by_chance: bool = True

    def probability(self, view: ConfigDict) -> float:
        """Returns the value of `key`."""
        value: float = operator.attrgetter(self.key)(view)
        return value


def _is_shift(name: str, jitter: ConfigDict) -> bool:
    """Whether an adjustment adds a number around 0; the others multiply by one around 1."""
    return name == "hue" or (name == "brightness" and jitter.brightness_mode == "add")


def _sample_jitter(random: RandomNumbers, view: ConfigDict) -> Parameters:
    jitter = view.jitter
    parameters = {}
    for name in _JITTERS:
        strength = jitter[name]
        low = -strength if _is_shift(name, jitter) else max(0.0, 1.0 - strength)
        high = strength if _is_shift(name, jitter) else 1.0 + strength
        parameters[name] = random.uniform(name, low, high)
    order = jnp.arange(4)
    if jitter.random_order:
        order = jax.random.permutation(random.key("order"), order)
    return {**parameters, "order": order}


def _apply_jitter(x: Images, parameters: Parameters, view: ConfigDict) -> Images:
    """The four adjustments in each image's own order, clipped to [0, 1] after each."""
    jitter, order = view.jitter, jnp.asarray(parameters["order"])

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

    def adjust_in_order(position: Array, planes: _Planes) -> _Planes:
        # Every image gets all four and keeps one: three quarters of the arithmetic is discarded,
        # but a switch per image would process the images of a batch one after the other.
        chosen = _per_image(order[:, position], 3)
        result = planes
        for which in range(4):
            result = _select(chosen == which, adjust(which, planes), result)
        return _clip(result)

    planes = _split(x)
    if jitter.random_order:
        # Unrolled, the compiler would compute each position again inside the next one's means.
        return _join(jax.lax.fori_loop(0, 4, adjust_in_order, planes))
    for which in range(4):
        planes = _clip(adjust(which, planes))
    return _join(planes)


def _describe_jitter(parameters: Mapping[str, Any], view: ConfigDict) -> str:
    """The factors in the image's order, without those whose strength is 0."""
    jitter = view.jitter
    factors = [
        f"{name[0]}{parameters[name]:{'+z' if _is_shift(name, jitter) else ''}.2f}"
        for name in (_JITTERS[which] for which in parameters["order"])
        if jitter[name] > 0
    ]
    return " ".join(["jitter", *factors]) if factors else ""


def blur_taps(size: tuple[int, int], view: ConfigDict) -> int:
    """The number of taps of the blur of a view, see the key `blur.kernel_size`.

    Args:
      size: height and width of the view, pixels.
      view: its config.
    """
    taps = view.blur.kernel_size or max(size[0] // 10, 1)
    if view.jitter.style == "tf":
        return taps
    if not view.blur.kernel_size:
        # The reach of Pillow's blur depends on sigma only, not on the size of the image.
        taps = max(taps, 2 * math.ceil(3 * view.blur.sigma[1]) + 1)
    return min(taps, 2 * min(size) - 1)  # the mirrored border has one pixel less than the image


def _apply_blur(x: Images, parameters: Parameters, view: ConfigDict) -> Images:
    taps = blur_taps((x.shape[1], x.shape[2]), view)
    return gaussian_blur(x, parameters["sigma"], taps, view.jitter.style)


def _add_noise(x: Images, parameters: Parameters, view: ConfigDict) -> Images:
    sample = jax.vmap(lambda key: jax.random.normal(key, x.shape[1:]))
    return x + view.noise * sample(parameters["noise_key"])


# In the order applied.
AUGMENTATIONS = (
    Augmentation("flip", "flip", lambda x, p, view: x[:, :, ::-1]),
    Augmentation(
        "jitter",
        key="jitter.prob",
        apply=_apply_jitter,
        sample=_sample_jitter,
        describe=_describe_jitter,
        legend="jitter in the order applied: b brightness, c contrast, s saturation, h hue",
        settings=lambda view: ", ".join(f"{name} {view.jitter[name]:g}" for name in _JITTERS),
    ),
    Augmentation("gray", "gray", lambda x, p, view: to_grayscale(x)),
    Augmentation(
        "blur",
        key="blur.prob",
        apply=_apply_blur,
        sample=lambda random, view: {"sigma": random.uniform("sigma", *view.blur.sigma)},
        describe=lambda p, view: f"blur {p['sigma']:.2f}",
        legend="blur sigma in pixels of the view",
        settings=lambda view: "sigma {:g} to {:g}".format(*view.blur.sigma),
    ),
    Augmentation(
        "solarize",
        key="solarize.prob",
        apply=lambda x, p, view: solarize(x, view.solarize.threshold),
        describe=lambda p, view: f"solarize {view.solarize.threshold:g}",
        legend="solarize threshold",
        settings=lambda view: f"from {view.solarize.threshold:g}",
    ),
    Augmentation(
        "noise",
        key="noise",
        apply=_add_noise,
        sample=lambda random, view: {"noise_key": random.key("noise")},
        describe=lambda p, view: f"noise {view.noise:g}",
        legend="noise standard deviation",
        by_chance=False,
    ),
)


def augmentations(view: ConfigDict) -> list[Augmentation]:
    """Returns the augmentations that a view's config turns on, in the order applied."""
    entries = list(AUGMENTATIONS)
    if view.gray_first:
        names = [entry.name for entry in entries]
        entries.insert(names.index("jitter"), entries.pop(names.index("gray")))
    return [entry for entry in entries if entry.probability(view) > 0]


def sample_parameters(key: Key[Array, ""], view: ConfigDict) -> Parameters:
    """Samples one image's parameters; `jax.vmap` it for a batch.

    Args:
      key: of this image in this view.
      view: config of the view.

    Returns:
      The parameters of the augmentations that the view has. By an augmentation's name, whether the
      image is changed; "order" [4], the sequence of the jitter (0 brightness, 1 contrast,
      2 saturation, 3 hue); its factors and deltas "brightness", "contrast", "saturation", "hue";
      the blur's "sigma" in pixels; "noise_key".
    """
    random = RandomNumbers(key)
    parameters: Parameters = {}
    for entry in augmentations(view):
        if entry.by_chance:
            parameters[entry.name] = random.uniform(entry.name) < entry.probability(view)
        parameters |= entry.sample(random, view)
    return parameters


def apply_parameters(
    images: UInt8[Array, "n tall wide c"] | Float[Array, "n tall wide c"],
    parameters: Parameters,
    view: ConfigDict,
) -> Float[Array, "n tall wide c"]:
    """Applies sampled parameters, clips, and normalizes.

    Augmentations of probability 0 are not in the compiled program. `view.jitter.style` is also the
    style of the blur.

    Args:
      images: crops, uint8 or floats in [0, 1].
      parameters: of `sample_parameters`, with the images on axis 0.
      view: config of the view, static.

    Returns:
      float32 images; in [0, 1] unless the view has a mean and std.

    Raises:
      UserError: unknown style or brightness mode in the view.
    """
    x = to_float(images)
    for entry in augmentations(view):
        changed = entry.apply(x, parameters, view)
        x = _where(parameters[entry.name], changed, x) if entry.by_chance else changed
    x = jnp.clip(x, 0.0, 1.0)
    if view.mean:
        mean, std = (jnp.array(each)[None, None, None, :] for each in (view.mean, view.std))
        x = (x - mean) / std
    return x


def describe(parameters: Mapping[str, Any], view: ConfigDict) -> list[str]:
    """Describes what was done to one image, in the order applied.

    Args:
      parameters: of this image, from `sample_parameters`.
      view: config of the view.

    Returns:
      A short text per augmentation that changed the image.
    """
    applied = [e for e in augmentations(view) if not e.by_chance or parameters[e.name]]
    texts = [e.describe(parameters, view) if e.describe else e.name for e in applied]
    return [text for text in texts if text]


def color(
    images: UInt8[Array, "n tall wide c"] | Float[Array, "n tall wide c"],
    keys: Key[Array, " n"],
    view: ConfigDict,
) -> Float[Array, "n tall wide c"]:
    """Applies the device's augmentations to crops; an image's pixels depend only on its key.

    Args:
      images: crops, uint8 or floats in [0, 1].
      keys: one per image; may be the keys that sampled the crops.
      view: config of the view, static: close over it under `jax.jit`.

    Returns:
      float32 images; in [0, 1] unless the view has a mean and std.

    Raises:
      UserError: unknown style or brightness mode in the view.
    """
    parameters = jax.vmap(lambda key: sample_parameters(key, view))(keys)
    return apply_parameters(images, parameters, view)


def _brightness(planes: _Planes, factor: PerImage, mode: str) -> _Planes:
    require_choice("The brightness mode", mode, _BRIGHTNESS_MODES)
    factor = _per_image(factor, 3)
    if mode == "add":
        return tuple(plane + factor for plane in planes)
    return tuple(plane * factor for plane in planes)


def _contrast(planes: _Planes, factor: PerImage, style: str) -> _Planes:
    require_choice("The style", style, _STYLES)
    means: _Planes = tuple(plane.mean(axis=(1, 2), keepdims=True) for plane in planes)
    if style == "torchvision" and len(planes) == 3:
        means = (_gray(means),) * 3  # the mean of the gray image: graying is linear
    return _blend(means, planes, _per_image(factor, 3))


def _saturation(planes: _Planes, factor: PerImage, style: str) -> _Planes:
    require_choice("The style", style, _STYLES)
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
    per_sixth = 1.0 / jnp.where(spread > 0, spread, 1.0)  # a gray pixel's hue is irrelevant
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
    """Returns the V of HSV and its distance from the smallest channel; S is their quotient."""
    r, g, b = planes
    value = jnp.maximum(jnp.maximum(r, g), b)
    return value, value - jnp.minimum(jnp.minimum(r, g), b)


def _gray(planes: _Planes) -> Array:
    r, g, b = planes
    return _GRAY_WEIGHTS[0] * r + _GRAY_WEIGHTS[1] * g + _GRAY_WEIGHTS[2] * b


def _blend(base: _Planes, planes: _Planes, factor: Array) -> _Planes:
    return tuple(low + factor * (plane - low) for low, plane in zip(base, planes, strict=True))


def _convolve(x: Images, taps: Float[Array, "_n half"], axis: int, border: str) -> Images:
    """Applies a symmetric filter along one axis; `taps` go from the center outward."""
    # A convolution with a filter per image has a group per image, 30 times slower on a CPU. There
    # shifts and sums are fastest; on hardware for matrix products, a banded matrix per image is.
    cpu, others = (
        functools.partial(how, axis=axis, border=border) for how in (_by_shifts, _by_matrices)
    )
    result: Images = jax.lax.platform_dependent(x, taps, cpu=cpu, default=others)
    return result


def _by_shifts(x: Images, taps: Float[Array, "_n half"], axis: int, border: str) -> Images:
    radius = taps.shape[1] - 1
    width = [(radius, radius) if i == axis else (0, 0) for i in range(4)]
    # Without the barrier the compiler fuses x's producer into every shift, recomputed per tap.
    padded = jax.lax.optimization_barrier(jnp.pad(x, width, mode=border))

    def shifted(by: int) -> Images:
        start = radius + by
        return jax.lax.slice_in_dim(padded, start, start + x.shape[axis], axis=axis)

    total = _per_image(taps[:, 0], 4) * shifted(0)
    for by in range(1, radius + 1):
        total = total + _per_image(taps[:, by], 4) * (shifted(-by) + shifted(by))
    return total


def _by_matrices(x: Images, taps: Float[Array, "_n half"], axis: int, border: str) -> Images:
    """Multiplies by a banded matrix per image, in TF32 or better: exact to 1/1000 of white."""
    radius, size = taps.shape[1] - 1, x.shape[axis]
    by = jnp.arange(-radius, radius + 1)
    source = jnp.arange(size)[:, None] + by[None, :]  # the pixel that a tap reads
    if border == "reflect":
        source = jnp.abs(source)
        source = jnp.where(source < size, source, 2 * (size - 1) - source)
    takes = (source[:, :, None] == jnp.arange(size)[None, None, :]).astype(jnp.float32)
    matrices = jnp.einsum("nt,itj->nij", taps[:, jnp.abs(by)], takes, precision="highest")
    subscripts = "nij,njwc->niwc" if axis == 1 else "nij,nhjc->nhic"
    return jnp.einsum(subscripts, matrices, x, precision="high")


def _per_image(value: PerImage | Array, dimensions: int) -> Array:
    """Reshapes a number, or one per image, to multiply arrays with the images on axis 0."""
    return jnp.reshape(jnp.asarray(value), (-1,) + (1,) * (dimensions - 1))


def _where(condition: Array, yes: Images, no: Images) -> Images:
    return jnp.where(_per_image(condition, 4), yes, no)


def _split(x: Images) -> _Planes:
    return tuple(x[..., channel] for channel in range(x.shape[-1]))


def _join(planes: _Planes) -> Images:
    return jnp.stack(planes, axis=-1)


def _select(condition: Array, yes: _Planes, no: _Planes) -> _Planes:
    return tuple(jnp.where(condition, new, old) for new, old in zip(yes, no, strict=True))


def _clip(planes: _Planes) -> _Planes:
    return tuple(jnp.clip(plane, 0.0, 1.0) for plane in planes)
