"""What a classifier's scores are worth: accuracies with intervals, confusion, calibration."""

from typing import Any

import numpy as np
from jaxtyping import Int, Real
from scipy import special

from ssl_jax.errors import UserError

_BINS = 15  # of confidence (Guo et al., 2017, section 2)


def classification_metrics(
    scores: Real[np.ndarray, "n c"],
    labels: Int[np.ndarray, " n"],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Top-1, top-5, mean per class, calibration and confusion, with bootstrap intervals.

    An image counts in top-k if fewer than k classes come before its own, by score and, where scores
    are equal, by number, as argmax has them; with scores that are not finite it counts as wrong.
    The calibration error is the mean, over bins of confidence, of the distance between accuracy and
    confidence (Guo et al., 2017, arXiv:1706.04599, section 2).

    Args:
      scores: logits of the classes.
      labels: in 0 … c-1.
      resamples: of the test images with replacement; 0: no intervals.
      seed: of the resamples.

    Returns:
      "top1", "top5" (of more than five classes), "mean_per_class" over the classes that
      occur, "calibration_error", each {"value", "low", "high"} in [0, 1] with 95 % intervals that
      hold the value: percentiles, and of the calibration error, which noise makes larger, these
      reflected in the value; "examples"; "confusion", counts [c, c] by true class and predicted
      one, without images whose scores are not finite.

    Raises:
      UserError: nothing to measure, or labels that the scores don't have.
    """
    scores, labels = np.asarray(scores), np.asarray(labels)
    # Not less precise than they are: rounding would make scores equal.
    scores = scores.astype(np.result_type(scores, np.float32))
    _check(scores, labels)
    classes = scores.shape[1]
    # Those of a diverged classifier put its own class behind all others.
    finite = np.isfinite(scores).all(axis=1)
    scores = np.where(finite[:, None], scores, 0)
    ahead = np.where(finite, _ahead(scores, labels), classes)
    predicted = scores.argmax(axis=1)
    confident = special.softmax(scores, axis=1).max(axis=1)
    each = {"top1": ahead < 1}
    if classes > 5:
        each["top5"] = ahead < 5
    bins = np.minimum((confident * _BINS).astype(int), _BINS - 1)
    # By image: in how many resamples it is; the rest is sums.
    rng = np.random.default_rng(seed)
    uniform = np.full(len(labels), 1 / len(labels))
    counts = rng.multinomial(len(labels), uniform, size=resamples)
    weights = np.concatenate([np.ones((1, len(labels)), counts.dtype), counts])
    measured = {name: weights @ correct / len(labels) for name, correct in each.items()}
    measured["mean_per_class"] = _mean_per_class(weights, each["top1"], labels, classes)
    measured["calibration_error"] = _calibration(weights, each["top1"], confident, bins)
    confusion = np.zeros((classes, classes), int)
    np.add.at(confusion, (labels[finite], predicted[finite]), 1)
    found: dict[str, Any] = {
        name: _interval(values, reflected=name == "calibration_error")
        for name, values in measured.items()
    }
    return {**found, "examples": len(labels), "confusion": confusion.tolist()}


def _check(scores: np.ndarray, labels: np.ndarray) -> None:
    if scores.ndim != 2 or len(scores) != len(labels) or not len(labels):
        raise UserError(
            f"Scores of shape {list(scores.shape)} don't belong to {len(labels)} labels: give "
            "[n, classes] and [n], of one image or more."
        )
    classes = scores.shape[1]
    if labels.min() < 0 or labels.max() >= classes:
        raise UserError(
            f"Labels go from {labels.min()} to {labels.max()}, but there are scores of {classes} "
            f"classes: labels are 0 to {classes - 1}."
        )


def _ahead(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """How many classes come before an image's own."""
    own = scores[np.arange(len(labels)), labels][:, None]
    earlier = np.arange(scores.shape[1]) < labels[:, None]
    count: np.ndarray = np.sum((scores > own) | ((scores == own) & earlier), axis=1)
    return count


def _mean_per_class(
    weights: np.ndarray, correct: np.ndarray, labels: np.ndarray, classes: int
) -> np.ndarray:
    """Of each draw, over the classes that occur in it."""
    of_class = np.eye(classes)[labels]
    there, rights = weights @ of_class, (weights * correct) @ of_class
    shares = np.divide(rights, there, out=np.zeros_like(rights), where=there > 0)
    mean: np.ndarray = shares.sum(axis=1) / (there > 0).sum(axis=1)
    return mean


def _calibration(
    weights: np.ndarray, correct: np.ndarray, confident: np.ndarray, bins: np.ndarray
) -> np.ndarray:
    in_bin = np.eye(_BINS)[bins]
    gap = np.abs((weights * (correct - confident)) @ in_bin)
    error: np.ndarray = gap.sum(axis=1) / weights.sum(axis=1)
    return error


def _interval(values: np.ndarray, reflected: bool) -> dict[str, float]:
    value, drawn = float(values[0]), values[1:]
    low, high = np.percentile(drawn, [2.5, 97.5]) if len(drawn) else (value, value)
    if reflected:
        low, high = max(2 * value - high, 0.0), 2 * value - low
    return {"value": value, "low": min(float(low), value), "high": max(float(high), value)}


def interval_text(found: dict[str, float]) -> str:
    """One of those numbers with its interval, for tables, in percent."""
    return f"{100 * found['value']:.1f} [{100 * found['low']:.1f}, {100 * found['high']:.1f}]"


def metrics_line(metrics: dict[str, Any]) -> str:
    """The numbers of `classification_metrics` in a line for people, in percent."""
    names = {"top1": "top-1", "top5": "top-5", "mean_per_class": "mean per class"}
    names["calibration_error"] = "calibration error"
    parts = [
        f"{name} {100 * metrics[key]['value']:.2f} "
        f"[{100 * metrics[key]['low']:.2f}, {100 * metrics[key]['high']:.2f}]"
        for key, name in names.items()
        if key in metrics
    ]
    return f"{', '.join(parts)} % of {metrics['examples']:,} images"
