"""Signs of collapse, which the loss by itself does not show."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ssl_jax.losses import normalize

# In units of 1/sqrt(d). Healthy encoders measure 0.2 to 1 after ReLU and pooling.
COLLAPSED_STD = 0.02
# Relative distance below which a loss counts as equal to that of constant outputs.
NEAR_TRIVIAL = 0.005
# Prototypes in use, or effective rank of the features, below which one direction is left.
COLLAPSED_COUNT = 1.5


def embedding_std(
    embedding: Float[Array, "n d"], mean_over_devices: Callable[[Array], Array] = lambda x: x
) -> Float[Array, ""]:
    """Computes the spread of unit-length embeddings over the global batch (SimSiam, section 4.1).

    Args:
      embedding: this device's, [n, d].
      mean_over_devices: averages a local mean over devices.

    Returns:
      The standard deviation of each coordinate over the batch, averaged over coordinates and
      divided by 1/sqrt(d): 1 for evenly spread directions, 0 if all embeddings are equal.
    """
    unit = normalize(embedding)
    mean = mean_over_devices(jnp.mean(unit, axis=0))
    # Around the global mean: E[x^2] - E[x]^2 would cancel when nearly collapsed.
    variance = mean_over_devices(jnp.mean(jnp.square(unit - mean[None, :]), axis=0))
    return jnp.mean(jnp.sqrt(variance)) * np.sqrt(unit.shape[1])


def prototypes_used(
    nearest: Int[Array, " n"],
    count: int,
    mean_over_devices: Callable[[Array], Array] = lambda x: x,
) -> Float[Array, ""]:
    """Effective number of prototypes that are some image's nearest: exp of their shares' entropy.

    Assignments don't show collapse: Sinkhorn-Knopp spreads even collapsed embeddings evenly over
    prototypes.

    Args:
      nearest: index of the nearest prototype of this device's images, [n].
      count: K, the number of prototypes.
      mean_over_devices: averages a local mean over devices.

    Returns:
      A number between 1 (one prototype is nearest to all images) and K.
    """
    share = mean_over_devices(jnp.zeros(count).at[nearest].add(1 / nearest.shape[0]))
    return jnp.exp(-jnp.sum(share * jnp.log(jnp.maximum(share, 1e-12))))


def rankme(features: Float[np.ndarray, "n d"]) -> float:
    """Computes the effective rank of features (Garrido et al., 2023, arXiv:2210.02885, eq. 1).

    Args:
      features: [n, d].

    Returns:
      exp of the entropy of the normalized singular values, between 1 and min(n, d); NaN if any
      feature is not finite.
    """
    if not np.isfinite(features).all():
        return math.nan
    values = np.linalg.svd(np.asarray(features, np.float64), compute_uv=False)
    p = values / max(values.sum(), 1e-300) + 1e-7
    return float(np.exp(-np.sum(p * np.log(p))))


def uniformity(features: Float[np.ndarray, "n d"]) -> float:
    """Log of the mean Gaussian potential over pairs of features (Wang & Isola, 2020, eq. 2).

    Args:
      features: [n, d], n at least 2.

    Returns:
      At most 0, for features that are all equal; lower is more uniform.
    """
    x = unit_rows(features)
    squared = np.maximum(2 - 2 * x @ x.T, 0)[np.triu_indices(len(x), 1)]
    return float(np.log(np.exp(-2 * squared).mean()))


def alignment(first: Float[np.ndarray, "n d"], second: Float[np.ndarray, "n d"]) -> float:
    """Mean squared distance between unit features of two views (Wang & Isola, 2020, eq. 1).

    Args:
      first: of one view of each image, [n, d].
      second: of another view of the same images.

    Returns:
      A number between 0 (views of an image have equal features) and 4.
    """
    return float(np.square(unit_rows(first) - unit_rows(second)).sum(axis=1).mean())


def unit_rows(x: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    """Scales features to unit length, float64; zeros stay zero."""
    x = np.asarray(x, np.float64)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


@dataclasses.dataclass
class CollapseDetector:
    """Follows a run's logged metrics and warns once of each kind of collapse.

    Attributes:
      trivial_loss: the loss of constant outputs, if known: ln K for SwAV, d for Barlow Twins.
      patience: steps for which the loss, which starts there, may stay there.
    """

    trivial_loss: float | None = None
    patience: int = 0
    _widest: float = 0.0
    _since: dict[str, int] = dataclasses.field(default_factory=dict)
    _warned: set[str] = dataclasses.field(default_factory=set)

    def check(self, step: int, metrics: Mapping[str, float]) -> list[str]:
        """Checks the metrics of a step.

        A sign must hold at two logged steps in a row, as a single batch may mislead.

        Args:
          step: of the metrics.
          metrics: any of "loss", "embedding_std", "prototypes_used" and "rankme"; others are
            ignored.

        Returns:
          New warnings that name what collapsed and since which step; usually none.
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
        """Maps each kind of collapse to its evidence, or to None if the metric is healthy."""
        indicators: dict[str, str | None] = {}

        def judge(key: str, healthy: Callable[[float], bool], what: str) -> None:
            if key in metrics:
                value = metrics[key]
                indicators[key] = None if healthy(value) else what.format(value)

        judge(
            "embedding_std",
            lambda std: std >= COLLAPSED_STD,
            "the embeddings of different images are nearly identical (embedding_std {:.4f})",
        )
        std = metrics.get("embedding_std", math.nan)
        if std >= COLLAPSED_STD:
            self._widest = max(self._widest, std)
            # Some directions collapse first: BatchNorm at a projector's end keeps some spread.
            halved = std < self._widest / 2
            spread = f"(embedding_std {std:.2f}, {self._widest:.2f} before)"
            halving = f"the spread of embeddings has halved {spread}"
            indicators["halved"] = halving if halved else None
        judge(
            "rankme",
            lambda rank: rank >= COLLAPSED_COUNT,
            "the features have a single direction left (RankMe {:.2f})",
        )
        judge(
            "prototypes_used",
            lambda used: used >= COLLAPSED_COUNT,
            "one prototype is nearest to almost all images ({:.2f} prototypes in use)",
        )
        trivial = self.trivial_loss
        if trivial is not None:
            judge(
                "loss",
                lambda loss: not abs(loss - trivial) < NEAR_TRIVIAL * abs(trivial),
                f"the loss stays at that of constant outputs ({{:.4f}}, constant: {trivial:.4f})",
            )
        return indicators


