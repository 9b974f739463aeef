"""Users' own sources of images: what they implement, and their names in configs."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from jaxtyping import Int

from ssl_jax.config import register_source


class Images(Protocol):
    """A split of your own images, with ids 0 … N-1: all that a source of your own implements.

    Which images a step needs, and their order, follow from the run's seed, so an object of this
    kind needs neither shuffling nor any state. It may also have the attributes `labels` (integers
    [N]: the class of each image, or -1 for an image without a label; for images of several classes
    0s and 1s [N, classes], and -1 where it is unknown) and `class_names` (strings, in
    the order of the labels).
    """

    def __len__(self) -> int:
        """The number of images, N."""
        ...

    def read(self, ids: Int[np.ndarray, " n"]) -> Sequence[Any]:
        """Reads images.

        Args:
          ids: int64, ascending and without repeats, as HDF5 and chunked arrays are read best: the
            images of a whole step, of this process. Calls for one split never overlap.

        Returns:
          An image per id, in the same order, each decoded or each encoded: uint8 arrays [H, W, C],
          of any size, or one array [n, H, W, 3]; or the bytes of image files.
        """
        ...


# What opens the images of a path, by name.
_OPENERS: dict[str, Callable[[str], Any]] = {}


def register(name: str) -> Callable[[Callable[[str], Any]], Any]:
    """A decorator that makes a source available as `config.data.name = name`.

    Your own file, such as a config file, may register one (see docs/data.md). Registering a name
    again replaces the earlier source.

    Args:
      name: the source's name in configs.

    Returns:
      The decorator of a class or function. It is called with `config.data.dir`, and with
      `config.data.test_dir` if that isn't empty, and returns `Images` or a
      `ssl_jax.data.sources.Source`. The decorator returns it unchanged.

    Raises:
      UserError: the name is a source of ssl_jax.
    """
    register_source(name)

    def add(opener: Callable[[str], Any]) -> Callable[[str], Any]:
        _OPENERS[name] = opener
        return opener

    return add


def registered_opener(name: str) -> Callable[[str], Any] | None:
    """What was registered under a name, or None."""
    return _OPENERS.get(name)
