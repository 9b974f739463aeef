"""Signs of collapse: what the loss alone does not show."""

import dataclasses
from collections.abc import Callable, Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ssl_jax.losses import normalize

# Relative to 1/sqrt(d). Healthy encoders after ReLU and pooling measure .2 to 1.
COLLAPSED_STD = 0.02
# A loss this near to its value for constant outputs has learned nothing.
NEAR_TRIVIAL = 0.005


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
    variance = mean_over_devices(jnp.mean(jnp.square(unit - mean), axis=0))
    return jnp.mean(jnp.sqrt(variance)) * np.sqrt(unit.shape[1])


def rankme(features: Float[np.ndarray, "n d"]) -> float:
    """The effective rank of features (Garrido et al., 2023, arXiv:2210.02885, eq. 1).

    Args:
      features: [n, d].

    Returns:
      exp of the entropy of the normalised singular values, between 1 and min(n, d).
    """
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
    x = _unit(features)
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
    return float(np.square(_unit(first) - _unit(second)).sum(axis=1).mean())


def _unit(x: np.ndarray) -> np.ndarray:
    x = np.asarray(x, np.float64)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


@dataclasses.dataclass
class CollapseWatch:
    """Follows the logged metrics of a run and warns once of each kind of collapse.

    Attributes:
      trivial_loss: the loss of constant outputs, where it is known: ln K of SwAV.
    """

    trivial_loss: float | None = None
    _since: dict[str, int] = dataclasses.field(default_factory=dict)
    _warned: set[str] = dataclasses.field(default_factory=set)

    def check(self, step: int, metrics: Mapping[str, float]) -> list[str]:
        """Warnings that are new at this step.

        A sign must hold at two logged steps in a row: a single batch may mislead.

        Args:
          step: of the metrics.
          metrics: with "embedding_std" and "loss".

        Returns:
          Sentences that say what collapsed and since which step; usually none.
        """
        signs = {}
        std = metrics.get("embedding_std")
        if std is not None and not std >= COLLAPSED_STD:
            signs["embeddings"] = (
                f"the embeddings of different images are nearly the same (their standard deviation "
                f"is {std:.4f} of 1/√d)"
            )
        loss, trivial = metrics["loss"], self.trivial_loss
        if trivial is not None and abs(loss - trivial) < NEAR_TRIVIAL * trivial:
            signs["assignments"] = (
                f"the loss stays at that of constant outputs ({loss:.4f}, ln K = {trivial:.4f})"
            )
        warnings = []
        for sign, what in signs.items():
            since = self._since.setdefault(sign, step)
            if step > since and sign not in self._warned:
                self._warned.add(sign)
                warnings.append(f"warning: collapse since step {since}: {what}.")
        self._since = {sign: self._since[sign] for sign in signs}
        return warnings
