"""Prefetches batches onto the devices, and augments them there."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Self

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from ssl_jax.config import flat_views
from ssl_jax.data.augment import color
from ssl_jax.data.device_crop import antialiased, crop_views, eval_box, resize_images
from ssl_jax.data.index import Index, view_keys
from ssl_jax.data.sources import Source
from ssl_jax.errors import UserError

_DEPTH = 1  # batches waiting on the devices, besides the one in use and the one being placed


def make_augment_fn(
    config: ConfigDict,
) -> Callable[[dict[str, Any], dict[str, Array], Array], dict[str, Any]]:
    """Makes the device half of the input: crops of device_data images, then color.

    Args:
      config: the run's config, whose views define the augmentation.

    Returns:
      A function (batch from the source, device data, the step's `views_stream`) -> the batch with
      "views", a tuple of float32 [n, H, W, 3]. An example's pixels depend only on the key and its
      id, not on its position in the batch or mesh.
    """
    views = flat_views(config)

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
                cropped = crop_views(device_data["image"][raw["id"]], keys, view)
            made.append(color(cropped, keys, view))
        return {**batch, "views": tuple(made)}

    return augment_fn


def unnormalized(config: ConfigDict) -> ConfigDict:
    """A copy of a config whose views stay in [0, 1], for display."""
    plain = ConfigDict(config.to_dict())
    for name in plain.views:
        plain.views[name].mean = plain.views[name].std = ()
    return plain


def prepare_eval(images: Array, config: ConfigDict) -> Float[Array, "n size size 3"]:
    """Prepares images for evaluation: center crop, resize, normalize as in training.

    `device_crop.eval_box` is cropped and resized to the first view's size: the central square, or
    the whole image if it already has that size. Downsizing uses antialiasing if training does, see
    `device_crop.antialiased`.

    Args:
      images: uint8, or floats in [0, 1], [n, H, W, 3].
      config: the run's config.

    Returns:
      float32 [n, size, size, 3].
    """
    view = flat_views(config)[0]
    top, left, tall, wide = eval_box(*images.shape[1:3], view.size, config.eval.crop_fraction)
    x = images[:, top : top + tall, left : left + wide]
    x = resize_images(x, view.size, config.eval.interpolation, antialiased(view))
    if view.mean:
        mean, std = (jnp.array(each)[None, None, None, :] for each in (view.mean, view.std))
        x = (x - mean) / std
    return x


class Prefetcher:
    """Reads batches in a background thread and places them on the devices ahead of time.

    Attributes:
      wait_seconds: total time that `next` has waited for data.
    """

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
        self.wait_seconds, self._timeout_s = 0.0, timeout_s
        self._queue: queue.Queue[Any] = queue.Queue(maxsize=_DEPTH)
        self._stopped = threading.Event()
        self._thread = threading.Thread(
            target=self._read, args=(source.batches(steps), place), daemon=True
        )
        self._thread.start()

    def _read(self, batches: Iterator[dict[str, Any]], place: Callable[[Any], Any]) -> None:
        try:
            for batch in batches:
                if not self._put(place(batch)):
                    return
            self._put(RuntimeError("the source ended before the last step"))
        except BaseException as error:  # `next` raises it in the main thread
            self._put(error)

    def _put(self, item: Any) -> bool:
        while not self._stopped.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def next(self) -> Any:
        """Returns the next batch, on the devices; raises errors of the background thread.

        Raises:
          UserError: no batch within `timeout_s` seconds.
        """
        start = time.perf_counter()
        try:
            item = self._queue.get(timeout=self._timeout_s or None)
        except queue.Empty:
            raise UserError(
                f"Data loader timed out: no batch for {self._timeout_s:g} s "
                "(config.data.timeout_s). Check the file system, then rerun the same command to "
                "resume."
            ) from None
        self.wait_seconds += time.perf_counter() - start
        if isinstance(item, BaseException):
            raise item
        return item

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stopped.set()
        self._thread.join(timeout=10)
