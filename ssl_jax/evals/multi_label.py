"""Mean average precision of classifiers of images that may be of several classes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, Int8, Real

from ssl_jax.data.labels import NO_COMMON_CLASS
from ssl_jax.errors import UserError
from ssl_jax.evals.metrics import percentile_interval

MULTI_LABEL_METRICS = ("mean_ap", "mean_ap_11_point")
_RECALLS = 10  # steps of recall in VOC2007's measure: 0, 0.1, … 1
_CELLS = 2_000_000  # resampled weights that are held at a time
# Resamples × images × classes beyond which fewer resamples are taken.
_WORK = 1_000_000_000
_FEWEST = 100  # resamples of which 95 % intervals are still taken


def average_precision(
    scores: Real[np.ndarray, " n"],
    positive: Bool[np.ndarray, " n"],
    weights: Real[np.ndarray, "r n"] | None = None,
) -> tuple[Float[np.ndarray, " r"], Float[np.ndarray, " r"]]:
    """Computes a class's average precision over all points and over VOC2007's 11 points.

    Images of equal scores enter together, so their order doesn't matter. All points: Σ (Rₖ - Rₖ₋₁)
    Pₖ over the distinct scores, with recall R and precision P, as scikit-learn defines it. 11
    points: the mean over recalls 0, 0.1, … 1 of the largest precision at that recall or above
    (Everingham et al., 2010, "The PASCAL Visual Object Classes (VOC) Challenge", section 4.2).

    Args:
      scores: higher for images that are more likely of the class; a non-finite score ranks last.
      positive: whether an image is of the class.
      weights: whole numbers, how often each image counts in each of r evaluations; None: once.

    Returns:
      Both measures, float64 [r], in [0, 1]; NaN where no image of the class counts.
    """
    scores = np.where(np.isfinite(scores), scores, -np.inf)
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    ends = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))  # also of infinite ones
    counted = np.ones((1, len(scores))) if weights is None else weights
    counted = counted[:, order].astype(np.float64)
    found = np.cumsum(counted, axis=1)[:, ends]
    hits = np.cumsum(counted * positive[order], axis=1)[:, ends]
    total = hits[:, -1:]
    precision = np.divide(hits, found, out=np.zeros_like(hits), where=found > 0)
    gained = np.diff(hits, axis=1, prepend=0)
    best = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    eleven = np.zeros(len(hits))
    for step in range(_RECALLS + 1):
        # Whole numbers are compared exactly, where 3/10 and 0.3 may differ.
        first = np.sum(_RECALLS * hits < step * total, axis=1, keepdims=True)
        eleven += np.take_along_axis(best, np.minimum(first, best.shape[1] - 1), axis=1)[:, 0]
    exists = total[:, 0] > 0
    every = np.sum(gained * precision, axis=1) / np.where(exists, total[:, 0], 1)
    return np.where(exists, every, np.nan), np.where(exists, eleven / (_RECALLS + 1), np.nan)


def mean_average_precision(
    scores: Real[np.ndarray, "n c"], targets: Int8[np.ndarray, "n c"], metric: str = "mean_ap"
) -> float:
    """The mean over classes of average precision; NaN if no image is of any class.

    Args:
      scores: logits.
      targets: see `Targets.values`.
      metric: "mean_ap" or "mean_ap_11_point".
    """
    column = MULTI_LABEL_METRICS.index(metric)
    found = []
    for score, target in zip(scores.T, targets.T, strict=True):
        known = target >= 0
        if (target == 1).any():
            found.append(average_precision(score[known], target[known] == 1)[column][0])
    return float(np.mean(found)) if found else np.nan


def multi_label_metrics(
    scores: Real[np.ndarray, "n c"],
    targets: Int8[np.ndarray, "n c"],
    class_names: Sequence[str],
    *,
    skipped: Int[np.ndarray, " k"] | Sequence[int] = (),
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Computes mean average precision with bootstrap intervals, and that of each class.

    Args:
      scores: logits.
      targets: see `Targets.values`; an image that is -1 for a class is left out of it.
      class_names: by column.
      skipped: columns to leave out, of classes that could not be learned.
      resamples: number of bootstrap resamples of the images, at most; 0: no intervals. Fewer, but
        100 or more, are taken of data so large that all would take minutes.
      seed: of the resamples.

    Returns:
      "mean_ap" and "mean_ap_11_point", each {"value", "low", "high"} in [0, 1] with a 95 % interval
      that contains the value; a resample's mean is over the classes that occur in it. "classes"
      lists {"name", "positives", "mean_ap", "mean_ap_11_point"} of each class that counts,
      "excluded" the names of the others, which have no image here or are skipped. "examples" is n.

    Raises:
      UserError: no class counts, or scores don't match the targets.
    """
    scores, targets = np.asarray(scores), np.asarray(targets)
    if scores.shape != targets.shape or not scores.size:
        raise UserError(
            f"Scores of shape {list(scores.shape)} don't match targets {list(targets.shape)}. "
            "Give both as [n, classes], with n and classes at least 1."
        )
    counts = (targets == 1).sum(axis=0)
    kept = [c for c in range(len(counts)) if counts[c] and c not in set(skipped)]
    require_classes(kept)
    enough = max(_FEWEST, _WORK // (len(scores) * len(kept)))
    each = _resampled(scores[:, kept], targets[:, kept], min(resamples, enough), seed)
    occurs = np.isfinite(each)
    # A resample may have no image of any class.
    means = np.where(occurs, each, 0).sum(axis=0) / np.maximum(occurs.sum(axis=0), 1)
    usable = occurs.any(axis=0)
    found: dict[str, Any] = {
        name: percentile_interval(means[k][usable[k]]) for k, name in enumerate(MULTI_LABEL_METRICS)
    }
    found["classes"] = [
        {"name": class_names[c], "positives": int(counts[c])}
        | {name: float(own[k, 0]) for k, name in enumerate(MULTI_LABEL_METRICS)}
        for c, own in zip(kept, each, strict=True)
    ]
    excluded = [name for c, name in enumerate(class_names) if c not in kept]
    return {**found, "excluded": excluded, "examples": len(scores)}


def require_classes(kept: Sequence[int] | Int[np.ndarray, " k"]) -> None:
    """Refuses data without a class that both splits have.

    Args:
      kept: the classes that do.

    Raises:
      UserError: there are none.
    """
    if not len(kept):
        raise UserError(NO_COMMON_CLASS)


def _resampled(
    scores: Real[np.ndarray, "n c"], targets: Int8[np.ndarray, "n c"], resamples: int, seed: int
) -> Float[np.ndarray, "c 2 r"]:
    """Both measures of each class, of the images and in each resample; some resamples at a time."""
    count, rng = len(scores), np.random.default_rng(seed)
    uniform, step = np.full(count, 1 / count), max(1, _CELLS // count)
    parts = [_measured(scores, targets, np.ones((1, count), np.int64))]
    for start in range(0, resamples, step):
        drawn = rng.multinomial(count, uniform, size=min(step, resamples - start))
        parts.append(_measured(scores, targets, drawn))
    return np.concatenate(parts, axis=2)


def _measured(
    scores: Real[np.ndarray, "n c"],
    targets: Int8[np.ndarray, "n c"],
    weights: Int[np.ndarray, "r n"],
) -> Float[np.ndarray, "c 2 r"]:
    """Both measures of each class, with each of r weights of the images."""
    each = []
    for score, target in zip(scores.T, targets.T, strict=True):
        known = target >= 0
        found = average_precision(score[known], target[known] == 1, weights[:, known])
        each.append(np.stack(found))
    return np.stack(each)
