"""Linear classifiers on frozen features: multinomial logistic regression by L-BFGS in JAX.

A fit minimizes, over weights W [d, classes] and biases b [classes],

    1/n Σᵢ CE(softmax(xᵢ W + b), yᵢ) + penalty/2 ‖W‖²,

where x are the features, centered and divided by their overall standard deviation. One scale per
feature would have to be estimated from the few labels there may be: on the raw pixels of digits it
costs three points at 5 labels per class.

For images of several classes, the first term is the sum over classes of the mean sigmoid
cross-entropy of the images for which the class is known.

Large fits are split over this process's devices by examples: each holds its share of the features,
twice while they are projected, and about three times its share of the logits. For ImageNet's 1.28
million training images, 2,048 features and 1,000 classes, that is 26 GB over all devices. An
evaluation of the objective and its gradient takes 4·n·d·classes FLOPs, there 1.0e13.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Int8

from ssl_jax.errors import UserError, counted, require_choice
from ssl_jax.evals.multi_label import (
    MULTI_LABEL_METRICS,
    mean_average_precision,
    multi_label_metrics,
    require_classes,
)
from ssl_jax.memory import enough_memory
from ssl_jax.spmd import Spmd, make_spmd

_Carry = tuple[Array, optax.OptState, Array, Array, Array]
PENALTIES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
METRICS = ("top1", "mean_per_class")  # that can choose the penalty
# Curvature of a class's loss where all its scores are equal: with softmax 1 / classes, about.
_SIGMOID_CURVATURE = 0.25
_MEMORY = 10  # past gradients that L-BFGS keeps
# Examples are padded to this many with zeros, so that fits on few labels, which take milliseconds,
# share one program, whose compilation takes seconds.
_SMALLEST = 128
# Logits times features from which on several devices share a product. Below it, which takes a
# device milliseconds at most, they would spend the time waiting for each other.
_SHARED = 2**28


@dataclasses.dataclass(frozen=True)
class LinearClassifier:
    """A linear classifier.

    Attributes:
      weights: for features as extracted, not scaled; float32 [d, classes].
      bias: float32 [classes].
      penalty: on the squared weights, chosen or given.
      validation: accuracy (or its mean per class) on the validation split by penalty; empty if only
        one penalty was given.
      evaluations: of the objective and its gradient in the last fit, at 4·n·d·c FLOPs each.
    """

    weights: Float[np.ndarray, "d c"]
    bias: Float[np.ndarray, " c"]
    penalty: float
    validation: dict[float, float]
    evaluations: int

    def scores(self, features: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n c"]:
        """Logits of the classes."""
        return _scores(np.asarray(features, np.float32), self.weights, self.bias)

    def predict(self, features: Float[np.ndarray, "n d"]) -> Int[np.ndarray, " n"]:
        """The most likely class of each example, int32 [n]."""
        return self.scores(features).argmax(axis=1).astype(np.int32)


def linear_probe(
    train_features: Float[np.ndarray, "n d"],
    train_labels: Int[np.ndarray, " n"],
    test_features: Float[np.ndarray, "m d"],
    *,
    regularization: float = 0.1,
    axes: Float[np.ndarray, "d d"] | None = None,
) -> Int[np.ndarray, " m"]:
    """Fits a linear classifier on frozen features, with one penalty.

    Args:
      train_features: [n, d].
      train_labels: [n], any integers.
      test_features: [m, d].
      regularization: inverse strength of the L2 penalty, C of scikit-learn's `LogisticRegression`.
      axes: see `fit_linear`.

    Returns:
      Predicted labels of the test features, [m].
    """
    classes, labels = np.unique(train_labels, return_inverse=True)
    penalty = 1 / (len(labels) * regularization)
    if len(classes) == 2:
        # scikit-learn fits two classes by one weight vector w, here w/2 and -w/2, and penalizes
        # ‖w‖², twice the squares of these two.
        penalty *= 2
    # At the default tolerance an image in 500 is still on the wrong side of a boundary.
    model = fit_linear(
        train_features,
        labels,
        num_classes=len(classes),
        penalties=[penalty],
        tolerance=1e-5,
        axes=axes,
    )
    predicted: np.ndarray = classes[model.predict(test_features)]
    return predicted


def few_label_accuracies(
    train_features: Float[np.ndarray, "n d"],
    train_labels: Int[np.ndarray, " n"],
    test_features: Float[np.ndarray, "m d"],
    test_labels: Int[np.ndarray, " m"],
    *,
    labels_per_class: int,
    trials: int,
    seed: int = 0,
) -> Float[np.ndarray, " trials"]:
    """Accuracy of linear probes trained on a few labels per class.

    The sampled labels depend only on the labels and the seed, so different features of the same
    images are compared on the same trials: differences are paired.

    Args:
      train_features: [n, d].
      train_labels: [n].
      test_features: [m, d].
      test_labels: [m].
      labels_per_class: number of training labels per class.
      trials: number of times they are sampled.
      seed: of the sampling.

    Returns:
      Accuracy on the test features for each trial, in [0, 1].
    """
    generator = np.random.default_rng([seed, labels_per_class])
    # Searched once: with a thousand classes, each search of ImageNet's labels takes a second.
    members = [np.flatnonzero(train_labels == c) for c in np.unique(train_labels)]
    sampled = [
        np.concatenate([generator.choice(ids, labels_per_class, replace=False) for ids in members])
        for _ in range(trials)
    ]
    axes, (count, width) = None, (len(sampled[0]), train_features.shape[1])
    if count >= width:
        # The host finds the axes of 2,048 features in seconds, in which devices fit many trials.
        first = np.asarray(train_features[sampled[0]], np.float32)
        axes = _principal_axes(jnp.asarray(first - first.mean(axis=0)))
    accuracies = []
    for seen in sampled:
        predicted = linear_probe(train_features[seen], train_labels[seen], test_features, axes=axes)
        accuracies.append(np.mean(predicted == test_labels))
    return np.array(accuracies)


def fit_linear(
    features: Float[np.ndarray, "n d"],
    labels: Int[np.ndarray, " n"] | Int8[np.ndarray, "n c"],
    *,
    num_classes: int,
    penalties: Sequence[float] = PENALTIES,
    validation_fraction: float = 0.1,
    max_iterations: int = 500,
    tolerance: float = 1e-4,
    seed: int = 0,
    metric: str = "top1",
    axes: Float[np.ndarray, "d d"] | None = None,
) -> LinearClassifier:
    """Fits a linear classifier to frozen features; the module's docstring has the objective.

    With several penalties, the best one on held-out examples is chosen, the weaker of equals, and
    the classifier is fitted again to all examples. scikit-learn's C is 1 / (n · penalty).

    Args:
      features: [n, d].
      labels: [n], in 0 … num_classes-1; or `Targets.values`, int8 [n, num_classes].
      num_classes: number of classes.
      penalties: candidates; a single one is used as is.
      validation_fraction: share of the examples on which the penalty is chosen.
      max_iterations: limit on the L-BFGS iterations of each fit.
      tolerance: of a fit, on the largest entry of the gradient along the features' principal axes.
      seed: of the validation split.
      metric: that chooses the penalty, "top1" or "mean_per_class"; of several classes per image
        "mean_ap" or "mean_ap_11_point".
      axes: orthonormal axes, in columns, such as the principal axes of similar features, which are
        not computed then; None: those of the features. The solution is the same.

    Returns:
      The classifier.

    Raises:
      UserError: labels that don't match the features or the number of classes, too few examples to
        choose a penalty, or too little memory on the devices.
    """
    features, labels = np.asarray(features, np.float32), np.asarray(labels)
    _check(features, labels, num_classes, metric)
    if not penalties:
        raise UserError("There are no penalties to choose from. Give at least one.")
    center = features.mean(axis=0)
    x = features - center
    scale = max(float(x.std()), 1e-12)
    x /= scale  # in place, as ImageNet's features take 10 GB
    data = _Data(x, labels, num_classes, (max_iterations, tolerance), axes)
    start = np.zeros((features.shape[1] + 1, num_classes), np.float32)
    penalty, *weaker = ordered = sorted(set(penalties), reverse=True)
    validation: dict[float, float] = {}
    subject = f"The linear classifier on {counted(len(labels), 'feature vector')}"
    with enough_memory(subject, ["fewer images", "more devices"]):
        if weaker:
            split = _split(len(labels), validation_fraction, seed)
            start, validation = _sweep(start, data, *split, ordered, metric)
            penalty = min(ordered, key=lambda p: (-validation[p], p))
        solution, evaluations = _Fit(data)(start, penalty)
    weights, bias = solution[:-1] / scale, solution[-1] - center @ solution[:-1] / scale
    return LinearClassifier(weights, bias, penalty, validation, evaluations)


def fit_multi_label(
    train: Float[np.ndarray, "n d"],
    targets: Int8[np.ndarray, "n c"],
    test: Float[np.ndarray, "m d"],
    test_targets: Int8[np.ndarray, "m c"],
    class_names: Sequence[str],
    *,
    penalties: Sequence[float] = PENALTIES,
    seed: int = 0,
    metric: str = "mean_ap",
) -> tuple[dict[str, Any], float]:
    """Fits a linear classifier to images of several classes each and evaluates it.

    Classes without an image in either split are left out: they can't be learned or measured.

    Args:
      train: training features.
      targets: of the training images, see `Targets.values`.
      test: held-out features.
      test_targets: of the held-out images.
      class_names: by column.
      penalties: see `fit_linear`.
      seed: see `fit_linear`.
      metric: see `fit_linear`.

    Returns:
      `multi_label_metrics` of the held-out images, and the penalty.

    Raises:
      UserError: no class is in both splits, or as `fit_linear`.
    """
    both = (targets == 1).any(axis=0) & (test_targets == 1).any(axis=0)
    kept = np.flatnonzero(both)
    require_classes(kept)
    model = fit_linear(
        train,
        targets[:, kept],
        num_classes=len(kept),
        penalties=penalties,
        seed=seed,
        metric=metric,
    )
    scores = np.zeros(test_targets.shape, np.float32)
    scores[:, kept] = model.scores(test)
    skipped = np.flatnonzero(~both)
    metrics = multi_label_metrics(scores, test_targets, class_names, skipped=skipped)
    return metrics, model.penalty


@dataclasses.dataclass(frozen=True)
class _Data:
    """Examples on the host, centered and scaled, limits of a fit and axes; see `fit_linear`."""

    x: np.ndarray
    y: np.ndarray
    classes: int
    limits: tuple[int, float]
    axes: np.ndarray | None

    def part(self, ids: np.ndarray) -> "_Data":
        """Some of the examples."""
        return dataclasses.replace(self, x=self.x[ids], y=self.y[ids])


class _Fit:
    """Minimizes the objective on fixed examples, from a given start, with a given penalty.

    In coordinates in which the objective's curvature where all scores are equal, the features'
    covariance over the number of classes plus the penalty, is 1 in all directions. In the features'
    own coordinates it is far from that, and L-BFGS needs several times as many iterations.

    Examples are split over the devices; the weights and the state of L-BFGS are on each of them.
    """

    def __init__(self, data: _Data) -> None:
        x, y = data.x, data.y
        self.limits = data.limits
        self.flatness = 1 / _SIGMOID_CURVATURE if y.ndim == 2 else data.classes
        spmd = _shared_by(x, data.classes)
        rows = max(_SMALLEST, len(x))
        rows += -rows % spmd.size
        padded = _place(spmd, x, rows)
        self.axes = _principal_axes(padded) if data.axes is None else data.axes
        self.projected, squares = _along(padded, self.axes)
        self.variances = np.asarray(squares) / len(x)
        self.targets = _place(spmd, np.maximum(y, 0).astype(np.int32), rows)
        known = (y >= 0).astype(np.float32)
        self.shares = _place(spmd, known / np.maximum(known.sum(axis=0), 1), rows)

    def __call__(self, start: np.ndarray, penalty: float) -> tuple[np.ndarray, int]:
        """The solution, float32 [d + 1, classes], whose last row is the bias; and evaluations."""
        curvature = self.variances / self.flatness + penalty
        # With few examples, some directions have no curvature but the penalty's.
        root = np.sqrt(np.maximum(curvature, 1e-7 * curvature.max() + 1e-30))
        scales = np.append(root, self.flatness**-0.5).astype(np.float32)[:, None]
        along_axes = np.concatenate([self.axes.T @ start[:-1], start[-1:]])
        found, evaluations = _minimize(
            scales * along_axes,
            self.projected,
            self.targets,
            self.shares,
            np.float32(penalty),
            scales,
            *self.limits,
        )
        along_axes = np.asarray(found) / scales
        solution = np.concatenate([self.axes @ along_axes[:-1], along_axes[-1:]])
        return solution, int(evaluations)


def _shared_by(x: np.ndarray, classes: int) -> Spmd:
    """The devices that share a product of features with weights of that many classes."""
    devices = jax.local_devices()
    return make_spmd(devices=devices if x.size * classes >= _SHARED else devices[:1])


def _place(spmd: Spmd, array: np.ndarray, rows: int) -> Array:
    """Splits an array over devices by rows, with zeros appended up to `rows`."""

    def shard(index: Any) -> np.ndarray:
        missing = len(range(rows)[index[0]]) - len(part := array[index[0]])
        return np.pad(part, ((0, missing),) + ((0, 0),) * (array.ndim - 1)) if missing else part

    shape = (rows, *array.shape[1:])
    return jax.make_array_from_callback(shape, spmd.sharding("sharded"), shard)


def _scores(
    features: Float[np.ndarray, "n d"],
    weights: Float[np.ndarray, "d c"],
    bias: Float[np.ndarray, " c"],
) -> Float[np.ndarray, "n c"]:
    """Logits, computed on this process's devices."""
    spmd = _shared_by(features, len(bias))
    placed = _place(spmd, features, len(features) + -len(features) % spmd.size)
    logits = jnp.matmul(placed, weights, precision="highest") + bias[None, :]
    return np.asarray(logits)[: len(features)]


