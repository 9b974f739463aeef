"""What a run is built from: devices, data, schedule and train step."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Int, Int8
from ml_collections import ConfigDict

from ssl_jax.config import from_json, require_fitting_range, run_schedule, to_json
from ssl_jax.data.index import Index
from ssl_jax.data.labels import targets_of
from ssl_jax.data.registry import Images
from ssl_jax.data.sources import Source, bits_of, labeled, make_sources
from ssl_jax.errors import UserError
from ssl_jax.interop.initial_weights import resolve_initial_weights
from ssl_jax.methods import method_class
from ssl_jax.methods.base import Method
from ssl_jax.run.wandb import require_wandb
from ssl_jax.spmd import make_spmd
from ssl_jax.step import Program


class Setup:
    """A config on these devices and this data; nothing is written yet.

    Attributes:
      rows: indices of the global batch that belong to this process's devices.
      watched: options of `CollapseDetector`.
      derived: recorded in the run's folder, as it depends on devices and method.
    """

    def __init__(
        self,
        config: ConfigDict,
        started: ConfigDict | None = None,
        train: Source | Images | None = None,
        test: Source | Images | None = None,
    ) -> None:
        """Builds everything; compiles nothing.

        Args:
          config: of the run, validated.
          started: config of the run that is resumed, if any.
          train: see `pretrain`.
          test: see `pretrain`.

        Raises:
          UserError: the config can't run on these devices or this data.
        """
        require_wandb(config.wandb)
        options: Any = jax.config
        if options.jax_enable_x64:
            raise UserError(
                "JAX_ENABLE_X64 is on, but runs compute in config.dtype and float32. Unset the "
                "variable, or call jax.config.update('jax_enable_x64', False)."
            )
        self.spmd = make_spmd(
            config.spmd, batch_size=config.batch_size, microbatch=config.microbatch
        )
        self.train, self.test = make_sources(config, train, test)
        _require_one_label(config, self.train)
        # TFDS's labels are inside the records, all of which would be read; the loss of `supervised`
        # leaves out images without a label by itself.
        masked = (config.method, config.data.name) == ("supervised", "tfds")
        kind = method_class(config.method)
        if kind.needs_labels and self.train.num_classes and not (masked or kind.keeps_unlabeled):
            self.train = labeled(self.train)
        self.config = config = resolve(config, self.train, started)
        self.schedule = run_schedule(config, self.train.num_examples)
        self.index = Index(self.train.num_examples, config.batch_size, config.seed)
        self.rows = self.spmd.local_indices(config.batch_size)
        self.program = Program(config, self.schedule, self.spmd)
        self.method = self.program.method
        several = self.method.takes_targets and targets_of(self.train) is not None
        self._targets = _targets_by_id(self.train) if several else None
        _require_fitting_labels(config, self.method, self.train, self.test)
        optim = config.optim
        # A loss may start at its value for constant outputs and leave it as the rate warms up.
        patience = max(self.schedule.every(max(1.0, optim.warmup_epochs)), optim.frozen_steps)
        self.watched = {"trivial_loss": self.method.trivial_loss, "patience": patience}
        self.derived = {"batchnorm_images": self.program.batchnorm_images, **self.watched}
        if self.method.custom_encoder:
            self.derived["encoder"] = self.method.custom_encoder

    def place_batch(self, batch: dict[str, Any]) -> Any:
        """Puts a batch of the source on the devices, with its targets if the method takes them."""
        if self._targets is not None:
            batch = {**batch, "label": self._targets(batch["id"])}
        return self.spmd.place_batch(batch)


def _require_fitting_labels(
    config: ConfigDict, method: Method, train: Source, test: Source | None
) -> None:
    """Refuses images without the labels that a method needs, and more classes than it has."""
    targets = targets_of(train) if method.takes_targets else None
    if method.needs_labels and targets is None and train.num_classes == 0:
        raise UserError(
            f"config.method is '{config.method}', but the training images have no labels. Use "
            "a folder with one subfolder per class."
        )
    classes = test.num_classes if test else 0
    if method.classifies and classes > config.data.num_classes:
        raise UserError(
            f"The held-out images are of {classes} classes, but the classifier has "
            f"{config.data.num_classes}. Use two splits of one dataset."
        )


def _targets_by_id(
    source: Source,
) -> Callable[[Int[np.ndarray, " n"]], Int8[np.ndarray, "n c"]]:
    """A function from ids to `Targets.values` of a source whose images have several labels each."""
    known: tuple[int, Any] = (-1, None)

    def of(ids: Int[np.ndarray, " n"]) -> Int8[np.ndarray, "n c"]:
        nonlocal known
        if known[0] != len(source.bad):  # an unreadable image has the labels of its replacement
            bad, targets = len(source.bad), targets_of(source)
            assert targets is not None
            known = bad, targets.values
        rows: np.ndarray = known[1][ids]
        return rows

    return of


def _require_one_label(config: ConfigDict, train: Source) -> None:
    """Refuses images of several classes for a method whose loss needs one class per image."""
    method = method_class(config.method)
    needs_one = method.needs_labels and not method.takes_targets
    needs_one |= config.method == "distill" and config.distill.labels > 0
    if needs_one and targets_of(train):
        raise UserError(
            f"config.method is '{config.method}', but the training images have several labels "
            "each, and its loss needs one class per image. Give one label per image, or train on "
            "several with the method 'supervised' or `ssl-jax finetune`."
        )


def resolve(config: ConfigDict, train: Source, started: ConfigDict | None = None) -> ConfigDict:
    """A copy of the config, completed from the data and from the runs that give initial weights.

    Args:
      config: of the run.
      train: the training data.
      started: see `Setup`.

    Raises:
      UserError: more classes than `config.data.num_classes`, or no such weights.
    """
    config = from_json(to_json(config))
    config.data.bits = config.data.bits or bits_of(train)
    require_fitting_range(config)
    _resolve_classes(config, train)
    resolve_initial_weights(config, started)
    return config


def _resolve_classes(config: ConfigDict, train: Source) -> None:
    """Sets the number of classes, and whether the classifier has a sigmoid for each."""
    targets = targets_of(train) if method_class(config.method).takes_targets else None
    classes = train.num_classes if targets is None else len(targets.names)
    given = config.data.num_classes
    if classes > given > 0 or targets is not None and given not in (0, classes):
        raise UserError(
            f"config.data.num_classes is {given}, but the training images are of {classes} "
            f"classes. Set it to {classes}, or to 0."
        )
    config.data.num_classes = given or classes
    if targets is not None:
        config.supervised.sigmoid = True
    elif config.supervised.sigmoid:
        raise UserError(
            "config.supervised.sigmoid is True, but only a classifier of images with several "
            "labels each has a sigmoid per class, and is given it. Leave the key out."
        )
