"""Features of a run's frozen encoder, and kNN and linear accuracy on them."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from ml_collections import ConfigDict

from ssl_jax.config import apply_overrides
from ssl_jax.data.sources import make_sources
from ssl_jax.errors import UserError
from ssl_jax.evals.evaluator import Evaluator
from ssl_jax.evals.knn import knn_votes
from ssl_jax.evals.linear import PENALTIES, fit_linear
from ssl_jax.evals.metrics import classification_metrics
from ssl_jax.files import asked_for
from ssl_jax.interop.load import config_at, load
from ssl_jax.spmd import make_spmd

NO_TEST_LABELS = (
    "The data has no held-out split with labels to evaluate on. Name one, such as "
    "--config.data.test_dir=DIR."
)
# Prefixes of the config keys that change a frozen encoder's features, and the keys of its first
# view that do.
_IMAGES = ("batch_size", "crop_fraction", "interpolation", "projector_layer")
SEEN = ("data.", "dtype", *(f"eval.{key}" for key in _IMAGES))
_SEEN_OF_VIEW = ("size", "mean", "std", "crop.sampler")


@dataclasses.dataclass(frozen=True)
class Features:
    """Features of the two splits of a data set.

    Attributes:
      train, test: float32 [n, d] and [m, d]; `test` is None without a held-out split.
      train_labels, test_labels: int32 [n] and [m]; None without labels.
      class_names: by label.
      step: of the checkpoint.
    """

    train: Float[np.ndarray, "n d"]
    train_labels: Int[np.ndarray, " n"] | None
    test: Float[np.ndarray, "m d"] | None
    test_labels: Int[np.ndarray, " m"] | None
    class_names: tuple[str, ...]
    step: int

    def labeled(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, int]:
        """Features and labels of both splits, and the number of classes.

        Raises:
          UserError: a held-out split or labels are missing.
        """
        train, test = self.train_labels, self.test_labels
        if self.test is None or train is None or test is None:
            raise UserError(NO_TEST_LABELS)
        classes = max(len(self.class_names), int(train.max()) + 1, int(test.max()) + 1)
        return self.train, train, self.test, test, classes

    def save(self, file: Path) -> None:
        """Writes an `.npz` of the attributes that are not None, by their names.

        Raises:
          UserError: the file can't be written.
        """
        arrays: dict[str, Any] = {
            name: value
            for name, value in dataclasses.asdict(self).items()
            if value is not None and name != "class_names"
        }
        with asked_for(file) as temporary, temporary.open("wb") as handle:
            np.savez(handle, class_names=np.array(self.class_names, str), **arrays)


def run_features(
    path: str | Path,
    *,
    step: int | None = None,
    projector_layer: int | None = None,
    overrides: Iterable[str] = (),
) -> Features:
    """Extracts the features of a data set with a run's encoder.

    Args:
      path: the run's workdir.
      step: of the checkpoint; default the newest.
      projector_layer: see `ssl_jax.load`.
      overrides: strings `a.b=VALUE` that change the run's config: `data.…` names other data,
        `data.subset` a share of it, and `eval.…` sets how images are prepared.

    Returns:
      The features, in the order of the sources.

    Raises:
      UserError: the run or the data is missing, or an override is bad or doesn't change features.
    """
    overrides = tuple(overrides)
    config = apply_overrides(config_at(path), overrides)
    _require_seen(config, overrides)
    if projector_layer is not None:
        config.eval.projector_layer = projector_layer
    encoder = load(path, step, projector_layer=config.eval.projector_layer)
    train, test = make_sources(config)
    spmd = make_spmd()
    evaluator = Evaluator(config, spmd, train, test)
    variables = spmd.replicate(encoder.variables)
    return Features(
        evaluator.features(variables, train),
        train.labels,
        None if test is None else evaluator.features(variables, test),
        None if test is None else test.labels,
        train.class_names,
        encoder.step,
    )


def _require_seen(config: ConfigDict, overrides: Iterable[str]) -> None:
    """Refuses keys that have no effect or would change the trained network."""
    first = sorted(config.views)[0]
    seen = (*SEEN, *(f"views.{first}.{key}" for key in _SEEN_OF_VIEW))
    for override in overrides:
        key = override.partition("=")[0]
        if not key.startswith(seen):
            raise UserError(
                f"config.{key} doesn't apply to a frozen encoder's features. Leave it out, or set "
                f"one of {', '.join(seen).replace('data.', 'data.…')}."
            )


def knn_metrics(
    features: Features, *, k: int = 200, temperature: float | None = 0.1
) -> dict[str, Any]:
    """`classification_metrics` of a vote of nearest neighbors; see `knn_classify`.

    Raises:
      UserError: a held-out split or labels are missing.
    """
    train, labels, test, test_labels, classes = features.labeled()
    votes = knn_votes(train, labels, test, num_classes=classes, k=k, temperature=temperature)
    # The softmax of their logarithms is the vote.
    return classification_metrics(np.log(np.maximum(votes, 1e-12)), test_labels)


def linear_metrics(
    features: Features,
    *,
    penalties: Iterable[float] = PENALTIES,
    seed: int = 0,
    metric: str = "top1",
) -> tuple[dict[str, Any], float]:
    """`classification_metrics` of a linear classifier and its penalty; see `fit_linear`.

    Raises:
      UserError: a held-out split or labels are missing.
    """
    train, labels, test, test_labels, classes = features.labeled()
    model = fit_linear(
        train, labels, num_classes=classes, penalties=tuple(penalties), seed=seed, metric=metric
    )
    return classification_metrics(model.scores(test), test_labels), model.penalty
