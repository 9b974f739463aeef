"""k-nearest-neighbor classification of frozen features."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ssl_jax.errors import UserError
from ssl_jax.memory import require_host_memory
from ssl_jax.spmd import Layout, Spmd, make_spmd

_QUERIES, _KEYS = 1024, 16_384  # per chunk: 64 MiB of similarities in float32
_VOTES = 2**24  # images and classes whose votes are counted together: 256 MiB
_CHUNKS = 64  # of queries that stay on a device while all keys are sent


def knn_classify(
    train_features: Float[np.ndarray, "n d"],
    train_labels: Int[np.ndarray, " n"],
    test_features: Float[np.ndarray, "m d"],
    *,
    num_classes: int,
    k: int = 200,
    temperature: float | None = 0.1,
) -> Int[np.ndarray, " m"]:
    """Classifies by a vote of the nearest neighbors (Wu et al., 2018, section 3.4).

    Args:
      train_features: [n, d]; compared by cosine similarity, so their norm does not matter.
      train_labels: [n], in 0 … num_classes-1.
      test_features: [m, d].
      num_classes: number of classes.
      k: number of neighbors that vote, at most n.
      temperature: a neighbor's vote has weight exp(similarity / temperature); None: equal weights.

    Returns:
      Predicted labels, int32 [m].

    Raises:
      UserError: train and test features differ in dimension, labels don't match the features or
        the number of classes, or k neighbors of each image can't fit in memory.
    """
    weight, voters = _voters(
        train_features, train_labels, test_features, num_classes, k, temperature
    )
    predicted = np.zeros(len(test_features), np.int32)
    rows = max(1, _VOTES // num_classes)
    for start in range(0, len(predicted), rows):
        part = slice(start, start + rows)
        predicted[part] = _shares(weight[part], voters[part], num_classes).argmax(axis=1)
    return predicted


def knn_votes(
    train_features: Float[np.ndarray, "n d"],
    train_labels: Int[np.ndarray, " n"],
    test_features: Float[np.ndarray, "m d"],
    *,
    num_classes: int,
    k: int = 200,
    temperature: float | None = 0.1,
) -> Float[np.ndarray, "m c"]:
    """Share of each class in the vote; arguments as for `knn_classify`.

    Raises:
      UserError: as for `knn_classify`, or the shares of all classes can't fit in memory.
    """
    require_host_memory(
        16 * len(test_features) * num_classes,
        f"The votes of {len(test_features)} images for {num_classes} classes",
        "Evaluate fewer images, or number the classes without gaps.",
    )
    weight, voters = _voters(
        train_features, train_labels, test_features, num_classes, k, temperature
    )
    return _shares(weight, voters, num_classes)


def _voters(
    train_features: Float[np.ndarray, "n d"],
    train_labels: Int[np.ndarray, " n"],
    test_features: Float[np.ndarray, "m d"],
    num_classes: int,
    k: int,
    temperature: float | None,
) -> tuple[Float[np.ndarray, "m k"], Int[np.ndarray, "m k"]]:
    """Weights and labels of each image's neighbors."""
    if len(train_labels) != len(train_features):
        raise UserError(
            f"The numbers of training features ({len(train_features)}) and labels "
            f"({len(train_labels)}) differ. Give one label per feature."
        )
    labels = np.asarray(train_labels)
    if len(labels) and not 0 <= labels.min() <= labels.max() < num_classes:
        raise UserError(
            f"Labels range from {labels.min()} to {labels.max()}, but there are {num_classes} "
            "classes. Leave out images without a label, or set num_classes."
        )
    similarity, neighbor = nearest_neighbors(train_features, test_features, k=k)
    # Divided by the row's largest weight, so that exp can't overflow; shares don't change.
    weight = np.ones_like(similarity)
    if temperature is not None:
        weight = np.exp((similarity - similarity[:, :1]) / temperature)
    return weight, labels[neighbor]


def _shares(
    weight: Float[np.ndarray, "m k"], voters: Int[np.ndarray, "m k"], num_classes: int
) -> Float[np.ndarray, "m c"]:
    votes = np.zeros((len(weight), num_classes))
    np.add.at(votes, (np.arange(len(weight))[:, None], voters), weight)
    shares: np.ndarray = votes / votes.sum(axis=1, keepdims=True)
    return shares


