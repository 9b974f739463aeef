"""The losses of all methods: arrays to scalars, in float32.

A loss that needs other devices' examples takes `axis_name` and returns the global value on every
device. Its gradient is this device's share: the gradient of the sum over devices of their local
means. One `pmean` of the parameters' gradients then gives exactly the single-device gradient.
The remaining losses are local means, which the caller averages over devices.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ssl_jax import loss_kernels
from ssl_jax.loss_kernels import matmul

_ANCHORS = 256  # of the global batch, about, on which contrastive accuracy is measured


def nt_xent(
    z1: Float[Array, "n d"],
    z2: Float[Array, "n d"],
    *,
    temperature: float,
    axis_name: str | None = None,
    block_size: int | None = None,
    memory: Float[Array, "k d"] | None = None,
) -> Float[Array, ""]:
    """Normalized temperature-scaled cross-entropy of two views (SimCLR, section 2.1, eq. 1).

    With the 2N normalized projections x_i of the global batch, s_ij = x_i·x_j / τ and i+ the other
    view of i's image:

        lse_i = log Σ_{j≠i} e^{s_ij}
        loss  = 1/2N Σ_i (lse_i - s_{i,i+})

    The official code reports twice this value.

    Args:
      z1: projections of the first view, [n, d], any float type; normalized here in float32.
      z2: projections of the second view of the same images, [n, d].
      temperature: τ, positive; safe down to 0.01.
      axis_name: mapped axis over which the batch is split; None on a single device.
      block_size: anchors compared at a time; memory is O(N·d + block_size·N). None picks one
        that keeps a block within 16 MiB on a CPU, 256 MiB elsewhere.
      memory: additional negatives for every anchor, [k, d], unit rows, the same on every device; no
        gradient flows into them (SimCLR v2, section 2).

    Returns:
      float32 scalar, the same on every device.
    """
    return nt_xent_and_accuracy(
        z1,
        z2,
        temperature=temperature,
        axis_name=axis_name,
        block_size=block_size,
        memory=memory,
    )[0]


def nt_xent_and_accuracy(
    z1: Float[Array, "n d"],
    z2: Float[Array, "n d"],
    *,
    temperature: float,
    axis_name: str | None = None,
    block_size: int | None = None,
    memory: Float[Array, "k d"] | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """`nt_xent`, and `contrastive_accuracy` among the second views of the global batch.

    Both use the same all-gathered projections. No gradient flows into the accuracy.
    """
    z = jnp.stack([normalize(z1), normalize(z2)])
    if memory is None:
        memory = jnp.zeros((0, z.shape[-1]))
    loss, accuracy = _local_nt_xent(z, memory, None, temperature, axis_name, block_size)
    return _pmean(loss, axis_name), _pmean(accuracy, axis_name)


def supcon(
    z1: Float[Array, "n d"],
    z2: Float[Array, "n d"],
    label: Int[Array, " n"],
    *,
    temperature: float,
    axis_name: str | None = None,
    block_size: int | None = None,
) -> Float[Array, ""]:
    """Supervised contrastive loss of two views (Khosla et al., 2020, arXiv:2004.11362, eq. 2).

    As `nt_xent`, except that the positives P(i) of an anchor are all other projections of its
    class, its other view among them:

        loss = 1/2N Σ_i (lse_i - mean_{p∈P(i)} s_ip)

    Args:
      z1: projections of the first view, as for `nt_xent`.
      z2: projections of the second view of the same images.
      label: each image's class; -1 for none: its only positive is its other view.
      temperature: τ, positive; safe down to 0.01.
      axis_name: mapped axis over which the batch is split; None on a single device.
      block_size: as for `nt_xent`.

    Returns:
      float32 scalar, the same on every device: eq. 2 divided by 2N, without the factor of the
      official codes.
    """
    z = jnp.stack([normalize(z1), normalize(z2)])
    memory = jnp.zeros((0, z.shape[-1]))
    loss, _ = _local_nt_xent(z, memory, label, temperature, axis_name, block_size)
    return _pmean(loss, axis_name)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _local_nt_xent(
    z: Float[Array, "2 n d"],
    memory: Float[Array, "k d"],
    label: Int[Array, " n"] | None,
    temperature: float,
    axis_name: str | None,
    block_size: int | None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Averages over this device's 2n anchors; negatives come from all devices."""
    return _nt_xent_forward(z, memory, label, temperature, axis_name, block_size)[0]


