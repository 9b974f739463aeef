"""The losses of the methods: arrays to scalars, in float32.

A loss that needs other devices' examples takes `axis_name`, returns the global value on every
device, and its gradient is this device's share: the gradient of the sum over devices of their local
means. One `pmean` of the parameters' gradients then gives exactly the single-device gradient.
The other losses are local means, which the caller averages over devices.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

_Limits = tuple[int, int]
# Similarities held at a time, float32, by platform: a problem that has no more is one block, else
# rows are taken so many at a time; and, where each pair is visited once, the rows and columns of a
# block. A CPU's cache holds 4 MiB; an accelerator needs much at once to be busy.
_CPU_BLOCK = (2**22, 1024)
_BLOCK = (2**26, 4096)
# Scores within ±60 need no maximum taken out: their exponentials, sums of 2^38 of them and the
# inverses stay within float32.
_SMALL_SCORE = 60.0


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
      block_size: anchors compared at a time; memory is O(N·d + block_size·N). None picks one
        that keeps a block within 16 MiB on a CPU, 256 MiB elsewhere.
      memory: further negatives of every anchor, [k, d], rows of unit length, the same on every
        device; no gradient flows into them (SimCLR v2, section 2).

    Returns:
      float32 scalar, the same on every device.
    """
    z = jnp.stack([normalize(z1), normalize(z2)])
    if memory is None:
        memory = jnp.zeros((0, z.shape[-1]))
    return _pmean(_local_nt_xent(z, memory, temperature, axis_name, block_size), axis_name)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _local_nt_xent(
    z: Float[Array, "2 n d"],
    memory: Float[Array, "k d"],
    temperature: float,
    axis_name: str | None,
    block_size: int | None,
) -> Float[Array, ""]:
    return _nt_xent_forward(z, memory, temperature, axis_name, block_size)[0]


def _nt_xent_forward(
    z: Float[Array, "2 n d"],
    memory: Float[Array, "k d"],
    temperature: float,
    axis_name: str | None,
    block_size: int | None,
) -> tuple[Float[Array, ""], tuple[Array, ...]]:
    gathered = _gather(z, axis_name)  # [2, N, d]
    rows = _global_rows(z, gathered, axis_name).reshape(-1)
    anchors = z.reshape(-1, z.shape[-1])
    columns = jnp.concatenate([gathered.reshape(-1, z.shape[-1]), memory.astype(jnp.float32)])

    def log_sum_exps(limits: _Limits, anchors: Array, rows: Array, columns: Array) -> Array:
        sizes = len(anchors), len(columns), block_size, limits
        if pair_block := _in_pairs(*sizes):
            return _pairs_log_sum_exps(anchors, temperature, pair_block)
        block = _rows_of_block(*sizes)
        return _rows_log_sum_exps(anchors, rows, columns, temperature, block)

    lse = _by_platform(log_sum_exps, anchors, rows, columns)
    positive = jnp.sum(z[0] * z[1], axis=-1) / temperature
    loss = jnp.mean(lse) - jnp.mean(positive)
    all_lse = _gather(lse.reshape(2, -1), axis_name).reshape(-1)
    # What is remembered is no anchor: e^{s - inf} = 0 takes its rows out of the backward.
    all_lse = jnp.concatenate([all_lse, jnp.full(memory.shape[0], jnp.inf)])
    return loss, (z, memory, columns, rows, lse, all_lse)


def _nt_xent_backward(
    temperature: float,
    axis_name: str | None,
    block_size: int | None,
    saved: tuple[Array, ...],
    cotangent: Float[Array, ""],
) -> tuple[Array, Array]:
    """Each device completes its own rows; the matrix is symmetric, so nothing is reduced.

    dz_i = [Σ_{j≠i} (e^{s_ij - lse_i} + e^{s_ij - lse_j}) z_j - 2 z_positive(i)] / (anchors·τ),
    where `anchors` counts this device's alone: the gradient of the sum of the devices' local means.
    """
    z, memory, columns, rows, lse, all_lse = saved
    anchors = z.reshape(-1, z.shape[-1])

    def grad_z(
        limits: _Limits, anchors: Array, rows: Array, columns: Array, lse: Array, all_lse: Array
    ) -> Array:
        sizes = len(anchors), len(columns), block_size, limits
        if pair_block := _in_pairs(*sizes):
            return _pairs_attractions(anchors, lse, temperature, pair_block)
        block = _rows_of_block(*sizes)
        return _rows_attractions(anchors, rows, columns, lse, all_lse, temperature, block)

    dz = _by_platform(grad_z, anchors, rows, columns, lse, all_lse)
    dz = dz.reshape(z.shape) - 2 * z[::-1]
    dz *= cotangent / (2 * z.shape[1] * temperature)
    return dz, jnp.zeros_like(memory)


