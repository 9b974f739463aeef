"""Multinomial logistic regression on frozen features, fast: L-BFGS in JAX, the penalty swept."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from ssl_jax.errors import UserError

# Of the mean cross-entropy, features in units of their overall spread.
PENALTIES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
METRICS = ("top1", "mean_per_class")  # by which a penalty may be chosen
_TOLERANCE = 1e-4  # of the gradient's largest entry
_MEMORY = 10


@dataclasses.dataclass(frozen=True)
class LinearClassifier:
    """A linear classifier of features.

    Attributes:
      weights: of the features as they are, not of scaled ones, float32 [d, classes].
      bias: float32 [classes].
      penalty: on the squared weights, chosen or given.
      validation: accuracy (or its mean per class) on the validation split by penalty; empty where
        the penalty was given.
    """

    weights: Float[np.ndarray, "d c"]
    bias: Float[np.ndarray, " c"]
    penalty: float
    validation: dict[float, float]

    def scores(self, features: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n c"]:
        """Logits of the classes."""
        return np.asarray(features, np.float32) @ self.weights + self.bias

    def predict(self, features: Float[np.ndarray, "n d"]) -> Int[np.ndarray, " n"]:
        """The likeliest class of each, int32 [n]."""
        return self.scores(features).argmax(axis=1).astype(np.int32)


def fit_linear(
    features: Float[np.ndarray, "n d"],
    labels: Int[np.ndarray, " n"],
    *,
    num_classes: int,
    penalties: Sequence[float] = PENALTIES,
    validation_fraction: float = 0.1,
    max_iterations: int = 500,
    seed: int = 0,
    metric: str = "top1",
) -> LinearClassifier:
    """Fits a linear classifier to frozen features.

    It minimises the mean cross-entropy and penalty / 2 · ‖weights‖² (scikit-learn's C is 1 / (n ·
    penalty)) of features that are centred and divided by their overall standard deviation, and not
    each by its own, which few labels can't tell. With several penalties the one that classifies a
    part of the data best is taken, the weaker of equals, and the fit is repeated on all.

    Args:
      features: [n, d].
      labels: [n], in 0 … num_classes-1.
      num_classes: of the labels.
      penalties: to choose among; a single one is taken as it is.
      validation_fraction: of the examples, on which the penalty is chosen.
      max_iterations: of L-BFGS at most, for each fit.
      seed: of the split.
      metric: by which the penalty is chosen, "top1" or "mean_per_class".

    Returns:
      The classifier.

    Raises:
      UserError: labels that don't fit the features or the number of classes, or too few examples to
        choose a penalty on.
    """
    features, labels = np.asarray(features, np.float32), np.asarray(labels)
    _check(features, labels, num_classes, metric)
    if not penalties:
        raise UserError("There is no penalty to choose: give at least one.")
    centre = features.mean(axis=0)
    scale = max(float((features - centre).std()), 1e-12)
    x, y = jnp.asarray((features - centre) / scale), jnp.asarray(labels, jnp.int32)
    fit = _Fit(x, y, num_classes, max_iterations)
    start = np.zeros((features.shape[1] + 1, num_classes), np.float32)
    ordered = sorted(set(penalties), reverse=True)
    penalty = ordered[0]
    validation: dict[float, float] = {}
    if len(ordered) > 1:
        shuffled = np.random.default_rng(seed).permutation(len(y))
        held = round(validation_fraction * len(y))
        if not 0 < held < len(y):
            raise UserError(
                f"{validation_fraction:g} of {len(y)} examples is no validation split: give more "
                "examples, or one penalty."
            )
        start, validation = _sweep(start, fit, shuffled, held, ordered, metric)
        penalty = min(ordered, key=lambda p: (-validation[p], p))
    fitted = fit(start, penalty)
    weights = fitted[:-1] / scale
    return LinearClassifier(weights, fitted[-1] - centre @ weights, penalty, validation)


class _Fit:
    """Minimises on examples, from a start, with a penalty."""

    def __init__(self, x: Array, y: Array, classes: int, max_iterations: int) -> None:
        self.x, self.y, self.classes, self.max_iterations = x, y, classes, max_iterations
        product = np.asarray(jnp.matmul(x.T, x, precision="highest"), np.float64) / len(x)
        self.variances, self.directions = np.linalg.eigh(product)

    def __call__(self, start: np.ndarray, penalty: float) -> np.ndarray:
        """The solution, float32 [d + 1, classes]; its last row is the bias.

        In coordinates in which the loss at equal scores is as steep in all directions: its
        curvature there is the features' covariance over the number of classes. Features are far
        from that, and L-BFGS takes several times as many steps in their own.
        """
        steep = np.maximum(self.variances, 0) / self.classes + penalty
        # Of few examples there are directions without any, but for the penalty.
        root = np.sqrt(np.maximum(steep, 1e-7 * steep.max() + 1e-30))
        into, lower = self.directions / root, self.directions * root
        bias = self.classes**-0.5
        own = np.concatenate([lower.T @ start[:-1], bias * start[-1:]]).astype(np.float32)
        found = np.asarray(
            _minimise(
                jnp.asarray(own),
                self.x,
                self.y,
                jnp.float32(penalty),
                jnp.asarray(into, jnp.float32),
                jnp.asarray(lower, jnp.float32),
                self.max_iterations,
            )
        )
        back = np.concatenate([into @ found[:-1], found[-1:] / bias])
        return back.astype(np.float32)


def _sweep(
    solution: np.ndarray,
    fit: _Fit,
    shuffled: np.ndarray,
    held: int,
    penalties: Sequence[float],
    metric: str,
) -> tuple[np.ndarray, dict[float, float]]:
    """The last solution, and the metric on the `held` first of the shuffled by penalty."""
    out, seen = shuffled[:held], shuffled[held:]
    labels, accuracy = np.asarray(fit.y)[out], {}
    part = _Fit(fit.x[seen], fit.y[seen], fit.classes, fit.max_iterations)
    weights = np.ones(held)
    if metric == "mean_per_class":
        weights /= np.bincount(labels)[labels]
    for penalty in penalties:  # from the strongest: each starts where the one before has ended
        solution = part(solution, penalty)
        predicted = np.asarray(jnp.argmax(_logits(solution, fit.x[out]), axis=1))
        accuracy[penalty] = float(np.average(predicted == labels, weights=weights))
    return solution, accuracy


def _check(features: np.ndarray, labels: np.ndarray, num_classes: int, metric: str) -> None:
    if metric not in METRICS:
        raise UserError(f"The metric is {metric!r}: it may be 'top1' or 'mean_per_class'.")
    if features.ndim != 2 or len(labels) != len(features):
        raise UserError(
            f"Features {list(features.shape)} have {len(labels)} labels: give [n, d] and [n]."
        )
    if not np.isfinite(features).all():
        raise UserError("There are features that are not finite: look at the encoder's run.")
    if len(labels) and not 0 <= labels.min() <= labels.max() < num_classes:
        raise UserError(
            f"Labels go from {labels.min()} to {labels.max()}, which {num_classes} classes don't "
            "have: set num_classes."
        )


def _logits(solution: Float[np.ndarray, "d1 c"], x: Float[Array, "n d"]) -> Float[Array, "n c"]:
    return jnp.matmul(x, solution[:-1], precision="highest") + solution[-1:]


@functools.partial(jax.jit, static_argnums=6)
def _minimise(
    start: Float[Array, "d1 c"],
    x: Float[Array, "n d"],
    y: Int[Array, " n"],
    penalty: Array,
    into: Float[Array, "d d"],
    lower: Float[Array, "d d"],
    max_iterations: int,
) -> Float[Array, "d1 c"]:
    """L-BFGS until the gradient of weights and bias vanishes, in the coordinates of `_Fit`.

    `into` brings a solution's rows to weights, and `lower` a gradient's rows to theirs.
    """
    bias = start.shape[1] ** 0.5

    def objective(solution: Array) -> Array:
        weights = jnp.matmul(into, solution[:-1], precision="highest")
        logits = jnp.matmul(x, weights, precision="highest") + bias * solution[-1:]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        return losses.mean() + penalty / 2 * jnp.sum(jnp.square(weights))

    def largest(gradient: Array) -> Array:
        of_weights = jnp.matmul(lower, gradient[:-1], precision="highest")
        return jnp.maximum(jnp.abs(of_weights).max(), jnp.abs(gradient[-1]).max() / bias)

    solver = optax.lbfgs(memory_size=_MEMORY)
    value_and_grad = optax.value_and_grad_from_state(objective)

    def step(carry: tuple[Array, optax.OptState, Array, Array]) -> tuple:
        solution, state, done, _ = carry
        value, gradient = value_and_grad(solution, state=state)
        updates, state = solver.update(
            gradient, state, solution, value=value, grad=gradient, value_fn=objective
        )
        solution = optax.apply_updates(solution, updates)
        return solution, state, done + 1, largest(gradient)

    def going(carry: tuple[Array, optax.OptState, Array, Array]) -> Array:
        return (carry[2] < max_iterations) & (carry[3] > _TOLERANCE)

    first = (start, solver.init(start), jnp.int32(0), jnp.float32(jnp.inf))
    return jax.lax.while_loop(going, step, first)[0]
