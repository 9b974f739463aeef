"""Fine-tuning: the whole encoder and a classifier, trained on all or a few labels."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from ssl_jax.config import apply_overrides
from ssl_jax.downstream.classifier import derived_config, overridden, train_classifier
from ssl_jax.interop.load import config_at

# SimCLR v2 (arXiv:2006.10029, section 3 and appendix; the released code): on few labels, from the
# projector's first hidden layer, twice as long on 1 % as on 10 %; on all labels, from the encoder.
# Wider networks and those with selective kernels have a learning rate of their own.
_RECIPE: dict[str, Any] = {
    "batch_size": 1024,
    "count_steps": "images_plus_1",
    "optim": {"lr": 0.005, "lr_scaling": "sqrt", "weight_decay": 0.0, "warmup_epochs": 0.0},
}
_RATE_OF_LARGER = 0.002
# ImageNet's published subsets of labels, which are TFDS datasets (1 % is TFDS's default).
_SHARES = {"imagenet2012_subset": 0.01, "imagenet2012_subset/1pct": 0.01}
_SHARES |= {"imagenet2012_subset/10pct": 0.1}


def finetune_config(
    path: str | Path,
    labels: float = 1.0,
    projector_layer: int | None = None,
    overrides: Iterable[str] = (),
) -> ConfigDict:
    """The config of fine-tuning a run's whole encoder with a classifier on a share of the labels.

    Args:
      path: the run's workdir.
      labels: share of the training images that is labeled, the same number of each class; of
        images with several labels each, sampled without regard to classes.
      projector_layer: number of hidden projector layers that are kept; default, as in SimCLR v2, 1
        on part of the labels for a SimCLR run whose projector has three layers, else 0.
      overrides: strings `a.b=VALUE`, as on the command line.

    Returns:
      The config, for `train_classifier`.

    Raises:
      UserError: no run at `path`, or a bad override.
    """
    overrides = tuple(overrides)
    config = derived_config(path, _RECIPE)
    source = config_at(path)
    config.data.subset = float(labels)
    data = apply_overrides(config, overrides).data
    share = data.subset * _SHARES.get(data.dataset.partition(":")[0], 1.0)
    if projector_layer is None:
        deep = source.method == "simclr" and source.simclr.layers > 2
        projector_layer = int(deep and share < 1)
    config.supervised.projector_layer = projector_layer
    config.epochs = 60.0 if share <= 0.01 else 30.0
    if source.model.name == "resnet" and (source.model.width > 1 or source.model.sk):
        config.optim.lr = _RATE_OF_LARGER
    return overridden(config, overrides)


def finetune(
    path: str | Path,
    workdir: str | Path,
    *,
    labels: float = 1.0,
    projector_layer: int | None = None,
    overrides: Iterable[str] = (),
) -> dict[str, Any]:
    """Fine-tunes a run's encoder, or resumes; `finetune_config` describes the other arguments.

    Args:
      path: the run's workdir.
      workdir: of the fine-tuning.
      labels: share of the labels.
      projector_layer: number of projector layers that are kept.
      overrides: strings `a.b=VALUE`.

    Returns:
      Metrics of the held-out images, see `train_classifier`; {} where that has None.

    Raises:
      UserError: bad input.
    """
    config = finetune_config(path, labels, projector_layer, overrides)
    return train_classifier(config, workdir)[1] or {}