def _nt_xent_forward(
    z: Float[Array, "2 n d"],
    memory: Float[Array, "k d"],
    label: Int[Array, " n"] | None,
    temperature: float,
    axis_name: str | None,
    block_size: int | None,
) -> tuple[tuple[Float[Array, ""], Float[Array, ""]], tuple[Array, ...]]:
    n, d = z.shape[1:]
    gathered = _gather(z, axis_name)  # [2, N, d]
    columns = jnp.concatenate([gathered.reshape(-1, d), memory.astype(jnp.float32)])
    own = batch_positions(n, axis_name)  # this device's anchors among the columns
    own = jnp.concatenate([own, gathered.shape[1] + own])
    lse = loss_kernels.log_sum_exp(z.reshape(-1, d), own, columns, temperature, block_size)
    positives = z[::-1]
    if label is not None:
        labels = _gather(label[None], axis_name)[0]
        both = jnp.tile(label, 2)
        positives = loss_kernels.class_means(both, own, columns, labels, block_size)
        positives = positives.reshape(z.shape)
    loss = jnp.mean(lse) - jnp.mean(jnp.sum(z * positives, axis=-1)) / temperature
    accuracy = contrastive_accuracy(z[0], z[1], gathered[1], among=True, axis_name=axis_name)
    return (loss, accuracy), (z, memory, columns, own, lse, positives)


def _nt_xent_backward(
    temperature: float,
    axis_name: str | None,
    block_size: int | None,
    saved: tuple[Array, ...],
    cotangents: tuple[Float[Array, ""], Float[Array, ""]],
) -> tuple[Array, Array, None]:
    """The gradient of the sum over devices of their local means.

        dx_i = 1/(2n·τ) [Σ_{j≠i} (e^{s_ij - lse_i} + e^{s_ij - lse_j}) x_j - 2 x_{i+}]

    n is the number of this device's images, x_{i+} the mean of i's positives: one of them has the
    same number of positives as i, so it pulls i as i pulls it. Because s is symmetric, each device
    computes its own rows from the lse of all anchors, and no gradient is reduced across devices.
    """
    z, memory, columns, own, lse, positives = saved
    n, d = z.shape[1:]
    column_lse = _gather(lse.reshape(2, -1), axis_name).reshape(-1)
    # Rows of the memory bank are not anchors: e^{s - inf} = 0 removes their terms.
    column_lse = jnp.concatenate([column_lse, jnp.full(memory.shape[0], jnp.inf)])
    dz = loss_kernels.softmax_pull(
        z.reshape(-1, d), own, columns, lse, column_lse, temperature, block_size
    )
    dz = dz.reshape(z.shape) - 2 * positives
    dz *= cotangents[0] / (2 * n * temperature)
    return dz, jnp.zeros_like(memory), None


_local_nt_xent.defvjp(_nt_xent_forward, _nt_xent_backward)


def info_nce(
    queries: Float[Array, "n d"],
    keys: Float[Array, "n d"],
    queue: Float[Array, "k d"],
    *,
    temperature: float,
    own: Int[Array, " n"] | None = None,
    block_size: int | None = None,
) -> Float[Array, ""]:
    """InfoNCE against a queue of negatives (MoCo, section 3.1, eq. 1), or against a batch's keys.

    With s_i+ = q_i·k_i / τ and s_ij = q_i·x_j / τ for the queue's x_j:

        lse_i = log (e^{s_i+} + Σ_j e^{s_ij})
        loss  = 1/n Σ_i (lse_i - s_i+)

    Args:
      queries: q, [n, d], normalized here.
      keys: k, the positives, [n, d], normalized here; no gradient flows into them.
      queue: x, the negatives, [K, d], unit rows; no gradient flows into them.
      temperature: τ, positive; safe down to 0.01.
      own: the row of the queue that holds each query's key, if it does: the keys of the global
        batch (MoCo v3), and `batch_positions`. Then only the other rows are negatives.
      block_size: queries compared with the queue at a time; memory is O((n + K)·d + block_size·K).
        None picks one that keeps a block within 16 MiB on a CPU, 256 MiB elsewhere.

    Returns:
      float32 scalar, the mean over the n queries.
    """
    q = normalize(queries)
    k, queue = jax.lax.stop_gradient((normalize(keys), queue.astype(jnp.float32)))
    return _info_nce(q, k, queue, own, temperature, block_size)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _info_nce(
    q: Float[Array, "n d"],
    k: Float[Array, "n d"],
    queue: Float[Array, "k d"],
    own: Int[Array, " n"] | None,
    temperature: float,
    block_size: int | None,
) -> Float[Array, ""]:
    return jnp.mean(loss_kernels.queue_loss(q, k, queue, own, temperature, block_size))


