"""Reads batches ahead of time, and augments them on the devices."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from ssl_jax.config import flat_views, view_size
from ssl_jax.data.augment import color, to_float
from ssl_jax.data.device_crop import antialiased, crop_views, eval_box, resize_images
from ssl_jax.data.index import Index, view_keys
from ssl_jax.data.reader import Reader
from ssl_jax.data.sources import Source


def make_augment_fn(
    config: ConfigDict,
) -> Callable[[dict[str, Any], dict[str, Array], Array], dict[str, Any]]:
    """Makes the device half of the input: crops of device_data images, then color.

    Args:
      config: the run's config, whose views define the augmentation.

    Returns:
      A function (batch from the source, device data, the step's `views_stream`) -> the batch with
      "views", a tuple of float32 [n, H, W, C]. An example's pixels depend only on the key and its
      id, not on its position in the batch or mesh. The batch may hold the whole images, "image", in
      place of device data.
    """
    views = flat_views(config)

    def whole(raw: dict[str, Any], device_data: dict[str, Array]) -> Array:
        images = raw["image"] if "image" in raw else device_data["image"][raw["id"]]
        # Bytes are converted with each crop.
        is_plain = images.dtype == jnp.uint8 and not config.data.range
        return images if is_plain else to_float(images, config.data.range)

    def augment_fn(
        raw: dict[str, Any], device_data: dict[str, Array], key: Array
    ) -> dict[str, Any]:
        batch: dict[str, Any] = {name: raw[name] for name in ("id", "label") if name in raw}
        made = []
        for number, view in enumerate(views):
            keys = view_keys(key, raw["id"], number)
            if "views" in raw:
                cropped = raw["views"][number]
            else:
                cropped = crop_views(whole(raw, device_data), keys, view)
            made.append(color(cropped, keys, view))
        return {**batch, "views": tuple(made)}

    return augment_fn


def unnormalized(config: ConfigDict) -> ConfigDict:
    """A copy of a config whose views stay in [0, 1], for display."""
    plain = ConfigDict(config.to_dict())
    for name in plain.views:
        plain.views[name].mean = plain.views[name].std = ()
    return plain


def prepare_eval(images: Array, config: ConfigDict) -> Float[Array, "n tall wide c"]:
    """Prepares images for evaluation: center crop, resize, normalize as in training.

    `device_crop.eval_box` is cropped and resized to the first view's size: the central square, that
    of a view that is not square the central rectangle of its aspect, or the whole image if it
    already has that size. Downsizing uses antialiasing if training does, see
    `device_crop.antialiased`.

    Args:
      images: uint8 or uint16, scaled by `config.data.range`, or floats in [0, 1], [n, H, W, C].
      config: the run's config.

    Returns:
      float32 [n, height, width, C].
    """
    view = flat_views(config)[0]
    height, width = images.shape[1:3]
    size = view_size(view)
    top, left, tall, wide = eval_box(height, width, size, config.eval.crop_fraction)
    x = to_float(images[:, top : top + tall, left : left + wide], config.data.range)
    x = resize_images(x, size, config.eval.interpolation, antialiased(view))
    if view.mean:
        mean, std = (jnp.array(each)[None, None, None, :] for each in (view.mean, view.std))
        x = (x - mean) / std
    return x


class Prefetcher(Reader[Any]):
    """Reads batches in a background thread, ahead of time."""

    def __init__(
        self,
        source: Source,
        index: Index,
        indices: Int[np.ndarray, " local"],
        place: Callable[[Any], Any],
        first_step: int,
        last_step: int,
        timeout_s: float = 0.0,
    ) -> None:
        """Starts reading.

        Args:
          source: the source of the images.
          index: the sample ids of each step.
          indices: positions in the global batch that this process's devices hold.
          place: puts a host batch on the devices.
          first_step: first step to read, counted over the whole run.
          last_step: the step after the last one to read.
          timeout_s: maximum time that `next` waits, in seconds; 0 for no limit.
        """
        steps = ((step, index.local_ids(step, indices)) for step in range(first_step, last_step))
        super().__init__(source.batches(steps), timeout_s, place)
