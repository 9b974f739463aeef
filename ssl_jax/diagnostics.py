"""Signs of collapse: what the loss alone does not show."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ssl_jax.losses import normalize

# Relative to 1/sqrt(d). Healthy encoders after ReLU and pooling measure .2 to 1.
COLLAPSED_STD = 0.02
# A loss this near to its value for constant outputs has learned nothing.
NEAR_TRIVIAL = 0.005
# Of prototypes in use, and of the effective rank of the features: one direction is left.
COLLAPSED_COUNT = 1.5
_ANCHORS = 256


def embedding_std(
    embedding: Float[Array, "n d"], mean_over_devices: Callable[[Array], Array] = lambda x: x
) -> Float[Array, ""]:
    """Spread of unit-length embeddings over the global batch (SimSiam, section 4.1).

    Args:
      embedding: this device's, [n, d].
      mean_over_devices: averages a local mean over devices.

    Returns:
      The standard deviation of each coordinate over the batch, averaged over coordinates and
      divided by 1/sqrt(d): 1 for directions spread evenly, 0 when all are the same.
    """
    unit = normalize(embedding)
    mean = mean_over_devices(jnp.mean(unit, axis=0))
    # About the global mean: the difference of two means would cancel when nearly collapsed.
    variance = mean_over_devices(jnp.mean(jnp.square(unit - mean[None, :]), axis=0))
    return jnp.mean(jnp.sqrt(variance)) * np.sqrt(unit.shape[1])


def contrastive_accuracy(
    anchors: Float[Array, "n d"],
    positives: Float[Array, "n d"],
    candidates: Float[Array, "m d"],
    *,
    among: bool,
) -> Float[Array, ""]:
    """How often the positive is more similar to its anchor than every negative is.

    On the first 256 anchors of this device at most, which is enough to follow and costs little.
    As near as the positive within rounding counts as nearer, so that collapsed embeddings, all the
    same, score 0.

    Args:
      anchors: of this device, [n, d]; normalised here, like the rest.
      positives: of the same images, [n, d].
      candidates: to be told from the positive, [m, d].
      among: whether each positive is itself one of the candidates.

    Returns:
      This device's fraction, float32; the caller averages it over devices.
    """
    anchors, positives = normalize(anchors)[:_ANCHORS], normalize(positives)[:_ANCHORS]
    positive = jnp.sum(anchors * positives, axis=1, keepdims=True)
    similarity = jnp.matmul(anchors, normalize(candidates).T, precision="highest")
    as_near = jnp.sum(similarity > positive - 1e-6, axis=1)
    return jnp.mean(as_near <= int(among))


def prototypes_used(
    scores: Float[Array, "n k"], mean_over_devices: Callable[[Array], Array] = lambda x: x
) -> Float[Array, ""]:
    """How many prototypes are some image's nearest, as exp of the entropy of their shares.

    Assignments can't tell: Sinkhorn-Knopp spreads also what has collapsed evenly over prototypes.

    Args:
      scores: of this device's images against the K prototypes, [n, K].
      mean_over_devices: averages a local mean over devices.

    Returns:
      Between 1, one prototype is nearest to all, and K.
    """
    count = scores.shape[1]
    nearest = jnp.zeros(count).at[jnp.argmax(scores, axis=1)].add(1 / scores.shape[0])
    share = mean_over_devices(nearest)
    return jnp.exp(-jnp.sum(share * jnp.log(jnp.maximum(share, 1e-12))))


def rankme(features: Float[np.ndarray, "n d"]) -> float:
    """The effective rank of features (Garrido et al., 2023, arXiv:2210.02885, eq. 1).

    Args:
      features: [n, d].

    Returns:
      exp of the entropy of the normalised singular values, between 1 and min(n, d); NaN where the
      features are not all finite.
    """
    if not np.isfinite(features).all():
        return math.nan
    values = np.linalg.svd(np.asarray(features, np.float64), compute_uv=False)
    p = values / max(values.sum(), 1e-300) + 1e-7
    return float(np.exp(-np.sum(p * np.log(p))))


def uniformity(features: Float[np.ndarray, "n d"]) -> float:
    """Log of the mean Gaussian potential of pairs of unit features (Wang & Isola, 2020, eq. 2).

    Args:
      features: [n, d], n at least 2.

    Returns:
      At most 0, which means that all are the same; lower is more even.
    """
    x = unit_rows(features)
    squared = np.maximum(2 - 2 * x @ x.T, 0)[np.triu_indices(len(x), 1)]
    return float(np.log(np.exp(-2 * squared).mean()))


def alignment(first: Float[np.ndarray, "n d"], second: Float[np.ndarray, "n d"]) -> float:
    """Mean squared distance of the unit features of two views (Wang & Isola, 2020, eq. 1).

    Args:
      first: of one view of each image, [n, d].
      second: of another view of the same images.

    Returns:
      Between 0 (the views are told apart by nothing) and 4.
    """
    return float(np.square(unit_rows(first) - unit_rows(second)).sum(axis=1).mean())


def unit_rows(x: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    """Features divided by their length, float64; those of length 0 stay as they are."""
    x = np.asarray(x, np.float64)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


@dataclasses.dataclass
class CollapseDetector:
    """Follows the logged metrics of a run and warns once of each kind of collapse.

    Attributes:
      trivial_loss: the loss of constant outputs, where it is known: ln K of SwAV.
      patience: steps for which the loss may stay there; it starts there.
    """

    trivial_loss: float | None = None
    patience: int = 0
    _widest: float = 0.0
    _since: dict[str, int] = dataclasses.field(default_factory=dict)
    _warned: set[str] = dataclasses.field(default_factory=set)

    def check(self, step: int, metrics: Mapping[str, float]) -> list[str]:
        """Warnings that are new at this step.

        A sign must hold at two logged steps in a row: a single batch may mislead.

        Args:
          step: of the metrics.
          metrics: those of the step that there are of "loss", "embedding_std", "prototypes_used"
            and "rankme".

        Returns:
          Sentences that say what collapsed and since which step; usually none.
        """
        warnings = []
        for sign, what in self.indicators(metrics).items():
            if what is None:
                self._since.pop(sign, None)
                continue
            since = self._since.setdefault(sign, step)
            patience = self.patience if sign == "loss" else 0
            if step > since + patience and sign not in self._warned:
                self._warned.add(sign)
                warnings.append(f"warning: collapse since step {since}: {what}.")
        return warnings

    def indicators(self, metrics: Mapping[str, float]) -> dict[str, str | None]:
        """By kind of collapse what shows it; None where the metric is there and healthy."""
        indicators: dict[str, str | None] = {}

        def look(key: str, healthy: Callable[[float], bool], what: str) -> None:
            if key in metrics:
                value = metrics[key]
                indicators[key] = None if healthy(value) else what.format(value)

        look(
            "embedding_std",
            lambda std: std >= COLLAPSED_STD,
            "the embeddings of different images are nearly the same (their standard deviation is "
            "{:.4f} of 1/√d)",
        )
        std = metrics.get("embedding_std", math.nan)
        if std >= COLLAPSED_STD:
            self._widest = max(self._widest, std)
            # Directions are lost before all is: BatchNorm at the end of a projector keeps a rest.
            halved = std < self._widest / 2
            told = f"({std:.2f} of 1/√d, {self._widest:.2f} before)"
            indicators["halved"] = f"the spread of embeddings has halved {told}" if halved else None
        look(
            "rankme",
            lambda rank: rank >= COLLAPSED_COUNT,
            "the features have one direction left (RankMe {:.2f})",
        )
        look(
            "prototypes_used",
            lambda used: used >= COLLAPSED_COUNT,
            "one prototype is the nearest of nearly all images ({:.2f} are in use)",
        )
        trivial = self.trivial_loss
        if trivial is not None:
            look(
                "loss",
                lambda loss: not abs(loss - trivial) < NEAR_TRIVIAL * abs(trivial),
                f"the loss stays at that of constant outputs ({{:.4f}}, ln K = {trivial:.4f})",
            )
        return indicators


@dataclasses.dataclass(frozen=True)
class CollapseSign:
    """A sign of collapse in a run's records.

    Attributes:
      kind: "embedding_std", "halved", "rankme", "prototypes_used" or "loss".
      since: the step at which it was first seen.
      until: the step at which it was gone; None where it holds to the end.
      what: shows it, with the value where it was seen last.
    """

    kind: str
    since: int
    until: int | None
    what: str


def collapse_signs(
    records: Iterable[tuple[int, Mapping[str, float]]],
    trivial_loss: float | None = None,
    patience: int = 0,
) -> list[CollapseSign]:
    """The indicators of collapse in what a run has logged, as `CollapseDetector` knows them.

    A sign counts that held at two records in a row. A loss that starts at that of constant outputs
    and leaves it, or still has the time to, is none.

    Args:
      records: pairs of a step and its metrics, in order.
      trivial_loss: see `CollapseDetector`.
      patience: see there, too.

    Returns:
      The indicators, by the step they began at: first those that hold to the end, then the rest.
    """
    watch = CollapseDetector(trivial_loss)
    held: dict[str, list[tuple[int, str]]] = {}
    found: list[CollapseSign] = []
    loss_was_healthy = False

    def end(kind: str, until: int | None) -> None:
        seen = held.pop(kind, [])
        if len(seen) < 2:
            return
        since, last = seen[0][0], seen[-1][0]
        began_so = kind == "loss" and not loss_was_healthy
        if not began_so or (until is None and last > since + patience):
            found.append(CollapseSign(kind, since, until, seen[-1][1]))

    for step, metrics in records:
        for kind, what in watch.indicators(metrics).items():
            if what is not None:
                held.setdefault(kind, []).append((step, what))
                continue
            end(kind, step)
            loss_was_healthy = loss_was_healthy or kind == "loss"
    for kind in list(held):
        end(kind, None)
    return sorted(found, key=lambda sign: (sign.until is not None, sign.since))