@dataclasses.dataclass(frozen=True)
class CollapseSign:
    """A sign of collapse in a run's records.

    Attributes:
      kind: "embedding_std", "halved", "rankme", "prototypes_used" or "loss".
      since: the first step that shows it.
      until: the first step that no longer shows it; None if it lasts to the end.
      what: the evidence, with its last value.
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
    """Finds signs of collapse in a run's logged metrics, by the criteria of `CollapseDetector`.

    A sign must hold at two records in a row. A loss that starts at its value for constant outputs
    counts only if it is still there after `patience` steps.

    Args:
      records: pairs of a step and its metrics, in order.
      trivial_loss: see `CollapseDetector`.
      patience: see `CollapseDetector`.

    Returns:
      Signs that last to the end, then the others, each ordered by `since`.
    """
    detector = CollapseDetector(trivial_loss)
    held: dict[str, list[tuple[int, str]]] = {}
    found: list[CollapseSign] = []
    loss_was_healthy = False

    def end(kind: str, until: int | None) -> None:
        seen = held.pop(kind, [])
        if len(seen) < 2:
            return
        since, last = seen[0][0], seen[-1][0]
        from_start = kind == "loss" and not loss_was_healthy
        if not from_start or (until is None and last > since + patience):
            found.append(CollapseSign(kind, since, until, seen[-1][1]))

    for step, metrics in records:
        for kind, what in detector.indicators(metrics).items():
            if what is not None:
                held.setdefault(kind, []).append((step, what))
                continue
            end(kind, step)
            loss_was_healthy = loss_was_healthy or kind == "loss"
    for kind in list(held):
        end(kind, None)
    return sorted(found, key=lambda sign: (sign.until is not None, sign.since))