def _info_nce_forward(
    q: Array, k: Array, queue: Array, own: Array | None, temperature: float, block_size: int | None
) -> tuple[Float[Array, ""], Float[Array, "n d"]]:
    """Computes loss and gradient in one pass: no query's gradient depends on other queries.

    dq_i = 1/(n·τ) [Σ_j e^{s_ij - lse_i} x_j + (e^{s_i+ - lse_i} - 1) k_i]
    """
    loss, dq = loss_kernels.queue_loss_and_pull(q, k, queue, own, temperature, block_size)
    return jnp.mean(loss), dq / (q.shape[0] * temperature)


def _info_nce_backward(
    temperature: float,
    block_size: int | None,
    dq: Float[Array, "n d"],
    cotangent: Float[Array, ""],
) -> tuple[Array, None, None, None]:
    return dq * cotangent, None, None, None


_info_nce.defvjp(_info_nce_forward, _info_nce_backward)


def batch_positions(n: int, axis_name: str | None) -> Int[Array, " n"]:
    """The positions of this device's n examples in the global batch."""
    first = 0 if axis_name is None else jax.lax.axis_index(axis_name) * n
    return first + jnp.arange(n)


def contrastive_accuracy(
    anchors: Float[Array, "n d"],
    positives: Float[Array, "n d"],
    candidates: Float[Array, "m d"],
    *,
    among: bool,
    axis_name: str | None = None,
) -> Float[Array, ""]:
    """Computes how often an anchor's positive is more similar to it than every negative.

    Uses about 256 anchors, evenly spaced over the global batch, which is accurate enough and cheap:
    the same anchors on any number of devices if batch and devices are powers of 2. A negative as
    similar as the positive, up to rounding, counts as more similar, so that collapsed embeddings
    score 0.

    Args:
      anchors: of this device, [n, d]; normalized here, like the rest.
      positives: of the same images, [n, d].
      candidates: the negatives, [m, d], the same on every device.
      among: whether the candidates include the positives.
      axis_name: mapped axis over which the anchors are split; None on a single device.

    Returns:
      This device's fraction, float32; the caller averages it over devices.
    """
    devices = 1 if axis_name is None else jax.lax.axis_size(axis_name)
    every = max(1, anchors.shape[0] * devices // _ANCHORS)
    anchors, positives = normalize(anchors[::every]), normalize(positives[::every])
    positive = jnp.sum(anchors * positives, axis=1, keepdims=True)
    similarity = matmul(anchors, normalize(candidates).T, "highest")
    as_near = jnp.sum(similarity > positive - 1e-6, axis=1)
    return jnp.mean(as_near <= int(among))


def sinkhorn(
    scores: Float[Array, "n k"],
    *,
    epsilon: float = 0.05,
    iterations: int = 3,
    axis_name: str | None = None,
) -> Float[Array, "n k"]:
    """Balanced soft assignments by Sinkhorn-Knopp over the global batch (SwAV, section 3.1).

    In float32, safe for any finite scores; no gradient flows through. The first iteration works in
    logarithms. After it every row sums to 1, which keeps the prototypes' sums within [1/K, N] and
    the samples' within [1/N, K]. Later iterations therefore only update factors of rows and
    columns, which are multiplied into the matrix before they can overflow float32.

    Args:
      scores: samples against prototypes, [n, K].
      epsilon: entropy regularization; smaller is sharper.
      iterations: normalizations of prototypes, then samples; at least 1.
      axis_name: mapped axis over which the samples are split; None on a single device.

    Returns:
      Assignments, float32 [n, K], each row summing to 1.
    """
    scores = jax.lax.stop_gradient(scores.astype(jnp.float32))
    top = jnp.max(scores, axis=0)
    if axis_name is not None:
        top = jax.lax.pmax(top, axis_name)
    # The floor is far below where the exponential underflows, and finite after the division.
    logits = jnp.maximum(scores - top[None, :], -1e30) / epsilon
    total = _psum(jnp.sum(jnp.exp(logits), axis=0), axis_name)
    log_q = logits - jnp.log(total)[None, :]
    q = jnp.exp(log_q - jnp.max(log_q, axis=1, keepdims=True))
    rows, columns = 1 / jnp.sum(q, axis=1), jnp.ones(q.shape[1])
    for done in range(1, iterations):
        if done % 4 == 0:
            q, rows = q * columns[None, :] * rows[:, None], jnp.ones(q.shape[0])
        columns = 1 / _psum(matmul(rows, q, "highest"), axis_name)
        rows = 1 / matmul(q, columns, "highest")
    return q * columns[None, :] * rows[:, None]


def swapped_prediction(
    scores: Float[Array, "n v k"], assignments: Float[Array, "n a k"], *, temperature: float
) -> Float[Array, ""]:
    """Each crop predicts the other crops' assignments (SwAV, eq. 2 and its multi-crop form).

    Args:
      scores: every crop against the prototypes, [n, V, K].
      assignments: the first A crops' targets, [n, A, K], rows sum to 1.
      temperature: positive.

    Returns:
      float32 scalar: the cross-entropy, averaged over the n images and over the A·(V-1) pairs of
      an assigned crop and another crop.
    """
    views, assigned = scores.shape[1], assignments.shape[1]
    scores = scores.astype(jnp.float32)
    # Without this, both terms below would be large and nearly equal.
    scores -= jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    agreement = matmul(assignments.astype(jnp.float32), scores.swapaxes(1, 2), "highest")
    agreement /= temperature
    lse = jax.nn.logsumexp(scores / temperature, axis=-1)
    # -Σ q log p = lse - Σ q·scores/τ, because q sums to 1; [A, V].
    cross = jnp.mean(lse[:, None, :] - agreement, axis=0)
    others = 1.0 - jnp.eye(assigned, views)
    return jnp.sum(cross * others) / (assigned * (views - 1))


def self_distillation(
    student: Float[Array, "n v d"],
    teacher: Float[Array, "n a d"],
    prototypes: Float[Array, "d k"],
    teacher_prototypes: Float[Array, "d k"],
    center: Float[Array, " k"],
    *,
    temperature: float,
    teacher_temperature: float | Float[Array, ""],
    block_size: int | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""], Int[Array, " n"]]:
    """Each crop predicts the teacher's distributions of other crops (DINO, eq. 3).

    With the student's logits s_v = x_v·P / τ of V crops, and the teacher's distributions
    q_a = softmax((x'_a·P' - c) / τ') of the first A of them:

        loss = 1/n Σ_i 1/(A(V-1)) Σ_a Σ_{v≠a} -Σ_k q_ak log softmax(s_v)_k

    The logits [n, V, K] are computed a block of images at a time, and never all in memory.

    Args:
      student: x_v, [n, V, d], V at least 2.
      teacher: x'_a, [n, A, d]; no gradient flows into it or the other arrays of the teacher.
      prototypes: P, [d, K].
      teacher_prototypes: P'.
      center: c, [K].
      temperature: τ, positive.
      teacher_temperature: τ', positive; may be traced.
      block_size: images per block; None picks one that keeps their logits within 16 MiB on a CPU,
        256 MiB elsewhere.

    Returns:
      The cross-entropy and the entropy of q, float32 scalars, whose difference is the mean
      Kullback-Leibler divergence of the student from the teacher; and the prototype with the
      largest q of each image's first crop.
    """
    temperatures = jnp.stack([jnp.float32(temperature), jnp.float32(teacher_temperature)])
    fixed = (teacher, teacher_prototypes, center, temperatures)
    student, prototypes = student.astype(jnp.float32), prototypes.astype(jnp.float32)
    return _self_distillation(student, prototypes, jax.lax.stop_gradient(fixed), block_size)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _self_distillation(
    student: Float[Array, "n v d"],
    prototypes: Float[Array, "d k"],
    fixed: tuple[Array, Array, Array, Array],
    block_size: int | None,
) -> tuple[Array, Array, Array]:
    return _self_distillation_forward(student, prototypes, fixed, block_size)[0]


