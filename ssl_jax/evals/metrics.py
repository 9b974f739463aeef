"""Metrics of a classifier: accuracies with intervals, confusion, calibration."""

from typing import Any

import lazy_loader
import numpy as np
from jaxtyping import Int, Real

from ssl_jax.data.listing import some
from ssl_jax.errors import UserError

scipy = lazy_loader.load("scipy")
_BINS = 15  # of confidence (Guo et al., 2017, section 2)


def classification_metrics(
    scores: Real[np.ndarray, "n c"],
    labels: Int[np.ndarray, " n"],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Computes accuracies, calibration error and confusion, with bootstrap intervals.

    An image counts in top-k if fewer than k classes rank before its own, by score and, for equal
    scores, by class number, as in argmax; it counts as wrong if its scores are not finite. The
    calibration error is the mean over bins of confidence of abs(accuracy - confidence) (Guo et al.,
    2017, arXiv:1706.04599, section 2).

    Args:
      scores: logits [n, c].
      labels: [n], in 0 … c-1.
      resamples: number of bootstrap resamples of the images; 0: no intervals.
      seed: of the resamples.

    Returns:
      "top1", "top5" (with more than five classes), "mean_per_class" over the classes that occur and
      "calibration_error", each {"value", "low", "high"} in [0, 1] with a 95 % interval that
      contains the value: percentiles; those of the calibration error, which resampling biases
      upward, are reflected at the value. "examples" is n. "confusion" lists [true class, predicted
      class, number of images] of the pairs that occur, in ascending order, without images whose
      scores are not finite: a matrix of all pairs would be too large with thousands of classes.

    Raises:
      UserError: there are no images, or labels don't match the scores.
    """
    scores, labels = np.asarray(scores), np.asarray(labels)
    # At their own precision: rounding would create ties.
    scores = scores.astype(np.result_type(scores, np.float32))
    _check(scores, labels)
    classes = scores.shape[1]
    # Non-finite scores, of a diverged classifier, rank an image's own class last.
    finite = np.isfinite(scores).all(axis=1)
    scores = np.where(finite[:, None], scores, 0)
    ahead = np.where(finite, _ahead(scores, labels), classes)
    predicted = scores.argmax(axis=1)
    confident = scipy.special.softmax(scores, axis=1).max(axis=1)
    each = {"top1": ahead < 1}
    if classes > 5:
        each["top5"] = ahead < 5
    bins = np.minimum((confident * _BINS).astype(int), _BINS - 1)
    # A resample is a weight per image, so every metric is a weighted sum.
    rng = np.random.default_rng(seed)
    uniform = np.full(len(labels), 1 / len(labels))
    counts = rng.multinomial(len(labels), uniform, size=resamples)
    weights = np.concatenate([np.ones((1, len(labels)), counts.dtype), counts])
    measured = {name: weights @ correct / len(labels) for name, correct in each.items()}
    measured["mean_per_class"] = _mean_per_class(weights, each["top1"], labels, classes)
    measured["calibration_error"] = _calibration(weights, each["top1"], confident, bins)
    confusion = _confusion(labels[finite], predicted[finite])
    found: dict[str, Any] = {
        name: percentile_interval(values, reflected=name == "calibration_error")
        for name, values in measured.items()
    }
    return {**found, "examples": len(labels), "confusion": confusion}


def _confusion(labels: np.ndarray, predicted: np.ndarray) -> list[list[int]]:
    """The pairs of true and predicted class that occur, each with its number of images."""
    pairs, counts = np.unique(np.stack([labels, predicted], 1), axis=0, return_counts=True)
    found: list[list[int]] = np.concatenate([pairs, counts[:, None]], axis=1).tolist()
    return found


def _check(scores: np.ndarray, labels: np.ndarray) -> None:
    if scores.ndim != 2 or len(scores) != len(labels) or not len(labels):
        raise UserError(
            f"Scores of shape {list(scores.shape)} don't match {len(labels)} labels. Give "
            "[n, classes] and [n], with n at least 1."
        )
    classes = scores.shape[1]
    if labels.min() < 0 or labels.max() >= classes:
        raise UserError(
            f"Labels range from {labels.min()} to {labels.max()}, but scores have {classes} "
            f"classes. Use labels from 0 to {classes - 1}."
        )


def _ahead(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Number of classes that rank before each image's own."""
    own = scores[np.arange(len(labels)), labels][:, None]
    earlier = np.arange(scores.shape[1]) < labels[:, None]
    count: np.ndarray = np.sum((scores > own) | ((scores == own) & earlier), axis=1)
    return count


def _mean_per_class(
    weights: np.ndarray, correct: np.ndarray, labels: np.ndarray, classes: int
) -> np.ndarray:
    """Mean accuracy per resample over the classes that occur in it."""
    images = np.arange(len(labels))
    # Dense, this is gigabytes with thousands of classes.
    places = (images, labels)
    of_class = scipy.sparse.csr_array((np.ones(len(labels)), places), (len(labels), classes))
    total, hits = weights @ of_class, (weights * correct) @ of_class
    shares = np.divide(hits, total, out=np.zeros_like(hits), where=total > 0)
    mean: np.ndarray = shares.sum(axis=1) / (total > 0).sum(axis=1)
    return mean


def _calibration(
    weights: np.ndarray, correct: np.ndarray, confident: np.ndarray, bins: np.ndarray
) -> np.ndarray:
    in_bin = np.eye(_BINS)[bins]
    gap = np.abs((weights * (correct - confident)) @ in_bin)
    error: np.ndarray = gap.sum(axis=1) / weights.sum(axis=1)
    return error


def percentile_interval(
    values: Real[np.ndarray, " r"], reflected: bool = False
) -> dict[str, float]:
    """A value and its 95 % percentile interval, which contains it.

    Args:
      values: the value, and those of bootstrap resamples, if any.
      reflected: whether the interval is reflected at the value.

    Returns:
      "value", "low" and "high".
    """
    value, resampled = float(values[0]), values[1:]
    low, high = np.percentile(resampled, [2.5, 97.5]) if len(resampled) else (value, value)
    if reflected:
        low, high = max(2 * value - high, 0.0), 2 * value - low
    return {"value": value, "low": min(float(low), value), "high": max(float(high), value)}


def interval_text(found: dict[str, float]) -> str:
    """Formats a metric with its interval, in percent."""
    return f"{100 * found['value']:.1f} [{100 * found['low']:.1f}, {100 * found['high']:.1f}]"


def metrics_line(metrics: dict[str, Any]) -> str:
    """Formats the metrics of a classifier as one line, in percent."""
    names = {"top1": "top-1", "top5": "top-5", "mean_per_class": "mean per class"}
    names |= {"calibration_error": "calibration error"}
    names |= {"mean_ap": "mAP", "mean_ap_11_point": "11-point mAP"}
    parts = [
        f"{name} {100 * metrics[key]['value']:.2f} "
        f"[{100 * metrics[key]['low']:.2f}, {100 * metrics[key]['high']:.2f}]"
        for key, name in names.items()
        if key in metrics
    ]
    line = f"{', '.join(parts)} % of {metrics['examples']:,} images"
    if excluded := metrics.get("excluded"):
        line += f"; without {some(excluded)}, which a split has no images of"
    return line
