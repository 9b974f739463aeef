"""Linear evaluation by the official recipes: a classifier trained on a frozen encoder."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from ssl_jax.downstream.classifier import PLAIN_SGD, derived_config, overridden
from ssl_jax.errors import UserError, did_you_mean
from ssl_jax.interop.load import config_at

_MOCO_V3 = {
    "batch_size": 1024,
    "epochs": 90.0,
    "supervised": {"classifier_init": "normal_0.01"},
}
# Batch, length and optimizer of the methods' official codes for a linear classifier on ImageNet;
# `lr` is for a batch of 256. Deviations: the codes in PyTorch also train on the last, smaller batch
# of an epoch; crops and flips are those of the run.
LINEAR_RECIPES: dict[str, dict[str, Any]] = {
    # google-research/simclr: weight decay 1e-6, of the bias as well, no warmup.
    "simclr": {
        "batch_size": 4096,
        "epochs": 90.0,
        "count_steps": "images_plus_1",
        "optim": {**PLAIN_SGD, "nesterov": True, "lr": 0.1, "weight_decay": 1e-6}
        | {"per_epoch": False},
    },
    # The same code's CIFAR-10 command.
    "simclr_cifar": {
        "batch_size": 512,
        "epochs": 100.0,
        "count_steps": "images_plus_1",
        "optim": {**PLAIN_SGD, "nesterov": True, "lr": 0.1, "per_epoch": False},
    },
    # facebookresearch/moco: the rate is for unnormalized features.
    "moco": {
        "batch_size": 256,
        "epochs": 100.0,
        "supervised": {"classifier_init": "normal_0.01"},
        "optim": {**PLAIN_SGD, "lr": 30.0, "schedule": "step"}
        | {"step_epochs": (60.0, 80.0), "step_gamma": 0.1},
    },
    # facebookresearch/swav
    "swav": {
        "batch_size": 256,
        "epochs": 100.0,
        "supervised": {"classifier_init": "normal_0.01"},
        "optim": {**PLAIN_SGD, "lr": 0.3, "weight_decay": 1e-6},
    },
    # deepmind-research/byol
    "byol": {
        "batch_size": 1024,
        "epochs": 80.0,
        "count_steps": "images",
        "supervised": {"classifier_init": "haiku"},
        "optim": {**PLAIN_SGD, "nesterov": True, "lr": 0.2, "per_epoch": False},
    },
    # facebookresearch/barlowtwins
    "barlow": {
        "batch_size": 256,
        "epochs": 100.0,
        "supervised": {"classifier_init": "normal_0.01"},
        "optim": {**PLAIN_SGD, "lr": 0.3, "weight_decay": 1e-6},
    },
    # facebookresearch/vicreg, the command of its README
    "vicreg": {
        "batch_size": 256,
        "epochs": 100.0,
        "supervised": {"classifier_init": "normal_0.01"},
        "optim": {**PLAIN_SGD, "lr": 0.02, "weight_decay": 1e-6},
    },
    # facebookresearch/simsiam: LARC around SGD.
    "simsiam": {
        "batch_size": 4096,
        "epochs": 90.0,
        "supervised": {"classifier_init": "normal_0.01"},
        "optim": {**PLAIN_SGD, "name": "larc", "lr": 0.1},
    },
    # facebookresearch/moco-v3, for ResNet-50 and for ViTs.
    "mocov3": {**_MOCO_V3, "optim": {**PLAIN_SGD, "lr": 0.1}},
    "mocov3_vit": {**_MOCO_V3, "optim": {**PLAIN_SGD, "lr": 3.0}},
}


def linear_config(
    path: str | Path, recipe: str = "simclr", overrides: Iterable[str] = ()
) -> ConfigDict:
    """The config of a linear classifier on a run's frozen encoder, trained on crops and flips.

    Args:
      path: the run's workdir.
      recipe: a key of `LINEAR_RECIPES`.
      overrides: strings `a.b=VALUE`, as on the command line.

    Returns:
      The config, for `train_classifier`.

    Raises:
      UserError: no run at `path`, an unknown recipe, or a bad override.
    """
    if recipe not in LINEAR_RECIPES:
        raise UserError(f"--recipe={recipe}.{did_you_mean(recipe, LINEAR_RECIPES)}")
    config = derived_config(path, LINEAR_RECIPES[recipe])
    config.supervised.freeze = True
    config.supervised.projector_layer = config_at(path).eval.projector_layer
    return overridden(config, overrides)
