"""Distillation: a student learns the predictions of a run with a classifier (SimCLR v2)."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from ssl_jax.config import apply_overrides
from ssl_jax.downstream.classifier import derived_config, is_overridden, train_classifier
from ssl_jax.interop.load import config_at


def distill_config(teacher: str | Path, overrides: Iterable[str] = ()) -> ConfigDict:
    """The config of a student of a fine-tuned run, trained on all images without their labels.

    The student has the teacher's architecture unless `overrides` change it, as in `model.depth=18`.
    The optimizer is LARS as in SimCLR v2's distillation, with temperature 0.1 for a student of the
    teacher's architecture and 1 for another.

    Args:
      teacher: the workdir of a run with a classifier.
      overrides: strings `a.b=VALUE`, as on the command line.

    Returns:
      The config, for `train_classifier`; a twentieth of its epochs is warmup.

    Raises:
      UserError: no run at `teacher`, or a bad override.
    """
    overrides = list(overrides)
    config = derived_config(teacher, {"epochs": 400.0})
    config.data.num_classes = config_at(teacher).data.num_classes  # those that it predicts
    config.method = "distill"
    config.distill.teacher = config.init_from.path
    config.distill.step, config.init_from.step = config.init_from.step, 0
    config.init_from.path = ""
    config.data.subset = 1.0
    config.optim.update(lr=0.1, lr_scaling="sqrt", weight_decay=1e-4)
    teacher_model = config.model
    config = apply_overrides(config, overrides)
    if not is_overridden(overrides, "distill.temperature"):
        keys = ("name", "depth", "width", "sk")
        alike = all(config.model[key] == teacher_model[key] for key in keys)
        config.distill.temperature = 0.1 if alike else 1.0
    if not is_overridden(overrides, "optim.warmup_epochs"):
        config.optim.warmup_epochs = config.epochs / 20
    return config


def distill(
    teacher: str | Path, workdir: str | Path, *, overrides: Iterable[str] = ()
) -> dict[str, Any]:
    """Trains a student of a run with a classifier, or resumes; see `distill_config`.

    Args:
      teacher: the workdir of the run with a classifier.
      workdir: of the student.
      overrides: strings `a.b=VALUE`.

    Returns:
      `classification_metrics` of the held-out images; {} where `train_classifier` has None.

    Raises:
      UserError: bad input.
    """
    return train_classifier(distill_config(teacher, overrides), workdir)[1] or {}