def _self_distillation_forward(
    student: Array,
    prototypes: Array,
    fixed: tuple[Array, Array, Array, Array],
    block_size: int | None,
) -> tuple[tuple[Array, Array, Array], tuple[Array, Array]]:
    """Computes losses and gradients in one pass, as no image's gradient depends on others."""
    teacher, teacher_prototypes, center, temperatures = fixed
    n = student.shape[0]
    (loss, entropy, nearest), dx, dp = loss_kernels.distillation(
        student, teacher, prototypes, teacher_prototypes, center, temperatures, block_size
    )
    return (loss / n, entropy / n, nearest), (dx / n, dp / n)


def _self_distillation_backward(
    block_size: int | None, saved: tuple[Array, Array], cotangents: tuple[Array, Array, Array]
) -> tuple[Array, Array, None]:
    return saved[0] * cotangents[0], saved[1] * cotangents[0], None


_self_distillation.defvjp(_self_distillation_forward, _self_distillation_backward)


def negative_cosine(p: Float[Array, "n d"], z: Float[Array, "n d"]) -> Float[Array, ""]:
    """Averages -cos(p, z) over [n, d] rows (SimSiam, eq. 1); the caller stops z's gradient."""
    return -jnp.mean(jnp.sum(normalize(p) * normalize(z), axis=-1))