def nearest_neighbors(
    keys: Float[np.ndarray, "n d"], queries: Float[np.ndarray, "m d"], *, k: int
) -> tuple[Float[np.ndarray, "m k"], Int[np.ndarray, "m k"]]:
    """Finds the k keys with the highest cosine similarity to each query, nearest first.

    Both are processed in chunks, so memory does not grow with n·m. Queries are sharded over this
    process's devices, and each device compares its share with all keys, which are sent once per
    65,536 queries of a device.

    Args:
      keys: [n, d].
      queries: [m, d].
      k: number of neighbors, at most n.

    Returns:
      Cosine similarities float32 [m, k], and indices of keys int32 [m, k].

    Raises:
      UserError: keys and queries differ in dimension, or the result can't fit in memory.
    """
    if keys.shape[1] != queries.shape[1]:
        raise UserError(
            f"Cannot compare features of dimension {queries.shape[1]} with features of dimension "
            f"{keys.shape[1]}. Extract both with the same encoder."
        )
    k = min(k, len(keys))
    require_neighbors_memory(len(queries), k)
    spmd = make_spmd(devices=jax.local_devices())
    merge = _mapped_merge(spmd, k)
    similarity, index = [], []
    rows = min(_QUERIES, -(-len(queries) // spmd.size)) * spmd.size  # of a chunk
    starts = range(0, len(queries), rows)
    for at in range(0, len(starts), _CHUNKS):
        chunks = [_padded(queries[start : start + rows], rows) for start in starts[at:][:_CHUNKS]]
        placed = [spmd.place_batch(chunk) for chunk in chunks]
        best = [spmd.place_batch(_no_neighbors(rows, k)) for _ in chunks]
        for first in range(0, len(keys), _KEYS):
            key = spmd.replicate(
                (np.asarray(keys[first : first + _KEYS], np.float32), np.int32(first))
            )
            jax.block_until_ready(best)  # at most two chunks of keys are on the devices
            best = [merge(b, query, *key) for b, query in zip(best, placed, strict=True)]
        similarity += [np.asarray(b[0]) for b in best]
        index += [np.asarray(b[1]) for b in best]
    count = len(queries)
    return np.concatenate(similarity)[:count], np.concatenate(index)[:count]


def require_neighbors_memory(queries: int, k: int) -> None:
    """Refuses k nearest neighbors of each query that can't fit in this machine's memory."""
    fix = "Set a smaller config.eval.knn_k (--k)."
    require_host_memory(16 * k * queries, f"{k} neighbors of {queries} images", fix)


def _padded(queries: np.ndarray, rows: int) -> np.ndarray:
    padded = np.zeros((rows, queries.shape[1]), np.float32)
    padded[: len(queries)] = queries
    return padded


def _no_neighbors(rows: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    return np.full((rows, k), -np.inf, np.float32), np.zeros((rows, k), np.int32)


@functools.cache
def _mapped_merge(spmd: Spmd, k: int) -> Callable[..., tuple[Array, Array]]:
    """`_merge` mapped over devices, each with its own queries."""
    layouts: tuple[Layout, ...] = ("sharded", "sharded", "replicated", "replicated")
    return spmd.map(functools.partial(_merge, k=k), layouts, "sharded")


def _merge(
    best: tuple[Array, Array], query: Array, key: Array, first: Array, k: int
) -> tuple[Array, Array]:
    """The k nearest of the best so far and a new chunk of keys."""
    scores = jnp.matmul(_unit(query), _unit(key).T, precision="highest")
    index = jnp.broadcast_to(first + jnp.arange(key.shape[0], dtype=jnp.int32), scores.shape)
    all_scores = jnp.concatenate([best[0], scores], axis=1)
    all_index = jnp.concatenate([best[1], index], axis=1)
    top, at = jax.lax.top_k(all_scores, k)
    return top, jnp.take_along_axis(all_index, at, axis=1)


def _unit(x: Array) -> Array:
    x = x.astype(jnp.float32)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=1, keepdims=True), 1e-12)