def _principal_axes(x: Float[Array, "n d"]) -> Float[np.ndarray, "d r"]:
    """Axes of centered features, r = min(n, d).

    Gradients are combinations of examples, so with fewer examples than features no more than n axes
    matter.
    """
    count, width = x.shape
    if width <= count:
        product = np.asarray(jnp.matmul(x.T, x, precision="highest"), np.float64)
        _, axes = np.linalg.eigh(product)
    else:
        wide = np.asarray(x, np.float64)
        squares, left = np.linalg.eigh(wide @ wide.T)
        spanned = squares > 1e-12 * squares.max()
        axes = wide.T @ left * (spanned / np.sqrt(np.where(spanned, squares, 1)))
    return axes.astype(np.float32)


@jax.jit
def _along(
    x: Float[Array, "n d"], axes: Float[Array, "d r"]
) -> tuple[Float[Array, "n r"], Float[Array, " r"]]:
    """Coordinates of features along axes, and the sums of their squares."""
    projected = jnp.matmul(x, axes, precision="highest")
    return projected, jnp.sum(jnp.square(projected), axis=0)


def _split(count: int, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids of the examples that are held out, a share of them, and of the others."""
    held = round(share * count)
    if not 0 < held < count:
        raise UserError(
            f"A validation split of {share:g} of {count} examples is empty or leaves nothing to "
            "fit. Give more examples, or a single penalty."
        )
    shuffled = np.random.default_rng(seed).permutation(count)
    return shuffled[:held], shuffled[held:]


def _sweep(
    solution: np.ndarray,
    data: _Data,
    out: np.ndarray,
    seen: np.ndarray,
    penalties: Sequence[float],
    metric: str,
) -> tuple[np.ndarray, dict[float, float]]:
    """The last solution, and the metric on the examples left out by penalty."""
    held_out = data.part(out)
    labels, accuracy, weights = held_out.y, {}, np.ones(len(out))
    several = labels.ndim == 2
    if several and not (labels == 1).any():
        raise UserError(
            f"None of the {len(out)} images on which the penalty is chosen is of any class. Give "
            "more labeled images, or a single penalty."
        )
    if metric == "mean_per_class":
        weights /= np.bincount(labels)[labels]
    fit = _Fit(data.part(seen))
    for penalty in penalties:  # strongest first: each fit starts from the previous solution
        solution, _ = fit(solution, penalty)
        logits = _scores(held_out.x, solution[:-1], solution[-1])
        if several:
            accuracy[penalty] = mean_average_precision(logits, labels, metric)
            continue
        correct = logits.argmax(axis=1) == labels
        accuracy[penalty] = float(np.average(correct, weights=weights))
    return solution, accuracy


def _check(features: np.ndarray, labels: np.ndarray, num_classes: int, metric: str) -> None:
    several = labels.ndim == 2
    require_choice("The metric", metric, MULTI_LABEL_METRICS if several else METRICS)
    if features.ndim != 2 or len(labels) != len(features):
        raise UserError(
            f"Features {list(features.shape)} and {len(labels)} labels don't match. Give [n, d] "
            "and [n]."
        )
    if not np.isfinite(features).all():
        raise UserError("Some features are not finite. Check the encoder's run.")
    if several and labels.shape[1] != num_classes:
        raise UserError(f"Labels have {labels.shape[1]} columns for {num_classes} classes.")
    lowest = -1 if several else 0
    num_classes = 2 if several else num_classes
    if len(labels) and not lowest <= labels.min() <= labels.max() < num_classes:
        raise UserError(
            f"Labels range from {labels.min()} to {labels.max()}, but there are {num_classes} "
            "classes. Set num_classes."
        )


@jax.jit
def _minimize(
    start: Float[Array, "r1 c"],
    x: Float[Array, "n r"],
    y: Int[Array, "n *c"],
    shares: Float[Array, "n *c"],
    penalty: Float[Array, ""],
    scales: Float[Array, "r1 1"],
    max_iterations: Int[Array, ""],
    tolerance: Float[Array, ""],
) -> tuple[Float[Array, "r1 c"], Int[Array, ""]]:
    """Runs L-BFGS until the gradient with respect to weights and bias vanishes.

    The coordinates are weights along the principal axes and bias, times `scales`; the loss is the
    sum of the examples' times `shares`. Returns the solution and the number of evaluations.
    """

    def objective(solution: Array) -> Array:
        own = solution / scales
        logits = jnp.matmul(x, own[:-1], precision="highest") + own[-1:]
        if y.ndim == 2:
            losses = optax.sigmoid_binary_cross_entropy(logits, y)
        else:
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        return jnp.sum(shares * losses) + penalty / 2 * jnp.sum(jnp.square(own[:-1]))

    solver = optax.lbfgs(memory_size=_MEMORY)
    value_and_grad = optax.value_and_grad_from_state(objective)

    def step(carry: _Carry) -> _Carry:
        solution, state, done, evaluations, _ = carry
        value, gradient = value_and_grad(solution, state=state)
        updates, state = solver.update(
            gradient, state, solution, value=value, grad=gradient, value_fn=objective
        )
        solution = optax.apply_updates(solution, updates)
        evaluations += optax.tree_utils.tree_get(state, "num_linesearch_steps")
        return solution, state, done + 1, evaluations, jnp.abs(scales * gradient).max()

    def unfinished(carry: _Carry) -> Array:
        return (carry[2] < max_iterations) & (carry[-1] > tolerance)

    # The line search leaves value and gradient to the next iteration; the first computes its own.
    first = (start, solver.init(start), jnp.int32(0), jnp.int32(1), jnp.float32(jnp.inf))
    solution, _, _, evaluations, _ = jax.lax.while_loop(unfinished, step, first)
    return solution, evaluations