_local_nt_xent.defvjp(_nt_xent_forward, _nt_xent_backward)


def _by_platform(function, *arrays: Array):  # type: ignore[no-untyped-def]
    """function(limits, *arrays), with the limits of the platform that it is compiled for."""
    cpu, others = (functools.partial(function, limits) for limits in (_CPU_BLOCK, _BLOCK))
    return jax.lax.platform_dependent(*arrays, cpu=cpu, default=others)


def _rows_of_block(rows: int, columns: int, block_size: int | None, limits: _Limits) -> int:
    return min(block_size or max(1, limits[0] // columns), rows)


def _in_pairs(anchors: int, columns: int, block_size: int | None, limits: _Limits) -> int:
    """Rows and columns of a block where half of the symmetric matrix tells everything; else 0."""
    if columns > anchors or _rows_of_block(anchors, columns, block_size, limits) == anchors:
        return 0  # other devices' anchors are among them, or one block holds it all
    return block_size or -(-anchors // -(-anchors // limits[1]))


def _rows_log_sum_exps(
    anchors: Array, rows: Array, columns: Array, temperature: float, block: int
) -> Array:
    def log_sum_exp(anchor: Array, row: Array) -> Array:
        return _log_sum_exp(_masked_scores(anchor, row, columns, temperature), 1, temperature)

    return _in_blocks(log_sum_exp, block, anchors, rows)


def _rows_attractions(
    anchors: Array,
    rows: Array,
    columns: Array,
    lse: Array,
    all_lse: Array,
    temperature: float,
    block: int,
) -> Array:
    def attraction(anchor: Array, row: Array, own_lse: Array) -> Array:
        scores = _masked_scores(anchor, row, columns, temperature)
        return _matmul(_weights(scores, own_lse, all_lse, temperature), columns)

    return _in_blocks(attraction, block, anchors, rows, lse)


def _pairs_log_sum_exps(anchors: Array, temperature: float, block: int) -> Array:
    blocks = _split(anchors, block)

    def visit(i: Array, j: Array, lse: Array) -> Array:
        scores = _pair_scores(blocks, i, j, len(anchors), temperature)
        by_row, by_column = (_log_sum_exp(scores, axis, temperature) for axis in (1, 0))
        lse = lse.at[i].set(jnp.logaddexp(lse[i], by_row))
        return lse.at[j].set(jnp.logaddexp(lse[j], by_column))

    lse = _over_pairs(len(blocks), visit, jnp.full(blocks.shape[:2], -jnp.inf))
    return lse.reshape(-1)[: len(anchors)]


def _pairs_attractions(anchors: Array, lse: Array, temperature: float, block: int) -> Array:
    blocks, lse = _split(anchors, block), _split(lse, block)

    def visit(i: Array, j: Array, dz: tuple[Array, Array]) -> tuple[Array, Array]:
        scores = _pair_scores(blocks, i, j, len(anchors), temperature)
        weights = _weights(scores, lse[i], lse[j], temperature)
        # The second transposed, for on the CPU weights.T @ blocks[i] takes twice as long.
        to_rows, to_columns = dz
        to_rows = to_rows.at[i].add(_matmul(weights, blocks[j]))
        return to_rows, to_columns.at[j].add(_matmul(blocks[i].T, weights))

    zeros = jnp.zeros_like(blocks)
    to_rows, to_columns = _over_pairs(len(blocks), visit, (zeros, zeros.swapaxes(1, 2)))
    total = to_rows + to_columns.swapaxes(1, 2)
    return total.reshape(-1, anchors.shape[-1])[: len(anchors)]


def _log_sum_exp(scores: Array, axis: int, temperature: float) -> Array:
    if 1 / temperature <= _SMALL_SCORE:
        return jnp.log(jnp.sum(jnp.exp(scores), axis=axis))
    return jax.nn.logsumexp(scores, axis=axis)


def _weights(scores: Array, own_lse: Array, other_lse: Array, temperature: float) -> Array:
    """e^{s_ij - lse_i} + e^{s_ij - lse_j}."""
    own, other = own_lse[:, None], other_lse[None, :]
    if 1 / temperature <= _SMALL_SCORE:
        return jnp.exp(scores) * (jnp.exp(-own) + jnp.exp(-other))
    return jnp.exp(scores - own) + jnp.exp(scores - other)


def _pair_scores(blocks: Array, i: Array, j: Array, total: int, temperature: float) -> Array:
    """Scores of block i with block j, -inf but where the row comes before the column."""
    number = jnp.arange(blocks.shape[1])
    rows, columns = i * blocks.shape[1] + number, j * blocks.shape[1] + number
    # A row before a column before `total` leaves out itself, the second visit and the padding.
    once = (rows[:, None] < columns[None, :]) & (columns < total)[None, :]
    return jnp.where(once, _matmul(blocks[i], blocks[j].T) / temperature, -jnp.inf)


def _over_pairs(blocks: int, visit, carry):  # type: ignore[no-untyped-def]
    """Folds visit(i, j, carry) over the pairs i <= j of blocks."""
    # One loop of a length that is known: a GPU would ask for the end of another at every turn.
    rows, columns = (jnp.asarray(indices, jnp.int32) for indices in np.triu_indices(blocks))
    return jax.lax.fori_loop(
        0, len(rows), lambda k, carry: visit(rows[k], columns[k], carry), carry
    )


def info_nce(
    queries: Float[Array, "n d"],
    keys: Float[Array, "n d"],
    queue: Float[Array, "k d"],
    *,
    temperature: float,
    block_size: int | None = None,
) -> Float[Array, ""]:
    """InfoNCE against a queue of negatives (MoCo, section 3.1, eq. 1).

    Args:
      queries: [n, d], normalised here.
      keys: the positives, [n, d], normalised here; no gradient flows into them.
      queue: the negatives, [K, d], rows of unit length; no gradient flows into them.
      temperature: positive; safe down to 0.01.
      block_size: queries compared with the queue at a time; memory is O((n + K)·d + block_size·K).
        None picks one that keeps a block within 16 MiB on a CPU, 256 MiB elsewhere.

    Returns:
      float32 scalar, the mean over the n queries.
    """
    q = normalize(queries)
    k, queue = jax.lax.stop_gradient((normalize(keys), queue.astype(jnp.float32)))
    return _info_nce(q, k, queue, temperature, block_size)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _info_nce(
    q: Float[Array, "n d"],
    k: Float[Array, "n d"],
    queue: Float[Array, "k d"],
    temperature: float,
    block_size: int | None,
) -> Float[Array, ""]:
    def losses(limits: _Limits, q: Array, k: Array, queue: Array) -> Array:
        def loss(q: Array, k: Array) -> Array:
            _, positive, lse = _info_nce_scores(q, k, queue, temperature)
            return lse - positive

        block = _rows_of_block(len(q), len(queue), block_size, limits)
        return _in_blocks(loss, block, q, k)

    return jnp.mean(_by_platform(losses, q, k, queue))


def _info_nce_forward(
    q: Array, k: Array, queue: Array, temperature: float, block_size: int | None
) -> tuple[Float[Array, ""], Float[Array, "n d"]]:
    """The loss and its gradient together: a query's needs no other's, so nothing is done twice."""

    def losses_and_gradients(limits: _Limits, q: Array, k: Array, queue: Array) -> Any:
        def loss_and_gradient(q: Array, k: Array) -> tuple[Array, Array]:
            scores, positive, lse = _info_nce_scores(q, k, queue, temperature)
            attraction = _matmul(jnp.exp(scores - lse[:, None]), queue)
            return lse - positive, attraction + jnp.expm1(positive - lse)[:, None] * k

        block = _rows_of_block(len(q), len(queue), block_size, limits)
        return _in_blocks(loss_and_gradient, block, q, k)

    loss, dq = _by_platform(losses_and_gradients, q, k, queue)
    return jnp.mean(loss), dq / (q.shape[0] * temperature)


def _info_nce_backward(
    temperature: float,
    block_size: int | None,
    dq: Float[Array, "n d"],
    cotangent: Float[Array, ""],
) -> tuple[Array, None, None]:
    return dq * cotangent, None, None


_info_nce.defvjp(_info_nce_forward, _info_nce_backward)


def _info_nce_scores(
    q: Array, k: Array, queue: Array, temperature: float
) -> tuple[Float[Array, "n k"], Float[Array, " n"], Float[Array, " n"]]:
    """Scores of the negatives and of the positive, and the log-sum-exp of both."""
    scores = _matmul(q, queue.T) / temperature
    positive = jnp.sum(q * k, axis=1) / temperature
    return scores, positive, jnp.logaddexp(positive, jax.nn.logsumexp(scores, axis=1))


def sinkhorn(
    scores: Float[Array, "n k"],
    *,
    epsilon: float = 0.05,
    iterations: int = 3,
    axis_name: str | None = None,
) -> Float[Array, "n k"]:
    """Balanced soft assignments by Sinkhorn-Knopp over the global batch (SwAV, section 3.1).

    In float32, safe for any finite scores; no gradient flows through. The first iteration is done
    in logarithms. After it every row sums to 1, so that prototypes' sums stay within [1/K, N] and
    samples' within [1/N, K]: the others multiply factors of rows and columns, which go into the
    matrix before they could leave float32.

    Args:
      scores: of samples against prototypes, [n, K].
      epsilon: entropy regularisation.
      iterations: of normalising prototypes, then samples; at least 1.
      axis_name: mapped axis over which the samples are split; None on a single device.

    Returns:
      Assignments, float32 [n, K], each row summing to 1.
    """
    scores = jax.lax.stop_gradient(scores.astype(jnp.float32))
    top = jnp.max(scores, axis=0)
    if axis_name is not None:
        top = jax.lax.pmax(top, axis_name)
    # The floor is far below what an exponential can tell, and still finite divided by epsilon.
    logits = jnp.maximum(scores - top[None, :], -1e30) / epsilon
    total = _psum(jnp.sum(jnp.exp(logits), axis=0), axis_name)
    log_q = logits - jnp.log(total)[None, :]
    q = jnp.exp(log_q - jnp.max(log_q, axis=1, keepdims=True))
    rows, columns = 1 / jnp.sum(q, axis=1), jnp.ones(q.shape[1])
    for done in range(1, iterations):
        if done % 4 == 0:
            q, rows = q * columns[None, :] * rows[:, None], jnp.ones(q.shape[0])
        columns = 1 / _psum(_matmul(rows, q, "highest"), axis_name)
        rows = 1 / _matmul(q, columns, "highest")
    return q * columns[None, :] * rows[:, None]


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
    scores = scores.astype(jnp.float32)
    # Both terms below would be large and nearly equal otherwise.
    scores -= jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    agreement = _matmul(assignments.astype(jnp.float32), scores.swapaxes(1, 2), "highest")
    agreement /= temperature
    lse = jax.nn.logsumexp(scores / temperature, axis=-1)
    # -Σ q log p = lse - Σ q·scores/τ, for q sums to 1; [A, V].
    cross = jnp.mean(lse[:, None, :] - agreement, axis=0)
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


def _in_blocks(function, block: int, *rows: Array):  # type: ignore[no-untyped-def]
    """Applies a row-wise function to blocks of rows in turn, padding the last."""
    n = rows[0].shape[0]
    if block >= n:
        return function(*rows)
    out = jax.lax.map(lambda args: function(*args), tuple(_split(r, block) for r in rows))
    return jax.tree.map(lambda o: o.reshape(-1, *o.shape[2:])[:n], out)


def _split(x: Array, block: int) -> Array:
    """Rows in blocks, [blocks, block, ...], the last one padded with zeros."""
    blocks = -(-x.shape[0] // block)
    pad = blocks * block - x.shape[0]
    padded = jnp.pad(x, [(0, pad)] + [(0, 0)] * (x.ndim - 1))
    return padded.reshape(blocks, block, *x.shape[1:])


def _global_rows(z: Array, gathered: Array, axis_name: str | None) -> Int[Array, "2 n"]:
    n, total = z.shape[1], gathered.shape[1]
    first = 0 if axis_name is None else jax.lax.axis_index(axis_name) * n
    own = first + jnp.arange(n)
    return jnp.stack([own, total + own])


def _matmul(a: Array, b: Array, precision: str = "high") -> Array:
    # float32 by default means one bfloat16 pass on a TPU. Three, or TF32 on a GPU, give scores of
    # unit vectors to some 1e-4 / temperature, for a half to a tenth of what full float32 costs.
    return jnp.matmul(a, b, precision=precision)


def _gather(x: Array, axis_name: str | None) -> Array:
    return x if axis_name is None else jax.lax.all_gather(x, axis_name, axis=1, tiled=True)


def _pmean(x: Array, axis_name: str | None) -> Array:
    return x if axis_name is None else jax.lax.pmean(x, axis_name)


def _psum(x: Array, axis_name: str | None) -> Array:
    return x if axis_name is None else jax.lax.psum(x, axis_name)


def _axis_size(axis_name: str | None) -> int:
    return 1 if axis_name is None else jax.lax.axis_size(axis_name)
