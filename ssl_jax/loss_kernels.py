"""Blockwise kernels of the losses, which never materialize the whole matrix of scores.

Each kernel takes all rows and columns, computes scores one block at a time, and reduces them to
the sums that `losses` needs. Shapes: m rows (anchors or queries), n columns (candidates), d
dimensions.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

_Limits = tuple[int, int]
# Per platform: float32 scores in memory at a time, and the side of a square block where each pair
# is visited once. A CPU's cache holds 4 MiB; an accelerator needs large blocks to be busy.
_CPU_BLOCK = (2**22, 1024)
_BLOCK = (2**26, 4096)
# For scores within ±60 the maximum needn't be subtracted: their exponentials, sums of 2^38
# exponentials, and the inverses of both stay within float32.
_SMALL_SCORE = 60.0


def log_sum_exp(
    anchors: Float[Array, "m d"],
    own: Int[Array, " m"],
    columns: Float[Array, "n d"],
    temperature: float,
    block_size: int | None,
) -> Float[Array, " m"]:
    """lse_i = log Σ_{j≠own(i)} e^{s_ij}, where s_ij = x_i·x_j / τ.

    Args:
      anchors: x_i, rows of unit length.
      own: the index of each anchor's own column, which is excluded.
      columns: x_j, rows of unit length; if m = n they are the anchors, and only half of the
        symmetric matrix s is computed.
      temperature: τ.
      block_size: rows per block; None: chosen for the platform the program is compiled for.
    """

    def kernel(limits: _Limits, anchors: Array, own: Array, columns: Array) -> Array:
        if pair_block := _pair_block(len(anchors), len(columns), block_size, limits):
            return _pairs_log_sum_exp(anchors, temperature, pair_block)

        def of_block(anchor: Array, own: Array) -> Array:
            return _log_sum_exp(_masked_scores(anchor, own, columns, temperature), 1, temperature)

        return _in_blocks(of_block, block_size, limits, len(columns), anchors, own)

    return _by_platform(kernel, anchors, own, columns)


def softmax_pull(
    anchors: Float[Array, "m d"],
    own: Int[Array, " m"],
    columns: Float[Array, "n d"],
    lse: Float[Array, " m"],
    column_lse: Float[Array, " n"],
    temperature: float,
    block_size: int | None,
) -> Float[Array, "m d"]:
    """Σ_{j≠own(i)} (e^{s_ij - lse_i} + e^{s_ij - lse_j}) x_j for each anchor i.

    Args:
      anchors: x_i, as for `log_sum_exp`.
      own: the index of each anchor's own column.
      columns: x_j.
      lse: lse_i of the anchors.
      column_lse: lse_j of the columns; infinite for a column that is not an anchor.
      temperature: τ.
      block_size: as for `log_sum_exp`.
    """

    def kernel(
        limits: _Limits, anchors: Array, own: Array, columns: Array, lse: Array, column_lse: Array
    ) -> Array:
        if pair_block := _pair_block(len(anchors), len(columns), block_size, limits):
            return _pairs_softmax_pull(anchors, lse, temperature, pair_block)

        def of_block(anchor: Array, own: Array, own_lse: Array) -> Array:
            scores = _masked_scores(anchor, own, columns, temperature)
            return matmul(_weights(scores, own_lse, column_lse, temperature), columns)

        return _in_blocks(of_block, block_size, limits, len(columns), anchors, own, lse)

    return _by_platform(kernel, anchors, own, columns, lse, column_lse)


def class_means(
    label: Int[Array, " m"],
    own: Int[Array, " m"],
    columns: Float[Array, "n d"],
    column_label: Int[Array, " images"],
    block_size: int | None,
) -> Float[Array, "m d"]:
    """The mean of each anchor's positives: the other columns of its class.

    Args:
      label: of the anchors; -1 for none.
      own: the index of each anchor's own column, which is excluded.
      columns: first views of all images, then their second views.
      column_label: of the images.
      block_size: as for `log_sum_exp`.

    Returns:
      The means; of an anchor without a label, the other view.
    """
    images = len(column_label)

    def kernel(
        limits: _Limits, label: Array, own: Array, columns: Array, column_label: Array
    ) -> Array:
        index = jnp.arange(len(columns))

        def of_block(label: Array, own: Array) -> Array:
            own, label = own[:, None], label[:, None]
            positive = (label == jnp.tile(column_label, 2)[None]) & (label >= 0)
            positive |= own % images == (index % images)[None]
            positive &= own != index[None]
            count = jnp.sum(positive, axis=1, keepdims=True)
            return matmul(positive.astype(jnp.float32), columns) / count

        return _in_blocks(of_block, block_size, limits, len(columns), label, own)

    return _by_platform(kernel, label, own, columns, column_label)


def queue_loss(
    queries: Float[Array, "m d"],
    keys: Float[Array, "m d"],
    queue: Float[Array, "n d"],
    own: Int[Array, " m"] | None,
    temperature: float,
    block_size: int | None,
) -> Float[Array, " m"]:
    """lse_i - s_i+ for each query; s_i+ = q_i·k_i / τ, and lse_i is over s_i+ and the queue.

    The queue's row `own` of each query, if given, is excluded.
    """

    def of_block(q: Array, k: Array, own: Array | None, queue: Array) -> Array:
        _, positive, lse = _queue_scores(q, k, own, queue, temperature)
        return lse - positive

    return _over_queries(of_block, queries, keys, own, queue, block_size)


def queue_loss_and_pull(
    queries: Float[Array, "m d"],
    keys: Float[Array, "m d"],
    queue: Float[Array, "n d"],
    own: Int[Array, " m"] | None,
    temperature: float,
    block_size: int | None,
) -> tuple[Float[Array, " m"], Float[Array, "m d"]]:
    """`queue_loss`, and Σ_j e^{s_ij - lse_i} x_j + (e^{s_i+ - lse_i} - 1) k_i, in one pass."""

    def of_block(q: Array, k: Array, own: Array | None, queue: Array) -> tuple[Array, Array]:
        scores, positive, lse = _queue_scores(q, k, own, queue, temperature)
        pull = matmul(jnp.exp(scores - lse[:, None]), queue)
        return lse - positive, pull + jnp.expm1(positive - lse)[:, None] * k

    return _over_queries(of_block, queries, keys, own, queue, block_size)


def distillation(
    student: Float[Array, "n v d"],
    teacher: Float[Array, "n a d"],
    prototypes: Float[Array, "d k"],
    teacher_prototypes: Float[Array, "d k"],
    center: Float[Array, " k"],
    temperatures: Float[Array, "2"],
    block_size: int | None,
) -> tuple[tuple[Array, Array, Int[Array, " n"]], Float[Array, "n v d"], Float[Array, "d k"]]:
    """Sums over images of DINO's cross-entropies, and their gradients, in one pass.

    With s_v = x_v·P / τ of the student's crops and the teacher's q_a = softmax((t_a - c) / τ'):

        loss = Σ_i 1/(A(V-1)) Σ_a Σ_{v≠a} (lse(s_v) - q_a·s_v)
        ds_v = 1/(A(V-1)) Σ_{a≠v} (softmax(s_v) - q_a)

    Args:
      student: x_v, embeddings of V crops.
      teacher: embeddings of the first A crops.
      prototypes: P, of the student.
      teacher_prototypes: of the teacher.
      center: c.
      temperatures: τ and τ'.
      block_size: images per block; None: chosen for the platform the program is compiled for.

    Returns:
      The loss; the teacher's entropy, Σ_i of the mean over a of -q_a·log q_a; the prototype of
      each image with the largest q_0; the gradients of the loss with respect to `student` and
      `prototypes`.
    """

    def kernel(limits: _Limits, student: Array, teacher: Array, *shared: Array) -> Any:
        n, crops = student.shape[0], student.shape[1] + teacher.shape[1]
        block = _row_block(n, crops * shared[0].shape[1], block_size, limits)
        real = _split(jnp.ones(n), block)  # 0 in the padding

        def visit(totals: Any, rows: tuple[Array, Array, Array]) -> tuple[Any, Any]:
            sums, of_rows = _distill_block(*rows, *shared)
            return jax.tree.map(jnp.add, totals, sums), of_rows

        zero = jnp.zeros(())
        start = (zero, zero, jnp.zeros(shared[0].shape))
        blocks = (_split(student, block), _split(teacher, block), real)
        sums, of_rows = jax.lax.scan(visit, start, blocks)
        loss, entropy, of_prototypes = sums
        nearest, of_student = (x.reshape(-1, *x.shape[2:])[:n] for x in of_rows)
        return (loss, entropy, nearest), of_student, of_prototypes

    arrays = (student, teacher, prototypes, teacher_prototypes, center, temperatures)
    values, of_student, of_prototypes = _by_platform(kernel, *arrays)
    return values, of_student, of_prototypes


def _distill_block(
    student: Float[Array, "b v d"],
    teacher: Float[Array, "b a d"],
    real: Float[Array, " b"],
    prototypes: Float[Array, "d k"],
    teacher_prototypes: Float[Array, "d k"],
    center: Float[Array, " k"],
    temperatures: Float[Array, "2"],
) -> tuple[tuple[Array, Array, Array], tuple[Array, Array]]:
    """`distillation` of a block of images; `real` is 1, or 0 for images that don't count.

    Returns:
      Loss, entropy and the gradient of the prototypes, summed; nearest prototypes and the gradient
      of the student, by image.
    """
    scores = matmul(student, prototypes) / temperatures[0]
    # Without this, both terms of the cross-entropy would be large and nearly equal.
    scores -= jnp.max(scores, axis=-1, keepdims=True)
    lse = jax.nn.logsumexp(scores, axis=-1)
    targets = (matmul(teacher, teacher_prototypes) - center[None, None, :]) / temperatures[1]
    log_q = jax.nn.log_softmax(targets, axis=-1)
    q = jnp.exp(log_q)
    entropy = -jnp.sum(q * log_q, axis=-1).mean(axis=-1)
    a, v = teacher.shape[1], student.shape[1]
    others = (1.0 - jnp.eye(a, v)) / (a * (v - 1))
    agreement = matmul(q, scores.swapaxes(1, 2), "highest")
    loss = jnp.sum((lse[:, None, :] - agreement) * others[None], axis=(1, 2))
    p = jnp.exp(scores - lse[:, :, None]) * jnp.sum(others, axis=0)[None, :, None]
    pull = (p - jnp.einsum("av,bak->bvk", others, q)) * (real / temperatures[0])[:, None, None]
    of_student = matmul(pull, prototypes.T)
    d, k = prototypes.shape
    of_prototypes = matmul(student.reshape(-1, d).T, pull.reshape(-1, k))
    sums = (jnp.sum(loss * real), jnp.sum(entropy * real), of_prototypes)
    return sums, (jnp.argmax(targets[:, 0], axis=-1), of_student)


def gram_pull(
    anchors: Float[Array, "m d"],
    columns: Float[Array, "n d"],
    values: Float[Array, "n d"],
    block_size: int | None,
) -> Float[Array, "m d"]:
    """Σ_j (x_i·x_j) y_j for each anchor i, where y_j is the value of column j.

    Args:
      anchors: x_i, of any length.
      columns: x_j.
      values: y_j.
      block_size: as for `log_sum_exp`.
    """

    def kernel(limits: _Limits, anchors: Array, columns: Array, values: Array) -> Array:
        def of_block(anchor: Array) -> Array:
            return matmul(matmul(anchor, columns.T), values)

        return jnp.asarray(_in_blocks(of_block, block_size, limits, len(columns), anchors))

    return _by_platform(kernel, anchors, columns, values)


def matmul(a: Array, b: Array, precision: str = "high") -> Array:
    """A float32 product: three bfloat16 passes on a TPU, TF32 on a GPU.

    On a TPU, JAX's default for float32 is a single bfloat16 pass. "high" computes scores of unit
    vectors to within about 1e-4 / temperature, at a tenth to a half of the cost of full float32.
    """
    return jnp.matmul(a, b, precision=precision)


def _by_platform(kernel, *arrays: Array):  # type: ignore[no-untyped-def]
    """Calls kernel(limits, *arrays) with the limits of the platform it is compiled for."""
    cpu, default = (functools.partial(kernel, limits) for limits in (_CPU_BLOCK, _BLOCK))
    return jax.lax.platform_dependent(*arrays, cpu=cpu, default=default)


def _over_queries(of_block, queries, keys, own, queue, block_size):  # type: ignore[no-untyped-def]
    """of_block(queries, keys, own, queue), for a block of queries and their keys at a time."""

    def kernel(limits: _Limits, queue: Array, *rows: Array) -> Any:
        def with_queue(q: Array, k: Array, own: Array | None = None) -> Any:
            return of_block(q, k, own, queue)

        return _in_blocks(with_queue, block_size, limits, len(queue), *rows)

    return _by_platform(kernel, queue, queries, keys, *([] if own is None else [own]))


def _row_block(rows: int, columns: int, block_size: int | None, limits: _Limits) -> int:
    return min(block_size or max(1, limits[0] // columns), rows)


def _pair_block(rows: int, columns: int, block_size: int | None, limits: _Limits) -> int:
    """Returns the side of a square block if half of the symmetric matrix suffices, else 0."""
    if columns > rows or _row_block(rows, columns, block_size, limits) == rows:
        return 0  # columns include other devices' anchors, or one block holds the whole matrix
    return block_size or -(-rows // -(-rows // limits[1]))


def _pairs_log_sum_exp(anchors: Array, temperature: float, block: int) -> Array:
    blocks = _split(anchors, block)

    def visit(i: Array, j: Array, lse: Array) -> Array:
        scores = _pair_scores(blocks, i, j, len(anchors), temperature)
        by_row, by_column = (_log_sum_exp(scores, axis, temperature) for axis in (1, 0))
        lse = lse.at[i].set(jnp.logaddexp(lse[i], by_row))
        return lse.at[j].set(jnp.logaddexp(lse[j], by_column))

    lse = _over_pairs(len(blocks), visit, jnp.full(blocks.shape[:2], -jnp.inf))
    return lse.reshape(-1)[: len(anchors)]


def _pairs_softmax_pull(anchors: Array, lse: Array, temperature: float, block: int) -> Array:
    blocks, lse = _split(anchors, block), _split(lse, block)

    def visit(i: Array, j: Array, pull: tuple[Array, Array]) -> tuple[Array, Array]:
        scores = _pair_scores(blocks, i, j, len(anchors), temperature)
        weights = _weights(scores, lse[i], lse[j], temperature)
        # `to_columns` is kept transposed: on a CPU weights.T @ blocks[i] takes twice as long.
        to_rows, to_columns = pull
        to_rows = to_rows.at[i].add(matmul(weights, blocks[j]))
        return to_rows, to_columns.at[j].add(matmul(blocks[i].T, weights))

    zeros = jnp.zeros_like(blocks)
    to_rows, to_columns = _over_pairs(len(blocks), visit, (zeros, zeros.swapaxes(1, 2)))
    total = to_rows + to_columns.swapaxes(1, 2)
    return total.reshape(-1, anchors.shape[-1])[: len(anchors)]


def _log_sum_exp(scores: Array, axis: int, temperature: float) -> Array:
    if 1 / temperature <= _SMALL_SCORE:
        return jnp.log(jnp.sum(jnp.exp(scores), axis=axis))
    return jax.nn.logsumexp(scores, axis=axis)


def _weights(scores: Array, row_lse: Array, column_lse: Array, temperature: float) -> Array:
    """e^{s_ij - lse_i} + e^{s_ij - lse_j}."""
    row, column = row_lse[:, None], column_lse[None, :]
    if 1 / temperature <= _SMALL_SCORE:
        return jnp.exp(scores) * (jnp.exp(-row) + jnp.exp(-column))
    return jnp.exp(scores - row) + jnp.exp(scores - column)


def _masked_scores(anchors: Array, own: Array | None, columns: Array, tau: float) -> Array:
    scores = matmul(anchors, columns.T) / tau
    if own is None:
        return scores
    itself = own[:, None] == jnp.arange(columns.shape[0])[None, :]
    return jnp.where(itself, -jnp.inf, scores)


def _pair_scores(blocks: Array, i: Array, j: Array, total: int, temperature: float) -> Array:
    """Scores of block i with block j; -inf unless the row's index is below the column's."""
    index = jnp.arange(blocks.shape[1])
    rows, columns = i * blocks.shape[1] + index, j * blocks.shape[1] + index
    # This excludes the anchor itself, the mirrored pair and the padding.
    once = (rows[:, None] < columns[None, :]) & (columns < total)[None, :]
    return jnp.where(once, matmul(blocks[i], blocks[j].T) / temperature, -jnp.inf)


def _queue_scores(
    q: Array, k: Array, own: Array | None, queue: Array, temperature: float
) -> tuple[Float[Array, "m n"], Float[Array, " m"], Float[Array, " m"]]:
    """Returns scores of the negatives, scores of the positive, and the log-sum-exp of both."""
    scores = _masked_scores(q, own, queue, temperature)
    positive = jnp.sum(q * k, axis=1) / temperature
    return scores, positive, jnp.logaddexp(positive, jax.nn.logsumexp(scores, axis=1))


def _over_pairs(blocks: int, visit, carry):  # type: ignore[no-untyped-def]
    """Folds visit(i, j, carry) over the pairs i <= j of blocks."""
    # One loop of known length: with nested loops a GPU would check the end at every iteration.
    rows, columns = (jnp.asarray(indices, jnp.int32) for indices in np.triu_indices(blocks))
    return jax.lax.fori_loop(
        0, len(rows), lambda k, carry: visit(rows[k], columns[k], carry), carry
    )


def _in_blocks(function, block_size, limits, columns, *rows):  # type: ignore[no-untyped-def]
    """Applies a row-wise function to blocks of rows in turn, padding the last.

    `columns` is the number of scores that the function computes per row.
    """
    n = len(rows[0])
    block = _row_block(n, columns, block_size, limits)
    if block >= n:
        return function(*rows)
    out = jax.lax.map(lambda args: function(*args), tuple(_split(r, block) for r in rows))
    return jax.tree.map(lambda o: o.reshape(-1, *o.shape[2:])[:n], out)


def _split(x: Array, block: int) -> Array:
    """Splits rows into blocks, [blocks, block, ...]; the last one is padded with zeros."""
    blocks = -(-x.shape[0] // block)
    pad = blocks * block - x.shape[0]
    padded = jnp.pad(x, [(0, pad)] + [(0, 0)] * (x.ndim - 1))
    return padded.reshape(blocks, block, *x.shape[1:])
