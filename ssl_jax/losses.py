"""The losses of the methods: arrays to scalars, in float32.

A loss that needs other devices' examples takes `axis_name`, returns the global value on every
device, and its gradient is this device's share: the gradient of the sum over devices of their local
means. One `pmean` of the parameters' gradients then gives exactly the single-device gradient.
The other losses are local means, which the caller averages over devices.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# One block of similarities, in float32, stays within 16 MiB.
_BLOCK_ELEMENTS = 4 * 1024 * 1024


def nt_xent(
    z1: Float[Array, "n d"],
    z2: Float[Array, "n d"],
    *,
    temperature: float,
    axis_name: str | None = None,
    block_size: int | None = None,
    memory: Float[Array, "k d"] | None = None,
) -> Float[Array, ""]:
    """The normalised temperature-scaled cross-entropy of two views (SimCLR, section 2.1, eq. 1).

    The mean over the 2N anchors of the global batch of -log softmax of the positive among all other
    2N-1 embeddings. The official code reports twice this value.

    Args:
      z1: projections of the first view, [n, d], any float type; normalised here in float32.
      z2: projections of the second view of the same images, [n, d].
      temperature: positive; safe down to 0.01.
      axis_name: mapped axis over which the batch is split; None on a single device.
      block_size: anchors compared with all embeddings at a time; memory is
        O(N·d + block_size·N). None picks one.
      memory: further negatives of every anchor, [k, d], rows of unit length, the same on every
        device; no gradient flows into them (SimCLR v2, section 2).

    Returns:
      float32 scalar, the same on every device.
    """
    z = jnp.stack([normalize(z1), normalize(z2)])
    if memory is None:
        memory = jnp.zeros((0, z.shape[-1]))
    anchors = 2 * z.shape[1]
    columns = anchors * _axis_size(axis_name) + memory.shape[0]
    block = block_size or max(1, min(anchors, _BLOCK_ELEMENTS // columns))
    local_mean = _local_nt_xent(z, memory, temperature, axis_name, min(block, anchors))
    return _pmean(local_mean, axis_name)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _local_nt_xent(
    z: Float[Array, "2 n d"],
    memory: Float[Array, "k d"],
    temperature: float,
    axis_name: str | None,
    block: int,
) -> Float[Array, ""]:
    return _nt_xent_forward(z, memory, temperature, axis_name, block)[0]


def _nt_xent_forward(
    z: Float[Array, "2 n d"],
    memory: Float[Array, "k d"],
    temperature: float,
    axis_name: str | None,
    block: int,
) -> tuple[Float[Array, ""], tuple[Array, ...]]:
    everyone = _gather(z, axis_name)  # [2, N, d]
    rows = _global_rows(z, everyone, axis_name)
    columns = jnp.concatenate([everyone.reshape(-1, z.shape[-1]), memory.astype(jnp.float32)])

    def log_sum_exp(anchor: Array, row: Array) -> Array:
        scores = _masked_scores(anchor, row, columns, temperature)
        return jax.nn.logsumexp(scores, axis=1)

    lse = _in_blocks(log_sum_exp, block, z.reshape(-1, z.shape[-1]), rows.reshape(-1))
    positive = jnp.sum(z[0] * z[1], axis=-1) / temperature
    loss = jnp.mean(lse) - jnp.mean(positive)
    all_lse = _gather(lse.reshape(2, -1), axis_name).reshape(-1)
    # What is remembered is no anchor: e^{s - inf} = 0 takes its rows out of the backward.
    all_lse = jnp.concatenate([all_lse, jnp.full(memory.shape[0], jnp.inf)])
    return loss, (z, memory, columns, rows, lse, all_lse)


def _nt_xent_backward(
    temperature: float,
    axis_name: str | None,
    block: int,
    saved: tuple[Array, ...],
    cotangent: Float[Array, ""],
) -> tuple[Array, Array]:
    """Each device completes its own rows; the matrix is symmetric, so nothing is reduced.

    dz_i = [Σ_{j≠i} (e^{s_ij - lse_i} + e^{s_ij - lse_j}) z_j - 2 z_positive(i)] / (anchors·τ),
    where `anchors` counts this device's alone: the gradient of the sum of the devices' local means.
    """
    z, memory, columns, rows, lse, all_lse = saved

    def attraction(anchor: Array, row: Array, own_lse: Array) -> Array:
        scores = _masked_scores(anchor, row, columns, temperature)
        weights = jnp.exp(scores - own_lse[:, None]) + jnp.exp(scores - all_lse[None, :])
        return _matmul(weights, columns)

    dz = _in_blocks(attraction, block, z.reshape(-1, z.shape[-1]), rows.reshape(-1), lse)
    dz = dz.reshape(z.shape) - 2 * z[::-1]
    dz *= cotangent / (2 * z.shape[1] * temperature)
    return dz, jnp.zeros_like(memory)


_local_nt_xent.defvjp(_nt_xent_forward, _nt_xent_backward)


def info_nce(
    queries: Float[Array, "n d"],
    keys: Float[Array, "n d"],
    queue: Float[Array, "k d"],
    *,
    temperature: float,
) -> Float[Array, ""]:
    """InfoNCE against a queue of negatives (MoCo, section 3.1, eq. 1).

    Args:
      queries: [n, d], normalised here.
      keys: the positives, [n, d], normalised here; no gradient flows into them.
      queue: the negatives, [K, d], rows of unit length.
      temperature: positive.

    Returns:
      float32 scalar, the mean over the n queries.
    """
    q, k = normalize(queries), jax.lax.stop_gradient(normalize(keys))
    positive = jnp.sum(q * k, axis=1, keepdims=True)
    negative = _matmul(q, jax.lax.stop_gradient(queue.astype(jnp.float32)).T)
    logits = jnp.concatenate([positive, negative], axis=1) / temperature
    return jnp.mean(jax.nn.logsumexp(logits, axis=1) - logits[:, 0])


def sinkhorn(
    scores: Float[Array, "n k"],
    *,
    epsilon: float = 0.05,
    iterations: int = 3,
    axis_name: str | None = None,
) -> Float[Array, "n k"]:
    """Balanced soft assignments by Sinkhorn-Knopp over the global batch (SwAV, section 3.1).

    In float32 and in logarithms, so that any finite scores are safe. No gradient flows through.

    Args:
      scores: of samples against prototypes, [n, K].
      epsilon: entropy regularisation.
      iterations: of normalising prototypes, then samples.
      axis_name: mapped axis over which the samples are split; None on a single device.

    Returns:
      Assignments, float32 [n, K], each row summing to 1.
    """
    log_q = jax.lax.stop_gradient(scores.astype(jnp.float32)) / epsilon
    for _ in range(iterations):
        top = jnp.max(log_q, axis=0)
        if axis_name is not None:
            top = jax.lax.pmax(top, axis_name)
        total = jnp.sum(jnp.exp(log_q - top), axis=0)
        if axis_name is not None:
            total = jax.lax.psum(total, axis_name)
        log_q -= top + jnp.log(total)
        log_q -= jax.nn.logsumexp(log_q, axis=1, keepdims=True)
    return jnp.exp(log_q)


def swapped_prediction(
    scores: Float[Array, "n v k"], assignments: Float[Array, "n a k"], *, temperature: float
) -> Float[Array, ""]:
    """Each crop predicts the other crops' assignments (SwAV, eq. 2 and its multi-crop form).

    Args:
      scores: of every crop against the prototypes, [n, V, K].
      assignments: of the first A crops, [n, A, K], rows summing to 1.
      temperature: positive.

    Returns:
      float32 scalar: the mean over the A assigned crops of the mean over the V-1 other crops of the
      cross-entropy, averaged over n.
    """
    views, assigned = scores.shape[1], assignments.shape[1]
    log_p = jax.nn.log_softmax(scores.astype(jnp.float32) / temperature, axis=-1)
    cross = -jnp.einsum("nak,nvk->av", assignments, log_p) / scores.shape[0]
    others = 1.0 - jnp.eye(assigned, views)
    return jnp.sum(cross * others) / (assigned * (views - 1))


def negative_cosine(p: Float[Array, "n d"], z: Float[Array, "n d"]) -> Float[Array, ""]:
    """The mean of -cos(p, z) (SimSiam, eq. 1); the caller stops the gradient of z."""
    return -jnp.mean(jnp.sum(normalize(p) * normalize(z), axis=-1))


def normalized_mse(p: Float[Array, "n d"], z: Float[Array, "n d"]) -> Float[Array, ""]:
    """The mean of the squared distance of unit vectors (BYOL, eq. 2), 2 - 2 cos(p, z)."""
    return jnp.mean(jnp.sum(jnp.square(normalize(p) - normalize(z)), axis=-1))


def normalize(x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
    """Rows of unit length, in float32; a zero row stays zero, with a finite gradient."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), 1e-24))


