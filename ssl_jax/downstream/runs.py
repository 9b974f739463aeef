"""Evaluations that train: linear classifiers by the official recipes, fine-tuning, distillation.

Each is a run like any other, of the same loop, with a config that is derived from the run that it
evaluates: it continues where it was broken off, plans, distributes and reports the same way.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from ssl_jax.config import (
    apply_overrides,
    default_config,
    did_you_mean,
    flat_views,
    from_json,
    to_json,
    view,
)
from ssl_jax.data.sources import make_sources
from ssl_jax.errors import UserError
from ssl_jax.evals.evaluator import LAST_FILE
from ssl_jax.interop.load import config_at, newest_step
from ssl_jax.run import processes
from ssl_jax.train import pretrain

# What a recipe doesn't name of the optimiser is the schema's default: momentum 0.9, cosine, linear.
_PLAIN_SGD = {"name": "sgd", "decay_norm_bias": True, "per_epoch": True}
_PLAIN_SGD |= {"warmup_epochs": 0.0, "weight_decay": 0.0}
# As the methods' official codes evaluate: the batch, the epochs and the optimiser of a linear
# classifier on ImageNet; `lr` is that of a batch of 256.
LINEAR_RECIPES: dict[str, dict[str, Any]] = {
    # google-research/simclr: weight decay 1e-6, and no warmup.
    "simclr": {
        "batch_size": 4096,
        "epochs": 90.0,
        "optim": {**_PLAIN_SGD, "nesterov": True, "lr": 0.1, "weight_decay": 1e-6}
        | {"per_epoch": False, "decay_norm_bias": False},
    },
    # The same code's CIFAR-10 command.
    "simclr_cifar": {
        "batch_size": 512,
        "epochs": 100.0,
        "optim": {**_PLAIN_SGD, "nesterov": True, "lr": 0.1, "per_epoch": False},
    },
    # facebookresearch/moco: the rate is for features of any size, weights start at N(0, .01).
    "moco": {
        "batch_size": 256,
        "epochs": 100.0,
        "supervised": {"classifier_init": 0.01},
        "optim": {**_PLAIN_SGD, "lr": 30.0, "schedule": "step"}
        | {"step_epochs": (60.0, 80.0), "step_gamma": 0.1},
    },
    # facebookresearch/swav
    "swav": {
        "batch_size": 256,
        "epochs": 100.0,
        "supervised": {"classifier_init": 0.01},
        "optim": {**_PLAIN_SGD, "lr": 0.3, "weight_decay": 1e-6},
    },
    # deepmind-research/byol
    "byol": {
        "batch_size": 1024,
        "epochs": 80.0,
        "optim": {**_PLAIN_SGD, "nesterov": True, "lr": 0.2, "per_epoch": False},
    },
    # facebookresearch/simsiam: LARC around SGD.
    "simsiam": {
        "batch_size": 4096,
        "epochs": 90.0,
        "supervised": {"classifier_init": 0.01},
        "optim": {**_PLAIN_SGD, "name": "larc", "lr": 0.1},
    },
}
# SimCLR v2 (arXiv:2006.10029, section 3 and appendix; the released code): on few labels, from the
# projector's first hidden layer, twice as long on 1 % as on 10 %; on all, from the encoder. Wider
# networks and those with selective kernels have a rate of their own.
_FINETUNE: dict[str, Any] = {
    "batch_size": 1024,
    "optim": {"lr": 0.005, "lr_scaling": "sqrt", "weight_decay": 0.0, "warmup_epochs": 0.0},
}
_RATE_OF_LARGER = 0.002
# ImageNet's published shares of the labels, which are data sets of TFDS (the first is its default).
_SHARES = {"imagenet2012_subset": 0.01, "imagenet2012_subset/1pct": 0.01}
_SHARES |= {"imagenet2012_subset/10pct": 0.1}
# SimCLR's appendix B.8, on other data sets; rate and decay are chosen there for each.
_TRANSFER: dict[str, Any] = {
    "batch_size": 256,
    "steps": 20_000,
    "optim": {**_PLAIN_SGD, "nesterov": True, "per_epoch": False},
    # Of many runs only the classifier counts.
    "eval": {"at_end": False, "knn_every_epochs": 0.0, "probe": False},
    "checkpoint": {"keep": 1},
}


def linear_config(
    path: str | Path, recipe: str = "simclr", overrides: Iterable[str] = ()
) -> ConfigDict:
    """A linear classifier on a run's frozen encoder, trained on crops and flips.

    Args:
      path: the run's workdir.
      recipe: a key of `LINEAR_RECIPES`.
      overrides: strings `a.b=VALUE`, as of the command line.

    Returns:
      The config, for `ssl_jax.train.pretrain`.

    Raises:
      UserError: no run there, no such recipe, or a bad override.
    """
    if recipe not in LINEAR_RECIPES:
        raise UserError(f"--recipe={recipe}.{did_you_mean(recipe, LINEAR_RECIPES)}")
    config = _derived(path, LINEAR_RECIPES[recipe])
    config.supervised.freeze = True
    config.supervised.projector_layer = config_at(path).eval.projector_layer
    return apply_overrides(config, overrides)


def finetune_config(
    path: str | Path,
    labels: float = 1.0,
    projector_layer: int | None = None,
    overrides: Iterable[str] = (),
) -> ConfigDict:
    """All of a run's encoder and a classifier, trained on a share of the labels.

    Args:
      path: the run's workdir.
      labels: share of the training images, drawn with as many of each class.
      projector_layer: hidden layers of the projector that are kept; default, as in SimCLR v2, 1 on
        a part of the labels for a SimCLR run whose projector has three layers, else 0.
      overrides: strings `a.b=VALUE`, as of the command line.

    Returns:
      The config, for `ssl_jax.train.pretrain`.

    Raises:
      UserError: no run there, or a bad override.
    """
    overrides = tuple(overrides)
    config = _derived(path, _FINETUNE)
    source = config_at(path)
    config.data.subset = float(labels)
    data = apply_overrides(config, overrides).data
    share = data.subset * _SHARES.get(data.dataset.partition(":")[0], 1.0)
    if projector_layer is None:
        deep = source.method == "simclr" and source.simclr.layers > 2
        projector_layer = int(deep and share < 1)
    config.supervised.projector_layer = projector_layer
    config.epochs = 60.0 if share <= 0.01 else 30.0
    if source.model.width > 1 or source.model.sk:
        config.optim.lr = _RATE_OF_LARGER
    return apply_overrides(config, overrides)


def transfer_config(
    path: str | Path, overrides: Iterable[str] = (), step: int | None = None
) -> ConfigDict:
    """All of a run's encoder and a classifier, trained on another data set.

    Args:
      path: the run's workdir.
      overrides: strings `a.b=VALUE`; `data.…` names the data, `optim.…` rate and decay.
      step: of the run's checkpoint, default the newest.

    Returns:
      The config, for `train_classifier`.

    Raises:
      UserError: no run there, or a bad override.
    """
    overrides = list(overrides)
    config = _derived(path, _TRANSFER, step)
    config.data.update(default_config().data.to_dict())
    if _given(overrides, "epochs"):
        config.steps = 0
    return apply_overrides(config, overrides)


def distill_config(teacher: str | Path, overrides: Iterable[str] = ()) -> ConfigDict:
    """A student of a fine-tuned run, trained on all images, without their labels.

    The student has the teacher's architecture unless `overrides` say otherwise, such as
    `model.depth=18`; the optimiser is LARS as in SimCLR v2's distillation, whose temperature is 0.1
    for a student of the teacher's architecture and 1 for another.

    Args:
      teacher: the workdir of a run with a classifier.
      overrides: strings `a.b=VALUE`, as of the command line.

    Returns:
      The config, for `ssl_jax.train.pretrain`; its warmup is a twentieth of its epochs.

    Raises:
      UserError: no run there, or a bad override.
    """
    overrides = list(overrides)
    config = _derived(teacher, {"epochs": 400.0})
    config.method = "distill"
    config.distill.teacher = config.init_from.path
    config.distill.step, config.init_from.step = config.init_from.step, 0
    config.init_from.path = ""
    config.data.subset = 1.0
    config.optim.update(lr=0.1, lr_scaling="sqrt", weight_decay=1e-4)
    theirs = config.model
    config = apply_overrides(config, overrides)
    if not _given(overrides, "distill.temperature"):
        alike = all(config.model[key] == theirs[key] for key in ("depth", "width", "sk"))
        config.distill.temperature = 0.1 if alike else 1.0
    if not _given(overrides, "optim.warmup_epochs"):
        config.optim.warmup_epochs = config.epochs / 20
    return config


def _given(overrides: Iterable[str], key: str) -> bool:
    return any(override.partition("=")[0] == key for override in overrides)


def _derived(path: str | Path, recipe: Mapping[str, Any], step: int | None = None) -> ConfigDict:
    """A config of supervised training that starts from a run, on its data, with crops and flips.

    Of the run's views the size, the normalisation, the flips and any rotations and shifts stay.
    """
    source = config_at(path)
    config = from_json(to_json(source))
    plain = {"microbatch": 0, "steps": 0, "remat": False, "count_steps": "epochs", "wandb": ""}
    config.update({**plain, "method": "supervised"})
    # Of the run's own optimiser and classifier nothing stays; nor do its groups of BatchNorm.
    defaults = default_config()
    for group in ("optim", "supervised", "distill"):
        config[group].update(defaults[group].to_dict())
    config.model.bn_group_size = 0
    # The newest now: a run that goes on will have newer ones.
    step = newest_step(path) if step is None else step
    config.init_from.update(path=str(Path(path).expanduser().resolve()), step=step, heads=False)
    config.eval.projector_layer = 0
    first = flat_views(source)[0]
    kept = {"size": first.size, "flip": first.flip, "mean": first.mean, "std": first.std}
    area = tuple(first.crop.area) if first.size < 64 else (0.08, 1.0)
    crop = {**first.crop.to_dict(), "area": area}
    off = {"jitter": {"prob": 0.0}, "gray": 0.0, "blur": {"prob": 0.0}, "solarize": {"prob": 0.0}}
    with config.unlocked():
        config.views = {"view": view(**kept, **off, crop=crop, affine=first.affine.to_dict())}
    for key, value in recipe.items():
        if isinstance(value, Mapping):
            config[key].update(value)
        else:
            config[key] = value
    return config


def train_classifier(
    config: ConfigDict, workdir: str | Path, command: str = "", verbosity: str = "all"
) -> tuple[Any, dict[str, Any] | None]:
    """Trains what a config of this module describes, or goes on.

    Args:
      config: of `linear_config`, `finetune_config` or `distill_config`.
      workdir: of the run.
      command: recorded there.
      verbosity: how much is printed, as `pretrain` takes it.

    Returns:
      The state, and `classification_metrics` of the held-out images, in the first process; None in
      others, and where SIGTERM has stopped the run.

    Raises:
      UserError: bad input; or nothing could be measured, which shows before anything is trained.
    """
    train, test = make_sources(config)
    if test is None or test.labels is None:
        raise UserError(
            "The data has no held-out split with labels to measure a classifier on: name one, such "
            "as --config.data.test_dir=DIR."
        )
    if train.labels is None and (config.method != "distill" or config.distill.labels > 0):
        raise UserError(
            "The training images have no labels to learn: use a folder with one subfolder per "
            "class, or distil with config.distill.labels=0."
        )
    state = pretrain(config, workdir, command, verbosity=verbosity)
    file = Path(workdir) / "evals" / "classifier.json"
    # A run that was stopped while it was evaluated lacks the last of its files.
    done = (Path(workdir) / LAST_FILE).exists() and file.exists()
    if not processes.is_primary() or not done:
        return state, None
    return state, json.loads(file.read_text())["metrics"]


def _trained(config: ConfigDict, workdir: str | Path) -> dict[str, Any]:
    return train_classifier(config, workdir)[1] or {}


def finetune(
    path: str | Path,
    workdir: str | Path,
    *,
    labels: float = 1.0,
    projector_layer: int | None = None,
    overrides: Iterable[str] = (),
) -> dict[str, Any]:
    """Fine-tunes a run's encoder, or goes on doing so; see `finetune_config`.

    Returns:
      `classification_metrics` of the held-out images; {} as in `train_classifier`.

    Raises:
      UserError: bad input, in one sentence.
    """
    return _trained(finetune_config(path, labels, projector_layer, overrides), workdir)


def distill(
    teacher: str | Path, workdir: str | Path, *, overrides: Iterable[str] = ()
) -> dict[str, Any]:
    """Trains a student of a run with a classifier, or goes on; see `distill_config`.

    Returns:
      `classification_metrics` of the held-out images; {} as in `train_classifier`.

    Raises:
      UserError: bad input, in one sentence.
    """
    return _trained(distill_config(teacher, overrides), workdir)
