"""Runs that train a classifier on top of another run's encoder.

Linear evaluation by recipe, fine-tuning, transfer and distillation are runs like any other, with a
config derived from that of the evaluated run: they use the same loop, resume, plan, distribute and
report the same way.
"""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from ssl_jax.config import (
    apply_overrides,
    default_config,
    flat_views,
    from_json,
    to_json,
    view,
    view_size,
)
from ssl_jax.data.registry import Images
from ssl_jax.data.sources import Source, make_sources, require_labels, require_measurable
from ssl_jax.errors import UserError
from ssl_jax.evals.results import measured_with, read_result
from ssl_jax.files import local_path
from ssl_jax.interop.load import config_at, network_at, newest_step
from ssl_jax.report import images_settings
from ssl_jax.run import processes
from ssl_jax.run.folder import read_config
from ssl_jax.run.log import read_metrics
from ssl_jax.train import pretrain

# Other keys of the optimizer keep the schema's defaults: momentum 0.9, cosine, linear scaling.
PLAIN_SGD = {"name": "sgd", "decay_norm_bias": True, "per_epoch": True}
PLAIN_SGD |= {"warmup_epochs": 0.0, "weight_decay": 0.0}


def derived_config(
    path: str | Path, recipe: Mapping[str, Any], step: int | None = None
) -> ConfigDict:
    """The config of supervised training that starts from a run's encoder, on the run's data.

    Images are cropped and flipped. Size, normalization, flips, rotations and shifts are those of
    the run's first view.

    Args:
      path: the run's workdir.
      recipe: values by key of the config, one level of groups deep.
      step: of the run's checkpoint; default the newest.

    Returns:
      The config, not validated yet.

    Raises:
      UserError: there is no run with a checkpoint at `path`.
    """
    source = config_at(path)
    config = from_json(to_json(source))
    plain = {"microbatch": 0, "steps": 0, "remat": False, "count_steps": "epochs", "wandb": ""}
    config.update({**plain, "method": "supervised"})
    # The run's own optimizer, classifier and BatchNorm groups don't apply here.
    defaults = default_config()
    for group in ("optim", "supervised", "distill"):
        config[group].update(defaults[group].to_dict())
    config.model.update(bn_group_size=0, bn_splits=1)
    # The data's, which may not be those that the run trained on.
    config.data.num_classes = config.data.bits = 0
    # Fixed now, because a run in progress will have newer checkpoints.
    step = newest_step(path) if step is None else step
    config.init_from.update(path=str(local_path(path).resolve()), step=step)
    config.init_from.update(heads=False, state="weights", network="default")
    config.eval.update(projector_layer=0, network="default")
    config.eval.labels_per_class = ()  # the encoder will have seen more labels
    first = flat_views(source)[0]
    kept = {"size": first.size, "flip": first.flip, "mean": first.mean, "std": first.std}
    area = tuple(first.crop.area) if max(view_size(first)) < 64 else (0.08, 1.0)
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


def overridden(config: ConfigDict, overrides: Iterable[str]) -> ConfigDict:
    """`apply_overrides` to a `derived_config`.

    A classifier has one network, so `eval.network` is that of the run which its encoder is from.

    Raises:
      UserError: a bad override, the run has no such network, or two are named.
    """
    config = apply_overrides(config, overrides)
    if config.eval.network != "default":
        network_at(config.init_from.path, config.eval.network, "config.eval.network")
        if config.init_from.network not in ("default", config.eval.network):
            raise UserError(
                f"config.init_from.network is '{config.init_from.network}', but config.eval.network"
                f" is '{config.eval.network}': set only one of them."
            )
        config.init_from.network, config.eval.network = config.eval.network, "default"
    return config


def is_overridden(overrides: Iterable[str], key: str) -> bool:
    """Whether one of the strings `a.b=VALUE` sets the key."""
    return any(override.partition("=")[0] == key for override in overrides)


def train_classifier(
    config: ConfigDict,
    workdir: str | Path,
    command: str = "",
    verbosity: str = "all",
    *,
    train: Source | Images | None = None,
    test: Source | Images | None = None,
) -> tuple[Any, dict[str, Any] | None]:
    """Trains, or resumes, a run with a classifier and evaluates it.

    Args:
      config: from `linear_config`, `finetune_config`, `transfer_config` or `distill_config`.
      workdir: of the run.
      command: recorded there.
      verbosity: how much is printed, as for `pretrain`.
      train: training images given in Python, as to `pretrain`; None: the config names them.
      test: the held-out images to `train`, if any.

    Returns:
      The state, and the metrics of the held-out images on the primary process,
      `classification_metrics` or, of several labels per image, `multi_label_metrics`; None on other
      processes, and if SIGTERM stopped the run.

    Raises:
      UserError: bad input, or no labels to train or evaluate on; raised before training.
    """
    splits = make_sources(config, train, test)
    if config.method == "distill":
        require_labels(*splits, learned=config.distill.labels > 0)
    else:
        require_measurable(*splits)
    run = pretrain(config, workdir, command, train=train, test=test, verbosity=verbosity)
    state, held_out = run.state, splits[1]
    # A run that was stopped during its evaluation lacks the last file, or has an earlier one's.
    settings = images_settings(local_path(workdir)) if processes.is_primary() else None
    done = measured_with(settings, config, held_out.fingerprint if held_out is not None else "")
    result = read_result(local_path(workdir), "classifier") if done else None
    return state, result and result["metrics"]


def loss_warning(workdir: str | Path) -> str:
    """A warning if a run's classifier has learned nothing; "" otherwise.

    Args:
      workdir: of a run of method "supervised".
    """
    workdir = local_path(workdir)
    config = read_config(workdir)
    losses = [r["loss"] for r in read_metrics(workdir / "metrics.jsonl") if "loss" in r]
    several, classes = config.supervised.sigmoid, config.data.num_classes
    equal = math.log(2 if several else classes)
    if not losses or losses[-1] <= equal:  # neither if it is NaN
        return ""
    what = (
        "a probability of 0.5 per class"
        if several
        else f"equal probabilities for {classes} classes"
    )
    return (
        f"warning: the last training loss is {losses[-1]:.4g}, and that of {what} {equal:.4g}, so "
        "the classifier has learned nothing. Lower "
        f"--config.optim.lr (now {config.optim.lr:g}), or train longer, in a new --workdir."
    )