def _masked_scores(anchors: Array, rows: Int[Array, " b"], columns: Array, tau: float) -> Array:
    scores = _matmul(anchors, columns.T) / tau
    itself = rows[:, None] == jnp.arange(columns.shape[0])[None, :]
    return jnp.where(itself, -jnp.inf, scores)


def _in_blocks(function, block: int, *rows: Array) -> Array:  # type: ignore[no-untyped-def]
    """Applies a row-wise function to blocks of rows in turn, padding the last."""
    n = rows[0].shape[0]
    if block >= n:
        return function(*rows)
    blocks = -(-n // block)
    pad = blocks * block - n
    padded = [jnp.pad(r, [(0, pad)] + [(0, 0)] * (r.ndim - 1)) for r in rows]
    split = tuple(r.reshape(blocks, block, *r.shape[1:]) for r in padded)
    out = jax.lax.map(lambda args: function(*args), split)
    return out.reshape(blocks * block, *out.shape[2:])[:n]


def _global_rows(z: Array, everyone: Array, axis_name: str | None) -> Int[Array, "2 n"]:
    n, total = z.shape[1], everyone.shape[1]
    first = 0 if axis_name is None else jax.lax.axis_index(axis_name) * n
    own = first + jnp.arange(n)
    return jnp.stack([own, total + own])


def _matmul(a: Array, b: Array) -> Array:
    # float32 by default means bfloat16 passes on a TPU and TF32 on a GPU.
    return jnp.matmul(a, b, precision="highest")


def _gather(x: Array, axis_name: str | None) -> Array:
    return x if axis_name is None else jax.lax.all_gather(x, axis_name, axis=1, tiled=True)


def _pmean(x: Array, axis_name: str | None) -> Array:
    return x if axis_name is None else jax.lax.pmean(x, axis_name)


def _axis_size(axis_name: str | None) -> int:
    return 1 if axis_name is None else jax.lax.axis_size(axis_name)