def normalized_mse(p: Float[Array, "n d"], z: Float[Array, "n d"]) -> Float[Array, ""]:
    """Averages the squared distance of unit rows, 2 - 2 cos(p, z) (BYOL, eq. 2)."""
    return jnp.mean(jnp.sum(jnp.square(normalize(p) - normalize(z)), axis=-1))


def barlow_twins(
    z1: Float[Array, "n d"],
    z2: Float[Array, "n d"],
    *,
    axis_name: str | None = None,
    block_size: int | None = None,
    gram: bool | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The two terms of Barlow Twins' loss (eq. 1 and 2): the first plus λ times the second.

    With u and v, both views' embeddings, of which each dimension is normalized by its mean and
    variance over the N images of the global batch, as by a BatchNorm without scale and shift:

        C_ij       = 1/N Σ_a u_ai v_aj
        invariance = Σ_i (C_ii - 1)²
        redundancy = Σ_{i≠j} C_ij² = 1/N² Σ_ab (u_a·u_b)(v_a·v_b) - Σ_i C_ii²

    The last form never needs the d x d matrix C, and compares N x N pairs of images in blocks.

    Args:
      z1: embeddings of the first view, [n, d], any float type; normalized here in float32.
      z2: embeddings of the second view of the same images, [n, d].
      axis_name: mapped axis over which the batch is split; None on a single device.
      block_size: images compared with all others at a time. None picks one that keeps a block
        within 16 MiB on a CPU, 256 MiB elsewhere.
      gram: whether to compare images, in memory O(N·d + block_size·N), rather than to form C, in
        O(n·d + d²). None: if N < d, which needs less memory and fewer operations.

    Returns:
      Both terms, float32 scalars, the same on every device.
    """
    z = jnp.stack([z1, z2]).astype(jnp.float32)
    return _barlow_twins(z, axis_name, block_size, _by_images(z, axis_name, gram))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _barlow_twins(
    z: Float[Array, "2 n d"], axis_name: str | None, block_size: int | None, gram: bool
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    return _barlow_twins_forward(z, axis_name, block_size, gram)[0]


def _barlow_twins_forward(
    z: Float[Array, "2 n d"], axis_name: str | None, block_size: int | None, gram: bool
) -> tuple[tuple[Float[Array, ""], Float[Array, ""]], tuple[Array, ...]]:
    """Also returns N/2 times the gradient of N Σ C_ij², one pass over the images later than C.

    N C v_a = Σ_b (v_a·v_b) u_b, and for the second view with u and v exchanged
    """
    x, gathered, variance = _centered(z, axis_name, gram)
    n = _batch(z, axis_name)
    scale = jax.lax.rsqrt(variance + 1e-5)
    u, gathered = x * scale, gathered * scale
    pull = _pull(u, gathered, axis_name, block_size, gram, cross=True) / n
    # Σ_a u_ai (C v_a)_i = N Σ_j C_ij²: squared rows of C, then columns, then the diagonal.
    sums = jnp.concatenate([jnp.sum(u * pull, axis=1), jnp.sum(u[:1] * u[1:], axis=1)])
    sums = _psum(sums, axis_name) / n
    squares, diagonal = sums[:2], sums[2]
    invariance = jnp.sum(jnp.square(diagonal - 1))
    redundancy = jnp.sum(squares[0]) - jnp.sum(jnp.square(diagonal))
    return (invariance, redundancy), (u, pull, scale, squares, diagonal)


def _barlow_twins_backward(
    axis_name: str | None,
    block_size: int | None,
    gram: bool,
    saved: tuple[Array, ...],
    cotangents: tuple[Float[Array, ""], Float[Array, ""]],
) -> tuple[Array]:
    """The gradient of the sum over devices, of which each has the global terms.

    With t_i = 2 (C_ii - 1) for the invariance, and -2 C_ii for the redundancy:

        du_a = 1/N (2 C v_a + t v_a),  dz_a = 1/σ (du_a - mean_b du_b - u_a mean_b(u_b du_b))

    The second term is 0 as the mean of v is, the third's mean is 1/N (2 Σ_j C_ij² + t_i C_ii).
    """
    u, pull, scale, squares, diagonal = saved
    of_invariance, of_redundancy = cotangents
    t = 2 * of_invariance * (diagonal - 1) - 2 * of_redundancy * diagonal
    du = 2 * of_redundancy * pull + t[None, None, :] * u[::-1]
    along = 2 * of_redundancy * squares + (t * diagonal)[None, :]
    return ((du - u * along[:, None, :]) * scale / u.shape[1],)  # n·devices/N = 1


_barlow_twins.defvjp(_barlow_twins_forward, _barlow_twins_backward)


def vicreg(
    z1: Float[Array, "n d"],
    z2: Float[Array, "n d"],
    *,
    axis_name: str | None = None,
    block_size: int | None = None,
    gram: bool | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
    """The three terms of VICReg's loss (section 4.1), which is their weighted sum.

    With x_a = z_a - mean over the N images of the global batch, separately for each view:

        Cov_ij     = 1/(N-1) Σ_a x_ai x_aj
        invariance = 1/(N·d) Σ_a ‖z1_a - z2_a‖²
        variance   = Σ_views 1/2d Σ_i max(0, 1 - √(Cov_ii + 1e-4))
        covariance = Σ_views 1/d Σ_{i≠j} Cov_ij²

        Σ_{i≠j} Cov_ij² = 1/(N-1)² Σ_ab (x_a·x_b)² - Σ_i Cov_ii²

    The last form never needs the d x d matrix Cov. The ½ of the variance is the official code's.

    Args:
      z1: embeddings of the first view, [n, d], any float type; float32 here.
      z2: embeddings of the second view of the same images, [n, d].
      axis_name: mapped axis over which the batch is split; None on a single device.
      block_size: as for `barlow_twins`.
      gram: as for `barlow_twins`.

    Returns:
      The three terms, float32 scalars, the same on every device.

    Raises:
      ValueError: the global batch is a single image, which has no variance.
    """
    z = jnp.stack([z1, z2]).astype(jnp.float32)
    variance, covariance = _vicreg(z, axis_name, block_size, _by_images(z, axis_name, gram))
    return _pmean(jnp.mean(jnp.square(z[0] - z[1])), axis_name), variance, covariance


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _vicreg(
    z: Float[Array, "2 n d"], axis_name: str | None, block_size: int | None, gram: bool
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Variance and covariance."""
    return _vicreg_forward(z, axis_name, block_size, gram)[0]


def _vicreg_forward(
    z: Float[Array, "2 n d"], axis_name: str | None, block_size: int | None, gram: bool
) -> tuple[tuple[Float[Array, ""], Float[Array, ""]], tuple[Array, ...]]:
    x, gathered, variance = _centered(z, axis_name, gram)
    n, d = _batch(z, axis_name), z.shape[2]
    if n == 1:
        raise ValueError("VICReg's variance needs at least two images in the global batch.")
    variance *= n / (n - 1)
    pull = _pull(x, gathered, axis_name, block_size, gram, cross=False) / (n - 1)  # Cov x_a
    squares = _psum(jnp.sum(x * pull), axis_name) / (n - 1)
    covariance = (squares - jnp.sum(jnp.square(variance))) / d
    short = jax.nn.relu(1 - jnp.sqrt(variance + 1e-4))
    return (jnp.sum(short) / (2 * d), covariance), (x, pull, variance)


def _vicreg_backward(
    axis_name: str | None,
    block_size: int | None,
    gram: bool,
    saved: tuple[Array, ...],
    cotangents: tuple[Float[Array, ""], Float[Array, ""]],
) -> tuple[Array]:
    """The gradient of the sum over devices, of which each has the global terms.

        variance:   dz_ai = -[σ_i < 1] x_ai / (2d σ_i (N-1)), with σ_i = √(Cov_ii + 1e-4)
        covariance: dz_a  = 4/(d (N-1)) (Cov x_a - diag(Cov) x_a)

    Both sum to 0 over the images, so the mean needs no further term.
    """
    x, pull, variance = saved
    devices = 1 if axis_name is None else jax.lax.axis_size(axis_name)
    of_variance, of_covariance = cotangents
    deviation = jnp.sqrt(variance + 1e-4)
    dz = 4 * of_covariance * (pull - variance * x)
    dz -= jnp.where(deviation < 1, of_variance / (2 * deviation), 0) * x
    n, d = devices * x.shape[1], x.shape[2]
    return (dz * devices / (d * (n - 1)),)


_vicreg.defvjp(_vicreg_forward, _vicreg_backward)


def _batch(z: Float[Array, "2 n d"], axis_name: str | None) -> int:
    """The number of images in the global batch."""
    return z.shape[1] * (1 if axis_name is None else jax.lax.axis_size(axis_name))


def _by_images(z: Float[Array, "2 n d"], axis_name: str | None, gram: bool | None) -> bool:
    return _batch(z, axis_name) < z.shape[2] if gram is None else gram


def _centered(
    z: Float[Array, "2 n d"], axis_name: str | None, gathered: bool
) -> tuple[Float[Array, "2 n d"], Float[Array, "2 m d"], Float[Array, "2 1 d"]]:
    """Subtracts the mean over the global batch.

    Args:
      z: this device's embeddings of both views.
      axis_name: mapped axis over which the batch is split.
      gathered: gather the embeddings once, and take their statistics without further collectives.

    Returns:
      This device's centered embeddings, those of the global batch (if not gathered, the same), and
      the variance with 1/N.
    """
    rows = _gather(z, axis_name) if gathered else z
    over = None if gathered else axis_name
    mean = _pmean(jnp.mean(rows, axis=1, keepdims=True), over)
    rows -= mean
    variance = _pmean(jnp.mean(jnp.square(rows), axis=1, keepdims=True), over)
    return z - mean, rows, variance


def _pull(
    own: Float[Array, "2 n d"],
    gathered: Float[Array, "2 m d"],
    axis_name: str | None,
    block_size: int | None,
    gram: bool,
    cross: bool,
) -> Float[Array, "2 n d"]:
    """Σ_b (p_a·p_b) q_b = (Σ_b q_b p_bᵀ) p_a for this device's images a and both views' q.

    Args:
      own: q, this device's embeddings of both views.
      gathered: those of the global batch; used if `gram`.
      axis_name: mapped axis over which the batch is split.
      block_size: images compared with all others at a time, if `gram`.
      gram: use the first form, with N x N products, rather than the second, with a d x d matrix.
      cross: whether p is the other view's, or the same one's.
    """
    if gram:
        views = [(1 - q if cross else q, q) for q in (0, 1)]
        pulls = [
            loss_kernels.gram_pull(own[p], gathered[p], gathered[q], block_size) for p, q in views
        ]
        return jnp.stack(pulls)
    if not cross:
        return matmul(own, _psum(matmul(own.swapaxes(1, 2), own), axis_name))
    matrix = _psum(matmul(own[0].T, own[1]), axis_name)
    return jnp.stack([matmul(own[1], matrix.T), matmul(own[0], matrix)])


def normalize(x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
    """Scales rows to unit length, in float32; a zero row stays zero, with a finite gradient."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), 1e-24))


def _gather(x: Array, axis_name: str | None) -> Array:
    return x if axis_name is None else jax.lax.all_gather(x, axis_name, axis=1, tiled=True)


def _pmean(x: Array, axis_name: str | None) -> Array:
    return x if axis_name is None else jax.lax.pmean(x, axis_name)


def _psum(x: Array, axis_name: str | None) -> Array:
    return x if axis_name is None else jax.lax.psum(x, axis_name)
