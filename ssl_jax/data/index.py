"""The sample ids of each step, and the random keys of their augmentation.

Both are pure functions of (seed, step). A resumed run, or one on a different number of devices or
processes, sees the same images, and there is no iterator state to restore.
"""

import dataclasses
import functools
import zlib

import jax
import numpy as np
from jaxtyping import Array, Int, Key


@dataclasses.dataclass(frozen=True)
class Index:
    """The order of a training set: each epoch a permutation, cut into whole batches.

    The last N mod B samples of each epoch's permutation are dropped, different ones each epoch: a
    batch across two epochs could hold the same image twice, as its own negative. Any step has its
    ids, so a run may end within an epoch, as those that count their epochs in images do.

    Attributes:
      num_examples: number of images in the training set, N.
      batch_size: number of images per step over all processes, B.
      seed: seed of the permutations.
    """

    num_examples: int
    batch_size: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Number of whole batches in an epoch."""
        return self.num_examples // self.batch_size

    def ids(self, step: int) -> Int[np.ndarray, " batch"]:
        """The sample ids of a step.

        Args:
          step: counted from 0 over the whole run.

        Returns:
          Distinct ids of the global batch, int32 [B], in device order.
        """
        return self.local_ids(step, np.arange(self.batch_size, dtype=np.int32))

    def local_ids(self, step: int, indices: Int[np.ndarray, " local"]) -> Int[np.ndarray, " local"]:
        """One process's share of `ids(step)`.

        Args:
          step: counted from 0 over the whole run.
          indices: positions in the global batch that its devices hold, `Spmd.local_indices`.

        Returns:
          `ids(step)[indices]`. Only these indices of an epoch's order are cached.
        """
        epoch, position = divmod(step, self.steps_per_epoch)
        return _indices_of_epoch(self, epoch, indices.astype(np.int32).tobytes())[position]


@functools.lru_cache(maxsize=2)
def _indices_of_epoch(index: Index, epoch: int, indices: bytes) -> Int[np.ndarray, "steps local"]:
    """The ids at some indices of every batch of an epoch."""
    order = permutation(index.seed, epoch, index.num_examples)
    whole = index.steps_per_epoch * index.batch_size
    held = np.frombuffer(indices, np.int32)
    ids = np.ascontiguousarray(order[:whole].reshape(-1, index.batch_size)[:, held])
    ids.flags.writeable = False
    return ids


def permutation(seed: int, epoch: int, num_examples: int) -> Int[np.ndarray, " n"]:
    """The order of an epoch: the stable argsort of counter-based random bits.

    Philox is a fixed function of its key, so the order doesn't depend on the machine or on the
    versions of NumPy and JAX.

    Args:
      seed: the run's seed.
      epoch: counted from 0.
      num_examples: number of ids to permute.

    Returns:
      A permutation of range(num_examples), int32.
    """
    bits = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(num_examples)
    order = np.argsort(bits, kind="stable").astype(np.int32)
    return order


def fixed_sample(count: int, most: int) -> Int[np.ndarray, " n"]:
    """Samples images of a split for measurements and pictures that need only some of them.

    A random sample, because the first ids of a split that is sorted by class are of one or two
    classes.

    Args:
      count: number of images in the split.
      most: number of images in the sample, at most.

    Returns:
      Distinct ids, int32, in random order, the same in every run: a smaller sample is the beginning
      of a larger one.
    """
    return np.random.default_rng(0).permutation(count)[:most].astype(np.int32)


def stream_key(key: Key[Array, ""], name: str, step: int | Array) -> Key[Array, ""]:
    """The key of a named random stream at a step; the same on every device."""
    return jax.random.fold_in(jax.random.fold_in(key, zlib.crc32(name.encode())), step)


def views_stream(key: Key[Array, ""], step: int | Array) -> Key[Array, ""]:
    """The key of all views at a step, from the run's key."""
    return stream_key(key, "views", step)


def view_keys(key: Key[Array, ""], ids: Int[Array, " n"], number: int) -> Key[Array, " n"]:
    """The keys that determine one view of some examples.

    Args:
      key: from `views_stream`.
      ids: the examples' ids.
      number: position of the view in `config.flat_views`.

    Returns:
      One key per example.
    """
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(example_keys(key, ids), number)


def example_keys(key: Key[Array, ""], ids: Int[Array, " n"]) -> Key[Array, " n"]:
    """One key per example from its global id, independent of its place in the batch or mesh."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, ids)
