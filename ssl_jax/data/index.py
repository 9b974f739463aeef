"""Which samples a step sees, and the random keys of what happens to them.

Both are functions of (seed, step) alone, so a resumed run, another number of devices and another
number of processes all see the same images, and nothing has to be restored or sought.
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

    The N mod B samples at the end of an epoch's permutation are left out of that epoch (others in
    each epoch): a batch that joined two epochs could hold one image twice, as its own negative.

    Attributes:
      num_examples: images in the training set, N.
      batch_size: images in a step over all processes, B.
      seed: of the permutations.
    """

    num_examples: int
    batch_size: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in an epoch."""
        return self.num_examples // self.batch_size

    def ids(self, step: int) -> Int[np.ndarray, " batch"]:
        """The sample ids of a step.

        Args:
          step: counted from 0 over the whole run.

        Returns:
          Distinct ids of the global batch, int32 [B], in the order of the devices.
        """
        return self.local_ids(step, np.arange(self.batch_size, dtype=np.int32))

    def local_ids(self, step: int, indices: Int[np.ndarray, " local"]) -> Int[np.ndarray, " local"]:
        """One process's share of `ids(step)`.

        Args:
          step: counted from 0 over the whole run.
          indices: of the global batch that its devices hold, `Spmd.local_indices`.

        Returns:
          `ids(step)[indices]`. No more of an epoch's order is kept than these indices of its steps.
        """
        epoch, position = divmod(step, self.steps_per_epoch)
        return _indices_of_epoch(self, epoch, indices.astype(np.int32).tobytes())[position]


@functools.lru_cache(maxsize=2)
def _indices_of_epoch(index: Index, epoch: int, indices: bytes) -> Int[np.ndarray, "steps local"]:
    """The ids of some indices of every batch of an epoch."""
    order = permutation(index.seed, epoch, index.num_examples)
    whole = index.steps_per_epoch * index.batch_size
    held = np.frombuffer(indices, np.int32)
    ids = np.ascontiguousarray(order[:whole].reshape(-1, index.batch_size)[:, held])
    ids.flags.writeable = False
    return ids


def permutation(seed: int, epoch: int, num_examples: int) -> Int[np.ndarray, " n"]:
    """The order of an epoch: the stable argsort of counter-based random bits.

    Philox is a fixed function of its key, so the order is the same on every machine and in every
    version of NumPy and JAX.

    Args:
      seed: of the run.
      epoch: counted from 0.
      num_examples: how many ids to permute.

    Returns:
      A permutation of range(num_examples), int32.
    """
    bits = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(num_examples)
    order = np.argsort(bits, kind="stable").astype(np.int32)
    return order


def stream_key(key: Key[Array, ""], name: str, step: int | Array) -> Key[Array, ""]:
    """The key of a named stream of randomness at a step; the same on every device."""
    return jax.random.fold_in(jax.random.fold_in(key, zlib.crc32(name.encode())), step)


def views_stream(key: Key[Array, ""], step: int | Array) -> Key[Array, ""]:
    """The key of all views of a step, from the run's key."""
    return stream_key(key, "views", step)


def view_keys(key: Key[Array, ""], ids: Int[Array, " n"], number: int) -> Key[Array, " n"]:
    """The keys on which a view of some examples depends, and on nothing else.

    Args:
      key: of `views_stream`.
      ids: of the examples.
      number: of the view, in the order of `config.flat_views`.

    Returns:
      One key per example.
    """
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(example_keys(key, ids), number)


def example_keys(key: Key[Array, ""], ids: Int[Array, " n"]) -> Key[Array, " n"]:
    """One key per example from its global id, wherever in the batch or on the mesh it is."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, ids)
